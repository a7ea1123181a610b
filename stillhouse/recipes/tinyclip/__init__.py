"""TinyCLIP: a two-tower image-text model made smaller in stages, by inherited weights and the teacher's affinities."""

from typing import Any

TITLE = "TinyCLIP: smaller image-text models by inherited weights and the teacher's image-text affinities"
FAMILY = "model"
GIVES = "one smaller two-tower model per stage, in the teacher's shared space of images and texts"
SOURCE = "code-checked"
PAPER = "Wu et al., ICCV 2023, arXiv 2309.12314"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.tinyclip import recipe

        return getattr(recipe, name)
    if name == "TinyClip":
        from stillhouse.recipes.tinyclip import system

        return system.TinyClip
    raise AttributeError(name)
