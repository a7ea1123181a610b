"""A ladder of students beside one teacher, over live objects: distilled, alone, pruned, quantised; to be scored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from stillhouse.comparisons import Objective, taps_of
from stillhouse.data import Batches, Data, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes
from stillhouse.recipes.distillation_metric.copies import int8, pruned
from stillhouse.score import checked_alpha
from stillhouse.system import Teacher, fold
from stillhouse.teachers import Frozen
from stillhouse.weights import cosine


@dataclass(frozen=True)
class Config:
    """Settings of a ladder and of its score; every field is a flag."""

    alpha: float = 0.5  # weight of size against score in DS, from 0 to 1; the smaller, the stricter about accuracy
    hidden: tuple[int, ...] = (4, 8, 16, 32, 64, 128)  # a student with one hidden layer for each of these widths
    alone: bool = True  # train every student also on labels alone: what distillation adds is the difference
    objective: tuple[str, ...] = ("kd:0.5?T=2",)  # what a student learns from the teacher, as in stillhouse distill
    label: float = 0.5  # weight of the labels beside it
    sparsity: float = 0.8  # part of the teacher's weights that its pruned copy sets to zero; 0 makes no such copy
    quantise: bool = True  # an eight-bit copy of the teacher
    teacher_epochs: float = 40.0  # passes over the training data for the teacher; 0 takes it as it comes
    epochs: float = 120.0  # passes over the training data for each student
    batch: int = 64  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "adamw"  # sgd has Nesterov momentum 0.9
    lr: float = 3e-3  # learning rate at the top of its cosine
    weight_decay: float = 0.01  # of all trained weights

    def __post_init__(self) -> None:
        checked_alpha(self.alpha)
        for text in self.objective:
            Objective.parse(text)
        if not self.hidden or min(self.hidden) < 1 or len(set(self.hidden)) < len(self.hidden):
            raise UserError(f"hidden: expected different widths from 1, got {self.hidden}")
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity: expected a part in [0, 1), got {self.sparsity}")
        if not (self.epochs > 0 and self.teacher_epochs >= 0 and self.batch >= 1 and self.lr > 0 and self.label >= 0):
            raise UserError(
                "expected epochs and lr > 0, teacher_epochs and label >= 0, batch >= 1, got "
                f"{self.epochs}, {self.lr}, {self.teacher_epochs}, {self.label}, {self.batch}"
            )


def ladder(data: Data, cfg: Config) -> dict[str, ModelSpec]:
    """The students of `cfg.hidden` by name: multilayer perceptrons with one hidden layer."""
    shape, classes = tuple(data.shape), len(data.classes)
    return {f"h{h}": ModelSpec("stillhouse:mlp", classes, shape, options={"widths": [h]}) for h in cfg.hidden}


def distill(
    run: Run,
    data: Data,
    teacher: nn.Module | ModelSpec,
    students: Mapping[str, ModelSpec] | None = None,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
) -> Family:
    """Trains every student under the teacher and, from the same first weights, on labels alone; copies the teacher.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        teacher: a trained network, or a network or its description that `cfg.teacher_epochs` train first.
        students: descriptions by name; None takes `ladder`.
        cfg: settings.
        network: the teacher with weights of its own where `teacher` is only a `ModelSpec`.

    Returns:
        a family with the teacher as its base: ``NAME``, ``NAME-alone``, ``pruned``, ``int8``. Its rows in a report are
        scored against the teacher (`stillhouse.report.rate`).

    Raises:
        UserError: settings, classes or features that do not fit.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, master = spec_and_network(teacher, network, fold(run.seed, "teacher"))
    named = dict(students or ladder(data, cfg))
    for model in (master, *(described.build() for described in named.values())):
        check_classes(model, [], data.train.take(np.arange(min(2, len(data.train)))), data)
    if cfg.teacher_epochs:
        teach(run, "teacher", master, None, data, cfg, cfg.teacher_epochs)
    members = []
    for name, described in named.items():
        for suffix, ask in (("", master), ("-alone", None)):
            if ask is not None or cfg.alone:
                student = described.build(seed=fold(run.seed, name))
                teach(run, name + suffix, student, ask, data, cfg, cfg.epochs)
                members.append(Member(name + suffix, student, spec=described))
    if cfg.sparsity:
        members.append(Member("pruned", pruned(master, cfg.sparsity).eval(), spec=spec))
    if cfg.quantise:
        members.append(Member("int8", *int8(master), spec=spec))
    cost = {"students": len(members), "seconds": time.monotonic() - began}
    logs = [{**row, "stage": m.name} for m in members for row in run.log(m.name)]
    return Family.of(data, members, master, spec, cost, logs=logs, base_name="teacher")


def teach(
    run: Run, stage: str, model: nn.Module, teacher: nn.Module | None, data: Data, cfg: Config, epochs: float
) -> None:
    """One network, in place: by the objectives under a teacher, without one by labels alone."""
    if cfg.optimizer == "adamw":
        optimizer: Any = partial(torch.optim.AdamW, lr=cfg.lr, weight_decay=cfg.weight_decay)
    else:
        optimizer = partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay)
    objectives = cfg.objective if teacher is not None else ()
    ask: Teacher | None = Frozen(teacher, taps=taps_of(objectives)) if teacher is not None and objectives else None
    system = Distill(
        model, ask, objectives=objectives, label=cfg.label if teacher is not None else 1.0, optimizer=optimizer,
        lr=cosine(), clip=5.0, seed=run.seed, example=data.train.take(np.arange(min(4, len(data.train)))),
    )  # fmt: skip
    fit(run, stage, system, prefetch(Batches(data.train, cfg.batch), run.workers), epochs=epochs, settings=cfg)
    model.cpu().eval()
