"""Text by name as windows of token ids, for language models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import find
from stillhouse.data.external import choose_splits, fetch
from stillhouse.data.samples import digest, draws
from stillhouse.errors import UserError, did_you_mean
from stillhouse.text.encoding import small_tokenizer
from stillhouse.text.sentences import lines_of

TEST = 0.1  # the end of a text that has no test part of its own
NAMED: dict[str, tuple[str, str, str | None]] = {  # folder in $STILLHOUSE_DATA, its text, its test part
    "shakespeare": ("tiny-shakespeare", "input.txt.gz", None),
    "wikitext2": ("wikitext2-small", "valid.txt.gz", "test.txt.gz"),
    "names": ("names", "names.txt.gz", None),
}
EMBEDDED = "python-reference"


def open_text(spec: str) -> tuple[str, str | None]:
    """A text and, where it comes with one, its test part.

    Args:
        spec: ``python-reference`` (the language reference that Python's own help reads, 0.5 MB of English);
            ``shakespeare``, ``wikitext2``, ``names`` (in $STILLHOUSE_DATA); ``FILE.txt[.gz]``; of Hugging Face datasets
            ``hf:NAME?text=COLUMN``.

    Raises:
        UserError: it is none of these, cannot be read, or is empty.
    """
    parts: list[str | None]
    if spec == EMBEDDED:
        from pydoc_data.topics import topics

        parts = ["\n".join(topics[k] for k in sorted(topics)), None]
    elif spec in NAMED:
        folder, text, test = NAMED[spec]
        home = find(folder)
        parts = ["\n".join(lines_of(home / f)) if f else None for f in (text, test)]
    elif spec.startswith("hf:"):
        parts = list(_hub_text(spec.removeprefix("hf:")))
    elif spec.endswith((".txt", ".txt.gz")):
        parts = ["\n".join(lines_of(Path(spec))), None]
    else:
        known = [EMBEDDED, *NAMED, "FILE.txt", "hf:NAME?text=COLUMN"]
        raise UserError(f"--data {spec}: no text of this name; {did_you_mean(spec, known)}")
    if not (parts[0] or "").strip():
        raise UserError(f"{spec} holds no text")
    return str(parts[0]), parts[1]


def _hub_text(spec: str) -> tuple[str, str | None]:
    name, _, query = spec.partition("?")
    asked = {"text": "text", **dict(parse_qsl(query))}
    for key in asked:
        if key not in (known := ("text", "config", "train", "test")):
            raise UserError(f"unknown option {key!r} in hf:{spec}; {did_you_mean(key, known)}")
    tables = fetch(name, asked.get("config"))
    splits, column = choose_splits(tables, asked, spec), asked["text"]
    first = tables[splits["train"]]
    if column not in first.features:
        raise UserError(f"hf:{spec} has no column {column!r}; {did_you_mean(column, first.features)}")
    found = {part: "\n".join(map(str, tables[split][column])) for part, split in splits.items()}
    return found["train"], found.get("test")


class Windows:
    """A stream of token ids as windows of equal length, side by side; a set in the sense of `stillhouse.data.Samples`.

    ``take`` gives ``{"input": {"input_ids": (n, length)}, "label": (n, length), "id": (n,)}``: the label of a position
    is the token behind it, so nobody shifts again. An augmented view moves every window by a random part of its
    length: epochs cut the stream at other places.

    Args:
        tokens: (N,) ids.
        length: tokens of a window.
        vocabulary: number of ids.

    Raises:
        UserError: a stream that is shorter than one window, ids out of range.

    Example:
        >>> w = Windows(np.arange(10), 3, 10)
        >>> b = w.take(np.array([1]))
        >>> len(w), b["input"]["input_ids"].tolist(), b["label"].tolist()
        (3, [[3, 4, 5]], [[4, 5, 6]])
    """

    def __init__(self, tokens: np.ndarray, length: int, vocabulary: int):
        self.tokens, self.length, self.vocabulary = np.asarray(tokens, np.int64), length, vocabulary
        count = (len(self.tokens) - 1) // length if length > 0 else 0
        if count < 1:
            raise UserError(f"a text of {len(self.tokens)} tokens has no window of {length} and the token behind it")
        if self.tokens.min() < 0 or self.tokens.max() >= vocabulary:
            raise UserError(f"token ids must lie in 0…{vocabulary - 1}, got up to {self.tokens.max()}")
        self.labels = np.zeros(count, np.int64)  # windows have no classes
        self.shape: tuple[int, ...] = (length,)
        self.classes: tuple[str, ...] = ("text",)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        return digest("windows", self.tokens, self.length)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Any]:
        ids = np.asarray(ids, np.int64)
        at = ids * self.length
        if view is not None:
            moved = at + np.floor(draws(seed, view, ids, 1)[:, 0] * self.length).astype(np.int64)
            at = np.minimum(moved, len(self.tokens) - self.length - 1)
        rows = torch.from_numpy(self.tokens[at[:, None] + np.arange(self.length + 1)])
        inputs = {"input_ids": rows[:, :-1].contiguous()}
        return {"input": inputs, "label": rows[:, 1:].contiguous(), "id": torch.from_numpy(ids.copy())}


@dataclass
class Corpus:
    """Training and test windows of one text.

    Attributes:
        name: as reports have it. train, test: windows of different places.
        tokenizer: of transformers, saved with students. notes: what the reader of a report must know.
    """

    name: str
    train: Windows
    test: Windows
    tokenizer: Any
    notes: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int:
        return self.train.vocabulary

    @property
    def length(self) -> int:
        return self.train.length

    def example(self, n: int = 1) -> dict[str, Tensor]:
        """The first n test windows, as models are called with them."""
        return self.test.take(np.arange(min(n, len(self.test))))["input"]


def corpus(
    spec: str = EMBEDDED,
    *,
    length: int = 64,
    tokens: Literal["char", "word"] = "char",
    tokenizer: Any = None,
    limit: int | None = None,
) -> Corpus:
    """Windows of a text by name; without a test part of its own, the last tenth of the text is it.

    Args:
        spec: see `open_text`.
        length: tokens of a window.
        tokens: without a tokenizer: characters, or what stands between blanks and comes twice in the training text.
        tokenizer: of transformers.
        limit: read only so many characters of the text.

    Raises:
        UserError: what `open_text` or `Windows` refuse.
    """
    text, test = open_text(spec)
    notes: tuple[str, ...] = ()
    if limit is not None and limit < len(text):
        text, notes = text[:limit], (f"text: its first {limit} characters",)
    if test is None:
        cut = round((1 - TEST) * len(text))
        text, test = text[:cut], text[cut:]
        notes += (f"test: the last {TEST:.0%} of the text",)
    if tokenizer is None:
        tokenizer = small_tokenizer([text], level=tokens, min_count=2 if tokens == "word" else 1)
        notes += (f"tokens: {'characters' if tokens == 'char' else 'words that come twice in the training text'}",)
    train, held = (Windows(_ids(tokenizer, part), length, len(tokenizer)) for part in (text, test))
    return Corpus(spec, train, held, tokenizer, notes)


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
