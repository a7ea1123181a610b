"""DSFormer: a trained text transformer whose linear weights are stored as dense × semi-structured sparse."""

from typing import Any

TITLE = "DSFormer: linear weights of a trained text transformer as dense × semi-structured sparse factors"
FAMILY = "model"
GIVES = "the same network with every chosen weight as a thin dense matrix times a sparse one, of a given size on disk"
SOURCE = "reconstructed"
PAPER = "DSFormer, 2023, arXiv 2312.13211"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.dsformer import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
