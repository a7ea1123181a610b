"""LELP: a binary or few-class classifier whose student learns the sub-classes in its teacher's embedding."""

from typing import Any

TITLE = "LELP: few-class distillation through sub-classes read off the teacher's embedding"
FAMILY = "model"
GIVES = "one student for 2 or a few classes, taught S sub-classes per class that no label names"
SOURCE = "reconstructed from descriptions, no code compared"
PAPER = "Loo, Iliopoulos, Hu, Vee 2024, arXiv 2409.20449"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.lelp import recipe

        return getattr(recipe, name)
    if name in ("Subclasses", "SubclassTeacher", "find_subclasses"):
        from stillhouse.recipes.lelp import subclasses

        return getattr(subclasses, name)
    raise AttributeError(name)
