"""Settings of a TinyCLIP run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of a TinyCLIP run; every field is a flag."""

    inherit: Literal["manual", "auto", "fresh"] = "manual"  # by hand; by learned gates; fresh weights in manual's shape
    keep: tuple[float, ...] = (0.75, 0.5)  # per stage: part of the teacher's blocks (manual) or prunable weights (auto)
    image_depth: tuple[int, ...] = ()  # manual, per stage: blocks of the image tower, instead of keep
    text_depth: tuple[int, ...] = ()  # the same of the text tower
    image_width: tuple[int, ...] = ()  # manual, per stage: channels of the image tower (default: as they are)
    text_width: tuple[int, ...] = ()  # the same of the text tower
    alpha: float = 1.0  # part of affinity mimicking in the loss; the rest is InfoNCE on the pairs
    weight: float = 1.0  # of the loss, beside the gates' penalty
    scale: float = 50.0  # logit scale of teacher and student; 0: the teacher's own, the student's is learned (1 to 100)
    epochs: float = 6.0  # passes of each stage
    mask_steps: int = 3000  # auto: steps with gates at the beginning of each stage
    ramp_steps: int = 1000  # auto: steps over which the wanted sparsity rises to a stage's target
    gate_lr: float = 0.02  # auto: learning rate of gates and of the budget's multipliers
    teacher_epochs: float = 0.0  # train the teacher first, by InfoNCE; 0 takes it as it comes
    batch: int = 1024  # pairs per step, over all processes: the affinities are among these
    optimizer: Literal["adamw", "sgd"] = "adamw"  # adamw has betas 0.9 and 0.98; sgd is plain
    lr: float = 1e-4  # learning rate at the top of its cosine
    teacher_lr: float = 5e-4  # the same for the teacher's own training
    lr_warmup: float = 0.1  # part of a stage over which the learning rate rises (auto: over mask_steps instead)
    weight_decay: float = 0.2  # of matrices; vectors have none
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        least = {"weight": 0, "scale": 0, "epochs": 0, "mask_steps": 1, "ramp_steps": 0, "gate_lr": 0,
                 "teacher_epochs": 0, "batch": 2, "lr": 0, "teacher_lr": 0, "weight_decay": 0, "clip": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1 or not 0 <= self.lr_warmup < 1:
            raise UserError(f"alpha in [0, 1] and lr_warmup in [0, 1) are needed, got {self.alpha}, {self.lr_warmup}")
        if not self.keep or not all(0 < k <= 1 for k in self.keep) or list(self.keep) != sorted(self.keep)[::-1]:
            raise UserError(f"keep: expected parts in (0, 1] that do not grow, such as 0.75 0.5, got {self.keep}")
        for name in ("image_depth", "text_depth", "image_width", "text_width"):
            sizes = getattr(self, name)
            if sizes and self.inherit == "auto":
                raise UserError(f"{name}: sizes by hand are for --inherit manual; gates find their own")
            if sizes and (len(sizes) != len(self.keep) or min(sizes) < 1):
                raise UserError(
                    f"{name}: expected a positive size for each of the {len(self.keep)} stages in keep, got {sizes}"
                )

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = dict[str, str]()
        if self.inherit != "auto":
            found |= dict.fromkeys(("mask_steps", "ramp_steps", "gate_lr"), "it is of --inherit auto")
        elif not self.teacher_epochs:
            found |= {"lr_warmup": "with --inherit auto the rate rises over --mask-steps"}
        if not self.teacher_epochs:
            found |= {"teacher_lr": "nothing is trained without --teacher-epochs"}
        return found
