"""Weights as functions of other weights while they are trained: putting projectors on a network, and baking them in.

A projector (`students.projectors`, or your own) is a parametrization (`torch.nn.utils.parametrize`): the layer keeps a
dense weight that the optimiser moves, and computes with what the projector makes of it. `bake` puts the projected
values in its place and gives the edits with which a `Plan` stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.dictionary import Mix
from stillhouse.students.edits import Edit, Pack
from stillhouse.students.packing import PARTS, groups
from stillhouse.students.projectors import NM, Half, Quantizer


def weight_layers(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Paths of the layers of some kinds, in the order of the network.

    Args:
        include, exclude: module paths, or patterns with ``*``; a path stands for all that lies under it.

    Raises:
        UserError: a pattern that no module has, or a module that is named and of another kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> weight_layers(net, exclude=["0"])
        ['2']
    """
    paths = {n: m for n, m in model.named_modules() if n}

    def meant(pattern: str, path: str) -> bool:
        return fnmatchcase(path, pattern) or path.startswith(pattern + ".")

    for pattern in (*include, *exclude):
        if not any(meant(pattern, p) for p in paths):
            raise UserError(f"{type(model).__name__} has no module {pattern!r}; {did_you_mean(pattern, paths)}")
    for pattern in include:
        if pattern in paths and not any(isinstance(m, kinds) for m in paths[pattern].modules()):
            known = ", ".join(k.__name__ for k in kinds)
            raise UserError(f"{pattern}: {type(paths[pattern]).__name__} is not supported; it must be or hold {known}")
    found = [p for p, m in paths.items() if isinstance(m, kinds) and not any(meant(e, p) for e in exclude)]
    return [p for p in found if not include or any(meant(i, p) for i in include)]


def weight_name(layer: nn.Module) -> str:
    """Which tensor of a layer is meant: ``weight``, of an nn.MultiheadAttention ``in_proj_weight``."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def parametrize_weights(
    model: nn.Module, layers: Sequence[str], make: Callable[[str, nn.Module], nn.Module | None]
) -> list[str]:
    """Puts a projector on the weight of each of these layers, in place; those for which `make` gives None stay.

    Returns:
        The paths that have one now.

    Raises:
        UserError: a weight that is a mix from a dictionary which other layers share.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> parametrize_weights(net, ["0"], lambda path, layer: NM(2, 4)), int((net[0].weight != 0).sum())
        (['0'], 4)
    """
    done = []
    for path in layers:
        layer = model.get_submodule(path)
        projector, name = make(path, layer), weight_name(layer)
        if projector is None:
            continue
        if parametrize.is_parametrized(layer, name) and isinstance(layer.parametrizations[name][0], Mix):  # type: ignore[index]
            raise UserError(
                f"{path}: its weight is a mix from a dictionary that other layers share; leave it out, or give the "
                "network before it was shared"
            )
        parametrize.register_parametrization(layer, name, projector)
        done.append(path)
    return done


def projectors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, layer, its list of parametrizations) of every layer whose weight is a function."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, name := weight_name(module)):
            yield path, module, module.parametrizations[name]


def strip(model: nn.Module) -> None:
    """Takes the projectors off, in place, and leaves the weights behind them."""
    for _, layer, _ in list(projectors(model)):
        _off(layer, keep_values=False)


def _off(layer: nn.Module, keep_values: bool) -> None:
    # A parametrised layer and its deep copies share one class, from which torch would delete `weight` for all of them.
    kind: Any = type(layer)
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(kind.__name__, kind.__bases__, own)
    parametrize.remove_parametrizations(layer, weight_name(layer), leave_parametrized=keep_values)
    if "weight" in layer._buffers:  # it was made of several tensors, and torch takes the result for a buffer
        layer.weight = nn.Parameter(layer._buffers.pop("weight"))  # type: ignore[arg-type]


@torch.no_grad()
def bake(model: nn.Module, layers: Sequence[str] | None = None) -> list[Edit]:
    """Puts the projected values in place of the weights, in place: plain layers that compute the same.

    Args:
        layers: paths of these alone; None takes all that have projectors.

    Returns:
        The edits with which a plan stores what the projectors left: codes where the last one is a `Quantizer`, float16
        where it is `Half`, and only the weights that stay where one is an `NM` whose pattern they have. The layer has
        the buffers that its edit needs. A last projector with ``baked(path, layer, *originals)`` gives a module that
        stands for the layer, and the edit for that. ``plan.then(*bake(model))`` is the plan of the baked model.

    Example:
        >>> from stillhouse.students.projectors import Symmetric
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> _ = parametrize_weights(net, ["0"], lambda path, layer: Symmetric(4))
        >>> [edit.facts() for edit in bake(net)]
        [{'module': '0', 'bits': 4, 'group': 0}]
    """
    edits: list[Edit] = []
    for path, layer, chain in [p for p in projectors(model) if layers is None or p[0] in layers]:
        code, made = None, list(chain.eval())  # what draws in training does not in the end
        if hasattr(made[-1], "baked"):
            kept = [p.detach() for n, p in chain.named_parameters(recurse=False) if n.startswith("original")]
            _off(layer, keep_values=True)
            other, edit = made[-1].baked(path, layer, *kept)
            model.set_submodule(path, other)
            edits.append(edit)
            continue
        if isinstance(last := made[-1], Quantizer):
            before = chain.original
            for earlier in made[:-1]:
                before = earlier(before)
            code = last.code(before)
        _off(layer, keep_values=True)
        name = weight_name(layer)
        w: Any = getattr(layer, name)
        sparse = _pattern(made, w)
        if code is not None:
            for part in PARTS:
                layer.register_buffer(f"{name}_{part}", getattr(code, part).detach().clone())
            assert groups(w.shape, code.group) == len(code.scale)
        bits = code.bits if code is not None else 16 if isinstance(last, Half) else 0
        if bits or sparse:
            edits.append(Pack(path, bits, code.group if code else 0, name, sparse))
    return edits


def _pattern(chain: Sequence[nn.Module], w: Tensor) -> tuple[int, ...]:
    """n, m and unit of the N:M pattern that a weight has behind its projectors; empty where it has none."""
    for p in (p.pattern for p in chain if isinstance(p, NM)):
        if p.n < p.m and p.fits(w.shape) and not p.broken(w):
            return astuple(p)
    return ()
