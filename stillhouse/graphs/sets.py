"""Sets of labelled graphs: as they came (`Collection`), and as samples with label ids (`Graphs`).

Every tensor of a batch has one row per graph, padded with −1: so the engine cuts it into micro-batches and shares for
processes, `count_macs` takes one sample of it, and ``plan.json`` describes it, like any other batch. The network makes
one disjoint graph of the rows (`flat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import Data, Samples
from stillhouse.data.samples import as_labels, digest
from stillhouse.data.sets import divide
from stillhouse.errors import UserError
from stillhouse.system import fold

PAD = -1


@dataclass(frozen=True)
class Labels:
    """What ids of node or edge labels mean: id k+1 is row k of `values`, id 0 is whatever training never saw.

    Attributes:
        values: (K, F) the training set's distinct rows in sorted order, or the centres of its clusters.
        scale: (F,) for clusters, what features are divided by before distances are taken (nothing is unseen there);
            None where rows must be equal.

    Example:
        >>> Labels.fit(np.array([[6], [8], [6]])).encode(np.array([[8], [7]])).tolist()
        [2, 0]
    """

    values: np.ndarray
    scale: np.ndarray | None = None

    @classmethod
    def fit(cls, x: np.ndarray, bins: int = 16, seed: int = 0) -> Labels:
        """The labels of training rows `x` (N, F): distinct rows where all are whole numbers, else k-means of `bins`."""
        if x.dtype.kind in "biu" or not len(x) or (x == np.round(x)).all():
            return cls(np.unique(x.astype(np.int64), axis=0))
        from sklearn.cluster import KMeans

        bins = min(bins, len(np.unique(x, axis=0)))
        scale = np.where(x.std(0) > 0, x.std(0), 1.0).astype(np.float32)
        found = KMeans(bins, n_init=1, random_state=fold(seed, "bins") % 2**31).fit(x / scale)
        centres = found.cluster_centers_ * scale
        return cls(centres[np.lexsort(centres.T[::-1])].astype(np.float32), scale)

    def __len__(self) -> int:
        return len(self.values) + 1

    def encode(self, x: np.ndarray) -> np.ndarray:
        """(N,) int64 ids of rows (N, F)."""
        if x.shape[1] != self.values.shape[1]:
            raise UserError(f"labels have {x.shape[1]} columns, those of the training graphs {self.values.shape[1]}")
        if self.scale is not None:
            pieces = np.array_split(x, max(1, len(x) // 4096))
            near = [(((p[:, None] - self.values) / self.scale) ** 2).sum(-1).argmin(1) for p in pieces]
            return np.concatenate(near).astype(np.int64) + 1
        k = len(self.values)
        _, place = np.unique(np.concatenate([self.values, x.astype(np.int64)]), axis=0, return_inverse=True)
        place = place.reshape(-1)
        ids = np.zeros(place.max() + 1 if len(place) else 0, np.int64)
        ids[place[:k]] = np.arange(1, k + 1)
        return ids[place[k:]]


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The positions ``start … start + count − 1`` of every span, one after the other.

    Example:
        >>> spans(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each of several runs of `counts` things begins."""
    return np.cumsum(counts) - counts


@dataclass(frozen=True)
class Collection:
    """Graphs as they came, one after the other.

    Attributes:
        name: what they are called in reports.
        x: (N, F) node features of all graphs. node_counts: (n,) nodes of each graph.
        edges: (E, 2) directed edges (source, target), node numbers local to their graph. edge_counts: (n,).
        edge_x: (E, F') edge features, or None.
        labels: (n,) int64, 0…C−1. classes: their names.
        notes: what the reader of a report must know.
        bins: clusters that features which are not whole numbers are put into.

    Raises:
        UserError: no graphs, an edge that leads nowhere, counts or labels that do not fit, features not finite.
    """

    name: str
    x: np.ndarray
    node_counts: np.ndarray
    edges: np.ndarray
    edge_counts: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    edge_x: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    bins: int = 16

    def __post_init__(self) -> None:
        n = len(self.node_counts)
        if not n:
            raise UserError(f"{self.name}: there are no graphs; give at least two of each class")
        if len(self.labels) != n or len(self.edge_counts) != n or len(self.x) != self.node_counts.sum():
            raise UserError(f"{self.name}: {n} graphs, but {len(self.labels)} labels and {len(self.x)} rows of nodes")
        owner = np.repeat(np.arange(n), self.edge_counts)
        wrong = ((self.edges < 0) | (self.edges >= self.node_counts[owner][:, None])).any(1)
        if wrong.any():
            e = int(wrong.argmax())
            pair, size = tuple(self.edges[e].tolist()), self.node_counts[owner[e]]
            raise UserError(
                f"{self.name}: edge_index of graph {owner[e]} holds {pair}, but its nodes are 0…{size - 1}; "
                "number nodes inside each graph"
            )
        for what, values in (("node", self.x), ("edge", self.edge_x)):
            if values is not None and not np.isfinite(values).all():
                raise UserError(f"{self.name}: {what} features hold NaN or infinity; clean the data first")

    def __len__(self) -> int:
        return len(self.node_counts)

    def part(self, ids: np.ndarray) -> Collection:
        """The graphs at positions `ids`."""
        nodes = spans(starts(self.node_counts)[ids], self.node_counts[ids])
        edges = spans(starts(self.edge_counts)[ids], self.edge_counts[ids])
        return replace(
            self, x=self.x[nodes], node_counts=self.node_counts[ids], edges=self.edges[edges],
            edge_counts=self.edge_counts[ids], labels=self.labels[ids],
            edge_x=None if self.edge_x is None else self.edge_x[edges],
        )  # fmt: skip

    def encoded(self, nodes: Labels, edges: Labels | None) -> Graphs:
        """The same graphs as samples, their labels as ids."""
        edge_ids = edges.encode(self.edge_x) if edges is not None and self.edge_x is not None else None
        return Graphs(
            nodes.encode(self.x), self.node_counts, self.edges, self.edge_counts, self.labels, self.classes,
            node_labels=nodes, edge_labels=edges, edge_ids=edge_ids,
        )  # fmt: skip

    def split(self, seed: int = 0, test: float = 0.2) -> Data:
        """A stratified training and test part. Labels are numbered by the training part alone.

        Raises:
            UserError: one class only, or too few graphs to divide.
        """
        if len(set(self.labels.tolist())) < 2:
            raise UserError(f"{self.name}: all {len(self)} graphs are of class {self.classes[self.labels[0]]!r}; "
                            "at least two classes are needed")  # fmt: skip
        rest, part = divide(self.labels, test, fold(seed, "graphs"))
        train = self.part(rest)
        nodes = Labels.fit(train.x, self.bins, seed)
        edges = None if train.edge_x is None else Labels.fit(train.edge_x, self.bins, seed)
        notes = list(self.notes)
        for what, labels in (("node", nodes), ("edge", edges)):
            if labels is not None and labels.scale is not None:
                n = len(labels) - 1
                notes.append(f"continuous {what} features: replaced by {n} k-means clusters of the training part")
        learn, judge = (c.encoded(nodes, edges) for c in (train, self.part(part)))
        unseen = int((judge.nodes == 0).sum())
        if unseen:
            notes.append(f"{unseen} test nodes have labels that no training graph has; they share one reserved id")
        return Data(self.name, learn, judge, notes=tuple(notes))


class Graphs(Samples):
    """Graphs with label ids, as samples: what `Batches`, `fit` and `predict` take.

    Args:
        nodes: (N,) label ids of the nodes of all graphs; 0 is reserved for labels that training never saw.
        node_counts, edges, edge_counts, labels, classes: as in `Collection`.
        node_labels, edge_labels: what the ids mean.
        edge_ids: (E,) label ids of the edges, or None.
        inner: (N,) nodes that the readout leaves out, or None; those of a computation tree below its root.

    `take` gives ``{"label": (n,), "id": (n,), "input": {…}}``, the label first because the engine counts samples by it.
    The input is padded with −1 to the largest graph of the batch: ``nodes`` (n, V) int64, ``edges`` (n, E, 2) int64
    (source, target) and, where there are any, ``edge_ids`` (n, E) int64 and ``inner`` (n, V) bool.

    Example:
        >>> g = Graphs(np.array([1, 2, 2]), np.array([1, 2]), np.array([[0, 1]]), np.array([0, 1]), [0, 1], ("a", "b"))
        >>> g.take(np.array([0, 1]))["input"]["nodes"].tolist()
        [[1, -1], [2, 2]]
    """

    def __init__(
        self,
        nodes: np.ndarray,
        node_counts: np.ndarray,
        edges: np.ndarray,
        edge_counts: np.ndarray,
        labels: Any,
        classes: Sequence[str],
        *,
        node_labels: Labels | None = None,
        edge_labels: Labels | None = None,
        edge_ids: np.ndarray | None = None,
        inner: np.ndarray | None = None,
    ):
        self.nodes, self.node_counts = nodes.astype(np.int64), node_counts.astype(np.int64)
        self.edges, self.edge_counts = edges.astype(np.int64).reshape(-1, 2), edge_counts.astype(np.int64)
        self.labels, self.classes = as_labels(labels, len(node_counts)), tuple(classes)
        self.node_labels = node_labels or Labels(np.arange(1, self.nodes.max(initial=0) + 1)[:, None])
        if edge_ids is not None and edge_labels is None:
            edge_labels = Labels(np.arange(1, edge_ids.max(initial=0) + 1)[:, None])
        self.edge_labels, self.edge_ids, self.inner = edge_labels, edge_ids, inner
        self.shape = (len(self.node_labels), len(edge_labels) if edge_labels else 0)

    @cached_property
    def fingerprint(self) -> str:
        empty = np.zeros(0)
        arrays = (self.nodes, self.node_counts, self.edges, self.edge_counts, self.labels)
        extra = (empty if a is None else a for a in (self.edge_ids, self.inner))
        return digest("graphs", *arrays, *extra, self.classes, self.shape)

    @cached_property
    def owner(self) -> np.ndarray:
        """(N,) which graph each node belongs to."""
        return np.repeat(np.arange(len(self)), self.node_counts)

    @cached_property
    def pairs(self) -> np.ndarray:
        """(E, 2) edges by the numbers that nodes have over all graphs."""
        return self.edges + np.repeat(starts(self.node_counts), self.edge_counts)[:, None]

    def part(self, ids: np.ndarray) -> Graphs:
        """The graphs at positions `ids`, as a set of its own."""
        nodes = spans(starts(self.node_counts)[ids], self.node_counts[ids])
        edges = spans(starts(self.edge_counts)[ids], self.edge_counts[ids])
        return Graphs(
            self.nodes[nodes], self.node_counts[ids], self.edges[edges], self.edge_counts[ids], self.labels[ids],
            self.classes, node_labels=self.node_labels, edge_labels=self.edge_labels,
            edge_ids=None if self.edge_ids is None else self.edge_ids[edges],
            inner=None if self.inner is None else self.inner[nodes],
        )  # fmt: skip

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Any]:
        ids = np.asarray(ids, np.int64)
        many, links = self.node_counts[ids], self.edge_counts[ids]
        nodes, edges = spans(starts(self.node_counts)[ids], many), spans(starts(self.edge_counts)[ids], links)
        given = {"nodes": padded(self.nodes[nodes], many), "edges": padded(self.edges[edges], links)}
        if self.edge_ids is not None:
            given["edge_ids"] = padded(self.edge_ids[edges], links)
        if self.inner is not None:
            given["inner"] = padded(self.inner[nodes], many, True)
        return {"label": torch.from_numpy(self.labels[ids]), "id": torch.from_numpy(ids.copy()), "input": given}

    def bytes(self) -> int:
        """Bytes of the set as plainly as it can be stored: every array in the smallest whole numbers that hold it."""
        arrays = (self.nodes, self.node_counts, self.edges, self.edge_counts, self.labels, self.edge_ids)
        return sum(narrow(a).nbytes for a in arrays if a is not None)


def padded(values: np.ndarray, counts: np.ndarray, fill: int | bool = PAD) -> Tensor:
    """Runs of `counts` values as rows (n, longest, …), filled up at the end."""
    longest = max(1, int(counts.max(initial=0)))
    out = np.full((len(counts), longest, *values.shape[1:]), fill, values.dtype)
    out[np.arange(longest) < counts[:, None]] = values
    return torch.from_numpy(out)


def narrow(values: np.ndarray) -> np.ndarray:
    """Whole numbers ≥ 0 in the smallest type that holds them and that safetensors and torch know."""
    top = int(values.max(initial=0))
    fits = (t for t in (np.uint8, np.int16, np.int32, np.int64) if top <= np.iinfo(t).max)
    return values.astype(next(fits))
