"""One number for a smaller model against its teacher, and what must stand beside it: intervals, the front, its volume.

Nothing here loads PyTorch, so that reports can be rated and compared without it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import UserError

ALPHA = 0.5


def score_ratio(student: float, teacher: float, *, higher_is_better: bool = True, chance: float | None = None) -> float:
    """How much of the teacher's score the student has: 1 is as good, below 1 worse, above 1 better.

    A_s/A_t; with `chance` (A_s − c)/(A_t − c), which is the ratio of A' = (A − c)/(1 − c) and 0 for a student that
    guesses; for errors, where lower is better, A_t/A_s.

    Args:
        student, teacher: of one metric on one test set; shift what can be negative, such as returns, to
            (R − R_random)/(R_teacher − R_random) first.
        higher_is_better: False for errors: perplexity, FID, RMSE.
        chance: the score of guessing; needs scores in [0, 1].

    Raises:
        UserError: a score that is not finite, a teacher that is not above 0 (above chance), an error of the student
            that is not above 0, `chance` where it has no meaning.

    Example:
        >>> score_ratio(0.5, 0.93), score_ratio(0.5, 0.93, chance=0.5), score_ratio(20.0, 10.0, higher_is_better=False)
        (0.5376344086021505, 0.0, 0.5)
    """
    for who, value in (("student", student), ("teacher", teacher)):
        if not math.isfinite(value):
            raise UserError(f"score of the {who}: expected a finite number, got {value}")
    if chance is not None:
        if not higher_is_better:
            raise UserError("chance: errors, where lower is better, have no chance level; leave it out")
        if not (0 <= chance < 1 and 0 <= student <= 1 and 0 <= teacher <= 1):
            raise UserError(
                f"chance: expected scores in [0, 1] and 0 <= chance < 1, got {student}, {teacher}, {chance}"
            )
    floor = chance or 0.0
    if teacher <= floor:
        raise UserError(
            f"score of the teacher: expected a number above {floor}, got {teacher}; shift it, for example to "
            "(score − random's)/(teacher's − random's)"
        )
    if higher_is_better:
        return (student - floor) / (teacher - floor)
    if student <= 0:
        raise UserError(f"error of the student: expected a number above 0, got {student}")
    return teacher / student


def distillation_score(
    student_size: float,
    teacher_size: float,
    student_score: float,
    teacher_score: float,
    alpha: float = ALPHA,
    higher_is_better: bool = True,
    chance: float | None = None,
) -> float:
    """DS = α·S_s/S_t + (1−α)·(1 − A_s/A_t): size and lost score in one number; LOWER is better.

    Doing nothing (the teacher itself) has DS = α, a useful distillation less; below 0 is possible for a small student
    that beats its teacher. Numbers of different α are not comparable.

    Args:
        student_size, teacher_size: parameters, bytes, multiply-adds, milliseconds: any cost, both in one unit. Bytes
            (`evaluate.count_bytes`) where a student is quantised; the sum of its members for an ensemble.
        student_score, teacher_score, higher_is_better, chance: see `score_ratio`.
        alpha: what size counts against score, in [0, 1].

    Returns:
        DS; with `chance` the corrected one (DS_adj), which no collapsed student can win.

    Raises:
        UserError: sizes that are not above 0, alpha out of range, scores that have no ratio.

    Source: Alkhulaifi, Alsahli, Ahmad, Knowledge distillation in deep learning and its applications, PeerJ Computer
    Science 2021 (arXiv 2007.09029); the formula is reconstructed. Errors, chance and other costs are extensions.

    Example:
        >>> round(distillation_score(66e6, 110e6, 0.97, 1.0), 3)
        0.315
    """
    for who, size in (("student", student_size), ("teacher", teacher_size)):
        if not (math.isfinite(size) and size > 0):
            raise UserError(f"size of the {who}: expected a number above 0, got {size}")
    ratio = score_ratio(student_score, teacher_score, higher_is_better=higher_is_better, chance=chance)
    alpha = checked_alpha(alpha)
    return alpha * student_size / teacher_size + (1 - alpha) * (1 - ratio)


def checked_alpha(alpha: float) -> float:
    """The weight of size, if it is one."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: expected a weight of size in [0, 1], got {alpha}")
    return float(alpha)


# -- the front ------------------------------------------------------------------------------------------------


def pareto(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Which (cost, quality) points no other point beats: lower cost is better, higher quality is better.

    A point is beaten when another is at least as good in both and better in one; equal points stay together.
    Points with a missing or non-finite number are never on the front.

    Example:
        >>> pareto([(1, 0.5), (2, 0.9), (3, 0.8)])
        [True, True, False]
    """
    known = [
        (float(c), float(q)) if c is not None and q is not None and math.isfinite(c) and math.isfinite(q) else None
        for c, q in points
    ]
    others = [p for p in known if p is not None]
    return [p is not None and not any(c <= p[0] and q >= p[1] and (c, q) != p for c, q in others) for p in known]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float] = (1.0, 0.0)) -> float:
    """Area that (cost, quality) points dominate: what lies at higher cost and lower quality, up to `reference`.

    ∫ from the least cost to c_ref of (best quality at cost ≤ c) − q_ref dc. It grows with every point that adds to the
    front, and knows no α.

    Args:
        points: for example (size ratio, score ratio); those beyond the reference add nothing.
        reference: its default is the teacher's size and no score.

    Example:
        >>> hypervolume([(0.5, 0.8), (0.25, 0.5), (0.6, 0.7)])
        0.525
    """
    corner, floor = reference
    inside = sorted((c, q) for c, q in points if c < corner and q > floor)
    area, best = 0.0, floor
    for cost, quality in inside:
        if quality > best:
            area += (corner - cost) * (quality - best)
            best = quality
    return area


# -- paired bootstrap -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A number and the range in which it lies by the bootstrap."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    statistic: Callable[..., Any],
    *columns: Sequence[float],
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a function of means, where what belongs together is drawn together.

    Each draw takes n of the n units with replacement, the same ones of every column: two models err on the same hard
    samples, and two arms share the seed, so their difference is much surer than either. With k seeds there are few
    different draws (10 for k = 3, 126 for k = 5), and the interval says little more than the range of the k values.

    Args:
        statistic: of one mean per column, each an array (draws,); elementwise, such as ``lambda s, t: s / t``.
        columns: values (n,), one per test sample or per seed, in one order.
        draws, level, seed: of the bootstrap.

    Returns:
        the statistic of the plain means and its interval, widened to hold it where skew leaves it outside.

    Raises:
        UserError: no columns, no values, or columns of different length.

    Source: Efron, Bootstrap methods, Annals of Statistics 1979.

    Example:
        >>> student, teacher = [1, 0, 0, 1] * 25, [1, 1, 0, 1] * 25
        >>> paired_bootstrap(lambda s, t: s / t, student, teacher).value
        0.6666666666666666
    """
    import numpy as np

    lengths = {len(c) for c in columns}
    if len(lengths) != 1 or not min(lengths):
        raise UserError(f"paired_bootstrap: expected columns of one length above 0, got lengths {sorted(lengths)}")
    if draws < 1 or not 0 < level < 1:
        raise UserError(f"paired_bootstrap: expected draws >= 1 and 0 < level < 1, got {draws}, {level}")
    rows = np.stack([np.asarray(c, np.float64) for c in columns], 1)
    # Units that are alike are drawn together: right or wrong for two models are four kinds, however many samples.
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    n, rng = len(rows), np.random.default_rng(seed)
    block = max(1, 5_000_000 // len(kinds))
    parts = [rng.multinomial(n, counts / n, size=min(block, draws - k)) @ kinds / n for k in range(0, draws, block)]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.asarray(statistic(*np.concatenate(parts).T), np.float64)
        value = float(statistic(*(np.float64(m) for m in rows.mean(0))))
    low, high = np.quantile(np.nan_to_num(drawn, nan=np.inf, posinf=np.inf, neginf=-np.inf),
                            [(1 - level) / 2, (1 + level) / 2], method="nearest")  # fmt: skip
    return Interval(value, min(value, float(low)), max(value, float(high)))


def pack(flags: Sequence[bool]) -> str:
    """True and false as text, six to a character: which samples a model named right.

    Example:
        >>> unpack(pack([True, False, True]), 3)
        [True, False, True]
    """
    bits = "".join("1" if f else "0" for f in flags)
    size = -(-len(bits) // 8)
    return base64.b64encode(int(bits.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")).decode()


def unpack(text: str, n: int) -> list[bool]:
    """The first n flags of `pack`.

    Raises:
        UserError: the text holds fewer, or is none of `pack`.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != -(-n // 8):
        raise UserError(f"packed answers: expected {n} flags, got {8 * len(raw)}; the report is damaged, run again")
    bits = f"{int.from_bytes(raw, 'big'):0{8 * len(raw)}b}"
    return [b == "1" for b in bits[:n]]
