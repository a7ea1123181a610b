"""Where a transformer's blocks keep their queries, keys, values and outputs: paths of linear layers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.blocks import alike_blocks
from stillhouse.students.edits_shared import Split

NAMES = {
    "q": ("q_proj", "query", "to_q", "q_lin", "wq", "q"),
    "k": ("k_proj", "key", "to_k", "k_lin", "wk", "k"),
    "v": ("v_proj", "value", "to_v", "v_lin", "wv", "v"),
    "o": ("o_proj", "out_proj", "to_out.0", "out_lin", "wo", "o", "proj", "c_proj", "output.dense"),
}
FUSED = ("qkv", "c_attn")  # queries, keys and values, a third of the outputs each, in this order


def projections(
    model: nn.Module, kinds: str = "qkvo", *, blocks: str = "", named: Sequence[str] = ()
) -> tuple[list[Split], dict[str, list[str]]]:
    """The attention's linear layers by kind, one path for each block.

    Args:
        model: with a list of alike blocks, such as those of timm and transformers.
        kinds: which of q, k, v and o.
        blocks: path of the list; empty finds it.
        named: ``KIND=PATH`` inside a block, for networks with other names; the kinds may then be any.

    Returns:
        The edits that take fused layers apart (none for most of transformers), and kind -> paths behind these edits.

    Raises:
        UserError: a block in which a layer is not found, or found twice.

    Example:
        >>> block = lambda: nn.ModuleDict({"attn": nn.ModuleDict({k: nn.Linear(4, 4) for k in ("wq", "wk", "wv")})})
        >>> projections(nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])}), "qk")
        ([], {'q': ['blocks.0.attn.wq', 'blocks.1.attn.wq'], 'k': ['blocks.0.attn.wk', 'blocks.1.attn.wk']})
    """
    home, each = alike_blocks(model, blocks)
    inside = _named(each[0], named) if named else {}
    splits: dict[str, tuple[int, ...]] = {}
    if not named:
        inside, splits = _found(each[0], kinds)
    edits = [Split(f"{home}.{k}.{path}", sizes) for k in range(len(each)) for path, sizes in splits.items()]
    return edits, {kind: [f"{home}.{k}.{path}" for k in range(len(each))] for kind, path in inside.items()}


def _named(block: nn.Module, named: Sequence[str]) -> dict[str, str]:
    paths = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    found = {}
    for text in named:
        kind, _, path = text.partition("=")
        if not kind or path not in paths:
            raise UserError(f"{text!r}: expected KIND=PATH of a linear layer in a block; {did_you_mean(path, paths)}")
        found[kind] = path
    return found


def _found(block: nn.Module, kinds: str) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Paths by kind in one block, and the parts of the layers that must be taken apart for them."""
    inside, splits = dict[str, str](), dict[str, tuple[int, ...]]()
    paths: dict[str, Any] = {n: m for n, m in block.named_modules() if "attn" in n.lower() or "attention" in n.lower()}
    torchs = [n for n, m in paths.items() if isinstance(m, nn.MultiheadAttention)]
    if torchs:
        raise UserError(
            f"{torchs[0]}: nn.MultiheadAttention keeps queries, keys and values in one parameter that it reads itself, "
            "which cannot be shared; give a network of timm or transformers"
        )
    for kind in kinds:
        own = [n for n, m in paths.items() if _linear(m) and n.endswith(tuple(f".{end}" for end in NAMES[kind]))]
        fused = [n for n, m in paths.items() if _linear(m) and n.endswith(tuple(f".{end}" for end in FUSED))]
        at = own or (fused if kind in "qkv" else [])
        if len(at) != 1:
            known = [n for n, m in paths.items() if _linear(m)] or [n for n, m in block.named_modules() if _linear(m)]
            raise UserError(
                f"{type(block).__name__} has {len(at) or 'no'} layers that could be its {kind!r}{': ' if at else ''}"
                f"{', '.join(at)}; name them: --projections q=PATH k=PATH v=PATH, of {', '.join(known[:8])}"
            )
        layer, turned = paths[at[0]], not isinstance(paths[at[0]], nn.Linear)
        if not own:
            out = len(layer.weight.T if turned else layer.weight)
            splits[at[0]] = (out // 3,) * 3
            inside[kind] = f"{at[0]}.{'qkv'.index(kind)}"
        else:
            inside[kind] = at[0]
            if turned:
                splits[at[0]] = (layer.nf,)
    return inside, splits


def _linear(module: Any) -> bool:
    """A linear layer, or the Conv1D of transformers, which is one turned."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))
