"""The settings of online distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of the distillation of a query; every field is a flag."""

    k: int = 100  # documents of the first stage, and of every second one
    terms: int = 40  # terms that the distilled query keeps (those of the question come on top)
    ridge: float = 200.0  # λ of the first fit, over all terms of the first documents
    refit_ridge: float = 100.0  # λ of the second fit, over the terms that are kept
    mix: float = 0.3  # share of the question's own terms in the executed query; 0 is the student alone
    rounds: int = 1  # distil, search and re-rank so many times; ends early when nothing new is found
    student: Literal["ridge", "lasso", "listwise"] = "ridge"  # how the term weights are fitted
    lasso: float = 0.02  # penalty of the lasso
    temperature: float = 1.0  # T of the listwise student
    non_negative: bool = True  # only weights >= 0, which engines with dynamic pruning (WAND, MaxScore) need
    min_df: int = 1  # documents of the pool that a kept term must occur in (2 keeps out terms of one document)

    def __post_init__(self) -> None:
        for name, least in (("k", 2), ("terms", 1), ("rounds", 1), ("min_df", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.mix <= 1:
            raise UserError(f"mix is the question's share in the executed query, in [0, 1]; got {self.mix}")
        for name in ("ridge", "refit_ridge"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("lasso", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.student not in ("ridge", "lasso", "listwise"):
            raise UserError(f"student must be ridge, lasso or listwise, got {self.student!r}")
