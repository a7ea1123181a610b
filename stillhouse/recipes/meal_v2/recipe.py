"""MEAL V2 over live objects: a trained student, trained teachers, images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from stillhouse.data import Batches, Data, mixing, prefetch
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, count_params, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import Plain, check_classes, kept, train_teacher
from stillhouse.recipes.meal_v2.config import Config
from stillhouse.recipes.meal_v2.system import Meal
from stillhouse.students.plan import Plan
from stillhouse.system import Teacher
from stillhouse.teachers import Asked, Ensemble, Frozen, Normalisation, read_by_teachers


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teachers: Sequence[nn.Module],
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    plan: Plan | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Fine-tune `student` on the mean answer of `teachers`.

    Args:
        run: folder, seed, device. data: training and test samples; training labels serve no loss unless cfg says so.
        student: a trained module (changed in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        teachers: trained networks with the data's classes in the data's order.
        cfg: settings.
        network: the trained student where `student` is only a `ModelSpec`; plan: how it differs from the spec's.
        normalize, resize: of the teachers' input where it differs from the student's, as in `Frozen`.

    Returns:
        A family of one, ``student``, whose base is the teacher, or `Asked` for the mean of several. ``before.json`` in
        the run folder holds the student's test accuracy and NLL before it was fine-tuned.

    Raises:
        UserError: no teacher, settings or classes that do not fit; said before the first step.
    """
    cfg, began, models = cfg or Config(), time.monotonic(), list(teachers)
    spec, network = spec_and_network(student, network, run.seed)
    if not models or any(m is network for m in models):
        raise UserError(f"meal_v2 needs teachers that are not the student itself, got {len(models)}; give a copy")
    example = data.train.take(np.arange(min(4, len(data.train))))
    if isinstance(example["input"], Mapping) and (normalize or resize or cfg.crops > 1 or cfg.cutmix):
        raise UserError("normalize, resize, crops and cutmix are of images, and these data are sentences")
    read = read_by_teachers(example)
    look: dict[str, Any] = {"input": read, "normalize": normalize, "resize": resize}
    check_classes(network, [Frozen(m, **look) for m in models], example, data)
    train_on_labels(run, data, network, models, cfg)
    run.memo("before", lambda: classification(*predict(network, data.test, device=run.device)))
    mean = Ensemble([Frozen(m, **look) for m in models], average="probabilities")
    ask: Teacher = mean
    if cfg.cache >= 0:
        ask = kept(run, mean, data, cfg.cache, batch=cfg.batch, topk=cfg.topk or None)
    system = Meal(network, ask, cfg, len(data.classes), run.seed)
    views = Batches(data.train, cfg.batch // cfg.crops, views=max(0, cfg.cache) // cfg.crops, copies=cfg.crops)
    source = mixing(views, len(data.classes), cutmix=cfg.cutmix)
    fit(run, "fine-tune", system, prefetch(source, run.workers), epochs=cfg.epochs, settings=cfg)
    cost = {
        "trained_params": count_params(system),
        "teacher_params": sum(map(count_params, models)),
        "steps": max(1, round(cfg.epochs * source.steps_per_epoch)),
        "seconds": time.monotonic() - began,
    }
    # Measured as it teaches: several as their mean, each with the normalisation and size it reads.
    base = models[0] if len(models) == 1 and not (normalize or resize) else Asked(mean, models)
    name = "teacher" if len(models) == 1 else "mean of the teachers"
    members, logs = [Member("student", network, plan, spec=spec)], run.log("fine-tune")
    return Family.of(data, members, base, spec, cost, base_reads=read, logs=logs, base_name=name)


def train_on_labels(run: Run, data: Data, student: nn.Module, teachers: Sequence[nn.Module], cfg: Config) -> None:
    """Trains what has not been trained yet, each in a stage of its own; `Frozen` must be made afterwards."""
    given = [(f"teacher{k}", m, cfg.teacher_epochs) for k, m in enumerate(teachers)]
    for name, model, epochs in [*given, ("start", student, cfg.student_epochs)]:
        if epochs:
            model.requires_grad_(True)
            train_teacher(run, name, model, data, Plain(teacher_epochs=epochs, batch=cfg.batch, lr=cfg.label_lr))
