"""Pilots, and the law that they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.errors import UserError
from stillhouse.recommend.law import LEAST_SIZES, LEAST_TEACHERS, Best, Law, best_teacher, fit_law, short


@dataclass(frozen=True)
class Pilot:
    """One student of one teacher.

    Attributes:
        name: of the student. teacher: its name. asked: the student's size as it was asked for.
        student_size, teacher_size: parameters. start, loss: nats per token of the test text, before and after training.
        seed: of the pilot, where there are several.
    """

    name: str
    teacher: str
    asked: float
    student_size: float
    teacher_size: float
    start: float
    loss: float
    seed: int = 0


def minima(pilots: Sequence[Pilot]) -> dict[tuple[float, int], Best]:
    """The best teacher of each size of student and seed, where it has pilots with teachers of four sizes or more.

    Of teachers of one size the mean loss counts.
    """
    groups: dict[tuple[float, int], dict[float, list[float]]] = {}
    for p in pilots:
        groups.setdefault((p.asked, p.seed), {}).setdefault(p.teacher_size, []).append(p.loss)
    return {
        key: best_teacher({size: sum(losses) / len(losses) for size, losses in found.items()})
        for key, found in groups.items()
        if len(found) >= LEAST_TEACHERS
    }


def minima_of_means(pilots: Sequence[Pilot]) -> dict[float, Best]:
    """The best teacher of each size by the mean loss over seeds, where there are several."""
    seeds = {p.seed for p in pilots}
    losses: dict[tuple[str, float, float], list[float]] = {}
    for p in pilots:
        losses.setdefault((p.teacher, p.asked, p.teacher_size), []).append(p.loss)
    means = [
        Pilot("", t, s, s, size, 0.0, sum(v) / len(v)) for (t, s, size), v in losses.items() if len(v) == len(seeds)
    ]
    return {s: best for (s, _), best in minima(means).items()} if len(seeds) > 1 else {}


def law_of(pilots: Sequence[Pilot], counts: str, seed: int = 0) -> tuple[Law | None, str]:
    """T* = aS + b over the sizes whose minimum is bracketed, or why there is none."""
    found = minima(pilots)
    points = [(s, best.teacher) for (s, _), best in found.items() if best.bracketed]
    said = []
    for size in sorted({s for s, _ in found}):
        seeds = [best.bracketed for (s, _), best in found.items() if s == size]
        if not all(seeds):
            of = f" on {seeds.count(False)} of {len(seeds)} seeds" if len(seeds) > 1 else ""
            said.append(f"students of {short(size)}: not bracketed{of}, the best teacher is at the end of the grid")
    if len({s for s, _ in points}) < LEAST_SIZES:
        tried, whole = len({p.asked for p in pilots}), len({s for s, _ in points})
        said.append(
            f"a law needs {LEAST_SIZES} sizes of students, each with a bracketed best of {LEAST_TEACHERS} or more; "
            f"of {tried} tried {whole} have"
        )
        return None, "; ".join(said)
    sizes = [p.teacher_size for p in pilots]
    try:
        return fit_law(points, teachers=(min(sizes), max(sizes)), counts=counts, seed=seed), "; ".join(said)
    except UserError as error:
        return None, str(error)
