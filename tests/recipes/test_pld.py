"""PLD: the card's exact checks, shortlists, padded lists, and the recipe as plain distillation with one objective."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from table import Row
from torch import nn

from stillhouse.cli import invoke
from stillhouse.comparisons import Objective
from stillhouse.data import Arrays, load
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.objectives import plackett_luce, shortlist
from stillhouse.recipes.pld.experiment import STUDENT, TINY, label_weight, order_agreement
from stillhouse.recipes.pld.lists import Lists, Scorer, large, lists_of, small
from stillhouse.recipes.pld.recipe import Config, distill
from stillhouse.run import Run

N, C = 7, 6
G = torch.Generator().manual_seed(5)
T, S = (2 * torch.randn(N, C, generator=G, dtype=torch.float64) for _ in range(2))
Y = torch.randint(0, C, (N,), generator=G)

_PLAIN = {"teacher_epochs": 0.0, "optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4}
ROWS = [
    Row("pld", "shortlist of a cached teacher", {"topk": 3, "cache": 0, "temperature": math.inf}),
    Row("pld", "lists", {}, {"lists": True}),
]
ZERO = [  # nothing is weighed against anything; what must agree is `stillhouse distill --objective pld --label 0`
    (Row("pld"), Row("distill", "with the one objective pld", asdict(TINY.as_plain()), {"student": STUDENT}))
]
JOINT = [Row("pld", "sgd", _PLAIN), Row("pld", "lists by sgd", _PLAIN, {"lists": True})]


def permutation(t, y):
    """π: the label, then the others by descending t."""
    return [y, *sorted((c for c in range(len(t)) if c != y), key=lambda c: -t[c])]


def by_hand(t, s, y, tau=1.0, ranks=None):
    """Equation (1) as a double loop; with `ranks` only so many of them, renormalised, the tail still in the sums."""
    q = np.exp(t / tau - (t / tau).max())
    pi = permutation(t, y)
    kept = pi[:ranks]
    total = sum(q[c] for c in kept)
    return sum(
        q[c] / total * (math.log(sum(math.exp(s[other]) for other in pi[k:])) - s[c]) for k, c in enumerate(kept)
    )


def gradient_by_hand(t, s, y, tau):
    """Equation (2), in the order of the classes."""
    q, pi, out = np.exp(t / tau) / np.exp(t / tau).sum(), permutation(t, y), np.zeros(len(t))
    for j, c in enumerate(pi):
        shares = (q[pi[k]] * math.exp(s[c]) / sum(math.exp(s[o]) for o in pi[k:]) for k in range(j + 1))
        out[c] = sum(shares) - q[c]
    return out


# -- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_the_vectorised_form_is_the_double_loop(tau):
    expected = [by_hand(t, s, int(y), tau) for t, s, y in zip(T.numpy(), S.numpy(), Y)]
    assert np.allclose(plackett_luce(T, S, Y, tau).numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_gradient_by_hand_by_autograd_and_by_differences(tau):
    s = S.clone().requires_grad_()
    plackett_luce(T, s, Y, tau).sum().backward()
    expected = np.stack([gradient_by_hand(t, z, int(y), tau) for t, z, y in zip(T.numpy(), S.numpy(), Y)])
    assert np.abs(s.grad.numpy() - expected).max() < 1e-12
    assert s.grad.sum(1).abs().max() < 1e-12
    h, bumps = 1e-5, torch.eye(C, dtype=torch.float64)
    differences = torch.stack(
        [(plackett_luce(T, S + h * e, Y, tau) - plackett_luce(T, S - h * e, Y, tau)) / (2 * h) for e in bumps], 1
    )
    assert (s.grad - differences).abs().max() < 1e-8


def test_a_constant_added_to_either_side_changes_nothing():
    assert (plackett_luce(T, S + 11, Y) - plackett_luce(T, S, Y)).abs().max() < 1e-12
    assert (plackett_luce(T - 4, S, Y) - plackett_luce(T, S, Y)).abs().max() < 1e-12


def test_special_weights():
    first = torch.eye(C, dtype=torch.float64)[0]
    assert torch.allclose(
        plackett_luce(T, S, Y, weights=first), F.cross_entropy(S, Y, reduction="none"), atol=1e-12, rtol=0
    )
    uniform = torch.full((C,), 1 / C, dtype=torch.float64)
    assert torch.allclose(plackett_luce(T, S, Y, math.inf), plackett_luce(T, S, Y, weights=uniform), atol=1e-12, rtol=0)


def test_two_classes_are_weighted_cross_entropy():
    q = T[:, :2].softmax(1).gather(1, Y[:, None] % 2).squeeze(1)
    expected = q * F.cross_entropy(S[:, :2], Y % 2, reduction="none")
    assert torch.allclose(plackett_luce(T[:, :2], S[:, :2], Y % 2), expected, atol=1e-12, rtol=0)


def test_a_teacher_that_is_wrong_of_the_label_weighs_it_little():
    """The weight belongs to the class at the rank; sorting the weights would give the label the largest."""
    t = torch.tensor([[0.0, 5.0, 1.0]], dtype=torch.float64)
    s = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    plackett_luce(t, s, torch.tensor([0])).sum().backward()
    assert s.grad[0].argmin() == 1  # the descent direction raises the teacher's class most, not the label


def test_convex_in_the_student():
    a, b = (3 * torch.randn(200, C, generator=G, dtype=torch.float64) for _ in range(2))
    t, y = torch.randn(200, C, generator=G, dtype=torch.float64), torch.randint(0, C, (200,), generator=G)
    middle, ends = plackett_luce(t, (a + b) / 2, y), (plackett_luce(t, a, y) + plackett_luce(t, b, y)) / 2
    assert (middle <= ends + 1e-12).all() and (middle < ends - 1e-3).any()


def test_names_of_classes_do_not_matter():
    names = torch.randperm(C, generator=G)
    back = torch.empty_like(names).scatter_(0, names, torch.arange(C))
    assert torch.allclose(plackett_luce(T[:, names], S[:, names], back[Y]), plackett_luce(T, S, Y), atol=1e-12, rtol=0)


def test_the_teacher_is_detached_and_half_precision_is_computed_in_single():
    t = T.clone().requires_grad_()
    assert not plackett_luce(t, S, Y).requires_grad
    assert plackett_luce(T.half(), S.half(), Y).dtype == torch.float32


# -- shortlists and padded lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, C - 2])
def test_a_shortlist_keeps_the_rest_in_the_sums_and_renormalises(k):
    expected = [by_hand(t, s, int(y), 2.0, k + 1) for t, s, y in zip(T.numpy(), S.numpy(), Y)]
    s = S.clone().requires_grad_()
    loss = plackett_luce(T, s, Y, 2.0, topk=k)
    assert np.allclose(loss.detach().numpy(), expected, atol=1e-12, rtol=0)
    loss.sum().backward()
    assert s.grad.sum(1).abs().max() < 1e-12 and (s.grad != 0).all()  # what is not on the list is pushed down
    assert torch.autograd.gradcheck(lambda z: plackett_luce(T, z, Y, 2.0, topk=k), S.clone().requires_grad_())


@pytest.mark.parametrize("k", [C - 1, C, 10 * C])
def test_a_shortlist_of_everything_is_the_whole_loss(k):
    assert torch.equal(plackett_luce(T, S, Y, 2.0, topk=k), plackett_luce(T, S, Y, 2.0))


def test_a_closed_shortlist_is_the_loss_among_its_classes():
    i = shortlist(T, Y, 2)
    assert torch.equal(i[:, 0], Y)
    for row, t, y in zip(i, T, Y):
        assert row.tolist() == permutation(t.numpy(), int(y))[:3]
    zero = torch.zeros(N, dtype=torch.long)
    expected = [by_hand(t[j].numpy(), s[j].numpy(), 0) for t, s, j in zip(T, S, i)]
    assert np.allclose(plackett_luce(T.gather(1, i), S.gather(1, i), zero).numpy(), expected, atol=1e-12, rtol=0)
    with pytest.raises(UserError, match="k must lie in"):
        shortlist(T, Y, C)


@pytest.mark.parametrize(("tau", "topk"), [(1.0, 0), (3.0, 0), (math.inf, 0), (2.0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padded_candidates_are_not_in_the_list(tau, topk, dtype):
    """A list padded with teacher scores −inf has the loss and the gradient of the list itself."""
    t, s = T.to(dtype), S.to(dtype)
    padded_t = torch.cat([t, torch.full((N, 2), -math.inf, dtype=dtype)], 1)
    padded_s = torch.cat([s, 100 * torch.ones(N, 2, dtype=dtype)], 1)
    s, padded_s = s.clone().requires_grad_(), padded_s.requires_grad_()
    short, long = plackett_luce(t, s, Y, tau, topk=topk), plackett_luce(padded_t, padded_s, Y, tau, topk=topk)
    assert torch.allclose(short, long, atol=1e-5)
    short.sum().backward(), long.sum().backward()
    assert torch.allclose(padded_s.grad[:, :C], s.grad, atol=1e-5) and (padded_s.grad[:, C:] == 0).all()


def test_lists_hold_one_candidate_of_the_querys_class():
    digits = load("digits", limit=60).train
    lists = Lists(digits, length=5, seed=1)
    y = digits.labels[lists.rows]
    same = y[:, 1:] == y[:, :1]
    assert (same.sum(1) == 1).all() and (same.argmax(1) == lists.labels).all()
    assert (lists.rows[:, 1:] != lists.rows[:, :1]).all()
    batch = lists.take(np.array([3, 4]))
    assert torch.equal(batch["input"][1, 2], digits.take(lists.rows[4, 2:3])["input"][0])
    assert set(lists.labels.tolist()) == set(range(5))
    assert Lists(digits, length=5, seed=2).fingerprint != lists.fingerprint
    with pytest.raises(UserError, match="two samples of two classes"):
        Lists(Arrays(np.zeros((3, 1)), [0, 1, 2]))


def test_scores_are_scaled_cosines():
    class Same(nn.Module):
        def forward(self, x):
            return x

    x = torch.randn(2, 4, 3, generator=G)
    expected = torch.stack([F.cosine_similarity(row[1:], row[:1]) for row in x]) / 0.1
    assert torch.allclose(Scorer(Same())(x), expected, atol=1e-5)
    assert large((5, 1, 8, 8))(torch.zeros(2, 5, 1, 8, 8)).shape == (2, 4)


def test_a_ranker_is_taught_as_a_classifier_is(tmp_path):
    data = lists_of(load("digits", limit=100), length=4)
    cfg = replace(TINY, epochs=1, teacher_epochs=1)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, small(data.shape), large(data.shape), cfg)
    assert family["student"].model(torch.zeros(2, *data.shape)).shape == (2, 4)


# -- the recipe --------------------------------------------------------------------------------------------------


def test_the_loss_in_training_is_the_objective(tmp_path):
    run, data = Run(tmp_path, quiet=True, device="cpu", log_every=1), load("digits", limit=64)
    teacher, student = (ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build(seed=k) for k in (1, 2))
    cfg = Config(temperature=2.0, topk=3, epochs=1, batch=64, optimizer="sgd", lr=0.0, weight_decay=0.0)
    x = data.train.take(np.arange(64))
    with torch.no_grad():
        expected = plackett_luce(teacher(x["input"]), student(x["input"]), x["label"], 2.0, topk=3).mean()
    family = distill(run, data, student, teacher, cfg)
    assert [set(r) - {"step", "epoch", "accuracy"} for r in family.logs] == [{"pld"}]
    assert family.logs[0]["pld"] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_the_run_says_what_the_teacher_gives_the_label(tau, tmp_path):
    data = load("digits", limit=64)
    teacher = ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build(seed=1)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, STUDENT, teacher, Config(temperature=tau, epochs=1))
    x = data.train.take(np.arange(64))
    q = (teacher(x["input"]) / tau).softmax(-1).gather(1, x["label"][:, None]).mean()
    assert family.cost["teacher_on_label"] == pytest.approx(float(q), abs=1e-6)
    assert f"temperature {tau:g}" in family.notes[-1]
    if tau == 1.0:
        assert label_weight(teacher, data) == pytest.approx(float(q), abs=1e-6)


def test_agreement_in_order_is_spearmans_without_the_label():
    found = order_agreement(T, S, Y)
    for t, s, y, rho in zip(T.numpy(), S.numpy(), Y, found):
        others = np.arange(C) != int(y)
        assert float(rho) == pytest.approx(spearmanr(t[others], s[others]).statistic, abs=1e-12)


def test_the_flag_of_plain_distillation_says_the_same():
    o = Objective.parse(Config(temperature=math.inf, topk=5).objective)
    assert o.options == {"T": math.inf, "topk": 5.0} and o.weight == 1.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "digits"], ["--teacher is missing"]),
        (["--temperature", "0"], ["temperature", "positive"]),
        (["--topk", "-1"], ["topk", "0 (all classes)"]),
        (["--teacher", "timm:resnet18", "--data", "digits"], ["1000 classes", "--teacher-epochs"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    code = invoke(["run", "pld", *flags, "--epochs", "1", "--quiet", "--out", str(tmp_path / "x")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_a_run_with_equal_weights_can_be_resumed(tmp_path, capsys):
    """run.json has no infinity."""
    networks = ["--data", "digits", "--limit", "64", "--teacher", "stillhouse:mlp", "--model", "stillhouse:mlp"]
    flags = ["--teacher-epochs", "1", "--epochs", "1", "--temperature", "inf", "--quiet", "--out", str(tmp_path / "x")]
    assert invoke(["run", "pld", *networks, *flags]) == 0
    assert invoke(["resume", str(tmp_path / "x")]) == 0, capsys.readouterr().err


def test_wrong_shapes_are_told():
    with pytest.raises(UserError, match=r"must be \(n, C\)"):
        plackett_luce(T, S[:, :3], Y)


@pytest.mark.data
def test_fashion_mnist_from_the_command_line(data_root, tmp_path):
    common = ["--data", "fashion-mnist", "--limit", "64", "--epochs", "1", "--quiet", "--batch", "32"]
    networks = ["--model", "stillhouse:mlp", "--teacher", "stillhouse:mlp", "--teacher-epochs", "1"]
    assert invoke(["run", "pld", *common, *networks, "--out", str(tmp_path / "x")]) == 0
