"""The family table and the claims: for the terminal, and as every form shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from stillhouse.files import strict
from stillhouse.report import units
from stillhouse.report.parts import Claim, Report, Student
from stillhouse.report.rating import ADDED, basis

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


@dataclass(frozen=True)
class Column:
    """How one number of a student is shown. ``better``: 1 higher, -1 lower, 0 neither."""

    key: str
    title: str
    text: Callable[[Any], str]
    better: int = 0
    hint: str = ""


def _fixed(value: Any) -> str:
    x = units.number(value)
    return units.MISSING if x is None else f"{x:.3f}"


_FIRST = (
    Column("accuracy", "Accuracy", units.percent, 1, "share of test samples named right"),
    Column("nll", "NLL", _fixed, -1, "negative log-likelihood, nats per sample"),
    Column("ece", "ECE", partial(units.percent, places=1), -1, "expected calibration error"),
    Column("params", "Params", units.scaled, -1, "parameters"),
    Column("macs", "MACs", units.scaled, -1, "multiply–accumulates per sample"),
    Column("bytes", "Size", partial(units.scaled, unit="B"), -1, "bytes on disk"),
    Column("latency_ms", "Latency", units.milliseconds, -1, "median of one forward pass"),
    Column("compression", "Smaller", units.times, 1, "parameters of the base over parameters"),
    Column("speedup", "Faster", units.times, 1, "latency of the base over latency"),
)
DS = Column("ds", "DS", _fixed, -1, "α · size ratio + (1 − α)(1 − score ratio), against the teacher; lower is better")
COLUMNS = (*_FIRST, DS, Column("importance", "ω", _fixed, 0, "weight in the ensemble"))
RATED = (  # what a comparison of runs shows as well, and a page in a table of its own
    Column("size_ratio", "size ratio", partial(units.percent, places=2), -1, "size over the teacher's"),
    Column("score_ratio", "score ratio", units.percent, 1, "score over the teacher's"),
    DS,
    Column("ds_adj", "DS_adj", _fixed, -1, "DS of scores corrected for chance"),
)
FIDELITY = (
    Column("teacher_agreement", "agreement", units.percent, 1, "share of test samples named as the teacher names them"),
    Column("teacher_kl", "KL, nats", _fixed, -1, "mean KL(teacher ‖ student) over test samples"),
)
_BESIDE = {"latency_p10", "latency_p90", "threads", "batch", "repeats", "weight_bytes", "chance", *ADDED}


def columns(students: Sequence[Student], rated: bool = False) -> list[Column]:
    """The known columns for which some student has a number, then one for every other number they have.

    Args:
        rated: also the ratios that make up DS, and its form corrected for chance.
    """
    known = {c.key for c in (*COLUMNS, *FIDELITY)} | _BESIDE
    alpha = next((a for s in students if (a := s.number("ds_alpha")) is not None), None)
    first = [replace(c, title=f"DS (α={alpha:g})") if c.key == "ds" and alpha is not None else c for c in COLUMNS]
    keys = dict.fromkeys(k for s in students for k in s.metrics if k not in known and not k.endswith("_std"))
    extra = [Column(k, label(k), partial(units.humanise, k)) for k in keys]
    more = [c for c in (*RATED, *FIDELITY) if rated and c != DS]
    every = (*first, *more, *extra)
    return [c for c in every if any(s.number(c.key) is not None for s in students)]


def label(key: str) -> str:
    """A key as a heading: ``train_seconds`` → ``train seconds``."""
    return units.plain(str(key)).replace("_", " ")


def beside(student: Student, key: str) -> str:
    """What stands small beside a number: p10–p90 of a latency, ± deviation over seeds, or nothing."""
    if key == "latency_ms":
        low, high = student.number("latency_p10"), student.number("latency_p90")
        return "" if low is None or high is None else f"{units.digits(low, 2)}–{units.digits(high, 2)}"
    wide = student.number(f"{key}_std")
    column = next((c for c in COLUMNS if c.key == key), None)
    return "" if wide is None else f"± {column.text(wide) if column else units.humanise(key, wide)}"


def measured_with(students: Sequence[Student]) -> str:
    """How the latencies were taken, in words: threads and batch size."""
    said = []
    for key, one, many in (("threads", "thread", "threads"), ("batch", "batch size", "batch sizes")):
        found = sorted({int(n) for s in students if (n := s.number(key)) is not None})
        if found:
            listed = ", ".join(map(str, found))
            counts = f"{listed} {one if found == [1] else many}"
            said.append(counts if key == "threads" else f"{one if len(found) == 1 else many} {listed}")
    return ", ".join(said)


class FamilyTable:
    """The students as a table that fits the terminal: where it is too narrow, the columns in SPARE go first."""

    SPARE = ("ece", "compression", "bytes", "ds", "macs", "nll", "speedup", "params")

    def __init__(self, students: Sequence[Student]):
        self.students = students

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        shown = columns(self.students)[:11]
        names = min(28, max(8, *(len(units.plain(s.name)) for s in self.students), 0))
        texts = {c.key: [c.title, *(c.text(s.number(c.key)) for s in self.students)] for c in shown}
        for spare in self.SPARE:
            if names + sum(max(map(len, texts[c.key])) + 2 for c in shown) <= options.max_width:
                break
            shown = [c for c in shown if c.key != spare]
        yield self.drawn(shown)

    def drawn(self, shown: Sequence[Column]) -> RenderableType:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
        table.add_column("Student", min_width=8, max_width=28)
        for column in shown:
            table.add_column(Text(column.title), justify="right", no_wrap=True)
        for student in self.students:
            style = {"base": "dim", "ensemble": "italic"}.get(student.role, "")
            name = Text(units.plain(student.name), style=style, no_wrap=True, overflow="ellipsis")
            table.add_row(name, *(Text(c.text(student.number(c.key)), style=style) for c in shown))
        how, said = measured_with(self.students), list[str]()
        if how:
            said.append(f"latency: median of one forward pass, {how}")
        if any(c.key == "ds" for c in shown) and (found := basis(self.students)):
            said.append(f"DS: against {found.teacher.name}, lower is better")
        if said:
            table.caption = Text(units.plain("; ".join(said)))
            table.caption_justify = "left"
        return table


def summary(report: Report) -> RenderableType:
    """The family table, the results, the cost and the claims for the terminal, as wide as it is.

    Args:
        report: what a run found.

    Returns:
        Something rich can print.

    Example:
        >>> from rich.console import Console
        >>> Console().print(summary(Report("wml", "On digits", "", 0, {}, {"mean_accuracy": 0.93}, [], [])))
        On digits
        result: mean accuracy 93.0 %
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(units.plain(report.title), style="bold")]
    if report.students:
        parts.append(FamilyTable(report.students))
    for name, values in (("result", report.metrics), ("cost", report.cost)):
        if values:
            said = " · ".join(f"{label(k)} {units.humanise(k, v)}" for k, v in strict(values).items())
            parts.append(Text(f"{name}: {said}"))
    return Group(*parts, *map(claim_line, report.claims))


def claim_line(claim: Claim) -> RenderableType:
    from rich.text import Text

    mark, style = ("holds", "green") if claim.holds else ("does not hold", "red")
    numbers = f"measured {units.humanise('', claim.value)}, threshold {units.humanise('', claim.threshold)}"
    seeds = f", seeds {' '.join(map(str, claim.seeds))}" if claim.seeds else ""
    return Text.assemble((f"{mark}: ", style), units.plain(claim.text), f" ({numbers}{around(claim)}{seeds})")


def around(claim: Claim) -> str:
    """The interval of a claim's value over its seeds, in words; nothing where there is none."""
    if not claim.interval:
        return ""
    low, high = (units.humanise("", v) for v in claim.interval)
    return f", 95 % {low} … {high}"
