"""What a run found, as data: the parts of a report, and report.json and back."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from stillhouse.errors import UserError
from stillhouse.files import read_json, strict
from stillhouse.report import units

FORMAT = 1
NAN = math.nan


@dataclass
class Claim:
    """A falsifiable sentence and how it came out. ``value`` was measured, ``threshold`` was set before.

    ``interval`` is the paired bootstrap interval of the value over the seeds, where there is one.
    """

    text: str
    holds: bool
    value: float
    threshold: float
    seeds: list[int] = field(default_factory=list)
    interval: list[float] | None = None


@dataclass
class Student:
    """One model of the outcome.

    Attributes:
        name: as the user sees it. path: its folder relative to the run, or None (an ensemble has none).
        params: parameters. macs: per sample. latency_ms: median of one forward pass.
        metrics: accuracy, nll, ece (fractions, nats), bytes, compression, speedup, importance, latency_p10,
            latency_p90 (ms), threads, …; ``NAME_std`` is shown as ± beside ``NAME``; any other number
            gets a column.
        role: ``base`` and ``ensemble`` are set apart from the students.
        right: which test samples it named right: ``test`` (the fingerprint of the samples), ``n`` and ``bits``
            (`stillhouse.score.pack`); with it two models are compared pair by pair.
    """

    name: str
    path: str | None = None
    params: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    role: Literal["student", "base", "ensemble"] = "student"
    right: dict[str, Any] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """A finite number under this key (an attribute or a metric), else None."""
        own = key in ("params", "macs", "latency_ms")
        return units.number(getattr(self, key) if own else self.metrics.get(key))


@dataclass
class Curve:
    """Lines over a common axis: series maps a name to (xs, ys)."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass
class Matrix:
    """A square of numbers between things with names (agreement, who teaches whom)."""

    title: str
    names: list[str]
    values: Sequence[Sequence[float]]


@dataclass
class Table:
    """Any table: rankings, arms of a comparison."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass
class Image:
    """A PNG that is embedded: a grid of samples, a distilled set."""

    title: str
    png_bytes: bytes


@dataclass
class Report:
    """Everything a run has to say. What is drawn is in ``report.json``; the page can be made again from it.

    Attributes:
        system, title: which recipe, and what ran. command: exact. seed: one or several. environment: see
            `stillhouse.evaluate.environment`.
        metrics, cost: names to numbers; the unit comes from the name (`stillhouse.report.units.humanise`).
        claims, students, curves, matrices, tables, images, notes: sections; an empty one is not shown.

    Example:
        >>> r = Report("wml", "On digits", "stillhouse run wml", 0, {}, {}, [], [Student("p50")])
        >>> r.to_json()["students"][0]["name"]
        'p50'
    """

    system: str
    title: str
    command: str
    seed: Any
    environment: dict[str, Any]
    metrics: dict[str, Any]
    claims: list[Claim]
    students: list[Student]
    cost: dict[str, Any] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``: strict JSON, NaN and infinity as null, images as base64."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "images"}
        pictures = [{"title": i.title, "png": base64.b64encode(i.png_bytes).decode()} for i in self.images]
        made = strict({**out, "images": pictures, "format": FORMAT})
        for part, key in (("claims", "interval"), ("students", "right")):
            for row in made[part]:
                if not row[key]:  # most have none
                    del row[key]
        return made

    @classmethod
    def from_json(cls, data: Any, where: str = "report") -> Report:
        """The report of `to_json`.

        Raises:
            UserError: not a report, a part is missing, or it was written by a newer version.
        """
        if not isinstance(data, Mapping) or "system" not in data:
            raise UserError(f"{where} is not a report of Stillhouse; give the folder of a run")
        version = data.get("format", FORMAT)
        if not isinstance(version, int) or version > FORMAT:
            raise UserError(
                f"{where} has format {version!r}, this version reads up to {FORMAT}; run: pip install -U stillhouse"
            )
        parts: dict[str, Callable[[Any], Any]] = {
            "claims": lambda c: _made(Claim, c, where),
            "students": lambda s: _made(Student, s, where),
            "curves": lambda c: _made(Curve, c, where),
            "matrices": lambda m: _made(Matrix, m, where),
            "tables": lambda t: _made(Table, t, where),
            "images": lambda i: Image(i["title"], base64.b64decode(i["png"], validate=True)),
        }
        try:
            return _made(cls, {k: [parts[k](i) for i in v] if k in parts else v for k, v in data.items()}, where)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where} is damaged ({type(error).__name__}: {error}); run again to make it") from None

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """The report of a run folder (or of the path of a ``report.json``).

        Raises:
            UserError: no report there, damaged, or of a newer version.
        """
        path = Path(folder)
        path = path if path.suffix == ".json" else path / "report.json"
        return cls.from_json(read_json(path), str(path))


T = TypeVar("T")


def _made(cls: type[T], data: Any, where: str) -> T:
    """The dataclass from a mapping: unknown keys are left out, missing ones are named."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is damaged: a {cls.__name__.lower()} is a {type(data).__name__}; run again")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = {f.name: data[f.name] for f in fields if f.name in data}
    lacks = [
        f.name
        for f in fields
        if f.name not in known and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if lacks:
        raise UserError(f"{where} lacks {', '.join(lacks)} of a {cls.__name__.lower()}; run again to make it")
    for name in ("value", "threshold"):
        if cls is Claim and known[name] is None:
            known[name] = NAN
    return cls(**known)
