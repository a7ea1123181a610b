"""Labelled sentences and pairs of sentences: reading them, and as token ids for classifiers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import Data, Samples, find
from stillhouse.data.external import choose_splits, column_labels, fetch
from stillhouse.data.named import call_function, first_balanced, is_function
from stillhouse.data.samples import as_labels, digest
from stillhouse.data.sets import divide
from stillhouse.errors import UserError, did_you_mean
from stillhouse.models import import_library
from stillhouse.text.encoding import small_tokenizer

Row = Mapping[str, Any]  # {"text": …, "label": …} and, of a pair, "pair": …
Parts = dict[str, Sequence[Row]]  # "train", "test", "held_out"
PART_OF = {"train": "train", "test": "test", "valid": "held_out", "validation": "held_out", "dev": "held_out"}
WIDTHS = 8  # batches are padded to a multiple of so many tokens


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, gzip-compressed or not."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_jsonl(path: Path) -> list[Row]:
    """One object ``{"text": …, "label": …}`` a line; pairs have ``"pair"`` as well."""
    rows: list[Row] = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: no JSON ({error.msg})") from None
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise UserError(f'{path}:{number}: expected {{"text": "…", "label": …}}, got {line[:80]!r}')
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no sentences")
    return rows


def names_text(spec: str) -> bool:
    """Whether `open_rows` reads these data, rather than `stillhouse.data.load`.

    Example:
        >>> [names_text(s) for s in ("sst2", "mine.jsonl", "hf:glue/sst2?text=sentence", "cifar10")]
        [True, True, True, False]
    """
    if spec == "sst2" or spec.endswith((".jsonl", ".jsonl.gz")):
        return True
    if spec.startswith("hf:"):
        return "text" in dict(parse_qsl(spec.partition("?")[2]))
    return Path(spec).is_dir() and any(Path(spec).glob("train.jsonl*"))


def open_rows(spec: str) -> Parts:
    """Sentences by name, by part.

    Args:
        spec: ``sst2`` (in $STILLHOUSE_DATA; its dev part is the test part); ``FILE.jsonl[.gz]``; a folder with
            ``train.jsonl`` and perhaps ``test.jsonl`` and ``valid.jsonl``; of Hugging Face datasets
            ``hf:NAME?text=COLUMN[,COLUMN]&label=COLUMN``.

    Raises:
        UserError: it is none of these, cannot be read, or holds something else.
    """
    if spec == "sst2":
        folder = find("sst2")
        rows = {k: read_jsonl(folder / f"{f}.jsonl.gz") for k, f in (("train", "train"), ("test", "dev"))}
        return {k: [{**r, "label": ("negative", "positive")[int(r["label"])]} for r in v] for k, v in rows.items()}
    if spec.startswith("hf:"):
        return hub_rows(spec.removeprefix("hf:"))
    path = Path(spec)
    if path.is_dir():
        found = {PART_OF.get(p.name.partition(".")[0], ""): p for p in sorted(path.glob("*.jsonl*"))}
        if "train" not in found:
            raise UserError(
                f"{path} holds no train.jsonl; expected train.jsonl, and perhaps test.jsonl and valid.jsonl"
            )
        return {part: read_jsonl(p) for part, p in found.items() if part}
    return {"train": read_jsonl(path)}


def hub_rows(spec: str) -> Parts:
    """``NAME?text=COLUMN[,COLUMN]&label=COLUMN&train=SPLIT&test=SPLIT`` of Hugging Face datasets or a local path."""
    name, _, query = spec.partition("?")
    asked = dict(parse_qsl(query))
    known = ("text", "label", "config", "train", "test")
    for key in asked:
        if key not in known:
            raise UserError(f"unknown option {key!r} in hf:{spec}; {did_you_mean(key, known)}")
    tables = fetch(name, asked.get("config"))
    splits = choose_splits(tables, asked, spec)
    first, texts, label = tables[splits["train"]], asked["text"].split(","), asked.get("label", "label")
    for column in (*texts, label):
        if column not in first.features:
            raise UserError(f"hf:{spec} has no column {column!r}; {did_you_mean(column, first.features)}")
    columns = {part: tables[split][label] for part, split in splits.items()}
    labels, classes = column_labels(columns, first.features[label], spec, label)
    keys = ("text", "pair")
    return {
        part: [
            {**{k: str(row[c]) for k, c in zip(keys, texts, strict=False)}, "label": classes[y]}
            for row, y in zip(tables[split], labels[part], strict=True)
            if y >= 0  # test splits of public benchmarks come with -1 for labels that are kept secret
        ]
        for part, split in splits.items()
    }


def look(spec: str) -> tuple[Parts | None, Any]:
    """Sentences by name (`open_rows`, or a function's rows, as a list or by part), where that is what is named.

    Returns:
        (rows by part, None); for anything else (None, what ``package.module:function`` gave, or None), so that a user's
        function is called once (`stillhouse.data.load` takes it as ``given``).
    """
    if names_text(spec):
        return open_rows(spec), None
    made = call_function(spec) if is_function(spec) else None
    parts = made if isinstance(made, Mapping) else {"train": made}
    rows = parts.get("train")
    if isinstance(rows, list) and rows and isinstance(rows[0], Mapping) and "text" in rows[0]:
        return dict(parts), None
    return None, made


def with_test(parts: Parts, name: str, seed: int = 0) -> tuple[Parts, tuple[str, ...], tuple[str, ...]]:
    """The parts with a test part, class names, and a note: without one, a fifth of the training part is set apart."""
    if not parts.get("train"):
        raise UserError(f"{name} has no training sentences")
    classes = tuple(sorted({str(r["label"]) for r in parts["train"]}))
    if parts.get("test"):
        return parts, classes, ()
    rows = parts["train"]
    rest, part = divide(labels_of(rows, classes), 0.2, seed)
    made: Parts = {**parts, "train": [rows[i] for i in rest], "test": [rows[i] for i in part]}
    return made, classes, (f"test: {len(part)} of {len(rows)} sentences, set apart by class with seed {seed}",)


def labels_of(rows: Sequence[Row], classes: Sequence[str]) -> np.ndarray:
    """Labels 0…C−1 of rows whose labels are names of `classes`."""
    position = {name: i for i, name in enumerate(classes)}
    for i, r in enumerate(rows):
        if str(r["label"]) not in position:
            raise UserError(f"sentence {i} has label {r['label']!r}, which no training sentence has")
    return as_labels(np.array([position[str(r["label"])] for r in rows]), len(rows), "labels")


class Sentences(Samples):
    """Labelled sentences as token ids, padded to the longest of a batch (rounded up to a multiple of 8).

    ``take`` gives as ``input`` what classifiers of transformers are called with, ``{"input_ids", "attention_mask"}``
    and what else the tokenizer makes, (n, length) int64 each; a further tokenizer's ids under its own name, for a
    teacher with another vocabulary.

    Args:
        rows: ``{"text", "label"}``, and ``"pair"`` for pairs.
        classes: names of the labels.
        tokenizers: of transformers, by the name under which a batch has their ids; the first must be ``input``.
        length: most tokens, special ones included; longer sentences lose their end.

    Raises:
        UserError: a label that no class has, an empty text, a tokenizer without padding.
    """

    def __init__(self, rows: Sequence[Row], classes: Sequence[str], tokenizers: Mapping[str, Any], length: int = 128):
        self.classes, self.labels, self.shape = tuple(classes), labels_of(rows, classes), (length,)
        self.rows, self.tokenizers, self.tokenizer = rows, dict(tokenizers), tokenizers["input"]
        self.encoded: dict[str, dict[str, list[np.ndarray]]] = {}
        self.pad: dict[str, int] = {}
        self.longer = 0
        empty = next((i for i, r in enumerate(rows) if not r["text"].strip()), None)
        if empty is not None:
            raise UserError(f"sentence {empty} has no text; drop it or fill it in")
        texts, pairs = [r["text"] for r in rows], [str(r.get("pair", "")) for r in rows]
        for name, tokenizer in tokenizers.items():
            if getattr(tokenizer, "pad_token_id", None) is None:
                raise UserError(f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token")
            both = (texts, pairs) if any(pairs) else (texts,)
            whole = tokenizer(*both, verbose=False)["input_ids"]
            if name == "input":
                self.longer = sum(len(row) > length for row in whole)
            found = tokenizer(*both, truncation=True, max_length=length, verbose=False)
            wanted = [k for k in ("input_ids", "token_type_ids") if k in found]
            self.encoded[name] = {k: [np.asarray(row, np.int64) for row in found[k]] for k in wanted}
            self.pad[name] = tokenizer.pad_token_id

    @cached_property
    def fingerprint(self) -> str:
        ids = [np.concatenate([np.append(row, -1) for row in e["input_ids"]]) for e in self.encoded.values()]
        return digest("sentences", *ids, self.labels, self.classes)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Any]:
        ids = np.asarray(ids, dtype=np.int64)
        made: dict[str, Any] = {name: self._padded(name, ids) for name in self.encoded}
        return {**made, "label": torch.from_numpy(self.labels[ids]), "id": torch.from_numpy(ids.copy())}

    def _padded(self, name: str, ids: np.ndarray) -> dict[str, Tensor]:
        encoded = self.encoded[name]
        lengths = np.array([len(encoded["input_ids"][i]) for i in ids])
        width = min(self.shape[0], -(-int(lengths.max(initial=1)) // WIDTHS) * WIDTHS)
        own = np.arange(width) < lengths[:, None]
        out = {}
        for key, rows in encoded.items():
            table = np.full((len(ids), width), self.pad[name] if key == "input_ids" else 0, np.int64)
            table[own] = np.concatenate([rows[i] for i in ids]) if len(ids) else 0
            out[key] = torch.from_numpy(table)
        return {**out, "attention_mask": torch.from_numpy(own.astype(np.int64))}


def tokenizer_by_name(name: str) -> Any:
    """A tokenizer of transformers, by its name on the hub or its folder.

    Raises:
        UserError: there is none.
    """
    try:
        return import_library("transformers").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no tokenizer {name!r}: {' '.join(str(error).split())[:200]}") from None


def sentence_data(
    parts: Parts,
    name: str,
    *,
    tokenizers: Mapping[str, Any] | None = None,
    length: int = 128,
    seed: int = 0,
    limit: int | None = None,
) -> Data:
    """`Data` of labelled sentences as token ids.

    Args:
        parts: rows by part; see `open_rows`.
        name: as reports have it.
        tokenizers: see `Sentences`; without any, words of the training texts that come twice (`small_tokenizer`).
        length: most tokens of a sentence.
        seed: of the test part, where it has to be set apart.
        limit: keep the first so many training sentences, the classes balanced.

    Example:
        >>> rows = [{"text": t, "label": l} for t, l in [("so good", "yes"), ("so bad", "no")] * 5]
        >>> data = sentence_data({"train": rows}, "opinions")
        >>> sorted(data.train.take(np.array([0]))["input"]), data.classes
        (['attention_mask', 'input_ids'], ('no', 'yes'))
    """
    parts, classes, notes = with_test(parts, name, seed)
    if tokenizers is None:
        texts = [str(r.get(k, "")) for r in parts["train"] for k in ("text", "pair")]
        tokenizers = {"input": small_tokenizer(texts, min_count=2, lower=True)}
        notes += ("tokens: the words of the training sentences that come twice",)
    if limit is not None and limit < len(parts["train"]):
        kept = first_balanced(labels_of(parts["train"], classes), limit)
        parts = {**parts, "train": [parts["train"][i] for i in kept]}
        notes += (f"train: the first {limit} sentences, classes balanced",)
    made = {k: Sentences(rows, classes, tokenizers, length) for k, rows in parts.items() if rows}
    longer = {k: s.longer for k, s in made.items() if s.longer}
    notes += tuple(f"{k}: {n} sentences are longer than {length} tokens and were cut" for k, n in longer.items())
    return Data(name, made["train"], made["test"], made.get("held_out"), notes=notes)
