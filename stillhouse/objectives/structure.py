"""What the samples of a batch are to one another: a value per anchor sample; teacher first, detached unless asked.

The values depend on which samples share the batch, so they are not the same under micro-batches or several processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import unit, upcast


def _rows(teacher: Tensor, student: Tensor, detach_teacher: bool, where: str) -> tuple[Tensor, Tensor]:
    if len(teacher) != len(student) or teacher.dim() < 2 or student.dim() < 2:
        raise UserError(
            f"{where}: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be features (n, …) of "
            "one batch"
        )
    teacher = teacher.detach() if detach_teacher else teacher
    return upcast(teacher).flatten(1), upcast(student).flatten(1)


def relative_distance(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """mean_j huber(d_t(i,j)/d̄_t − d_s(i,j)/d̄_s) per anchor i (RKD-D, arXiv 1904.05068).

    d are Euclidean distances, d̄ their mean over pairs i ≠ j; huber with threshold 1. The mean over j has n below,
    the diagonal's zero included, as in the authors' code. Samples that coincide have distance 0 and get no gradient
    from one another; without any distance, as in a batch of one, they stay 0.

    Args:
        teacher, student: (n, …); widths may differ.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).
    """
    t, s = _rows(teacher, student, detach_teacher, "relative_distance")

    def distances(x: Tensor) -> Tensor:
        x = x - x.mean(0)  # what all samples share would cancel below only up to rounding
        square = x.square().sum(1)
        square = square[:, None] + square - 2 * x @ x.T
        apart = (square > 1e-12) & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        d = torch.where(apart, square, 1.0).sqrt() * apart
        return d / (d.sum() / apart.sum().clamp_min(1)).clamp_min(torch.finfo(d.dtype).tiny)

    return F.smooth_l1_loss(distances(s), distances(t), reduction="none").mean(1)


def relative_angle(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """mean_jk huber(cos∠_t(j,i,k) − cos∠_s(j,i,k)) per corner i (RKD-A, arXiv 1904.05068); n³ numbers.

    Arguments and result as for `relative_distance`.
    """
    t, s = _rows(teacher, student, detach_teacher, "relative_angle")

    def angles(x: Tensor) -> Tensor:
        edges = unit(x.unsqueeze(0) - x.unsqueeze(1))
        return edges @ edges.mT

    return F.smooth_l1_loss(angles(s), angles(t), reduction="none").mean((1, 2))


def probabilistic(teacher: Tensor, student: Tensor, detach_teacher: bool = True, eps: float = 1e-7) -> Tensor:
    """Σ_j p(j|i) log (p(j|i) + ε)/(q(j|i) + ε) per sample i (PKT, arXiv 1803.10837).

    p and q are each sample's similarities (1 + cos)/2 to all samples of the batch, itself included, made to sum to 1.
    The authors' code takes the mean over all n² pairs, hence 1/n of the mean of these.

    Args:
        teacher, student: (n, …); widths may differ.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).
    """
    t, s = _rows(teacher, student, detach_teacher, "probabilistic")

    def neighbours(x: Tensor) -> Tensor:
        u = unit(x, eps=eps)
        near = (u @ u.T + 1) / 2
        return near / near.sum(1, keepdim=True)

    p, q = neighbours(t), neighbours(s)
    return (p * ((p + eps) / (q + eps)).log()).sum(1)


def cka(teacher: Tensor, student: Tensor, detach_teacher: bool = True, eps: float = 1e-12) -> Tensor:
    """1 − ‖TᵀS‖²_F / (‖TᵀT‖_F ‖SᵀS‖_F), columns centred: linear CKA (arXiv 1905.00414).

    One number for the batch, given to every sample. Invariant to rotation and to a common scale of either side.

    Args:
        teacher, student: (n, …); widths may differ.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,), in [0, 1].
    """
    t, s = _rows(teacher, student, detach_teacher, "cka")
    t, s = t - t.mean(0), s - s.mean(0)
    # Through the n × n Gram matrices: ⟨TTᵀ, SSᵀ⟩ = ‖TᵀS‖²_F, and n is smaller than the widths of feature maps.
    a, b = t @ t.T, s @ s.T
    value = 1 - (a * b).sum() / (a.norm() * b.norm()).clamp_min(eps)
    return value.expand(len(t))


def contrastive(teacher: Tensor, student: Tensor, T: float = 0.1, detach_teacher: bool = True) -> Tensor:
    """−log exp(⟨s_i, t_i⟩/T) / Σ_j exp(⟨s_i, t_j⟩/T) per sample, unit vectors: the batch's other samples are negatives.

    The in-batch form of contrastive distillation; CRD itself (arXiv 1910.10699) draws its negatives from a memory of
    the whole training set and estimates with NCE.

    Args:
        teacher, student: (n, …) of one width: put projectors in front of them.
        T: temperature.
        detach_teacher: no gradient to the teacher's side; False where it has a learned projector.

    Returns:
        (n,).
    """
    t, s = _rows(teacher, student, detach_teacher, "contrastive")
    if t.shape != s.shape:
        raise UserError(f"contrastive: widths {t.shape[1]} and {s.shape[1]} differ; put a projector on one of them")
    scores = unit(s) @ unit(t).T / T
    return F.cross_entropy(scores, torch.arange(len(t), device=t.device), reduction="none")


def nt_xent(a: Tensor, b: Tensor, T: float = 0.5) -> Tensor:
    """½ Σ over both directions of −log exp(⟨a_i, b_i⟩/T) / Σ_{v ≠ a_i} exp(⟨a_i, v⟩/T), unit vectors (SimCLR).

    v runs over the 2n views of the batch but the anchor itself: the other view of the same sample is right, all others
    are negatives (normalised temperature-scaled cross-entropy, arXiv 2002.05709). No side is detached.

    Args:
        a, b: (n, d), two views of each sample, n ≥ 2. T: temperature.

    Returns:
        (n,); log(2n − 1) where all views are alike.

    Raises:
        UserError: shapes that differ, or a single sample.

    Example:
        >>> nt_xent(torch.ones(2, 3), torch.ones(2, 3))
        tensor([1.0986, 1.0986])
    """
    if a.shape != b.shape or a.dim() != 2 or len(a) < 2:
        raise UserError(f"nt_xent: needs two views (n, d) of n >= 2 samples, got {tuple(a.shape)} and {tuple(b.shape)}")
    n, z = len(a), unit(upcast(torch.cat([a, b])))
    scores = (z @ z.T / T).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf"))
    right = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(scores, right, reduction="none").view(2, n).mean(0)
