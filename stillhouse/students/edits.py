"""What a plan can change besides channels: factorised layers, other depths, parts taken out, packed weights.

Every edit is a frozen dataclass with a ``kind``, which names it in JSON; `apply` gives the changed network. They are
applied in order, each to what the ones before it left, so that a network can be pruned, then factorised, then packed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.packing import Code, decode, encode


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


def _at(model: nn.Module, path: str, kinds: tuple[type[nn.Module], ...], what: str) -> Any:
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


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
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
        layer = _at(model, self.module, (nn.Linear, nn.Conv2d), "factorised")
        return _put(model, self.module, factorised(layer, self.rank, self.module))

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
        blocks = _at(model, self.module, (nn.ModuleList, nn.Sequential), "made deeper or shallower")
        if not self.source or not all(0 <= i < len(blocks) for i in self.source):
            raise UserError(f"{self.module}: source {list(self.source)} must name blocks 0…{len(blocks) - 1}")
        made = [copy.deepcopy(blocks[i]) for i in self.source]
        for j, block in enumerate(made):  # transformers' layers know their place, for their cache
            for part in block.modules():
                if isinstance(getattr(part, "layer_idx", None), int):
                    part.layer_idx = j
        config = getattr(model, "config", None)
        for name in ("num_hidden_layers", "n_layer"):
            if getattr(config, name, None) == len(blocks):
                setattr(config, name, len(made))
        return _put(
            model, self.module, type(blocks)(made) if isinstance(blocks, nn.ModuleList) else type(blocks)(*made)
        )

    def facts(self) -> dict[str, Any]:
        return {"module": self.module, "source": list(self.source)}


class Skip(nn.Module):
    """Gives its first input back, whatever else it is called with."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


class Zero(nn.Module):
    """Gives zeros like its first input: a residual branch that adds nothing."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Remove:
    """A part that is taken out.

    Attributes:
        module: its path.
        leaves: ``input``: the part gives its first input back; ``zero``: it gives zeros, so that a residual branch adds
            nothing.
    """

    kind: ClassVar[str] = "remove"
    module: str
    leaves: Literal["input", "zero"] = "input"

    def apply(self, model: nn.Module) -> nn.Module:
        _at(model, self.module, (nn.Module,), "removed")
        if self.leaves not in ("input", "zero"):
            raise UserError(f"{self.module}: what is removed leaves 'input' or 'zero', got {self.leaves!r}")
        return _put(model, self.module, Skip() if self.leaves == "input" else Zero())

    def facts(self) -> dict[str, Any]:
        return {"module": self.module, "leaves": self.leaves}


@dataclass(frozen=True)
class Pack:
    """A weight that is stored by its codes: on disk a few bits a value, in the network the values they stand for.

    ``w = scale_g · points[code] + zero_g`` for the group g of a value (`packing.Code`). The network gets the buffers
    ``weight_points``, ``weight_scale`` and ``weight_zero``.

    Attributes:
        module: path of the layer whose ``weight`` is packed.
        bits: of a code.
        group: values with one scale and zero; 0 for one group per output channel, -1 for the whole tensor.
    """

    kind: ClassVar[str] = "pack"
    module: str
    bits: int
    group: int = 0

    @property
    def prefix(self) -> str:
        return f"{self.module}." if self.module else ""

    def apply(self, model: nn.Module) -> nn.Module:
        layer = _at(model, self.module, (nn.Module,), "packed")
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            raise UserError(f"{self.module}: a {type(layer).__name__} has no weight to pack")
        code = Code.empty(weight.shape, self.bits, self.group)
        for name, value in (("points", code.points), ("scale", code.scale), ("zero", code.zero)):
            layer.register_buffer(f"weight_{name}", value)
        return model

    def code(self, tensors: Mapping[str, Tensor]) -> Code:
        """The code that stands in a network's tensors."""
        points, scale, zero = (tensors[f"{self.prefix}weight_{k}"] for k in ("points", "scale", "zero"))
        return Code(points, scale, zero, self.bits, self.group)

    def encode(self, tensors: dict[str, Tensor]) -> None:
        """Puts codes in place of the weight."""
        name = f"{self.prefix}weight"
        tensors[name] = encode(tensors[name], self.code(tensors))

    def decode(self, tensors: dict[str, Tensor], shape: torch.Size) -> None:
        """Puts the weight back in place of its codes."""
        name = f"{self.prefix}weight"
        tensors[name] = decode(tensors[name], self.code(tensors), shape)

    def facts(self) -> dict[str, Any]:
        return {"module": self.module, "bits": self.bits, "group": self.group}


KINDS: dict[str, type[Any]] = {k.kind: k for k in (Factor, Depth, Remove, Pack)}


def read(facts: Mapping[str, Any]) -> Any:
    """An edit from its JSON.

    Raises:
        UserError: a kind that this version does not know.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k != "kind"}
    kind = str(facts.get("kind"))
    if kind not in KINDS:
        raise UserError(f"this plan has an edit of kind {kind!r}; {did_you_mean(kind, KINDS)}, or upgrade Stillhouse")
    return KINDS[kind](**fields)
