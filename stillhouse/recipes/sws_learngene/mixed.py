"""Distillation and training on mixed images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stillhouse.distill import Distill
from stillhouse.system import Batch, Clock, Terms


class Mixed(Distill):
    """`Distill` on mixed images x̃ = λx + (1−λ)x_π, which student and teacher both see; labels are mixed alike.

    λ ~ Beta(a, a), one per batch, and the order π are functions of the clock; a = 0 does not mix.
    """

    def __init__(self, *args: Any, mixup: float, classes: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mixup, self.classes = mixup, classes

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        return super().learn(mixed(batch, self.mixup, self.classes, clock) if self.mixup else batch, clock)


def mixed(batch: Batch, a: float, classes: int, clock: Clock) -> dict[str, Any]:
    """The batch with its images mixed, and labels (n, classes) in the same parts."""
    g, x, y = clock.generator("mixup"), batch["input"], F.one_hot(batch["label"], classes).to(torch.float32)
    lam = float(np.random.default_rng(int(torch.randint(2**62, (1,), generator=g))).beta(a, a))
    order = torch.randperm(len(x), generator=g).to(x.device)
    return {**batch, "input": lam * x + (1 - lam) * x[order], "label": lam * y + (1 - lam) * y[order]}
