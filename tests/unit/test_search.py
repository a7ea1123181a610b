"""Search over spaces of students: proposals, budgets, resuming, spaces by name, agreement of rankings."""

from __future__ import annotations

import itertools
import json
import math
import sys
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.evaluate import count_macs, count_params
from stillhouse.models import ModelSpec
from stillhouse.run import Run
from stillhouse.search import BLOCK, Costs, kendall, kendall_interval, search, student
from stillhouse.spaces import SPACES, Cell, Choices, Stages, from_space, frozen, named

SHAPE = (1, 8, 8)


class Toy(Choices):
    """Six slots of eight values; the cost is their sum, so nothing is built."""

    def __init__(self):
        super().__init__({f"slot {k}": tuple(range(8)) for k in range(6)}, lambda a: nn.Identity())

    def cost(self, arch, measure):
        return float(sum(arch))


BEST = (3, 1, 4, 1, 5, 2)


def near(arch):
    return {"score": -float(sum(abs(a - b) for a, b in zip(arch, BEST))), "first": float(arch[0])}


def go(folder, seed=0, score=near, space=None, **settings):
    settings = {"evaluations": 100, "population": 10, "sample": 5, "best": 2, **settings}
    return search(Run(folder, seed=seed, quiet=True, device="cpu"), space or Toy(), score, SHAPE, **settings)


def seen(found):
    return [(c.arch, c.score, c.cost, c.parts) for c in found.history]


# -- the walk ---------------------------------------------------------------------------------------------------------


def test_evolution_comes_to_the_optimum_and_beats_random_draws(tmp_path):
    settings = {"evaluations": 600, "population": 20, "sample": 10}
    found = [go(tmp_path / f"e{s}", s, **settings).ranking()[0] for s in range(3)]
    drawn = [go(tmp_path / f"r{s}", s, strategy="random", **settings).ranking()[0] for s in range(3)]
    assert all(c.score >= -1 for c in found) and any(c.arch == BEST for c in found)
    assert all(e.score > r.score for e, r in zip(found, drawn))


def test_a_child_is_a_mutation_of_one_of_the_best_of_the_youngest(tmp_path):
    """With the whole population as sample and one best, every child differs in one slot from the best of the last P."""
    found = go(tmp_path, evaluations=60, population=8, sample=8, best=1).history
    for i in range(8, 60):
        top = max(c.score for c in found[i - 8 : i])
        parents = [c.arch for c in found[i - 8 : i] if c.score == top]
        assert any(sum(a != b for a, b in zip(found[i].arch, p)) == 1 for p in parents), i


@pytest.mark.parametrize("strategy", ["evolution", "random", "all"])
def test_the_budget_is_never_exceeded(strategy, tmp_path):
    space = named("conv", SHAPE, 10)
    found = go(tmp_path, space=space, score=lambda a: {"score": float(sum(a))}, strategy=strategy, limit=5000.0)
    assert found.history and all(c.cost <= 5000 for c in found.history)
    assert all(c.cost == count_params(student(space, c.arch)[0]) for c in found.history[:5])
    if strategy == "all":
        fits = {a for a in space if count_params(student(space, a)[0]) <= 5000}
        assert {c.arch for c in found.history} == fits and len(found.history) == len(fits)


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_a_tight_budget_is_met_from_below(limit, tmp_path):
    """Random students never fit; the walk begins at the smallest one."""
    found = go(tmp_path, evaluations=20, limit=limit)
    assert all(c.cost <= limit for c in found.history) and len({c.arch for c in found.history}) >= (limit > 1) * 3


def test_random_draws_do_not_repeat_while_there_are_others(tmp_path):
    space = named("conv", SHAPE, 10)
    found = go(tmp_path, space=space, score=lambda a: {"score": 0.0}, strategy="random", evaluations=40)
    assert len({c.arch for c in found.history}) == 40


def test_same_seed_same_result_and_another_seed_another(tmp_path):
    a, b, c = (go(tmp_path / str(i), seed) for i, seed in enumerate((1, 1, 2)))
    assert seen(a) == seen(b) and seen(a) != seen(c)


@pytest.mark.parametrize("strategy", ["evolution", "random"])
def test_a_killed_search_goes_on_and_ends_the_same(strategy, tmp_path):
    whole, calls = go(tmp_path / "whole", strategy=strategy), []

    def fragile(arch):
        calls.append(arch)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return near(arch)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", score=fragile, strategy=strategy)
    before = len(calls)
    again = go(tmp_path / "killed", score=fragile, strategy=strategy)
    assert seen(again) == seen(whole) and seen(go(tmp_path / "killed", score=None, strategy=strategy)) == seen(whole)
    distinct = len({c.arch for c in whole.history})
    assert len(calls) - before <= distinct - before + 1 + BLOCK  # what was saved is not scored again


def test_a_student_is_scored_once(tmp_path):
    calls = []
    found = go(tmp_path, score=lambda a: calls.append(a) or near(a), evaluations=300)
    assert len(calls) == len(set(calls)) == len({c.arch for c in found.history}) < 300


def test_ranking_and_curve(tmp_path):
    """Best first, of equal scores the cheaper first, without a score last; the curve never falls."""
    scores = {0: 1.0, 1: None, 2: 3.0, 3: 3.0, 4: 2.0}
    space = Choices({"only": (3, 1, 2, 0, 4)}, lambda a: nn.Linear(1 + a[0], 1, bias=False))
    found = go(tmp_path, space=space, score=lambda a: {"score": scores[a[0]]}, strategy="all")
    assert [c.arch[0] for c in found.ranking()] == [2, 3, 4, 0, 1]
    assert found.curve() == [3.0] * 5
    assert found.history[1].score is None and found.history[1].order == -math.inf
    assert [c.arch for c in found.history] == [(3,), (1,), (2,), (0,), (4,)]


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_budget_below_the_smallest_names_it_with_its_cost(tmp_path):
    with pytest.raises(UserError, match=r"budget of 100 parameters: the smallest, \(1, 1, 1, 8\), costs 2,034 param"):
        go(tmp_path, space=named("conv", SHAPE, 10), limit=100.0)
    with pytest.raises(UserError, match=r"the smallest, \(1, 1, 1, 8\), costs 2,034"):
        go(tmp_path / "all", space=named("conv", SHAPE, 10), limit=100.0, strategy="all")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"limit": -1.0}, "budget must be"),
        ({"limit": math.nan}, "budget must be"),
        ({"measure": "bytes"}, "measure: expected params, macs, latency"),
        ({"score": lambda a: {"score": math.nan}}, "must be finite"),
    ],
)
def test_mistakes(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        go(tmp_path, **changes)


def test_a_search_under_other_settings_is_not_gone_on_with(tmp_path):
    go(tmp_path, settings={"repeats": 3})
    with pytest.raises(UserError, match=r"other settings \(repeats: 3, now 4\)"):
        go(tmp_path, settings={"repeats": 4})
    with pytest.raises(UserError, match="other settings"):
        go(tmp_path, settings={"repeats": 3}, limit=30.0)


def test_a_space_that_cannot_be_listed_says_so(tmp_path):
    class Endless:
        def random(self, rng):
            return (rng.random(),)

        def mutate(self, arch, rng):
            return self.random(rng)

        def build(self, arch):
            return nn.Linear(2, 2)

    with pytest.raises(UserError, match="Endless cannot be iterated; take evolution or random"):
        go(tmp_path, space=Endless(), strategy="all")
    assert len(go(tmp_path / "b", space=Endless(), score=lambda a: {"score": a[0]}).history) == 100


# -- spaces -----------------------------------------------------------------------------------------------------------


def test_choices_draw_inside_and_mutate_one_slot():
    space, rng = Toy(), Random(0)
    for _ in range(50):
        arch = space.random(rng)
        child = space.mutate(arch, rng)
        assert all(v in range(8) for v in (*arch, *child)) and sum(a != b for a, b in zip(arch, child)) == 1
    fixed = Choices({"a": (1,), "b": (1, 2)}, lambda a: nn.Identity())
    assert fixed.mutate((1, 1), rng) == (1, 2)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet", 64), ("resnet-widths", 256), ("conv", 54), ("resnet-small", 54), ("cell", 15_625)]
)
def test_spaces_by_name_build_from_json(name, count):
    space, rng = named(name, (3, 16, 16), 7), Random(1)
    assert len(space) == len(set(space)) == count
    arch = space.random(rng)
    spec = space.build(arch)
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spec.build(seed=3).eval()(x), again.build(seed=3).eval()(x))
    assert spec.build()(x).shape == (2, 7) and set(SPACES) >= {name}


def test_unequal_stages_are_the_resnet_where_they_are_equal():
    x = torch.randn(2, 3, 16, 16)
    published = ModelSpec("stillhouse:resnet20", 10, (3, 16, 16)).build(seed=1).eval()
    assert torch.equal(named("resnet", (3, 16, 16), 10).build((3, 3, 3)).build(seed=1).eval()(x), published(x))
    net = ModelSpec("stillhouse:resnet", 10, (3, 16, 16), options={"depths": [1, 2, 4], "widths": [4, 6, 10]}).build()
    assert [len(getattr(net, f"layer{k}")) for k in (1, 2, 3)] == [1, 2, 4] and net.linear.in_features == 10
    with pytest.raises(UserError, match="three stages"):
        ModelSpec("stillhouse:resnet", 10, (3, 16, 16), options={"depths": [1, 2]}).build()


@pytest.mark.parametrize(
    ("operation", "params", "macs"), [("none", 73_306, 7_783_050), ("conv3", 1_531_546, 220_119_690)]
)
def test_cells_have_the_published_sizes(operation, params, macs):
    """The smallest and the largest network of NAS-Bench-201 on CIFAR-10 (which counts the bias of the head as MACs)."""
    net = named("cell", (3, 32, 32), 10).build((operation,) * 6).build()
    assert count_params(net) == params and count_macs(net, torch.zeros(1, 3, 32, 32)) + 10 == macs


def test_a_cell_sums_its_edges():
    cell = Cell(("conv1", "none", "skip", "pool3", "conv3", "skip"), 3).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    e = cell.edges
    one = e["0-1"](x)
    two = one  # 0→2 is none, 1→2 skips
    three = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + e["1-3"](one) + two
    torch.testing.assert_close(cell(x), three)
    assert not Cell(("none",) * 6, 3)(x.float()).any()
    with pytest.raises(UserError, match="no operation 'conv5'; did you mean 'conv"):
        Cell(("conv5",) * 6, 3)


def test_unknown_spaces_and_bad_objects(tmp_path, monkeypatch):
    (tmp_path / "spaces_of_mine.py").write_text(
        "from torch import nn\n"
        "from stillhouse.spaces import Choices, Stages\n"
        "def good(shape, classes):\n"
        "    make = lambda a: Stages(shape, classes, [a[0]] * 3, [a[1]] * 3)\n"
        "    return Choices({'depth': (1, 2), 'width': (4, 8)}, make)\n"
        "def bad():\n    return nn.Linear(2, 2)\n"
        "def raises(shape):\n    raise KeyError('x')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match="no space 'resnt'; did you mean 'resnet'"):
        named("resnt", SHAPE, 10)
    with pytest.raises(UserError, match=r"returned Linear without random, mutate, build\(\)"):
        named("spaces_of_mine:bad", SHAPE, 10)
    with pytest.raises(UserError, match="raised KeyError"):
        named("spaces_of_mine:raises", SHAPE, 10)
    with pytest.raises(UserError, match="has no 'god'; did you mean 'good'"):
        named("spaces_of_mine:god", SHAPE, 10)
    space = named("spaces_of_mine:good", SHAPE, 10)
    spec = space.build((2, 8))
    assert spec.name == "stillhouse.spaces:from_space"
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))).build(seed=1)
    x = torch.randn(2, *SHAPE)
    assert isinstance(again, Stages) and torch.equal(again.eval()(x), spec.build(seed=1).eval()(x))
    assert torch.equal(student(space, (2, 8), 1)[0].eval()(x), again(x)) and student(space, (2, 8), 1)[1] == spec
    assert count_params(from_space("spaces_of_mine:good", [1, 4], SHAPE, 10)) < count_params(again)
    found = go(tmp_path / "run", space=space, score=lambda a: {"score": 0.0}, strategy="all")
    assert {c.arch for c in found.history} == set(itertools.product((1, 2), (4, 8)))


def test_architectures_survive_json():
    arch = (1, ("a", 2.5, None), True)
    assert frozen(json.loads(json.dumps(arch))) == arch
    with pytest.raises(UserError, match="numbers and words in tuples, got set"):
        frozen({1, 2})


def test_costs_are_measured_once_and_a_space_may_know_its_own(tmp_path):
    built = []

    def make(arch):
        built.append(arch)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, arch[0], bias=False))

    space = Choices({"width": (1, 2, 3)}, make)
    costs = Costs(space, "macs", SHAPE)
    assert [costs((2,)), costs((2,))] == [128, 128] and built == [(2,)]
    assert Costs(space, "latency", SHAPE)((1,)) > 0
    assert Costs(Toy(), "latency", SHAPE)((1,) * 6) == 6.0
    assert costs.cheapest(Random(0)) == (1,)


# -- rankings ---------------------------------------------------------------------------------------------------------


def test_kendall_against_scipy():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 12), rng.normal(size=12).round(1)
        assert kendall(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall([1, 2, 3], [2, 4, 9]) == 1 and kendall([1, 2, 3], [3, 2, 1]) == -1
    assert math.isnan(kendall([1, 1], [1, 2]))
    with pytest.raises(UserError, match="one length"):
        kendall([1, 2], [1, 2, 3])


def test_the_bootstrap_interval():
    rng = np.random.default_rng(1)
    a = rng.normal(size=30)
    b = a + rng.normal(size=30)
    mean, low, high = kendall_interval([(a, b)], seed=0)
    assert low < mean < high and high - low < 0.6 and mean == kendall(a, b)
    assert kendall_interval([(a, a)])[0] == 1 and kendall_interval([(a, a)])[1] == 1
    narrow = kendall_interval([(a, a + rng.normal(size=30)) for _ in range(8)])
    assert narrow[2] - narrow[1] < (high - low) / 1.8
    assert kendall_interval([(a, -a)], seed=3) == kendall_interval([(a, -a)], seed=3) == (-1, -1, -1)
