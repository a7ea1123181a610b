"""MASA: attention whose matrices are mixes of a few that all layers share."""

from typing import Any

TITLE = "MASA: attention weights of all layers as mixes of a few shared matrices, trained so or fitted in closed form"
FAMILY = "model"
GIVES = "the same transformer with half to two thirds fewer attention weights, or a trained one with a fifth fewer"
SOURCE = "paper-text"
PAPER = "AAAI 2026, arXiv 2508.04581"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Shared", "distill"):
        from stillhouse.recipes.masa import recipe

        return getattr(recipe, name)
    if name in ("Coded", "Coefficients"):
        from stillhouse.recipes.masa import codes

        return getattr(codes, name)
    if name == "fitted":
        from stillhouse.recipes.masa import fitting

        return fitting.fitted
    raise AttributeError(name)
