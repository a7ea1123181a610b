"""Arms of a comparison over seeds: each a resumable run of its own in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from stillhouse.evaluate import spread
from stillhouse.progress import Progress
from stillhouse.report import Table
from stillhouse.run import Run

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
