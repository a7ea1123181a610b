"""Settings of quantised distillation and differentiable quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.plain import Plain


@dataclass(frozen=True)
class Config:
    """Settings of a quantised distillation; every field is a flag."""

    method: Literal["qd", "dq", "cycle"] = "qd"  # weights through the quantiser, its points alone, or both in turn
    bits: int = 4  # of a weight, 1 to 8; 2^bits values per tensor
    bucket: int = 256  # weights with one scale; 0: one per output channel, -1: one per tensor
    backward: Literal["plain", "truncated", "exact"] = "plain"  # qd: the gradient: of w, inside ±1, or exact
    rounding: Literal["nearest", "stochastic"] = "nearest"  # qd: stochastic draws in training only
    points: Literal["percentiles", "uniform"] = "percentiles"  # dq: where the points begin
    auto_bits: bool = False  # dq: share the points over the tensors by the size of their gradients
    include: tuple[str, ...] = ()  # quantise only these modules (paths or patterns); default: all that can be
    exclude: tuple[str, ...] = ()  # leave these modules in full precision, such as the first and the last
    kd: float = 0.7  # weight of the teacher; the labels have the rest
    temperature: float = 2.0  # T of the KL
    reduction: Literal["batch", "elements"] = "batch"  # KL per sample, or also divided by the classes (released code)
    ask: Literal["always", "cutoff", "random", "wrong"] = "always"  # qd: samples for which the teacher is asked
    cutoff: float = 0.5  # ask cutoff: the student's entropy in bits above which it is asked
    teacher_epochs: float = 0.0  # train the teacher first, for so many passes; 0 takes it as it comes
    student_epochs: float = 30.0  # distil in full precision first; 0 takes the student as it comes
    epochs: float = 15.0  # passes with quantised weights; cycle: whole ones, one of points between two
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # of weights; sgd has Nesterov momentum 0.9
    lr: float = 0.05  # of the stages in full precision, at the top of their cosine
    quantised_lr: float = 0.01  # of weights behind the quantiser
    point_lr: float = 1e-5  # dq: of the points, SGD with momentum 0.9; released: 1e-6 to 1e-4
    lr_warmup: float = 0.05  # part of a stage over which the learning rate rises
    weight_decay: float = 2.2e-4  # of weights; points have none
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.bucket < -1:
            raise UserError(f"expected bits from 1 to 8 and a bucket of -1, 0 or more, got {self.bits}, {self.bucket}")
        if not 0 <= self.kd <= 1 or not self.temperature > 0:
            raise UserError(f"expected kd in [0, 1] and temperature > 0, got {self.kd}, {self.temperature}")
        for name in ("cutoff", "teacher_epochs", "student_epochs", "lr", "quantised_lr", "point_lr", "clip"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        if not self.epochs > 0 or self.batch < 1:
            raise UserError(f"expected epochs > 0 and batch >= 1, got {self.epochs}, {self.batch}")
        if self.auto_bits and (self.method == "qd" or self.bits < 2):
            raise UserError(
                f"auto_bits shares points: it needs method dq or cycle and 2 bits, got {self.method} and {self.bits}"
            )

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found = dict[str, str]()
        if self.method == "dq":
            found |= dict.fromkeys(("backward", "rounding", "ask", "cutoff", "quantised_lr"), "it is of --method qd")
        if self.method == "qd":
            found |= dict.fromkeys(("points", "point_lr"), "it is of --method dq")
        if self.ask != "cutoff":
            found |= {"cutoff": "it is of --ask cutoff"}
        if not self.kd:
            found |= dict.fromkeys(("temperature", "reduction", "ask", "cutoff"), "--kd 0 asks no teacher")
        return found

    def plain(self, lr: float | None = None) -> Plain:
        """The same training as plain distillation has it: what its parts are called with."""
        return Plain(
            objective=(), label=1.0, teacher_epochs=self.teacher_epochs, epochs=self.epochs, batch=self.batch,
            optimizer=self.optimizer, lr=self.lr if lr is None else lr, lr_warmup=self.lr_warmup,
            weight_decay=self.weight_decay, clip=self.clip,
        )  # fmt: skip
