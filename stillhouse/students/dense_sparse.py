"""A weight as dense × sparse, W ≈ D·S: D is thin, every column of S has t non-zeros in each block of b rows.

Columns of D are atoms; each column of W is a sum of a few of them, and which few differs from column to column, so
that the rank is not bounded by their number. With t = b this is low rank. A linear layer becomes two: a plain one that
holds D and a `Sparse` one that holds the values of S and, in log2(b) bits each, their places in the blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import UserError

SQUARINGS = 3  # for the bound on the largest eigenvalue
RIDGE = 1e-6  # of the least squares, whose unknowns have scale 1


class Blocks(NamedTuple):
    """Where S may have values: in every column, `nonzeros` of each `block` consecutive rows.

    The last block may be shorter, unlike those of `patterns.Pattern`, so that a size is met within one row.

    Example:
        >>> Blocks(block=4, nonzeros=1).per_column(10), Blocks(4, 1).bits
        (3, 2)
    """

    block: int = 16
    nonzeros: int = 1

    def per_column(self, rank: int) -> int:
        """k, the values in a column of S with `rank` rows."""
        return self.nonzeros * (rank // self.block) + min(self.nonzeros, rank % self.block)

    @property
    def bits(self) -> int:
        """Of a value's place in its block; none where blocks are full."""
        return (self.block - 1).bit_length() if self.nonzeros < self.block else 0

    def check(self) -> Blocks:
        """Itself. Raises UserError for sizes that cannot be."""
        if not (2 <= self.block <= 256 and 1 <= self.nonzeros <= self.block):
            raise UserError(
                f"expected blocks of 2 to 256 rows with 1 to all of them non-zero, got {self.block}, {self.nonzeros}"
            )
        return self


def stored_bytes(rows: int, columns: int, rank: int, blocks: Blocks, value: int = 4) -> int:
    """m·r + n·k values of `value` bytes, and ⌈n·k·log2(b)/8⌉ bytes of places; m <= n are the sides of the weight.

    Example:
        >>> stored_bytes(64, 192, 20, Blocks(16, 1)), 4 * 64 * 192
        (6848, 49152)
    """
    m, n = sorted((rows, columns))
    count = n * blocks.per_column(rank)
    return value * (m * rank + count) + -(-count * blocks.bits // 8)


def places(s: Tensor, blocks: Blocks) -> Tensor:
    """Rows of the t largest magnitudes in every block of every column, (k, n) int64, block by block; ties: the first.

    Args:
        s: (r, n).

    Example:
        >>> places(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.5, 0.0], [0.4, -3.0]]), Blocks(2, 1)).tolist()
        [[1, 0], [2, 3]]
    """
    b, t = blocks
    whole, (rank, n) = len(s) // b * b, s.shape
    found = []
    if whole:
        starts = torch.arange(0, whole, b, device=s.device)
        found.append((_largest(s[:whole].reshape(-1, b, n), t) + starts[:, None, None]).reshape(-1, n))
    if rank > whole:
        found.append(_largest(s[whole:], min(t, rank - whole)) + whole)
    return torch.cat(found)


def _largest(s: Tensor, t: int) -> Tensor:
    """Positions of the t largest magnitudes along the last but one dimension, in ascending order."""
    if t == 1:
        return s.abs().argmax(-2, keepdim=True)
    order = s.abs().argsort(dim=-2, descending=True, stable=True)
    return order.narrow(-2, 0, t).sort(-2).values


def top(s: Tensor, blocks: Blocks) -> Tensor:
    """S with zeros outside `places`."""
    rows = places(s, blocks)
    return torch.zeros_like(s).scatter(0, rows, s.gather(0, rows))


# -- the factorisation ---------------------------------------------------------------------------------------------


def oriented(w: Tensor) -> Tensor:
    """W with its longer side as columns, (m, n), m <= n; its own inverse for tall weights."""
    return w.T if w.shape[0] > w.shape[1] else w


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """λ_max of a symmetric positive semi-definite (r, r), from above: ‖G^8‖_F^(1/8), at most r^(1/16) too large.

    Never too small, which power iteration may be, and with which a gradient step could climb.
    """
    least = torch.finfo(gram.dtype).tiny
    scale = gram.norm().clamp(min=least)
    power = gram / scale
    for _ in range(SQUARINGS):
        power = power @ power
    return (scale * power.norm() ** (1 / 2**SQUARINGS)).clamp(min=least)


def descended(w: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """S − η Dᵀ(DS − W), dense, with an η <= 1/‖D‖₂² at which ½‖W − DS‖² does not grow, thresholded or not."""
    gram = d.T @ d
    return s - (gram @ s - d.T @ w) / largest_eigenvalue(gram)


def sweep(w: Tensor, d: Tensor, s: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """One step on S and one on D; ‖W − D·S‖_F does not grow.

    S ← Top_t(S − η Dᵀ(DS − W)), η ≤ 1/‖D‖₂² (iterative hard thresholding);  D ← W Sᵀ(S Sᵀ + 1e-6)⁻¹ with the rows of S
    at unit norm; then the columns of D get unit norm, and S their scale. An atom that no column uses becomes the
    direction of the worst approximated column.

    Args:
        w: (m, n). d: (m, r). s: (r, n), with at most t non-zeros per block and column.

    Source: Blumensath, Davies (2008) for the thresholding; Engan et al. (1999) for the dictionary.
    """
    s = top(descended(w, d, s), blocks)
    size = s.norm(dim=1)
    used = size > 0
    rows = s / torch.where(used, size, 1)[:, None]
    gram = rows @ rows.T
    gram.diagonal().add_(RIDGE)
    d = torch.linalg.solve(gram, rows @ w.T).T
    length = d.norm(dim=0)
    used = used & (length > 0)
    d, s = d / torch.where(used, length, 1), rows * torch.where(used, length, 0)[:, None]
    return _reseed(w, d, s, used), s


def _reseed(w: Tensor, d: Tensor, s: Tensor, used: Tensor) -> Tensor:
    """Atoms that are not used, from the columns with the largest residuals."""
    if used.all():
        return d
    dead = (~used).nonzero()[:, 0]
    residual = w - d @ s
    worst = residual.norm(dim=0).argsort(descending=True, stable=True)[torch.arange(len(dead)) % w.shape[1]]
    return d.index_copy(1, dead, F.normalize(residual[:, worst], dim=0))


@torch.no_grad()
def factorise(w: Tensor, rank: int, blocks: Blocks, sweeps: int = 50) -> tuple[Tensor, Tensor]:
    """D (m, r) and S (r, n) with D·S ≈ `oriented` W: from the first singular vectors, then `sweeps` of `sweep`.

    The singular vectors are dealt to the blocks in turn, so that the strong ones do not compete for one place. Where
    more atoms are asked for than there are, the others begin at the columns with the largest residuals.

    Example:
        >>> w = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
        >>> d, s = factorise(w, 8, Blocks(4, 2))
        >>> (s != 0).view(2, 4, 12).sum(1).unique().tolist(), bool((w - d @ s).norm() < 0.6 * w.norm())
        ([2], True)
    """
    w = oriented(w.detach())
    w = w if w.dtype == torch.float64 else w.float()  # never in half precision
    u = torch.linalg.svd(w, full_matrices=False).U[:, :rank]
    count = -(-rank // blocks.block)
    order = torch.cat([torch.arange(j, u.shape[1], count) for j in range(count)])
    d, s = w.new_zeros(len(w), rank), w.new_zeros(rank, w.shape[1])
    d[:, : u.shape[1]] = u[:, order.to(u.device)]
    d = _reseed(w, d, s, torch.arange(rank, device=w.device) < u.shape[1])
    for _ in range(sweeps):
        d, s = sweep(w, d, s, blocks)
    return d, s


# -- the layers ----------------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """A linear layer whose weight is S (r, n) or its transpose, of which only the values and their places are kept.

    The forward pass fills S with zeros and multiplies by it; plain PyTorch has no faster way on all devices.

    Args:
        rank, columns: r and n. blocks: where the values are.
        reads: the columns are inputs, y = S x; else outputs, y = Sᵀ x.
        bias: of the outputs.

    Attributes:
        weight: (k, n), the values, block by block; trained, on the places as they are.
        index: (k, n) uint8, their places in the blocks; (0, n) where blocks are full.

    Example:
        >>> layer = Sparse(8, 12, Blocks(4, 1), reads=True)
        >>> layer(torch.zeros(5, 12)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 8]), 24)
    """

    index: Tensor
    start: Tensor

    def __init__(self, rank: int, columns: int, blocks: Blocks, reads: bool, bias: bool = False, **like: Any):
        super().__init__()
        self.rank, self.columns, self.blocks, self.reads = rank, columns, blocks, reads
        self.in_features, self.out_features = (columns, rank) if reads else (rank, columns)
        k = blocks.per_column(rank)
        self.weight = nn.Parameter(torch.zeros(k, columns, **like))
        self.bias = nn.Parameter(torch.zeros(self.out_features, **like)) if bias else None
        first = torch.arange(rank) % blocks.block < blocks.nonzeros
        start = torch.arange(rank)[first] // blocks.block * blocks.block
        self.register_buffer("start", start[:, None].to(self.weight.device), persistent=False)
        index = (torch.arange(rank)[first] % blocks.block).to(torch.uint8)[:, None].repeat(1, columns)
        self.register_buffer("index", (index if blocks.bits else index[:0]).to(self.weight.device))

    @torch.no_grad()
    def fill(self, s: Tensor) -> None:
        """Takes places and values from a matrix (r, n)."""
        rows = places(s, self.blocks)
        self.weight.copy_(s.gather(0, rows))
        if self.blocks.bits:
            self.index.copy_(rows - self.start)

    def matrix(self) -> Tensor:
        """S, (r, n)."""
        if not self.blocks.bits:
            return self.weight
        rows = self.start + self.index.long()
        return self.weight.new_zeros(self.rank, self.columns).scatter(0, rows, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        s = self.matrix()
        return F.linear(x, s if self.reads else s.T, self.bias)

    def extra_repr(self) -> str:
        b, t = self.blocks
        return f"{self.in_features}, {self.out_features}, {t} of {b}, bias={self.bias is not None}"


def dense_sparse(layer: nn.Linear, rank: int, blocks: Blocks) -> nn.Sequential:
    """Two layers of the right sizes in place of one, ``dense`` (D) and ``sparse`` (S) by name, with its bias.

    S x comes first where the layer has at least as many inputs as outputs. Values are zero until `fill`.
    """
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    rows, columns, bias = layer.out_features, layer.in_features, layer.bias is not None
    made = nn.Sequential()
    if rows <= columns:
        made.add_module("sparse", Sparse(rank, columns, blocks, True, **like))
        made.add_module("dense", nn.Linear(rank, rows, bias, **like))
    else:
        made.add_module("dense", nn.Linear(columns, rank, False, **like))
        made.add_module("sparse", Sparse(rank, rows, blocks, False, bias, **like))
    with torch.no_grad():
        made.dense.weight.zero_()  # type: ignore[union-attr, operator]
        if bias:
            made[1].bias.copy_(layer.bias)  # type: ignore[operator]
    return made.requires_grad_(layer.weight.requires_grad)


@torch.no_grad()
def fill(made: nn.Sequential, d: Tensor, s: Tensor) -> None:
    """D (m, r) and S (r, n) into the two layers of `dense_sparse`."""
    first, second = made.dense, made.sparse
    assert isinstance(first, nn.Linear) and isinstance(second, Sparse)
    first.weight.copy_(d if second.reads else d.T)
    second.fill(s.to(second.weight))
