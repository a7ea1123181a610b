"""The training steps that a distilled set stands for: the same code while it is learned and when it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.bilevel import unrolled
from stillhouse.evaluate import logits_of
from stillhouse.objectives import cross_entropy

Params = dict[str, Tensor]


def label_loss(z: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of −Σ_c y_c log softmax(z)_c for real-valued y; with one logit softplus(z) − y z.

    Args:
        z: (n, C) logits, or (n, 1). y: (n, C) or (n, 1), any real numbers; or class ids (n,).
    """
    if z.shape[-1] > 1:
        return cross_entropy(z, y).mean()
    y = y.to(z.dtype).reshape(z.shape)
    return (F.softplus(z) - y * z).mean()


@dataclass(frozen=True)
class Steps:
    """How to train on a set: which block comes when, and what its labels mean."""

    blocks: int = 1
    momentum: float = 0.0
    label_softmax: bool = False
    segment: int = 0

    def __call__(self, net: nn.Module, start: Params, rates: Tensor, x: Tensor, y: Tensor, seed: int) -> Params:
        """The weights after len(rates) steps from `start`, attached to rates, x and y.

        Args:
            net: in the mode to train in; its own parameters are not read.
            start: θ_0 by name. rates: η, (T,). x: samples of all blocks. y: their labels.
            seed: of the dropout.
        """
        m = len(x) // self.blocks

        def inner(params: Params, k: int, x: Tensor, y: Tensor) -> Tensor:
            rows = slice(k % self.blocks * m, (k % self.blocks + 1) * m)
            with _differentiable_recurrence(net):
                z = logits_of(functional_call(net, params, (x[rows],)))
            return label_loss(z, torch.softmax(y[rows], -1) if self.label_softmax else y[rows])

        return unrolled(inner, start, rates, x, y, momentum=self.momentum, segment=self.segment, seed=seed)


@contextlib.contextmanager
def _differentiable_recurrence(net: nn.Module) -> Iterator[None]:
    """cuDNN's recurrent layers cannot be differentiated twice."""
    if any(isinstance(m, nn.RNNBase) for m in net.modules()):
        with torch.backends.cudnn.flags(enabled=False):
            yield
    else:
        yield
