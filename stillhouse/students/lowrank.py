"""Ranks for a whole network: which layers become two thin ones so that a share of its parameters goes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.evaluate import call, count_params, evaluating
from stillhouse.students.edits import Factor, full_rank, largest_paying_rank
from stillhouse.students.parametrized import weight_layers
from stillhouse.students.prune import Budget
from stillhouse.system import map_tensors

# Left whole, as by the released code of PELA; `classifier` is what transformers calls a head.
ENDS = ("norm", "head", "head_dist", "classifier", "cls", "patch_embed", "downsample")
FURTHER = {"SwinTransformer": ("attn.proj",)}  # by class of the network, as released

READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # read their layers' weights


def factorable(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Paths of the layers that two thin ones can stand for, with fewer weights.

    Left out: grouped convolutions, weights that are tied or functions of others, layers whose weight is read past them,
    and those too small for any rank to pay.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, READERS))
    found = []
    for path in weight_layers(model, (nn.Linear, nn.Conv2d), include, exclude):
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        plain = "weight" in layer._parameters and owners[id(layer.weight)] == 1 and not path.startswith(inside)
        whole = isinstance(layer, nn.Linear) or layer.groups == 1
        if plain and whole and largest_paying_rank(layer) >= 1:
            found.append(path)
    return found


def choose(
    model: nn.Module, include: Sequence[str] = (), skip: Sequence[str] = (), least_outputs: int = 10
) -> list[str]:
    """Paths of the linear layers that are to be factorised.

    Args:
        include: paths or patterns; empty takes every linear layer outside `ENDS`.
        skip: names left whole: a path, a part of paths such as ``attn.proj``, or a pattern.
        least_outputs: layers with fewer outputs stay whole.

    Raises:
        UserError: a name the model does not have; a layer that is named and cannot be factorised; none is left.
    """
    paths = [n for n, _ in model.named_modules() if n]

    def under(word: str) -> list[str]:
        """The patterns for a name wherever it stands, of which some module is meant; the word itself if none is."""
        forms = [word, f"*.{word}", f"*.{word}.*"]
        return [f for f in forms if any(fnmatchcase(p, f) for p in paths)]

    usual = () if include else (*ENDS, *FURTHER.get(type(model).__name__, ()))
    left = [f for word in usual for f in under(word)] + [f for word in skip for f in under(word) or [word]]
    found = weight_layers(model, (nn.Linear,), include, left)
    able, chosen = set(factorable(model)), []
    for path in found:
        if path not in able and path in include:
            raise UserError(f"{path}: {_why(model, path)}; leave it out")
        if path in able and full_rank(model.get_submodule(path))[0] >= least_outputs:  # type: ignore[arg-type]
            chosen.append(path)
    if not chosen:
        raise UserError(f"{type(model).__name__} has no linear layer left to factorise; give --modules or fewer --skip")
    return chosen


@torch.no_grad()
def try_pairs(model: nn.Module, paths: Sequence[str], inputs: Any) -> None:
    """Runs a copy of the network with two layers, of rank 1, in place of each of these.

    Raises:
        UserError: some module reads the weight of such a layer itself.
    """
    trial, device = copy.deepcopy(model), next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        for path in paths:
            rows, columns = full_rank(trial.get_submodule(path))  # type: ignore[arg-type]
            like: dict[str, Any] = {"device": device, "dtype": trial.get_submodule(path).weight.dtype}
            pair = nn.Sequential(nn.Linear(columns, 1, bias=False, **like), nn.Linear(1, rows, **like))
            trial.set_submodule(path, pair)
    try:
        with evaluating(trial):
            call(trial, map_tensors(inputs, lambda t: t.to(device)))
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{type(model).__name__} does not run with two layers in place of one ({error}): some module reads a "
            "layer's weight itself; --skip that layer"
        ) from None


def _why(model: nn.Module, path: str) -> str:
    """Why two thin layers cannot stand for this one."""
    names = path.split(".")
    for parent in (model.get_submodule(".".join(names[:k])) for k in reversed(range(len(names)))):
        if isinstance(parent, READERS):
            return f"{type(parent).__name__} reads the weight of this layer itself and cannot do with two"
    if not largest_paying_rank(model.get_submodule(path)):  # type: ignore[arg-type]
        return "no rank pays for a layer this small"
    return "its weight is tied to another layer's, or a function of others, so two thin layers would add weights"


@torch.no_grad()
def fit_ranks(
    model: nn.Module, ratio: float, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[Factor], Budget]:
    """The factorisation that leaves (1 − ratio) of the network's parameters and most of its layers' energy.

    All layers begin at rank 1; what is left of the budget goes where it buys the most of a layer's Σσ², as a share of
    that layer's own, per weight. A layer may come out whole.

    Args:
        model: with plain weights. ratio: part of all its parameters that goes, in [0, 1).
        include, exclude: module paths or patterns, as for `weight_layers`.

    Returns:
        One `Factor` per layer that becomes thin, and what was reached.

    Raises:
        UserError: nothing to factorise, or a ratio out of reach, with the largest one.

    Example:
        >>> net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
        >>> edits, budget = fit_ranks(net, 0.5)
        >>> budget.met, sum(64 * e.rank for e in edits) == budget.reached <= 1024
        (True, True)
    """
    if not 0 <= ratio < 1:
        raise UserError(f"ratio is the fraction of parameters to remove and must lie in [0, 1), got {ratio}")
    paths = factorable(model, include, exclude)
    if not paths:
        raise UserError(f"{type(model).__name__} has no layer that two thin ones could stand for with fewer weights")
    base = count_params(model)
    target = (1 - ratio) * base
    if ratio == 0:
        return [], Budget("params", ratio, base, target, base)
    every = [_choices(model.get_submodule(p)) for p in paths]
    at = [0] * len(paths)
    reached = base - sum(c[-1].cost - c[0].cost for c in every)
    if reached > target:
        raise UserError(
            f"factor ratio {ratio} cannot be reached: at most {1 - reached / base:.3f} of the parameters go at rank 1"
        )
    # First along each layer's concave hull: near the rank that just pays, the whole layer is the better buy.
    for _, i, a, b in sorted(segment for k, c in enumerate(every) for segment in _hull(c, k)):
        cost = every[i][b].cost - every[i][a].cost
        if reached + cost > target:
            break
        at[i], reached = b, reached + cost
    # Then single ranks, as long as one fits.
    while True:
        following = [(every[i][k], every[i][k + 1], i) for i, k in enumerate(at) if k + 1 < len(every[i])]
        fits = [(_slope(a, b), i) for a, b, i in following if reached + b.cost - a.cost <= target]
        if not fits:
            unit = min((b.cost - a.cost for a, b, _ in following), default=0)
            break
        _, i = min(fits)
        reached, at[i] = reached + every[i][at[i] + 1].cost - every[i][at[i]].cost, at[i] + 1
    edits = [Factor(p, c[k].rank) for p, c, k in zip(paths, every, at, strict=True) if c[k].rank]
    return edits, Budget("params", ratio, base, target, reached, unit)


class _Choice(NamedTuple):
    """One way to keep a layer: a rank (0: whole), its weights, and the share of Σσ² it keeps."""

    rank: int
    cost: int
    energy: float


def _choices(layer: nn.Module) -> list[_Choice]:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    rows, columns = full_rank(layer)
    s = torch.linalg.svdvals(layer.weight.detach().double().flatten(1)) ** 2
    kept = (s.cumsum(0) / s.sum().clamp(min=1e-30)).tolist()
    ranks = range(1, largest_paying_rank(layer) + 1)
    return [*(_Choice(k, k * (rows + columns), kept[k - 1]) for k in ranks), _Choice(0, rows * columns, 1.0)]


def _slope(a: _Choice, b: _Choice) -> float:
    """Energy per weight from a to b, negative, so that the best comes first."""
    return -(b.energy - a.energy) / (b.cost - a.cost)


def _hull(choices: list[_Choice], i: int) -> list[tuple[float, int, int, int]]:
    """(slope, layer, from, to) along the upper concave hull of (cost, energy)."""
    corners: list[int] = []
    for k in range(len(choices)):
        while len(corners) > 1 and _slope(choices[corners[-2]], choices[corners[-1]]) >= _slope(
            choices[corners[-1]], choices[k]
        ):
            corners.pop()
        corners.append(k)
    return [(_slope(choices[a], choices[b]), i, a, b) for a, b in itertools.pairwise(corners)]
