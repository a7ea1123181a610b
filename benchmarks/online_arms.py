"""The arms, data sets and settings of benchmarks/online.py (and of pipeline.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from online_report import ALONE

from stillhouse.recipes.wml.experiment import PRESET
from stillhouse.recipes.wml.recipe import Config

ARMS: dict[str, dict[str, Any]] = {
    "separate": {"rule": "independent", "share": "none"},  # nothing shared, no teaching: what each model does alone
    "independent": {"rule": "independent"},
    "dml": {"rule": "dml"},
    "kdcl-general": {"rule": "kdcl-general"},
    "one": {"rule": "one"},
    "okddip": {"rule": "okddip"},
    "uniform": {"rule": "wml", "eta": 0.0},
    "wml": {"rule": "wml"},
    "wml-first-term": {"rule": "wml", "second_term": False},
    "wml+merge": {"rule": "wml", "merge": 0.2},  # the last fifth of the steps with the held-out part merged in
}
VARIANTS = ("clean", "poison", "noise")
MUTUAL = [a for a in ARMS if a not in ALONE]
WEIGHED = [a for a, c in ARMS.items() if c["rule"] == "wml" and c.get("eta") != 0.0]  # whose importance moves
TRIED = {"alphas": [0.25, 0.5, 0.75], "ramps": [0.0, 0.3], "etas": [0.03, 0.3], "floors": [0.02, 0.1]}
TUNE_SEED = 100


@dataclass(frozen=True)
class Setting:
    """A data set with its network and the settings that all arms have in common."""

    model: str
    seeds: int
    steps: int
    cfg: Config
    options: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "digits": Setting("stillhouse:mlp", 5, 240, PRESET, {"widths": [64, 64]}),
    "fashion-mnist": Setting(
        "stillhouse:cnn", 3, 780,
        Config(ratios=(0.0, 0.3, 0.6, 0.8), trunk=("block1",), lr=0.05, outer_every=5),
    ),
    "cifar10": Setting("stillhouse:resnet8", 3, 3120, Config(ratios=(0.0, 0.3, 0.5, 0.7), lr=0.1, alpha=0.3)),
}  # fmt: skip
