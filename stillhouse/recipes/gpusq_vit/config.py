"""Settings of a GPUSQ-ViT run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.plain import Moves
from stillhouse.students.patterns import Pattern


@dataclass(frozen=True)
class Config(Moves):
    """Settings of a GPUSQ-ViT run; every field is a flag."""

    bits: int = 8  # of weights and activations, 2 to 8
    pattern: str = ""  # N:M, or N:M:UNIT in units of neighbours; empty: 2:4, from 4 bits down 4:8 in pairs
    include: tuple[str, ...] = ()  # only these modules (paths or patterns); empty: all linear layers and convolutions
    exclude: tuple[str, ...] = ()  # leave these modules as they are
    head: bool = False  # also the classifier
    compare: tuple[str, ...] = ()  # modules whose outputs are compared; empty: the last stage, or third of the blocks
    alpha: float = 1.0  # weight of the labels' cross-entropy
    beta: float = 10.0  # weight of the KL to the teacher's logits
    gamma: float = 5.0  # weight of the features of samples on which both agree
    temperature: float = 2.0  # T of the KL
    weighting: Literal["inverse", "share", "none"] = "inverse"  # w_i of the second stage, from the errors of the first
    labels: Literal["given", "dense"] = "given"  # dense: the dense network's answers in place of labels
    teacher_epochs: float = 0.0  # train the dense network first, for so many passes; 0 takes it as it comes
    epochs: float = 10.0  # passes of the sparse stage
    quantized_epochs: float = 5.0  # passes of the quantised stage
    calibrate: int = 512  # training samples from which the ranges of activations are taken
    percentile: float = 100.0  # of |activation| that is a batch's range; 100 is the largest
    momentum: float = 0.9  # of the running mean of the ranges
    ranges: float = 0.5  # part of the quantised stage in which ranges follow, before they are fixed
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    lr: float = 1e-4  # of the sparse stage, at the top of its cosine
    quantized_lr: float = 5e-5  # the same for the quantised stage
    teacher_lr: float = 1e-3  # the same for the dense network's own training
    lr_warmup: float = 0.05  # part of a stage over which the learning rate rises
    weight_decay: float = 0.05  # of all trained weights
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits: expected 2 to 8, got {self.bits}")
        self.sparsity  # noqa: B018 – says what is wrong with it
        if not self.temperature > 0 or not 0 < self.percentile <= 100 or self.calibrate < 1:
            raise UserError(
                "expected temperature > 0, percentile in (0, 100] and calibrate >= 1, got "
                f"{self.temperature}, {self.percentile}, {self.calibrate}"
            )
        own = ("alpha", "beta", "gamma", "epochs", "quantized_epochs", "lr", "quantized_lr")
        for name, low in {**self.LEAST, **dict.fromkeys(own, 0)}.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        if not 0 <= self.ranges <= 1 or not 0 <= self.momentum < 1:
            raise UserError(f"expected ranges in [0, 1] and momentum in [0, 1), got {self.ranges}, {self.momentum}")
        if (self.epochs or self.quantized_epochs) and not (self.alpha or self.beta or self.gamma):
            raise UserError("alpha, beta and gamma are all 0: nothing to learn; give --epochs 0 --quantized-epochs 0")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = {}
        if self.include:
            found["head"] = "--include names the layers"
        if not self.alpha:
            found["labels"] = "--alpha 0 asks for none"
        if not self.beta:
            found["temperature"] = "--beta 0 has no KL"
        if not self.gamma:
            found |= dict.fromkeys(("compare", "weighting"), "--gamma 0 compares no features")
        if not self.teacher_epochs:
            found["teacher_lr"] = "--teacher-epochs 0 does not train the dense network first"
        if not self.epochs:
            found["lr"] = "--epochs 0 does not train the sparse stage"
        if not self.quantized_epochs:
            rest = ("quantized_lr", "weighting", "ranges")
            found |= dict.fromkeys(rest, "--quantized-epochs 0 does not train the quantised stage")
        return found

    @property
    def sparsity(self) -> Pattern:
        """What the weights get."""
        return Pattern.parse(self.pattern or ("2:4" if self.bits > 4 else "4:8:2"))
