"""Decoder language models of transformers as groups of units: heads, neurons of the MLPs, the residual stream.

What can be cut, how much each unit matters (gradients of masks), and the plan that leaves a model of a given size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating
from stillhouse.students.attention import heads_of
from stillhouse.students.costs import Costs
from stillhouse.students.groups import Group, Member, assemble
from stillhouse.students.hub import names_of
from stillhouse.students.layers import Axis, layout, part, width_of
from stillhouse.students.plan import Plan

Counts = Literal["all", "blocks"]
LARGEST = 0.9  # of all heads that may go; beyond it neurons go in their place


def head_path(model: Any) -> str:
    """Path of the language model's head."""
    head = model.get_output_embeddings()
    return next(n for n, m in model.named_modules() if m is head)


@dataclass(frozen=True)
class Units:
    """The units of a decoder, for one model: all values by group, the residual stream first.

    Attributes:
        hidden: channels of the residual stream, one group for the whole model.
        heads: per block; of grouped-query attention a unit is one head of keys and values with its queries.
        neurons: per block, of the MLP.
    """

    hidden: Group
    heads: tuple[Group, ...]
    neurons: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.hidden, *self.heads, *self.neurons)


def units_of(model: Any) -> Units:
    """What of a decoder can be cut.

    Raises:
        UserError: a family that is not known, or an attention whose heads cannot be cut.
    """
    n, head = names_of(model), head_path(model)
    stream: list[tuple[str, Axis]] = [(e, "out") for e in n.embed]
    heads, neurons = [], []
    for b in (f"{n.blocks}.{i}" for i in range(len(model.get_submodule(n.blocks)))):
        at, write = f"{b}.{n.attention}", f"{b}.{n.writes}"
        found = heads_of(model.get_submodule(at))
        if found is None:
            raise UserError(f"{at}: the heads of a {type(model.get_submodule(at)).__name__} cannot be cut")
        stored = [(f"{at}.{s.layer}", s.axis) for s in found[1]]
        stream += [(f"{b}.{norm}", "out") for norm in n.norms]
        stream += [(path, "in" if axis == "out" else "out") for path, axis in stored]
        stream += [*((f"{b}.{r}", "in") for r in n.reads), (write, "out")]
        heads.append(_group(at, found[0], [(at, "heads")]))
        inner: list[tuple[str, Axis]] = [*((f"{b}.{r}", "out") for r in n.reads), (write, "in")]
        neurons.append(_group(inner[0][0], width_of(model, *inner[0]), inner))
    stream += [(n.final, "out"), (head, "in")]
    return Units(_group("hidden", width_of(model, *stream[0]), stream), tuple(heads), tuple(neurons))


def _group(name: str, size: int, places: Sequence[tuple[str, Axis]]) -> Group:
    each = tuple((i,) for i in range(size))
    return Group(name, size, tuple(Member(path, axis, each) for path, axis in places))


# -- how much a unit matters ---------------------------------------------------------------------------------------


@contextmanager
def _caught(model: nn.Module, paths: Sequence[str]) -> Any:
    """What the modules are given in the next forward pass, by path; gradients start at the first of them."""
    caught: dict[str, Tensor] = {}

    def catch(path: str, args: Any) -> Any:
        x = args[0].detach().requires_grad_(True) if path == paths[0] else args[0]
        caught[path] = x
        return (x, *args[1:])

    handles = [model.get_submodule(p).register_forward_pre_hook(lambda m, args, p=p: catch(p, args)) for p in paths]
    asked = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)  # only activations need gradients here
        yield caught
    finally:
        for p, before in asked.items():
            p.requires_grad_(before)
        for h in handles:
            h.remove()


def mask_gradients(model: Any, loss: Callable[[Any, Any], Tensor], batches: Iterable[Any]) -> list[Tensor]:
    """Mean over batches of |∂L/∂m| for a mask m = 1 on every unit (first order, not weight · gradient).

    A mask multiplies a head's attention weights (so its output), a neuron's activation, or a channel of the residual
    stream: there it is one vector for the whole model, applied to the embedding and after every residual addition. With
    x what a mask multiplies, ∂L/∂m = Σ over positions of x · ∂L/∂x, which a forward and backward pass give exactly.

    Args:
        model: a decoder (`units_of`); in eval mode meanwhile, and left as it was.
        loss: ``loss(model, batch)``, a scalar.
        batches: the absolute value is taken of each one's gradient, then the mean: their size matters.

    Returns:
        One float64 tensor (units,) per group of `Units.groups`, each divided by its L2 norm; detached, on the CPU.

    Raises:
        UserError: no batches, or a loss that is not finite.

    Source: MiniMA (arXiv 2311.07052) and its code; Michel et al., NeurIPS 2019 (masks on heads).
    """
    n, units = names_of(model), units_of(model)
    blocks = [f"{n.blocks}.{i}" for i in range(len(units.heads))]
    # The input of a block is the stream behind the block before it. With parallel residuals there is one addition.
    parallel = bool(getattr(model.config, "use_parallel_residual", False)) and model.config.model_type == "gpt_neox"
    middle = [] if parallel else [f"{b}.{n.norms[1]}" for b in blocks]
    stream = [*blocks, *middle, n.final]
    stored = [heads_of(model.get_submodule(f"{b}.{n.attention}"))[1] for b in blocks]  # type: ignore[index]
    outs = [f"{b}.{n.attention}.{s.layer}" for b, all_ in zip(blocks, stored) for s in all_ if s.axis == "in"]
    paths = [*stream, *outs, *(f"{b}.{n.writes}" for b in blocks)]
    total, count = [torch.zeros(g.size, dtype=torch.float64) for g in units.groups], 0
    for batch in batches:
        with evaluating(model), _caught(model, paths) as caught, torch.enable_grad():
            value = loss(model, batch)
            if not torch.isfinite(value):
                raise UserError(f"the loss on calibration text is {value.item()}; check the model and the text")
            grads = torch.autograd.grad(value, [caught[p] for p in paths])
        rows = [(caught[p].detach().double() * g.double()).flatten(0, -2).sum(0).cpu() for p, g in zip(paths, grads)]
        found = [torch.stack(rows[: len(stream)]).sum(0)]
        found += [r.unflatten(0, (g.size, -1)).sum(1) for r, g in zip(rows[len(stream) :], units.groups[1:])]
        total, count = [t + f.abs() for t, f in zip(total, found)], count + 1
    if not count:
        raise UserError("importance needs at least one batch of calibration text")
    return [t / count / (t / count).norm().clamp(min=1e-30) for t in total]


# -- how much is kept ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widths:
    """What a pruned decoder keeps: channels of the stream, and heads and neurons of all blocks together.

    Attributes:
        even: heads and neurons are those of every block instead, alike everywhere, as configurations of transformers
            can say it.
    """

    hidden: int
    heads: int
    neurons: int
    even: bool = False


def per_dimension(p: float) -> float:
    """p' = 1 − √(1−p): the part of rows and of columns that goes where a part p of a matrix is to go.

    Example:
        >>> per_dimension(0.0), round(per_dimension(0.6), 4)
        (0.0, 0.3675)
    """
    return 1 - math.sqrt(1 - p)


def widths_at(units: Units, p: float, head_dim: int, multiple: int = 8) -> Widths:
    """Widths for a sparsity p of the block weights: p' of each of the three dimensions goes.

    Beyond p' = 90 % heads stay at a tenth, and for each that stays 4/3 · head_dim neurons go in its place.

    Args:
        units: of the model. p: in [0, 1). head_dim: channels of a head, with all queries of its group.
        multiple: stream and neurons are rounded to multiples of this.
    """
    gone, blocks = per_dimension(p), len(units.heads)
    heads, neurons = sum(g.size for g in units.heads), sum(g.size for g in units.neurons)
    kept = max(blocks, round((1 - min(gone, LARGEST)) * heads))
    extra = max(0.0, kept - (1 - gone) * heads) * head_dim * 4 / 3 if gone > LARGEST else 0.0
    hidden = _multiple(units.hidden.size * (1 - gone), multiple, multiple, units.hidden.size)
    return Widths(hidden, kept, _multiple(neurons * (1 - gone) - extra, multiple, multiple * blocks, neurons))


def _multiple(value: float, multiple: int, least: int, most: int) -> int:
    return most if value >= most else min(most, max(least, multiple * round(value / multiple)))


def kept_units(units: Units, importance: Sequence[Tensor], widths: Widths, multiple: int = 1) -> list[Tensor]:
    """Which units stay, a boolean tensor per group: the most important ones.

    Heads and neurons are ranked over all blocks together, and each block keeps some; of even widths per block.

    Args:
        multiple: neurons of a block stay or go so many at a time, by their mean.

    Raises:
        UserError: more than there are, or less than every block needs.
    """
    stream, heads, neurons = importance[0], importance[1 : 1 + len(units.heads)], importance[1 + len(units.heads) :]
    return [
        *_best([stream], widths.hidden, "channels of the residual stream"),
        *_best(heads, widths.heads, "heads", widths.even),
        *_best(neurons, widths.neurons, "neurons", widths.even, multiple),
    ]


def _best(values: Sequence[Tensor], count: int, what: str, even: bool = False, multiple: int = 1) -> list[Tensor]:
    if even:
        return [k for v in values for k in _best([v], count, f"{what} of a block")]
    total, ranked = sum(map(len, values)), []
    least = sum(min(multiple, len(v)) for v in values)
    if not least <= count <= total:
        raise UserError(f"cannot keep {count} {what} of {total}; give {least} to {total}")
    for v in values:
        falling, order = v.double().sort(descending=True, stable=True)
        spare = -len(v) % multiple
        blocks = F.pad(falling, (0, spare), value=math.nan).view(-1, multiple)
        level = blocks.nanmean(1).repeat_interleave(multiple)[: len(v)]
        level[:multiple] = math.inf  # the best of every block stay
        ranked.append(torch.empty_like(level).index_copy_(0, order, level))
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.cat(ranked).argsort(descending=True, stable=True)[:count]] = True
    return list(kept.split([len(v) for v in values]))


def counted(model: Any, counts: Counts = "all") -> int:
    """Parameters of a model, all of them or without embeddings and head; tied ones once."""
    whole = _outside(model) if counts == "blocks" else ()
    return sum(p.numel() for n, p in model.named_parameters() if not n.startswith(tuple(f"{w}." for w in whole)))


def _outside(model: Any) -> tuple[str, ...]:
    return (*names_of(model).embed, head_path(model))


def plan_of_size(
    model: Any, importance: Sequence[Tensor], size: float, *, counts: Counts = "all", multiple: int = 8
) -> tuple[Plan, Widths]:
    """The plan that keeps the most important units of a decoder and leaves `size` parameters.

    The sparsity whose `widths_at` come nearest is found by bisection; the neurons then make up for the rounding of
    the rest, as near as their multiple allows.

    Args:
        model: a decoder. importance: per group, from `mask_gradients`.
        size: parameters, counted as `counts` says on both sides.
        multiple: see `widths_at`.

    Raises:
        UserError: the model is not larger, or what must stay is larger already.
    """
    units = units_of(model)
    whole = _outside(model) if counts == "blocks" else ()
    full = counted(model, counts)
    if size == full:
        return Plan.identity(model), _full(units)
    if size > full:
        raise UserError(f"a model of {full:,} parameters cannot be pruned to {size:,.0f}; give a smaller size")
    order = [v.argsort(stable=True).numpy() for v in importance]
    costs = Costs(model, None, units.groups, order, "params", whole)

    def cost(w: Widths) -> int:
        return costs([len(k) - int(k.sum()) for k in kept_units(units, importance, w, multiple)])

    def filled(hidden: int) -> Widths:
        """With as many neurons as the size leaves."""
        each = cost(Widths(hidden, near.heads, most)) - cost(Widths(hidden, near.heads, most - multiple))
        rest = most - multiple * round((cost(Widths(hidden, near.heads, most)) - size) / each)
        return Widths(hidden, near.heads, min(most, max(multiple * len(units.neurons), rest)))

    inner = next(s.block for s in heads_of(part(model, units.heads[0].name))[1] if s.axis == "in")  # type: ignore[index]
    most, low, high = sum(g.size for g in units.neurons), 0.0, 0.9999
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(widths_at(units, middle, inner, multiple)) <= size else (middle, high)
    near = widths_at(units, high, inner, multiple)
    # A stream of one multiple more or less where neurons alone cannot make up for its rounding.
    streams = [h for h in (near.hidden, near.hidden + multiple, near.hidden - multiple) if 0 < h <= units.hidden.size]
    found = [(filled(h), abs(cost(filled(h)) - size) / size) for h in streams]
    w, miss = next((f for f in found if f[1] <= 0.01), min(found, key=lambda f: f[1]))
    if miss > 0.05:
        least = cost(widths_at(units, 0.9999, inner, multiple))
        raise UserError(
            f"{full:,} parameters cannot be pruned to {size:,.0f} (nearest {cost(w):,}, at least {least:,}); give "
            f"another size, or multiples of less than {multiple}"
        )
    return assemble(model, units.groups, kept_units(units, importance, w, multiple)), w


def plan_of_widths(model: Any, importance: Sequence[Tensor], widths: Widths) -> Plan:
    """The plan that keeps so many units, the most important ones."""
    units = units_of(model)
    return assemble(model, units.groups, kept_units(units, importance, widths))


def _full(units: Units) -> Widths:
    return Widths(units.hidden.size, sum(g.size for g in units.heads), sum(g.size for g in units.neurons))


def reordered(model: Any, importance: Sequence[Tensor]) -> nn.Module:
    """The same function with all units in descending importance, so that smaller models are its leading slices.

    Channels inside a head keep their order, which rotary embeddings read; the stream has one order in the whole model.
    """
    from stillhouse.students.cutting import bare_copy, take
    from stillhouse.students.layers import expand

    made, orders = bare_copy(model), [v.argsort(descending=True, stable=True).tolist() for v in importance]
    moved: dict[str, dict[int, Tensor]] = {}
    for group, order in zip(units_of(model).groups, orders, strict=True):
        for member in group.members:
            for path, axis, index in expand(model, member.module, member.axis, order):
                where = layout(part(model, path), axis)
                assert where is not None
                for leaf, dim in where.dims.items():
                    moved.setdefault(f"{path}.{leaf}", {})[dim] = torch.tensor(index)
    done: set[int] = set()
    with torch.no_grad():
        for name, p in made.named_parameters(remove_duplicate=False):
            if name in moved and id(p) not in done:
                p.copy_(take(p, tuple(moved[name].items())).clone())
                done.add(id(p))
    return made
