"""Contrast normalisation and ZCA whitening as the first layer of a classifier, so that it reads images as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models import ModelSpec

MOST = 4096  # numbers per input; the matrix has as many rows and columns


def contrast(x: Tensor, scale: float = 55.0) -> Tensor:
    """g(x) = scale · (x − m)/‖x − m‖, m the mean of all numbers of x; a constant input gives 0. (n, …) → (n, …).

    Example:
        >>> contrast(torch.tensor([[1.0, 3.0], [7.0, 7.0]]), 1.0)
        tensor([[-0.7071,  0.7071],
                [ 0.0000,  0.0000]])
    """
    flat = x.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    size = flat.norm(dim=1, keepdim=True)
    return (scale * flat / torch.where(size < 1e-6, torch.ones_like(size), size)).view_as(x)


class Whitening(nn.Module):
    """y = W (g(x) − μ), W = (Σ + ε I)^(−1/2), g as in `contrast`; μ and Σ of g over some samples. Nothing is trained.

    Args:
        shape: of one input, d numbers in all.

    Raises:
        UserError: more than 4,096 numbers, for W is (d, d).
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        d = int(np.prod(shape))
        if d > MOST:
            raise UserError(
                f"whitening: inputs {tuple(shape)} have {d} numbers, which would need a {d} × {d} matrix; at most "
                f"{MOST} are possible, give smaller images (--image-size 32)"
            )
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("matrix", torch.eye(d))

    @torch.no_grad()
    def find(self, samples: Any, epsilon: float = 0.1, batch_size: int = 512) -> Whitening:
        """This layer with μ and W of these samples, un-augmented; computed in float64.

        Args:
            samples: `stillhouse.data.Samples`, at least two; training samples, never those of a test.
            epsilon: ε, added to every eigenvalue of Σ.
        """
        n, d = len(samples), len(self.mean)
        if n < 2:
            raise UserError(f"whitening: at least two samples are needed, got {n}")
        total, squares = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        for start in range(0, n, batch_size):
            ids = np.arange(start, min(start + batch_size, n))
            x = contrast(samples.take(ids)["input"].double()).flatten(1)
            total += x.sum(0)
            squares += x.T @ x
        mean = total / n
        covariance = (squares - n * torch.outer(mean, mean)) / (n - 1)
        variance, axes = torch.linalg.eigh(covariance)
        self.mean.copy_(mean)
        self.matrix.copy_((axes / (variance.clamp_min(0) + epsilon).sqrt()) @ axes.T)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return ((contrast(x).flatten(1) - self.mean) @ self.matrix).view_as(x)


class Whitened(nn.Module):
    """A classifier behind `Whitening`: front and body.

    Example:
        >>> from stillhouse.data import Arrays
        >>> x = np.random.default_rng(0).normal(size=(50, 1, 2, 2))
        >>> net = Whitened(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
        >>> _ = net.front.find(Arrays(x, np.arange(50) % 2))
        >>> net(torch.ones(3, 1, 2, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, body: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.front, self.body = Whitening(shape), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.front(x))


def build(classes: int, shape: tuple[int, ...], body: Mapping[str, Any]) -> Whitened:
    """A `Whitened` around the network that `body` describes; what its ``plan.json`` names."""
    return Whitened(ModelSpec.from_json(body).build(), shape)


def whitened(
    network: nn.Module, samples: Any, spec: ModelSpec | None = None, epsilon: float = 0.1
) -> tuple[Whitened, ModelSpec | None]:
    """The network behind the whitening of these samples, and how it is built again where `spec` says how it was.

    Contrast ×55 and ε = 0.1 are what semi-supervised learning on CIFAR-10 has used since Oliver et al. (2018, arXiv
    1804.09170).

    Args:
        network: is used, not copied; must not be trained yet, for it never saw such inputs.
        samples: `stillhouse.data.Samples`, as they are normalised: training inputs, labelled or not.
        spec: how the network is built. epsilon: as for `Whitening.find`.
    """
    made = Whitened(network, samples.shape)
    made.front.find(samples, epsilon)
    if spec is not None:
        spec = replace(spec, name="stillhouse.students.whitened:build", stem="keep", options={"body": spec.to_json()})
    return made, spec
