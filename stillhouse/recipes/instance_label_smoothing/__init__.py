"""Instance-specific label smoothing: Beta smoothing and multi-generation self-distillation."""

from typing import Any

TITLE = "Instance-specific label smoothing: Beta smoothing, and self-distillation over generations"
FAMILY = "model"
GIVES = "one classifier without a teacher, its labels smoothed sample by sample; or one per generation"
SOURCE = "code-checked"
PAPER = "Zhang & Sabuncu, NeurIPS 2020, arXiv 2006.05065"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.instance_label_smoothing import recipe

        return getattr(recipe, name)
    if name in ("Beta", "Plain", "Taught"):
        from stillhouse.recipes.instance_label_smoothing import systems

        return getattr(systems, name)
    raise AttributeError(name)
