"""DisWOT: the student that will distil best, chosen by comparing untrained networks on one batch."""

from typing import Any

TITLE = "DisWOT: choose the student by comparing untrained networks with the teacher"
FAMILY = "model"
GIVES = "the students of a space and budget that promise to distil best, trained with the teacher, and the ranking"
SOURCE = "code-checked"
PAPER = "Dong et al., CVPR 2023, arXiv 2303.15678"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Found", "distill"):
        from stillhouse.recipes.diswot import recipe

        return getattr(recipe, name)
    if name in ("Scorer", "look", "compare"):
        from stillhouse.recipes.diswot import scoring

        return getattr(scoring, name)
    raise AttributeError(name)
