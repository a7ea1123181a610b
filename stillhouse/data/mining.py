"""Choosing from a pool without labels: the surest of every class, and nothing that stands in the test set too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.data.samples import Samples
from stillhouse.errors import UserError
from stillhouse.system import Teacher, map_tensors


def top_per_class(logits: Tensor, k: int = 0) -> Tensor:
    """Positions of the k samples with the highest softmax(t)_c among those with arg-max c, for c = 0…C−1 in turn.

    A cap per class, not a threshold: a class with fewer gives all it has, and no class crowds out another.

    Args:
        logits: (N, C). k: most samples per class; 0 keeps all.

    Returns:
        (M,) int64, class by class, surest first; the earlier one where two are equally sure.

    Example:
        >>> top_per_class(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), 2)
        tensor([1, 3, 2])
    """
    if logits.dim() != 2 or k < 0:
        raise UserError(f"top_per_class: needs logits (N, C) and k >= 0, got {tuple(logits.shape)} and {k}")
    score, best = logits.double().softmax(-1).max(-1)
    order = torch.sort(score, descending=True, stable=True).indices
    order = order[torch.sort(best[order], stable=True).indices]
    starts = torch.searchsorted(best[order], best[order])  # where the sample's class begins
    within = torch.arange(len(order), device=order.device) - starts
    return order[within < k] if k else order


def signatures(samples: Samples, side: int = 8, batch_size: int = 512) -> Tensor:
    """A short description of every input by which copies are found, (N, d) of length 1.

    Images: the mean over channels, pooled to side × side, minus its mean. The same for a copy that was resized, stored
    again, or made brighter or of other contrast; not for one that was cut out or mirrored. Other inputs: all
    numbers, minus their mean. A constant input gives 0 and is like nothing.
    """
    found = []
    for start in range(0, len(samples), batch_size):
        x = samples.take(np.arange(start, min(start + batch_size, len(samples))))["input"].float()
        if x.dim() == 4:
            x = x.mean(1, keepdim=True)
            x = F.adaptive_avg_pool2d(x, (min(side, x.shape[2]), min(side, x.shape[3])))
        x = x.flatten(1)
        found.append(F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-6))
    return torch.cat(found)


def nearest(a: Tensor, b: Tensor, block: int = 4096) -> Tensor:
    """min_j (1 − ⟨a_i, b_j⟩) for every row i of a, rows of length 1: (N, d), (M, d) → (N,); in [0, 2]."""
    rows = [torch.stack([(x @ y.T).amax(1) for y in b.split(block)]).amax(0) for x in a.split(block)]
    return (1 - torch.cat(rows)).clamp_min(0)


@dataclass(frozen=True)
class Mined:
    """What was kept of a pool.

    Attributes:
        positions: (M,) in the pool, class by class, surest first.
        classes: (M,) the teacher's arg-max.
        scores: (M,) its probability.
        copies: how many were left out as near copies.
    """

    positions: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    copies: int


def mine(
    teacher: Teacher,
    pool: Samples,
    k: int = 0,
    *,
    against: Sequence[Samples] = (),
    radius: float = 0.01,
    describe: Callable[[Samples], Tensor] = signatures,
    batch_size: int = 512,
    device: Any = "cpu",
) -> Mined:
    """The k surest samples of every class, after near copies of other sets are left out (SSLD, arXiv 2103.05959).

    Args:
        teacher: asked about every sample of the pool without augmentation; a sample's class is its arg-max.
        pool: labels are not read.
        k: most samples per class; 0 keeps all.
        against: sets that the pool may not repeat, such as the test set.
        radius: a pool sample with 1 − cosine (of `describe`) up to this to one of them is left out; below 0 keeps all.
        describe: samples → (N, d) rows of length 1.

    Raises:
        UserError: an empty pool, or nothing is left of it.
    """
    if not len(pool):
        raise UserError("the pool is empty; give images, or train on the labelled ones alone")
    kept = np.arange(len(pool))
    if against and radius >= 0:
        own = describe(pool)
        far = torch.stack([nearest(own, describe(part)) for part in against]).amin(0) > radius
        kept = kept[far.numpy()]
    if not len(kept):
        raise UserError(f"all {len(pool)} samples of the pool are within {radius} of the test set; lower the radius")
    answers = []
    for part in np.array_split(kept, -(-len(kept) // batch_size)):
        batch = map_tensors(pool.take(part), lambda t: t.to(device))
        answers.append(teacher(batch)["logits"].cpu())
    logits = torch.cat(answers)
    chosen = top_per_class(logits, k)
    score, best = logits[chosen].double().softmax(-1).max(-1)
    return Mined(kept[chosen.numpy()], best.numpy(), score.numpy(), len(pool) - len(kept))
