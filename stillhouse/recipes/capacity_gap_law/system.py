"""Token-level distillation of a decoder whose logits are computed a few thousand tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.students.hub import names_of
from stillhouse.system import Batch, Clock, Schedule, System, Terms, Update


class ChunkedDistill(System):
    """(1−α)·mean CE(z, y) + α·mean softCE, softCE = −T² Σ_v p_T(v) log p_S(v), means over all positions.

    softCE is the KL divergence plus the teacher's entropy, with the same gradient. Student and teacher give their last
    hidden states; logits of both exist for `chunk` tokens at a time, in both passes.

    Args:
        student: a decoder of transformers that learns.
        teacher: a decoder over the same tokens; detached, in eval mode, no part of this module. Not asked with α = 0.
        alpha, T: see above. chunk: tokens at once; 0: all.
        optimizer, lr, clip: of the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float,
        T: float,
        chunk: int,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
        lr: Schedule | None = None,
        clip: float | None = None,
    ):
        super().__init__()
        for model in (student, teacher):
            names_of(model)  # those whose logits are their head's answer to the last hidden state, without more
        self.student, self._teacher = student, [teacher.eval().requires_grad_(False)]
        self.alpha, self.T, self.chunk = alpha, T, chunk
        self._optimizer, self._lr, self._clip = optimizer, lr, clip

    def updates(self) -> Sequence[Update]:
        return [Update("learn", list(self.student.parameters()), self._optimizer, lr=self._lr, clip=self._clip)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        labels = batch["label"].flatten()
        h, head = hidden(self.student, batch["input"])
        if not self.alpha:
            return Terms(label=O.in_chunks(lambda a, y: O.cross_entropy(head(a), y), h, labels, size=self.chunk).mean())
        with torch.no_grad():
            t, teacher_head = hidden(self._teacher[0].to(h.device), batch["input"])

        def values(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
            z = head(a)
            with torch.no_grad():
                said = teacher_head(b)
            return torch.stack([O.cross_entropy(z, y), O.soft_cross_entropy(said, z, self.T)], 1)

        label, soft = O.in_chunks(values, h, t, labels, size=self.chunk).mean(0)
        terms = {"label": (1 - self.alpha) * label} if self.alpha < 1 else {}
        return Terms(**terms, soft=self.alpha * soft).note(nats=label)

    def outcome(self) -> nn.Module:
        """The student."""
        return self.student


def hidden(model: Any, inputs: Any) -> tuple[Tensor, nn.Module]:
    """Last hidden states of all positions, (n·t, d), and the head that makes logits of them."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1), model.get_output_embeddings()
