"""PELA: a trained transformer with its linear layers as pairs of thin ones, trained on against itself."""

from typing import Any

TITLE = "PELA: a trained transformer made thin by low rank, trained on against its own block outputs"
FAMILY = "model"
GIVES = "one student in which every chosen linear layer is two thin ones, with 1/c of its weights"
SOURCE = "code-checked"
PAPER = "Guo et al., CVPR 2024, arXiv 2310.10700"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.pela import recipe

        return getattr(recipe, name)
    if name == "Pela":
        from stillhouse.recipes.pela import system

        return system.Pela
    raise AttributeError(name)
