"""Sets of graphs by name, and a user's own PyTorch Geometric graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stillhouse.data import find
from stillhouse.errors import UserError, did_you_mean, need
from stillhouse.graphs.sets import Collection
from stillhouse.models import import_object

PACKED = {"mutag": "MUTAG", "proteins": "PROTEINS", "nci1": "NCI1"}
FORMS = ("atlas", *PACKED, "tu:NAME", "package.module:function")
DEGREES = "no node features: the number of edges that lead to a node is its label"


def read(name: str, *, bins: int = 16) -> Collection:
    """A set of graphs by name.

    Args:
        name: ``mutag``, ``proteins`` or ``nci1``, packed in STILLHOUSE_DATA/tu-graphs; ``atlas``, all graphs of up to
            seven nodes, classified by whether they contain a cycle; ``tu:NAME``, a set of the TU collection, from
            STILLHOUSE_DATA/tu-graphs/NAME or downloaded; ``package.module:function``, which returns a list of
            ``torch_geometric.data.Data`` or a `Collection`.
        bins: clusters that continuous features are put into.

    Raises:
        UserError: an unknown name, missing or bad data.

    Example:
        >>> graphs = read("atlas")
        >>> len(graphs), graphs.classes
        (1252, ('forest', 'contains a cycle'))
    """
    if name == "atlas":
        return atlas()
    if name in PACKED:
        return packed(name)
    kind, colon, rest = name.partition(":")
    if kind == "tu" and rest:
        return tu(rest, bins)
    if colon and rest and kind.replace(".", "").replace("_", "").isalnum():
        return own(name, bins)
    raise UserError(f"unknown graphs {name!r}; {did_you_mean(name, FORMS)}")


def atlas() -> Collection:
    """The 1,252 graphs of one to seven nodes in the Atlas of Graphs (Read & Wilson 1998, in networkx)."""
    try:
        from networkx import graph_atlas_g, number_connected_components
    except ModuleNotFoundError:
        raise need("graphs", "networkx") from None
    nodes, links, cyclic = [], [], []
    for g in graph_atlas_g()[1:]:
        here = np.array(g.edges, np.int64).reshape(-1, 2)
        nodes.append(len(g))
        links.append(np.concatenate([here, here[:, ::-1]]))
        cyclic.append(len(here) > len(g) - number_connected_components(g))
    counts, edge_counts = np.array(nodes), np.array([len(e) for e in links])
    edges = np.concatenate(links)
    x = degrees(counts, edges, edge_counts)
    labels = np.array(cyclic, np.int64)
    return Collection("atlas", x, counts, edges, edge_counts, labels, ("forest", "contains a cycle"), notes=(DEGREES,))


def degrees(node_counts: np.ndarray, edges: np.ndarray, edge_counts: np.ndarray) -> np.ndarray:
    """(N, 1) how many edges lead to each node."""
    first = np.repeat(np.cumsum(node_counts) - node_counts, edge_counts)
    return np.bincount(edges[:, 1] + first, minlength=int(node_counts.sum()))[:, None]


def packed(name: str) -> Collection:
    """A set of STILLHOUSE_DATA/tu-graphs, one npz each."""
    path = find("tu-graphs") / f"{PACKED[name]}.npz"
    try:
        with np.load(path, allow_pickle=False) as z:
            part = {k: z[k].astype(np.int64) for k in z.files}
        return Collection(
            name, part["node_labels"][:, None], part["node_counts"], part["edge_index"].T, part["edge_counts"],
            part["graph_labels"], tuple(str(c) for c in range(int(part["graph_labels"].max()) + 1)),
        )  # fmt: skip
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; copy it again") from None


def tu(name: str, bins: int) -> Collection:
    """A set of the TU collection (Morris et al. 2020) from its text files, which are downloaded once.

    The texts are read anew each time: the processed copy that `TUDataset` keeps is a pickle.
    """
    try:
        from torch_geometric.datasets import TUDataset
        from torch_geometric.io import fs, read_tu_data
    except ModuleNotFoundError:
        raise need("graphs", "torch_geometric") from None
    root = os.environ.get("STILLHOUSE_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse" / "tu-graphs"
    places = [*([Path(root).expanduser() / "tu-graphs"] if root else []), cache]
    folders = [place / name / sub for place in places for sub in (".", "raw", name)]
    folder = next((f for f in folders if (f / f"{name}_A.txt").is_file()), None)
    if folder is None:
        folder = cache / name / name  # the archive holds a folder of the set's name
        try:
            fs.cp(f"{TUDataset.url}/{name}.zip", str(cache / name), extract=True)
        except Exception as error:
            why = " ".join((str(error) or type(error).__name__).split())[:160]
            raise UserError(
                f"tu:{name} not found in {' or '.join(map(str, places))} and could not be downloaded ({why}); put its "
                f"text files ({name}_A.txt, …) into one of them, under {name}/, or connect once to the internet"
            ) from None
    try:
        data, slices, sizes = read_tu_data(str(folder), name)
        counts = np.diff(slices["x"].numpy()) if "x" in slices else np.array(data._num_nodes)
    except Exception as error:
        raise UserError(f"cannot read tu:{name} in {folder}: {type(error).__name__}: {error}") from None
    if data.y is None or data.y.is_floating_point():
        raise UserError(f"tu:{name} is a set for regression (no {name}_graph_labels.txt); a class per graph is needed")
    values = {}
    for what, key in (("x", "node"), ("edge_attr", "edge")):
        rows, continuous = getattr(data, what), sizes[f"num_{key}_attributes"]
        labelled = rows is not None and rows.shape[1] > continuous
        values[what] = rows[:, continuous:] if labelled else rows
    links = np.diff(slices["edge_index"].numpy())
    return collection(f"tu:{name}", values["x"], counts, data.edge_index, links, data.y, values["edge_attr"], bins)


def own(name: str, bins: int) -> Collection:
    """What a user's function returns."""
    made = import_object(name, "--data")
    if callable(made):
        try:
            made = made()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--data {name} raised {type(error).__name__}: {error}") from None
    return made if isinstance(made, Collection) else of(made, name, bins=bins)


def of(graphs: Any, name: str = "graphs", *, bins: int = 16) -> Collection:
    """A list of ``torch_geometric.data.Data`` as a collection.

    Args:
        graphs: each with ``edge_index`` (2, E), ``y`` (one whole number) and, if there are any, ``x`` (V, F) and
            ``edge_attr`` (E, F'). Rows of whole numbers (also one-hot) are labels; other rows are clustered. Without
            ``x``, degrees are the labels.
        bins: clusters for continuous features.

    Raises:
        UserError: no graphs, a graph without edges' or class's entry, features of some graphs only; the graph is named.
    """
    try:
        items = list(graphs)
    except TypeError:
        raise UserError(f"{name}: expected a list of torch_geometric graphs, got {type(graphs).__name__}") from None
    if not items:
        raise UserError(f"{name}: there are no graphs; give at least two of each class")
    for i, g in enumerate(items):
        for key in ("edge_index", "y"):
            if getattr(g, key, None) is None:
                raise UserError(f"{name}: graph {i} has no {key}; expected torch_geometric Data with edge_index and y")
        if g.edge_index.dim() != 2 or len(g.edge_index) != 2 or g.edge_index.is_floating_point():
            got = f"{g.edge_index.dtype} {tuple(g.edge_index.shape)}"
            raise UserError(f"{name}: edge_index of graph {i} must be whole numbers (2, E), got {got}")
        y = g.y.reshape(-1) if isinstance(g.y, Tensor) else np.reshape(g.y, -1)
        if len(y) != 1 or float(y[0]) != round(float(y[0])):
            raise UserError(f"{name}: y of graph {i} must be one whole number, its class, got {y.tolist()}")
    joined = {key: together(items, key, name) for key in ("x", "edge_attr")}
    counts = np.array([int(g.num_nodes) for g in items])
    links = np.array([g.edge_index.shape[1] for g in items])
    edges = np.concatenate([g.edge_index.numpy(force=True) for g in items], 1)
    y = np.array([int(np.reshape(np.asarray(g.y), -1)[0]) for g in items])
    return collection(name, joined["x"], counts, edges, links, y, joined["edge_attr"], bins)


def together(items: Sequence[Any], key: str, name: str) -> np.ndarray | None:
    """One feature of all graphs, (all rows, F), or None where none has it."""
    parts = [getattr(g, key, None) for g in items]
    have = [p is not None and p.numel() > 0 for p in parts]
    rows = [int(g.num_nodes) if key == "x" else g.edge_index.shape[1] for g in items]
    if not any(have):
        return None
    for i, (p, n) in enumerate(zip(parts, rows)):
        if n and not have[i]:
            raise UserError(f"{name}: graph {i} has no {key}, graph {have.index(True)} has; give it to all or to none")
        if p is not None and n and len(p) != n:
            raise UserError(f"{name}: {key} of graph {i} has {len(p)} rows, expected {n}")
    flat = [p.numpy(force=True).reshape(len(p), -1) for p in parts if p is not None and p.numel()]
    widths = {f.shape[1] for f in flat}
    if len(widths) > 1:
        raise UserError(f"{name}: {key} has {sorted(widths)} columns; all graphs need as many")
    return np.concatenate(flat)


def collection(
    name: str, x: Any, counts: np.ndarray, edges: Any, links: np.ndarray, y: Any, edge_x: Any, bins: int
) -> Collection:
    """The collection of plain arrays: classes numbered from 0, degrees where there are no node features."""
    edges = np.asarray(edges).T.astype(np.int64)
    kinds, labels = np.unique(np.asarray(y).reshape(-1), return_inverse=True)
    # Edges are checked before degrees are counted with them.
    empty = np.zeros((int(counts.sum()), 1), np.int64)
    made = Collection(
        name, empty if x is None else np.asarray(x), counts, edges, links, labels.astype(np.int64),
        tuple(str(k) for k in kinds.tolist()), None if edge_x is None else np.asarray(edge_x), bins=bins,
    )  # fmt: skip
    if x is not None:
        return made
    return replace(made, x=degrees(counts, edges, links), notes=(DEGREES,))
