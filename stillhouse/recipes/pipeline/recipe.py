"""A pipeline over live objects: every step gives a student, and all of them are one plan from the original base.

family = distill(run, data, network, Config(steps=("prune:0.5", "distill", "quantize:int8")))
family["3-quantize"].model    # plain layers; its plan says what was cut, and how its weights are stored
family.save("runs/mine")
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.data import Data
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.export import check_packages
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes
from stillhouse.recipes.pipeline.config import Config, Step
from stillhouse.recipes.pipeline.deploy import exported
from stillhouse.recipes.pipeline.steps import DO, Line
from stillhouse.students.parametrized import bake
from stillhouse.students.plan import Plan, unpacked
from stillhouse.teachers import Ensemble, Frozen, Normalisation, read_by_teachers

__all__ = ["Config", "Step", "distill"]


def distill(
    run: Run,
    data: Data,
    base: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    teacher: nn.Module | list[nn.Module] | None = None,
    network: nn.Module | None = None,
    plan: Plan | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Take `base` through the steps of `cfg`.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        base: a trained network (a live module is changed), or a `ModelSpec` (then students can be loaded from their
            folders alone; give its weights by `network`, or let the first step be ``train``).
        cfg: steps and settings.
        teacher: of the steps that learn; None is the network before the pipeline; several are averaged.
        network: the base with weights of its own where `base` is only a `ModelSpec`.
        plan: how `network` already differs from its base, where it is a student of another run.
        normalize, resize: of a given teacher's input where it differs from the student's, as in `teachers.Frozen`.

    Returns:
        A family of one member per step, ``1-prune``, ``2-distill``, …; its base is the network before the pipeline.
        ``cost["stages"]`` has what each step did.

    Raises:
        UserError: steps, classes or layers that do not fit; a budget that cannot be reached.
    """
    cfg, began = cfg or Config(), time.monotonic()
    for step in cfg.parsed:
        if step.name == "export":
            check_packages(step.value)  # now, not after all the training before it
    spec, network = spec_and_network(base, network, run.seed)
    example = data.train.take(np.arange(min(4, len(data.train))))
    given = [teacher] if isinstance(teacher, nn.Module) else list(teacher or [])
    frozen = [Frozen(m, input=read_by_teachers(example), normalize=normalize, resize=resize) for m in given]
    check_classes(network, frozen, example, data)
    network, plan = unpacked(network, plan or Plan.identity(network))  # codes of another run do not outlive a cut
    line = Line(run, data, cfg, network, plan)
    if frozen:
        line.teacher = frozen[0] if len(frozen) == 1 else Ensemble(frozen)
    members: list[Member] = []
    stages: list[dict[str, Any]] = []
    before: nn.Module | None = None
    for k, step in enumerate(cfg.parsed, 1):
        if before is None and step.name != "train":
            before = line.start()
        at, name = time.monotonic(), f"{k}-{step.name}"
        if step.name == "export":
            said = exported(run, members[-1], step, data)
        else:
            said = DO[step.name](line, name, step)
            members.append(snapshot(line, name, example["input"], spec))
        stages.append({"stage": name, "step": step.text, "what": said, "seconds": time.monotonic() - at})
    cost = {"stages": stages, "steps": line.steps, "seconds": time.monotonic() - began}
    for m in members:
        m.importance = 1 / len(members)
    base = before or line.start()
    return Family.of(data, members, base, spec, cost, base_name="base", notes=line.notes, logs=line.logs)


@torch.no_grad()
def snapshot(line: Line, name: str, x: Any, spec: ModelSpec | None) -> Member:
    """The student as it is now, its projectors baked in, with its plan from the original base.

    Raises:
        UserError: baking changed its answers, which would be a defect.
    """
    model = copy.deepcopy(line.model).cpu().eval()
    edits = bake(model)
    with evaluating(line.model):
        want, got = (logits_of(call(m, x)) for m in (line.model, model))
    if not torch.allclose(want, got, atol=1e-5, rtol=1e-5):
        raise UserError(f"{name}: the baked student differs from the trained one by {(want - got).abs().max():.2g}")
    return Member(name, model, line.plan.then(*edits), spec=spec)
