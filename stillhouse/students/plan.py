"""Plan: how a smaller network differs from its base, as a serialisable list of edits.

A plan builds the smaller network from any network of the base's structure; where it only keeps channels, it also gives
the index lists through which the smaller network can share the base's tensors.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, cast

from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.activations import Inputs
from stillhouse.students.cutting import Keep, Slices, bare_copy, cut, masked, slices, take
from stillhouse.students.edits import Depth, Edit, Factor, Pack, Remove
from stillhouse.students.edits_shared import Dictionary, Split
from stillhouse.students.edits_sparse import DenseSparse
from stillhouse.students.layers import Axis

__all__ = ["Axis", "Edit", "Keep", "Plan", "bare_copy", "signature", "take"]

VERSION = 1
EDITS = (Factor, Depth, Remove, Inputs, Pack, Dictionary, Split, DenseSparse)  # besides `Keep`
KINDS: dict[str, type[Any]] = {k.kind: k for k in EDITS}


def signature(model: nn.Module) -> str:
    """A print of all parameter names and shapes: a hash of all, then four hex digits for each in order."""
    lines = [f"{n} {tuple(p.shape)}" for n, p in model.named_parameters()]
    whole = blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
    return whole + "-" + "".join(blake2b(line.encode(), digest_size=2).hexdigest() for line in lines)


@dataclass(frozen=True)
class Plan:
    """How a student differs from its base: for each touched layer, the channels that stay, and other edits.

    Attributes:
        edits: one `Keep` for each (layer, axis) that loses channels, and those of `stillhouse.students.edits`. They are
            applied in order; neighbouring `Keep` are one cut.
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

    edits: tuple[Keep | Edit, ...]
    signature: str
    base: Mapping[str, Any] | None = None

    @staticmethod
    def identity(base: nn.Module) -> Plan:
        """The plan that changes nothing."""
        return Plan((), signature(base))

    def then(self, *edits: Keep | Edit) -> Plan:
        """This plan, and further edits of what it builds.

        Channels kept of kept channels become one cut of the base; a weight that is packed again is stored in the last
        way alone.

        Raises:
            UserError: a layer is changed behind its packing, whose codes and scales would not fit it any more.
        """
        for edit in (e for e in edits if isinstance(e, Keep | Factor | Depth | Remove)):
            if late := next((p for p in self.edits if isinstance(p, Pack) and _inside(p.module, edit.module)), None):
                raise UserError(
                    f"{late.module}: its weights are packed, and then the layer is changed; go on from plain weights: "
                    "network, plan = stillhouse.students.plan.unpacked(network, plan)"
                )
        end = len(self.edits)
        while end and isinstance(self.edits[end - 1], Keep):
            end -= 1
        start = next((i for i, e in enumerate(edits) if not isinstance(e, Keep)), len(edits))
        before, after = cast("list[Keep]", self.edits[end:]), cast("list[Keep]", edits[:start])
        again = {e.name for e in edits if isinstance(e, Pack)}
        earlier = [e for e in self.edits[:end] if not (isinstance(e, Pack) and e.name in again)]
        return replace(self, edits=(*earlier, *_joined(before, after), *edits[start:]))

    @property
    def keeps(self) -> tuple[Keep, ...]:
        """The edits, where all of them keep channels.

        Raises:
            UserError: there are others, through which nothing can be shared with the base.
        """
        if others := sorted({e.kind for e in self.edits if not isinstance(e, Keep)}):
            raise UserError(f"only kept channels are slices of a base's tensors; this plan also has edits: {others}")
        return cast("tuple[Keep, ...]", self.edits)

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

        Raises:
            UserError: the network is not the plan's base, or the plan does more than keep channels.
        """
        self.check(base)
        return slices(base, self.keeps)

    def build(self, base: nn.Module) -> nn.Module:
        """A new network with the edits, and the base's weights where they stay; the base is not touched.

        Where only channels are kept the result has the base's class and state-dict names. Hooks are not copied.

        Raises:
            UserError: the network is not the plan's base, or a layer cannot be changed as asked.
        """
        self.check(base)
        model = base
        for keeps, run in itertools.groupby(self.edits, lambda e: isinstance(e, Keep)):
            if keeps:
                model = cut(model, cast("list[Keep]", list(run)))
                continue
            model = bare_copy(model) if model is base else model
            for edit in cast("list[Edit]", list(run)):
                model = edit.apply(model)
        return bare_copy(model) if model is base else model

    def masked(self, base: nn.Module) -> nn.Module:
        """A full-size copy of the base in which nothing reads the removed channels; see `cutting.masked`."""
        self.check(base)
        return masked(base, self.keeps)

    def encoded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A built network's tensors as they are stored: packed weights by their codes, shared ones once."""
        made = dict(tensors)
        for edit in self._stored():
            edit.encode(made)
        return made

    def decoded(self, stored: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The tensors of `model`, which this plan built, from what `encoded` gave."""
        made, shapes = dict(stored), {k: v.shape for k, v in model.state_dict().items()}
        for edit in self._stored():
            edit.decode(made, shapes)
        return made

    def saved_bytes(self, model: nn.Module) -> int:
        """Bytes by which packed weights, with all that is stored beside them, are smaller than in memory."""
        own = model.state_dict()
        stored, sizes = dict(own), [0, 0]
        for edit in (e for e in self.edits if isinstance(e, Pack | DenseSparse)):
            edit.encode(stored)
        for k, tensors in enumerate((own, stored)):
            sizes[k] = sum(t.numel() * t.element_size() for t in tensors.values())
        return sizes[0] - sizes[1]

    @property
    def packed(self) -> bool:
        """Whether tensors lie otherwise on disk than in the network, so that only `stillhouse.load` reads them."""
        return bool(self._stored())

    def _stored(self) -> list[Any]:
        """The edits that say how tensors lie on disk."""
        return [e for e in self.edits if hasattr(e, "encode")]

    def to_json(self) -> str:
        """The plan as JSON text; index lists are written as ranges such as ``0-15,17``."""
        edits = [_facts(e) for e in self.edits]
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
            edits = tuple(_read(e) for e in data["edits"])
            return Plan(edits, data["signature"], data.get("base"))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not a readable plan: {type(error).__name__} {error}") from None


def unpacked(network: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """A student whose weights were packed as one with plain weights of the same values, in place, to go on from."""
    for edit in (e for e in plan.edits if isinstance(e, Pack)):
        layer = network.get_submodule(edit.module)
        for part in edit.parts:
            del layer._buffers[part]
    return network, replace(plan, edits=tuple(e for e in plan.edits if not isinstance(e, Pack)))


def _inside(path: str, of: str) -> bool:
    return path == of or not of or path.startswith(f"{of}.")


def _joined(before: Sequence[Keep], after: Sequence[Keep]) -> list[Keep]:
    """Two cuts, the second of what the first left, as one."""
    first = {(e.module, e.axis): e for e in before}
    for e in after:
        at = (e.module, e.axis)
        first[at] = replace(e, index=tuple(first[at].index[i] for i in e.index)) if at in first else e
    return list(first.values())


def _facts(edit: Keep | Edit) -> dict[str, Any]:
    if isinstance(edit, Keep):
        return {"module": edit.module, "axis": edit.axis, "keep": _ranges(edit.index)}
    return {"kind": edit.kind, **edit.facts()}


def _read(facts: Mapping[str, Any]) -> Keep | Edit:
    if "kind" not in facts:
        return Keep(facts["module"], facts["axis"], _indices(facts["keep"]))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k != "kind"}
    kind = str(facts["kind"])
    if kind not in KINDS:
        raise UserError(f"this plan has an edit of kind {kind!r}; {did_you_mean(kind, KINDS)}, or upgrade Stillhouse")
    return KINDS[kind](**fields)


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
