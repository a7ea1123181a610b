"""Proximal policy optimisation as pure functions (arXiv 1707.06347), with generalised advantages (arXiv 1506.02438)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.control.networks import Learner, entropy, log_prob
from stillhouse.system import Clock


def advantages(
    rewards: Tensor, values: Tensor, following: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """A_t = δ_t + γλ(1 − ended_t) A_{t+1}, with δ_t = r_t + γ(1 − terminated_t) V(s'_t) − V(s_t).

    An episode that was cut off (ended, not terminated) still counts the value of the state it was cut off in.

    Args:
        rewards, values: (T, N) of each step and its state.
        following: (T, N) values of the states the steps led to, before any reset.
        terminated, ended: (T, N) bool.
        gamma, lam: discount and λ.

    Returns:
        (T, N). The returns that a value network learns are A + V.

    Example:
        >>> one, no = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool)
        >>> advantages(one, 0 * one, 0 * one, no, no, 0.5, 1.0).flatten()
        tensor([1.5000, 1.0000])
    """
    delta = rewards + gamma * following * ~terminated - values
    keep = gamma * lam * (~ended).to(delta.dtype)
    out, last = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        last = delta[t] + keep[t] * last
        out[t] = last
    return out


def discounted(rewards: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + γ G_{t−1}, starting anew after an end: how large sums of rewards get; (T, N).

    Example:
        >>> discounted(torch.ones(3, 1), torch.tensor([[False], [True], [False]]), 0.5).flatten()
        tensor([1.0000, 1.5000, 1.0000])
    """
    out, last = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in range(len(rewards)):
        last = rewards[t] + gamma * last
        out[t] = last
        last = last * ~ended[t]
    return out


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−min(r·A, clip(r, 1−ε, 1+ε)·A) per sample, r = exp(log_ratio).

    Example:
        >>> clipped(torch.tensor([1.0]).log() + 1, torch.tensor([1.0]), 0.2)
        tensor([-1.2000])
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@torch.no_grad()
def judged(learner: Learner, rollout: dict[str, Tensor], gamma: float, lam: float) -> dict[str, Tensor]:
    """A rollout (T, N, …) with what its learner says of it: ``log_prob``, ``advantage``, ``goal``, ``discounted``.

    ``goal`` is A + V, in rewards. All are constants of the updates that follow.
    """
    steps, n = rollout["reward"].shape
    out, value = learner(rollout["obs"].flatten(0, 1))
    values = value.view(steps, n)
    following = torch.cat([values[1:], values[-1:]])
    apart = rollout["ended"].clone()  # where the next row is not the state that the step led to
    apart[-1] = True
    following[apart] = learner(rollout["following"][apart])[1]
    gained = advantages(rollout["reward"], values, following, rollout["terminated"], rollout["ended"], gamma, lam)
    old = log_prob(out, rollout["action"].flatten(0, 1), learner.spaces.discrete).view(steps, n)
    sums = discounted(rollout["reward"], rollout["ended"], gamma)
    return {**rollout, "log_prob": old, "advantage": gained, "goal": gained + values, "discounted": sums}


def minibatch(rows: int, parts: int, clock: Clock, name: str) -> tuple[Tensor, Tensor]:
    """The rows of one minibatch over all processes, and this process's share of them.

    An epoch of `parts` minibatches goes through all rows once in a new order; ``clock.turn`` counts minibatches. Every
    process has all rows, so that together they see what one would.
    """
    epoch, part = divmod(clock.turn, parts)
    order = torch.randperm(rows, generator=replace(clock, rank=0, micro=0, turn=0).generator("order", name, epoch))
    chosen = order.tensor_split(parts)[part].to(clock.device)
    return chosen, chosen.tensor_split(clock.world)[clock.rank]


def losses(learner: Learner, batch: Any, chosen: Tensor, mine: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Policy loss, value loss and entropy of the rows `mine`, one value per row.

    L = −min(r·Â, clip(r)·Â) with Â = (A − mean)/std over `chosen`; (V − goal)² in units of the value network.

    Args:
        batch: rows of `judged`, flat.
        chosen: the rows of the minibatch over all processes. mine: this process's rows of it.
        clip: ε.
    """
    discrete, gained = learner.spaces.discrete, batch["advantage"][chosen]
    out, value = learner(batch["obs"][mine])
    advantage = (batch["advantage"][mine] - gained.mean()) / (gained.std(correction=0) + 1e-8)
    ratio = log_prob(out, batch["action"][mine], discrete) - batch["log_prob"][mine]
    error = ((value - batch["goal"][mine]) / learner.scale) ** 2
    return clipped(ratio, advantage, clip), error, entropy(out, discrete)
