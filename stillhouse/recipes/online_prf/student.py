"""The student: S(d) = Σ_t θ_t φ(t, d) + b, fitted to one query's re-ranker scores. NumPy, float64, no labels.

F (k, V) are the index's own term weights of the k scored documents, s (k,) the re-ranker's scores. s is standardised
and F centred first: b is the mean, which no ranking depends on, and λ means the same for every re-ranker.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from stillhouse.recipes.online_prf.config import Config

Vector = np.ndarray


def features(rows: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, list[str]]:
    """(k, V) term weights and their V terms, in the order of the alphabet.

    Example:
        >>> features([{"b": 2.0}, {"a": 1.0}])[0].tolist()
        [[0.0, 2.0], [1.0, 0.0]]
    """
    terms = sorted(set().union(*rows))
    column = {t: j for j, t in enumerate(terms)}
    out = np.zeros((len(rows), len(terms)))
    for i, row in enumerate(rows):
        out[i, [column[t] for t in row]] = list(row.values())
    return out, terms


def standardised(s: Vector) -> Vector:
    """(s − mean) / std over the documents; zeros where all scores are alike (up to rounding)."""
    centred = s - s.mean()
    std = centred.std()
    return centred / std if std > 1e-12 * max(1.0, np.abs(s).max()) else np.zeros_like(centred)


def ridge(F: np.ndarray, s: Vector, lam: float) -> Vector:
    """argmin ‖F_c θ − s_c‖² + λ‖θ‖² = F_cᵀ (F_c F_cᵀ + λI)⁻¹ s_c = (F_cᵀ F_c + λI)⁻¹ F_cᵀ s_c, the smaller of the two.

    It also minimises the pairwise margin MSE, Σ_{i<j} ((S_i − S_j) − (s_i − s_j))² + kλ‖θ‖²: the sum over pairs is k
    times the squared error with a free bias. λ = 0 gives the shortest exact least-squares fit, λ = ∞ zeros.

    Example:
        >>> ridge(np.array([[1.0], [3.0]]), np.array([0.0, 4.0]), 0.0)
        array([2.])
    """
    Fc, sc = F - F.mean(0), s - s.mean()
    k, V = F.shape
    if math.isinf(lam) or not V:
        return np.zeros(V)
    if lam == 0:
        return np.linalg.lstsq(Fc, sc, rcond=None)[0]
    if k <= V:
        return Fc.T @ np.linalg.solve(Fc @ Fc.T + lam * np.eye(k), sc)
    return np.linalg.solve(Fc.T @ Fc + lam * np.eye(V), Fc.T @ sc)


def positive_ridge(F: np.ndarray, s: Vector, lam: float) -> Vector:
    """The ridge with θ ≥ 0: non-negative least squares on F_c with √λ I below it."""
    from scipy.optimize import nnls

    Fc, sc = F - F.mean(0), s - s.mean()
    V = F.shape[1]
    if math.isinf(lam):
        return np.zeros(V)
    return nnls(np.vstack([Fc, math.sqrt(lam) * np.eye(V)]), np.concatenate([sc, np.zeros(V)]))[0]


def lasso(F: np.ndarray, s: Vector, penalty: float, positive: bool = False) -> Vector:
    """argmin ‖F_c θ − s_c‖² / 2k + penalty · ‖θ‖₁, by scikit-learn's coordinate descent, to a hundredth of ‖s_c‖²."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    model = Lasso(penalty, fit_intercept=False, positive=positive, max_iter=1000, tol=1e-2)
    with warnings.catch_warnings():  # it only chooses terms; their weights are fitted again
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(F - F.mean(0), s - s.mean()).coef_


def listwise(F: np.ndarray, s: Vector, T: float, positive: bool = False, steps: int = 100, lr: float = 0.02) -> Vector:
    """T² KL( softmax(s/T) ‖ softmax(Fθ/T) ), so many steps of Adam from θ = 0; its gradient is T F_cᵀ (q − p)."""
    F = F - F.mean(0)
    theta, m, v = (np.zeros(F.shape[1]) for _ in range(3))
    p = softmax(s / T)
    for t in range(1, steps + 1):
        g = T * (F.T @ (softmax(F @ theta / T) - p))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta = theta - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        theta = theta.clip(0) if positive else theta
    return theta


def softmax(x: Vector) -> Vector:
    e = np.exp(x - x.max())
    return e / e.sum()


def learn(F: np.ndarray, s: Vector, cfg: Config) -> Vector:
    """θ (V,) with at most `cfg.terms` weights: fit, keep the terms that move the scores most, fit again on those.

    The importance of a term is |θ_t| · std_d φ(t, d).
    """
    target = standardised(s)
    dense = first_fit(F, target, cfg)
    importance = (dense.clip(0) if cfg.non_negative else np.abs(dense)) * F.std(0)
    importance[(F != 0).sum(0) < cfg.min_df] = 0
    kept = np.argsort(-importance, kind="stable")[: cfg.terms]
    kept = np.sort(kept[importance[kept] > 0])
    theta = np.zeros(F.shape[1])
    if len(kept):
        theta[kept] = second_fit(F[:, kept], target, cfg)
    return theta


def first_fit(F: np.ndarray, target: Vector, cfg: Config) -> Vector:
    if cfg.student == "lasso":
        return lasso(F, target, cfg.lasso, cfg.non_negative)
    if cfg.student == "listwise":
        return listwise(F, target, cfg.temperature, cfg.non_negative)
    return ridge(F, target, cfg.ridge)


def second_fit(F: np.ndarray, target: Vector, cfg: Config) -> Vector:
    """The lasso's terms are refitted by ridge too, which takes its shrinkage back."""
    if cfg.student == "listwise":
        return listwise(F, target, cfg.temperature, cfg.non_negative)
    return (positive_ridge if cfg.non_negative else ridge)(F, target, cfg.refit_ridge)


def expand(theta: Mapping[str, float], words: Mapping[str, float], mix: float) -> dict[str, float]:
    """(1 − a) θ/‖θ‖₁ + a · q/‖q‖₁, largest magnitude first; the question alone where θ is zero.

    Example:
        >>> expand({"a": 3.0, "b": -1.0}, {"a": 1.0}, 0.5)
        {'a': 0.875, 'b': -0.125}
    """
    size, total = sum(map(abs, theta.values())), sum(words.values())
    if not size:
        mix, size = 1.0, 1.0
    made = {t: (1 - mix) * w / size for t, w in theta.items()}
    for t, w in words.items():
        made[t] = made.get(t, 0.0) + mix * w / total
    return dict(sorted(((t, w) for t, w in made.items() if w), key=lambda p: (-abs(p[1]), p[0])))
