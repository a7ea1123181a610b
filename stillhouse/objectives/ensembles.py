"""One common target from the logits of a group: KDCL (CVPR 2020) and its General weights.

All targets stay attached to `z`; `stillhouse.objectives.kl` detaches its teacher, which is what KDCL does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import _peers, cross_entropy


def kdcl_mean(z: Tensor) -> Tensor:
    """Σ_i z_i / M, (M, n, C) -> (n, C): the target of the usual re-implementations of KDCL."""
    return _peers(z, "kdcl_mean").mean(0)


def kdcl_naive(z: Tensor, y: Tensor) -> Tensor:
    """Per sample the logits of the peer with the smallest cross-entropy; the first one on a tie.

    Args:
        z: (M, n, C) logits.
        y: (n,) labels.

    Returns:
        (n, C).

    Example:
        >>> kdcl_naive(torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([1]))
        tensor([[0., 1.]])
    """
    z = _peers(z, "kdcl_naive")
    best = cross_entropy(z.detach(), y).argmin(0)
    return z[best, torch.arange(z.shape[1], device=z.device)]


def kdcl_linear(z: Tensor, y: Tensor, steps: int = 60) -> Tensor:
    """Σ_i a_i z_i with a from `linear_weights`: the best convex combination of this batch, (n, C).

    The weights are constants to the gradient; the logits are not.
    """
    z = _peers(z, "kdcl_linear")
    return torch.tensordot(linear_weights(z, y, steps).to(z.dtype), z, dims=1)


@torch.no_grad()
def linear_weights(z: Tensor, y: Tensor, steps: int = 60, gap: float = 1e-9) -> Tensor:
    """a = argmin over the simplex of mean_n CE(Σ_i a_i z_i, y), to a certified gap.

    The problem is convex, so f(a) − f* <= ⟨a, ∇f⟩ − min ∇f, which is where it stops. A primal-dual
    interior point: Newton steps on ∇f − s + λ1 = 0, a·s = μ → 0, 1ᵀa = 1. Computed in float64, detached.

    Args:
        z: (M, n, C) logits.
        y: (n,) labels.
        steps: most Newton steps; about 15 are used.
        gap: largest distance of the loss from its minimum, as a fraction of max(1, loss).

    Returns:
        (M,) float64, positive, sums to 1.

    Example:
        >>> z = torch.tensor([[[4.0, 0.0], [0.0, 4.0]], [[0.0, 4.0], [4.0, 0.0]]])
        >>> linear_weights(z, torch.tensor([0, 1])).round(decimals=6)
        tensor([1., 0.], dtype=torch.float64)
    """
    z = _peers(z, "linear_weights").double()
    m, n, _ = z.shape

    def loss(a: Tensor, mu: float) -> Tensor:
        return cross_entropy(torch.tensordot(a, z, dims=1), y).mean() - mu * a.log().sum()

    a, dual = z.new_full((m,), 1 / m), None
    kkt = z.new_zeros(m + 1, m + 1)
    kkt[:m, m] = kkt[m, :m] = 1
    for _ in range(steps):
        p = torch.tensordot(a, z, dims=1).softmax(-1)
        mean = (p * z).sum(-1)
        grad = (mean - z[:, torch.arange(n, device=z.device), y]).mean(-1)
        if float(a @ grad - grad.min()) <= gap * max(1.0, float(loss(a, 0.0))):
            break
        s = grad - grad.min() + 0.1 * (grad.max() - grad.min()) if dual is None else dual
        mu = 0.1 * float(a @ s) / m
        spread = (p.sqrt() * (z - mean.unsqueeze(-1))).flatten(1)
        kkt[:m, :m] = spread @ spread.T / n + torch.diag(s / a)
        move = torch.linalg.solve(kkt, torch.cat([mu / a - grad, grad.new_zeros(1)]))[:m]
        turn = (mu - s * move) / a - s
        t, here, slope = _inside(a, move), float(loss(a, mu)), float((mu / a - grad) @ move)
        noise = 1e-13 * max(1.0, abs(here))
        while float(loss(a + t * move, mu)) > here - 0.01 * t * slope + noise and t > 1e-6:
            t /= 2
        a, dual = a + t * move, s + min(t, _inside(s, turn)) * turn
    return a / a.sum()


def _inside(x: Tensor, move: Tensor) -> float:
    """The longest step up to 1 that keeps x + step·move positive, short of the boundary."""
    return min(1.0, 0.995 / max(1e-300, float((-move / x).max())))


def kdcl_minlogit(z: Tensor, y: Tensor) -> Tensor:
    """min over peers of z_i − z_i[y], element by element; 0 for the true class.

    Args:
        z: (M, n, C) logits.
        y: (n,) labels.

    Returns:
        (n, C). Its softmax gives the true class at least the probability any peer gives it.

    Example:
        >>> kdcl_minlogit(torch.tensor([[[2.0, 1.0]], [[0.0, 3.0]]]), torch.tensor([0]))
        tensor([[ 0., -1.]])
    """
    z = _peers(z, "kdcl_minlogit")
    true = z.gather(-1, y.expand(z.shape[:2]).unsqueeze(-1))
    return (z - true).amin(0)


@torch.no_grad()
def error_covariance(z: Tensor, y: Tensor) -> Tensor:
    """C_ij = mean_n Σ_c (p_i − y)_c (p_j − y)_c: second moment of the peers' errors, p = softmax(z).

    Must come from held-out data: on training data the most over-fitted peer wins. Detached.

    Args:
        z: (M, N, C) held-out logits.
        y: (N,) labels.

    Returns:
        (M, M) float64, symmetric, positive semi-definite.
    """
    z = _peers(z, "error_covariance").double()
    error = (z.softmax(-1) - F.one_hot(y, z.shape[-1])).flatten(1)
    return error @ error.T / z.shape[1]


@torch.no_grad()
def general_weights(errors_cov: Tensor, ridge: float = 1e-3) -> Tensor:
    """w = C⁻¹1 / 1ᵀC⁻¹1: the combination of least squared error (KDCL-General; Perrone & Cooper 1993).

    Args:
        errors_cov: (M, M) from `error_covariance`.
        ridge: C ← C + ridge · (tr C / M) · I, so that peers with the same errors stay solvable.

    Returns:
        (M,), sums to 1. Weights may be negative where errors are strongly correlated.

    Raises:
        UserError: not a square matrix, or not positive.

    Example:
        >>> general_weights(torch.diag(torch.tensor([1.0, 1.0, 2.0])), ridge=0)
        tensor([0.4000, 0.4000, 0.2000])
    """
    m = len(errors_cov)
    if errors_cov.shape != (m, m) or ridge < 0:
        raise UserError(f"general_weights: needs (M, M), ridge >= 0; got {tuple(errors_cov.shape)}, {ridge}")
    c = errors_cov + ridge * errors_cov.diagonal().mean() * torch.eye(m).to(errors_cov)
    w, bad = torch.linalg.solve_ex(c, torch.ones(m).to(c))
    if int(bad) or not bool(torch.isfinite(w).all()) or float(w.sum()) <= 0:
        raise UserError("general_weights: the error covariance is singular; give ridge > 0 or drop a peer")
    return w / w.sum()
