"""Quantised distillation over live objects: a student, its teacher, and weights of a few bits.

family = distill(run, data, student, teacher, Config(bits=2))
family["q2"].model            # plain layers whose weights have four values per bucket
family.save("runs/mine")      # students/q2/model.safetensors holds two bits a weight
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import numpy as np
from torch import nn

from stillhouse.data import Data
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes, train_teacher
from stillhouse.recipes.quantized_distillation.config import Config
from stillhouse.recipes.quantized_distillation.stages import Stages, weight_of
from stillhouse.students.parametrized import bake, weight_layers, weight_name
from stillhouse.students.plan import Plan
from stillhouse.teachers import Ensemble, Frozen, Normalisation, read_by_teachers

KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teacher: nn.Module | Sequence[nn.Module],
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Give `student` weights of a few bits under `teacher`.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        student: a live module (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        teacher: a trained network; several are averaged (logits); none, an empty sequence, where ``cfg.kd`` is 0.
        cfg: settings.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        normalize, resize: of the teacher's input where it differs from the student's, as in `teachers.Frozen`.

    Returns:
        A family of two, ``full`` in full precision and ``qB`` with B bits, and the first teacher as its base.

    Raises:
        UserError: settings, layers or classes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    if not models and cfg.kd and (cfg.student_epochs or cfg.method != "dq"):
        raise UserError("a teacher is needed: give one, or kd=0, or a trained student, student_epochs=0 and method dq")
    layers = layers_of(network, cfg.include, cfg.exclude)
    example = data.train.take(np.arange(min(4, len(data.train))))
    read = read_by_teachers(example)
    frozen = [Frozen(m, input=read, normalize=normalize, resize=resize) for m in models]
    check_classes(network, frozen, example, data)
    for k, model in enumerate(models if cfg.teacher_epochs else []):
        model.requires_grad_(True)
        train_teacher(run, f"teacher{k or ''}", model, data, cfg.plain())
    frozen = [Frozen(m, input=read, normalize=normalize, resize=resize) for m in models]
    ask = (frozen[0] if len(frozen) == 1 else Ensemble(frozen)) if frozen else None
    stages = Stages(run, data, cfg)
    if cfg.student_epochs:
        stages.full(network, ask)
    full = copy.deepcopy(network).cpu().eval()
    gap = stages.quantised(network, ask, layers, example["input"])
    count = sum(weight_of(network, path).numel() for path in layers)
    plan = Plan.identity(full).then(*bake(network))
    members = [
        Member("full", full, importance=0.0, spec=spec),
        Member(f"q{cfg.bits}", network.cpu().eval(), plan, spec=spec),
    ]
    cost = {"steps": stages.steps, "seconds": time.monotonic() - began, "baked_difference": gap}
    part = 100 * count / count_params(full)
    notes = [f"quantised: the weights of {len(layers)} layers, {part:.1f} % of the parameters", *stages.notes]
    base, reads = (models[0], read) if models else (full, "input")
    return Family.of(
        data, members, base, spec, cost, base_reads=reads, base_name="teacher" if models else "", notes=notes,
        logs=run.log(stages.last),
    )  # fmt: skip


def layers_of(network: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Paths of the layers whose weight can be quantised; of an nn.MultiheadAttention its packed projections.

    Raises:
        UserError: there is none, or a pattern that names no module or one of another kind.
    """
    found = weight_layers(network, KINDS, include, exclude)
    found = [p for p in found if getattr(layer := network.get_submodule(p), weight_name(layer)) is not None]
    if not found:
        raise UserError(f"{type(network).__name__} has no layer to quantise ({', '.join(k.__name__ for k in KINDS)})")
    return found
