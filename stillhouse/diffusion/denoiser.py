"""A network that says what is noise in x_t, with the process it was trained under."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.diffusion.process import Prediction, Process, View, guide, of_scheduler
from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating
from stillhouse.system import map_tensors

Condition = Any
"""Class labels (n,), embeddings (n, l, d), or a mapping of keyword arguments of the network; None for none."""


class Denoiser:
    """A network and its process: what it predicts at (x_t, t, condition), with or without guidance.

    Deliberately not a Module: a teacher is never a part of the System. What a trainable one trains is its `weights`,
    which the System registers.

    Args:
        network: a ``UNet2DModel`` or ``DiTTransformer2DModel`` (conditions are ``class_labels``), a
            ``UNet2DConditionModel`` (``encoder_hidden_states``), any other network of that form, or a plain
            ``f(x_t, t)`` / ``f(x_t, t, condition)``. What it returns is a tensor, or holds one as ``sample``.
        process: how noise is added.
        prediction: what the network predicts.
        null: what stands for "no condition": a class label, an embedding (l, d), or a mapping like the conditions.
            Needed for guidance.

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> zeros = Denoiser(lambda x, t: x / t.view(-1, 1), Flow(1.0), "flow_prediction")  # knows that all data are 0
        >>> view = zeros.view(torch.tensor([[0.5]]), torch.tensor([0.25]))
        >>> view.x0, view.eps
        (tensor([[0.]]), tensor([[2.]]))
    """

    weights: nn.Module | None = None

    def __init__(
        self,
        network: Callable[..., Any],
        process: Process,
        prediction: Prediction = "epsilon",
        *,
        null: Condition = None,
    ):
        if not callable(network):
            raise UserError(f"a denoiser is a network or a function (x_t, t, condition), got {type(network).__name__}")
        self.network, self.process, self.prediction, self.null = network, process, prediction, null
        self.passes = _passes(network)
        self._late_time = "timestep" in _names(network)[2:]  # SD3 and Flux take the texts before it
        self._device: torch.device | None = None

    @classmethod
    def of(cls, network: Any, scheduler: Any, *, prediction: str | None = None, null: Condition = None) -> Denoiser:
        """A frozen network of diffusers with the scheduler it was trained with.

        Raises:
            UserError: a scheduler of another kind, or one that contradicts `prediction`.
        """
        process, kind = of_scheduler(scheduler, prediction)
        return cls(network, process, kind, null=null).freeze()

    def freeze(self) -> Denoiser:
        """Puts the network in eval mode, without gradients to its weights."""
        if isinstance(self.network, nn.Module):
            self.network.eval().requires_grad_(False)
        return self

    def trainable_copy(self) -> Denoiser:
        """A denoiser of its own, with the same values, all of whose weights train."""
        if not isinstance(self.network, nn.Module):
            raise UserError(f"a copy that trains needs a torch.nn.Module, got {type(self.network).__name__}")
        network = copy.deepcopy(self.network).requires_grad_(True)
        made = Denoiser(network, self.process, self.prediction, null=self.null)
        made.weights = network
        return made

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [] if self.weights is None else [p for p in self.weights.parameters() if p.requires_grad]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition = None, *, camera: Tensor | None = None) -> Tensor:
        """What the network says, (n, …) like x_t, at least float32.

        Args:
            x_t: (n, …). t: (n,), as `process` counts. condition: of n samples.
            camera: (n, k); only a fake score with a camera embedding looks at it.
        """
        network, x, c = self.network, x_t, condition
        if isinstance(network, nn.Module):
            weight = next(network.parameters(), None)
            if weight is not None:
                if weight.device != x.device or self._device != x.device:  # weights may be another denoiser's too
                    network.to(x.device)
                    self._device = x.device
                x = x.to(weight.dtype)
                c = map_tensors(c, lambda v: v.to(x.device, weight.dtype if v.is_floating_point() else v.dtype))
        return self.ask(x, t, c).to(torch.promote_types(x_t.dtype, torch.float32))

    def ask(self, x: Tensor, t: Tensor, c: Condition = None) -> Tensor:
        """The network's answer as it is, with nothing moved or cast: for what is itself a part of a Module."""
        given, named = [x], dict[str, Any]()
        if self._late_time:
            named["timestep"] = self.process.network_time(t)
        else:
            given.append(self.process.network_time(t))
        if isinstance(c, Mapping):
            named |= c
        elif c is not None and self.passes:
            named[self.passes] = c
        elif c is not None:
            given.append(c)
        return sample_of(self.network(*given, **named))

    def view(
        self, x_t: Tensor, t: Tensor, condition: Condition = None, scale: float = 1.0, *, camera: Tensor | None = None
    ) -> View:
        """The prediction in every form (``.eps``, ``.x0``, …), guided by p(∅) + scale (p(y) − p(∅)).

        In eval mode, also where the network trains at other times.

        Raises:
            UserError: guidance is asked of a denoiser that has no `null`.
        """
        if isinstance(self.network, nn.Module) and self.network.training:
            with evaluating(self.network):
                return self.view(x_t, t, condition, scale, camera=camera)
        if condition is None or scale == 1:
            value = self.predict(x_t, t, condition, camera=camera)
        elif scale == 0:
            value = self.predict(x_t, t, self.no_condition(condition), camera=camera)
        else:
            both = _joined(self.no_condition(condition), condition)
            cameras = None if camera is None else torch.cat([camera, camera])
            twice = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both, camera=cameras)
            value = guide(twice[: len(x_t)], twice[len(x_t) :], scale)
        return View(self.process, x_t, t, self.prediction, value)

    def no_condition(self, condition: Condition) -> Condition:
        """`null` in the shape of these conditions."""
        if self.null is None:
            raise UserError(
                "guidance (kappa other than 1) and dropped conditions need to know what stands for no condition: "
                "the null class of the network (--null-class), or the embedding of the empty prompt"
            )
        if isinstance(condition, Mapping):
            return {k: torch.as_tensor(self.null[k], device=v.device).expand_as(v).to(v) for k, v in condition.items()}
        return torch.as_tensor(self.null, device=condition.device).expand_as(condition).to(condition)

    def drop(self, condition: Condition, gone: Tensor) -> Condition:
        """The conditions, with `null` in the place of those where `gone` (n,) is true."""
        return pick(gone, self.no_condition(condition), condition)

    def check(self, x: Tensor, condition: Condition = None) -> None:
        """Refuses what is no denoiser for samples like x (n, …): one call at the noisiest time.

        Raises:
            UserError: the call fails, or gives another shape.
        """
        t = torch.as_tensor([self.process.at(1.0)], device=x.device).expand(len(x))
        who = type(self.network).__name__
        try:
            with torch.no_grad():
                out = self.predict(x, t, condition)
        except UserError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"{who} is no denoiser for samples {tuple(x.shape[1:])}: called with (x_t, t"
                f"{'' if condition is None else ', condition'}) it raised {type(error).__name__}: {said}"
            ) from None
        if out.shape != x.shape:
            raise UserError(f"{who} is no denoiser: for x_t {tuple(x.shape)} it gives {tuple(out.shape)}, not the same")


def sample_of(output: Any) -> Tensor:
    """The prediction in what a network returned: a tensor, something with ``sample``, or a tuple that starts with one.

    Raises:
        UserError: nothing of the kind.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("sample") if isinstance(output, Mapping) else getattr(output, "sample", None)
    if isinstance(output, tuple | list) and output and not isinstance(found, Tensor):
        found = output[0]
    if not isinstance(found, Tensor):
        raise UserError(f"a denoiser gives a tensor or something with 'sample', this one {type(output).__name__}")
    return found


def pick(mask: Tensor, yes: Condition, no: Condition) -> Condition:
    """Rows of `yes` where the mask (n,) is true, else of `no`."""
    if isinstance(no, Mapping):
        return {k: pick(mask, yes[k], v) for k, v in no.items()}
    return torch.where(mask.to(no.device).view(-1, *[1] * (no.dim() - 1)), yes, no)


def _names(network: Callable[..., Any]) -> list[str]:
    """What a network calls its arguments; nothing where that cannot be known."""
    try:
        return list(inspect.signature(getattr(network, "forward", network)).parameters)
    except (TypeError, ValueError):
        return []


def _passes(network: Callable[..., Any]) -> str:
    """The keyword under which a network takes its conditions; empty: the third argument."""
    return next((k for k in ("encoder_hidden_states", "class_labels") if k in _names(network)), "")


def _joined(first: Condition, second: Condition) -> Condition:
    if isinstance(first, Mapping):
        return {k: torch.cat([first[k], second[k]]) for k in first}
    return torch.cat([first, second])
