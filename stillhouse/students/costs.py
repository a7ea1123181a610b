"""Parameters and multiply-adds of a pruned network, computed from the base without building it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from stillhouse.students.groups import Group, call
from stillhouse.students.layers import Place, attention, expand, is_depthwise, layout, part, under, width_of
from stillhouse.system import walk

Measure = Literal["macs", "params"]


def macs_by_module(model: nn.Module, example: Any) -> dict[str, int]:
    """Multiply-adds per sample of every module, its children included ("" is the whole network).

    Counted by ``torch.utils.flop_counter`` (half its flops): convolutions, matrix products and attention; one
    forward in eval mode without gradients.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    modes = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel is not counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(model.eval(), example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
    samples = next((len(t) for t in walk(example) if t.dim()), 1)
    root = type(model).__name__
    counts = {n.removeprefix(root + "."): c for n, c in counter.get_flop_counts().items() if n.startswith(root + ".")}
    counts[""] = counter.get_flop_counts()["Global"]
    return {n: sum(c.values()) // (2 * samples) for n, c in counts.items()}


class Costs:
    """Cost of any pruned version of a network: a constant, plus products of kept widths.

    A convolution costs ``unit * out * in``, a depthwise one ``unit * out``, the core of attention
    ``unit * heads``; a parameter tensor costs the product of its kept dimensions.

    Args:
        model: the base.
        example: one input, for counting multiply-adds.
        groups: what can be pruned.
        order: for each group its units in the order in which they would go.
        measure: "macs" (per sample) or "params".
        whole: module paths whose cost does not count.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        groups: Sequence[Group],
        order: Sequence[np.ndarray],
        measure: Measure,
        whole: Sequence[str] = (),
    ) -> None:
        self.model, self.groups = model, groups
        self.widths: dict[Place, int] = {}
        self.gone: dict[Place, list[tuple[int, np.ndarray]]] = {}
        for g, group in enumerate(groups):
            for member in group.members:
                self._add_member(g, member.module, member.axis, member.index, order[g])
        self.terms: list[tuple[int, tuple[Place, ...]]] = []
        terms = self._params(whole) if measure == "params" else self._macs(example, whole)
        self.fixed = sum(cost for cost, places in terms if not places)
        for cost, places in terms:
            if places:
                full = int(np.prod([self.widths[p] for p in places], dtype=np.int64))
                self.terms.append((cost // full, places))

    def _add_member(self, g: int, path: str, axis: Any, index: Sequence[Sequence[int]], order: np.ndarray) -> None:
        lengths = np.array([len(unit) for unit in index])[order]
        places: list[tuple[Place, int]] = [((path, axis), 1)]
        if axis == "heads":
            stored = expand(self.model, path, axis, (0,))
            places += [((p, a), len(i)) for p, a, i in stored if p != path]  # its own rows go as its heads do
        for place, each in places:
            lost = np.concatenate([[0], np.cumsum(lengths * each)])
            self.widths[place] = width_of(self.model, *place)
            self.gone.setdefault(place, []).append((g, lost))

    def _params(self, whole: Sequence[str]) -> list[tuple[int, tuple[Place, ...]]]:
        cut: dict[str, list[Place]] = {}
        for path, axis in self.widths:
            where = layout(part(self.model, path), axis)
            for leaf in where.dims if where else ():
                cut.setdefault(".".join(p for p in (path, leaf) if p), []).append((path, axis))
        named = self.model.named_parameters()
        return [(p.numel(), tuple(cut.get(n, ()))) for n, p in named if under(n, whole) is None]

    def _macs(self, example: Any, whole: Sequence[str]) -> list[tuple[int, tuple[Place, ...]]]:
        counts = macs_by_module(self.model, example)
        rest = counts[""] - sum(counts.get(path, 0) for path in _outermost(whole))
        terms: list[tuple[int, tuple[Place, ...]]] = []
        for name, module in self.model.named_modules():
            if under(name, whole) is not None:
                continue
            places: list[Place] = []
            cost = counts.get(name, 0)
            if isinstance(module, _ConvNd | nn.Linear):
                axes: list[Place] = [(name, "out")] if is_depthwise(module) else [(name, "out"), (name, "in")]
                places = [place for place in axes if place in self.widths]
            elif attention(module) and (name, "heads") in self.widths:
                cost -= sum(counts.get(f"{name}.{child}" if name else child, 0) for child, _ in module.named_children())
                places = [(name, "heads")]
            if places:
                terms.append((cost, tuple(places)))
                rest -= cost
        return [*terms, (rest, ())]

    def __call__(self, pruned: Sequence[int] | np.ndarray) -> int:
        """The cost when the first ``pruned[g]`` units of each group's order are gone."""
        kept = {p: self.widths[p] - sum(int(lost[pruned[g]]) for g, lost in gone) for p, gone in self.gone.items()}
        total = self.fixed
        for unit, places in self.terms:
            for place in places:
                unit *= kept[place]
            total += unit
        return total


def _outermost(paths: Sequence[str]) -> list[str]:
    """The paths that lie under no other path of the list, so that nothing is counted twice."""
    return [p for p in dict.fromkeys(paths) if under(p, [q for q in paths if q != p]) is None]
