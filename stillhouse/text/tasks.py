"""Tasks made of text: inputs, gold labels, a teacher's rationales and labels; by name, from JSONL, from a function."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stillhouse.data import find
from stillhouse.errors import UserError, did_you_mean
from stillhouse.models import import_object
from stillhouse.report import Table
from stillhouse.text.parsers import KINDS, PARSED, Kind, kind

PAIR = "\x1e"  # between the two texts of a pair; encoded as the tokenizer's end-of-sequence token
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        input: what the student reads; `PAIR` stands between the texts of a pair.
        label: the gold answer; None where there is none.
        rationale: the teacher's; empty where its output could not be parsed.
        taught: the teacher's own answer; empty where it could not be parsed.
        value: of the gold label where it is a number that is known.
        choices: the answers to choose from, if any.
        where: file and line, or id.
        tensors: what the student reads beside the text, by name.
    """

    input: str
    label: str | None = None
    rationale: str = ""
    taught: str = ""
    value: float | None = None
    choices: tuple[str, ...] = ()
    where: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Examples in three splits. The teacher's labels are only for training: valid and test are judged by gold labels.

    Attributes:
        name: as the report has it.
        train, valid, test: examples; `valid` may be empty (then nothing is selected).
        kind: how answers are judged.
        notes: what the user should know.
    """

    name: str
    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]
    kind: Kind = KINDS["text"]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            if not getattr(self, split):
                raise UserError(f"{self.name}: there are no {split} examples")
        for split in ("valid", "test"):
            for e in getattr(self, split):
                if e.label is None:
                    raise UserError(f"{self.name}: {e.where or split} has no 'label'; {split} is judged by gold labels")
        for e in (*self.train, *self.valid, *self.test):
            if not e.input.replace(PAIR, "").strip() and not e.tensors:
                raise UserError(f"{self.name}: {e.where or 'an example'} has no text in 'input'; drop it or fill it in")

    def accuracy(self, said: Sequence[str], examples: Sequence[Example]) -> float:
        """Share of `said` that is right against the examples' gold labels."""
        right = [self.kind.right(s, str(e.label), e.value) for s, e in zip(said, examples, strict=True)]
        return sum(right) / len(right)

    def report(self) -> Table:
        """Per split: rows (all are kept), what could not be parsed, and how good the teacher is against gold labels."""
        rows = []
        for split in SPLITS:
            found = parse_report(getattr(self, split), self.kind)
            rows.append([split, *found.values()])
        note = (
            "rows whose rationale or label is missing are kept, with an empty one; valid and test are judged by gold "
            "labels, and their rationales are never read"
        )
        columns = ["split", "rows", "no rationale", "no teacher label", "teacher right", "not among the choices"]
        return Table(f"Teacher's outputs on {self.name}", columns, rows, note)


def parse_report(examples: Sequence[Example], kind: Kind) -> dict[str, int]:
    """Counts over examples: rows, no_rationale, no_label, right (teacher against gold), outside (not a choice)."""
    return {
        "rows": len(examples),
        "no_rationale": sum(not e.rationale.strip() for e in examples),
        "no_label": sum(not e.taught.strip() for e in examples),
        "right": sum(e.label is not None and kind.right(e.taught, e.label, e.value) for e in examples),
        "outside": sum(bool(e.choices and e.taught.strip()) and e.taught not in e.choices for e in examples),
    }


# -- opening ------------------------------------------------------------------------------------------------


def open_task(
    spec: str, kind_name: str | None = None, *, valid: float = 0.1, test: float = 0.1, subsample: float = 1.0
) -> Task:
    """A task by name.

    Args:
        spec: ``svamp``, ``cqa`` (in $STILLHOUSE_DATA); ``jsonl:PATH`` or a PATH, a JSONL file (``.gz`` too) or a folder
            with ``train.jsonl`` and optionally ``valid.jsonl`` and ``test.jsonl``; ``package.module:function``, which
            returns a `Task`, rows, or split → rows. A row is ``{input, label, rationale, taught | raw}``;
            ``{premise, hypothesis}`` may stand for ``input``.
        kind_name: how ``raw`` completions are parsed and answers judged: text, cqa, svamp, asdiv, esnli, anli1.
        valid, test: parts of the training rows that are set apart where there is no such split; the same whatever
            the seed of the run.
        subsample: part of the training rows that is used; taken before `valid` is.

    Raises:
        UserError: an unknown name; a file, line or row that cannot be used, with its place.
    """
    if not 0 <= valid < 1 or not 0 < test < 1 or not 0 < subsample <= 1:
        raise UserError(
            f"valid in [0, 1), test in (0, 1) and subsample in (0, 1] are needed, got {valid}, {test}, {subsample}"
        )
    way, colon, rest = spec.partition(":")
    if spec in NAMED:
        if kind_name not in (None, spec):
            raise UserError(f"{spec} is a task of its own kind; leave out --task {kind_name}")
        return NAMED[spec](valid, subsample)
    if colon and way != "jsonl" and way.replace(".", "").replace("_", "").isalnum() and "/" not in way:
        return from_function(spec, kind_name, valid, test, subsample)
    path = Path(rest if way == "jsonl" and colon else spec).expanduser()
    if not path.exists():
        forms = "jsonl:PATH or package.module:function"
        raise UserError(f"no task and no file {str(path)!r}; {did_you_mean(spec, NAMED)} (or {forms})")
    files = {"train": path} if path.is_file() else split_files(path)
    return divided(path.stem, {k: read_jsonl(p) for k, p in files.items()}, kind_name, valid, test, subsample)


def split_files(folder: Path) -> dict[str, Path]:
    found = {}
    for split in SPLITS:
        for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
            if (folder / name).is_file():
                found[split] = folder / name
    if "train" not in found:
        raise UserError(f"{folder} holds no train.jsonl or train.jsonl.gz; give a JSONL file or a folder with one")
    return found


def read_jsonl(path: Path) -> list[tuple[str, Any]]:
    """(file:line, row) of every line that is not blank.

    Raises:
        UserError: a line that is no JSON, or an unreadable file; names it.
    """
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        rows.append((f"{path}:{number}", json.loads(line)))
                    except json.JSONDecodeError as error:
                        raise UserError(f"{path}:{number} is no JSON ({error.msg} at column {error.colno})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty; one JSON object a line is needed")
    return rows


def divided(
    name: str,
    rows: Mapping[str, Sequence[tuple[str, Any]]],
    kind_name: str | None,
    valid: float,
    test: float,
    subsample: float,
) -> Task:
    """A task of rows by split; the splits that are missing are set apart from the training rows."""
    how = kind(kind_name or "text")
    if not set(rows) <= set(SPLITS) or "train" not in rows:
        raise UserError(f"{name}: splits must be train and optionally valid and test, got {sorted(rows)}")
    made = {k: [example(r, where, how, k == "train") for where, r in v] for k, v in rows.items()}
    notes = []
    if "test" not in made:
        made["test"], made["train"] = apart(made["train"], test, "test")
        notes.append(f"test: {len(made['test'])} rows set apart from the training rows, the same for every seed")
    return carve(name, made, how, valid, subsample, notes)


def carve(
    name: str, made: dict[str, list[Example]], how: Kind, valid: float, subsample: float, notes: Iterable[str] = ()
) -> Task:
    """Takes a share of the training examples, then sets `valid` apart of it where there is none."""
    notes, train, held = [*notes], made["train"], made.get("valid")
    if subsample < 1:
        train, _ = apart(train, subsample, "subsample")
        notes.append(f"train: {len(train)} of {len(made['train'])} rows")
    if held is None:
        held, train = apart(train, valid, "valid") if valid else ([], train)
        if held:
            notes.append(f"valid: {len(held)} of the {len(held) + len(train)} training rows, the same for every seed")
    return Task(name, train, held, made["test"], how, tuple(notes))


def apart(rows: list[Example], fraction: float, what: str) -> tuple[list[Example], list[Example]]:
    """A random `fraction` of the rows and the rest, by a permutation with seed 0; both in their old order."""
    count = round(fraction * len(rows))
    if not 0 < count < len(rows):
        raise UserError(f"{what}: {fraction:g} of {len(rows)} rows is {count}; give more rows or another fraction")
    chosen = set(np.random.default_rng(0).permutation(len(rows))[:count].tolist())
    return [r for i, r in enumerate(rows) if i in chosen], [r for i, r in enumerate(rows) if i not in chosen]


def example(row: Any, where: str, how: Kind, taught: bool = True) -> Example:
    """One row as an `Example`; `taught` rows must have a rationale, or a raw completion that is parsed.

    Raises:
        UserError: a field is missing or no text; names the row.
    """
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise UserError(f"{where} must be an object with input, label, rationale; got a {type(row).__name__}")
    row = {k: v for k, v in row.items() if v is not None}
    if "premise" in row and "hypothesis" in row:
        row.setdefault("input", f"{row['premise']}{PAIR}{row['hypothesis']}")
    if "input" not in row:
        near = did_you_mean("input", row) if row else "the row is empty"
        raise UserError(f"{where} has no 'input' (the text the student reads); {near.replace('known', 'it has')}")
    for key in ("input", "label", "rationale", "taught", "raw"):
        if key in row and not isinstance(row[key], str):
            raise UserError(f"{where}: {key!r} must be text, got {row[key]!r}")
    if "raw" in row and "rationale" not in row:
        if not how.phrase:
            raise UserError(f"{where} has a raw completion; say how it is parsed: --task {', '.join(PARSED)}")
        row["rationale"], row["taught"] = how.parse(row["raw"])
    if taught and "rationale" not in row:
        raise UserError(f"{where} has neither 'rationale' nor 'raw'; an empty rationale says that the teacher failed")
    value = row.get("value")
    return Example(
        row["input"],
        row.get("label"),
        row.get("rationale", ""),
        row.get("taught", ""),
        float(value) if isinstance(value, int | float) else None,
        tuple(map(str, row.get("choices", ()))),
        where,
    )


def from_function(spec: str, kind_name: str | None, valid: float, test: float, subsample: float) -> Task:
    """What ``package.module:function`` returns, as a task."""
    made = import_object(spec, "--data")
    if callable(made):
        try:
            made = made()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--data {spec} raised {type(error).__name__}: {' '.join(str(error).split())}") from None
    if isinstance(made, Task):
        return made
    splits = made if isinstance(made, Mapping) else {"train": made}
    if not all(isinstance(v, Sequence) and not isinstance(v, str) for v in splits.values()):
        raise UserError(f"--data {spec} returned {type(made).__name__}; expected a Task, rows, or split → rows")
    rows = {k: [(f"{spec} {k}[{i}]", r) for i, r in enumerate(v)] for k, v in splits.items()}
    return divided(spec, rows, kind_name, valid, test, subsample)


# -- sets with rationales of a 540B model -------------------------------------------------------------------


def named(folder: str, name: str, make: Callable[[Mapping[str, Any], str], Example]) -> Callable[[float, float], Task]:
    def open_named(valid: float, subsample: float) -> Task:
        files = split_files(find(folder))
        try:
            made = {k: [make(row, where) for where, row in read_jsonl(p)] for k, p in files.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{find(folder)} does not hold {name} as expected ({error!r}); copy it again") from None
        return carve(name, made, KINDS[name], valid, subsample)

    return open_named


def svamp(row: Mapping[str, Any], where: str) -> Example:
    """Problem → equation; the teacher's output is parsed here, the parsed fields of the file are not used."""
    rationale, taught = KINDS["svamp"].parse(row["llm_raw"])
    return Example(row["question"], row["equation"], rationale, taught, float(row["answer"]), where=where)


def cqa(row: Mapping[str, Any], where: str) -> Example:
    """Question and five lettered choices, one a line → the text of the right one."""
    choices = tuple(row["choices"])
    lines = [row["question"], "Answer Choices:", *(f"({'abcde'[i]}) {c}" for i, c in enumerate(choices))]
    text = "\n".join(lines)
    return Example(text, row["answer"], row["llm_rationale"] or "", row["llm_answer"] or "", None, choices, where)


NAMED = {"svamp": named("rationales-svamp", "svamp", svamp), "cqa": named("rationales-cqa", "cqa", cqa)}


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same examples, the rationales permuted among them: as many tokens and as much compute, no content."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return [replace(e, rationale=examples[j].rationale) for e, j in zip(examples, order, strict=True)]
