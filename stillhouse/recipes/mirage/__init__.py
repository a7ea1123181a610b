"""Mirage: a set of labelled graphs as a few weighted sets of computation trees."""

from typing import Any

TITLE = "Mirage: a graph set as a few weighted computation trees, for any message-passing network"
FAMILY = "graph"
GIVES = "a summary of a few dozen nodes that trains any message-passing network, and networks trained on it"
SOURCE = "code-checked"
PAPER = "Gupta et al., ICLR 2024, arXiv 2310.09486"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Distilled", "Summary", "distill", "summarise", "train"):
        from stillhouse.recipes.mirage import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
