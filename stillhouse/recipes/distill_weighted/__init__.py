"""DistillNearest and DistillWeighted: the fitting ones of many source models, and what they say of unlabelled data."""

from typing import Any

TITLE = "DistillWeighted: from the source models whose tasks are similar, into one small model"
FAMILY = "model"
GIVES = "one student for a new task with few labels, and how well each source model fits that task"
SOURCE = "reconstructed from the abstract; PARC code-checked"
PAPER = "Borup, Phoo, Hariharan, ICCV 2023, arXiv 2304.12314"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.distill_weighted import recipe

        return getattr(recipe, name)
    if name in ("Selection", "select"):
        from stillhouse.recipes.distill_weighted import selection

        return getattr(selection, name)
    raise AttributeError(name)
