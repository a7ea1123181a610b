"""Decoder language models of transformers: where a family keeps its parts, and configurations that follow a cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stillhouse.errors import UserError
from stillhouse.students.attention import heads_of


@dataclass(frozen=True)
class Names:
    """Where a family of models keeps its parts; all but `embed`, `blocks` and `final` inside a block."""

    embed: tuple[str, ...]
    blocks: str
    final: str
    norms: tuple[str, str]
    attention: str
    reads: tuple[str, ...]
    writes: str


_LLAMA = Names(("model.embed_tokens",), "model.layers", "model.norm", ("input_layernorm", "post_attention_layernorm"),
               "self_attn", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": Names(("transformer.wte", "transformer.wpe"), "transformer.h", "transformer.ln_f", ("ln_1", "ln_2"), "attn",
                  ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": Names(("gpt_neox.embed_in",), "gpt_neox.layers", "gpt_neox.final_layer_norm",
                      ("input_layernorm", "post_attention_layernorm"), "attention", ("mlp.dense_h_to_4h",),
                      "mlp.dense_4h_to_h"),
}  # fmt: skip


def names_of(model: Any) -> Names:
    """Where a decoder keeps its parts.

    Raises:
        UserError: it is of no family whose slicing is known.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES or not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} ({kind}) is no language model whose heads, neurons and width can be cut; give one "
            f"of transformers' {', '.join(FAMILIES)} with its head (…ForCausalLM)"
        )
    return FAMILIES[kind]


def settle(model: Any) -> None:
    """Writes the widths of a cut decoder into its configuration, where that can say them: alike in all blocks.

    Such a model is what ``from_pretrained`` builds from its folder; of others the configuration stays as it was.
    """
    config: Any = getattr(model, "config", None)
    n = FAMILIES.get(getattr(config, "model_type", ""))
    if n is None or not hasattr(model, n.embed[0].partition(".")[0]):
        return
    blocks = list(model.get_submodule(n.blocks))
    heads = {heads_of(b.get_submodule(n.attention)) for b in blocks}
    inner = {_inputs(b.get_submodule(n.writes)) for b in blocks}
    hidden = model.get_submodule(n.embed[0]).embedding_dim
    if len(heads) != 1 or len(inner) != 1 or None in heads:
        return
    (units, stored), width = heads.pop(), inner.pop()  # type: ignore[misc]
    block = next(s.block for s in stored if s.axis == "in")
    if config.model_type in ("gpt2", "gpt_neox"):  # a head is as wide as the stream divided by their number
        if units * block == hidden:
            config.update({"hidden_size": hidden, "num_attention_heads": units})
            config.update({"n_inner" if config.model_type == "gpt2" else "intermediate_size": width})
        return
    d = blocks[0].get_submodule(n.attention).head_dim
    queries = units * block // d
    if hidden % queries == 0:  # transformers refuses configurations in which it is not
        config.update({"hidden_size": hidden, "num_attention_heads": queries, "num_key_value_heads": units})
        config.update({"head_dim": d, "intermediate_size": width})


def _inputs(linear: Any) -> int:
    return int(linear.nx if hasattr(linear, "nx") else linear.in_features)
