"""Arms of a comparison over seeds: each a resumable run of its own in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from stillhouse.evaluate import spread
from stillhouse.progress import Progress
from stillhouse.report import Claim, Table
from stillhouse.run import Run
from stillhouse.score import Interval, paired_bootstrap

Arm = Callable[[Run], Mapping[str, Any]]
Results = dict[str, list[dict[str, Any]]]


def trials(run: Run, arms: Mapping[str, Arm], seeds: Sequence[int]) -> Results:
    """Every arm on every seed; what is finished is read back when the run is resumed.

    Args:
        run: arms are its children, with the seed of the trial.
        arms: name to ``arm(child_run) -> numbers``; stages it trains go into the child's folder.
        seeds: of the trials; all arms have the same.

    Returns:
        arm → one result per seed, in the order of `seeds`.

    Example:
        >>> import tempfile
        >>> trials(Run(tempfile.mkdtemp(), quiet=True), {"a": lambda run: {"x": run.seed}}, [3, 4])
        {'a': [{'x': 3}, {'x': 4}]}
    """
    results: Results = {arm: [] for arm in arms}
    with Progress("arms × seeds", len(arms) * len(seeds), 0, run.quiet or not run.main) as bar:
        for name, arm in arms.items():
            for seed in seeds:
                child = run.child(f"{slug(name)}-{seed}", seed=seed, quiet=True)
                results[name].append(child.memo("result", partial(arm, child)))
                bar.advance([])
    return results


def slug(name: str) -> str:
    """A name as a folder's name."""
    return re.sub(r"\W", "-", name.lower())


def mean(results: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean over seeds of one number of an arm."""
    return sum(float(r[key]) for r in results) / len(results)


def difference(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], key: str | tuple[str, str], scale: float = 1.0
) -> Interval:
    """Mean over seeds of scale·(a − b), paired by seed, with the bootstrap interval over the seeds.

    Args:
        a, b: results of two arms, in the order of the seeds.
        key: of the number in both; two keys are that of `a` and that of `b`.

    Example:
        >>> difference([{"x": 0.9}, {"x": 0.8}], [{"x": 0.7}, {"x": 0.6}], "x", 100.0)
        Interval(value=20.0, low=20.0, high=20.0)
    """
    one, two = (key, key) if isinstance(key, str) else key
    pairs = [scale * (float(x[one]) - float(y[two])) for x, y in zip(a, b, strict=True)]
    return paired_bootstrap(lambda gain: gain, [round(p, 12) for p in pairs])


def claim(text: str, found: Interval, threshold: float, seeds: Sequence[int]) -> Claim:
    """The claim that a difference is at least `threshold`, with its interval where there are several seeds."""
    ends = [found.low, found.high] if len(seeds) > 1 else None
    return Claim(text, found.value >= threshold, found.value, threshold, list(seeds), ends)


def table(
    title: str,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    columns: Mapping[str, tuple[str, float, int]],
    note: str = "",
) -> Table:
    """One row per arm, mean ± standard deviation over its seeds.

    Args:
        columns: heading → (key in the results, factor, digits behind the point); an arm without the key shows "–".
    """
    rows = []
    for arm, found in results.items():
        row: list[Any] = [arm]
        for key, scale, digits in columns.values():
            values = [scale * r[key] for r in found if r.get(key) is not None]
            if not values:
                row.append("–")
                continue
            s = spread(values)
            row.append(f"{s['mean']:.{digits}f}" + (f" ± {s['std']:.{digits}f}" if s["n"] > 1 and digits else ""))
        rows.append(row)
    return Table(title, ["arm", *columns], rows, note or "mean ± standard deviation over seeds")
