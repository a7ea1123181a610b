"""Quantised distillation: weights of a few bits, trained through the quantiser or by moving its points."""

from typing import Any

TITLE = "Quantised distillation and differentiable quantisation: weights of 1 to 8 bits under a teacher"
FAMILY = "model"
GIVES = "a student whose weights are stored as codes of a few bits, beside itself in full precision"
SOURCE = "code-checked"
PAPER = "Polino, Pascanu, Alistarh, ICLR 2018, arXiv 1802.05668"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.quantized_distillation import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
