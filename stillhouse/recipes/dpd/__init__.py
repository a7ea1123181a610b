"""DPD: policies trained side by side that borrow from each other where the other is better."""

from typing import Any

TITLE = "Dual Policy Distillation: policies that borrow from each other where the other is better"
FAMILY = "policy"
GIVES = "two or more policies for one environment, trained side by side without a teacher"
SOURCE = "code-checked"
PAPER = "Lai et al., IJCAI 2020, arXiv 2006.04061"


def __getattr__(name: str) -> Any:
    if name in ("Config", "DPD", "distill"):
        from stillhouse.recipes.dpd import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
