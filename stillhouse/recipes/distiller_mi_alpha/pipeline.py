"""What is trained in a Distiller run: `Distill`, whose batches may be mixed and whose layer pairs may be weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.comparisons import ON_LOGITS, Comparison
from stillhouse.critics import Critic
from stillhouse.data import Samples
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating
from stillhouse.recipes.distiller_mi_alpha.maps import transport
from stillhouse.system import Batch, Clock, Signals, Terms, map_tensors
from stillhouse.taps import tap


def embedded(model: Any, ids: Tensor) -> Tensor:
    """Token ids (n, length) as the model's word vectors (n, length, d)."""
    return model.get_input_embeddings()(ids)


def mix(x: Tensor, order: Tensor, share: float) -> Tensor:
    """λ x + (1−λ) x[order].

    Example:
        >>> mix(torch.tensor([0.0, 1.0]), torch.tensor([1, 0]), 0.75)
        tensor([0.2500, 0.7500])
    """
    return share * x + (1 - share) * x[order]


class Pipeline(Distill):
    """w_hard CE(z, y) + w_kd L_pred(t, z) + w_int Σ_(i,j) ℓ(H_i^S, H_j^T), on the batch and on a mixed copy of it.

    Args:
        student, teacher: as in `Distill`.
        emd: (layers of the student, of the teacher): the objectives on features are all their pairs, row by row, and
            are weighed in each step by the transport plan of least cost.
        mixup: a of λ ~ Beta(a, a): images, or word vectors of both networks, are mixed with the same λ and order, and
            the losses are the mean over the plain and the mixed batch; labels count on the plain one. 0 does not mix.
        teacher_model: the teacher's network, for its word vectors; only where sentences are mixed.
        share: pairs of layers with features of the same sizes have one critic between them.
        how: further arguments of `Distill`.

    Raises:
        UserError: mixed sentences without word vectors; else as `Distill`.
    """

    student_gradient: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        emd: tuple[int, int] | None = None,
        mixup: float = 0.0,
        teacher_model: nn.Module | None = None,
        share: bool = True,
        **how: Any,
    ):
        super().__init__(student, teacher, **how)
        self.emd, self.mixup = emd, mixup
        example = how.get("example") or {}
        if mixup and isinstance(example.get("input"), Mapping):
            for who, model in (("student", student), ("teacher", teacher_model)):
                if not hasattr(model, "get_input_embeddings"):
                    raise UserError(
                        f"mixup of sentences needs word vectors; the {who} {type(model).__name__} gives none"
                    )
        self._embed_teacher: Callable[[Tensor], Tensor] = partial(embedded, teacher_model)
        if share:
            self._share_critics()
        self.register_buffer("student_gradient", torch.zeros(()))

    def _share_critics(self) -> None:
        first: dict[Any, Critic] = {}
        for comparison in map(_as_comparison, self.comparisons.values()):
            if comparison.critic is not None:
                shapes = tuple(p.shape for p in comparison.critic.parameters())
                comparison.critic = first.setdefault(shapes, comparison.critic)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """The terms by name, the pairs of layers in one; notes accuracy and the last step's (clipped) gradient norm."""
        plain = self._once(batch, clock)
        terms = plain.terms
        if self.mixup and self.objectives:
            mixed = self._once(self.mixed(batch, clock), clock).terms
            terms = {k: v if k == "label" else (v + mixed[k]) / 2 for k, v in terms.items()}
        return Terms(**terms).note(**plain.notes, student_gradient=self.student_gradient)

    def _once(self, batch: Batch, clock: Clock) -> Terms:
        made = super().learn(batch, clock)
        names = list(made.terms)[len(made.terms) - len(self.objectives) :]
        pairs = [n for o, n in zip(self.objectives, names, strict=True) if o.level not in ON_LOGITS]
        terms = {n: v for n, v in made.terms.items() if n not in pairs}
        if pairs:
            each = torch.stack([made.terms[n] for n in pairs])
            terms[pairs[0]] = (each if self.emd is None else each * transport(each.view(self.emd)).flatten()).sum()
        return Terms(**terms).note(**made.notes)

    def draw(self, n: int, clock: Clock) -> tuple[float, Tensor]:
        """λ ~ Beta(a, a) and a permutation of n samples."""
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=clock.generator("mixup"))))
        return float(rng.beta(self.mixup, self.mixup)), torch.from_numpy(rng.permutation(n))

    def mixed(self, batch: Batch, clock: Clock) -> Batch:
        """The batch with every sample mixed with another one: same λ and order for student and teacher."""
        share, order = self.draw(len(batch["label"]), clock)
        own = batch[self._read]
        if not isinstance(own, Mapping):
            return {**batch, self._read: mix(own, order.to(own.device), share)}
        theirs = batch.get("teacher", own)
        with torch.no_grad():
            teacher = _mixed_words(theirs, self._embed_teacher, order, share)
        student = _mixed_words(own, partial(embedded, self.student), order, share)
        return {**batch, self._read: student, "teacher": teacher, "mixed": teacher}

    def _ask(self, batch: Batch, clock: Clock) -> Signals:
        if "mixed" in batch:  # whichever of the two the teacher reads
            batch = {**batch, "input": batch["mixed"], "teacher": batch["mixed"]}
        return super()._ask(batch, clock)

    def after_step(self, clock: Clock) -> None:
        """Keeps the norm of the student's gradient: a bound that rises while it vanishes is the critic's doing."""
        norms = [p.grad.norm() for p in self.student.parameters() if p.grad is not None]
        if norms:
            self.student_gradient.copy_(torch.stack(norms).norm())

    @torch.no_grad()
    def bound(self, samples: Samples, batch_size: int) -> float:
        """Mean Î_α over pairs of layers and whole batches of samples, nats: what the critics find on such data."""
        device, found = self.student_gradient.device, []
        compared = {k: _as_comparison(c) for k, c in self.comparisons.items()}
        critics = {k: c for k, c in compared.items() if c.critic is not None}
        size = min(batch_size, len(samples))
        with evaluating(self):
            for start in range(0, len(samples) - size + 1, size):
                taken = samples.take(np.arange(start, start + size), view=None)
                batch = {k: map_tensors(v, lambda t: t.to(device)) for k, v in taken.items()}
                with tap(self.student, self._taps) as seen:
                    call(self.student, batch[self._read])
                said = self._ask(batch, Clock())
                for k, comparison in critics.items():
                    (s,), (t,) = self._features(self.objectives[int(k)], seen, said, batch)
                    found.append(comparison.bound(s, t).mean())
        return float(torch.stack(found).double().mean())


def _as_comparison(module: nn.Module) -> Comparison:
    assert isinstance(module, Comparison)
    return module


def _mixed_words(inputs: Mapping[str, Tensor], embed: Callable[[Tensor], Tensor], order: Tensor, share: float) -> Any:
    order = order.to(inputs["input_ids"].device)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    mask = torch.maximum(inputs["attention_mask"], inputs["attention_mask"][order])
    return {**rest, "inputs_embeds": mix(embed(inputs["input_ids"]), order, share), "attention_mask": mask}
