"""Instance-specific label smoothing over live objects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from torch import nn

from stillhouse.calibration import certainty
from stillhouse.data import Batches, Data, prefetch, split
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import predict
from stillhouse.family import Family
from stillhouse.generations import Learner, generations
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes
from stillhouse.recipes.instance_label_smoothing.config import Config
from stillhouse.recipes.instance_label_smoothing.systems import Beta, Plain, Taught
from stillhouse.system import fold
from stillhouse.teachers import Frozen


def distill(
    run: Run, data: Data, student: nn.Module | ModelSpec, cfg: Config | None = None, *, network: nn.Module | None = None
) -> Family:
    """Train `student` on `data` with labels smoothed by `cfg.rule`; no teacher is needed.

    Args:
        run: folder, seed, device.
        data: training and test samples; the checkpoint is chosen on ``data.held_out``, or on a part set apart.
        student: a `ModelSpec`; or a live module, trained in place (not for rule ``generations``, whose networks all
            start afresh).
        cfg: settings.
        network: weights to start the first network from where `student` is a `ModelSpec`.

    Returns:
        A family: ``student``, or ``g0``, ``g1``, … of the generations. The ordinary network, not its average.

    Raises:
        UserError: settings or objects that do not fit.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, first = spec_and_network(student, network, run.seed)
    if spec is None and cfg.count > 1:
        raise UserError("rule generations starts every network afresh and needs a ModelSpec, not a live module")
    check_classes(first, [], data.train.take(np.arange(min(2, len(data.train)))), data)
    train, validation = (data.train, data.held_out) if data.held_out or not cfg.held_out else apart(data, cfg, run.seed)
    source = Batches(train, cfg.batch)

    def make(g: int, before: Sequence[nn.Module]) -> Learner:
        if spec and before:
            return Taught(spec.build(seed=fold(run.seed, "generation", g)), Frozen(before[-1]), cfg)
        return Beta(first, cfg) if cfg.rule == "beta" else Plain(first, cfg)

    made = generations(
        run, make, prefetch(source, run.workers), cfg.count, epochs=cfg.epochs, settings=cfg, validation=validation
    )
    names = ["student"] if cfg.count == 1 else [f"g{k}" for k in range(cfg.count)]
    members = [Member(n, m, importance=1 / cfg.count, spec=spec) for n, m in zip(names, made, strict=True)]
    logs = [{**row, "generation": k} for k in range(cfg.count) for row in run.log(f"generation{k}")]
    steps = max(1, round(cfg.epochs * source.steps_per_epoch)) * cfg.count
    cost = {"steps": steps, "seconds": time.monotonic() - began}
    return Family.of(data, members, deepcopy(made[0]), spec, cost, logs=logs)


def apart(data: Data, cfg: Config, seed: int) -> tuple:
    """The training samples without those on which checkpoints are chosen, and these."""
    return split(data.train, cfg.held_out, seed=fold(seed, "held out"))


def teacher_quality(family: Family, data: Data, temperature: float = 1.0) -> dict[str, dict[str, float]]:
    """Uncertainty, diversity and confidence of each member on the training samples, as its pupil would see them."""
    found = {}
    for m in family.members:
        z, y = predict(m.model, data.train)
        found[m.name] = certainty(z, y, temperature)
    return found


__all__ = ["Config", "distill", "teacher_quality"]
