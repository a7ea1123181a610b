"""GPUSQ-ViT: a trained vision transformer made 2:4 sparse, then quantised, each against what it was before."""

from typing import Any

TITLE = "GPUSQ-ViT: 2:4 sparse, then 8- or 4-bit vision transformers, distilled from what they were"
FAMILY = "model"
GIVES = "the network with N:M sparse float16 weights, and with N:M sparse quantised weights and activations"
SOURCE = "paper-text"
PAPER = "Yu et al., CVPR 2023, arXiv 2305.10727"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.gpusq_vit import recipe

        return getattr(recipe, name)
    if name == "Sensed":
        from stillhouse.recipes.gpusq_vit import system

        return system.Sensed
    raise AttributeError(name)
