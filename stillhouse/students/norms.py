"""Batch normalisation around slicing and sharing: batch statistics without side effects, and recalibration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from stillhouse.evaluate import evaluating


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation uses the batch's own statistics, as in training, without moving the running ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimates the running statistics of batch normalisation anew, as a cumulative average over `batches`.

    Needed after slicing or weight sharing, where the averages kept in training belong to other activations
    (Yu & Huang, 2019, US-Nets).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    with torch.no_grad(), evaluating(model):
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average
            m.train()
        for x in batches:
            model(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
