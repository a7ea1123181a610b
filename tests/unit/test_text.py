"""Text: the masked reduction, safe arithmetic, parsers, tasks, tokenizers, views, models that answer."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse import text
from stillhouse.errors import UserError
from stillhouse.objectives import token_cross_entropy, token_mean, tokens_per_sequence
from stillhouse.system import Clock
from stillhouse.text import KINDS, Codec, Example, Task, View, Views, evaluate, open_task, parse_report, small_tokenizer
from stillhouse.text.gru import GRUSeq2Seq
from stillhouse.text.seq2seq import behind_phrase, own_model, pretrained
from stillhouse.text.views import shifted_right

D = torch.float64

# -- the masked reduction --------------------------------------------------------------------------------------------


def test_cross_entropy_per_token_by_hand():
    z = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0]]], dtype=D)
    assert torch.allclose(
        token_cross_entropy(z, torch.tensor([[1, 0]])), torch.tensor([[math.log(4 / 3), math.log(5 / 4)]], dtype=D)
    )
    assert token_cross_entropy(z, torch.tensor([[1, -100]]))[0, 1] == 0
    shifted = token_cross_entropy(z, torch.tensor([[-100, 1]]), shift=1)
    assert torch.allclose(shifted, torch.tensor([[math.log(4 / 3), 0]], dtype=D))


def test_the_three_normalisers_in_closed_form():
    v = torch.tensor([[1.0, 2.0, 100.0], [5.0, 100.0, 100.0]], dtype=D)
    m = torch.tensor([[True, True, False], [True, False, False]])
    assert token_mean(v, m).tolist() == [1.5, 5.0]
    assert token_mean(v, m, tokens_per_sequence(m)).mean().item() == pytest.approx(8 / 3, abs=1e-15)
    assert token_mean(v, m, 4.0).tolist() == [0.75, 1.25]
    assert token_mean(v, torch.zeros_like(m)).tolist() == [0.0, 0.0]


def test_parts_of_a_global_batch_add_up_to_its_token_mean_and_means_of_parts_do_not():
    g = torch.Generator().manual_seed(0)
    v = torch.rand(5, 7, generator=g, dtype=D)
    lengths = torch.tensor([7, 1, 3, 1, 2])
    m = torch.arange(7) < lengths[:, None]
    c = tokens_per_sequence(m).expand(5)
    whole = v[m].mean()
    parts = [(token_mean(v[a:b], m[a:b], c[a:b]).mean(), b - a) for a, b in ((0, 2), (2, 5))]
    assert torch.allclose(sum(x * n for x, n in parts) / 5, whole, atol=1e-15)
    local = sum(v[a:b][m[a:b]].mean() * (b - a) for a, b in ((0, 2), (2, 5))) / 5
    assert (local - whole).abs() > 1e-2


def test_what_is_masked_has_no_gradient_even_if_it_is_not_a_number():
    v = torch.tensor([[1.0, float("nan")]], dtype=D, requires_grad=True)
    loss = token_mean(v, torch.tensor([[1, 0]])).sum()
    loss.backward()
    assert loss.item() == 1.0 and v.grad.tolist() == [[1.0, 0.0]]


def test_a_shift_pairs_values_with_the_tokens_behind_them():
    v, m = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 0, 1]])
    assert token_mean(v, m, 1.0, shift=1).tolist() == [2.0]  # the value at 1 speaks of token 2; token 0 has none
    assert tokens_per_sequence(m, shift=1).item() == 1.0
    prompt = torch.tensor([[-100, -100, 3, 4]])
    z = torch.randn(1, 4, 6, dtype=D, generator=torch.Generator().manual_seed(1))
    mine = token_mean(token_cross_entropy(z, prompt, shift=1), prompt != -100, shift=1)
    by_hand = -(z[0, 1].log_softmax(0)[3] + z[0, 2].log_softmax(0)[4]) / 2
    assert torch.allclose(mine[0], by_hand, atol=1e-14)


def test_mistakes_in_shapes_and_normalisers_are_named():
    v = torch.zeros(2, 3)
    for call, said in (
        (lambda: token_mean(v, torch.ones(2, 4)), r"\(2, 3\) and \(2, 4\)"),
        (lambda: token_mean(v, v, "global"), "'own'"),
        (lambda: token_mean(v, v, torch.ones(3)), "2 sequences"),
        (lambda: token_mean(v, v, 0.0), "positive"),
        (lambda: token_mean(v, v, shift=4), "0..3"),
        (lambda: token_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, 2)), "labels"),
    ):
        with pytest.raises(UserError, match=said):
            call()


# -- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("( 84.0 / 2.0 )", 42),
        ("-(3 - 5) * 2", 4),
        ("7 // 2 + 7 % 4", 6),
        ("2 ** 10", 1024),
        (" 1e3 ", 1000),
        ("((1))", 1),
    ],
)
def test_arithmetic_is_evaluated(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["x", "(3 + x)", "abs(-1)", "(1).real", "__import__('os').system('true')", "9**9**9", "2 ** 65", "1/0", "(7x = 14)",
     "(175, 5)", "(53 + 17) and (14 - 10)", "True", "'a' * 3", "1j", "[1]", "1 if 1 else 2", "lambda: 1", "~1",
     "1 << 9", "1e308 * 10", "(-8) ** 0.5", "", "1 + " * 200 + "1", "1 == 1", "0b1 @ 2"],
)  # fmt: skip
def test_everything_else_is_refused(expression):
    assert evaluate(expression) is None


def test_values_are_compared_with_a_tolerance():
    assert text.same_value(evaluate("0.1 + 0.2"), 0.3) and text.same_value(1e9 + 1, 1e9)
    assert not text.same_value(1.0, 1.01) and not text.same_value(None, None) and not text.same_value(1.0, None)


# -- parsers ---------------------------------------------------------------------------------------------------------

FORMS = {
    "cqa": ("It falls. So the answer is (e) gravity.\n\nQ: What? So the answer is (a) no.", ("It falls.", "gravity")),
    "svamp": ("84 / 2 = 42. The answer is ((84) / (2)).\n\nQ: x. The answer is (1)", ("84 / 2 = 42.", "((84) / (2))")),
    "asdiv": ("Two and two. The answer is (2 + 2).", ("Two and two.", "(2 + 2)")),
    "esnli": ("A man is a person. Answer: entailment\n\nPremise: next", ("A man is a person.", "entailment")),
    "anli1": ("He was born there. So the answer is yes.\nPremise: next", ("He was born there.", "yes")),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_completion_is_cut_and_split(name):
    raw, expected = FORMS[name]
    assert KINDS[name].parse(raw) == expected


@pytest.mark.parametrize("name", FORMS)
def test_a_malformed_completion_gives_an_empty_pair_and_is_counted(name):
    raw = "I do not know." + f"\n\n{KINDS[name].cut} {KINDS[name].phrase} (a) yes."  # the phrase only behind the cut
    assert KINDS[name].parse(raw) == ("", "")
    good, bad = ({"input": "i", "label": "x", "raw": r} for r in (FORMS[name][0], raw))
    made = [text.tasks.example(r, "here", KINDS[name]) for r in (good, bad)]
    found = parse_report(made, KINDS[name])
    assert found["rows"] == 2 and found["no_rationale"] == found["no_label"] == 1


def test_a_label_of_another_form_leaves_the_rationale():
    assert KINDS["svamp"].parse("So 3. The answer is three.") == ("So 3.", "")


def test_answers_are_judged_by_text_or_by_value():
    assert (
        KINDS["text"].right(" a  b ", "a b") and not KINDS["text"].right("", "") and not KINDS["text"].right("a", "b")
    )
    svamp = KINDS["svamp"]
    assert svamp.right("(4 / 2)", "( 2.0 )") and svamp.right("6 / 3", "nonsense", 2.0)
    assert not svamp.right("nonsense", "nonsense") and not svamp.right("import os", "( 1 )")


# -- tasks -----------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def row(i, **more):
    return {"input": f"question {i}", "label": f"l{i}", "rationale": f"because {i}", **more}


def test_a_file_is_split_the_same_way_every_time(tmp_path):
    path = write(tmp_path / "mine.jsonl", [row(i) for i in range(50)])
    a, b = open_task(path), open_task(f"jsonl:{path}")
    assert a == b and (len(a.train), len(a.valid), len(a.test)) == (41, 4, 5)
    ids = [e.input for part in (a.train, a.valid, a.test) for e in part]
    assert sorted(ids) == sorted(f"question {i}" for i in range(50))
    half = open_task(path, subsample=0.5)
    assert len(half.train) + len(half.valid) == round(0.5 * 45) and half.test == a.test


def test_a_folder_has_splits_and_pairs_and_compressed_files(tmp_path):
    write(tmp_path / "train.jsonl", [{"premise": "a", "hypothesis": "b", "label": "y", "raw": FORMS["esnli"][0]}])
    write(tmp_path / "valid.jsonl", [{"input": "v", "label": "y"}])
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as f:
        f.write(json.dumps({"input": "t", "label": "y"}) + "\n")
    task = open_task(str(tmp_path), "esnli")
    assert task.train[0].input == f"a{text.PAIR}b" and task.train[0].taught == "entailment"
    assert task.valid[0].rationale == "" and task.test[0].where.endswith("test.jsonl.gz:1")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(0), "{broken"], r"mine.jsonl:2 is no JSON"),
        ([row(0), {"inputs": "x", "label": "y", "rationale": ""}], r"mine.jsonl:2 has no 'input'.*mean 'inputs'"),
        ([row(0), {"input": "x", "label": "y"}], r"mine.jsonl:2 has neither 'rationale' nor 'raw'"),
        ([row(0), {"input": "x", "label": "y", "raw": "z"}], r"mine.jsonl:2 has a raw completion; .*--task"),
        ([row(0), row(1, label=3)], r"mine.jsonl:2: 'label' must be text, got 3"),
        ([row(0), "[1, 2]"], r"mine.jsonl:2 must be an object"),
        ([row(i, input="  ") for i in range(20)], r"mine.jsonl:\d+ has no text in 'input'"),
        ([row(0)], r"test: 0.1 of 1 rows is 0"),
        ([], r"mine.jsonl is empty"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(tmp_path, rows, said):
    with pytest.raises(UserError, match=said) as error:
        open_task(write(tmp_path / "mine.jsonl", rows))
    assert "\n" not in str(error.value)


def test_names_that_are_none(tmp_path, monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    path = write(tmp_path / "mine.jsonl", [row(i) for i in range(20)])
    for spec, kind, said in (
        ("svanp", None, "did you mean 'svamp'"),
        (path, "cqaa", "did you mean 'cqa'"),
        ("svamp", None, "STILLHOUSE_DATA"),
        ("svamp", "cqa", "own kind"),
        (str(tmp_path), None, "train.jsonl"),
        ("no.such:thing", None, "no module"),
    ):
        with pytest.raises(UserError, match=said):
            open_task(spec, kind)


def test_a_function_gives_rows_splits_or_a_task(tmp_path, monkeypatch):
    rows = [{"input": f"q{i}", "label": "y", "rationale": "r"} for i in range(20)]
    (tmp_path / "given.py").write_text(
        f"rows = {rows!r}\ndef flat(): return rows\ndef split(): return {{'train': rows[:9], 'test': rows[9:]}}\n"
        "def bad(): return 3\ndef broken(): return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    assert len(open_task("given:flat").test) == 2 and len(open_task("given:split").test) == 11
    with pytest.raises(UserError, match="returned int"):
        open_task("given:bad")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        open_task("given:broken")


def test_valid_and_test_need_gold_labels_and_training_examples_must_be_there():
    e = Example("q", None, "r", "y", where="f:1")
    with pytest.raises(UserError, match="f:1 has no 'label'"):
        Task("t", [e], [], [e])
    with pytest.raises(UserError, match="no train examples"):
        Task("t", [], [], [e])


def test_shuffling_moves_rationales_and_nothing_else():
    rows = [Example(f"q{i}", "y", f"r{i}") for i in range(30)]
    mixed = text.shuffled(rows, 1)
    assert [e.input for e in mixed] == [e.input for e in rows] and mixed == text.shuffled(rows, 1)
    assert sorted(e.rationale for e in mixed) == sorted(e.rationale for e in rows) != [e.rationale for e in mixed]


# -- real rationales -------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_svamp_as_the_card_counts_it(data_root):
    task = open_task("svamp")
    train = parse_report([*task.train, *task.valid], task.kind)
    test = parse_report(task.test, task.kind)
    assert (train["rows"], train["no_rationale"], train["right"]) == (800, 11, 585)
    assert (test["rows"], test["no_rationale"], test["right"]) == (200, 2, 148)
    assert (len(task.train), len(task.valid)) == (720, 80)


@pytest.mark.data
def test_parser_and_evaluator_agree_with_what_is_stored(data_root):
    for split in ("train", "test"):
        with gzip.open(data_root / f"rationales-svamp/{split}.jsonl.gz", "rt") as lines:
            for r in map(json.loads, lines):
                assert KINDS["svamp"].parse(r["llm_raw"]) == (r["llm_rationale"] or "", r["llm_equation"] or "")
                if r["llm_equation"] is not None:
                    value = evaluate(r["llm_equation"])
                    assert value is None if r["llm_answer"] is None else text.same_value(value, r["llm_answer"])


@pytest.mark.data
def test_cqa_as_the_card_counts_it(data_root):
    task = open_task("cqa")
    train, test = parse_report([*task.train, *task.valid], task.kind), parse_report(task.test, task.kind)
    assert (train["rows"], test["rows"]) == (9741, 1221)
    assert round(train["right"] / 9741, 3) == 0.743 and round(test["right"] / 1221, 3) == 0.772
    assert train["outside"] > 0 and "\n(e) " in task.test[0].input


# -- tokenizers, budgets ---------------------------------------------------------------------------------------------


def words(*more, level="word"):
    return small_tokenizer(["predict: explain: a b c d e because so (1 / 2)", *more], level)


@pytest.mark.parametrize("level", ["word", "char"])
def test_small_tokenizers_give_back_what_they_read(level, tmp_path):
    made = words("naïve 東京 x", level=level)
    codec = Codec(made, 0)
    for said in ("a b because", "(1 / 2)", "naïve 東京"):
        ids = codec.targets([said])[0]
        assert ids[-1] == codec.eos == 1 and codec.decode([ids]) == [said]
    assert codec.targets([""]) == [[1]] and made("zzz")["input_ids"][0] == 2
    made.save_pretrained(tmp_path)
    import transformers

    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert again("a b because")["input_ids"] == made("a b because")["input_ids"]
    assert words("naïve 東京 x", level=level).get_vocab() == made.get_vocab()


def test_minus_100_and_padding_are_not_decoded():
    made = words()
    a = made("a")["input_ids"][0]
    assert Codec(made, 0).decode([[a, 1, -100, -100], [a, a, 1, 0]]) == ["a", "a a"]


def test_a_pair_is_joined_by_the_end_token():
    codec = Codec(words(), 0)
    a, b = (words()(t)["input_ids"][0] for t in "ab")
    assert codec.inputs([f"a{text.PAIR}b"])[0] == [a, 1, b, 1]


def test_cutting_spares_the_prefix_and_is_counted():
    codec = Codec(words(), 0, max_input=4, max_target=2)
    p, a, b = (words()(t)["input_ids"][0] for t in ("predict:", "a", "b"))
    ids = codec.inputs(["a b c d e", "a"], "predict: ", ["f:1", "f:2"], "inputs")
    assert ids == [[p, a, b, 1], [p, a, 1]]
    assert codec.notes() == ["1 of 2 inputs are longer than 4 tokens and were cut; the longest, f:1, by 3"]
    with pytest.raises(UserError, match="prefix 'a b c d e' has 6 tokens"):
        codec.inputs(["a"], "a b c d e")
    strict = Codec(words(), 0, max_input=4, strict=True)
    with pytest.raises(UserError, match="f:1: 7 tokens, 3 more than the 4 allowed for inputs"):
        strict.inputs(["a b c d e", "a"], "predict: ", ["f:1", "f:2"], "inputs")


def test_tokenizers_and_models_that_do_not_fit():
    with pytest.raises(UserError, match="all texts are empty"):
        small_tokenizer(["", " "])
    with pytest.raises(UserError, match="decoder_start_token_id"):
        Codec.of(nn.Linear(2, 2), words())
    with pytest.raises(UserError, match="do not belong together"):
        Codec.of(GRUSeq2Seq(3, 4), words())


# -- views -----------------------------------------------------------------------------------------------------------


def a_view(n=7, tensors=None):
    rng = np.random.default_rng(0)
    inputs, targets = ([[*rng.integers(3, 9, rng.integers(1, 6)).tolist(), 1] for _ in range(n)] for _ in range(2))
    return View(inputs, targets, 0, 0, tensors or {})


def test_decoders_are_fed_the_targets_one_later():
    assert shifted_right(torch.tensor([[5, 6, 1], [7, 1, -100]]), 9, 0).tolist() == [[9, 5, 6], [9, 7, 1]]


def test_a_batch_pads_to_and_counts_the_global_batch_on_every_rank():
    view = a_view(7, {"x": torch.arange(7.0)})
    source = Views({"predict": view}, 5)
    whole = source.batch(Clock(seed=3, steps_per_epoch=1))
    parts = [source.batch(Clock(seed=3, steps_per_epoch=1, rank=r, world=2)) for r in range(2)]
    for key in whole["predict"]:
        assert torch.equal(torch.cat([p["predict"][key] for p in parts]), whole["predict"][key]), key
    one = whole["predict"]
    assert torch.equal(one["tokens"], torch.full((5,), int((one["labels"] != -100).sum())))
    assert torch.equal(one["attention_mask"].bool(), one["input_ids"] != 0)
    assert one["x"].tolist() == whole["id"].tolist()


def test_views_of_one_step_are_of_the_same_examples_in_the_order_of_batches():
    from stillhouse.data import Arrays, Batches

    view, clock = a_view(20), Clock(seed=1, step=3, steps_per_epoch=2)
    both = Views({"a": view, "b": view}, 8).batch(clock)
    assert torch.equal(both["a"]["labels"], both["b"]["labels"])
    plain = Batches(Arrays(np.zeros((20, 1)), np.arange(20) % 2), 8).batch(clock)
    assert torch.equal(both["id"], plain["id"])


def test_other_texts_give_another_fingerprint_and_unequal_views_are_refused():
    a, b = a_view(7), a_view(7)
    b.targets[3][0] += 1
    assert Views({"p": a}, 2).fingerprint != Views({"p": b}, 2).fingerprint == Views({"p": b}, 2).fingerprint
    assert Views({"p": a}, 2).fingerprint != Views({"q": a}, 2).fingerprint
    with pytest.raises(UserError, match="same examples"):
        Views({"p": a_view(3), "q": a_view(4)}, 2)
    with pytest.raises(UserError, match="same shapes"):
        text.views.stacked([Example("a", tensors={"x": torch.zeros(2)}), Example("b", tensors={"x": torch.zeros(3)})])


# -- models ----------------------------------------------------------------------------------------------------------


def models():
    made = words()
    torch.manual_seed(0)
    yield GRUSeq2Seq(len(made), 8).double().eval(), made
    yield text.t5_spec("T5ForConditionalGeneration", len(made), 8, 1, 2).build().double().eval(), made


@pytest.mark.parametrize("which", [0, 1], ids=["gru", "t5"])
def test_greedy_answers_are_the_argmax_step_by_step_and_do_not_depend_on_the_batch(which):
    model, tokenizer = list(models())[which]
    codec, said = Codec.of(model, tokenizer), ["a", "a b c d e because", "c c", "(1"]
    together = text.generate(model, codec, said, prefix="predict: ", max_new=6)
    assert together == [text.generate(model, codec, [s], prefix="predict: ", max_new=6, batch_size=1)[0] for s in said]
    for s, answer in zip(said, together, strict=True):
        ids = torch.tensor(codec.inputs([s], "predict: "))
        fed = [codec.start]
        while len(fed) < 7 and fed[-1] != codec.eos:
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([fed]))
            out = out if isinstance(out, torch.Tensor) else out.logits
            fed.append(int(out[0, -1].argmax()))
        assert answer == codec.decode([fed[1:]])[0]


@pytest.mark.parametrize("which", [0, 1], ids=["gru", "t5"])
def test_padding_of_the_input_changes_nothing(which):
    model, _ = list(models())[which]
    ids, fed = torch.tensor([[4, 5, 1]]), torch.tensor([[0, 6, 7]])
    padded, mask = torch.tensor([[4, 5, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])

    def logits(i, m):
        out = model(input_ids=i, attention_mask=m, decoder_input_ids=fed)
        return out if isinstance(out, torch.Tensor) else out.logits

    assert torch.allclose(logits(ids, torch.ones_like(ids)), logits(padded, mask), atol=1e-12)


def test_patches_are_read_beside_the_tokens():
    model = GRUSeq2Seq(9, 8, patch=3).double()
    ids = torch.tensor([[3, 1], [4, 1]])
    x = torch.randn(2, 5, 3, dtype=D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model(ids, torch.ones_like(ids), torch.zeros_like(ids), patches=x)[0].sum().backward()
    assert x.grad[0].abs().sum() > 0 and x.grad[1].abs().sum() == 0


def test_token_nll_is_a_mean_over_all_tokens_of_all_batches():
    model, _ = next(models())
    view = a_view(7)
    whole = text.token_nll(model, view, batch_size=7)
    assert whole == pytest.approx(text.token_nll(model, view, batch_size=2), abs=1e-12)
    each = [
        (text.token_nll(model, View([i], [t], 0, 0)), len(t)) for i, t in zip(view.inputs, view.targets, strict=True)
    ]
    assert whole == pytest.approx(sum(x * n for x, n in each) / sum(n for _, n in each), abs=1e-12)


def test_what_stands_behind_a_phrase():
    assert behind_phrase("3 so So the answer is x", "So the answer is") == "x"
    assert behind_phrase("3 so", "So the answer is") == "" and behind_phrase(" y ", "") == " y "


def test_models_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("stillhouse.text.seq2seq._hub_answers", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for call, said in (
        (lambda: pretrained("google-t5/t5-small"), "hf:google-t5/t5-small cannot be had: .*local folder"),
        (lambda: pretrained("./nowhere"), "no folder ./nowhere"),
        (lambda: text.t5_spec("BertModel", 10), "transformers:BertModel cannot be sized"),
        (lambda: text.t5_spec("T5ForConditionalGeneration", 10, 10, 1, 4), "--width 12"),
        (lambda: own_model("math:sqrt"), "raised TypeError"),
        (lambda: own_model("time:time"), "returned float"),
    ):
        with pytest.raises(UserError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_local_folder_of_transformers_is_a_model(tmp_path):
    _, (model, tokenizer) = models()
    model.float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words_again = pretrained(str(tmp_path))
    assert torch.equal(again.shared.weight, model.shared.weight) and len(words_again) == len(tokenizer)


def test_the_encoder_reads_each_text_in_both_directions():
    """Against torch's own bidirectional GRU on packed sequences."""
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    model = GRUSeq2Seq(9, 8).double()
    both = nn.GRU(8, 4, batch_first=True, bidirectional=True).double()
    for ours, end in ((model.forth, ""), (model.back, "_reverse")):
        for name, value in ours.named_parameters():
            getattr(both, name + end).data.copy_(value)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [5, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    memory, _, state = model.encode(ids, mask)
    packed, last = both(pack_padded_sequence(model.embed(ids), mask.sum(1), batch_first=True, enforce_sorted=False))
    expected, _ = pad_packed_sequence(packed, batch_first=True)
    assert torch.allclose(memory * mask[..., None], expected, atol=1e-14)
    assert torch.allclose(state[0], torch.tanh(model.bridge(torch.cat([last[0], last[1]], 1))), atol=1e-14)
