"""Settings of a search and of the training of what it finds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError
from stillhouse.search import Measure, Strategy


@dataclass(frozen=True)
class Config:
    """Settings of one search and of the training of what it finds; every field is a flag."""

    space: str = "resnet"  # resnet, resnet-widths, resnet-small, conv, cell, or package.module:function
    budget: float = 0.0  # largest cost of a student; 0 takes the teacher's own
    measure: Measure = "params"  # what the budget counts: params, macs (per image), latency (ms, one CPU thread)
    metric: Literal["both", "relation", "semantic"] = "both"  # score: −(R + S), −R or −S
    semantic: Literal["auto", "channel", "class"] = "auto"  # S between channels, or classes where channels differ
    scoring: Literal["random", "trained"] = "random"  # weights of the teacher in scoring
    init: Literal["normal", "own"] = "normal"  # weights of the students in scoring: N(0, 1), or as they are built
    repeats: int = 3  # random initialisations and batches that a score is the mean of
    score_batch: int = 64  # images in each of these batches
    strategy: Strategy = "evolution"  # evolution, random, or all (for a space that can be listed)
    evaluations: int = 200  # students to propose
    population: int = 20  # of the evolution
    sample: int = 10  # drawn from the population for each child
    best: int = 5  # of the sample, among which the parent is chosen
    students: int = 1  # how many of the best to train
    alpha: float = 0.9  # weight of the teacher's logits against the labels
    T: float = 4.0  # temperature
    b1: float = 0.0  # DisWOT+: weight of R between teacher and student in training
    b2: float = 0.0  # DisWOT+: weight of ICC
    teacher_epochs: float = 60.0  # passes over the training data for the teacher; 0 takes it as it comes
    epochs: float = 60.0  # for each student
    batch: int = 64  # samples per step, over all processes
    lr: float = 0.05  # learning rate of SGD at the top of its cosine
    weight_decay: float = 5e-4  # of all trained weights

    def __post_init__(self) -> None:
        inf = math.inf
        ranges = {
            "alpha": (0, 1), "T": (1e-3, inf), "b1": (0, inf), "b2": (0, inf), "repeats": (1, inf), "epochs": (0, inf),
            "score_batch": (2, inf), "students": (1, inf), "teacher_epochs": (0, inf), "batch": (1, inf),
            "lr": (0, inf), "weight_decay": (0, inf), "budget": (0, inf),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}: expected a number from {low:g} to {high:g}, got {getattr(self, name)}")
        kinds = {"metric": ("both", "relation", "semantic"), "semantic": ("auto", "channel", "class"),
                 "scoring": ("random", "trained"), "init": ("normal", "own"),
                 "strategy": ("evolution", "random", "all"), "measure": ("params", "macs", "latency")}  # fmt: skip
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}: expected {', '.join(known)}, got {getattr(self, name)!r}")
