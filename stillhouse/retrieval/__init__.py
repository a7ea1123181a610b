"""Search: collections of texts, weighted inverted indexes, re-rankers and their scores, ranking measures.

An index, a re-ranker and a collection of your own are ordinary objects (`Index`, `Reranker`, `Collection`); here are
defaults for them, over bm25s, sentence-transformers and ir-measures (``pip install 'stillhouse[retrieval]'``).
"""

from stillhouse.retrieval.collection import Collection, load_collection
from stillhouse.retrieval.index import Index, Ranking, SparseIndex, Tokens, bm25, rocchio
from stillhouse.retrieval.measures import measure, recall, save_trec, tau
from stillhouse.retrieval.rerank import Reranker, Scores, load_reranker

__all__ = [
    "Collection",
    "Index",
    "Ranking",
    "Reranker",
    "Scores",
    "SparseIndex",
    "Tokens",
    "bm25",
    "load_collection",
    "load_reranker",
    "measure",
    "recall",
    "rocchio",
    "save_trec",
    "tau",
]
