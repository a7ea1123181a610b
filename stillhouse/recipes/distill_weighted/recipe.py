"""DistillNearest and DistillWeighted over live objects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse import objectives as O
from stillhouse.data import Batches, Data, Samples, prefetch, together
from stillhouse.encoders import Encoder
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, count_params, logits_of
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes
from stillhouse.recipes.distill_weighted.config import Config
from stillhouse.recipes.distill_weighted.selection import Selection, mixed, remembered
from stillhouse.system import Batch, Clock, System, Teacher, Terms, Update
from stillhouse.weights import cosine

__all__ = ["Chosen", "Config", "Weighted", "distill"]


class Weighted(System):
    """λ·mean CE(f(x_l), y) + (1−λ)·mean KL(q(x_u) ‖ softmax f(x_u)), q = Σ_s w_s q_s.

    The mixture has the same gradient as Σ_s w_s KL(q_s ‖ softmax f), from which it differs by a constant. With λ = 1
    the pool is not touched, with λ = 0 the labels are not.

    Args:
        student: f, gives logits (n, C).
        teacher: answers batches of the pool with the logits of q; None only with λ = 1.
        cfg: settings.
    """

    def __init__(self, student: nn.Module, teacher: Teacher | None, cfg: Config):
        super().__init__()
        if teacher is None and cfg.label < 1:
            raise UserError(f"label {cfg.label}: below 1 the sources must speak too; give sources, or label 1")
        if not any(p.requires_grad for p in student.parameters()):
            raise UserError("the student has no trainable parameter; if it is also a source, give a copy as the source")
        self.student, self.teacher, self.cfg = student, teacher, cfg

    def updates(self) -> Sequence[Update]:
        cfg = self.cfg
        optimizer: Any = partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay)
        if cfg.optimizer == "adamw":
            optimizer = partial(torch.optim.AdamW, lr=cfg.lr, weight_decay=cfg.weight_decay)
        return [Update("learn", list(self.student.parameters()), optimizer, lr=self.lr, clip=cfg.clip or None)]

    def lr(self, clock: Clock) -> float:
        return cosine(warmup_steps=round(self.cfg.lr_warmup * clock.steps))(clock)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        terms, share = {}, self.cfg.label
        if share > 0:
            few = batch["labelled"]
            label = O.cross_entropy(logits_of(call(self.student, few["input"])), few["label"]).mean()
            terms["label"] = label if share == 1 else share * label
        if share < 1:
            assert self.teacher is not None
            pool = batch["pool"]
            z = logits_of(call(self.student, pool["input"]))
            terms["teach"] = (1 - share) * O.kl(self.teacher(pool)["logits"], z).mean()
        return Terms(**terms)

    def outcome(self) -> nn.Module:
        return self.student


@dataclass
class Chosen(Family):
    """The student, and which sources taught it."""

    selection: Selection | None = None


def distill(
    run: Run,
    data: Data,
    pool: Samples,
    student: nn.Module | ModelSpec,
    sources: Sequence[Encoder | nn.Module],
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    cache: Path | None = None,
) -> Chosen:
    """Teach `student` what the sources with similar tasks say of the pool.

    Args:
        run: folder, seed, device.
        data: the few labelled samples as its training part, and a test part.
        pool: samples of the same task; their labels are never read.
        student: a live module (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        sources: trained networks, whatever their classes; a plain module becomes an `Encoder`.
        cfg: settings.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        cache: folder for the sources' answers, to be used by other runs on the same labels and pool too.

    Returns:
        A family of one, ``student``, with the most similar source and its linear classifier as base; `selection` has
        scores and weights.

    Raises:
        UserError: settings, classes or sources that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    example = data.train.take(np.arange(min(2, len(data.train))))["input"]
    check_classes(network.cpu(), [], {"input": example}, data)
    selection, teacher, base = None, None, network
    cost: dict[str, Any] = {"samples": len(data.train), "pool": len(pool)}
    unlabelled = Batches(pool, cfg.batch, seed_with="pool")
    parts: dict[str, Batches] = {}
    if cfg.label > 0:
        parts["labelled"] = Batches(data.train, cfg.labelled_batch)
    if cfg.label < 1:
        parts["pool"] = unlabelled
        known = [s if isinstance(s, Encoder) else Encoder(s, example) for s in sources]
        selection = remembered(run, known, data.train, cfg)
        teacher = mixed(run, known, selection, pool, cfg, cache)
        best = max(selection.kept, key=selection.weights.__getitem__)
        base = selection.teacher(known[best], best)
        cost |= {"sources": len(known), "sources_used": len(selection.kept), "base_params": count_params(base)}
    system = Weighted(network, teacher, cfg)
    steps = max(1, round(cfg.epochs * unlabelled.steps_per_epoch))
    fit(run, "distill", system, prefetch(together(**parts), run.workers), steps=steps, settings=cfg)
    cost |= {"steps": steps, "seconds": time.monotonic() - began}
    members, name = [Member("student", network, spec=spec)], "nearest source" if selection else ""
    logs = run.log("distill")
    return Chosen.of(data, members, base, spec, cost, logs=logs, base_name=name, selection=selection)
