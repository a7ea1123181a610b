"""The quantisers of the paper: buckets with their backward styles, first points, and how points are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.students.packing import Code, grouped, ungrouped
from stillhouse.students.projectors import EPS, MinMax, straight_through
from stillhouse.system import fold

MOST = 256  # points of a tensor: codes have 8 bits at most


class Bucketed(MinMax):
    """Q(w) = α_g · round(u (s−1)) / (s−1) + β_g, u = (w − β_g)/α_g, β = min, α = max − min of the bucket, s = 2^b.

    The gradient of w, with g = ∂L/∂Q and ρ = round(u (s−1))/(s−1) − u held still:

    * ``plain``: g.
    * ``truncated``: g where |w| ≤ 1, else 0; Q sees w cut to [−1, 1].
    * ``exact``: g, and at the bucket's argmax + Σ g ρ, at its argmin − Σ g ρ: that of α and β too.

    Args:
        bits: b. group: values in a bucket; see `Quantizer`.
        backward: see above.
        stochastic: in training, round up with the fractional part as probability, drawn from `seed`, which whoever
            trains sets for each step.

    Example:
        >>> Bucketed(1, -1)(torch.tensor([0.0, 0.2, 0.9, 1.0])).tolist()
        [0.0, 0.0, 1.0, 1.0]
    """

    def __init__(
        self,
        bits: int,
        group: int = 256,
        backward: Literal["plain", "truncated", "exact"] = "plain",
        stochastic: bool = False,
    ):
        super().__init__(bits, group)
        self.backward_style, self.stochastic, self.seed = backward, stochastic, 0

    def rounded(self, x: Tensor) -> Tensor:
        if not (self.stochastic and self.training):
            return super().rounded(x)
        g = torch.Generator(device=x.device).manual_seed(self.seed)
        low = torch.floor(x)
        return low + (torch.rand(x.shape, generator=g, device=x.device, dtype=x.dtype) < x - low)

    def seen(self, w: Tensor) -> Tensor:
        """What is quantised: w, or w cut to [−1, 1]."""
        return w.clamp(-1, 1) if self.backward_style == "truncated" else w

    def code(self, w: Tensor) -> Code:
        return super().code(self.seen(w))

    def values(self, w: Tensor) -> Tensor:
        return super().values(self.seen(w))

    def passes(self, w: Tensor) -> Tensor | None:
        return w.abs() <= 1 if self.backward_style == "truncated" else None

    def forward(self, w: Tensor) -> Tensor:
        if self.backward_style != "exact":
            return super().forward(w)
        fixed = w.detach()
        values, before = self.values(fixed), grouped(fixed.float(), self.group)
        residual = (grouped(values.float(), self.group) - before) / self.range(before)[1][:, None]
        wide = grouped(w.float(), self.group)
        alpha = wide.max(1).values - wide.min(1).values  # whose gradient goes to one value each
        alpha = torch.where(alpha < EPS, alpha.detach(), alpha)
        return straight_through(w + ungrouped(alpha[:, None] * residual, w.shape).to(w.dtype), values)


def first_points(w: Tensor, count: int, group: int, how: Literal["percentiles", "uniform"] = "percentiles") -> Tensor:
    """Where the points of a tensor begin: (count,) ascending in [0, 1].

    ``percentiles``: of the scaled values u at `count` equally spaced ranks, so that each point has about as many
    values. ``uniform``: k/(count−1), with which the first forward pass is that of the uniform quantiser.
    """
    if how == "uniform":
        return torch.arange(count).float() / (count - 1)
    code = MinMax(8, group).code(w.detach())
    u = ungrouped((grouped(w.detach().float(), group) - code.zero[:, None]) / code.scale[:, None], w.shape)
    return torch.from_numpy(np.quantile(u.cpu().numpy().ravel(), np.linspace(0, 1, count))).float()


def shared_points(norms: Sequence[float], count: int) -> list[int]:
    """`count` points per tensor on average, more of them where the gradient is larger ("auto bits").

    Every tensor has half of its points, ``count // 2``; the rest is shared in proportion to `norms`, rounded. What is
    too much in sum is taken from the largest, what is missing given to the smallest, as in the released code. Two
    guards of ours: no tensor has fewer than 2 points or more than 256; what that moves goes to the smallest as well,
    or comes from the largest.

    Example:
        >>> shared_points([3.0, 1.0], 4)
        [5, 3]
    """
    half, total = count // 2, count * len(norms)
    rest, whole = total - half * len(norms), sum(norms)
    even = [1 / len(norms)] * len(norms)
    shares = [n / whole for n in norms] if whole > 0 else even
    made = [half + round(s * rest) for s in shares]
    over = sum(made) - total
    made[made.index(max(made) if over > 0 else min(made))] -= over
    made = [min(max(n, 2), MOST) for n in made]
    while (over := sum(made) - total) != 0:  # only where a guard has moved something
        at = made.index(max(made) if over > 0 else min(made))
        if made[at] in (2, MOST) and (made[at] == 2) == (over > 0):
            break  # all are at their least, or at their most
        made[at] -= 1 if over > 0 else -1
    return made


def bits_for(points: int) -> int:
    """Bits of a code that tells so many points apart."""
    return max(1, (points - 1).bit_length())


def step_seed(layer: nn.Module, *parts: object) -> None:
    """Gives every stochastic quantiser under `layer` the seed of this step, the same on every process."""
    for path, module in layer.named_modules():
        if isinstance(module, Bucketed) and module.stochastic:
            module.seed = fold(*parts, path)
