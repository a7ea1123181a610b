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
from stillhouse.system import Batch, Clock, Terms
from stillhouse.teachers import Frozen, Normalisation
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
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        normalize, resize: of the teacher's input where it differs from the student's, as in `Frozen`.

    Returns:
        A family of one, ``student``, with the teacher as its base. ``pool.json`` in the run folder says which pool
        images were kept, of which class and how sure the teacher was.

    Raises:
        UserError: settings, classes or shapes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    look: dict[str, Any] = {"normalize": normalize, "resize": resize}
    check_classes(network, [Frozen(teacher, **look)], data.train.take(np.arange(min(4, len(data.train)))), data)
    sgd = partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)
    slowed = partial(torch.optim.SGD, lr=cfg.lr * cfg.finetune_lr, momentum=0.9, weight_decay=cfg.weight_decay)
    slow = by_module(network, cfg.stages(), slowed)
    if cfg.teacher_epochs:
        teacher.requires_grad_(True)
        how = Plain(teacher_epochs=cfg.teacher_epochs, batch=cfg.batch, lr=cfg.teacher_lr)
        train_teacher(run, "teacher", teacher, data, how)
    images, notes = unlabelled(run, data, pool, Frozen(teacher, **look), cfg)
    ask = Frozen(teacher, **look, batch_statistics=cfg.batch_statistics)
    objective = [OBJECTIVES[cfg.objective]]

    source = prefetch(Batches(images, cfg.batch), run.workers)
    steps = cfg.steps or max(1, round(cfg.epochs * source.steps_per_epoch))
    learner = LabelFree(
        network, ask, objectives=objective, label=0.0, optimizer=sgd, lr=cosine(round(cfg.warmup * steps))
    )
    fit(run, "label-free", learner, source, steps=steps, settings=cfg)
    if cfg.finetune != "none":
        taught = cfg.finetune == "teacher"
        kind, objectives = (LabelFree, objective) if taught else (Distill, [])
        tuner = kind(network, ask, objectives=objectives, label=0.0 if taught else 1.0, optimizer=slow, lr=cosine())
        known = prefetch(Batches(data.train, cfg.batch), run.workers)
        fit(run, "fine-tune", tuner, known, epochs=cfg.finetune_epochs, settings=cfg)

    for model in (network, teacher):
        model.cpu().eval()
    cost = {
        "trained_params": count_params(network), "teacher_params": count_params(teacher), "images": len(images),
        "steps": steps, "seconds": time.monotonic() - began,
    }  # fmt: skip
    members, shape, classes = [Member("student", network, spec=spec)], tuple(data.shape), tuple(data.classes)
    logs = [{**row, "phase": name} for name in ("label-free", "fine-tune") for row in run.log(name)]
    return Family(members, shape, classes, teacher, spec, cost, notes=notes, logs=logs, base_name="teacher")


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
