"""Settings of a G2SD run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from stillhouse.errors import UserError
from stillhouse.plain import Plain, optimizer_of


@dataclass(frozen=True)
class Config:
    """Settings of a G2SD run; every field is a flag. Learning rates are per 256 samples of a batch."""

    mask: float = 0.75  # part of the patches that both networks do not see in the generic stage
    layer: int = 4  # block of the teacher's decoder whose output is the target, counted from 1
    beta: float = 2.0  # where the smooth L1 loss turns from a parabola into a line
    generic: Literal["features", "pixels", "none"] = "features"  # pixels: masked pre-training without the teacher
    specific: Literal["token", "nkd", "labels"] = "token"  # nkd: normalised KD instead; labels: no teacher
    hard: float = 0.5  # weight of the teacher's class for the distillation token, against the labels
    decoder: tuple[int, int] = (256, 4)  # width and blocks of the student's decoder, which is dropped afterwards
    teacher_decoder: tuple[int, int] = (512, 8)  # the same of an autoencoder that is pre-trained here
    teacher_epochs: float = 0.0  # pre-train the autoencoder first, for so many passes; 0 takes it as it comes
    tune_epochs: float = 50.0  # passes for fine-tuning it into the teacher, where no teacher is given
    generic_epochs: float = 300.0  # passes over all training images
    specific_epochs: float = 200.0  # passes over the labelled ones
    labelled: float = 1.0  # part of the training labels that may be used
    mixup: float = 0.8  # a of Beta(a, a) for mixed images of the specific stage; 0 does not mix
    cutmix: float = 1.0  # the same for exchanged rectangles
    label_smoothing: float = 0.1  # part of each label that is spread over all classes
    layer_decay: float = 0.75  # of the learning rate, per block away from the head, in the specific stage
    batch: int = 256  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    teacher_lr: float = 1.5e-4  # of the autoencoder's pre-training, at the top of its cosine
    tune_lr: float = 1e-3  # of its fine-tuning
    generic_lr: float = 1.5e-4  # of the generic stage
    specific_lr: float = 1e-3  # of the specific stage
    lr_warmup: float = 0.03  # part of each stage over which the rate rises
    weight_decay: float = 0.05  # of all trained matrices
    clip: float = 0.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        for name in ("mask", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        for name in ("labelled", "layer_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a number in (0, 1], got {getattr(self, name)}")
        if not 0 < self.hard < 1:
            raise UserError(f"hard: expected a number in (0, 1), for both heads are asked afterwards, got {self.hard}")
        least = {"layer": 1, "teacher_epochs": 0, "tune_epochs": 0, "mixup": 0, "cutmix": 0, "batch": 1, "clip": 0,
                 "teacher_lr": 0, "tune_lr": 0, "generic_lr": 0, "specific_lr": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        for name in ("beta", "generic_epochs", "specific_epochs"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("decoder", "teacher_decoder"):
            width, depth = getattr(self, name)
            if depth < 1 or width < 4 or width % 4 or width % max(1, width // 32):
                raise UserError(
                    f"{name}: expected a multiple of 32 as width and a depth from 1, got {width} and {depth}"
                )

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside these, and why."""
        found = {} if self.teacher_epochs else {"teacher_lr": "the autoencoder is not trained without --teacher-epochs"}
        if self.generic != "features":
            found |= dict.fromkeys(("layer", "beta"), f"--generic {self.generic} compares no features")
        if self.generic == "none":
            unused = ("decoder", "generic_epochs", "generic_lr", *(() if self.teacher_epochs else ("mask",)))
            found |= dict.fromkeys(unused, "--generic none leaves the generic stage out")
        if self.specific != "token":
            found["hard"] = f"--specific {self.specific} has one weight, of 1"
        if self.specific == "labels":
            found |= dict.fromkeys(("tune_epochs", "tune_lr"), "--specific labels asks no teacher")
        return found

    def reads_autoencoder(self, taught: bool) -> bool:
        """Whether the autoencoder is read: its features, or where no teacher is given its fine-tuned self."""
        return self.generic == "features" or (self.specific != "labels" and not taught)

    def moves(self, lr: float, samples: int) -> Plain:
        """The optimiser's part of a stage's settings on so many samples, as plain training has them."""
        batch = min(self.batch, samples)
        return Plain(
            (), batch=batch, optimizer=self.optimizer, lr=lr * batch / 256, lr_warmup=self.lr_warmup,
            weight_decay=self.weight_decay, clip=self.clip,
        )  # fmt: skip

    def pretrains(self, how: Plain) -> Any:
        """The optimiser of masked pre-training, whose second moment is shorter: β = (0.9, 0.95)."""
        made = optimizer_of(how)
        return partial(made, betas=(0.9, 0.95)) if made.func is torch.optim.AdamW else made
