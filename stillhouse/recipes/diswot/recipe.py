"""DisWOT: search without training, then distillation of what was found.

The whole run, on built-in digits::

    stillhouse run diswot --out runs/diswot

From Python, with a teacher, data and a space of your own::

    found = diswot.distill(run, data, teacher, diswot.Config(budget=100_000), space=space)
    found.search.ranking()[0].arch
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.comparisons import Objective, taps_of
from stillhouse.data import Batches, Data
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params, evaluating
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.diswot.config import Config
from stillhouse.recipes.diswot.scoring import Scorer
from stillhouse.search import Search, cost_of, search, student
from stillhouse.spaces import StudentSpace, named
from stillhouse.system import fold
from stillhouse.taps import ends
from stillhouse.teachers import Frozen
from stillhouse.weights import cosine

__all__ = ["Config", "Found", "distill", "train"]


@dataclass
class Found(Family):
    """The trained students, largest first; `base` is the teacher, `search` what was seen on the way."""

    search: Search | None = None

    def facts(self, m: Member) -> dict[str, Any]:
        facts = super().facts(m)  # of a live network only its own class is known, not the teacher's
        return facts if m.spec else {**facts, "base": {"class": type(m.model).__qualname__}}


def distill(
    run: Run,
    data: Data,
    teacher: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    space: StudentSpace | None = None,
    network: nn.Module | None = None,
) -> Found:
    """Choose students for `teacher` without training them, then train the best with it.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        teacher: a trained network (never changed), or a `ModelSpec`, which is trained on the labels first.
        cfg: settings.
        space: of the students; None takes the one that cfg.space names.
        network: the teacher with weights of its own, where `teacher` is only a `ModelSpec`.

    Returns:
        The trained students, the search's history, what each part cost.

    Raises:
        UserError: settings that cannot be; a budget that no student meets; a teacher that cannot be compared.
    """
    cfg = cfg or Config()
    spec = teacher if isinstance(teacher, ModelSpec) else None
    space = space or named(cfg.space, data.shape, len(data.classes))
    if spec is not None and network is None and not cfg.teacher_epochs:
        raise UserError("teacher_epochs 0: a teacher by name starts untrained; give --teacher-epochs or --pretrained")
    if network is None:
        network = teacher.build(seed=run.seed) if isinstance(teacher, ModelSpec) else teacher
    limit = cfg.budget or run.memo("budget", lambda: cost_of(network, cfg.measure, torch.zeros(1, *data.shape)))
    first = cfg.scoring == "trained"  # else the search needs its architecture alone
    cost: dict[str, Any] = {}

    def teach() -> None:
        began = time.monotonic()
        if spec is not None and cfg.teacher_epochs:
            train(run, "teacher", network, None, data, cfg, cfg.teacher_epochs)
        cost["teacher_seconds"] = time.monotonic() - began

    if first:
        teach()
    scorer = Scorer(run, space, data.train, network, spec, cfg)
    seen = search(
        run, space, scorer, data.shape, strategy=cfg.strategy, evaluations=cfg.evaluations, population=cfg.population,
        sample=cfg.sample, best=cfg.best, measure=cfg.measure, limit=limit, settings=cfg,
    )  # fmt: skip
    chosen = [c for c in seen.ranking() if c.score is not None][: cfg.students]
    if not chosen:
        raise UserError(f"none of the {len(seen.history)} students passes anything on from input to output; search on")
    if not first:
        teach()
    members, began = [], time.monotonic()
    for rank, c in enumerate(chosen):
        seed = fold(run.seed, "train", c.arch)
        model, its = student(space, c.arch, seed)
        model = train(run, f"student{rank}", model, network, data, cfg, cfg.epochs)
        members.append(Member(f"best{rank + 1}", model.eval(), importance=1 / len(chosen), spec=its))
    members.sort(key=lambda m: -count_params(m.model))
    cost.update(
        scoring_seconds=seen.seconds, evaluations=len(seen.history), students_scored=len(seen.ranking()),
        training_seconds=time.monotonic() - began,
    )  # fmt: skip
    logs = [row for rank in range(len(chosen)) for row in run.log(f"student{rank}")]
    return Found(
        members, tuple(data.shape), tuple(data.classes), network, cost=cost, notes=scorer.notes, logs=logs,
        base_name="teacher", search=seen,
    )  # fmt: skip


def train(
    run: Run, name: str, model: nn.Module, teacher: nn.Module | None, data: Data, cfg: Config, epochs: float
) -> nn.Module:
    """One stage: labels alone, or (1−α) CE + α KD + b1·R + b2·ICC with a teacher (DisWOT+ where b1 or b2 is not 0)."""
    source, example = Batches(data.train, cfg.batch), data.train.take(np.arange(min(8, len(data.train))))
    objectives: list[Objective] = []
    if teacher is not None:
        objectives.append(Objective("kd", cfg.alpha, options={"T": cfg.T}))
        if cfg.b1 or cfg.b2:
            mine, its = (_features(m, example["input"]) for m in (model, teacher))
            objectives += [Objective("similarity", cfg.b1, mine, its), Objective("icc", cfg.b2, mine, its)]
    objectives = [o for o in objectives if o.weight]
    system = Distill(
        model,
        Frozen(teacher, taps=taps_of(objectives), copy=True) if teacher is not None and objectives else None,
        objectives=objectives,
        label=1.0 if teacher is None else 1 - cfg.alpha,
        example=example,
        seed=run.seed,
        optimizer=partial(_sgd, lr=cfg.lr, decay=cfg.weight_decay),
        lr=cosine(),
    )
    fit(run, name, system, source, epochs=epochs, settings=cfg)
    return model.cpu().eval()


def _sgd(params: Sequence[Tensor], lr: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=decay, nesterov=True)


def _features(model: nn.Module, x: Tensor) -> str:
    with evaluating(model):
        return ends(model, x[:2]).features
