"""Settings of a plain distillation, and the optimiser and schedule they describe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from stillhouse.comparisons import ON_LOGITS, Objective
from stillhouse.data import Data
from stillhouse.errors import UserError
from stillhouse.system import Schedule
from stillhouse.weights import cosine


@dataclass(frozen=True)
class Config:
    """Settings of a plain distillation; every field is a flag."""

    objective: tuple[str, ...] = ("kd:0.9?T=4",)  # NAME[:STUDENT=TEACHER][:WEIGHT][?OPTION=VALUE&…]; see the page
    label: float = 0.1  # weight of the labels' cross-entropy
    label_smoothing: float = 0.0  # part of each label that is spread over all classes
    teacher_epochs: float = 0.0  # train the teacher first, for so many passes; 0 takes it as it comes
    cache: int = -1  # ask the teacher once for so many augmented views and keep its logits; 0: plain view; -1: live
    epochs: float = 30.0  # passes over the training data
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has Nesterov momentum 0.9
    lr: float = 0.1  # learning rate at the top of its cosine
    lr_warmup: float = 0.05  # part of the run over which the learning rate rises
    weight_decay: float = 5e-4  # of all trained weights
    clip: float = 5.0  # largest gradient norm

    def __post_init__(self) -> None:
        for text in self.objective:
            Objective.parse(text)
        for name, least in (("label", 0), ("teacher_epochs", 0), ("cache", -1), ("batch", 1), ("lr", 0), ("clip", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected a number from {least}, got {getattr(self, name)}")
        if not self.epochs > 0:
            raise UserError(f"epochs: expected a positive number, got {self.epochs}")
        if self.cache >= 0 and any(Objective.parse(o).level not in ON_LOGITS for o in self.objective):
            raise UserError("cache: keeps logits only; drop the objectives on features, or ask the teacher live")


def optimizer_of(cfg: Config) -> Any:
    if cfg.optimizer == "adamw":
        return partial(torch.optim.AdamW, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay)


def schedule(data: Data, cfg: Config, epochs: float) -> Schedule:
    steps = max(1, round(epochs * (len(data.train) // min(cfg.batch, len(data.train)))))
    return cosine(warmup_steps=round(cfg.lr_warmup * steps))
