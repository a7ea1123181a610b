"""Inverted indexes that execute weighted queries: the interface, and ours over a sparse matrix of term weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from stillhouse.data.samples import digest
from stillhouse.errors import UserError, need

Ranking = list[tuple[str, float]]
"""Document ids with scores, best first."""


@runtime_checkable
class Index(Protocol):
    """What a search engine must offer to be distilled into: these five, and nothing of its insides.

    The one rule is that the engine's score of document d for a weighted query θ is Σ_t θ_t φ(t, d) with the φ that
    `weights` gives; a tokeniser or weighting of your own beside the engine's would fit another model than is executed.
    """

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def parse(self, text: str) -> dict[str, float]:
        """The query as the engine reads it: known term → weight (its count, say); {} if it knows none."""
        ...

    def search(self, query: Mapping[str, float], k: int) -> Ranking:
        """At most k documents, best first. With negative weights the engine must score exhaustively, or not get any."""
        ...

    def weights(self, docs: Sequence[str]) -> list[dict[str, float]]:
        """For each document its terms t with φ(t, d)."""
        ...

    def texts(self, docs: Sequence[str]) -> list[str]:
        """For each document the text that a re-ranker reads."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Tokenisation by bm25s: lower case, words of two characters or more, stop words out, then a Snowball stemmer.

    Attributes:
        stemmer: a language of PyStemmer ("english"), or "none".
        stopwords: a language that bm25s has stop words for ("english"), or "none".

    Example:
        >>> Tokens()(["The waves of a Radio"])
        [['wave', 'radio']]
    """

    stemmer: str = "english"
    stopwords: str = "english"

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        words = [] if self.stopwords == "none" else self.stopwords
        how = {"stopwords": words, "stemmer": self._stemmer, "return_ids": False, "show_progress": False}
        try:
            return _bm25s().tokenize(list(texts), **how)
        except ValueError as error:
            raise UserError(f"stop words {self.stopwords!r}: {' '.join(str(error).split())}") from None

    @cached_property
    def _stemmer(self) -> Any:
        if self.stemmer == "none":
            return None
        try:
            import Stemmer
        except ModuleNotFoundError:
            raise need("retrieval", "PyStemmer") from None
        if self.stemmer not in Stemmer.algorithms():
            raise UserError(f"no stemmer {self.stemmer!r}; known: none, {', '.join(Stemmer.algorithms())}")
        return Stemmer.Stemmer(self.stemmer)


def _bm25s() -> Any:
    try:
        import bm25s
    except ModuleNotFoundError:
        raise need("retrieval", "bm25s") from None
    return bm25s


class SparseIndex:
    """An `Index` over a sparse matrix of term weights: BM25 (`bm25`), or impacts of a learned sparse model.

    S(d) = Σ_t θ_t φ(t, d) is computed for every document that has one of the query's terms (exhaustively: no WAND or
    MaxScore), so negative weights are exact. Documents that do not score above 0, which is what a document without
    any of the terms has, are not returned. Equal scores stand in the order of the collection.

    Args:
        weights: (n, V) sparse, φ(t, d) of document d in row d.
        terms: V terms. ids: n document ids. texts: n texts.
        tokens: texts → lists of terms, for queries.
        facts: strict JSON: what the weights are.

    Raises:
        UserError: no documents, or sizes that do not fit.

    Example:
        >>> weights = sp.csr_matrix([[2.0, 0.0], [1.0, 3.0]])
        >>> index = SparseIndex(weights, ["a", "b"], ["x", "y"], ["a a", "a b"], Tokens())
        >>> index.search({"a": 1.0, "b": -0.5}, 2)
        [('x', 2.0)]
    """

    def __init__(
        self,
        weights: Any,
        terms: Sequence[str],
        ids: Sequence[str],
        texts: Sequence[str],
        tokens: Any,
        facts: Mapping[str, Any] | None = None,
    ):
        if not len(ids):
            raise UserError("an index needs documents, got none")
        if weights.shape != (len(ids), len(terms)) or len(texts) != len(ids):
            raise UserError(
                f"weights must be (documents, terms) = ({len(ids)}, {len(terms)}) with as many texts, got "
                f"{tuple(weights.shape)} and {len(texts)} texts"
            )
        self.by_term = sp.csc_matrix(weights, dtype=np.float64)
        self.by_doc = self.by_term.tocsr()
        self.terms, self.ids, self.tokens = list(terms), list(ids), tokens
        self.facts = dict(facts or {})
        self._texts = list(texts)
        self._term = {t: j for j, t in enumerate(self.terms)}
        self._doc = {d: i for i, d in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any document, term or weight."""
        m = self.by_doc
        return digest("index", self.ids, self.terms, m.data, m.indices, m.indptr)

    def parse(self, text: str) -> dict[str, float]:
        """Known term → how often the query has it."""
        counts = Counter(self.tokens([text])[0])
        return {t: float(n) for t, n in counts.items() if t in self._term}

    def scores(self, query: Mapping[str, float]) -> np.ndarray:
        """S(d) of every document, (n,), in the order of `ids`; terms that the index does not have count nothing."""
        total, m = np.zeros(len(self)), self.by_term
        for term, weight in query.items():
            j = self._term.get(term)
            if j is not None:
                part = slice(m.indptr[j], m.indptr[j + 1])
                total[m.indices[part]] += weight * m.data[part]
        return total

    def search(self, query: Mapping[str, float], k: int) -> Ranking:
        """At most k documents with S(d) > 0, best first."""
        total = self.scores(query)
        found = np.flatnonzero(total > 0)
        if len(found) > k:
            kth = np.partition(total[found], len(found) - k)[len(found) - k]
            found = found[total[found] >= kth]
        best = found[np.argsort(-total[found], kind="stable")][:k]
        return [(self.ids[i], float(total[i])) for i in best]

    def weights(self, docs: Sequence[str]) -> list[dict[str, float]]:
        """For each document its terms t with φ(t, d)."""
        m, rows = self.by_doc, []
        for i in self.positions(docs):
            part = slice(m.indptr[i], m.indptr[i + 1])
            rows.append({self.terms[j]: w for j, w in zip(m.indices[part].tolist(), m.data[part].tolist())})
        return rows

    def texts(self, docs: Sequence[str]) -> list[str]:
        """For each document its text."""
        return [self._texts[i] for i in self.positions(docs)]

    def positions(self, docs: Sequence[str]) -> list[int]:
        """For each document its row."""
        try:
            return [self._doc[d] for d in docs]
        except KeyError as error:
            raise UserError(f"the index has no document {error.args[0]!r}") from None


def bm25(
    docs: Mapping[str, str], *, tokens: Tokens | None = None, k1: float = 1.2, b: float = 0.75, method: str = "atire"
) -> SparseIndex:
    """A BM25 index by bm25s; its features are bm25s's own scores of one term in one document.

    φ(t, d) = idf(t) · (k1 + 1) tf / (tf + k1 (1 − b + b |d| / avg)), idf(t) = ln(n / df) for "atire". "lucene" has
    idf(t) = ln(1 + (n − df + ½) / (df + ½)) and no factor k1 + 1; "robertson" ln((n − df + ½) / (df + ½)), at least 0.

    Args:
        docs: document id → text.
        tokens: tokenisation of documents and queries alike.
        k1, b: of BM25.
        method: "atire", "lucene" or "robertson"; bm25s's other variants score documents for terms they do not have.

    Raises:
        UserError: no documents, none with a term, numbers out of range, bm25s not installed.

    Example:
        >>> index = bm25({"a": "radio waves", "b": "radio noise", "c": "noise of a machine"})
        >>> [d for d, _ in index.search(index.parse("noisy radios: noise"), 3)]
        ['b', 'a', 'c']
    """
    if k1 < 0 or not 0 <= b <= 1:
        raise UserError(f"BM25 needs k1 >= 0 and b in [0, 1], got k1={k1} and b={b}")
    if method not in ("lucene", "robertson", "atire"):
        raise UserError(f"method must be atire, lucene or robertson, got {method!r}")
    if not docs:
        raise UserError("an index needs documents, got none")
    tokens = tokens or Tokens()
    texts = list(docs.values())
    words = tokens(texts)
    terms = sorted(set().union(*words))  # a fixed order: bm25s's own goes by Python's changing hashes
    if not terms:
        raise UserError(f"none of the {len(docs)} documents has a term that is left by the tokenisation ({tokens})")
    number = {t: j for j, t in enumerate(terms)}
    engine = _bm25s().BM25(k1=k1, b=b, method=method)
    engine.index(([[number[t] for t in row] for row in words], number), create_empty_token=False, show_progress=False)
    s = engine.scores
    matrix = sp.csc_matrix((s["data"], s["indices"], s["indptr"]), shape=(len(texts), len(terms)))
    facts = {"weights": "bm25", "method": method, "k1": k1, "b": b, "stemmer": tokens.stemmer,
             "stopwords": tokens.stopwords, "documents": len(texts), "terms": len(terms)}  # fmt: skip
    return SparseIndex(matrix, terms, list(docs), texts, tokens, facts)


def rocchio(
    query: Mapping[str, float], feedback: Sequence[Mapping[str, float]], *, terms: int = 20, mix: float = 0.5
) -> dict[str, float]:
    """Pseudo-relevance feedback without a re-ranker (Rocchio 1971): the query moved to its first results' centroid.

    q' = mix · q/‖q‖₁ + (1 − mix) · c/‖c‖₁, c the `terms` largest weights of the mean over `feedback`.

    Args:
        query: term → weight.
        feedback: term weights of the first results (`Index.weights`), 10 of them usually.
        terms: how many terms of the centroid are kept.
        mix: share of the original query.

    Example:
        >>> rocchio({"a": 1.0}, [{"a": 1.0, "b": 3.0}], terms=1)
        {'a': 0.5, 'b': 0.5}
    """
    centre: Counter[str] = Counter()
    for row in feedback:
        for t, w in row.items():
            centre[t] += w / len(feedback)  # type: ignore[assignment]
    best = sorted(centre.items(), key=lambda p: (-p[1], p[0]))[:terms]
    size, total = sum(w for _, w in best) or 1.0, sum(query.values()) or 1.0
    made = {t: mix * w / total for t, w in query.items()}
    for t, w in best:
        made[t] = made.get(t, 0.0) + (1 - mix) * w / size
    return made
