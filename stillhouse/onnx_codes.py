"""Weights of quantised students in ONNX files: integers of 8 or 4 bits and their scales, decoded in the graph.

Computing stays in floats. onnxruntime decodes such weights in every call, and rounds activations before some of them,
unless a session has the entry `DECODE_AT_LOAD`; with it they are decoded once, and the file is as fast as a plain one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.packing import Code, grouped, nearest

DECODE_AT_LOAD = ("session.disable_quant_qdq", "1")
TOLERANCE = 2e-6  # of a weight's largest value: the exporter folds batch norm into weights, which rounds them


class Whole(NamedTuple):
    """A weight as whole numbers: q (out, …) int8, of which `block` neighbours in a row share a scale."""

    q: np.ndarray
    block: int

    @property
    def small(self) -> bool:
        """Whether four bits hold the numbers."""
        return bool(np.abs(self.q).max() <= 7)


def whole_numbers(model: nn.Module) -> dict[str, Whole]:
    """The packed weights of a student that are scale · whole number, by name; others have no such form in ONNX."""
    state, found = model.state_dict(), dict[str, Whole]()
    for name in [n.removesuffix("_points") for n in state if n.endswith("_points")]:
        points, scale, zero = (state[f"{name}_{part}"].cpu() for part in ("points", "scale", "zero"))
        w = state[name].detach().cpu().float()
        size = w[0].numel() if len(scale) in (1, len(w)) else -(-w.numel() // len(scale))
        if zero.any() or (points != points.round()).any() or points.abs().max() > 127 or w[0].numel() % size:
            continue
        if size < w[0].numel() and w.dim() > 2:
            continue  # blocks of a convolution's weight have no axis of their own
        group = {1: -1, len(w): 0}.get(len(scale), size)
        index = nearest(grouped(w, group), Code(points, scale, zero, 8, group).levels())
        found[name] = Whole(points[index].to(torch.int8).view(w.shape).numpy(), size)
    return found


def opset(model: nn.Module) -> int | None:
    """The ONNX version that the codes need: 21 for four bits and for blocks; None for any."""
    found = whole_numbers(model).values()
    return 21 if any(w.small or w.block < w.q[0].size for w in found) else None


def store(proto: Any, model: nn.Module) -> list[str]:
    """Puts integers and a DequantizeLinear in place of the weights of an ONNX graph that are `whole_numbers`, in place.

    The values stay: scale · q. Where batch norm was folded into a weight, the scales take it up.

    Args:
        proto: the ONNX model that `model` was exported to.

    Returns:
        The names of the weights that are integers now.

    Raises:
        UserError: there is none.
    """
    from onnx import numpy_helper

    graph, done = proto.graph, list[str]()
    for name, whole in whole_numbers(model).items():
        same = [t for t in graph.initializer if sorted(t.dims) == sorted(whole.q.shape) and t.data_type == 1]
        for tensor in sorted(same, key=lambda t: t.name != name):  # the exporter renames what it transposes
            found = scales(numpy_helper.to_array(tensor), whole)
            if found is not None:
                _replace(graph, tensor, *found)
                done.append(name)
                break
    if not done:
        raise UserError(
            f"{type(model).__name__} has no weights of whole numbers and scales: export a student that was quantised "
            "symmetrically, as quantize:int8 of the pipeline does, or export to onnx"
        )
    return done


def scales(w: np.ndarray, whole: Whole) -> tuple[np.ndarray, np.ndarray, int, int] | None:
    """Codes, scales, axis and block size with which DequantizeLinear gives w; None where w is another weight.

    w may be transposed, and every row may have been multiplied by a factor.
    """
    for turned in (False, True):
        v = w.T if turned else w
        if v.shape != whole.q.shape:
            continue
        rows = len(v)
        q, values = (a.reshape(rows, -1, whole.block) for a in (whole.q.astype(np.float32), v))
        at = np.abs(q).argmax(-1)[..., None]
        top, most = np.take_along_axis(values, at, -1), np.take_along_axis(q, at, -1)
        scale = np.where(most == 0, 1.0, top / np.where(most == 0, 1.0, most)).astype(np.float32)
        if not np.allclose(scale * q, values, rtol=0, atol=TOLERANCE * float(np.abs(values).max())):
            continue
        codes, each = np.where(scale < 0, -q, q).reshape(v.shape).astype(np.int8), np.abs(scale[..., 0])
        codes = codes.T if turned else codes
        if each.shape[1] == 1:
            return codes, each[:, 0], int(turned), 0
        return codes, (each.T if turned else each), 1 - int(turned), whole.block
    return None


def _replace(graph: Any, tensor: Any, q: np.ndarray, scale: np.ndarray, axis: int, block: int) -> None:
    from onnx import TensorProto, helper, numpy_helper

    name = tensor.name
    if np.abs(q).max() <= 7:
        half = np.pad(q.reshape(-1), (0, q.size % 2)).view(np.uint8) & 15
        raw = (half[::2] | half[1::2] << 4).tobytes()  # the first in the lower half of a byte
        codes = helper.make_tensor(f"{name}_codes", TensorProto.INT4, q.shape, raw, raw=True)
    else:
        codes = numpy_helper.from_array(np.ascontiguousarray(q), f"{name}_codes")
    graph.initializer.remove(tensor)
    graph.initializer.extend([codes, numpy_helper.from_array(np.ascontiguousarray(scale), f"{name}_scale")])
    how: dict[str, Any] = {"axis": axis, **({"block_size": block} if block else {})}
    graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{name}_codes", f"{name}_scale"], [name], **how))
