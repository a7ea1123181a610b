"""Telling students from teachers: the loss of a discriminator, and what of its gradient reaches the student."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.factor * grads[0], None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient is multiplied by `factor`. −1 is gradient reversal (Ganin & Lempitsky, arXiv 1409.7495).

    With it two sides of a game move in one backward pass: what comes after descends the loss, what comes before
    ascends it (factor < 0), descends it too (> 0) or is left alone (0).

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> (scale_gradient(x, -0.5) ** 2).backward()
        >>> float(x.grad)
        -3.0
    """
    return _Scaled.apply(x, factor)


def discrimination(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """mean over both rows and both outputs of BCE(D(x), y): y = (1, 0) for student rows, (0, 1) for teacher rows.

    Args:
        student_scores, teacher_scores: (n, 2), a discriminator's logits for the outputs of student and teacher on the
            same samples. Nothing is detached.

    Returns:
        (n,), log 2 where the discriminator says 0; its mean is the BCE over the stacked (2n, 2) of MEAL V2
        (arXiv 2009.08453).

    Raises:
        UserError: scores of other shapes.

    Example:
        >>> discrimination(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.6931])
    """
    if student_scores.shape != teacher_scores.shape or student_scores.dim() != 2 or student_scores.shape[1] != 2:
        raise UserError(
            f"discrimination: needs two scores per sample and side, (n, 2) each, got {tuple(student_scores.shape)} "
            f"and {tuple(teacher_scores.shape)}"
        )
    sign = student_scores.new_tensor([-1.0, 1.0], dtype=upcast(student_scores).dtype)
    return (F.softplus(sign * upcast(student_scores)) + F.softplus(-sign * upcast(teacher_scores))).mean(-1) / 2
