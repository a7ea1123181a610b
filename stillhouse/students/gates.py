"""Gates that learn which parts of a network to keep, and the multipliers that hold them to a budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError

LOW, HIGH, TEMPERATURE, EPS = -0.1, 1.1, 2 / 3, 1e-6
EDGE = math.log(-LOW / HIGH)  # logit of the point at which the stretched sigmoid is 0


def settled_value(a: Tensor) -> Tensor:
    """sigmoid(0.8·a/τ): what a gate that stays multiplies with in the end."""
    return torch.sigmoid(0.8 * a / TEMPERATURE)


class HardConcrete(nn.Module):
    """Gates z in [0, 1], many of them exactly 0 or 1, with a gradient.

    z = clip(sigmoid((log u − log(1−u) + a) / τ) · 1.2 − 0.1, 0, 1), u uniform, τ = 2/3;
    P(z > 0) = sigmoid(a − τ log(0.1/1.1)).

    In training mode `forward` draws, in eval mode it gives clip(sigmoid(a/τ)·1.2 − 0.1, 0, 1).

    Args:
        *shape: of the gates.
        start: first value of a; 10 begins with all gates open.

    Source: Louizos, Welling, Kingma (ICLR 2018, arXiv 1712.01312).

    Example:
        >>> gates = HardConcrete(4, start=10.0).eval()
        >>> gates().tolist(), round(gates.open_probability().sum().item(), 2)
        ([1.0, 1.0, 1.0, 1.0], 4.0)
    """

    def __init__(self, *shape: int, start: float = 10.0):
        super().__init__()
        if not shape or min(shape) < 1:
            raise UserError(f"gates need a size of at least 1, got {shape}")
        self.log_alpha = nn.Parameter(torch.full(shape, float(start)))

    def forward(self, generator: torch.Generator | None = None) -> Tensor:
        """Gates of `shape`; one draw serves a whole batch."""
        a: Tensor = self.log_alpha
        if self.training:
            u = torch.rand(a.shape, generator=generator, dtype=a.dtype).to(a.device).clamp(EPS, 1 - EPS)
            a = u.logit() + a
        return (torch.sigmoid(a / TEMPERATURE) * (HIGH - LOW) + LOW).clamp(0, 1)

    @torch.no_grad()
    def settled(self) -> Tensor:
        """Gates for good: sigmoid(0.8·a/τ), but 0 for the n − Σ P(z > 0) (rounded) smallest; one always stays open.

        Source: as `Budget`; 0.8 makes the middle of the distribution.
        """
        shut = round(self.log_alpha.numel() - float(self.open_probability().sum()))
        return settled_value(self.log_alpha) * self.kept(self.log_alpha.numel() - shut)

    def open_probability(self) -> Tensor:
        """P(z > 0) of every gate."""
        return torch.sigmoid(self.log_alpha - TEMPERATURE * EDGE)

    @torch.no_grad()
    def clamp_(self, low: float = math.log(1e-2), high: float = math.log(1e2)) -> None:
        """Keeps a where the gradient has not died; call it after every step."""
        self.log_alpha.clamp_(low, high)

    @torch.no_grad()
    def kept(self, count: int | None = None) -> Tensor:
        """Which gates stay, as many as expected open (or `count`), those with the largest a; bool, of `shape`."""
        flat = self.log_alpha.reshape(-1)
        count = round(float(self.open_probability().sum())) if count is None else count
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[flat.argsort(descending=True, stable=True)[: max(1, count)]] = True
        return mask.view(self.log_alpha.shape)


class Budget(nn.Module):
    """Lagrange multipliers for a budget that is met from above: l1·d + l2·d², d = max(target − sparsity, 0).

    The multipliers ascend: give them to an Update with ``maximize=True``, and the gates to one that descends.

    Args:
        start: first value of both.

    Source: Wang, Wohlwend, Lei (EMNLP 2020); one-sided as in TinyCLIP's code.

    Example:
        >>> round(Budget(start=10.0)(torch.tensor(0.3), 0.5).item(), 4)
        2.4
    """

    def __init__(self, start: float = 10.0):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor(float(start))), nn.Parameter(torch.tensor(float(start)))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """The penalty, a scalar; `sparsity` is the expected part that is removed."""
        short = (target - sparsity).clamp(min=0)
        return self.first * short + self.second * short**2
