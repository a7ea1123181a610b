"""Forward processes x_t = α_t x_0 + σ_t ε, and what a network may predict of them: ε, x_0, v, velocity, score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stillhouse.errors import UserError, did_you_mean

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "score"]
Guidance = Literal["teacher_only", "both", "none"]
Density = Literal["uniform", "logit_normal", "mode"]
Weighting = Literal["one", "sigma_sqrt", "cosmap"]
LEAST_ALPHA_BAR = 1e-3


class Process:
    """x_t = α_t x_0 + σ_t ε, ε ~ N(0, I): how noise is added at time t.

    A subclass gives `alpha`, `sigma`, `at` and `times`; `network_time` is what a network is told of t.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """α_t, (n,), float64 where the device has it."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """σ_t, (n,), float64 where the device has it."""
        raise NotImplementedError

    def at(self, fraction: float) -> float:
        """The time that lies at this part of the way from data (0) to noise (1)."""
        raise NotImplementedError

    def times(self, n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
        """n times, uniform between the parts `low` and `high` of the way from data to noise, (n,)."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t, shaped to multiply x (n, …), in its precision but not below float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (-1, *[1] * (x.dim() - 1))
        return self.alpha(t).to(x.device, dtype).view(shape), self.sigma(t).to(x.device, dtype).view(shape)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = α_t x_0 + σ_t ε; x0, eps: (n, …), t: (n,)."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps


class VP(Process):
    """Variance preserving: α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t), t an integer in 0 … T−1 (0 has the least noise).

    Args:
        alpha_bar: ᾱ, (T,), decreasing.

    Example:
        >>> process = VP([0.84, 0.36, 0.0])
        >>> float(process.alpha(torch.tensor([1]))), float(process.sigma(torch.tensor([1])))
        (0.6, 0.8)
    """

    def __init__(self, alpha_bar: Tensor | Sequence[float]):
        table = torch.as_tensor(alpha_bar, dtype=torch.float64).cpu()
        if table.dim() != 1 or len(table) < 2 or bool((table < 0).any() or (table > 1).any()):
            raise UserError(f"VP: alpha_bar must be a list of numbers in [0, 1], got shape {tuple(table.shape)}")
        self.alpha_bar = table
        self.steps = len(table)

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> VP:
        """The linear schedule of DDPM: β from `first` to `last` (arXiv 2006.11239)."""
        return cls(torch.cumprod(1 - torch.linspace(first, last, steps, dtype=torch.float64), 0))

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_bar(t)).sqrt()

    def _alpha_bar(self, t: Tensor) -> Tensor:
        return self.alpha_bar.to(t.device, _exact(t.device))[t]

    def at(self, fraction: float) -> int:
        return min(self.steps - 1, max(0, int(fraction * self.steps)))

    def times(self, n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
        """Integers in {low·T, …, high·T}, both ends included and at most T−1."""
        return torch.randint(self.at(low), self.at(high) + 1, (n,), generator=generator)


class Flow(Process):
    """Rectified flow: α_t = 1 − t, σ_t = t, t in [0, 1]; networks of diffusers are told 1000·t.

    Args:
        time_scale: what t is multiplied by for the network; 1 for plain functions of t.
        shift: s > 1 puts more of the way from data to noise at high noise, t = s·u/(1 + (s − 1)·u) at the part u of it
            (arXiv 2403.03206); SD3 has 3.

    Example:
        >>> Flow().add_noise(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25])).tolist()
        [[0.25, 0.25]]
    """

    def __init__(self, time_scale: float = 1000.0, shift: float = 1.0):
        self.time_scale, self.shift = time_scale, shift

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.to(_exact(t.device))

    def sigma(self, t: Tensor) -> Tensor:
        return t.to(_exact(t.device))

    def at(self, fraction: float) -> float:
        return float(self.shift * fraction / (1 + (self.shift - 1) * fraction))

    def times(self, n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
        u = low + (high - low) * torch.rand(n, generator=generator)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def drawn(self, n: int, density: Density, generator: torch.Generator) -> Tensor:
        """n times of the densities of SD3 over the whole way, (n,), then shifted.

        ``logit_normal``: the sigmoid of N(0, 1); ``mode``: 1 − u − 1.29 (cos²(πu/2) − 1 + u), u uniform.

        Source: Esser et al., arXiv 2403.03206, section 3.1.
        """
        if density == "uniform":
            return self.times(n, 0.0, 1.0, generator)
        if density == "logit_normal":
            u = torch.randn(n, generator=generator).sigmoid()
        else:
            u = torch.rand(n, generator=generator)
            u = 1 - u - 1.29 * ((math.pi * u / 2).cos().square() - 1 + u)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def network_time(self, t: Tensor) -> Tensor:
        return t * self.time_scale


def loss_weight(weighting: Weighting, sigma: Tensor) -> Tensor:
    """Weights of a flow's samples by their noise: 1; ``sigma_sqrt`` σ⁻²; ``cosmap`` 2 / (π (1 − 2σ + 2σ²)).

    Example:
        >>> [round(float(loss_weight(w, torch.tensor([0.5]))), 4) for w in ("one", "sigma_sqrt", "cosmap")]
        [1.0, 4.0, 1.2732]
    """
    if weighting == "one":
        return torch.ones_like(sigma)
    return sigma**-2 if weighting == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def _exact(device: torch.device) -> torch.dtype:
    """float64, which Apple's devices lack."""
    return torch.float32 if device.type == "mps" else torch.float64


# -- one thing in five forms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What a prediction at x_t says, in every form.

    Attributes:
        process, x_t, t: where it was made; x_t (n, …), t (n,).
        kind: what `value` is.
        value: the prediction, (n, …).

    v = α ε − σ x_0 (VP), u = ε − x_0 (flow), score = −ε/σ. With α and σ of any process:
    x_0 = (α x_t − σ v)/(α² + σ²) = (x_t − σ u)/(α + σ).

    Example:
        >>> x0, eps, t = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.5])
        >>> view = View(Flow(), Flow().add_noise(x0, eps, t), t, "flow_prediction", eps - x0)
        >>> view.x0.tolist(), view.eps.tolist()
        ([[1.0, 1.0]], [[0.0, 0.0]])
    """

    process: Process
    x_t: Tensor
    t: Tensor
    kind: Prediction
    value: Tensor

    @property
    def x0(self) -> Tensor:
        """x̂_0, the clean sample that is expected behind x_t."""
        (a, s), x, v = self.process.scales(self.t, self.x_t), self.x_t, self.value
        if self.kind == "sample":
            return v
        if self.kind == "epsilon":
            return (x - s * v) / a
        if self.kind == "v_prediction":
            return (a * x - s * v) / (a * a + s * s)
        if self.kind == "flow_prediction":
            return (x - s * v) / (a + s)
        return (x + s * s * v) / a

    @property
    def eps(self) -> Tensor:
        """ε̂, the noise that is expected in x_t."""
        (a, s), x, v = self.process.scales(self.t, self.x_t), self.x_t, self.value
        if self.kind == "epsilon":
            return v
        if self.kind == "sample":
            return (x - a * v) / s
        if self.kind == "v_prediction":
            return (s * x + a * v) / (a * a + s * s)
        if self.kind == "flow_prediction":
            return (x + a * v) / (a + s)
        return -s * v

    @property
    def v(self) -> Tensor:
        """v = α ε̂ − σ x̂_0."""
        if self.kind == "v_prediction":
            return self.value
        a, s = self.process.scales(self.t, self.x_t)
        return a * self.eps - s * self.x0

    @property
    def velocity(self) -> Tensor:
        """u = ε̂ − x̂_0."""
        return self.value if self.kind == "flow_prediction" else self.eps - self.x0

    @property
    def score(self) -> Tensor:
        """∇ log p_t(x_t) = −ε̂ / σ_t."""
        if self.kind == "score":
            return self.value
        return -self.eps / self.process.scales(self.t, self.x_t)[1]


def target(process: Process, kind: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network of this kind should say at x_t = α_t x0 + σ_t eps; the training target of denoising, (n, …)."""
    a, s = process.scales(t, x0)
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return a * eps - s * x0
    return eps - x0 if kind == "flow_prediction" else -eps / s


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the form of diffusers: p(∅) + κ (p(y) − p(∅)); κ = 1 is plain, 0 unconditional.

    The form of Imagen and LCM, p(y) + w (p(y) − p(∅)), is κ = 1 + w.

    Example:
        >>> guide(torch.zeros(1), torch.ones(1), 7.5)
        tensor([7.5000])
    """
    return unconditional + scale * (conditional - unconditional)


def scales_of(policy: str, kappa: float) -> tuple[float, float]:
    """Guidance of the teacher and of the fake score under a named policy.

    ``teacher_only`` moves the goal: where both scores agree, a drift (κ−1)(s(y) − s(∅)) is left. ``both`` keeps the
    unguided distribution as the goal, κ only shapes the way. ``none`` uses no guidance.

    Raises:
        UserError: a policy of another name.
    """
    known = {"teacher_only": (kappa, 1.0), "both": (kappa, kappa), "none": (1.0, 1.0)}
    if policy not in known:
        raise UserError(f"guidance must be one of {', '.join(known)}, got {policy!r}; {did_you_mean(policy, known)}")
    return known[policy]


# -- schedulers of diffusers ------------------------------------------------------------------------------------


def of_scheduler(scheduler: Any, prediction: str | None = None) -> tuple[Process, Prediction]:
    """Process and kind of prediction that a scheduler of diffusers stands for.

    Args:
        scheduler: one with ``alphas_cumprod`` (DDPM, DDIM, DPM++, Euler, …) or a FlowMatch one.
        prediction: what the network is said to predict; must then agree with the scheduler.

    Raises:
        UserError: no such scheduler, or one that stands for another kind of prediction.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> process, kind = of_scheduler(DDPMScheduler(prediction_type="v_prediction"))
        >>> process.steps, kind
        (1000, 'v_prediction')
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None) or {}
    kind: str
    if "FlowMatch" in name:
        shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift") or 1.0)
        process: Process = Flow(float(config.get("num_train_timesteps", 1000)), shift)
        kind = "flow_prediction"
    elif hasattr(scheduler, "alphas_cumprod"):
        process, kind = VP(scheduler.alphas_cumprod), str(config.get("prediction_type", "epsilon"))
        if kind in ("flow_prediction", "score") or kind not in get_args(Prediction):
            raise UserError(f"{name}: prediction_type {kind!r} is not known; expected epsilon, sample or v_prediction")
    else:
        raise UserError(f"expected a scheduler of diffusers with alphas_cumprod or a FlowMatch one, got {name}")
    if prediction is not None and prediction != kind:
        raise UserError(
            f"the network is said to predict {prediction!r}, but {name} is set to {kind!r}; "
            "load the scheduler the network was trained with, or set its prediction_type"
        )
    return process, kind  # type: ignore[return-value]


def check_first_step(process: Process, t: float, kind: Prediction) -> None:
    """Refuses a one-step generator x̂_0 = (z − σ_t ε̂)/α_t that divides by next to nothing.

    Raises:
        UserError: the network predicts ε and ᾱ_t = α_t² < 1e-3 (arXiv 2312.05239 has 0.0047 at t = T−1).
    """
    alpha_bar = float(process.alpha(torch.as_tensor([t]))[0]) ** 2
    if kind == "epsilon" and alpha_bar < LEAST_ALPHA_BAR:
        raise UserError(
            f"a one-step generator that predicts noise would divide by alpha_t = {alpha_bar**0.5:.2g} at t = {t} "
            f"(alpha_bar {alpha_bar:.2g} < {LEAST_ALPHA_BAR}); start at an earlier t (0.6 to 0.8 of the way)"
        )
