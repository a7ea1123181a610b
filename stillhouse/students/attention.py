"""Attention that can lose heads: how each kind stores them, and what stands in for nn.MultiheadAttention after."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from stillhouse.errors import UserError


class HeadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with any number of heads: ``num_heads * head_dim`` need not be ``embed_dim``.

    ``out = concat_h(softmax(q_h k_h^T / sqrt(d)) v_h) W_o + b_o`` with ``q, k, v = x W_in + b_in``. Parameter names,
    their order, call signature and results are those of nn.MultiheadAttention; shapes are in_proj_weight
    (3·h·d, E), in_proj_bias (3·h·d,), out_proj.weight (E, h·d), out_proj.bias (E,).

    Args:
        embed_dim: E, width of inputs and output.
        num_heads: h.
        head_dim: d.
        dropout: on the attention weights, in training only.
        bias: whether both projections have one.
        batch_first: (n, length, E) instead of (length, n, E).

    Example:
        >>> HeadAttention(32, 3, 8, batch_first=True).in_proj_weight.shape
        torch.Size([72, 32])
    """

    # nn.TransformerEncoderLayer asks this before it hands the weights to a fused kernel, which takes h·d to be E.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.embed_dim = self.kdim = self.vdim = embed_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, False
        inner = num_heads * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim, device=device, dtype=dtype))
        no_bias = None if not bias else nn.Parameter(torch.empty(3 * inner, device=device, dtype=dtype))
        self.register_parameter("in_proj_bias", no_bias)
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"):
            self.register_parameter(name, None)
        self.out_proj = nn.Linear(inner, embed_dim, bias, device=device, dtype=dtype)  # type: ignore[assignment]
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output like `query`, and the attention weights (n, L, S) or (n, h, L, S) if asked for, else None."""
        single = query.dim() == 2
        q, k, v = (self._split(t) for t in self._project(query, key, value))
        mask = self._mask(key_padding_mask, attn_mask, q.dtype)  # is_causal is only a hint about attn_mask
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, self.dropout, self.training)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if single:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        thirds = zip((query, key, value), self.in_proj_weight.chunk(3), bias, strict=True)
        return tuple(F.linear(x, w, b) for x, w, b in thirds)

    def _split(self, x: Tensor) -> Tensor:
        """(…, h·d) as (n, h, length, d)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one to add to the scores, (L, S) or (n, 1, 1 or L, S)."""
        if mask is not None and mask.dim() == 3:
            raise UserError(
                f"attn_mask of shape {tuple(mask.shape)} has one mask per head, but heads were cut; give it as (L, S)"
            )
        wide = None if padding is None else padding.reshape(-1, 1, 1, padding.shape[-1])
        given = [
            torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(m, float("-inf"))
            if m.dtype == torch.bool
            else m.to(dtype)
            for m in (wide, mask)
            if m is not None
        ]
        return None if not given else given[0] if len(given) == 1 else given[0] + given[1]


def timm_attention(module: object) -> bool:
    """Whether a module is timm's plain multi-head attention, whose heads can be cut."""
    timm = sys.modules.get("timm.layers.attention")  # a model that holds one has imported it
    if timm is None or not isinstance(module, timm.Attention) or type(module).forward is not timm.Attention.forward:
        return False
    return hasattr(module, "attn_dim") and isinstance(module.norm, nn.Identity)


def torch_attention(module: object) -> bool:
    """Whether a module is an nn.MultiheadAttention whose heads can be cut: one packed weight, no extra tokens."""
    if not isinstance(module, nn.MultiheadAttention) or is_parametrized(module):
        return False
    known = type(module).forward in (nn.MultiheadAttention.forward, HeadAttention.forward)
    extra = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return known and module.in_proj_weight is not None and not extra


@dataclass(frozen=True)
class Stored:
    """Where heads lie on one axis of one layer: `parts` times over (queries, keys, values), `block` channels a head.

    Attributes:
        layer: name of the attention's child, "" for the attention itself.
        axis: of that layer, as in `layers.layout`.
        block: channels of one head. parts: how often all heads follow one another on the axis.
    """

    layer: str
    axis: Literal["out", "in", "heads"]
    block: int
    parts: int = 1

    def channels(self, heads: int, index: Sequence[int]) -> tuple[int, ...]:
        """The channels of some of `heads` heads."""
        starts = [(part * heads + h) * self.block for part in range(self.parts) for h in index]
        return tuple(start + i for start in starts for i in range(self.block))


def heads_of(module: Any) -> tuple[int, tuple[Stored, ...]] | None:
    """How many heads of an attention can be cut one by one, and how they are stored; None where none can.

    Of grouped-query attention in transformers a "head" is one of keys and values with all queries that read it.
    """
    if timm_attention(module):
        gate = (Stored("gate", "out", module.head_dim),) if getattr(module, "gate", None) is not None else ()
        d = module.head_dim
        return module.num_heads, (Stored("qkv", "out", d, 3), Stored("proj", "in", d), *gate)
    if torch_attention(module):
        return module.num_heads, (Stored("", "heads", module.head_dim, 3), Stored("out_proj", "in", module.head_dim))
    return _hub_heads(module) if type(module).__module__.startswith("transformers.models.") else None


def _hub_heads(module: Any) -> tuple[int, tuple[Stored, ...]] | None:
    """Decoders and CLIP of transformers, whose attention reads the number of heads off its tensors."""
    kind, children = type(module).__name__, {n for n, c in module.named_children() if any(True for _ in c.parameters())}
    if {"q_proj", "k_proj", "v_proj", "o_proj"} == children - {"q_norm", "k_norm"} and hasattr(module, "head_dim"):
        d, queries = module.head_dim, module.num_key_value_groups * module.head_dim
        norms = [p for n in ("q_norm", "k_norm") for p in getattr(module, n, nn.Identity()).parameters()]
        if any(p.numel() != d for p in norms):  # over all heads at once
            return None
        keys = (Stored("k_proj", "out", d), Stored("v_proj", "out", d))
        return len(module.k_proj.weight) // d, (
            Stored("q_proj", "out", queries),
            *keys,
            Stored("o_proj", "in", queries),
        )
    if kind == "GPT2Attention" and not module.is_cross_attention:
        return module.num_heads, (Stored("c_attn", "out", module.head_dim, 3), Stored("c_proj", "in", module.head_dim))
    if kind == "CLIPAttention":
        d = module.head_dim
        made = (Stored(n, "out", d) for n in ("q_proj", "k_proj", "v_proj"))
        return len(module.k_proj.weight) // d, (*made, Stored("out_proj", "in", d))
    if kind == "GPTNeoXAttention":
        d = module.head_size
        heads = len(module.query_key_value.weight) // (3 * d)
        return heads, (Stored("query_key_value", "out", 3 * d), Stored("dense", "in", d))
    return None


def resize_heads(model: nn.Module, path: str, heads: int) -> nn.Module:
    """Fits an attention, whose tensors have already been cut, to its number of heads.

    Those of timm and transformers can have any number; an nn.MultiheadAttention gives way to a `HeadAttention` on its
    tensors.

    Returns:
        the model (another module only where the path is the whole model).
    """
    old = model.get_submodule(path)
    if not isinstance(old, nn.MultiheadAttention):
        written = {"num_heads": 1, "attn_dim": getattr(old, "head_dim", 0), "split_size": getattr(old, "head_dim", 0)}
        for name, each in written.items():  # transformers' newer classes read it off their tensors
            if hasattr(old, name):
                setattr(old, name, heads * cast(int, each))
        return model
    bias = old.in_proj_bias is not None
    new = HeadAttention(old.embed_dim, heads, old.head_dim, old.dropout, bias, old.batch_first, device="meta")
    new.in_proj_weight, new.in_proj_bias, new.out_proj = old.in_proj_weight, old.in_proj_bias, old.out_proj
    new.train(old.training)
    if not path:
        return new
    model.set_submodule(path, new)
    for module in model.modules():  # nested tensors are made for the fused kernel alone
        if isinstance(module, nn.TransformerEncoder) and new in module.modules():
            module.use_nested_tensor = False
    return model
