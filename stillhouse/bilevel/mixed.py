"""How an outer loss moves through one step when the inner loss depends on outer parameters in any way.

With θ' = Φ(θ, g), g = ∇_θ L(θ, φ), and an outer loss F(θ')::

    dF/dφ = ∂/∂φ ⟨w, ∇_θ L(θ, φ)⟩,   w = (∂θ'/∂g)ᵀ ∇F(θ')          for gradient descent w = −η ∇F(θ')

`step` is Φ of a torch optimiser, with its state, as a function of g; `mixed` the derivative of the inner product;
`along` the inner products with many gradients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.bilevel.one_step import Params, _differentiable_attention, _grads, _leaves, own_precision
from stillhouse.errors import UserError


def mixed(
    loss: Callable[[Params, Params], Tensor],
    inner: Mapping[str, Tensor],
    outer: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    *,
    mode: Literal["autograd", "fd"] = "autograd",
    radius: float = 0.01,
) -> list[Tensor]:
    """∂/∂φ ⟨v, ∂L(θ, φ)/∂θ⟩ for every outer parameter φ.

    ``fd``, with R = `radius` / ‖v‖ (of all tensors together), needs first derivatives alone, with an error of O(R²)::

        [∇_φ L(θ + R v, φ) − ∇_φ L(θ − R v, φ)] / 2R

    Args:
        loss: ``(inner, outer) -> scalar``, L; attached to both. It must be a function of its arguments: no dropout.
        inner: θ by name; not changed. outer: φ by name; not changed.
        direction: v, shaped and named as θ.
        mode: ``autograd`` differentiates twice.
        radius: length of the steps that ``fd`` makes.

    Returns:
        One detached tensor per outer parameter, in their order; zeros where v is 0 or nothing depends on φ.

    Source: Liu et al., DARTS (arXiv 1806.09055), equation 8, for the differences.

    Example:
        >>> x, y, v = ({k: torch.tensor(n)} for k, n in (("x", 2.0), ("y", 3.0), ("x", 1.0)))
        >>> [float(g) for g in mixed(lambda a, b: a["x"] ** 2 * b["y"] ** 2, x, y, v)]   # 4xy
        [24.0]
    """
    theta, v = {k: p.detach() for k, p in inner.items()}, [direction[k].detach() for k in inner]
    with own_precision(next(iter(theta.values())).device.type), _differentiable_attention():
        if mode == "autograd":
            there, phi = _leaves(theta), _leaves(outer)
            value = loss(there, phi)
            first = torch.autograd.grad(value, list(there.values()), create_graph=True, allow_unused=True)
            dots = [(g * u).sum() for g, u in zip(first, v, strict=True) if g is not None]
            total = torch.stack(dots).sum() if dots else value.new_zeros(())
            if not total.requires_grad:
                return [torch.zeros_like(p) for p in phi.values()]
            return _grads(total, list(phi.values()))
        if mode != "fd":
            raise ValueError(f"mode must be 'autograd' or 'fd', got {mode!r}")
        norm = float(torch.sqrt(sum((u.double() ** 2).sum() for u in v)))  # type: ignore[arg-type]
        if not norm > 0:
            return [torch.zeros_like(p) for p in outer.values()]
        step = radius / norm
        ends = []
        for sign in (1.0, -1.0):
            at = {k: p + sign * step * u for (k, p), u in zip(theta.items(), v, strict=True)}
            phi = _leaves(outer)
            value = loss(at, phi)
            leaves = list(phi.values())
            ends.append(_grads(value, leaves) if value.requires_grad else [torch.zeros_like(p) for p in leaves])
        return [(ahead - behind) / (2 * step) for ahead, behind in zip(*ends, strict=True)]


def along(values: Callable[[Params], Tensor], params: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    """⟨v, ∂f_i/∂θ⟩ for every value f_i, shaped as they are, in one forward-mode pass.

    Args:
        values: parameters → f, such as the losses of all samples of a batch.
        params: θ by name. direction: v, shaped and named as θ.

    Example:
        >>> p, v = {"x": torch.tensor(3.0)}, {"x": torch.tensor(1.0)}
        >>> along(lambda q: torch.stack([q["x"], q["x"] ** 2]), p, v).tolist()
        [1.0, 6.0]
    """
    theta = {k: p.detach() for k, p in params.items()}
    v = {k: direction[k].detach() for k in theta}
    with own_precision(next(iter(theta.values())).device.type), _differentiable_attention():
        return torch.func.jvp(values, (theta,), (v,))[1].detach()


def step(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    factor: float | None = None,
) -> list[Tensor]:
    """The parameters after the next step of `optimizer`, as a differentiable function of the gradients.

    Nothing is changed: neither the parameters nor the optimiser's state.

    Args:
        optimizer: SGD, Adam or AdamW of torch, with whatever state it has.
        params: parameters that it moves.
        grads: g, one for each; None leaves a parameter alone, as a real step does.
        factor: on each group's learning rate as it was made (``initial_lr``); None takes its present one.

    Raises:
        UserError: another optimiser, or one with amsgrad or maximize.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> step(torch.optim.SGD([p], lr=0.1), [p], [torch.tensor([2.0])])[0].tolist(), p.item()
        ([0.800000011920929], 1.0)
    """
    rule: Any = RULES.get(type(optimizer))
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    if rule is None or any(g.get("amsgrad") or g.get("maximize") for g in optimizer.param_groups):
        raise UserError(f"a virtual step is known for SGD, Adam and AdamW without amsgrad or maximize, got {optimizer}")
    made = []
    for p, g in zip(params, grads, strict=True):
        group = group_of[id(p)]
        lr = group["lr"] if factor is None else group.get("initial_lr", group["lr"]) * factor
        made.append(p.detach() if g is None else rule(p.detach(), g, optimizer.state.get(p, {}), group, lr))
    return made


def _sgd(p: Tensor, g: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], lr: float) -> Tensor:
    g = g + group["weight_decay"] * p
    if group["momentum"]:
        old = state.get("momentum_buffer")
        b = g if old is None else group["momentum"] * old + (1 - group["dampening"]) * g
        g = g + group["momentum"] * b if group["nesterov"] else b
    return p - lr * g


def _adam(p: Tensor, g: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], lr: float) -> Tensor:
    (b1, b2), decay, t = group["betas"], group["weight_decay"], float(state.get("step", 0)) + 1
    if group.get("decoupled_weight_decay"):
        p = p * (1 - lr * decay)
    else:
        g = g + decay * p
    m = b1 * state["exp_avg"] + (1 - b1) * g if state else (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g if state else (1 - b2) * g * g
    # The root has no derivative at 0, where the step is m/ε and does not feel it.
    root = torch.where(v > 0, v, 1.0).sqrt() * (v > 0)
    return p - lr / (1 - b1**t) * m / (root / (1 - b2**t) ** 0.5 + group["eps"])


RULES = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam, torch.optim.AdamW: _adam}
