"""The parts of a diffusion transformer that can be removed, what each is worth, and which of them go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.blocks import block_paths
from stillhouse.students.edits import Remove
from stillhouse.students.removed import Leaves

# What a component is called in the blocks of DiT, SD3 and Flux, and in most others.
CHILDREN: dict[str, tuple[str, ...]] = {
    "w_norm1": ("norm1", "norm"),
    "w_norm1_context": ("norm1_context",),
    "attn": ("attn", "attn1"),
    "attn2": ("attn2",),
    "ff": ("ff", "mlp"),
    "ff_context": ("ff_context",),
}
FINE = tuple(CHILDREN)
BRANCHES = ("attn", "attn2", "ff", "ff_context")  # for which zero can stand
READ_BY_OTHERS = {"DiTTransformer2DModel": "norm1.emb"}  # of the first block: its output layers ask it for the time


@dataclass(frozen=True)
class Part:
    """A removable part.

    Attributes:
        block: its block's number in the whole network, from 0. component: ``block``, or a key of `CHILDREN`.
        module: its path. params: parameters that go with it. keeps: modules under it that stay, see `Remove`.
    """

    block: int
    component: str
    module: str
    params: int
    keeps: tuple[str, ...] = ()

    def edit(self, leaves: Leaves) -> Remove:
        return Remove(self.module, leaves if self.component in BRANCHES else "input", self.keeps)

    def touches(self, other: Part) -> bool:
        """Whether it is the other, lies in it, or holds it."""
        a, b = f"{self.module}.", f"{other.module}."
        return a.startswith(b) or b.startswith(a)


def find_parts(network: nn.Module) -> list[Part]:
    """Every block, and every component of it, in the order of the network.

    Raises:
        UserError: the network has no list of blocks.
    """
    found = []
    for number, path in enumerate(block_paths(network)):
        block = network.get_submodule(path)
        owner = network.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
        kept = READ_BY_OTHERS.get(type(owner).__name__, "") if path.endswith(".0") else ""
        children = dict(block.named_children())
        names = {c: next((n for n in called if n in children), "") for c, called in CHILDREN.items()}
        for component, name in {"block": "", **{c: n for c, n in names.items() if n}}.items():
            inside = kept if not name else kept.removeprefix(f"{name}.") if kept.startswith(f"{name}.") else ""
            module = f"{path}.{name}".rstrip(".")
            own, stays = network.get_submodule(module), [inside] if inside else []
            params = _count(own) - sum(_count(own.get_submodule(k)) for k in stays)
            if params:
                found.append(Part(number, component, module, params, tuple(stays)))
    return found


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def between(every: Sequence[Part], components: Sequence[str], low: int, high: int) -> list[Part]:
    """The parts of some kinds in the blocks from `low` to `high`, which counts from the end where it is negative.

    Raises:
        UserError: no such blocks.
    """
    count = 1 + max(p.block for p in every)
    last = high + count if high < 0 else high
    if not 0 <= low <= last < count:
        raise UserError(f"there are blocks 0 to {count - 1} to remove parts from, got --low {low} --high {high}")
    return [p for p in every if p.component in components and low <= p.block <= last]


@contextmanager
def taken_out(network: nn.Module, edits: Iterable[Remove]) -> Iterator[nn.Module]:
    """While this is open the network lacks these parts; afterwards it is as it was. Nothing is copied."""
    were: list[tuple[str, nn.Module]] = []
    try:
        for edit in edits:
            part = network.get_submodule(edit.module)
            edit.apply(network)
            were.append((edit.module, part))
        yield network
    finally:
        for path, part in reversed(were):
            network.set_submodule(path, part)


def position_weight(block: int, blocks: int) -> float:
    """ω(i) = exp(−i/B), which makes late blocks cheap to remove."""
    return math.exp(-block / blocks)


def in_order(parts: Sequence[Part], impact: Mapping[str, float], mode: str, blocks: int) -> list[Part]:
    """The parts as they are removed, first to last; of equal ones the later goes first.

    ``position``: the smallest |ΔP| ω(i). Others: the highest score after removal, that is the smallest ΔP.

    Args:
        impact: ΔP by path.
    """

    def price(p: Part) -> float:
        return abs(impact[p.module]) * position_weight(p.block, blocks) if mode == "position" else impact[p.module]

    return sorted(parts, key=lambda p: (price(p), -p.block))


def settled(taken: Sequence[Part], every: Sequence[Part]) -> list[Part]:
    """The same removal, said shortest: a block without any component is a removed block, which includes its parts."""
    found = []
    for number, group in groupby(every, lambda p: p.block):
        whole, *fine = group
        mine = [p for p in taken if p.block == number]
        gone = whole in mine or (fine and all(p in mine for p in fine))
        found += [whole] if gone else mine
    return found


def left(taken: Sequence[Part], every: Sequence[Part], total: int) -> float:
    """Part of the `total` parameters that stays."""
    return 1 - sum(p.params for p in settled(taken, every)) / total


def remove(
    ordered: Sequence[Part], taken: Sequence[Part], every: Sequence[Part], total: int, budget: float, most: int = 0
) -> list[Part]:
    """`taken`, and further parts in order until less than `budget` of the parameters stay, or `most` are added."""
    made, before = list(taken), len(taken)
    for part in ordered:
        if left(made, every, total) < budget or (most and len(made) - before >= most):
            break
        if part not in settled(made, every) and not any(p.block == part.block for p in _whole(made, every)):
            made.append(part)
    return made


def _whole(taken: Sequence[Part], every: Sequence[Part]) -> list[Part]:
    return [p for p in settled(taken, every) if p.component == "block"]


def choose(
    every: Sequence[Part],
    allowed: Sequence[Part],
    total: int,
    *,
    mode: str,
    budget: float,
    named: Sequence[int] = (),
    remeasure: int = 0,
    measure: Callable[[Sequence[Part], Sequence[Part]], Mapping[str, float]],
) -> list[Part]:
    """The parts to remove.

    Args:
        every: all parts. allowed: those that may be chosen by impact. total: parameters of the network.
        mode, budget, remeasure: see `Config`. named: blocks that go whole.
        measure: ``measure(parts, removed) -> ΔP by path`` of a network without the removed ones.

    Raises:
        UserError: a block that is not there, or a budget that the allowed parts cannot meet.
    """
    whole = {p.block: p for p in every if p.component == "block"}
    if missing := [n for n in named if n not in whole]:
        raise UserError(f"there is no block {missing[0]}; this network has blocks 0 to {max(whole)}")
    taken = [whole[n] for n in dict.fromkeys(named)]
    while mode != "manual" and left(taken, every, total) >= budget < 1:
        gone = {p.block for p in _whole(taken, every)}
        free = [p for p in allowed if p not in taken and p.block not in gone]
        if not free:
            raise UserError(
                f"budget {budget:g} cannot be met: without all allowed parts {left(taken, every, total):.3f} of the "
                "parameters stay; allow more --components, or blocks between --low and --high"
            )
        impact = measure(free, settled(taken, every) if remeasure else ())
        taken = remove(in_order(free, impact, mode, len(whole)), taken, every, total, budget, remeasure)
    return settled(taken, every)
