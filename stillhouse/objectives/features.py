"""Losses on intermediate features, one value per sample; teacher first, detached unless asked otherwise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast


def _pair(teacher: Tensor, student: Tensor, detach_teacher: bool, where: str) -> tuple[Tensor, Tensor]:
    if teacher.shape != student.shape or teacher.dim() < 2:
        raise UserError(
            f"{where}: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must have one shape "
            "(n, …); put a projector on the student"
        )
    teacher = teacher.detach() if detach_teacher else teacher
    return upcast(teacher).flatten(1), upcast(student).flatten(1)


def mse(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """mean_d (t_d − s_d)² per sample, over all its features d (FitNets, arXiv 1412.6550, without the ½).

    Args:
        teacher, student: (n, …) of one shape.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).
    """
    t, s = _pair(teacher, student, detach_teacher, "mse")
    return (t - s).square().mean(1)


def cosine(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """1 − ⟨t, s⟩ / (‖t‖ ‖s‖) per sample, on flattened features: 0 for equal directions, 2 for opposite ones.

    Args:
        teacher, student: (n, …) of one shape.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).
    """
    t, s = _pair(teacher, student, detach_teacher, "cosine")
    return 1 - F.cosine_similarity(t, s, dim=1)


def attention_transfer(teacher: Tensor, student: Tensor, p: int = 2, detach_teacher: bool = True) -> Tensor:
    """‖ a(t)/‖a(t)‖ − a(s)/‖a(s)‖ ‖² per sample, a(f) = Σ_c |f_c|^p flattened over positions.

    The squared distance, summed over positions (Zagoruyko & Komodakis, arXiv 1612.03928: the paper writes the
    distance itself, the authors' code the squared one divided by the number of positions).

    Args:
        teacher, student: (n, C, H, W); the numbers of channels may differ, the positions must not.
        p: power of the activation.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,), between 0 and 2.

    Raises:
        UserError: not four-dimensional, or different batch or positions.
    """
    ends = [(f.shape[0], *f.shape[2:]) for f in (teacher, student)]
    if teacher.dim() != 4 or student.dim() != 4 or ends[0] != ends[1]:
        raise UserError(
            f"attention_transfer: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be "
            "(n, C, H, W) with the same n, H, W; resize one of them"
        )
    teacher = teacher.detach() if detach_teacher else teacher
    t, s = (F.normalize(upcast(f).abs().pow(p).sum(1).flatten(1), dim=1) for f in (teacher, student))
    return (t - s).square().sum(1)
