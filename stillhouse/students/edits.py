"""What a plan can change besides channels: factorised layers, other depths, parts taken out, packed weights.

Every edit is a frozen dataclass with a ``kind``, which names it in JSON; `apply` gives the changed network. They are
applied in order, each to what the ones before it left, so that a network can be pruned, then factorised, then packed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.packing import PARTS, Code, decode, encode, pack, unpack
from stillhouse.students.patterns import Pattern
from stillhouse.students.removed import Leaves, keep_parts, without


class Edit(Protocol):
    """One change of a network."""

    kind: ClassVar[str]

    @property
    def module(self) -> str:
        """Path of what it changes."""
        ...

    def apply(self, model: nn.Module) -> nn.Module:
        """The network with the change; `model` may be changed in place."""
        ...

    def facts(self) -> dict[str, Any]:
        """The edit's fields as JSON, without ``kind``."""
        ...


def module_at(model: nn.Module, path: str, kinds: tuple[type[nn.Module], ...], what: str) -> Any:
    """The module at a path, if it is of one of the kinds."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        raise UserError(f"{type(model).__name__} has no module {path!r}; {did_you_mean(path, names)}") from None
    if not isinstance(found, kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"{path}: a {type(found).__name__} cannot be {what}; expected {wanted}")
    return found


def put_at(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The model with a module in place of the one at a path, which may be the model itself."""
    if not path:
        return module
    model.set_submodule(path, module)
    return model


@dataclass(frozen=True)
class Factor:
    """A linear layer or convolution as two thin ones, W ≈ U·V with `rank` channels between them.

    The first has no bias; a convolution's first keeps kernel, stride and padding, its second is 1×1. Both start from
    the truncated singular value decomposition of the weight, the singular values shared evenly: U√S, √S Vᵀ.

    Attributes:
        module: path of the layer.
        rank: channels between.
    """

    kind: ClassVar[str] = "factor"
    module: str
    rank: int

    def apply(self, model: nn.Module) -> nn.Module:
        layer = module_at(model, self.module, (nn.Linear, nn.Conv2d), "factorised")
        return put_at(model, self.module, factorised(layer, self.rank, self.module))

    def facts(self) -> dict[str, Any]:
        return {"module": self.module, "rank": self.rank}


def full_rank(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Rows and columns of a layer's weight as one matrix, (out, in·kernel)."""
    return layer.weight.shape[0], layer.weight[0].numel()


def largest_paying_rank(layer: nn.Linear | nn.Conv2d) -> int:
    """The largest rank at which two thin layers have fewer weights than the one.

    Example:
        >>> largest_paying_rank(nn.Linear(6, 6))
        2
    """
    rows, columns = full_rank(layer)
    return (rows * columns - 1) // (rows + columns)


def factorised(layer: nn.Linear | nn.Conv2d, rank: int, where: str = "the layer") -> nn.Sequential:
    """The two thin layers of `Factor`, from the layer's own weight.

    Raises:
        UserError: a rank below 1 or above that of the matrix, or a grouped convolution.
    """
    rows, columns = full_rank(layer)
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise UserError(f"{where}: a convolution with {layer.groups} groups cannot be factorised")
    if not 1 <= rank <= min(rows, columns):
        raise UserError(
            f"{where}: rank {rank} does not fit a {rows}×{columns} weight; give 1…{min(rows, columns)} "
            f"(fewer weights from {largest_paying_rank(layer)} down)"
        )
    matrix = layer.weight.detach().flatten(1)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()  # never in half precision
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    first_w, second_w = root[:, None] * v[:rank], u[:, :rank] * root
    bias = layer.bias is not None
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: nn.Module
    second: nn.Module
    if isinstance(layer, nn.Conv2d):
        how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        how |= {"padding_mode": layer.padding_mode, "kernel_size": layer.kernel_size}
        first = nn.Conv2d(layer.in_channels, rank, bias=False, **how, **like)
        second = nn.Conv2d(rank, layer.out_channels, 1, bias=bias, **like)
    else:
        first = nn.Linear(layer.in_features, rank, bias=False, **like)
        second = nn.Linear(rank, layer.out_features, bias=bias, **like)
    with torch.no_grad():
        first.weight.copy_(first_w.view_as(first.weight))
        second.weight.copy_(second_w.view_as(second.weight))
        if bias:
            second.bias.copy_(layer.bias)  # type: ignore[union-attr, arg-type]
    return nn.Sequential(first, second)


@dataclass(frozen=True)
class Depth:
    """A list of blocks of another depth: block j is a copy of the base's block ``source[j]``; nothing stays shared.

    Attributes:
        module: path of an ``nn.ModuleList`` or ``nn.Sequential`` of blocks.
        source: indices of the base's blocks, in the order of the new ones; an index may come more than once.
    """

    kind: ClassVar[str] = "depth"
    module: str
    source: tuple[int, ...]

    def apply(self, model: nn.Module) -> nn.Module:
        blocks = module_at(model, self.module, (nn.ModuleList, nn.Sequential), "made deeper or shallower")
        if not self.source or not all(0 <= i < len(blocks) for i in self.source):
            raise UserError(f"{self.module}: source {list(self.source)} must name blocks 0…{len(blocks) - 1}")
        made = [copy.deepcopy(blocks[i]) for i in self.source]
        for j, block in enumerate(made):  # transformers' layers know their place, for their cache
            for part in block.modules():
                if isinstance(getattr(part, "layer_idx", None), int):
                    part.layer_idx = j
        owners = [self.module.rpartition(".")[0]]
        while owners[-1]:
            owners.append(owners[-1].rpartition(".")[0])
        configs = (getattr(model.get_submodule(p), "config", None) for p in owners)
        config = next((c for c in configs if c is not None), None)  # the nearest: two towers have one each
        for name in ("num_hidden_layers", "n_layer"):
            if getattr(config, name, None) == len(blocks):
                setattr(config, name, len(made))
                if config is not None and getattr(config, "layer_types", None):  # of each layer, in newer classes
                    config.layer_types = [config.layer_types[i] for i in self.source]
        return put_at(
            model, self.module, type(blocks)(made) if isinstance(blocks, nn.ModuleList) else type(blocks)(*made)
        )

    def facts(self) -> dict[str, Any]:
        return {"module": self.module, "source": list(self.source)}


@dataclass(frozen=True)
class Remove:
    """A part that is taken out.

    Attributes:
        module: its path.
        leaves: ``input``: the part gives its input back, an adaptive norm the plain norm, a block of two streams both;
            ``zero``: it gives zeros, so that a residual branch adds nothing (`removed.without`).
        keeps: paths under it of modules that others read, and which stay.
    """

    kind: ClassVar[str] = "remove"
    module: str
    leaves: Leaves = "input"
    keeps: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> nn.Module:
        part = module_at(model, self.module, (nn.Module,), "removed")
        for path in self.keeps:
            module_at(part, path, (nn.Module,), "kept")
        return put_at(model, self.module, keep_parts(without(part, self.leaves, self.module), part, self.keeps))

    def facts(self) -> dict[str, Any]:
        kept = {"keeps": list(self.keeps)} if self.keeps else {}
        return {"module": self.module, "leaves": self.leaves, **kept}


@dataclass(frozen=True)
class Pack:
    """A weight that is stored by its codes: on disk a few bits a value, in the network the values they stand for.

    ``w = scale_g · points[code] + zero_g`` for the group g of a value (`packing.Code`). The network gets the buffers
    ``weight_points``, ``weight_scale`` and ``weight_zero``. Of a weight with an N:M pattern the file holds only what
    stays, and where it stays as ``weight_places``.

    Attributes:
        module: path of the layer whose weight is packed.
        bits: of a code; 16 for float16 values and 0 for values in their own type, which both have no codes.
        group: values with one scale and zero; 0 for one group per output channel, -1 for the whole tensor.
        weight: its name in the layer.
        sparse: n, m and unit of a `patterns.Pattern`; empty where every value is stored.
        axis: 0 where the pattern runs along the first dimension of a matrix, as in Conv1D of transformers, (in, out).
    """

    kind: ClassVar[str] = "pack"
    module: str
    bits: int
    group: int = 0
    weight: str = "weight"
    sparse: tuple[int, ...] = ()
    axis: int = 1

    @property
    def name(self) -> str:
        """Of the weight among the network's tensors."""
        return f"{self.module}.{self.weight}" if self.module else self.weight

    @property
    def pattern(self) -> Pattern | None:
        return Pattern(*self.sparse) if self.sparse else None

    @property
    def parts(self) -> list[str]:
        """Names of the buffers of the layer that codes need."""
        return [f"{self.weight}_{part}" for part in PARTS] if 0 < self.bits <= 8 else []

    def apply(self, model: nn.Module) -> nn.Module:
        layer = module_at(model, self.module, (nn.Module,), "packed")
        weight = getattr(layer, self.weight, None)
        if not isinstance(weight, Tensor):
            raise UserError(f"{self.module}: a {type(layer).__name__} has no {self.weight} to pack")
        if self.parts:
            code = Code.empty(weight.shape, self.bits, self.group)
            for name, part in zip(self.parts, PARTS, strict=True):
                layer.register_buffer(name, getattr(code, part).to(weight.device))
        return model

    def code(self, tensors: Mapping[str, Tensor]) -> Code:
        """The code that stands in a network's tensors, or in a file, which leaves out what `Code.stored` does not name.

        Raises:
            KeyError: neither.
        """
        scale = tensors[f"{self.name}_scale"]
        known = Code.empty(scale.shape, self.bits, 0)
        points, zero = (tensors.get(f"{self.name}_{k}", getattr(known, k)) for k in ("points", "zero"))
        return Code(points, scale, zero, self.bits, self.group)

    def encode(self, tensors: dict[str, Tensor]) -> None:
        """Puts codes, and with a pattern places, in place of the weight.

        Raises:
            UserError: float16 does not hold its values, or it does not have the pattern.
        """
        w, pattern = tensors[self.name] if self.axis else tensors[self.name].mT, self.pattern
        kept = w
        if pattern is not None:
            places = pattern.places(w)
            tensors[f"{self.name}_places"], kept = pack(places, pattern.bits), pattern.kept(w, places)
        if self.parts:
            code = self.code(tensors)
            tensors[self.name] = encode(w, code, pattern)
            for part in set(PARTS) - set(code.stored()):
                del tensors[f"{self.name}_{part}"]
            return
        tensors[self.name] = kept.half() if self.bits == 16 else kept
        if not torch.equal(tensors[self.name].to(kept.dtype), kept):
            raise UserError(f"{self.name} has values that float16 does not hold; round them before they are packed")

    def decode(self, tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        """Puts the weight back in place of its codes."""
        stored, pattern, shape, places = tensors[self.name], self.pattern, shapes[self.name], None
        shape = shape if self.axis else shape[::-1]
        if pattern is not None:
            count = shape.numel() // pattern.m * pattern.n // pattern.unit
            places = unpack(tensors.pop(f"{self.name}_places"), pattern.bits, count)
        if self.parts:
            code = self.code(tensors)
            tensors |= {f"{self.name}_{part}": getattr(code, part) for part in PARTS}
            tensors[self.name] = decode(stored, code, shape, pattern, places)
        elif pattern is not None and places is not None:
            tensors[self.name] = pattern.placed(stored, places, shape)
        if not self.axis:
            tensors[self.name] = tensors[self.name].mT

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"module": self.module, "bits": self.bits, "group": self.group}
        facts |= {"weight": self.weight} if self.weight != "weight" else {}
        facts |= {"sparse": list(self.sparse)} if self.sparse else {}
        return facts if self.axis else facts | {"axis": self.axis}
