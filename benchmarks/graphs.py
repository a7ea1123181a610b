"""Mirage against training on the whole set: seconds, compression and quality, on real graphs.

    STILLHOUSE_DATA=../shared/data .venv/bin/python benchmarks/graphs.py            # MUTAG, PROTEINS, NCI1
    .venv/bin/python benchmarks/graphs.py --quick                                   # the atlas alone, few steps

Seconds are processor time of one thread; the sides of a ratio run in one process, in turn, on every split. A network on
the whole set is trained for as many epochs as it is usually given (`--epochs`), one on the summary for `--steps` steps.
Results are added to OUT/graphs.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common import pm, read, table, write

import torch  # isort: skip

from stillhouse.data import Batches
from stillhouse.engine import Run
from stillhouse.evaluate import environment
from stillhouse.graphs import measure
from stillhouse.graphs import read as read_graphs
from stillhouse.recipes.mirage.experiment import DRAWS, random_graphs, tuned
from stillhouse.recipes.mirage.recipe import Config, summarise, train, training
from stillhouse.system import fold

# Where two hops have no tree that enough graphs share (PROTEINS), one; supports as low as trees in common ask for.
SETS: dict[str, dict[str, Any]] = {
    "mutag": {"hops": 2, "support": (0.6,)},
    "proteins": {"hops": 1, "support": (0.3,)},
    "nci1": {"hops": 2, "support": (0.1,)},
    "atlas": {"hops": 1, "support": (0.1,)},
}


def clocked(job: Any) -> tuple[Any, float]:
    began = time.process_time()
    return job(), time.process_time() - began


def once(name: str, cfg: Config, epochs: int, seed: int, encoder: str) -> dict[str, Any]:
    """One split: summarise, train on the summary, on random graphs of as many stored nodes, and on all."""
    data = read_graphs(name).split(seed)
    graphs = training(data)
    summary, mining = clocked(lambda: summarise(graphs, cfg))
    few = [random_graphs(graphs, summary.stored_nodes, fold(seed, draw)) for draw in range(DRAWS)]
    every = replace(tuned(cfg, "full"), steps=max(1, round(epochs * len(graphs) / cfg.batch)))
    sides: dict[str, tuple[list[Any], Config]] = {
        "summary": ([summary.source(cfg.batch, cfg.per_class)], cfg),
        "random": ([Batches(some, cfg.batch) for some in few], tuned(cfg, "random, same stored nodes")),
        "full": ([Batches(graphs, cfg.batch)], every),
    }
    found: dict[str, Any] = {"mining": mining, "stored": summary.stored_nodes, "expanded": summary.expanded_nodes}
    found |= {"nodes": len(graphs.nodes), "source bytes": graphs.bytes()}
    found["bytes"] = summary.bytes()["total"] - summary.bytes()["labels"]
    for side, (sources, how) in sides.items():
        each = []
        for source in sources:
            with tempfile.TemporaryDirectory() as folder:
                run = Run(folder, seed=seed, quiet=True, device="cpu")
                network = how.spec(graphs, encoder).build(seed=fold(seed, "network"))
                network, seconds = clocked(lambda r=run, n=network, s=source, h=how: train(r, "train", n, s, h))
            each.append({**measure(network, data.test), "seconds": seconds, "steps": how.steps})
        found[side] = {k: fmean(e[k] for e in each) for k in each[0]}
    return found


def rows_of(name: str, found: list[dict[str, Any]]) -> list[list[str]]:
    def mean(*keys: str) -> float:
        return fmean(f[keys[0]] if len(keys) == 1 else f[keys[0]][keys[1]] for f in found)

    faster = median(f["full"]["seconds"] / (f["mining"] + f["summary"]["seconds"]) for f in found)
    ratios = [mean("nodes") / mean("stored"), mean("nodes") / mean("expanded"), mean("source bytes") / mean("bytes")]
    auc = [pm([f[s]["auc"] for f in found], 3) for s in ("summary", "random", "full")]
    accuracy = [pm([f[s]["accuracy"] for f in found], 3) for s in ("summary", "random", "full")]
    return [
        [name, "seconds to summarise / to train on it / to train on all", *(f"{s:.2f}" for s in
         (mean("mining"), mean("summary", "seconds"), mean("full", "seconds")))],
        [name, "all ÷ (summarise + train on it); all ÷ summarise", f"{faster:.1f} ×",
         f"{median(f['full']['seconds'] / f['mining'] for f in found):.0f} ×", ""],
        [name, "smaller by: nodes stored / nodes expanded / bytes", *(f"{r:.1f} ×" for r in ratios)],
        [name, "test AUC: summary / random graphs / all", *auc],
        [name, "test accuracy: summary / random graphs / all", *accuracy],
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; default: all but atlas")
    parser.add_argument("--encoder", default="gin", help="gcn, gin, gat or sage")
    parser.add_argument("--seeds", type=int, default=5, help="random splits")
    parser.add_argument(
        "--epochs", type=int, default=60, help="passes over all graphs for the network on the whole set"
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of the networks on the summary and random graphs")
    parser.add_argument("--out", default="runs/graphs")
    parser.add_argument("--quick", action="store_true", help="the atlas, 2 splits, 2 epochs, 20 steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.sets, args.seeds, args.epochs, args.steps = args.sets or ["atlas"], 2, 2, 20
    names = args.sets or [n for n in SETS if n != "atlas"]
    if any(n != "atlas" for n in names) and not os.environ.get("STILLHOUSE_DATA"):
        parser.error("set STILLHOUSE_DATA to the folder that holds tu-graphs/, or give: atlas")
    path, rows = Path(args.out) / "graphs.json", []
    for name in names:
        cfg = replace(Config(**SETS[name]), steps=args.steps)
        found = []
        for seed in range(args.seeds):
            found.append(once(name, cfg, args.epochs, seed, args.encoder))
            print(f"{name}, split {seed}: AUC {found[-1]['summary']['auc']:.3f} against {found[-1]['full']['auc']:.3f}",
                  flush=True)  # fmt: skip
        rows += rows_of(name, found)
        kept = read(path) or {}
        kept[f"{name}, {args.encoder}"] = {"splits": found, "settings": vars(args), "environment": environment()}
        write(path, kept)
    print("\n" + table(["set", "what", "", " ", "  "], rows))


if __name__ == "__main__":
    main()
