"""Groups of coupled channels: the units that structured pruning removes, and the plan that removes some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.students.layers import Axis, Index, expand, width_of
from stillhouse.students.plan import Keep, Plan, signature


@dataclass(frozen=True)
class Member:
    """One axis of one layer that takes part in a group.

    Attributes:
        module: path of the layer.
        axis: "out", "in" or "heads".
        index: for each unit of the group the channels of this axis that belong to it (none, one or several).
    """

    module: str
    axis: Axis
    index: tuple[Index, ...]


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each from all member layers at once.

    Attributes:
        name: path of the root layer, the one that makes the channels.
        size: number of units.
        members: the coupled layers, the root first.
    """

    name: str
    size: int
    members: tuple[Member, ...]


def assemble(model: nn.Module, groups: Sequence[Group], keep: Sequence[Tensor]) -> Plan:
    """The plan that keeps, in each group, the units marked in a boolean tensor of its size."""
    gone: dict[tuple[str, Axis], set[int]] = {}
    for group, kept in zip(groups, keep, strict=True):
        lost = [u for u, stays in enumerate(kept.tolist()) if not stays]
        for member in group.members if lost else ():
            gone.setdefault((member.module, member.axis), set()).update(i for u in lost for i in member.index[u])
    edits = []
    for (path, axis), lost_channels in gone.items():
        stay = tuple(i for i in range(width_of(model, path, axis)) if i not in lost_channels)
        if not stay:
            raise UserError(f"{path}: this would remove all of its {axis} channels; keep at least one")
        if lost_channels:
            edits.append(Keep(path, axis, stay))
    return Plan(tuple(edits), signature(model))


def call(model: nn.Module, example: Any) -> Any:
    """Runs a network on an example: a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def plain(model: nn.Module, group: Group) -> Iterator[Member]:
    """A group's members, with heads written as the rows and columns of tensors that hold them."""
    for m in group.members:
        if m.axis != "heads":
            yield m
            continue
        rows = [expand(model, m.module, m.axis, unit) for unit in m.index]
        for k, (path, axis, _) in enumerate(rows[0]):
            yield Member(path, axis, tuple(row[k][2] for row in rows))
