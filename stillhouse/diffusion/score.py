"""Score distillation: a student moved by the difference of two scores, and the fake score that follows the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Condition, Denoiser, pick
from stillhouse.diffusion.process import Guidance, View, scales_of, target
from stillhouse.errors import UserError
from stillhouse.objectives.injection import inject
from stillhouse.system import Batch, Clock, System, Terms, Update
from stillhouse.teachers import EMA

__all__ = ["Denoiser", "ScoreDistillation", "Scores"]


@dataclass(frozen=True)
class Scores:
    """Settings of `ScoreDistillation`.

    Attributes:
        kappa: guidance of the teacher, in the form of diffusers (1 is none).
        guidance: whom it is given to, see `stillhouse.diffusion.process.scales_of`.
        weight: w of g = w (ε_T − ε_q): ``sigma2`` is σ_t² (ProlificDreamer, SwiftBrush); ``one``; ``dmd`` is
            (σ/α) / max(mean|x_0 − x̂_T|, 0.01), with which g is (x̂_q − x̂_T) over the teacher's distance.
        low, high: the student's times, parts of the way from data to noise.
        late_high, late_from: `high` from this part of the stage on.
        reduction: ``sum`` gives the student g/n, ``mean`` g/numel; with Adam only ε and clipping tell them apart.
        fake_low, fake_high: the fake's times.
        fake_weight: of its loss: ``one``, or ``alpha2`` for α_t² (SwiftBrush).
        drop: part of the fake's samples that are trained without their condition.
        drop_whole: drop the condition of the whole batch or of nobody.
        drop_camera: part of the fake's samples whose camera is all zeros.
        ema: decay of an average of the student, which is then the outcome; 0 for none.
    """

    kappa: float = 1.0
    guidance: Guidance = "teacher_only"
    weight: Literal["sigma2", "one", "dmd"] = "sigma2"
    low: float = 0.02
    high: float = 0.98
    late_high: float | None = None
    late_from: float = 1.0
    reduction: Literal["sum", "mean"] = "sum"
    fake_low: float = 0.0
    fake_high: float = 1.0
    fake_weight: Literal["one", "alpha2"] = "one"
    drop: float = 0.0
    drop_whole: bool = False
    drop_camera: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        scales_of(self.guidance, self.kappa)
        ends = [(self.low, self.high), (self.low, self.late_high or self.high), (self.fake_low, self.fake_high)]
        if not all(0 <= low < high <= 1 for low, high in ends):
            raise UserError(f"times must be parts of the way from data to noise, 0 <= low < high <= 1, got {ends}")
        for name in ("drop", "drop_camera", "ema", "late_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def times(self, clock: Clock) -> tuple[float, float]:
        """(low, high) of the student's times at this step."""
        late = self.late_high is not None and clock.progress >= self.late_from
        return self.low, self.late_high if late and self.late_high is not None else self.high


class ScoreDistillation(System):
    """g = w(t) [ε_T(x_t, t, y) − ε_q(x_t, t, y, c)], injected into x_0 = student(batch); ε_q follows the student.

    Two updates. ``generator`` moves the student by g, which is detached: no gradient reaches teacher or fake, both of
    which see the same x_t, t and ε. ``fake`` trains ε_q by denoising on the same x_0, detached, with t and ε of its
    own, fresh in every repeat. Without a fake ε_q is the noise that was added: score distillation sampling (SDS).

    Args:
        student: ``student(batch) -> x_0`` (n, …): free images, a generator, a renderer.
        teacher: not a part of this module, never trained.
        fake: None for SDS; an exact score (nothing to train); or one with weights: a copy or LoRA of the teacher. Only
            these weights are a part of this module.
        scores: settings.
        batch_size: B, the GLOBAL batch. ``batch["index"]`` (n,) says which of its B samples these are.
        generator, fake_update: `Update` without name and parameters, e.g. ``partial(Update, optimizer=…, repeat=5)``.

    The batch holds "index" (n,); "condition", of both scores; "teacher_condition", of the teacher alone (prompts with
    view words); "camera" (n, k), of the fake alone; and whatever the student wants.

    Sources: arXiv 2305.16213 (VSD), 2209.14988 (SDS), 2312.05239 (one generator for all conditions).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Denoiser,
        fake: Denoiser | None,
        scores: Scores,
        batch_size: int,
        *,
        generator: Callable[..., Update],
        fake_update: Callable[..., Update] | None = None,
    ):
        super().__init__()
        self.student, self.teacher, self.fake_score, self.scores = student, teacher, fake, scores
        self.batch_size, self.how_generator, self.how_fake = batch_size, generator, fake_update
        self.fake_weights = fake.weights if fake is not None else None
        self.average = EMA(student, scores.ema) if scores.ema else None
        self._made: dict[int, tuple[str, int, Tensor]] = {}

    def updates(self) -> Sequence[Update]:
        trained = [p for p in self.student.parameters() if p.requires_grad]
        found = [self.how_generator("generator", trained)]
        if self.fake_score is not None and (weights := self.fake_score.parameters()):
            if self.how_fake is None:
                raise ValueError("a fake score with weights needs fake_update, the Update that trains it")
            found.append(self.how_fake("fake", weights))
        return found

    # -- the two updates --------------------------------------------------------------------------------------------

    def generator(self, batch: Batch, clock: Clock) -> Terms:
        """mean over the batch of `inject`(x_0, g), or of g over the elements of a sample."""
        x0 = self.student(batch)
        self._made[clock.micro] = (clock.stage, clock.step, x0.detach())
        t, eps = self.noise(batch, clock, x0, "student", *self.scores.times(clock))
        g = self.direction(x0.detach(), t, eps, batch)
        if self.scores.reduction == "mean":
            g = g / x0[0].numel()
        return Terms(generator=inject(x0, g).mean()).note(size=g.square().mean().sqrt())

    def fake(self, batch: Batch, clock: Clock) -> Terms:
        """mean ‖net_φ(x_t', t', y, c) − target‖² over elements, on the detached x_0 of this step."""
        assert self.fake_score is not None
        score, x0 = self.fake_score, self.made(batch, clock)
        t, eps = self.noise(batch, clock, x0, "fake", self.scores.fake_low, self.scores.fake_high)
        condition, camera = self.dropped(batch, clock)
        said = score.predict(score.process.add_noise(x0, eps, t), t, condition, camera=camera)
        error = (said - target(score.process, score.prediction, x0, eps, t)).square().flatten(1).mean(1)
        if self.scores.fake_weight == "alpha2":
            error = error * score.process.alpha(t).to(error).square()
        return Terms(fake=error.mean())

    def after_step(self, clock: Clock) -> None:
        if self.average is not None:
            self.average.update(self.student, clock)

    def outcome(self) -> nn.Module:
        """The student, or its average where one is kept."""
        return self.student if self.average is None else self.average.model

    # -- their parts ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def direction(self, x0: Tensor, t: Tensor, eps: Tensor, batch: Batch) -> Tensor:
        """g = w (ε_T − ε_q) at x_t = α x_0 + σ ε, (n, …), detached."""
        x_t = self.teacher.process.add_noise(x0, eps, t)
        kappa, kappa_fake = scales_of(self.scores.guidance, self.scores.kappa)
        condition = batch.get("condition")
        teacher = self.teacher.view(x_t, t, batch.get("teacher_condition", condition), kappa)
        if self.fake_score is None:
            fake = View(self.teacher.process, x_t, t, "epsilon", eps)
        else:
            fake = self.fake_score.view(x_t, t, condition, kappa_fake, camera=batch.get("camera"))
        return self.weigh(x0, t, teacher) * (teacher.eps - fake.eps)

    def weigh(self, x0: Tensor, t: Tensor, teacher: View) -> Tensor:
        """w, (n, 1, …)."""
        alpha, sigma = teacher.process.scales(t, x0)
        if self.scores.weight == "dmd":
            distance = (x0 - teacher.x0).abs().flatten(1).mean(1).view_as(sigma)
            return sigma / alpha / distance.clamp_min(0.01)
        return sigma.square() if self.scores.weight == "sigma2" else torch.ones_like(sigma)

    def made(self, batch: Batch, clock: Clock) -> Tensor:
        """x_0 of this step, detached: what the student's update saw, or a new one where that was not due."""
        stage, step, x0 = self._made.get(clock.micro, ("", -1, None))
        if x0 is None or (stage, step) != (clock.stage, clock.step):
            with torch.no_grad():
                x0 = self.student(batch)
            self._made[clock.micro] = (clock.stage, clock.step, x0)
        return x0

    def noise(self, batch: Batch, clock: Clock, x0: Tensor, who: str, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Times (n,) and noise like x0, of the global batch's samples that these are."""
        t = self.draw(batch, clock, f"{who} t", partial(self.teacher.process.times, low=low, high=high))
        shape, dtype = x0.shape[1:], torch.promote_types(x0.dtype, torch.float32)

        def normal(n: int, generator: torch.Generator) -> Tensor:
            return torch.randn(n, *shape, generator=generator, dtype=dtype)

        eps = self.draw(batch, clock, f"{who} noise", normal)
        return t.to(x0.device), eps.to(x0.device)

    def draw(self, batch: Batch, clock: Clock, name: str, make: Callable[..., Tensor]) -> Tensor:
        """``make(B, generator=…)`` at this batch's indices: alike in one process and in several, split or not."""
        generator = replace(clock, rank=0, micro=0).generator(name)
        return make(self.batch_size, generator=generator)[batch["index"].cpu()]

    def dropped(self, batch: Batch, clock: Clock) -> tuple[Condition, Tensor | None]:
        """Condition and camera for the fake's training, some of them taken away."""
        condition, camera = batch.get("condition"), batch.get("camera")
        if condition is not None and self.scores.drop:
            assert self.fake_score is not None
            gone = self.gone(batch, clock, "condition", self.scores.drop, self.scores.drop_whole)
            condition = self.fake_score.drop(condition, gone)
        if camera is not None and self.scores.drop_camera:
            gone = self.gone(batch, clock, "camera", self.scores.drop_camera, False)
            camera = pick(gone, torch.zeros_like(camera), camera)
        return condition, camera

    def gone(self, batch: Batch, clock: Clock, name: str, part: float, whole: bool) -> Tensor:
        """Which samples lose something, (n,) of bool."""
        index = torch.zeros_like(batch["index"]) if whole else batch["index"]
        return self.draw({"index": index}, clock, f"drop {name}", torch.rand) < part
