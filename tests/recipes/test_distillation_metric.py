"""The distillation score: its closed forms, honest sizes, the front, intervals; what reports and comparisons show."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.evaluate import count_bytes, count_params, fidelity
from stillhouse.export import save_student
from stillhouse.models import ModelSpec
from stillhouse.recipes.distillation_metric.copies import int8, pruned
from stillhouse.recipes.distillation_metric.experiment import TEACHER, TINY, claims
from stillhouse.recipes.distillation_metric.recipe import Config, distill
from stillhouse.report import (
    Claim,
    DistillationReport,
    Rated,
    Report,
    Student,
    compare,
    rate,
    read_arms,
    summary,
    write,
)
from stillhouse.run import Run
from stillhouse.score import (
    Interval,
    distillation_score,
    hypervolume,
    pack,
    paired_bootstrap,
    pareto,
    score_ratio,
    unpack,
)
from stillhouse.students.plan import Keep, Plan, signature
from stillhouse.trials import claim, difference

_SGD = {"optimizer": "sgd", "lr": 0.05}
ROWS = [Row("distillation_metric", "copies alone", {"hidden": (4,), "alone": False, "sparsity": 0.5})]
ZERO = [
    (
        Row("distillation_metric", "weight 0", {"objective": ("kd:0",), "label": 1.0}),
        Row("distillation_metric", "labels alone", {"objective": (), "label": 1.0}),
    )
]
JOINT = [Row("distillation_metric", "sgd", {**_SGD, "hidden": (4, 16)})]


# -- the score: exact checks of the card ------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_the_teacher_itself_scores_alpha(alpha):
    assert distillation_score(1e6, 1e6, 0.93, 0.93, alpha) == alpha
    assert distillation_score(7.0, 7.0, 0.93, 0.93, alpha, chance=0.1) == pytest.approx(alpha, abs=1e-15)
    assert distillation_score(7.0, 7.0, 12.0, 12.0, alpha, higher_is_better=False) == alpha


def test_linear_in_size_and_in_score_with_the_slopes_of_the_card():
    alpha, big, top = 0.3, 110.0, 0.8

    def ds(size, score):
        return distillation_score(size, big, score, top, alpha)

    for a, b in ((10.0, 20.0), (50.0, 170.0)):
        assert (ds(b, 0.5) - ds(a, 0.5)) / (b - a) == pytest.approx(alpha / big, rel=1e-12)
    for a, b in ((0.1, 0.4), (0.7, 0.95)):
        assert (ds(30.0, b) - ds(30.0, a)) / (b - a) == pytest.approx(-(1 - alpha) / top, rel=1e-12)


def test_limits_of_alpha():
    assert distillation_score(30, 120, 0.5, 0.8, alpha=1.0) == 0.25
    assert distillation_score(30, 120, 0.5, 0.8, alpha=0.0) == pytest.approx(1 - 0.5 / 0.8, abs=1e-15)


def test_units_of_size_and_of_score_do_not_matter():
    plain = distillation_score(30, 120, 0.5, 0.8, 0.4)
    assert distillation_score(30 * 4, 120 * 4, 0.5, 0.8, 0.4) == pytest.approx(plain, rel=1e-14)
    assert distillation_score(30, 120, 50.0, 80.0, 0.4) == pytest.approx(plain, rel=1e-14)
    assert distillation_score(30, 120, 0.5, 0.8, 0.4, chance=0.1) != pytest.approx(plain, abs=1e-3)


CASES = [  # the card's worked table: size ratio, score ratio, DS(.5), DS(.2)
    (1.0, 1.0, 0.500, 0.200),
    (0.60, 0.97, 0.315, 0.144),
    (0.04, 0.90, 0.070, 0.088),
    (0.04, 0.5 / 0.93, 0.251, 0.378),
    (0.50, 1.01, 0.245, 0.092),
]


@pytest.mark.parametrize(("size", "score", "half", "fifth"), CASES)
def test_the_worked_table_to_three_decimals(size, score, half, fifth):
    assert distillation_score(size, 1, score, 1, 0.5) == pytest.approx(half, abs=5e-4 + 1e-12)
    assert distillation_score(size, 1, score, 1, 0.2) == pytest.approx(fifth, abs=5e-4 + 1e-12)


def test_a_collapsed_binary_student_beats_a_good_one_raw_and_is_worse_than_nothing_corrected():
    good, collapsed = distillation_score(0.6, 1, 0.97, 1), distillation_score(0.04, 1, 0.5, 0.93)
    assert collapsed < good
    assert distillation_score(0.04, 1, 0.5, 0.93, chance=0.5) == pytest.approx(0.52, abs=1e-12)
    for alpha, size in itertools.product((0.0, 0.1, 0.3, 0.5), (1e-6, 0.01, 0.5)):  # claim 4, as a closed form
        assert distillation_score(size, 1, 0.25, 0.8, alpha, chance=0.25) == pytest.approx(alpha * size + 1 - alpha)
        assert distillation_score(size, 1, 0.25, 0.8, alpha, chance=0.25) > alpha


def test_errors_turn_the_ratio_round():
    assert score_ratio(20.0, 10.0, higher_is_better=False) == 0.5
    assert distillation_score(0.5, 1, 20.0, 10.0, 0.5, higher_is_better=False) == 0.5
    assert distillation_score(0.5, 1, 8.0, 10.0, 0.5, higher_is_better=False) < 0.25  # better than its teacher


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: distillation_score(1, 0, 1, 1), "size of the teacher"),
        (lambda: distillation_score(0, 1, 1, 1), "size of the student"),
        (lambda: distillation_score(1, 1, 1, 0), "score of the teacher"),
        (lambda: distillation_score(1, 1, 1, -5.0), "random"),
        (lambda: distillation_score(1, 1, float("nan"), 1), "finite"),
        (lambda: distillation_score(1, 1, 1, 1, alpha=1.2), "alpha"),
        (lambda: distillation_score(1, 1, 93.0, 95.0, chance=0.1), r"\[0, 1\]"),
        (lambda: distillation_score(1, 1, 0.3, 0.1, chance=0.1), "above 0.1"),
        (lambda: distillation_score(1, 1, 9.0, 8.0, higher_is_better=False, chance=0.1), "no chance"),
        (lambda: distillation_score(1, 1, 0.0, 8.0, higher_is_better=False), "error of the student"),
        (lambda: paired_bootstrap(lambda x: x), "columns"),
        (lambda: paired_bootstrap(lambda x, y: x - y, [1.0], [1.0, 2.0]), "lengths"),
        (lambda: paired_bootstrap(lambda x: x, []), "lengths"),
        (lambda: paired_bootstrap(lambda x: x, [1.0], level=1.0), "level"),
        (lambda: DistillationReport(Rated("t", 1, 1), []), "at least one student"),
        (lambda: DistillationReport(Rated("t", 1, 0), [Rated("s", 1, 1)]), "score of the teacher"),
        (lambda: unpack("AA==", 9), "9 flags"),
        (lambda: unpack("?", 3), "damaged"),
        (lambda: Config(alpha=-0.1), "alpha"),
        (lambda: Config(hidden=(4, 4)), "hidden"),
        (lambda: Config(hidden=()), "hidden"),
        (lambda: Config(sparsity=1.0), "sparsity"),
        (lambda: Config(epochs=0), "epochs"),
        (lambda: Config(objective=("kdd:1",)), "kdd"),
    ],
)
def test_mistakes_are_one_line(call, says):
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


# -- sizes ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding that is also the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.head(self.norm(self.embed(x).mean(1)))


def test_tied_weights_count_once_and_running_statistics_not_at_all():
    model = Tied()
    assert count_params(model) == 50 * 8 + 16
    assert count_bytes(model) == 4 * (50 * 8 + 16)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    assert count_bytes(model) == 4 * (2 * 50 * 8 + 16)
    assert count_bytes(model.half()) == 2 * (2 * 50 * 8 + 16)


def test_masked_weights_are_as_large_as_before_and_sliced_ones_are_not():
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    masked = pruned(model, 0.75)
    zeros = sum(int((p == 0).sum()) for p in masked.parameters() if p.dim() > 1)
    assert zeros == round(0.75 * (80 + 24)) and not any((p == 0).any() for p in model.parameters() if p.dim() > 1)
    assert (count_params(masked), count_bytes(masked)) == (count_params(model), count_bytes(model))
    sliced = Plan((Keep("0", "out", (1, 5)), Keep("2", "in", (1, 5))), signature(model)).build(model)
    assert count_params(sliced) == 2 * 10 + 2 + 2 * 3 + 3
    assert count_bytes(sliced) == 4 * count_params(sliced)
    kept = masked[0].weight[masked[0].weight != 0].abs().min()
    every = torch.cat([p.abs().flatten() for p in model.parameters() if p.dim() > 1])
    assert (every < kept).sum() <= zeros  # the smallest went


@pytest.mark.parametrize("module", [nn.Linear(20, 6), nn.Conv2d(3, 5, 3)])
def test_eight_bits_are_counted_as_eight_and_miss_by_half_a_step_at_most(module):
    plain = nn.Sequential(module)
    made, plan = int8(plain)
    weight, bias = plain[0].weight, plain[0].bias
    assert count_bytes(plain) == 4 * (weight.numel() + len(bias))
    code = 4 * len(weight)  # the scale of each output; points and zero of symmetric codes are known
    assert count_bytes(made) - plan.saved_bytes(made) == weight.numel() + 4 * len(bias) + code
    step = weight.detach().abs().flatten(1).amax(1) / 127
    miss = (made[0].weight - weight).detach().abs().flatten(1).amax(1)
    assert (miss <= step / 2 + 1e-7).all() and miss.max() > 0.1 * step.max()
    assert plan.build(plain).state_dict().keys() == made.state_dict().keys()


def test_meta_and_packed_tensors_are_counted():
    with torch.device("meta"):
        assert count_bytes(nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4))) == 4 * (44 + 20)
    view = nn.Linear(4, 4, bias=False)
    view.register_buffer("first", view.weight.data[:2])  # a part of the same memory
    assert count_bytes(view) == 4 * 16


def test_fidelity_by_hand():
    t = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    z = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=torch.float64)
    p, q = t.softmax(1), z.softmax(1)
    found = fidelity(t, z)
    assert found["teacher_agreement"] == 0.5
    assert found["teacher_kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), abs=1e-14)
    assert fidelity(t, t + 3.0)["teacher_kl"] == pytest.approx(0, abs=1e-15)
    with pytest.raises(UserError, match="same samples"):
        fidelity(t, torch.zeros(2, 3))


# -- the front, its volume, who is best -------------------------------------------------------------------------------


def table_of(seed: int, n: int = 8) -> DistillationReport:
    """A random table with ties in size and in score."""
    g = np.random.default_rng(seed)
    students = [Rated(f"s{i}", int(g.integers(1, 12)), int(g.integers(1, 40)) / 40) for i in range(n)]
    return DistillationReport(Rated("teacher", 10, int(g.integers(20, 40)) / 40), students)


def exact(made: DistillationReport, model: Rated, alpha: Fraction) -> Fraction:
    """DS in exact arithmetic."""
    score = Fraction(model.score).limit_denominator(40) / Fraction(made.teacher.score).limit_denominator(40)
    return alpha * Fraction(model.size, made.teacher.size) + (1 - alpha) * (1 - score)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_student_shrinks_with_alpha_and_lies_on_the_front(seed):
    """The card's claims 2 and 3 are theorems: here against exact arithmetic."""
    made = table_of(seed)
    every = [*made.students, made.teacher]
    front = dict(zip([m.name for m in every], pareto([(m.size, m.score) for m in every]), strict=True))
    last = None
    for k in range(1, 64):
        best = made.best(k / 64)
        least = min(exact(made, m, Fraction(k, 64)) for m in every)
        assert exact(made, best, Fraction(k, 64)) == least
        assert front[best.name] and (last is None or best.size <= last)
        last = best.size
    assert made.front == [front[s.name] for s in made.students]


@pytest.mark.parametrize("seed", range(20))
def test_the_path_names_the_best_of_every_alpha(seed):
    made = table_of(seed)
    steps = made.path()
    starts = [at for at, _ in steps]
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] < 1
    assert all(b.size < a.size for (_, a), (_, b) in itertools.pairwise(steps))
    for (at, model), end in zip(steps, [*starts[1:], 1.0], strict=True):
        middle = Fraction((at + end) / 2)
        least = min(exact(made, m, middle) for m in (*made.students, made.teacher))
        assert float(exact(made, model, middle) - least) == pytest.approx(0, abs=1e-12)


def test_volume_against_a_grid_and_without_what_adds_nothing():
    points = [(0.5, 0.8), (0.25, 0.5), (0.6, 0.7), (0.9, 1.1), (1.2, 2.0), (0.1, -0.5)]
    c, q = np.meshgrid((np.arange(1000) + 0.5) / 1000, (np.arange(1200) + 0.5) / 1000, indexing="ij")
    dominated = np.any([(c >= a) & (q <= b) for a, b in points], axis=0)
    assert hypervolume(points) == pytest.approx(dominated.mean() * 1.2, abs=2e-3)
    assert hypervolume(points) == pytest.approx(hypervolume([points[0], points[1], points[3]]), abs=1e-15)
    assert hypervolume([]) == hypervolume([(1.0, 1.0)]) == 0.0
    assert hypervolume([(0.5, 1.0)], reference=(2.0, 0.5)) == pytest.approx(0.75)


# -- the bootstrap ----------------------------------------------------------------------------------------------------


def test_the_interval_contains_the_plug_in_value_whatever_the_skew():
    g = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 200):
        for _ in range(20):
            t = g.random(n) < 0.9
            t[0] = True
            s = g.random(n) < 0.6
            found = paired_bootstrap(lambda a, b: a / b, s.tolist(), t.tolist(), draws=200)
            assert found.low <= found.value <= found.high
            assert found.value == pytest.approx(s.mean() / t.mean(), rel=1e-12)


def test_the_interval_of_a_mean_is_that_of_the_binomial():
    """n right of N: the bootstrap draws Binomial(N, n/N)/N, whose quantiles are known."""
    from scipy.stats import binom

    right = [True] * 320 + [False] * 80
    found = paired_bootstrap(lambda a: a, right, draws=20_000)
    low, high = (binom.ppf(p, 400, 0.8) / 400 for p in (0.025, 0.975))
    assert found.low == pytest.approx(low, abs=0.004) and found.high == pytest.approx(high, abs=0.004)


def test_pairs_are_kept_together():
    """Two models that err on the same samples have an equal difference in every draw; apart it would not be."""
    g = np.random.default_rng(1)
    a = g.random(300) < 0.7
    same = paired_bootstrap(lambda x, y: x - y, a.tolist(), a.tolist())
    assert (same.low, same.high) == (0.0, 0.0)
    apart = paired_bootstrap(lambda x, y: x - y, a.tolist(), g.permutation(a).tolist())
    assert apart.high - apart.low > 0.08
    values = [0.3, 0.5, 0.9]
    found = paired_bootstrap(lambda x: x, values, draws=5000)
    assert found.value == pytest.approx(np.mean(values)) and min(values) <= found.low < found.high <= max(values)
    many = g.random(50).tolist()
    assert paired_bootstrap(lambda x: x, many, seed=1) == paired_bootstrap(lambda x: x, many, seed=1)
    assert paired_bootstrap(lambda x: x, many, seed=1) != paired_bootstrap(lambda x: x, many, seed=2)


def test_differences_over_seeds_are_paired_by_seed():
    a, b = ([{"x": x} for x in xs] for xs in ((0.9, 0.5, 0.7), (0.8, 0.4, 0.6)))
    found = difference(a, b, "x", 100.0)
    assert (found.value, found.low, found.high) == pytest.approx((10.0, 10.0, 10.0))
    assert difference(a, b[::-1], "x").high - difference(a, b[::-1], "x").low > 0.1
    assert claim("t", found, 5.0, [0, 1, 2]) == Claim("t", True, found.value, 5.0, [0, 1, 2], [found.low, found.high])
    assert claim("t", Interval(0.1, 0.1, 0.1), 0.2, [0]) == Claim("t", False, 0.1, 0.2, [0], None)


def test_flags_pack_and_come_back():
    for n in (0, 1, 7, 8, 9, 1000):
        flags = (np.random.default_rng(n).random(n) < 0.3).tolist()
        assert unpack(pack(flags), n) == flags
    assert len(pack([True] * 10_000)) < 1700


# -- reports ----------------------------------------------------------------------------------------------------------


def models(**changes) -> Report:
    """A teacher and two students whose answers on 8 samples are known."""
    right = {"teacher": [1, 1, 1, 1, 1, 1, 1, 0], "a": [1, 1, 1, 1, 0, 0, 1, 0], "b": [1, 0, 0, 0, 0, 0, 0, 0]}

    def row(name, params, role="student"):
        facts = {"accuracy": sum(right[name]) / 8, "weight_bytes": 4 * params, "chance": 0.125}
        bits = {"test": "t", "n": 8, "bits": pack([bool(r) for r in right[name]])}
        return Student(name, None, params, metrics=facts, role=role, right=bits)

    rows = [row("teacher", 1000, "base"), row("a", 250), row("b", 10)]
    return Report("x", "t", "", 0, {}, {}, [], **{"students": rows, **changes})


def test_a_report_is_rated_when_it_is_written_and_only_gains_keys(tmp_path):
    before = {s.name: dict(s.metrics) for s in models().students}
    write(models(), tmp_path)
    rows = {s["name"]: s["metrics"] for s in json.loads((tmp_path / "report.json").read_text())["students"]}
    for name, old in before.items():
        assert {k: rows[name][k] for k in old} == old
    assert rows["teacher"] == before["teacher"]
    a = rows["a"]
    assert (a["size_ratio"], a["score_ratio"], a["ds_alpha"], a["front"]) == (0.25, pytest.approx(5 / 7), 0.5, 1.0)
    assert a["ds"] == pytest.approx(0.5 * 0.25 + 0.5 * (1 - 5 / 7))
    assert a["ds_adj"] == pytest.approx(0.5 * 0.25 + 0.5 * (1 - (5 / 8 - 1 / 8) / (7 / 8 - 1 / 8)))
    assert a["score_ratio_low"] < a["score_ratio"] < a["score_ratio_high"] <= 1.0
    assert rows["b"]["ds_adj"] > 0.5 > rows["b"]["ds"]  # a chance-level student
    html = (tmp_path / "report.html").read_text()
    assert "DS (α=0.5, lower is better)" in html and "against teacher" in html
    again = Report.read(tmp_path)
    write(rate(again, 0.2), tmp_path)
    assert Report.read(tmp_path).students[1].metrics["ds"] == pytest.approx(0.2 * 0.25 + 0.8 * 2 / 7)
    write(Report.read(tmp_path), tmp_path)  # keeps its α
    assert "DS (α=0.2, lower is better)" in (tmp_path / "report.html").read_text()


def test_what_a_report_is_rated_against():
    whole = models()
    whole.students[0].role, whole.students[0].metrics["compression"] = "student", 1.0
    assert rate(whole).students[1].metrics["size_ratio"] == 0.25 and "ds" not in whole.students[0].metrics
    bare = models(students=models().students[1:])
    assert "ds" not in rate(bare).students[0].metrics
    errors = models()
    for s, e in zip(errors.students, (10.0, 12.5, 40.0), strict=True):
        s.metrics = {"perplexity": e}
    assert [s.metrics.get("score_ratio") for s in rate(errors).students] == [None, 0.8, 0.25]
    assert [s.metrics.get("size_ratio") for s in errors.students] == [None, 0.25, 0.01]  # parameters
    odd = models()
    odd.students[1].metrics |= {"accuracy": float("nan"), "ds": 3.0}
    odd.students[2].right["test"] = "other samples"
    rate(odd)
    assert "ds" not in odd.students[1].metrics and "score_ratio_low" not in odd.students[2].metrics


def test_the_terminal_says_alpha_and_direction_and_drops_the_column_where_it_is_narrow():
    def shown(width):
        console = Console(width=width, file=io.StringIO())
        console.print(summary(rate(models())))
        return console.file.getvalue()

    assert "DS (α=0.5)" in shown(100) and "lower is better" in shown(100)
    assert "DS" not in shown(32) and max(map(len, shown(32).splitlines())) <= 32


def test_compare_shows_one_alpha_and_paired_intervals():
    a, b = models(), models()
    b.students[1].right["bits"] = pack([True] * 4 + [True, False, True, False])
    b.students[1].metrics["accuracy"] = 6 / 8
    shown, data = compare([a, b], ["x", "y"], alpha=0.25)
    entry = data["students"]["a"]["accuracy"]
    assert entry["difference"][1] == 0.125 and entry["interval"][0] is None
    assert entry["interval"][1][0] <= 0.125 <= entry["interval"][1][1] and entry["interval"][1][0] == 0.0
    ds = data["students"]["a"]["ds"]
    assert ds["difference"][1] == pytest.approx(0.75 * (5 / 7 - 6 / 7))
    assert ds["interval"][1][0] <= ds["difference"][1] <= ds["interval"][1][1] <= 0
    assert data["alpha"] == 0.25 and "size_ratio" in data["students"]["a"]
    console = Console(width=150, file=io.StringIO())
    console.print(shown)
    said = console.file.getvalue()
    assert "α=0.25, lower is better" in said and "paired bootstrap" in said
    with pytest.raises(UserError, match="alpha"):
        compare([models(), models()], alpha=2.0)


def test_compare_pairs_arms_by_seed(tmp_path):
    for run, gain in (("a", 0.0), ("b", 0.1)):
        write(models(), tmp_path / run)
        for seed, value in enumerate((0.5, 0.9, 0.7)):
            folder = tmp_path / run / "arms" / f"labels-alone-{seed}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"accuracy": value + gain, "name": "x", "more": [1]}))
    arms = [read_arms(tmp_path / r) for r in "ab"]
    assert arms[0]["labels-alone"][1]["accuracy"] == 0.9
    _, data = compare([Report.read(tmp_path / r) for r in "ab"], arms=arms)
    entry = data["arms"]["labels-alone"]
    assert entry["seeds"] == [0, 1, 2] and set(entry) == {"seeds", "accuracy"}
    assert entry["accuracy"]["interval"][1] == pytest.approx([0.1, 0.1])  # every seed gained as much
    assert read_arms(tmp_path / "nothing") == {}


def test_the_command_compares_with_the_alpha_asked_for(tmp_path, capsys):
    for run in "ab":
        write(models(), tmp_path / run)
    folders = [str(tmp_path / r) for r in "ab"]
    assert invoke(["compare", *folders, "--alpha", "0.2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["alpha"] == 0.2 and data["students"]["a"]["ds"]["values"][0] == pytest.approx(0.05 + 0.8 * 2 / 7)
    assert invoke(["report", folders[0], "--alpha", "0.2"]) == 0
    assert Report.read(folders[0]).students[1].metrics["ds_alpha"] == 0.2
    assert invoke(["compare", *folders, "--alpha", "-1"]) == 2
    assert "alpha" in capsys.readouterr().err


def test_markdown_says_direction_and_weight():
    text = DistillationReport(Rated("t", 100, 0.9, [1, 1, 0]), [Rated("s", 25, 0.45, [1, 0, 0])], 0.3).to_markdown()
    assert "DS (α=0.3, lower is better)" in text and "| s | 0.2500 | 0.500 |" in text
    assert text.count("\n") == 2


# -- the ladder -------------------------------------------------------------------------------------------------------


def small(folder, cfg=TINY, **options):
    return distill(Run(folder, quiet=True, device="cpu", **options), load("digits", limit=96), TEACHER, cfg=cfg)


def test_a_ladder_is_measured_beside_its_teacher(tmp_path):
    family, data = small(tmp_path), load("digits", limit=96)
    family.save(tmp_path)
    rows, _, _ = family.measure(data, tmp_path)
    found = {s.name: s for s in rows}
    assert list(found) == ["teacher", "h4", "h4-alone", "h16", "h16-alone", "pruned", "int8", "ensemble"]
    teacher, eight = found["teacher"], found["int8"]
    assert teacher.metrics["weight_bytes"] == 4 * teacher.params == 4 * count_params(family.base)
    widths = [(64, 256), (256, 128), (128, 10)]
    assert eight.metrics["weight_bytes"] == sum(i * o + 4 * o + 4 * o for i, o in widths)
    rate(Report("x", "t", "", 0, {}, {}, [], rows))
    assert found["pruned"].metrics["size_ratio"] == 1.0 and 0.25 < eight.metrics["size_ratio"] < 0.30
    assert 0 < found["h4"].metrics["size_ratio"] < 0.01 and "ds" not in found["ensemble"].metrics
    z, y = family.logits(data.test)
    right = (z[0].argmax(1) == y).tolist()
    assert unpack(found["h4"].right["bits"], len(y)) == right
    assert found["h4"].right["test"] == teacher.right["test"] == data.test.fingerprint
    assert found["int8"].metrics["teacher_agreement"] > 0.95 > found["h4"].metrics["teacher_agreement"]
    assert teacher.metrics["chance"] == pytest.approx(np.bincount(data.test.labels).max() / len(y))


def test_a_teacher_is_scored_as_it_teaches(tmp_path):
    """Several count with the sum of their sizes and the mean of their logits, each with the input it expects."""
    from stillhouse.recipes import distill as plain

    data, mlp = load("digits", limit=96), ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [8]})
    teachers, look = [TEACHER.build(seed=k) for k in (1, 2)], ([0.3], [0.4], [0.1], [0.2])
    cfg = plain.Config(epochs=1, lr=0.01, objective=("kd:0.5",), label=0.5)
    run = Run(tmp_path, quiet=True, device="cpu")
    family = plain.distill(run, data, mlp, teachers, cfg, normalize=look)
    family.save(tmp_path)
    rows, _, _ = family.measure(data, tmp_path)
    assert rows[0].metrics["weight_bytes"] == 2 * count_bytes(teachers[0]) and rows[0].params == 2 * 50826
    batch = data.test.take(np.arange(len(data.test)))
    x = (batch["input"] * 0.4 + 0.3 - 0.1) / 0.2
    with torch.no_grad():
        z = sum(t(x) for t in teachers) / 2
        plain_z = sum(t(batch["input"]) for t in teachers) / 2
    right = (z.argmax(1) == batch["label"]).tolist()
    assert unpack(rows[0].right["bits"], len(right)) == right != (plain_z.argmax(1) == batch["label"]).tolist()


def test_both_students_of_a_width_start_from_the_same_weights(tmp_path):
    family = small(tmp_path, replace(TINY, epochs=0.001, hidden=(8,)))
    a, b = (dict(family[n].model.named_parameters()) for n in ("h8", "h8-alone"))
    gap = max(float((a[k] - b[k]).detach().abs().max()) for k in a)
    assert 0 < gap < 0.05  # one step apart


def test_a_saved_copy_in_eight_bits_loads_alone_and_with_its_base(tmp_path):
    family = small(tmp_path, replace(TINY, hidden=(4,), epochs=1, teacher_epochs=1))
    family.save(tmp_path)
    x = load("digits", limit=96).test.take(np.arange(5))["input"]
    loaded = stillhouse.load(tmp_path / "students/int8")
    assert torch.equal(loaded(x), family["int8"].model(x))
    sizes = [(tmp_path / f"students/{n}/model.safetensors").stat().st_size for n in ("int8", "pruned")]
    assert sizes[0] < 0.31 * sizes[1]
    live = distill(Run(tmp_path / "live", quiet=True, device="cpu"), load("digits", limit=96), TEACHER.build(),
                   cfg=replace(TINY, hidden=(4,), epochs=1, teacher_epochs=0.0))  # fmt: skip
    live.save(tmp_path / "live")
    with pytest.raises(UserError, match="base=your_network"):
        stillhouse.load(tmp_path / "live/students/int8")
    again = stillhouse.load(tmp_path / "live/students/int8", base=TEACHER.build(seed=5))
    assert torch.equal(again(x), live["int8"].model(x))


def test_the_claims_notice_what_is_wrong():
    """Each of the five fails for results that break it, and holds for those that do not."""
    cfg = Config(hidden=(4,))

    def result(kd, alone):
        students = {"h4": [40, kd], "h4-alone": [40, alone]}
        return {"teacher": [1000, 0.95], "students": students, "chance": 0.1, "accuracy": kd, "accuracy_alone": alone}

    good = claims([result(0.9, 0.8), result(0.85, 0.84)], [0, 1], cfg)
    assert [c.holds for c in good] == [True] * 5
    assert good[0].value == pytest.approx(0.5 * (0.1 + 0.01) / 2 / 0.95) and good[1].value == pytest.approx(5.5)
    assert good[0].interval and good[0].interval[0] == pytest.approx(0.5 * 0.01 / 0.95)
    bad = claims([result(0.8, 0.81)], [0], cfg)
    assert [c.holds for c in bad] == [False, False, True, True, True] and bad[0].interval is None
    slight = claims([result(0.8, 0.803)], [0], cfg)
    assert [c.holds for c in slight[:2]] == [False, True]


# -- the command ------------------------------------------------------------------------------------------------------

COMMON = ["run", "distillation_metric", "--data", "digits", "--limit", "96", "--quiet"]


def test_trained_students_are_scored_as_they_come(tmp_path, capsys):
    spec = {"big": ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [64]})}
    spec["small"] = replace(spec["big"], options={"widths": [8]})
    for name, s in spec.items():
        model = s.build(seed=1)
        plan = {**json.loads(Plan.identity(model).to_json()), "base": s.to_json(), "shape": [1, 8, 8]}
        save_student(tmp_path / name, model, plan_json=plan)
    flags = ["--teacher", str(tmp_path / "big"), "--student", str(tmp_path / "small"), str(tmp_path / "small")]
    assert invoke([*COMMON, *flags, "--alpha", "0.2", "--out", str(tmp_path / "out")]) == 0
    assert "DS (α=0.2)" in capsys.readouterr().out and not (tmp_path / "out/stages").exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [s["name"] for s in report["students"]] == ["teacher", "small-0", "small"]
    assert report["students"][1]["metrics"]["size_ratio"] == pytest.approx((65 * 8 + 90) / (65 * 64 + 650))
    assert report["tables"][0]["title"] == "Which model for which α"
    x = torch.zeros(2, 1, 8, 8)
    assert torch.equal(stillhouse.load(tmp_path / "out/students/small")(x), spec["small"].build(seed=1).eval()(x))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--student", "x"], ["--teacher is missing"]),
        (["--teacher", "nowhere", "--student", "x"], ["nowhere", "RUN/students/NAME"]),
        (["--teacher", "stillhouse:mlp"], ["trained network"]),
        (["--teacher", "three.py:net"], ["three"]),
        (["--alpha", "7"], ["alpha", "[0, 1]"]),
        (["--hidden", "0"], ["hidden"]),
        (["--model", "torchvision:resnet18"], ["cannot take inputs", "(1, 8, 8)"]),
        (["--model", "stillhouse:mlp", "--teacher", "x"], ["--model does nothing", "--teacher"]),
        (["--teacher", "x", "--student", "y", "--hidden", "4"], ["--hidden does nothing", "--student"]),
        (["--teacher", "x", "--teacher-epochs", "4"], ["--teacher-epochs does nothing", "--teacher"]),
        (["--model", "stillhouse:mlp", "--pretrained"], ["no published weights"]),
    ],
)
def test_bad_commands_end_with_one_line(tmp_path, capsys, flags, says):
    assert invoke([*COMMON, *flags, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip()
    assert line.count("\n") == 0 and all(word in line for word in says), line


def test_a_teacher_of_other_classes_is_told_before_anything_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef three(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert invoke([*COMMON, "--teacher", "mine:three", "--out", str(Path("out"))]) == 2
    assert "3 logits" in capsys.readouterr().err
