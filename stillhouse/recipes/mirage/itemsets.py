"""Frequent sets of computation trees, the most frequent first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from stillhouse.errors import UserError
from stillhouse.graphs.sets import Graphs
from stillhouse.recipes.mirage.trees import Trees

Itemset = tuple[int, ...]


def frequent(has: np.ndarray, least: int, cap: int) -> tuple[list[tuple[Itemset, int]], bool]:
    """All sets of items that at least `least` transactions hold together, or the `cap` most frequent of them.

    A set never has more support than a part of it. So a set that waits in a queue by support, and is followed by its
    extensions only when its turn comes, comes in the order of support: after `cap` sets one can stop, and has the
    most frequent ones, where level by level (Apriori) or by tree (FP-growth) all of them would have to be found first.
    Ties are broken by fewer items, then by smaller numbers. Supports are bit counts (Zaki's Eclat, 2000).

    Args:
        has: (n, m) bool, whether transaction i holds item j.
        least: smallest support, ≥ 1.
        cap: most sets to give.

    Returns:
        [(items in rising order, support)], and whether there were more than `cap`.

    Example:
        >>> frequent(np.array([[1, 1], [1, 1], [1, 0]], bool), 2, 10)
        ([((0,), 3), ((1,), 2), ((0, 1), 2)], False)
    """
    masks = [int.from_bytes(np.packbits(column).tobytes()) for column in has.T]
    waiting: list[tuple[int, int, Itemset, int]] = [
        (-m.bit_count(), 1, (j,), m) for j, m in enumerate(masks) if m.bit_count() >= max(1, least)
    ]
    heapq.heapify(waiting)
    items = sorted(s[2][0] for s in waiting)
    found: list[tuple[Itemset, int]] = []
    while waiting and len(found) < cap:
        support, size, those, mask = heapq.heappop(waiting)
        found.append((those, -support))
        for j in items:
            if j > those[-1]:
                both = mask & masks[j]
                if both.bit_count() >= max(1, least):
                    heapq.heappush(waiting, (-both.bit_count(), size + 1, (*those, j), both))
    return found, bool(waiting)


def thresholds(graphs: Graphs, support: Sequence[float]) -> list[int]:
    """Least number of graphs for each class."""
    sizes = np.bincount(graphs.labels, minlength=len(graphs.classes)).tolist()
    if len(support) not in (1, len(sizes)):
        raise UserError(f"support has {len(support)} values; give one for all or one for each of {len(sizes)} classes")
    each = list(support) * len(sizes) if len(support) == 1 else list(support)
    least = [int(np.ceil(s * n - 1e-9)) if s <= 1 else int(np.ceil(s)) for s, n in zip(each, sizes)]
    for y, (s, n) in enumerate(zip(least, sizes)):
        if not n:
            raise UserError(f"there are no training graphs of class {graphs.classes[y]!r}; give some, or leave it out")
        if s > n:
            raise UserError(f"support {s} of class {graphs.classes[y]!r} is more than its {n} graphs; lower it")
    return least


def of_class(graphs: Graphs, trees: Trees, y: int, least: int, cap: int) -> tuple[list[tuple[Itemset, int]], bool]:
    """`frequent` sets of trees among the graphs of class `y`; the trees of a graph are a set, multiplicity is dropped.

    Raises:
        UserError: no tree is in `least` of them; says what the largest support is.
    """
    pairs = np.column_stack([graphs.owner, trees.ids])[graphs.labels[graphs.owner] == y]
    pairs = np.unique(pairs[trees.size[pairs[:, 1]] > 1], axis=0)  # a node without neighbours gives no edge
    items, column, count = np.unique(pairs[:, 1], return_inverse=True, return_counts=True)
    n, best, often = int((graphs.labels == y).sum()), int(count.max(initial=0)), count >= least
    if best < least:
        raise UserError(
            f"no tree of {len(trees.levels) - 1} hops is in {least} of the {n} graphs of class {graphs.classes[y]!r}; "
            f"the largest support available is {best} ({best / n:.2f}): lower --support or --hops"
        )
    pairs, column = pairs[often[column.reshape(-1)]], column.reshape(-1)[often[column.reshape(-1)]]
    rows, row = np.unique(pairs[:, 0], return_inverse=True)
    has = np.zeros((len(rows), int(often.sum())), bool)
    has[row.reshape(-1), np.cumsum(often)[column] - 1] = True
    found, more = frequent(has, least, cap)
    return [(tuple(items[often][list(s)].tolist()), support) for s, support in found], more
