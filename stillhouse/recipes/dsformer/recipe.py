"""DSFormer over live objects: a trained network, data, a size.

family = distill(run, data, network, Config(ratio=0.3))
family["student"].model       # a dense and a sparse layer in place of every chosen linear one
family.save("runs/mine")      # students/student/model.safetensors: D, the values of S, and their places in a few bits
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from stillhouse.data import Batches, Data, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes, optimizer_of, schedule, train_first
from stillhouse.recipes.dsformer.config import Config
from stillhouse.recipes.dsformer.factors import Following, on_weights
from stillhouse.recipes.dsformer.sizes import Layer, layers_of
from stillhouse.students.dense_sparse import factorise, fill
from stillhouse.students.lowrank import choose, try_pairs
from stillhouse.students.parametrized import bake
from stillhouse.students.plan import Plan
from stillhouse.system import Schedule
from stillhouse.teachers import Frozen

__all__ = ["Config", "distill"]


def distill(
    run: Run,
    data: Data,
    base: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    plan: Plan | None = None,
) -> Family:
    """Store the linear weights of `base` in ``cfg.ratio`` of their bytes, and train it on so that it keeps its answers.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        base: a trained module, or a `ModelSpec` (then the student can be loaded from its folder alone). It is the
            teacher; nothing but ``teacher_epochs`` changes its weights.
        cfg: settings.
        network: the trained network where `base` is only a `ModelSpec`; plan: how it differs from the spec's.

    Returns:
        A family of one, ``student``, with the network as its base; ``budgets`` has a row per factorised layer.

    Raises:
        UserError: settings, layers, sizes or classes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(base, network, run.seed)
    paths = choose(network, cfg.modules, cfg.skip, cfg.least_outputs)
    layers_of(network, paths, replace(cfg, nonzeros=(max(cfg.nonzeros),)))  # the most values take the fewest places
    example = data.train.take(np.arange(min(2, len(data.train))))
    check_classes(network, [], example, data)
    try_pairs(network, paths, example["input"])
    train_first(run, network, data, cfg)
    layers = layers_of(network, paths, cfg)
    student = trained(run, data, copy.deepcopy(network).requires_grad_(True), Frozen(network), layers, cfg)
    cost = {
        "trained_params": count_params(student),
        "teacher_params": count_params(network),
        "seconds": time.monotonic() - began,
    }
    share = sum(x.rows * x.columns for x in layers) / count_params(network)
    made = (plan or Plan.identity(network)).then(*(x.edit for x in layers))
    return Family.of(
        data, [Member("student", student, made, spec=spec)], network, spec, cost, base_name="teacher",
        budgets=[{**asdict(x), "stored": x.stored()} for x in layers], logs=[*run.log("factorise"), *run.log("tune")],
        notes=[f"the chosen weights hold {100 * share:.1f} % of the network's parameters; the others stay as they are"],
    )  # fmt: skip


def trained(run: Run, data: Data, student: nn.Module, ask: Frozen, layers: Sequence[Layer], cfg: Config) -> nn.Module:
    """The student after both parts of its training: through the factorizer, then on the factors themselves."""
    source, how = Batches(data.train, cfg.batch), cfg.moves(cfg.lr)
    steps, whole = round(cfg.epochs * source.steps_per_epoch), schedule(data, how, cfg.epochs)
    searched = round((1 - cfg.freeze) * steps) if cfg.method in ("W", "C") else 0
    moves: dict[str, Any] = {"optimizer": optimizer_of(how), "clip": cfg.clip or None, **cfg.losses}
    if searched:
        on_weights(student, layers, cfg.method, cfg.sweeps)
        system = Following(student, ask, per_step=cfg.per_step, lr=part(whole, 0, steps), **moves)
        fit(run, "factorise", system, prefetch(source, run.workers), steps=searched, settings=cfg)
        bake(student, [x.module for x in layers])
    else:
        student = started(student, layers, cfg)
    if steps > searched:
        tuned = Distill(student, ask, lr=part(whole, searched, steps), **moves)
        fit(run, "tune", tuned, prefetch(source, run.workers), steps=steps - searched, settings=cfg)
    return student


def started(student: nn.Module, layers: Sequence[Layer], cfg: Config) -> nn.Module:
    """The factors as the factorisation of the weights alone gives them, in place of the layers."""
    for x in layers:
        w = student.get_submodule(x.module).weight
        assert isinstance(w, nn.Parameter)
        student = x.edit.apply(student)
        if x.nonzeros:
            fill(student.get_submodule(x.module), *factorise(w, x.rank, x.blocks, cfg.sweeps))  # type: ignore[arg-type]
    return student


def part(whole: Schedule, before: int, steps: int) -> Schedule:
    """The schedule of `steps` steps, as it goes on after the first `before` of them."""
    return lambda clock: whole(replace(clock, step=clock.step + before, steps=steps))
