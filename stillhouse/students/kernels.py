"""Students with 8-bit weights on torchao's kernels: the same codes, kept as bytes in memory and multiplied as such."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.packing import grouped, whole_points


@torch.no_grad()
def to_torchao(model: nn.Module, activations: bool = False) -> list[str]:
    """Gives the packed 8-bit linear layers of a student torchao's int8 weights, in place, with the student's own codes.

    torchao's `quantize_` alone would round the weights once more, with a scale of max|w| / 127.5 in place of the
    max|w| / 127 that they were trained with. Other layers stay as they are.

    Args:
        model: as `stillhouse.load` gives it, quantised symmetrically with one scale per output channel.
        activations: also round the inputs of these layers to 8 bits, each row by its own largest value, and multiply
            integers; otherwise y = x·(scale·q)ᵀ + b as before.

    Returns:
        The paths of the layers.

    Raises:
        UserError: torchao is missing, or no layer is of this kind.

    Source: torchao (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig).
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("torchao is not installed; pip install torchao") from None
    codes = {}
    for path, layer in model.named_modules():
        parts: Any = [getattr(layer, f"weight_{k}", None) for k in ("points", "scale", "zero")]
        if type(layer) is not nn.Linear or any(p is None for p in parts):
            continue
        points, scale, zero = parts
        if len(scale) == layer.out_features and torch.equal(points.cpu(), whole_points(8)) and not zero.any():
            codes[path] = (grouped(layer.weight, 0) / scale[:, None]).round().to(torch.int8), scale[:, None]
    if not codes:
        raise UserError(
            f"{type(model).__name__} has no linear layers of 8-bit symmetric weights with a scale per output channel; "
            "load a student that went through quantize:int8"
        )
    config = Int8DynamicActivationInt8WeightConfig() if activations else Int8WeightOnlyConfig()
    quantize_(model, config, filter_fn=lambda module, path: path in codes)
    for path, (q, scale) in codes.items():
        weight: Any = model.get_submodule(path).weight
        weight.qdata.copy_(q)
        weight.scale.copy_(scale)
    return list(codes)
