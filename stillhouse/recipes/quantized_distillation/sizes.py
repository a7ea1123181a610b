"""What quantised weights take: the file's codes, and the paper's figure with a Huffman code."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.export import WEIGHTS, read_weights
from stillhouse.students.edits import Pack
from stillhouse.students.packing import stored_bits, unpack
from stillhouse.students.plan import Plan


def huffman_length(counts: Sequence[int]) -> float:
    """Mean length, in bits, of a Huffman code for symbols that occur so often: Σ of all merged counts / Σ counts.

    Example:
        >>> huffman_length([1, 1, 2])
        1.5
    """
    heap = [c for c in counts if c > 0]
    total, merged = sum(heap), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        merged += pair
        heapq.heappush(heap, pair)
    return merged / total if total else 0.0


def reduction(bits: float, bucket: int) -> float:
    """How much smaller than float32 a long tensor becomes, k·32/(k·b + 64), with scale and zero in each bucket.

    Example:
        >>> round(reduction(2, 256), 1)
        14.2
    """
    return bucket * 32 / (bucket * bits + 64)


def account(model: nn.Module, plan: Plan, file: Path | None = None) -> dict[str, Any]:
    """Sizes of a baked network in bytes, and of its file where there is one.

    * ``full``: every tensor of the unquantised network, float32.
    * ``claimed``: codes in whole bytes, points, scales, zeros, and the other tensors as they are.
    * ``tensors``, ``file``: what lies on disk, without and with the file's header.
    * ``huffman``: the paper's figure, (unquantised·32 + quantised·H + buckets·64)/8, H the mean length of one Huffman
      code for the codes of all tensors.
    * ``layers``: path, values, bits, groups and stored bytes of each.
    """
    own = model.state_dict()
    stored = plan.encoded(own)
    packs = [e for e in plan.edits if isinstance(e, Pack)]
    counts, layers, quantised, groups, claimed = torch.zeros(256, dtype=torch.long), [], 0, 0, 0
    parts: set[str] = set()
    for edit in packs:
        name, code = edit.name, edit.code(own)
        shape = own[name].shape
        counts += unpack(stored[name], edit.bits, shape.numel()).bincount(minlength=256)
        size = stored_bits(shape, code) // 8
        parts |= {name, *(f"{name}_{k}" for k in ("points", "scale", "zero"))}
        quantised, groups, claimed = quantised + shape.numel(), groups + len(code.scale), claimed + size
        layers.append({"path": edit.module, "values": shape.numel(), "bits": edit.bits,
                       "groups": len(code.scale), "bytes": size})  # fmt: skip
    others = sum(t.nbytes for n, t in own.items() if n not in parts)
    mean = huffman_length(counts.tolist())
    found: dict[str, Any] = {
        "full": others + 4 * quantised, "claimed": others + claimed, "unquantised": others,
        "huffman_bits": mean, "huffman": others + (quantised * mean + groups * 64) / 8, "layers": layers,
        "quantised_share": quantised / max(1, sum(p.numel() for p in model.parameters())),
    }  # fmt: skip
    if file is not None:
        path = Path(file) / WEIGHTS
        found |= {"tensors": sum(t.nbytes for t in read_weights(path)[0].values()), "file": path.stat().st_size}
    return found
