"""Settings of LGTM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.plain import Plain


@dataclass(frozen=True)
class Config:
    """Settings of an LGTM run; every field is a flag."""

    influence: Literal["exact", "sgd", "released", "none"] = "exact"  # how the student's held-out loss leads it
    strength: float = 1.0  # factor on the influence; 0 trains both together without it, as none does
    derivative: Literal["autograd", "fd"] = "autograd"  # fd: by differences, as released; no second derivatives
    radius: float = 0.01  # length of the two steps of fd
    alpha_student: float = 1.0  # a_s: weight of the teacher against the labels in the student's loss
    alpha_teacher: float = 0.4  # a_t: weight of the student against the labels in the teacher's loss
    temperature: float = 1.0  # T of both KLs, which have no factor T²
    held_out: float = 0.1  # part of the training data that judges the student, where the data bring no held-out part
    zero_heads: bool = True  # both heads start at 0; turn it off where the teacher's head is trained already
    teacher_epochs: float = 0.0  # train the teacher alone first, for so many passes
    epochs: float = 6.0  # passes over the training data, both together
    batch: int = 32  # samples per step, over all processes; as many held-out ones
    optimizer: Literal["sgd", "adamw"] = "adamw"  # of both; sgd has Nesterov momentum 0.9
    lr: float = 3e-5  # the student's learning rate; 3e-5 is for pre-trained encoders, from scratch 1e-3 is usual
    teacher_lr: float = 3e-5  # the teacher's learning rate
    lr_warmup: float = 0.05  # part of the run over which the learning rates rise; then a cosine
    weight_decay: float = 0.01  # of all trained weights
    clip: float = 1.0  # largest gradient norm of each

    def __post_init__(self) -> None:
        for name in ("alpha_student", "alpha_teacher"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a weight in [0, 1], got {getattr(self, name)}")
        for name in ("temperature", "radius"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out: expected a part of the training data in (0, 1), got {self.held_out}")
        if not self.strength >= 0 or not self.teacher_lr >= 0:
            raise UserError(
                f"strength and teacher_lr: expected numbers from 0, got {self.strength} and {self.teacher_lr}"
            )
        self.plain()

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside these, and why."""
        if self.influence == "none":
            return dict.fromkeys(("strength", "derivative", "radius"), "--influence none trains both without it")
        if self.strength == 0:
            return dict.fromkeys(("influence", "derivative", "radius"), "--strength 0 trains both without it")
        return {"radius": "--derivative autograd takes no steps"} if self.derivative == "autograd" else {}

    def plain(self, objective: tuple[str, ...] = (), label: float = 1.0) -> Plain:
        """The student's side of the run as a plain distillation: what baselines take."""
        return Plain(
            objective=objective, label=label, teacher_epochs=self.teacher_epochs, epochs=self.epochs, batch=self.batch,
            optimizer=self.optimizer, lr=self.lr, lr_warmup=self.lr_warmup, weight_decay=self.weight_decay,
            clip=self.clip,
        )  # fmt: skip

    def teachers(self) -> Plain:
        """The same with the teacher's learning rate."""
        return replace(self.plain(), lr=self.teacher_lr)
