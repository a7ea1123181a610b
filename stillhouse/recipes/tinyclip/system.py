"""The loss of TinyCLIP: the teacher's image-text affinities, InfoNCE beside it, and the budget of gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call
from stillhouse.recipes.tinyclip.config import Config
from stillhouse.recipes.tinyclip.gates import Gates
from stillhouse.students.gates import Budget
from stillhouse.system import Batch, Clock, Schedule, System, Teacher, Terms, Update

PROJECTIONS = ("visual_projection", "text_projection")  # their outputs are the features of a teacher
TOP = math.log(100.0)  # of a learned logit scale


class TinyClip(System):
    """L = w·(α·L_affinity + (1−α)·L_InfoNCE) + l1·d + l2·d², d = max(target(step) − e, 0).

    A = g·I Tᵀ of unit features over the whole batch of all processes. With gates, their draw is one for the batch; the
    multipliers l1, l2 ascend. The target rises linearly from what is gone already over ``ramp_steps``.

    Args:
        student: answers with ``image_embeds`` and ``text_embeds``. teacher: with `PROJECTIONS` as taps; None for α = 0.
        cfg: settings. gates: of the student. target: sparsity that the gates are to reach.
        teacher_scale: log g of the teacher, where `cfg.scale` is 0.
        lr: learning rate at the top of `schedule`.

    Source: Wu et al. (ICCV 2023, arXiv 2309.12314).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        cfg: Config,
        *,
        gates: Gates | None = None,
        target: float = 0.0,
        teacher_scale: float = 0.0,
        lr: float | None = None,
        schedule: Schedule | None = None,
    ):
        super().__init__()
        self.student, self.teacher, self.cfg, self.gates, self.target = student, teacher, cfg, gates, target
        self.budget = Budget() if gates else None
        self._teacher_scale = math.exp(teacher_scale)
        self._lr, self._schedule = cfg.lr if lr is None else lr, schedule
        self.alpha = cfg.alpha if teacher is not None else 0.0
        if cfg.scale:
            with torch.no_grad():
                student.logit_scale.fill_(math.log(cfg.scale))  # type: ignore[operator]

    def updates(self) -> Sequence[Update]:
        fixed = [self.student.logit_scale] if self.cfg.scale else []
        moving = [p for p in self.parameters() if not any(p is f for f in fixed)]
        # The loss compares pairs of the batch with one another, so it is not split into micro-batches.
        return [Update("learn", moving, self._optimizer, lr=self._schedule, clip=self.cfg.clip or None, whole=True)]

    def _optimizer(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Matrices with weight decay, vectors without; gates descend and multipliers ascend at a rate of their own."""
        own = {id(p) for p in self.student.parameters()}
        matrices = [p for p in params if id(p) in own and p.dim() > 1]
        vectors = [p for p in params if id(p) in own and p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        if self.gates and self.budget:
            apart = {"lr": self.cfg.gate_lr, "weight_decay": 0.0, "constant": True}
            groups += [{"params": list(self.gates.parameters()), **apart},
                       {"params": list(self.budget.parameters()), "maximize": True, **apart}]  # fmt: skip
        if self.cfg.optimizer == "sgd":
            return torch.optim.SGD(groups, self._lr, weight_decay=self.cfg.weight_decay)
        return torch.optim.AdamW(groups, self._lr, betas=(0.9, 0.98), weight_decay=self.cfg.weight_decay)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``affinity``, ``contrast`` and ``budget``, weighted; only those that weigh something."""
        with self._gated(clock):
            said = call(self.student, batch["input"])
        own = self._affinity(clock, said.image_embeds, said.text_embeds, self._scale())
        terms = {}
        if self.alpha:
            assert self.teacher is not None
            told = self.teacher(batch)
            image, text = (told[p] for p in PROJECTIONS)
            wanted = self._affinity(clock, image, text, self.cfg.scale or self._teacher_scale)
            terms["affinity"] = self.cfg.weight * self.alpha * O.affinity_mimicking(wanted, own).mean()
        if self.alpha < 1:
            terms["contrast"] = self.cfg.weight * (1 - self.alpha) * O.info_nce(own).mean()
        if not self.gates or not self.budget:
            return Terms(**terms)
        sparsity = self.gates.sparsity()
        terms["budget"] = self.budget(sparsity, self.wanted(clock))
        return Terms(**terms).note(sparsity=sparsity)

    def wanted(self, clock: Clock) -> float:
        """The sparsity asked for at this step."""
        assert self.gates is not None
        gone = 1 - self.gates.present / self.gates.whole
        return gone + (self.target - gone) * min(1.0, clock.step / self.cfg.ramp_steps if self.cfg.ramp_steps else 1.0)

    def _gated(self, clock: Clock) -> AbstractContextManager[None]:
        if self.gates is None:
            return nullcontext()
        draws = replace(clock, rank=0, micro=0).generator("gates")  # alike on all processes
        return self.gates.on(self.student, self.gates.draw(draws))

    def _scale(self) -> float | Tensor:
        return self.cfg.scale or self.student.logit_scale.exp()  # type: ignore[operator]

    @staticmethod
    def _affinity(clock: Clock, image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        return O.affinity(clock.all_rows(image), clock.all_rows(text), scale)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Keeps gates where their gradient lives, and a learned logit scale between 1 and 100."""
        if self.gates:
            self.gates.clamp_()
        if not self.cfg.scale:
            self.student.logit_scale.clamp_(0.0, TOP)  # type: ignore[operator]

    def outcome(self) -> nn.Module:
        """The student."""
        return self.student
