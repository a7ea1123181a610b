"""The loss of both stages, what the first one tells the second, and ranges that follow and are then fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call, logits_of
from stillhouse.students.activations import follow_ranges, set_mode
from stillhouse.system import Batch, Clock, Schedule, System, Teacher, Terms, Update
from stillhouse.taps import tap

LEAST = 1e-12  # of a feature error, where a layer lost nothing at all
KEPT = 0.95  # of the running mean of feature errors


def factors(errors: Sequence[float], how: Literal["inverse", "share", "none"] = "inverse") -> list[float]:
    """How much each compared layer weighs in the second stage, from its feature error ℓ_i in the first; mean 1.

    ``inverse``: w_i = K · (1/ℓ_i) / Σ_j (1/ℓ_j). ``share``: w_i = (1 − ℓ_i/Σ_j ℓ_j) · K/(K−1). ``none``: 1. A layer
    that followed well weighs much in both: its error in quantisation hurts more. The paper's formula is not available.

    Example:
        >>> factors([1.0, 3.0]), factors([1.0, 3.0], "share"), factors([2.0, 2.0])
        ([1.5, 0.5], [1.5, 0.5], [1.0, 1.0])
    """
    k, e = len(errors), torch.tensor(list(errors), dtype=torch.float64).clamp_min(LEAST)
    if how == "none" or k < 2:
        return [1.0] * k
    w = k * (1 / e) / (1 / e).sum() if how == "inverse" else (1 - e / e.sum()) * k / (k - 1)
    return [float(x) for x in w]


class Sensed(System):
    """L = α·L_hard + β·L_soft + γ·Σ_i w_i·MSE(f_i, f_i^T), the features of samples on which both name one class.

    L_hard = mean CE; L_soft = mean T² KL(teacher ‖ student). The buffer ``errors`` is the running mean of every layer's
    MSE. What has no weight is not computed; where only L_hard has, the teacher is not asked.

    Args:
        student: with masked, and in the second stage quantised, weights. teacher: a `Teacher` with `compare` as taps.
        compare: paths whose outputs are compared. weights: w_i.
        alpha, beta, gamma: see above. T: of the KL.
        answers: a `Teacher` whose classes stand in for the labels; None takes the batch's.
        ranges: part of the stage in which the ranges of quantised inputs follow, with `momentum`.
        optimizer, lr, clip: as in `Distill`.

    Source: Yu et al. (CVPR 2023, arXiv 2305.10727).
    """

    errors: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        compare: Sequence[str],
        weights: Sequence[float] = (),
        alpha: float = 1.0,
        beta: float = 10.0,
        gamma: float = 5.0,
        T: float = 2.0,
        answers: Teacher | None = None,
        ranges: float = 0.0,
        momentum: float = 0.9,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
        lr: Schedule | None = None,
        clip: float | None = None,
    ):
        super().__init__()
        self.student, self.teacher, self.answers = student, teacher, answers
        self.alpha, self.beta, self.gamma, self.T = alpha, beta, gamma, T
        self.compare = list(compare) if gamma else []
        self.weights = list(weights) or [1.0] * len(self.compare)
        self.ranges, self.momentum = ranges, momentum
        self._optimizer, self._lr, self._clip = optimizer, lr, clip
        self._sums: list[tuple[Tensor, int]] = []  # of the micro-batches of this step
        self.register_buffer("errors", torch.zeros(len(self.compare)))

    def updates(self) -> Sequence[Update]:
        return [Update("learn", list(self.student.parameters()), self._optimizer, lr=self._lr, clip=self._clip)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``hard``, ``soft`` and ``feature``, weighted; notes the part of the samples that agree."""
        set_follow(self.student, clock, self.ranges)
        with tap(self.student, self.compare) as seen:
            z = logits_of(call(self.student, batch["input"]))
        said = self.teacher(batch) if self.beta or self.gamma else None
        terms: dict[str, Tensor] = {}
        if self.alpha:
            terms["hard"] = self.alpha * O.cross_entropy(z, self._labels(batch, said)).mean()
        if said is None:
            return Terms(**terms)
        if self.beta:
            terms["soft"] = self.beta * O.kl(said.logits, z, self.T).mean()
        agree = (said.logits.argmax(-1) == z.detach().argmax(-1)).to(said.logits.dtype).mean()
        if self.compare:
            terms["feature"] = self.gamma * self._features(said, seen, z, clock.all_mean([agree], len(z))[0])
        return Terms(**terms).note(agree=agree)

    def _labels(self, batch: Batch, said: Any) -> Tensor:
        if self.answers is None:
            return batch["label"]
        return (said if self.answers is self.teacher and said else self.answers(batch)).logits.argmax(-1)

    def _features(self, said: Any, seen: Any, z: Tensor, share: Tensor) -> Tensor:
        each = [O.where_agreed(O.mse(said[p], seen[p]), said.logits, z, share).mean() for p in self.compare]
        found = torch.stack(each)
        self._sums.append((found.detach(), len(z)))
        return (found * found.new_tensor(self.weights)).sum()

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        if self._sums:
            count = sum(n for _, n in self._sums)
            own = torch.stack([e * n / count for e, n in self._sums]).sum(0)
            now = clock.all_mean([own], count)[0].to(self.errors)
            mixed = torch.where(self.errors == 0, now, KEPT * self.errors + (1 - KEPT) * now)
            self.errors.copy_(torch.where(now > 0, mixed, self.errors))  # 0: nobody agreed
            self._sums = []
        follow_ranges(self.student, clock, self.momentum)

    def outcome(self) -> nn.Module:
        """The student."""
        return self.student


def set_follow(student: nn.Module, clock: Clock, ranges: float) -> None:
    """Ranges follow in the first part of a stage: a function of the clock, so that a resumed stage does the same."""
    if clock.micro == 0:
        set_mode(student, "follow" if clock.progress < ranges else "quantise")
