"""Weighted ground-truth self-distillation: the closed forms of the card, kernel models, last layers, networks."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import load, split
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, predict
from stillhouse.models import ModelSpec
from stillhouse.recipes.weighted_ground_truth_self_distillation.closed import (
    Features,
    Kernel,
    after,
    chain,
    greedy,
    limit,
    mse,
    shrinkage,
)
from stillhouse.recipes.weighted_ground_truth_self_distillation.config import Config
from stillhouse.recipes.weighted_ground_truth_self_distillation.deep import Mixture, estimate
from stillhouse.recipes.weighted_ground_truth_self_distillation.experiment import CNN, MLP, PRINTED, TINY, toy_errors
from stillhouse.recipes.weighted_ground_truth_self_distillation.last import features, last_layer
from stillhouse.recipes.weighted_ground_truth_self_distillation.problems import (
    KernelModel,
    from_data,
    from_table,
    kernel_matrix,
    landmarks,
    problem,
)
from stillhouse.recipes.weighted_ground_truth_self_distillation.recipe import distill, kernel, networks
from stillhouse.run import Run
from stillhouse.system import Clock
from stillhouse.teachers import Frozen
from stillhouse.weights import optimal_mix

NAME = "weighted_ground_truth_self_distillation"
_SGD = {"method": "networks", "steps": 2, "weight": "fixed", "optimizer": "sgd", "lr": 0.05, "epochs": 1.0}
ROWS = [
    Row(NAME, "networks", {"method": "networks", "steps": 2}),
    Row(NAME, "last layer", {"method": "last-layer"}, {"model": CNN}),
    Row(NAME, "landmarks", {"landmarks": 30, "weight": "fixed", "ridge": 0.01}),
]
ZERO = [  # the labels alone: the weight of the chain is 0, and no step changes anything
    (
        Row(NAME, "labels alone", {"weight": "fixed", "alpha": 1.0, "steps": 5}),
        Row(NAME, "one step", {"weight": "fixed", "steps": 1}),
    ),
]
JOINT = [Row(NAME, "networks by sgd", _SGD)]

G = torch.Generator().manual_seed(11)
N, Q, RIDGE = 12, 2, 0.3
X = torch.randn(N, 3, generator=G, dtype=torch.float64)
K = kernel_matrix(X, X, 0.4)
Y = torch.randn(N, Q, generator=G, dtype=torch.float64)
D, V = torch.linalg.eigh(K)
ALPHAS = [0.0, 0.25, 0.7, 1.0]


def fitted(alpha, steps, ridge=RIDGE):
    return [K @ s.coefficients for s in chain(Kernel(K, ridge), Y, [alpha] * (steps - 1))]


# -- the closed forms --------------------------------------------------------------------------------------------


def test_the_chain_minimises_the_weighted_loss():
    """Step τ is the minimiser of α‖f−Y‖² + (1−α)‖f−ŷ‖² + λ‖f‖²_H: the gradient in the coefficients is 0."""
    steps = chain(Kernel(K, RIDGE), Y, [0.3, 0.6])
    for k, s in enumerate(steps[1:], 1):
        c = s.coefficients.clone().requires_grad_()
        before = (K @ steps[k - 1].coefficients).detach()
        loss = s.alpha * (K @ c - Y).square().sum() + (1 - s.alpha) * (K @ c - before).square().sum()
        loss = loss + RIDGE * (c * (K @ c)).sum()
        (gradient,) = torch.autograd.grad(loss, c)
        assert gradient.abs().max() < 1e-10
        assert torch.allclose(s.target, s.alpha * Y + (1 - s.alpha) * before, atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_spectral_form_is_the_recursion(alpha):
    for step, prediction in enumerate(fitted(alpha, 7), 1):
        b = shrinkage(D, RIDGE, alpha, step)
        assert (V @ (b[:, None] * (V.T @ Y)) - prediction).abs().max() < 1e-12
        assert (K @ after(K, Y, RIDGE, alpha, step) - prediction).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", [0.05, 0.25, 0.7, 1.0])
def test_the_limit_is_a_larger_ridge(alpha):
    far = fitted(alpha, 500)[-1]
    end = K @ limit(Kernel, K, Y, RIDGE, alpha)
    direct = K @ torch.linalg.solve(K + RIDGE / alpha * torch.eye(N, dtype=torch.float64), Y)
    assert (far - end).abs().max() < 1e-12 and (end - direct).abs().max() < 1e-12
    if alpha < 0.5:  # λ·α would be another model
        assert (
            end - K @ torch.linalg.solve(K + RIDGE * alpha * torch.eye(N, dtype=torch.float64), Y)
        ).abs().max() > 0.1


def test_without_labels_everything_collapses():
    assert fitted(0.0, 500)[-1].abs().max() < 1e-12
    assert torch.equal(limit(Kernel, K, Y, RIDGE, 0.0), torch.zeros(N, Q, dtype=torch.float64))


def test_with_labels_alone_nothing_happens():
    first, *rest = fitted(1.0, 4)
    assert all(torch.equal(r, first) for r in rest)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_without_a_ridge_every_step_is_the_labels(alpha):
    for prediction in fitted(alpha, 5, ridge=1e-13):
        assert (prediction - Y).abs().max() < 1e-8


def test_the_best_weight_is_the_argmin_of_a_grid():
    xv, yv = torch.randn(9, 3, generator=G, dtype=torch.float64), torch.randn(9, Q, generator=G, dtype=torch.float64)
    rows, smoother = kernel_matrix(xv, X, 0.4), Kernel(K, RIDGE)
    steps = greedy(smoother, Y, rows, yv, 4)
    for k in range(1, 4):
        before = K @ steps[k - 1].coefficients

        def error(a, before=before):
            return mse(rows @ smoother.coefficients(a * Y + (1 - a) * before), yv)

        grid = np.arange(-20, 20, 0.005)
        found = grid[np.argmin([error(a) for a in grid])] if abs(steps[k].alpha) < 20 else None
        assert found is None or steps[k].alpha == pytest.approx(found, abs=0.005)
        assert mse(rows @ steps[k].coefficients, yv) <= mse(rows @ steps[0].coefficients, yv) + 1e-12
    assert any(abs(s.alpha) < 20 for s in steps[1:])
    assert all(0 <= s.alpha <= 1 for s in greedy(smoother, Y, rows, yv, 4, clip=True))


def test_the_best_weight_of_two_predictors():
    u, v, y = (torch.randn(20, 3, generator=G, dtype=torch.float64) for _ in range(3))
    a = optimal_mix(u, v, y)
    slope = ((u - v) * (a * u + (1 - a) * v - y)).sum()
    assert abs(float(slope)) < 1e-10
    assert optimal_mix(u, v, 3 * u - 2 * v) == pytest.approx(3.0, abs=1e-12)  # beyond [0, 1]
    assert optimal_mix(u, u, y) == 1.0
    with pytest.raises(UserError, match="shapes differ"):
        optimal_mix(u, v, y[:2])


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.8])
def test_degrees_of_freedom_fall_to_those_of_the_limit(alpha):
    traces = [float(shrinkage(D, RIDGE, alpha, k).sum()) for k in range(1, 60)]
    floor = float((D / (D + RIDGE / alpha)).sum()) if alpha else 0.0
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(traces)) and traces[-1] >= floor - 1e-12
    assert traces[0] == pytest.approx(
        float(torch.trace(K @ torch.linalg.inv(K + RIDGE * torch.eye(N, dtype=K.dtype)))), abs=1e-9
    )


def test_small_directions_shrink_faster_and_labels_dampen_that():
    d = D.flip(0)[:6]

    def growth(alpha):
        ratio = [shrinkage(d, RIDGE, alpha, k)[:-1] / shrinkage(d, RIDGE, alpha, k)[1:] for k in (1, 10, 20)]
        assert (ratio[1] >= ratio[0] - 1e-12).all()
        return float(((ratio[2] - ratio[1]) / ratio[1]).max())

    assert growth(0.0) > 1.0 and growth(0.5) < 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.35])
def test_the_toy_table_to_five_decimals(alpha):
    assert [round(v, 5) for v in toy_errors(alpha)] == list(PRINTED[alpha])


def test_the_printed_table_is_not_that_of_a_quarter():
    expected = [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250]
    assert [round(v, 5) for v in toy_errors(0.25)] == expected


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_features_have_the_same_algebra(alpha):
    phi = torch.randn(N, 4, generator=G, dtype=torch.float64)
    new = torch.randn(5, 4, generator=G, dtype=torch.float64)
    primal = chain(Features(phi, RIDGE), Y, [alpha] * 3)
    dual = chain(Kernel(phi @ phi.T, RIDGE), Y, [alpha] * 3)
    for a, b in zip(primal, dual):
        assert torch.allclose(new @ a.coefficients, new @ phi.T @ b.coefficients, atol=1e-12)
    if alpha:
        ends = new @ limit(Features, phi, Y, RIDGE, alpha), new @ phi.T @ limit(Kernel, phi @ phi.T, Y, RIDGE, alpha)
        assert torch.allclose(*ends, atol=1e-12)


def test_all_points_as_landmarks_are_the_kernel():
    Z, W = landmarks(X, N, 0.4, seed=0)
    phi = kernel_matrix(X, Z, 0.4) @ W
    assert torch.allclose(phi @ phi.T, K, atol=1e-8)


def test_the_kernel_by_hand():
    expected = torch.tensor([[torch.exp(-0.4 * ((a - b) ** 2).sum()) for b in X] for a in X])
    assert torch.allclose(K, expected.double(), atol=1e-6) and torch.allclose(K.diagonal(), torch.ones(N).double())
    assert torch.allclose(kernel_matrix(X, X, 0.0), X @ X.T)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Kernel(torch.zeros(2, 3), 1.0), "square"),
        (lambda: Kernel(K, 0.0), "positive number"),
        (lambda: Kernel(-K, 1e-6), "larger ridge"),
        (lambda: Features(torch.zeros(3), 1.0), "features"),
        (lambda: limit(Kernel, K, Y, 1.0, 1.5), r"\[0, 1\]"),
    ],
)
def test_bad_matrices_are_told(call, words):
    with pytest.raises(UserError, match=words):
        call()


# -- kernel models -----------------------------------------------------------------------------------------------


def run_in(folder, **options):
    return Run(folder, quiet=True, device="cpu", **options)


def test_the_saved_model_predicts_what_the_chain_does(tmp_path):
    made = problem("diabetes", seed=1)
    found = kernel(run_in(tmp_path), made, Config(ridge=0.01, steps=4))
    found.save(tmp_path)
    again = stillhouse.load(tmp_path / "students/student")
    (c, k), test = made.outputs, made.y[2]
    row = found.logs[found.cost["best_step"] - 1]
    assert mse((again(made.x[2]) - c) / k, (test - c) / k) == pytest.approx(row["test_mse"], abs=1e-12)
    assert row["validation_mse"] == min(r["validation_mse"] for r in found.logs)
    assert found.logs[0]["alpha"] == 1.0 and "test_accuracy" not in row


def test_the_ridge_is_the_best_held_out_one_of_step_one(tmp_path):
    made = problem("diabetes", seed=2)
    errors = {r: kernel(run_in(tmp_path / str(r)), made, Config(ridge=r, steps=1)).logs[0]["validation_mse"]
              for r in (1e-3, 1e-2, 1e-1, 1.0)}  # fmt: skip
    chosen = kernel(run_in(tmp_path / "chosen"), made, Config(steps=1))
    assert chosen.cost["ridge"] == pytest.approx(min(errors, key=errors.get))


def test_landmarks_come_close_to_the_whole_kernel(tmp_path):
    made = problem("diabetes", seed=1)
    cfg = Config(ridge=0.1, weight="fixed", alpha=0.3, steps=3)
    whole = kernel(run_in(tmp_path / "a"), made, cfg)["student"].model
    some = kernel(run_in(tmp_path / "b"), made, replace(cfg, landmarks=len(made.x[0])))["student"].model
    assert torch.allclose(whole(made.x[2]), some(made.x[2]), atol=1e-3 * float(made.y[0].std()))
    few = kernel(run_in(tmp_path / "c"), made, replace(cfg, landmarks=20))["student"].model
    assert isinstance(few, KernelModel) and few.points.shape == (20, 10)


def test_targets_of_classes_and_numbers():
    x = np.random.default_rng(0).normal(size=(60, 4))
    two = from_table("two", x, np.arange(60) % 2)
    assert two.y[0].shape == (36, 1) and set(two.y[0].flatten().tolist()) == {-1.0, 1.0}
    three = from_table("three", x, np.array(["a", "b", "c"])[np.arange(60) % 3])
    assert three.classes == ("a", "b", "c") and three.y[0].sum(1).eq(-1).all()
    assert three.accuracy(three.y[2], three.y[2]) == 1.0 and two.accuracy(-two.y[2], two.y[2]) == 0.0
    numbers = from_table("numbers", x, x[:, 0] * 3 + 5)
    assert numbers.accuracy(numbers.y[0], numbers.y[0]) is None
    inputs, targets = numbers.standardised()
    for t in (inputs[0], targets[0]):
        assert t.mean(0).abs().max() < 1e-12 and torch.allclose(t.std(0, correction=0), torch.ones(t.shape[1]).double())
    assert not torch.equal(from_table("other", x, np.arange(60) % 2, seed=1).x[0], two.x[0])


def test_the_three_parts_share_no_sample():
    x = np.arange(100.0)[:, None]
    parts = [set(p.flatten().tolist()) for p in from_table("t", x, np.arange(100) % 2).x]
    assert [len(p) for p in parts] == [60, 20, 20] and len(set.union(*parts)) == 100


def test_digits_as_a_kernel_problem(tmp_path):
    data = load("digits", limit=200)
    made = from_data(data)
    assert [len(x) for x in made.x] == [160, 40, 539] and made.x[0].shape[1] == 64
    found = kernel(run_in(tmp_path), made, Config(steps=3))
    assert found.logs[0]["test_accuracy"] > 0.8


def test_a_table_of_ones_own_from_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    x = np.random.default_rng(0).normal(size=(40, 3))\n"
        "    return x, x @ [1.0, 2.0, 3.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "mine:load", "--kernel", "linear", "--quiet", "--out", str(tmp_path / "run")]
    assert invoke(["run", NAME, *flags]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["metrics"]["test_mse"] < 1e-3 and not report["claims"]


# -- last layers -------------------------------------------------------------------------------------------------


def test_the_head_is_the_ridge_regression_on_its_features(tmp_path):
    data, net = load("digits", limit=200), CNN.build(seed=1)
    before = [p.clone() for p in net.parameters()]
    family = last_layer(run_in(tmp_path), data, net, Config(method="last-layer", ridge=0.1, steps=1), spec=CNN)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    learn, _ = split(data.train, 0.2, seed=stillhouse.system.fold(0, "held out"))
    phi, y = features(net, "head", learn, "cpu")
    middle, ridge = phi.mean(0), family.cost["ridge"]
    a, b = phi - middle, y - y.mean(0)
    w = torch.linalg.solve(a.T @ a + ridge * torch.eye(phi.shape[1]).double(), a.T @ b)
    T, made = family.cost["temperature"], family["student"].model
    assert torch.allclose(made.head.weight.double(), w.T / T, atol=1e-5)
    assert torch.allclose(made.head.bias.double(), (y.mean(0) - middle @ w) / T, atol=1e-5)
    assert ridge == pytest.approx(0.1 * float(a.square().sum(1).mean()))


def test_features_are_what_the_head_reads():
    data, net = load("digits", limit=30), CNN.build(seed=1).eval()
    phi, y = features(net, "head", data.train, "cpu", size=7)
    z, labels = predict(net, data.train)
    assert torch.allclose(net.head(phi.float()), z, atol=1e-5) and torch.equal(y.argmax(1), labels)


def test_a_refitted_head_reads_better_and_says_how_sure_it_is(tmp_path):
    data, net = load("digits", limit=300), CNN.build(seed=1)  # random features: all is in the head
    family = last_layer(run_in(tmp_path), data, net, Config(method="last-layer"), spec=CNN)
    was = classification(*predict(net, data.test))
    now = classification(*predict(family["student"].model, data.test))
    assert now["accuracy"] > was["accuracy"] + 0.3 and now["nll"] < was["nll"]
    assert family.logs[0]["alpha"] == 1.0 and len(family.logs) == 5


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LogSoftmax(1)), "not the output of an nn.Linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), "expected the 10 classes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), "and a bias"),
    ],
)
def test_heads_that_cannot_be_refitted_are_told(net, words, tmp_path):
    with pytest.raises(UserError, match=words):
        last_layer(run_in(tmp_path), load("digits", limit=60), net, Config(method="last-layer"))


def test_the_last_layer_of_a_student_of_another_run(tmp_path):
    first = ["run", "wml", "--data", "digits", "--limit", "80", "--model", "stillhouse:cnn", "--ratios", "0", "0.5"]
    assert invoke([*first, "--epochs", "1", "--quiet", "--out", str(tmp_path / "wml")]) == 0
    teacher = ["--method", "last-layer", "--teacher", str(tmp_path / "wml/students/p50"), "--data", "digits"]
    assert invoke(["run", NAME, *teacher, "--limit", "150", "--quiet", "--out", str(tmp_path / "head")]) == 0
    again = stillhouse.load(tmp_path / "head/students/student")
    assert classification(*predict(again, load("digits").test))["accuracy"] > 0.5


# -- networks ----------------------------------------------------------------------------------------------------


def test_the_mixture_loss_by_hand():
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 4).double(), nn.Linear(3, 4).double()
    batch = {"input": X, "label": torch.arange(N) % 4}
    alpha, penalty = 0.3, 0.01
    found = Mixture(student, Frozen(teacher), alpha, Config(penalty=penalty)).learn(batch, Clock())
    q, t, e = student(X).softmax(1), teacher(X).softmax(1), F.one_hot(batch["label"], 4).double()
    by_hand = alpha * F.mse_loss(q, e) + (1 - alpha) * F.mse_loss(q, t)  # the mean over classes, as released
    by_hand = by_hand + penalty * (student.weight.square().sum().sqrt() + student.bias.square().sum().sqrt())
    assert found.total.item() == pytest.approx(by_hand.item(), abs=1e-12)
    assert set(found.terms) == {"label", "teach", "norm"}


def test_the_first_step_and_labels_alone_do_not_ask_the_teacher():
    def never(batch):
        raise AssertionError("asked")

    batch = {"input": X, "label": torch.arange(N) % 4}
    nets = [nn.Linear(3, 4).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    alone = Mixture(nets[0], None, 0.3, Config(penalty=0.0)).learn(batch, Clock())
    labels = Mixture(nets[1], never, 1.0, Config(penalty=0.0)).learn(batch, Clock())
    assert torch.equal(alone.total, labels.total) and set(labels.terms) == {"label"}


def test_the_norms_have_a_gradient_at_zero():
    net = nn.Linear(3, 4).double()
    nn.init.zeros_(net.bias)
    Mixture(net, None, 1.0, Config(penalty=1.0)).learn(
        {"input": X, "label": torch.arange(N) % 4}, Clock()
    ).total.backward()
    assert torch.isfinite(net.bias.grad).all()


def test_the_estimate_is_the_best_mix_of_two_networks():
    held = load("digits", limit=100).train
    u, v = MLP.build(seed=1), MLP.build(seed=2)
    found = estimate(u, v, held)
    (a, y), (b, _) = predict(u, held), predict(v, held)
    p, q, e = a.double().softmax(1), b.double().softmax(1), F.one_hot(y, 10).double()
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    errors = torch.stack([(w * p + (1 - w) * q - e).square().sum() for w in grid])
    assert found == pytest.approx(float(grid[errors.argmin()]), abs=5e-4)


def test_steps_of_networks(tmp_path):
    data = load("digits", limit=120)
    cfg = replace(TINY, method="networks", steps=3)
    run = run_in(tmp_path)
    family = networks(run, data, MLP, cfg)
    assert [m.name for m in family.members] == ["g0", "g1", "g2"]
    stages = {p.name for p in (tmp_path / "stages").iterdir()}
    assert stages == {"generation0", "generation1", "generation2", "on-teacher1-0", "on-teacher2-0"}
    weights = [r["label_weight"] for r in family.logs if "label_weight" in r]
    assert weights[0] == 1.0 and len(weights) == 3 and all(0 <= w <= 1 for w in weights)
    fixed = networks(run_in(tmp_path / "fixed"), data, MLP, replace(cfg, weight="fixed"))
    assert fixed.notes == ["weight of the labels, by step: 1.000, 0.200, 0.200"]
    assert torch.equal(fixed["g0"].model[1].weight, family["g0"].model[1].weight)


def test_what_goes_with_which_method_is_told(tmp_path):
    data = load("digits", limit=60)
    with pytest.raises(UserError, match="needs a Problem"):
        distill(run_in(tmp_path), data, cfg=Config())
    with pytest.raises(UserError, match="needs Data and a model"):
        distill(run_in(tmp_path), data, cfg=Config(method="networks"))
    with pytest.raises(UserError, match="needs a ModelSpec, got MLP"):
        networks(run_in(tmp_path), data, MLP.build())


class Registered(nn.Module):
    """A classifier whose head is not the linear layer that was registered last."""

    def __init__(self):
        super().__init__()
        self.head, self.hidden = nn.Linear(8, 10), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.hidden(x.flatten(1)).relu())


def test_the_head_is_what_gives_the_logits_wherever_it_is_registered(tmp_path):
    data, net = load("digits", limit=120), Registered()
    made = last_layer(run_in(tmp_path), data, net, Config(method="last-layer"))["student"].model
    assert torch.equal(made.hidden.weight, net.hidden.weight) and not torch.equal(made.head.weight, net.head.weight)


X_OK, WORDS = np.random.default_rng(0).normal(size=(40, 3)), np.array(["a", "b"] * 20)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.where(X_OK > 2, np.nan, X_OK), WORDS, "x.*NaN"),
        (X_OK, np.append(np.arange(39.0), np.nan), "y.*NaN"),
        (X_OK, np.ones(40), "constant"),
        (X_OK, np.zeros(40, int), "two classes"),
        (np.array([["a"]] * 40), WORDS, "must be numbers"),
        (X_OK, np.array([1, "a"] * 20, dtype=object), "targets must be numbers"),
        (X_OK, np.zeros((40, 2), int), "targets must be numbers"),
        (X_OK, WORDS[:30], "as many targets"),
        (1.0, WORDS, "as many targets"),
    ],
)
def test_tables_that_cannot_be_learned_are_told(x, y, words):
    with pytest.raises(UserError, match=words):
        from_table("mine", x, y)


def test_a_limit_is_of_the_training_part(monkeypatch):
    whole, few = problem("breast_cancer", 3), problem("breast_cancer", 3, limit=50)
    assert len(few.x[0]) == 50 and torch.equal(few.x[1], whole.x[1]) and torch.equal(few.x[2], whole.x[2])
    rows = {tuple(r) for r in whole.x[0].tolist()}
    assert all(tuple(r) in rows for r in few.x[0].tolist())
    assert abs(float(few.y[0].mean() - whole.y[0].mean())) < 0.05  # the classes keep their shares


def test_a_kernel_matrix_too_large_is_told_before_it_is_made(tmp_path, monkeypatch):
    from stillhouse.recipes.weighted_ground_truth_self_distillation import recipe

    monkeypatch.setattr(recipe, "MOST", 100)
    with pytest.raises(UserError, match="--landmarks"):
        kernel(run_in(tmp_path), problem("diabetes"), Config())
    with pytest.raises(UserError, match="at most the 265"):
        kernel(run_in(tmp_path), problem("diabetes"), Config(landmarks=266))
    kernel(run_in(tmp_path), problem("diabetes"), Config(landmarks=30))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "-0.1"], ["alpha", "[0, 1]"]),
        (["--steps", "0"], ["steps", "from 1"]),
        (["--model", "stillhouse:cnn"], ["--model does nothing", "--method kernel"]),
        (["--student", "stillhouse:cnn"], ["--student does nothing", "--method kernel"]),
        (["--data", "diabetes", "--epochs", "3"], ["--epochs does nothing", "--method kernel"]),
        (["--data", "diabetes", "--alpha", "0.3"], ["--alpha does nothing", "--weight optimal"]),
        (["--data", "diabetes", "--label-noise", "0.1"], ["--label-noise does nothing"]),
        (["--method", "networks", "--data", "digits", "--teacher", "x"], ["--teacher does nothing", "networks"]),
        (["--method", "networks", "--data", "digits", "--ridge", "1"], ["--ridge does nothing", "networks"]),
        (["--method", "networks", "--model", "torchvision:resnet18", "--data", "digits"], ["cannot take inputs"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--data", "os:getcwd"], ["(x, y)", "str"]),
        (["--method", "last-layer", "--data", "digits"], ["one --teacher"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    code = invoke(["run", NAME, *flags, "--quiet", "--out", str(tmp_path / "x")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_a_network_of_ones_own_class_count(tmp_path):
    small = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [8]})
    cfg = replace(TINY, method="networks", steps=1, epochs=1)
    assert len(networks(run_in(tmp_path), load("digits", limit=60), small, cfg)) == 1
