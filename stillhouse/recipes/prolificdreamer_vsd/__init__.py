"""VSD: particles that a frozen diffusion model draws, by the difference of two scores."""

from typing import Any

TITLE = "Variational score distillation: images or scenes out of a frozen diffusion model, without data"
FAMILY = "sampler"
GIVES = "particles for each prompt: images, or the weights of your own renderer or generator"
SOURCE = "code-checked"
PAPER = "Wang et al., ProlificDreamer, NeurIPS 2023, arXiv 2305.16213"


def __getattr__(name: str) -> Any:
    if name in ("Config", "distill"):
        from stillhouse.recipes.prolificdreamer_vsd import recipe

        return getattr(recipe, name)
    if name in ("Generator", "Images"):
        from stillhouse.recipes.prolificdreamer_vsd import scenes

        return getattr(scenes, name)
    raise AttributeError(name)
