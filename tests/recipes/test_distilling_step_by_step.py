"""Distilling step-by-step: the card's exact checks, mistakes, the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from table import Row
from torch import nn

from stillhouse import load
from stillhouse.cli import invoke
from stillhouse.data import Arrays
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.recipes.distilling_step_by_step import digits, experiment, rationales
from stillhouse.recipes.distilling_step_by_step.config import PHRASE
from stillhouse.recipes.distilling_step_by_step.recipe import Config, StepByStep, distill, make_views
from stillhouse.system import Clock
from stillhouse.text import KINDS, Codec, Example, Task, Views, gru_spec, small_tokenizer, t5_spec
from stillhouse.text import load as load_text
from stillhouse.text.encoding import vocabulary_texts

NAME = "distilling_step_by_step"
T5 = {"model": "T5ForConditionalGeneration"}
_SGD = {"optimizer": "sgd", "lr": 0.5, "eval_every": 0, "steps": 5}

ROWS = [
    Row(NAME, "t5", {}, T5),
    Row(NAME, "teacher's labels, last weights", {"label_type": "llm", "eval_every": 0}),
    Row(NAME, "labels alone", {"model_type": "standard"}),
    Row(NAME, "one target", {"model_type": "single_task", "max_target": 20}),
    Row(NAME, "lora", {"lora": 2}, T5),
    Row(NAME, "micro", {}, micro_batch=2),
]
_PLAIN = Row(NAME, "labels alone with the prefix", {"model_type": "standard", "plain_prefix": True})
ZERO = [
    (Row(NAME, "alpha 1", {"alpha": 1.0}), _PLAIN),
    (
        Row(NAME, "t5, alpha 1", {"alpha": 1.0}, T5),
        Row(NAME, "t5, labels alone with the prefix", _PLAIN.changes, T5),
    ),
]
# Rationales have 3 to 8 tokens here: a mean over each process's own tokens would not give the joint batch's.
JOINT = [
    Row(NAME, "sgd", _SGD),
    Row(NAME, "sgd, uneven", {**_SGD, "batch": 5}),
    Row(NAME, "sgd, t5", _SGD, T5),
]

EXAMPLES = [
    Example("a b", "x", "because a b so x", "x"),
    Example("b", "y", "so y", "y"),
    Example("a a a b", "x", "because", "y"),
    Example("b a", "y", "", ""),
]
TASK = Task("letters", EXAMPLES, [], EXAMPLES[:2])


def tokenizer():
    return small_tokenizer(vocabulary_texts([EXAMPLES], {"a": "predict: ", "b": "explain: ", "c": PHRASE}))


def student(which="gru", seed=0):
    words = tokenizer()
    spec = gru_spec(len(words), 8) if which == "gru" else t5_spec("T5ForConditionalGeneration", len(words), 8, 1, 2)
    return spec.build(seed=seed).double(), words, spec


def batch_of(cfg, examples=EXAMPLES, which="gru"):
    model, words, _ = student(which)
    views = make_views(Codec.of(model, words), examples, cfg)
    return model, Views(views, len(examples)).batch(Clock(steps_per_epoch=1))


def gradients(system, batch):
    system.zero_grad()
    system.learn(batch, Clock()).total.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in system.moved]


# -- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["gru", "t5"])
def test_each_loss_is_the_mean_over_its_own_tokens(which):
    """By hand: −log p of every target token and end token of a view, divided by their number; then α and 1 − α."""
    cfg = Config(alpha=0.3)
    model, batch = batch_of(cfg, which=which)
    terms = StepByStep(model, cfg).learn(batch, Clock()).terms
    for name, weight in (("predict", 0.3), ("explain", 0.7)):
        view, total, count = batch[name], 0.0, 0
        for i in range(len(EXAMPLES)):
            real = view["labels"][i][view["labels"][i] != -100]
            n, t = int(view["attention_mask"][i].sum()), len(real)
            out = model(
                input_ids=view["input_ids"][i : i + 1, :n],
                attention_mask=view["attention_mask"][i : i + 1, :n],
                decoder_input_ids=view["decoder_input_ids"][i : i + 1, :t],
            )
            logits = out if isinstance(out, torch.Tensor) else out.logits
            total -= logits[0].log_softmax(-1)[torch.arange(t), real].sum()
            count += t
        assert torch.allclose(terms[name], weight * total / count, atol=1e-10)
    assert batch["explain"]["tokens"][0] == 6 + 3 + 2 + 1  # words and end tokens


def test_alpha_zero_leaves_the_label_loss_out_of_the_gradient():
    """Other labels, same gradient; and with α = ½ another one."""
    others = [replace(e, label="x" if e.label == "y" else "y") for e in EXAMPLES]
    for alpha, same in ((0.0, True), (0.5, False)):
        cfg = Config(alpha=alpha)
        model, batch = batch_of(cfg)
        a = gradients(StepByStep(model, cfg), batch)
        b = gradients(StepByStep(model, cfg), batch_of(cfg, others)[1])
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) == same


class Constant(nn.Module):
    """Logits that are one vector wherever they are: linear in its only parameter."""

    def __init__(self, vocabulary):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, vocabulary, dtype=torch.float64))

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        return self.w.expand(*decoder_input_ids.shape, -1)


def test_longer_rationales_do_not_take_weight_from_the_labels():
    """r → r r: L_rationale changes, what the labels add to the gradient stays α ∂L_label exactly."""
    cfg = Config(alpha=0.3)
    words = tokenizer()
    model, codec = Constant(len(words)), Codec(words, 0)
    found = []
    for examples in (EXAMPLES, [replace(e, rationale=f"{e.rationale} {e.rationale}") for e in EXAMPLES]):
        batch = Views(make_views(codec, examples, cfg), 4).batch(Clock(steps_per_epoch=1))
        both = gradients(StepByStep(model, cfg), batch)[0]
        system = StepByStep(model, cfg)
        reasons = torch.autograd.grad(system.loss(batch["explain"]).mean(), model.w)[0]
        labels = torch.autograd.grad(system.loss(batch["predict"]).mean(), model.w)[0]
        found.append((system.loss(batch["explain"]).mean().item(), both - 0.7 * reasons, labels))
    assert abs(found[0][0] - found[1][0]) > 1e-3
    for _, part, labels in found:
        assert torch.allclose(part, 0.3 * labels, atol=1e-15)
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("which", ["gru", "t5"])
def test_padding_of_the_targets_changes_nothing(which):
    cfg = Config()
    model, batch = batch_of(cfg, which=which)
    system = StepByStep(model, cfg)
    for view in (batch["predict"], batch["explain"]):
        more = {**view, "labels": nn.functional.pad(view["labels"], (0, 10), value=-100)}
        more["decoder_input_ids"] = nn.functional.pad(view["decoder_input_ids"], (0, 10), value=0)
        assert torch.allclose(system.loss(more), system.loss(view), atol=1e-12)


def test_micro_batches_of_unequal_lengths_give_the_gradient_of_the_whole():
    cfg = Config(alpha=0.4)
    model, batch = batch_of(cfg)
    system = StepByStep(model, cfg)
    whole = gradients(system, batch)

    def part(a, b):
        views = {v: {k: t[a:b] for k, t in batch[v].items()} for v in ("predict", "explain")}
        return gradients(system, views)

    pieces = [(part(0, 1), 1), (part(1, 4), 3)]
    for i, g in enumerate(whole):
        assert torch.allclose(sum(n * p[i] for p, n in pieces) / 4, g, atol=1e-14)


# -- arms, labels, selection -----------------------------------------------------------------------------------------


def test_the_arms_of_the_released_script():
    def asked(**settings):
        cfg = Config(**settings)
        views = make_views(Codec(tokenizer(), 0), EXAMPLES, cfg)
        words = Codec(tokenizer(), 0)
        return {k: list(zip(words.decode(v.inputs), words.decode(v.targets), strict=True)) for k, v in views.items()}

    both = asked()
    assert both["predict"][2] == ("predict: a a a b", "x") and both["explain"][2] == ("explain: a a a b", "because")
    assert asked(label_type="llm")["predict"][2] == ("predict: a a a b", "y")
    assert asked(label_type="llm")["explain"] == both["explain"]
    assert asked(model_type="standard") == {"predict": [(e.input, e.label) for e in EXAMPLES]}
    assert asked(model_type="standard", plain_prefix=True) == {"predict": both["predict"]}
    assert both["explain"][3] == ("explain: b a", "")  # not parsed, kept
    one = asked(model_type="single_task")["predict"][1]
    assert one[0] == "b" and one[1].startswith("so y ") and one[1].endswith(" y")


def test_the_best_weights_on_valid_are_the_outcome():
    model = nn.Linear(1, 1)
    system = StepByStep(model, Config(), select=True)
    for value, accuracy, nll in ((1.0, 0.3, 2.0), (2.0, 0.6, 2.0), (3.0, 0.6, 1.5), (4.0, 0.6, 1.5), (5.0, 0.5, 0.1)):
        nn.init.constant_(model.weight, value)
        system.offer(accuracy, nll)
    assert system.outcome().weight.item() == 3.0
    last = StepByStep(model, Config())
    nn.init.constant_(model.weight, 9.0)
    assert last.outcome().weight.item() == 9.0


def small_run(folder, task=TASK, **settings):
    model, words, spec = student()
    cfg = Config(**{"steps": 3, "lr": 1e-2, "batch": 4, "max_generated": 6, "eval_every": 1, **settings})
    return distill(Run(folder, device="cpu", quiet=True), task, model.float(), words, cfg, spec)


def test_valid_is_judged_every_so_many_steps_and_at_the_end(tmp_path):
    made = small_run(tmp_path, replace(TASK, valid=EXAMPLES[:2]), steps=5, eval_every=2)
    assert [row["step"] for row in made.logs if "valid_accuracy" in row] == [1, 3, 4]
    last = small_run(tmp_path / "last", replace(TASK, valid=EXAMPLES[:2]), steps=5, eval_every=0)
    assert not any("valid_accuracy" in row for row in last.logs)


def test_inference_and_selection_never_read_rationales(tmp_path):
    """Rationales of valid and test replaced by noise: same student, same answers, bit for bit."""
    noise = [replace(e, rationale="a b " * k, taught="noise") for k, e in enumerate(EXAMPLES)]
    tasks = [replace(TASK, valid=part, test=part) for part in (EXAMPLES, noise)]
    made = [small_run(tmp_path / str(i), t) for i, t in enumerate(tasks)]
    a, b = (m["student"].model.state_dict() for m in made)
    assert all(torch.equal(a[k], b[k]) for k in a)
    said = [m.answerer("student").examples(t.test) for m, t in zip(made, tasks, strict=True)]
    assert said[0] == said[1]


@pytest.mark.parametrize("settings", [{}, {"model_type": "single_task"}], ids=["two tasks", "one target"])
def test_it_learns_its_examples_and_answers_from_its_folder_alone(tmp_path, settings):
    task = Task("letters", EXAMPLES[:2], [], EXAMPLES[:2])
    made = small_run(tmp_path / "run", task, steps=150, lr=2e-2, batch=2, max_target=20, **settings)
    made.save(tmp_path)
    again = load_text(tmp_path / "students" / "student")
    assert again.answer(["a b", "b"]) == ["x", "y"] == made.answerer("student").examples(task.test)
    if settings:
        with pytest.raises(UserError, match="no rationales"):
            again.explain(["a b"])
    else:
        assert again.explain(["a b", "b"]) == ["because a b so x", "so y"]
    assert type(load(tmp_path / "students" / "student")).__name__ == "GRUSeq2Seq"


def test_a_student_of_transformers_is_a_folder_of_transformers(tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    run = Run(tmp_path / "run", device="cpu", quiet=True)
    made = experiment.tiny(run, experiment.TINY, "T5ForConditionalGeneration")
    made.save(tmp_path)
    folder = str(tmp_path / "students" / "student")
    theirs, ours = AutoModelForSeq2SeqLM.from_pretrained(folder), made["student"].model
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.state_dict().items())
    words = AutoTokenizer.from_pretrained(folder)
    assert words("predict: 1 plus 3").input_ids == made.tokenizer("predict: 1 plus 3").input_ids


def test_lora_moves_adapters_alone_and_leaves_a_plain_model(tmp_path):
    run = Run(tmp_path, device="cpu", quiet=True)
    before = experiment.tiny(
        Run(tmp_path / "0", device="cpu", quiet=True), replace(experiment.TINY, lr=1e-30), T5["model"]
    )
    after = experiment.tiny(run, replace(experiment.TINY, lora=2, lr=0.1, eval_every=0), T5["model"])
    a, b = (m["student"].model.state_dict() for m in (before, after))
    assert a.keys() == b.keys()
    moved = {k.split(".")[-2] for k in a if not torch.allclose(a[k], b[k], atol=1e-6)}
    assert moved == {"q", "v"}


# -- the built-in experiments ----------------------------------------------------------------------------------------


def test_patches_are_the_squares_of_the_image():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    seen = digits.patches(image)
    assert seen.shape == (1, 16, 4)
    assert seen[0, 5].tolist() == [image[0, 0, 2 + i, 2 + j].item() for i in range(2) for j in range(2)]


def test_the_teacher_says_what_it_sees_with_its_errors():
    class Wrong(nn.Module):  # takes every digit for its successor, and has the digit itself as its second guess
        def forward(self, x):
            d = x[:, 0, 0, 0].long()
            return 2.0 * nn.functional.one_hot((d + 1) % 10, 10) + nn.functional.one_hot(d, 10)

    ten = Arrays(
        np.arange(10, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 8, 8), np.float32), np.arange(10)
    )
    assert all(not e.rationale and not e.taught for e in digits.examples(ten, None))
    for d, e in enumerate(digits.examples(ten, Wrong())):
        assert e.rationale == f"it is {digits.WORDS[(d + 1) % 10]} maybe {digits.WORDS[d]}"
        assert e.label == digits.parity(d) != e.taught


def test_training_sets_of_one_seed_lie_inside_one_another():
    rows = [Example(str(i), "x", f"r{i}") for i in range(20)]
    task = Task("t", rows, [], rows)
    small, large = digits.part(task, 5, 3, False), digits.part(task, 10, 3, False)
    assert small.train == large.train[:5]
    mixed = digits.part(task, 10, 3, True)
    assert [e.input for e in mixed.train] == [e.input for e in large.train] and mixed.train != large.train


def test_numbers_are_masked_and_restored():
    question = "Ann has 1,200 apples and 3 pears, Bob 3.0 and 45.5."
    known = rationales.numbers(question)
    assert known == [1200.0, 3.0, 45.5]
    assert rationales.masked(question, known, "NUM") == "Ann has N1 apples and N2 pears , Bob N2 and N3 ."
    assert rationales.masked("so 1200 - 3 = 1197.", known, "NUM") == "so N1 - N2 = NUM ."
    label = rationales.masked("( 1200.0 - 7.0 )", known, None)
    assert label == "( N1 - 7.0 )" and rationales.restored(label, known) == "( 1200.0 - 7.0 )"
    plain = [Example(question, "( 1200.0 - 3.0 )", value=1197.0)]
    assert rationales.accuracy(["( N1 - N2 )"], plain) == 1.0 and rationales.accuracy(["( N1 - N9 )"], plain) == 0.0
    assert rationales.mask(replace(plain[0], rationale="word " * 60)).rationale.count("word") == rationales.LONGEST


@pytest.mark.data
def test_masking_keeps_the_value_of_the_labels(data_root):
    from stillhouse.text import open_task

    task = open_task("svamp")
    labels = [rationales.mask(e).label for e in task.test]
    assert rationales.accuracy(labels, task.test) == 1.0 and sum("N1" in str(x) for x in labels) > 150


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"explain": "predict: "}, "different prefixes"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(UserError, match=said):
        Config(**settings)


def test_zero_stands_for_the_published_numbers():
    published, scratch = Config().settled(), Config(steps=7).settled(scratch=True)
    assert (published.steps, published.batch, published.lr, published.alpha) == (10_000, 64, 5e-5, 0.5)
    assert (scratch.steps, scratch.lr) == (7, 2e-3)


def test_t5_in_half_precision_is_refused(tmp_path):
    model, words, spec = student("t5")
    with pytest.raises(UserError, match="T5 overflows in fp16"):
        distill(Run(tmp_path, device="cpu", precision="fp16"), TASK, model, words, Config(steps=1), spec)


def test_adapters_need_layers_that_are_known(tmp_path):
    with pytest.raises(UserError, match="takes no LoRA adapters"):
        small_run(tmp_path, lora=2)


def test_the_phrase_before_an_answer_must_be_in_the_vocabulary(tmp_path):
    model, words, spec = *student()[:1], small_tokenizer(["a b x y"]), None
    with pytest.raises(UserError, match="tokenizer cannot write 'So the answer is'"):
        distill(Run(tmp_path, device="cpu"), TASK, model, words, Config(model_type="single_task"), spec)


def test_training_without_gold_labels_names_the_way_out(tmp_path):
    rows = [replace(e, label=None, where=f"f:{i}") for i, e in enumerate(EXAMPLES)]
    with pytest.raises(UserError, match=r"f:0 has no gold 'label'.*--label-type llm"):
        small_run(tmp_path, replace(TASK, train=rows))
    small_run(tmp_path / "llm", replace(TASK, train=rows), label_type="llm")


def said_of(capsys, *flags):
    code = invoke(["run", NAME, "--device", "cpu", "--quiet", *map(str, flags)])
    return code, capsys.readouterr().err.strip()


def lines(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


ROW = {"input": "one two three four", "label": "yes", "rationale": "since two"}


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ([ROW, "{"], (), "mine.jsonl:2 is no JSON"),
        ([{k: v for k, v in ROW.items() if k != "rationale"}] * 30, (), "mine.jsonl:1 has neither 'rationale'"),
        ([{**ROW, "input": ""}] * 30, (), "has no text in 'input'"),
        ([""], (), "is empty"),
        ([ROW] * 30, ("--max-input", 4, "--too-long", "stop"), r"mine.jsonl:\d+: 6 tokens, 2 more than the 4 allowed"),
        ([ROW] * 30, ("--max-input", 2, "--predict", "one two three "), "the prefix 'one two three ' has 4 tokens"),
        ([ROW] * 30, ("--task", "svanp"), "did you mean 'svamp'"),
        ([ROW] * 30, ("--model", "transformers:BertModel"), "cannot be sized"),
        ([ROW] * 30, ("--model", "hf:./nowhere"), "no folder ./nowhere"),
        ([ROW] * 30, ("--alpha", 2), "alpha must lie in"),
    ],
)
def test_one_line_and_exit_code_2(tmp_path, capsys, rows, flags, said):
    import re

    flags = ("--data", lines(tmp_path / "mine.jsonl", rows), "--model", "gru", "--width", 8, *flags)
    code, line = said_of(capsys, *flags, "--steps", 1, "--out", tmp_path / "out")
    assert code == 2 and "\n" not in line and re.search(said, line), line


def test_a_model_needs_data_and_names_are_guessed(tmp_path, capsys):
    code, line = said_of(capsys, "--model", "gru", "--out", tmp_path / "a")
    assert code == 2 and "needs --data" in line
    code, line = said_of(capsys, "--data", "svamq", "--out", tmp_path / "b")
    assert code == 2 and "did you mean 'svamp'" in line


# -- the command on a task of one's own ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gru", "transformers:T5ForConditionalGeneration"])
def test_a_file_of_raw_completions_becomes_a_student(tmp_path, capsys, model):
    rows = []
    for i in range(40):
        good = f"There are {i} and 2. The answer is ({i} + 2).\n\nQ: next"
        raw = good if i % 10 else "I do not know."
        rows.append({"input": f"{i} and 2 " + "long " * (i % 3), "label": f"( {i}.0 + 2.0 )", "raw": raw})
    path, out = lines(tmp_path / "mine.jsonl", rows), tmp_path / "out"
    flags = ("--data", path, "--task", "svamp", "--model", model, "--width", 16, "--layers", 1, "--max-input", 6)
    code, line = said_of(capsys, *flags, "--steps", 4, "--batch", 8, "--max-generated", 8, "--out", out)
    assert code == 0, line
    report = json.loads((out / "report.json").read_text())
    table = next(t for t in report["tables"] if t["title"].startswith("Teacher's outputs"))
    assert sum(r[1] for r in table["rows"]) == 40 and sum(r[2] for r in table["rows"]) == 4
    assert sum(r[4] for r in table["rows"]) == 36  # the teacher's equation is right where there is one
    assert any("longer than 6 tokens and were cut" in n for n in report["notes"])
    assert {"accuracy", "nll", "bytes"} <= report["students"][0]["metrics"].keys()
    assert any("decoded rationale" in t["columns"] for t in report["tables"])
    assert len(load_text(out / "students" / "student").answer(["3 and 2"])) == 1


def test_a_function_gives_model_and_tokenizer(tmp_path, capsys, monkeypatch):
    (tmp_path / "mymodel.py").write_text(
        "from stillhouse.text import small_tokenizer, t5_spec\n"
        "def make():\n"
        "    words = small_tokenizer(['predict: explain: one two three four yes since'])\n"
        "    return t5_spec('T5ForConditionalGeneration', len(words), 8, 1, 2).build(), words\n"
        "def alone(): return make()[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ("--data", lines(tmp_path / "mine.jsonl", [ROW] * 30), "--steps", 2, "--batch", 4, "--lr", 1e-3)
    code, line = said_of(capsys, *flags, "--model", "mymodel:make", "--out", tmp_path / "out")
    assert code == 0, line
    assert load_text(tmp_path / "out" / "students" / "student").codec.max_input == 1024
    code, line = said_of(capsys, *flags, "--model", "mymodel:alone", "--out", tmp_path / "other")
    assert code == 2 and "return (model, tokenizer)" in line


def test_kinds_of_the_card_are_all_there():
    assert {"cqa", "svamp", "asdiv", "esnli", "anli1"} < set(KINDS)
