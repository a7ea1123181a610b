"""Few bits a value: codes for weights, and how they are packed into bytes.

One form serves uniform and non-uniform, symmetric and asymmetric quantisation::

    w = scale_g · points[code] + zero_g,      g the group of the value

Groups are consecutive values of the flattened tensor (a bucket), an output channel, or the whole tensor. Of weights
with an N:M pattern only the codes of those that stay are kept, and their places (`patterns`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.students.patterns import Pattern

PARTS = ("points", "scale", "zero")


@dataclass(frozen=True)
class Code:
    """What the codes of one tensor stand for.

    Attributes:
        points: (2^bits or fewer,) float32, ascending.
        scale, zero: (groups,) float32.
        bits: of a code, 1 to 8.
        group: values per group; 0: one group per output channel (dimension 0); -1: one group.
    """

    points: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int = 0

    @staticmethod
    def empty(shape: torch.Size, bits: int, group: int) -> Code:
        """Symmetric, with scale 1: of the right sizes, to be filled."""
        g = groups(shape, group)
        return Code(whole_points(bits), torch.ones(g), torch.zeros(g), bits, group)

    def stored(self) -> list[str]:
        """The parts that a file must hold: whole-number points and zeros are known without it."""
        known = {"points": whole_points(self.bits), "zero": torch.zeros_like(self.zero)}
        return [p for p in PARTS if p not in known or not torch.equal(getattr(self, p).cpu(), known[p].cpu())]

    def levels(self) -> Tensor:
        """The values each group can take, (groups, points)."""
        return self.scale[:, None] * self.points + self.zero[:, None]


def whole_points(bits: int) -> Tensor:
    """The points of a symmetric quantiser, ±(2^{b−1}−1), the last one twice; of one bit −1 and 0.

    Example:
        >>> whole_points(2).tolist()
        [-1.0, 0.0, 1.0, 1.0]
    """
    most = max(1, 2 ** (bits - 1) - 1)
    return torch.arange(-most, 2**bits - most).clamp(max=most).float()


def groups(shape: torch.Size, group: int) -> int:
    """How many groups a tensor of this shape has.

    Example:
        >>> [groups(torch.Size([4, 10]), g) for g in (0, -1, 16)]
        [4, 1, 3]
    """
    n = shape.numel()
    if not n:
        raise UserError(f"a tensor of shape {tuple(shape)} has no values to quantise")
    return shape[0] if group == 0 else 1 if group == -1 else -(-n // group)


def grouped(w: Tensor, group: int) -> Tensor:
    """The values as (groups, size); the last bucket is filled up with its own last value."""
    g = groups(w.shape, group)
    flat = w.reshape(-1)
    size = flat.numel() // g if group <= 0 else group
    if missing := g * size - flat.numel():
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(g, size)


def ungrouped(values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `grouped`."""
    return values.reshape(-1)[: shape.numel()].view(shape)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Positions of the nearest of ascending levels, (groups, size) in (groups, points); the lower one of two."""
    between = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    return torch.searchsorted(between, values.contiguous())


def encode(w: Tensor, code: Code, pattern: Pattern | None = None) -> Tensor:
    """The codes of a tensor, packed into bytes, (⌈n·bits/8⌉,) uint8; with a pattern only of the n values that stay."""
    index = ungrouped(nearest(grouped(w.detach().float(), code.group), code.levels()), w.shape)
    return pack(index if pattern is None else pattern.kept(index, pattern.places(w)), code.bits)


def decode(
    packed: Tensor, code: Code, shape: torch.Size, pattern: Pattern | None = None, places: Tensor | None = None
) -> Tensor:
    """The values that packed codes stand for, float32 of `shape`; with a pattern, at `places`, zeros elsewhere.

    Example:
        >>> code = Code(torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([0.5, 2.0]), torch.zeros(2), bits=2)
        >>> w = torch.tensor([[0.5, -0.5, 1.0], [0.0, 4.0, -2.0]])
        >>> torch.equal(decode(encode(w, code), code, w.shape), w), encode(w, code).shape
        (True, torch.Size([2]))
    """
    if pattern is None or places is None:
        index = unpack(packed, code.bits, shape.numel()).view(shape)
        return ungrouped(code.levels().gather(1, grouped(index, code.group)), shape)
    kept = unpack(packed, code.bits, len(places) * pattern.unit)
    index = pattern.placed(kept, places, shape)
    values = ungrouped(code.levels().gather(1, grouped(index, code.group)), shape)
    return pattern.placed(pattern.kept(values, places), places, shape)


def pack(index: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits as bytes, the first in the lowest bits.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 0, 1]), 2).tolist()
        [57, 1]
    """
    if not 1 <= bits <= 8:
        raise UserError(f"codes have 1 to 8 bits, got {bits}")
    flat = index.reshape(-1).to(torch.int64)
    each = (flat[:, None] >> torch.arange(bits)) & 1
    stream = each.reshape(-1)
    stream = torch.cat([stream, stream.new_zeros(-len(stream) % 8)]).view(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers that `pack` wrote, int64.

    Raises:
        UserError: there are fewer bytes than that takes.
    """
    if len(packed) != -(-count * bits // 8):
        raise UserError(f"{count} codes of {bits} bits take {-(-count * bits // 8)} bytes, got {len(packed)}")
    stream = ((packed.to(torch.int64)[:, None] >> torch.arange(8)) & 1).reshape(-1)[: count * bits]
    return (stream.view(count, bits) << torch.arange(bits)).sum(1)


def stored_bits(shape: torch.Size, code: Code, pattern: Pattern | None = None) -> int:
    """What a tensor takes on disk, in bits: codes and places in whole bytes, and what `Code.stored` says."""
    count, places = shape.numel(), 0
    if pattern is not None:
        count = count // pattern.m * pattern.n
        places = count // pattern.unit * pattern.bits
    parts = sum(getattr(code, p).numel() for p in code.stored())
    return 8 * (-(-count * code.bits // 8) + -(-places // 8)) + 32 * parts
