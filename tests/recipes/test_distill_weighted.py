"""DistillNearest and DistillWeighted: the card's exact checks, similarities by hand, sources by name, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from table import Row
from torch import nn

import stillhouse
from stillhouse import objectives as O
from stillhouse.cli import invoke
from stillhouse.data import Arrays, Batches, Data, load, together
from stillhouse.data.pools import Unlabelled, few, open_pool
from stillhouse.encoders import Encoder, Probed, encode, open_encoder
from stillhouse.errors import UserError
from stillhouse.export import save_student
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.distill_weighted.experiment import STUDENT, TINY, task
from stillhouse.recipes.distill_weighted.recipe import Config, Weighted, distill
from stillhouse.recipes.distill_weighted.selection import mixed, remembered, select, some_of, weigh
from stillhouse.run import Run
from stillhouse.similarity import METRICS, h_score, knn, leep, logistic, nce, parc, probe, standardised, weights_of
from stillhouse.system import Clock

ROWS = [Row("distill_weighted", "nearest", {"rule": "nearest", "tune": (), "half": True, "label": 0.0})]
ZERO = [
    (Row("distill_weighted", "labels alone", {"label": 1.0}), Row("distill_weighted", "plain", {}, {"plain": True}))
]
JOINT = [Row("distill_weighted", "joint", {"optimizer": "sgd", "lr": 0.05, "tune": ()})]

RNG = np.random.default_rng(3)
LABELS = np.repeat(np.arange(3), 5)
FEATURES = RNG.normal(size=(15, 4)) + 1.5 * np.eye(3, 4)[LABELS]


def sources(n: int = 2, seed: int = 0, width: int = 6) -> list[Encoder]:
    """Small networks with classes of their own."""
    made = []
    for k in range(n):
        spec = ModelSpec("stillhouse:mlp", 3 + k, (1, 8, 8), options={"widths": [width]})
        made.append(Encoder(spec.build(seed=seed + k), torch.zeros(1, 1, 8, 8), name=f"s{k}"))
    return made


# -- check 1: PARC ------------------------------------------------------------------------------------------------


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """PARC with loops: Pearson's correlation of every pair of rows, mean ranks, Pearson's correlation of the ranks."""
    z = (x - x.mean(0)) / x.std(0)
    onehot = np.eye(y.max() + 1)[y]
    lists: list[list[float]] = [[], []]
    for i in range(len(y)):
        for j in range(i + 1, len(y)):
            for out, rows in zip(lists, (z, onehot)):
                out.append(round(1 - np.corrcoef(rows[i], rows[j])[0, 1], 10))
    ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v] for v in lists]
    return float(np.corrcoef(*ranks)[0, 1])


def test_parc_by_hand():
    assert parc(FEATURES, LABELS) == pytest.approx(by_hand(FEATURES, LABELS), abs=1e-12)
    uneven = np.array([0, 0, 1, 2, 2, 2, 2, 0, 1, 0, 2, 2, 0, 2, 0])
    assert parc(FEATURES, uneven) == pytest.approx(by_hand(FEATURES, uneven), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_parc_of_the_labels_themselves_is_one(classes):
    y = np.arange(4 * classes) % classes
    assert parc(np.eye(classes)[y], y) == pytest.approx(1.0, abs=1e-12)


def test_parc_does_not_see_scale_shift_or_the_order_of_samples():
    expected, order = parc(FEATURES, LABELS), RNG.permutation(15)
    assert parc(FEATURES * np.array([3.0, 0.01, 7.0, 100.0]) + 5, LABELS) == pytest.approx(expected, abs=1e-9)
    assert parc(FEATURES[order], LABELS[order]) == pytest.approx(expected, abs=1e-12)
    assert parc(FEATURES, LABELS[order]) != pytest.approx(expected, abs=1e-3)


def test_parc_leaves_dead_features_out_and_says_nothing_of_nothing():
    dead = np.concatenate([FEATURES, np.full((15, 2), 0.1)], 1)
    assert parc(dead, LABELS) == pytest.approx(parc(FEATURES, LABELS), abs=1e-12)
    assert parc(np.full((15, 3), 7.0), LABELS) == 0.0


def test_as_many_components_as_samples_are_never_taken():
    """Whitened to n−1 components all samples are equally far apart, and the score is noise."""
    wide = RNG.normal(size=(16, 40)) + 15 * np.eye(4, 40)[np.arange(16) % 4]
    y = np.arange(16) % 4
    assert parc(wide, y, dims=15) == parc(wide, y, dims=4) > 0.5


# -- the other similarities ---------------------------------------------------------------------------------------


def test_leep_by_hand():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    y = np.array([0, 0, 1])
    joint = np.array([[1.5 / 3, 0.5 / 3], [0.2 / 3, 0.8 / 3]])  # label by source class
    given = joint / joint.sum(0)
    expected = np.mean([math.log(given[y[i]] @ p[i]) for i in range(3)])
    assert leep(p, y) == pytest.approx(expected, abs=1e-12)


def test_nce_is_minus_the_conditional_entropy():
    hard = np.array([0, 0, 0, 1, 1, 2])
    y = np.array([0, 0, 1, 1, 1, 0])
    entropy = 3 / 6 * -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert nce(np.eye(3)[hard] * 0.4 + 0.2, y) == pytest.approx(-entropy, abs=1e-12)


def test_h_score_of_the_labels_is_one_less_than_the_classes():
    assert h_score(np.eye(3)[LABELS], LABELS, shrink=False) == pytest.approx(2.0, abs=1e-9)
    wide = RNG.normal(size=(15, 40))
    assert h_score(wide, LABELS, shrink=False) == pytest.approx(2.0, abs=1e-6)  # says nothing where n ≤ d
    assert h_score(wide, LABELS) < h_score(np.eye(3)[LABELS] + 0.1 * RNG.normal(size=(15, 3)), LABELS)


def test_h_score_is_the_trace_of_between_over_all():
    x = standardised(FEATURES)
    between = sum(5 / 15 * np.outer(x[c == LABELS].mean(0), x[c == LABELS].mean(0)) for c in range(3))
    assert h_score(FEATURES, LABELS, shrink=False) == pytest.approx(np.trace(np.linalg.inv(x.T @ x / 15) @ between))


def test_neighbours_are_counted_without_the_sample_itself():
    z, right = standardised(FEATURES), 0
    for i in range(15):
        cosines = [z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j]) if j != i else -9 for j in range(15)]
        right += LABELS[int(np.argmax(cosines))] == LABELS[i]
    assert knn(FEATURES, LABELS) == pytest.approx(right / 15) and 3 < right < 15
    near = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    y = np.array([0, 0, 1, 1, 1, 0])
    assert knn(near, y, k=3) < knn(near, np.array([0, 0, 0, 1, 1, 1]), k=2) == 1.0


def test_the_linear_classifier_is_at_its_optimum():
    """Of its penalised loss in standardised features: C Σ CE + ‖W‖²/2 has gradient 0."""
    found = probe(FEATURES, LABELS, 3)
    spread, mean = FEATURES.std(0), FEATURES.mean(0)
    z = torch.tensor((FEATURES - mean) / spread)
    w = torch.tensor(found.weight * spread, requires_grad=True)
    b = torch.tensor(found.bias + found.weight @ mean, requires_grad=True)
    loss = found.C * O.cross_entropy(z @ w.T + b, torch.tensor(LABELS)).sum() + w.square().sum() / 2
    g = torch.autograd.grad(loss, [w, b])
    assert max(float(t.abs().max()) for t in g) < 1e-2 * max(1, found.C)
    assert found.held_out.shape == (15, 3) and np.allclose(found.held_out.sum(1), 1)


def test_the_penalty_is_chosen_on_samples_the_classifier_has_not_seen():
    noise = RNG.normal(size=(30, 50))
    y = np.arange(30) % 3
    assert probe(noise, y, 3).C == 1e-4  # nothing can be learned: the strongest penalty says the least wrong
    assert 0.1 < logistic(noise, y) < 0.7 and logistic(np.eye(3)[y] + 0.01 * noise[:, :3], y) == 1.0


def test_two_classes_have_two_logits():
    from sklearn.linear_model import LogisticRegression

    y, z = LABELS % 2, standardised(FEATURES)
    found = probe(FEATURES, y, 2, grid=(1.0,))
    said = np.exp(FEATURES @ found.weight.T + found.bias)
    expected = LogisticRegression(C=1.0).fit(z, y).predict_proba(z)
    assert np.allclose(said / said.sum(1, keepdims=True), expected, atol=1e-4)


def test_one_sample_per_class_takes_the_middle_penalty():
    found = probe(FEATURES[::5], LABELS[::5], 3)
    assert found.C == 1.0 and found.held_out is None


# -- check 2 and 5: weights ---------------------------------------------------------------------------------------


def test_weights_by_power():
    e = [0.5, 0.25, -0.3, 0.1]
    assert np.array_equal(weights_of(e, 0), np.full(4, 0.25))
    assert weights_of(e, 2) == pytest.approx(np.array([0.25, 0.0625, 0, 0.01]) / 0.3225, abs=1e-15)
    for p in (100.0, 1e6, math.inf):
        assert weights_of(e, p) == pytest.approx([1, 0, 0, 0], abs=1e-12)
    for p in (0.0, 0.3, 12.0, 1e5):
        w = weights_of(e, p)
        assert w.sum() == pytest.approx(1, abs=1e-12) and (p == 0 or w[2] == 0)
        assert w == pytest.approx(weights_of([100 * s for s in e], p), abs=1e-12)  # only ratios count


def test_scores_below_zero_of_log_likelihoods_still_weigh():
    cfg = Config(metric="leep", power=1.0)
    assert weigh([-1.0, -2.0], cfg, 1.0) == pytest.approx(np.array([math.e, 1]) / (math.e + 1))
    assert weigh([-1.0, -2.0], replace(cfg, rule="nearest"), 1.0).tolist() == [1, 0]
    assert weigh([-1.0, -2.0, -1.5], replace(cfg, minmax=True), 1.0)[1] == 0


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_selects(name):
    data, _, _ = task(0)
    found = select(sources(3), data.train, Config(metric=name, power=0.0))
    assert len(set(found.scores)) == 3 or name == "h-score"  # shrunk to nothing where there is nothing to see
    assert found.weights == [1 / 3] * 3 and all(f"weight.{k}" in found.heads for k in (0, 1, 2))


def test_the_power_is_tuned_on_held_out_labels():
    from stillhouse.recipes.distill_weighted.selection import tuned
    from stillhouse.similarity import Probe

    y = np.array([0, 1])
    good, bad = np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([[0.1, 0.9], [0.9, 0.1]])
    cfg = Config(tune=(0.0, 1.0, 9.0))
    found = {k: Probe(np.zeros((2, 1)), np.zeros(2), 1.0, q) for k, q in enumerate((good, bad))}
    assert tuned([0.6, 0.3], found, y, cfg) == 9.0 and tuned([0.3, 0.6], found, y, cfg) == 0.0


def test_a_dropped_source_never_sees_the_pool(tmp_path):
    data, pool, _ = task(0)
    seen: dict[str, int] = {}

    class Counting(Encoder):
        def answer(self, x):
            seen[self.name] = seen.get(self.name, 0) + len(x)
            return super().answer(x)

    many = [Counting(s.network, torch.zeros(1, 1, 8, 8), name=s.name) for s in sources(3)]
    seen.clear()
    found = remembered(run := Run(tmp_path, device="cpu"), many, data.train, Config(rule="nearest"))
    assert len(found.kept) == 1
    mixed(run, many, found, pool, Config())
    assert {k: v - len(data.train) for k, v in seen.items()} == {
        f"s{k}": len(pool) if k in found.kept else 0 for k in range(3)
    }


def test_probes_are_some_of_every_class():
    data = load("digits").train
    some = some_of(data, 50, seed=1)
    assert len(some) == 50 and np.bincount(some.labels).tolist() == [5] * 10
    assert some_of(data, 10**6, 0) is data


# -- check 3: one mixture instead of many teachers ----------------------------------------------------------------


def test_the_mixture_has_the_gradient_of_the_weighted_sum():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    t = 2 * torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    w = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    apart = sum(w[s] * O.kl(t[s], z).mean() for s in range(3))
    q = (w[:, None, None] * t.softmax(-1)).sum(0).log()
    together_ = O.kl(q, z).mean()
    (a,), (b,) = torch.autograd.grad(apart, z), torch.autograd.grad(together_, z)
    assert torch.allclose(a, b, atol=1e-12) and float(apart.detach() - together_.detach()) > 0.01  # but not its value


class Says:
    """A teacher of fixed logits."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, batch):
        return {"logits": self.logits}


def test_the_loss_by_hand():
    torch.manual_seed(0)
    student, t = nn.Linear(3, 2).double(), torch.randn(5, 2, dtype=torch.float64)
    x, u, y = torch.randn(4, 3).double(), torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0])
    batch = {"labelled": {"input": x, "label": y}, "pool": {"input": u}}
    Weighted(student, Says(t), Config(label=0.3)).learn(batch, Clock()).total.backward()
    left = 0.3 * (student(x).softmax(-1) - torch.eye(2)[y]).sum(0) / 4
    right = 0.7 * (student(u).softmax(-1) - t.softmax(-1)).sum(0) / 5
    assert torch.allclose(student.bias.grad, (left + right).detach(), atol=1e-12)


# -- check 4: λ at its ends ---------------------------------------------------------------------------------------


def test_at_the_ends_the_other_part_is_not_even_drawn():
    class Refuses:
        steps_per_epoch, fingerprint = 1, ""

        def batch(self, clock):
            raise AssertionError("drawn")

    data, pool, _ = task(0)
    student = STUDENT.build()
    labels = Weighted(student, None, Config(label=1.0))
    labels.learn(together(labelled=Batches(data.train, 8), pool=Refuses()).batch(Clock()), Clock())
    teach = Weighted(student, Says(torch.zeros(8, 5)), Config(label=0.0))
    teach.learn(together(pool=Batches(pool, 8), labelled=Refuses()).batch(Clock()), Clock())


# -- check 6: the cache, the classifier ---------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_kept_answers_equal_the_sources(tmp_path, half):
    data, pool, _ = task(0)
    run, cfg, many = Run(tmp_path, device="cpu"), Config(power=1.0, half=half), sources(3)
    found = remembered(run, many, data.train, cfg)
    batch = Batches(pool, 16, seed_with="pool").batch(Clock(step=2))
    kept = mixed(run, many, found, pool, cfg)(batch)["logits"]
    q = sum(found.weights[k] * found.teacher(many[k], k)(batch["input"]).softmax(-1) for k in found.kept)
    q = q / sum(found.weights[k] for k in found.kept)
    assert torch.allclose(kept.exp(), q, atol=2e-3 if half else 1e-6)


def test_another_power_needs_no_further_pass(tmp_path):
    data, pool, _ = task(0)
    asked: list[int] = []

    class Counting(Encoder):
        def answer(self, x):
            asked.append(len(x))
            return super().answer(x)

    many = [Counting(s.network, torch.zeros(1, 1, 8, 8), name=s.name) for s in sources(2)]
    for name, power in (("a", 0.0), ("b", 1.0)):
        run, cfg = Run(tmp_path / name, device="cpu"), Config(power=power)
        found = remembered(run, many, data.train, cfg)
        asked.clear()
        mixed(run, many, found, pool, cfg, tmp_path / "cache")
        assert bool(asked) == (name == "a")


def test_a_classifier_on_an_encoder_is_its_formula():
    source = sources(1)[0]
    x, w, b = torch.randn(3, 1, 8, 8), torch.randn(2, 6), torch.randn(2)
    assert torch.allclose(Probed(source, w, b)(x), source(x) @ w.T + b, atol=1e-5)


def test_one_source_is_nearest_and_weighted_alike(tmp_path):
    data, pool, _ = task(0)
    made = []
    for rule in ("weighted", "nearest"):
        cfg = replace(TINY, rule=rule, tune=())
        run = Run(tmp_path / rule, device="cpu", quiet=True)
        made.append(distill(run, data, pool, STUDENT, sources(1), cfg)["student"].model.state_dict())
    assert all(torch.equal(made[0][k], v) for k, v in made[1].items())


def test_sources_are_not_changed(tmp_path):
    data, pool, _ = task(0)
    many = sources(2)
    before = [{k: v.clone() for k, v in s.state_dict().items()} for s in many]
    distill(Run(tmp_path, device="cpu", quiet=True), data, pool, STUDENT, many, TINY)
    assert all(torch.equal(v, s.state_dict()[k]) for s, old in zip(many, before) for k, v in old.items())
    assert not any(p.requires_grad for s in many for p in s.parameters())


# -- encoders -----------------------------------------------------------------------------------------------------


def test_features_are_what_the_classifier_reads():
    net = ModelSpec("stillhouse:cnn", 4, (1, 8, 8)).build()
    made, x = Encoder(net, torch.zeros(1, 1, 8, 8)), torch.randn(5, 1, 8, 8)
    features, logits = made.answer(x)
    assert made.at == "head:in" and torch.allclose(net.head(features), logits, atol=1e-6)
    assert not made.train().network.training


def test_a_network_without_a_classifier_gives_its_output_and_maps_are_averaged():
    trunk = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU())
    made, x = Encoder(trunk, torch.zeros(1, 1, 8, 8)), torch.randn(2, 1, 8, 8)
    assert not made.classifies and torch.allclose(made(x), trunk(x).mean((2, 3)))


def test_inputs_of_another_shape_and_scale_are_brought_to_the_source():
    class Keeps(nn.Module):
        def forward(self, x):
            self.seen = x
            return x.flatten(1)

    net = Keeps()
    made = Encoder(net, torch.zeros(1, 1, 8, 8), shape=(3, 16, 16), normalize=([0.5], [2.0], [1.0] * 3, [4.0] * 3))
    made(torch.ones(2, 1, 8, 8))
    assert net.seen.shape == (2, 3, 16, 16) and torch.allclose(net.seen, torch.full((), (1 * 2 + 0.5 - 1) / 4))
    with pytest.raises(UserError, match=r"reads 3 channels, the data have 2"):
        Encoder(net, torch.zeros(1, 2, 8, 8), shape=(3, 8, 8))


def test_encoding_a_set_is_encoding_its_samples():
    data = load("digits", limit=20)
    source = sources(1)[0]
    features, p = encode(source, data.train, batch_size=7)
    x = data.train.take(np.arange(20))["input"]
    assert torch.allclose(features, source(x), atol=1e-6) and torch.allclose(p.sum(1), torch.ones(20))


# -- pools --------------------------------------------------------------------------------------------------------


def test_a_few_labels_and_the_rest_share_nothing():
    data = load("digits").train
    some, rest = few(data, 4, seed=2)
    assert np.bincount(some.labels).tolist() == [4] * 10
    assert sorted([*some.indices, *rest.indices]) == list(range(len(data)))
    hidden = Unlabelled(rest)
    assert set(hidden.take(np.arange(9))["label"].tolist()) == {-1} and set(hidden.labels.tolist()) == {-1}
    assert torch.equal(hidden.take(np.arange(9))["input"], rest.take(np.arange(9))["input"])


def test_a_folder_of_files_is_a_pool(tmp_path):
    from PIL import Image

    like = Arrays(np.zeros((4, 3, 8, 8), np.uint8), [0, 1, 0, 1], mean=[0.5] * 3, std=[0.5] * 3)
    (tmp_path / "deep/er").mkdir(parents=True)
    for k, name in enumerate(["a.png", "deep/b.png", "deep/er/c.png"]):
        Image.fromarray(np.full((10, 9, 3), 255 * (k == 0), np.uint8)).save(tmp_path / name)
    pool = open_pool(f"folder:{tmp_path}", like)
    x = pool.take(np.arange(3))["input"]
    assert x.shape == (3, 3, 8, 8) and torch.allclose(x[0], torch.ones(())) and torch.allclose(x[1], -torch.ones(()))
    with pytest.raises(UserError, match="shape"):
        open_pool("digits", like)


# -- the command --------------------------------------------------------------------------------------------------

COMMON = ["run", "distill_weighted", "--data", "digits", "--epochs", "1", "--model", "stillhouse:mlp", "--quiet"]


def saved_source(folder: Path, classes: int, shape: tuple[int, ...]) -> str:
    spec = ModelSpec("stillhouse:cnn", classes, shape)
    model = spec.build(seed=classes)
    Family([Member("one", model)], shape, tuple(map(str, range(classes))), model, spec).save(folder)
    return str(folder / "students/one")


def test_sources_by_folder_and_by_weights(tmp_path, capsys):
    first = saved_source(tmp_path / "a", 3, (3, 16, 16))  # other classes, channels and size than the data
    net = ModelSpec("stillhouse:cnn", 7, (1, 8, 8)).build(seed=1)
    save_student(tmp_path / "w", net, plan_json={})
    weights = f"stillhouse:cnn={tmp_path / 'w/model.safetensors'}"
    flags = ["--per-class", "4", "--sources", first, weights, f"{first}@block2"]
    assert invoke([*COMMON, *flags, "--metric", "logistic", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "nearest source" in said and (tmp_path / "run/report.html").exists()
    student = stillhouse.load(tmp_path / "run/students/student")
    assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    data = load("digits")
    assert open_encoder(weights, data).network.head.out_features == 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sources", "x"], ["--per-class", "--pool"]),
        (["--per-class", "4"], ["--sources is missing"]),
        (["--per-class", "4", "--sources", "nowhere/at/all"], ["nowhere/at/all", "plan.json"]),
        (["--per-class", "4", "--sources", "stillhouse:cnn"], ["no published weights", "FILE.safetensors"]),
        (["--per-class", "4", "--sources", "stillhouse:cnn=none.safetensors"], ["none.safetensors"]),
        (["--per-class", "4", "--sources", "nosuchmodule:f"], ["nosuchmodule"]),
        (["--per-class", "900", "--sources", "x"], ["class '0'", "900"]),
        (["--per-class", "4", "--pool", "cifr10", "--sources", "x"], ["cifar10"]),
        (["--metric", "park"], ["did you mean 'parc'"]),
        (["--per-class", "4", "--model", "torchvision:resnet18", "--label", "1"], ["network cannot take inputs"]),
        (["--label", "2"], ["label", "0 to 1"]),
        (["--rule", "nearest", "--tune", "1", "2"], ["tune"]),
        (["--rule", "nearest", "--power", "4"], ["--power does nothing", "--rule nearest"]),
        (["--tune", "1", "2", "--power", "4"], ["--power does nothing", "--tune"]),
        (["--label", "1", "--metric", "knn"], ["--metric does nothing", "--label 1"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    code = invoke([*COMMON, *flags, "--out", str(tmp_path / "x")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--sources x", "--per-class"), ("--pool nowhere", "nowhere"), ("--cache x", "--per-class"),
     ("--per-class 4", "--sources is missing")],
)  # fmt: skip
def test_what_the_user_brings_never_falls_to_the_built_in_experiment(flags, words, tmp_path, capsys):
    assert invoke(["run", "distill_weighted", *flags.split(), "--quiet", "--out", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err


def test_labels_alone_need_no_source(tmp_path):
    assert invoke([*COMMON, "--per-class", "4", "--label", "1", "--out", str(tmp_path / "x")]) == 0


def test_a_selection_is_not_taken_for_that_of_other_settings_samples_or_sources(tmp_path):
    data, _, _ = task(0)
    other, _, _ = task(1)
    run, many = Run(tmp_path, device="cpu"), sources(2)
    first = remembered(run, many, data.train, Config())
    assert remembered(run, many, data.train, Config()).scores == first.scores
    for args, word in (
        ((many, data.train, Config(power=1.0)), "power"),
        ((many, data.train, Config(tune=(1.0, 2.0))), "tune"),
        ((many, other.train, Config()), "labelled"),
        ((sources(2, seed=5), data.train, Config()), "sources"),
    ):
        with pytest.raises(UserError, match=f"made otherwise .*{word}"):
            remembered(run, *args)


def test_mistakes_in_python(tmp_path):
    data, pool, _ = task(0)
    run = Run(tmp_path, device="cpu", quiet=True)
    with pytest.raises(UserError, match="at least one source"):
        distill(run, data, pool, STUDENT, [], TINY)
    with pytest.raises(UserError, match=r"network gives 3 logits.*5 classes"):
        distill(run, data, pool, ModelSpec("stillhouse:mlp", 3, (1, 8, 8)), sources(), TINY)
    with pytest.raises(UserError, match="give a copy as the source"):
        net = STUDENT.build()
        distill(run.child("same"), data, pool, net, [net], TINY)
    with pytest.raises(UserError, match="two labelled samples of every class"):
        one_each, _ = few(data.train, 1)
        select(sources(), one_each, Config(tune=(1.0, 2.0)))
    with pytest.raises(UserError, match="needs sources that classify"):
        trunk = Encoder(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.zeros(1, 1, 8, 8))
        select([trunk], data.train, Config(metric="leep"))
    with pytest.raises(UserError, match="no labelled sample"):
        one = Arrays(np.zeros((4, 1, 8, 8), np.float32), [0, 1, 1, 0], classes=["a", "b", "c"])
        select(sources(), one, Config())
    with pytest.raises(UserError, match="similarity above 0"):
        weights_of([-1.0, 0.0], 2)
    with pytest.raises(UserError, match="not finite"):
        parc(np.full((4, 2), np.nan), np.arange(4) % 2)
    with pytest.raises(UserError, match="one class"):
        parc(np.zeros((4, 2)), np.zeros(4))


@pytest.mark.data
def test_trained_networks_of_the_data_folder_are_sources(data_root, tmp_path):
    """CIFAR-10 networks fit CIFAR-10 better than networks with fresh weights of the same structure."""
    weights = sorted((data_root / "resnet-cifar10-weights").glob("*resnet20*.safetensors"))
    assert weights, f"no ResNet-20 weights in {data_root / 'resnet-cifar10-weights'}"
    data = load("cifar10", root=data_root, limit=100)
    trained = open_encoder(f"stillhouse:resnet20={weights[0]}", data)
    fresh = Encoder(ModelSpec("stillhouse:resnet20", 10, (3, 32, 32)).build(), torch.zeros(1, 3, 32, 32))
    some, _ = few(data.train, 4, seed=0)
    found = select([fresh, trained], some, Config())
    assert found.nearest == 1 and Data("c", some, data.test)
