"""Dual Policy Distillation over live objects.

stillhouse run dpd --out runs/dpd
stillhouse run dpd --env InvertedPendulum-v5 --out runs/pendulum
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.control.environments import Make, Spaces, find_environment
from stillhouse.control.networks import Learner, Statistics, check_network, sample
from stillhouse.control.policy import Policy, build_network
from stillhouse.control.ppo import judged, losses, minibatch
from stillhouse.control.rollout import Rollout
from stillhouse.data.replay import Replay
from stillhouse.data.sources import Together, together
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.recipes.dpd import ddpg
from stillhouse.recipes.dpd.borrow import advantage, best_of, distance
from stillhouse.recipes.dpd.config import Config
from stillhouse.recipes.dpd.group import Group, always, share_of, thinned
from stillhouse.system import Batch, Clock, Terms, Update, fold

__all__ = ["DPD", "Config", "distill"]

Network = Callable[[tuple[int, ...], int], nn.Module]


class DPD(Group):
    """The form over PPO: ξ(s) = Ṽ(s) − V(s); D is a KL, or the squared distance of means."""

    METHODS = ("improve",)

    def updates(self) -> Sequence[Update]:
        cfg, lr = self.cfg, (lambda clock: 1 - clock.progress) if self.cfg.anneal else None
        own, borrowed = [], []
        for name, learner in self.learners.items():
            params, how = list(learner.parameters()), {"lr": lr, "clip": cfg.max_norm, "whole": True}
            adam = partial(torch.optim.Adam, eps=1e-5, fused=True)
            shared = adam(params, lr=cfg.lr)
            turns = cfg.epochs * cfg.minibatches
            own.append(Update(f"improve_{name}", params, always(shared), repeat=turns, **how))  # type: ignore[arg-type]
            kind = partial(adam, lr=cfg.distil_lr or cfg.lr) if cfg.optimizer == "separate" else always(shared)
            borrowed.append(Update(f"distil_{name}", params, kind, every=max(1, cfg.every), start=cfg.warmup, **how))  # type: ignore[arg-type]
        return [*own, *borrowed] if cfg.every and len(self.learners) > 1 else own

    def improve(self, name: str, batch: Batch, clock: Clock) -> Terms:
        """One minibatch of PPO on the learner's own rollout."""
        cfg, rollout = self.cfg, batch[name]
        self.seen[name] = rollout
        chosen, mine = minibatch(len(rollout["obs"]), cfg.minibatches, clock, name)
        parts = losses(self.learners[name], rollout, chosen, mine, cfg.clip)
        # Processes count alike in the engine's mean, their shares of a minibatch may differ by a row.
        policy, value, entropy = (p.sum() * clock.world / len(chosen) for p in parts)
        terms = {f"{name}_policy": policy, f"{name}_value": cfg.value_weight * value}
        if cfg.entropy_weight:
            terms[f"{name}_entropy"] = -cfg.entropy_weight * entropy
        return Terms(**terms)

    def compare(self, name: str, states: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        said = [peer(states) for k, peer in self.learners.items() if k != name]
        peer, value = best_of([out for out, _ in said], [v for _, v in said])
        if self.cfg.target == "sample":
            mean, log_std = peer.chunk(2, -1)
            noise = torch.randn(mean.shape, generator=clock.generator("target", name)).to(mean)
            peer = torch.cat([sample(peer, noise, discrete=False), log_std], -1)
        return peer, advantage(value, self.learners[name](states)[1], self.cfg.unit)

    def apart(self, name: str, states: Tensor, peer: Tensor) -> Tensor:
        own = self.learners[name]
        return distance(peer, own.actor(states), own.spaces.discrete, self.cfg.distance)

    def after_step(self, clock: Clock) -> None:
        """Takes the step's observations into the statistics, for the next rollouts."""
        for name, learner in self.learners.items():
            if learner.statistics is not None:
                learner.statistics.update(self.seen[name]["obs"], self.seen[name]["discounted"])
        super().after_step(clock)


def distill(run: Run, env: str | Make, cfg: Config | None = None, *, network: str | Network | None = None) -> Policy:
    """Trains `cfg.learners` policies side by side in copies of one environment.

    Args:
        run: folder, seed, device.
        env: a name gymnasium knows, ``package.module:function``, or a function that makes an environment.
        cfg: settings.
        network: your actor-critic: ``package.module:function`` (its policies load by name) or a function, called with
            the shape of observations and the number of outputs; it gives (logits or means, values).

    Returns:
        The policies, named a, b, …; ``logs`` has the return curves.

    Raises:
        UserError: settings, an environment or a network that cannot be; the network does not fit the environment.
    """
    cfg, began = cfg or Config(), time.monotonic()
    found = find_environment(env)
    names = list(string.ascii_lowercase[: cfg.learners])
    path = network if isinstance(network, str) else None
    system: Group
    if cfg.base == "ddpg":
        if network is not None:
            raise UserError("--base ddpg has a network of its own; leave out --model, or use --base ppo")
        system, path = ddpg.DDPG(ddpg.make_learners(run.seed, found[2], names, cfg), cfg), ddpg.NETWORK
        data = ddpg.source(system, found, cfg)
    else:
        system = DPD(make_learners(run.seed, found[2], names, cfg, network), cfg)
        data = source(system, found, cfg)
    fit(run, "dpd", system, data, steps=cfg.updates, settings=cfg)
    policy = Policy.of(dict(system.learners.items()), found[0], path, cfg.widths, live=callable(network))
    curves = {name: system.curve(name) for name in names}
    tail = max(1, cfg.updates // 10)
    policy.scores = {name: sum(c[-tail:]) / tail for name, c in curves.items()}
    rows = zip(*curves.values(), strict=True)
    policy.logs = thinned([{"step": (k + 1) * cfg.rollout, **dict(zip(names, row))} for k, row in enumerate(rows)])
    policy.cost = {"env_steps": cfg.learners * cfg.updates * cfg.rollout, "seconds": time.monotonic() - began}
    return policy


def make_learners(
    seed: int, spaces: Spaces, names: Sequence[str], cfg: Config, network: str | Network | None = None
) -> dict[str, Learner]:
    """Learners of their own seeds by name, with the running statistics that the settings ask for."""
    if cfg.distance == "squared" and spaces.discrete:
        raise UserError("the squared distance has no meaning for discrete actions; use --distance kl or auto")
    if cfg.target == "sample" and (spaces.discrete or cfg.distance == "kl"):
        raise UserError("--target sample is for the squared distance of continuous actions; leave it at mean")
    shared, learners = Statistics(spaces.shape), {}
    for name in names:
        of = fold(seed, "learner", name)
        if callable(network):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(of)
                made = network(spaces.shape, spaces.outputs)
            check_network(made, spaces, getattr(network, "__qualname__", type(network).__name__))
        else:
            made = build_network(spaces, network, cfg.widths, of)
        kept = {"shared": shared, "own": Statistics(spaces.shape), "none": None}[cfg.normalise]
        learners[name] = Learner(made, spaces, kept)
    return learners


def source(system: Group, env: tuple[str, Make, Spaces], cfg: Config) -> Together:
    """Each learner's rollouts in environments of its own, and draws from its latest states."""
    parts: dict[str, Any] = {}
    for name, learner in system.learners.items():
        finish = partial(judged, learner, gamma=cfg.gamma, lam=cfg.lam)
        rollout = Rollout(name, env, learner, envs=cfg.envs, steps=cfg.horizon, finish=finish)
        parts[name] = Replay(rollout, ["obs"], cfg.buffer, share_of(cfg, len(system.learners) - 1))
    return together(**parts)
