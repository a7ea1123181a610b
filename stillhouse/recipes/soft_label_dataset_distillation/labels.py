"""Where labels start."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import Samples
from stillhouse.errors import UserError
from stillhouse.recipes.soft_label_dataset_distillation.config import Config


def starting_classes(cfg: Config, classes: int) -> Tensor:
    """The class that each of a block's samples starts from, (m,)."""
    known = cfg.classes or tuple(range(classes))
    if max(known) >= classes:
        raise UserError(f"classes: expected numbers from 0 to {classes - 1}, got {max(known)}")
    return torch.tensor([known[i % len(known)] for i in range(cfg.samples)])


def initial_labels(cfg: Config, classes: int, g: torch.Generator, distances: Tensor | None = None) -> Tensor:
    """ỹ at the start, (blocks · m, C), or (blocks · m, 1) with one logit, where class 1's label is 1 and class 0's 0.

    Args:
        g: what random ones are drawn from.
        distances: (C, C), d_ij ≥ 0 between classes, for ``similar``: ỹ_i = e_i + Σ_{j≠i} (1 − d_ij / max d) e_j.

    Raises:
        UserError: a class that does not exist, more orthogonal rows than classes, one logit for other than 2 classes.
    """
    own, rows, how = starting_classes(cfg, classes), cfg.samples, cfg.label_init
    one_hot = torch.eye(classes)[own]
    if how == "orthogonal" and rows > classes:
        raise UserError(f"label_init orthogonal: at most {classes} samples per block for {classes} classes, got {rows}")
    if cfg.one_logit and classes != 2:
        raise UserError(f"one_logit: expected 2 classes, got {classes}")

    def block() -> Tensor:
        if how == "one-hot":
            return one_hot
        if how == "smooth":
            return 0.9 * one_hot + 0.1 / classes
        if how == "similar":
            assert distances is not None
            return (1 - distances / distances.max()).fill_diagonal_(1.0)[own]
        if how == "orthogonal":
            q, r = torch.linalg.qr(torch.randn(classes, classes, generator=g, dtype=torch.float64))
            return (q * r.diagonal().sign()).T[:rows].float()
        made = {"zeros": torch.zeros, "ones": torch.ones}
        if how in made:
            return made[how](rows, classes)
        u = torch.rand(rows, classes, generator=g)
        return {"uniform": u, "bernoulli": (u < 0.5).float()}.get(how, torch.randn(rows, classes, generator=g))

    labels = torch.cat([block() for _ in range(cfg.blocks)])
    return cfg.label_scale * (labels[:, 1:] if cfg.one_logit else labels) + cfg.label_shift


def class_distances(samples: Samples) -> Tensor:
    """d_ij: Euclidean distance between the mean inputs of two classes, (C, C)."""
    sums = torch.zeros(len(samples.classes), int(np.prod(samples.shape)), dtype=torch.float64)
    counts = torch.zeros(len(sums), 1, dtype=torch.float64)
    for first in range(0, len(samples), 2048):
        batch = samples.take(np.arange(first, min(first + 2048, len(samples))))
        sums.index_add_(0, batch["label"], batch["input"].flatten(1).double())
        counts.index_add_(0, batch["label"], torch.ones(len(batch["label"]), 1, dtype=torch.float64))
    means = sums / counts.clamp(min=1)
    return torch.cdist(means, means).float()
