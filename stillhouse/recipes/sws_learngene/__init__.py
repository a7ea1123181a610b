"""SWS: a few learned blocks from one run, from which networks of any depth start."""

from typing import Any

TITLE = "SWS learngenes: a few blocks trained once, from which networks of any depth start"
FAMILY = "model"
GIVES = "the learned blocks, and one network per depth that started from them and was tuned briefly"
SOURCE = "code-checked"
PAPER = "Xia et al., IJCAI 2024, arXiv 2404.16897"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Gene", "auxiliary", "descend", "distill"):
        from stillhouse.recipes.sws_learngene import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
