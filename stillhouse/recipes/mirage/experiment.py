"""Mirage on real graphs: the summary of a set, networks of three architectures from it, and the card's claims.

stillhouse run mirage --out runs/mirage                          # MUTAG, or the graph atlas without STILLHOUSE_DATA
stillhouse run mirage --data proteins --hops 1 --support 0.3 --out runs/proteins
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from stillhouse.data import Batches, Data
from stillhouse.engine import Run
from stillhouse.evaluate import environment, spread
from stillhouse.graphs import Collection, Graphs, measure, read
from stillhouse.options import Options
from stillhouse.recipes.mirage.draw import picture
from stillhouse.recipes.mirage.recipe import Config, Distilled, distill, summarise, train, training
from stillhouse.recipes.mirage.summary import Summary
from stillhouse.report import Claim, Curve, Image, Report, Table
from stillhouse.system import fold
from stillhouse.trials import Results, mean, trials


@dataclass(frozen=True)
class GraphOptions(Options):
    """Options of systems for sets of graphs."""

    model: str | None = None  # gcn, gin, gat, sage, torch_geometric:CLASS or package.module:function
    data: str | None = None  # mutag, proteins, nci1, atlas, tu:NAME or package.module:function
    seeds: int = 10  # random splits for the claims of the built-in experiment
    test: float = 0.2  # part of the graphs to test on
    bins: int = 16  # clusters that continuous features are put into

    def load(self, default: str) -> Collection:
        """The graphs named by ``--data``, or `default`."""
        return read(self.data or default, bins=self.bins)


OPTIONS = GraphOptions
PRESET = replace(Config(), steps=100)
# The atlas' labels are degrees, which are a hop already, and its graphs have few trees in common.
ATLAS: dict[str, Any] = {"hops": 1, "support": (0.1,)}
TINY = replace(PRESET, **ATLAS, width=8, steps=8, batch=16)
ENCODERS = ("gin", "gcn", "gat")
# What a network is trained on, and how: for each the best of steps {100, 400} × learning rate {1e-3, 5e-3} × weight
# decay {0, 0.1} for GIN on splits 100 to 109 of MUTAG (or one within 0.001 of its AUC with fewer steps).
ARMS: dict[str, dict[str, Any]] = {
    "mirage": {},
    "random, same stored nodes": {"lr": 5e-3},
    "random, same expanded nodes": {"steps": 400},
    "full": {"steps": 400, "lr": 5e-3, "weight_decay": 0.0},
}
SHIFTED = (
    "Judge by AUC: a few roots are read out in training, all nodes at test, which shifts the logits, not the order."
)
DRAWS = 5  # of two to four random graphs for one split: with so few, what a network learns is a matter of luck


def main(run: Run, options: GraphOptions, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it: summarise, train every architecture from the summary, measure, compare."""
    built_in = "mutag" if os.environ.get("STILLHOUSE_DATA") else "atlas"
    if not options.own and built_in == "atlas":
        cfg = replace(cfg, **{k: v for k, v in ATLAS.items() if getattr(cfg, k) == getattr(PRESET, k)})
    graphs, encoders = options.load(built_in), (options.model,) if options.model else ENCODERS
    data = graphs.split(run.seed, options.test)
    made = distill(run, data, cfg, encoders)
    report = describe(run, made, data, cfg, command) if run.main else None
    run.barrier()
    seeds = [options.seed] if options.own else options.children()
    results = compare(run, graphs, options.test, cfg, encoders, seeds)
    if report is not None:
        report.tables += [sizes(made.summary, training(data)), quality(results, encoders), costs(results, encoders)]
        report.claims += [] if options.own else claims(results, seeds)
    return report


def tiny(run: Run, cfg: Config = TINY, encoders: Sequence[str] = ("gin",)) -> Distilled:
    """One run of about a second on the atlas' graphs of at most six nodes, for the contract table."""
    graphs = read("atlas")
    return distill(run, graphs.part(np.flatnonzero(graphs.node_counts < 7)).split(run.seed), cfg, encoders)


def describe(run: Run, made: Distilled, data: Data, cfg: Config, command: str) -> Report:
    """The report of one summary and the networks trained on it."""
    png = picture(made.summary)
    made.summary.pictures["trees"] = png
    made.save(run.folder)
    found = {m.name: measure(m.model, data.test) for m in made.models}
    graphs, s = training(data), made.summary
    steps = [r["step"] for r in made.models.logs if r["network"] == made.models.members[0].name]
    loss: Any = {m.name: (steps, [r["label"] for r in made.models.logs if r["network"] == m.name]) for m in made.models}
    return Report(
        "mirage",
        f"Mirage · {data.name}, {cfg.hops} hops",
        command,
        run.seed,
        environment(),
        {"stored_nodes": s.stored_nodes, "expanded_nodes": s.expanded_nodes, "training_nodes": len(graphs.nodes)},
        [],
        made.models.rows(run.folder, found),
        cost=made.models.cost,
        curves=[Curve("Loss on the distilled graphs", "step", "nats", loss)],
        images=[Image("Most frequent trees of each class (label on each node, root on top)", png)],
        notes=[*data.notes, *made.models.notes, SHIFTED],
    )


def sizes(summary: Summary, graphs: Graphs) -> Table:
    """Every count that a compression can be quoted in."""
    has = summary.bytes()
    plain = has["total"] - has["labels"]  # what labels mean is not counted on the other side either
    rows = [
        ["graphs / sets of trees", len(graphs), len(summary.array("sets.class"))],
        ["distinct trees", summary.facts["source"]["distinct trees"], len(summary.array("trees.nodes"))],
        ["nodes stored", len(graphs.nodes), summary.stored_nodes],
        ["nodes in one pass (expanded)", len(graphs.nodes), summary.expanded_nodes],
        ["bytes", graphs.bytes(), plain],
    ]
    filled = [[what, f"{a:,}", f"{b:,}", f"{100 * b / a:.2f} %"] for what, a, b in rows]
    return Table("Sizes", ["", "training graphs", "summary", "part"], filled, "this run's split")


# -- arms over splits ----------------------------------------------------------------------------------------------


def random_graphs(graphs: Graphs, nodes: int, seed: int) -> Graphs:
    """Random graphs, one of each class in turn, until they have at least `nodes` nodes."""
    rng = np.random.default_rng(fold(seed, "random graphs"))
    classes = range(len(graphs.classes))
    queues = [rng.permutation(np.flatnonzero(graphs.labels == c)).tolist() for c in classes]
    ids: list[int] = []
    while any(queues) and (graphs.node_counts[ids].sum() < nodes or len(ids) < len(queues)):
        queue = queues[len(ids) % len(queues)] or next(q for q in queues if q)
        ids.append(queue.pop())
    return graphs.part(np.array(ids))


def tuned(cfg: Config, arm: str) -> Config:
    """The settings of an arm; what the user set stays."""
    free = {k: v for k, v in ARMS[arm].items() if getattr(cfg, k) in (getattr(PRESET, k), getattr(Config(), k))}
    return replace(cfg, **free)


def once(whole: Collection, test: float, cfg: Config, encoder: str, arm: str, run: Run) -> dict[str, Any]:
    """Networks trained on what the arm gives them of one split, measured on that split's test part; means over them."""
    data = whole.split(run.seed, test)
    graphs = training(data)
    began = time.process_time()
    summary = summarise(graphs, cfg)
    mining, sources = time.process_time() - began, list[Batches]()
    if arm == "mirage":
        sources = [summary.source(cfg.batch, cfg.per_class)]
    elif arm == "full":
        sources = [Batches(graphs, cfg.batch)]
    else:
        least, draws = (summary.stored_nodes, DRAWS) if "stored" in arm else (summary.expanded_nodes, 1)
        drawn = [random_graphs(graphs, least, fold(run.seed, draw)) for draw in range(draws)]
        sources = [Batches(some, cfg.batch) for some in drawn]
    how, found = tuned(cfg, arm), list[dict[str, float]]()
    began = time.process_time()
    for k, source in enumerate(sources):
        network = cfg.spec(graphs, encoder).build(seed=fold(run.seed, "network"))
        found.append(measure(train(run, f"train{k}", network, source, how), data.test, run.device))
    seconds = (time.process_time() - began) / len(sources)
    used = [summary.stored_nodes if arm == "mirage" else int(s.samples.node_counts.sum()) for s in sources]  # type: ignore[attr-defined]
    facts = {"mining": mining, "seconds": seconds, "share": summary.stored_nodes / len(graphs.nodes)}
    return {**facts, "nodes": sum(used) / len(used), "auc": [f["auc"] for f in found]}


def compare(
    run: Run, graphs: Collection, test: float, cfg: Config, encoders: Sequence[str], seeds: Sequence[int]
) -> Results:
    """Every architecture on every arm and split: "gin, mirage" → one result per split."""
    both = {f"{e}, {arm}": partial(once, graphs, test, cfg, e, arm) for e in encoders for arm in ARMS}
    return trials(run, both, seeds)


def every(results: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One number of every split, or of every network where a split has several."""
    return [v for r in results for v in (r[key] if isinstance(r[key], list) else [r[key]])]


def cell(results: Sequence[Mapping[str, Any]], key: str, digits: int = 3) -> str:
    s = spread(every(results, key))
    return f"{s['mean']:.{digits}f}" + (f" ± {s['std']:.{digits}f}" if s["n"] > 1 else "")


def quality(results: Results, encoders: Sequence[str]) -> Table:
    """Test AUC, architecture × what it was trained on."""
    rows = [[e, *(cell(results[f"{e}, {arm}"], "auc") for arm in ARMS)] for e in encoders]
    nodes = [f"{mean(results[f'{encoders[0]}, {arm}'], 'nodes'):,.0f}" for arm in ARMS]
    note = (
        f"mean ± standard deviation over random splits, and over {DRAWS} draws of the fewest random graphs for each. "
        "Mirage stores each tree once, and expands it into every set that holds it when it trains: say which is meant"
    )
    return Table("Test AUC by what a network was trained on", ["", *ARMS], [["nodes stored", *nodes], *rows], note)


def costs(results: Results, encoders: Sequence[str]) -> Table:
    """Seconds of processor time."""
    rows = [
        [
            e,
            cell(results[f"{e}, mirage"], "mining"),
            *(cell(results[f"{e}, {a}"], "seconds", 2) for a in ("mirage", "full")),
        ]
        for e in encoders
    ]
    return Table("Seconds of processor time", ["", "summarise", "train on the summary", "train on all"], rows)


def claims(results: Results, seeds: Sequence[int]) -> list[Claim]:
    """Claims (a) and (b) of the card, with GIN; (c) is in the table."""
    mirage, random, full = (results[f"gin, {arm}"] for arm in ("mirage", "random, same stored nodes", "full"))
    share, at = mean(mirage, "share"), [spread(every(r, "auc")) for r in (mirage, random, full)]
    ratio, gain, calmer = at[0]["mean"] / at[2]["mean"], at[0]["mean"] - at[1]["mean"], at[1]["std"] - at[0]["std"]
    s = list(seeds)
    return [
        Claim("a. nodes of the distinct trees stored, part of the training nodes", share <= 0.03, share, 0.03, s),
        Claim("a. test AUC of GIN, summary / all training graphs", ratio >= 0.93, ratio, 0.93, s),
        Claim("b. test AUC of GIN, summary − random graphs of as many stored nodes", gain >= 0.03, gain, 0.03, s),
        Claim("b. … and standard deviation of that AUC, random − summary", calmer > 0, calmer, 0.0, s),
    ]
