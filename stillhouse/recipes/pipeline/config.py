"""Settings of a pipeline, and its steps as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stillhouse.errors import UserError, did_you_mean
from stillhouse.plain import Plain

EXPORTS = ("onnx", "onnx-packed", "onnx-int8", "torch-export")
FORMS = {
    "train": "train[:EPOCHS]", "prune": "prune:RATIO", "factor": "factor:RATIO", "sparsify": "sparsify:N:M",
    "distill": "distill[:EPOCHS]", "quantize": "quantize:intBITS (2 to 8)",
    "export": "export:" + ", export:".join(EXPORTS),
}  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {"quantize": ("train", "bucket")}


@dataclass(frozen=True)
class Step:
    """One step, as text ``NAME[:VALUE][?OPTION=NUMBER&…]``.

    Example:
        >>> Step.parse("quantize:int8?train=0")
        Step(name='quantize', value='int8', options={'train': 0.0})
    """

    name: str
    value: str = ""
    options: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Step:
        """The step that a text describes.

        Raises:
            UserError: an unknown name or option, or a value out of range.
        """
        body, _, query = text.strip().partition("?")
        name, _, value = body.partition(":")
        if name not in FORMS:
            raise UserError(f"steps: no step {name!r}; {did_you_mean(name, FORMS)}")
        options: dict[str, float] = {}
        for pair in filter(None, query.split("&")):
            key, _, number = pair.partition("=")
            if key not in OPTIONS.get(name, ()):
                known = did_you_mean(key, OPTIONS.get(name, ()))
                raise UserError(f"steps: {name} has no option {key!r}; {known}")
            options[key] = _number(number, f"steps: {text!r}: {key}")
        step = Step(name, value, options)
        step.check()
        return step

    def check(self) -> None:
        """Raises UserError where the value is none of this step's."""
        try:
            fits = {
                "train": lambda: not self.value or float(self.value) > 0,
                "distill": lambda: not self.value or float(self.value) > 0,
                "prune": lambda: 0 < float(self.value) < 1,
                "factor": lambda: 0 < float(self.value) < 1,
                "sparsify": lambda: bool(re.fullmatch(r"\d+:\d+", self.value)) and 0 < self.n_of_m[0] < self.n_of_m[1],
                "quantize": lambda: 2 <= self.bits <= 8,
                "export": lambda: self.value in EXPORTS,
            }[self.name]()
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"steps: {self.text!r} is not of the form {FORMS[self.name]} with a value that can be")
        if self.options.get("train", 0) < 0 or self.options.get("bucket", 0) < -1:
            raise UserError(f"steps: {self.text!r}: train takes epochs >= 0, bucket -1, 0 or more")

    @property
    def text(self) -> str:
        return self.name + (f":{self.value}" if self.value else "")

    @property
    def bits(self) -> int:
        return int(self.value.removeprefix("int"))

    @property
    def n_of_m(self) -> tuple[int, int]:
        n, m = self.value.split(":")
        return int(n), int(m)

    def epochs(self, default: float) -> float:
        return float(self.value) if self.value else default


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where} needs a number, got {text!r}") from None


@dataclass(frozen=True)
class Config:
    """Settings of a pipeline; every field is a flag."""

    steps: tuple[str, ...] = (
        "prune:0.5",
        "distill",
        "quantize:int8",
    )  # in order; the page has their forms
    kd: float = 0.9  # weight of the teacher in distill and quantize; the labels have the rest
    temperature: float = 4.0  # T of the KL
    measure: Literal["macs", "params"] = "macs"  # prune: what its ratio is a part of
    score: Literal["snip", "l1", "bn"] = "snip"  # prune: importance of channels
    scope: Literal["inside", "all"] = "inside"  # prune: inside residual blocks only, or coupled block outputs too
    exclude: tuple[str, ...] = ()  # modules that are neither factorised, sparsified nor quantised
    epochs: float = 30.0  # passes of train, and of distill where the step does not say
    quantize_epochs: float = 5.0  # passes with quantised weights where the step does not say; ?train=0: none
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has Nesterov momentum 0.9
    lr: float = 0.05  # learning rate of train and distill at the top of their cosine
    quantize_lr: float = 0.005  # of quantize
    lr_warmup: float = 0.05  # part of a stage over which the learning rate rises
    weight_decay: float = 5e-4  # of all trained weights
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        if not 0 <= self.kd <= 1 or not self.temperature > 0:
            raise UserError(f"expected kd in [0, 1] and temperature > 0, got {self.kd}, {self.temperature}")
        if not (self.epochs > 0 and self.quantize_epochs >= 0 and self.batch >= 1 and self.clip >= 0):
            raise UserError("expected epochs > 0, quantize_epochs >= 0, batch >= 1 and clip >= 0")
        check_order(self.parsed)

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing in these steps, and why."""
        steps, found = self.parsed, dict[str, str]()
        names = {s.name for s in steps}

        def without(of: str, settings: tuple[str, ...]) -> None:
            found.update(dict.fromkeys(settings, f"no step is {of}"))

        quantized = [s for s in steps if s.name == "quantize" and s.options.get("train", self.quantize_epochs)]
        if "prune" not in names:
            without("prune", ("measure", "score", "scope"))
        if not names & {"factor", "sparsify", "quantize"}:
            without("factor, sparsify or quantize", ("exclude",))
        if not any("train" not in s.options for s in steps if s.name == "quantize"):
            without("a quantize that leaves its epochs open", ("quantize_epochs",))
        if not any(s.name in ("train", "distill") and not s.value for s in steps):
            without("a train or distill that leaves its epochs open", ("epochs",))
        if not quantized:
            without("a quantize that trains", ("quantize_lr",))
        if not names & {"train", "distill"}:
            without("train or distill", ("lr",))
        if not quantized and not names & {"train", "distill"}:
            without("one that trains", ("optimizer", "lr_warmup", "weight_decay", "clip"))
        if not quantized and "distill" not in names:
            without("one that asks the teacher", ("kd", "temperature"))
        elif not self.kd:
            found["temperature"] = "--kd 0 does not ask the teacher"
        return found

    @property
    def parsed(self) -> list[Step]:
        return [Step.parse(text) for word in self.steps for text in word.split(",") if text.strip()]

    def plain(self, lr: float, epochs: float) -> Plain:
        """One training stage as plain distillation has it."""
        return Plain(
            objective=(), label=1.0, epochs=epochs, batch=self.batch, optimizer=self.optimizer, lr=lr,
            lr_warmup=self.lr_warmup, weight_decay=self.weight_decay, clip=self.clip,
        )  # fmt: skip


def check_order(steps: list[Step]) -> None:
    """Refuses steps that undo or cannot follow one another.

    Raises:
        UserError: the pair, and what to do.
    """
    if not steps:
        raise UserError("steps: expected at least one, such as prune:0.5,distill,quantize:int8")
    names = [s.name for s in steps]
    for late, early in (("prune", "sparsify"), ("factor", "sparsify"), ("prune", "quantize"), ("factor", "quantize"),
                        ("sparsify", "quantize")):  # fmt: skip
        if early in names and late in names[names.index(early) :]:
            raise UserError(f"steps: {late} cannot follow {early}, which is bound to the weights; put {late} first")
    for once in ("sparsify", "quantize"):
        if names.count(once) > 1:
            raise UserError(f"steps: {once} stands there {names.count(once)} times; give it once")
    if any(s.value == "onnx-packed" and "quantize" not in names[:k] for k, s in enumerate(steps)):
        raise UserError("steps: export:onnx-packed stores quantised weights; put quantize:int8 before it")
    if "train" in names[1:]:
        raise UserError("steps: train makes the network that the pipeline starts from; put it first")
    if all(n == "export" for n in names):
        raise UserError("steps: export alone is a command: stillhouse export RUN --to onnx")
