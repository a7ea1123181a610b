"""Settings of a MEAL V2 run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of a MEAL V2 run; every field is a flag."""

    discriminator: Literal["adversarial", "joint", "none"] = "adversarial"  # student against it (paper), with it (code)
    push: float = 1.0  # factor on the discriminator's gradient to the student
    last_relu: bool = True  # the discriminator ends in a ReLU, as in the released code
    narrowest: int = 8  # least width of its hidden layers, which are C/8 and C/64 for C classes
    soft: float = 1.0  # weight of the teachers' mean answer
    label: float = 0.0  # weight of the labels' cross-entropy; the method has none
    cache: int = -1  # -1: teachers see the student's view; V: ask them once for V views; 0: once for the plain image
    topk: int = 0  # probabilities kept per cached view, the rest spread evenly (5 in the released code); 0 keeps all
    crops: int = 1  # views of one image in a batch
    cutmix: float = 0.0  # a of Beta(a, a): rectangles are exchanged between images, and teachers asked about those
    epochs: float = 180.0  # passes over the training data
    batch: int = 512  # views per step, over all processes
    lr: float = 0.01  # learning rate of SGD with momentum 0.9, of student and discriminator
    drop: float = 100 / 180  # part of the run after which the learning rate is a tenth
    weight_decay: float = 0.0  # trained weights are not to be shrunk
    student_epochs: float = 0.0  # train the student on labels first, for so many passes; 0 takes it as it comes
    teacher_epochs: float = 0.0  # the same for the teachers
    label_lr: float = 0.1  # top of the cosine in training on labels

    def __post_init__(self) -> None:
        least = {"push": 0, "soft": 0, "label": 0, "cache": -1, "topk": 0, "crops": 1, "batch": 1, "narrowest": 1,
                 "cutmix": 0, "student_epochs": 0, "teacher_epochs": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        if not (self.epochs > 0 and self.lr > 0 and 0 < self.drop < 1):
            raise UserError(f"needs epochs > 0, lr > 0, 0 < drop < 1; got {self.epochs}, {self.lr}, {self.drop}")
        if not self.soft and not self.label:
            raise UserError("soft and label are both 0: there is nothing to learn; give --soft 1")
        if (self.cache > 0 and self.cache % self.crops) or self.batch % self.crops:
            raise UserError(f"cache and batch must be multiples of crops={self.crops}, got {self.cache}, {self.batch}")
        if self.topk and self.cache < 0:
            raise UserError("topk: only cached answers are shortened; give --cache too")
        if self.cutmix and (self.cache >= 0 or self.crops > 1):
            raise UserError("cutmix: teachers are asked about the mixed image, so it goes with cache -1 and crops 1")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = {}
        if self.discriminator == "none":
            found = dict.fromkeys(("push", "last_relu", "narrowest"), "--discriminator none has no discriminator")
        if not (self.student_epochs or self.teacher_epochs):
            found["label_lr"] = "nothing is trained on labels first"
        return found
