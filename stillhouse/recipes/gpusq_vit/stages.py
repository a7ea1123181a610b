"""The two stages over live objects: sparse against the dense network, then quantised against the sparse one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.data import Batches, Data, prefetch
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.plain import optimizer_of, schedule
from stillhouse.recipes.gpusq_vit.config import Config
from stillhouse.recipes.gpusq_vit.layers import Layers, weight_of
from stillhouse.recipes.gpusq_vit.system import Sensed, factors
from stillhouse.students.activations import Inputs, calibrate, set_mode
from stillhouse.students.edits import Edit
from stillhouse.students.parametrized import bake, parametrize_weights
from stillhouse.students.projectors import NM, Half, Symmetric
from stillhouse.system import fold, map_tensors
from stillhouse.taps import tap
from stillhouse.teachers import Frozen


@dataclass
class Made:
    """A network of one of the stages, baked: how it differs from the dense one, and what was measured on the way.

    Attributes:
        masks: of the sparse layers, by path. errors: ℓ_i, the feature errors of the sparse stage.
        gap: largest difference of the logits that baking made.
    """

    model: nn.Module
    edits: list[Edit]
    masks: dict[str, Tensor]
    errors: list[float]
    gap: float


def sparsify(run: Run, data: Data, dense: nn.Module, layers: Layers, cfg: Config) -> Made:
    """The first stage: masks from the dense magnitudes, fixed; the weights that stay are trained against `dense`."""
    student = copy.deepcopy(dense).requires_grad_(True)
    masks = {p: cfg.sparsity.mask(weight_of(student, p)) for p in layers.sparse}
    mask(student, masks, cfg)
    errors = list[float]()
    if cfg.epochs:
        teacher = Frozen(dense, taps=layers.compare)
        answers = teacher if cfg.labels == "dense" else None
        how = settings(data, layers, cfg, cfg.lr, cfg.epochs)
        system = train(run, "sparse", Sensed(student, teacher, answers=answers, **how), data, cfg.epochs, cfg)
        errors = system.errors.tolist()
    elif cfg.gamma:
        errors = feature_errors(dense, student, layers.compare, samples(run, data, cfg))
    parametrize_weights(student, layers.sparse, lambda path, layer: Half())
    return baked(student.cpu(), layers.sparse, [], masks, errors, next(samples(run, data, cfg)))


def quantize(
    run: Run, data: Data, dense: nn.Module, sparse: Made, layers: Layers, cfg: Config, stage: str = "quantized"
) -> Made:
    """The second stage: the sparse network behind quantisers of weights and inputs, trained against itself.

    Args:
        dense: whose answers stand in for labels where ``cfg.labels`` asks for that.
        sparse: what `sparsify` gave. stage: its name in the run's folder.
    """
    student: nn.Module = copy.deepcopy(sparse.model).requires_grad_(True)
    inputs: list[Edit] = [Inputs(p, cfg.bits, cfg.percentile) for p in layers.quantized]
    for edit in inputs:
        student = edit.apply(student)
    calibrate(student.to(run.device), samples(run, data, cfg, run.device), cfg.momentum)
    mask(student, sparse.masks, cfg)
    parametrize_weights(student, layers.quantized, lambda path, layer: Symmetric(cfg.bits, 0))
    if cfg.quantized_epochs:
        teacher = Frozen(sparse.model, taps=layers.compare)
        answers = Frozen(dense) if cfg.labels == "dense" else None
        how = settings(data, layers, cfg, cfg.quantized_lr, cfg.quantized_epochs)
        how |= {"weights": factors(sparse.errors, cfg.weighting), "ranges": cfg.ranges, "momentum": cfg.momentum}
        train(run, stage, Sensed(student, teacher, answers=answers, **how), data, cfg.quantized_epochs, cfg)
    set_mode(student, "quantise")
    x = next(samples(run, data, cfg))
    return baked(student.cpu(), layers.quantized, inputs, sparse.masks, sparse.errors, x)


def mask(student: nn.Module, masks: dict[str, Tensor], cfg: Config) -> None:
    """Fixed masks: what is out is zero after every step, whatever momentum and weight decay do, and is not learned."""
    p = cfg.sparsity
    device = next(student.parameters()).device
    parametrize_weights(student, list(masks), lambda path, layer: NM(p.n, p.m, masks[path].to(device), unit=p.unit))


def settings(data: Data, layers: Layers, cfg: Config, lr: float, epochs: float) -> dict[str, Any]:
    """What both stages have: what is compared, what weighs how much, and the optimiser."""
    how = cfg.moves(lr)
    moves = {"optimizer": optimizer_of(how), "lr": schedule(data, how, epochs), "clip": cfg.clip or None}
    weigh = {"alpha": cfg.alpha, "beta": cfg.beta, "gamma": cfg.gamma, "T": cfg.temperature}
    return {"compare": layers.compare, **weigh, **moves}


def train(run: Run, name: str, system: Sensed, data: Data, epochs: float, cfg: Config) -> Sensed:
    source = prefetch(Batches(data.train, cfg.batch), run.workers)
    return fit(run, name, system, source, epochs=epochs, settings=cfg)


def samples(run: Run, data: Data, cfg: Config, device: Any = "cpu") -> Iterator[Any]:
    """Batches of inputs, without augmentation, of the samples that calibrate."""
    ids = np.random.default_rng(fold(run.seed, "calibrate")).permutation(len(data.train))[: cfg.calibrate]
    for part in np.split(ids, range(cfg.batch, len(ids), cfg.batch)):
        yield map_tensors(data.train.take(np.sort(part))["input"], lambda t: t.to(device))


@torch.no_grad()
def feature_errors(dense: nn.Module, student: nn.Module, compare: list[str], batches: Iterator[Any]) -> list[float]:
    """ℓ_i where no stage was trained: every layer's MSE, mean over the samples that agree; 0 where none does."""
    teacher, sums, count = Frozen(dense, taps=compare), torch.zeros(len(compare)), 0
    with evaluating(student):
        for x in batches:
            with tap(student, compare) as seen:
                z = logits_of(call(student, x))
            said = teacher({"input": x})
            same = said.logits.argmax(-1) == z.argmax(-1)
            sums += torch.stack([O.mse(said[p], seen[p])[same].sum().float().cpu() for p in compare])
            count += int(same.sum())
    return (sums / max(1, count)).tolist()


@torch.no_grad()
def baked(
    student: nn.Module, layers: list[str], edits: list[Edit], masks: dict[str, Tensor], errors: list[float], x: Any
) -> Made:
    """The projected weights of these layers in place of their sources.

    Raises:
        UserError: that changed the answers, which would be a defect.
    """
    with evaluating(student):
        want = logits_of(call(student, x))
    packs = bake(student.eval(), layers)
    gap = float((logits_of(call(student, x)) - want).abs().max())
    if not gap <= 1e-5 * max(1.0, float(want.abs().max())):
        raise UserError(f"the baked student differs from the trained one by {gap:.2g}")
    return Made(student, [*edits, *packs], masks, errors, gap)
