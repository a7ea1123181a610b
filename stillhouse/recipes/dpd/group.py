"""What the two forms of DPD share: learners side by side, the distillation loss, return curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.recipes.dpd.borrow import weighted, weights
from stillhouse.recipes.dpd.config import Config
from stillhouse.system import Batch, Clock, System, Terms


class Group(System):
    """Learners by name that learn from their peers where these are better.

    L_D = Σ_i w_i D(π(·|s_i), π̃(·|s_i)) on states of the peers, w_i ∝ clip(exp(α ξ_i), 0.01, 100), ξ = Ṽ − V.

    A form names its updates' methods in `METHODS`; each is called with the learner's name first.
    """

    METHODS: tuple[str, ...] = ()
    learners: Any
    returns: Tensor

    def __init__(self, learners: Mapping[str, nn.Module], cfg: Config):
        super().__init__()
        self.learners, self.cfg = nn.ModuleDict(learners), cfg
        self.seen: dict[str, Batch] = {}
        # Sum and number of the returns of the episodes that ended in each step, for the curves.
        self.register_buffer("returns", torch.zeros(len(learners), 2, cfg.updates))
        for method in (*self.METHODS, "distil"):
            for name in learners:
                setattr(self, f"{method}_{name}", partial(getattr(self, method), name))

    def compare(self, name: str, states: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """What the best peer would do in each state, and ξ, (n,); no gradients."""
        raise NotImplementedError

    def apart(self, name: str, states: Tensor, peer: Tensor) -> Tensor:
        """D per state, (n,), with a gradient to the own actor alone."""
        raise NotImplementedError

    def distil(self, name: str, batch: Batch, clock: Clock) -> Terms:
        """One step towards the better peer on states of the peers; peers, weights and values are constants."""
        cfg, peers = self.cfg, [k for k in self.learners if k != name]
        states = torch.cat([batch[k]["drawn"]["obs"][: share_of(cfg, len(peers))] for k in peers])
        with torch.no_grad():
            peer, xi = self.compare(name, states, clock)
        w = weights(-xi if cfg.reverse else xi, cfg.alpha, cfg.normalise_weights)
        mine = torch.arange(len(states), device=states.device).tensor_split(clock.world)[clock.rank]
        d = self.apart(name, states[mine], peer[mine])
        # Processes count alike in the engine's mean, whatever their part of the sum.
        loss = cfg.weight * clock.world * weighted(w[mine], d) / (len(states) if cfg.over_batch else 1)
        facts = {"behind": (xi > 0).float().mean(), "distance": d.mean(), "largest_weight": w.max() * len(w)}
        return Terms(**{f"{name}_distil": loss}).note(**{f"{name}_{k}": v for k, v in facts.items()})

    def after_step(self, clock: Clock) -> None:
        """Notes the returns of the episodes that ended."""
        for i, name in enumerate(self.learners):
            ended = self.seen[name]["return"]
            ended = ended[~ended.isnan()]
            self.returns[i, :, clock.step] = torch.stack([ended.sum(), torch.tensor(len(ended)).to(ended)])
        self.seen = {}

    def curve(self, name: str) -> list[float]:
        """Mean return of the episodes that ended in each step; where none did, of the step before (0 at first)."""
        last, out = 0.0, []
        for total, count in self.returns[list(self.learners).index(name)].T.tolist():
            last = total / count if count else last
            out.append(last)
        return out


def always(optimizer: torch.optim.Optimizer) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
    """The same optimiser for every Update that asks: several Updates then share its moments."""
    return lambda params: optimizer


def share_of(cfg: Config, peers: int) -> int:
    """States from each of so many peers."""
    return -(-cfg.states // max(1, peers))


def thinned(rows: list[Any], most: int = 500) -> list[Any]:
    """At most so many of them, evenly, with the last."""
    every = -(-len(rows) // most)
    return rows[::-1][::every][::-1]
