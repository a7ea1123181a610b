"""Distilling step-by-step: a small model learns to answer and, as a second task, to give a large model's reasons."""

from typing import Any

TITLE = "Distilling step-by-step: rationales of a large language model as a second task"
FAMILY = "model"
GIVES = "a small sequence-to-sequence model that answers directly and needs fewer labels"
SOURCE = "code-checked"
PAPER = "Hsieh et al., Findings of ACL 2023, arXiv 2305.02301"


def __getattr__(name: str) -> Any:
    if name in ("Config", "StepByStep", "distill"):
        from stillhouse.recipes.distilling_step_by_step import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
