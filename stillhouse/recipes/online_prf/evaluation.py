"""What was gained: pools at equal numbers of re-ranker calls, ranking measures, times, and rankings to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stillhouse.recipes.online_prf.config import Config
from stillhouse.recipes.online_prf.recipe import Distillation, Distilled
from stillhouse.recipes.online_prf.student import features, first_fit, learn, standardised
from stillhouse.report import Curve, Table
from stillhouse.retrieval import Collection, Index, Ranking, Scores, measure, recall, rocchio, tau
from stillhouse.system import fold

Pools = dict[str, list[str]]
FEEDBACK, ROCCHIO = 10, {"terms": 80, "mix": 0.5}  # the best of 36 settings on Vaswani's queries 1–60


def pools(found: Mapping[str, Distilled], collection: Collection, index: Index) -> dict[str, Pools]:
    """The documents that three ways give the re-ranker, equally many for every query, in the order they come in.

    "distilled" is U; "deeper" is the first stage to depth |U|; "Rocchio" is R₁ and then what Rocchio's query, moved
    half-way to the first 10 results, finds beside them.
    """
    made: dict[str, Pools] = {"distilled": {}, "deeper": {}, "Rocchio": {}}
    for id, r in found.items():
        words = index.parse(collection.queries[id])
        first, size = [d for d, _ in r.first], r.calls
        moved = rocchio(words, index.weights(first[:FEEDBACK]), **ROCCHIO)  # type: ignore[arg-type]
        near = [d for d, _ in index.search(moved, len(first) + size) if d not in set(first)]
        made["distilled"][id] = r.found
        made["deeper"][id] = [d for d, _ in index.search(words, size)]
        made["Rocchio"][id] = first + near[: size - len(first)]
    return made


def judged(pool: Pools, collection: Collection, index: Index, scores: Scores) -> dict[str, Ranking]:
    """The pools in the re-ranker's order."""
    ranked = {}
    for id, docs in pool.items():
        known = scores(collection.queries[id], docs, index)
        ranked[id] = sorted(known.items(), key=lambda p: -p[1])
    return ranked


def quality(outcome: Distillation, collection: Collection, index: Index, scores: Scores) -> Table:
    """Every stage and both comparisons: nDCG@10, recall of what was looked at, re-ranker calls per query."""
    found = outcome.results
    made = pools(found, collection, index)
    once, all_of_u = mean(len(r.first) for r in found.values()), calls(found)
    deeper, moved = (judged(made[way], collection, index, scores) for way in ("deeper", "Rocchio"))
    stages: list[tuple[str, dict[str, Ranking], float]] = [
        ("first stage", {q: r.first for q, r in found.items()}, 0.0),
        ("first stage, re-ranked", {q: r.reranked for q, r in found.items()}, once),
        ("distilled query alone, not re-ranked", {q: r.second for q, r in found.items()}, once),
        ("first stage + distilled query, re-ranked", {q: r.final for q, r in found.items()}, all_of_u),
        ("first stage to the same depth, re-ranked", deeper, all_of_u),
        ("first stage + Rocchio, re-ranked", moved, all_of_u),
    ]
    rows = []
    for name, rankings, asked in stages:
        kept = {q: r for q, r in rankings.items() if collection.qrels.get(q)}
        ndcg = measure(kept, collection.qrels, ["nDCG@10"])["nDCG@10"]
        share = recall({q: [d for d, _ in r] for q, r in kept.items()}, collection.qrels)
        rows.append([name, f"{ndcg:.3f}", f"{share:.3f}", f"{asked:.1f}"])
    note = "Recall of all documents in the list, whatever their order. The last three ask the re-ranker equally often."
    return Table("What was found", ["list", "nDCG@10", "recall", "re-ranker calls"], rows, note)


def gains(
    outcome: Distillation, collection: Collection, index: Index, cfg: Config, seeds: Sequence[int], apart: int = 60
) -> dict[str, Any]:
    """The numbers of one arm: recalls at equal calls, nDCG@10, fidelity, times.

    ``held_…`` are those of the queries after the first `apart`, which chose nothing.
    """
    found, qrels = outcome.results, collection.qrels
    made = pools(found, collection, index)
    recalls = {f"recall_{way}": recall(pool, qrels) for way, pool in made.items()}
    held = {way: recall(dict(list(pool.items())[apart:]), qrels) for way, pool in made.items()}
    lists: dict[str, dict[str, Ranking]] = {
        "ndcg_first": {q: r.first for q, r in found.items()},
        "ndcg_reranked": {q: r.reranked for q, r in found.items()},
        "ndcg_distilled": {q: r.final for q, r in found.items()},
    }
    more = {
        "gain": recalls["recall_distilled"] - recalls["recall_deeper"],
        "against_rocchio": recalls["recall_distilled"] - recalls["recall_Rocchio"],
        "held_gain": held["distilled"] - held["deeper"],
        "held_against_rocchio": held["distilled"] - held["Rocchio"],
        "calls": calls(found),
        "fit_worst_ms": 1000 * max(r.seconds["fit"] / max(1, r.rounds) for r in found.values()),
    }
    ndcg = {name: measure(rankings, qrels, ["nDCG@10"])["nDCG@10"] for name, rankings in lists.items()}
    times = {f"{part}_ms": 1000 * float(np.median([r.seconds[part] for r in found.values()])) for part in PARTS}
    return {**recalls, **more, **ndcg, **times, **fidelity(found, index, cfg, seeds)}


def fidelity(found: Mapping[str, Distilled], index: Index, cfg: Config, seeds: Sequence[int]) -> dict[str, float]:
    """Kendall's τ of the student against the re-ranker on R₁, mean over queries.

    ``tau``: the first fit, on the documents it was fitted to; ``tau_kept``: after only `cfg.terms` terms are kept;
    ``tau_half`` and ``tau_half_kept``: fitted on a random half of R₁, measured on the other, mean over `seeds`.
    """
    taus: dict[str, list[float]] = {"tau": [], "tau_kept": [], "tau_half": [], "tau_half_kept": []}
    for id, r in found.items():
        docs, s = [d for d, _ in r.reranked], np.array([x for _, x in r.reranked])
        if len(docs) < 4:
            continue
        F, _ = features(index.weights(docs))
        taus["tau"].append(tau(F @ first_fit(F, standardised(s), cfg), s))
        taus["tau_kept"].append(tau(F @ learn(F, s, cfg), s))
        for seed in seeds:
            order = np.random.default_rng(fold("halves", seed, id)).permutation(len(docs))
            a, b = order[: len(docs) // 2], order[len(docs) // 2 :]
            taus["tau_half"].append(tau(F[b] @ first_fit(F[a], standardised(s[a]), cfg), s[b]))
            taus["tau_half_kept"].append(tau(F[b] @ learn(F[a], s[a], cfg), s[b]))
    return {name: float(np.mean(values)) for name, values in taus.items() if values}


PARTS = ("first", "rerank", "fit", "second", "rerank_new")


def times(found: Mapping[str, Distilled]) -> Table:
    """Milliseconds per query and part: median, 10th and 90th percentile over the queries."""
    names = ("first stage", "re-ranking its documents", "fitting the query", "second stage", "re-ranking what is new")
    rows: list[list[Any]] = []
    every = np.array([[1000 * r.seconds[p] for p in PARTS] for r in found.values()])
    extra = every[:, 2:].sum(1)
    for name, values in (*zip(names, every.T), ("all", every.sum(1)), ("of this beyond plain re-ranking", extra)):
        low, middle, high = np.percentile(values, [10, 50, 90])
        rows.append([name, f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}"])
    note = f"{len(found)} queries, one thread, wall time; the re-ranker's time is that of its first asking."
    return Table("Milliseconds per query", ["part", "median", "p10", "p90"], rows, note)


def terms_table(outcome: Distillation, collection: Collection, index: Index, count: int = 5, words: int = 12) -> Table:
    """The first queries and their heaviest terms; the question's own are in capitals."""
    rows = []
    for id, r in list(outcome.results.items())[:count]:
        own = index.parse(collection.queries[id])
        shown = [f"{t.upper() if t in own else t} {w:+.3f}" for t, w in list(r.query.terms.items())[:words]]
        rows.append([f"{id}: {r.query.text}", ", ".join(shown)])
    return Table("Distilled queries", ["question", "heaviest terms"], rows, "Capitals: terms of the question itself.")


def before_after(r: Distilled, collection: Collection, index: Index, top: int = 10, width: int = 70) -> Table:
    """One query's first documents: by the first stage, re-ranked, and re-ranked with the distilled query's."""
    relevant = {d for d, g in collection.qrels.get(r.query.id, {}).items() if g > 0}
    known = {d for d, _ in r.first}

    def cell(ranking: Ranking, i: int) -> str:
        if i >= len(ranking):
            return ""
        doc = ranking[i][0]
        text = " ".join(index.texts([doc])[0].split())
        marks = ("● " if doc in relevant else "") + ("new " if doc not in known else "")
        return f"{marks}[{doc}] {text[:width]}{'…' if len(text) > width else ''}"

    columns = ["rank", "first stage", "re-ranked", "with the distilled query"]
    rows = [[i + 1, *(cell(x, i) for x in (r.first, r.reranked, r.final))] for i in range(min(top, len(r.final)))]
    note = ("● relevant; " if relevant else "") + "new: only the distilled query found it"
    return Table(f"Query {r.query.id}: {r.query.text}", columns, rows, note)


def depth_curve(found: Mapping[str, Distilled], collection: Collection, index: Index, cfg: Config) -> Curve:
    """Recall of what the re-ranker has seen against how much that was, beyond the first stage."""
    made = pools(found, collection, index)
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    names = {"distilled": "distilled query", "deeper": "first stage, deeper", "Rocchio": "Rocchio on the first 10"}
    longest = max(r.calls for r in found.values())
    for way, name in names.items():
        xs, ys = [], []
        for n in range(cfg.k, longest + 1, max(1, (longest - cfg.k) // 25)):
            cut = {q: docs[:n] for q, docs in made[way].items()}
            xs.append(mean(len(d) for d in cut.values()))
            ys.append(recall(cut, collection.qrels))
        lines[name] = (xs, ys)
    return Curve("Recall of the documents shown to the re-ranker", "documents per query", "recall", lines)


def calls(found: Mapping[str, Distilled]) -> float:
    return mean(r.calls for r in found.values())


def mean(values: Any) -> float:
    return float(np.mean(list(values)))
