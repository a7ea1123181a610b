"""Soft-label data-set distillation: a handful of synthetic samples, labels and step sizes that train a network."""

from typing import Any

TITLE = "Soft-label data-set distillation: images or sentences, labels and step sizes learned together"
FAMILY = "data"
GIVES = "a few synthetic images or sentences with learned labels and step sizes, fewer than classes if wanted"
SOURCE = "code-checked"
PAPER = "Sucholutsky & Schonlau, IJCNN 2021, arXiv 1910.02551"


def __getattr__(name: str) -> Any:
    from importlib import import_module

    homes = {"Config": "config", "SoftLabels": "recipe", "distill": "recipe", "train_on": "use"}
    if name in homes:
        return getattr(import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(name)
