"""Losses on the order of the classes (or documents), one value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast

_NOWHERE = -1e30  # a score without weight in any sum; −inf would make the gradient of logcumsumexp NaN


def plackett_luce(
    teacher_logits: Tensor,
    student_logits: Tensor,
    target: Tensor,
    T: float = 1.0,
    weights: Tensor | None = None,
    topk: float = 0,
) -> Tensor:
    """Σ_k a_k [log Σ_{l≥k} exp(s_{π_l}) − s_{π_k}] per sample (PLD, arXiv 2506.12542).

    π puts the label first and the other classes in the teacher's order; a_k = softmax(t/T) at the class of rank k. The
    first bracket is the cross-entropy of the label. The sum over ranks is not divided by C and has no T²: only the
    weights are tempered. The teacher is detached.

    The "classes" may be the candidates of a query: positive first, then the teacher's order. A candidate whose teacher
    score is −inf is not in its list, which is how lists of unequal length are padded; the student's score there is not
    looked at.

    Args:
        teacher_logits, student_logits: (n, C). target: (n,) class indices.
        T: temperature of the teacher's weights; infinite ones are uniform (ListMLE / C).
        weights: (n, C) or (C,), a by rank instead of the teacher's: (1, 0, …) is cross-entropy, 1/C is ListMLE / C.
        topk: rank only the label and the teacher's `topk` best others, a renormalised over these topk + 1; the rest
            stay in every sum over l, without an order among them. 0 ranks all. For a list that is closed, gather both
            sides by `shortlist` first.

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
    there = label | (t > -torch.inf)
    s = s.masked_fill(~there, _NOWHERE)
    tempered = torch.where(there, t.clamp_min(torch.finfo(t.dtype).min) / T, -torch.inf)
    if 0 < topk < t.shape[1] - 1:
        order = shortlist(t, target, int(topk)).flip(1)
        tail = s.scatter(1, order, _NOWHERE).logsumexp(1, keepdim=True)
        ranked = s.gather(1, order)
        sums = torch.logcumsumexp(torch.cat([tail, ranked], 1), 1)[:, 1:]
        a = F.softmax(tempered.gather(1, order), 1)
    else:
        # Ascending with the label last: the suffix sums of (1) become running sums.
        order = torch.argsort(t.masked_fill(label, torch.inf), dim=1, stable=True)
        ranked = s.gather(1, order)
        sums = torch.logcumsumexp(ranked, 1)
        a = F.softmax(tempered, 1).gather(1, order)
    if weights is not None:
        a = weights.expand_as(ranked).flip(1) * there.gather(1, order)
    return (a * (sums - ranked)).sum(1)


def shortlist(teacher_logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Where the label and the teacher's k best other classes stand, best first.

    For heads with so many classes that only some are computed: ``plackett_luce(t.gather(1, i), s_i, zeros)`` with the
    student's logits s_i of these classes alone is the likelihood among them; it says nothing of all others.

    Args:
        teacher_logits: (n, C). target: (n,). k: 1 … C−1.

    Returns:
        (n, k + 1) class indices; the label is in column 0.

    Example:
        >>> shortlist(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([1]), 1)
        tensor([[1, 0]])
    """
    if not 1 <= k < teacher_logits.shape[1]:
        raise UserError(f"shortlist: k must lie in 1…{teacher_logits.shape[1] - 1}, got {k}")
    label = F.one_hot(target, teacher_logits.shape[1]).bool()
    return upcast(teacher_logits.detach()).masked_fill(label, torch.inf).topk(k + 1, dim=1).indices
