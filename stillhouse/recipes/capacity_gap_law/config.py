"""Settings of the system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.recommend.sizes import parse_size
from stillhouse.text.language import Training


@dataclass(frozen=True)
class Config:
    """Pruned initialisation and distillation; the defaults are MiniMA's, the length of training is not."""

    sizes: tuple[str, ...] = ()  # parameters of the students, such as 3B or 60k; by default the law's for each teacher
    counts: Literal["all", "blocks"] = "all"  # parameters that count in students and teachers; blocks: no embeddings
    shape: tuple[int, ...] = ()  # instead of sizes: width, heads, neurons of every block (MiniMA: 3072 24 8192)
    drop: tuple[int, int] = (0, 0)  # blocks to leave out at the beginning and the end (MiniMA: 4 4)
    units: Literal["gradient", "random"] = "gradient"  # what stays: by gradients of masks, or any units
    start: Literal["pruned", "fresh"] = "pruned"  # the students' first weights: their teacher's, or drawn
    calibration: int = 16  # batches for the importance of units
    calibration_batch: int = 8  # windows in each of them
    multiple: int = 8  # width and neurons of a block are multiples of this
    alpha: float = 0.5  # weight of the teacher; the text's own cross-entropy has 1 − alpha
    temperature: float = 1.0  # of both distributions
    chunk: int = 4096  # tokens whose logits are held at once; 0: all
    teacher_steps: int = 0  # train the teachers first, for so many steps; 0 takes them as they come
    teacher_lr: float = 3e-3  # learning rate of that
    steps: int = 1000  # optimiser steps of each distillation
    batch: int = 32  # windows per step, over all processes
    optimizer: Literal["adamw", "sgd"] = "adamw"  # adamw has β 0.9 and 0.95 and does not decay biases and norms
    lr: float = 3e-4  # learning rate at the top of its cosine
    lr_warmup: float = 0.01  # part of the run over which the learning rate rises
    weight_decay: float = 0.1  # of weight matrices
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    judged: int = 0  # test windows on which students are judged, spread evenly; 0: all

    def __post_init__(self) -> None:
        self.training(self.lr, self.steps)
        for size in self.sizes:
            if not (parse_size(size) or 0) >= 1:
                raise UserError(f"sizes: expected numbers of parameters such as 3B, 60k or 6e8, got {size!r}")
        if self.shape and (len(self.shape) != 3 or min(self.shape) < 1):
            raise UserError(f"shape: expected width, heads and neurons of every block, got {list(self.shape)}")
        if self.shape and self.sizes:
            raise UserError(
                "shape: it and sizes both say what the students are; give one of them (the built-in experiment has "
                f"sizes {' '.join(self.sizes)}: bring --teacher or --model for a shape)"
            )
        least = {"calibration": 1, "calibration_batch": 1, "multiple": 1, "chunk": 0, "teacher_steps": 0, "judged": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise UserError(f"expected alpha in [0, 1] and temperature > 0, got {self.alpha} and {self.temperature}")
        if min(self.drop) < 0:
            raise UserError(f"drop: expected two numbers of blocks from 0, got {list(self.drop)}")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = dict[str, str]()
        if self.units == "random":
            found |= dict.fromkeys(("calibration", "calibration_batch"), "--units random reads no text")
        if not self.alpha:
            found |= {"temperature": "--alpha 0 asks no teacher"}
        if not self.teacher_steps:
            found |= {"teacher_lr": "teachers are taken as they come without --teacher-steps"}
        if self.shape:
            found |= {"multiple": "--shape says the sizes"}
        if self.optimizer == "sgd" and not self.teacher_steps:
            found |= {"weight_decay": "it is of --optimizer adamw"}
        return found

    def training(self, lr: float, steps: int) -> Training:
        """How a network is trained with this learning rate for so long."""
        return Training(steps, self.batch, lr, self.lr_warmup, self.weight_decay, self.clip)
