"""Instance-specific label smoothing: the card's exact checks, generations and their checkpoints, calibration."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from table import Row
from torch import nn

from stillhouse import objectives as O
from stillhouse.calibration import certainty, fit_temperature
from stillhouse.cli import invoke
from stillhouse.data import Data, load, split
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, predict
from stillhouse.generations import Best, Learner, generations
from stillhouse.models import ModelSpec
from stillhouse.recipes.instance_label_smoothing.experiment import MLP, TINY, few_digits
from stillhouse.recipes.instance_label_smoothing.recipe import Config, distill, teacher_quality
from stillhouse.recipes.instance_label_smoothing.systems import Beta, Plain, Taught
from stillhouse.run import Run
from stillhouse.system import Clock, Terms, Update
from stillhouse.teachers import EMA, Frozen
from stillhouse.weights import warm_decay

CNN = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 6, 12]})
_SGD = {"optimizer": "sgd", "lr": 0.05}
ROWS = [
    Row("instance_label_smoothing", "generations", {"rule": "generations", "generations": 3, "epochs": 1.0}),
    Row("instance_label_smoothing", "batch norm", {"epochs": 1.0}, {"student": CNN}),
    Row("instance_label_smoothing", "smoothing", {"rule": "smoothing", "held_out": 0.0, "epochs": 1.0}),
    Row("instance_label_smoothing", "split", {"epochs": 1.0}, micro_batch=10),
]
_PLAIN = Row("instance_label_smoothing", "plain", {"rule": "plain"})
ZERO = [
    (Row("instance_label_smoothing", "beta 0", {"alpha": 0.0}), _PLAIN),
    (Row("instance_label_smoothing", "entropy 0", {"rule": "entropy", "penalty": 0.0}), _PLAIN),
]
JOINT = [
    Row("instance_label_smoothing", "beta by sgd", _SGD),
    Row("instance_label_smoothing", "generations by sgd", {**_SGD, "rule": "generations"}),
]

K, N = 5, 12
G = torch.Generator().manual_seed(3)
X = torch.randn(N, 4, generator=G, dtype=torch.float64)
Y = torch.randint(0, K, (N,), generator=G)
BATCH = {"input": X, "label": Y}


def line(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, K).double()


def system(**settings):
    made = Beta(line(), Config(**settings))
    made.ema.model.load_state_dict(line(1).state_dict())
    return made


def sure(model):
    return model(X).softmax(1).gather(1, Y[:, None]).squeeze(1).detach()


# -- targets -----------------------------------------------------------------------------------------------------


def test_targets_sum_to_one_and_hold_b_on_the_label():
    b = torch.rand(N, generator=G, dtype=torch.float64)
    t = O.smoothed(Y, b, K, torch.float64)
    assert torch.allclose(t.sum(1), torch.ones(N, dtype=torch.float64), atol=1e-15)
    assert torch.equal(t.gather(1, Y[:, None]).squeeze(1), b)
    others = t[~F.one_hot(Y, K).bool()].view(N, K - 1)
    assert torch.allclose(others, ((1 - b) / (K - 1))[:, None].expand_as(others), atol=1e-15)


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_a_constant_b_is_label_smoothing_in_either_convention(epsilon):
    z = line()(X)
    ours = O.cross_entropy(z, O.smoothed(Y, 1 - epsilon, K, torch.float64))
    theirs = F.cross_entropy(z, Y, reduction="none", label_smoothing=epsilon * K / (K - 1))
    assert torch.allclose(ours, theirs, atol=1e-12)
    loss = Plain(line(), Config(rule="smoothing", epsilon=epsilon)).learn(BATCH, Clock()).total
    assert torch.allclose(loss, ours.mean(), atol=1e-12)


def test_strengths_have_the_order_of_the_confidence_in_the_true_class():
    made = system(a=3.0)
    b, c = made.strengths(BATCH, Clock(seed=1)), sure(made.ema.model)
    assert spearmanr(b, c).statistic == pytest.approx(1.0, abs=1e-12)
    assert b.argmin() == c.argmin()  # reversed, the hardest sample would be trusted most
    drawn = O.beta_draws(N, 3.0, Clock(seed=1).generator("beta"), torch.float64)
    assert torch.equal(b.sort().values, drawn.sort().values)
    chance = system(assign="random").strengths(BATCH, Clock(seed=1))
    assert torch.equal(chance, drawn) and not torch.equal(chance, b)
    assert not torch.equal(made.strengths(BATCH, Clock(seed=1, step=1)), b)


def test_ranks_go_by_order_alone_and_ties_go_to_the_first():
    values, by = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([5.0, 5.0, -1.0])
    assert O.ranked_like(values, by).tolist() == pytest.approx([0.2, 0.3, 0.1])
    assert torch.equal(O.ranked_like(values, by), O.ranked_like(values, by.exp()))
    with pytest.raises(UserError, match="must both be"):
        O.ranked_like(values, by[:2])


@pytest.mark.parametrize("a", [0.5, 1.0, 3.0])
def test_draws_are_from_beta(a):
    b = O.beta_draws(200_000, a, torch.Generator().manual_seed(0), torch.float64)
    mean, variance = a / (a + 1), a / ((a + 1) ** 2 * (a + 2))
    assert abs(float(b.mean()) - mean) < 3 * math.sqrt(variance / len(b))
    assert abs(float((b <= 0.5).double().mean()) - 0.5**a) < 3 * math.sqrt(0.25 / len(b))  # F(b) = b^a


def test_a_large_a_is_cross_entropy():
    loss = system(a=1e9).learn(BATCH, Clock()).total
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(line()(X), Y).detach()), abs=1e-6)


# -- the losses --------------------------------------------------------------------------------------------------


def test_the_loss_by_hand_and_its_mass_on_the_label():
    alpha, made = 0.6, system(alpha=0.6)
    b, log_q = made.strengths(BATCH, Clock()), line()(X).log_softmax(1)
    mass = (1 - alpha) + alpha * b
    label = F.one_hot(Y, K).double()
    target = label * mass[:, None] + (1 - label) * (alpha * (1 - b) / (K - 1))[:, None]
    terms = made.learn(BATCH, Clock())
    assert float(terms.total.detach()) == pytest.approx(float(-(target * log_q.detach()).sum(1).mean()), abs=1e-12)
    assert set(terms.terms) == {"label", "smooth"}


def test_alpha_zero_is_cross_entropy_bit_for_bit():
    zero = system(alpha=0.0).learn(BATCH, Clock()).total
    assert torch.equal(zero, Plain(line(), Config(rule="plain")).learn(BATCH, Clock()).total)


def test_the_order_of_the_batch_does_not_matter():
    p = torch.randperm(N, generator=G)
    moved = {"input": X[p], "label": Y[p]}
    a, b = (system().learn(batch, Clock()).total for batch in (BATCH, moved))
    assert float(a.detach()) == pytest.approx(float(b.detach()), abs=1e-12)


def test_entropy_is_rewarded():
    z = line()(X)
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1).mean()
    loss = Plain(line(), Config(rule="entropy", penalty=0.3)).learn(BATCH, Clock()).total
    assert loss.item() == pytest.approx((F.cross_entropy(z, Y) - 0.3 * entropy).item(), abs=1e-12)


def test_only_the_teacher_is_tempered_and_there_is_no_square():
    """∂L/∂z = [(1−α)(softmax(z) − e_y) + α(softmax(z) − softmax(t/T))] / n, through the bias."""
    student, teacher, alpha, T = line(), line(2), 0.4, 4.0
    Taught(student, Frozen(teacher), Config(teach=alpha, temperature=T)).learn(BATCH, Clock()).total.backward()
    q, t = student(X).softmax(1), (teacher(X) / T).softmax(1)
    by_hand = (1 - alpha) * (q - F.one_hot(Y, K)) + alpha * (q - t)
    assert torch.allclose(student.bias.grad, by_hand.mean(0), atol=1e-12)


# -- the averaged network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "expected"), [(1, 0.5), (2, 2 / 3), (1000, 1 - 1 / 1001), (5000, 0.999)])
def test_the_decay_warms_up(t, expected):
    assert warm_decay(0.999)(Clock(step=t - 1)) == pytest.approx(min(expected, 0.999), abs=1e-15)


def test_the_average_starts_as_a_copy_and_is_the_mean_after_one_step():
    made = Beta(line(), Config())
    before = made.ema.model.weight.clone()
    assert torch.equal(before, made.student.weight)
    with torch.no_grad():
        made.student.weight.add_(1.0)
    made.after_step(Clock(step=0))
    assert torch.allclose(made.ema.model.weight, (before + made.student.weight) / 2, atol=1e-15)


def test_the_average_gets_no_gradient_and_is_not_moved():
    made = system()
    made.learn(BATCH, Clock()).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in made.ema.parameters())
    moving = {id(p) for u in made.updates() for p in u.params}
    assert moving == {id(p) for p in made.student.parameters()}


def test_the_average_normalises_by_the_batch_as_the_student_does():
    net = CNN.build(seed=1)
    x = {"input": torch.randn(16, 1, 8, 8, generator=G) * 3 + 1}
    batch, running = (EMA(net, 0.9, batch_statistics=b)(x).logits for b in (True, False))
    net.train()
    assert torch.allclose(batch, net(x["input"]), atol=1e-6)
    assert not torch.allclose(batch, running, atol=1e-2)
    dropping = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5))
    average = EMA(dropping, 0.9, batch_statistics=True)
    here = {"input": X.float()}
    assert torch.equal(average(here).logits, average(here).logits)  # dropout stays off


def test_ranks_are_those_of_the_global_batch():
    """Three processes with unequal shares: each gets its part of what one process would assign."""
    whole, made = system().strengths(BATCH, Clock()), system()
    shares = [list(range(N))[:5], list(range(N))[5:9], list(range(N))[9:]]
    own = made.ema(BATCH).logits.double().log_softmax(-1).gather(1, Y[:, None]).squeeze(1)
    ranks = torch.cat([torch.full((len(share),), float(r)) for r, share in enumerate(shares)])
    for rank, share in enumerate(shares):

        def all_rows(rows, share=share):
            """What all processes have of what this one asks about: its confidences, then its rank."""
            return own if torch.allclose(rows, own[share]) else ranks

        clock = Clock(rank=rank, world=len(shares), all_rows=all_rows)
        part = {"input": X[share], "label": Y[share]}
        assert torch.allclose(made.strengths(part, clock), whole[share], atol=1e-12)


# -- generations -------------------------------------------------------------------------------------------------


def test_each_generation_starts_afresh_and_learns_from_the_one_before(tmp_path):
    data, seen = load("digits", limit=60), []
    cfg = replace(TINY, rule="generations", generations=3, epochs=1, teach=1.0)
    import stillhouse.recipes.instance_label_smoothing.recipe as recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "Taught", lambda m, t, c: seen.append((m, t)) or Taught(m, t, c))
        family = distill(Run(tmp_path, quiet=True, device="cpu"), data, MLP, cfg)
    assert [m.name for m in family.members] == ["g0", "g1", "g2"] and len(seen) == 2
    x = data.train.take(np.arange(5))
    for k, (_, teacher) in enumerate(seen):
        assert torch.equal(teacher(x).logits, family.members[k].model(x["input"]))
        assert teacher.unchanged()
    first = [m.model[1].weight for m in family.members]
    assert not torch.allclose(first[0], first[1], atol=1e-2) and not torch.allclose(first[1], first[2], atol=1e-2)


def test_the_best_checkpoint_is_chosen_and_ties_keep_the_first():
    net = nn.Linear(1, 1)
    best = Best(net)
    for value, score in ((1.0, 0.2), (2.0, 0.7), (3.0, 0.7), (4.0, 0.1)):
        nn.init.constant_(net.weight, value)
        best.offer(net, score)
    assert float(best.model.weight) == 2.0 and float(best.score) == pytest.approx(0.7)
    assert not any(p.requires_grad for p in best.parameters()) and not best.train().training


def test_generations_give_the_checkpoint_that_validation_liked_best(tmp_path):
    data = load("digits", limit=80)
    train, held = split(data.train, 0.3)
    scores = iter([0.1, 0.9, 0.5, 0.4])
    states = []

    class Simple(Learner):
        def updates(self):
            return [Update("learn", list(self.student.parameters()), partial(torch.optim.SGD, lr=0.1))]

        def learn(self, batch, clock):
            return Terms(ce=O.cross_entropy(self.student(batch["input"]), batch["label"]).mean())

    def make(g, before):
        states.append(Simple(MLP.build()))
        return states[-1]

    from stillhouse.data import Batches

    kept = []

    def score(z, y):
        kept.append(states[-1].student[1].weight.detach().clone())
        return next(scores)

    run = Run(tmp_path, quiet=True, device="cpu")
    (network,) = generations(run, make, Batches(train, 28), 1, epochs=4, validation=held, score=score)
    assert torch.equal(network[1].weight, kept[1]) and not torch.equal(kept[1], kept[3])
    again = generations(run, make, Batches(train, 28), 1, epochs=4, validation=held, score=score)
    assert torch.equal(again[0][1].weight, kept[1])  # read back, not trained again: the scores are used up
    assert [r["validation"] for r in run.log("generation0") if "validation" in r] == [0.1, 0.9, 0.5, 0.4]


def test_checkpoints_are_chosen_on_held_out_samples_and_never_on_the_test_part(tmp_path):
    whole = load("digits", limit=100)

    class Watched:
        def __init__(self, samples):
            self.samples, self.asked = samples, 0

        def __getattr__(self, name):
            return getattr(self.samples, name)

        def __len__(self):
            return len(self.samples)

        def take(self, *a, **k):
            self.asked += 1
            return self.samples.take(*a, **k)

    test, held = Watched(whole.test), Watched(split(whole.test, 0.5)[1])
    data = Data("watched", whole.train, test, held_out=held)
    before = test.asked
    distill(Run(tmp_path, quiet=True, device="cpu"), data, MLP, replace(TINY, epochs=2))
    assert test.asked == before and held.asked >= 2


def test_a_live_module_is_trained_in_place_but_not_over_generations(tmp_path):
    data, net = load("digits", limit=60), MLP.build(seed=4)
    before = net[1].weight.clone()
    family = distill(Run(tmp_path / "a", quiet=True, device="cpu"), data, net, TINY)
    assert family["student"].model is net and not torch.equal(net[1].weight, before)
    with pytest.raises(UserError, match="ModelSpec"):
        distill(Run(tmp_path / "b", quiet=True), data, net, replace(TINY, rule="generations"))


# -- calibration -------------------------------------------------------------------------------------------------


def test_temperature_is_where_the_likelihood_is_best():
    z = 3 * torch.randn(300, K, generator=G, dtype=torch.float64)
    y = torch.distributions.Categorical(logits=z / 2.5).sample()
    best = fit_temperature(z, y)
    grid = torch.linspace(0.1, 8, 1581, dtype=torch.float64)
    nll = torch.stack([F.cross_entropy(z / T, y) for T in grid])
    assert best == pytest.approx(float(grid[nll.argmin()]), abs=0.006)
    assert fit_temperature(z, z.argmax(1)) == pytest.approx(0.01, rel=1e-3)  # never wrong: the sharper the better
    smoothed = torch.stack([F.cross_entropy(z / T, z.argmax(1), label_smoothing=0.02) for T in grid])
    prior = fit_temperature(z, z.argmax(1), smoothing=0.02)
    assert prior == pytest.approx(float(grid[smoothed.argmin()]), abs=0.006) and prior > 0.2
    with pytest.raises(UserError, match="logits"):
        fit_temperature(z, y[:3])


def test_diversity_and_uncertainty_by_hand():
    z = line()(X).detach()
    found = certainty(z, Y, T=2.0)
    q = (z / 2).softmax(1)
    own = q.gather(1, Y[:, None]).numpy()
    assert found["diversity"] == pytest.approx(float(own.std()), abs=1e-12)
    assert found["confidence"] == pytest.approx(float(own.mean()), abs=1e-12)
    assert found["uncertainty"] == pytest.approx(float(-(q * q.log()).sum(1).mean()), abs=1e-12)
    smooth = O.smoothed(Y, 0.7, K, torch.float64).log()
    alike = certainty(smooth, Y)  # plain label smoothing: uncertain, but the same of every sample
    assert alike["diversity"] == pytest.approx(0.0, abs=1e-9) and alike["uncertainty"] > 0.5


def test_a_family_says_how_it_would_teach(tmp_path):
    data = load("digits", limit=60)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, MLP, TINY)
    z, y = predict(family["student"].model, data.train)
    assert teacher_quality(family, data) == {"student": certainty(z, y)}


# -- mistakes and the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "1.5"], ["alpha", "0 to 1"]),
        (["--a", "0"], ["a:", "positive"]),
        (["--generations", "0"], ["generations", "from 1"]),
        (["--milestones", "30", "60"], ["milestones", "parts of the run"]),
        (["--rule", "gamma"], ["gamma"]),
        (["--data", "digits", "--model", "torchvision:resnet18"], ["network cannot take inputs", "(1, 8, 8)"]),
        (["--data", "digits", "--model", "stillhouse:mlp", "--pretrained"], ["no published weights"]),
        (["--data", "digits", "--epsilon", "0.1"], ["--epsilon does nothing", "--rule smoothing"]),
        (["--data", "digits", "--rule", "plain", "--a", "2"], ["--a does nothing", "--rule beta"]),
        (["--data", "digits", "--assign", "random", "--ema-norm", "running"], ["--ema-norm", "--assign random"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    code = invoke(["run", "instance_label_smoothing", *flags, "--quiet", "--out", str(tmp_path / "x")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_noise_is_in_the_training_labels_alone():
    data, judge = few_digits(0, 0.2)
    assert (data.train.labels != data.train.clean).sum() == 60 and len(judge) == 300
    mine = {int(i) for i in data.train.take(np.arange(300))["id"]}
    assert not mine & {int(i) for i in judge.take(np.arange(300))["id"]}
    assert classification(torch.eye(10)[data.test.labels] * 50, torch.from_numpy(data.test.labels))["accuracy"] == 1.0


@pytest.mark.data
def test_fashion_mnist_from_the_command_line(data_root, tmp_path):
    common = ["--data", "fashion-mnist", "--limit", "64", "--model", "stillhouse:cnn", "--epochs", "1", "--quiet"]
    flags = ["--rule", "generations", "--label-noise", "0.2", "--out", str(tmp_path / "x")]
    assert invoke(["run", "instance_label_smoothing", *common, *flags]) == 0
    assert (tmp_path / "x/students/g1/model.safetensors").exists()
