"""What one policy borrows from another: advantage of the peer, weights, distance. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stillhouse.control.networks import divergence
from stillhouse.errors import UserError

LEAST, MOST = 0.01, 100.0


def advantage(peer: Tensor, own: Tensor, unit: Literal["spread", "reward"] = "reward") -> Tensor:
    """ξ(s) = Ṽ(s) − V(s), detached; with unit "spread" divided by the standard deviation of both values together.

    Args:
        peer, own: (n,) values of the same states.

    Example:
        >>> advantage(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor([ 2., -1.])
    """
    xi = (peer - own).detach()
    if unit == "reward":
        return xi
    return xi / (torch.cat([peer, own]).detach().std(correction=0) + 1e-8)


def weights(xi: Tensor, alpha: float, normalise: bool = True) -> Tensor:
    """w_i ∝ clip(exp(α ξ_i), 0.01, 100), detached: summing to one, or 1/n of the clipped value each.

    Example:
        >>> weights(torch.tensor([0.0, 0.0, 9.0]), alpha=1.0, normalise=False)
        tensor([ 0.3333,  0.3333, 33.3333])
    """
    w = (alpha * xi.detach()).exp().clamp(LEAST, MOST)
    return w / w.sum() if normalise else w / len(w)


def distance(peer: Tensor, own: Tensor, discrete: bool, kind: str = "auto") -> Tensor:
    """D(π, π̃) per state: KL(π̃ ‖ π), or the squared distance of mean actions, averaged over their numbers.

    Args:
        peer: (n, A) logits, or (n, 2d) means and log standard deviations; detached.
        own: the same.
        kind: "kl" or "squared"; "auto" is the first for discrete, the second for continuous actions.

    Raises:
        UserError: squared distance of discrete actions, which has no meaning.
    """
    if kind == "kl" or (kind == "auto" and discrete):
        return divergence(peer, own, discrete)
    if discrete:
        raise UserError("the squared distance has no meaning for discrete actions; use --distance kl")
    return ((own.chunk(2, -1)[0] - peer.detach().chunk(2, -1)[0]) ** 2).mean(-1)


def weighted(w: Tensor, d: Tensor) -> Tensor:
    """Σ_i w_i D_i. Both must be (n,): (n, 1) × (n,) would spread to (n, n) and lose the weighting.

    Example:
        >>> weighted(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 3.0]))
        tensor(3.)
    """
    if w.dim() != 1 or w.shape != d.shape:
        raise ValueError(f"weights and distances must both be (n,), got {tuple(w.shape)} and {tuple(d.shape)}")
    return (w * d).sum()


def best_of(outs: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Per state, the distribution and value of the member with the largest value; of one member, its own.

    Args:
        outs: (n, k) each. values: (n,) each.
    """
    value, who = torch.stack(list(values)).max(0)
    return torch.stack(list(outs))[who, torch.arange(len(who), device=who.device)], value
