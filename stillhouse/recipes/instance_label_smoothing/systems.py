"""The losses: z logits (n, K) of the student, y labels; every term is a mean over the batch.

plain        CE(z, y)
smoothing    −Σ_k t_k log softmax(z)_k,   t = 1 − ε on y and ε/(K−1) on every other class
entropy      CE(z, y) − β H(softmax(z))
beta         (1−α) CE(z, y) + α [−Σ_k t_ik log softmax(z_i)_k],   t_i = b_i on y_i and (1 − b_i)/(K−1) elsewhere
generations  (1−α) CE(z, y) + α [−Σ_k softmax(t/T)_k log softmax(z)_k],   t of the generation before

b_1 … b_n are drawn from Beta(a, 1) for each batch and given out by rank: the sample of which the averaged network is
the least sure, by its confidence in the TRUE class, gets the smallest. A wrong label is therefore trusted least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call, logits_of
from stillhouse.generations import Learner
from stillhouse.recipes.instance_label_smoothing.config import Config
from stillhouse.system import Batch, Clock, Teacher, Terms, Update
from stillhouse.teachers import EMA
from stillhouse.weights import step, warm_decay


class Plain(Learner):
    """Labels alone: as they are, smoothed alike for all, or with the entropy of the answer rewarded."""

    def __init__(self, student: nn.Module, cfg: Config):
        super().__init__(student)
        self.cfg = cfg

    def updates(self) -> Sequence[Update]:
        moving = [p for p in self.student.parameters() if p.requires_grad]
        # whole: ranks within a batch are no mean over samples, so a step is not cut into micro-batches.
        whole = isinstance(self, Beta)
        return [Update("learn", moving, self.cfg.moves, lr=step(self.cfg.milestones), whole=whole)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        z, y = logits_of(call(self.student, batch["input"])), batch["label"]
        right = (z.detach().argmax(-1) == y).float().mean()
        return Terms(**self.terms(z, batch, clock)).note(accuracy=right)

    def terms(self, z: Tensor, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The named parts of the loss."""
        y = batch["label"]
        if self.cfg.rule == "smoothing":
            target = O.smoothed(y, 1 - self.cfg.epsilon, z.shape[-1], O.upcast(z).dtype)
            return {"smooth": O.cross_entropy(z, target).mean()}
        label = {"label": O.cross_entropy(z, y).mean()}
        if self.cfg.rule != "entropy":
            return label
        log_q = O.upcast(z).log_softmax(-1)
        return {**label, "entropy": self.cfg.penalty * (log_q.exp() * log_q).sum(-1).mean()}


class Beta(Plain):
    """Beta smoothing; the averaged network θ̄ ← λ_t θ̄ + (1−λ_t) θ, λ_t = min(1 − 1/(t+1), decay), starts as a copy."""

    def __init__(self, student: nn.Module, cfg: Config):
        super().__init__(student, cfg)
        self.ema = EMA(student, warm_decay(cfg.ema), batch_statistics=cfg.ema_norm == "batch")

    def terms(self, z: Tensor, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        label, alpha = O.cross_entropy(z, batch["label"]).mean(), self.cfg.alpha
        if alpha == 0:
            return {"label": label}
        target = O.smoothed(batch["label"], self.strengths(batch, clock), z.shape[-1], O.upcast(z).dtype)
        return {"label": (1 - alpha) * label, "smooth": alpha * O.cross_entropy(z, target).mean()}

    def strengths(self, batch: Batch, clock: Clock) -> Tensor:
        """b_i of the samples of this process, (n,), in float64 on the batch's device; detached."""
        log_q = self.ema(batch).logits.double().log_softmax(-1)
        own = log_q.gather(1, batch["label"][:, None]).squeeze(1)  # of the same order as its exponential
        every, rank = clock.all_rows(own), clock.all_rows(torch.full_like(own, clock.rank))
        # One draw for the global batch, the same in all processes, on the CPU so that devices agree.
        generator = replace(clock, rank=0).generator("beta")
        b = O.beta_draws(len(every), self.cfg.a, generator, torch.float64).to(own.device)
        if self.cfg.assign == "rank":
            b = O.ranked_like(b, by=every)
        return b[rank == clock.rank]

    def after_step(self, clock: Clock) -> None:
        self.ema.update(self.student, clock)


class Taught(Plain):
    """A generation under the one before it. Only the teacher is tempered, and nothing is multiplied by T²."""

    def __init__(self, student: nn.Module, teacher: Teacher, cfg: Config):
        super().__init__(student, cfg)
        self.teacher = teacher

    def terms(self, z: Tensor, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        label, alpha = O.cross_entropy(z, batch["label"]).mean(), self.cfg.teach
        if alpha == 0:
            return {"label": label}
        tempered = self.teacher(batch).logits / self.cfg.temperature
        return {"label": (1 - alpha) * label, "teach": alpha * O.soft_cross_entropy(tempered, z).mean()}
