"""How good rankings are: ir-measures, recall of a set, rank correlation; TREC run files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from stillhouse.errors import UserError, need
from stillhouse.files import atomic_write
from stillhouse.retrieval.index import Ranking

Judged = Mapping[str, Mapping[str, int]]


def measure(rankings: Mapping[str, Ranking], qrels: Judged, measures: Sequence[str]) -> dict[str, float]:
    """Means over the judged queries, by ir-measures.

    Args:
        rankings: query id → ranking. qrels: query id → document id → relevance.
        measures: names as ir-measures has them: "nDCG@10", "AP", "R@100", ….

    Raises:
        UserError: no ranked query is judged, an unknown measure, ir-measures not installed.

    Example:
        >>> measure({"1": [("a", 2.0), ("b", 1.0)]}, {"1": {"b": 1}}, ["RR"])
        {'RR': 0.5}
    """
    try:
        import ir_measures
    except ModuleNotFoundError:
        raise need("retrieval", "ir-measures") from None
    judged = {q: dict(r) for q, r in qrels.items() if q in rankings}
    if not judged:
        raise UserError("none of the ranked queries has relevance judgements")
    try:
        wanted = [ir_measures.parse_measure(m) for m in measures]
    except (NameError, ValueError) as error:
        raise UserError(f"unknown measure among {', '.join(measures)}: {error}") from None
    found = ir_measures.calc_aggregate(wanted, judged, {q: dict(rankings[q]) for q in judged})
    return {str(m): float(found[m]) for m in wanted}


def recall(pools: Mapping[str, Iterable[str]], qrels: Judged) -> float:
    """|pool ∩ relevant| / |relevant|, mean over the judged queries; the order within a pool does not matter.

    Example:
        >>> recall({"1": ["a", "b"]}, {"1": {"b": 1, "c": 1}})
        0.5
    """
    parts = []
    for query, pool in pools.items():
        if relevant := {d for d, r in qrels.get(query, {}).items() if r > 0}:
            parts.append(len(relevant & set(pool)) / len(relevant))
    if not parts:
        raise UserError("none of the pooled queries has relevance judgements")
    return sum(parts) / len(parts)


def tau(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Kendall's τ-b between two lists of scores of the same documents; 0 where one of them is constant.

    Example:
        >>> round(tau([1, 2, 3], [1, 3, 2]), 3)
        0.333
    """
    from scipy.stats import kendalltau

    found = float(kendalltau(a, b).statistic)
    return 0.0 if found != found else found


def save_trec(path: str | Path, rankings: Mapping[str, Ranking], tag: str) -> None:
    """Writes rankings as TREC run lines: ``query Q0 document rank score tag``."""
    rows = [f"{q} Q0 {d} {i} {s!r} {tag}" for q, r in rankings.items() for i, (d, s) in enumerate(r, 1)]
    atomic_write(path, "\n".join(rows) + "\n")
