"""The form of DPD over deterministic policy gradients: one gradient step of each kind per few environment steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.control.ddpg import DeterministicActorCritic, DeterministicLearner
from stillhouse.control.environments import Make, Spaces
from stillhouse.control.rollout import Rollout
from stillhouse.data.replay import Replay
from stillhouse.data.sources import Together, together
from stillhouse.recipes.dpd.borrow import advantage, best_of
from stillhouse.recipes.dpd.config import Config
from stillhouse.recipes.dpd.group import Group, always, share_of
from stillhouse.system import Batch, Clock, Terms, Update, fold

NETWORK = "stillhouse.control.ddpg:network"
KEPT = ("obs", "action", "reward", "following", "terminated")


class DDPG(Group):
    """ξ(s) = Q̃(s, μ̃(s)) − Q(s, μ̃(s)), both at the peer's action; D is the squared distance of actions."""

    METHODS = ("criticise", "improve")

    def updates(self) -> Sequence[Update]:
        cfg, made = self.cfg, []
        critics = partial(torch.optim.Adam, lr=cfg.critic_lr, weight_decay=cfg.critic_decay)
        for name, learner in self.learners.items():
            actor, critic = (list(part.parameters()) for part in (learner.network.actor, learner.network.critic))
            made.append(Update(f"criticise_{name}", critic, critics, whole=True))
            shared = torch.optim.Adam(actor, lr=cfg.lr)
            made.append(Update(f"improve_{name}", actor, always(shared), whole=True))
            if cfg.every and len(self.learners) > 1:
                own = partial(torch.optim.Adam, lr=cfg.distil_lr or cfg.lr)
                kind = own if cfg.optimizer == "separate" else always(shared)
                made.append(Update(f"distil_{name}", actor, kind, every=cfg.every, start=cfg.warmup, whole=True))
        return sorted(made, key=lambda u: u.name.startswith("distil"))  # borrow after all have improved

    def rows(self, name: str, batch: Batch, clock: Clock) -> tuple[dict[str, Tensor], float]:
        """This process's share of a draw from the learner's own replay, and the weight of each of its rows."""
        self.seen[name] = batch[name]
        n = self.cfg.batch
        mine = {k: v[:n].tensor_split(clock.world)[clock.rank] for k, v in batch[name]["drawn"].items()}
        return mine, clock.world / n

    def criticise(self, name: str, batch: Batch, clock: Clock) -> Terms:
        rows, weight = self.rows(name, batch, clock)
        return Terms(**{f"{name}_critic": weight * self.learners[name].error(rows, self.cfg.gamma).sum()})

    def improve(self, name: str, batch: Batch, clock: Clock) -> Terms:
        """−Q(s, μ(s)) on states of the own replay."""
        rows, weight = self.rows(name, batch, clock)
        return Terms(**{f"{name}_actor": -weight * self.learners[name].network(rows["obs"])[1].sum()})

    def compare(self, name: str, states: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        said = [peer.network(states) for k, peer in self.learners.items() if k != name]
        action, value = best_of([a for a, _ in said], [q for _, q in said])
        return action, advantage(value, self.learners[name].network.value(states, action), self.cfg.unit)

    def apart(self, name: str, states: Tensor, peer: Tensor) -> Tensor:
        return ((self.learners[name].network.act(states) - peer) ** 2).mean(-1)

    def after_step(self, clock: Clock) -> None:
        super().after_step(clock)
        for learner in self.learners.values():
            learner.follow(self.cfg.target_rate)


def make_learners(seed: int, spaces: Spaces, names: Sequence[str], cfg: Config) -> dict[str, Any]:
    """Deterministic learners of their own seeds by name."""
    learners = {}
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(seed, "learner", name))
            network = DeterministicActorCritic(spaces, cfg.widths)
        learners[name] = DeterministicLearner(network, spaces, cfg.noise)
    return learners


def source(system: DDPG, env: tuple[str, Make, Spaces], cfg: Config) -> Together:
    """Each learner's own environment and replay, for its own updates and for its peers'."""
    draw = max(cfg.batch, share_of(cfg, len(system.learners) - 1))
    parts = {
        name: Replay(Rollout(name, env, learner, steps=cfg.stride), KEPT, cfg.buffer, draw)
        for name, learner in system.learners.items()
    }
    return together(**parts)
