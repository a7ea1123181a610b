"""Search over a `StudentSpace` under a budget: regularised evolution, random draws, everything; how rankings agree.

What is scored, and how, is the caller's: ``score(arch)`` gives numbers, of which "score" is to be large.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.evaluate import count_macs, count_params, latency
from stillhouse.models import ModelSpec
from stillhouse.progress import Progress
from stillhouse.run import Run
from stillhouse.spaces import Arch, Choices, StudentSpace, frozen, inner_of
from stillhouse.system import fold

Measure = Literal["params", "macs", "latency"]
Strategy = Literal["evolution", "random", "all"]
Score = Callable[[Arch], Mapping[str, float | None]]

UNITS = {"params": "parameters", "macs": "multiply-adds", "latency": "ms"}
BLOCK = 16  # evaluations between two savings
TRIES = 200


def student(space: StudentSpace, arch: Arch, seed: int = 0) -> tuple[nn.Module, ModelSpec | None]:
    """The network of `arch`, initialised from `seed`, and how to build it again where the space knows it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = space.build(arch)
    if isinstance(made, ModelSpec):
        return made.build(seed=seed), made
    if not isinstance(made, nn.Module):
        raise UserError(f"space: build({arch!r}) returned {type(made).__name__}, expected a module or a ModelSpec")
    return made, None


def cost_of(model: nn.Module, measure: Measure, example: Any) -> float:
    """Parameters, multiply-adds of one sample, or the median ms of one forward pass on one CPU thread."""
    if measure == "params":
        return count_params(model)
    return count_macs(model, example) if measure == "macs" else latency(model, example).median_ms


class Costs:
    """What students cost, each measured once.

    Args:
        space: its own ``cost(arch, measure)`` is taken where it has one.
        measure: see `cost_of`.
        shape: of one input.

    Example:
        >>> from stillhouse.spaces import named
        >>> Costs(named("conv", (1, 8, 8), 10), "params", (1, 8, 8))((1, 1, 1, 8))
        2034.0
    """

    def __init__(self, space: StudentSpace, measure: Measure, shape: Sequence[int]):
        if measure not in UNITS:
            raise UserError(f"measure: expected {', '.join(UNITS)}, got {measure!r}")
        self.space, self.measure, self.example = space, measure, torch.zeros(1, *shape)
        self.known: dict[Arch, float] = {}

    def __call__(self, arch: Arch) -> float:
        if arch not in self.known:
            inner = inner_of(self.space)
            own = getattr(inner, "cost", None)
            made = own(arch, self.measure) if own else cost_of(student(self.space, arch)[0], self.measure, self.example)
            self.known[arch] = float(made)
        return self.known[arch]

    def cheapest(self, rng: Random) -> Arch:
        """The student of least cost that going downhill finds; exact where the slots of a `Choices` are ascending."""
        inner = inner_of(self.space)
        start = [tuple(values[0] for values in inner.slots.values())] if isinstance(inner, Choices) else []
        best = min([*start, *(frozen(self.space.random(rng)) for _ in range(16))], key=self)
        for _ in range(TRIES):
            best = min(best, frozen(self.space.mutate(best, rng)), key=self)
        return best


@dataclass
class Candidate:
    """A student that was scored.

    Attributes:
        arch: its name in the space. score: larger is better; None where it has none (see the score). cost: in the
            budget's measure. parts: further numbers of the score. seconds: that scoring it took.
    """

    arch: Arch
    score: float | None
    cost: float
    parts: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def order(self) -> float:
        return -math.inf if self.score is None else self.score


@dataclass
class Search:
    """What a search saw: every evaluation in its order.

    Attributes:
        history: one candidate per evaluation; a student that came up again stands again, with the score it had.
        measure, limit: the budget.
    """

    history: list[Candidate]
    measure: str
    limit: float

    def ranking(self) -> list[Candidate]:
        """Each student once, best first; of equal scores the cheaper first."""
        once = {c.arch: c for c in self.history}
        return sorted(once.values(), key=lambda c: (-c.order, c.cost))

    def curve(self) -> list[float]:
        """The best score after each evaluation from the first one with a score on."""
        best = np.maximum.accumulate([c.order for c in self.history])
        return [float(b) for b in best if math.isfinite(b)]

    @property
    def seconds(self) -> float:
        """Spent on scoring, over all interruptions."""
        return sum(c.seconds for c in {c.arch: c for c in reversed(self.history)}.values())


def search(
    run: Run,
    space: StudentSpace,
    score: Score,
    shape: Sequence[int],
    *,
    strategy: Strategy = "evolution",
    evaluations: int = 200,
    population: int = 20,
    sample: int = 10,
    best: int = 5,
    measure: Measure = "params",
    limit: float = 0.0,
    name: str = "search",
    settings: Any = None,
) -> Search:
    """Score students of a space within a budget.

    Regularised evolution (arXiv 1802.01548) with the parent drawn from the best of a sample: `population` random
    students; then, again and again, draw `sample` of the youngest `population`, choose one of their `best` at random,
    mutate it and append the child, so that the oldest falls out. A child over the budget is drawn again. (The released
    DisWOT search for NAS-Bench-201 sorts ascending and so takes a parent among the worst; this one does not.)

    Every proposal is a function of the seed, its number and the students before it, and every 16 evaluations are saved,
    so an interrupted search goes on where it was and ends as if it had not stopped.

    Args:
        run: keeps the evaluations in its child `name`; gives the seed.
        score: ``arch -> {"score": …, further parts}``; None for a student that cannot be scored.
        shape: of one input, for costs.
        strategy: "evolution"; "random", without repeats while there are others; "all", for a space with ``__iter__``.
        evaluations: how many, repeats included; "all" takes every student instead.
        measure, limit: the budget; 0 has none.
        settings: a dataclass or mapping that the score depends on; going on under other settings is refused.

    Raises:
        UserError: numbers out of range, a budget below the smallest student (which is named with its cost).
    """
    for what, value in {"evaluations": evaluations, "population": population, "sample": sample, "best": best}.items():
        if value < 1:
            raise UserError(f"{what} must be at least 1, got {value}")
    if limit < 0 or not math.isfinite(limit):
        raise UserError(f"budget must be a number >= 0 (0 has none), got {limit}")
    if limit and measure == "latency" and run.world > 1:
        raise UserError("budget latency: processes would measure differently; search with one, or take params or macs")
    walk = _Walk(Costs(space, measure, shape), score, limit, run.seed, (strategy, population, sample, best))
    todo = walk.everything() if strategy == "all" else None
    total = evaluations if todo is None else len(todo)
    home, history = run.child(name), list[Candidate]()
    _same_settings(home, {"strategy": [strategy, total, population, sample, best], "budget": [measure, limit],
                          "seed": run.seed, **_plain(settings)})  # fmt: skip
    with Progress(name, total, 0, run.quiet or not run.main) as bar:
        for start in range(0, total, BLOCK):
            stop = min(start + BLOCK, total)
            rows = home.memo(f"{start:06d}", partial(walk.block, history, start, stop, todo, bar))
            history += [Candidate(**{**row, "arch": frozen(row["arch"])}) for row in rows]
            bar.done = stop  # also where the block was read back
    return Search(history, measure, limit)


def _plain(settings: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return dataclasses.asdict(settings)
    return dict(settings or {})


def _same_settings(home: Run, settings: dict[str, Any]) -> None:
    """Evaluations made under other settings are not gone on with."""
    now = json.loads(json.dumps(settings, default=str))
    kept = home.memo("settings", lambda: now)
    for key in {**kept, **now}:
        if kept.get(key) != now.get(key):
            raise UserError(
                f"{home.folder} holds a search with other settings ({key}: {kept.get(key)}, now {now.get(key)}); "
                "give a new folder"
            )


def scored(arch: Arch, score: Score, costs: Costs) -> Candidate:
    """One evaluation, timed."""
    cost, began = costs(arch), time.perf_counter()
    parts = dict(score(arch))
    value = parts.pop("score")
    if value is not None and not math.isfinite(value):
        raise UserError(f"the score of {arch} is {value}; a score must be finite, or None for a student without one")
    return Candidate(arch, value, cost, parts, time.perf_counter() - began)


class _Walk:
    """Proposals, each a function of (seed, number, what came before)."""

    def __init__(self, costs: Costs, score: Score, limit: float, seed: int, settings: tuple[Strategy, int, int, int]):
        self.costs, self.score, self.space, self.limit, self.seed = costs, score, costs.space, limit, seed
        self.strategy, self.population, self.sample, self.best = settings
        self._small: Arch = None

    def block(
        self, history: Sequence[Candidate], start: int, stop: int, todo: Sequence[Arch] | None, bar: Progress
    ) -> list[dict[str, Any]]:
        """Evaluations number `start` to `stop`, as JSON."""
        past, known = list(history), {c.arch: c for c in history}
        for i in range(start, stop):
            arch = self.propose(i, past) if todo is None else todo[i]
            if arch not in known:
                known[arch] = scored(arch, self.score, self.costs)
            past.append(known[arch])
            bar.advance([{"best": max(c.order for c in past)}])
        return [vars(c) for c in past[start:]]

    def fits(self, arch: Arch) -> bool:
        return not self.limit or self.costs(arch) <= self.limit

    def propose(self, i: int, history: Sequence[Candidate]) -> Arch:
        rng = Random(fold(self.seed, "propose", i))
        if self.strategy == "random" or i < self.population:
            return self.draw(rng, {c.arch for c in history})
        members = history[-self.population :]
        picked = rng.sample(range(len(members)), min(self.sample, len(members)))
        ordered = sorted((members[k] for k in picked), key=lambda c: -c.order)
        parent = rng.choice(ordered[: self.best])
        for _ in range(TRIES):
            child = frozen(self.space.mutate(parent.arch, rng))
            if self.fits(child):
                return child
        return parent.arch  # nothing beside it fits

    def draw(self, rng: Random, seen: set[Arch]) -> Arch:
        """A student within the budget, a new one if there seems to be one."""
        again: list[Arch] = []
        for _ in range(TRIES):
            arch = frozen(self.space.random(rng))
            if self.fits(arch):
                if arch not in seen:
                    return arch
                again.append(arch)
            if len(again) > 20:
                break
        return again[0] if again else self.from_below(rng)

    def from_below(self, rng: Random) -> Arch:
        """Where hardly a random student fits: a walk within the budget that begins at the smallest."""
        arch = self.smallest()
        for _ in range(TRIES):
            step = frozen(self.space.mutate(arch, rng))
            arch = step if self.fits(step) else arch
        return arch

    def smallest(self) -> Arch:
        if self._small is None:
            self._small = self.costs.cheapest(Random(fold(self.seed, "cheapest")))
        if not self.fits(self._small):
            unit = UNITS[self.costs.measure]
            raise UserError(
                f"no student fits a budget of {self.limit:,.6g} {unit}: the smallest, {self._small}, costs "
                f"{self.costs(self._small):,.6g} {unit}; raise --budget or search another space"
            )
        return self._small

    def everything(self) -> list[Arch]:
        inner = inner_of(self.space)
        if not hasattr(inner, "__iter__"):
            raise UserError(f"strategy all: {type(inner).__name__} cannot be iterated; take evolution or random")
        found = [a for a in map(frozen, inner) if self.fits(a)]
        if not found:
            self.smallest()
        return found


# -- how rankings agree -----------------------------------------------------------------------------------------------


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's τ_b: agreement of two rankings in [−1, 1], ties counted out; NaN where one side is constant.

    Example:
        >>> kendall([1, 2, 3], [1, 3, 2])
        0.3333333333333333
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(f"kendall needs two lists of one length, got {x.shape} and {y.shape}")
    one, two = (np.sign(v[:, None] - v) for v in (x, y))
    below = math.sqrt(float((one**2).sum()) * float((two**2).sum()))
    return float((one * two).sum()) / below if below else math.nan


def kendall_interval(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean τ_b over several pairs of rankings and its percentile bootstrap interval over the ranked things.

    Args:
        pairs: one (a, b) per seed; the things of each are drawn again with replacement, by themselves.

    Returns:
        mean, low, high.
    """
    rng = np.random.default_rng(fold(seed, "bootstrap"))
    both = [(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs]
    means = []
    for _ in range(draws):
        picks = [rng.integers(0, len(a), len(a)) for a, _ in both]
        taus = [kendall(a[i], b[i]) for (a, b), i in zip(both, picks, strict=True)]  # type: ignore[arg-type]
        known = [t for t in taus if math.isfinite(t)]
        means += [sum(known) / len(known)] if known else []
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if means else (math.nan, math.nan)
    return float(np.mean([kendall(a, b) for a, b in pairs])), float(low), float(high)
