"""The distillation score: one number for size and lost accuracy, and what must stand beside it."""

from typing import Any

TITLE = "Distillation score: which student is worth its size"
FAMILY = "model"
GIVES = "size and score ratios, DS, the front and intervals of any students beside their teacher; a ladder of students"
SOURCE = "reconstructed from the abstract and general knowledge of the formula"
PAPER = "Alkhulaifi, Alsahli, Ahmad, PeerJ Computer Science 2021, arXiv 2007.09029"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.distillation_metric import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
