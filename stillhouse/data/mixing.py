"""Sources whose batches are changed as they pass: mixed images, and numbers drawn for every sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.data.samples import digest, draws
from stillhouse.errors import UserError
from stillhouse.system import Batch, Clock, Source, fold


class Changed(Source):
    """A source with ``change(batch, clock)`` in place of its batches.

    Args:
        source: where the batches come from.
        change: a pure function of both; what it draws comes from the clock.
        name: says what is changed; a resume under another name is refused.
    """

    def __init__(self, source: Source, change: Callable[[Batch, Clock], Batch], name: str):
        self.source, self.change, self.name = source, change, name

    @property
    def steps_per_epoch(self) -> int:
        return self.source.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        return digest("changed", self.name, self.source.fingerprint)

    @property
    def one_thread(self) -> bool:
        return getattr(self.source, "one_thread", False)

    def num_samples(self, clock: Clock) -> int:
        return self.source.num_samples(clock)  # type: ignore[attr-defined]

    def batch(self, clock: Clock) -> Batch:
        return self.change(self.source.batch(clock), clock)


def mixing(source: Source, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> Source:
    """Every batch mixed with itself in another order, by mixup or by cutmix, and its labels in the same parts.

    Mixup (arXiv 1710.09412): x ← λx + (1−λ)x_π. Cutmix (arXiv 1905.04899): a rectangle of 1−λ of the area comes from
    x_π. In both y ← λy + (1−λ)y_π, (n, classes), with the λ that came about. λ ~ Beta(a, a) and the order π are drawn
    once per batch from the clock; where both are asked for, each step is one of them, with even chances.

    Args:
        source: with images ``input`` (n, C, H, W) and class indices ``label`` (n,).
        mixup, cutmix: a of each; 0 leaves it out, and `source` comes back where both are 0.

    Raises:
        UserError: a negative a; batches without images, when they come.

    Example:
        >>> from stillhouse.data import Arrays, Batches
        >>> source = Batches(Arrays(np.zeros((8, 1, 4, 4)), np.arange(8) % 2), 4)
        >>> mixing(source, 2, mixup=0.8).batch(Clock())["label"].shape
        torch.Size([4, 2])
    """
    if min(mixup, cutmix) < 0:
        raise UserError(f"mixup and cutmix must be 0 or positive, got {mixup} and {cutmix}")
    if not (mixup or cutmix):
        return source
    change = partial(_mixed, classes=classes, mixup=mixup, cutmix=cutmix)
    return Changed(source, change, f"mixup {mixup:g}, cutmix {cutmix:g}, {classes} classes")


def _mixed(batch: Batch, clock: Clock, *, classes: int, mixup: float, cutmix: float) -> dict[str, Any]:
    x = batch["input"]
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise UserError("mixup and cutmix are of images (n, C, H, W), and these data are others; give 0 for both")
    y, g = F.one_hot(batch["label"], classes).to(torch.float32), clock.generator("mixing")
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=g)))
    order = torch.randperm(len(x), generator=g).to(x.device)
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    a = cutmix if cut else mixup
    keep = float(rng.beta(a, a))
    if cut:
        (top, bottom), (left, right) = (_side(rng, size, (1 - keep) ** 0.5) for size in x.shape[2:])
        mixed = x.clone()
        mixed[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
    else:
        mixed = keep * x + (1 - keep) * x[order]
    return {**batch, "input": mixed, "label": keep * y + (1 - keep) * y[order]}


def _side(rng: np.random.Generator, size: int, share: float) -> tuple[int, int]:
    """One side of a rectangle around an even draw of its centre; what lies outside of the image is lost."""
    length = round(size * share)
    start = int(rng.integers(size)) - length // 2
    return max(0, start), min(size, start + length)


def with_draws(source: Source, count: int, key: str = "noise") -> Source:
    """`source` with uniform numbers in [0, 1) under `key`, (n, count) float32, of each sample and step.

    They are a function of (seed, stage, step, sample): the same for every network that reads the batch, and in
    however many processes and pieces it is read.

    Example:
        >>> from stillhouse.data import Arrays, Batches
        >>> source = with_draws(Batches(Arrays(np.zeros((8, 3)), np.arange(8) % 2), 4), 5)
        >>> source.batch(Clock())["noise"].shape
        torch.Size([4, 5])
    """

    def change(batch: Batch, clock: Clock) -> Batch:
        seed = fold(clock.seed, clock.stage, key)
        numbers = draws(seed, clock.step, np.asarray(batch["id"]), count)
        return {**batch, key: torch.from_numpy(numbers).float()}

    return Changed(source, change, f"{count} draws as {key}")
