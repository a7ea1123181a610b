"""Losses on the affinities of image-text pairs: two encoders, one matrix of scores over a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import cross_entropy, soft_cross_entropy, unit, upcast


def affinity(image: Tensor, text: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """A = g · Î T̂ᵀ: how well every image fits every text of a batch, by unit vectors.

    Args:
        image, text: (n, E) and (m, E); rows are brought to length 1 here. scale: g.

    Returns:
        (n, m), attached to both.

    Raises:
        UserError: features of different widths.

    Example:
        >>> affinity(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 50.0)
        tensor([[50.,  0.]])
    """
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1]:
        raise UserError(
            f"affinity: images {tuple(image.shape)} and texts {tuple(text.shape)} must be (n, E) and (m, E) of one "
            "space; put a projection on one of them"
        )
    return scale * unit(upcast(image)) @ unit(upcast(text)).mT


def affinity_mimicking(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """½ [CE(softmax(A'_n,:), A_n,:) + CE(softmax(A'_:,n), A_:,n)] per pair n, natural log (TinyCLIP, ICCV 2023).

    The soft cross-entropy of each image over all texts and of each text over all images, pair n's own score included;
    no T². It is KL plus the teacher's entropy, which is its value where the two agree. Teacher and student may have
    features of different widths: only affinities are compared.

    Args:
        teacher, student: affinities A', A (n, n) of one batch in one order. detach_teacher: no gradient to A'.

    Returns:
        (n,); a value depends on which others share the batch, so not the same under micro-batches. 0 for n = 1.

    Raises:
        UserError: shapes that differ, or are not square.

    Example:
        >>> affinity_mimicking(torch.zeros(2, 2), torch.zeros(2, 2))
        tensor([0.6931, 0.6931])
    """
    _square(student, "affinity_mimicking")
    rows = soft_cross_entropy(teacher, student, detach_teacher=detach_teacher)
    columns = soft_cross_entropy(teacher.mT, student.mT, detach_teacher=detach_teacher)
    return (rows + columns) / 2


def info_nce(scores: Tensor) -> Tensor:
    """½ [−log softmax(A_n,:)_n − log softmax(A_:,n)_n] per pair n: own text against the others', and the reverse.

    The loss of CLIP (Radford et al. 2021, arXiv 2103.00020); another pair with the same text counts as wrong.

    Args:
        scores: A (n, n), pairs on the diagonal.

    Returns:
        (n,); log n where all scores are alike.

    Example:
        >>> info_nce(torch.zeros(2, 2))
        tensor([0.6931, 0.6931])
    """
    _square(scores, "info_nce")
    own = torch.arange(len(scores), device=scores.device)
    return (cross_entropy(scores, own) + cross_entropy(scores.mT, own)) / 2


def _square(scores: Tensor, where: str) -> None:
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise UserError(f"{where}: affinities of n pairs are (n, n), got {tuple(scores.shape)}")
