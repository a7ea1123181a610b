"""Settings of a PELA run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.plain import Moves


@dataclass(frozen=True)
class Config(Moves):
    """Settings of a PELA run; every field is a flag."""

    ratio: float = 2.0  # c: the two thin layers have 1/c of a layer's weights
    rank: int = 0  # one rank for all chosen layers, instead of the ratio
    modules: tuple[str, ...] = ()  # linear layers to factorise, by path or pattern; empty: all but the network's ends
    skip: tuple[str, ...] = ()  # names left whole: paths, or parts of them such as attn.proj
    least_outputs: int = 10  # layers with fewer outputs stay whole
    start: Literal["svd", "fresh"] = "svd"  # the thin layers start from singular vectors, or fresh
    task: float = 1.0  # weight of the labels' cross-entropy
    feature: float = 1.0  # a: weight of the error at the compared outputs
    logits: float = 0.0  # b: weight of the error at the logits
    perturbation: float = 1.0  # g: weight of the bound on the weights' deviation
    epsilon: float = 1e-3  # the largest deviation of a weight that the bound pulls to
    compare: tuple[str, ...] = ()  # modules whose outputs are compared; empty: every block
    labelled: float = 1.0  # part of the training labels that is used; the other terms see all samples
    teacher_epochs: float = 0.0  # train the network first, for so many passes; 0 takes it as it comes
    epochs: float = 20.0  # passes of the intermediate stage, against the network before
    tune_epochs: float = 0.0  # passes of plain fine-tuning behind it
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    lr: float = 1e-4  # learning rate at the top of its cosine
    teacher_lr: float = 1e-3  # the same for the network's own training
    lr_warmup: float = 0.05  # part of a stage over which the learning rate rises
    weight_decay: float = 0.05  # of all trained weights
    label_smoothing: float = 0.0  # part of each label that is spread over all classes
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        if not self.ratio > 1:
            raise UserError(f"ratio: expected a number above 1, got {self.ratio}; a pair at 1 saves nothing")
        own = ("rank", "task", "feature", "logits", "perturbation", "epsilon", "epochs", "tune_epochs", "lr")
        least = {**self.LEAST, **dict.fromkeys(own, 0), "least_outputs": 1}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        if not 0 < self.labelled <= 1 or not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"labelled in (0, 1] and label_smoothing in [0, 1) are needed, got {self.labelled}, "
                f"{self.label_smoothing}; --task 0 uses no labels"
            )
        if self.epochs and not (self.task or self.feature or self.logits or self.perturbation):
            raise UserError("task, feature, logits and perturbation are all 0: there is nothing to learn; --epochs 0")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = {}
        if self.rank:
            found["ratio"] = "--rank gives all layers one rank"
        if not self.teacher_epochs:
            found["teacher_lr"] = "--teacher-epochs 0 does not train the network first"
        if not self.feature:
            found["compare"] = "--feature 0 compares nothing"
        if not self.perturbation:
            found["epsilon"] = "--perturbation 0 leaves its term out"
        if not self.epochs:
            terms = ("task", "feature", "logits", "perturbation", "epsilon", "compare")
            found |= dict.fromkeys(terms, "--epochs 0 leaves the intermediate stage out")
        if not ((self.task and self.epochs) or self.tune_epochs):
            found |= dict.fromkeys(("labelled", "label_smoothing"), "no stage learns from labels")
        return found
