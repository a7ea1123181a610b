"""Settings of SwiftBrush."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from stillhouse.diffusion.process import Guidance
from stillhouse.diffusion.score import Scores
from stillhouse.errors import UserError
from stillhouse.system import Update
from stillhouse.weights import constant, cosine

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Config:
    """Settings of a SwiftBrush run; every field is a flag."""

    prompts: tuple[str, ...] = ()  # texts or class numbers, or a text file with one in a line; none: every class
    t_init: float = 1.0  # the generator's one time, part of the way from data to noise; 1 is t = T-1
    fake: Literal["lora", "copy", "none"] = "lora"  # score of the student: LoRA, a full copy, or none, which is SDS
    kappa: float = 4.5  # guidance inside the two score calls, p(no) + kappa (p(y) - p(no)); 1 is none
    guidance: Guidance = "both"  # who gets kappa: both keeps the teacher's distribution as the goal, see the page
    weight: Literal["sigma2", "one", "dmd"] = "sigma2"  # w(t) of the gradient
    low: float = 0.02  # least noise of the student's update, part of the way
    high: float = 0.98  # most noise of the student's update
    steps: int = 10000  # generator steps
    batch: int = 16  # samples per step
    lr: float = 1e-6  # of the generator
    fake_lr: float = 1e-3  # of the fake
    decay: bool = False  # both learning rates fall to 0 as a cosine; otherwise they are constant
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"  # of both
    beta1: float = 0.9  # of Adam
    fake_repeat: int = 1  # steps of the fake for one of the generator
    fake_weight: Literal["alpha2", "one"] = "alpha2"  # of the fake's loss; alpha2 weighs the noisy end down
    drop: float = 0.1  # how often a whole batch of the fake is trained without its prompts
    rank: int = 64  # of the LoRA
    lora_alpha: float = 108.0  # scale of the LoRA is lora_alpha / rank
    lora_targets: tuple[str, ...] = ("to_q", "to_v")  # attention, convolutions, linear, or names of layers
    clip: float = 1.0  # largest gradient norm of either
    ema: float = 0.999  # decay of the average of the generator, which is the outcome; 0 for none
    null_class: int | None = None  # the teacher's label for "no class", for guidance
    prediction: Literal["auto", "epsilon", "sample", "v_prediction", "flow_prediction"] = "auto"  # of the teacher

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "fake_repeat"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.t_init <= 1 or self.clip <= 0:
            raise UserError(f"t_init must lie in (0, 1] and clip above 0, got {self.t_init} and {self.clip}")
        self.scores()

    def scores(self) -> Scores:
        """The part of the settings that is about scores."""
        return Scores(
            kappa=self.kappa, guidance=self.guidance, weight=self.weight, low=self.low, high=self.high,
            reduction="mean", fake_weight=self.fake_weight, drop=self.drop, drop_whole=True, ema=self.ema,
        )  # fmt: skip

    def update(self, lr: float, repeat: int = 1) -> Any:
        """An `Update` without its name and parameters."""
        how: dict[str, Any] = {"lr": lr} if self.optimizer == "sgd" else {"lr": lr, "betas": (self.beta1, 0.999)}
        schedule = cosine() if self.decay else constant()
        optimizer = partial(OPTIMIZERS[self.optimizer], **how)
        return partial(Update, optimizer=optimizer, lr=schedule, clip=self.clip, repeat=repeat)
