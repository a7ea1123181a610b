"""Settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of one distilled set; every field is a flag."""

    samples: int = 10  # synthetic samples in a block; may be fewer than there are classes
    blocks: int = 1  # distinct blocks; a training step sees one, in turn
    passes: int = 3  # passes over the blocks; blocks × passes training steps, each with a step size of its own
    classes: tuple[int, ...] = ()  # classes that a block's samples start from, in turn; empty takes all, in order
    labels: Literal["soft", "hard"] = "soft"  # learned label vectors, or those of the start kept (the method of 2018)
    label_init: Literal[
        "one-hot", "normal", "uniform", "bernoulli", "zeros", "ones", "smooth", "orthogonal", "similar"
    ] = "one-hot"  # start values; similar: one-hot moved toward classes with similar mean images (or similar names)
    label_scale: float = 1.0  # the start values are multiplied by this
    label_shift: float = 0.0  # … and this is added
    label_softmax: bool = False  # pass labels through a softmax, which takes away negative evidence
    one_logit: bool = False  # two classes: one logit and binary cross-entropy, the label of a sample is one number
    start: Literal["known", "unknown", "pool"] = "known"  # weights to train from: one fixed draw, fresh ones, a pool's
    weights: Literal["xavier", "zeros", "own"] = "xavier"  # how they are drawn: normal with zero biases, or the model's
    pool: tuple[str, ...] = ()  # for start pool: folders of trained networks, RUN/students/NAME
    nets: int = 1  # networks per step, for start unknown and pool
    step_size: float = 0.02  # start value of all step sizes
    momentum: float = 0.0  # heavy-ball momentum of the training steps
    lr: float = 0.01  # learning rate of Adam, which moves samples, labels and step sizes
    epochs: float = 400.0  # passes over the real data
    decay: float = 40.0  # epochs after which the learning rate is halved, again and again; 0 keeps it
    batch: int = 1024  # real samples per step
    segment: int = 0  # keep the weights of every this many training steps; 0 takes √T, 1 is faster for small weights

    def __post_init__(self) -> None:
        low: dict[str, float] = {
            "samples": 1, "blocks": 1, "passes": 1, "nets": 1, "batch": 1, "segment": 0, "lr": 0, "epochs": 0,
        }  # fmt: skip
        for name, least in low.items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise UserError(f"{name}: expected a finite number of at least {least:g}, got {value}")
        if not 0 < self.step_size < math.inf:
            raise UserError(f"step_size: expected a number above 0, got {self.step_size}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum: expected a number in [0, 1), got {self.momentum}")
        if self.decay != 0 and not self.decay >= 1:
            raise UserError(f"decay: expected at least 1 epoch, or 0 for none, got {self.decay}")
        if self.classes and min(self.classes) < 0:
            raise UserError(f"classes: expected class numbers from 0 on, got {self.classes}")
        if self.start != "pool" and self.pool:
            raise UserError(f"pool: networks are taken from a pool with --start pool, got --start {self.start}")
        if self.start == "unknown" and self.weights == "zeros":
            raise UserError("weights zeros are the same in every draw: use --start known")
        if self.start == "known" and self.nets > 1:
            raise UserError(f"nets: start known has one network, got {self.nets}; use --start unknown or pool")

    @property
    def steps(self) -> int:
        """T, the number of training steps."""
        return self.blocks * self.passes
