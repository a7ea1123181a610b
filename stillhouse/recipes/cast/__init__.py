"""CAST: exact N:M sparsity into which a language model is trained smoothly, masks and weights together."""

from typing import Any

TITLE = "CAST: a language model trained into exact N:M sparsity, so that the last pruning changes nothing"
FAMILY = "model"
GIVES = "the same language model with N non-zero weights in every M along the inputs of its blocks' layers"
SOURCE = "paper-text, predecessor code-checked"
PAPER = "arXiv 2509.25996"


def __getattr__(name: str) -> Any:
    if name == "Config":
        from stillhouse.recipes.cast.config import Config

        return Config
    if name == "AdamS":
        from stillhouse.recipes.cast.adams import AdamS

        return AdamS
    if name in ("distill", "Sparse"):
        from stillhouse.recipes.cast import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
