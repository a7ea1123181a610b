"""Settings of a CAST run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.students.patterns import Pattern
from stillhouse.text.language import Training


@dataclass(frozen=True)
class Config:
    """Settings of a CAST run; every field is a flag."""

    method: Literal["cast", "ste", "fixed"] = "cast"  # AdamS; straight-through as AST; one mask, then fine-tuning
    pattern: str = "2:4"  # N:M, weights that stay of every M along a layer's input; N:M:UNIT in units of neighbours
    modules: tuple[str, ...] = ()  # linear layers to make sparse, by path or pattern; empty: all in the blocks
    skip: tuple[str, ...] = ()  # layers left dense, by path or pattern
    refresh: int = 10  # steps between two choices of the masks
    blocks: int = 2  # cast: parts of a row with a trained factor each; 0: no factors
    teach: float = 1 / 3  # weight of the model as it was, as the teacher; the text has the rest
    temperature: float = 1.0  # of the teacher's KL
    decay: float | None = None  # cast: λ, the pull on masked weights; default: ten times the mean |gradient| at first
    ste_decay: float = 1e-4  # ste: decay of masked weights at its end
    ste_ramp: float = 1.0  # ste: part of the steps over which that decay rises
    reach: float = 3.0  # cast: least way a weight can go, in mean weights of its layer; 0 does not check
    dense_steps: int = 0  # train the model first, for so many steps; 0 takes it as it comes
    dense_lr: float = 3e-3  # learning rate of that, at the top of its cosine
    steps: int = 1000  # optimiser steps; 0: prune once and train nothing
    batch: int = 32  # windows per step, over all processes
    lr: float = 0.0  # at the top of its cosine; 0 (cast): the one with which a weight can go 4 mean weights far
    lr_warmup: float = 0.1  # part of the steps over which the learning rate rises
    clip: float = 1.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        if self.sparsity.n == self.sparsity.m:
            raise UserError(f"pattern: {self.pattern} leaves every weight; 2:4 is what hardware knows")
        if not 0 <= self.teach <= 1 or not self.temperature > 0:
            raise UserError(
                f"expected teach in [0, 1] and temperature > 0, got teach {self.teach}, temperature {self.temperature}"
            )
        if self.decay is not None and not self.decay >= 0:
            raise UserError(f"decay: expected a number from 0, got {self.decay}")
        least = {"refresh": 1, "blocks": 0, "ste_decay": 0, "reach": 0, "dense_steps": 0, "dense_lr": 0,
                 "steps": 0, "batch": 1, "lr": 0, "clip": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        for name in ("lr_warmup", "ste_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a part of the steps in [0, 1], got {getattr(self, name)}")
        if self.method != "cast" and self.steps and not self.lr:
            raise UserError(f"lr: method {self.method} needs one; only cast can derive it from how far weights must go")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        of = {"cast": ("blocks", "decay", "reach"), "ste": ("ste_decay", "ste_ramp")}
        found = {name: f"it is of --method {m}" for m, names in of.items() if m != self.method for name in names}
        if self.method == "fixed":
            found |= {"refresh": "--method fixed chooses its masks once"}
        if not self.teach:
            found |= {"temperature": "--teach 0 asks no teacher"}
        if not self.steps:
            of_training = ("refresh", "teach", "temperature", "lr", "decay", "reach", *of["ste"])
            found |= dict.fromkeys(of_training, "--steps 0 trains nothing")
        if not self.dense_steps:
            found |= {"dense_lr": "the model is taken as it comes without --dense-steps"}
        return found

    @property
    def sparsity(self) -> Pattern:
        """The pattern that ``pattern`` names."""
        return Pattern.parse(self.pattern)

    def training(self, lr: float) -> Training:
        """The loop's part of the settings."""
        return Training(max(1, self.steps), self.batch, lr, self.lr_warmup, 0.0, self.clip)

    def dense(self) -> Training:
        """The same for the model's own training before."""
        return Training(max(1, self.dense_steps), self.batch, self.dense_lr, self.lr_warmup, clip=self.clip)
