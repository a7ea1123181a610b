"""Settings of a weight-aware distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of a weight-aware distillation; every field is a flag."""

    teacher: Literal["pca", "simclr"] = "simclr"  # encoder where none is given: whitened PCA, or SimCLR trained first
    components: int = 20  # pca: principal components
    body: str = "stillhouse:cnn"  # simclr: the encoder's structure, by name (the paper: torchvision:resnet18)
    simclr_epochs: float = 100.0  # simclr: passes over labelled samples and pool (the paper has 700 to 2,000)
    simclr_batch: int = 128  # simclr: images per step, two views of each
    simclr_lr: float = 0.1  # simclr: learning rate at the top of its cosine, after a warm-up over a tenth
    simclr_temperature: float = 0.5  # simclr: temperature of NT-Xent
    projection: int = 128  # simclr: width of the projection head, whose output is compared
    crop: float = 0.2  # least part of an image's area in a view; 1 does not crop
    colour: float = 0.4  # strength of a view's brightness and contrast changes; 0 has none
    augmented: bool = True  # compare one random view of each image, drawn anew in every round, instead of the plain one
    rounds: int = 5  # R: how often samples are taken in; there is one more round of training
    steps: int = 1500  # of training in each round
    grow: float = 0.1  # a: (1 − r/R)² of this part of the pool is taken in after round r
    weight: Literal["gap", "similarity", "product", "none"] = "gap"  # of a pool sample: S1 − S2, S1, S1·(S1 − S2), 1
    beta: float = 1.0  # weight of the pool's term; 0 learns from the labels alone
    recheck: bool = False  # samples taken in leave again where the other ones of the bank name another class
    whiten: bool = False  # contrast normalisation and ZCA whitening in front of the student (the authors' for CIFAR-10)
    batch: int = 32  # labelled samples per step, and as many of the pool
    optimizer: Literal["adam", "sgd"] = "adam"  # starts afresh in every round; sgd has Nesterov momentum 0.9
    lr: float = 5e-4  # learning rate
    flip: bool = True  # mirror half of the images
    shift: int = 2  # most pixels that an image is shifted, padded by reflection
    noise: float = 0.15  # standard deviation of the noise on the student's inputs
    shared: bool = True  # one mirroring and one shift for a whole batch, as in the authors' code

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "components": (1, math.inf), "simclr_batch": (2, math.inf), "simclr_lr": (0, math.inf),
            "simclr_temperature": (1e-3, math.inf), "projection": (1, math.inf), "crop": (0.01, 1), "colour": (0, 0.9),
            "rounds": (0, 1000), "steps": (1, math.inf), "grow": (0, 1), "beta": (0, math.inf), "batch": (1, math.inf),
            "lr": (0, math.inf), "shift": (0, math.inf), "noise": (0, math.inf),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}: expected a number from {low} to {high}, got {getattr(self, name)}")
        if not 0 < self.simclr_epochs < math.inf:
            raise UserError(f"simclr_epochs: expected a positive number, got {self.simclr_epochs}")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        of_simclr = ("body", "simclr_epochs", "simclr_batch", "simclr_lr", "simclr_temperature", "projection")
        names = of_simclr if self.teacher == "pca" else ("components",)
        found = dict.fromkeys(names, f"it is not of --teacher {self.teacher}")
        if self.teacher == "pca" and not self.augmented:
            found |= dict.fromkeys(("crop", "colour"), "no view is drawn without --augmented or --teacher simclr")
        if self.beta == 0:
            found["weight"] = "--beta 0 learns from the labels alone"
        if self.grow == 0 or self.rounds == 0:
            found["recheck"] = "nothing is taken in with --grow 0 or --rounds 0"
        return found
