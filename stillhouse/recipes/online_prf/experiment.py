"""Online distillation on real queries: what a distilled query finds, and the card's claims on the Vaswani collection.

stillhouse run online_prf --out runs/prf                       # Vaswani where STILLHOUSE_DATA has it, else a smoke test
stillhouse run online_prf --data PATH --model hf:cross-encoder/ms-marco-MiniLM-L6-v2 --out runs/mine
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.models import import_object
from stillhouse.options import Options
from stillhouse.recipes.online_prf import evaluation as ev
from stillhouse.recipes.online_prf.recipe import Config, Distillation, distill, kept_scores
from stillhouse.recipes.online_prf.teachers import Latent, save_reranker, train_bi_encoder
from stillhouse.report import Claim, Report, Table
from stillhouse.retrieval import (
    Collection,
    Index,
    Reranker,
    Scores,
    SparseIndex,
    Tokens,
    bm25,
    load_collection,
    load_reranker,
    save_trec,
)
from stillhouse.trials import Results, table, trials

PRESET = Config()
# The card's own settings. Those of `Config` were chosen on Vaswani's queries 1–60; see README.md.
CARD = {"terms": 20, "ridge": 50.0, "refit_ridge": 20.0, "non_negative": False}
TINY = Config(k=8, terms=6)


@dataclass(frozen=True)
class RetrievalOptions(Options):
    """Options of systems that search."""

    BRINGS: ClassVar[tuple[str, ...]] = ("model", "data", "index")

    model: str | None = None  # the re-ranker: hf:NAME_OR_FOLDER or package.module:function, (query, texts) -> scores
    data: str | None = (
        None  # vaswani, descriptions, folder:PATH (docs, queries, perhaps qrels) or package.module:function
    )
    index: str | None = None  # your engine: package.module:function, Collection -> Index (default: BM25 by bm25s)
    stemmer: str = "english"  # a language of PyStemmer, or none
    stopwords: str = "english"  # a language of bm25s, or none
    k1: float = 1.2  # of BM25
    b: float = 0.75  # of BM25
    lsa_weight: float = 20.0  # w of the default re-ranker, w cos(LSA) + BM25
    queries: int | None = None  # only the first so many
    skip_bad: bool = False  # leave out queries without a known term, and say so, instead of stopping

    def collection(self) -> Collection:
        """The collection named by ``--data``; Vaswani by default where it is, else the smoke test."""
        if self.queries is not None and self.queries < 1:
            raise UserError(f"queries must be at least 1, got {self.queries}")
        place = os.environ.get("STILLHOUSE_DATA")
        there = place and (Path(place).expanduser() / "vaswani").is_dir()
        found = load_collection(self.data or ("vaswani" if there else "descriptions"))
        return found if self.queries is None else found.first(self.queries)

    def lexical(self, collection: Collection) -> SparseIndex:
        """BM25 over the collection, as the flags say."""
        return bm25(collection.docs, tokens=Tokens(self.stemmer, self.stopwords), k1=self.k1, b=self.b)


OPTIONS = RetrievalOptions


def tiny(run: Run, cfg: Config = TINY) -> Distillation:
    """Five queries over 149 paragraphs, for the contract table."""
    collection = load_collection("descriptions").first(5)
    index = bm25(collection.docs)
    return distill(run, collection, index, Latent(index, dims=20), cfg)


def main(run: Run, options: RetrievalOptions, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it: distil every query, write queries and rankings, measure."""
    collection = options.collection()
    small = not options.own and collection.name == "descriptions"
    notes = list(collection.notes)
    if small and cfg.k > len(collection.docs) // 5:
        cfg = replace(cfg, k=len(collection.docs) // 5)
        notes.append(f"k is {cfg.k}, a fifth of the documents. The claims need vaswani in the folder STILLHOUSE_DATA.")
    lexical = options.lexical(collection) if options.index is None or options.model is None else None
    index: Index = lexical if options.index is None and lexical else own_index(options.index or "", collection)
    reranker: Reranker
    if options.model:
        reranker, name = load_reranker(options.model, str(run.device)), options.model
    else:
        assert lexical is not None
        reranker = latent = Latent(lexical, options.lsa_weight)
        name = latent.name
        notes.append(f"The re-ranker is a stand-in: {name}. Give a real one with --model.")
    scores = kept_scores(run, collection, reranker)
    outcome = distill(run, collection, index, scores, cfg, skip_bad=options.skip_bad)
    report = None
    if run.main:
        report = describe(run, outcome, collection, index, scores, cfg, f"{name} on {collection.name}", command)
        report.notes += notes
    run.barrier()
    if not options.own and not small and options.queries is None:  # the claims are about all 93 queries
        results = run_arms(run, options, cfg, collection, latent)
        if report is not None:
            report.claims += claims(results, options.children())
            report.tables += tables(results)
    return report


def own_index(spec: str, collection: Collection) -> Index:
    """What the function named by ``--index`` gives for the collection."""
    make = import_object(spec, "--index")
    try:
        found = make(collection)
    except Exception as error:
        raise UserError(f"--index {spec} raised {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(found, Index):
        lacks = [m for m in ("parse", "search", "weights", "texts", "__len__") if not hasattr(found, m)]
        raise UserError(f"--index {spec} gave {type(found).__name__}, which lacks {', '.join(lacks)} of an Index")
    return found


def describe(
    run: Run, outcome: Distillation, collection: Collection, index: Index, scores: Scores, cfg: Config, title: str,
    command: str,
) -> Report:  # fmt: skip
    """Saves queries and rankings; the report of one run."""
    outcome.save(run.folder)
    found = outcome.results
    for name, rankings in (
        ("first", {q: r.first for q, r in found.items()}),
        ("reranked", {q: r.reranked for q, r in found.items()}),
        ("distilled", {q: r.final for q, r in found.items()}),
    ):
        save_trec(run.folder / "rankings" / f"{name}.trec", rankings, f"stillhouse-{name}")
    metrics = {
        "queries": len(found),
        "documents": len(index),
        "re-ranker calls per query": ev.calls(found),
        "new documents per query": ev.mean(r.calls - len(r.first) for r in found.values()),
        "terms per query": ev.mean(len(r.query.terms) for r in found.values()),
    }
    report = Report(
        system="online_prf", title=f"Online distillation · {title}", command=command, seed=run.seed,
        environment=environment(), metrics=metrics, claims=[], students=[], cost=outcome.cost, notes=outcome.notes,
    )  # fmt: skip
    if collection.qrels:
        report.tables.append(ev.quality(outcome, collection, index, scores))
        report.curves.append(ev.depth_curve(found, collection, index, cfg))
    report.tables += [ev.times(found), ev.terms_table(outcome, collection, index)]
    report.tables += [ev.before_after(r, collection, index) for r in list(found.values())[:3]]
    return report


# -- the claims of the card --------------------------------------------------------------------------------------


def run_arms(run: Run, options: RetrievalOptions, cfg: Config, collection: Collection, latent: Latent) -> Results:
    """Teachers and settings on all queries. Only the halves of the fidelity are random; they go over the seeds."""
    index, seeds = latent.index, options.children()
    known: dict[str, Scores] = {}

    def teacher(name: str, make: Callable[[], Reranker]) -> Scores:
        if name not in known:
            known[name] = Scores(make())
        return known[name]

    def once(name: str, make: Callable[[], Reranker], changes: Mapping[str, Any], child: Run) -> dict[str, Any]:
        settings = replace(cfg, **changes)
        outcome = distill(child, collection, index, teacher(name, make), settings)
        return ev.gains(outcome, collection, index, settings, seeds)

    def lsa(weight: float, **changes: Any) -> Callable[[Run], dict[str, Any]]:
        return partial(once, f"w={weight:g}", lambda: latent.weighing(weight), changes)

    neural = lambda: teacher("neural", partial(neural_reranker, run, collection)).reranker  # noqa: E731
    arms: dict[str, Callable[[Run], dict[str, Any]]] = {
        "card: w=5, a=0 (control)": lsa(5, **CARD, mix=0.0),
        "card: w=20": lsa(20, **CARD),
        "card: w=40": lsa(40, **CARD),
        "card: w=40, 40 terms": lsa(40, **{**CARD, "terms": 40}),
        "w=5": lsa(5),
        "w=20": lsa(20),
        "w=40": lsa(40),
        "w=20, a=0": lsa(20, mix=0.0),
        "w=20, weights of both signs": lsa(20, non_negative=False),
        "w=20, terms of 2 documents or more": lsa(20, min_df=2),
        "w=20, lasso": lsa(20, student="lasso"),
        "w=20, listwise": lsa(20, student="listwise"),
        "w=20, 3 rounds": lsa(20, rounds=3),
        "small bi-encoder": partial(once, "neural", neural, {}),
        "small bi-encoder + BM25": partial(once, "mixed", lambda: mixed(neural(), latent), {}),
        "a judge who knows the answers": partial(once, "judge", lambda: judge(collection, latent), {}),
    }
    return trials(run, arms, [run.seed])


def neural_reranker(run: Run, collection: Collection) -> Reranker:
    """The bi-encoder trained on the documents; saved for ``--model hf:RUN/reranker``."""
    model = train_bi_encoder(run.child("bi-encoder", quiet=True), collection.docs)
    folder = run.folder / "reranker"
    if run.main:
        return save_reranker(model, folder)
    from stillhouse.retrieval.rerank import BiEncoder

    return BiEncoder(model)


def mixed(neural: Reranker, latent: Latent, weight: float = 20.0) -> Reranker:
    """w cos + BM25 with the neural cosine in place of LSA's."""
    lexical = latent.weighing(0.0)

    def both(query: str, texts: Sequence[str]) -> Any:
        return weight * neural(query, texts) + lexical(query, texts)

    return both


def judge(collection: Collection, latent: Latent) -> Reranker:
    """BM25, and 20 more for a relevant document: an upper bound that no system has, to part teacher from student."""
    lexical = latent.weighing(0.0)
    query_of = {text: id for id, text in collection.queries.items()}
    texts_of = {id: {collection.docs[d] for d, g in r.items() if g > 0} for id, r in collection.qrels.items()}

    def score(query: str, texts: Sequence[str]) -> Any:
        relevant = texts_of.get(query_of[query], set())
        return lexical(query, texts) + [20.0 * (t in relevant) for t in texts]

    return score


def claims(results: Results, seeds: Sequence[int]) -> list[Claim]:
    """Claims (a), (b), (c) and (e) of the card, as measured, holding or not; (d) claims nothing."""
    one = {arm: found[0] for arm, found in results.items()}
    s = list(seeds)

    def at_least(text: str, value: float, threshold: float, over: Sequence[int] = s[:1]) -> Claim:
        return Claim(text, value >= threshold, value, threshold, list(over))

    card = one["card: w=20"]
    made = [
        at_least("(a) card: w=20: Kendall's τ of the first fit against the re-ranker on R₁", card["tau"], 0.9),
        at_least("(a) … fitted on a random half of R₁, on the other half", card["tau_half"], 0.3, s),
    ]
    for arm in ("card: w=20", "card: w=40", "card: w=40, 40 terms"):
        made.append(at_least(f"(b) {arm}: recall of U − of BM25 to the same depth", one[arm]["gain"], 0.01))
    for arm in ("w=20", "w=40"):
        text = f"(b) our settings, {arm}, queries 61–93: the same"
        made.append(at_least(text, one[arm]["held_gain"], 0.01))
    for arm in ("card: w=20", "card: w=40"):
        made.append(at_least(f"(c) {arm}: recall of U − of Rocchio's pool", one[arm]["against_rocchio"], 0.0))
    for arm in ("w=20", "w=40"):
        text = f"(c) our settings, {arm}, queries 61–93: the same"
        made.append(at_least(text, one[arm]["held_against_rocchio"], 0.0))
    slow = max(card["fit_ms"], one["w=20"]["fit_ms"])
    made.append(Claim("(e) w=20: fit and sparsify, ms per query, median", slow <= 50, slow, 50.0, s[:1]))
    return made


def tables(results: Results) -> list[Table]:
    """What the arms found, and how well and how fast the students imitate."""
    found = {
        "recall of U": ("recall_distilled", 1.0, 3),
        "BM25 to |U|": ("recall_deeper", 1.0, 3),
        "Rocchio to |U|": ("recall_Rocchio", 1.0, 3),
        "|U|": ("calls", 1.0, 1),
        "− BM25, queries 61–93": ("held_gain", 1.0, 3),
        "− Rocchio, queries 61–93": ("held_against_rocchio", 1.0, 3),
        "nDCG@10 BM25": ("ndcg_first", 1.0, 3),
        "re-ranked": ("ndcg_reranked", 1.0, 3),
        "with U": ("ndcg_distilled", 1.0, 3),
    }
    faithful = {
        "τ on R₁, first fit": ("tau", 1.0, 3),
        "kept terms": ("tau_kept", 1.0, 3),
        "τ on the other half, first fit": ("tau_half", 1.0, 3),
        "kept terms, other half": ("tau_half_kept", 1.0, 3),
        "fit, ms": ("fit_ms", 1.0, 1),
        "slowest fit, ms": ("fit_worst_ms", 1.0, 1),
        "second stage, ms": ("second_ms", 1.0, 2),
    }
    note = (
        "w: how far the teacher, w cos(LSA) + BM25, is from a lexical one. Re-ranker calls are equal within a row. "
        "Queries 1–60 chose our settings and Rocchio's. The judge adds 20 to BM25 for a relevant document: no system."
    )
    halves = "Kendall's τ, mean over queries; halves over seeds."
    return [
        table("Recall at equal re-ranker calls, and nDCG@10", results, found, note),
        table("Fidelity of the student, and its cost", results, faithful, halves),
    ]
