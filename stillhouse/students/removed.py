"""What stands where a part of a network was taken out: operators without weights, called as the part was.

The blocks of diffusion transformers carry two streams, image and text, by the names that diffusers gives them; the
operators for their parts give both back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError

Leaves = Literal["input", "zero"]
IMAGE, TEXT = "hidden_states", "encoder_hidden_states"
# Blocks of diffusers that give (text, image); all others that are known give the image alone.
TWO_STREAMS = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
# What its adaptive norms give: the normalised input (x), gates (1), shifts and scales (0).
ADAPTIVE_NORMS = {
    "AdaLayerNormZero": "x1001",
    "AdaLayerNormZeroSingle": "x1",
    "SD35AdaLayerNormZeroX": "x1001x1",
    "AdaLayerNormContinuous": "x",
}


class Skip(nn.Module):
    """Gives its first input back, whatever else it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class Zero(Skip):
    """Gives zeros like its first input: a residual branch that adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(super().forward(*args, **kwargs))


class SkipStreams(nn.Module):
    """Gives both streams back, in the order in which the part gave them.

    Args:
        names: that order.
        text_ends_here: for diffusers' ControlNets, which ask a block for its ``context_pre_only``.
    """

    def __init__(self, names: tuple[str, str], text_ends_here: bool = False):
        super().__init__()
        self.names, self.context_pre_only = names, text_ends_here

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {IMAGE: hidden_states, TEXT: encoder_hidden_states}
        return tuple(given[name] for name in self.names)


class ZeroStreams(SkipStreams):
    """Gives zeros like both streams."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tuple(torch.zeros_like(t) for t in super().forward(hidden_states, encoder_hidden_states))


class PlainNorm(nn.Module):
    """An adaptive layer norm without what adapts it: no affine map, gates 1, shifts and scales 0.

    Args:
        width: d. eps: of the norm.
        gives: what the adaptive norm gave, see `ADAPTIVE_NORMS`.

    Example:
        >>> normed, gate = PlainNorm(2, 0.0, "x1")(torch.tensor([[[1.0, 3.0]]]), emb=None)
        >>> normed.tolist(), gate.tolist()
        ([[[-1.0, 1.0]]], [[1.0, 1.0]])
    """

    def __init__(self, width: int, eps: float, gives: str):
        super().__init__()
        self.norm, self.gives = nn.LayerNorm(width, eps=eps, elementwise_affine=False), gives

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed, one = self.norm(x), x.new_ones(1, x.shape[-1])
        known = {"x": normed, "1": one, "0": torch.zeros_like(one)}
        return normed if self.gives == "x" else tuple(known[k] for k in self.gives)


def without(part: nn.Module, leaves: Leaves, where: str = "the part") -> nn.Module:
    """What takes the place of a part.

    ``input`` gives back what the part was given (of an adaptive norm: the norm without the adapting), ``zero`` zeros.

    Raises:
        UserError: zeros in place of a norm or of a block of two streams, which would wipe what passes through.
    """
    kind, norm = type(part).__name__, getattr(part, "norm", None)
    adapts, block = kind in ADAPTIVE_NORMS and isinstance(norm, nn.LayerNorm), kind in TWO_STREAMS
    if leaves not in ("input", "zero"):
        raise UserError(f"{where}: what is removed leaves 'input' or 'zero', got {leaves!r}")
    if leaves == "zero" and (adapts or block):
        raise UserError(f"{where}: zeros in place of a {kind} would wipe what passes through it; leave its 'input'")
    if adapts:
        return PlainNorm(norm.normalized_shape[-1], norm.eps, ADAPTIVE_NORMS[kind])  # type: ignore[union-attr]
    if block:
        return SkipStreams((TEXT, IMAGE), bool(getattr(part, "context_pre_only", False)))
    if getattr(part, "added_kv_proj_dim", None) is not None:  # joint attention gives the image first
        return (SkipStreams if leaves == "input" else ZeroStreams)((IMAGE, TEXT))
    return Skip() if leaves == "input" else Zero()


def keep_parts(made: nn.Module, part: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    """`made` with some modules of the part it replaces, at the paths where others look for them."""
    for path in paths:
        at, (*parents, name) = made, path.split(".")
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(name, part.get_submodule(path))
    return made
