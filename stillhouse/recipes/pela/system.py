"""The loss of PELA's intermediate stage: the task, the blocks' outputs, the logits, and a bound on the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call, logits_of
from stillhouse.objectives.logits import upcast
from stillhouse.system import Batch, Clock, Schedule, System, Teacher, Terms, Update
from stillhouse.taps import Features, tap


def feature_error(teacher: Tensor, student: Tensor, inputs: Any = None) -> Tensor:
    """mean_d (t_d − s_d)² per sample over all elements; of sentences with a mask, over their own tokens.

    Args:
        teacher: detached. student: both (n, …) of one shape, (n, length, d) for tokens.
        inputs: what the network was called with; its ``attention_mask`` is (n, length).

    Returns:
        (n,).
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or teacher.dim() != 3 or mask.shape != teacher.shape[:2]:
        return O.mse(teacher, student)
    return O.token_mean((upcast(teacher.detach()) - upcast(student)).square().mean(-1), mask)


def deviation(pair: nn.Module, weight: Tensor) -> Tensor:
    """max_ij |B·A − W|_ij, A and B the weights of the pair (rank, in) and (out, rank); W is detached.

    The largest absolute entry, not the matrix norm induced by ∞. Its gradient touches one entry of B·A.

    Example:
        >>> from stillhouse.students.edits import factorised
        >>> layer = nn.Linear(4, 3)
        >>> bool(deviation(factorised(layer, 3), layer.weight) < 1e-6)
        True
    """
    first, second = pair.children()
    with torch.autocast(weight.device.type, enabled=False):  # half precision would round the difference away
        made = upcast(second.weight) @ upcast(first.weight)  # type: ignore[arg-type]
        return (made - weight.detach().to(made)).abs().max()


class Pela(System):
    """L = w·L_task + a·L_fm + b·L_sr + g·L_wp.

    L_task = mean CE; L_fm = 1/K Σ_l MSE(f_s^l, f_t^l); L_sr = MSE of the logits; L_wp = 1/P Σ (max|B·A − W| − ε)²,
    which pulls every pair's largest deviation TO ε, from either side. The student is asked once per step. A batch may
    have two parts, ``every`` for L_fm and L_sr and ``labelled`` for L_task.

    Args:
        student: with pairs in place of layers. teacher: a `Teacher` with the student's blocks as taps.
        base: the network before it was factorised; its weights are the W, and never change.
        blocks: paths whose outputs are compared. pairs: paths of the factorised layers.
        task, feature, logits, perturbation: w, a, b, g. epsilon: ε.
        optimizer, lr, clip, label_smoothing: as in `Distill`.

    Source: Guo et al. (CVPR 2024, arXiv 2310.10700).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        base: nn.Module,
        *,
        blocks: Sequence[str],
        pairs: Sequence[str],
        task: float = 1.0,
        feature: float = 1.0,
        logits: float = 0.0,
        perturbation: float = 0.0,
        epsilon: float = 1e-3,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
        lr: Schedule | None = None,
        clip: float | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.task, self.feature, self.logits, self.perturbation = task, feature, logits, perturbation
        self.epsilon, self.label_smoothing = epsilon, label_smoothing
        self._blocks, self._pairs = list(blocks) if feature else [], list(pairs)
        self._originals = [base.get_submodule(p) for p in pairs]  # a list: not trained, not saved
        self._optimizer, self._lr, self._clip = optimizer, lr, clip

    def updates(self) -> Sequence[Update]:
        return [Update("learn", list(self.student.parameters()), self._optimizer, lr=self._lr, clip=self._clip)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``task``, ``feature``, ``logits`` and ``perturbation``, weighted; only those that weigh something."""
        few, every = (batch["labelled"], batch["every"]) if "labelled" in batch else (batch, batch)
        asks = bool(self.feature or self.logits)
        terms: dict[str, Tensor] = {}
        z, seen = self._see(every if asks else few)
        if self.task:
            own = z if few is every or not asks else logits_of(call(self.student, few["input"]))
            terms["task"] = self.task * O.cross_entropy(own, few["label"], self.label_smoothing).mean()
        if asks:
            said = self.teacher(every)
            if self.feature:
                each = [feature_error(said[p], seen[p], every["input"]).mean() for p in self._blocks]
                terms["feature"] = self.feature * torch.stack(each).mean()
            if self.logits:
                terms["logits"] = self.logits * O.mse(said["logits"], z).mean()
        if self.perturbation:
            terms["perturbation"] = self.perturbation * self.bound()
        return Terms(**terms)

    def _see(self, batch: Batch) -> tuple[Tensor, Features]:
        with tap(self.student, self._blocks) as seen:
            return logits_of(call(self.student, batch["input"])), seen

    def bound(self) -> Tensor:
        """L_wp; needs no data."""
        pairs = [self.student.get_submodule(p) for p in self._pairs]
        each = [deviation(p, o.weight.to(next(p.parameters()))) for p, o in zip(pairs, self._originals)]  # type: ignore[arg-type]
        return (torch.stack(each) - self.epsilon).square().mean()

    def outcome(self) -> nn.Module:
        """The student."""
        return self.student
