"""Weighted ground-truth self-distillation over live objects: kernel models, last layers, networks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Batches, Data, prefetch
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.family import Family
from stillhouse.generations import generations
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.plain import check_classes
from stillhouse.recipes.weighted_ground_truth_self_distillation import closed
from stillhouse.recipes.weighted_ground_truth_self_distillation.config import Config
from stillhouse.recipes.weighted_ground_truth_self_distillation.deep import Mixture, estimate
from stillhouse.recipes.weighted_ground_truth_self_distillation.last import best_chain, last_layer, parts
from stillhouse.recipes.weighted_ground_truth_self_distillation.problems import (
    KernelModel,
    Problem,
    kernel_matrix,
    landmarks,
)
from stillhouse.system import fold
from stillhouse.teachers import Frozen

MOST = 20_000  # samples whose kernel matrix is made whole
HOME = "stillhouse.recipes.weighted_ground_truth_self_distillation"


def distill(
    run: Run, what: Problem | Data, model: Any = None, cfg: Config | None = None, **more: Any
) -> Models | Family:
    """`kernel` of a `Problem`; `last_layer` or `networks` of `Data` and a model, as ``cfg.method`` says."""
    cfg = cfg or Config()
    if cfg.method == "kernel":
        if not isinstance(what, Problem):
            raise UserError(f"method kernel needs a Problem (problems.from_table, …), got {type(what).__name__}")
        return kernel(run, what, cfg)
    if not isinstance(what, Data) or model is None:
        raise UserError(f"method {cfg.method} needs Data and a model, got {type(what).__name__} and {model!r}")
    return (last_layer if cfg.method == "last-layer" else networks)(run, what, model, cfg, **more)


def kernel(run: Run, problem: Problem, cfg: Config | None = None) -> Models:
    """Kernel ridge regression, distilled into itself; nothing is trained, every step is a formula.

    Returns:
        One model, ``student``: of the step that is best on the validation part. ``logs`` has a row per step.

    Raises:
        UserError: more samples than a whole kernel matrix is made of, without landmarks; more landmarks than samples.
    """
    cfg, began = cfg or Config(), time.monotonic()
    (x, xv, xt), (y, yv, yt) = problem.standardised()
    if len(x) > MOST and not cfg.landmarks:
        raise UserError(
            f"{problem.name}: the kernel matrix of {len(x):,} samples takes {8e-9 * len(x) ** 2:.0f} GB; give "
            "--landmarks 2000, or --limit"
        )
    if cfg.landmarks > len(x):
        raise UserError(f"landmarks: expected at most the {len(x)} training samples, got {cfg.landmarks}")
    gamma = 0.0 if cfg.kernel == "linear" else cfg.gamma or 1 / x.shape[1]
    points, transform = landmarks(x, cfg.landmarks, gamma, run.seed) if cfg.landmarks else (x, None)

    def rows(inputs: Tensor) -> Tensor:
        found = kernel_matrix(inputs, points, gamma)
        return found if transform is None else found @ transform

    train = rows(x)
    size = float(train.square().sum(1).mean()) if transform is not None else float(train.diagonal().mean())
    kind = closed.Kernel if transform is None else closed.Features
    held, test = rows(xv), rows(xt)
    ridge, steps = best_chain(lambda r: kind(train, r * size), y, held, yv, cfg)
    logs = [step_row(k, s, problem, (held, yv), (test, yt)) for k, s in enumerate(steps)]
    best = min(range(len(logs)), key=lambda k: logs[k]["validation_mse"])
    found = steps[best].coefficients
    n, d, q = len(points), x.shape[1], y.shape[1]
    spec = ModelSpec(f"{HOME}.problems:KernelModel", q, (d,), options={"n": n, "d": d, "q": q, "gamma": gamma})
    model = spec.build()
    assert isinstance(model, KernelModel)
    (mean, std), (centre, scale) = problem.inputs, problem.outputs
    values = (points, found if transform is None else transform @ found, mean, std, centre, scale)
    for name, value in zip(("points", "coefficients", "mean", "std", "centre", "scale"), values, strict=True):
        getattr(model, name).copy_(value)
    cost = {"ridge": ridge * size, "best_step": best + 1, "seconds": time.monotonic() - began}
    example = torch.zeros(1, d, dtype=torch.float64)
    return Models([Member("student", model.eval(), spec=spec)], example, spec, cost, logs=logs)


def step_row(
    k: int, s: closed.Step, problem: Problem, held: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """What is known of a step: its label weight and errors, in units of the standardised targets."""
    row: dict[str, Any] = {"step": k + 1, "alpha": s.alpha}
    for name, (rows, y) in (("validation", held), ("test", test)):
        row[f"{name}_mse"] = closed.mse(rows @ s.coefficients, y)
        right = problem.accuracy(rows @ s.coefficients, y)
        if right is not None:
            row[f"{name}_accuracy"] = right
    return row


def networks(run: Run, data: Data, spec: ModelSpec, cfg: Config | None = None) -> Family:
    """Whole networks: step 1 on the labels, every further one on a mixture of labels and the step before.

    With ``cfg.weight == "optimal"`` a step first trains a network on the teacher alone, to estimate the label weight.

    Returns:
        ``g0``, ``g1``, … each with the checkpoint that was best on the held-out samples; ``logs`` of their training.

    Raises:
        UserError: a live module, of which no further networks can be built.
    """
    if not isinstance(spec, ModelSpec):
        raise UserError(f"method networks builds a network per step and needs a ModelSpec, got {type(spec).__name__}")
    cfg, began = cfg or Config(method="networks"), time.monotonic()
    first = spec.build(seed=run.seed)
    check_classes(first, [], data.train.take(np.arange(min(2, len(data.train)))), data)
    learn, held = parts(data, cfg, run.seed)
    source = prefetch(Batches(learn, cfg.batch), run.workers)
    alphas = [1.0]

    def loop(make: Any, count: int, name: str) -> list[nn.Module]:
        how = replace(cfg, steps=count)
        return generations(run, make, source, count, epochs=cfg.epochs, settings=how, validation=held, name=name)

    def make(g: int, before: Sequence[nn.Module]) -> Mixture:
        if not before:
            return Mixture(first, None, 1.0, cfg)
        student = spec.build(seed=fold(run.seed, "generation", g))
        teacher, alpha = Frozen(before[-1]), cfg.alpha
        if cfg.weight == "optimal":
            other = spec.build(seed=fold(run.seed, "on the teacher", g))
            (alone,) = loop(lambda *_: Mixture(other, teacher, 0.0, cfg), 1, f"on-teacher{g}-")
            alpha = estimate(before[0], alone, held, run.device)
        alphas.append(alpha)
        return Mixture(student, teacher, alpha, cfg)

    made = loop(make, cfg.steps, "generation")
    members = [Member(f"g{k}", m, importance=1 / cfg.steps, spec=spec) for k, m in enumerate(made)]
    weights = ", ".join(f"{a:.3f}" for a in alphas)
    logs = [{"step": 0, "generation": k, "label_weight": a} for k, a in enumerate(alphas)]
    logs += [{**row, "generation": k} for k in range(cfg.steps) for row in run.log(f"generation{k}")]
    cost, notes = {"seconds": time.monotonic() - began}, [f"weight of the labels, by step: {weights}"]
    return Family.of(data, members, deepcopy(made[0]), spec, cost, notes=notes, logs=logs)


__all__ = ["Config", "best_chain", "distill", "kernel", "last_layer", "networks"]
