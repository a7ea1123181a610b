"""DisWOT: the exact checks of its card, what is compared, the search through it, DisWOT+, bad inputs."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse import cli
from stillhouse import objectives as O
from stillhouse.data import load
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.recipes.diswot import experiment
from stillhouse.recipes.diswot.recipe import Config, distill, train
from stillhouse.recipes.diswot.scoring import Look, Scorer, compare, look, randomise
from stillhouse.run import Run
from stillhouse.search import student
from stillhouse.spaces import Choices, Stages, named
from stillhouse.system import Clock
from stillhouse.taps import ends, tap
from stillhouse.teachers import Frozen, state_fingerprint

# -- contract ---------------------------------------------------------------------------------------------------------

_NOTHING = {"alpha": 0.0, "b1": 0.0, "b2": 0.0}
# R compares the samples of a batch, so only training without it can be split over processes.
_APART = {"b1": 0.0, "b2": 0.0}
ROWS = [Row("diswot", "random, relation, plain KD", {**_APART, "strategy": "random", "metric": "relation"})]
_OTHER = {**_NOTHING, "teacher_epochs": 2}
ZERO = [(Row("diswot", "no weight", _NOTHING), Row("diswot", "no weight, another teacher", _OTHER))]
JOINT = [Row("diswot", "kd", _APART, {"norm": False})]


def quiet(folder, seed=0):
    return Run(folder, seed=seed, device="cpu", quiet=True)


# -- the measures -----------------------------------------------------------------------------------------------------


def rand(*shape, seed=0, positive=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.abs() if positive else x


def batch(n=8, classes=5, side=8, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, side, side, generator=draws, dtype=torch.float64)
    return {"input": x, "label": torch.arange(n) % classes}


def net(depths=(1, 1, 1), widths=(4, 4, 6), classes=5, seed=0, kind="stillhouse:resnet"):
    options = {"depths": list(depths), "widths": list(widths)}
    return randomise(ModelSpec(kind, classes, (1, 8, 8), options=options).build().double(), seed)


def gram_by_hand(x):
    """Row by row, as the card has it: each row of X Xᵀ divided by its own length."""
    out = torch.zeros(len(x), len(x), dtype=x.dtype)
    for i in range(len(x)):
        row = torch.stack([(x[i] * x[j]).sum() for j in range(len(x))])
        out[i] = row / row.norm() if row.norm() > 0 else row
    return out


def test_relation_by_hand():
    t, s = rand(6, 3, 4, 4), rand(6, 5, 2, 2, seed=1)
    by_hand = (gram_by_hand(t.flatten(1)) - gram_by_hand(s.flatten(1))).square().sum() / 36
    torch.testing.assert_close(O.similarity(t, s).mean(), by_hand)
    assert O.similarity(t, s).shape == (6,)


def test_inter_channel_by_hand():
    t, s = rand(4, 3, 2, 5), rand(4, 3, 3, 3, seed=1)
    each = [(gram_by_hand(t[n].flatten(1)) - gram_by_hand(s[n].flatten(1))).square().sum() / 3 for n in range(4)]
    torch.testing.assert_close(O.inter_channel(t, s), torch.stack(each))
    # a value per sample: the rest of the batch does not matter
    torch.testing.assert_close(O.inter_channel(t[1:2], s[1:2]), each[1].unsqueeze(0))


@pytest.mark.parametrize("kind", ["stillhouse:resnet", "stillhouse.spaces:Stages"])
def test_1_equal_networks_have_no_distance(kind):
    a, b, other = net(kind=kind), net(kind=kind), net(kind=kind, seed=1)
    same, apart = (compare(look(a, batch()), look(n, batch())) for n in (b, other))
    assert same == {"relation": 0.0, "semantic": pytest.approx(0.0, abs=1e-14)}
    assert apart["relation"] > 1e-4 and apart["semantic"] > 1e-2
    by_class = compare(look(a, batch()), look(b, batch()), by_class=True)
    assert by_class == {"relation": 0.0, "semantic": 0.0}


@pytest.mark.parametrize("zeros", [False, True])
def test_2_closed_form_of_s_is_the_gram_computation(zeros):
    t, s = rand(5, 7), rand(5, 7, seed=1)
    if zeros:  # dead channels, and a class without any gradient
        t[:, 2], s[:, 4], s[3] = 0, 0, 0
    grams = [(gram_by_hand(a[:, None]) - gram_by_hand(b[:, None])).square().sum() / 7 for a, b in zip(t, s)]
    torch.testing.assert_close(O.class_activation(t, s), torch.stack(grams), rtol=0, atol=1e-12)
    for a, b, found in zip(t, s, O.class_activation(t, s)):  # E = rownorm(g gᵀ) by `gram`, rank one
        e = O.gram(a[:, None]) - O.gram(b[:, None])
        torch.testing.assert_close(e.square().sum() / 7, found, rtol=0, atol=1e-12)
    if not zeros:
        cos, signs = F.cosine_similarity(t, s), (t.sign() * s.sign()).mean(1)
        torch.testing.assert_close(O.class_activation(t, s), 2 - 2 * cos * signs)


def test_2_small_gradients_keep_their_precision():
    t, s = rand(5, 7), rand(5, 7, seed=1)
    small = O.class_activation((1e-25 * t).float(), (1e-18 * s).float())
    torch.testing.assert_close(small.double(), O.class_activation(t, s), rtol=0, atol=1e-6)


def test_3_relation_ignores_scale_and_rotation():
    t, s = rand(6, 3, 4, 4), rand(6, 5, 2, 2, seed=1)
    rotation, _ = torch.linalg.qr(rand(20, 20, seed=2))
    turned = (s.flatten(1) @ rotation).reshape(6, 5, 2, 2)
    found = O.similarity(t, s)
    torch.testing.assert_close(O.similarity(t, turned), found)
    torch.testing.assert_close(O.similarity(t, 1e30 * s), found)
    torch.testing.assert_close(O.similarity(t, (1e25 * s).float()).double(), found, rtol=1e-4, atol=1e-7)
    assert (O.similarity(t, s * torch.arange(1, 7)[:, None, None, None]) - found).abs().max() > 1e-3  # not per sample


@pytest.mark.parametrize("n", [2, 5, 16])
def test_4_bounds_of_the_relation(n):
    for seed in range(20):
        both = [rand(n, 3, seed=k + seed) for k in (0, 100)]
        assert 0 <= O.similarity(*both).mean() <= 4 / n
        assert 0 <= O.similarity(*(x.abs() for x in both)).mean() <= 2 / n
    one, sign = torch.ones(n, 1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    sign[::2] = -1
    far = O.similarity(torch.eye(n, dtype=torch.float64), one).mean()
    torch.testing.assert_close(far, torch.tensor((2 - 2 / n**0.5) / n, dtype=torch.float64))
    k = len(sign[::2])  # of them, 2k(n−k) ordered pairs have opposite signs
    expected = 4 / n * 2 * k * (n - k) / n**2
    torch.testing.assert_close(O.similarity(one, sign).mean(), torch.tensor(expected, dtype=torch.float64))


def test_5_the_order_of_the_batch_does_not_matter():
    data, order = batch(), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    mixed = {k: v[order] for k, v in data.items()}
    t, s = net(), net((2, 1, 1), seed=1)
    for by_class in (False, True):
        a = compare(look(t, data), look(s, data), by_class)
        b = compare(look(t, mixed), look(s, mixed), by_class)
        assert a == pytest.approx(b, rel=1e-10)


@pytest.mark.parametrize("measure", [O.similarity, O.inter_channel])
def test_gradients_reach_the_student_alone(measure):
    t, s = rand(4, 3, 2, 2).requires_grad_(), rand(4, 3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: measure(t.detach(), x), (s,))
    measure(t, s).sum().backward()
    assert t.grad is None and s.grad.abs().max() > 0
    measure(t, s, detach_teacher=False).sum().backward()
    assert t.grad.abs().max() > 0
    zero = torch.zeros(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    measure(t, zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_shapes_that_cannot_be_compared():
    with pytest.raises(UserError, match="one batch"):
        O.similarity(rand(3, 2), rand(4, 2))
    with pytest.raises(UserError, match="1×1 projector"):
        O.inter_channel(rand(3, 2, 4), rand(3, 5, 4))
    with pytest.raises(UserError, match="class_relation"):
        O.class_activation(rand(3, 2), rand(3, 5))
    with pytest.raises(UserError, match="same classes"):
        O.class_relation(rand(3, 2), rand(4, 2))
    assert O.class_relation(rand(3, 2), rand(3, 5)).shape == (3,)


def test_classes_by_hand():
    t, s = rand(4, 3), rand(4, 6, seed=1)
    torch.testing.assert_close(O.class_relation(t, s), (gram_by_hand(t) - gram_by_hand(s)).square().sum(1))
    assert O.class_relation(t, 5 * t).abs().max() < 1e-20


# -- one look ---------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_classifier_by_hand():
    """∂CE/∂w = (softmax(z) − y)ᵀ pooled / n, of the features before pooling."""
    model, data = net(), batch()
    seen = look(model, data)
    pooled = seen.features.mean((2, 3))
    p = F.softmax(pooled @ model.linear.weight.T + model.linear.bias, 1) - F.one_hot(data["label"], 5)
    torch.testing.assert_close(seen.gradient, p.T @ pooled / 8)
    assert not seen.features.requires_grad and seen.features.shape == (8, 6, 2, 2)


def test_nothing_accumulates_and_batch_statistics_are_taken():
    model, data = net(), batch()
    first = look(model, data)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.fill_(3.0)
    again = look(model, data)
    assert torch.equal(first.gradient, again.gradient) and torch.equal(first.features, again.features)
    assert all(p.grad is None for p in model.parameters())
    own = look(model, data, statistics=False)
    assert not torch.allclose(own.features, first.features)


def test_dropout_stays_off():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 5)).double()
    assert torch.equal(look(model, batch()).gradient, look(model, batch()).gradient)


def test_random_weights_are_standard_normal():
    model = ModelSpec("stillhouse:resnet20", 10, (3, 8, 8)).build()
    model.linear.bias.data.fill_(2)
    model.bn1.weight.data.fill_(3)
    randomise(model, 5)
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000:
            assert abs(m.weight.mean()) < 0.05 and abs(m.weight.std() - 1) < 0.05
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()
    assert not model.linear.bias.any()
    first, again = model.conv1.weight.clone(), ModelSpec("stillhouse:resnet20", 10, (3, 8, 8)).build(seed=1)
    assert torch.equal(randomise(again, 5).conv1.weight, first)
    assert not torch.equal(randomise(again, 6).conv1.weight, first)


@pytest.mark.parametrize(
    ("name", "shape", "features", "head"),
    [
        ("stillhouse:resnet20", (3, 32, 32), "layer3", "linear"),
        ("torchvision:resnet18", (3, 32, 32), "avgpool:in", "fc"),
        ("torchvision:mobilenet_v3_small", (3, 64, 64), "avgpool:in", "classifier.3"),
        ("torchvision:mobilenet_v2", (3, 32, 32), "features", "classifier.1"),
        ("timm:convnext_atto", (3, 64, 64), "head.global_pool:in", "head.fc"),
        ("timm:vit_tiny_patch16_224", (3, 32, 32), "norm", "head"),
    ],
)
def test_the_feature_map_before_pooling_is_found(name, shape, features, head):
    model = ModelSpec(name, 10, shape).build().eval()
    assert ends(model, torch.zeros(2, *shape)) == (features, head)


def test_networks_without_a_map_or_a_linear_classifier():
    with pytest.raises(UserError, match="MLP has no feature map"):
        ends(ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(UserError, match=r"no nn\.Linear that gives its logits"):
        ends(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), torch.zeros(2, 1, 8, 8))


# -- the score --------------------------------------------------------------------------------------------------------

SPEC = ModelSpec("stillhouse:resnet", 10, (1, 8, 8), options={"depths": [1, 1, 1], "widths": [4, 4, 8]})


def resnet(depths, widths):
    return replace(SPEC, options={"depths": list(depths), "widths": list(widths)})


SPACE = Choices({"first": (1, 2), "width": (4, 8)}, lambda a: resnet((a[0], 1, 1), (a[1], 4, 8)))
DIGITS = load("digits", limit=96)


def scorer(tmp_path, seed=0, space=SPACE, teacher=None, **changes):
    run = quiet(tmp_path, seed)
    return Scorer(run, space, DIGITS.train, teacher or SPEC.build(), SPEC, Config(**{"score_batch": 16, **changes}))


def test_the_score_is_a_function_of_seed_and_architecture(tmp_path):
    one, two, other = scorer(tmp_path), scorer(tmp_path), scorer(tmp_path, seed=1)
    archs = list(SPACE)
    first = {a: one(a) for a in archs}
    assert {a: two(a) for a in reversed(archs)} == first == {a: one(a) for a in archs}
    assert all(other(a) != first[a] for a in archs) and len({s["score"] for s in first.values()}) == 4


@pytest.mark.parametrize(
    ("metric", "parts"), [("both", ("relation", "semantic")), ("relation",) * 2, ("semantic",) * 2]
)
def test_the_score_is_the_mean_over_repetitions(metric, parts, tmp_path):
    found = scorer(tmp_path, metric=metric, repeats=3)
    looks = [compare(t, found._look((2, 4), r)) for r, t in enumerate(found.looks)]
    parts = ("relation", "semantic") if metric == "both" else (metric,)
    assert found((2, 4))["score"] == pytest.approx(-sum(sum(x[k] for x in looks) / 3 for k in parts))
    assert len({x["semantic"] for x in looks}) == 3  # other batches, other weights


def test_a_student_like_the_teacher_does_not_share_its_weights(tmp_path):
    assert scorer(tmp_path)((1, 4))["relation"] > 1e-5


@pytest.mark.parametrize("scoring", ["random", "trained"])
def test_the_teacher_is_never_changed(scoring, tmp_path):
    teacher = SPEC.build().train()
    before, modes = state_fingerprint(teacher), [m.training for m in teacher.modules()]
    found = scorer(tmp_path, teacher=teacher, scoring=scoring)
    found((1, 8))
    assert state_fingerprint(teacher) == before and [m.training for m in teacher.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_a_trained_teacher_is_looked_at_as_it_is(tmp_path):
    teacher = SPEC.build(seed=7)
    found = scorer(tmp_path, teacher=teacher, scoring="trained")
    with tap(teacher.eval(), "layer3") as seen, torch.no_grad():
        teacher(found.batches[1]["input"])
    assert torch.equal(found.looks[1].features, seen["layer3"])


def test_own_initialisation(tmp_path):
    found = scorer(tmp_path, init="own")
    assert found((1, 4)) != scorer(tmp_path)((1, 4))
    with pytest.raises(UserError, match="give the teacher by name"):
        Scorer(quiet(tmp_path), SPACE, DIGITS.train, SPEC.build(), None, Config(init="own"))


def test_a_network_that_passes_nothing_on_has_no_score(tmp_path):
    space = named("cell", (1, 8, 8), 10)
    small = Choices({"cell": (("none",) * 6, ("skip",) * 6)}, lambda a: replace(
        space.build(a[0]), options={"cell": list(a[0]), "width": 4, "cells": 1}))  # fmt: skip
    teacher = ModelSpec("stillhouse.spaces:CellNet", 10, (1, 8, 8), options={"width": 4, "cells": 1})
    cfg = replace(experiment.TINY, strategy="all", students=1, teacher_epochs=1)
    found = distill(quiet(tmp_path), DIGITS, teacher, cfg, space=small)
    dead = found.search.ranking()[-1]
    assert dead.arch == (("none",) * 6,) and dead.score is None
    assert found["best1"].spec.options["cell"] == ["skip"] * 6
    with pytest.raises(UserError, match="nothing reaches the teacher's classifier"):
        scorer(tmp_path, teacher=student(small, (("none",) * 6,))[0])
    assert Look(torch.zeros(2, 3), torch.ones(2, 3)).dead


def test_unequal_channels_take_the_class_variant_and_say_so(tmp_path):
    space = Choices({"width": (8, 12)}, lambda a: resnet((1, 1, 1), (4, 4, a[0])))
    found = scorer(tmp_path, space=space)
    assert found.by_class and "our variant" in found.notes[0] and "ends in 8 channels" in found.notes[0]
    r = found._look((8,), 0)
    assert compare(found.looks[0], r, True)["semantic"] != compare(found.looks[0], r)["semantic"]
    assert found((8,))["semantic"] > 0 and found((12,))["semantic"] > 0  # one measure for the whole space
    forced = scorer(tmp_path, space=space, semantic="channel")
    with pytest.raises(UserError, match="12 channels, the teacher in 8: S cannot compare them; give --semantic class"):
        forced((12,))
    assert not scorer(tmp_path, space=space, metric="relation").notes
    assert not scorer(tmp_path).by_class and scorer(tmp_path, semantic="class").by_class


def test_features_that_explode_say_what_to_do(tmp_path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(nn.Conv2d(32 if k else 1, 32, 3, padding=1) for k in range(40)))
            self.linear = nn.Linear(32, 10)

        def forward(self, x):
            return self.linear(self.body(x).mean((2, 3)))

    space = Choices({"only": (1,)}, lambda a: Deep())
    with pytest.raises(UserError, match="give --init own"):
        scorer(tmp_path, space=space, metric="relation")((1,))


# -- DisWOT+ ----------------------------------------------------------------------------------------------------------


def test_the_distiller_is_the_sum_of_its_parts(tmp_path, monkeypatch):
    """(1−α) CE + α T² KL + b1·R + b2·ICC, with a 1×1 projector where channels differ."""
    cfg = replace(experiment.TINY, alpha=0.7, b1=5.0, b2=0.3)
    made: list[Distill] = []
    monkeypatch.setattr("stillhouse.recipes.diswot.recipe.fit", lambda run, name, system, *a, **k: made.append(system))
    teacher, data = SPEC.build(seed=1).eval(), DIGITS.train.take(np.arange(12))
    for width in (8, 6):
        model = resnet((1, 2, 1), (4, 4, width)).build(seed=2)
        train(quiet(tmp_path), "x", model, teacher, DIGITS, cfg, 1)
        system = made[-1].train()
        terms = system.learn(data, Clock()).terms
        with tap(model, "layer3") as s, tap(teacher, "layer3") as t:
            z, y = model(data["input"]), data["label"]
            u = teacher(data["input"]).detach()
        projectors = [m for m in system.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
        assert len(projectors) == (width != 8)
        mine = projectors[0](s["layer3"]) if projectors else s["layer3"]
        expected = {
            "label": 0.3 * F.cross_entropy(z, y),
            "kd": 0.7 * 16 * F.kl_div((z / 4).log_softmax(1), (u / 4).softmax(1), reduction="batchmean"),
            "similarity": 5 * O.similarity(t["layer3"], s["layer3"]).mean(),
            "icc": 0.3 * O.inter_channel(t["layer3"], mine).mean(),
        }
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_without_weights_it_is_plain_training(tmp_path):
    cfg = replace(experiment.TINY, alpha=0.0, b1=0.0, b2=0.0)

    def trained(name, teacher):
        model = SPEC.build(seed=3)
        return state_fingerprint(train(quiet(tmp_path), name, model, teacher, DIGITS, cfg, 1))

    plain = trained("plain", None)
    assert trained("zero", SPEC.build(seed=4)) == plain
    cfg = replace(cfg, alpha=0.5)
    assert trained("half", SPEC.build(seed=4)) != plain


def test_the_relation_loss_brings_the_relations_together(tmp_path):
    cfg = replace(experiment.TINY, batch=32, b1=0.0, b2=0.0)
    run, found = quiet(tmp_path), {}
    teacher = train(run, "t", SPEC.build(), None, DIGITS, cfg, 5)
    for b1 in (0.0, 3000.0):
        model = train(run, f"b{b1}", SPEC.build(seed=5), teacher, DIGITS, replace(cfg, b1=b1), 5)
        found[b1] = experiment.apart(teacher, model, DIGITS)["R"]
    assert found[3000.0] < 0.7 * found[0.0]


def test_the_teacher_of_a_run_is_not_changed_and_the_student_reloads(tmp_path):
    teacher = SPEC.build(seed=1)
    before = state_fingerprint(teacher)
    found = distill(quiet(tmp_path), DIGITS, teacher, experiment.TINY, space=SPACE)
    assert state_fingerprint(teacher) == before and all(p.requires_grad for p in teacher.parameters())
    x = DIGITS.test.take(np.arange(4))["input"]
    for folder, m in zip(found.save(tmp_path), found.members, strict=True):
        assert torch.equal(stillhouse.load(folder)(x), m.model(x))


def test_a_live_space_says_its_own_class(tmp_path):
    space = Choices({"width": (4, 6)}, lambda a: Stages((1, 8, 8), 10, [1, 1, 1], [a[0], 4, 8]))
    found = distill(quiet(tmp_path), DIGITS, SPEC, experiment.TINY, space=space)
    (folder, *_) = found.save(tmp_path)
    with pytest.raises(UserError, match="live Stages"):
        stillhouse.load(folder)


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": 1.5}, "alpha: expected a number from 0 to 1, got 1.5"),
        ({"repeats": 0}, "repeats"),
        ({"budget": float("nan")}, "budget"),
        ({"b1": -1}, "b1"),
        ({"metric": "cka"}, "metric: expected both, relation, semantic, got 'cka'"),
        ({"strategy": "tpe"}, "strategy"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(UserError, match=said):
        Config(**changes)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data digits --space resnt", "no space 'resnt'; did you mean 'resnet'"),
        ("--data digits --model stillhouse:resnet8 --teacher-epochs 1 --budget 100", "the smallest, (1, 1, 1), costs"),
        ("--data digits --model stillhouse:mlp --teacher-epochs 1", "MLP has no feature map"),
        ("--data digits --model stillhouse:resnet8 --teacher-epochs 0", "teacher_epochs 0: a teacher by name"),
        ("--space cell", "has the spaces resnet-small and conv; give --data with cell"),
        ("--data digits --space nowhere:space --model stillhouse:resnet8 --teacher-epochs 1", "no module 'nowhere'"),
        ("--data digits --metric cka", "metric"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(flags, said, tmp_path, capsys):
    line = f"run diswot {flags} --limit 64 --device cpu --quiet --out {tmp_path / 'x'}"
    assert cli.invoke(line.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_command_with_a_space_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "diswot_space.py").write_text(
        "from stillhouse.spaces import Choices, Stages\n"
        "def widths(shape, classes):\n"
        "    return Choices({'width': (4, 8)}, lambda a: Stages(shape, classes, [1, 1, 1], [a[0], 4, 8]))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    flags = "--data digits --limit 64 --model stillhouse:resnet8 --space diswot_space:widths --evaluations 4"
    line = f"run diswot {flags} --teacher-epochs 1 --epochs 1 --out r --quiet --device cpu"
    assert cli.invoke(line.split()) == 0, capsys.readouterr().err
    assert type(stillhouse.load("r/students/best1")).__name__ == "Stages"
    report = stillhouse.Report.read("r")
    assert report.students[0].role == "base" and "our variant" in " ".join(report.notes)
    assert [t.title for t in report.tables] == ["Ranking"] and report.curves[0].title == "Search"
    assert Frozen(stillhouse.load("r/students/best1")).unchanged()
