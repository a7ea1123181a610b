"""Lists to rank: a query and its candidates, one of which is right. What retrievers and re-rankers learn from.

A list is one sample: the networks give a score per candidate, (n, L), and the label is the right one's place. So
whatever trains classifiers trains rankers, from the command line as well::

    stillhouse run pld --data stillhouse.recipes.pld.lists:digits --model stillhouse.recipes.pld.lists:small
        --teacher stillhouse.recipes.pld.lists:large --teacher-epochs 20 --out runs/ranker

Lists of your own: a function that gives ``(x, y)``, x (N, 1 + L, …) with the query in front of its candidates and y
(N,) the place of the right one among them, 0 … L−1.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data import Data, Samples, load
from stillhouse.data.samples import digest
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.system import fold

LENGTH = 8


class Lists(Samples):
    """Lists out of a labelled set: every sample once as the query, one of its class, length − 1 of other classes.

    Args:
        samples: each class that occurs needs two samples.
        length: candidates per list.
        seed: chooses the candidates and the place of the right one.

    Example:
        >>> from stillhouse.data import Arrays
        >>> lists = Lists(Arrays(np.arange(6.0)[:, None], [0, 0, 1, 1, 2, 2]), length=3)
        >>> lists.shape, lists.take(np.array([0]))["input"].shape
        ((4, 1), torch.Size([1, 4, 1]))
    """

    def __init__(self, samples: Samples, length: int = LENGTH, seed: int = 0):
        y = samples.labels
        if length < 2 or min(np.bincount(y)[np.unique(y)]) < 2 or len(np.unique(y)) < 2:
            raise UserError(f"Lists: needs length >= 2 and two samples of two classes or more, got length {length}")
        rng, rows = np.random.default_rng(fold(seed, "lists")), []
        self.labels = rng.integers(0, length, len(y))
        for query, place in enumerate(self.labels):
            same, other = np.flatnonzero(y == y[query]), np.flatnonzero(y != y[query])
            row = rng.choice(other, length, replace=len(other) < length)
            row[place] = rng.choice(same[same != query])
            rows.append([query, *row])
        self.samples, self.rows = samples, np.array(rows)
        self.shape = (1 + length, *samples.shape)
        self.classes = tuple(f"candidate {k}" for k in range(length))

    @cached_property
    def fingerprint(self) -> str:
        return digest("lists", self.samples.fingerprint, self.rows, self.labels)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        ids = np.asarray(ids, dtype=np.int64)
        x = self.samples.take(self.rows[ids].reshape(-1), view=view, seed=seed)["input"]
        return {
            "input": x.reshape(len(ids), *self.shape),
            "label": torch.from_numpy(self.labels[ids]),
            "id": torch.from_numpy(ids.copy()),
        }


class Scorer(nn.Module):
    """Scores cos(f(query), f(candidate_j)) / T of an encoder f: (n, 1 + L, …) → (n, L)."""

    def __init__(self, encoder: nn.Module, temperature: float = 0.1):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature

    def forward(self, x: Tensor) -> Tensor:
        e = F.normalize(self.encoder(x.flatten(0, 1)), dim=-1).unflatten(0, x.shape[:2])
        return (e[:, 1:] @ e[:, :1].transpose(1, 2)).squeeze(-1) / self.temperature


def scorer(
    shape: tuple[int, ...], encoder: str = "stillhouse:cnn", width: int = 16, widths: tuple[int, ...] = (16, 32, 64)
) -> Scorer:
    """A `Scorer` for lists of this shape around a network by name, whose `width` outputs are the embedding."""
    inner = ModelSpec(encoder, width, tuple(shape[1:]), options={"widths": widths})
    return Scorer(inner.build(seed=torch.initial_seed()))


def large(shape: tuple[int, ...]) -> Scorer:
    """A convolutional bi-encoder: the teacher of the lists of digits."""
    return scorer(shape)


def small(shape: tuple[int, ...]) -> Scorer:
    """A bi-encoder of one small hidden layer: the student of the lists of digits."""
    return scorer(shape, "stillhouse:mlp", 8, (12,))


def lists_of(data: Data, seed: int = 0, length: int = LENGTH) -> Data:
    """The parts of a labelled set as lists."""
    train, test = (Lists(part, length, fold(seed, name)) for name, part in (("train", data.train), ("test", data.test)))
    return Data(f"lists of {data.name}", train, test)


def digits() -> Data:
    """Lists of eight digits, one of which shows the query's number."""
    return lists_of(load("digits"))
