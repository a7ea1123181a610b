"""Values per row whose intermediate results, such as logits over a vocabulary, are never held all at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stillhouse.errors import UserError


def in_chunks(values: Callable[..., Tensor], *rows: Tensor, size: int) -> Tensor:
    """``values(*rows)``, `size` rows at a time; what it needs in between is made again in the backward pass.

    With f = ``z -> CE(W h, y)`` over N tokens and a vocabulary C this holds size · C logits in place of N · C, in both
    passes, for one more product W h.

    Args:
        values: of (m, …) tensors gives (m,) or (m, k), each row by its own rows alone; parameters it closes over get
            their gradients.
        rows: (N, …) each.
        size: rows at a time; 0 takes all at once, without computing anything twice.

    Returns:
        (N,) or (N, k), as `values` gives for all rows.

    Raises:
        UserError: a negative size, or rows of different number.

    Example:
        >>> in_chunks(lambda x: x.exp().sum(1), torch.zeros(5, 3), size=2)
        tensor([3., 3., 3., 3., 3.])
    """
    if size < 0 or len({len(r) for r in rows}) != 1:
        raise UserError(f"in_chunks: needs size >= 0 and as many rows of each, got {size} and {[len(r) for r in rows]}")
    if size == 0 or size >= len(rows[0]):
        return values(*rows)
    pieces = zip(*(r.split(size) for r in rows), strict=True)
    return torch.cat([checkpoint(values, *p, use_reentrant=False, preserve_rng_state=False) for p in pieces])
