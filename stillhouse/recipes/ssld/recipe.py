"""SSLD over live objects: a teacher, a student, labelled images and a pool without labels."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.data import Batches, Data, Samples, Subset, prefetch
from stillhouse.data.mining import mine
from stillhouse.data.pools import Joined, Unlabelled
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import Plain, check_classes, train_teacher
from stillhouse.recipes.ssld.config import Config
from stillhouse.recipes.ssld.size import fix
from stillhouse.system import Batch, Clock, Terms
from stillhouse.taps import head
from stillhouse.teachers import Asked, Frozen, Normalisation
from stillhouse.weights import by_module, cosine

OBJECTIVES = {"symmetric": "symmetric:1?T=1", "ce": "kd:1?T=1", "js": "js:1?T=1"}


class LabelFree(Distill):
    """mean_n ½ [KL(q ‖ p) + KL(p ‖ q)], q of the teacher (detached) and p of the student, T = 1; no label is read.

    `Distill` with one objective; all that is left out is its count of right labels, which a pool does not have.
    """

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        return Terms(**super().learn(batch, clock).terms)


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teacher: nn.Module,
    pool: Samples | None = None,
    cfg: Config | None = None,
    *,
    larger: Data | None = None,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Teach `student` what `teacher` says about the training images and a mined pool; then about the former alone.

    Args:
        run: folder, seed, device.
        data: labelled training images and test images; labels are read only with ``finetune="labels"``.
        student: a live module (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        teacher: a trained network; is not changed.
        pool: further inputs of the same shape and normalisation; labels are not read. None has no pool.
        cfg: settings.
        larger: the same data with images of the size that the student is for; its last layer is then tuned to it.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        normalize, resize: of the teacher's input where it differs from the student's, as in `Frozen`.

    Returns:
        A family of one, ``student``, with the teacher as its base, for images as in `larger` where that is given.
        ``pool.json`` in the run folder says which pool images were kept, of which class and how sure the teacher was.

    Raises:
        UserError: settings, classes or shapes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    look: dict[str, Any] = {"normalize": normalize, "resize": resize}
    for part in [data, larger] if larger else [data]:
        check_classes(network, [Frozen(teacher, **look)], part.train.take(np.arange(min(4, len(part.train)))), part)
    if larger:
        head(network, larger.train.take(np.arange(2))["input"])  # says now if there is no last layer to tune
    sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=cfg.weight_decay)
    slow = by_module(network, cfg.stages(), partial(sgd, lr=cfg.lr * cfg.finetune_lr))
    if cfg.teacher_epochs:
        teacher.requires_grad_(True)
        how = Plain(teacher_epochs=cfg.teacher_epochs, batch=cfg.batch, lr=cfg.teacher_lr)
        train_teacher(run, "teacher", teacher, data, how)
    images, notes = unlabelled(run, data, pool, Frozen(teacher, **look), cfg)
    ask = Frozen(teacher, **look, batch_statistics=cfg.batch_statistics)
    free = partial(LabelFree, teacher=ask, objectives=[OBJECTIVES[cfg.objective]], label=0.0)
    later = partial(Distill, teacher=None, objectives=[]) if cfg.finetune == "labels" else free

    source = prefetch(Batches(images, cfg.batch), run.workers)
    steps = cfg.steps or max(1, round(cfg.epochs * source.steps_per_epoch))
    learner = free(network, optimizer=partial(sgd, lr=cfg.lr), lr=cosine(round(cfg.warmup * steps)))
    fit(run, "label-free", learner, source, steps=steps, settings=cfg)
    if cfg.finetune != "none":
        tuner, known = later(network, optimizer=slow, lr=cosine()), Batches(data.train, cfg.batch)
        fit(run, "fine-tune", tuner, prefetch(known, run.workers), epochs=cfg.finetune_epochs, settings=cfg)
    if larger:
        tuning = partial(later, optimizer=partial(sgd, lr=cfg.lr * cfg.fix_lr), lr=cosine())
        notes.append(fix(run, network, tuning, larger, cfg))

    cost = {
        "trained_params": count_params(network), "teacher_params": count_params(teacher), "images": len(images),
        "steps": steps, "seconds": time.monotonic() - began,
    }  # fmt: skip
    logs = [{**row, "phase": name} for name in ("label-free", "fine-tune", "fix") for row in run.log(name)]
    base = Asked(Frozen(teacher, **look), [teacher]) if normalize or resize else teacher  # measured as it is asked
    member = Member("student", network, spec=spec)
    return Family.of(larger or data, [member], base, spec, cost, notes=notes, logs=logs, base_name="teacher")


def unlabelled(run: Run, data: Data, pool: Samples | None, teacher: Frozen, cfg: Config) -> tuple[Samples, list[str]]:
    """The labelled images and what is kept of the pool, as one set without labels; and what there is to say of it."""
    if pool is None:
        return Unlabelled(data.train), [f"no pool: the {len(data.train)} labelled images alone, without their labels"]
    tests = [data.test, *data.extra.values()]

    def make() -> dict[str, Any]:
        found = mine(teacher, pool, cfg.per_class, against=tests, radius=cfg.radius, device=run.device)
        return {"position": found.positions.tolist(), "class": found.classes.tolist(),
                "score": found.scores.tolist(), "copies": found.copies}  # fmt: skip

    kept = run.memo("pool", make)
    positions = np.array(kept["position"], np.int64)
    cap = f"at most {cfg.per_class} per class; " if cfg.per_class else ""
    note = f"{len(positions)} of {len(pool)} pool images kept, {cap}{kept['copies']} left out as copies of test images"
    return Joined([Unlabelled(data.train), Unlabelled(Subset(pool, positions, own_ids=True))]), [note]
