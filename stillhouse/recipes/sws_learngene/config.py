"""Settings of an SWS run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.plain import Plain


@dataclass(frozen=True)
class Config:
    """Settings of an SWS run; every field is a flag."""

    depths: tuple[int, ...] = (6, 9, 12)  # layers of the networks that are wanted
    depth: int = 0  # layers of the auxiliary network (16 published); 0: as many as the model has
    stages: tuple[int, ...] = ()  # layers of each stage, which share one block; empty: as even as they get
    genes: int = 5  # number of stages, where their sizes are not given
    blocks: str = ""  # path of the model's list of blocks; empty finds it
    alpha: float = 1.0  # weight of the teacher against the labels; 1 uses no labels
    temperature: float = 1.0  # T of the KL
    element_mean: bool = False  # divide the KL by the number of classes, as released
    drop_path: float = 0.1  # stochastic depth of the last layer, rising from 0 at the first; 0 has none
    mixup: float = 0.0  # a of Beta(a, a) for mixed images, in both stages (0.8 published); 0 does not mix
    teacher_epochs: float = 0.0  # train the teacher first, for so many passes; 0 takes it as it comes
    epochs: float = 150.0  # passes for the auxiliary network
    tune_epochs: float = 10.0  # passes for each wanted network; 0 leaves them as they start
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    lr: float = 5e-4  # learning rate of the auxiliary network at the top of its cosine
    tune_lr: float = 5e-5  # the same for the wanted networks
    teacher_lr: float = 1e-3  # the same for the teacher
    lr_warmup: float = 0.03  # part of the auxiliary's and the teacher's training over which the rate rises
    weight_decay: float = 0.05  # of all trained weights; a shared one decays once per step
    label_smoothing: float = 0.1  # part of each label that is spread over all classes, in tuning
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) < len(self.depths):
            raise UserError(f"depths: expected different numbers of layers from 1, got {self.depths}")
        if not 0 <= self.alpha <= 1 or not self.temperature > 0 or not 0 <= self.drop_path < 1:
            raise UserError(
                f"alpha in [0, 1], temperature above 0 and drop_path in [0, 1) are needed, got {self.alpha}, "
                f"{self.temperature}, {self.drop_path}"
            )
        least = {"depth": 0, "genes": 1, "mixup": 0, "teacher_epochs": 0, "tune_epochs": 0, "batch": 1, "lr": 0,
                 "tune_lr": 0, "clip": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        if not self.epochs > 0:
            raise UserError(f"epochs: expected a positive number, got {self.epochs}")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside these, and why."""
        found = {"genes": "--stages says how many there are"} if self.stages else {}
        if not self.alpha:
            found |= dict.fromkeys(("temperature", "element_mean"), "--alpha 0 does not ask the teacher")
        if not self.teacher_epochs:
            found["teacher_lr"] = "the teacher is not trained without --teacher-epochs"
        if not self.tune_epochs:
            found |= dict.fromkeys(("tune_lr", "label_smoothing"), "--tune-epochs 0 leaves the networks as they start")
        return found

    def moves(self, lr: float, warmup: float) -> Plain:
        """The optimiser's part of the settings, as plain distillation has them."""
        return Plain(
            (), batch=self.batch, optimizer=self.optimizer, lr=lr, lr_warmup=warmup, weight_decay=self.weight_decay,
            clip=self.clip,
        )  # fmt: skip
