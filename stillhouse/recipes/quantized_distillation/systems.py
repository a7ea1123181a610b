"""What is trained: weights behind a quantiser, or the points of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.comparisons import Objective
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of
from stillhouse.objectives import cross_entropy, kl
from stillhouse.recipes.quantized_distillation.config import Config
from stillhouse.recipes.quantized_distillation.quantizers import Bucketed, step_seed
from stillhouse.students.parametrized import projectors
from stillhouse.students.projectors import Codebook
from stillhouse.system import Batch, Clock, Terms, map_tensors


def weights_of(cfg: Config, classes: int) -> dict[str, Any]:
    """Objectives and label weight of `Distill`: kd · T² KL (per sample, or also over C) + (1−kd) · CE."""
    share = cfg.kd / (classes if cfg.reduction == "elements" else 1)
    return {"objectives": [Objective("kd", share, options={"T": cfg.temperature})], "label": 1 - cfg.kd}


def entropy_bits(z: Tensor) -> Tensor:
    """Entropy of softmax(z) per sample, in bits: (n, C) → (n,)."""
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(2)


def asked(z: Tensor, y: Tensor, cfg: Config, clock: Clock) -> Tensor:
    """For which samples the teacher is asked, (n,) bool, from the student's logits (n, C) and the labels (n,).

    ``cutoff``: entropy > cutoff. ``random``: with probability entropy / log2 C. ``wrong``: the student is wrong.
    """
    if cfg.ask == "cutoff":
        return entropy_bits(z) > cfg.cutoff
    if cfg.ask == "random":
        u = torch.rand(len(z), generator=clock.generator("ask")).to(z.device)
        return u < entropy_bits(z) / math.log2(z.shape[1])
    return z.argmax(-1) != y if cfg.ask == "wrong" else torch.ones_like(y, dtype=torch.bool)


class QuantizedDistill(Distill):
    """Distillation through the quantiser: forward and backward pass at Q(w), the step on w.

    Batch norm's running statistics are those of the network at Q(w), and are kept. Samples for which the teacher is
    not asked learn from their label alone, with weight 1.
    """

    def __init__(self, student: nn.Module, teacher: Any, cfg: Config, **how: Any):
        super().__init__(student, teacher, **how)
        self.cfg = cfg

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        step_seed(self.student, clock.seed, clock.stage, clock.step)
        if self.cfg.ask == "always" or not self.objectives:
            return super().learn(batch, clock)
        z, y = logits_of(call(self.student, batch[self._read])), batch["label"]
        chosen = asked(z.detach(), y, self.cfg, clock)
        ce = cross_entropy(z, y)
        teach = z.sum() * 0
        if chosen.any():
            some = map_tensors(batch, lambda t: t[chosen])
            said = self._ask(some, clock)["logits"]
            teach = self.objectives[0].weight * kl(said, z[chosen], self.cfg.temperature).sum() / len(y)
        label = torch.where(chosen, self.label * ce, ce).mean()
        right = (z.detach().argmax(-1) == y).float().mean()
        return Terms(label=label, kd=teach).note(accuracy=right, asked=chosen.float().mean())

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        for _, _, chain in projectors(self.student):
            if isinstance(chain[-1], Bucketed) and chain[-1].backward_style == "truncated":
                chain.original.clamp_(-1, 1)  # or what has left would never come back


class PointDistill(Distill):
    """Differentiable quantisation: the weights stay, the points move, and are in order after every step."""

    def __init__(self, student: nn.Module, teacher: Any, **how: Any):
        books = list(codebooks(student))
        if not books:
            raise UserError("differentiable quantisation needs layers with a codebook; quantise them first")
        student.requires_grad_(False)
        for book in books:
            book.points.requires_grad_(True)
        super().__init__(student, teacher, **how)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        for book in codebooks(self.student):
            book.sort_()


def codebooks(model: nn.Module) -> Sequence[Codebook]:
    return [chain[-1] for _, _, chain in projectors(model) if isinstance(chain[-1], Codebook)]
