"""SwiftBrush: a one-step generator out of a multi-step diffusion model and prompts alone."""

from typing import Any

TITLE = "SwiftBrush: one-step generator from a diffusion model and prompts, without images"
FAMILY = "sampler"
GIVES = "a network of the teacher's structure that makes a sample in one forward pass, without guidance"
SOURCE = "code-checked"
PAPER = "Nguyen and Tran, CVPR 2024, arXiv 2312.05239"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Prompts", "distill"):
        from stillhouse.recipes.swiftbrush import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
