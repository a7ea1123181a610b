"""One request: search, re-rank, teach, search again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from stillhouse.errors import UserError
from stillhouse.outcomes import Query
from stillhouse.recipes.online_prf.config import Config
from stillhouse.recipes.online_prf.student import expand, features, learn
from stillhouse.retrieval import Index, Ranking, Reranker, Scores


@dataclass
class Distilled:
    """What one request gave.

    Attributes:
        query: the executed query: the student's terms mixed with the question's own.
        student: θ alone, as fitted in the last round: term → weight.
        first: R₁, by the index. reranked: R₁, by the re-ranker.
        second: R₂, by the distilled query, of the last round. final: U = R₁ ∪ R₂ (∪ …), by the re-ranker.
        found: documents of U in the order in which they were found; the first ``len(first)`` are R₁'s.
        rounds: searches with a distilled query.
        seconds: wall time of "first" stage, "rerank" (R₁), "fit", "second" stage, "rerank_new" (what R₂ added).
    """

    query: Query
    student: dict[str, float]
    first: Ranking
    reranked: Ranking
    second: Ranking
    final: Ranking
    found: list[str]
    rounds: int
    seconds: dict[str, float]

    @property
    def calls(self) -> int:
        """Documents that the re-ranker scored: |U|."""
        return len(self.final)


def distill_query(
    query: str, index: Index, reranker: Reranker | Scores, cfg: Config | None = None, *, id: str = ""
) -> Distilled:
    """Search, re-rank, teach the re-ranker's scores to a bag of terms, search with it, re-rank what is new.

    θ = argmin ‖F_c θ − s_c‖² + λ‖θ‖² on R₁; keep n terms, fit again; execute (1 − a) θ/‖θ‖₁ + a q/‖q‖₁ on the whole
    index → R₂; U = R₁ ∪ R₂ in the re-ranker's order. Nothing is trained beforehand and nothing is kept.

    Args:
        query: the question.
        index: searched and read through the five methods of `Index`.
        reranker: (question, texts) → scores, or `Scores`, which asks for nothing twice.
        cfg: settings.
        id: of the query in the outcome.

    Returns:
        The distilled query, all rankings and where the time went.

    Raises:
        UserError: an empty query or one without a term that the index knows, k above the number of documents, a
            re-ranker that does not give one finite number per document.

    Source: MacAvaney & Wang, arXiv 2306.09657 (the abstract; loss and sparsification are ours, see README.md).

    Example:
        >>> from stillhouse.retrieval import bm25
        >>> index = bm25({"a": "red apple", "b": "green apple", "c": "red wine", "d": "green wine grape", "e": "grape"})
        >>> found = distill_query("apple", index, lambda q, texts: ["green" in t for t in texts], Config(k=2))
        >>> [d for d, _ in found.first], [d for d, _ in found.final], found.query.terms["green"] > 0
        (['a', 'b'], ['b', 'd', 'a'], True)
    """
    cfg = cfg or Config()
    scores = reranker if isinstance(reranker, Scores) else Scores(reranker)
    words = parsed(query, index, cfg)
    seconds = dict.fromkeys(("first", "rerank", "fit", "second", "rerank_new"), 0.0)
    with timed(seconds, "first"):
        first = index.search(words, cfg.k)
    if not first:
        raise UserError(f"the index finds no document for the query {query[:80]!r}")
    pool = judged(scores, query, [d for d, _ in first], index, seconds, "rerank")
    reranked, terms, student, second, rounds = order(pool), dict(words), dict[str, float](), first, 0
    for _ in range(cfg.rounds):
        with timed(seconds, "fit"):
            student = teach(index, pool, cfg)
            terms = expand(student, words, cfg.mix)
        with timed(seconds, "second"):
            second = index.search(terms, cfg.k)
        rounds += 1
        new = [d for d, _ in second if d not in pool]
        if not new:
            break
        pool |= judged(scores, query, new, index, seconds, "rerank_new")
    made = Query(id, terms, query)
    return Distilled(made, student, first, reranked, second, order(pool), list(pool), rounds, seconds)


def parsed(query: str, index: Index, cfg: Config) -> dict[str, float]:
    """The query's terms as the index reads them."""
    if not len(index):
        raise UserError("the index has no documents; nothing can be searched")
    if cfg.k > len(index):
        raise UserError(f"k = {cfg.k} is more than the {len(index)} documents of the index; give a smaller --k")
    if not query.strip():
        raise UserError("the query is empty; give at least one word")
    words = index.parse(query)
    if not words:
        raise UserError(f"the query {query[:80]!r} has no term that the index knows; leave it out or rephrase it")
    return words


def teach(index: Index, pool: Mapping[str, float], cfg: Config) -> dict[str, float]:
    """Term → weight of the student of the pool's scores."""
    F, names = features(index.weights(list(pool)))
    theta = learn(F, np.array(list(pool.values())), cfg)
    return {names[j]: float(theta[j]) for j in np.flatnonzero(theta)}


def judged(
    scores: Scores, query: str, docs: list[str], index: Index, seconds: dict[str, float], what: str
) -> dict[str, float]:
    """The documents' re-ranker scores; the time is the re-ranker's, also where they were read back."""
    found = scores(query, docs, index)
    seconds[what] += scores.seconds(query, docs)
    return found


def order(pool: Mapping[str, float]) -> Ranking:
    """Best first; equal scores in the order in which they were found."""
    return sorted(pool.items(), key=lambda p: -p[1])


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - began
