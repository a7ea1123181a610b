"""Settings of a distillation from similar tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.similarity import metric

SELECTS = ("metric", "rule", "power", "tune", "minmax", "cutoff", "probes", "folds")  # what a selection depends on


@dataclass(frozen=True)
class Config:
    """Settings of a distillation from similar tasks; every field is a flag."""

    metric: str = "parc"  # similarity of a source's task: parc, leep, nce, h-score, knn, logistic
    rule: Literal["weighted", "nearest"] = "weighted"  # all sources by their weights, or the most similar alone
    power: float = 12.0  # p of the weights: 0 weighs all alike, a large one leaves the most similar
    tune: tuple[float, ...] = ()  # powers to choose from instead, by what the mixture says of held-out labels
    minmax: bool = False  # scale the scores to 0…1 first, which leaves the least similar source out
    cutoff: float = 0.01  # sources with less weight are dropped, and never see the pool
    probes: int = 1000  # most labelled samples that the similarity is measured on
    folds: int = 3  # of the cross-validation that sets the penalty of each source's linear classifier
    label: float = 0.2  # λ, the share of the labels' cross-entropy; the rest is the sources'
    half: bool = False  # keep the sources' answers in 16 bits
    epochs: float = 100.0  # passes over the pool
    batch: int = 64  # pool samples per step, over all processes
    labelled_batch: int = 32  # labelled samples per step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has Nesterov momentum 0.9
    lr: float = 0.05  # learning rate at the top of its cosine
    lr_warmup: float = 0.05  # part of the run over which the learning rate rises
    weight_decay: float = 5e-4  # of all weights
    clip: float = 5.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        metric(self.metric)
        ranges: dict[str, tuple[float, float]] = {
            "power": (0, 1e6), "cutoff": (0, 1), "probes": (2, math.inf), "folds": (2, math.inf), "label": (0, 1),
            "batch": (1, math.inf), "labelled_batch": (1, math.inf), "lr": (0, math.inf), "lr_warmup": (0, 1),
            "weight_decay": (0, math.inf), "clip": (0, math.inf),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}: expected a number from {low} to {high}, got {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise UserError(f"epochs: expected a positive number, got {self.epochs}")
        if any(not 0 <= p <= 1e6 for p in self.tune):
            raise UserError(f"tune: expected powers from 0 to 1e6, got {self.tune}")
        if self.tune and self.rule == "nearest":
            raise UserError("tune: chooses the power of the weights; rule nearest has none, drop one of them")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside these, and why."""
        if self.label == 1:
            return dict.fromkeys((*SELECTS, "half"), "with --label 1 no source is asked")
        found = {"labelled_batch": "with --label 0 no label is read"} if self.label == 0 else {}
        if self.tune:
            found["power"] = "--tune chooses it"
        if self.rule == "nearest":
            found |= dict.fromkeys(("power", "minmax", "cutoff"), "--rule nearest has one source and no weights")
        return found
