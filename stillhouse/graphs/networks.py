"""Classifiers of graphs: any message-passing network, read out over some or all of its nodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean, need
from stillhouse.evaluate import classification, evaluating, predict
from stillhouse.models import import_object

Readout = Literal["sum", "mean"]
LAYERS = ("gcn", "gin", "gat", "sage")


def flat(
    nodes: Tensor, edges: Tensor, edge_ids: Tensor | None = None, inner: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Rows of padded graphs as one disjoint graph, in the terms of PyTorch Geometric.

    Args:
        nodes: (n, V) label ids, −1 where a row is filled up.
        edges: (n, E, 2) source and target, numbered inside each graph; −1 where filled up.
        edge_ids: (n, E) label ids of edges. inner: (n, V) True for nodes that the readout leaves out.

    Returns:
        ids (N,), edge_index (2, M), edge ids (M,) or None, batch (N,) graph of each node, counted (N,) bool.

    Example:
        >>> ids, edge_index, *_ , batch, _ = flat(torch.tensor([[1, -1], [2, 3]]), torch.tensor([[[-1, -1]], [[0, 1]]]))
        >>> ids.tolist(), edge_index.tolist(), batch.tolist()
        ([1, 2, 3], [[1], [2]], [0, 1, 1])
    """
    real, links = nodes >= 0, edges[..., 0] >= 0
    counts = real.sum(1)
    first = (counts.cumsum(0) - counts)[:, None, None]
    batch = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
    counted = torch.ones_like(batch, dtype=torch.bool) if inner is None else ~inner[real]
    return nodes[real], (edges + first)[links].T, None if edge_ids is None else edge_ids[links], batch, counted


class GraphClassifier(nn.Module):
    """Logits W · readout_v h_v + b over the nodes v of each graph that count; h from any node encoder.

    Args:
        encoder: ``(x (N, labels) one-hot, edge_index (2, M)) → (N, d)``; with edge labels and a parameter called
            ``edge_attr`` it is given those too, (M, edge labels) one-hot.
        classes: number of logits.
        shape: number of node and of edge label ids.
        readout: "sum" or "mean" over the nodes that count: the roots of computation trees, all nodes of a graph.

    Raises:
        UserError: an encoder that does not give one row per node.

    Example:
        >>> net = classifier(2, (5, 0), "gin", width=8)
        >>> net(torch.tensor([[1, 2, -1]]), torch.tensor([[[0, 1], [1, 0]]])).shape
        torch.Size([1, 2])
    """

    def __init__(self, encoder: nn.Module, classes: int, shape: Sequence[int], readout: Readout = "sum"):
        super().__init__()
        if readout not in ("sum", "mean"):
            raise UserError(f"readout must be sum or mean, got {readout!r}")
        self.encoder, self.shape, self.readout = encoder, tuple(shape), readout
        self.with_edges = bool(shape[1]) and "edge_attr" in inspect.signature(encoder.forward).parameters
        self.head = nn.Linear(self._width(), classes)

    def _width(self) -> int:
        """Columns of the encoder's output, from a try on two nodes."""
        ids, pair = torch.zeros(2, dtype=torch.int64), torch.tensor([[0, 1], [1, 0]])
        try:
            with torch.no_grad(), evaluating(self.encoder):
                out = self.encode(ids, pair, torch.zeros(2, dtype=torch.int64))
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"the encoder {type(self.encoder).__name__} could not be called as encoder(x (2, {self.shape[0]}), "
                f"edge_index (2, 2)): {type(error).__name__}: {said}"
            ) from None
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 2:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f"the encoder {type(self.encoder).__name__} must give one row per node (2, d), got {got}")
        return out.shape[1]

    def encode(self, ids: Tensor, edge_index: Tensor, edge_ids: Tensor | None = None) -> Tensor:
        """Embeddings of all nodes (N, d)."""
        dtype = next((p.dtype for p in self.encoder.parameters() if p.is_floating_point()), torch.float32)
        x = nn.functional.one_hot(ids, self.shape[0]).to(dtype)
        more = {}
        if self.with_edges and edge_ids is not None:
            more["edge_attr"] = nn.functional.one_hot(edge_ids, self.shape[1]).to(dtype)
        return self.encoder(x, edge_index, **more)

    def forward(
        self, nodes: Tensor, edges: Tensor, edge_ids: Tensor | None = None, inner: Tensor | None = None
    ) -> Tensor:
        ids, edge_index, edge_ids, batch, counted = flat(nodes, edges, edge_ids, inner)
        h = self.encode(ids, edge_index, edge_ids)
        return self.head(self.pool(h, batch, counted, len(nodes)))

    def pool(self, h: Tensor, batch: Tensor, counted: Tensor, n: int) -> Tensor:
        """Sum or mean of the embeddings that count, (n, d)."""
        where = batch[counted]
        total = h.new_zeros(n, h.shape[1]).index_add(0, where, h[counted])
        if self.readout == "sum":
            return total
        return total / torch.bincount(where, minlength=n).clamp(min=1).to(h.dtype)[:, None]


class Stack(nn.Module):
    """Message-passing layers, each followed by ReLU and dropout."""

    def __init__(self, layers: list[nn.Module], dropout: float, edges: bool):
        super().__init__()
        self.layers, self.dropout, self.edges = nn.ModuleList(layers), nn.Dropout(dropout), edges

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, edge_index, edge_attr) if self.edges and edge_attr is not None else layer(x, edge_index)
            x = self.dropout(torch.relu(x))
        return x


def classifier(
    classes: int,
    shape: Sequence[int],
    encoder: str = "gin",
    width: int = 64,
    layers: int = 2,
    dropout: float = 0.0,
    readout: Readout = "sum",
) -> GraphClassifier:
    """A graph classifier by the name of its encoder, as `ModelSpec("stillhouse.graphs:classifier", …)` builds it.

    Args:
        encoder: gcn, gin, gat or sage; ``torch_geometric:CLASS`` of its models; or ``package.module:function``, called
            with those of ``in_channels, hidden_channels, num_layers, out_channels, dropout, edge_dim`` that it takes.
        width, layers, dropout: of the encoder.

    Without batch normalisation: batch statistics of trees are not those of graphs.
    """
    if width < 1 or layers < 1 or not 0 <= dropout < 1:
        raise UserError(f"a network needs width, layers >= 1 and dropout in [0, 1), got {width}, {layers}, {dropout}")
    return GraphClassifier(_encoder(encoder, shape, width, layers, dropout), classes, shape, readout)


def _encoder(name: str, shape: Sequence[int], width: int, layers: int, dropout: float) -> nn.Module:
    if name in LAYERS:
        made = [_layer(name, shape[0] if i == 0 else width, width, shape[1]) for i in range(layers)]
        return Stack(made, dropout, name in ("gin", "gat") and shape[1] > 0)
    source, colon, rest = name.partition(":")
    if not colon:
        raise UserError(f"unknown encoder {name!r}; {did_you_mean(name, [*LAYERS, 'package.module:function'])}")
    _geometric()
    build = import_object(f"torch_geometric.nn:{rest}" if source == "torch_geometric" else name, "--model")
    known: dict[str, Any] = {
        "in_channels": shape[0],
        "hidden_channels": width,
        "out_channels": width,
        "num_layers": layers,
    }
    known |= {"dropout": dropout} | ({"edge_dim": shape[1]} if shape[1] else {})
    try:
        takes = inspect.signature(build).parameters
        model = build(**{k: v for k, v in known.items() if k in takes})
    except Exception as error:
        raise UserError(f"--model {name} raised {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _layer(name: str, i: int, o: int, edge_labels: int) -> nn.Module:
    nets = _geometric()
    if name == "gin":
        mlp = nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o))
        return nets.GINEConv(mlp, edge_dim=edge_labels) if edge_labels else nets.GINConv(mlp)
    if name == "gat":
        return nets.GATConv(i, o, edge_dim=edge_labels or None)
    kinds: dict[str, Callable[..., nn.Module]] = {"gcn": nets.GCNConv, "sage": nets.SAGEConv}
    return kinds[name](i, o)


def depth(network: nn.Module) -> int:
    """Number of message-passing layers."""
    kind = _geometric().MessagePassing
    return sum(isinstance(m, kind) for m in network.modules())


def _geometric() -> Any:
    try:
        import torch_geometric.nn as nets
    except ModuleNotFoundError:
        raise need("graphs", "torch_geometric") from None
    return nets


def measure(network: nn.Module, graphs: Any, device: Any = "cpu") -> dict[str, float]:
    """Accuracy, NLL and the area under the ROC curve (one class against the rest, averaged, where there are several).

    Args:
        network: is in eval mode meanwhile, and on the CPU afterwards.
        graphs: `Graphs`. A class that does not occur in them is left out of the area.
    """
    from sklearn.metrics import roc_auc_score

    z, y = predict(network, graphs, device=device)
    network.cpu()
    p = z.double().softmax(1)
    there = [c for c in range(p.shape[1]) if 0 < int((y == c).sum()) < len(y)]
    # Of two classes the area is the same from either side; a difference of logits has no ties by rounding.
    scores = z.double() - (z.double().sum(1, keepdim=True) - z) if p.shape[1] == 2 else p
    areas = [float(roc_auc_score(y == c, scores[:, c])) for c in there]
    found = {k: v for k, v in classification(z, y).items() if k in ("accuracy", "nll")}
    return {**found, "auc": sum(areas) / len(areas) if areas else float("nan")}
