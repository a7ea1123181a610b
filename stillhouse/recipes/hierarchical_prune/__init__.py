"""HierarchicalPrune: a diffusion transformer without its least needed parts, repaired from there on, and packed."""

from typing import Any

TITLE = "HierarchicalPrune: a diffusion transformer without its least needed parts, its tail repaired, in 4 bits"
FAMILY = "model"
GIVES = "a smaller diffusion transformer, and the same with 4-bit weights on disk"
SOURCE = "code-checked"
PAPER = "AAAI 2026, arXiv 2508.04663"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.hierarchical_prune import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
