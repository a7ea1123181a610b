"""SWS over live objects: a network, a teacher, data, the depths that are wanted.

stillhouse run sws_learngene --out runs/sws
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from stillhouse.comparisons import Objective
from stillhouse.data import Batches, Data, mixing, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes, optimizer_of, schedule, train_teacher
from stillhouse.recipes.sws_learngene.config import Config
from stillhouse.recipes.sws_learngene.gene import Gene, learned, set_drop_path, shared
from stillhouse.system import Teacher, fold
from stillhouse.teachers import Ensemble, Frozen, Normalisation, read_by_teachers

__all__ = ["Config", "Gene", "auxiliary", "descend", "distill"]


def distill(
    run: Run,
    data: Data,
    base: nn.Module | ModelSpec,
    teacher: nn.Module | Sequence[nn.Module],
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    **look: Any,
) -> Family:
    """Train the learngene once, and from it a network of every wanted depth.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        base: a network with a list of alike blocks: a live module, or a `ModelSpec` (then networks can be loaded from
            their folders alone). Not changed.
        teacher: a trained network; several are averaged.
        cfg: settings.
        network: the base with weights of its own where `base` is only a `ModelSpec`.
        look: ``normalize``, ``resize`` of the teacher's input, as in `Frozen`.

    Returns:
        A family: ``learngene`` (importance 0) and one ``dNN`` per depth; its base is the auxiliary network.

    Raises:
        UserError: settings, blocks or classes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    whole, gene, teaching = auxiliary(run, data, base, teacher, cfg, network=network, **look)
    family = descend(run, data, gene, cfg)
    family.base, family.base_name = whole, "auxiliary"
    family.logs = run.log("auxiliary") + family.logs
    family.cost |= {**teaching, "seconds": time.monotonic() - began}
    return family


def auxiliary(
    run: Run,
    data: Data,
    base: nn.Module | ModelSpec,
    teacher: nn.Module | Sequence[nn.Module],
    cfg: Config,
    *,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> tuple[nn.Module, Gene, dict[str, Any]]:
    """Stage 1: the network whose stages share one block each, taught by `teacher`; arguments as for `distill`.

    Returns:
        The trained auxiliary network, its gene, and what that took.
    """
    spec, network = spec_and_network(base, network, run.seed)
    aux, path, stages = shared(network, cfg.blocks, cfg.depth, cfg.stages, cfg.genes)
    set_drop_path(aux, path, cfg.drop_path)
    example = data.train.take(np.arange(min(4, len(data.train))))
    read = read_by_teachers(example)
    if cfg.mixup and (isinstance(example["input"], Mapping) or read == "teacher"):
        raise UserError("mixup mixes images, and these data are sentences; give --mixup 0")
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    for k, model in enumerate(models if cfg.teacher_epochs else []):
        how = replace(cfg.moves(cfg.teacher_lr, cfg.lr_warmup), teacher_epochs=cfg.teacher_epochs)
        train_teacher(run, f"teacher{k or ''}", model, data, how)
    frozen = [Frozen(m, input=read, normalize=normalize, resize=resize) for m in models]
    check_classes(aux, frozen, example, data)
    ask: Teacher = frozen[0] if len(frozen) == 1 else Ensemble(frozen)
    weight = cfg.alpha / len(data.classes) if cfg.element_mean else cfg.alpha
    how = cfg.moves(cfg.lr, cfg.lr_warmup)
    system = Distill(
        aux, ask, objectives=[Objective("kd", weight, options={"T": cfg.temperature})], label=1 - cfg.alpha,
        optimizer=optimizer_of(how), lr=schedule(data, how, cfg.epochs), clip=cfg.clip or None,
    )  # fmt: skip
    source = mixing(Batches(data.train, cfg.batch), len(data.classes), mixup=cfg.mixup)
    fit(run, "auxiliary", system, prefetch(source, run.workers), epochs=cfg.epochs, settings=cfg)
    for model in (aux, network, *models):
        model.cpu().eval()
    set_drop_path(aux, path, 0.0)
    cost = {"teacher_params": sum(map(count_params, models)), "auxiliary_params": count_params(aux)}
    return aux, learned(aux, network, path, stages, spec, data.classes), {**cost, "stages": list(stages)}


def descend(run: Run, data: Data, gene: Gene, cfg: Config) -> Family:
    """Stages 2 and 3: a network of every wanted depth out of the gene, tuned on the labels for a few passes.

    Where the classes are not the gene's, the head starts fresh.
    """
    began, own = time.monotonic(), gene.for_classes(data.classes, fold(run.seed, "head"))
    members = [own.member(d, 1 / len(cfg.depths)) for d in sorted(cfg.depths)]
    for m in members:
        tune(run, f"tune-{m.name}", data, m.model, own.path, cfg)
    gene_member = Member("learngene", own.network, own.plan, 0.0, own.spec)
    separate = sum(count_params(m.model) for m in members)
    cost = {
        "stored_params": count_params(own.network),
        "separate_params": separate,
        "seconds": time.monotonic() - began,
    }
    logs = [{**row, "name": m.name} for m in members for row in run.log(f"tune-{m.name}")]
    return Family.of(data, [gene_member, *members], own.network, own.spec, cost, logs=logs)


def tune(run: Run, name: str, data: Data, model: nn.Module, path: str, cfg: Config) -> None:
    """Labels alone, in place, for ``tune_epochs``."""
    if not cfg.tune_epochs:
        return
    set_drop_path(model, path, cfg.drop_path)
    how = cfg.moves(cfg.tune_lr, 0.0)
    system = Distill(
        model, None, objectives=(), optimizer=optimizer_of(how), lr=schedule(data, how, cfg.tune_epochs),
        clip=cfg.clip or None, label_smoothing=cfg.label_smoothing,
    )  # fmt: skip
    source = mixing(Batches(data.train, cfg.batch), len(data.classes), mixup=cfg.mixup)
    fit(run, name, system, prefetch(source, run.workers), epochs=cfg.tune_epochs, settings=cfg)
    model.cpu().eval()
    set_drop_path(model, path, 0.0)
