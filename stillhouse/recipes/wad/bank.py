"""The feature bank: how near a pool sample is to each class, what weight that gives, and who is taken in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import UserError


def similarities(
    features: Tensor, bank: Tensor, labels: Tensor, classes: int, *, chunk: int = 4096, itself: Tensor | None = None
) -> Tensor:
    """S[u, c] = max over the bank's samples of class c of cos(φ(u), φ(x)): the nearest one, not the mean.

    Args:
        features: (N, d). bank: (M, d). labels: (M,), every class at least once.
        classes: K.
        chunk: rows of `features` compared at a time.
        itself: (N,) the column of each row in the bank, which is left out for it.

    Returns:
        (N, K), in [−1, 1]; −1 for a class whose only sample was left out.

    Raises:
        UserError: a class without a sample, widths that differ.

    Example:
        >>> similarities(torch.eye(2), torch.eye(2), torch.tensor([1, 0]), 2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    if features.shape[1] != bank.shape[1] or bank.shape[:1] != labels.shape:
        raise UserError(
            f"similarities: features {tuple(features.shape)}, bank {tuple(bank.shape)} and labels "
            f"{tuple(labels.shape)} do not fit each other"
        )
    missing = set(range(classes)) - set(labels.tolist())
    if missing:
        raise UserError(f"similarities: class {min(missing)} has no sample in the bank; every class needs one")
    unit = F.normalize(bank, dim=1)
    out = []
    for start in range(0, len(features), chunk):
        cosine = (F.normalize(features[start : start + chunk], dim=1) @ unit.T).clamp(-1, 1)
        if itself is not None:
            cosine.scatter_(1, itself[start : start + chunk, None], -1.0)
        best = cosine.new_full((len(cosine), classes), -1.0)
        out.append(best.scatter_reduce(1, labels.expand(len(cosine), -1), cosine, "amax"))
    return torch.cat(out) if out else features.new_zeros(0, classes)


def gap(s: Tensor) -> Tensor:
    """w(u) = S₁ − S₂, the best class's similarity less the second best's; (N, K) → (N,), ≥ 0.

    The paper writes S₁·(1 − S₂/S₁), which is the same number wherever S₁ ≠ 0.

    Example:
        >>> gap(torch.tensor([[0.25, 0.75, 0.5]]))
        tensor([0.2500])
    """
    best = s.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def weights(s: Tensor, kind: str) -> Tensor:
    """The weight of each pool sample from its similarities (N, K): "gap", "similarity", "product" or "none"; ≥ 0."""
    if kind == "none":
        return torch.ones_like(s[:, 0])
    if kind == "gap":
        return gap(s)
    first = s.amax(1).clamp_min(0)
    return first if kind == "similarity" else first * gap(s)


def fraction(a: float, rounds: int, r: int) -> float:
    """a_r = a·(1 − r/R)², the part of the pool that is taken in after round r = 1…R; 0 at r = R and later.

    Example:
        >>> [round(fraction(0.1, 5, r), 3) for r in range(1, 7)]
        [0.064, 0.036, 0.016, 0.004, 0.0, 0.0]
    """
    return a * (1 - r / rounds) ** 2 if r < rounds else 0.0


def smallest(losses: Tensor, part: float) -> Tensor:
    """Positions of the ⌊part·N⌋ smallest losses, smallest first; the first of equals.

    Example:
        >>> smallest(torch.tensor([0.3, 0.1, 0.2, 0.9]), 0.5)
        tensor([1, 2])
    """
    return losses.argsort(stable=True)[: math.floor(round(part * len(losses), 9))]


class NearestClass(nn.Module):
    """A classifier without training: the logits are the `similarities` of an encoder's features to a bank.

    Args:
        encoder: inputs → (n, d).
        bank: (M, d). labels: (M,). classes: K.
    """

    bank: Tensor
    labels: Tensor

    def __init__(self, encoder: nn.Module, bank: Tensor, labels: Tensor, classes: int):
        super().__init__()
        self.encoder, self.classes = encoder, classes
        self.register_buffer("bank", bank)
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor) -> Tensor:
        return similarities(self.encoder(x), self.bank, self.labels, self.classes)
