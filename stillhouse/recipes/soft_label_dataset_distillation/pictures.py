"""A distilled set for people: images with their labels, nearest words, step sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.outcomes import DataSet
from stillhouse.report import Curve, Table, grid

MOST = 100  # samples that are shown


def preview(dataset: DataSet) -> bytes | None:
    """The images as a PNG, all on one scale (from their 2 % to their 98 % quantile); None for other samples."""
    x = dataset.tensors.get("images")
    if x is None or x.dim() != 4 or x.shape[1] not in (1, 3):
        return None
    x = x[:MOST].float()
    ends = torch.quantile(x.flatten()[:1_000_000], torch.tensor([0.02, 0.98]))
    images = (x - ends[0]) / (ends[1] - ends[0]).clamp(min=1e-6)
    captions = [caption(y, dataset.facts["classes"]) for y in dataset["labels"][:MOST]]
    return grid(images, columns=5 if len(x) <= 5 else 10, captions=captions, side=112)


def caption(y: Tensor, classes: Sequence[str], most: int = 2) -> str:
    """The label entries of largest magnitude, largest first."""
    if y.dim() == 0:
        return str(classes[int(y)])[:9]
    if len(y) == 1:
        return f"{classes[1][:9]} {float(y):+.1f}"
    top = y.abs().argsort(descending=True, stable=True)[:most].tolist()
    return " ".join(f"{str(classes[c])[:5]}{float(y[c]):+.1f}" for c in top)


def label_table(dataset: DataSet) -> list[Table]:
    """One row per sample: what it started from, its label, for sentences its nearest words."""
    facts, labels = dataset.facts, dataset["labels"]
    names, words = facts["classes"], facts.get("nearest_words")
    if len(names) > 20 and not words:
        return []
    shown = [names[1]] if labels.shape[1] == 1 else names
    rows = []
    for i, y in enumerate(labels[:MOST]):
        row = [names[facts["starting_classes"][i]], *(f"{v:+.2f}" for v in y.tolist())]
        rows.append([i, *row, *([words[i]] if words else [])])
    columns = ["sample", "started as", *shown, *(["nearest words"] if words else [])]
    note = "labels are targets of a cross-entropy, not probabilities: they may be negative and sum to anything"
    return [Table("Learned labels", columns, rows, note)]


def step_size_curve(dataset: DataSet, rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The learned step sizes, and the real loss while they were learned."""
    sizes = dataset["step_sizes"].tolist()
    done = [r["step"] for r in rows if "real" in r]
    loss = [r["real"] for r in rows if "real" in r]
    return [
        Curve("Real loss after training on the set", "outer step", "nats", {"real loss": (done, loss)}),
        Curve("Learned step sizes", "training step", "step size", {"η": (list(range(len(sizes))), sizes)}),
    ]
