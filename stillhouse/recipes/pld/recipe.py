"""PLD over live objects: plain distillation with the one objective ``pld``, and what the teacher's certainty means.

Per sample, s the student's logits, t the teacher's, y the label; π has y first and then the others by descending t:

    L = Σ_k q_{π_k} [ log Σ_{l≥k} exp(s_{π_l}) − s_{π_k} ],   q = softmax(t/τ)

There is no other term: the first bracket is the cross-entropy of the label, weighted by what the teacher gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from stillhouse import plain
from stillhouse.data import Data
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.teachers import Ensemble, Frozen, Normalisation, read_by_teachers

SURE = 0.95  # a teacher that gives its training labels more than this leaves nothing of (1) but the cross-entropy


@dataclass(frozen=True)
class Config:
    """Settings of a PLD run; every field is a flag."""

    temperature: float = 4.0  # of the teacher's weights alone; the paper has 4 for CIFAR, 1 for ImageNet; inf: ListMLE
    topk: int = 0  # rank only the label and so many of the teacher's best others; 0 ranks all
    teacher_epochs: float = 0.0  # train the teacher first, for so many passes; 0 takes it as it comes
    cache: int = -1  # ask the teacher once for so many augmented views and keep its logits; 0: plain view; -1: live
    epochs: float = 30.0  # passes over the training data; the paper has 250 on CIFAR, 100 on ImageNet
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    lr: float = 1e-3  # learning rate at the top of its cosine
    lr_warmup: float = 0.05  # part of the run over which the learning rate rises
    weight_decay: float = 0.5  # of all trained weights; the paper's for AdamW, a thousand times too much for sgd
    clip: float = 5.0  # largest gradient norm

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature: expected a positive number, got {self.temperature}")
        if self.topk < 0:
            raise UserError(f"topk: expected 0 (all classes) or a number of classes, got {self.topk}")
        self.as_plain()

    @property
    def objective(self) -> str:
        """The loss, as ``stillhouse distill --objective`` takes it."""
        return f"pld:1?T={self.temperature!r}&topk={self.topk}"

    def as_plain(self, objective: tuple[str, ...] | None = None, label: float = 0.0) -> plain.Plain:
        """The same run as a plain distillation, also by another objective: what a baseline takes."""
        return plain.Plain(
            objective=(self.objective,) if objective is None else objective, label=label, cache=self.cache,
            teacher_epochs=self.teacher_epochs, epochs=self.epochs, batch=self.batch, optimizer=self.optimizer,
            lr=self.lr, lr_warmup=self.lr_warmup, weight_decay=self.weight_decay, clip=self.clip,
        )  # fmt: skip


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teacher: nn.Module | Sequence[nn.Module],
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Teach `student` the label first and then the teacher's order.

    For rankers, a sample is a list: the networks give one score per candidate, (n, L), and the label is the place of
    the positive one (`stillhouse.recipes.pld.lists`). Arguments, result and errors are those of
    `stillhouse.plain.distill`; ``cost["teacher_on_label"]`` is the mean weight q_y of the label's term.
    """
    cfg = cfg or Config()
    how = {"network": network, "normalize": normalize, "resize": resize}
    family = plain.distill(run, data, student, teacher, cfg.as_plain(), **how)  # type: ignore[arg-type]
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    read = read_by_teachers(data.train.take(np.arange(1)))
    ask = Ensemble([Frozen(m, input=read, normalize=normalize, resize=resize) for m in models])
    family.cost["teacher_on_label"] = sure = on_label(ask, data, cfg.temperature)
    said = f"the teacher gives the training labels {sure:.3f} of its weight at temperature {cfg.temperature:g}"
    if sure > SURE:
        said += ", so that the loss is nearly cross-entropy alone; a higher --temperature lets the order speak"
    family.notes.append(said)
    return family


def on_label(teacher: Ensemble, data: Data, temperature: float, most: int = 256) -> float:
    """Mean q_y = softmax(t/τ)_y over (at most 256) training samples: the weight of the label's term."""
    batch = data.train.take(np.arange(0, len(data.train), -(-len(data.train) // most)))
    q: Tensor = (teacher(batch).logits / temperature).softmax(-1)
    return float(q.gather(1, batch["label"][:, None]).mean())
