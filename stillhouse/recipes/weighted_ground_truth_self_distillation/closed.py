"""Self-distillation of a ridge regression, in closed form (arXiv 2102.13088). Everything in float64.

K = κ(X, X) = V diag(d) Vᵀ, S = K (K + λI)⁻¹, α the weight of the ground truth:

    ŷ_1 = S Y,   ŷ_τ = S [α Y + (1−α) ŷ_{τ−1}],   f_τ(x) = κ(x, X) (K + λI)⁻¹ [α Y + (1−α) ŷ_{τ−1}]            (1)
    ŷ_τ = V diag(b_τ) Vᵀ Y,   b_τ = a [r^{τ−1} + α (1 − r^{τ−1}) / (1 − r)],   a = d/(d + λ),   r = (1−α) a   (2)
    f_∞ = ridge regression with λ/α for α > 0, and 0 for α = 0                                                 (3)
    α*_τ = ⟨u − v, ỹ − v⟩ / ‖u − v‖²,   u = f_1(x̃),   v: trained on ŷ_{τ−1} alone                             (4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.weights import optimal_mix


class Smoother(Protocol):
    """A linear smoother: coefficients are linear in the targets, predictions in the coefficients."""

    rows: Tensor
    """What predicts the training samples: ``rows @ coefficients``; of other samples it is made alike."""

    def coefficients(self, y: Tensor) -> Tensor: ...


class Kernel:
    """Kernel ridge regression: c = (K + λI)⁻¹ y, prediction κ(x, X) c; K + λI is factored once.

    Args:
        K: (n, n) symmetric, positive semi-definite. ridge: λ > 0.

    Example:
        >>> s = Kernel(torch.eye(2), 1.0)
        >>> (s.rows @ s.coefficients(torch.tensor([[4.0], [2.0]]))).flatten().float()
        tensor([2., 1.])
    """

    def __init__(self, K: Tensor, ridge: float):
        if K.dim() != 2 or K.shape[0] != K.shape[1]:
            raise UserError(f"Kernel: needs a square kernel matrix (n, n), got {tuple(K.shape)}")
        self.rows, self.ridge = K.double(), _positive(ridge)
        self._factor = _cholesky(self.rows, ridge)

    def coefficients(self, y: Tensor) -> Tensor:
        return torch.cholesky_solve(y.double(), self._factor)


class Features:
    """The same with features Φ (n, d), K = Φ Φᵀ: c = (ΦᵀΦ + λI)⁻¹ Φᵀ y, prediction φ(x) c; for n far above d."""

    def __init__(self, features: Tensor, ridge: float):
        if features.dim() != 2:
            raise UserError(f"Features: needs features (n, d), got {tuple(features.shape)}")
        self.rows, self.ridge = features.double(), _positive(ridge)
        self._factor = _cholesky(self.rows.T @ self.rows, ridge)

    def coefficients(self, y: Tensor) -> Tensor:
        return torch.cholesky_solve(self.rows.T @ y.double(), self._factor)


def _positive(ridge: float) -> float:
    if not ridge > 0:
        raise UserError(f"the ridge must be a positive number, got {ridge}")
    return ridge


def _cholesky(gram: Tensor, ridge: float) -> Tensor:
    """Of gram + ridge·I; rounding can make it indefinite for a tiny ridge."""
    made, info = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if int(info):
        raise UserError(f"the kernel matrix plus ridge {ridge:g} is not positive definite; give a larger ridge")
    return made


@dataclass(frozen=True)
class Step:
    """One step of a chain: the label weight, the targets (n, q) and the coefficients they give."""

    alpha: float
    target: Tensor
    coefficients: Tensor


def chain(smoother: Smoother, y: Tensor, alphas: Sequence[float]) -> list[Step]:
    """Steps 1, 2, … by equation (1): the first on the labels alone, then one per weight.

    Args:
        smoother: `Kernel` or `Features`, or anything like them. y: (n, q) targets. alphas: label weights of steps 2 on.
    """
    made = [_step(smoother, y, y, 1.0)]
    for alpha in alphas:
        made.append(_step(smoother, y, smoother.rows @ made[-1].coefficients, alpha))
    return made


def _step(smoother: Smoother, y: Tensor, before: Tensor, alpha: float) -> Step:
    # Written so that alpha 1 gives the labels bit for bit.
    target = y.double() if alpha == 1 else alpha * y.double() + (1 - alpha) * before.double()
    return Step(alpha, target, smoother.coefficients(target))


def greedy(smoother: Smoother, y: Tensor, rows: Tensor, held_out: Tensor, steps: int, clip: bool = False) -> list[Step]:
    """`chain` whose every weight is (4), the best for held-out samples given the steps before.

    No step is worse on the held-out samples than step 1, which α = 1 would repeat; that need not hold between later
    ones, nor on other samples.

    Args:
        rows: (m, ·) what predicts the held-out samples: κ(x̃, X) or φ(x̃). held_out: (m, q) their targets.
        steps: in all, the first included. clip: keep weights in [0, 1] instead of going beyond.
    """
    made = [_step(smoother, y, y, 1.0)]
    u = rows.double() @ made[0].coefficients
    for _ in range(steps - 1):
        fitted = smoother.rows @ made[-1].coefficients
        alpha = optimal_mix(u, rows.double() @ smoother.coefficients(fitted), held_out.double())
        made.append(_step(smoother, y, fitted, min(1.0, max(0.0, alpha)) if clip else alpha))
    return made


def shrinkage(eigenvalues: Tensor, ridge: float, alpha: float, step: int) -> Tensor:
    """b_τ of (2) for each eigenvalue d of K, without going through the steps; their sum is trace(B_τ).

    Example:
        >>> shrinkage(torch.tensor([1.0]), 1.0, 0.0, 3).tolist()  # pure self-distillation: a³
        [0.125]
    """
    d = eigenvalues.double().clamp_min(0)
    return d * _dual(d, ridge, alpha, step)


def _dual(d: Tensor, ridge: float, alpha: float, step: int) -> Tensor:
    """b_τ / d, finite where d is 0."""
    r = (1 - alpha) * d / (d + ridge)
    power = r ** (step - 1)
    # 1 − r as a sum of positive parts: of a large d little would be left after the subtraction.
    return (power + alpha * (1 - power) * (d + ridge) / (alpha * d + ridge)) / (d + ridge)


def after(K: Tensor, y: Tensor, ridge: float, alpha: float, step: int) -> Tensor:
    """Coefficients (n, q) of step τ by (2), in one go."""
    d, V = torch.linalg.eigh(K.double())
    return V @ (_dual(d.clamp_min(0), _positive(ridge), alpha, step)[:, None] * (V.T @ y.double()))


def limit(make: type[Kernel | Features], rows: Tensor, y: Tensor, ridge: float, alpha: float) -> Tensor:
    """Coefficients of the limit (3): ridge λ/α, or nothing for α = 0.

    Args:
        make: `Kernel` with its matrix as `rows`, or `Features` with features.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"limit: the label weight must lie in [0, 1], got {alpha}")
    if alpha == 0:
        return torch.zeros(rows.shape[1], y.shape[1], dtype=torch.float64)
    return make(rows, ridge / alpha).coefficients(y)


def mse(prediction: Tensor, target: Tensor) -> float:
    """Mean squared error over samples and outputs."""
    return float((prediction.double() - target.double()).square().mean())
