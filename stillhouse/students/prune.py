"""Structured pruning to a budget: scores of coupled channels, and the plan that meets a size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from stillhouse.errors import UserError
from stillhouse.students.attention import torch_attention
from stillhouse.students.costs import Costs, Measure, macs_by_module
from stillhouse.students.groups import Group, Member, assemble, plain
from stillhouse.students.layers import layout, part, under
from stillhouse.students.plan import Plan
from stillhouse.students.trace import check_paths, find_groups
from stillhouse.system import fold

__all__ = ["Budget", "Group", "Member", "find_groups", "fit_budget", "macs_by_module", "score_groups"]

Method = Literal["snip", "l1", "bn"]
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Budget:
    """What was asked for and what was reached.

    Attributes:
        measure: "macs" (multiply-adds per sample) or "params".
        ratio: the fraction that was to be removed.
        base: the measure of the unpruned network (without the paths in ``whole``).
        target: ``(1 - ratio) * base``.
        reached: the measure of the plan's network.
        unit: what the unit at the cut costs; a miss below it cannot be helped without breaking nestedness.
    """

    measure: Measure
    ratio: float
    base: int
    target: float
    reached: int
    unit: int = 0

    @property
    def error(self) -> float:
        """Signed relative error ``reached / target - 1``."""
        return self.reached / self.target - 1 if self.target else 0.0

    @property
    def met(self) -> bool:
        """Within 1 % of the target, or within the cost of one unit."""
        return abs(self.reached - self.target) <= max(0.01 * self.target, self.unit)


def score_groups(
    model: nn.Module, groups: Sequence[Group], method: Method = "snip", loss: Loss | None = None
) -> list[Tensor]:
    """How much each unit of each group matters; the least important go first.

    * ``snip``: ``s_u = sum over the unit's weights of |w * dL/dw|``, over all member convolutions and linear
      layers (what makes the unit and what reads it). The sum of absolute values, not ``|sum|``: for a filter
      that feeds BatchNorm the signed sum is zero, because BatchNorm removes the filter's scale.
    * ``l1``: the same sum of ``|w|``.
    * ``bn``: the sum of ``|gamma|`` over the group's BatchNorm layers.

    Args:
        model: the base; weights, buffers, gradients and modes are as before afterwards.
        groups: from `find_groups`.
        method: see above.
        loss: for ``snip``, the cross-entropy of the network on one or a few labelled batches. It is called
            once, in train mode, with dropout and stochastic depth off.

    Returns:
        one float64 tensor of shape (size,) per group, on the CPU, detached.

    Raises:
        UserError: no loss for ``snip``, a loss that is not finite, or ``bn`` on a group without BatchNorm.

    Source: Lee et al., SNIP, ICLR 2019; Li et al., ICLR 2017 (l1); Liu et al., ICCV 2017 (bn).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = nn.init.ones_(net[0].weight), nn.init.ones_(net[2].weight)
        >>> groups, _ = find_groups(net, torch.zeros(1, 2))
        >>> score_groups(net, groups, "l1")[0].tolist()
        [3.0, 3.0]
    """
    if method not in get_args(Method):
        raise UserError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if method == "bn":
        return _bn_scores(model, groups)
    weights = {
        f"{path}.weight" if path else "weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear) and isinstance(module.weight, nn.Parameter)
    } | {
        f"{path}.in_proj_weight" if path else "in_proj_weight": module.in_proj_weight
        for path, module in model.named_modules()
        if torch_attention(module)
    }
    if method == "snip":
        if loss is None:
            raise UserError("method 'snip' needs loss=, a function of the model that gives its cross-entropy")
        grads = _gradients(model, list(weights.values()), loss)
        sizes = {n: (w * g).abs() for (n, w), g in zip(weights.items(), grads, strict=True)}
    else:
        sizes = {n: w.abs() for n, w in weights.items()}
    sizes = {n: s.detach().cpu() for n, s in sizes.items()}
    return [_group_score(model, group, sizes) for group in groups]


def _group_score(model: nn.Module, group: Group, sizes: dict[str, Tensor]) -> Tensor:
    score = torch.zeros(group.size, dtype=torch.float64)
    for member in plain(model, group):
        where = layout(part(model, member.module), member.axis)
        for leaf, dim in where.dims.items() if where else ():
            name = f"{member.module}.{leaf}" if member.module else leaf
            if name in sizes:
                others = [d for d in range(sizes[name].dim()) if d != dim]
                score += _by_unit(sizes[name].sum(others, dtype=torch.float64), member)
    if not torch.isfinite(score).all():
        raise UserError(f"{group.name}: its scores are not finite; check the loss and the weights")
    return score


def _by_unit(per_channel: Tensor, member: Member) -> Tensor:
    """Sums a value per channel over the channels of each unit."""
    units = torch.tensor([u for u, channels in enumerate(member.index) for _ in channels], dtype=torch.long)
    channels = torch.tensor([c for unit in member.index for c in unit], dtype=torch.long)
    zero = torch.zeros(len(member.index), dtype=per_channel.dtype)
    return zero.index_add(0, units, per_channel[channels])


def _bn_scores(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    scores, without = [], []
    for group in groups:
        score, seen = torch.zeros(group.size, dtype=torch.float64), False
        for member in group.members:
            layer = part(model, member.module)
            if isinstance(layer, _BatchNorm) and layer.weight is not None:
                seen = True
                score += _by_unit(layer.weight.detach().double().abs().cpu(), member)
        scores.append(score)
        without += [] if seen else [group.name]
    if without:
        named = "no group has one" if len(without) == len(groups) else f"{without[0]} has none"
        raise UserError(f"method 'bn' needs a BatchNorm in every group, {named}; use 'snip' or 'l1', or ignore= it")
    return scores


@contextmanager
def _scoring(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Train mode with dropout off, for a moment: buffers, modes and requires_grad come back as they were."""
    modes = {m: m.training for m in model.modules()}
    asked = [w.requires_grad for w in weights]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    try:
        model.train()
        for module in model.modules():
            if "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth":
                module.eval()
        for w in weights:
            w.requires_grad_(True)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(fold("prune scores"))
            yield
    finally:
        for w, before in zip(weights, asked, strict=True):
            w.requires_grad_(before)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for module, mode in modes.items():
            module.training = mode


def _gradients(model: nn.Module, weights: Sequence[Tensor], loss: Loss) -> list[Tensor]:
    with _scoring(model, weights):
        value = loss(model)
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            raise UserError("loss= must return a scalar tensor that depends on the model's weights")
        if not torch.isfinite(value):
            raise UserError(f"the scoring loss is {value.item()}; check the scoring batches and the weights")
        grads = torch.autograd.grad(value, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]


def fit_budget(
    model: nn.Module,
    example: Any,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    ratio: float,
    *,
    measure: Measure = "macs",
    kappa: float = 0.5,
    layer_bound: float = 0.9,
    round_to: int = 1,
    tolerance: float = 0.01,
    whole: Sequence[str] = (),
) -> tuple[Plan, Budget]:
    """The plan that removes the least important units until the cost is ``(1 - ratio)`` of the base's.

    Units are compared by ``s / mean(s) * I ** kappa`` with the group's importance
    ``I = mean(s) / (sum over groups of mean(s))``, and go in that one order, so plans for a larger ratio
    contain all cuts of a smaller one. The cut in this order that comes nearest to the target is found by
    bisection on exact costs.

    Args:
        model: the base.
        example: one input, for counting multiply-adds.
        groups: from `find_groups`.
        scores: from `score_groups`, one (size,) tensor per group.
        ratio: fraction of the cost to remove, in [0, 1); 0 gives the identity plan.
        measure: "macs" per sample, or "params".
        kappa: 0 prunes all groups alike, 1 compares raw scores over the whole network.
        layer_bound: at most this fraction of a group goes.
        round_to: kept channels are a multiple of this (heads, and groups left untouched, are exempt).
        tolerance: relative miss that counts as reached.
        whole: module paths outside base and budget (a shared trunk).

    Returns:
        the plan and a `Budget`, whose ``error`` tells the miss (one unit may cost more than the tolerance).

    Raises:
        UserError: an option out of range, or a target out of reach (the message gives the largest ratio).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> groups, _ = find_groups(net, torch.zeros(1, 4))
        >>> plan, budget = fit_budget(net, torch.zeros(1, 4), groups, [torch.arange(8.0)], 0.5)
        >>> plan.edits[0].index, budget.base, budget.reached
        ((4, 5, 6, 7), 56, 28)
    """
    _check_options(model, groups, scores, ratio, measure, kappa, layer_bound, round_to, whole)
    ranked = _ranked(scores, kappa)
    order = [np.argsort(s, kind="stable") for s in ranked]
    costs = Costs(model, example, groups, order, measure, whole)
    steps = _steps(groups, ranked, order, layer_bound, round_to)

    def pruned(k: int) -> np.ndarray:
        counts = np.zeros(len(groups), dtype=np.int64)
        for g, units in steps[:k]:
            counts[g] += units
        return counts

    base = costs(pruned(0))
    target = (1 - ratio) * base
    low, high = 0, len(steps)  # the smallest k whose cost is at most the target
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(pruned(middle)) <= target else (middle + 1, high)
    k = low
    if k and abs(costs(pruned(k - 1)) - target) <= abs(costs(pruned(k)) - target):
        k -= 1
    reached = costs(pruned(k))
    last = costs(pruned(k - 1)) - reached if k else 0
    if reached > target * (1 + tolerance) and k == len(steps) and reached - target > last:
        if not steps:
            raise UserError("no group can lose a unit; the second value of find_groups says why for each layer")
        raise UserError(
            f"ratio={ratio} cannot be reached: at most {1 - reached / max(base, 1):.3f} of {measure} can go; "
            f"lower ratio, raise layer_bound={layer_bound}, or prune more with find_groups(scope='all')"
        )
    keep = []
    for n, group, units in zip(pruned(k), groups, order, strict=True):
        kept = torch.ones(group.size, dtype=torch.bool)
        kept[torch.from_numpy(units[:n].copy())] = False
        keep.append(kept)
    unit = max(last, reached - costs(pruned(k + 1)) if k < len(steps) else 0)
    return assemble(model, groups, keep), Budget(measure, ratio, base, target, reached, unit)


def _ranked(scores: Sequence[Tensor], kappa: float) -> list[np.ndarray]:
    """Scores made comparable between groups: divided by their mean, times the group's importance ** kappa."""
    raw = [s.detach().double().cpu().numpy() for s in scores]
    means = np.array([s.mean() for s in raw]) if raw else np.zeros(0)
    total = means.sum()
    return [s / m * (m / total) ** kappa if m > 0 else np.zeros_like(s) for s, m in zip(raw, means, strict=True)]


def _steps(
    groups: Sequence[Group],
    ranked: Sequence[np.ndarray],
    order: Sequence[np.ndarray],
    layer_bound: float,
    round_to: int,
) -> list[tuple[int, int]]:
    """The single order in which units go: (group, how many of its next units), least important first."""
    steps: list[tuple[float, int, int, int]] = []
    for g, group in enumerate(groups):
        block = 1 if group.members[0].axis == "heads" else round_to
        least = max(1, group.size - int(layer_bound * group.size + 1e-9))
        gone = 0
        while True:
            units = (group.size - gone) % block or block
            if group.size - gone - units < least:
                break
            value = float(ranked[g][order[g][gone : gone + units]].mean())
            steps.append((value, g, gone, units))
            gone += units
    return [(g, units) for _, g, _, units in sorted(steps)]


def _check_options(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    ratio: float,
    measure: str,
    kappa: float,
    layer_bound: float,
    round_to: int,
    whole: Sequence[str],
) -> None:
    if not 0 <= ratio < 1:
        raise UserError(f"ratio is the fraction to remove and must lie in [0, 1), got {ratio}")
    if measure not in get_args(Measure):
        raise UserError(f"measure must be 'macs' or 'params', got {measure!r}")
    if not 0 <= kappa <= 1:
        raise UserError(f"kappa must lie in [0, 1], got {kappa}")
    if not 0 < layer_bound < 1:
        raise UserError(f"layer_bound is the largest fraction of a group to prune, in (0, 1), got {layer_bound}")
    if round_to < 1:
        raise UserError(f"round_to must be at least 1, got {round_to}")
    if [tuple(s.shape) for s in scores] != [(g.size,) for g in groups]:
        raise UserError("scores must be one tensor of shape (size,) for each group, as score_groups gives them")
    check_paths(model, whole=whole)
    for group in groups:
        held = [m.module for m in group.members if under(m.module, whole) is not None]
        if held:
            raise UserError(
                f"{group.name}: its group cuts {held[0]}, which whole= sets apart; find_groups(ignore=…) it"
            )
