"""Computation trees of all nodes of a set, and their canonical codes, without building a single tree.

The tree T_v^k of a node v has v's label at its root and, below it, T_u^{k−1} for EVERY edge u → v, also back to where
one came from. So two nodes have isomorphic trees of k hops exactly when they have the same label and the same multiset
of (edge label, tree of k−1 hops) over their neighbours: the codes are the colours of k rounds of Weisfeiler–Leman, and
cost k sorts of the edges whatever the degrees are. Only trees that are stored are unrolled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stillhouse.graphs.sets import Graphs, spans, starts


@dataclass(frozen=True)
class Level:
    """The distinct trees of some number of hops.

    Attributes:
        ids: (N,) the tree of each node of the set.
        label: (T,) label of each tree's root.
        counts: (T,) its children. child, edge: (Σ counts,) their trees one level down, and the labels of their edges.
        size: (T,) nodes of the whole tree.
    """

    ids: np.ndarray
    label: np.ndarray
    counts: np.ndarray
    child: np.ndarray
    edge: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Tree:
    """A tree spelled out, level by level from its root: labels (V,), parents (V,) (the root is its own), edges (V,)."""

    label: np.ndarray
    parent: np.ndarray
    edge: np.ndarray


class Trees:
    """The computation trees of every node of `graphs`, each known by a number that isomorphic trees share.

    Args:
        graphs: messages go from the first to the second node of an edge.
        hops: L, the depth of the trees.
        max_degree: 0, or how many children a tree's node keeps: the first in the order of their codes, so that the
            codes still do not depend on how nodes are numbered.

    Example:
        >>> path = Graphs(np.array([1, 1, 1]), np.array([3]), np.array([[0, 1], [1, 0], [1, 2], [2, 1]]), np.array([4]),
        ...               [0], ("a",))
        >>> trees = Trees(path, 1)
        >>> trees.ids.tolist(), trees.code(0)
        ([0, 1, 0], (1, ((0, (1, ())),)))
    """

    def __init__(self, graphs: Graphs, hops: int, max_degree: int = 0):
        self.cut = 0
        labels, ids = np.unique(graphs.nodes, return_inverse=True)
        none = np.zeros(0, np.int64)
        zeros, ones = np.zeros(len(labels), np.int64), np.ones(len(labels), np.int64)
        self.levels = [Level(ids.reshape(-1), labels, zeros, none, none, ones)]
        for _ in range(hops):
            self.levels.append(self._deeper(graphs, max_degree))

    def _deeper(self, graphs: Graphs, max_degree: int) -> Level:
        below = self.levels[-1]
        source, target = graphs.pairs.T
        edge = np.zeros(len(source), np.int64) if graphs.edge_ids is None else graphs.edge_ids
        key = edge * len(below.label) + below.ids[source]
        order = np.lexsort((key, target))
        key, degree = key[order], np.bincount(target, minlength=len(graphs.nodes))
        first = starts(degree)
        if max_degree:
            self.cut = int((degree > max_degree).sum())
            degree = np.minimum(degree, max_degree)
        ids, roots, children, known = np.empty_like(degree), [], [], 0
        for d in np.unique(degree):  # nodes of equal degree have rows of equal length, which sort at once
            here = np.flatnonzero(degree == d)
            rows = np.column_stack([graphs.nodes[here], key[first[here, None] + np.arange(d)]])
            distinct, place = np.unique(rows, axis=0, return_inverse=True)
            ids[here] = known + place.reshape(-1)
            known += len(distinct)
            roots.append(distinct[:, 0])
            children.append(distinct[:, 1:])
        counts = np.concatenate([np.full(len(c), c.shape[1]) for c in children])
        flat = np.concatenate([c.reshape(-1) for c in children])
        child, label = flat % len(below.label), np.concatenate(roots)
        size = 1 + np.bincount(np.repeat(np.arange(known), counts), below.size[child], known).astype(np.int64)
        return Level(ids, label, counts, child, flat // len(below.label), size)

    @property
    def ids(self) -> np.ndarray:
        """(N,) number of each node's tree of all hops."""
        return self.levels[-1].ids

    @property
    def size(self) -> np.ndarray:
        """(T,) nodes of each distinct tree of all hops."""
        return self.levels[-1].size

    def unroll(self, tree: int) -> Tree:
        """The tree of this number, node by node."""
        level, ids = len(self.levels) - 1, np.array([tree])
        labels, parents, edges, done = [self.levels[-1].label[ids]], [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], 0
        while level and len(ids):
            at = self.levels[level]
            picks = spans(starts(at.counts)[ids], at.counts[ids])
            parents.append(done + np.repeat(np.arange(len(ids)), at.counts[ids]))
            done, level, ids = done + len(ids), level - 1, at.child[picks]
            labels.append(self.levels[level].label[ids])
            edges.append(at.edge[picks])
        return Tree(np.concatenate(labels), np.concatenate(parents), np.concatenate(edges))

    def code(self, tree: int, level: int | None = None) -> tuple:
        """The canonical code: (label, sorted (edge label, code of the child)); equal exactly for isomorphic trees."""
        level = len(self.levels) - 1 if level is None else level
        at, below = self.levels[level], level - 1
        picks = spans(starts(at.counts)[[tree]], at.counts[[tree]])
        children = [(int(at.edge[p]), self.code(int(at.child[p]), below)) for p in picks]
        return int(at.label[tree]), tuple(sorted(children))
