"""Hypergradients: how an outer loss moves when the weights inside an inner loss move.

The inner loss is linear in the outer variable, L1(θ, ω) = Σ_i ω_i · L_i(θ): that covers weights of peers, of
teachers, of terms and of data domains, and makes the derivative of one inner step closed-form and first-order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Params = dict[str, Tensor]
Mode = Literal["grad", "jvp", "fd"]


@dataclass(frozen=True)
class Hypergradient:
    """The result of `one_step`.

    Attributes:
        total: dL2/dω, shape (m,).
        direct: ∂L2/∂ω at fixed θ, shape (m,).
        indirect: −γ⟨∂L2/∂θ, ∂L_i/∂θ⟩, shape (m,).
        outer: the outer loss, a scalar.
    """

    total: Tensor
    direct: Tensor
    indirect: Tensor
    outer: Tensor


def one_step(
    predict: Callable[[Params], Any],
    terms: Callable[[Any, Any], Tensor],
    outer: Callable[[Params, Tensor], Tensor],
    params: Mapping[str, Tensor],
    weights: Tensor,
    *,
    lr: float,
    mode: Mode = "jvp",
    at: Literal["before", "after"] = "before",
    scale: Mapping[str, float] | None = None,
    neumann: int = 0,
    all_mean: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
    inner_mean: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
) -> Hypergradient:
    """Derivative of an outer loss through one gradient step of a weighted inner loss.

    With θ' = θ − γ S ∇_θ Σ_i ω_i L_i(θ)::

        dL2/dω_i = ∂L2/∂ω_i − γ ⟨∂L2/∂θ, S ∂L_i/∂θ⟩                                    (WML, eq. 4)

    where ∂L2 is taken at θ' (``at="after"``: the exact total derivative of the one-step problem) or at θ
    (``at="before"``: no extra step, a first-order approximation). With ``neumann=K`` the vector ∂L2/∂θ is
    replaced by Σ_{k≤K} (I − γ H S)^k ∂L2/∂θ, H the Hessian of the inner loss with its teachers held still (truncated
    implicit function theorem).

    Args:
        predict: parameters → whatever `terms` needs (logits on the training batch).
        terms: ``(outputs, fixed) -> (m,)``, the L_i. ``fixed`` are the same outputs without a graph; use them where
            a stop-gradient belongs, so that finite differences hold the teachers still as the other modes do.
        outer: ``(params, weights) -> scalar``, L2 on held-out data.
        params: θ by name; not changed.
        weights: ω, shape (m,); not changed.
        lr: γ, the inner step size.
        mode: how the m inner products are taken: ``grad`` m backward passes, ``jvp`` one forward-mode pass,
            ``fd`` central differences along v with ε = 1e-2/‖v‖, 1e-5/‖v‖ in float64 (two forward passes).
        scale: S, a factor per parameter name where the optimiser scales gradients (a shared trunk); 1 elsewhere.
        neumann: K, number of further terms; each costs one Hessian-vector product.
        all_mean: averages a list of tensors over processes; with it every process gets the joint derivative.
        inner_mean: the same for what comes from the inner batch, where its shares differ from the outer one's.

    Returns:
        A `Hypergradient`, all detached, in float32 or better.

    Source: Zhang et al., Weighted Mutual Learning (NeurIPS 2022), Theorem 1 as a third-party code names it; the
    Neumann form is that of iDARTS (Zhang et al., 2021).

    Example:
        >>> x, t = torch.tensor(1.0), torch.tensor([0.0, 2.0])
        >>> h = one_step(lambda p: p["x"], lambda out, _: (out - t) ** 2, lambda p, w: (p["x"] - 2) ** 2,
        ...              {"x": x}, torch.tensor([0.5, 0.5]), lr=0.1, mode="grad")
        >>> [round(float(v), 3) for v in h.total]   # raising the weight of target 2 lowers the outer loss
        [0.4, -0.4]
    """
    theta = {k: p.detach() for k, p in params.items()}
    names, scale = list(theta), dict(scale or {})
    factors = [scale.get(k, 1.0) for k in names]
    inner_mean = inner_mean or all_mean

    with own_precision(next(iter(theta.values())).device.type):
        if at == "after":
            inner = _leaves(theta)
            out = predict(inner)
            loss = (weights.detach() * terms(out, _fixed(out))).sum()
            step = inner_mean(_grads(loss, list(inner.values())))
            point = {k: theta[k] - lr * f * g for k, f, g in zip(names, factors, step, strict=True)}
        else:
            point = theta
        there, omega = _leaves(point), weights.detach().clone().requires_grad_()
        value = outer(there, omega)
        *v, direct = all_mean(_grads(value, [*there.values(), omega]))
        if lr == 0:
            return Hypergradient(direct, direct, torch.zeros_like(direct), value.detach())
        v = _neumann(predict, terms, theta, weights, v, lr, factors, neumann, inner_mean)
        v = [f * g for f, g in zip(factors, v, strict=True)]
        products = _inner_products(predict, terms, theta, dict(zip(names, v, strict=True)), mode)
        products = inner_mean([products])[0]
    indirect = -lr * products.to(direct.dtype)
    return Hypergradient(direct + indirect, direct, indirect, value.detach())


def _inner_products(predict: Any, terms: Any, theta: Params, v: Params, mode: Mode) -> Tensor:
    """⟨v, ∂L_i/∂θ⟩ for every i, shape (m,)."""
    if mode == "grad":
        leaves = _leaves(theta)
        out = predict(leaves)
        values = terms(out, _fixed(out))
        rows = []
        for i, value in enumerate(values):
            g = _grads(value, list(leaves.values()), keep=i + 1 < len(values))
            rows.append(torch.stack([(a * b).sum() for a, b in zip(g, v.values(), strict=True)]).sum())
        return torch.stack(rows)
    if mode == "jvp":

        def at(p: Params) -> Tensor:
            out = predict(p)
            return terms(out, _fixed(out))

        with _differentiable_attention():
            return torch.func.jvp(at, (theta,), (v,))[1].detach()
    if mode == "fd":
        with torch.no_grad():
            norm = torch.sqrt(sum((g.double() ** 2).sum() for g in v.values()))  # type: ignore[arg-type]
            if not norm > 0:
                return torch.zeros_like(terms(*[predict(theta)] * 2))
            double = all(p.dtype == torch.float64 for p in theta.values())
            eps = float((1e-5 if double else 1e-2) / norm)
            fixed = predict(theta)
            ahead = terms(predict({k: p + eps * v[k] for k, p in theta.items()}), fixed)
            behind = terms(predict({k: p - eps * v[k] for k, p in theta.items()}), fixed)
            return (ahead - behind) / (2 * eps)
    raise ValueError(f"mode must be 'grad', 'jvp' or 'fd', got {mode!r}")


def _neumann(
    predict: Any,
    terms: Any,
    theta: Params,
    weights: Tensor,
    v: list[Tensor],
    lr: float,
    factors: list[float],
    order: int,
    all_mean: Any,
) -> list[Tensor]:
    """Σ_{k=0}^{order} (I − γ H S)^k v by repeated Hessian-vector products."""
    if order == 0:
        return v
    total, term = list(v), list(v)
    for _ in range(order):
        leaves = _leaves(theta)
        out = predict(leaves)
        loss = (weights.detach() * terms(out, _fixed(out))).sum()
        g = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        dot = sum((a * b * f).sum() for a, b, f in zip(g, term, factors, strict=True) if a is not None)
        hv = all_mean(_grads(dot, list(leaves.values())))  # type: ignore[arg-type]
        term = [t - lr * h for t, h in zip(term, hv, strict=True)]
        total = [a + t for a, t in zip(total, term, strict=True)]
    return total


def _leaves(params: Mapping[str, Tensor]) -> Params:
    return {k: p.detach().requires_grad_() for k, p in params.items()}


def _fixed(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return [_fixed(o) for o in outputs]


def _grads(value: Tensor, inputs: list[Tensor], keep: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=keep or None)
    return [torch.zeros_like(x) if g is None else g.detach() for g, x in zip(found, inputs, strict=True)]


@contextlib.contextmanager
def own_precision(device: str) -> Iterator[None]:
    """Eager and in the parameters' own precision: neither compiled modules nor autocast support forward mode.

    Half precision would also be too coarse for differences and inner products of small gradients.
    """
    compiled = "torch._dynamo" in sys.modules  # importing it costs seconds, and nothing is compiled without it
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with eager, torch.autocast(device, enabled=False):
        yield


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """The fused attention kernels have no forward-mode derivative; the plain one has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()  # nn.MultiheadAttention's own kernel, taken in eval mode
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
