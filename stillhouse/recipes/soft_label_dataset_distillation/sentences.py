"""Sentences as embedded samples: reading them, word vectors learned or given, and the nearest words of a sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import Data, Samples
from stillhouse.data.samples import digest, packed
from stillhouse.errors import UserError
from stillhouse.outcomes import DataSet
from stillhouse.system import fold
from stillhouse.text.sentences import Parts, labels_of, lines_of, with_test

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
Texts = tuple[list[str], np.ndarray]


@dataclass(frozen=True)
class Vocabulary:
    """Words and their vectors, which are never trained on. Row 0 is padding and row 1 every other word.

    Attributes:
        words: by row, from ``<pad>`` and ``<other>`` on.
        table: (V, width) float32; row 0 is zero.
    """

    words: tuple[str, ...]
    table: Tensor

    @cached_property
    def rows(self) -> dict[str, int]:
        return {w: i for i, w in enumerate(self.words)}

    def ids(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Rows of the first `length` words of each text, padded with 0, (n, length)."""
        out = np.zeros((len(texts), length), np.int64)
        for row, text in zip(out, texts, strict=True):
            found = [self.rows.get(w, 1) for w in words_of(text)[:length]]
            row[: len(found)] = found
        return out

    def embed(self, texts: Sequence[str], length: int) -> Tensor:
        """(n, length, width): what a network over sentences takes."""
        return self.table[torch.from_numpy(self.ids(texts, length))]

    def nearest(self, sentences: Tensor) -> list[str]:
        """Every row's word with the smallest Euclidean distance, for sentences (n, length, width)."""
        rows = torch.cdist(sentences.float(), self.table[1:].float()).argmin(-1) + 1
        return [" ".join(self.words[i] for i in row) for row in rows.tolist()]


def words_of(text: str) -> list[str]:
    """Lower-case words and marks.

    Example:
        >>> words_of("It's fine, really.")
        ["it's", 'fine', ',', 'really', '.']
    """
    return WORD.findall(text.lower())


def vocabulary(dataset: DataSet) -> Vocabulary:
    """The words and vectors that a distilled set of sentences was made with."""
    if "vocabulary" not in dataset.facts or "table" not in dataset.tensors:
        raise UserError("this set has no vocabulary: it is no set of sentences")
    return Vocabulary(tuple(dataset.facts["vocabulary"]), dataset["table"])


class Sentences(Samples):
    """Labelled sentences as a network sees them: word vectors looked up when taken, (length, width) each."""

    def __init__(self, texts: Texts, vocabulary: Vocabulary, length: int, classes: Sequence[str]):
        self.texts, self.vocabulary, self.length = texts[0], vocabulary, length
        self.labels, self.classes = texts[1], tuple(classes)
        self.word_ids = vocabulary.ids(texts[0], length)
        self.shape = (length, vocabulary.table.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        return digest("sentences", self.word_ids, self.labels, self.vocabulary.table.numpy(), self.classes)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        ids = np.asarray(ids, dtype=np.int64)
        return packed(self.vocabulary.table[torch.from_numpy(self.word_ids[ids])], self.labels[ids], ids)


def co_occurrence(texts: Sequence[str], words: int, width: int, window: int = 5, seed: int = 0) -> Vocabulary:
    """Word vectors of a text collection alone: the leading singular vectors of positive pointwise mutual information.

    P_ij = max(0, log(n_ij n / (n_i n_j))) over pairs at most `window` words apart, P ≈ U S Vᵀ, vectors U √S, scaled
    to a mean square of 1 per number (Levy and Goldberg, 2014). No label is used.

    Args:
        words: size of the vocabulary, most frequent first.
        width: of a vector.
    """
    split = [words_of(t) for t in texts]
    counts = Counter(w for t in split for w in t)
    ranked = sorted(counts, key=lambda w: (-counts[w], w))[: max(2, words) - 2]
    if len(ranked) < 2:
        raise UserError("there are fewer than two different words in the training texts; check the data")
    row = {w: i for i, w in enumerate(ranked)}
    pairs = np.zeros((len(ranked), len(ranked)), np.float32)
    for text in split:
        ids = np.array([row.get(w, -1) for w in text])
        for gap in range(1, window + 1):
            a, b = ids[:-gap], ids[gap:]
            both = (a >= 0) & (b >= 0)
            np.add.at(pairs, (a[both], b[both]), 1.0)
            np.add.at(pairs, (b[both], a[both]), 1.0)
    n = np.maximum(pairs.sum(1), 1.0)
    with np.errstate(divide="ignore"):
        pairs = np.maximum(np.log(pairs * pairs.sum() / np.outer(n, n)), 0.0)
    from scipy.sparse.linalg import svds  # scipy comes with scikit-learn

    k = min(width, len(ranked) - 1)
    u, s, _ = svds(pairs, k=k, v0=np.random.default_rng(fold(seed, "svd")).normal(size=len(ranked)))
    order = np.argsort(-s)
    vectors = u[:, order] * np.sqrt(s[order])
    vectors *= np.sign(vectors.sum(0) + 1e-12)  # a singular vector's sign is arbitrary
    vectors = np.pad(vectors, ((0, 0), (0, width - k)))
    return vocabulary_of(ranked, torch.from_numpy(vectors.astype(np.float32) / np.sqrt(np.square(vectors).mean())))


def vocabulary_of(words: Sequence[str], vectors: Tensor) -> Vocabulary:
    """With zeros for padding in front, and the mean vector for unknown words."""
    table = torch.cat([torch.zeros_like(vectors[:1]), vectors.mean(0, keepdim=True), vectors])
    return Vocabulary(("<pad>", "<other>", *words), table)


def read_vectors(path: Path, known: Sequence[str] | None = None, limit: int | None = None) -> Vocabulary:
    """Word vectors from a text file, ``word v1 … vd`` a line (as GloVe has them), perhaps gzip-compressed.

    Args:
        known: keep only these words. limit: keep at most this many, in the file's order.
    """
    wanted, words, rows = None if known is None else set(known), list[str](), list[np.ndarray]()
    for number, line in enumerate(lines_of(path), 1):
        word, *numbers = line.rstrip().split(" ")
        if len(numbers) < 2 or (wanted is not None and word not in wanted):
            continue
        try:
            rows.append(np.array(numbers, np.float32))
        except ValueError:
            raise UserError(f"{path}:{number}: expected a word and numbers, got {line[:60]!r}") from None
        words.append(word)
        if len(rows[-1]) != len(rows[0]):
            raise UserError(f"{path}:{number}: {len(rows[-1])} numbers, the lines before have {len(rows[0])}")
        if limit and len(words) >= limit:
            break
    if not words:
        raise UserError(f"{path} has no vector of any word of the data; expected lines 'word 0.1 0.2 …'")
    return vocabulary_of(words, torch.from_numpy(np.stack(rows)))


def name_distances(names: Sequence[str], path: Path) -> Tensor:
    """Euclidean distances between class names, each the mean vector of its words, (C, C)."""
    found = read_vectors(path, [w for name in names for w in words_of(name)])
    for name in names:
        if not any(w in found.rows for w in words_of(name)):
            raise UserError(f"{path} has no vector of a word of the class name {name!r}")
    means = [torch.stack([found.table[found.rows[w]] for w in words_of(n) if w in found.rows]).mean(0) for n in names]
    return torch.cdist(torch.stack(means), torch.stack(means))


def sentence_data(
    parts: Parts,
    name: str,
    *,
    words: int = 5000,
    width: int = 50,
    length: int = 32,
    vectors: Path | None = None,
    seed: int = 0,
) -> Data:
    """`Data` of sentences.

    Args:
        parts: "train" and perhaps "test" (else a fifth of the training part) → rows with "text" and "label".
        words, width: of the vocabulary, learned on the training texts; with `vectors` the file has the width.
        length: words of a sentence; longer ones are cut, shorter ones padded.
        vectors: a file of word vectors.
    """
    if min(words, width, length) < 2:
        raise UserError(f"{name}: words, width and length must be at least 2, got {words}, {width}, {length}")
    parts, classes, notes = with_test(parts, name, seed)
    made = {k: ([r["text"] for r in parts[k]], labels_of(parts[k], classes)) for k in ("train", "test")}
    if vectors is None:
        vocabulary = co_occurrence(made["train"][0], words, width)
        notes += ("word vectors were learned on the training sentences, without labels",)
    else:
        seen = Counter(w for t in made["train"][0] for w in words_of(t))
        vocabulary = read_vectors(vectors, [w for w, _ in seen.most_common(words)])
    train, test = (Sentences(made[k], vocabulary, length, classes) for k in ("train", "test"))
    return Data(name, train, test, notes=notes)
