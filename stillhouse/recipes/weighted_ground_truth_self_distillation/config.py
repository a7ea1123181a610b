"""Settings of weighted ground-truth self-distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import UserError

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
OF = {
    ("kernel",): ("kernel", "gamma", "landmarks"),
    ("kernel", "last-layer"): ("clip", "ridge"),
    ("last-layer", "networks"): ("held_out",),
    ("networks",): ("penalty", "epochs", "batch", "optimizer", "lr"),
}  # methods → the settings that they alone have


@dataclass(frozen=True)
class Config:
    """Settings of one run; every field is a flag."""

    method: Literal["kernel", "last-layer", "networks"] = "kernel"  # what is distilled into itself
    steps: int = 5  # of self-distillation, the first on labels alone
    weight: Literal["optimal", "fixed"] = "optimal"  # label weights estimated on held-out samples, or alpha
    alpha: float = 0.2  # weight of the ground truth in every step but the first, where it is fixed
    clip: bool = False  # keep estimated weights of kernel and last layer in [0, 1]; networks' always are
    ridge: float = 0.0  # kernel, last-layer: λ over the mean diagonal of the kernel matrix; 0: the best held-out one
    kernel: Literal["rbf", "linear"] = "rbf"  # kernel: of standardised inputs
    gamma: float = 0.0  # kernel: of rbf; 0 takes one over the number of inputs
    landmarks: int = 0  # kernel: Nyström, for more than 20,000 samples; 0 takes all
    held_out: float = 0.2  # last-layer, networks: part of the training data that weights are estimated on
    penalty: float = 1e-4  # networks: weight of the sum of the tensors' norms, not squared
    epochs: float = 75.0  # networks: passes over the training data, per step
    batch: int = 16  # networks: samples per step of the optimiser, over all processes
    optimizer: Literal["adam", "sgd"] = "adam"  # networks: sgd has momentum 0.9
    lr: float = 1e-4  # networks: learning rate, constant

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("ridge", 0), ("gamma", 0), ("landmarks", 0), ("penalty", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected a number from {least}, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha: expected the labels' weight in [0, 1], got {self.alpha}")
        if not 0 < self.held_out <= 0.9:
            raise UserError(f"held_out: expected a part in (0, 0.9], got {self.held_out}")
        if not (self.epochs > 0 and self.lr >= 0):
            raise UserError(f"epochs > 0 and lr >= 0 are needed, got {self.epochs} and {self.lr}")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing under this method, and why."""
        named, found = f"--method {self.method} has none", dict[str, str]()
        for methods, names in OF.items():
            if self.method not in methods:
                found |= dict.fromkeys(names, named)
        if self.weight == "optimal":
            found["alpha"] = "--weight optimal estimates the labels' weight"
        else:
            found["clip"] = "--weight fixed estimates none"
        if self.kernel == "linear":
            found["gamma"] = "--kernel linear has none"
        return found

    @property
    def moves(self) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
        """Builds the optimiser of networks."""
        if self.optimizer == "adam":
            return partial(torch.optim.Adam, lr=self.lr)
        return partial(torch.optim.SGD, lr=self.lr, momentum=0.9)
