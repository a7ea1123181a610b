"""TinyCLIP over live objects: a two-tower model, pairs, stages.

stillhouse run tinyclip --out runs/tinyclip
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stillhouse.data import Batches, prefetch
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, count_params, evaluating
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member, Models
from stillhouse.recipes.tinyclip.config import Config
from stillhouse.recipes.tinyclip.stages import by_hand, manual_sizes, masked, names_of, refresh, rehearse, shape_of
from stillhouse.recipes.tinyclip.system import PROJECTIONS, TinyClip
from stillhouse.students.plan import Edit, Keep, Plan
from stillhouse.students.towers import tell_sizes, towers
from stillhouse.system import Teacher, fold
from stillhouse.teachers import Frozen
from stillhouse.text.pairs import PairData
from stillhouse.weights import cosine

__all__ = ["Config", "TinyClip", "distill"]


@dataclass
class Stages(Models):
    """The students of all stages, largest first; `teacher` is what they learned from, `sizes` has a row per stage."""

    teacher: nn.Module | None = None
    sizes: list[dict[str, Any]] = field(default_factory=list)


def distill(
    run: Run,
    data: PairData,
    base: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    plan: Plan | None = None,
) -> Stages:
    """Make `base` smaller in stages; each begins with the weights of the one before, and learns from the first.

    Args:
        run: folder, seed, device.
        data: image-text pairs; no labels are used.
        base: a two-tower model like transformers' CLIPModel, or a `ModelSpec` of one (then students can be loaded from
            their folders alone). It is the teacher of all stages; nothing but ``teacher_epochs`` changes its weights.
        cfg: settings.
        network: the trained model where `base` is only a `ModelSpec`; plan: how it differs from the spec's.

    Returns:
        A student per stage, ``keep75``, ``keep50``, …

    Raises:
        UserError: settings, a model or pairs that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(base, network, run.seed)
    sizes = [] if cfg.inherit == "auto" else manual_sizes(network, cfg)
    check(network, data)
    rehearse(network, sizes)
    if cfg.teacher_epochs:
        train(run, "teacher", network.requires_grad_(True), None, data, cfg, cfg.teacher_epochs, cfg.teacher_lr)
    network.cpu().eval()
    ask, g = Frozen(network, taps=PROJECTIONS), float(network.logit_scale)  # type: ignore[arg-type]
    whole = sum(t.prunable(network) for t in towers(network))
    cost: dict[str, Any] = {"teacher_params": count_params(network)}
    made = Stages([], data.example(), spec, cost, list(data.notes), tokenizer=data.tokenizer, teacher=network)
    student, plan, sparsity = network, plan or Plan.identity(network), None
    edits: Sequence[Keep | Edit]
    for k, name in enumerate(names_of(cfg.keep)):
        if cfg.inherit == "auto":
            student, edits, sparsity = masked(
                run, name, student, ask, data, cfg, whole=whole, target=1 - cfg.keep[k], teacher_scale=g
            )
        else:
            edits = by_hand(student, sizes[k])
            student = Plan.identity(student).then(*edits).build(student)
        plan = plan.then(*edits)
        if cfg.inherit == "fresh":
            refresh(student, fold(run.seed, "fresh", k))
        tell_sizes(student)
        if cfg.epochs:
            train(run, name, student.requires_grad_(True), ask, data, cfg, cfg.epochs, cfg.lr, teacher_scale=g)
        made.members.append(Member(name, student.cpu().eval(), plan))
        left = sum(t.prunable(student) for t in towers(student))
        row = {"stage": name, "asked": cfg.keep[k], "kept": left / whole, "prunable": left, "sparsity": sparsity}
        made.sizes.append({**row, **shape_of(student)})
        made.logs += [{**row, "stage": s} for s in (f"{name}-gates", name) for row in run.log(s)]
    network.cpu()
    cost["seconds"] = time.monotonic() - began
    return made


def train(
    run: Run, name: str, model: nn.Module, teacher: Teacher | None, data: PairData, cfg: Config, epochs: float,
    lr: float, *, teacher_scale: float = 0.0,
) -> None:  # fmt: skip
    """One stage without gates, in place: by the teacher's affinities, or without one by InfoNCE alone."""
    source = prefetch(Batches(data.train, cfg.batch), run.workers)
    steps = max(1, round(epochs * source.steps_per_epoch))
    warm = 0 if cfg.inherit == "auto" and teacher else round(cfg.lr_warmup * steps)
    system = TinyClip(model, teacher, cfg, teacher_scale=teacher_scale, lr=lr, schedule=cosine(warm))
    fit(run, name, system, source, steps=steps, settings=cfg)


@torch.no_grad()
def check(network: nn.Module, data: PairData) -> None:
    """Runs the network on two pairs: what does not fit is said here."""
    towers(network)
    who = type(network).__name__
    try:
        with evaluating(network):
            said = call(network.cpu(), data.example(2))
            said.image_embeds, said.text_embeds, network.logit_scale  # noqa: B018
    except Exception as error:  # whatever a network raises about inputs it was not made for
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        longest = data.train.length
        raise UserError(
            f"{who} cannot take the pairs of {data.name} (images {tuple(data.shape)}, captions of at most {longest} "
            f"tokens out of {len(data.tokenizer)}): {why}"
        ) from None
