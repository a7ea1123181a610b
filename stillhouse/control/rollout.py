"""Rollouts as a source: environments that the learner in training acts in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.control.environments import Environments, Make, Spaces
from stillhouse.data.samples import digest
from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating
from stillhouse.system import Batch, Clock, Source, fold

Finish = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Rollout(Source):
    """The next `steps` steps of `envs` environments under the policy as it stands.

    A source with state: its environments, saved as their reset seeds and the actions since (`Environments`). Reset
    seeds and the draws of actions come from the clock. Every process simulates all environments and has the whole
    rollout, so that their states stay alike and several processes see together what one would; the System takes its
    share of the rows (`ppo.minibatch`).

    Args:
        name: parts its random draws from those of other rollouts.
        env: name, how to make one, and spaces, from `find_environment`.
        actor: a module with ``noise(rows, generator)`` and ``choose(obs, noise) -> actions``; in eval mode here.
        envs, steps: N and T.
        finish: ``finish(rollout) -> rollout``, tensors (T, N, …), adds what is known when the rollout is whole.

    The batch has T·N rows, in order of time: ``obs``, ``action``, ``reward``, ``following`` (the state the step led to,
    before any reset), ``terminated``, ``ended`` (terminated or cut off), ``return`` (of an episode that ended here,
    else NaN), and what `finish` adds.

    Raises:
        UserError: an environment that cannot be brought back where it was, or gives numbers that are not finite.

    Example:
        >>> from stillhouse.control import ActorCritic, Learner, find_environment
        >>> env = find_environment("CartPole-v1")
        >>> actor = Learner(ActorCritic(env[2].shape, env[2].outputs), env[2])
        >>> Rollout("a", env, actor, envs=2, steps=3).batch(Clock())["obs"].shape
        torch.Size([6, 4])
    """

    def __init__(
        self,
        name: str,
        env: tuple[str, Make, Spaces],
        actor: Any,
        *,
        envs: int = 1,
        steps: int = 128,
        finish: Finish | None = None,
    ):
        if envs < 1 or steps < 1:
            raise UserError(f"a rollout needs at least one environment and one step, got {envs} and {steps}")
        self.name, self.actor, self.steps, self.finish = name, actor, steps, finish
        self.environments = Environments(*env, envs)

    @property
    def steps_per_epoch(self) -> int:
        return 1

    @property
    def fingerprint(self) -> str:
        e = self.environments
        return digest("rollout", self.name, e.name, e.spaces.to_json(), e.n, self.steps)

    def num_samples(self, clock: Clock) -> int:
        return self.steps * self.environments.n

    def batch(self, clock: Clock) -> Batch:
        clock = replace(clock, rank=0, micro=0, turn=0)  # every process draws the same
        with torch.no_grad(), evaluating(self.actor):
            rollout = self._collect(clock)
            for key in ("obs", "reward"):
                if not bool(torch.isfinite(rollout[key]).all()):
                    what = {"obs": "an observation", "reward": "a reward"}[key]
                    raise UserError(f"environment {self.environments.name} gave {what} that is not finite")
            if self.finish is not None:
                rollout = self.finish(rollout)
        return {k: v.flatten(0, 1) for k, v in rollout.items()}

    def _collect(self, clock: Clock) -> dict[str, Tensor]:
        world = self.environments

        def seed(i: int, episode: int) -> int:
            return fold(clock.seed, clock.stage, self.name, "reset", i, episode) >> 32  # some take only 31 bits

        world.wake(seed)
        noise = self.actor.noise((self.steps, world.n), clock.generator("actions", self.name)).to(clock.device)
        rows: dict[str, list[Any]] = {k: [] for k in ("following", "reward", "terminated", "ended", "return")}
        seen, actions = [], []
        for t in range(self.steps):
            obs = torch.from_numpy(world.obs.copy())
            action = self.actor.choose(obs.to(clock.device), noise[t])
            seen.append(obs)
            actions.append(action)
            for key, value in zip(rows, world.step(action, seed), strict=True):
                rows[key].append(value)
        stacked = {k: torch.from_numpy(np.stack(v)).to(clock.device) for k, v in rows.items()}
        return {"obs": torch.stack(seen).to(clock.device), "action": torch.stack(actions), **stacked}

    def state_dict(self) -> dict[str, Tensor]:
        return self.environments.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.environments.load_state_dict(state)
