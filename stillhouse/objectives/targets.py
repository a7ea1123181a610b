"""Soft targets made of labels: label smoothing with a strength per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError


def smoothed(target: Tensor, keep: Tensor | float, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """b_i on the label, (1 − b_i)/(K − 1) on every other class.

    torch's ``label_smoothing`` spreads ε over all K classes: it equals 1 − b = ε·(K − 1)/K here.

    Args:
        target: (n,) class indices. keep: b, (n,) or one number, in [0, 1]. classes: K ≥ 2.

    Returns:
        (n, K) probabilities.

    Example:
        >>> smoothed(torch.tensor([1]), 0.8, 3)
        tensor([[0.1000, 0.8000, 0.1000]])
    """
    if classes < 2:
        raise UserError(f"smoothed: needs at least 2 classes, got {classes}")
    b = torch.as_tensor(keep, dtype=dtype, device=target.device).expand(target.shape)[:, None]
    label = F.one_hot(target, classes).to(dtype)
    return label * b + (1 - label) * (1 - b) / (classes - 1)


def ranked_like(values: Tensor, by: Tensor) -> Tensor:
    """The values in such an order that the r-th smallest of them stands where the r-th smallest of `by` stands.

    Only the order of `by` is used; of equal ones the first gets the smaller value.

    Args:
        values, by: (n,).

    Returns:
        (n,), a permutation of `values`.

    Example:
        >>> ranked_like(torch.tensor([0.9, 0.1, 0.5]), by=torch.tensor([3.0, 1.0, 2.0]))
        tensor([0.9000, 0.1000, 0.5000])
    """
    if values.shape != by.shape or values.dim() != 1:
        raise UserError(f"ranked_like: values {tuple(values.shape)} and by {tuple(by.shape)} must both be (n,)")
    return torch.empty_like(values).scatter_(0, by.argsort(stable=True), values.sort().values)


def beta_draws(
    n: int, a: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """n draws from Beta(a, 1) as U^(1/a), by the inverse of F(b) = b^a; their mean is a/(a + 1).

    Example:
        >>> b = beta_draws(1000, 3.0, torch.Generator().manual_seed(0))
        >>> bool((b >= 0).all() and (b <= 1).all())
        True
    """
    return torch.rand(n, generator=generator, dtype=dtype) ** (1 / a)
