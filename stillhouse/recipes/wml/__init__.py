"""WML: one run trains peers of many sizes together, each heard as much as it deserves."""

from typing import Any

TITLE = "Weighted Mutual Learning: a family of smaller models from one run"
FAMILY = "model"
GIVES = "a family of pruned models of different sizes, their importance weights and their weighted ensemble"
SOURCE = "reconstructed"
PAPER = "Zhang et al., NeurIPS 2022"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Mutual", "distill"):
        from stillhouse.recipes.wml import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
