"""The exact checks of the Mirage card: trees, codes, itemsets, roots, the summary as a data set, and bad input."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from table import Row
from torch import nn

import stillhouse
from stillhouse import cli
from stillhouse.data import Data
from stillhouse.errors import UserError
from stillhouse.graphs import Graphs, Labels, classifier, flat, measure, read
from stillhouse.recipes.mirage import experiment
from stillhouse.recipes.mirage.draw import picture, places
from stillhouse.recipes.mirage.itemsets import frequent, thresholds
from stillhouse.recipes.mirage.recipe import Config, distill, mismatch, summarise
from stillhouse.recipes.mirage.summary import Summary
from stillhouse.recipes.mirage.trees import Tree, Trees
from stillhouse.run import Run
from stillhouse.system import Clock

ROWS = [
    Row("mirage", "architectures", {"hops": 1, "layers": 2, "readout": "sum"}, {"encoders": ("gcn", "gat", "sage")}),
    Row("mirage", "micro", {"per_class": True, "dropout": 0.2}, micro_batch=5),
]
JOINT = [
    Row("mirage", "sgd", {"optimizer": "sgd", "lr": 0.05}),
    Row("mirage", "uneven", {"optimizer": "sgd", "batch": 15}),
]

CFG = Config(hops=2, support=(0.1, 0.05))


def graph(labels, edges, directed=False, edge_ids=None) -> Graphs:
    """One graph; an undirected edge stands for both directions."""
    edges = np.array(edges, np.int64).reshape(-1, 2)
    ids = None if edge_ids is None else np.array(edge_ids)
    if not directed:
        edges = np.concatenate([edges, edges[:, ::-1]])
        ids = None if ids is None else np.concatenate([ids, ids])
    return Graphs(
        np.array(labels), np.array([len(labels)]), edges, np.array([len(edges)]), [0], ("a", "b"), edge_ids=ids
    )


def random_graph(seed=0, n=14, p=0.25, labels=3, edge_labels=0) -> Graphs:
    """A connected random graph, so that no node is without neighbours."""
    rng = np.random.default_rng(seed)
    pairs = {(i, i + 1) for i in range(n - 1)} | {q for q in itertools.combinations(range(n), 2) if rng.random() < p}
    edges = sorted(pairs)
    ids = rng.integers(1, edge_labels + 1, len(edges)) if edge_labels else None
    return graph(rng.integers(1, labels + 1, n), edges, edge_ids=ids)


def by_definition(g: Graphs, v: int, hops: int) -> tuple:
    """The code of T_v^hops straight from its definition: the children are all neighbours, also the one above."""
    kinds = np.zeros(len(g.edges), int) if g.edge_ids is None else g.edge_ids
    into = [(int(k), int(u)) for (u, w), k in zip(g.pairs, kinds) if w == v] if hops else []
    return int(g.nodes[v]), tuple(sorted((k, by_definition(g, u, hops - 1)) for k, u in into))


def code_of(tree: Tree) -> tuple:
    """The code of a tree that is spelled out."""

    def at(v: int) -> tuple:
        below = [c for c, p in enumerate(tree.parent) if p == v and c != v]
        return int(tree.label[v]), tuple(sorted((int(tree.edge[c]), at(c)) for c in below))

    return at(0)


# -- trees and their codes ---------------------------------------------------------------------------------------------


def test_star_and_triangle_by_hand():
    leaf = (2, ())
    star = Trees(graph([1, 2, 2, 2], [(0, 1), (0, 2), (0, 3)]), 2)
    hub = (1, ((0, leaf),) * 3)
    assert [star.code(i) for i in star.ids[[0, 1]]] == [(1, ((0, (2, ((0, (1, ())),))),) * 3), (2, ((0, hub),))]
    assert star.ids[1] == star.ids[2] == star.ids[3] and star.size[star.ids].tolist() == [7, 5, 5, 5]
    triangle = Trees(graph([1, 1, 1], [(0, 1), (1, 2), (0, 2)]), 2)
    two = (1, ((0, (1, ())),) * 2)
    assert triangle.ids.tolist() == [0, 0, 0] and triangle.code(0) == (1, ((0, two),) * 2)


def test_a_tree_walks_back_to_where_it_came_from():
    tree = Trees(graph([1, 2], [(0, 1)]), 2)
    assert code_of(tree.unroll(int(tree.ids[0]))) == (1, ((0, (2, ((0, (1, ())),))),))


@pytest.mark.parametrize(("hops", "edge_labels"), [(0, 0), (1, 2), (2, 0), (3, 2)])
def test_trees_are_those_of_the_definition(hops, edge_labels):
    g = random_graph(1, edge_labels=edge_labels)
    trees = Trees(g, hops)
    for v in range(len(g.nodes)):
        expected = by_definition(g, v, hops)
        tree = trees.unroll(int(trees.ids[v]))
        assert trees.code(int(trees.ids[v])) == expected == code_of(tree)
        assert trees.size[trees.ids[v]] == len(tree.label)
    codes = [trees.code(int(i)) for i in trees.ids]
    assert all((a == b) == (i == j) for (a, i), (b, j) in itertools.product(zip(codes, trees.ids), repeat=2))


def test_codes_follow_directions():
    g = graph([1, 2, 3], [(0, 1), (1, 2)], directed=True)
    trees = Trees(g, 2)
    assert trees.code(int(trees.ids[2])) == (3, ((0, (2, ((0, (1, ())),))),)) and trees.code(int(trees.ids[0])) == (
        1,
        (),
    )


@pytest.mark.parametrize("max_degree", [0, 2])
@pytest.mark.parametrize("edge_labels", [0, 2])
def test_codes_do_not_depend_on_how_nodes_are_numbered(edge_labels, max_degree):
    g, order = random_graph(2, edge_labels=edge_labels), np.random.default_rng(3).permutation(14)
    nodes = np.empty(14, int)
    nodes[order] = g.nodes
    shuffled = np.random.default_rng(4).permutation(len(g.edges))
    ids = None if g.edge_ids is None else g.edge_ids[shuffled]
    h = graph(nodes, order[g.edges][shuffled], directed=True, edge_ids=ids)
    a, b = Trees(g, 2, max_degree), Trees(h, 2, max_degree)
    assert [a.code(int(i)) for i in a.ids] == [b.code(int(i)) for i in b.ids[order]]
    assert max_degree == 0 or (a.cut > 0 and max(lv.counts.max() for lv in a.levels) == 2)


def rooted(tree: nx.Graph, root: int, labels: tuple[int, ...]) -> tuple[nx.DiGraph, list[tuple[int, int]]]:
    """A rooted labelled tree, edges from child to parent; in it T_root of enough hops is the tree itself."""
    out = nx.DiGraph()
    out.add_nodes_from((v, {"label": labels[v], "root": v == root}) for v in tree)
    edges = [(c, p) for p, c in nx.bfs_edges(tree, root)]
    out.add_edges_from(edges)
    return out, edges


def all_rooted(sizes, kinds: int) -> list[tuple[nx.DiGraph, tuple]]:
    """Every rooted tree of these sizes with every labelling, and its code."""
    found = []
    for n in sizes:
        trees = [nx.empty_graph(1)] if n == 1 else nx.nonisomorphic_trees(n)
        for tree, root, labels in itertools.product(trees, range(n), itertools.product(range(1, kinds + 1), repeat=n)):
            directed, edges = rooted(tree, root, labels)
            trees_of = Trees(graph(labels, edges, directed=True), n - 1)
            found.append((directed, trees_of.code(int(trees_of.ids[root]))))
    return found


@pytest.mark.parametrize(("sizes", "kinds", "classes"), [(range(1, 7), 1, 37), (range(1, 5), 2, 2 + 4 + 14 + 52)])
def test_equal_codes_are_isomorphic_trees_and_others_are_not(sizes, kinds, classes):
    """All rooted trees of up to six nodes (37, OEIS A000081), and with two labels those of up to four (A000151)."""
    found = all_rooted(sizes, kinds)
    assert len({code for _, code in found}) == classes

    def same(a, b):
        return a["label"] == b["label"] and a["root"] == b["root"]

    for (a, code_a), (b, code_b) in itertools.combinations(found, 2):
        if len(a) == len(b):
            assert (code_a == code_b) == nx.is_isomorphic(a, b, node_match=same)


# -- frequent itemsets -------------------------------------------------------------------------------------------------


def all_itemsets(has: np.ndarray, least: int) -> dict[tuple[int, ...], int]:
    m = has.shape[1]
    every = (s for k in range(1, m + 1) for s in itertools.combinations(range(m), k))
    counts = {s: int(has[:, s].all(1).sum()) for s in every}
    return {s: n for s, n in counts.items() if n >= least}


@pytest.mark.parametrize("least", [1, 5, 12])
def test_itemsets_are_all_that_there_are(least):
    has = np.random.default_rng(0).random((30, 8)) < np.linspace(0.2, 0.9, 8)
    found, more = frequent(has, least, 10_000)
    assert dict(found) == all_itemsets(has, least) and not more and len(found) == len(dict(found))
    for s, n in found:  # support never grows with a set
        assert all(n <= dict(found)[part] for part in itertools.combinations(s, len(s) - 1) if part)


def test_a_cap_keeps_the_most_frequent():
    has = np.random.default_rng(1).random((40, 7)) < 0.7
    every = sorted(all_itemsets(has, 3).values(), reverse=True)
    found, more = frequent(has, 3, 20)
    assert more and [n for _, n in found] == every[:20]
    assert not frequent(has, 3, len(every))[1]


# -- the summary -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Data:
    graphs = read("atlas")
    return graphs.part(np.flatnonzero(graphs.node_counts < 7)).split(0)


@pytest.fixture(scope="module")
def summary(data) -> Summary:
    return summarise(data.train, CFG)


def test_supports_are_numbers_of_graphs_that_hold_all_trees(data, summary):
    trees = Trees(data.train, 2)
    held = [set(map(trees.code, set(trees.ids[data.train.owner == g].tolist()))) for g in range(len(data.train))]
    codes = [code_of(t) for t in spelled_out(summary)]
    starts = np.cumsum(summary.array("sets.trees")) - summary.array("sets.trees")
    for s, n, support, y in zip(
        starts, summary.array("sets.trees"), summary.array("sets.support"), summary.array("sets.class")
    ):
        wanted = {codes[i] for i in summary.array("sets.tree")[s : s + n]}
        assert len(wanted) == n
        assert support == sum(wanted <= h for h, label in zip(held, data.train.labels) if label == y)
        assert support >= thresholds(data.train, CFG.support)[y]


def spelled_out(s: Summary) -> list[Tree]:
    ends = np.cumsum(s.array("trees.nodes"))
    label, parent = (np.split(s.array(k), ends[:-1]) for k in ("trees.label", "trees.parent"))
    edge = np.split(s.array("trees.edge"), ends[:-1]) if "trees.edge" in s.tensors else [0 * p for p in parent]
    return [Tree(*t) for t in zip(label, parent, edge)]


def test_trees_are_stored_once_and_single_nodes_are_left_out(summary):
    codes = [code_of(t) for t in spelled_out(summary)]
    assert len(set(codes)) == len(codes) and min(summary.array("trees.nodes")) > 1
    assert set(summary.array("sets.tree")) == set(range(len(codes)))
    assert summary.stored_nodes < summary.expanded_nodes


def test_a_union_keeps_nodes_edges_and_roots(summary):
    graphs, sizes = summary.graphs(), summary.array("trees.nodes")
    sets = np.split(summary.array("sets.tree"), np.cumsum(summary.array("sets.trees"))[:-1])
    assert graphs.node_counts.tolist() == [sizes[s].sum() for s in sets]
    assert graphs.edge_counts.tolist() == [(sizes[s] - 1).sum() for s in sets]
    assert graphs.node_counts.sum() == summary.expanded_nodes
    source = np.zeros(len(graphs.nodes), bool)
    source[graphs.pairs[:, 0]] = True
    assert np.array_equal(source, graphs.inner)  # a root is a node that is never a source
    for i, s in enumerate(sets):
        one = graphs.part(np.array([i]))
        trees = Trees(one, 2)
        roots = Counter(trees.code(int(t)) for t in trees.ids[~one.inner])
        assert roots == Counter(code_of(spelled_out(summary)[t]) for t in s)


def test_sets_are_drawn_by_support(summary):
    support, classes = summary.array("sets.support"), summary.array("sets.class")
    assert np.array_equal(summary.weights(), support)
    even = summary.weights(per_class=True)
    assert [even[classes == y].sum() for y in (0, 1)] == pytest.approx([1, 1])
    assert np.allclose(
        even[classes == 1] / even[classes == 1].sum(), support[classes == 1] / support[classes == 1].sum()
    )
    source = summary.source(5)
    rare = source.weights.argmin()
    source.weights = np.where(np.arange(len(support)) == rare, 0.0, source.weights)
    clock = Clock(steps_per_epoch=source.steps_per_epoch)
    drawn = np.concatenate([source.ids(replace(clock, step=i)) for i in range(400)])
    assert rare not in drawn and len(drawn) == 2000
    share = np.bincount(drawn, minlength=len(support)) / 2000
    assert np.abs(share - source.weights / source.weights.sum()).max() < 0.05
    epochs = [source.ids(replace(clock, step=e * source.steps_per_epoch)).tolist() for e in range(4)]
    assert len(set(map(tuple, epochs))) == 4  # anew in every epoch, where the released code draws once


def test_the_summary_comes_back_from_its_folder(summary, data, tmp_path):
    summary.save(tmp_path)
    back = Summary.of(stillhouse.load(tmp_path / "dataset"))
    assert back.graphs().fingerprint == summary.graphs().fingerprint
    assert np.array_equal(back.weights(), summary.weights()) and back.facts == summary.facts
    assert np.array_equal(back.labels("node").values, data.train.node_labels.values)
    total = sum(p.stat().st_size for p in (tmp_path / "dataset").glob("*.safetensors"))
    assert summary.bytes()["total"] < total  # the header comes on top
    with pytest.raises(UserError, match="method 'other', expected 'mirage'"):
        Summary.of(stillhouse.DataSet({}, {"method": "other"}))


def test_nothing_is_random_in_a_summary(data, summary):
    order = np.random.default_rng(0).permutation(len(data.train))
    again = summarise(data.train.part(order), CFG)
    assert all(torch.equal(again.tensors[k], v) for k, v in summary.tensors.items())


def test_supports_per_class_and_as_numbers(data):
    n = np.bincount(data.train.labels).tolist()
    assert thresholds(data.train, (0.25,)) == [-(-k // 4) for k in n]
    assert thresholds(data.train, (1.0, 7)) == [n[0], 7]
    some = summarise(data.train, replace(CFG, support=(0.1, 10)))
    assert some.array("sets.support")[some.array("sets.class") == 1].min() >= 10
    few = summarise(data.train, replace(CFG, max_sets=1))
    assert len(few.array("sets.class")) == 2 and any("most frequent" in note for note in few.facts["notes"])


# -- roots and embeddings ----------------------------------------------------------------------------------------------


def embeddings(net, g: Graphs) -> torch.Tensor:
    ids, edge_index, edge_ids, _, _ = flat(**g.take(np.arange(len(g)))["input"])
    return net.encode(ids, edge_index, edge_ids)


def root_difference(encoder: str, layers: int, hops: int, edge_labels: int = 0) -> float:
    """Largest difference between a node's embedding in the graph and that of the root of its tree."""
    g = random_graph(5, edge_labels=edge_labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = classifier(2, g.shape, encoder, width=8, layers=layers).double().eval()
    trees, whole = Trees(g, hops), embeddings(net, g)
    worst = 0.0
    for v in range(len(g.nodes)):
        t = trees.unroll(int(trees.ids[v]))
        below = np.arange(1, len(t.label))
        ids = t.edge[1:] if edge_labels else None
        tree = graph(t.label, np.column_stack([below, t.parent[1:]]), directed=True, edge_ids=ids)
        tree.shape = g.shape
        worst = max(worst, float((embeddings(net, tree)[0] - whole[v]).abs().max().detach()))
    assert float(whole.detach().std(0).max()) > 1e-2
    return worst


@pytest.mark.parametrize("encoder", ["gin", "sage", "gat", "torch_geometric:GIN", "torch_geometric:GraphSAGE"])
def test_the_root_of_a_tree_has_the_embedding_of_its_node(encoder):
    assert root_difference(encoder, 2, 2) <= 1e-5
    assert root_difference(encoder, 1, 2) <= 1e-5
    assert root_difference(encoder, 2, 1) > 1e-4  # the second layer sees a truncated tree


@pytest.mark.parametrize("encoder", ["gin", "gat"])
def test_roots_with_edge_labels(encoder):
    assert root_difference(encoder, 2, 2, edge_labels=3) <= 1e-5


def test_gcn_violates_it_unless_trees_are_one_hop_deeper():
    assert root_difference("gcn", 2, 2) > 1e-3
    assert root_difference("gcn", 2, 3) <= 1e-5  # then every degree that counts is in the tree


@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_a_distilled_graph_is_read_out_over_its_roots(summary, readout):
    graphs = summary.graphs()
    net = classifier(2, graphs.shape, "gin", width=8, readout=readout).double()
    i = int(summary.array("sets.trees").argmax())
    which = np.split(summary.array("sets.tree"), np.cumsum(summary.array("sets.trees"))[:-1])[i]
    alone = []
    for t in which:
        tree = spelled_out(summary)[t]
        g = graph(tree.label, np.column_stack([np.arange(1, len(tree.label)), tree.parent[1:]]), directed=True)
        g.shape = graphs.shape
        alone.append(embeddings(net, g)[0])
    assert len(alone) > 1
    total = torch.stack(alone).sum(0) if readout == "sum" else torch.stack(alone).mean(0)
    found = net(**graphs.take(np.array([0, i]))["input"])[1]
    torch.testing.assert_close(found, net.head(total), rtol=1e-9, atol=1e-9)


def test_layers_against_hops_are_said(data):
    gin, gcn = (classifier(2, data.shape, e, width=4, layers=2) for e in ("gin", "gcn"))
    assert mismatch("gin", gin, 2) == [] and "2 layers, the trees 1 hops" in mismatch("gin", gin, 1)[0]
    assert "degrees" in mismatch("gcn", gcn, 2)[0] and mismatch("gcn", gcn, 3) == []
    assert "batch normalisation" in mismatch("x", nn.Sequential(gin, nn.BatchNorm1d(3)), 2)[0]


# -- labels, pictures, bad input ---------------------------------------------------------------------------------------


def test_labels_that_training_never_saw_share_the_reserved_id():
    labels = Labels.fit(np.array([[3], [5], [5]]))
    assert labels.encode(np.array([[5], [4], [3], [9]])).tolist() == [2, 0, 1, 0] and len(labels) == 3


def test_picture(summary):
    x, depth = places(np.array([0, 0, 0, 1, 1]))
    assert depth.tolist() == [0, 1, 1, 2, 2] and x.tolist() == [1.25, 0.5, 2, 0, 1]
    assert picture(summary)[:4] == b"\x89PNG" == picture(summary)[:4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"support": (0.9,)},
            r"no tree of 2 hops is in .* of the .* graphs of class 'forest'; the largest support avail",
        ),
        ({"support": (1000,)}, r"support 1000 of class 'forest' is more than its \d+ graphs"),
        ({"support": (0.3, 0.3, 0.3)}, "support has 3 values; give one for all or one for each of 2 classes"),
    ],
)
def test_supports_that_do_not_fit(data, changes, message):
    with pytest.raises(UserError, match=message) as said:
        summarise(data.train, replace(CFG, **changes))
    assert "\n" not in str(said.value)


def test_the_largest_support_available_is_true(data):
    with pytest.raises(UserError) as said:
        summarise(data.train, replace(CFG, support=(0.9,)))
    best = int(str(said.value).split("available is ")[1].split()[0])
    made = summarise(data.train, replace(CFG, support=(best, 0.05)))
    assert made.array("sets.support")[made.array("sets.class") == 0].tolist() == [best]
    with pytest.raises(UserError, match=f"available is {best} "):
        summarise(data.train, replace(CFG, support=(best + 1, 0.05)))


@pytest.mark.parametrize("bad", [{"support": ()}, {"support": (0.0,)}, {"hops": 0}, {"max_sets": 0}, {"steps": 0}])
def test_settings_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Config(**bad)


def test_only_graphs_are_summarised(tmp_path):
    with pytest.raises(UserError, match=r"Graphs, got list; see graphs\.read"):
        distill(Run(tmp_path, quiet=True, device="cpu"), [1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "mutga"], "did you mean 'mutag'?"),
        (["--data", "atlas", "--support", "0.99"], "largest support available"),
        (["--data", "atlas", "--hops", "1", "--support", "0.1", "--model", "gni"], "unknown encoder 'gni'"),
        (["--data", "atlas", "--hops", "0"], "hops must be at least 1"),
        (["--data", "nowhere:graphs"], "there is no module 'nowhere'"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(flags, message, tmp_path, capsys):
    assert cli.invoke(["run", "mirage", *flags, "--quiet", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_the_command_on_a_users_own_graphs_and_network(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_graphs.py").write_text(
        "import torch\n"
        "from torch_geometric.data import Data\n"
        "from torch_geometric.nn import SAGEConv\n"
        "def ring(n): return torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])\n"
        "def both(e): return torch.cat([e, e.flip(0)], 1)\n"
        "def path(n): return torch.stack([torch.arange(n - 1), torch.arange(n - 1) + 1])\n"
        "def graphs():\n"
        "    return [Data(edge_index=both(make(n)), y=torch.tensor([k]), num_nodes=n)\n"
        "            for n in range(4, 24) for k, make in enumerate((ring, path))]\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.layer = SAGEConv(width, 8)\n"
        "    def forward(self, x, edge_index): return self.layer(x, edge_index)\n"
        "def network(in_channels): return Net(in_channels)\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = "--data own_graphs:graphs --model own_graphs:network --hops 1 --steps 60 --lr 0.02 --readout mean"
    code = cli.invoke(["run", "mirage", *flags.split(), "--quiet", "--device", "cpu", "--out", "run"])
    assert code == 0, capsys.readouterr().err
    report = stillhouse.Report.read(tmp_path / "run")
    assert "the number of edges that lead to a node is its label" in " ".join(report.notes)
    assert report.students[0].metrics["auc"] == 1.0  # a path has ends, a ring has none
    assert {t.title for t in report.tables} > {"Sizes"} and report.images and not report.claims
    model = stillhouse.load(tmp_path / "run/students/network")
    test = read("own_graphs:graphs").split(0).test
    assert measure(model, test) == pytest.approx({k: report.students[0].metrics[k] for k in ("accuracy", "nll", "auc")})


def test_claims_are_those_of_the_card():
    def arm(auc, **more):
        return [{"auc": a, **more} for a in auc]

    results = {
        "gin, mirage": arm([0.9, 0.8], share=0.02),
        "gin, random, same stored nodes": arm([0.9, 0.5]),
        "gin, full": arm([0.9, 0.9]),
    }
    share, ratio, gain, calm = experiment.claims(results, [0, 1])
    assert (share.value, share.threshold, share.holds) == (0.02, 0.03, True)
    assert ratio.value == pytest.approx(0.85 / 0.9) and ratio.holds
    assert gain.value == pytest.approx(0.15) and gain.holds
    assert calm.value == pytest.approx((0.4 - 0.1) / 2**0.5) and calm.holds


def test_random_graphs_are_balanced_and_large_enough(data):
    few = experiment.random_graphs(data.train, 30, 0)
    assert few.node_counts.sum() >= 30 > few.node_counts[:-1].sum()
    assert abs(np.diff(np.bincount(few.labels))[0]) <= 1
    assert experiment.random_graphs(data.train, 1, 0).labels.tolist() == [0, 1]
    assert len(experiment.random_graphs(data.train, 10**9, 0)) == len(data.train)


@pytest.mark.data
def test_proteins_of_two_hops_are_refused(data_root):
    train = read("proteins").split(0).train
    with pytest.raises(UserError, match="largest support available"):
        summarise(train, Config(hops=2, support=(0.3,)))
    assert summarise(train, Config(hops=1, support=(0.3,))).stored_nodes < 0.01 * len(train.nodes)


@pytest.mark.data
def test_mutag_is_as_the_card_has_it(data_root):
    train = read("mutag").split(0).train
    trees = Trees(train, 2)
    assert len(train) == 150 and 2600 < len(train.nodes) < 2800 and 130 < len(trees.size) < 190
    assert np.sort(np.bincount(trees.ids))[-20:].sum() / len(train.nodes) > 0.8
    assert summarise(train, Config()).stored_nodes < 0.03 * len(train.nodes)
