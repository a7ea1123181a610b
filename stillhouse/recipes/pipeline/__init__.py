"""Several steps on one network: prune, factorise, sparsify, distil, quantise, export; one plan, one file per stage."""

from typing import Any

TITLE = "Pipeline: prune, factorise, sparsify, distil, quantise and export one network, step by step"
FAMILY = "model"
GIVES = "a student after every step, with its size on disk, MACs, latency and accuracy"
SOURCE = "composition of the library's parts; no paper of its own"
PAPER = "Han, Mao, Dally, ICLR 2016, arXiv 1510.00149 (the idea)"


def __getattr__(name: str) -> Any:
    if name in ("Config", "Step", "distill"):
        from stillhouse.recipes.pipeline import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
