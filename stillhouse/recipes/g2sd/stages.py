"""The Systems of the generic stage: a decoder's features, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.data import Samples
from stillhouse.data.samples import draws
from stillhouse.students.masked import Masked, patches_of
from stillhouse.system import Batch, Clock, Signals, System, Terms, Update, fold


class Features:
    """The teacher of the generic stage: Y = LN(H_q), H_q what its decoder's block q says of all tokens.

    LN normalises every token over its channels (ε 1e-6, nothing learned), in at least float32. The decoder's own norm
    and its pixel head are not applied.

    Args:
        masked: the autoencoder; kept by reference, in eval mode and frozen.
        ratio: part of the patches that is masked. layer: q, from 1.
    """

    def __init__(self, masked: Masked, ratio: float, layer: int):
        self._masked, self.ratio, self.layer = masked.eval().requires_grad_(False), ratio, layer

    def __call__(self, batch: Batch) -> Signals:
        """``target`` (n, 1 + P, D) for ``input`` and ``noise``, class token first."""
        with torch.no_grad():
            self._masked.eval()
            encoded = self._masked.encode(batch["input"], batch["noise"], self.ratio)
            h = O.upcast(self._masked.decode(*encoded, until=self.layer))
            return Signals(target=F.layer_norm(h, h.shape[-1:], eps=1e-6))


class Stage(System):
    """One masked autoencoder that learns, moved by one optimiser."""

    def __init__(self, masked: Masked, ratio: float, *, optimizer: Callable[..., Any], lr: Any, clip: float | None):
        super().__init__()
        self.masked, self.ratio = masked, ratio
        self._moves = (optimizer, lr, clip)

    def updates(self) -> Sequence[Update]:
        optimizer, lr, clip = self._moves
        return [Update("learn", [p for p in self.parameters() if p.requires_grad], optimizer, lr=lr, clip=clip)]


class Generic(Stage):
    """mean SmoothL1_β(Z, Y) over all tokens, class, visible and masked, and all channels.

    Z is the predictor (linear, GELU, linear) on the student's decoder, Y the teacher's `Features` for the same noise.
    """

    def __init__(self, masked: Masked, teacher: Features, width: int, beta: float, **moves: Any):
        super().__init__(masked, teacher.ratio, **moves)
        self.teacher, self.beta = teacher, beta
        self.predictor: nn.Module = nn.Sequential(
            nn.Linear(masked.decoder_width, width), nn.GELU(), nn.Linear(width, width)
        )

    def loss(self, batch: Batch) -> Tensor:
        encoded = self.masked.encode(batch["input"], batch["noise"], self.ratio)
        z = self.predictor(self.masked.decode(*encoded))
        return O.smooth_l1(self.teacher(batch).target, z, self.beta).mean()

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        return Terms(features=self.loss(batch))


class Pixels(Stage):
    """mean (true − said)² over the masked patches; each one's pixels have mean 0 and variance 1 (arXiv 2111.06377)."""

    def loss(self, batch: Batch) -> Tensor:
        encoded, places = self.masked.encode(batch["input"], batch["noise"], self.ratio)
        said = O.upcast(self.masked.pixels(self.masked.decode(encoded, places)))
        true = patches_of(batch["input"], self.masked.patch)
        true = (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = places >= encoded.shape[1] - 1
        return ((said - true).square().mean(-1) * hidden).sum() / hidden.sum()

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        return Terms(pixels=self.loss(batch))


def held_out(samples: Samples, patches: int, most: int = 512) -> Callable[[Any, Clock], dict[str, float]]:
    """What `fit` evaluates a stage with: its loss on the first samples, masked once and for all."""
    ids = np.arange(min(most, len(samples)))
    batch = {"input": samples.take(ids)["input"], "noise": torch.from_numpy(draws(fold("held out"), 0, ids, patches))}

    def loss(system: Any, clock: Clock) -> dict[str, float]:
        return {"held out": float(system.loss({k: v.to(clock.device) for k, v in batch.items()}))}

    return loss
