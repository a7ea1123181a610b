"""Settings of HierarchicalPrune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.diffusion.process import Density, Weighting
from stillhouse.errors import UserError, did_you_mean
from stillhouse.recipes.hierarchical_prune.parts import CHILDREN, FINE
from stillhouse.students.removed import Leaves


@dataclass(frozen=True)
class Config:
    """Settings of a run; every field is a flag."""

    mode: Literal["position", "least-drop", "manual", "hybrid"] = "position"  # how parts are chosen, see the page
    budget: float = 0.8  # part of the parameters that may stay: removing stops at the first value below it; 1: nothing
    blocks: tuple[int, ...] = ()  # blocks that manual and hybrid remove whole, from 0
    components: tuple[str, ...] = ()  # what may be removed (position: block; others: all but block), see the page
    low: int = 0  # first block of which parts may be removed
    high: int = -1  # last block of which parts may be removed, counted from the end where negative
    leaves: Leaves = "input"  # what stands for a removed attn or ff: its input, as released, or zero
    remeasure: int = 0  # measure impacts anew after so many removals; 0 never
    metric: str = "samples"  # what impact is measured by: samples, velocity, or package.module:function
    calibration: int = 64  # samples that are made, or noised, for one measurement
    sample_steps: int = 8  # steps of sampling, in the measurement and of the student
    kappa: float = 1.0  # guidance of sampling, p(no) + kappa (p(y) - p(no)); 1 is none
    train: Literal["after", "all"] = "after"  # what learns: all behind the first removed part, or everything
    train_blocks: tuple[int, ...] = ()  # or exactly these blocks
    sensitivity: Literal["auto", "impact", "mask"] = "auto"  # impact: lower rates for needed parts; auto: from 25 % on
    task: float = 0.0  # weight of the error at x_0
    output: float = 1.0  # weight of the distance to the teacher's prediction
    feature: float = 1e-4  # weight of the distance to the teacher's block outputs
    density: Density = "logit_normal"  # of the times in training, for a flow
    weighting: Weighting = "one"  # of the samples by their noise, for a flow
    drop: float = 0.1  # part of the samples without their condition, where the teacher knows what stands for none
    steps: int = 64000  # of repair; 0 removes only
    batch: int = 64  # samples per step
    optimizer: Literal["adamw", "sgd"] = "adamw"  # adamw has betas (0.9, 0.999); sgd no momentum
    lr: float = 1e-4  # learning rate
    decay: bool = False  # the learning rate falls to 0 as a cosine; otherwise it is constant
    weight_decay: float = 1e-4  # of all that learns
    clip: float = 1.0  # largest gradient norm
    pack: Literal["nf4", "none"] = "nf4"  # nf4: give the student a second time with 4-bit weights
    null_class: int | None = None  # the teacher's label for "no class"
    prediction: Literal["auto", "epsilon", "sample", "v_prediction", "flow_prediction"] = "auto"  # of the teacher

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise UserError(f"budget: the part of the parameters that may stay lies in (0, 1], got {self.budget}")
        if self.mode in ("manual", "hybrid") and not self.blocks:
            raise UserError(f"mode {self.mode} removes the blocks that are named; give --blocks")
        if self.mode not in ("manual", "hybrid") and self.blocks:
            raise UserError(f"blocks are named for the modes manual and hybrid, and this is {self.mode}; drop them")
        for name in self.components:
            if name not in CHILDREN and name != "block":
                raise UserError(f"no component {name!r}; {did_you_mean(name, ['block', *CHILDREN])}")
        if self.metric not in ("samples", "velocity") and ":" not in self.metric:
            raise UserError(f"metric: expected samples, velocity or package.module:function, got {self.metric!r}")
        for name, least in (("calibration", 1), ("sample_steps", 1), ("batch", 1), ("steps", 0), ("remeasure", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if min(self.task, self.output, self.feature) < 0 or not self.task + self.output + self.feature > 0:
            raise UserError("task, output and feature are weights from 0, and one of them must be above it")
        if not 0 <= self.drop < 1 or self.clip <= 0 or self.lr <= 0:
            raise UserError(f"drop lies in [0, 1), lr and clip above 0; got {self.drop}, {self.lr} and {self.clip}")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside these, and why."""
        chosen, found = ("low", "high", "budget", "remeasure"), dict[str, str]()
        if self.mode == "manual":
            found |= dict.fromkeys(chosen, "--mode manual removes the blocks that are named, and nothing else")
        if not self.steps:
            trained = ("train", "train_blocks", "sensitivity", "task", "output", "feature", "density", "weighting",
                       "drop", "batch", "optimizer", "lr", "decay", "weight_decay", "clip")  # fmt: skip
            found |= dict.fromkeys(trained, "--steps 0 repairs nothing")
        elif self.train_blocks:
            found["train"] = "--train-blocks says what learns"
        return found

    @property
    def chosen_from(self) -> tuple[str, ...]:
        """The components that may be removed by impact."""
        return self.components or (("block",) if self.mode == "position" else FINE)
