"""How well a trained network's features fit a new task, from a few labelled samples and forward passes alone.

Pure functions of arrays: features (n, d) or the source classifier's probabilities (n, Z), and labels (n,). A larger
score promises a better start. `METRICS` has them by name.

| metric | looks at | range | source |
|---|---|---|---|
| `parc` | features | [−1, 1] | Bolya et al., NeurIPS 2021, arXiv 2111.06977 |
| `leep` | probabilities | ≤ 0 | Nguyen et al., ICML 2020, arXiv 2002.12462 |
| `nce` | probabilities | ≤ 0 | Tran et al., ICCV 2019, arXiv 1908.08142 |
| `h_score` | features | [0, C − 1] | Bao et al., ICIP 2019; shrunk: Ibrahim et al., arXiv 2110.06893 |
| `knn` | features | [0, 1] | leave-one-out accuracy |
| `logistic` | features | [0, 1] | cross-validated accuracy of a linear classifier |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stillhouse.errors import UserError, did_you_mean

Array = np.ndarray
GRID = tuple(10.0**k for k in range(-4, 5))  # inverse strengths of the L2 penalty that `logistic` chooses from


def _checked(x: Array, labels: Array, what: str) -> tuple[Array, Array]:
    x, y = np.asarray(x, np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) < 2:
        raise UserError(f"{what}: needs (n, d) values and (n,) labels of n >= 2 samples, got {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise UserError(f"{what}: sample {int(np.argmin(np.isfinite(x).all(1)))} has features that are not finite")
    classes, y = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"{what}: the labelled samples are all of one class; at least two classes are needed")
    return x, y


def standardised(features: Array) -> Array:
    """Each feature with mean 0 and spread 1 over the samples; features that never change are left out.

    Example:
        >>> standardised(np.array([[1.0, 5.0], [3.0, 5.0]]))
        array([[-1.],
               [ 1.]])
    """
    x = np.asarray(features, np.float64)
    spread = x.std(0)
    alive = spread > 1e-9 * np.maximum(1e-30, np.abs(x).max(0))
    return (x[:, alive] - x[:, alive].mean(0)) / spread[alive]


def parc(features: Array, labels: Array, dims: int = 0) -> float:
    """Spearman correlation of 1 − corr(f_i, f_j) and 1 − corr(y_i, y_j) over pairs of samples i < j (PARC).

    Features are standardised over the samples first, labels are one-hot. Ties get their mean rank; distances are
    rounded to ten decimals, so that those which are equal but for rounding are tied.

    Args:
        features: (n, d). labels: (n,).
        dims: first reduce to so many principal components, which the standardising then whitens; at most n/4 are
            taken, since whitened samples are all equally far apart when there are as many components as samples. 0: no.

    Returns:
        In [−1, 1]; 0 where the features say nothing at all (all constant). The authors' code has 100 times that.

    Example:
        >>> y = np.array([0, 0, 1, 1, 2, 2])
        >>> round(parc(np.eye(3)[y], y), 6)
        1.0
    """
    from scipy.stats import spearmanr

    x, y = _checked(features, labels, "parc")
    if dims:
        x = x - x.mean(0)
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        k = max(1, min(dims, len(x) // 4))
        x = u[:, :k] * s[:k]
    x = standardised(x)
    if x.shape[1] == 0:
        return 0.0
    x = x - x.mean(1, keepdims=True)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(length > 0, length, 1)
    pairs = np.triu_indices(len(x), 1)
    apart = np.round(1 - (x @ x.T)[pairs], 10)
    other = (y[:, None] != y[None])[pairs]  # the ranks of one-hot correlations: only equal or unequal counts
    if (apart == apart[0]).all() or (other == other[0]).all():
        return 0.0
    return float(spearmanr(apart, other).statistic)


def leep(probabilities: Array, labels: Array) -> float:
    """mean_i log Σ_z P(y_i | z) θ(x_i)_z, P(y, z) = (1/n) Σ_i θ(x_i)_z [y_i = y] (LEEP).

    Args:
        probabilities: θ, (n, Z), what the source classifier says in its own classes. labels: (n,).

    Returns:
        ≤ 0, nats; 0 if the source's classes tell the labels.
    """
    p, y = _checked(probabilities, labels, "leep")
    joint = np.stack([p[y == c].sum(0) for c in range(y.max() + 1)]) / len(y)
    given = joint / np.maximum(joint.sum(0), 1e-300)
    return float(np.log(np.maximum((given[y] * p).sum(1), 1e-300)).mean())


def nce(probabilities: Array, labels: Array) -> float:
    """−H(Y | Z) of the labels given the source's most likely class (NCE): Σ P(y, z) log P(y | z), ≤ 0, nats.

    Example:
        >>> nce(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 0])) == 0
        True
    """
    p, y = _checked(probabilities, labels, "nce")
    return leep(np.eye(p.shape[1])[p.argmax(1)], y)  # LEEP of a source that is sure


def h_score(features: Array, labels: Array, shrink: bool = True) -> float:
    """tr(Σ⁻¹ B), Σ the features' covariance and B that of their class means (H-score).

    Args:
        features: (n, d). labels: (n,).
        shrink: (1−α) tr(((1−α) Σ + α·tr(Σ)/d·I)⁻¹ B), α of Ledoit and Wolf. Without it Σ⁻¹ is a pseudo-inverse, and
            where n ≤ d every source gets C − 1.

    Returns:
        In [0, C − 1].
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    x, y = _checked(features, labels, "h_score")
    x = standardised(x)
    if x.shape[1] == 0:
        return 0.0
    means = np.stack([x[y == c].mean(0) for c in range(y.max() + 1)])[y]
    within, between = x.T @ x / len(x), means.T @ means / len(x)
    a = float(ledoit_wolf_shrinkage(x, assume_centered=True)) if shrink else 0.0
    size = len(within)
    covariance = (1 - a) * within + a * np.trace(within) / size * np.eye(size)
    return float((1 - a) * np.trace(np.linalg.pinv(covariance, hermitian=True) @ between))


def knn(features: Array, labels: Array, k: int = 1) -> float:
    """Leave-one-out accuracy of the k nearest neighbours by the cosine of standardised features.

    Equal votes go to the class whose neighbours are nearer in sum.

    Example:
        >>> knn(np.array([[0.0], [0.1], [5.0], [5.1]]), np.array([0, 0, 1, 1]))
        1.0
    """
    x, y = _checked(features, labels, "knn")
    x = standardised(x)
    if x.shape[1] == 0:
        return float(np.bincount(y).max() / len(y))
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    near = x @ x.T
    np.fill_diagonal(near, -np.inf)
    first = np.argsort(-near, axis=1, kind="stable")[:, : min(k, len(y) - 1)]
    votes = np.zeros((len(y), y.max() + 1))
    for column in first.T:  # a vote counts 1 and, to break ties, a little of its similarity
        votes[np.arange(len(y)), y[column]] += 1 + 1e-6 * near[np.arange(len(y)), column]
    return float((votes.argmax(1) == y).mean())


@dataclass(frozen=True)
class Probe:
    """A linear classifier on features: logits = f @ weight.T + bias.

    Attributes:
        weight: (C, d). bias: (C,).
        C: the inverse strength of its penalty, chosen by cross-validation; the inputs are standardised for the penalty.
        held_out: (n, C) probabilities of each sample by a classifier that did not see it; None with one sample a class.
    """

    weight: Array
    bias: Array
    C: float
    held_out: Array | None


def probe(features: Array, labels: Array, classes: int, *, folds: int = 3, grid: tuple[float, ...] = GRID) -> Probe:
    """Logistic regression with the penalty that predicts held-out folds best (least negative log-likelihood).

    Args:
        features: (n, d). labels: (n,), each of 0…classes−1 at least once.
        folds: of the cross-validation, fewer where a class has fewer samples; with a single one, C is 1.
        grid: inverse penalties to choose from.

    Raises:
        UserError: a class without a sample.
    """
    from sklearn.model_selection import StratifiedKFold

    x, y = np.asarray(features, np.float64), np.asarray(labels)
    counts = np.bincount(y, minlength=classes)
    if len(counts) > classes or counts.min() == 0:
        raise UserError(f"probe: every class needs a labelled sample, class {int(counts.argmin())} has none")
    spread = x.std(0)
    alive = spread > 1e-9 * np.maximum(1e-30, np.abs(x).max(0))
    scale, mean = np.where(alive, 1 / np.where(alive, spread, 1), 0), x.mean(0)
    z, folds = (x - mean) * scale, min(folds, int(counts.min()))
    best, held = 1.0, None
    if folds > 1:
        parts = list(StratifiedKFold(folds).split(z, y))
        tried = {}
        for c in grid:
            tried[c] = np.empty((len(y), classes))
            for rest, part in parts:
                tried[c][part] = _softmax(_logits(z[part], *_fit(z[rest], y[rest], c, classes)))
        best = min(tried, key=lambda c: -np.log(np.maximum(tried[c][np.arange(len(y)), y], 1e-300)).mean())
        held = tried[best]
    weight, bias = _fit(z, y, best, classes)
    weight = weight * scale
    return Probe(weight, bias - weight @ mean, best, held)


def _fit(z: Array, y: Array, c: float, classes: int) -> tuple[Array, Array]:
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=c, max_iter=2000).fit(z, y)
    if classes == 2:  # scikit-learn gives the log odds alone
        return np.vstack([-found.coef_, found.coef_]) / 2, np.concatenate([-found.intercept_, found.intercept_]) / 2
    return found.coef_, found.intercept_


def _logits(z: Array, weight: Array, bias: Array) -> Array:
    return z @ weight.T + bias


def _softmax(z: Array) -> Array:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logistic(features: Array, labels: Array, folds: int = 3) -> float:
    """Accuracy of `probe` on held-out folds; of the largest class where a class has a single sample."""
    x, y = _checked(features, labels, "logistic")
    held = probe(x, y, int(y.max()) + 1, folds=folds).held_out
    return float(np.bincount(y).max() / len(y)) if held is None else float((held.argmax(1) == y).mean())


@dataclass(frozen=True)
class Metric:
    """A similarity by name: what it looks at, and how its score becomes a number ≥ 0 that weights can be made of."""

    score: Callable[[Array, Array], float]
    looks_at: Literal["features", "probabilities"]
    positive: Callable[[float], float] = lambda e: max(0.0, e)


METRICS = {
    "parc": Metric(parc, "features"),
    "leep": Metric(leep, "probabilities", math.exp),  # a mean log-likelihood: its exponential is a mean probability
    "nce": Metric(nce, "probabilities", math.exp),
    "h-score": Metric(h_score, "features"),
    "knn": Metric(knn, "features"),
    "logistic": Metric(logistic, "features"),
}


def metric(name: str) -> Metric:
    """The metric of this name.

    Raises:
        UserError: there is none.
    """
    if name not in METRICS:
        raise UserError(f"no task similarity {name!r}; {did_you_mean(name, METRICS)}")
    return METRICS[name]


def weights_of(scores: Array | list[float], power: float) -> Array:
    """w_s = ẽ_s^p / Σ_j ẽ_j^p with ẽ = max(0, e): p = 0 is uniform, p = ∞ gives all to the largest.

    Args:
        scores: (S,). power: p ≥ 0; may be infinite, and then equal largest scores share.

    Raises:
        UserError: p < 0, a score that is not finite, or no score above 0 (and p > 0).

    Example:
        >>> weights_of([0.4, 0.2, -0.1], 1).round(3)
        array([0.667, 0.333, 0.   ])
    """
    e, shown = np.maximum(0.0, np.asarray(scores, np.float64)), [round(float(s), 4) for s in scores]
    if not power >= 0 or not np.isfinite(e).all() or not len(e):
        raise UserError(f"weights_of: needs finite scores and a power >= 0, got {shown} and {power}")
    if power == 0:
        return np.full(len(e), 1 / len(e))
    if e.max() <= 0:
        raise UserError(f"no source has a similarity above 0 ({shown}); give other sources, or power 0")
    if math.isinf(power):
        return (e == e.max()) / (e == e.max()).sum()
    ratio = (e / e.max()) ** power  # the largest is 1: a large power cannot underflow them all
    return ratio / ratio.sum()
