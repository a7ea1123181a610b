"""N:M sparsity: which weights of every m stay, and how they are stored so that zeros take no room.

The kept values stand one after the other, and for every kept unit (a weight, or a pair of neighbours) its place in its
group, ⌈log2(m/unit)⌉ bits: what 2:4 tensor cores read. Of 64 bits of four float16 weights 2:4 leaves 36, of 32 bits of
four 8-bit weights 20, of 32 bits of eight 4-bit weights 4:8 in pairs leaves 20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """n weights of every m consecutive ones along the reduction axis, chosen in units of `unit` neighbours.

    The reduction axis of a linear layer is its input, of a convolution (input, kernel row, kernel column) flattened.

    Raises:
        UserError: not 0 < n <= m, or a unit that does not divide both.

    Example:
        >>> Pattern(4, 8, 2).mask(torch.tensor([[1.0, 1, 5, 0, 3, 3, 2, 0]])).int().tolist()
        [[0, 0, 1, 1, 1, 1, 0, 0]]
        >>> Pattern(2, 4).share(16) == 36 / 64, Pattern(2, 4).share(8) == Pattern(4, 8, 2).share(4) == 20 / 32
        (True, True)
    """

    n: int = 2
    m: int = 4
    unit: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m or self.unit < 1 or self.n % self.unit or self.m % self.unit:
            raise UserError(f"{self} sparsity needs 0 < n <= m, and a unit that divides both")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f" in units of {self.unit}" if self.unit > 1 else "")

    @staticmethod
    def parse(text: str) -> Pattern:
        """From ``N:M``, or ``N:M:UNIT``.

        Raises:
            UserError: not of this form.
        """
        parts = text.split(":")
        if len(parts) not in (2, 3) or not all(p.isdecimal() for p in parts):
            raise UserError(f"a sparsity pattern reads N:M or N:M:UNIT, such as 2:4 or 4:8:2, got {text!r}")
        return Pattern(*map(int, parts))

    @property
    def bits(self) -> int:
        """Bits of the place of a kept unit."""
        return (self.m // self.unit - 1).bit_length()

    def share(self, bits: int) -> float:
        """Bits stored of weights of so many bits, places included, as a part of those of all weights."""
        return (self.n * bits + self.n // self.unit * self.bits) / (self.m * bits)

    def fits(self, shape: torch.Size) -> bool:
        """Whether the rows of a weight (out, …) are whole groups."""
        return shape[1:].numel() % self.m == 0 and shape.numel() > 0

    def mask(self, w: Tensor) -> Tensor:
        """True for the units of the largest Σ|w| of every group, of w's shape (out, …); ties go to the first.

        Raises:
            UserError: rows that m does not divide.
        """
        if not self.fits(w.shape):
            raise UserError(f"{self} sparsity needs rows that {self.m} divides, got a weight of {tuple(w.shape)}")
        units = w.reshape(-1, self.m // self.unit, self.unit).abs()
        sizes = (units.sum(2) if self.unit > 1 else units.squeeze(2)).unbind(1)
        rank = [torch.zeros(sizes[0].shape, dtype=torch.int16, device=w.device) for _ in sizes]
        for later in range(len(sizes)):  # each pair once: for small m several times faster than sorting
            for first in range(later):
                ahead = sizes[first] >= sizes[later]
                rank[later] += ahead
                rank[first] += ~ahead
        kept = torch.stack(rank, 1) < self.n // self.unit
        return (kept.repeat_interleave(self.unit, 1) if self.unit > 1 else kept).view(w.shape)

    def broken(self, w: Tensor) -> int:
        """How many groups have more than the pattern allows."""
        return int((((w != 0) & ~self.mask(w)).reshape(-1, self.m)).any(1).sum())

    def places(self, w: Tensor) -> Tensor:
        """The place in its group of every kept unit, (groups · n/unit,) int64.

        Raises:
            UserError: weights that do not have the pattern.
        """
        if count := self.broken(w):
            raise UserError(
                f"{count} groups of a weight {tuple(w.shape)} do not have the pattern {self}; mask it first"
            )
        return self.mask(w).reshape(-1, self.m)[:, :: self.unit].nonzero()[:, 1]

    def kept(self, values: Tensor, places: Tensor) -> Tensor:
        """The values of the kept units in order, (groups · n,)."""
        return values.reshape(-1, self.m // self.unit, self.unit).gather(1, self._index(places)).reshape(-1)

    def placed(self, kept: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `kept`, zeros elsewhere.

        Example:
            >>> p, w = Pattern(), torch.tensor([[0.0, 3.0, 0.0, -1.0]])
            >>> torch.equal(p.placed(p.kept(w, p.places(w)), p.places(w), w.shape), w)
            True
        """
        whole = kept.new_zeros(shape.numel() // self.m, self.m // self.unit, self.unit)
        index = self._index(places)
        return whole.scatter_(1, index, kept.view(index.shape)).view(shape)

    def _index(self, places: Tensor) -> Tensor:
        return places.view(-1, self.n // self.unit, 1).expand(-1, -1, self.unit)


def nm_mask(w: Tensor, n: int = 2, m: int = 4, unit: int = 1) -> Tensor:
    """`Pattern.mask` of a weight (out, …): the n largest magnitudes of every m, in units of 1 or more neighbours.

    Example:
        >>> nm_mask(torch.tensor([[3.0, -4.0, 1.0, 2.0]])).tolist()
        [[True, True, False, False]]
    """
    return Pattern(n, m, unit).mask(w)
