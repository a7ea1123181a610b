"""Weights that change: schedules over the clock, and weights on the simplex moved by mirror descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.system import Clock, Schedule

# -- schedules: multipliers as functions of the clock


def constant(value: float = 1.0) -> Schedule:
    """The same factor at every step."""
    return lambda clock: value


def linear_warmup(steps: int) -> Schedule:
    """min(1, (step + 1) / steps): the first step already moves, step ``steps − 1`` has the full factor.

    Example:
        >>> [linear_warmup(4)(Clock(step=s)) for s in (0, 3, 9)]
        [0.25, 1.0, 1.0]
    """
    return lambda clock: min(1.0, (clock.step + 1) / max(1, steps))


def cosine(warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """final + (1 − final)·(1 + cos πt)/2, t = (step − warmup)/(steps − warmup), after a linear warm-up.

    Starts at 1; `final` is the limit at the end of the stage, one step after its last (arXiv 1608.03983).

    Example:
        >>> [round(cosine()(Clock(step=s, steps=4)), 3) for s in (0, 2, 4)]
        [1.0, 0.5, 0.0]
    """
    warm = linear_warmup(warmup_steps)

    def factor(clock: Clock) -> float:
        if clock.step < warmup_steps:
            return warm(clock)
        t = min(1.0, (clock.step - warmup_steps) / max(1, clock.steps - warmup_steps))
        return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2

    return factor


def step(milestones: Sequence[float], gamma: float = 0.1) -> Schedule:
    """gamma^(number of milestones passed).

    Args:
        milestones: all in (0, 1): fractions of the stage; all >= 1: epochs.
        gamma: factor at each.

    Raises:
        UserError: milestones that are neither, or mixed.

    Example:
        >>> at = step([0.5, 0.75])
        >>> [round(at(Clock(step=s, steps=4)), 3) for s in (1, 2, 3)]
        [1.0, 0.1, 0.01]
    """
    fractions = all(0 < m < 1 for m in milestones)
    if not fractions and not all(m >= 1 for m in milestones):
        raise UserError(f"step: milestones must all be fractions in (0, 1) or all epochs >= 1, got {list(milestones)}")

    def factor(clock: Clock) -> float:
        now = clock.progress if fractions else clock.step / max(1, clock.steps_per_epoch)
        return gamma ** sum(now >= m for m in milestones)

    return factor


def sigmoid_ramp(epochs: float = 80) -> Schedule:
    """exp(−5 (1 − min(t, L)/L)²), t in (fractional) EPOCHS, L = `epochs`: from e⁻⁵ to 1 (arXiv 1610.02242).

    Example:
        >>> [round(sigmoid_ramp(80)(Clock(step=s, steps_per_epoch=10)), 4) for s in (0, 800)]
        [0.0067, 1.0]
    """
    if epochs <= 0:
        raise UserError(f"sigmoid_ramp: epochs must be > 0, got {epochs}; use constant() for no ramp")

    def factor(clock: Clock) -> float:
        t = clock.step / max(1, clock.steps_per_epoch)
        return math.exp(-5 * (1 - min(t, epochs) / epochs) ** 2)

    return factor


# -- the simplex


def simplex(m: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter of m equal weights 1/m, to be moved by `MirrorDescent` and by no other optimiser.

    Example:
        >>> simplex(4).data
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if m < 1:
        raise UserError(f"simplex: needs at least one weight, got {m}")
    return nn.Parameter(torch.full((m,), 1.0 / m, dtype=dtype))


def entropy(p: Tensor) -> Tensor:
    """−Σ p log p in nats over the last dimension: log m when even, 0 when one weight has everything."""
    return torch.special.entr(p).sum(-1)


class MirrorDescent(torch.optim.Optimizer):
    """Exponentiated gradient on the simplex: p_i ← p_i e^{−lr·h_i} / Σ_j p_j e^{−lr·h_j}, in place.

    h is the gradient, centred to mean zero and then clipped symmetrically; afterwards p ← (1−ρ)p + ρ/m.
    Computed in log space. No state, no weight decay (Kivinen & Warmuth 1997; clip=None and floor=0 give the
    update of WML, NeurIPS 2022). Centring alone changes nothing, since the step ignores a constant added to
    h; it makes the clip fair to both signs.

    Args:
        params: one-dimensional parameters, each a point of its simplex.
        lr: η.
        floor: ρ in [0, 1); keeps every weight at least ρ/m.
        clip: largest |h_i|; None does not clip.
        centre: subtract the mean of h.

    Raises:
        UserError: a parameter that is not on the simplex, or settings out of range.

    Example:
        >>> p = simplex(2)
        >>> p.grad = torch.tensor([1.0, -1.0])
        >>> _ = MirrorDescent([p], lr=0.5, floor=0.0).step()
        >>> p.data
        tensor([0.2689, 0.7311])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        floor: float = 0.02,
        clip: float | None = 1.0,
        centre: bool = True,
    ):
        if lr < 0 or not 0 <= floor < 1 or (clip is not None and clip <= 0):
            raise UserError(
                f"MirrorDescent: needs lr >= 0, 0 <= floor < 1, clip > 0 or None; got lr={lr}, "
                f"floor={floor}, clip={clip}"
            )
        super().__init__(params, {"lr": lr, "floor": floor, "clip": clip, "centre": centre})
        for p in (p for group in self.param_groups for p in group["params"]):
            total = float(p.detach().sum())
            if p.dim() != 1 or abs(total - 1) > 1e-3 or bool((p < 0).any()):
                raise UserError(
                    f"MirrorDescent: moves weights on the simplex, got shape {tuple(p.shape)} with "
                    f"sum {total:.4g}; make them with simplex(m)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from each parameter's ``.grad``; a parameter without one stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self._moved(p, p.grad, group))
        return loss

    @staticmethod
    def _moved(p: Tensor, h: Tensor, group: dict[str, Any]) -> Tensor:
        if group["centre"]:
            h = h - h.mean()
        if group["clip"] is not None:
            h = h.clamp(-group["clip"], group["clip"])
        moved = torch.softmax(p.log() - group["lr"] * h, 0)
        return moved if group["floor"] == 0 else (1 - group["floor"]) * moved + group["floor"] / len(p)


def mirror_descent(
    lr: float = 0.1, floor: float = 0.02, clip: float | None = 1.0, centre: bool = True
) -> Callable[[Sequence[Tensor]], MirrorDescent]:
    """`MirrorDescent` with its settings, as the ``optimizer`` of an `Update`.

    Example:
        >>> type(mirror_descent(0.05)([simplex(3)])).__name__
        'MirrorDescent'
    """
    return partial(MirrorDescent, lr=lr, floor=floor, clip=clip, centre=centre)
