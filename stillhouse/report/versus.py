"""Runs side by side: students matched by name, arms by name and seed, differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError
from stillhouse.files import read_json, strict
from stillhouse.report import units
from stillhouse.report.parts import Report, Student
from stillhouse.report.rating import answers, basis, rate
from stillhouse.report.text import COLUMNS, FIDELITY, RATED, Column, columns, label
from stillhouse.score import ALPHA, paired_bootstrap

if TYPE_CHECKING:
    from rich.console import RenderableType

Arms = Mapping[str, Mapping[int, Mapping[str, Any]]]


def compare(
    reports: Sequence[Report],
    labels: Sequence[str] | None = None,
    *,
    alpha: float = ALPHA,
    arms: Sequence[Arms] | None = None,
) -> tuple[RenderableType, dict[str, Any]]:
    """Runs side by side: students matched by name, differences of their numbers to the first run, claims.

    Every student is rated against its own run's teacher (`stillhouse.report.rate`), all with one α. Where two runs
    asked the same test samples, differences in accuracy and in DS have a paired bootstrap interval over the samples;
    where they have arms of one name on the same seeds, differences between these have one over the seeds.

    Args:
        reports: two or more; they are rated in place. labels: what to call each (folders); their titles by default.
        alpha: weight of size in DS.
        arms: of each run, as `read_arms` gives them.

    Returns:
        Something rich can print, and the same as strict JSON: ``runs``, ``alpha``, ``students`` (per name and metric
        the ``values`` of the runs, their ``difference`` to the first and its ``interval``), ``arms`` (the same for
        means over the common ``seeds``), ``claims``.

    Raises:
        UserError: fewer than two reports, alpha out of range.
    """
    if len(reports) < 2:
        raise UserError(f"compare needs at least two runs, got {len(reports)}; give two run folders")
    reports = [rate(r, alpha) for r in reports]
    names = [units.plain(n) for n in (labels or [r.title for r in reports])]
    runs = [{"label": n, "system": r.system, "seed": r.seed, "command": r.command} for n, r in zip(names, reports)]
    teachers = [found.teacher if (found := basis(r.students)) else None for r in reports]
    students: dict[str, Any] = {}
    for name in dict.fromkeys(s.name for r in reports for s in r.students):
        each = [next((s for s in r.students if s.name == name), None) for r in reports]
        students[name] = {}
        for column in columns([s for s in each if s], rated=True):
            values = [s.number(column.key) if s else None for s in each]
            spans = [None, *(_span(column.key, each, teachers, k, alpha) for k in range(1, len(each)))]
            students[name][column.key] = _entry(values, spans)
    claims = []
    for text in dict.fromkeys(c.text for r in reports for c in r.claims):
        said = [next((c for c in r.claims if c.text == text), None) for r in reports]
        claims.append({"text": text, "holds": [c and c.holds for c in said], "values": [c and c.value for c in said]})
    data = strict({"runs": runs, "alpha": alpha, "students": students, "arms": _arms(arms or []), "claims": claims})
    return _side_by_side(names, data), data


def _entry(values: Sequence[float | None], spans: Sequence[Sequence[float] | None]) -> dict[str, Any]:
    """Numbers of one metric, their differences to the first, and the intervals of these."""
    base = values[0]
    change = [None if v is None or base is None else v - base for v in values]
    return {"values": values, "difference": change, "interval": spans}


def _span(
    key: str, each: Sequence[Student | None], teachers: Sequence[Student | None], k: int, alpha: float
) -> list[float] | None:
    """Paired bootstrap interval of run k's accuracy or DS minus the first run's, over the test samples of both."""
    a, b, s, t = each[0], each[k], teachers[0], teachers[k]
    if a is None or b is None or key not in ("accuracy", "ds"):
        return None
    first, second = answers(a, b), answers(b, a)
    if first is None or second is None:
        return None
    if key == "accuracy":
        found = paired_bootstrap(lambda x, y: y - x, first, second)
        return [found.low, found.high]
    sizes = [x.number("size_ratio") for x in (a, b)]
    if s is None or t is None or sizes[0] is None or sizes[1] is None:
        return None
    above, below = answers(s, a), answers(t, a)
    if above is None or below is None:
        return None
    fixed = alpha * (sizes[1] - sizes[0])
    found = paired_bootstrap(lambda x, y, u, v: fixed + (1 - alpha) * (x / u - y / v), first, second, above, below)
    return [found.low, found.high]


def read_arms(folder: str | Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The finished arms of a run folder (`stillhouse.trials`): arm → seed → its numbers; empty where it has none."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((Path(folder) / "arms").glob("*/result.json")):
        arm, _, seed = path.parent.name.rpartition("-")
        result = read_json(path)
        if arm and seed.isdigit() and isinstance(result, dict):
            found.setdefault(arm, {})[int(seed)] = result
    return found


def _arms(runs: Sequence[Arms]) -> dict[str, Any]:
    """Per arm that all runs have, and per number: means over the seeds that all have, and paired differences."""
    made: dict[str, Any] = {}
    for arm in runs[0] if len(runs) > 1 else ():
        seeds = sorted(set(runs[0][arm]).intersection(*(r.get(arm, {}) for r in runs[1:])))
        if not seeds:
            continue
        made[arm] = {"seeds": seeds}
        for key in runs[0][arm][seeds[0]]:
            each = [[units.number(r[arm][s].get(key)) for s in seeds] for r in runs]
            if any(v is None for values in each for v in values):
                continue
            spans: list[list[float] | None] = [None]
            for values in each[1:]:
                found = paired_bootstrap(lambda x, y: y - x, each[0], values)  # type: ignore[arg-type]
                spans.append([found.low, found.high] if len(seeds) > 1 else None)
            made[arm][key] = _entry([sum(v) / len(seeds) for v in each], spans)  # type: ignore[arg-type]
    return made


def _side_by_side(names: Sequence[str], data: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    known = {c.key: c for c in (*COLUMNS, *RATED, *FIDELITY)}
    rated = any("ds" in metrics for metrics in data["students"].values())
    lines = [Text(f"DS: α={data['alpha']:g}, lower is better; ratios to each run's own teacher")] if rated else []
    lines += [
        Text(f"{units.plain(c['text'])}: " + ", ".join(f"{n} {_verdict(h)}" for n, h in zip(names, c["holds"])))
        for c in data["claims"]
    ]
    parts: list[RenderableType] = [_table("Student", names, data["students"], known)]
    if data["arms"]:
        seeds = sorted({s for metrics in data["arms"].values() for s in metrics["seeds"]})
        arms = {arm: {k: v for k, v in metrics.items() if k != "seeds"} for arm, metrics in data["arms"].items()}
        parts.append(_table(f"Arm (seeds {', '.join(map(str, seeds))})", names, arms, known))
    if any(
        any(e["interval"])
        for group in ("students", "arms")
        for m in data[group].values()
        for k, e in m.items()
        if k != "seeds"
    ):
        parts.append(Text("(difference to the first run) and [its 95 % paired bootstrap interval]"))
    return Group(*parts, *lines)


def _table(head: str, names: Sequence[str], rows: Mapping[str, Any], known: Mapping[str, Column]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(head, no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("Number", no_wrap=True, min_width=11)
    for name in names:
        table.add_column(Text(units.shorten(name, 24)), justify="right", no_wrap=True)
    for student, metrics in rows.items():
        for i, (key, entry) in enumerate(metrics.items()):
            column = known.get(key, Column(key, label(key), partial(units.humanise, key)))
            cells = [
                Text(_with_change(column, *of)) for of in zip(*(entry[k] for k in ("values", "difference", "interval")))
            ]
            table.add_row(Text(units.plain(student) if i == 0 else ""), Text(column.title), *cells)
    return table


def _with_change(column: Column, value: float | None, change: float | None, span: Sequence[float] | None) -> str:
    if not change and not span:
        return column.text(value)
    ends = f"\n[{_signed(column, span[0])} … {_signed(column, span[1])}]" if span else ""
    return f"{column.text(value)} ({_signed(column, change)}){ends}"


def _signed(column: Column, value: float | None) -> str:
    sign = "+" if value and value > 0 else "−" if value else ""
    return units.MISSING if value is None else sign + column.text(abs(value))


def _verdict(holds: bool | None) -> str:
    return "not measured" if holds is None else "holds" if holds else "does not hold"
