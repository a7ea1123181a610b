"""Students beside their teacher: ratios, DS, the front; for any models, and for the students of every report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import UserError
from stillhouse.report.parts import Report, Student
from stillhouse.score import (
    ALPHA,
    Interval,
    checked_alpha,
    distillation_score,
    hypervolume,
    paired_bootstrap,
    pareto,
    score_ratio,
    unpack,
)

# What counts as the score of a row, the first that both have; False where lower is better.
SCORES = {"accuracy": True, "f1": True, "ndcg": True, "map": True, "perplexity": False, "fid": False, "rmse": False}
SIZES = ("weight_bytes", "params")
ADDED = ("size_ratio", "score_ratio", "score_ratio_low", "score_ratio_high", "ds", "ds_adj", "ds_alpha", "front")


@dataclass(frozen=True)
class Rated:
    """A model as the score sees it: its size, its score, and which test samples it named right, where that is known."""

    name: str
    size: float
    score: float
    right: Sequence[float] | None = None


@dataclass(frozen=True)
class DistillationReport:
    """Students of any size beside their teacher: ratios, DS, the front, and who is best for which α.

    Args:
        teacher: what the students are compared with.
        students: measured on the same test set, in the same unit of size.
        alpha, higher_is_better, chance: see `stillhouse.score.distillation_score`.

    Raises:
        UserError: no students, or numbers that have no ratio.

    Example:
        >>> teacher, small = Rated("teacher", 100, 0.9), Rated("small", 20, 0.81)
        >>> report = DistillationReport(teacher, [small], chance=0.1)
        >>> [round(v, 3) for v in (*report.ds, *report.ds_adj)]
        [0.15, 0.156]
        >>> report.best(alpha=0.05).name
        'teacher'
    """

    teacher: Rated
    students: Sequence[Rated]
    alpha: float = ALPHA
    higher_is_better: bool = True
    chance: float | None = None

    def __post_init__(self) -> None:
        if not self.students:
            raise UserError("DistillationReport needs at least one student")
        for s in (self.teacher, *self.students):
            for chance in {None, self.chance}:
                self._ds(s, chance, self.alpha)

    def _ds(self, s: Rated, chance: float | None, alpha: float) -> float:
        t = self.teacher
        return distillation_score(s.size, t.size, s.score, t.score, alpha, self.higher_is_better, chance)

    @property
    def sizes(self) -> list[float]:
        """S_s/S_t of each student."""
        return [s.size / self.teacher.size for s in self.students]

    @property
    def scores(self) -> list[float]:
        """A_s/A_t of each student (A_t/A_s for errors)."""
        better = self.higher_is_better
        return [score_ratio(s.score, self.teacher.score, higher_is_better=better) for s in self.students]

    @property
    def ds(self) -> list[float]:
        """DS of each student; lower is better."""
        return [self._ds(s, None, self.alpha) for s in self.students]

    @property
    def ds_adj(self) -> list[float]:
        """DS of each student corrected for chance; without a chance level it is DS."""
        return [self._ds(s, self.chance, self.alpha) for s in self.students]

    @property
    def front(self) -> list[bool]:
        """Which students no other student, nor the teacher, beats in size and score."""
        return pareto([*zip(self.sizes, self.scores, strict=True), (1.0, 1.0)])[:-1]

    @property
    def hypervolume(self) -> float:
        """Area that the students dominate in (size ratio, score ratio), up to the teacher's size and no score."""
        return hypervolume(list(zip(self.sizes, self.scores, strict=True)))

    @property
    def title(self) -> str:
        """The heading of a column of DS."""
        return f"DS (α={self.alpha:g}, lower is better)"

    def interval(self, student: Rated) -> Interval | None:
        """The score ratio and its paired bootstrap interval over test samples; None where answers are not known."""
        if student.right is None or self.teacher.right is None or not self.higher_is_better:
            return None
        return paired_bootstrap(lambda s, t: s / t, student.right, self.teacher.right)

    def best(self, alpha: float | None = None) -> Rated:
        """The model of least DS, the teacher included; the smaller one of two that are equal."""
        at = self.alpha if alpha is None else checked_alpha(alpha)
        return min((*self.students, self.teacher), key=lambda m: (self._ds(m, None, at), m.size))

    def path(self) -> list[tuple[float, Rated]]:
        """Who is best from which α on, from 0: the lower envelope of the lines DS(α); sizes along it only fall."""
        lines = [*zip(self.sizes, self.scores, self.students, strict=True), (1.0, 1.0, self.teacher)]
        size, score, now = min(lines, key=lambda m: (-m[1], m[0]))
        found = [(0.0, now)]
        while smaller := [m for m in lines if m[0] < size]:
            # A smaller model takes over where α(S − S') = (1−α)(A − A'): first the one that gives up least per size.
            price, k = min(((score - r) / (size - s), s, k) for k, (s, r, _) in enumerate(smaller))[::2]
            size, score, now = smaller[k]
            found.append((price / (1 + price), now))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per student: its name, and under the keys of `ADDED` what is known of it."""
        made = []
        for i, student in enumerate(self.students):
            row = {"name": student.name, "size_ratio": self.sizes[i], "score_ratio": self.scores[i]}
            if found := self.interval(student):
                row |= {"score_ratio_low": found.low, "score_ratio_high": found.high}
            row |= {"ds": self.ds[i], "ds_alpha": self.alpha, "front": float(self.front[i])}
            made.append(row if self.chance is None else {**row, "ds_adj": self.ds_adj[i]})
        return made

    def to_markdown(self) -> str:
        """A Markdown table; direction and weight of DS stand in its heading."""
        heads = ["student", "size ratio", "score ratio", "95 % interval", self.title, "DS_adj", "on the front"]
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
        for r in self.rows():
            ends = f"{r['score_ratio_low']:.3f} … {r['score_ratio_high']:.3f}" if "score_ratio_low" in r else "–"
            adjusted = f"{r['ds_adj']:.3f}" if "ds_adj" in r else "–"
            numbers = [f"{r['size_ratio']:.4f}", f"{r['score_ratio']:.3f}", ends, f"{r['ds']:.3f}", adjusted]
            lines.append([r["name"], *numbers, "yes" if r["front"] else "no"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- the students of a report ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """What the students of a report are compared with, and in which measures."""

    teacher: Student
    size: str
    score: str


def basis(students: Sequence[Student]) -> Basis | None:
    """The row marked as base, else the student as large as its base; None where no row can be compared with it."""
    whole = [s for s in students if s.role == "student" and s.number("compression") == 1]
    for teacher in [*(s for s in students if s.role == "base"), *whole]:
        score = next((k for k in SCORES if (teacher.number(k) or 0) > 0), None)
        size = next((k for k in SIZES if (teacher.number(k) or 0) > 0), None)
        if score and size:
            return Basis(teacher, size, score)
    return None


def rate(report: Report, alpha: float | None = None) -> Report:
    """Adds to every student of a report how it stands beside the teacher, in place (`ADDED`); nothing else changes.

    Args:
        report: its teacher is found by `basis`; without one the report stays as it is.
        alpha: weight of size; None keeps the one it was rated with, `stillhouse.score.ALPHA` at first.

    Returns:
        the report.
    """
    if alpha is None:
        alpha = next((a for s in report.students if (a := s.number("ds_alpha")) is not None), ALPHA)
    for student in report.students:
        for key in ADDED:
            student.metrics.pop(key, None)
    rated, made = rating(report.students, alpha)
    for student, row in zip(rated, made.rows() if made else [], strict=True):
        student.metrics |= {k: v for k, v in row.items() if k != "name"}
    return report


def rating(students: Sequence[Student], alpha: float) -> tuple[list[Student], DistillationReport | None]:
    """The students of a report that have size and score, and these beside their teacher; none where there is none."""
    found = basis(students)
    if found is None:
        return [], None
    teacher, better = found.teacher, SCORES[found.score]
    chance = teacher.number("chance") if found.score == "accuracy" else None
    known = chance is not None and 0 <= chance < (teacher.number("accuracy") or 0.0) <= 1

    def seen(s: Student) -> Rated | None:
        size, score = s.number(found.size), s.number(found.score)
        if not size or size < 0 or score is None or score < 0 or (not better and score == 0) or (known and score > 1):
            return None
        return Rated(s.name, size, score, answers(s, teacher) if found.score == "accuracy" else None)

    both = [(s, r) for s in students if s is not teacher and s.role != "base" and (r := seen(s))]
    reference = seen(teacher)
    if reference is None or not both:
        return [], None
    made = DistillationReport(reference, [r for _, r in both], alpha, better, chance if known else None)
    return [s for s, _ in both], made


def answers(student: Student, other: Student) -> list[bool] | None:
    """Which samples a student named right, where the other was asked the same ones."""
    mine, theirs = (s.right if isinstance(s.right, dict) else {} for s in (student, other))
    if mine.get("test") is None or mine["test"] != theirs.get("test"):
        return None
    return unpack(str(mine.get("bits", "")), int(mine.get("n", 0)))
