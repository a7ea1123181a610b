"""Settings of LELP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.plain import Plain


@dataclass(frozen=True)
class Config:
    """Settings of a LELP run; every field is a flag."""

    subclasses: int = 5  # S, outputs per class; 1 is plain distillation
    beta: float = 0.5  # β: softness among the sub-classes of a class, in standard deviations; inf says nothing of them
    temperature: float = 1.0  # T of the teacher's class probabilities
    student_temperature: float = 1.0  # τ of the student in training
    null_space: bool = True  # look for sub-classes only where the teacher's head does not see
    rotate: bool = True  # turn each class's directions at random, so that all have a similar variance
    assign: Literal["predicted", "label"] = "predicted"  # whose samples make a class when directions are looked for
    label: float = 0.0  # α: weight of the cross-entropy of the class; 0, the paper's, reads no label
    most: int = 100_000  # inputs that directions are looked for in
    cache: int = 0  # 0: targets of the plain input, fixed once; V: of V augmented views; -1: asked in every step
    teacher_epochs: float = 0.0  # train the teacher first, for so many passes; 0 takes it as it comes
    epochs: float = 30.0  # passes over the training data
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    lr: float = 1e-3  # learning rate at the top of its cosine
    lr_warmup: float = 0.05  # part of the run over which the learning rate rises
    weight_decay: float = 0.01  # of all trained weights
    clip: float = 5.0  # largest gradient norm

    def __post_init__(self) -> None:
        for name in ("beta", "temperature", "student_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.subclasses < 1 or self.most < 2 or not 0 <= self.label <= 1:
            raise UserError(
                f"subclasses >= 1, most >= 2 and label in [0, 1] are needed, got {self.subclasses}, {self.most}, "
                f"{self.label}"
            )
        self.plain()

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = ("null_space", "rotate", "assign", "most")
        if self.label == 1:
            names = ("beta", "temperature", "student_temperature", *found)
            return dict.fromkeys(names, "--label 1 learns from the labels alone")
        if self.subclasses == 1:
            return dict.fromkeys(("beta", *found), "--subclasses 1 is plain distillation")
        return dict.fromkeys(found, "--beta inf says nothing of sub-classes") if math.isinf(self.beta) else {}

    def plain(self, objective: tuple[str, ...] = (), label: float = 1.0) -> Plain:
        """The same run as a plain distillation by these objectives: what teachers and baselines take."""
        return Plain(
            objective=objective, label=label, cache=self.cache, teacher_epochs=self.teacher_epochs, epochs=self.epochs,
            batch=self.batch, optimizer=self.optimizer, lr=self.lr, lr_warmup=self.lr_warmup,
            weight_decay=self.weight_decay, clip=self.clip,
        )  # fmt: skip
