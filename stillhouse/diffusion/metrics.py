"""How good samples are: distances between distributions, precision and recall, diversity, modes of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating, logits_of
from stillhouse.taps import tap

ROWS = 1024  # of a matrix of distances that are in memory at once


def frechet_gaussian(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """‖m_a − m_b‖² + tr(S_a + S_b − 2 (S_a^½ S_b S_a^½)^½), computed in float64 by two symmetric eigenproblems.

    Args:
        mean_a, mean_b: (d,). cov_a, cov_b: (d, d), symmetric and positive semi-definite (they may be singular).

    Example:
        >>> one = torch.eye(2)
        >>> round(frechet_gaussian(torch.zeros(2), one, torch.tensor([3.0, 0.0]), 4 * one), 12)  # 9 + 2 (2 − 1)²
        11.0
    """
    m_a, s_a, m_b, s_b = (t.double() for t in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(s_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ s_b @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    return float((m_a - m_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of features (the squared form, as FID is reported).

    It depends on the number of samples (smaller sets lie farther away): compare at equal numbers, and beside the
    distance between two real sets.

    Args:
        a, b: (n, d) and (m, d).

    Raises:
        UserError: fewer than two samples, or features that differ in width.

    Source: arXiv 1706.08500.

    Example:
        >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> abs(frechet_distance(x, x)) < 1e-9, round(frechet_distance(x, x + 2), 6)
        (True, 12.0)
    """
    a, b = _sets(a, b, "frechet_distance", 2)
    return frechet_gaussian(
        a.mean(0), torch.cov(a.T).view(a.shape[1], -1), b.mean(0), torch.cov(b.T).view(a.shape[1], -1)
    )


def energy_distance(a: Tensor, b: Tensor, *, unbiased: bool = True) -> float:
    """2 E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖: zero only for equal distributions.

    Args:
        a, b: (n, d) and (m, d); what lies behind the first axis is flattened.
        unbiased: leave the pairs of a sample with itself out (U-statistic: right on average, may be negative).
            Otherwise the V-statistic: the distance between the two finite sets, never negative, zero for equal
            sets, and larger than the distributions' own by about (E‖a − a'‖/n + E‖b − b'‖/m).

    Raises:
        UserError: fewer than two samples, or samples that differ in width.

    Source: Székely and Rizzo, 2013.

    Example:
        >>> x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
        >>> energy_distance(x, y, unbiased=False), energy_distance(x, y)  # 2·1 − 1 − 0 and 2·1 − 2 − 0
        (1.0, 0.0)
    """
    a, b = _sets(a, b, "energy_distance", 2)

    def within(x: Tensor) -> float:
        n = len(x)
        return _total(x, x) / (n * (n - 1) if unbiased else n * n)

    return 2 * _total(a, b) / (len(a) * len(b)) - within(a) - within(b)


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Part of the made samples that lie among the real ones, and part of the real ones that lie among the made ones.

    A set's manifold is the union of balls around its samples, each as wide as the distance to the k-th nearest other
    sample of the set. Precision falls with bad samples, recall with missing variety.

    Args:
        real, made: features, (n, d) and (m, d).
        k: neighbours.

    Raises:
        UserError: not more than k samples in a set.

    Source: arXiv 1904.06991.

    Example:
        >>> line = torch.arange(10.0)[:, None]
        >>> precision_recall(line, line[:5]), precision_recall(line, line + 100)
        ((1.0, 0.8), (0.0, 0.0))
    """
    real, made = _sets(real, made, "precision_recall", k + 1)
    return _inside(made, real, k), _inside(real, made, k)


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean of 1 − cosine over the pairs of samples with one label, then over the labels with two samples or more.

    Args:
        features: (n, d). labels: (n,).

    Example:
        >>> round(diversity(torch.eye(4), torch.tensor([0, 0, 1, 1])), 6), diversity(torch.ones(2, 3), torch.zeros(2))
        (1.0, 0.0)
    """
    unit = nn.functional.normalize(features.flatten(1).double(), dim=1)
    found = []
    for label in labels.unique():
        mine = unit[labels == label]
        n = len(mine)
        if n > 1:  # Σ_{i≠j} cos = ‖Σ u‖² − Σ ‖u‖²
            cosines = (mine.sum(0).square().sum() - mine.square().sum()) / (n * (n - 1))
            found.append(1 - cosines)
    if not found:
        raise UserError("diversity needs two samples of one condition")
    return max(0.0, float(torch.stack(found).mean()))


def modes(points: Tensor, centres: Tensor, std: float, *, least: float = 0.02, wide: float = 4.0) -> dict[str, float]:
    """How samples lie about the centres of a mixture of isotropic Gaussians.

    Args:
        points: (n, d). centres: (K, d). std: c of the components.
        least: part of the samples from which on a mode counts as held.
        wide: samples farther than this many c from every centre belong to none.

    Returns:
        ``modes`` held, ``share`` of the samples within `wide` c of a centre, and ``within``, the standard deviation per
        coordinate about the mode's own mean, over those samples (NaN without any).

    Example:
        >>> centres = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
        >>> modes(torch.tensor([[0.5, 0.0], [-0.5, 0.0], [5.0, 5.0]]), centres, 1.0)["share"]
        0.6666666666666666
    """
    points, centres = _sets(points, centres, "modes", 1)
    distance, nearest = torch.cdist(points, centres).min(1)
    near = distance <= wide * std
    counts = torch.bincount(nearest[near], minlength=len(centres))
    squares, free = 0.0, 0
    for k in counts.nonzero().flatten().tolist():
        mine = points[near & (nearest == k)]
        squares += float((mine - mine.mean(0)).square().sum())
        free += (len(mine) - 1) * mine.shape[1]
    return {
        "modes": float((counts > least * len(points)).sum()),
        "share": float(near.double().mean()),
        "within": (squares / free) ** 0.5 if free else float("nan"),
    }


class Judge:
    """A fixed classifier whose logits and features samples are judged by.

    It must have been trained on real data only, and before any student.

    Args:
        classifier: gives logits (n, c).
        at: the module whose output are the features (see `stillhouse.taps`).
        real: real samples (n, …) that the distribution is compared with.
        at_once: samples in one forward pass.

    Example:
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> judge = Judge(nn.Sequential(nn.Identity(), nn.Linear(4, 2)), "0", x)
        >>> found = judge(x, torch.zeros(50, dtype=torch.long))
        >>> abs(found["fd"]) < 1e-9, found["precision"], found["recall"]
        (True, 1.0, 1.0)
    """

    def __init__(self, classifier: nn.Module, at: str, real: Tensor, at_once: int = 512):
        self.classifier, self.at, self.at_once = classifier.eval().requires_grad_(False), at, at_once
        self.real = self.look(real)[1]

    @torch.no_grad()
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, c) and features (n, d) of samples, on the CPU."""
        logits, features = [], []
        weight = next(self.classifier.parameters(), x)
        with evaluating(self.classifier), tap(self.classifier, self.at) as found:
            for part in x.split(self.at_once):
                logits.append(logits_of(self.classifier(part.to(weight.device, weight.dtype))).cpu())
                features.append(found[self.at].flatten(1).cpu())
        return torch.cat(logits), torch.cat(features)

    def __call__(self, x: Tensor, labels: Tensor | None = None, k: int = 3) -> dict[str, float]:
        """``fd``, ``precision``, ``recall``; with labels also ``accuracy`` (of the asked) and ``diversity``."""
        logits, features = self.look(x)
        precision, recall = precision_recall(self.real, features, k)
        found = {"fd": frechet_distance(self.real, features), "precision": precision, "recall": recall}
        if labels is not None:
            found["accuracy"] = float((logits.argmax(1) == labels.cpu()).double().mean())
            found["diversity"] = diversity(features, labels.cpu())
        return found


# -- parts ---------------------------------------------------------------------------------------------------------


def _sets(a: Tensor, b: Tensor, who: str, least: int) -> tuple[Tensor, Tensor]:
    a, b = a.detach().flatten(1).double(), b.detach().flatten(1).double()
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise UserError(
            f"{who} needs two sets of at least {least} samples of one width, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return a, b


def _total(a: Tensor, b: Tensor) -> float:
    """Σ ‖a_i − b_j‖, rows in pieces; exact differences, so that a sample is at distance 0 from itself."""
    exact = "donot_use_mm_for_euclid_dist"
    return sum(float(torch.cdist(part, b, compute_mode=exact).sum()) for part in a.split(ROWS))


def _inside(points: Tensor, manifold: Tensor, k: int) -> float:
    """Part of the points that lie in some ball of the manifold."""
    exact = "donot_use_mm_for_euclid_dist"
    radii = torch.cat(
        [torch.cdist(part, manifold, compute_mode=exact).kthvalue(k + 1, dim=1).values for part in manifold.split(ROWS)]
    )  # the nearest of all is the sample itself
    found = [(torch.cdist(part, manifold, compute_mode=exact) <= radii).any(1) for part in points.split(ROWS)]
    return float(torch.cat(found).double().mean())
