"""Distiller: a pipeline of augmentation, layer map, intermediate loss and prediction loss, with the MI-α objective."""

from typing import Any

TITLE = "Distiller: one pipeline of augmentation, layer map, intermediate and prediction loss, with MI-α"
FAMILY = "model"
GIVES = "one student, taught through its layers by a bound of mutual information or any classic feature loss"
SOURCE = (
    "code-checked (losses, critics, layer maps, released result tables); the recommender's training is not released"
)
PAPER = "He, Shi, Mueller, Zha, Li, Karypis, SustaiNLP 2021, arXiv 2109.11105"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.distiller_mi_alpha import recipe

        return getattr(recipe, name)
    if name in ("every", "last", "layers_of", "skip", "transport"):
        from stillhouse.recipes.distiller_mi_alpha import maps

        return getattr(maps, name)
    if name in ("augmented", "edit_words"):
        from stillhouse.recipes.distiller_mi_alpha import augment

        return getattr(augment, name)
    raise AttributeError(name)
