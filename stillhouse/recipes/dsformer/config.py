"""Settings of a DSFormer run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.comparisons import Objective
from stillhouse.errors import UserError
from stillhouse.plain import Moves
from stillhouse.students.dense_sparse import Blocks


@dataclass(frozen=True)
class Config(Moves):
    """Settings of a DSFormer run; every field is a flag."""

    method: Literal["W", "C", "fixed", "svd"] = "W"  # what trains: W, D and a shadow of S, D·S as found, or low rank
    ratio: float = 0.3  # bytes of the chosen weights, places of S included, as a part of what they take now
    block: int = 16  # b: rows of S in a block
    nonzeros: tuple[int, ...] = (1,)  # t: values of a column in a block; of several the best one for each layer
    modules: tuple[str, ...] = ()  # linear layers to factorise, by path or pattern; empty: all but the network's ends
    skip: tuple[str, ...] = ()  # names left whole: paths, or parts of them such as attention.output
    least_outputs: int = 10  # layers with fewer outputs stay whole
    sweeps: int = 50  # of the factorisation before training
    per_step: int = 1  # W: sweeps after every step
    freeze: float = 0.15  # part of the steps, at the end, in which places stay and D and the values are trained
    kd: float = 0.5  # weight of the network as it was; the labels have the rest
    temperature: float = 2.0  # T of the KL
    teacher_epochs: float = 0.0  # train the network first, for so many passes; 0 takes it as it comes
    epochs: float = 5.0  # passes of training while the weights are factorised
    batch: int = 32  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    lr: float = 5e-5  # learning rate at the top of its cosine
    teacher_lr: float = 1e-3  # the same for the network's own training
    lr_warmup: float = 0.05  # part of a training over which the learning rate rises
    weight_decay: float = 0.01  # of all trained weights; W: of W itself
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio: expected a part of the bytes between 0 and 1, got {self.ratio}")
        for t in self.nonzeros or (0,):
            Blocks(self.block, t).check()
        for name, low in {**self.LEAST, "sweeps": 1, "per_step": 0, "freeze": 0, "kd": 0, "epochs": 0, "lr": 0,
                          "least_outputs": 1}.items():  # fmt: skip
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        if self.freeze > 1 or self.kd > 1 or not self.temperature > 0:
            raise UserError(
                f"expected freeze and kd in [0, 1] and a temperature above 0, got {self.freeze}, {self.kd}, "
                f"{self.temperature}"
            )

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = {}
        if self.method != "W":
            found["per_step"] = "it is of --method W"
        if self.method in ("fixed", "svd"):
            found["freeze"] = "it is of --method W and C, which search for places"
        if self.method == "svd":
            found |= dict.fromkeys(("block", "nonzeros", "sweeps"), "--method svd has no sparse factor")
        if not self.kd:
            found["temperature"] = "--kd 0 has no KL"
        if not self.teacher_epochs:
            found["teacher_lr"] = "--teacher-epochs 0 does not train the network first"
        if not self.epochs:
            found |= dict.fromkeys(("freeze", "kd", "temperature", "lr"), "--epochs 0 trains nothing")
        return found

    @property
    def losses(self) -> dict[str, object]:
        """What `Distill` is to minimise: (1 − kd)·CE + kd·T² KL to the network as it was."""
        return {"objectives": [Objective("kd", self.kd, options={"T": self.temperature})], "label": 1 - self.kd}
