"""PELA over live objects: a trained transformer, data, a ratio.

stillhouse run pela --out runs/pela
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from stillhouse.data import Batches, Data, Samples, prefetch, split, together
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes, optimizer_of, schedule, train_first
from stillhouse.recipes.pela.config import Config
from stillhouse.recipes.pela.layers import Thin, refresh, thin_layers
from stillhouse.recipes.pela.system import Pela
from stillhouse.students.blocks import block_paths
from stillhouse.students.lowrank import choose, try_pairs
from stillhouse.students.plan import Plan
from stillhouse.system import Source, fold
from stillhouse.taps import tap
from stillhouse.teachers import Frozen

__all__ = ["Config", "Pela", "distill"]


def distill(
    run: Run,
    data: Data,
    base: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    plan: Plan | None = None,
) -> Family:
    """Make `base` thin and train it on against what it was.

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
        UserError: settings, layers, ranks or classes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(base, network, run.seed)
    layers = thin_layers(network, choose(network, cfg.modules, cfg.skip, cfg.least_outputs), cfg.ratio, cfg.rank)
    blocks = list(cfg.compare) or (block_paths(network) if cfg.feature else [])
    check(network, layers, blocks, data)
    train_first(run, network, data, cfg)
    student = thinned(network, layers)
    if cfg.start == "fresh":
        refresh(student, layers, run.seed)
    few = data.train if cfg.labelled == 1 else split(data.train, cfg.labelled, seed=fold(run.seed, "labelled"))[1]
    how = cfg.moves(cfg.lr)
    moves: dict[str, Any] = {"optimizer": optimizer_of(how), "clip": cfg.clip or None}
    moves["label_smoothing"] = cfg.label_smoothing
    if cfg.epochs:
        system = Pela(
            student, Frozen(network, taps=blocks), network, blocks=blocks, pairs=[t.module for t in layers],
            task=cfg.task, feature=cfg.feature, logits=cfg.logits, perturbation=cfg.perturbation, epsilon=cfg.epsilon,
            lr=schedule(data, how, cfg.epochs), **moves,
        )  # fmt: skip
        fit(run, "intermediate", system, source(run, data.train, few, cfg), epochs=cfg.epochs, settings=cfg)
    if cfg.tune_epochs:
        rate = schedule(replace(data, train=few), how, cfg.tune_epochs)
        tuned = Distill(student, None, objectives=(), lr=rate, **moves)
        fit(run, "fine-tune", tuned, source(run, few, few, cfg), epochs=cfg.tune_epochs, settings=cfg)
    cost = {
        "trained_params": count_params(student),
        "teacher_params": count_params(network),
        "seconds": time.monotonic() - began,
    }
    share = sum(t.rows * t.columns for t in layers) / count_params(network)
    few_layers = f"the chosen layers hold {100 * share:.1f} % of the network's weights; PELA is for linear layers"
    made = (plan or Plan.identity(network)).then(*(t.edit for t in layers))
    return Family.of(
        data, [Member("student", student, made, spec=spec)], network, spec, cost, base_name="teacher",
        budgets=[{**asdict(t), "kept": t.kept, "met": t.met} for t in layers], logs=run.log("intermediate"),
        notes=[few_layers] if share < 0.1 else [],
    )  # fmt: skip


def thinned(network: nn.Module, layers: Sequence[Thin]) -> nn.Module:
    """A copy of the network with two thin layers, from singular vectors, in place of each of these."""
    student = copy.deepcopy(network).requires_grad_(True)
    for thin in layers:
        student = thin.edit.apply(student)
    return student


def source(run: Run, every: Samples, few: Samples, cfg: Config) -> Source:
    """Batches of all samples; beside them, where labels are few, batches of the labelled ones."""
    if every is few:
        return prefetch(Batches(every, cfg.batch), run.workers)
    both = together(every=Batches(every, cfg.batch), labelled=Batches(few, min(cfg.batch, len(few)), seed_with="few"))
    return prefetch(both, run.workers)


def check(network: nn.Module, layers: Sequence[Thin], compare: Sequence[str], data: Data) -> None:
    """Runs the network, and one with pairs in place of the layers, on two samples: what does not fit is said here."""
    example = data.train.take(np.arange(min(2, len(data.train))))
    with tap(network, compare):
        check_classes(network, [], example, data)
    try_pairs(network, [t.module for t in layers], example["input"])
