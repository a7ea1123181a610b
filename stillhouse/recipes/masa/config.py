"""Settings of a MASA run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of a MASA run; every field is a flag."""

    way: Literal["train", "fit"] = "train"  # shared from the first step; or a trained network, without training
    variant: Literal["qkv", "qkvo"] = "qkv"  # which projections are shared; each kind has a dictionary of its own
    projections: tuple[str, ...] = ()  # a block's layers by name, such as q=attn.to_q k=attn.to_k; empty finds them
    blocks: str = ""  # path of the list of blocks; empty finds it
    atoms: int = 0  # S, matrices in a dictionary; 0: a third of the layers (train), what leaves the least error (fit)
    coefficients: Literal["network", "free"] = "network"  # train: codes from an MLP that is dropped, or free ones
    embedding: int = 32  # width of a block's embedding, which the MLP reads
    hidden: int = 64  # width of the MLP
    code_lr: float = 0.1  # learning rate of that MLP, in parts of lr
    ratio: float = 0.2  # fit: part of the shared matrices' weights that goes
    groups: int = 0  # fit: runs of blocks with dictionaries of their own; 0: one for every four blocks
    calibration: int = 128  # fit: training samples that the network is asked about
    whiten: bool = True  # fit: what is left over is fitted where inputs are, not evenly
    damping: float = 1e-4  # fit: of the inputs' second moments, in parts of their mean
    base_steps: int = 0  # fit: train the network first, for so many steps; 0 takes it as it comes
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd has momentum 0.9
    steps: int = 1000  # optimiser steps
    batch: int = 32  # samples per step, over all processes
    lr: float = 3e-3  # learning rate at the top of its cosine
    lr_warmup: float = 0.1  # part of the steps over which the learning rate rises
    weight_decay: float = 0.1  # of matrices; biases, norms and all that makes codes have none
    clip: float = 1.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        least = {"atoms": 0, "embedding": 1, "hidden": 1, "groups": 0, "code_lr": 0, "calibration": 1,
                 "damping": 0, "base_steps": 0, "steps": 1, "batch": 1, "lr": 0, "weight_decay": 0,
                 "clip": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}: expected a number from {low}, got {getattr(self, name)}")
        for name in ("ratio", "lr_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a part in [0, 1], got {getattr(self, name)}")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others, and why."""
        found: dict[str, str] = {}
        if self.way == "train":
            own = ["ratio", "groups", "calibration", "whiten", "damping", "base_steps"]
            found |= dict.fromkeys(own, "it is of --way fit")
        if self.way == "fit":
            own = ["coefficients", "embedding", "hidden", "code_lr", "steps"]
            found |= dict.fromkeys(own, "it is of --way train")
            if not self.base_steps:
                own = ["optimizer", "lr", "lr_warmup", "weight_decay", "clip"]
                found |= dict.fromkeys(own, "--way fit trains nothing without --base-steps")
            if not self.whiten:
                found["damping"] = "--no-whiten has no moments to damp"
        elif self.coefficients == "free":
            found |= dict.fromkeys(("embedding", "hidden", "code_lr"), "--coefficients free has no network for them")
        if self.projections:
            found["variant"] = "--projections names the layers"
        return found
