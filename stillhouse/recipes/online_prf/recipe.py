"""ODIS over live objects: an index, a re-ranker, a question.

The whole run on the built-in experiment::

    stillhouse run online_prf --out runs/prf

From Python, per request::

    found = distill_query("dielectric constant of liquids", index, reranker, Config(k=50))
    found.query.terms, found.final, found.seconds
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from threadpoolctl import threadpool_limits

from stillhouse.errors import UserError
from stillhouse.outcomes import Queries
from stillhouse.progress import Progress
from stillhouse.recipes.online_prf.config import Config
from stillhouse.recipes.online_prf.request import Distilled, distill_query
from stillhouse.retrieval import Collection, Index, Reranker, Scores
from stillhouse.run import Run

__all__ = ["Config", "Distillation", "Distilled", "distill", "distill_query"]


@dataclass
class Distillation(Queries):
    """`Queries` with what each request gave beside; only the queries are saved."""

    results: dict[str, Distilled] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)


def distill(
    run: Run,
    collection: Collection,
    index: Index,
    reranker: Reranker | Scores,
    cfg: Config | None = None,
    *,
    skip_bad: bool = False,
) -> Distillation:
    """`distill_query` for every query of a collection.

    What the re-ranker said is kept in ``scores.jsonl`` of the run's folder: a run that was interrupted asks for nothing
    again and gives the same bytes.

    Args:
        run: folder. No stage is trained, nothing is random.
        collection: its queries are distilled; its judgements are not looked at.
        index: of the collection's documents.
        reranker: see `distill_query`.
        cfg: settings.
        skip_bad: leave out queries without a term that the index knows, and say so, instead of stopping.

    Returns:
        The distilled queries, with the rankings and times of each under ``results``.
    """
    cfg = cfg or Config()
    scores = reranker if isinstance(reranker, Scores) else kept_scores(run, collection, reranker)
    results: dict[str, Distilled] = {}
    notes: list[str] = []
    blas = threadpool_limits(1, user_api="blas")  # a 100 × 100 solve is slower on many; the re-ranker's threads stay
    with blas, Progress("queries", len(collection.queries), 0, run.quiet or not run.main) as bar:
        for id, text in collection.queries.items():
            try:
                results[id] = distill_query(text, index, scores, cfg, id=id)
            except UserError as error:
                if not skip_bad or index.parse(text):
                    raise UserError(f"query {id!r}: {error}") from None
                notes.append(f"query {id!r} was left out: it has no term that the index knows")
            bar.advance([])
    if not results:
        raise UserError(f"none of the {len(collection.queries)} queries has a term that the index knows")
    engine = getattr(index, "facts", {"class": type(index).__qualname__})
    facts = {"method": "online_prf", "collection": collection.name, "settings": asdict(cfg), "index": engine}
    cost = {
        "queries": len(results),
        "reranker_calls": sum(r.calls for r in results.values()),
        "reranker_seconds": sum(r.seconds["rerank"] + r.seconds["rerank_new"] for r in results.values()),
    }
    return Distillation([r.query for r in results.values()], facts, results, notes, cost)


def kept_scores(run: Run, collection: Collection, reranker: Reranker) -> Scores:
    """The re-ranker's scores, kept in the run's folder by the process that writes."""
    name = getattr(reranker, "name", None) or getattr(reranker, "__qualname__", type(reranker).__qualname__)
    settings = {"re-ranker": str(name), "collection": collection.fingerprint}
    return Scores(reranker, run.folder / "scores.jsonl" if run.main else None, settings)
