"""One teacher into one student: the plain thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import teachers
from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of
from stillhouse.objectives import cross_entropy, kl
from stillhouse.system import Batch, Clock, Schedule, System, Teacher, Terms, Update


class Distill(System):
    """(1−α)·mean CE(z, y) + α·mean T² KL(softmax(t/T) ‖ softmax(z/T)) (Hinton et al. 2015, arXiv 1503.02531).

    The teacher is detached, in eval mode and no part of this module. With α = 0 it is not called, and
    training is plain cross-entropy bit for bit.

    Args:
        student: the network that learns; gives logits (n, C).
        teacher: a `Teacher`, or a `teachers.Sequence` of them; None only with α = 0.
        alpha: weight of the teacher in [0, 1].
        T: temperature, > 0.
        optimizer: builds the optimiser from the student's trainable parameters.
        lr: factor on the learning rate as a function of the clock.
        clip: largest gradient norm.
        label_smoothing: of the label term.

    Raises:
        UserError: a bare module as teacher, settings out of range, nothing to train, classes that differ.

    Example:
        >>> system = Distill(nn.Linear(4, 3), teachers.Frozen(nn.Linear(4, 3)))
        >>> terms = system.learn({"input": torch.ones(2, 4), "label": torch.tensor([0, 2])}, Clock())
        >>> sorted(terms.terms)
        ['label', 'teach']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | teachers.Sequence | None,
        *,
        alpha: float = 0.5,
        T: float = 4.0,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
        lr: Schedule | None = None,
        clip: float | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if isinstance(teacher, nn.Module):
            raise UserError(f"Distill: the teacher is a bare {type(teacher).__name__}; give teachers.Frozen(model)")
        if not 0 <= alpha <= 1 or T <= 0:
            raise UserError(f"Distill: needs 0 <= alpha <= 1 and T > 0, got alpha={alpha}, T={T}")
        if teacher is None and alpha > 0:
            raise UserError(f"Distill: alpha={alpha} needs a teacher; give one, or alpha=0 for labels alone")
        if not any(p.requires_grad for p in student.parameters()):
            raise UserError(
                "Distill: the student has no trainable parameter; if it is also the teacher, give "
                "Frozen(model, copy=True) before its parameters are frozen"
            )
        self.student, self.teacher = student, teacher
        self.alpha, self.T, self.label_smoothing = alpha, T, label_smoothing
        self._optimizer = optimizer or partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self._lr, self._clip = lr, clip

    def updates(self) -> Sequence[Update]:
        moving = [p for p in self.student.parameters() if p.requires_grad]
        return [Update("learn", moving, self._optimizer, lr=self._lr, clip=self._clip)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``label`` and ``teach``, already weighted by 1−α and α; notes the accuracy on the batch."""
        z = logits_of(call(self.student, batch["input"]))
        label = cross_entropy(z, batch["label"], self.label_smoothing).mean()
        correct = (z.detach().argmax(-1) == batch["label"]).float().mean()
        if self.alpha == 0 or self.teacher is None:
            return Terms(label=label).note(accuracy=correct)
        teacher = self.teacher.at(clock) if isinstance(self.teacher, teachers.Sequence) else self.teacher
        teach = kl(teacher(batch)["logits"], z, self.T).mean()
        return Terms(label=(1 - self.alpha) * label, teach=self.alpha * teach).note(accuracy=correct)

    def outcome(self) -> Any:
        """The student."""
        return self.student
