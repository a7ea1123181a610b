"""Weighted ground-truth self-distillation: closed forms for linear smoothers, the last layer and whole networks."""

from typing import Any

TITLE = "Weighted ground-truth self-distillation: every step, the limit and the best label weight in closed form"
FAMILY = "model"
GIVES = "a kernel model, a network with a refitted last layer, or one network per self-distillation step"
SOURCE = "code-checked (kernel part reproduced numerically)"
PAPER = "Borup & Andersen, NeurIPS 2021, arXiv 2102.13088"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill", "kernel", "last_layer", "networks"):
        from stillhouse.recipes.weighted_ground_truth_self_distillation import recipe

        return getattr(recipe, name)
    if name in ("Features", "Kernel", "chain", "greedy", "after", "limit", "shrinkage"):
        from stillhouse.recipes.weighted_ground_truth_self_distillation import closed

        return getattr(closed, name)
    raise AttributeError(name)
