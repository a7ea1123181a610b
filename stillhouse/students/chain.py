"""A network as a chain of units: where a trunk can end, and where the head is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluate import evaluating


@dataclass(frozen=True)
class Unit:
    """One step of a network's chain: a module path, its class, and its share of the multiply-accumulates."""

    path: str
    kind: str
    share: float


def find_units(model: nn.Module, example: Tensor) -> list[Unit]:
    """The coarse units of a network in the order they run: children, with containers and big bodies opened up.

    Args:
        model: any network.
        example: an input batch (n, …).

    Returns:
        Units with their MAC shares (they sum to at most 1).
    """
    order: list[str] = []
    macs: dict[str, float] = {}
    hooks = []
    names = {m: n for n, m in model.named_modules()}

    def before(module: nn.Module, args: Any) -> None:
        order.append(names[module])

    def after(module: nn.Module, args: Any, out: Any) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d | nn.Conv1d | nn.Linear) and isinstance(out, Tensor) and weight is not None:
            per = weight.numel() / weight.shape[0] * out.numel()
            path = names[module]
            while path:
                macs[path] = macs.get(path, 0.0) + per
                path = path.rpartition(".")[0]

    for module in names:
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    _run_once(model, example, hooks)
    total = sum(v for k, v in macs.items() if "." not in k) or 1.0

    def expand(path: str) -> Iterator[str]:
        module = model.get_submodule(path)
        children = [f"{path}.{n}" if path else n for n, _ in module.named_children()]
        ran = [c for c in children if order.count(c) == 1 or _list_like(model.get_submodule(c))]
        big = macs.get(path, 0.0) / total > 0.5
        if path and not (isinstance(module, nn.Sequential | nn.ModuleList) or (big and len(ran) > 1)):
            yield path
            return
        for child in sorted(ran, key=lambda c: next((k for k, p in enumerate(order) if p == c or p.startswith(c + ".")),
                                                    len(order))):  # fmt: skip
            yield from expand(child)

    return [
        Unit(p, type(model.get_submodule(p)).__name__, macs.get(p, 0.0) / total)
        for p in expand("")
        if order.count(p) == 1
    ]


def _list_like(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def trunk_until(units: Sequence[Unit], cut: str) -> list[str]:
    """The units up to and including module `cut` (a unit, or a module whose units it contains)."""
    inside = [k for k, u in enumerate(units) if u.path == cut or u.path.startswith(cut + ".")]
    if not inside:
        raise UserError(f"trunk: no part of the network is called {cut!r}; {did_you_mean(cut, parents(units))}")
    if inside[-1] + 1 >= len(units):
        raise UserError(f"the trunk cannot reach up to {cut!r}: nothing would be left for the peers' own tails")
    return [u.path for u in units[: inside[-1] + 1]]


def parents(units: Sequence[Unit]) -> list[str]:
    """Unit paths and the modules that hold them."""
    found: dict[str, None] = {}
    for u in units:
        parts = u.path.split(".")
        found.update({".".join(parts[: k + 1]): None for k in range(len(parts))})
    return list(found)


def default_trunk(units: Sequence[Unit], share: float = 0.5) -> list[str]:
    """The first units whose part of the multiply-accumulates comes nearest to `share`.

    At least one unit with weights is shared, and at least a twentieth of the work is left to the tails.
    """
    total, best, gap = 0.0, 0, 2.0
    whole = sum(u.share for u in units)
    for k, u in enumerate(units[:-1]):
        total += u.share
        if total > 0 and whole - total >= 0.05 and abs(total - share) <= gap:
            best, gap = k + 1, abs(total - share)
    if not best:
        raise UserError("the network has no parts that could be a shared trunk; use --share none or nested")
    return [u.path for u in units[:best]]


def _run_once(model: nn.Module, example: Tensor, hooks: list[Any]) -> None:
    """One forward pass in eval mode for the hooks to see, which are then removed; every module keeps its mode."""
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for h in hooks:
            h.remove()


def find_head(model: nn.Module, example: Tensor) -> str:
    """Path of the last linear layer that runs: its input is the feature vector, its output the logits."""
    seen: list[str] = []
    hooks = [
        m.register_forward_hook(lambda m, a, o, n=n: seen.append(n))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    _run_once(model, example, hooks)
    if not seen:
        raise UserError(f"{type(model).__name__} has no nn.Linear that could be its classification head")
    return seen[-1]
