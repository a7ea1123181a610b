"""Family: the classifiers that one run gives, their importance and their ensemble; how they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.evaluate import (
    agreement,
    classification,
    count_bytes,
    count_macs,
    count_params,
    diversity,
    fidelity,
    latency,
    predict,
)
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Members, describe
from stillhouse.report import Matrix, Student
from stillhouse.score import pack

if TYPE_CHECKING:
    from stillhouse.data import Data, Samples


@dataclass
class Family(Members):
    """The models of one run, largest budget first.

    Example (see the README for a whole one)::

        family = wml.distill(run, data, base)
        family["p50"].model(x)          # one member
        family.save("runs/mine")        # runs/mine/students/p50/{model.safetensors, plan.json}
    """

    members: list[Member]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    base: nn.Module
    spec: ModelSpec | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    budgets: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    base_name: str = ""  # the base's row in reports; without a name it has none
    inputs: Any = None  # an example input where it is not one tensor of `shape`: a mapping of token ids
    tokenizer: Any = None  # of transformers, saved with classifiers of text
    base_inputs: Any = None  # of the base, where it reads something else than its students: another vocabulary

    @classmethod
    def of(
        cls,
        data: Data,
        members: Sequence[Member],
        base: nn.Module,
        spec: ModelSpec | None = None,
        cost: dict[str, Any] | None = None,
        *,
        base_reads: str = "input",
        **known: Any,
    ) -> Self:
        """The family of models for `data`, from which it has shape, classes, tokenizer and example input.

        All models are put on the CPU and in eval mode.

        Args:
            base_reads: the entry of a batch that the base is called with, ``input`` or ``teacher`` (other token ids).
            known: further fields.
        """
        for model in (base, *(m.model for m in members)):
            model.cpu().eval()
        one = data.train.take(np.arange(1))
        return cls(
            list(members), tuple(data.shape), tuple(data.classes), base, spec, cost or {},
            inputs=one["input"] if isinstance(one["input"], Mapping) else None,
            base_inputs=None if base_reads == "input" else one[base_reads],
            tokenizer=getattr(data.train, "tokenizer", None), **known,
        )  # fmt: skip

    def facts(self, m: Member) -> dict[str, Any]:
        known: dict[str, Any] = {"classes": list(self.classes), "shape": list(self.shape)}
        if self.inputs is not None:
            known["inputs"] = describe(self.inputs)
        if not (m.spec or self.spec):  # what is given to `load`: what the student was sliced from, or its like
            known["base"] = {"class": type(self.base if m.plan else m.model).__qualname__}
        return {**super().facts(m), **known}

    def ensemble(self, logits: Sequence[Tensor]) -> Tensor:
        """Σ_i ω_i z_i of the members' logits, each (N, c)."""
        return sum(m.importance * z for m, z in zip(self.members, logits, strict=True))  # type: ignore[return-value]

    def logits(self, samples: Samples, device: Any = "cpu") -> tuple[list[Tensor], Tensor]:
        """Every member's logits on `samples`, [(N, c)], and the labels (N,)."""
        found = [predict(m.model, samples, device=device) for m in self.members]
        for m in self.members:
            m.model.cpu()
        return [z for z, _ in found], found[0][1]

    def evaluate(self, data: Data, device: Any = "cpu") -> dict[str, Any]:
        """Quality alone, fast: mean peer accuracy, per-member accuracy and NLL, the ensemble's accuracy and NLL."""
        z, y = self.logits(data.test, device)
        each = [classification(a, y) for a in z]
        both = classification(self.ensemble(z), y)
        return {
            "mean_accuracy": sum(e["accuracy"] for e in each) / len(each),
            "mean_nll": sum(e["nll"] for e in each) / len(each),
            "accuracy": {m.name: e["accuracy"] for m, e in zip(self.members, each, strict=True)},
            "nll": {m.name: e["nll"] for m, e in zip(self.members, each, strict=True)},
            "ensemble_accuracy": both["accuracy"],
            "ensemble_nll": both["nll"],
            "ensemble_ece": both["ece"],
            "diversity": diversity(z) if len(z) > 1 else 0.0,
            "importance": {m.name: m.importance for m in self.members},
        }

    def measure(self, data: Data, folder: str | Path, device: Any = "cpu") -> tuple[list[Student], dict, list[Matrix]]:
        """Everything a report says of the members: quality, size, multiply-accumulates, latency, agreement.

        Args:
            data: judged on ``data.test`` and every extra test part.
            folder: where `save` wrote the members, for their bytes on disk.
            device: where quality is measured; latency is always measured on one CPU thread.

        Returns:
            report rows (the base if it has a name, members, the ensemble of several), metrics, matrices.
        """
        example = torch.zeros(1, *self.shape) if self.inputs is None else self.inputs
        base_example = example if self.base_inputs is None else self.base_inputs
        base_params, base_macs = count_params(self.base), count_macs(self.base, base_example)
        speeds = [latency(m.model, example) for m in self.members]
        # A member as large as the base costs what the base costs: one timing, not two that differ by noise.
        whole = [
            s
            for m, s in zip(self.members, speeds, strict=True)
            if count_params(m.model) == base_params and count_macs(m.model, example) == base_macs
        ]
        base_ms = (whole[0] if whole else latency(self.base, base_example)).median_ms
        z, y = self.logits(data.test, device)
        extra = {name: self.logits(part, device) for name, part in data.extra.items()}
        rows = []
        for i, m in enumerate(self.members):
            speed = speeds[i]
            params, macs = count_params(m.model), count_macs(m.model, example)
            path = Path(folder) / "students" / m.name
            found = {k: v for k, v in classification(z[i], y).items() if k in ("accuracy", "nll", "ece")}
            found.update(
                bytes=(path / "model.safetensors").stat().st_size,
                compression=base_params / params,
                speedup=base_ms / speed.median_ms,
                latency_p10=speed.p10_ms,
                latency_p90=speed.p90_ms,
                threads=speed.threads,
            )
            if len(self) > 1:
                found["importance"] = m.importance
            found.update({f"accuracy_{k}": classification(a[i], b)["accuracy"] for k, (a, b) in extra.items()})
            rows.append(Student(m.name, f"students/{m.name}", params, macs, speed.median_ms, found))
            _compared(rows[-1], m.weight_bytes, z[i], y, data.test)
        if self.base_name:
            read = "input" if self.base_inputs is None else "teacher"
            t, _ = predict(self.base, data.test, device=device, read=read)
            self.base.cpu()
            known = {k: v for k, v in classification(t, y).items() if k in ("accuracy", "nll", "ece")}
            for row, own in zip(rows, z, strict=True):
                row.metrics.update(fidelity(t, own))
            rows.insert(0, Student(self.base_name, None, base_params, base_macs, base_ms, known, role="base"))
            _compared(rows[0], count_bytes(self.base), t, y, data.test)
        metrics: dict[str, Any] = {"base_params": base_params, "base_macs": base_macs, "task": data.facts}
        if len(self) == 1:
            return rows, {**metrics, "accuracy": rows[-1].metrics["accuracy"]}, []
        both = classification(self.ensemble(z), y)
        kept = {k: both[k] for k in ("accuracy", "nll", "ece")}
        kept.update({f"accuracy_{k}": classification(self.ensemble(a), b)["accuracy"] for k, (a, b) in extra.items()})
        metrics = {
            "mean_accuracy": sum(r.metrics["accuracy"] for r in rows if r.role == "student") / len(self),
            "ensemble_accuracy": both["accuracy"],
            "ensemble_nll": both["nll"],
            **metrics,
        }
        rows.append(Student("ensemble", None, metrics=kept, role="ensemble"))
        return rows, metrics, [Matrix("Agreement between peers", [m.name for m in self.members], agreement(z).tolist())]


def _compared(row: Student, weight_bytes: int, z: Tensor, y: Tensor, samples: Samples) -> None:
    """Adds what comparisons with other models need: bytes, a constant answer's accuracy, which samples were right."""
    row.metrics.update(weight_bytes=weight_bytes, chance=float(y.bincount().max()) / len(y))
    right = (z.argmax(1) == y) & ~z.isnan().any(1)
    row.right = {"test": samples.fingerprint, "n": len(y), "bits": pack(right.tolist())}


def names_of(ratios: Sequence[float]) -> list[str]:
    """Folder names of members by the per cent of the budget they gave up: p00, p30, p50; repeats get a letter.

    Example:
        >>> names_of([0, 0.3, 0.3, 0.875])
        ['p00', 'p30', 'p30b', 'p88']
    """
    stems = [f"p{round(100 * r):02d}" for r in ratios]
    repeats = [stems[:i].count(stem) for i, stem in enumerate(stems)]
    return [stem + ("" if k == 0 else chr(ord("a") + k) if k < 26 else f"_{k}") for stem, k in zip(stems, repeats)]
