"""PLD: the label first, then the classes in the teacher's order, as one list-wise loss."""

from typing import Any

TITLE = "PLD: label and teacher in one list-wise loss, for classifiers and rankers"
FAMILY = "model"
GIVES = "one student, taught the teacher's order of the classes (or of a query's candidates) with the label first"
SOURCE = "paper's text, with the listing in its appendix"
PAPER = "Bassam, Zhu, Bian, NeurIPS 2025, arXiv 2506.12542"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.pld import recipe

        return getattr(recipe, name)
    if name in ("Lists", "Scorer"):
        from stillhouse.recipes.pld import lists

        return getattr(lists, name)
    raise AttributeError(name)
