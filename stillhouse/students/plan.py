"""Plan: how a smaller network differs from its base, as a serialisable list of kept channels.

A plan builds the smaller dense network from any network of the base's structure, or gives the index lists
through which the smaller network can share the base's tensors.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.students.attention import resize_heads
from stillhouse.students.layers import Axis, expand, layout, part, set_width, tensors, width_of

__all__ = ["Axis", "Keep", "Plan", "bare_copy", "signature", "take"]

Slices = tuple[tuple[int, Tensor], ...]

VERSION = 1


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


def signature(model: nn.Module) -> str:
    """A print of all parameter names and shapes: a hash of all, then four hex digits for each in order."""
    lines = [f"{n} {tuple(p.shape)}" for n, p in model.named_parameters()]
    whole = blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
    return whole + "-" + "".join(blake2b(line.encode(), digest_size=2).hexdigest() for line in lines)


@dataclass(frozen=True)
class Keep:
    """The channels of one layer that stay.

    Attributes:
        module: path of the layer in the base (or of a bare parameter that scales channels).
        axis: "out" for the channels a layer makes (norms and depthwise convolutions too), "in" for those it
            reads, "heads" for the heads of timm's attention and of nn.MultiheadAttention.
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


@dataclass(frozen=True)
class Plan:
    """How a student differs from its base: for each touched layer, the channels that stay.

    Attributes:
        edits: one `Keep` for each (layer, axis) that loses channels.
        signature: `signature` of the base; building from another network is refused.
        base: how to build the base, e.g. ``{"model": "torchvision:resnet18"}``; carried, not read.

    Example:
        >>> base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> plan = Plan((Keep("0", "out", (0, 2)), Keep("2", "in", (0, 2))), signature(base))
        >>> plan.build(base)
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    edits: tuple[Keep, ...]
    signature: str
    base: Mapping[str, Any] | None = None

    @staticmethod
    def identity(base: nn.Module) -> Plan:
        """The plan that changes nothing."""
        return Plan((), signature(base))

    def check(self, base: nn.Module) -> None:
        """Raises UserError when the network is not the one the plan was made for, naming where they part."""
        found = signature(base)
        if found == self.signature:
            return
        theirs, ours = (s.partition("-")[2] for s in (found, self.signature))
        names = [f"{n!r} {tuple(p.shape)}" for n, p in base.named_parameters()]
        at = next((i for i in range(len(names)) if theirs[4 * i : 4 * i + 4] != ours[4 * i : 4 * i + 4]), None)
        where = f"parameter {names[at]} is the first that differs" if at is not None else ""
        if not where:
            where = f"it ends after {names[-1] if names else 'no parameter'}, the plan's base has more"
        hint = f"build the base from {dict(self.base)}" if self.base else "build the plan's own base first"
        raise UserError(f"this plan was made for another network than this {type(base).__name__}: {where}; {hint}")

    def slices(self, base: nn.Module) -> dict[str, Slices]:
        """For every parameter and buffer of the base, what `take` keeps of it (all of it: an empty tuple).

        Returns:
            name -> ((dimension, LongTensor of kept indices), …). A student shares the base's tensors by
            ``functional_call(small, {n: take(p, slices[n]) for n, p in base.named_parameters()}, x)``.
        """
        self.check(base)
        cuts: dict[str, dict[int, Tensor]] = {name: {} for name in tensors(base)}
        for path, axis, index in self._plain(base):
            where = layout(part(base, path), axis)
            assert where is not None
            kept = torch.tensor(index, dtype=torch.long)
            for leaf, dim in where.dims.items():
                name = ".".join(p for p in (path, leaf) if p)
                if name in cuts:
                    cuts[name][dim] = kept
        self._refuse_torn(base, cuts)
        return {name: tuple(sorted(c.items(), key=lambda item: item[0])) for name, c in cuts.items()}

    def build(self, base: nn.Module) -> nn.Module:
        """A new, smaller dense network with the kept weights and buffers; the base is not touched.

        The result has the base's class and state-dict names. Hooks are not copied. An nn.MultiheadAttention that
        loses heads becomes a `HeadAttention`.

        Raises:
            UserError: the network is not the plan's base, or a layer cannot be cut as asked.
        """
        slices = self.slices(base)
        model = bare_copy(base)
        made: dict[int, Tensor] = {}
        for name, old in tensors(model).items():
            if not slices[name]:
                continue
            owner, _, leaf = name.rpartition(".")
            home = model.get_submodule(owner)
            if id(old) not in made:
                new = take(old.detach(), slices[name]).clone()
                is_parameter = isinstance(old, nn.Parameter)
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
            (home._parameters if isinstance(old, nn.Parameter) else home._buffers)[leaf] = made[id(old)]  # type: ignore[assignment]
        for path, axis, index in self._plain(base):
            target = base.get_submodule(path) if not isinstance(part(base, path), nn.Parameter) else None
            if target is not None:
                set_width(model.get_submodule(path), axis, len(index))
        for edit in self.edits:
            if edit.axis == "heads":
                model = resize_heads(model, edit.module, len(edit.index))
        return model

    def masked(self, base: nn.Module) -> nn.Module:
        """A full-size copy in which nothing reads the removed channels (their input slices are zero).

        In eval mode it gives the same outputs as `build`, except where LayerNorm or GroupNorm take statistics
        over the removed channels.
        """
        self.check(base)
        model = bare_copy(base)
        for path, axis, index in self._plain(base):
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

    def _plain(self, base: nn.Module) -> list[tuple[str, Axis, tuple[int, ...]]]:
        """The edits as cuts of plain layers, checked against the base."""
        found: dict[tuple[str, Axis], tuple[int, ...]] = {}
        for edit in self.edits:
            width = width_of(base, edit.module, edit.axis)
            if edit.index[-1] >= width:
                what = f"the plan keeps {edit.axis} channel {edit.index[-1]}"
                raise UserError(f"{edit.module}: {what}, but there are only {width}")
            for path, axis, index in expand(base, edit.module, edit.axis, edit.index):
                if (path, axis) in found:
                    raise UserError(f"{path}: the plan cuts axis {axis!r} twice; give one Keep for it")
                found[path, axis] = index
        return [(path, axis, index) for (path, axis), index in found.items()]

    @staticmethod
    def _refuse_torn(base: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]]) -> None:
        """One tensor under two names must be cut the same way under both."""
        first: dict[int, str] = {}
        for name, tensor in tensors(base).items():
            other = first.setdefault(id(tensor), name)
            a, b = cuts[name], cuts[other]
            if a.keys() != b.keys() or any(not torch.equal(a[d], b[d]) for d in a):
                raise UserError(f"{name} and {other} are one tied tensor, but the plan cuts only one of them")

    def to_json(self) -> str:
        """The plan as JSON text; index lists are written as ranges such as ``0-15,17``."""
        edits = [{"module": e.module, "axis": e.axis, "keep": _ranges(e.index)} for e in self.edits]
        base = None if self.base is None else dict(self.base)
        head = {"format": "stillhouse.plan", "version": VERSION, "base": base, "signature": self.signature}
        return json.dumps({**head, "edits": edits}, indent=1)

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            UserError: not JSON, not a plan, or of a newer version.
        """
        try:
            data = json.loads(text) if isinstance(text, str) else text
            if not isinstance(data, Mapping) or data.get("format") != "stillhouse.plan":
                raise UserError('not a plan: expected a JSON object with "format": "stillhouse.plan"')
            if data.get("version") != VERSION:
                raise UserError(
                    f"this plan has version {data.get('version')!r}, this Stillhouse reads {VERSION}; "
                    "upgrade Stillhouse or write the plan again"
                )
            edits = tuple(Keep(e["module"], e["axis"], _indices(e["keep"])) for e in data["edits"])
            return Plan(edits, data["signature"], data.get("base"))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not a readable plan: {type(error).__name__} {error}") from None


def _ranges(index: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for i in index:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _indices(text: str) -> tuple[int, ...]:
    try:
        ends = [[int(v) for v in run.split("-")] for run in text.split(",")]
        return tuple(i for run in ends for i in range(run[0], run[-1] + 1))
    except ValueError:
        raise UserError(f"a plan's keep list reads like '0-15,17', got {text!r}") from None
