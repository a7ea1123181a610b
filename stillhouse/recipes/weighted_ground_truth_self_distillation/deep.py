"""Networks: the mixture loss, and the label weight estimated from two trained ones before the mixture is trained.

    L = α · MSE(softmax(z), e_y) + (1−α) · MSE(softmax(z), softmax(t)) + ν Σ_p ‖θ_p‖₂

z of the student, t of the step before (frozen, in eval mode), MSE the mean over classes and the batch, the norms not
squared. The first step has α = 1. The weight of step τ: u = what the network of step 1 says on held-out samples, v =
what a network says there that was trained on step τ−1's answers alone; α̂ = ⟨u − v, e_y − v⟩ / ‖u − v‖², in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call, logits_of, predict
from stillhouse.generations import Learner
from stillhouse.recipes.weighted_ground_truth_self_distillation.config import Config
from stillhouse.system import Batch, Clock, Teacher, Terms, Update
from stillhouse.weights import optimal_mix


class Mixture(Learner):
    """One step: squared errors of probabilities to the labels and to the teacher, weighted α and 1−α."""

    def __init__(self, student: nn.Module, teacher: Teacher | None, alpha: float, cfg: Config):
        super().__init__(student)
        self.teacher, self.alpha, self.cfg = teacher, alpha if teacher else 1.0, cfg

    def updates(self) -> Sequence[Update]:
        return [Update("learn", [p for p in self.student.parameters() if p.requires_grad], self.cfg.moves)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        z, y = logits_of(call(self.student, batch["input"])), batch["label"]
        q, terms = O.upcast(z).softmax(-1), dict[str, Tensor]()
        if self.alpha > 0:
            terms["label"] = self.alpha * O.mse(F.one_hot(y, z.shape[-1]).to(q.dtype), q).mean()
        if self.alpha < 1 and self.teacher is not None:
            terms["teach"] = (1 - self.alpha) * O.mse(self.teacher(batch).logits.softmax(-1), q).mean()
        if self.cfg.penalty:
            norms = [p.norm() for p in self.student.parameters() if p.requires_grad]
            terms["norm"] = self.cfg.penalty * torch.stack(norms).sum()
        right = (z.detach().argmax(-1) == y).float().mean()
        return Terms(**terms).note(accuracy=right)


def estimate(on_labels: nn.Module, on_teacher: nn.Module, held_out: object, device: object = "cpu") -> float:
    """α̂: by how much the labels should count, from two trained networks, clipped to [0, 1].

    Args:
        on_labels: trained on labels alone. on_teacher: trained on the teacher's answers alone.
        held_out: samples that neither has seen.
    """
    (u, y), (v, _) = (predict(m, held_out, device=device) for m in (on_labels, on_teacher))  # type: ignore[arg-type]
    target = F.one_hot(y, u.shape[1]).double()
    return min(1.0, max(0.0, optimal_mix(u.double().softmax(1), v.double().softmax(1), target)))
