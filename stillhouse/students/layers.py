"""What "output channel" and "input channel" mean for each kind of layer: which tensors, which dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.attention import heads_of, torch_attention

Axis = Literal["out", "in", "heads"]
Index = tuple[int, ...]
Place = tuple[str, Axis]
"""A dimension of one layer, e.g. ``("layer1.0.conv1", "out")``."""

_FEATURES: tuple[type[nn.Module], ...] = (_BatchNorm, _InstanceNorm)


@dataclass(frozen=True)
class Layout:
    """How one axis of a layer is stored.

    Attributes:
        width: channels on this axis (on "heads" the rows of the packed projection).
        dims: tensor name inside the module -> dimension that runs over the channels ("": the tensor itself).
        attrs: integer attributes of the module that hold the width.
    """

    width: int
    dims: dict[str, int]
    attrs: tuple[str, ...]


def is_depthwise(module: object) -> bool:
    """Whether a convolution sees one input channel per output channel (so out == in == groups)."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def mixes_channels(module: object) -> bool:
    """Whether a normalisation layer takes statistics over channels, so that removing one moves the others."""
    return (
        isinstance(module, nn.LayerNorm | nn.RMSNorm)
        or _hub_norm(module)
        or (isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels)
    )


def _hub_norm(module: object) -> bool:
    """Whether a module is one of transformers' RMS norms: a weight over the last dimension and nothing else."""
    kind = type(module)
    named = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("RMSNorm")
    return named and [(n, p.dim()) for n, p in cast(nn.Module, module).named_parameters()] == [("weight", 1)]


def layout(module: nn.Module | nn.Parameter, axis: Axis) -> Layout | None:
    """Where the channels of an axis live in a layer, or None when the layer cannot lose any of them.

    Example:
        >>> layout(nn.Linear(8, 4), "in")
        Layout(width=8, dims={'weight': 1}, attrs=('in_features',))
    """
    if isinstance(module, nn.Parameter):  # a bare scale or shift: its channels are the last dimension with any
        wide = [d for d, n in enumerate(module.shape) if n > 1]
        return Layout(module.shape[wide[-1]], {"": wide[-1]}, ()) if wide and axis == "out" else None
    if is_parametrized(module):
        return None
    if axis == "heads":
        if not torch_attention(module):
            return None
        rows = len(cast(nn.MultiheadAttention, module).in_proj_weight)
        return Layout(rows, {"in_proj_weight": 0, "in_proj_bias": 0}, ())
    if isinstance(module, _ConvNd):
        return _conv(module, axis)
    if isinstance(module, nn.Linear):
        if axis == "in":
            return Layout(module.in_features, {"weight": 1}, ("in_features",))
        return Layout(module.out_features, {"weight": 0, "bias": 0}, ("out_features",))
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        rows, columns = cast(Tensor, module.weight).shape  # GPT-2's linear layer, stored the other way round
        return (
            Layout(rows, {"weight": 0}, ("nx",)) if axis == "in" else Layout(columns, {"weight": 1, "bias": 0}, ("nf",))
        )
    return _norm(module) if axis == "out" else None


def _conv(module: _ConvNd, axis: Axis) -> Layout | None:
    transposed = isinstance(module, _ConvTransposeNd)
    if is_depthwise(module):
        attrs = ("out_channels", "in_channels", "groups")
        return Layout(module.out_channels, {"weight": 0, "bias": 0}, attrs) if axis == "out" else None
    if module.groups != 1:
        return None
    if axis == "in":
        return Layout(module.in_channels, {"weight": 0 if transposed else 1}, ("in_channels",))
    return Layout(module.out_channels, {"weight": 1 if transposed else 0, "bias": 0}, ("out_channels",))


def _norm(module: nn.Module) -> Layout | None:
    if isinstance(module, _FEATURES):
        dims = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
        return Layout(cast(int, module.num_features), dims, ("num_features",))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        return Layout(module.normalized_shape[0], {"weight": 0, "bias": 0}, ("normalized_shape",))
    if _hub_norm(module):
        return Layout(len(cast(Tensor, module.weight)), {"weight": 0}, ())
    if isinstance(module, nn.GroupNorm) and module.num_groups in (1, module.num_channels):
        attrs = ("num_channels",) if module.num_groups == 1 else ("num_channels", "num_groups")
        return Layout(module.num_channels, {"weight": 0, "bias": 0}, attrs)
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return Layout(module.num_parameters, {"weight": 0}, ("num_parameters",))
    if isinstance(module, nn.Embedding):
        return Layout(module.embedding_dim, {"weight": 1}, ("embedding_dim",))
    return None


def set_width(module: nn.Module, axis: Axis, width: int) -> None:
    """Writes a new channel count into the module's own attributes."""
    found = layout(module, axis)
    for attr in found.attrs if found else ():
        setattr(module, attr, (width,) if attr == "normalized_shape" else width)


def part(model: nn.Module, path: str) -> nn.Module | nn.Parameter:
    """The module, or the bare parameter, at a dotted path.

    Raises:
        UserError: nothing of that name; the message says what is near.
    """
    found: Any = model
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    if isinstance(found, nn.Module | nn.Parameter):
        return found
    names = [n for n, _ in model.named_modules() if n]
    raise UserError(f"{type(model).__name__} has no module {path!r}; {did_you_mean(path, names)}")


def under(path: str, prefixes: Sequence[str]) -> str | None:
    """The first of the prefixes that a module path lies under (whole dotted components), else None.

    Example:
        >>> under("layer1.0.conv1", ["layer10", "layer1"]), under("layer10.0", ["layer1"])
        ('layer1', None)
    """
    return next((p for p in prefixes if p == "" or path == p or path.startswith(p + ".")), None)


def attention(module: object) -> bool:
    """Whether the heads of a module can be cut: see `attention.heads_of`."""
    return heads_of(module) is not None


def expand(model: nn.Module, path: str, axis: Axis, index: Sequence[int]) -> list[tuple[str, Axis, Index]]:
    """The same cut in terms of stored tensors: heads become rows of what makes them and columns of what reads them."""
    if axis != "heads":
        owner = path.rpartition(".")[0]
        if path and isinstance(part(model, owner), nn.MultiheadAttention):
            raise UserError(f"{path}: cut its nn.MultiheadAttention by heads instead, Keep({owner!r}, 'heads', …)")
        return [(path, axis, tuple(index))]
    heads, stored = _heads(model, path)
    dot = path + "." if path else ""
    return [(dot + s.layer if s.layer else path, s.axis, s.channels(heads, index)) for s in stored]


def _heads(model: nn.Module, path: str) -> Any:
    found = heads_of(attn := part(model, path))
    if found is None:
        known = "timm.layers.Attention, nn.MultiheadAttention (without kdim, vdim, add_bias_kv, add_zero_attn)"
        raise UserError(
            f"{path}: {type(attn).__name__} has no heads to cut; {known}, transformers' decoders and CLIP have"
        )
    return found


def width_of(model: nn.Module, path: str, axis: Axis) -> int:
    """Channels (or heads) on an axis of a layer.

    Raises:
        UserError: the layer is of a kind that cannot be sliced along this axis.
    """
    module = part(model, path)
    if axis == "heads":
        return int(_heads(model, path)[0])
    found = layout(module, axis)
    if found is None:
        raise UserError(f"{path}: {type(module).__name__} cannot lose channels on axis {axis!r}")
    return found.width


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
