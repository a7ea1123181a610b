"""MEAL V2: fine-tune a trained classifier on nothing but the mean answer of several teachers."""

from typing import Any

TITLE = "MEAL V2: the same network, better, from the mean probabilities of several teachers"
FAMILY = "model"
GIVES = "one classifier of unchanged structure, fine-tuned without labels"
SOURCE = "code-checked"
PAPER = "Shen, Savvides 2020, arXiv 2009.08453"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.meal_v2 import recipe

        return getattr(recipe, name)
    if name in ("Discriminator", "Meal"):
        from stillhouse.recipes.meal_v2 import system

        return getattr(system, name)
    raise AttributeError(name)
