"""Settings of instance-specific label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import UserError

OF = {
    "beta": ("alpha", "a", "assign", "ema", "ema_norm"),
    "generations": ("generations", "teach", "temperature"),
    "smoothing": ("epsilon",),
    "entropy": ("penalty",),
}  # rule → the settings that it alone has


@dataclass(frozen=True)
class Config:
    """Settings of one run; every field is a flag."""

    rule: Literal["beta", "generations", "smoothing", "entropy", "plain"] = "beta"  # the last three are the baselines
    alpha: float = 0.6  # beta: weight of the smoothed labels against the hard ones
    a: float = 3.0  # beta: strengths are drawn from Beta(a, 1), whose mean is a/(a+1)
    assign: Literal["rank", "random"] = "rank"  # beta: by the rank of the averaged network's confidence, or by chance
    ema: float = 0.999  # beta: decay of the averaged network, after its warm-up
    ema_norm: Literal["batch", "running"] = "batch"  # beta: statistics by which the averaged network normalises
    epsilon: float = 0.15  # smoothing: mass on wrong classes; alpha/(a+1) has the mean strength of beta
    penalty: float = 0.1  # entropy: weight of the entropy that is rewarded
    generations: int = 2  # generations: networks trained one after the other, the first on labels alone
    teach: float = 0.4  # generations: weight of the generation before against the labels
    temperature: float = 4.0  # generations: of the teacher alone
    held_out: float = 0.1  # part of the training data on which the checkpoint is chosen; 0 takes the last weights
    epochs: float = 150.0  # passes over the training data, per generation
    batch: int = 128  # samples per step, over all processes; strengths are ranked within it
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has momentum 0.9
    lr: float = 0.1  # learning rate at the start
    milestones: tuple[float, ...] = (1 / 3, 2 / 3)  # parts of the run after which it falls to a tenth; DenseNet .5 .75
    weight_decay: float = 1e-4  # of all trained weights

    def __post_init__(self) -> None:
        ranges = {"alpha": (0, 1), "ema": (0, 1), "teach": (0, 1), "epsilon": (0, 1), "held_out": (0, 0.9)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}: expected a number from {low} to {high}, got {getattr(self, name)}")
        for name in ("a", "temperature", "epochs"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name, least in (("generations", 1), ("batch", 1), ("penalty", 0), ("lr", 0), ("weight_decay", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected a number from {least}, got {getattr(self, name)}")
        if not all(0 < m < 1 for m in self.milestones):
            raise UserError(f"milestones: expected parts of the run in (0, 1), got {self.milestones}")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing under this rule, and why."""
        found = {name: f"it is of --rule {rule}" for rule, names in OF.items() if rule != self.rule for name in names}
        if self.rule == "beta" and self.assign == "random":
            found |= dict.fromkeys(("ema", "ema_norm"), "--assign random asks no averaged network")
        return found

    @property
    def count(self) -> int:
        """Networks that are trained."""
        return self.generations if self.rule == "generations" else 1

    @property
    def moves(self) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
        """Builds the optimiser."""
        if self.optimizer == "adamw":
            return partial(torch.optim.AdamW, lr=self.lr, weight_decay=self.weight_decay)
        return partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
