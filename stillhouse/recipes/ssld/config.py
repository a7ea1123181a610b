"""Settings of an SSLD run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of an SSLD run; every field is a flag."""

    objective: Literal["symmetric", "ce", "js"] = "symmetric"  # half Jeffreys (the paper's "JS"), soft CE, true JS
    per_class: int = 4000  # pool images kept of each class, surest first; 0 keeps all (the paper's number is not known)
    radius: float = 0.01  # 1 − cosine to a test image up to which a pool image counts as its copy; -1 keeps all
    batch_statistics: bool = True  # the teacher's batch norm uses the batch's statistics, as in training
    epochs: float = 360.0  # passes over labelled images and pool together
    steps: int = 0  # optimiser steps in place of epochs, to compare pools of different size
    batch: int = 1024  # samples per step, over all processes
    lr: float = 0.4  # SGD with momentum 0.9, at the top of its cosine
    warmup: float = 5 / 360  # part of the run over which the learning rate rises
    weight_decay: float = 1e-5  # small: soft targets regularise already
    finetune: Literal["teacher", "labels", "none"] = "teacher"  # what phase 2 learns from, on the labelled images alone
    finetune_epochs: float = 30.0  # passes over the labelled images
    finetune_lr: float = 0.01  # learning rate of phase 2 as a part of phase 1's
    stage_lr: tuple[str, ...] = ()  # MODULE=FACTOR on the learning rate in phase 2, such as layer1=0.1
    fix_epochs: float = 10.0  # passes over the labelled images at the size of use, for the last layer alone
    fix_lr: float = 0.01  # learning rate of that as a part of phase 1's
    teacher_epochs: float = 0.0  # train the teacher on the labelled images first, for so many passes
    teacher_lr: float = 0.1  # top of its cosine

    def __post_init__(self) -> None:
        least = {"per_class": 0, "steps": 0, "batch": 1, "weight_decay": 0, "teacher_epochs": 0, "warmup": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        for name in ("epochs", "lr", "finetune_epochs", "finetune_lr", "fix_epochs", "fix_lr", "teacher_lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a positive number, got {getattr(self, name)}")
        self.stages()

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = {"epochs": "--steps says how long phase 1 is"} if self.steps else {}
        if self.finetune == "none":
            found |= dict.fromkeys(("finetune_epochs", "finetune_lr", "stage_lr"), "--finetune none has no phase 2")
        if not self.teacher_epochs:
            found["teacher_lr"] = "the teacher is not trained without --teacher-epochs"
        return found

    def stages(self) -> dict[str, float]:
        """`stage_lr` as module path → factor."""
        found = {}
        for text in self.stage_lr:
            path, _, factor = text.rpartition("=")
            try:
                found[path] = float(factor)
            except ValueError:
                found[path] = -1.0
            if not path or not found[path] >= 0:
                raise UserError(f"stage_lr {text!r}: expected MODULE=FACTOR with a factor >= 0, such as layer1=0.1")
        return found
