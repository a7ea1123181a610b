"""Problems for kernel models: tables of numbers in three parts, kernels, and the model that is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Data, load, split
from stillhouse.data.sets import divide, numpy_of
from stillhouse.errors import UserError
from stillhouse.evaluate import predict
from stillhouse.models import import_object
from stillhouse.system import fold

TABLES = ("diabetes", "breast_cancer")


@dataclass(frozen=True)
class Problem:
    """Inputs (n, d) and targets (n, q) of the three parts, float64, as they come; `mean` and `std` are of the training
    inputs, `centre` and `scale` of the training targets, which classes leave as they are.
    """

    name: str
    x: tuple[Tensor, Tensor, Tensor]  # train, validation, test
    y: tuple[Tensor, Tensor, Tensor]
    classes: tuple[str, ...] = ()  # none for a regression

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Mean and spread of each training input; a constant one has spread 1."""
        mean, std = self.x[0].mean(0), self.x[0].std(0, correction=0)
        return mean, torch.where(std > 1e-12, std, 1.0)

    @property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """Centre and scale of the targets."""
        if self.classes:
            return self.y[0].new_zeros(self.y[0].shape[1]), self.y[0].new_ones(self.y[0].shape[1])
        return self.y[0].mean(0), self.y[0].std(0, correction=0)

    def standardised(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and targets of the three parts, standardised by the training part."""
        (m, s), (c, k) = self.inputs, self.outputs
        return [(x - m) / s for x in self.x], [(y - c) / k for y in self.y]

    def accuracy(self, prediction: Tensor, target: Tensor) -> float | None:
        """Fraction of right classes; None for a regression."""
        if not self.classes:
            return None
        if target.shape[1] == 1:
            return float(((prediction > 0) == (target > 0)).double().mean())
        return float((prediction.argmax(1) == target.argmax(1)).double().mean())


def problem(name: str, seed: int = 0, limit: int | None = None) -> Problem:
    """A problem by name: ``diabetes``, ``breast_cancer`` (split 60/20/20 by the seed), a classification set that
    `stillhouse.data.load` knows (its own test part), or ``package.module:function`` giving ``(x, y)``.

    Numbers as y make a regression, integers or words classes: ±1 for two, one column of ±1 per class for more.
    """
    if not is_table(name):
        return from_data(load(name, limit=limit, seed=seed), seed)
    if name in TABLES:
        from sklearn import datasets

        raw = getattr(datasets, f"load_{name}")()
        y = raw.target if name == "diabetes" else raw.target.astype(np.int64)
        return from_table(name, raw.data, y, seed, tuple(map(str, getattr(raw, "target_names", ()))), limit)
    found = import_object(name, "--data")
    found = found() if callable(found) else found
    if isinstance(found, tuple) and len(found) == 2:
        return from_table(name, *found, seed, limit=limit)
    raise UserError(f"--data {name}: expected (x, y), got {type(found).__name__}")


def is_table(name: str) -> bool:
    """Whether the name is of (x, y), not of labelled samples."""
    return name in TABLES or (":" in name and name.partition(":")[0] not in ("folder", "hf"))


def from_table(
    name: str, x: Any, y: Any, seed: int = 0, classes: tuple[str, ...] = (), limit: int | None = None
) -> Problem:
    """A `Problem` from arrays: x (N, …), y (N,) or (N, q) numbers, or (N,) integers or words.

    Args:
        name: of the problem. seed: of the split into parts of 60, 20 and 20 per cent.
        classes: their names. limit: use only so many training samples.

    Raises:
        UserError: values that are no numbers or not finite, too few or constant targets, one class.
    """
    x, y = numpy_of(x, f"{name}: x"), numpy_of(y, f"{name}: y")
    if x.dtype.kind not in "biuf":
        raise UserError(f"{name}: inputs must be numbers, got {x.dtype}; encode words first")
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) < 5:
        raise UserError(f"{name}: expected as many targets as inputs and at least 5, got {x.shape} and {y.shape}")
    x = x.reshape(len(x), -1).astype(np.float64)
    if y.dtype.kind == "f":
        targets, classes, parts = y.reshape(len(y), -1), (), np.zeros(len(y), np.int64)
    elif y.dtype.kind in "biuSU" and y.ndim == 1:
        known, parts = np.unique(y, return_inverse=True)
        if len(known) < 2:
            raise UserError(f"{name}: at least two classes are needed, got {known.tolist()}")
        classes = classes if len(classes) == len(known) else tuple(map(str, known))
        targets = signs(parts, len(known))
    else:
        raise UserError(f"{name}: targets must be numbers, (N,) integers or (N,) words, got {y.dtype} {y.shape}")
    learn, rest = divide(parts, 0.4, fold(seed, "test"))
    a, b = divide(parts[rest], 0.5, fold(seed, "validation"))
    if limit is not None and limit < len(learn):
        learn = learn[divide(parts[learn], limit / len(learn), fold(seed, "limit"))[1]]
    if not np.ptp(targets[learn], axis=0).all():
        raise UserError(f"{name}: a target is constant in the training part, so there is nothing to learn")
    cut = [learn, rest[a], rest[b]]
    return Problem(name, _parts(x, cut), _parts(targets, cut), classes)


def _parts(values: np.ndarray, cut: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (torch.from_numpy(np.ascontiguousarray(values[i], np.float64)) for i in cut)
    return a, b, c


def signs(labels: np.ndarray, classes: int) -> np.ndarray:
    """±1: one column for two classes, one per class for more."""
    if classes == 2:
        return (2.0 * labels - 1)[:, None]
    return 2.0 * np.eye(classes)[labels] - 1


def from_data(data: Data, seed: int = 0) -> Problem:
    """A `Problem` from labelled samples: flattened inputs, a fifth of the training part for validation.

    Raises:
        UserError: sentences, which no kernel is for.
    """
    if hasattr(data.train, "tokenizer"):
        raise UserError(f"{data.name} holds sentences, and kernels are of numbers; take method last-layer or networks")
    train, validation = (
        (data.train, data.held_out) if data.held_out else split(data.train, 0.2, fold(seed, "validation"))
    )
    found = [predict(nn.Flatten(), part) for part in (train, validation, data.test)]
    x, y = zip(*((z.double(), torch.from_numpy(signs(t.numpy(), len(data.classes)))) for z, t in found), strict=True)
    return Problem(data.name, x, y, tuple(data.classes))


def kernel_matrix(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """κ(a, b) of rows (n, d) and (m, d): exp(−γ ‖a − b‖²), or ⟨a, b⟩ for γ = 0."""
    if gamma == 0:
        return a @ b.T
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
    return (-gamma * squares.clamp_min(0)).exp()


def landmarks(points: Tensor, count: int, gamma: float, seed: int) -> tuple[Tensor, Tensor]:
    """Nyström: `count` of the points Z and W = κ(Z, Z)^{−1/2}; φ(x) = κ(x, Z) W has ⟨φ(x), φ(x')⟩ ≈ κ(x, x')."""
    chosen = np.random.default_rng(fold(seed, "landmarks")).permutation(len(points))[:count]
    Z = points[np.sort(chosen)]
    d, V = torch.linalg.eigh(kernel_matrix(Z, Z, gamma))
    return Z, V * torch.where(d > 1e-10 * d.max(), d, torch.inf).rsqrt() @ V.T


class KernelModel(nn.Module):
    """f(x) = centre + scale · κ((x − mean)/std, points) coefficients: (n, d) raw inputs → (n, q) float64."""

    points: Tensor
    coefficients: Tensor
    mean: Tensor
    std: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, n: int, d: int, q: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        sizes = {"points": (n, d), "coefficients": (n, q), "mean": (d,), "std": (d,), "centre": (q,), "scale": (q,)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=torch.float64), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        rows = kernel_matrix((x.flatten(1).double() - self.mean) / self.std, self.points, self.gamma)
        return self.centre + self.scale * (rows @ self.coefficients)
