"""ODIS: every query becomes a small weighted bag of words that imitates the re-ranker, and searches again."""

from typing import Any

TITLE = "Online distillation for pseudo-relevance feedback: a re-ranker taught to the index, per query"
FAMILY = "query"
GIVES = "for every query a sparse weighted bag of terms that imitates the re-ranker, and a richer re-ranked list"
SOURCE = "reconstructed"
PAPER = "MacAvaney & Wang, preprint 2023, arXiv 2306.09657"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Distilled", "distill", "distill_query"):
        from stillhouse.recipes.online_prf import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
