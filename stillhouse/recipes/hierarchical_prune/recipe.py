"""HierarchicalPrune over live objects: a trained denoiser, examples, a budget.

stillhouse run hierarchical_prune --out runs/pruned
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.examples import Examples
from stillhouse.diffusion.process import Flow
from stillhouse.diffusion.sampling import ManySteps, Sampler, many_steps_spec
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.hierarchical_prune.config import Config
from stillhouse.recipes.hierarchical_prune.impact import Judge, impacts, scorer
from stillhouse.recipes.hierarchical_prune.parts import Part, between, choose, find_parts, left
from stillhouse.recipes.hierarchical_prune.system import Repair, common_start, rates, unfreeze
from stillhouse.students.edits import Edit
from stillhouse.students.normalfloat import NormalFloat
from stillhouse.students.parametrized import bake, parametrize_weights, weight_layers
from stillhouse.students.plan import Plan
from stillhouse.weights import by_module, cosine

__all__ = ["Config", "distill"]
Measure = Callable[[Sequence[Part], Sequence[Part]], Mapping[str, float]]


def distill(
    run: Run,
    teacher: Denoiser,
    examples: Examples,
    cfg: Config | None = None,
    *,
    spec: ModelSpec | None = None,
    judge: Judge | None = None,
) -> Sampler:
    """Removes the parts of a diffusion transformer that matter least, repairs what comes behind them, packs the rest.

    Args:
        run: folder, seed, device.
        teacher: the trained network with its process; its weights stay (half precision becomes float32).
        examples: clean samples and their conditions.
        cfg: settings.
        spec: how the network is built again; found by itself for classes of diffusers.
        judge: ``judge(samples, conditions)`` -> a score, or one per sample, higher is better, in place of ``metric``.

    Returns:
        A `Sampler` with the members ``student`` and, unless ``pack`` is none, ``student-nf4``; ``cost`` says which part
        of the parameters stays, ``notes`` what was removed.

    Raises:
        UserError: no blocks, a budget that cannot be met, nothing left to learn, examples that do not fit.
    """
    cfg, began, one = cfg or Config(), time.monotonic(), examples.rows([0])
    whole = sampled(teacher, one, cfg).to(run.device)
    every, total = find_parts(whole), count_params(whole)
    measure = partial(impacts, run, whole, cache(partial(scorer, run, whole, examples, cfg, judge)), cfg.leaves)
    gone = choose(
        every, between(every, cfg.chosen_from, cfg.low, cfg.high), total, mode=cfg.mode, budget=cfg.budget,
        named=cfg.blocks, remeasure=cfg.remeasure, measure=measure,
    )  # fmt: skip
    plan, stays = Plan.identity(whole).then(*(p.edit(cfg.leaves) for p in gone)), left(gone, every, total)
    student: Any = plan.build(whole)
    student.denoiser.check(one.x0.to(run.device), one.conditions)
    trained = repair(run, student, whole, examples, every, gone, measure, cfg) if cfg.steps else 0
    for model in (whole, student):
        model.cpu().eval().requires_grad_(False)
    built = spec_of(student, teacher.network, spec)
    members = [Member("student", student, plan, spec=built)]
    if cfg.pack == "nf4":
        packed, edits = in_nf4(student)
        members.append(Member("student-nf4", packed, plan.then(*edits), spec=built))
    inputs = {"x_t": torch.zeros_like(one.x0), "t": torch.tensor([teacher.process.at(0.5)])}
    if one.conditions is not None:
        inputs["condition"] = one.conditions
    cost = {"trained_params": trained, "teacher_params": total, "stays": stays, "seconds": time.monotonic() - began}
    notes = ["removed: " + (", ".join(p.module.removeprefix("network.") for p in gone) or "nothing")]
    return Sampler(members, inputs, cost=cost, notes=notes, logs=run.log("repair"))


def sampled(teacher: Denoiser, one: Examples, cfg: Config) -> ManySteps:
    """The teacher as it is to be sampled from, around the same network.

    Raises:
        UserError: it is no module, or no denoiser for these examples.
    """
    if not isinstance(teacher.network, nn.Module):
        raise UserError(f"pruning needs a torch.nn.Module, got {type(teacher.network).__name__}")
    teacher.freeze().check(one.x0, one.conditions)
    if next(teacher.network.parameters(), one.x0).dtype in (torch.float16, torch.bfloat16):
        teacher.network.float()  # it may be read in half precision; what trains may not be
    how = {"null": teacher.null, "steps": cfg.sample_steps, "kappa": cfg.kappa}
    return ManySteps(teacher.network, teacher.process, teacher.prediction, one.x0.shape[1:], **how)


def repair(
    run: Run,
    student: ManySteps,
    whole: ManySteps,
    examples: Examples,
    every: Sequence[Part],
    gone: Sequence[Part],
    measure: Measure,
    cfg: Config,
) -> int:
    """Trains what may learn, in place; how many numbers these are."""
    factors: dict[str, float] = {}
    removed_most = left(gone, every, count_params(whole)) < 0.75
    if cfg.sensitivity == "impact" or (cfg.sensitivity == "auto" and removed_most):
        kept = [p for p in every if p.component in cfg.chosen_from and not any(p.touches(g) for g in gone)]
        factors = rates(measure(kept, ()))
    blocks = [p for p in every if p.component == "block"]
    trained = unfreeze(
        student, [b.module for b in blocks], [p.module for p in gone], factors,
        everything=cfg.train == "all", listed=cfg.train_blocks,
    )  # fmt: skip
    learn = [b.module for b in blocks if b not in gone and _learns(student.get_submodule(b.module))]
    kind: Any = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.SGD
    optimizer = by_module(student, factors, partial(kind, lr=cfg.lr, weight_decay=cfg.weight_decay))
    system = Repair(
        student, whole, learn, weights=(cfg.task, cfg.output, cfg.feature), weighting=cfg.weighting, drop=cfg.drop,
        optimizer=optimizer, lr=cosine() if cfg.decay else None, clip=cfg.clip,
    )  # fmt: skip
    source = examples.noised(cfg.batch, partial(times, whole, cfg))
    one = examples.rows([0])
    at = (one.x0.to(run.device), torch.tensor([whole.process.at(0.5)], device=run.device), one.conditions)
    with common_start(student, whole, blocks, gone, at) if system.asks else nullcontext():
        fit(run, "repair", system, source, steps=cfg.steps, settings=cfg)
    return trained


def times(whole: ManySteps, cfg: Config, n: int, generator: torch.Generator) -> Tensor:
    """n training times, (n,)."""
    if isinstance(whole.process, Flow):
        return whole.process.drawn(n, cfg.density, generator)
    return whole.process.times(n, 0.0, 1.0, generator)


def in_nf4(student: ManySteps) -> tuple[ManySteps, list[Edit]]:
    """A copy whose linear layers have NF4 weights, and the edits with which a plan stores their codes."""
    packed = copy.deepcopy(student)
    parametrize_weights(packed, weight_layers(packed, (nn.Linear,)), lambda path, layer: NormalFloat())
    edits = bake(packed)
    return packed.eval().requires_grad_(False), edits


def spec_of(student: ManySteps, network: Any, spec: ModelSpec | None) -> ModelSpec | None:
    """How the whole network is built again; None for one of the user's own, which nothing on disk knows."""
    try:
        return many_steps_spec(student, spec or ModelSpec.of(network))
    except UserError:
        return None


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
