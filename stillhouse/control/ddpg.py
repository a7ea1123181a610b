"""Deterministic policy gradients: networks and their learner (arXiv 1509.02971)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse.control.environments import Spaces
from stillhouse.errors import UserError


def _perceptron(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with layer norm and ReLU between them; the last one starts small."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()]
    last = nn.Linear(sizes[-2], sizes[-1])
    nn.init.uniform_(last.weight, -3e-3, 3e-3)
    nn.init.uniform_(last.bias, -3e-3, 3e-3)
    return nn.Sequential(*layers, last)


class DeterministicActorCritic(nn.Module):
    """μ(s) inside the bounds of the actions, and Q(s, a).

    Raises:
        UserError: actions that are discrete or have no bounds.
    """

    centre: Tensor
    reach: Tensor

    def __init__(self, spaces: Spaces, widths: Sequence[int] = (64, 64)):
        super().__init__()
        if spaces.discrete or None in (*spaces.low, *spaces.high):
            raise UserError("deterministic policy gradients need continuous actions with bounds; use --base ppo")
        low, high = (torch.from_numpy(bound) for bound in spaces.bounds)
        self.register_buffer("centre", (low + high) / 2)
        self.register_buffer("reach", (high - low) / 2)
        seen = math.prod(spaces.shape)
        self.actor = _perceptron([seen, *widths, spaces.outputs])
        self.critic = _perceptron([seen + spaces.outputs, *widths, 1])

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """μ(s), (n, d), and Q(s, μ(s)), (n,)."""
        action = self.act(obs)
        return action, self.value(obs, action)

    def act(self, obs: Tensor) -> Tensor:
        return self.centre + self.reach * torch.tanh(self.actor(obs.flatten(1)))

    def value(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q(s, a), (n,), in rewards."""
        return self.critic(torch.cat([obs.flatten(1), (action - self.centre) / self.reach], -1)).squeeze(-1)


def network(spaces: Spaces, widths: Sequence[int]) -> DeterministicActorCritic:
    """How `stillhouse.load` builds the network again."""
    return DeterministicActorCritic(spaces, widths)


class DeterministicLearner(nn.Module):
    """A deterministic actor-critic, its slowly following target, and the noise it explores with.

    Args:
        network: trained. spaces: of the environment.
        noise: standard deviation of Gaussian exploration, in halves of the range of actions.
    """

    statistics = None

    def __init__(self, network: DeterministicActorCritic, spaces: Spaces, noise: float = 0.1):
        super().__init__()
        self.network, self.spaces, self.spread = network, spaces, noise
        self.target = copy.deepcopy(network).requires_grad_(False)

    def noise(self, rows: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.spread * torch.randn(*rows, self.spaces.outputs, generator=generator)

    def choose(self, obs: Tensor, noise: Tensor) -> Tensor:
        """μ(s) + noise, inside the bounds."""
        n = self.network
        return torch.clamp(n.act(obs) + n.reach * noise, n.centre - n.reach, n.centre + n.reach)

    def error(self, rows: dict[str, Tensor], gamma: float) -> Tensor:
        """(Q(s, a) − r − γ (1 − terminated) Q'(s', μ'(s')))² per row, with ' for the target."""
        with torch.no_grad():
            following = self.target(rows["following"])[1]
            goal = rows["reward"] + gamma * following * ~rows["terminated"]
        return (self.network.value(rows["obs"], rows["action"]) - goal) ** 2

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """target ← (1 − rate)·target + rate·network."""
        for slow, fast in zip(self.target.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast, rate)
