"""WAD: few labels, and a pool of unlabelled samples in which unknown classes are mixed."""

from typing import Any

TITLE = "WAD: few labels and a pool polluted by unknown classes, weighed by what an encoder sees"
FAMILY = "model"
GIVES = "one classifier of the classes of interest, a weight for every pool sample, and which ones were taken in"
SOURCE = "code-checked"
PAPER = "Du, Zhao, Sheng, Li, Chen, ICCV 2023, arXiv 2308.11874"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.wad import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
