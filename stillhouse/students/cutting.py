"""Keeping some channels of a network: which tensors that cuts, and the smaller dense network."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.students.attention import resize_heads
from stillhouse.students.hub import settle
from stillhouse.students.layers import Axis, expand, layout, part, set_width, tensors, width_of

Slices = tuple[tuple[int, Tensor], ...]


def take(tensor: Tensor, slices: Slices) -> Tensor:
    """The kept entries of a tensor, one ``index_select`` per cut dimension; differentiable in the tensor.

    Args:
        tensor: a parameter or buffer of the base.
        slices: pairs of (dimension, LongTensor of kept indices), as given by `Plan.slices`.

    Example:
        >>> take(torch.arange(6.0).view(2, 3), ((1, torch.tensor([0, 2])),)).tolist()
        [[0.0, 2.0], [3.0, 5.0]]
    """
    for dim, kept in slices:
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a network without its forward and backward hooks (what they hold is not part of it)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith(("_forward_", "_backward_")) and "_hooks" in name:
                memo[id(value)] = OrderedDict() if isinstance(value, OrderedDict) else type(value)()
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Keep:
    """The channels of one layer that stay.

    Attributes:
        module: path of the layer in the base (or of a bare parameter that scales channels).
        axis: "out" for the channels a layer makes (norms and depthwise convolutions too), "in" for those it
            reads, "heads" for the heads of an attention (`attention.heads_of`).
        index: kept channel indices of the base, ascending.
    """

    module: str
    axis: Axis
    index: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.axis not in get_args(Axis):
            raise UserError(f"Keep({self.module!r}): axis must be 'out', 'in' or 'heads', got {self.axis!r}")
        if not self.index or list(self.index) != sorted(set(self.index)) or self.index[0] < 0:
            raise UserError(f"Keep({self.module!r}, {self.axis!r}): index must be ascending, distinct and not empty")


def slices(base: nn.Module, keeps: Sequence[Keep]) -> dict[str, Slices]:
    """For every parameter and buffer of the base, what `take` keeps of it (all of it: an empty tuple)."""
    cuts: dict[str, dict[int, Tensor]] = {name: {} for name in tensors(base)}
    for path, axis, index in plain(base, keeps):
        where = layout(part(base, path), axis)
        assert where is not None
        kept = torch.tensor(index, dtype=torch.long)
        for leaf, dim in where.dims.items():
            name = ".".join(p for p in (path, leaf) if p)
            if name in cuts:
                cuts[name][dim] = kept
    refuse_torn(base, cuts)
    return {name: tuple(sorted(c.items(), key=lambda item: item[0])) for name, c in cuts.items()}


def cut(base: nn.Module, keeps: Sequence[Keep]) -> nn.Module:
    """A new, smaller dense network with the kept weights and buffers; the base is not touched.

    The result has the base's class and state-dict names. Hooks are not copied. An nn.MultiheadAttention that loses
    heads becomes a `HeadAttention`.

    Raises:
        UserError: a layer cannot be cut as asked.
    """
    kept = slices(base, keeps)
    model = bare_copy(base)
    made: dict[int, Tensor] = {}
    for name, old in tensors(model).items():
        if not kept[name]:
            continue
        owner, _, leaf = name.rpartition(".")
        home = model.get_submodule(owner)
        if id(old) not in made:
            new = take(old.detach(), kept[name]).clone()
            is_parameter = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
        (home._parameters if isinstance(old, nn.Parameter) else home._buffers)[leaf] = made[id(old)]  # type: ignore[assignment]
    for path, axis, index in plain(base, keeps):
        target = base.get_submodule(path) if not isinstance(part(base, path), nn.Parameter) else None
        if target is not None:
            set_width(model.get_submodule(path), axis, len(index))
    for edit in keeps:
        if edit.axis == "heads":
            model = resize_heads(model, edit.module, len(edit.index))
    settle(model)
    return model


def masked(base: nn.Module, keeps: Sequence[Keep]) -> nn.Module:
    """A full-size copy in which nothing reads the removed channels (their input slices are zero).

    In eval mode it gives the same outputs as `cut`, except where LayerNorm or GroupNorm take statistics over the
    removed channels.
    """
    model = bare_copy(base)
    for path, axis, index in plain(base, keeps):
        if axis != "in":
            continue
        module = model.get_submodule(path)
        where = layout(module, axis)
        assert where is not None
        gone = torch.ones(where.width, dtype=torch.bool)
        gone[list(index)] = False
        weight = cast(Tensor, module.weight)
        with torch.no_grad():
            weight.index_fill_(where.dims["weight"], gone.nonzero().flatten().to(weight.device), 0.0)
    return model


def plain(base: nn.Module, keeps: Sequence[Keep]) -> list[tuple[str, Axis, tuple[int, ...]]]:
    """The edits as cuts of plain layers, checked against the base."""
    found: dict[tuple[str, Axis], tuple[int, ...]] = {}
    for edit in keeps:
        width = width_of(base, edit.module, edit.axis)
        if edit.index[-1] >= width:
            what = f"the plan keeps {edit.axis} channel {edit.index[-1]}"
            raise UserError(f"{edit.module}: {what}, but there are only {width}")
        for path, axis, index in expand(base, edit.module, edit.axis, edit.index):
            if (path, axis) in found:
                raise UserError(f"{path}: the plan cuts axis {axis!r} twice; give one Keep for it")
            found[path, axis] = index
    return [(path, axis, index) for (path, axis), index in found.items()]


def refuse_torn(base: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]]) -> None:
    """One tensor under two names must be cut the same way under both."""
    first: dict[int, str] = {}
    for name, tensor in tensors(base).items():
        other = first.setdefault(id(tensor), name)
        a, b = cuts[name], cuts[other]
        if a.keys() != b.keys() or any(not torch.equal(a[d], b[d]) for d in a):
            raise UserError(f"{name} and {other} are one tied tensor, but the plan cuts only one of them")
