"""Gradient descent that can be differentiated through: weights after T steps, with exact gradients and flat memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from stillhouse.bilevel.one_step import Params, _differentiable_attention, own_precision
from stillhouse.system import fold

Inner = Callable[..., Tensor]
Mode = Literal["reverse", "graph"]
State = tuple[list[Tensor], list[Tensor] | None]  # θ_k and, with momentum, b_{k−1}


@overload
def unrolled(
    inner: Inner, params: Mapping[str, Tensor], rates: Tensor, *wrt: Tensor, momentum: float = ..., mode: Mode = ...,
    segment: int = ..., seed: int = ..., at: None = ...,
) -> Params: ...  # fmt: skip
@overload
def unrolled(
    inner: Inner, params: Mapping[str, Tensor], rates: Tensor, *wrt: Tensor, momentum: float = ..., mode: Mode = ...,
    segment: int = ..., seed: int = ..., at: Sequence[int],
) -> list[Params]: ...  # fmt: skip
def unrolled(
    inner: Inner,
    params: Mapping[str, Tensor],
    rates: Tensor,
    *wrt: Tensor,
    momentum: float = 0.0,
    mode: Mode = "reverse",
    segment: int = 0,
    seed: int = 0,
    at: Sequence[int] | None = None,
) -> Params | list[Params]:
    """The weights after T steps of gradient descent, attached to everything they depend on.

    For k = 0 … T−1, with g_k = ∇_θ ℓ_k(θ_k; wrt) and b_{−1} = 0::

        b_k = μ b_{k−1} + g_k,      θ_{k+1} = θ_k − η_k b_k

    Any loss of the result, and any function that made `wrt`, `rates` or `params`, is ordinary autograd. Going back,
    ``reverse`` holds one step's graph at a time: with λ_k = ∂L/∂θ_k, ν_k = ∂L/∂b_k (ν_T = 0)::

        ν_k = −η_k λ_{k+1} + μ ν_{k+1}           ∂L/∂η_k = −⟨λ_{k+1}, b_k⟩
        λ_k = λ_{k+1} + (∂g_k/∂θ)ᵀ ν_k           ∂L/∂wrt += (∂g_k/∂wrt)ᵀ ν_k

    What is kept of the way there is θ_k (and b_k) of every `segment`-th step, no activations: about 2√T copies of the
    weights. For several initialisations call it for each and take the mean of the outer losses.

    Args:
        inner: ``(params, step, *wrt) -> scalar``, ℓ_k; differentiable twice in `params`. It is called again on the
            way back, so it must be a function of its arguments: what it draws at random from a generator of its own
            must be seeded by `step`. A tensor that it reads without being given it is a constant.
        params: θ_0 by name.
        rates: η, (T,): one step size per step, and so the number of steps. For one size that all share give
            ``eta.expand(T)``.
        wrt: tensors of any shape that the inner losses depend on: synthetic inputs, labels, weights. One that is not
            used gets no gradient (zeros).
        momentum: μ.
        mode: ``reverse``, or ``graph``: the graph of all steps, in memory at once. It gives the same gradients, and
            is the one that can itself be differentiated again.
        segment: keep the weights of every this many steps, and go the steps between twice. 0 takes √T, which keeps
            the fewest; 1 keeps all T and saves one gradient per step, less than a tenth of the time.
        seed: torch's generators are seeded by (seed, k) before step k, in both directions, so that dropout draws the
            same masks; their state is given back as it was.
        at: also the weights on the way: numbers of steps done, ascending, in 1 … T.

    Returns:
        θ_T by name; with `at` a list of such, one for each.

    Autocast and compiled modules are off inside: neither can be differentiated twice exactly. Recurrent layers on a
    GPU need cuDNN off (``torch.backends.cudnn.flags(enabled=False)``) around this call and the backward pass.

    Raises:
        ValueError: settings out of range; an inner loss that is no scalar or does not depend on `params`.

    Source: Maclaurin et al. 2015 (arXiv 1502.03492) and Wang et al., Dataset Distillation (arXiv 1811.10959), for the
    reverse recursion.

    Example:
        >>> x, rates = torch.tensor(3.0, requires_grad=True), torch.tensor([0.25, 0.25])
        >>> theta = unrolled(lambda p, k, x: (p["w"] - x) ** 2, {"w": torch.tensor(0.0)}, rates, x)
        >>> theta["w"].backward()           # each step goes half of the way to x: w = (1 − 1/4) x
        >>> theta["w"].item(), x.grad.item()
        (2.25, 0.75)
    """
    steps = len(rates) if rates.dim() == 1 else 0
    marks = (steps,) if at is None else tuple(at)
    if steps < 1:
        raise ValueError(f"unrolled: rates must hold one step size per step, shape (T,), got {tuple(rates.shape)}")
    if mode not in ("reverse", "graph") or segment < 0:
        raise ValueError(f"unrolled: mode must be 'reverse' or 'graph' and segment >= 0, got {mode!r}, {segment}")
    if not marks or list(marks) != sorted(set(marks)) or not 1 <= marks[0] <= marks[-1] <= steps:
        raise ValueError(f"unrolled: at must be ascending numbers in 1…{steps}, got {marks}")
    plan = _Plan(inner, tuple(params), momentum, segment or math.isqrt(steps), seed, marks)
    theta = list(params.values())
    attached = torch.is_grad_enabled() and any(t.requires_grad for t in (rates, *theta, *wrt))
    if attached and mode == "graph":
        found = plan.graph(theta, rates, wrt)
    elif attached:
        found = _Reverse.apply(plan, rates, *theta, *wrt)
    else:
        found = plan.forward([t.detach() for t in theta], rates.detach(), [w.detach() for w in wrt])[0]
    n = len(theta)
    made = [dict(zip(plan.names, found[i * n : (i + 1) * n], strict=True)) for i in range(len(marks))]
    return made[0] if at is None else made


@dataclass(frozen=True)
class _Plan:
    """The inner loop without its tensors."""

    inner: Inner
    names: tuple[str, ...]
    momentum: float
    segment: int
    seed: int
    at: tuple[int, ...]

    def gradient(self, k: int, theta: Sequence[Tensor], wrt: Sequence[Tensor], graph: bool) -> list[Tensor]:
        """g_k; `theta` must require gradients."""
        device = theta[0].device
        torch.default_generator.manual_seed(fold(self.seed, k))
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(fold(self.seed, k))
        loss = self.inner(dict(zip(self.names, theta, strict=True)), k, *wrt)
        if loss.dim() or not loss.requires_grad:
            what = f"has shape {tuple(loss.shape)}" if loss.dim() else "does not depend on params"
            raise ValueError(f"unrolled: the inner loss must be a scalar function of params; at step {k} it {what}")
        found = torch.autograd.grad(loss, list(theta), create_graph=graph, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, theta, strict=True)]

    def moved(self, g: list[Tensor], b: list[Tensor] | None) -> list[Tensor]:
        """b_k from g_k and b_{k−1}."""
        return g if b is None or not self.momentum else [self.momentum * v + u for v, u in zip(b, g, strict=True)]

    def walk(self, state: State, steps: range, rates: Tensor, wrt: Sequence[Tensor]) -> Iterator[State]:
        """The states after each of `steps`, without a graph."""
        theta, b = state
        for k in steps:
            with torch.enable_grad():
                g = self.gradient(k, [t.detach().requires_grad_() for t in theta], wrt, graph=False)
            with torch.no_grad():
                b = self.moved(g, b)
                theta = [t - rates[k] * v for t, v in zip(theta, b, strict=True)]
            yield theta, b if self.momentum else None

    def forward(self, theta: list[Tensor], rates: Tensor, wrt: Sequence[Tensor]) -> tuple[list[Tensor], list[State]]:
        """The weights at the marks, one after the other, and the states to go back from."""
        start: State = (theta, None)
        kept, out = [start], list[Tensor]()
        with _alone(theta[0].device):
            for k, state in enumerate(self.walk(start, range(len(rates)), rates, wrt), 1):
                if k % self.segment == 0 and k < len(rates):
                    kept.append(state)
                if k in self.at:
                    out += [t.detach() for t in state[0]]  # not the tensors that are kept: those would hold themselves
        return out, kept

    def graph(self, theta: list[Tensor], rates: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
        """The weights at the marks, attached to every step's graph."""
        out, b = list[Tensor](), None
        theta = [t if t.requires_grad else t.detach().requires_grad_() for t in theta]
        with _alone(theta[0].device):
            for k in range(len(rates)):
                b = self.moved(self.gradient(k, theta, wrt, graph=True), b)
                theta = [t - rates[k] * v for t, v in zip(theta, b, strict=True)]
                out += theta if k + 1 in self.at else []
        return out


class _Reverse(torch.autograd.Function):
    """The walk back, one step's graph at a time."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, rates: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(plan.names)
        out, ctx.kept = plan.forward(list(tensors[:n]), rates, tensors[n:])
        ctx.plan = plan
        ctx.save_for_backward(rates, *tensors)  # autograd notices when one of them is changed before the way back
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        n = len(plan.names)
        rates, wrt = ctx.saved_tensors[0], ctx.saved_tensors[1 + n :]
        start = any(ctx.needs_input_grad[2 : 2 + n])
        leaves = [w.detach().requires_grad_(need) for w, need in zip(wrt, ctx.needs_input_grad[2 + n :], strict=True)]
        wanted = [w for w in leaves if w.requires_grad]
        direct = {k: given[i * n : (i + 1) * n] for i, k in enumerate(plan.at)}
        slope, found = torch.zeros_like(rates), [torch.zeros_like(w) for w in wanted]
        lam = [torch.zeros_like(t) for t in ctx.kept[0][0]]
        nu = [torch.zeros_like(t) for t in lam]
        with _alone(lam[0].device):
            for k, (theta, b) in _backwards(plan, ctx.kept, rates, wrt):
                lam = _add(lam, direct.get(k + 1, ()))
                with torch.enable_grad():
                    theta = [t.detach().requires_grad_() for t in theta]
                    g = plan.gradient(k, theta, leaves, graph=True)
                b = plan.moved([u.detach() for u in g], b)
                slope[k] = -torch.stack([(u * v).sum() for u, v in zip(lam, b, strict=True)]).sum()
                nu = [plan.momentum * v - rates[k] * u for u, v in zip(lam, nu, strict=True)]
                inputs = [*theta, *wanted] if k or start else wanted
                products = _pull(g, inputs, nu)
                lam = _add(lam, products[: len(inputs) - len(wanted)])
                found = _add(found, products[len(inputs) - len(wanted) :])
        rest = iter(found)
        back = [next(rest) if w.requires_grad else None for w in leaves]
        return None, slope, *(lam if start else [None] * n), *back


def _backwards(plan: _Plan, kept: list[State], rates: Tensor, wrt: Sequence[Tensor]) -> Iterator[tuple[int, State]]:
    """(k, state before step k) for k = T−1 … 0; between kept states the way is gone again."""
    for i in reversed(range(len(kept))):
        first, last = i * plan.segment, min((i + 1) * plan.segment, len(rates)) - 1
        states = [kept[i], *plan.walk(kept[i], range(first, last), rates, wrt)]
        while states:
            yield first + len(states) - 1, states.pop()


def _pull(outputs: list[Tensor], inputs: list[Tensor], vector: list[Tensor]) -> list[Tensor | None]:
    """(∂outputs/∂inputs)ᵀ vector; None where nothing depends on it."""
    pairs = [(o, v) for o, v in zip(outputs, vector, strict=True) if o.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    heads, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(heads, inputs, weights, allow_unused=True))


def _add(total: list[Tensor], more: Sequence[Tensor | None]) -> list[Tensor]:
    return [t if m is None else t + m for t, m in zip(total, more, strict=True)] if more else total


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Eager, in the tensors' own precision, and leaving the state of torch's generators as it was."""
    mine = [device] if device.type == "cuda" else []
    with own_precision(device.type), _differentiable_attention(), torch.random.fork_rng(devices=mine):
        yield
