"""Policies as outcomes: what is saved, loaded, exported, and played."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.control.environments import Make, Spaces
from stillhouse.control.networks import ActorCritic, Learner, Statistics, check_network
from stillhouse.evaluate import evaluating, spread
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.system import fold


class Acting(nn.Module):
    """A policy without its noise: observations in, logits or bounded actions out.

    Args:
        network: ``obs (n, …) -> (logits or means (n, outputs), values (n,))``.
        spaces: of its environment.
        statistics: how observations are scaled.

    Example:
        >>> Acting(ActorCritic((4,), 2), Spaces((4,), 2)).act(np.zeros(4)) in (0, 1)
        True
    """

    low: Tensor
    high: Tensor

    def __init__(self, network: nn.Module, spaces: Spaces, statistics: Statistics | None = None):
        super().__init__()
        self.network, self.spaces, self.statistics = network, spaces, statistics
        for name, bound in zip(("low", "high"), spaces.bounds, strict=True):
            self.register_buffer(name, torch.from_numpy(bound), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """(n, …) → logits (n, A) of discrete actions, the largest of which is taken; or actions (n, d) in bounds."""
        seen = obs if self.statistics is None else self.statistics.normal(obs)
        known = isinstance(self.network, ActorCritic)
        out = self.network.actor(seen) if known else self.network(seen)[0]  # type: ignore[operator]
        return out if self.spaces.discrete else torch.minimum(torch.maximum(out, self.low), self.high)

    @torch.no_grad()
    def act(self, observation: Any) -> Any:
        """One observation of the environment → one action that its ``step`` takes; deterministic."""
        out = self(torch.from_numpy(self.spaces.encode(observation)).unsqueeze(0).to(self.low.device))
        return self.spaces.natives(out.argmax(-1) if self.spaces.discrete else out)[0]


def acting(
    spaces: Mapping[str, Any],
    network: str | None = None,
    widths: Sequence[int] = (64, 64),
    statistics: bool = False,
) -> Acting:
    """An untrained `Acting` from what ``plan.json`` says of it; `network` is the user's ``package.module:function``."""
    known = Spaces.from_json(spaces)
    seen = Statistics(known.shape) if statistics else None
    return Acting(build_network(known, network, widths, 0), known, seen)


def build_network(spaces: Spaces, network: str | None, widths: Sequence[int], seed: int) -> nn.Module:
    """Our actor-critic, or what the user's ``package.module:function`` makes of what it takes of these:
    ``shape`` of an observation, number of ``outputs``, ``spaces``, ``widths``.

    Raises:
        UserError: the function fails, or its network does not fit the environment.
    """
    if network is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ActorCritic(spaces.shape, spaces.outputs, tuple(widths))
    given = {"outputs": spaces.outputs, "spaces": spaces, "widths": tuple(widths)}
    made = ModelSpec(network, spaces.outputs, spaces.shape, options=given).build(seed=seed)
    check_network(made, spaces, network)
    return made


def acting_spec(learner: Learner, network: str | None, widths: Sequence[int]) -> ModelSpec:
    """How `stillhouse.load` builds the policy of a learner again."""
    spaces = learner.spaces
    options = {
        "spaces": spaces.to_json(),
        "network": network,
        "widths": list(widths),
        "statistics": learner.statistics is not None,
    }
    return ModelSpec("stillhouse.control.policy:acting", spaces.outputs, spaces.shape, options=options)


@dataclass
class Policy(Models):
    """Policies for one environment, one per learner.

    Attributes:
        scores: mean return of each at the end of training, as it was trained (with its noise).
        environment: name of the environment.

    Example::

        policy = dpd.distill(run, "CartPole-v1")
        action = policy.act(observation)              # of the best learner
        policy["b"].model.act(observation)            # of a named one
    """

    scores: dict[str, float] = field(default_factory=dict)
    environment: str = ""

    @property
    def best(self) -> Member:
        """The member with the highest score; the first where none is known."""
        return max(self.members, key=lambda m: self.scores.get(m.name, -math.inf))

    def act(self, observation: Any, member: str | None = None) -> Any:
        """The action of the best member, or of a named one, for one observation; deterministic."""
        model: Any = (self.best if member is None else self[member]).model
        return model.act(observation)

    @staticmethod
    def of(
        learners: Mapping[str, Learner],
        environment: str,
        network: str | None,
        widths: Sequence[int],
        live: bool = False,
    ) -> Policy:
        """Policies of trained learners, on the CPU; with a `live` network nothing on disk knows how to build them."""
        members = []
        for name, learner in learners.items():
            parts = copy.deepcopy((learner.network, learner.statistics))
            model = Acting(parts[0], learner.spaces, parts[1]).cpu().eval()
            members.append(Member(name, model, spec=None if live else acting_spec(learner, network, widths)))
        spaces = next(iter(learners.values())).spaces
        return Policy(members, torch.zeros(1, *spaces.shape), environment=environment)


def play(model: Any, make: Make, episodes: int = 20, seed: int = 0) -> dict[str, Any]:
    """Returns of whole episodes under a policy without noise, each reset with a seed of its own.

    Args:
        model: an `Acting`. make: makes an environment. episodes: how many.
        seed: two policies played with one seed meet the same starts.

    Returns:
        ``return``, ``return_std`` (None for one episode), ``length``: means over episodes.

    Example:
        >>> from stillhouse.control import find_environment
        >>> name, make, spaces = find_environment("CartPole-v1")
        >>> play(Acting(ActorCritic(spaces.shape, spaces.outputs), spaces), make, 2)["length"] > 0
        True
    """
    env, totals, lengths = make(), [], []
    with evaluating(model):
        for episode in range(episodes):
            observation, _ = env.reset(seed=fold(seed, "play", episode) >> 32)
            total, length, over = 0.0, 0, False
            while not over:
                observation, reward, terminated, truncated, _ = env.step(model.act(observation))
                total, length, over = total + float(reward), length + 1, bool(terminated or truncated)
            totals.append(total)
            lengths.append(length)
    env.close()
    found = spread(totals)
    return {"return": found["mean"], "return_std": found["std"], "length": float(np.mean(lengths))}
