"""Settings of a peer-set run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of one peer-set run; every field is a flag."""

    ratios: tuple[float, ...] = (
        0.0,
        0.3,
        0.5,
        0.7,
    )  # part of the budget each peer gives up, ascending
    rule: str = "wml"  # wml, independent, dml, cl-ilr, kdcl-{mean,naive,linear,minlogit,general}, one, okddip, sandwich
    share: Literal["tree", "nested", "none"] = "tree"  # what peers share: a trunk, every weight, nothing
    trunk: tuple[str, ...] = ()  # last shared module, one for all or one per peer; empty takes about half of the MACs
    measure: Literal["macs", "params"] = "macs"  # what ratios are a part of
    score: Literal["snip", "l1", "bn"] = "snip"  # importance of channels
    scope: Literal["inside", "all"] = "inside"  # prune inside residual blocks only, or coupled block outputs too
    layer_bound: float = 0.9  # largest part of a layer that may go
    round_to: int = 1  # keep multiples of this many channels
    init: Literal["inherit", "fresh"] = "inherit"  # peers start from the base's weights, or each from a seed of its own
    alpha: float = 0.5  # weight of teaching against labels
    ramp: float = 0.0  # part of the run over which alpha grows from 0 (sigmoid ramp; the literature uses 80/300)
    temperature: float = 3.0  # T of every KL
    detach: bool = True  # WML: no gradient to the teaching side
    eta: float = 0.1  # mirror-descent step of the importance; 0 keeps it uniform
    floor: float = 0.02  # part of the importance that is always uniform
    clip_h: float = 1.0  # clip of the centred hypergradient
    outer: Literal["ensemble", "weighted_ce"] = "ensemble"  # held-out loss that the importance minimises
    outer_every: int = 10  # steps between importance updates
    warmup: float = 1.0  # epochs before the first importance update
    hypergradient: Literal["jvp", "grad", "fd"] = "jvp"  # how its inner products are taken
    at: Literal["before", "after"] = "before"  # outer gradient before or after the virtual inner step
    second_term: bool = True  # False keeps only the direct term of the hypergradient
    neumann: int = 0  # further terms of the implicit hypergradient
    gamma: float = 0.0  # inner step size of the hypergradient; 0 takes m times the learning rate
    held_out: float = 0.1  # part of the training data that the importance is judged on
    outer_batch: int = 0  # samples of either kind per importance update; 0 takes half the batch
    epochs: float = 30.0  # passes over the training data
    merge_epochs: float = 0.0  # further passes with the held-out part merged in and the importance frozen
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has Nesterov momentum 0.9
    lr: float = 0.1  # learning rate at the top of its cosine
    lr_warmup: float = 0.05  # part of the run over which the learning rate rises
    weight_decay: float = 5e-4  # of all trained weights
    clip: float = 5.0  # largest gradient norm
    ema: float = 0.0  # decay of an exponential moving average of the weights; 0 has none
    views: bool = False  # every peer sees another augmentation of each image (KDCL); not with share tree
    two_pass: bool = False  # one peer's activations in memory at a time, for one more forward pass

    def __post_init__(self) -> None:
        check_config(self)


def check_config(c: Config) -> None:
    """One line for every setting that cannot be."""
    if not c.ratios:
        raise UserError("ratios: expected at least one number in [0, 1), got none")
    for r in c.ratios:
        if not 0 <= r < 1:
            raise UserError(f"ratios: expected numbers in [0, 1) (part of the budget given up), got {r}")
    if list(c.ratios) != sorted(c.ratios):
        raise UserError(f"ratios: expected them from the largest student to the smallest (ascending), got {c.ratios}")
    ranges: dict[str, tuple[float, float]] = {
        "alpha": (0, 1), "ramp": (0, 1), "floor": (0, 1), "held_out": (0, 0.9), "ema": (0, 1), "lr_warmup": (0, 1),
        "eta": (0, math.inf), "lr": (0, math.inf), "weight_decay": (0, math.inf), "epochs": (0, math.inf),
        "merge_epochs": (0, math.inf), "temperature": (1e-3, math.inf), "clip_h": (1e-9, math.inf),
        "clip": (1e-9, math.inf), "layer_bound": (0, 1), "outer_every": (1, math.inf), "batch": (1, math.inf),
        "round_to": (1, math.inf), "outer_batch": (0, math.inf), "neumann": (0, 100), "warmup": (0, math.inf),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= getattr(c, name) <= high or math.isnan(getattr(c, name)):
            raise UserError(f"{name}: expected a number from {low} to {high}, got {getattr(c, name)}")
    if c.share == "nested" and c.init == "fresh":
        raise UserError("init fresh: nested peers share every weight and cannot start apart; use --share none or tree")
    if c.init == "inherit" and not c.views and len(set(c.ratios)) < len(c.ratios):
        remedy = "give each its own ratio" if c.share == "nested" else "give --init fresh"
        raise UserError(f"ratios {c.ratios} repeat: equal peers would stay equal for ever; {remedy}")
    if c.views and c.share == "tree":
        raise UserError("views: peers with a shared trunk must see the same input; use --share none or nested")
    if c.two_pass and c.rule in ("one", "okddip"):
        raise UserError(f"two_pass: rule {c.rule} needs the peers' features, which are not stored; drop --two-pass")
    if c.trunk and len(c.trunk) not in (1, len(c.ratios)):
        raise UserError(f"trunk: expected one module or one per peer ({len(c.ratios)}), got {len(c.trunk)}")
