"""SSLD: a small network learns from a strong one on far more images than there are labels for."""

from typing import Any

TITLE = "SSLD: distillation without labels on a mined pool of images"
FAMILY = "model"
GIVES = "one small classifier, taught on labelled and unlabelled images without using a label"
SOURCE = "code-checked, but for the mining script"
PAPER = "Cui et al. 2021, arXiv 2103.05959"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.ssld import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
