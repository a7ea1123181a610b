"""A synthetic set while it is being learned: samples, labels and step sizes as parameters of one module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def inverse_softplus(x: Tensor) -> Tensor:
    """r with softplus(r) = x > 0, as x + log(1 − e^{−x}), which is also exact for large x.

    Example:
        >>> F.softplus(inverse_softplus(torch.tensor([0.02, 100.0])))
        tensor([2.0000e-02, 1.0000e+02])
    """
    return x + torch.log(-torch.expm1(-x))


class Synthetic(nn.Module):
    """Learned samples in equal blocks, their labels, and a positive step size for every training step.

    Training on it walks through the blocks in turn: step k uses block k mod `blocks` and step size k.

    Args:
        samples: (blocks · m, …) start values: images, or embedded sentences (n, length, width).
        labels: (blocks · m,) class ids, which stay; or (blocks · m, C) numbers, learned when `learn_labels`.
        step_sizes: (T,) start values > 0, learned as softplus(r); None where the set has none.
        blocks: number of blocks, each of m samples.
        learn_labels: False keeps `labels` as they are.
        kind: the samples' name in an outcome, "images" or "embeddings".

    Raises:
        ValueError: numbers that do not fit each other.

    Example:
        >>> s = Synthetic(torch.zeros(4, 1, 8, 8), torch.eye(10)[:4], torch.full((6,), 0.02), blocks=2)
        >>> s.rows(3), s.step_sizes.shape, sorted(s.tensors())
        (slice(2, 4, None), torch.Size([6]), ['images', 'labels', 'step_sizes'])
    """

    labels: Tensor
    raw_step_sizes: nn.Parameter | None

    def __init__(
        self,
        samples: Tensor,
        labels: Tensor,
        step_sizes: Tensor | None = None,
        *,
        blocks: int = 1,
        learn_labels: bool = True,
        kind: str = "images",
    ):
        super().__init__()
        if len(samples) != len(labels) or blocks < 1 or len(samples) % blocks:
            raise ValueError(f"{len(samples)} samples, {len(labels)} labels and {blocks} blocks do not fit each other")
        if step_sizes is not None and (step_sizes.dim() != 1 or not bool((step_sizes > 0).all())):
            raise ValueError(f"step sizes must be positive and of shape (T,), got {step_sizes}")
        self.blocks, self.kind = blocks, kind
        self.samples = nn.Parameter(samples.clone())
        if learn_labels and labels.is_floating_point():
            self.labels = nn.Parameter(labels.clone())
        else:
            self.register_buffer("labels", labels.clone())
        raw = None if step_sizes is None else nn.Parameter(inverse_softplus(step_sizes))
        self.register_parameter("raw_step_sizes", raw)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def step_sizes(self) -> Tensor:
        """η = softplus(r), (T,), attached to r."""
        if self.raw_step_sizes is None:
            raise ValueError("this set has no step sizes")
        return F.softplus(self.raw_step_sizes)

    def rows(self, step: int) -> slice:
        """The samples that step k trains on."""
        m = len(self) // self.blocks
        first = step % self.blocks * m
        return slice(first, first + m)

    def tensors(self) -> dict[str, Tensor]:
        """What a `DataSet` holds of it: copies on the CPU, by name."""
        found = {self.kind: self.samples, "labels": self.labels}
        if self.raw_step_sizes is not None:
            found["step_sizes"] = self.step_sizes
        return {k: v.detach().cpu().clone() for k, v in found.items()}
