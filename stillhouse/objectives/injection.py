"""A gradient that was computed elsewhere, as a loss."""

from __future__ import annotations

from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast


def inject(x: Tensor, g: Tensor) -> Tensor:
    """½ ‖g‖² per sample, whose gradient with respect to x is g, exactly.

    The usual form ½ ‖x − sg(x − g)‖² gives x − (x − g), which is g only up to the rounding of x. Sum over features, so
    that the mean over a batch of n gives g/n; codes that take the mean over all elements give g/numel, and their
    learning rates differ by the number of elements per sample.

    Args:
        x: (n, …), attached to the graph.
        g: the same shape; detached here.

    Returns:
        (n,), summed over features.

    Raises:
        UserError: shapes that differ.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 3, requires_grad=True)
        >>> inject(x, torch.ones(2, 3)).mean().backward()
        >>> x.grad[0].tolist()
        [0.5, 0.5, 0.5]
    """
    if x.shape != g.shape or x.dim() < 2:
        raise UserError(f"inject: x {tuple(x.shape)} and its gradient {tuple(g.shape)} must have one shape (n, …)")
    x, g = upcast(x).flatten(1), upcast(g.detach()).flatten(1)
    product = (x * g).sum(1)
    return product - product.detach() + 0.5 * g.square().sum(1)
