"""Settings of distilling step-by-step; the four arms of the released script are four of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from stillhouse.errors import UserError

PHRASE = "So the answer is"  # between rationale and label where both are one target


@dataclass(frozen=True)
class Config:
    """Settings of one run; every field is a flag."""

    model_type: Literal["task_prefix", "standard", "single_task"] = "task_prefix"  # standard: labels alone, no prefix
    label_type: Literal["gt", "llm"] = "gt"  # training labels: gold, or the teacher's (valid and test are always gold)
    alpha: float = 0.5  # weight of the label loss; the rationale loss has 1 − alpha
    predict: str = "predict: "  # prefix of the first task
    explain: str = "explain: "  # prefix of the second
    plain_prefix: bool = False  # give `standard` the first prefix, too
    max_input: int = 1024  # most tokens of an input, prefix included
    max_target: int = 256  # most tokens of a label or rationale
    max_generated: int = 64  # most tokens of an answer
    too_long: Literal["cut", "stop"] = "cut"  # texts over these budgets: cut at the end and counted, or refused
    steps: int = 0  # optimiser steps; 0 takes the published 10000, and 500 for models trained from scratch
    batch: int = 64  # examples per step, over all processes
    lr: float = 0.0  # falls linearly to 0; 0 takes the published 5e-5, and 2e-3 for models trained from scratch
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd is plain
    weight_decay: float = 0.0  # of the optimiser
    clip: float = 1.0  # largest gradient norm (1 is the default of the released code's trainer); 0 does not clip
    eval_every: int = 250  # steps between judgements on valid, the best of which is kept; 0 keeps the last weights
    lora: int = 0  # rank of LoRA adapters, merged at the end; 0 trains every weight

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must lie in [0, 1], got {self.alpha}")
        zero = dict.fromkeys(("steps", "eval_every", "lora", "lr", "weight_decay", "clip"), 0)
        for name, least in {"max_input": 2, "max_target": 1, "max_generated": 1, "batch": 1, **zero}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.model_type == "task_prefix" and self.predict == self.explain:
            raise UserError(f"predict and explain must be different prefixes, both are {self.predict!r}")

    def settled(self, scratch: bool = False) -> Config:
        """With the numbers that 0 stands for."""
        steps, lr = (500, 2e-3) if scratch else (10_000, 5e-5)
        return replace(self, steps=self.steps or steps, lr=self.lr or lr)

    def weights(self) -> dict[str, float]:
        """View → weight of its loss; views of weight 0 are left out."""
        both = {"predict": self.alpha, "explain": 1 - self.alpha}
        return {k: w for k, w in both.items() if w} if self.model_type == "task_prefix" else {"predict": 1.0}

    def prefixes(self) -> dict[str, str]:
        """View → what stands before the input; `predict` is there even if its weight is 0."""
        if self.model_type != "task_prefix":
            return {"predict": self.predict if self.plain_prefix and self.model_type == "standard" else ""}
        return {"predict": self.predict} | ({"explain": self.explain} if self.alpha < 1 else {})

    @property
    def behind(self) -> str:
        """What an answer stands behind in the student's output; empty where the output is the answer."""
        return PHRASE if self.model_type == "single_task" else ""

    @property
    def longest_answer(self) -> int:
        return self.max_target if self.model_type == "single_task" else self.max_generated
