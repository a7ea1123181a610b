"""Capacity gap law: which teacher is best for a student's size, and pruned, distilled language models of that size."""

from typing import Any

TITLE = "Law of capacity gap: the best teacher's size for a student, and language models pruned and distilled to size"
FAMILY = "model"
GIVES = "language models cut from their teachers and distilled, and the law T* = aS + b where the pilots show one"
SOURCE = "code-checked; the law from public summaries"
PAPER = "Zhang et al., ACL 2025, arXiv 2311.07052 (MiniMA)"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Pilots", "distill", "prune"):
        from stillhouse.recipes.capacity_gap_law import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
