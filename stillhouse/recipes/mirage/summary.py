"""What Mirage leaves of a set of graphs: every distinct tree once, and the weighted sets of trees of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stillhouse.data import Weighted
from stillhouse.errors import UserError
from stillhouse.graphs import Graphs, Labels
from stillhouse.graphs.sets import narrow, spans, starts
from stillhouse.outcomes import DataSet
from stillhouse.recipes.mirage.itemsets import Itemset
from stillhouse.recipes.mirage.trees import Tree


class Summary(DataSet):
    """The distilled set as tensors.

    ``trees.nodes`` (T,) nodes of each tree; ``trees.label``, ``trees.parent`` (Σ nodes,) label id and parent, numbered
    inside the tree (a root is its own parent), ``trees.edge`` where edges have labels; ``sets.trees`` (S,) trees of
    each set, ``sets.tree`` (Σ trees,) which, ``sets.support`` (S,) graphs of its class that hold them all,
    ``sets.class`` (S,); ``labels.…`` what the label ids 1, 2, … mean.
    """

    @classmethod
    def of(cls, data: DataSet) -> Summary:
        """The summary that ``stillhouse.load(RUN/dataset)`` gave as a plain data set."""
        if data.facts.get("method") != "mirage":
            raise UserError(f"this data set is of method {data.facts.get('method')!r}, expected 'mirage'")
        return cls(data.tensors, data.facts, data.pictures)

    @classmethod
    def made(
        cls, trees: Sequence[Tree], sets: Sequence[tuple[Itemset, int, int]], graphs: Graphs, facts: dict[str, Any]
    ) -> Summary:
        """From trees and sets (their trees, support, class); `graphs` says what labels mean."""
        arrays = {
            "trees.nodes": [len(t.label) for t in trees],
            "trees.label": np.concatenate([t.label for t in trees]),
            "trees.parent": np.concatenate([t.parent for t in trees]),
            "sets.trees": [len(s) for s, _, _ in sets],
            "sets.tree": np.concatenate([np.array(s) for s, _, _ in sets]),
            "sets.support": [n for _, n, _ in sets],
            "sets.class": [c for _, _, c in sets],
        }
        if graphs.edge_ids is not None:
            arrays["trees.edge"] = np.concatenate([t.edge for t in trees])
        tensors = {k: torch.from_numpy(narrow(np.asarray(v))) for k, v in arrays.items()}
        for what, labels in (("node", graphs.node_labels), ("edge", graphs.edge_labels)):
            if labels is not None:
                tensors[f"labels.{what}"] = torch.from_numpy(np.ascontiguousarray(labels.values))
                if labels.scale is not None:
                    tensors[f"labels.{what}_scale"] = torch.from_numpy(labels.scale)
        return cls(tensors, {"method": "mirage", "classes": list(graphs.classes), **facts})

    def array(self, name: str) -> np.ndarray:
        return self[name].numpy().astype(np.int64)

    def labels(self, what: str) -> Labels | None:
        """What ids of "node" or "edge" labels mean; `Collection.encoded` numbers other graphs by it."""
        if f"labels.{what}" not in self.tensors:
            return None
        scale = self.tensors.get(f"labels.{what}_scale")
        return Labels(self[f"labels.{what}"].numpy(), None if scale is None else scale.numpy())

    @property
    def stored_nodes(self) -> int:
        """Nodes of the distinct trees, each stored once: what takes space."""
        return int(self.array("trees.nodes").sum())

    @property
    def expanded_nodes(self) -> int:
        """Nodes of all distilled graphs, a tree counted in every set that holds it: what a pass over them reads."""
        return int(self.array("trees.nodes")[self.array("sets.tree")].sum())

    def graphs(self) -> Graphs:
        """The distilled graphs: each set as the disjoint union of its trees, edges from child to parent.

        All nodes but the roots are `inner`, so that the readout goes over the roots.
        """
        sizes, which, per_set = self.array("trees.nodes"), self.array("sets.tree"), self.array("sets.trees")
        rows, many = spans(starts(sizes)[which], sizes[which]), sizes[which]
        inside = np.arange(len(rows)) - np.repeat(starts(many), many)  # number of a node in its tree
        sets = np.repeat(np.arange(len(per_set)), per_set)
        node_counts = np.bincount(sets, many, len(per_set)).astype(np.int64)
        before = starts(many) - np.repeat(starts(node_counts), per_set)  # nodes of a tree's set that stand before it
        first = np.repeat(before, many)
        inner = inside > 0
        edges = np.column_stack([inside + first, self.array("trees.parent")[rows] + first])[inner]
        edge_labels = self.labels("edge")
        return Graphs(
            self.array("trees.label")[rows], node_counts, edges, node_counts - per_set, self.array("sets.class"),
            self.facts["classes"], node_labels=self.labels("node"), edge_labels=edge_labels, inner=inner,
            edge_ids=self.array("trees.edge")[rows][inner] if edge_labels is not None else None,
        )  # fmt: skip

    def weights(self, per_class: bool = False) -> np.ndarray:
        """(S,) what sets are drawn in proportion to: their support, or their share of the support of their class."""
        support, classes = self.array("sets.support").astype(np.float64), self.array("sets.class")
        return support / np.bincount(classes, support)[classes] if per_class else support

    def source(self, batch: int, per_class: bool = False) -> Weighted:
        """Batches of distilled graphs drawn with replacement by `weights`, anew in every epoch."""
        graphs = self.graphs()
        return Weighted(graphs, self.weights(per_class), batch, draws=max(len(graphs), batch))
