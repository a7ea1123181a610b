"""Teacher and student in one System, and the influence of the teacher's answers on the student's held-out loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.bilevel import mixed, own_precision, step
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.objectives import cross_entropy, kl
from stillhouse.plain import optimizer_of
from stillhouse.recipes.lgtm.config import Config
from stillhouse.system import Batch, Clock, Gradients, Schedule, System, Terms, Update
from stillhouse.weights import constant

Params = dict[str, Tensor]


class LGTM(System):
    """Two networks that learn from labels and from each other; the teacher also from what it does for the student.

    With p = softmax(·/T), batch means, and the target of each KL detached::

        student   L_s = a_s KL(p_t ‖ p_s) + (1 − a_s) CE_s
        teacher   L_t = a_t KL(p_s ‖ p_t) + (1 − a_t) CE_t

    A step moves the teacher by ∇L_t and the derivative of F = CE of the student on held-out data after its next step
    θ' (`influence`), then the student by L_s against the moved teacher, which answers in eval mode.

    Args:
        student, teacher: give logits (n, C).
        cfg: settings.
        rate: factor on both learning rates.
        read: what of a batch the teacher is given.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, cfg: Config, rate: Schedule | None = None, read: str = "input"
    ):
        super().__init__()
        self.student, self.teacher, self.cfg = student, teacher, cfg
        self.rate, self.read = rate or constant(), read
        self.mover: torch.optim.Optimizer | None = None  # the student's, whose next step is foreseen

    def updates(self) -> Sequence[Update]:
        c = self.cfg
        clip = c.clip or None
        moves = optimizer_of(c.teachers())
        return [
            Update("teach", list(trained(self.teacher).values()), moves, lr=self.rate, clip=clip, whole=True),
            Update("learn", list(trained(self.student).values()), self._remember, lr=self.rate, clip=clip),
        ]

    def _remember(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        self.mover = optimizer_of(self.cfg.plain())(params)
        return self.mover

    # -- losses -------------------------------------------------------------------------------------------

    def student_loss(self, t: Tensor, s: Tensor, y: Tensor, detach: bool = True) -> Tensor:
        """L_s; `detach` False keeps the path through the teacher's answer."""
        return self._both(self.cfg.alpha_student, t, s, y, detach)

    def teacher_loss(self, s: Tensor, t: Tensor, y: Tensor, detach: bool = True) -> Tensor:
        """L_t; `detach` False keeps the path through the student's answer."""
        return self._both(self.cfg.alpha_teacher, s, t, y, detach)

    def _both(self, alpha: float, target: Tensor, z: Tensor, y: Tensor, detach: bool) -> Tensor:
        parts, T = [], self.cfg.temperature
        if alpha > 0:
            parts.append(alpha * kl(target, z, T, detach_teacher=detach).mean() / T**2)
        if alpha < 1:
            label = cross_entropy(z, y).mean()
            parts.append(label if alpha == 0 else (1 - alpha) * label)
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    # -- the two updates ----------------------------------------------------------------------------------

    def teach(self, batch: Batch, clock: Clock) -> Gradients:
        """∇L_t on the training batch and, as `cfg.influence` says, the influence."""
        train, params = batch["train"], list(trained(self.teacher).values())
        with torch.no_grad():
            s = answer(self.student, {}, train["input"])
        t = logits_of(call(self.teacher, train[self.read]))
        loss = self.teacher_loss(s, t, train["label"])
        own = _grads(loss, params)
        if self.cfg.influence == "none" or self.cfg.strength == 0:
            return Gradients(own, teacher=loss)
        with own_precision(loss.device.type):  # half precision is too coarse for it
            found, outer = self.influence(train, batch["held_out"], clock)
        found = [self.cfg.strength * g for g in found]
        share = norm(found) / norm(own).clamp(min=1e-30)
        total = [a + b for a, b in zip(own, found, strict=True)]
        return Gradients(total, teacher=loss, held_out=outer, influence=share)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """L_s on the same batch against the teacher that has just moved."""
        train = batch["train"]
        s = logits_of(call(self.student, train["input"]))
        with torch.no_grad(), evaluating(self.teacher):
            t = logits_of(call(self.teacher, train[self.read]))
        loss = self.student_loss(t, s, train["label"])
        right = (s.detach().argmax(-1) == train["label"]).float().mean()
        return Terms(student=loss).note(accuracy=right)

    # -- the influence ------------------------------------------------------------------------------------

    def influence(self, train: Batch, held_out: Batch, clock: Clock) -> tuple[list[Tensor], Tensor]:
        """The teacher's gradient from the student's held-out loss F, and F(θ').

        ========  =========================================================  =====================================
        exact     ∂/∂θ_t ⟨(∂θ'/∂g)ᵀ ∇F(θ'), g⟩,  g = ∇_θs L_s, all in eval   dF/dθ_t, through the optimiser's step
        sgd       −η_s ∂/∂θ_t ⟨∇F(θ'), ∇_θs L_s⟩                             the same where the step is θ − η_s g
        released  −η_t ∂/∂θ_t ⟨∇F(θ'), ∇_θs L_t⟩                             as the published code has it
        ========  =========================================================  =====================================
        """
        c, y, x = self.cfg, train["label"], train["input"]
        theta, phi = trained(self.student), trained(self.teacher)
        w, outer = self.direction(train, held_out, clock)

        def loss(inner: Params, teacher: Params) -> Tensor:
            s, t = answer(self.student, inner, x), answer(self.teacher, teacher, train[self.read])
            if c.influence == "released":
                return self.teacher_loss(s, t, y, detach=False)
            return self.student_loss(t, s, y, detach=False)

        factor = -c.teacher_lr * self.rate(clock) if c.influence == "released" else 1.0
        with evaluating(self.student), evaluating(self.teacher):
            found = mixed(loss, theta, phi, w, mode=c.derivative, radius=c.radius)
        return [factor * g for g in found], outer

    def direction(self, train: Batch, held_out: Batch, clock: Clock) -> tuple[Params, Tensor]:
        """What g is multiplied with: (∂θ'/∂g)ᵀ ∇F(θ'), or −η_s ∇F(θ'), or ∇F(θ') (`released`); and F(θ')."""
        c, theta = self.cfg, trained(self.student)
        with ExitStack() as quiet:
            if c.influence != "released":  # the published code has dropout on here and off in the differences
                quiet.enter_context(evaluating(self.student))
                quiet.enter_context(evaluating(self.teacher))
            with torch.no_grad():
                t = answer(self.teacher, {}, train[self.read])
            leaves = {k: p.detach().requires_grad_() for k, p in theta.items()}
            g = _grads(
                self.student_loss(t, answer(self.student, leaves, train["input"]), train["label"]), leaves.values()
            )
            g = [u.requires_grad_() for u in clock.all_mean(g, len(train["label"]))]
            after = dict(zip(theta, self.foreseen(g, clock), strict=True))
            outer = cross_entropy(answer(self.student, after, held_out["input"]), held_out["label"]).mean()
            found = _grads(outer, g if c.influence == "exact" else after.values())
        found = clock.all_mean(found, len(held_out["label"]))
        scale = -c.lr * self.rate(clock) if c.influence == "sgd" else 1.0
        return {k: scale * v for k, v in zip(theta, found, strict=True)}, outer.detach()

    def foreseen(self, g: Sequence[Tensor], clock: Clock) -> list[Tensor]:
        """θ': the student's weights after its next step with these gradients; attached to them, nothing is moved."""
        if self.mover is None:  # outside of a run: an optimiser without a past
            self._remember(list(trained(self.student).values()))
        assert self.mover is not None
        if self.cfg.clip:
            scale = (self.cfg.clip / (norm(g) + 1e-6)).clamp(max=1.0)
            g = [scale * u for u in g]
        return step(self.mover, list(trained(self.student).values()), g, self.rate(clock))

    def outcome(self) -> nn.Module:
        return self.student


def trained(model: nn.Module) -> Params:
    """The parameters that move, by name."""
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def answer(model: nn.Module, params: Mapping[str, Tensor], x: Any) -> Tensor:
    """Logits with these weights in place of the model's own; running statistics stay as they are."""
    held = {**{k: b.clone() for k, b in model.named_buffers()}, **params}
    if isinstance(x, Mapping):
        return logits_of(functional_call(model, held, (), dict(x)))
    return logits_of(functional_call(model, held, (x,)))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all of them together, with derivative 0 at 0."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


def _grads(value: Tensor, inputs: Any) -> list[Tensor]:
    inputs = list(inputs)
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
