"""Which layers become sparse and quantised, which features are compared, and what the weights then take on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.export import WEIGHTS, read_weights
from stillhouse.outcomes import Member
from stillhouse.recipes.gpusq_vit.config import Config
from stillhouse.students.attention import torch_attention
from stillhouse.students.blocks import block_lists
from stillhouse.students.edits import Pack
from stillhouse.students.parametrized import weight_layers, weight_name
from stillhouse.taps import head

KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
ENDS = {"head", "heads", "head_dist", "classifier"}  # what timm, torchvision and transformers call it


@dataclass(frozen=True)
class Layers:
    """Paths of what is quantised, of those among it that become sparse, and of what is compared."""

    quantized: list[str]
    sparse: list[str]
    compare: list[str]
    left_dense: list[str]  # what the pattern does not divide, for people


def weight_of(network: nn.Module, path: str) -> Tensor:
    layer = network.get_submodule(path)
    weight = getattr(layer, weight_name(layer))
    assert isinstance(weight, Tensor)
    return weight.detach()


def choose(network: nn.Module, x: Any, cfg: Config) -> Layers:
    """The layers of the settings: every matrix product with weights but the classifier's.

    Raises:
        UserError: names that are not there, or nothing that can be sparse.
    """
    found = weight_layers(network, KINDS, cfg.include, cfg.exclude)
    if not cfg.head and not cfg.include:
        try:
            last = {head(network, x)}
        except UserError:  # several heads, whose mean is the answer
            last = set()
        found = [p for p in found if p not in last and not ENDS & set(p.split("."))]
    found = [p for p in found if not _odd_attention(network.get_submodule(p))]
    fits = [p for p in found if cfg.sparsity.fits(weight_of(network, p).shape)]
    rows = {p: weight_of(network, p).shape[1:].numel() for p in found}
    if not fits:
        first = f"{found[0]} has rows of {rows[found[0]]}" if found else "there are no layers"
        raise UserError(f"{cfg.sparsity} sparsity needs layers whose rows {cfg.sparsity.m} divides: {first}")
    left = [f"{p} (rows of {rows[p]})" for p in found if p not in fits]
    return Layers(found, fits, list(cfg.compare) or (late_blocks(network) if cfg.gamma else []), left)


def _odd_attention(layer: nn.Module) -> bool:
    """An nn.MultiheadAttention without one packed weight, or with extra keys."""
    return isinstance(layer, nn.MultiheadAttention) and not torch_attention(layer)


def late_blocks(network: nn.Module) -> list[str]:
    """Paths of the blocks whose outputs are compared: of several lists (Swin's stages) the last, of one its last third.

    Raises:
        UserError: the network has no list of blocks.
    """
    lists = block_lists(network)
    if not lists:
        raise UserError(f"{type(network).__name__} has no list of blocks of one class; name what to --compare")
    names = [f"{lists[-1]}.{name}" for name, _ in network.get_submodule(lists[-1]).named_children()]
    return names if len(lists) > 1 else names[2 * len(names) // 3 :]


def stored(member: Member, folder: Path) -> list[dict[str, Any]]:
    """What every packed weight takes in a member's file, in bytes, and what its pattern says it should.

    * ``values``, ``places``, ``held`` = both, ``scales``: as read from the file.
    * ``dense``: all values at these bits, without scales. ``claimed``: ``held`` and ``scales`` by formula.
    """
    assert member.plan is not None
    file, rows = read_weights(folder / "students" / member.name / WEIGHTS)[0], list[dict[str, Any]]()
    for edit in (e for e in member.plan.edits if isinstance(e, Pack)):
        shape = weight_of(member.model, edit.module).shape
        size = {n.removeprefix(edit.name): t.nbytes for n, t in file.items() if n.startswith(edit.name)}
        values, places = size.pop(""), size.pop("_places", 0)
        dense, pattern = shape.numel() * edit.bits / 8, edit.pattern
        rows.append({
            "module": edit.module, "shape": list(shape), "pattern": str(pattern or "dense"), "bits": edit.bits,
            "values": values, "places": places, "held": values + places, "scales": sum(size.values()), "dense": dense,
            "claimed": dense * (pattern.share(edit.bits) if pattern else 1) + (4 * shape[0] if edit.parts else 0),
        })  # fmt: skip
    return rows


def broken_groups(model: nn.Module, paths: Sequence[str], cfg: Config) -> int:
    """Groups of weights with more than the pattern allows; 0 for what this recipe gives."""
    return sum(cfg.sparsity.broken(weight_of(model, p)) for p in paths)
