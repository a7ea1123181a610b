"""Mirage over live objects: frequent sets of computation trees, and networks trained on them.

    T_v^L = (label of v, {(edge label, T_u^(L−1)) : u → v})       all trees, as canonical codes (`Trees`)
    graph G ↦ {T_v^L : v ∈ G}                                      a set: multiplicity is dropped
    class y ↦ all I with support_y(I) = |{G of class y : I ⊆ G}| ≥ s_y     (`of_class`)
    I ↦ the disjoint union of its trees, label y, drawn with probability ∝ support_y(I); readout over the roots

A network of at most L layers, whose aggregation looks at nothing but the multiset of neighbours, gives the root of
T_v^L the embedding that it gives v. Gupta et al., ICLR 2024, arXiv 2310.09486; compared with the released code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from stillhouse.data import Data
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.graphs import Graphs, depth
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.recipes.mirage.itemsets import Itemset, of_class, thresholds
from stillhouse.recipes.mirage.summary import Summary
from stillhouse.recipes.mirage.trees import Trees
from stillhouse.system import Source, fold

MOST_NODES = 10_000_000


@dataclass(frozen=True)
class Config:
    """Settings of Mirage and of the networks that are trained; every field is a flag."""

    hops: int = 2  # depth L of the trees; a tree has about degree^L nodes
    support: tuple[float, ...] = (0.6,)  # least part (≤ 1) or number (> 1) of a class's graphs; one, or one each
    max_sets: int = 1000  # most sets per class; the most frequent are kept
    max_degree: int = 0  # 0, or most children of a tree's node, for graphs with hubs
    per_class: bool = False  # draw every class equally often, instead of by support alone
    layers: int = 0  # message-passing layers of the networks; 0 takes as many as hops
    width: int = 64  # of their embeddings
    dropout: float = 0.0  # after each of their layers
    readout: Literal["sum", "mean"] = "sum"  # over roots in training, over all nodes of ordinary graphs
    steps: int = 400  # optimiser steps
    batch: int = 32  # graphs per step
    optimizer: Literal["adam", "sgd"] = "adam"  # adam or sgd
    lr: float = 1e-3  # learning rate
    weight_decay: float = 0.1  # L2 penalty of the optimiser, which so few graphs need

    def __post_init__(self) -> None:
        least = {"hops": 1, "max_sets": 1, "max_degree": 0, "layers": 0, "width": 1, "steps": 1, "batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.support or not all(s > 0 for s in self.support):
            raise UserError(f"support must be parts in (0, 1] or numbers of graphs above 1, got {self.support}")

    def spec(self, graphs: Graphs, encoder: str) -> ModelSpec:
        """The network of these settings with this node encoder, for graphs with these labels."""
        how = {"encoder": encoder, "width": self.width, "layers": self.layers or self.hops, "dropout": self.dropout}
        options = {**how, "readout": self.readout}
        return ModelSpec("stillhouse.graphs:classifier", len(graphs.classes), graphs.shape, options=options)


@dataclass
class Distilled:
    """The summary and the networks trained on it."""

    summary: Summary
    models: Models

    @property
    def members(self) -> list[Member]:
        return self.models.members

    def save(self, folder: str | Path) -> list[Path]:
        return [*self.summary.save(folder), *self.models.save(folder)]


def summarise(graphs: Graphs, cfg: Config) -> Summary:
    """The frequent tree sets of labelled graphs; nothing is random and nothing is trained.

    Raises:
        UserError: no tree of a class reaches its support, a support per class that does not fit, trees too large.
    """
    trees = Trees(graphs, cfg.hops, cfg.max_degree)
    chosen: list[tuple[Itemset, int, int]] = []
    notes = [f"{trees.cut} nodes have more than {cfg.max_degree} neighbours; the others were cut"] * bool(trees.cut)
    for y, least in enumerate(thresholds(graphs, cfg.support)):
        found, more = of_class(graphs, trees, y, least, cfg.max_sets)
        chosen += [(items, support, y) for items, support in found]
        if more:
            notes.append(f"class {graphs.classes[y]!r}: only the {cfg.max_sets} most frequent sets of trees are kept")
    used = sorted({t for s, _, _ in chosen for t in s})
    expanded = sum(int(trees.size[list(s)].sum()) for s, _, _ in chosen)
    if expanded > MOST_NODES:
        raise UserError(f"the distilled graphs have {expanded:,} nodes; lower --hops, --max-sets or --max-degree")
    facts = {
        "hops": cfg.hops, "support": list(cfg.support), "per_class": cfg.per_class, "max_degree": cfg.max_degree,
        "source": {"graphs": len(graphs), "nodes": len(graphs.nodes), "edges": len(graphs.edges),
                   "bytes": graphs.bytes(), "distinct trees": len(trees.size), "fingerprint": graphs.fingerprint,
                   "graphs of each class": np.bincount(graphs.labels, minlength=len(graphs.classes)).tolist()},
        "notes": notes, "read with": "stillhouse.recipes.mirage.Summary.of(stillhouse.load(FOLDER)).source(batch)",
    }  # fmt: skip
    number = {t: i for i, t in enumerate(used)}
    sets = [(tuple(number[t] for t in s), n, y) for s, n, y in chosen]
    return Summary.made([trees.unroll(t) for t in used], sets, graphs, facts)


def train(run: Run, name: str, network: nn.Module, source: Source, cfg: Config) -> nn.Module:
    """A graph classifier trained by cross-entropy on any source of graphs: a summary's, or ordinary batches."""
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    how = partial(kinds[cfg.optimizer], lr=cfg.lr, weight_decay=cfg.weight_decay)
    system = Distill(network, None, alpha=0.0, optimizer=how)
    return fit(run, name, system, source, steps=cfg.steps, settings=cfg).student.eval()


def distill(run: Run, data: Data | Graphs, cfg: Config | None = None, encoders: Sequence[str] = ("gin",)) -> Distilled:
    """The summary of the training graphs and, from this one summary, a network for each encoder.

    Args:
        data: `Graphs`, or `Data` whose training part they are (`stillhouse.graphs.read(…).split(…)`).
        encoders: gcn, gin, gat, sage, ``torch_geometric:CLASS`` or ``package.module:function`` (`classifier`).
    """
    cfg, graphs = cfg or Config(), training(data)
    began = time.process_time()
    summary = summarise(graphs, cfg)
    cost = {"seconds_to_summarise": time.process_time() - began}
    source, members, notes = summary.source(cfg.batch, cfg.per_class), [], list(summary.facts["notes"])
    for encoder in encoders:
        spec, name = cfg.spec(graphs, encoder), encoder.rpartition(":")[2]
        network = train(run, name, spec.build(seed=fold(run.seed, "network")), source, cfg)
        members.append(Member(name, network.cpu(), spec=spec))
        notes += mismatch(name, network, cfg.hops)
    logs = [{**row, "network": m.name} for m in members for row in run.log(m.name)]
    return Distilled(summary, Models(members, graphs.take(np.arange(1))["input"], cost=cost, notes=notes, logs=logs))


def training(data: Any) -> Graphs:
    """The graphs to summarise."""
    graphs = data.train if isinstance(data, Data) else data
    if not isinstance(graphs, Graphs):
        raise UserError(f"mirage summarises stillhouse.graphs.Graphs, got {type(graphs).__name__}; see graphs.read, of")
    return graphs


def mismatch(name: str, network: nn.Module, hops: int) -> list[str]:
    """Where the roots of trees do not have the embeddings of the nodes that they stand for."""
    from torch_geometric.nn import GCNConv

    layers, notes = depth(network), []
    gcn = any(isinstance(m, GCNConv) for m in network.modules())
    if layers > hops:
        notes.append(f"{name} has {layers} layers, the trees {hops} hops: what lies further away is cut off")
    elif gcn and layers + 1 > hops:
        notes.append(f"{name}: GCN divides by degrees, which leaves have lost; exact only with hops above its layers")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        notes.append(f"{name} has batch normalisation: statistics of trees are not those of graphs")
    return notes
