"""LELP: the card's exact checks, heads and embeddings of any kind, labels that are not read, mistakes in one line."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

from stillhouse.cli import invoke
from stillhouse.data import Arrays, Data, Relabelled, load
from stillhouse.data.pools import Regrouped
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.evaluate import logits_of
from stillhouse.export import export
from stillhouse.models import ModelSpec
from stillhouse.outcomes import load as load_student
from stillhouse.recipes.lelp import subclasses as sub
from stillhouse.recipes.lelp.experiment import GROUPS, STUDENT, TEACHER, TINY, digits
from stillhouse.recipes.lelp.recipe import Config, Lelp, distill
from stillhouse.recipes.lelp.subclasses import Subclasses, SubclassTeacher, find_subclasses, head_of, information
from stillhouse.run import Run
from stillhouse.students.grouped import Grouped, grouped_head
from stillhouse.system import Clock, Signals
from stillhouse.taps import head
from stillhouse.teachers import Frozen
from stillhouse.text import bert_spec, sentence_data, small_tokenizer

ROWS = [
    Row("lelp", "pool", {"label": 0.0, "epochs": 1.0}, {"pool": True}),
    Row("lelp", "views", {"cache": 2, "epochs": 3.0, "teacher_epochs": 0.0}),
    Row("lelp", "live, by label", {"cache": -1, "assign": "label", "temperature": 2.0, "student_temperature": 2.0}),
    Row("lelp", "micro", {"null_space": False, "rotate": False}, micro_batch=10),
]
_LABELS, _ONE = {"label": 1.0}, {"subclasses": 1}
_OTHER = {"beta": 3.0, "null_space": False, "rotate": False, "temperature": 1.0}
ZERO = [
    (Row("lelp", "labels alone", _LABELS), Row("lelp", "labels alone, other targets", {**_LABELS, **_OTHER})),
    (Row("lelp", "one sub-class", _ONE), Row("lelp", "one sub-class, found otherwise", {**_ONE, **_OTHER})),
]
JOINT = [Row("lelp", "sgd", {"optimizer": "sgd", "lr": 0.05, "teacher_epochs": 0.0})]

N, D, C, S = 60, 7, 3, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Directions of very different variance, so that a rotation has something to even out.
H = draw(N, D) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.1], dtype=torch.float64)
W, B = draw(C, D, seed=1), draw(C, seed=2)
Z, Y = H @ W.T + B, torch.arange(N) % C


def found(**changes):
    return find_subclasses(H, Y, C, S, **{"weight": W, "seed": 3, **changes})


def shares(subclasses, h=H, beta=0.5):
    """r, (n, C, S)."""
    return (subclasses.scores(h) / beta).softmax(-1)


# -- the card's exact checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("changes", [{}, {"weight": None}, {"rotate": False}])
def test_1_subclasses_sum_to_the_class(T, changes):
    q = found(**changes).targets(H, Z, T, 0.3).exp().view(N, C, S)
    assert torch.allclose(q.sum(-1), (Z / T).softmax(-1), rtol=0, atol=1e-12)
    assert q.std(-1).max() > 0.1  # and they are not all alike


def network(outputs=C, width=D):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, outputs)).double()


BATCH = {"input": draw(6, 5, seed=5), "label": torch.arange(6) % C}


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_2_one_subclass_is_plain_distillation(T):
    student, other, teacher = network(), network(), network(width=9)
    h = draw(40, 5, seed=6)
    asked = SubclassTeacher(teacher, "2")
    embedded, z = asked.embed({"input": h})
    asked.use(find_subclasses(embedded, z.argmax(-1), C, 1, weight=asked.weight), T, 0.5)
    grouped, _ = grouped_head(student, BATCH["input"], C, 1)
    assert grouped.body[2] is student[2] and torch.equal(grouped.scores(BATCH["input"]), other(BATCH["input"]))
    cfg = Config(subclasses=1, temperature=T, student_temperature=T)
    Lelp(grouped, asked, cfg).learn(BATCH, Clock()).total.backward()
    Distill(other, Frozen(teacher), objectives=(f"kd:1?T={T}",), label=0).learn(BATCH, Clock()).total.backward()
    for p, q in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9) and p.grad.abs().max() > 1e-4


def test_3_the_null_space_holds_nothing_of_the_logits():
    left = sub.project_out(H, sub.head_basis(W))
    assert (left @ W.T).abs().max() < 1e-12 and left.norm() > 1
    more = H + draw(N, C, seed=7) @ W * 10  # a multiple of W's columns, another one for every sample
    assert torch.allclose(shares(found()), shares(found(), more), rtol=0, atol=1e-9)
    assert torch.allclose(shares(found()), shares(find_subclasses(more, Y, C, S, weight=W, seed=3), H), atol=1e-9)
    kept = found(weight=None)
    assert (shares(kept) - shares(kept, more)).abs().max() > 0.1


def test_4_a_permuted_rotation_permutes_the_subclasses(monkeypatch):
    order, plain = torch.tensor([2, 0, 3, 1]), sub.orthogonal
    before = found()
    monkeypatch.setattr(sub, "orthogonal", lambda size, seed: plain(size, seed)[order])
    after = found()
    assert torch.allclose(shares(after), shares(before)[:, :, order], rtol=0, atol=1e-12)
    assert torch.allclose(after.sigma, before.sigma) and torch.equal(after.mean, before.mean)


def test_5_a_large_beta_says_nothing_of_subclasses():
    assert torch.equal(shares(found(), beta=float("inf")), torch.full((N, C, S), 1 / S, dtype=torch.float64))
    assert torch.allclose(shares(found(), beta=1e9), torch.full((N, C, S), 1 / S, dtype=torch.float64), atol=1e-7)
    q = found().targets(H, Z, 1.0, float("inf"))
    assert torch.allclose(q.exp().view(N, C, S), Z.softmax(-1)[..., None].expand(N, C, S) / S, rtol=1e-12)


def test_6_the_grouped_head_gives_the_class_marginal():
    model = Grouped(network(), "2", C, S)
    x = draw(8, 5, seed=8) * 3
    p = model.scores(x).softmax(-1)
    by_hand = torch.stack([p[:, c * S : (c + 1) * S].sum(-1) for c in range(C)], -1)
    assert torch.allclose(model(x).softmax(-1), by_hand, rtol=1e-12)


def test_6_it_is_neither_the_sum_of_logits_nor_the_largest_output():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 2)

        def forward(self, x):
            return self.head(x)

    model = Grouped(Scores(), "head", 2, 2)
    with torch.no_grad():
        model.body.head.weight.zero_()
        model.body.head.bias.copy_(torch.tensor([2.0, -9.0, 1.6, 1.6]))  # class 0 has the largest output
    assert model(torch.zeros(1, 1)).argmax(-1).item() == 1
    with torch.no_grad():
        model.body.head.bias.copy_(torch.tensor([2.0, -9.0, 1.0, 0.5]))  # class 1 has the larger sum of logits
    assert model(torch.zeros(1, 1)).argmax(-1).item() == 0


def test_7_directions_are_orthonormal_and_a_rotation_evens_their_variance():
    plain, turned = found(rotate=False), found()
    eye = torch.eye(S, dtype=torch.float64)
    for made in (plain, turned):
        for v in made.directions:
            assert torch.allclose(v @ v.T, eye, atol=1e-10)
    assert bool((plain.before.diff(dim=1) <= 0).all())
    for c in range(C):
        left = sub.project_out(H, sub.head_basis(W))[c == Y]
        variance = torch.linalg.svdvals(left - left.mean(0))[:S] ** 2 / len(left)
        assert torch.allclose(plain.before[c], variance, rtol=1e-9)
        assert torch.allclose(plain.after[c], variance, rtol=1e-9)
        # the same plane: only the axes in it have turned
        a, b = plain.directions[c], turned.directions[c]
        assert torch.allclose(a.T @ a, b.T @ b, atol=1e-9)
    ratio = [m.after.max(1).values / m.after.min(1).values for m in (plain, turned)]
    assert bool((ratio[1] < ratio[0] / 2).all())
    assert torch.allclose(turned.sigma, turned.after.sqrt().mean(1))


# -- further properties ------------------------------------------------------------------------------------------------


def test_statistics_are_of_each_class_alone():
    """PCA of everything would find what parts the classes; the mean of each class is taken out first."""
    apart = H + 100 * F.one_hot(Y, D).double()[:, torch.tensor([0, 1, 2, 3, 4, 5, 6])]
    moved = find_subclasses(apart, Y, C, S, seed=3)
    assert torch.allclose(moved.directions, found(weight=None).directions, atol=1e-8)
    assert torch.allclose(shares(moved, apart)[torch.arange(N), Y], shares(found(weight=None))[torch.arange(N), Y])


def test_a_class_of_too_few_samples_gets_zeros_or_nothing():
    y = torch.cat([torch.zeros(N - 4), torch.ones(3), torch.full((1,), 2.0)]).long()  # 56, 3 and 1 samples
    made = find_subclasses(H, y, C, S, rotate=False, seed=3)
    assert int((made.directions[1].norm(dim=1) > 0).sum()) == 2 and not made.directions[2].any()
    q = find_subclasses(H, y, C, S, seed=3).targets(H, Z, 1.0, 0.5)
    assert bool(q.isfinite().all()) and torch.allclose(q.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    r = shares(find_subclasses(H, y, C, S, seed=3))
    assert torch.allclose(r[:, 2], torch.full((N, S), 1 / S, dtype=torch.float64)) and r[:, 1].std() > 0.01


def test_samples_without_a_class_are_left_out():
    y = torch.where(torch.arange(N) < 30, Y, -1)
    a, b = find_subclasses(H, y, C, S, seed=3), find_subclasses(H[:30], Y[:30], C, S, seed=3)
    assert torch.equal(a.directions, b.directions) and a.sizes.tolist() == [10, 10, 10]


def test_the_rotation_is_orthogonal_fixed_by_its_seed_and_turns_freely():
    q = sub.orthogonal(5, 1)
    assert torch.allclose(q @ q.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.equal(q, sub.orthogonal(5, 1)) and not torch.equal(q, sub.orthogonal(5, 2))
    mean = torch.stack([sub.orthogonal(3, s) for s in range(400)]).mean(0)  # QR without the signs is not even
    assert mean.abs().max() < 0.15


def test_the_loss_by_hand_with_labels_for_some():
    y = torch.tensor([0, -1, 2, -1, 1, 0])
    model = Grouped(network(), "2", C, S)
    log_q = draw(6, C * S, seed=9).log_softmax(-1)
    cfg = Config(subclasses=S, label=0.3, student_temperature=2.0)
    terms = Lelp(model, lambda batch: Signals(logits=log_q), cfg).learn({**BATCH, "label": y}, Clock()).terms
    s = model.scores(BATCH["input"])
    soft = -4 * (log_q.exp() * (s / 2).log_softmax(-1)).sum(-1).mean()
    marginal = s.softmax(-1).view(6, C, S).sum(-1)
    label = -sum(marginal[i, y[i]].log() for i in (0, 2, 4, 5)) / 6
    assert torch.allclose(terms["subclasses"], 0.7 * soft) and torch.allclose(terms["label"], 0.3 * label)


def test_information_in_bits():
    sharp = torch.full((4, 8), -200.0)
    sharp[torch.arange(4), torch.arange(4)] = 0.0  # one class, four sub-classes, each certain
    assert information(sharp, 2) == pytest.approx((0.0, 2.0), abs=1e-6)
    even = torch.full((4, 8), math.log(1 / 8))
    assert information(even, 2) == pytest.approx((1.0, 0.0), abs=1e-6)


class Odd(nn.Module):
    """Norm and dropout between the embedding and the head; the answer in a mapping; a linear layer after the head."""

    def __init__(self, outputs=C):
        super().__init__()
        self.classifier = nn.Linear(D, outputs)
        self.body = nn.Sequential(nn.Linear(5, D), nn.LayerNorm(D), nn.Dropout(0.5))
        self.side = nn.Linear(D, outputs)

    def forward(self, x):
        h = self.body(x)
        z = self.classifier(h)
        return {"logits": z, "other": self.side(h)}


def test_the_embedding_is_what_the_head_reads_in_eval_mode():
    model = Odd().double().train()
    at, outputs = head_of(model, BATCH["input"], C)
    assert (at, outputs) == ("classifier", C)
    h, z = SubclassTeacher(model, at).embed(BATCH)
    assert torch.allclose(h @ model.classifier.weight.T + model.classifier.bias, z, atol=1e-12)
    model.eval()
    assert torch.equal(h, model.body(BATCH["input"])) and torch.equal(z, logits_of(model(BATCH["input"])))


def test_one_logit_for_two_classes():
    model = Odd(1).double()
    at, outputs = head_of(model, BATCH["input"], 2)
    asked = SubclassTeacher(model, at)
    _, z = asked.embed(BATCH)
    raw = logits_of(model.eval()(BATCH["input"]))
    assert outputs == 1 and torch.allclose(z.softmax(-1)[:, 1:], raw.sigmoid()) and asked.weight.shape == (1, D)
    basis = sub.head_basis(asked.weight)
    assert basis.shape == (D, 1) and torch.allclose(basis.abs() * asked.weight.norm(), asked.weight.abs().T)
    assert torch.equal(sub.TwoLogits(model)(BATCH["input"]), torch.cat([torch.zeros_like(raw), raw], -1))
    with pytest.raises(UserError, match=r"1 logits.*3 classes"):
        head_of(model, BATCH["input"], C)


@pytest.mark.parametrize("epochs", [0.0, 1.0])
def test_a_teacher_of_one_logit_runs_whole(tmp_path, epochs):
    data = Data("two", *(Arrays(draw(40, 5, seed=k).float().numpy(), np.arange(40) % 2) for k in (1, 2)))
    spec = ModelSpec("stillhouse:mlp", 2, (5,), options={"widths": [4]})
    cfg = replace(TINY, teacher_epochs=epochs)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, spec, Odd(1), cfg)
    rows, _, _ = family.measure(data, family.save(tmp_path)[0].parent.parent)
    assert [r.name for r in rows] == ["teacher", "student"]


# -- a whole run -------------------------------------------------------------------------------------------------------


def evens(limit=96):
    whole = load("digits", limit=limit)
    return Data("even or odd", Regrouped(whole.train, GROUPS), Regrouped(whole.test, GROUPS))


def made(folder, data=None, cfg=TINY, teacher=3, student=STUDENT, **options):
    network = TEACHER.build(seed=teacher) if isinstance(teacher, int) else teacher
    return distill(Run(folder, quiet=True, device="cpu"), data or evens(), student, network, cfg, **options)


def test_without_its_weight_no_label_is_read(tmp_path):
    data, cfg = evens(), replace(TINY, label=0.0, teacher_epochs=0.0)
    wrong = Data("wrong", Relabelled(data.train, labels=dict.fromkeys(range(96), 0)), data.test)
    a, b = (made(tmp_path / n, d, cfg)["student"].model for n, d in (("right", data), ("wrong", wrong)))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    by_label = replace(cfg, assign="label")
    c = made(tmp_path / "by label", wrong, by_label)["student"].model
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_targets_are_fixed_and_their_projections_are_saved(tmp_path, monkeypatch):
    family = made(tmp_path, cfg=replace(TINY, teacher_epochs=0.0))
    kept, facts = Subclasses.load(tmp_path / "subclasses")
    assert facts["subclasses"] == 3 and kept.directions.shape == (2, 3, 64)
    monkeypatch.setattr(sub, "orthogonal", lambda *a: pytest.fail("the rotation was drawn again"))
    again = made(tmp_path, cfg=replace(TINY, teacher_epochs=0.0))
    pairs = zip(family["student"].model.parameters(), again["student"].model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_another_teacher_in_the_same_folder_is_refused(tmp_path):
    made(tmp_path, cfg=replace(TINY, teacher_epochs=0.0))
    with pytest.raises(UserError, match="another teacher"):
        made(tmp_path, cfg=replace(TINY, teacher_epochs=0.0), teacher=4)


def test_the_saved_student_gives_class_logits(tmp_path):
    family = made(tmp_path)
    family.save(tmp_path)
    model = load_student(tmp_path / "students/student")
    assert export(model, torch.zeros(2, 1, 8, 8), "torch-export", tmp_path / "one.pt2").max_abs_diff < 1e-5
    x = evens().test.take(np.arange(5))["input"]
    assert model(x).shape == (5, 2) and torch.equal(model(x), family["student"].model(x))
    assert type(model).__name__ == "Grouped" and model.scores(x).shape == (5, 6)


def test_a_live_student_is_loaded_with_its_structure(tmp_path):
    made(tmp_path, student=STUDENT.build(seed=0)).save(tmp_path)
    base, _ = grouped_head(STUDENT.build(seed=9), torch.zeros(2, 1, 8, 8), 2, 3)
    assert load_student(tmp_path / "students/student", base=base)(torch.zeros(2, 1, 8, 8)).shape == (2, 2)
    with pytest.raises(UserError, match="base="):
        load_student(tmp_path / "students/student")


def test_the_digits_of_the_experiment():
    task = digits(0)
    assert (len(task.many.train), len(task.few.train), len(task.few.test)) == (900, 300, 539)
    rows = task.few.train.take(np.arange(300))
    assert np.array_equal(task.hidden // 5, rows["label"].numpy()) and set(task.hidden) == set(range(10))
    pixels = {x.numpy().tobytes() for x in task.many.train.take(np.arange(900))["input"]}
    assert all(x.numpy().tobytes() in pixels for x in rows["input"])  # the teacher has seen the student's samples


def test_a_run_with_an_infinite_setting_can_be_resumed(tmp_path):
    flags = ["--data", "digits", "--limit", "64", "--epochs", "1", "--teacher", "stillhouse:mlp", "--quiet"]
    out = str(tmp_path / "x")
    assert invoke(["run", "lelp", *flags, "--teacher-epochs", "1", "--beta", "inf", "--out", out]) == 0
    assert invoke(["resume", out]) == 0


def test_a_transformer_teaches_one_with_another_vocabulary(tmp_path):
    words = [f"{a} {b}" for a in ("so", "very", "not", "hardly") for b in ("good", "bad", "dull", "fine", "odd")]
    rows = [{"text": w, "label": str(i % 2)} for i, w in enumerate(words)]
    tokenizers = {"input": small_tokenizer(words), "teacher": small_tokenizer(words, "char")}
    data = sentence_data({"train": rows}, "words", tokenizers=tokenizers, length=16)
    sizes = {"width": 8, "layers": 1, "heads": 2, "length": 16}
    student, large = (bert_spec(len(t), 2, **sizes) for t in tokenizers.values())
    teacher = large.build(seed=1)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, student, teacher, replace(TINY, batch=8))
    family.save(tmp_path)
    rows, _, _ = family.measure(data, tmp_path)
    assert [r.name for r in rows] == ["teacher", "student"]
    model = load_student(tmp_path / "students/student")
    x = data.test.take(np.arange(3))
    assert export(model, x["input"], "torch-export", tmp_path / "one.pt2").max_abs_diff < 1e-5
    assert model.scores(x["input"]).shape == (3, 6) and (tmp_path / "students/student/tokenizer.json").exists()


@pytest.mark.data
def test_sentences(tmp_path, data_root, capsys):
    flags = ["--data", "sst2", "--limit", "60", "--length", "16", "--width", "8", "--layers", "1", "--epochs", "1"]
    teacher = ["--teacher", "bert", "--teacher-epochs", "1", "--model", "bag", "--quiet", "--out", str(tmp_path / "x")]
    assert invoke(["run", "lelp", *flags, *teacher]) == 0
    model = load_student(tmp_path / "x/students/student")
    ids = torch.ones(2, 4, dtype=torch.long)
    assert model(input_ids=ids, attention_mask=ids).shape == (2, 2)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"beta": 0.0}, "beta"), ({"subclasses": 0}, "subclasses"), ({"label": 1.5}, "label"), ({"lr": -1.0}, "lr")],
)
def test_settings_out_of_range(settings, word):
    with pytest.raises(UserError, match=word):
        Config(**settings)


def test_unlabelled_inputs_alone_are_not_the_built_in_experiment(tmp_path, capsys):
    assert invoke(["run", "lelp", "--unlabelled", "digits", "--quiet", "--out", str(tmp_path / "x")]) == 2
    assert "one --teacher" in capsys.readouterr().err


def test_networks_that_do_not_fit(tmp_path):
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, 8)
            self.w = nn.Parameter(torch.randn(2, 8))

        def forward(self, x):
            return self.body(x.flatten(1)) @ self.w.T

    with pytest.raises(UserError, match=r"Cosine are not the output of an nn.Linear"):
        made(tmp_path / "a", teacher=Cosine())
    with pytest.raises(UserError, match=r"Cosine"):
        made(tmp_path / "b", student=Cosine())
    with pytest.raises(UserError, match=r"10 logits.*2 classes"):
        made(tmp_path / "c", teacher=ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build())
    with pytest.raises(UserError, match=r"fewer --subclasses"):
        made(tmp_path / "d", cfg=replace(TINY, subclasses=65))
    with pytest.raises(UserError, match=r"nn\.Linear"):
        head(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), torch.zeros(2, 1, 8, 8))
    assert not list(tmp_path.glob("[abc]/stages"))  # said before anything was trained


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["one --teacher", "0"]),
        (["--teacher", "stillhouse:mlp", "--teacher", "stillhouse:cnn"], ["one --teacher", "2"]),
        (["--teacher", "stillhouse:mlp", "--teacher-epochs", "1", "--subclasses", "99"], ["--subclasses"]),
        (["--teacher", "stillhouse:mlp", "--teacher-epochs", "1", "--beta", "-1"], ["beta"]),
        (["--subclasses", "1", "--beta", "0.7"], ["--beta does nothing", "--subclasses 1"]),
        (["--label", "1", "--no-rotate"], ["--rotate does nothing", "--label 1"]),
        (["--teacher", "stillhouse:mlp", "--teacher-epochs", "1", "--unlabelled", "folder:nowhere"], ["nowhere"]),
    ],
    ids=lambda v: " ".join(v)[:60],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = [
        "run",
        "lelp",
        "--data",
        "digits",
        "--limit",
        "64",
        "--epochs",
        "1",
        "--quiet",
        "--out",
        str(tmp_path / "x"),
    ]
    code = invoke([*common, *flags])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said
