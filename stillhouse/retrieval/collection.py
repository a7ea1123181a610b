"""Collections of documents and queries: by name, from a folder, from a function of yours."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.data import find
from stillhouse.data.samples import digest
from stillhouse.errors import UserError, did_you_mean
from stillhouse.models import import_object

Qrels = dict[str, dict[str, int]]
DOC_IDS = ("doc_id", "docno", "_id", "id")
QUERY_IDS = ("query_id", "qid", "_id", "id")


@dataclass(frozen=True)
class Collection:
    """Documents, queries and, where they are known, relevance judgements (for measuring only; no fit sees them).

    Attributes:
        name: what reports call it.
        docs: document id → text.
        queries: query id → text.
        qrels: query id → document id → relevance (an integer, 0 is not relevant).
        notes: what the user should know.

    Raises:
        UserError: there are no documents or no queries, or one of them has no text.

    Example:
        >>> Collection("two", {"a": "radio waves", "b": "noise"}, {"1": "radio"}).docs["b"]
        'noise'
    """

    name: str
    docs: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Qrels = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, texts in (("document", self.docs), ("query", self.queries)):
            if not texts:
                raise UserError(f"the collection {self.name!r} has no {what.replace('query', 'querie')}s")
            for id, text in texts.items():
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{self.name}: {what} {id!r} has no text (got {text!r}); leave it out")

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any id or text of a document."""
        return digest("collection", list(self.docs.items()))

    def first(self, queries: int) -> Collection:
        """The same documents with the first so many queries."""
        kept = dict(list(self.queries.items())[:queries])
        return Collection(self.name, self.docs, kept, {q: r for q, r in self.qrels.items() if q in kept}, self.notes)


def load_collection(spec: str) -> Collection:
    """A collection by name.

    Args:
        spec: "vaswani" ($STILLHOUSE_DATA/vaswani); "descriptions" (paragraphs of the data set descriptions that come
            with scikit-learn, with their titles as queries: a smoke test); a folder, ``folder:PATH`` or its path, with
            ``docs.jsonl``, ``queries.jsonl`` and, if there are judgements, ``qrels.tsv``, each plain or ``.gz``; or
            ``package.module:function``, which returns a `Collection`.

    Raises:
        UserError: an unknown name, a file that is missing or damaged, documents without text.

    Example:
        >>> load_collection("descriptions").queries["iris"]
        'Iris plants dataset'
    """
    if spec in NAMED:
        return NAMED[spec]()
    kind, colon, rest = spec.partition(":")
    if kind == "folder" and colon:
        return from_folder(Path(rest))
    if Path(spec).is_dir():
        return from_folder(Path(spec))
    if colon and kind.replace(".", "").replace("_", "").isalnum() and os.sep not in spec:
        make = import_object(spec, "--data")
        try:
            found = make()
        except Exception as error:
            raise UserError(f"--data {spec} raised {type(error).__name__}: {' '.join(str(error).split())}") from None
        if not isinstance(found, Collection):
            raise UserError(f"--data {spec} returned {type(found).__name__}, expected a Collection")
        return found
    raise UserError(f"no collection {spec!r}; {did_you_mean(spec, [*NAMED, 'folder:PATH', 'package.module:function'])}")


def from_folder(folder: Path, name: str | None = None) -> Collection:
    """The collection in a folder.

    ``docs.jsonl`` has ``doc_id`` and ``text`` (a ``title`` is put before it), ``queries.jsonl`` has ``query_id`` and
    ``text``, ``qrels.tsv`` three columns with a header: query id, document id, relevance. Each may be gzipped.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give one with docs.jsonl, queries.jsonl and perhaps qrels.tsv (or .gz)")
    docs, queries = texts_of(folder, "docs.jsonl", DOC_IDS), texts_of(folder, "queries.jsonl", QUERY_IDS)
    path = existing(folder, "qrels.tsv")
    return Collection(name or folder.name, docs, queries, read_qrels(path, docs, queries) if path else {})


def existing(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty, of a plain or gzipped UTF-8 file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def texts_of(folder: Path, name: str, ids: tuple[str, ...]) -> dict[str, str]:
    """Id → text of a file of JSON lines; the text is the title and the text."""
    path = existing(folder, name)
    if path is None:
        raise UserError(f"{folder} has no {name} (or {name}.gz); expected lines like {{{ids[0]!r}: …, 'text': …}}")
    found: dict[str, str] = {}
    for n, line in lines(path):
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {n}: not JSON ({error})") from None
        key = next((k for k in ids if isinstance(row, dict) and row.get(k) is not None), None)
        if key is None:
            raise UserError(f"{path}, line {n}: expected an object with {ids[0]!r} and 'text', got {line.strip()[:80]}")
        parts = [row.get("title"), row.get("text")]
        text = " ".join(p.strip() for p in parts if isinstance(p, str) and p.strip())
        if not text:
            raise UserError(f"{path}, line {n}: {key} {row[key]!r} has no text; leave it out")
        if str(row[key]) in found:
            raise UserError(f"{path}, line {n}: {key} {row[key]!r} stands there twice")
        found[str(row[key])] = text
    if not found:
        raise UserError(f"{path} is empty; expected lines like {{{ids[0]!r}: …, 'text': …}}")
    return found


def read_qrels(path: Path, docs: Mapping[str, str], queries: Mapping[str, str]) -> Qrels:
    """Query → document → relevance from three columns with a header; ids that are not in the files are refused."""
    found: Qrels = {}
    for i, (n, line) in enumerate(lines(path)):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) != 3:
            raise UserError(
                f"{path}, line {n}: expected query_id, doc_id, relevance with tabs, got {line.strip()[:80]!r}"
            )
        if i == 0 and not re.fullmatch(r"-?\d+", cells[2]):
            continue
        try:
            query, doc, relevance = cells[0], cells[1], int(cells[2])
        except ValueError:
            raise UserError(f"{path}, line {n}: relevance must be a whole number, got {cells[2]!r}") from None
        if doc not in docs or query not in queries:
            what = f"document {doc!r}" if doc not in docs else f"query {query!r}"
            raise UserError(f"{path}, line {n}: there is no {what} in the collection")
        found.setdefault(query, {})[doc] = relevance
    return found


def descriptions() -> Collection:
    """Paragraphs of scikit-learn's data set descriptions; a title is relevant to the paragraphs below it."""
    from sklearn import datasets

    docs: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    for path in sorted((Path(datasets.__file__).parent / "descr").glob("*.rst")):
        text = re.sub(r"(?m)^\.\. .*$|^[-=~^|:\s+.]+$", "", path.read_text(encoding="utf-8"))
        title, *rest = (p for p in (" ".join(t.split()) for t in re.split(r"\n\s*\n", text)) if p)
        queries[path.stem] = title
        for i, paragraph in enumerate(p for p in rest if len(p.split()) >= 8):
            docs[f"{path.stem}-{i}"] = paragraph
            qrels.setdefault(path.stem, {})[f"{path.stem}-{i}"] = 1
    note = "Paragraphs of scikit-learn's data set descriptions: a smoke test, too small and too easy for any claim."
    return Collection("descriptions", docs, queries, qrels, (note,))


NAMED: dict[str, Callable[[], Collection]] = {
    "vaswani": lambda: from_folder(find("vaswani"), "vaswani"),
    "descriptions": descriptions,
}
