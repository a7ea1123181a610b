"""PELA over live objects: a trained transformer, data, a ratio.

stillhouse run pela --out runs/pela
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.data import Batches, Data, Samples, prefetch, split, together
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, count_params, evaluating, logits_of
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import optimizer_of, schedule, train_teacher
from stillhouse.recipes.pela.config import Config
from stillhouse.recipes.pela.layers import Thin, choose, refresh, thin_layers
from stillhouse.recipes.pela.system import Pela
from stillhouse.students.blocks import block_paths
from stillhouse.students.plan import Plan
from stillhouse.system import Source, fold, map_tensors
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
    if cfg.teacher_epochs:
        how = replace(cfg.moves(cfg.teacher_lr), teacher_epochs=cfg.teacher_epochs)
        train_teacher(run, "teacher", network.requires_grad_(True), data, how)
    network.cpu().eval()
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
    for model in (student, network):
        model.cpu().eval()
    inputs = data.train.take(np.arange(1))["input"]
    cost = {
        "trained_params": count_params(student),
        "teacher_params": count_params(network),
        "seconds": time.monotonic() - began,
    }
    share = sum(t.rows * t.columns for t in layers) / count_params(network)
    few_layers = f"the chosen layers hold {100 * share:.1f} % of the network's weights; PELA is for linear layers"
    made = (plan or Plan.identity(network)).then(*(t.edit for t in layers))
    return Family(
        [Member("student", student, made, spec=spec)], tuple(data.shape), tuple(data.classes), network, spec, cost,
        [{**asdict(t), "kept": t.kept, "met": t.met} for t in layers], logs=run.log("intermediate"),
        notes=[few_layers] if share < 0.1 else [], base_name="teacher",
        inputs=inputs if isinstance(inputs, Mapping) else None, tokenizer=getattr(data.train, "tokenizer", None),
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


@torch.no_grad()
def check(network: nn.Module, layers: Sequence[Thin], compare: Sequence[str], data: Data) -> None:
    """Runs the network, and one with pairs in place of the layers, on two samples: what does not fit is said here."""
    x = data.train.take(np.arange(min(2, len(data.train))))["input"]
    device = next(network.parameters()).device
    x = map_tensors(x, lambda t: t.to(device))
    with evaluating(network), tap(network, compare):
        outputs = logits_of(call(network, x)).shape[-1]
    if outputs != len(data.classes):
        raise UserError(f"the network gives {outputs} logits, but {data.name} has {len(data.classes)} classes")
    trial = copy.deepcopy(network).eval()
    with torch.random.fork_rng(devices=[]):
        for t in layers:
            thin = nn.Sequential(nn.Linear(t.columns, t.rank, bias=False), nn.Linear(t.rank, t.rows)).to(device)
            trial.set_submodule(t.module, thin)
    try:
        call(trial, x)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{type(network).__name__} does not run with pairs of layers ({error}): some module reads a layer's weight "
            "itself; --skip that layer"
        ) from None
