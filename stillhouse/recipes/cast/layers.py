"""Sparse layers of CAST: which they are, their masks and scales, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.students.blocks import block_lists
from stillhouse.students.edits import Pack
from stillhouse.students.packing import PARTS
from stillhouse.students.parametrized import bake, parametrize_weights, projectors, weight_layers
from stillhouse.students.patterns import Pattern
from stillhouse.students.projectors import NM


@cache
def kinds() -> tuple[type[nn.Module], ...]:
    """Linear layers, and where transformers is installed its Conv1D, a linear layer with a weight of (in, out)."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ModuleNotFoundError:
        return (nn.Linear,)
    return (nn.Linear, Conv1D)


def input_axis(layer: nn.Module) -> int:
    """The dimension of a linear layer's weight along which it sums: 1, and 0 of transformers' Conv1D."""
    return 1 if isinstance(layer, nn.Linear) else 0


def find_mask(w: Tensor, pattern: Pattern, axis: int = 1) -> Tensor:
    """`Pattern.mask` along either dimension of a matrix: the n largest |w| of every m; of equal ones the first.

    Example:
        >>> find_mask(torch.tensor([[3.0], [-4.0], [1.0], [2.0]]), Pattern(2, 4), axis=0).tolist()
        [[True], [True], [False], [False]]
    """
    return pattern.mask(w) if axis == 1 else pattern.mask(w.T.contiguous()).T.contiguous()


class Scaled(nn.Module):
    """w ↦ A w: every row in blocks along its input, each times one trained factor; the mask is kept and not applied.

    A[r, c // (C/k)] · w[r, c], A from 1. It cannot make a zero something else, and `bake` folds it.

    Args:
        w: the weight. mask: of its shape, a buffer. blocks: k; 0: no factors. axis: that of the input.
        where: named in errors.

    Example:
        >>> w = torch.randn(3, 4)
        >>> torch.equal(Scaled(w, w > 0, 2)(w), w)
        True
    """

    mask: Tensor

    def __init__(self, w: Tensor, mask: Tensor, blocks: int = 2, axis: int = 1, where: str = "the layer"):
        super().__init__()
        if blocks and w.shape[axis] % blocks:
            raise UserError(
                f"{where}: its {w.shape[axis]} inputs cannot be cut into {blocks} blocks; give --blocks 1, or --skip it"
            )
        self.axis = axis
        shape = [blocks if d == axis else size for d, size in enumerate(w.shape)]
        self.scale = nn.Parameter(torch.ones(shape, dtype=w.dtype, device=w.device)) if blocks else None
        self.register_buffer("mask", mask)

    def forward(self, w: Tensor) -> Tensor:
        if self.scale is None:
            return w
        k = self.scale.shape[self.axis]
        parts = w.unflatten(self.axis, (k, w.shape[self.axis] // k))
        return (parts * self.scale.unsqueeze(self.axis + 1)).flatten(self.axis, self.axis + 1)


def choose(model: nn.Module, pattern: Pattern, modules: Sequence[str] = (), skip: Sequence[str] = ()) -> list[str]:
    """Paths of the layers to make sparse: those named, or all linear layers inside the network's lists of blocks.

    Raises:
        UserError: a name that is none, no such layer, or one that is tied, in half precision, or whose inputs m does
            not divide.
    """
    include = list(modules) or block_lists(model)
    if not include:
        raise UserError(f"{type(model).__name__} has no list of blocks; name the layers to make sparse: --modules")
    found = weight_layers(model, kinds(), include, skip)
    if not found:
        raise UserError(f"{type(model).__name__}: no linear layer is left to make sparse; see --modules and --skip")
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    for path in found:
        layer: Any = model.get_submodule(path)
        size = layer.weight.shape[input_axis(layer)]
        if size % pattern.m:
            raise UserError(f"{path}: {pattern.m} does not divide its {size} inputs, as {pattern} needs; --skip {path}")
        if owners.get(id(layer.weight)) != 1:
            raise UserError(f"{path}: its weight is tied to another layer's or a function of others; --skip {path}")
        if layer.weight.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{path}: its weight is {layer.weight.dtype}; convert the model with .float() first")
    return found


def make_sparse(model: nn.Module, paths: Sequence[str], method: str, pattern: Pattern, blocks: int = 2) -> None:
    """Puts masks on these layers, in place: beside a scaled dense weight (``cast``), or in front of the layer."""

    def projector(path: str, layer: Any) -> nn.Module:
        axis, w = input_axis(layer), layer.weight.detach()
        mask = find_mask(w, pattern, axis)
        if method == "cast":
            return Scaled(w, mask, blocks, axis, path)
        return NM(pattern.n, pattern.m, mask, dense_gradient=method == "ste", unit=pattern.unit)

    parametrize_weights(model, paths, projector)


@torch.no_grad()
def refresh_masks(model: nn.Module, pattern: Pattern) -> None:
    """Chooses every mask anew, in place, from the raw weight."""
    for _, layer, chain in projectors(model):
        chain[0].mask.copy_(find_mask(chain.original, pattern, input_axis(layer)))


def masks(model: nn.Module) -> dict[Tensor, Tensor]:
    """Raw weight → its mask."""
    return {chain.original: chain[0].mask for _, _, chain in projectors(model)}


@torch.no_grad()
def leftover(model: nn.Module) -> float:
    """mean |w| of the masked raw weights over mean |w| of the kept ones, over all layers."""
    pairs = list(masks(model).items())
    out, kept = (
        sum(float(w[m == side].double().abs().sum()) for w, m in pairs) / sum(int((m == side).sum()) for _, m in pairs)
        for side in (False, True)
    )
    return out / kept


@torch.no_grad()
def finalise(model: nn.Module, pattern: Pattern) -> tuple[list[Pack], dict[str, int]]:
    """Prunes by the masks as they are, folds the scales, and counts, in place: plain layers are left.

    Returns:
        The edits with which a plan stores only what stays; ``groups`` of m weights, and how many of them are ``exact``:
        have n non-zeros. A group has fewer only where a weight that stays, or its scale, is exactly zero.

    Raises:
        AssertionError: a mask that is not n of every m, or a group with more non-zeros.
    """
    layers: list[tuple[str, Any]] = []
    for path, layer, chain in projectors(model):
        marks = _per_group(chain[0].mask, pattern, input_axis(layer))
        assert bool((marks == pattern.n).all()), f"{path}: its mask is not {pattern}"
        chain.original.mul_(chain[0].mask)
        for part in PARTS:  # of codes that a weight had before it was moved
            layer._buffers.pop(f"weight_{part}", None)
        layers.append((path, layer))
    bake(model)
    counts = torch.cat([_per_group(x.weight != 0, pattern, input_axis(x)).flatten() for _, x in layers])
    assert bool((counts <= pattern.n).all()), f"a group of weights is not {pattern}"
    edits = [Pack(path, 0, sparse=astuple(pattern), axis=input_axis(layer)) for path, layer in layers]
    return edits, {"groups": len(counts), "exact": int((counts == pattern.n).sum())}


def _per_group(marks: Tensor, pattern: Pattern, axis: int) -> Tensor:
    return marks.unflatten(axis, (-1, pattern.m)).sum(axis + 1)
