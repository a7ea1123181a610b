"""What runs give, how it is saved, and how `load` reads it back: models, data sets, queries.

Every outcome has ``save(folder)``, which writes safetensors and JSON that live without the run:

| outcome | files |
|---|---|
| models (`Family`, `Models` and what is derived from them) | ``students/NAME/{model.safetensors, plan.json}`` |
| `DataSet` | ``dataset/{data.safetensors, dataset.json}`` and pictures |
| `Queries` | ``queries/queries.json`` |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import count_bytes, count_macs, count_params, latency
from stillhouse.export import PLAN, WEIGHTS, read_tensors, save_student, save_tensors
from stillhouse.files import atomic_write, inside, read_json, write_json
from stillhouse.models import ModelSpec
from stillhouse.report import Student
from stillhouse.students.plan import Plan

DATA, DATA_FACTS, QUERIES = "data.safetensors", "dataset.json", "queries.json"
FORMAT = 1


@dataclass
class Member:
    """One model of an outcome.

    Attributes:
        name: its folder's name.
        model: the network, on the CPU, in eval mode.
        plan: how it differs from its base; None where it is the base itself.
        importance: its weight in an ensemble of all members.
        spec: how its base is built again; None takes the outcome's.
    """

    name: str
    model: nn.Module
    plan: Plan | None = None
    importance: float = 1.0
    spec: ModelSpec | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights as they are stored: `evaluate.count_bytes`, packed ones by their codes."""
        return count_bytes(self.model) - (self.plan.saved_bytes(self.model) if self.plan else 0)


class Members:
    """What outcomes made of models share: access by name, saving, and the rows of a report."""

    members: list[Member]
    spec: ModelSpec | None
    tokenizer: Any  # of transformers, which models of text are saved with; None for others

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, name: str) -> Member:
        for m in self.members:
            if m.name == name:
                return m
        raise KeyError(f"{name!r}; members are {[m.name for m in self.members]}")

    def save(self, folder: str | Path) -> list[Path]:
        """Writes every member to ``folder/students/NAME/{model.safetensors, plan.json}``."""
        made = []
        for m in self.members:
            home = inside(Path(folder) / "students", m.name)
            save_student(home, m.model, plan_json=self.facts(m), encode=m.plan.encoded if m.plan else dict)
            self._companions(home, m)
            made.append(home)
        return made

    def _companions(self, home: Path, m: Member) -> None:
        """The tokenizer, and the configuration with which ``from_pretrained`` of transformers reads the folder too."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(home))
        model: Any = m.model
        as_stored = not (m.plan and m.plan.packed)
        if type(model).__module__.startswith("transformers.") and as_stored and _as_configured(model):
            config = model.config.to_dict() | {"architectures": [type(model).__name__]}
            text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
            atomic_write(inside(home, "config.json"), text.encode())

    def facts(self, m: Member) -> dict[str, Any]:
        """The content of a member's ``plan.json``."""
        facts = json.loads((m.plan or Plan.identity(m.model)).to_json())
        spec = m.spec or self.spec
        facts["base"] = spec.to_json() if spec else {"class": type(m.model).__qualname__}
        return {**facts, "name": m.name}


@dataclass
class Models(Members):
    """Models that are not one family of classifiers: samplers, policies, models of text or graphs.

    Attributes:
        members: the models.
        inputs: an example input of one sample, as the models are called: a tensor, a tuple by position or a mapping
            by name. Cost and latency are measured with it, and exports are made with it.
        spec: how the members' base is built again, where they share one.
        cost: what training took. notes: what the user should know. logs: rows of the stages.
        tokenizer: of transformers, saved with models of text.

    Example:
        >>> made = Models([Member("line", nn.Linear(3, 2))], torch.zeros(1, 3))
        >>> made["line"].model.out_features
        2
    """

    members: list[Member]
    inputs: Any
    spec: ModelSpec | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: Any = None

    def facts(self, m: Member) -> dict[str, Any]:
        return {**super().facts(m), "inputs": describe(self.inputs)}

    def rows(self, folder: str | Path, metrics: Mapping[str, Mapping[str, Any]]) -> list[Student]:
        """Report rows of the saved members: parameters, MACs and latency of one call, bytes, and `metrics` by name."""
        rows = []
        for m in self.members:
            path, speed = Path(folder) / "students" / m.name, latency(m.model, self.inputs)
            measured = {
                "bytes": (path / WEIGHTS).stat().st_size,
                "weight_bytes": m.weight_bytes,
                "latency_p10": speed.p10_ms,
                "latency_p90": speed.p90_ms,
                "threads": speed.threads,
            }
            cost = (count_params(m.model), count_macs(m.model, self.inputs), speed.median_ms)
            rows.append(Student(m.name, f"students/{m.name}", *cost, {**metrics.get(m.name, {}), **measured}))
        return rows


def _as_configured(model: Any) -> bool:
    """Whether a model of transformers has the tensors that its configuration says: no thin pairs, no codes."""
    with torch.device("meta"):
        plain = type(model)(model.config).state_dict()
    own = model.state_dict()
    return own.keys() == plain.keys() and all(own[k].shape == plain[k].shape for k in own)


def describe(inputs: Any) -> Any:
    """An example input as JSON: every tensor becomes its shape and dtype, whole numbers with their range."""
    if isinstance(inputs, Tensor):
        facts = {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
        whole = not inputs.is_floating_point() and inputs.dtype != torch.bool and inputs.numel()
        return {**facts, "range": [int(inputs.min()), int(inputs.max())]} if whole else facts
    if isinstance(inputs, Mapping):
        return {k: describe(v) for k, v in inputs.items()}
    return [describe(v) for v in inputs]


def example_inputs(facts: Mapping[str, Any], where: str) -> Any:
    """Inputs like those that a ``plan.json`` describes (`describe`), or of its ``shape``; a batch of two.

    Zeros, and whole numbers from all over their range: token ids that exist, a mask of ones.

    Raises:
        UserError: neither is there, or they are no sizes.
    """

    def made(value: Any) -> Any:
        if isinstance(value, Mapping) and {"shape", "dtype"} <= set(value) <= {"shape", "dtype", "range"}:
            dtype, size, ends = getattr(torch, str(value["dtype"]), None), value["shape"], value.get("range", [0, 0])
            if isinstance(dtype, torch.dtype) and isinstance(size, list) and _sizes(size) and _range(ends):
                one = torch.zeros([2, *size[1:]] if size else [], dtype=dtype)
                low, high = ends
                spread = (
                    torch.linspace(low, high, one.numel()).round() if high > low else torch.full([one.numel()], low)
                )
                return one + spread.view(one.shape).to(dtype)
        elif isinstance(value, Mapping):
            return {str(k): made(v) for k, v in value.items()}
        elif isinstance(value, list):
            return tuple(made(v) for v in value)
        raise UserError(f"{where}: inputs must describe tensors by shape and dtype, got {value!r}")

    if "inputs" in facts:
        return made(facts["inputs"])
    shape = facts.get("shape")
    if not isinstance(shape, list) or not _sizes(shape):
        raise UserError(f"{where}: shape must be a list of sizes, got {shape!r}")
    return torch.zeros(2, *shape)


def _range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)


def _sizes(value: list[Any]) -> bool:
    return all(isinstance(n, int) and n > 0 for n in value)


@dataclass
class DataSet:
    """A distilled data set: tensors, and where they come from.

    Attributes:
        tensors: name to values: images, embeddings or graphs; labels; step sizes; weights. Names with a dot group
            them: ``labels``, ``labels.text`` count as labels in `bytes`.
        facts: strict JSON: the method, what the values mean (normalisation, shapes, class names), how to train on
            them, the seed.
        pictures: name to PNG, for people.

    Example:
        >>> small = DataSet({"images": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2, 10)}, {"method": "none"})
        >>> small.bytes()
        {'images': 512, 'labels': 80, 'total': 592}
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise KeyError(f"{name!r}; the set has {sorted(self.tensors)}")
        return self.tensors[name]

    def bytes(self) -> dict[str, int]:
        """Bytes of each group of tensors and of all: what a budget is to be counted in."""
        sizes: dict[str, int] = {}
        for name, t in self.tensors.items():
            group = name.partition(".")[0]
            sizes[group] = sizes.get(group, 0) + t.numel() * t.element_size()
        return {**sizes, "total": sum(sizes.values())}

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``folder/dataset/{data.safetensors, dataset.json}`` and the pictures."""
        home = Path(folder) / "dataset"
        save_tensors(home, self.tensors, {"format": FORMAT, **self.facts}, (DATA, DATA_FACTS))
        for name, png in self.pictures.items():
            atomic_write(inside(home, f"{name}.png"), png)
        return [home]


@dataclass(frozen=True)
class Query:
    """A weighted bag of terms.

    Attributes:
        id: of the question it was distilled for.
        terms: term to weight, largest magnitude first; weights may be negative.
        text: the question as it was asked.
    """

    id: str
    terms: dict[str, float]
    text: str = ""


@dataclass
class Queries:
    """Distilled queries: the outcome of a run over several questions.

    Attributes:
        queries: one per question.
        facts: strict JSON: which index, tokeniser and settings they are for.
    """

    queries: list[Query]
    facts: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Query]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``folder/queries/queries.json``."""
        home = Path(folder) / "queries"
        home.mkdir(parents=True, exist_ok=True)
        rows = [{"id": q.id, "text": q.text, "terms": q.terms} for q in self.queries]
        write_json(home / QUERIES, {"format": FORMAT, "facts": self.facts, "queries": rows})
        return [home]


def load(folder: str | Path, base: nn.Module | None = None) -> Any:
    """What a run gave, from its folder alone: a model in eval mode, a `DataSet` or `Queries`.

    Args:
        folder: ``RUN/students/NAME``, ``RUN/dataset`` or ``RUN/queries``.
        base: a network of the base's structure; needed when the run was given a live module, whose construction
            nothing on disk knows.

    Only JSON and safetensors are read. But a student of your own network names its builder, ``module:function``, and
    that function is imported and called: give `base` yourself for a folder you do not trust.

    Raises:
        UserError: files that are missing or damaged, a base that does not fit or is not known.

    Example::

        model = stillhouse.load("runs/r18/students/p50")
    """
    folder = Path(folder)
    if (folder / DATA_FACTS).exists():
        return _load_data(folder)
    if (folder / QUERIES).exists():
        return _load_queries(folder / QUERIES)
    inner = [*sorted(folder.glob("students/*")), folder / "dataset", folder / "queries"]
    if not (folder / PLAN).exists() and (there := [str(p) for p in inner if p.is_dir()]):
        raise UserError(f"{folder} is a whole run; load one thing of it: {', '.join(there)}")
    return _load_model(folder, base)


def continued(name: str) -> tuple[ModelSpec, nn.Module, Plan] | None:
    """The student in a folder ``RUN/students/NAME`` with what it is built from, for a run that goes on from it.

    Returns:
        How its base is built, the student in eval mode, its plan; None where the name is of no such folder.

    Raises:
        UserError: its base is not known by name; files that are missing or damaged.
    """
    path = Path(name) / PLAN
    if not name or not path.exists():
        return None
    facts = read_json(path)
    if "name" not in (facts.get("base") or {}):
        raise UserError(f"{name}: made from a live network, which cannot be built by name; use Python")
    return ModelSpec.from_json(facts["base"]), load(name), Plan.from_json(facts)


def _load_model(folder: Path, base: nn.Module | None) -> nn.Module:
    tensors, facts = read_tensors(folder)
    if base is None:
        known = facts.get("base") or {}
        if not isinstance(known, Mapping):
            raise UserError(f"{folder}: base in plan.json must be an object, got {known!r}")
        if "name" not in known:
            raise UserError(
                f"{folder}: this student was made from a live {known.get('class', 'network')}, which cannot be built "
                "by name; call stillhouse.load(folder, base=your_network)"
            )
        base = ModelSpec.from_json(known).build()
    plan = Plan.from_json(facts)
    model = plan.build(base)
    own, tensors = model.state_dict(), plan.decoded(tensors, model)
    for name in [*own, *tensors]:
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise UserError(f"{folder}: model.safetensors and plan.json do not fit each other, first at {name!r}")
    model.load_state_dict(tensors)
    return model.eval()


def _newer(facts: Any, path: Path) -> None:
    version = facts.get("format") if isinstance(facts, Mapping) else None
    if not isinstance(version, int):
        raise UserError(f"{path} is damaged (format is missing); make it again")
    if version > FORMAT:
        raise UserError(f"{path} was written by a newer Stillhouse (format {version}); pip install -U stillhouse")


def _load_data(folder: Path) -> DataSet:
    tensors, facts = read_tensors(folder, (DATA, DATA_FACTS))
    _newer(facts, folder / DATA_FACTS)
    pictures = {p.stem: p.read_bytes() for p in sorted(folder.glob("*.png"))}
    return DataSet(tensors, {k: v for k, v in facts.items() if k != "format"}, pictures)


def _load_queries(path: Path) -> Queries:
    found = read_json(path)
    _newer(found, path)
    try:
        rows = [
            Query(str(q["id"]), {str(t): float(w) for t, w in q["terms"].items()}, q["text"]) for q in found["queries"]
        ]
        return Queries(rows, dict(found["facts"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); make it again") from None
