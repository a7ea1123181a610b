"""Sets of graphs and networks on them: reading, labels, padded rows, splitting, and what is wrong in one line."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Data as Geometric

from stillhouse.data import Batches, Weighted
from stillhouse.distill import Distill
from stillhouse.engine import fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_macs, predict
from stillhouse.graphs import Collection, Labels, classifier, depth, flat, measure, of, read
from stillhouse.graphs.sets import narrow, spans
from stillhouse.run import Run


def both(edges: list[tuple[int, int]]) -> torch.Tensor:
    e = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T
    return torch.cat([e, e.flip(0)], 1)


def molecules(n: int = 12) -> list[Geometric]:
    """Paths and triangles with a tail, with labels 0…2, in turn."""
    found = []
    for i in range(n):
        size = 4 + i % 3
        edges = [(v, v + 1) for v in range(size - 1)] + ([(0, 2)] if i % 2 else [])
        x = torch.tensor([[(v + i) % 3] for v in range(size)])
        found.append(Geometric(x=x, edge_index=both(edges), y=torch.tensor(i % 2)))
    return found


# -- reading -----------------------------------------------------------------------------------------------------------


def test_atlas():
    graphs = read("atlas")
    assert len(graphs) == 1252 and np.bincount(graphs.labels).tolist() == [79, 1173]  # forests: OEIS A005195
    assert graphs.node_counts.max() == 7 and "label" in graphs.notes[0]
    ends = graphs.part(np.array([3]))  # three nodes without edges and so on: degrees count the edges that come in
    assert ends.x.sum() == len(ends.edges)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts", "nodes", "edges"),
    [("mutag", [63, 125], 3371, 7442), ("proteins", [663, 450], 43471, 162088), ("nci1", [2053, 2057], 122747, 265506)],
)
def test_packed_sets(name, counts, nodes, edges, data_root):
    graphs = read(name)
    assert np.bincount(graphs.labels).tolist() == counts and len(graphs.x) == nodes and len(graphs.edges) == edges


def test_own_graphs_keep_features_edges_and_classes():
    graphs = molecules()
    made = of(graphs, "mine")
    assert len(made) == 12 and made.classes == ("0", "1") and made.labels.tolist() == [0, 1] * 6
    one = made.part(np.array([5]))
    assert np.array_equal(one.x, graphs[5].x.numpy()) and np.array_equal(one.edges.T, graphs[5].edge_index.numpy())
    named = of([Geometric(edge_index=both([(0, 1)]), y=y, num_nodes=2) for y in (-1, 4, -1, 4)])
    assert named.classes == ("-1", "4") and named.labels.tolist() == [0, 1, 0, 1]


def test_graphs_without_features_take_degrees_and_say_so():
    star = Geometric(edge_index=both([(0, 1), (0, 2), (0, 3)]), y=0, num_nodes=5)
    made = of([star, star])
    assert made.x.T.tolist() == [[3, 1, 1, 1, 0] * 2]
    assert made.notes == ("no node features: the number of edges that lead to a node is its label",)


def test_continuous_features_are_clustered_and_that_is_said():
    graphs = molecules(20)
    for i, g in enumerate(graphs):
        g.x = torch.stack([g.x[:, 0] * 5 + 0.01 * i + 0.003, torch.full((len(g.x),), 0.5)], 1)
    data = of(graphs, bins=3).split(0)
    assert data.train.shape == (4, 0) and "continuous node features: replaced by 3 k-means clusters" in data.notes[0]
    centres = data.train.node_labels.values[:, 0]
    assert np.abs(centres - [0.1, 5.1, 10.1]).max() < 0.1  # in order, and the constant column takes no part
    assert (data.test.nodes > 0).all()  # the nearest cluster counts, so nothing is unseen


def test_edge_labels():
    graphs = molecules()
    for g in graphs:
        g.edge_attr = torch.arange(g.edge_index.shape[1]).reshape(-1, 1) % 2
    data = of(graphs).split(0)
    assert data.shape == (4, 3) and set(data.train.edge_ids) == {1, 2}
    assert data.train.take(np.array([0, 1]))["input"]["edge_ids"].shape[0] == 2


def write_tu(folder, name: str, **files: list) -> None:
    folder.mkdir(parents=True)
    for kind, lines in files.items():
        (folder / f"{name}_{kind}.txt").write_text("\n".join(map(str, lines)) + "\n")


def test_sets_of_the_tu_collection_are_read_from_their_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    links = ["1, 2", "2, 1", "3, 4", "4, 3", "4, 5", "5, 4"]
    how = {"A": links, "graph_indicator": [1, 1, 2, 2, 2], "graph_labels": [-1, 1]}
    write_tu(tmp_path / "tu-graphs" / "TOY", "TOY", **how, node_labels=[7, 9, 7, 7, 9])
    toy = read("tu:TOY")
    assert (
        toy.node_counts.tolist() == [2, 3]
        and toy.edges.tolist()[2:4] == [[0, 1], [1, 0]]
        and toy.labels.tolist() == [0, 1]
    )
    assert Labels.fit(toy.x).encode(toy.x).tolist() in ([1, 2, 1, 1, 2], [2, 1, 2, 2, 1])
    write_tu(tmp_path / "tu-graphs" / "BARE", "BARE", **how)
    bare = read("tu:BARE")
    assert bare.x.T.tolist() == [[1, 1, 1, 2, 1]] and bare.notes


def test_a_set_that_cannot_be_downloaded(tmp_path, monkeypatch):
    from torch_geometric.io import fs

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(fs, "cp", offline)
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"tu:ENZYMES not found in .* \(no route to host\); put its text files"):
        read("tu:ENZYMES")


# -- labels and splits -------------------------------------------------------------------------------------------------


def test_labels_are_numbered_by_the_training_part_alone():
    graphs = molecules(20)
    data = of(graphs).split(3)
    assert len(data.train) == 16 and len(data.test) == 4 and data.train.node_labels is data.test.node_labels
    odd = Geometric(x=torch.tensor([[8], [9]]), edge_index=both([(0, 1)]), y=0)
    notes = [of([*graphs, odd]).split(s).notes for s in range(40)]
    assert any("2 test nodes have labels that no training graph has" in " ".join(n) for n in notes)


def test_rows_of_whole_numbers_are_labels_also_one_hot():
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = Labels.fit(rows)
    assert labels.encode(rows).tolist() == [2, 1, 2] and labels.encode(np.array([[1.0, 1.0]])).tolist() == [0]
    with pytest.raises(UserError, match="labels have 3 columns, those of the training graphs 2"):
        labels.encode(np.zeros((1, 3)))


def test_splits_are_stratified_seeded_and_disjoint():
    graphs = read("atlas")
    a, b, c = (graphs.split(s) for s in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert np.bincount(a.test.labels).tolist() == [16, 234] and len(a.train) + len(a.test) == 1252


def test_spans_and_narrow_types():
    assert spans(np.array([4, 9, 0]), np.array([2, 0, 3])).tolist() == [4, 5, 0, 1, 2]
    kinds = [narrow(np.array([top])).dtype for top in (255, 256, 40_000, 2**40)]
    assert kinds == [np.uint8, np.int16, np.int32, np.int64]


# -- batches and networks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    graphs = molecules(20)
    for i, g in enumerate(graphs):
        g.edge_attr = (torch.arange(g.edge_index.shape[1]).reshape(-1, 1) + i) % 2
    return of(graphs).split(0)


def test_rows_become_the_disjoint_union(data):
    batch = data.train.take(np.array([3, 0, 5]))
    ids, edge_index, edge_ids, where, counted = flat(**batch["input"])
    parts = [data.train.part(np.array([i])) for i in (3, 0, 5)]
    first = np.cumsum([0, *(p.node_counts[0] for p in parts)])
    assert ids.tolist() == np.concatenate([p.nodes for p in parts]).tolist() and counted.all()
    assert edge_index.T.tolist() == np.concatenate([p.edges + f for p, f in zip(parts, first)]).tolist()
    assert edge_ids is not None and edge_ids.tolist() == np.concatenate([p.edge_ids for p in parts]).tolist()
    assert where.tolist() == np.repeat([0, 1, 2], [p.node_counts[0] for p in parts]).tolist()
    assert batch["label"].tolist() == data.train.labels[[3, 0, 5]].tolist() and next(iter(batch)) == "label"


ENCODERS = ["gin", "gcn", "gat", "sage", "torch_geometric:GIN", "torch_geometric:GAT", "torch_geometric:PNA"]


@pytest.mark.parametrize("readout", ["sum", "mean"])
@pytest.mark.parametrize("encoder", ENCODERS[:5])
def test_a_graph_is_answered_alone_as_in_any_batch(encoder, readout, data):
    net = classifier(2, data.shape, encoder, width=8, readout=readout).double().eval()
    together, _ = predict(net, data.train)
    alone, _ = predict(net, data.train, batch_size=1)
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
    assert depth(net) == 2 and together.std(0).min() > 1e-4


def test_numbering_of_nodes_does_not_matter(data):
    net = classifier(2, data.shape, "gin", width=8).double()
    one = data.train.take(np.array([1]))["input"]
    n = int((one["nodes"] >= 0).sum())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    nodes = torch.empty(1, n, dtype=torch.int64)
    nodes[0, order] = one["nodes"][0, :n]
    torch.testing.assert_close(net(nodes, order[one["edges"]], one["edge_ids"]), net(**one), rtol=1e-12, atol=1e-12)


def test_edge_labels_reach_the_networks_that_can_take_them(data):
    one = data.train.take(np.array([1]))["input"]
    other = {**one, "edge_ids": torch.where(one["edge_ids"] == 1, 2, one["edge_ids"])}
    for encoder, takes in (("gin", True), ("gat", True), ("gcn", False), ("sage", False)):
        net = classifier(2, data.shape, encoder, width=8).double()
        assert net.with_edges == takes or not takes
        assert bool((net(**one) - net(**other)).abs().max() > 1e-9) == takes, encoder


def test_readout_over_the_nodes_that_count(data):
    one = data.train.take(np.array([0, 1]))["input"]
    net = classifier(2, data.shape, "sage", width=8, readout="mean").double()
    ids, edge_index, edge_ids, where, _ = flat(**one)
    h = net.encode(ids, edge_index, edge_ids)
    inner = torch.ones_like(one["nodes"], dtype=torch.bool)
    inner[:, 2] = False
    first = int((where == 0).sum())
    expected = net.head(torch.stack([h[2], h[first + 2]]))
    torch.testing.assert_close(net(**one, inner=inner), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("micro", [3, 7])
def test_micro_batches_make_the_same_step(micro, data, tmp_path):
    found = []
    for limit in (None, micro):
        run = Run(tmp_path / str(limit), quiet=True, device="cpu", micro_batch=limit)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = classifier(2, data.shape, "gin", width=8).double()
        system = Distill(net, None, alpha=0.0, optimizer=partial(torch.optim.SGD, lr=0.1))
        found.append(fit(run, "s", system, Batches(data.train, 10), steps=3).student)
    for a, b in zip(found[0].parameters(), found[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_macs_are_those_of_one_graph(data):
    net = classifier(2, data.shape, "gcn", width=8, layers=1)
    batch = data.train.take(np.array([0, 1, 2]))["input"]
    nodes = data.train.node_counts[0]
    assert count_macs(net, batch) == nodes * data.shape[0] * 8 + 8 * 2


def test_measure():
    class Fixed(nn.Module):
        def forward(self, nodes, edges):
            return torch.stack([torch.zeros(len(nodes)), nodes[:, 0].float()], 1)

    graphs = [
        Geometric(x=torch.tensor([[v], [0]]), edge_index=both([(0, 1)]), y=y)
        for v, y in ((1, 0), (3, 0), (2, 1), (4, 1))
    ]
    labels = Labels.fit(np.arange(5)[:, None])
    found = measure(Fixed(), of(graphs).encoded(labels, None))
    assert found["auc"] == 0.75 and found["accuracy"] == 0.5  # 3 of 4 pairs are in order


# -- what is wrong -----------------------------------------------------------------------------------------------------


def one(**changes) -> list[Geometric]:
    """Two graphs, the second of which is wrong."""
    good = {"x": torch.tensor([[1], [2]]), "edge_index": both([(0, 1)]), "y": torch.tensor(0)}
    return [Geometric(**good), Geometric(**{**good, **changes})]


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ([], "there are no graphs; give at least two of each class"),
        (3, "expected a list of torch_geometric graphs, got int"),
        (one(y=None), "graph 1 has no y"),
        (one(y=torch.tensor(0.5)), r"y of graph 1 must be one whole number, its class, got \[0.5\]"),
        (one(y=torch.tensor([0, 1])), "y of graph 1 must be one whole number"),
        (one(edge_index=None), "graph 1 has no edge_index"),
        (one(edge_index=both([(0, 2)])), r"edge_index of graph 1 holds \(0, 2\), but its nodes are 0…1"),
        (
            one(edge_index=both([(0, 1)]).float()),
            r"edge_index of graph 1 must be whole numbers \(2, E\), got torch.float32",
        ),
        (one(x=torch.zeros(2, 3)), r"x has \[1, 3\] columns"),
        (one(x=torch.zeros(3, 1)), None),
        (one(x=torch.tensor([[1.0], [float("nan")]])), "node features hold NaN or infinity"),
        ([Geometric(edge_index=both([(0, 1)]), y=0, num_nodes=2), one()[0]], "graph 0 has no x, graph 1 has"),
    ],
)
def test_own_graphs_that_are_wrong(graphs, message):
    if message is None:
        assert len(of(graphs)) == 2  # a node without edges is nothing wrong
        return
    with pytest.raises(UserError, match=message) as said:
        of(graphs, "mine")
    assert "\n" not in str(said.value) and str(said.value).startswith("mine: ")


def test_one_class_only():
    with pytest.raises(UserError, match="all 2 graphs are of class '0'; at least two classes are needed"):
        of(one()).split(0)


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean 'mutag'"):
        read("mutga")
    with pytest.raises(UserError, match="unknown encoder 'gib'; did you mean 'gi"):
        classifier(2, (3, 0), "gib")
    with pytest.raises(UserError, match="has no 'GNI'"):
        classifier(2, (3, 0), "torch_geometric:GNI")
    with pytest.raises(UserError, match="width, layers >= 1"):
        classifier(2, (3, 0), "gin", layers=0)
    with pytest.raises(UserError, match="readout must be sum or mean, got 'max'"):
        classifier(2, (3, 0), "gin", readout="max")  # type: ignore[arg-type]


def test_packed_sets_need_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    with pytest.raises(UserError, match="STILLHOUSE_DATA, which is not set"):
        read("mutag")
    (tmp_path / "tu-graphs").mkdir()
    (tmp_path / "tu-graphs" / "MUTAG.npz").write_bytes(b"no zip")
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot read .*MUTAG\.npz"):
        read("mutag")


def test_encoders_that_do_not_fit(monkeypatch, tmp_path):
    (tmp_path / "own_encoders.py").write_text(
        "from torch import nn\n"
        "class Image(nn.Module):\n"
        "    def forward(self, x): return x\n"
        "class Pooled(nn.Module):\n"
        "    def forward(self, x, edge_index): return x.sum(0)\n"
        "def broken(width): return 1 / 0\n"
        "def none(): return None\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("Image", r"Image could not be called as encoder\(x \(2, 3\), edge_index \(2, 2\)\)"),
        ("Pooled", r"Pooled must give one row per node \(2, d\), got \(3,\)"),
        ("broken", "raised"),
        ("none", "returned NoneType, expected a torch.nn.Module"),
    ):
        with pytest.raises(UserError, match=message) as said:
            classifier(2, (3, 0), f"own_encoders:{name}")
        assert "\n" not in str(said.value)


def test_weights_that_do_not_fit(data):
    for bad in ([1.0], -np.ones(len(data.train)), np.zeros(len(data.train))):
        with pytest.raises(UserError, match="weights must be 16 numbers >= 0 and not all zero"):
            Weighted(data.train, bad, 4)


def test_a_collection_that_does_not_fit_together():
    whole = of(molecules())
    with pytest.raises(UserError, match="12 graphs, but 11 labels"):
        Collection("c", whole.x, whole.node_counts, whole.edges, whole.edge_counts, whole.labels[1:], whole.classes)
