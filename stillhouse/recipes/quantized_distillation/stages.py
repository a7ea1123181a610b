"""The trainings of a quantised distillation, one after the other, and what stands between them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data import Batches, Data, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.objectives import cross_entropy
from stillhouse.plain import optimizer_of, schedule
from stillhouse.recipes.quantized_distillation.config import Config
from stillhouse.recipes.quantized_distillation.quantizers import Bucketed, bits_for, first_points, shared_points
from stillhouse.recipes.quantized_distillation.systems import PointDistill, QuantizedDistill, weights_of
from stillhouse.students.packing import PARTS
from stillhouse.students.parametrized import bake, parametrize_weights, strip, weight_name
from stillhouse.students.projectors import Codebook
from stillhouse.system import Clock, Schedule, Source, Teacher, map_tensors
from stillhouse.teachers import Frozen


class Stages:
    """The trainings of one run, each a stage that is resumed or loaded."""

    def __init__(self, run: Run, data: Data, cfg: Config):
        self.run, self.data, self.cfg = run, data, cfg
        self.source = Batches(data.train, cfg.batch)
        self.how: dict[str, Any] = {**weights_of(cfg, len(data.classes)), "clip": cfg.clip or None}
        self.steps, self.notes, self.last = 0, list[str](), ""

    def fit(self, name: str, system: Distill, epochs: float) -> None:
        fit(self.run, name, system, prefetch(self.source, self.run.workers), epochs=epochs, settings=self.cfg)
        self.steps, self.last = self.steps + max(1, round(epochs * self.source.steps_per_epoch)), name

    def full(self, network: nn.Module, ask: Teacher | None) -> None:
        """The student in full precision."""
        cfg = self.cfg
        lr = schedule(self.data, cfg.plain(), cfg.student_epochs)
        system = Distill(network, ask, optimizer=optimizer_of(cfg.plain()), lr=lr, **self.how)
        self.fit("full", system, cfg.student_epochs)

    def quantised(self, network: nn.Module, ask: Teacher | None, layers: list[str], x: Any) -> float:
        """By the method of the settings; leaves the projectors on, and gives what baking them will change."""
        cfg = self.cfg
        if cfg.method == "dq":
            self.points("points", network, layers, cfg.epochs)
        elif cfg.method == "qd":
            self.weights("weights", network, ask, layers, cfg.epochs, schedule(self.data, cfg.plain(), cfg.epochs))
        else:
            turns = max(1, round(cfg.epochs))
            whole = schedule(self.data, cfg.plain(), turns)
            for k in range(turns):
                self.weights(f"weights{k}", network, ask, layers, 1, part_of(whole, k, turns))
                strip(network)
                if k < turns - 1:
                    self.points(f"points{k}", network, layers, 1)
                    bake(network)  # the weights become the values of the points, as in the released code
                    forget_codes(network)
            self.on(network, layers)
        return difference(network, x)

    def on(self, network: nn.Module, layers: list[str]) -> None:
        cfg = self.cfg
        make = partial(Bucketed, cfg.bits, cfg.bucket, cfg.backward, cfg.rounding == "stochastic")
        parametrize_weights(network, layers, lambda path, layer: make())

    def weights(
        self, name: str, network: nn.Module, ask: Teacher | None, layers: list[str], epochs: float, lr: Schedule
    ) -> None:
        """Quantised distillation."""
        self.on(network, layers)
        optimizer = optimizer_of(self.cfg.plain(self.cfg.quantised_lr))
        self.fit(name, QuantizedDistill(network, ask, self.cfg, optimizer=optimizer, lr=lr, **self.how), epochs)

    def points(self, name: str, network: nn.Module, layers: list[str], epochs: float) -> None:
        """Differentiable quantisation; the teacher is the student itself, unquantised."""
        cfg, teacher = self.cfg, Frozen(network, copy=True)
        moving = [p for p in network.parameters() if p.requires_grad]
        counts = [2**cfg.bits] * len(layers)
        if cfg.auto_bits:
            counts = shared_points(gradient_norms(network, layers, self.source, self.run), 2**cfg.bits)
            self.notes.append(f"{name}: points by tensor {dict(zip(layers, counts, strict=True))}")
        have = dict(zip(layers, counts, strict=True))

        def book(path: str, layer: nn.Module) -> Codebook:
            weight = getattr(layer, weight_name(layer))
            return Codebook(
                bits_for(have[path]), first_points(weight, have[path], cfg.bucket, cfg.points), cfg.bucket
            ).to(weight.device)

        parametrize_weights(network, layers, book)
        optimizer = partial(torch.optim.SGD, lr=cfg.point_lr, momentum=0.9)
        lr = schedule(self.data, cfg.plain(), epochs)
        self.fit(name, PointDistill(network, teacher, optimizer=optimizer, lr=lr, **self.how), epochs)
        for p in moving:  # what stood still for the points' sake
            p.requires_grad_(True)


def weight_of(network: nn.Module, path: str) -> Tensor:
    """The weight of a layer: what it computes with."""
    layer = network.get_submodule(path)
    return getattr(layer, weight_name(layer))


def part_of(whole: Schedule, k: int, of: int) -> Schedule:
    """The k-th of so many equal stages of one schedule."""
    return lambda clock: whole(replace(clock, step=k * clock.steps + clock.step, steps=of * clock.steps))


def forget_codes(network: nn.Module) -> None:
    """Removes what `bake` kept of the codes of weights that are trained on."""
    parts = {f"{weight}_{part}" for weight in ("weight", "in_proj_weight") for part in PARTS}
    for layer in network.modules():
        for name in [n for n in layer._buffers if n in parts]:
            del layer._buffers[name]


@torch.no_grad()
def difference(network: nn.Module, x: Any) -> float:
    """Largest difference of the logits between a network with projectors and the same one baked."""
    x = map_tensors(x, lambda t: t.to(next(network.parameters()).device))
    with evaluating(network):
        want = logits_of(call(network, x))
    flat = copy.deepcopy(network).eval()
    bake(flat)
    return float((logits_of(call(flat, x)) - want).abs().max())


def gradient_norms(
    network: nn.Module, layers: Sequence[str], source: Source, run: Run, batches: int = 5
) -> list[float]:
    """‖mean over a few batches of ∂CE/∂w‖₂ of every layer's weight, in eval mode."""
    weights = [weight_of(network, path) for path in layers]
    asked, sums = [w.requires_grad for w in weights], [torch.zeros_like(w) for w in weights]
    with evaluating(network):
        for w in weights:
            w.requires_grad_(True)
        for k in range(batches):
            clock = Clock(run.seed, "norms", step=k, steps_per_epoch=source.steps_per_epoch)
            batch = map_tensors(source.batch(clock), lambda t: t.to(run.device))
            loss = cross_entropy(logits_of(call(network.to(run.device), batch["input"])), batch["label"]).mean()
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            sums = [s if g is None else s + g / batches for s, g in zip(sums, grads, strict=True)]
    for w, was in zip(weights, asked, strict=True):
        w.requires_grad_(was)
    return [float(s.norm()) for s in sums]
