"""Re-rankers for machines without pretrained weights: LSA + BM25, and a small neural one trained on the documents.

Neither sees a query or a judgement of the collection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.samples import digest
from stillhouse.data.sources import permutation
from stillhouse.engine import fit
from stillhouse.errors import UserError, need
from stillhouse.retrieval import SparseIndex
from stillhouse.retrieval.rerank import BiEncoder
from stillhouse.run import Run
from stillhouse.system import Batch, Clock, Source, System, Terms, Update, fold, map_tensors
from stillhouse.weights import cosine


class Latent:
    """s(q, d) = w · cos(LSA(q), LSA(d)) + BM25(q, d): the card's stand-in for a cross-encoder.

    LSA is the truncated SVD of the collection's tf-idf matrix ((1 + ln tf) idf). The first term knows which words
    go together, which BM25 does not; w says how far the teacher is from a lexical one.

    Args:
        index: of the collection; its tokenisation and its BM25 weights are the teacher's.
        weight: w. dims: of the LSA, at most the collection's rank.

    Example:
        >>> from stillhouse.retrieval import bm25
        >>> teacher = Latent(bm25({"a": "radio waves", "b": "radio noise", "c": "noise level"}), dims=2)
        >>> teacher("radio", ["radio noise", "noise level"]).shape
        (2,)
    """

    def __init__(self, index: SparseIndex, weight: float = 20.0, dims: int = 200):
        self.index, self.weight, self.name = index, weight, f"LSA+BM25, w={weight:g}"
        self._row = {text: i for i, text in enumerate(index.texts(index.ids))}
        self._column = {t: j for j, t in enumerate(index.terms)}
        self._docs, self._loadings = latent_space(index, self._column, dims)

    def weighing(self, weight: float) -> Latent:
        """The same LSA with another w."""
        other = object.__new__(Latent)
        other.__dict__.update(self.__dict__, weight=weight, name=f"LSA+BM25, w={weight:g}")
        return other

    def __call__(self, query: str, texts: Sequence[str]) -> np.ndarray:
        try:
            rows = [self._row[t] for t in texts]
        except KeyError:
            raise UserError("LSA+BM25 scores documents of the collection it was made from; got another text") from None
        words = self.index.parse(query)
        columns, counts = [self._column[t] for t in words], np.array(list(words.values()))
        q = unit((1 + np.log(counts)) @ self._loadings[columns])
        return self.weight * (self._docs[rows] @ q) + self.index.by_doc[rows][:, columns] @ counts


def latent_space(index: SparseIndex, column: Mapping[str, int], dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the documents, (n, dims), and idf times the right singular vectors, (V, dims)."""
    import scipy.sparse as sp
    from sklearn.decomposition import TruncatedSVD

    rows = [[column[t] for t in words] for words in index.tokens(index.texts(index.ids))]
    where = (np.repeat(np.arange(len(rows)), [len(r) for r in rows]), np.concatenate(rows).astype(int))
    counts = sp.csr_matrix((np.ones(len(where[0])), where), shape=(len(rows), len(column)))
    idf = np.log(len(rows) / np.maximum(1, np.bincount(counts.indices, minlength=len(column))))
    counts.data = 1 + np.log(counts.data)
    svd = TruncatedSVD(min(dims, min(counts.shape) - 1), n_iter=4, random_state=fold("lsa") % 2**32)
    docs = unit(svd.fit_transform(counts.multiply(idf).tocsr()))
    return docs, (svd.components_ * idf).T


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# -- a small neural re-ranker ------------------------------------------------------------------------------------


class Passages(Source):
    """Pairs of a pseudo-query and the document it was taken out of (inverse cloze, Lee et al. 2019).

    A contiguous third of the document's words, at least 2, is the query; it is removed from the document, except in a
    tenth of the pairs, so that words that go together are learnt and not only equal words.

    Args:
        docs: lists of word numbers; only those of 6 words or more are used.
        batch_size: pairs per step.
    """

    def __init__(self, docs: Sequence[Sequence[int]], batch_size: int):
        self.docs = [np.asarray(d) for d in docs if len(d) >= 6]
        if not self.docs:
            raise UserError("no document has 6 known words; a neural re-ranker cannot be trained on these")
        self.batch_size = min(batch_size, len(self.docs))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.docs) // self.batch_size

    @property
    def fingerprint(self) -> str:
        return digest("passages", self.batch_size, self.docs)

    def num_samples(self, clock: Clock) -> int:
        return self.batch_size

    def batch(self, clock: Clock) -> Batch:
        epoch, position = divmod(clock.step, self.steps_per_epoch)
        ids = permutation(fold(clock.seed, "passages", epoch), len(self.docs))[position * self.batch_size :]
        rng = np.random.default_rng(fold(clock.seed, "cloze", clock.stage, clock.step))
        queries, rests = [], []
        for d in (self.docs[i] for i in ids[: self.batch_size]):
            n = max(2, len(d) // 3)
            start = int(rng.integers(len(d) - n + 1))
            queries.append(d[start : start + n])
            rests.append(d if rng.random() < 0.1 else np.delete(d, slice(start, start + n)))
        whole = {"query": padded(queries), "doc": padded(rests)}
        return map_tensors(whole, lambda t: torch.tensor_split(t, clock.world)[clock.rank])


def padded(rows: Sequence[np.ndarray]) -> Tensor:
    """(n, longest) word numbers, 0 where a row is shorter."""
    out = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


class TwoTower(System):
    """One table of word vectors for queries and documents; InfoNCE over the batch's documents, both ways.

    mean_i −log softmax_j(cos(q_i, d_j) / τ) at j = i, and the same with queries and documents exchanged.
    """

    def __init__(self, words: int, dims: int, temperature: float = 0.05, lr: float = 0.02):
        super().__init__()
        self.table = nn.EmbeddingBag(words, dims, mode="mean", padding_idx=0)
        self.temperature, self.lr = temperature, lr

    def updates(self) -> Sequence[Update]:
        return [Update("contrast", [self.table.weight], partial(torch.optim.Adam, lr=self.lr), lr=cosine(), whole=True)]

    def contrast(self, batch: Batch, clock: Clock) -> Terms:
        q, d = (F.normalize(self.table(batch[k]), dim=-1) for k in ("query", "doc"))
        z, own = q @ d.T / self.temperature, torch.arange(len(q), device=q.device)
        return Terms(contrast=(F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2)


@dataclass(frozen=True)
class Training:
    """How the small neural re-ranker is trained."""

    dims: int = 128
    epochs: float = 12.0
    batch: int = 256
    lr: float = 0.02
    min_df: int = 2  # documents a word must occur in to get a vector


def train_bi_encoder(run: Run, docs: Mapping[str, str], how: Training | None = None) -> Any:
    """A `SentenceTransformer` with static embeddings, trained on the documents alone; an ordinary one afterwards.

    ``model.save(folder)`` and ``--model hf:folder`` use it again.

    Args:
        run: its stage "bi-encoder" is trained or resumed.
        docs: document id → text.
        how: settings.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ModuleNotFoundError:
        raise need("retrieval", "sentence-transformers") from None
    how = how or Training()
    split, lower = pre_tokenizers.Split(Regex(r"\w\w+"), "removed", invert=True), normalizers.Lowercase()
    words = [[w for w, _ in split.pre_tokenize_str(lower.normalize_str(t))] for t in docs.values()]
    df: dict[str, int] = {}
    for row in words:
        for w in set(row):
            df[w] = df.get(w, 0) + 1
    known = {"[UNK]": 0} | {w: j for j, w in enumerate(sorted(w for w, n in df.items() if n >= how.min_df), 1)}
    source = Passages([[known[w] for w in row if w in known] for row in words], how.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(run.seed, "bi-encoder"))
        system = TwoTower(len(known), how.dims, lr=how.lr)
    fit(run, "bi-encoder", system, source, epochs=how.epochs, settings=how)
    table = system.table.weight.detach().cpu().numpy()
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu")


def save_reranker(model: Any, folder: Path) -> BiEncoder:
    """Saves a `SentenceTransformer` (safetensors and JSON) and gives it as a `Reranker`."""
    model.save(str(folder), create_model_card=False)
    return BiEncoder(model)
