"""Any teacher into any student: objectives on logits and features, freely added."""

from typing import Any

TITLE = "Plain distillation: any teacher into any student, by any sum of objectives"
FAMILY = "model"
GIVES = "one student, taught by one teacher or several through logits, features, relations or attention"
SOURCE = "papers' equations, checked against NumPy"
PAPER = "Hinton et al. 2015, arXiv 1503.02531, and one paper per objective"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.distill import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
