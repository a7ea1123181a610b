"""The law of capacity gap: which teacher gives the best student of a size (Zhang et al., ACL 2025, arXiv 2311.07052).

T* = a·S + b, with S and T* parameters of the student and of its best teacher; published, or fitted on own pilots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.errors import UserError
from stillhouse.files import read_json
from stillhouse.system import fold

RULE = 2.5  # what is left of the published law in practice
LEAST_SIZES, LEAST_TEACHERS, DRAWS = 3, 4, 2000


@dataclass(frozen=True)
class Best:
    """The best teacher of one student size, as its pilots have it.

    Attributes:
        teacher: parameters. loss: what the parabola has there, or the grid where the minimum is at its end.
        bracketed: whether teachers on both sides were worse; else `teacher` is only the end of the grid.
    """

    teacher: float
    loss: float
    bracketed: bool


def best_teacher(losses: Mapping[float, float]) -> Best:
    """argmin of the parabola in log T through the lowest loss and its two neighbours.

    Args:
        losses: teacher's parameters → validation loss of its student; all students of one size.

    Raises:
        UserError: fewer than three teachers, or a loss that is not finite.

    Example:
        >>> found = best_teacher({t: (math.log(t) - math.log(150)) ** 2 for t in (60, 100, 200, 400)})
        >>> round(found.teacher, 6), found.bracketed, best_teacher({1: 0.3, 2: 0.2, 4: 0.1}).bracketed
        (150.0, True, False)
    """
    sizes = sorted(losses)
    values = [float(losses[t]) for t in sizes]
    if len(sizes) < 3 or not all(math.isfinite(v) for v in values) or sizes[0] <= 0:
        raise UserError(f"the best teacher needs finite losses of three teachers, got {dict(losses)}")
    k = int(np.argmin(values))
    if k in (0, len(sizes) - 1):
        return Best(float(sizes[k]), values[k], False)
    x = np.log(np.array(sizes[k - 1 : k + 2], dtype=np.float64))
    middle = x[1]
    curve = np.polynomial.Polynomial.fit(x - middle, values[k - 1 : k + 2], 2, domain=[-1, 1], window=[-1, 1])
    _, slope, bend = map(float, curve.coef)
    # Of three equal losses any teacher between is as good.
    at = float(np.clip(-slope / (2 * bend), x[0] - middle, x[2] - middle)) if bend > 0 else 0.0
    return Best(math.exp(at + middle), float(curve(at)), True)


@dataclass(frozen=True)
class Law:
    """T* = a·S + b, in parameters.

    Attributes:
        a, b: slope and offset. r2: of the fit. interval: of a, 95 %, or None.
        teachers, students: smallest and largest the fit has seen.
        counts: what is counted on both sides: ``all`` parameters, or ``blocks`` without embeddings and head.
        points: (S, T*) it was fitted on. source: where it comes from.
        rule: factor without an offset, for teachers below those that were tried; 0 takes the line there too.
    """

    a: float
    b: float
    r2: float
    teachers: tuple[float, float]
    students: tuple[float, float]
    interval: tuple[float, float] | None = None
    counts: str = "all"
    points: tuple[tuple[float, float], ...] = ()
    source: str = "own pilots"
    rule: float = 0.0

    def teacher(self, student: float) -> float:
        """Parameters of the best teacher.

        Example:
            >>> round(PUBLISHED.teacher(1e9) / 1e9, 4), PUBLISHED.teacher(1e7) / 1e7
            (2.4865, 2.5)
        """
        found = self.a * student + self.b
        return self.plain * student if found <= student or (self.rule and found < self.teachers[0]) else found

    def student(self, teacher: float) -> float:
        """Parameters of the student whose best teacher this is.

        Example:
            >>> round(PUBLISHED.student(PUBLISHED.teacher(5e8)))
            500000000
        """
        found = (teacher - self.b) / self.a
        small = not 0 < found < teacher or (self.rule and teacher < self.teachers[0])
        return teacher / self.plain if small else found

    @property
    def plain(self) -> float:
        """The factor without an offset."""
        return self.rule or RULE

    def beyond(self, student: float, teacher: float) -> str:
        """Why this pair is an extrapolation, and what was done about it; empty where it is none."""
        said = []
        if not self.students[0] <= student <= self.students[1]:
            said.append(f"students of {short(self.students[0])} to {short(self.students[1])} were fitted")
        if not self.teachers[0] <= teacher <= self.teachers[1]:
            said.append(f"teachers of {short(self.teachers[0])} to {short(self.teachers[1])} were tried")
        if abs(self.a * student + self.b - teacher) > 1e-6 * teacher:
            said.append(f"the offset, which outweighs so small a student, is left out: T = {self.plain} S")
        return "; ".join(said)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Any, where: str = "the law") -> Law:
        """Raises UserError where the JSON is no law."""
        try:
            pairs = {k: tuple(value[k]) for k in ("teachers", "students")}
            ends = None if value.get("interval") is None else tuple(map(float, value["interval"]))
            law = Law(**{**value, **pairs, "interval": ends, "points": tuple(map(tuple, value.get("points", ())))})
            if not law.a > 0 or not all(len(p) == 2 for p in (*pairs.values(), *law.points)):
                raise ValueError("a must be positive and ranges be pairs")
            return law
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{where} is no law ({type(error).__name__}: {error}); fit it again") from None


# The unit of the published offset is not stated; read as millions, which the text's "2.5 times" agrees with. The range
# of student sizes is only known as "below 3B".
PUBLISHED = Law(
    2.498, -11.498e6, 0.9957, (70e6, 2.8e9), (0.0, 3e9), source="arXiv 2311.07052: GPT-2, Pythia", rule=RULE
)
CAVEAT = (
    "The law compares the best students of one size over teachers. It does not say that distillation beats another use "
    "of the compute, and its constants come from students that were pruned from their teachers and taught by the soft "
    "cross-entropy of tokens."
)


def fit_law(
    points: Sequence[tuple[float, float]],
    *,
    teachers: tuple[float, float] | None = None,
    counts: str = "all",
    source: str = "own pilots",
    seed: int = 0,
) -> Law:
    """Least squares T* = a·S + b over (S, T*) pairs, R², and a bootstrap interval of a over the pairs.

    Args:
        points: (S, T*) of bracketed minima; of several seeds one pair each.
        teachers: smallest and largest of the grid; by default of the points.
        counts, source: see `Law`. seed: of the bootstrap.

    Raises:
        UserError: fewer than three sizes, or teachers that do not grow with their students.

    Example:
        >>> law = fit_law([(1e6, 3e6), (2e6, 5e6), (4e6, 9e6)])
        >>> round(law.a, 6), round(law.b), round(law.r2, 6)
        (2.0, 1000000, 1.0)
    """
    s, t = (np.array([p[k] for p in points], dtype=np.float64) for k in (0, 1))
    if len(np.unique(s)) < LEAST_SIZES:
        raise UserError(
            f"a law needs bracketed minima of {LEAST_SIZES} student sizes, got {len(np.unique(s))}; run more --sizes, "
            "or a wider range of teachers"
        )
    a, b = _line(s, t)
    if not a > 0:
        raise UserError(f"the best teachers do not grow with their students (slope {a:.3g}); the pilots show no law")
    rest, spread = ((t - a * s - b) ** 2).sum(), ((t - t.mean()) ** 2).sum()
    draw = np.random.default_rng(fold("law", seed)).integers(0, len(s), (DRAWS, len(s)))
    slopes = [_line(s[i], t[i])[0] for i in draw if len(np.unique(s[i])) > 1]
    low, high = np.quantile(slopes, (0.025, 0.975))
    return Law(
        float(a), float(b), float(1 - rest / spread) if spread > 0 else 1.0,
        teachers or (float(t.min()), float(t.max())), (float(s.min()), float(s.max())),
        (float(low), float(high)), counts, tuple(zip(s.tolist(), t.tolist(), strict=True)), source,
    )  # fmt: skip


def _line(s: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    unit = s.mean()  # parameters are large numbers
    a, b = np.linalg.lstsq(np.stack([s / unit, np.ones_like(s)], 1), t / unit, rcond=None)[0]
    return float(a), float(b * unit)


def read_law(folder: str | Path) -> Law:
    """The law that a run of ``capacity_gap_law`` left in its folder.

    Raises:
        UserError: no such run, one whose pilots gave no law (the reason), or a damaged file.
    """
    path = Path(folder) / "law.json"
    if not path.exists():
        raise UserError(
            f"--law {folder}: there is no law.json; give the --out folder of a finished capacity_gap_law run"
        )
    found = read_json(path)
    if not isinstance(found, Mapping) or not found.get("law"):
        why = found.get("why", "the file is damaged") if isinstance(found, Mapping) else "the file is damaged"
        raise UserError(f"--law {folder}: its pilots gave no law: {why}")
    return Law.from_json(found["law"], str(path))


def short(size: float) -> str:
    """A number of parameters for people.

    Example:
        >>> short(2.8e9), short(124_439_808), short(60_300), short(512)
        ('2.8B', '124M', '60.3k', '512')
    """
    for letter, unit in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= 0.9995 * unit:
            return f"{size / unit:.3g}{letter}" if size < 999.5 * unit else f"{size / unit:.0f}{letter}"
    return f"{size:.0f}"
