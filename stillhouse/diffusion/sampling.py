"""Samples from a denoiser in many steps (DDIM), or from a network that needs one; and the outcome that it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.diffusion.process import VP, Flow, Prediction, Process, View, check_first_step
from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Models

AT_ONCE = 256


def trailing(process: Process, steps: int, first: float = 1.0) -> list[float]:
    """`steps` times evenly from the part `first` of the way down, as diffusers spaces them ("trailing").

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> trailing(VP.linear(1000), 4), trailing(Flow(), 4)
        ([999, 749, 499, 249], [1.0, 0.75, 0.5, 0.25])
    """
    if steps < 1 or not 0 < first <= 1:
        raise UserError(f"sampling needs steps >= 1 and a start in (0, 1], got {steps} and {first}")
    parts = [first * (1 - k / steps) for k in range(steps)]
    return [max(0, round(p * process.steps) - 1) if isinstance(process, VP) else process.at(p) for p in parts]


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition = None,
    *,
    steps: int = 25,
    kappa: float = 1.0,
    times: Sequence[float] | None = None,
    clip: float | None = None,
) -> Tensor:
    """x_s = α_s x̂_0(x_t) + σ_s ε̂(x_t) from time to time, and x̂_0 at the last: DDIM without noise (η = 0).

    For a flow this is Euler's method. One network evaluation per step, two where κ is not 1.

    Args:
        denoiser: asked in eval mode. noise: x at the first time, (n, …). condition: of n samples.
        steps: number of steps, `trailing`; `times` gives them in full.
        kappa: guidance. clip: x̂_0 is cut to [−clip, clip] (ε̂ is not).

    Returns:
        Samples (n, …).

    Source: arXiv 2010.02502.

    Example:
        >>> from stillhouse.diffusion.exact import Mixture
        >>> from stillhouse.diffusion.process import Flow
        >>> point = Mixture(torch.tensor([[2.0]]), 0.0, Flow())
        >>> ddim(point, torch.zeros(1, 1), steps=3)
        tensor([[2.]])
    """
    process, x = denoiser.process, noise
    at = list(trailing(process, steps) if times is None else times)
    for k, time in enumerate(at):
        view = denoiser.view(x, torch.as_tensor([time], device=x.device).expand(len(x)), condition, kappa)
        x0 = view.x0 if clip is None else view.x0.clamp(-clip, clip)
        if k + 1 == len(at):
            return x0
        x = process.add_noise(x0, view.eps, torch.as_tensor([at[k + 1]], device=x.device).expand(len(x)))
    return x


class Moment(Process):
    """A process at one of its times, as plain numbers.

    Args:
        alpha, sigma: α and σ at that time. time: what the network is told of it.
        scale: deviation of the noise that sampling starts from.

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> Moment.of(Flow(), 0.75).facts
        {'alpha': 0.25, 'sigma': 0.75, 'time': 750.0, 'scale': 0.75}
    """

    def __init__(self, alpha: float, sigma: float, time: float, scale: float):
        self.facts = {"alpha": alpha, "sigma": sigma, "time": time, "scale": scale}

    @classmethod
    def of(cls, process: Process, t: float) -> Moment:
        """The process at time t, as it counts: an integer for a VP process."""
        at = torch.as_tensor([t], dtype=None if isinstance(t, int) else torch.float64)
        sigma = float(process.sigma(at))
        scale = 1.0 if isinstance(process, VP) else sigma
        return cls(float(process.alpha(at)), sigma, process.network_time(at).tolist()[0], scale)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.full(t.shape, self.facts["alpha"], dtype=torch.float64, device=t.device)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.full(t.shape, self.facts["sigma"], dtype=torch.float64, device=t.device)

    def network_time(self, t: Tensor) -> Tensor:
        return torch.full(t.shape, self.facts["time"], device=t.device)


class OneStep(nn.Module):
    """A sample in one forward pass: the x̂_0 that a network says at x_t = s z, at one fixed time t.

    For noise prediction x̂_0 = (s z − σ_t ε̂(s z, t, y)) / α_t. s is 1 for a VP process, whose x_t has unit variance at
    every t (SwiftBrush), and σ_t for others. No guidance: the network has learned what it is to say.

    Args:
        network: trained, saved and exported as ``network``.
        moment: the process at the fixed time.
        prediction: what the network predicts.
        shape: of one sample.

    Raises:
        UserError: noise prediction at a time where α_t is next to nothing.

    Source: arXiv 2312.05239.

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> class Zero(nn.Module):
        ...     def forward(self, x, t):
        ...         return 0 * x
        >>> OneStep(Zero(), Moment.of(Flow(), 0.75), "flow_prediction", (2,))(torch.ones(1, 2))
        tensor([[0.7500, 0.7500]])
    """

    def __init__(self, network: nn.Module, moment: Moment, prediction: Prediction, shape: Sequence[int]):
        super().__init__()
        check_first_step(moment, 0, prediction)
        self.network, self.shape, self.scale = network, tuple(shape), moment.facts["scale"]
        self.denoiser = Denoiser(network, moment, prediction)

    @classmethod
    def of(cls, teacher: Denoiser, start: float, shape: Sequence[int]) -> OneStep:
        """A copy of the teacher's network, used once at the part `start` of the way from data to noise."""
        if not isinstance(teacher.network, nn.Module):
            raise UserError(f"a one-step model needs a torch.nn.Module to copy, got {type(teacher.network).__name__}")
        t = teacher.process.at(start)
        check_first_step(teacher.process, t, teacher.prediction)  # before anything is copied
        network = copy.deepcopy(teacher.network).requires_grad_(True)
        if next(network.parameters(), torch.zeros(0)).dtype in (torch.float16, torch.bfloat16):
            network.float()  # a teacher may be read in half precision; what trains may not be
        return cls(network, Moment.of(teacher.process, t), teacher.prediction, shape)

    def forward(self, noise: Tensor, condition: Condition = None) -> Tensor:
        """noise: z ~ N(0, I), (n, *shape); condition: labels (n,) or embeddings (n, l, d)."""
        of, x = self.denoiser, self.scale * noise
        t = torch.zeros(x.shape[0], device=x.device)  # not len(x), which torch.export takes for a constant
        said = of.ask(x, t, condition)
        return View(of.process, x, t, of.prediction, said.to(torch.promote_types(x.dtype, torch.float32))).x0

    @torch.no_grad()
    def sample(self, condition: Condition = None, generator: torch.Generator | None = None, n: int = 1) -> Tensor:
        """Samples for these conditions (`n` of them without any), with noise from `generator`; in eval mode."""
        return _in_parts(self, self, condition, generator, n)


class ManySteps(nn.Module):
    """A network that makes samples in several steps (`ddim`), with all that it takes to do so.

    Args:
        network: trained, saved and exported as ``network``.
        process: how noise is added. prediction: what the network predicts.
        shape: of one sample.
        null: class that stands for no condition; needed for guidance.
        steps, kappa: of sampling.

    Example:
        >>> class Zero(nn.Module):
        ...     def forward(self, x, t):
        ...         return 0 * x
        >>> model = ManySteps(Zero(), Flow(), "flow_prediction", (2,), steps=3)
        >>> model.sample(n=4, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        prediction: Prediction,
        shape: Sequence[int],
        *,
        null: Condition = None,
        steps: int = 25,
        kappa: float = 1.0,
    ):
        super().__init__()
        trailing(process, steps)  # refuses no steps
        self.network, self.process, self.prediction, self.shape = network, process, prediction, tuple(shape)
        self.null, self.steps, self.kappa = null, steps, kappa

    @property
    def denoiser(self) -> Denoiser:
        """The network as a denoiser."""
        return Denoiser(self.network, self.process, self.prediction, null=self.null)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """One network evaluation: what it predicts at x_t (n, …), t (n,), as `process` counts."""
        return self.denoiser.ask(x_t, t, condition)

    @torch.no_grad()
    def sample(self, condition: Condition = None, generator: torch.Generator | None = None, n: int = 1) -> Tensor:
        """Samples for these conditions (`n` of them without any), with noise from `generator`; in eval mode."""

        def make(noise: Tensor, c: Condition) -> Tensor:
            return ddim(self.denoiser, noise, c, steps=self.steps, kappa=self.kappa)

        return _in_parts(self, make, condition, generator, n)


def _in_parts(
    model: OneStep | ManySteps,
    make: Callable[[Tensor, Condition], Tensor],
    condition: Condition,
    generator: torch.Generator | None,
    n: int,
) -> Tensor:
    if condition is not None:
        n = len(next(iter(condition.values())) if isinstance(condition, Mapping) else condition)
    where = next((p.device for p in model.network.parameters()), torch.device("cpu"))
    noise = torch.randn(n, *model.shape, generator=generator).to(where)
    with evaluating(model):
        made = [
            make(noise[i : i + AT_ONCE], _part(condition, slice(i, i + AT_ONCE), where)) for i in range(0, n, AT_ONCE)
        ]
    return torch.cat(made)


def _part(condition: Condition, rows: slice, device: torch.device) -> Condition:
    if condition is None:
        return None
    if isinstance(condition, Mapping):
        return {k: v[rows].to(device) for k, v in condition.items()}
    return condition[rows].to(device)


@dataclass
class Sampler(Models):
    """The outcome of distilling a sampler: networks that make samples, ready to be called.

    Attributes:
        members: each model is a `OneStep` (or another module with ``sample(condition, generator)``).

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> from stillhouse.outcomes import Member
        >>> net = nn.Linear(2, 2)
        >>> net.forward = lambda x, t: 0 * x
        >>> model = OneStep(net, Moment.of(Flow(), 0.75), "flow_prediction", (2,))
        >>> made = Sampler([Member("one-step", model)], torch.zeros(1, 2))
        >>> made.sample(n=3).shape
        torch.Size([3, 2])
    """

    def sample(
        self, condition: Condition = None, generator: torch.Generator | None = None, n: int = 1, name: str | None = None
    ) -> Tensor:
        """Samples of the first member, or of the one called `name`, for these conditions."""
        model: Any = (self.members[0] if name is None else self[name]).model
        return model.sample(condition, generator, n)


def one_step_spec(model: OneStep, network: ModelSpec) -> ModelSpec:
    """How to build a one-step model again from its ``plan.json``: network, α, σ and time, and what it predicts.

    Args:
        model: the live one. network: how its network is built, e.g. ``ModelSpec.of(unet)``.
    """
    of = model.denoiser
    assert isinstance(of.process, Moment)
    facts = {"network": network.to_json(), "moment": of.process.facts, "prediction": of.prediction}
    return ModelSpec("stillhouse.diffusion.sampling:build_one_step", 0, model.shape, options=facts)


def build_one_step(
    shape: Sequence[int], network: Mapping[str, Any], moment: Mapping[str, float], prediction: Prediction
) -> OneStep:
    """A `OneStep` with fresh weights from what `one_step_spec` wrote."""
    return OneStep(ModelSpec.from_json(network).build(), Moment(**moment), prediction, shape)


def many_steps_spec(model: ManySteps, network: ModelSpec) -> ModelSpec:
    """How to build a `ManySteps` again from its ``plan.json``; a null that is no class number is left out."""
    process: dict[str, Any]
    if isinstance(model.process, VP):
        process = {"alpha_bar": model.process.alpha_bar.tolist()}
    elif isinstance(model.process, Flow):
        process = {"time_scale": model.process.time_scale, "shift": model.process.shift}
    else:
        raise UserError(f"a process of the class {type(model.process).__name__} cannot be written down; use VP or Flow")
    null = model.null if isinstance(model.null, int) else None
    facts: dict[str, Any] = {"network": network.to_json(), "process": process, "prediction": model.prediction}
    facts |= {"null": null, "steps": model.steps, "kappa": model.kappa}
    return ModelSpec("stillhouse.diffusion.sampling:build_many_steps", 0, model.shape, options=facts)


def build_many_steps(
    shape: Sequence[int],
    network: Mapping[str, Any],
    process: Mapping[str, Any],
    prediction: Prediction,
    null: int | None,
    steps: int,
    kappa: float,
) -> ManySteps:
    """A `ManySteps` with fresh weights from what `many_steps_spec` wrote."""
    added: Process = VP(**process) if "alpha_bar" in process else Flow(**process)
    made = ModelSpec.from_json(network).build()
    return ManySteps(made, added, prediction, shape, null=null, steps=steps, kappa=kappa)
