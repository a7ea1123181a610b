"""The rows of the contract table.

Every recipe is in the table as soon as its ``experiment.py`` has

* ``TINY``: the smallest Config that touches everything, and
* ``tiny(run, cfg) -> outcome``: that run in about a second, where ``outcome.save(folder)`` writes all it gives.

A recipe that has nothing more to say adds nothing here. Further settings of it that deserve the whole contract are
rows in `MORE`; what its distillation weight 0 must equal is a pair in `ZERO`; rows that can be split over processes
(no batch statistics) are named in `JOINT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse import recipes
from stillhouse.run import Run


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe and how its TINY settings are changed."""

    recipe: str
    name: str = "tiny"
    changes: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the recipe's `tiny`
    micro_batch: int | None = None

    def __str__(self) -> str:
        return f"{self.recipe}-{self.name}"

    def config(self, **changes: Any) -> Any:
        return replace(recipes.experiment(self.recipe).TINY, **{**self.changes, **changes})

    def make(self, folder: str | Path, **options: Any) -> Any:
        """The outcome of this row's run in `folder`."""
        options = {"device": "cpu", "quiet": True, "log_every": 1, "micro_batch": self.micro_batch, **options}
        return recipes.experiment(self.recipe).tiny(Run(folder, **options), self.config(), **self.extra)


def cnn() -> dict[str, Any]:
    from stillhouse.models import ModelSpec

    return {"base": ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 8, 16]})}


MORE = [
    Row("wml", "merge", {"merge_epochs": 1.0}),
    Row("wml", "nested", {"share": "nested", "trunk": (), "optimizer": "sgd", "lr": 0.05}),
    Row("wml", "none-fd-after", {"share": "none", "trunk": (), "hypergradient": "fd", "at": "after"}),
    Row("wml", "batchnorm", {"trunk": ()}, cnn()),
    Row("wml", "nested-batchnorm", {"share": "nested", "trunk": ()}, cnn()),
    Row("wml", "ema", {"ema": 0.9, "ramp": 0.5}),
    Row("wml", "two-pass", {"two_pass": True, "share": "none", "trunk": ()}),
    Row("wml", "micro", {}, micro_batch=10),
    Row("wml", "dml", {"rule": "dml"}),
    Row("wml", "kdcl-general", {"rule": "kdcl-general"}),
    Row("wml", "one", {"rule": "one"}),
    Row("wml", "okddip", {"rule": "okddip", "ratios": (0.0, 0.25, 0.5)}),
    Row("wml", "sandwich", {"rule": "sandwich", "share": "nested", "trunk": (), "lr": 1e-3}),
]

ROWS = [Row(name) for name in recipes.names()] + MORE

# (left, right): these two runs give the same bytes. Only rounding could part them, and there is none: m·(1/m)·CE is
# exact for m a power of two (here 2), and 0·teaching adds zeros to the gradient.
_APART = {"share": "none", "trunk": ()}
ZERO = [
    (
        Row("wml", "alpha 0, eta 0", {**_APART, "alpha": 0.0, "eta": 0.0}),
        Row("wml", "independent", {**_APART, "rule": "independent"}),
    ),
    *(
        (
            Row("wml", f"{rule}, alpha 0", {**_APART, "rule": rule, "alpha": 0.0}),
            Row("wml", "independent", {**_APART, "rule": "independent"}),
        )
        for rule in ("dml", "kdcl-mean", "kdcl-minlogit")
    ),
]

# Plain SGD: an adaptive optimiser turns a gradient that is zero but for rounding into a whole step.
_SGD = {"optimizer": "sgd", "lr": 0.05}
JOINT = [
    Row("wml", "independent", {**_SGD, "rule": "independent"}),
    Row("wml", "tree", _SGD),
    Row("wml", "uneven", {**_SGD, "batch": 31, "outer_batch": 15}),
    Row("wml", "after", {**_SGD, "at": "after", "share": "none", "trunk": ()}),
    Row("wml", "dml", {**_SGD, "rule": "dml", "merge_epochs": 1.0}),
]
