"""G2SD: what a masked autoencoder sees, then what its fine-tuned self says, into a small vision transformer."""

from typing import Any

TITLE = "G2SD: a masked autoencoder's features from unlabelled images, then its fine-tuned self's answers"
FAMILY = "model"
GIVES = "one small vision transformer that started from the autoencoder's features and was taught the task"
SOURCE = "code-checked"
PAPER = "Huang et al., CVPR 2023, arXiv 2302.14771"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.g2sd import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
