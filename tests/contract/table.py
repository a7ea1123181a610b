"""A row of the contract table."""

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
