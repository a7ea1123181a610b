"""Losses on the order of the classes (or documents), one value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast


def plackett_luce(
    teacher_logits: Tensor, student_logits: Tensor, target: Tensor, T: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Σ_k a_k [log Σ_{l≥k} exp(s_{π_l}) − s_{π_k}] per sample (PLD, arXiv 2506.12542).

    π puts the label first and the other classes in the teacher's order; a_k = softmax(t/T) at the class of rank k. The
    first bracket is the cross-entropy of the label. The sum over ranks is not divided by C and has no T²: only the
    weights are tempered. The teacher is detached.

    Args:
        teacher_logits, student_logits: (n, C). target: (n,) class indices.
        T: temperature of the teacher's weights.
        weights: (n, C) or (C,), a by rank instead of the teacher's: (1, 0, …) is cross-entropy, 1/C is ListMLE / C.

    Returns:
        (n,).

    Example:
        >>> t, s = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.5, 0.0]])
        >>> plackett_luce(t, s, torch.tensor([0]), weights=torch.tensor([1.0, 0.0, 0.0]))
        tensor([0.6803])
    """
    t, s = upcast(teacher_logits.detach()), upcast(student_logits)
    if t.shape != s.shape or t.dim() != 2 or target.shape != t.shape[:1]:
        raise UserError(
            f"plackett_luce: teacher {tuple(t.shape)}, student {tuple(s.shape)} and labels {tuple(target.shape)} must "
            "be (n, C), (n, C) and (n,)"
        )
    label = F.one_hot(target, t.shape[1]).bool()
    # Ascending with the label last: the suffix sums of (1) become running sums.
    order = torch.argsort(t.masked_fill(label, torch.inf), dim=1, stable=True)
    ranked = s.gather(1, order)
    a = F.softmax(t / T, 1).gather(1, order) if weights is None else weights.expand_as(ranked).flip(1)
    return (a * (torch.logcumsumexp(ranked, 1) - ranked)).sum(1)
