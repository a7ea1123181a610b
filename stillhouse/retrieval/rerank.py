"""Re-rankers by name, and their scores, each asked for once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.errors import UserError, need
from stillhouse.models import import_object

Reranker = Callable[[str, Sequence[str]], Any]
"""(query text, n document texts) → n numbers in a list, array or tensor, higher is better: whatever judges a pair."""


class Scores:
    """The re-ranker's score of a document for a query, asked for once and kept.

    Args:
        reranker: asked for what is not known yet.
        path: a file of JSON lines that keeps what was asked for, with the time it took; what it holds is not asked for
            again. A last line that was cut off by a kill is dropped.
        settings: strict JSON that says which re-ranker and documents these are; a file of others is refused.

    Attributes:
        asked: documents given to the re-ranker by this object, those read from `path` not counted.

    Example:
        >>> class Two:
        ...     def texts(self, docs): return [d.upper() for d in docs]
        >>> scores = Scores(lambda query, texts: [float(len(t)) for t in texts])
        >>> scores("q", ["a", "bb"], Two()), scores("q", ["bb"], Two()), scores.asked
        ({'a': 1.0, 'bb': 2.0}, {'bb': 2.0}, 2)
    """

    def __init__(self, reranker: Reranker, path: Path | None = None, settings: Mapping[str, Any] | None = None):
        self.reranker, self.path, self.settings = reranker, path, dict(settings or {})
        self.asked = 0
        self._known: dict[str, dict[str, float]] = {}
        self._unpaid: dict[str, dict[str, float]] = {}  # seconds of documents that `seconds` has not told of yet
        if path is not None and path.exists():
            self._read(path)

    def __call__(self, query: str, docs: Sequence[str], index: Any) -> dict[str, float]:
        """Document → score, for one query.

        Args:
            index: knows the texts (`Index.texts`); only those of new documents are asked for.

        Raises:
            UserError: a document without text; another number of scores than documents; a score that is not finite.
        """
        known = self._known.setdefault(query, {})
        if new := [d for d in dict.fromkeys(docs) if d not in known]:
            texts = index.texts(new)
            began = time.perf_counter()
            found = self._ask(query, new, texts)
            seconds = time.perf_counter() - began
            self.asked += len(new)
            self._add(query, new, found, seconds)
            self._write({"query": query, "docs": new, "scores": found, "seconds": seconds})
        return {d: known[d] for d in docs}

    def seconds(self, query: str, docs: Sequence[str]) -> float:
        """What the re-ranker took for these documents, in this run or the one it resumes; told once, then 0."""
        left = self._unpaid.get(query, {})
        return sum(left.pop(d, 0.0) for d in docs)

    def _ask(self, query: str, docs: Sequence[str], texts: Sequence[str]) -> list[float]:
        for d, text in zip(docs, texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"document {d!r} has no text for the re-ranker; leave it out of the index")
        answer = self.reranker(query, texts)
        if isinstance(answer, torch.Tensor):
            answer = answer.detach().float().cpu().numpy()
        try:
            found = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError(f"the re-ranker must give {len(docs)} numbers, got {type(answer).__name__}") from None
        if found.shape != (len(docs),):
            raise UserError(f"the re-ranker gave scores of shape {found.shape} for {len(docs)} documents; one each")
        if not np.isfinite(found).all():
            bad = docs[int(np.flatnonzero(~np.isfinite(found))[0])]
            raise UserError(f"the re-ranker's score of document {bad!r} for {query[:60]!r} is not finite; mend it")
        return found.tolist()

    def _add(self, query: str, docs: Sequence[str], scores: Sequence[float], seconds: float) -> None:
        self._known.setdefault(query, {}).update(zip(docs, scores, strict=True))
        self._unpaid.setdefault(query, {}).update(dict.fromkeys(docs, seconds / len(docs)))

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        fresh = not self.path.exists()
        with open(self.path, "a", encoding="utf-8") as file:
            if fresh:
                file.write(json.dumps({"settings": self.settings}) + "\n")
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        if cut:  # a kill in the middle of a line
            path.write_bytes(whole + b"\n" if whole else b"")
        try:
            head, *rows = [json.loads(line) for line in whole.decode().splitlines()] or [None]
            if head is None:
                path.unlink()
                return
            found = head["settings"]
            for row in rows:
                self._add(**row)
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); delete it") from None
        if found != self.settings:
            other = [k for k in {**found, **self.settings} if found.get(k) != self.settings.get(k)]
            raise UserError(f"{path} holds scores of another {' and '.join(other)}; use a new run folder or delete it")


def load_reranker(spec: str, device: str = "cpu") -> Reranker:
    """A re-ranker by name.

    Args:
        spec: ``hf:NAME_OR_FOLDER``, a CrossEncoder or SentenceTransformer of sentence-transformers (one output; a
            bi-encoder scores by its own similarity); or ``package.module:object``, a `Reranker`, or a function or class
            without required arguments that gives one.
        device: where a model runs.

    Raises:
        UserError: nothing of that name, or something that is no re-ranker.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "hf" and colon and rest:
        return _sentence_transformers(rest, device)
    if not colon or not rest or not kind.replace(".", "").replace("_", "").isalnum():
        raise UserError(f"--model {spec!r}: expected hf:NAME_OR_FOLDER or package.module:function")
    found = import_object(spec, "--model")
    return _made(found, spec)


def _made(found: Any, spec: str) -> Reranker:
    """The object itself where it takes (query, texts); else what it gives when called without arguments."""
    import inspect

    try:
        takes = inspect.signature(found)
    except (TypeError, ValueError):
        raise UserError(
            f"--model {spec} is {type(found).__name__}, expected a function (query, texts) -> scores"
        ) from None
    if not isinstance(found, type):
        try:
            takes.bind("query", ["text"])
            return found
        except TypeError:
            pass
    try:
        takes.bind()
    except TypeError:
        raise UserError(f"--model {spec} takes {takes}, expected (query, texts) -> scores, or no arguments") from None
    made = found()
    if not callable(made):
        raise UserError(f"--model {spec}() gave {type(made).__name__}, expected a function (query, texts) -> scores")
    return made


def _sentence_transformers(name: str, device: str) -> Reranker:
    try:
        from sentence_transformers import CrossEncoder, SentenceTransformer
        from transformers.utils import logging as hub
    except ModuleNotFoundError:
        raise need("retrieval", "sentence-transformers") from None
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--model hf:{name}: there is no folder {folder}")
    kind = SentenceTransformer if local and _is_bi_encoder(folder) else CrossEncoder
    how: dict[str, Any] = {} if kind is SentenceTransformer else {"model_kwargs": {"use_safetensors": True}}
    bars = hub.is_progress_bar_enabled()
    hub.disable_progress_bar()
    try:
        model: Any = kind(str(folder) if local else name, device=device, local_files_only=local, **how)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--model hf:{name} is no re-ranker that can be loaded: {why}") from None
    finally:
        if bars:
            hub.enable_progress_bar()
    return (BiEncoder if kind is SentenceTransformer else Pairs)(model, f"hf:{name}")


def _is_bi_encoder(folder: Path) -> bool:
    path = folder / "config_sentence_transformers.json"
    try:
        return json.loads(path.read_text()).get("model_type", "SentenceTransformer") == "SentenceTransformer"
    except (OSError, ValueError):
        return False


class Pairs:
    """A CrossEncoder of sentence-transformers as a `Reranker`: its raw output; a sigmoid ranks alike but saturates."""

    def __init__(self, model: Any, name: str = "", batch: int = 32):
        if model.num_labels != 1:
            raise UserError(f"the cross-encoder {name} has {model.num_labels} outputs; a re-ranker has one")
        self.model, self.name, self.batch = model, name or type(model).__qualname__, batch

    def __call__(self, query: str, texts: Sequence[str]) -> np.ndarray:
        pairs = [(query, t) for t in texts]
        return self.model.predict(
            pairs, batch_size=self.batch, activation_fn=torch.nn.Identity(), show_progress_bar=False
        )


class BiEncoder:
    """A SentenceTransformer as a `Reranker`: the similarity it was trained for, between query and document."""

    def __init__(self, model: Any, name: str = "", batch: int = 64):
        self.model, self.name, self.batch = model, name or type(model).__qualname__, batch

    def __call__(self, query: str, texts: Sequence[str]) -> np.ndarray:
        how: dict[str, Any] = {"batch_size": self.batch, "show_progress_bar": False}
        q, d = self.model.encode_query([query], **how), self.model.encode_document(list(texts), **how)
        return self.model.similarity(q, d)[0].numpy()
