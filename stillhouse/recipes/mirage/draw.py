"""Distilled trees as a picture."""

from __future__ import annotations

import io

import numpy as np

from stillhouse.graphs.sets import starts
from stillhouse.recipes.mirage.summary import Summary


def places(parent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and depth of each node: leaves side by side, a parent over the middle of its children.

    Example:
        >>> x, depth = places(np.array([0, 0, 0]))
        >>> x.tolist(), depth.tolist()
        ([0.5, 0.0, 1.0], [0, 1, 1])
    """
    children: list[list[int]] = [[] for _ in parent]
    depth = np.zeros(len(parent), np.int64)
    for v, p in enumerate(parent.tolist()):
        if v != p:
            children[p].append(v)
            depth[v] = depth[p] + 1
    x, free, waiting = np.zeros(len(parent)), 0.0, [0]
    order = []
    while waiting:
        v = waiting.pop()
        order.append(v)
        waiting += children[v][::-1]
        if not children[v]:
            x[v], free = free, free + 1
    for v in reversed(order):
        if children[v]:
            x[v] = (x[children[v][0]] + x[children[v][-1]]) / 2
    return x, depth


def picture(summary: Summary, per_class: int = 5) -> bytes:
    """The most frequent single trees of each class as a PNG: colour and number are the label, the root is on top."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes, sizes = summary.facts["classes"], summary.array("trees.nodes")
    first, values = starts(sizes), summary["labels.node"].numpy()
    alone = np.flatnonzero(summary.array("sets.trees") == 1)
    tree = summary.array("sets.tree")[starts(summary.array("sets.trees"))]
    many = summary.facts["source"]["graphs of each class"]
    support, owner = summary.array("sets.support"), summary.array("sets.class")
    figure = Figure(figsize=(2.2 * per_class, 2.0 * len(classes)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(classes), per_class, squeeze=False)
    for y, row in enumerate(axes):
        mine = alone[owner[alone] == y]
        mine = mine[np.argsort(-support[mine], kind="stable")][:per_class]
        for axis in row:
            axis.axis("off")
        for axis, s in zip(row, mine):
            here = slice(first[tree[s]], first[tree[s]] + sizes[tree[s]])
            label, parent = summary.array("trees.label")[here], summary.array("trees.parent")[here]
            x, depth = places(parent)
            for v, p in enumerate(parent):
                axis.plot([x[v], x[p]], [-depth[v], -depth[p]], color="0.6", lw=0.8, zorder=1)
            axis.scatter(x, -depth, s=90, c=colormaps["tab20"](label % 20), zorder=2)
            for v, one in enumerate(label):
                name = "?" if one == 0 else name_of(values[one - 1], int(one))
                axis.text(x[v], -depth[v], name, ha="center", va="center", fontsize=6, zorder=3)
            axis.set_title(f"class {classes[y]}: in {support[s]} of {many[y]} graphs", fontsize=7)
            axis.margins(0.15)
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", metadata={"Software": None})
    return out.getvalue()


def name_of(value: np.ndarray, one: int) -> str:
    """What is written on a node: its label, or the number of it where a label is a row of features."""
    if len(value) == 1 and value.dtype.kind in "iu":
        return str(int(value[0]))
    return str(int(value.argmax())) if value.dtype.kind in "iu" and value.sum() == 1 else f"#{one}"
