"""What a trained weight may be a function of: straight-through projectors, N:M sparse, half precision, quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.students.packing import Code, grouped, nearest, ungrouped, whole_points
from stillhouse.students.patterns import Pattern

EPS = 1e-10  # below it a group of equal values has scale 1


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, values: Tensor, passes: Tensor | None) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return g if passes is None else g * passes, None, None

    @staticmethod
    def jvp(ctx: Any, dw: Tensor, dv: Any, dp: Any) -> Tensor:
        (passes,) = ctx.saved_tensors
        return dw.clone() if passes is None else dw * passes


def straight_through(w: Tensor, values: Tensor, passes: Tensor | None = None) -> Tensor:
    """The given values, exactly, with the derivative of w: ∂/∂w = 1, or `passes` where that is given.

    Args:
        w: what the optimiser moves.
        values: what the network computes with, of w's shape; detached.
        passes: factors of the gradient, such as a mask.

    Source: Bengio, Léonard, Courville (2013, arXiv 1308.3432).

    Example:
        >>> w = torch.tensor([0.3, 0.8], requires_grad=True)
        >>> straight_through(w, w.detach().round()).sum().backward()
        >>> w.grad.tolist()
        [1.0, 1.0]
    """
    return _Through.apply(w, values.detach(), None if passes is None else passes.to(w.dtype))


class Projector(nn.Module):
    """w ↦ P(w), the gradient straight through; subclasses say `values` and perhaps `passes`."""

    def values(self, w: Tensor) -> Tensor:
        """P(w); w is detached."""
        raise NotImplementedError

    def passes(self, w: Tensor) -> Tensor | None:
        """Factors of the gradient; None for 1."""
        return None

    def forward(self, w: Tensor) -> Tensor:
        fixed = w.detach()
        return straight_through(w, self.values(fixed), self.passes(fixed))


class NM(Projector):
    """N:M sparsity (`nm_mask`), the mask found anew in every forward pass, or kept as it is given.

    Args:
        n, m: n weights of every m stay.
        mask: a fixed one.
        dense_gradient: whether weights that are out are moved too (the straight-through way); with a fixed mask they
            are not.
        unit: neighbours that stay or go together.
    """

    mask: Tensor | None

    def __init__(
        self, n: int = 2, m: int = 4, mask: Tensor | None = None, dense_gradient: bool | None = None, unit: int = 1
    ):
        super().__init__()
        self.pattern = Pattern(n, m, unit)
        self.dense_gradient = mask is None if dense_gradient is None else dense_gradient
        self.register_buffer("mask", mask)

    def chosen(self, w: Tensor) -> Tensor:
        return self.pattern.mask(w) if self.mask is None else self.mask

    def values(self, w: Tensor) -> Tensor:
        return (w * self.chosen(w)).add_(0.0)  # several times faster than where on a CPU; + 0 leaves no −0

    def passes(self, w: Tensor) -> Tensor | None:
        return None if self.dense_gradient else self.chosen(w)


class Half(Projector):
    """w as float16 has it, and so it is stored."""

    def values(self, w: Tensor) -> Tensor:
        return w.half().to(w.dtype)


class Quantizer(Projector):
    """A projector whose values are `Code` levels.

    Args:
        bits: of a code, 1 to 8.
        group: values with one scale and zero; 0: per output channel, -1: one for the tensor, else buckets of so many
            consecutive values.
    """

    least = 1  # fewest bits

    def __init__(self, bits: int, group: int = 0):
        super().__init__()
        if not self.least <= bits <= 8 or group < -1:
            known = f"{self.least} to 8 bits and a group of -1, 0 or more"
            raise UserError(f"{type(self).__name__} quantisation needs {known}, got {bits}, {group}")
        self.bits, self.group = bits, group

    def code(self, w: Tensor) -> Code:
        """Points, scales and zeros for a tensor."""
        raise NotImplementedError

    def index(self, w: Tensor, code: Code) -> Tensor:
        """Codes of the values, (groups, size)."""
        return nearest(grouped(w.float(), self.group), code.levels())

    def values(self, w: Tensor) -> Tensor:
        code = self.code(w)
        return ungrouped(code.levels().gather(1, self.index(w, code)), w.shape).to(w.dtype)


class Symmetric(Quantizer):
    """scale_g · q, q a whole number in ±(2^{b−1}−1), scale_g = max|w_g| / (2^{b−1}−1), rounded half to even.

    Zero stays exactly zero, so that masks survive; with one bit nothing else would.
    """

    least = 2

    @property
    def most(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def scale(self, x: Tensor) -> Tensor:
        """(groups,), of values as (groups, size)."""
        scale = x.abs().amax(1).div_(self.most)
        return scale.masked_fill_(scale < EPS, 1.0)

    def steps(self, x: Tensor, scale: Tensor) -> Tensor:
        """q as floats, of values as (groups, size)."""
        return torch.div(x, scale[:, None]).round_().clamp_(-self.most, self.most)

    def code(self, w: Tensor) -> Code:
        scale = self.scale(grouped(w.float(), self.group))
        return Code(whole_points(self.bits).to(w.device), scale, torch.zeros_like(scale), self.bits, self.group)

    def index(self, w: Tensor, code: Code) -> Tensor:
        return (self.steps(grouped(w.float(), self.group), code.scale) + self.most).long()

    def values(self, w: Tensor) -> Tensor:
        x = grouped(w.float(), self.group)
        scale = self.scale(x)  # below: as `levels` has it, bit for bit (+ 0 leaves no −0), without looking values up
        return ungrouped(self.steps(x, scale).mul_(scale[:, None]).add_(0.0), w.shape).to(w.dtype)


class MinMax(Quantizer):
    """min_g + (max_g − min_g) · k / (2^b − 1), k a whole number, rounded half to even."""

    @property
    def most(self) -> int:
        return 2**self.bits - 1

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest value and range, (groups,) each, of values as (groups, size)."""
        low = x.amin(1)
        scale = x.amax(1).sub_(low)
        return low, scale.masked_fill_(scale < EPS, 1.0)

    def steps(self, x: Tensor, low: Tensor, scale: Tensor) -> Tensor:
        """k as floats, of values as (groups, size)."""
        u = torch.sub(x, low[:, None]).div_(scale[:, None])
        return self.rounded(u.mul_(self.most)).clamp_(0, self.most)

    def rounded(self, x: Tensor) -> Tensor:
        """Whole numbers for real ones; x may be changed."""
        return x.round_()

    def code(self, w: Tensor) -> Code:
        low, scale = self.range(grouped(w.float(), self.group))
        points = torch.arange(2**self.bits, device=w.device).float() / self.most
        return Code(points, scale, low, self.bits, self.group)

    def index(self, w: Tensor, code: Code) -> Tensor:
        return self.steps(grouped(w.float(), self.group), code.zero, code.scale).long()

    def values(self, w: Tensor) -> Tensor:
        x = grouped(w.float(), self.group)
        low, scale = self.range(x)  # below: as `levels` has it, bit for bit, without looking values up
        points = self.steps(x, low, scale).div_(self.most)
        return ungrouped(points.mul_(scale[:, None]).add_(low[:, None]), w.shape).to(w.dtype)


class Codebook(Quantizer):
    """min_g + (max_g − min_g) · p_k with learned points p, one set per tensor; the weight itself stays as it is.

    ∂L/∂p_k = Σ_{i: code k} (max − min)_{g(i)} ∂L/∂w_i. Sort the points after every step (`sort_`).

    Args:
        points: (2^bits,) in [0, 1], or fewer; they are filled up with the last.

    Source: Polino, Pascanu, Alistarh (ICLR 2018), section 4.
    """

    def __init__(self, bits: int, points: Tensor, group: int = 256):
        super().__init__(bits, group)
        if points.dim() != 1 or not 2 <= len(points) <= 2**bits:
            raise UserError(f"a codebook of {bits} bits has 2 to {2**bits} points, got {tuple(points.shape)}")
        self.points = nn.Parameter(points.detach().float().sort().values)

    def code(self, w: Tensor) -> Code:
        low_high = MinMax(self.bits, self.group).code(w)
        filled = torch.cat([self.points, self.points[-1:].expand(2**self.bits - len(self.points))])
        return Code(filled, low_high.scale, low_high.zero, self.bits, self.group)

    def forward(self, w: Tensor) -> Tensor:
        code = self.code(w.detach())
        with torch.no_grad():
            index = self.index(w.detach(), code)
        return ungrouped(code.levels().gather(1, index), w.shape).to(w.dtype)

    @torch.no_grad()
    def sort_(self) -> None:
        """Puts the points in ascending order."""
        self.points.copy_(self.points.sort().values)
