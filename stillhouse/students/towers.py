"""The two towers of an image-text model (transformers' CLIP): where their channels lie, and smaller ones from larger.

A tower has a residual stream of `hidden` channels that everything in it reads and writes, and in every block attention
heads of one width and an MLP of some neurons. Each of the three can lose channels: the stream for all blocks at once,
heads and neurons block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.cutting import Keep
from stillhouse.students.edits import Depth, Edit
from stillhouse.students.layers import Axis
from stillhouse.students.plan import Plan

Index = tuple[int, ...]


@dataclass(frozen=True)
class Tower:
    """Paths of one tower's parts in the whole model.

    Attributes:
        name: for messages and reports.
        embeddings: the module whose output begins the residual stream; parts: what in it makes the stream's channels.
        blocks: the list of blocks.
        norms: layer norms outside of the blocks.
        projection: the linear layer from the stream to the shared space.
    """

    name: str
    embeddings: str
    parts: tuple[str, ...]
    blocks: str
    norms: tuple[str, ...]
    projection: str

    def layers(self, model: nn.Module) -> list[Any]:
        """The blocks."""
        return list(model.get_submodule(self.blocks).children())

    def hidden(self, model: nn.Module) -> int:
        """Channels of the residual stream."""
        return model.get_submodule(self.projection).in_features  # type: ignore[return-value]

    def head_dim(self, model: nn.Module) -> int:
        """Channels of one head."""
        return self.layers(model)[0].self_attn.head_dim

    def heads(self, model: nn.Module) -> list[int]:
        """Heads of each block."""
        return [b.self_attn.out_proj.in_features // b.self_attn.head_dim for b in self.layers(model)]

    def neurons(self, model: nn.Module) -> list[int]:
        """MLP neurons of each block."""
        return [b.mlp.fc1.out_features for b in self.layers(model)]

    def prunable(self, model: nn.Module) -> int:
        """Weights between stream, heads and neurons: hidden · Σ_blocks (4·head_dim·heads + 2·neurons); no biases."""
        rows = (4 * self.head_dim(model) * h + 2 * n for h, n in zip(self.heads(model), self.neurons(model)))
        return self.hidden(model) * sum(rows)

    def block_norms(self, model: nn.Module) -> list[str]:
        """Paths of the layer norms inside the blocks."""
        return [f"{self.blocks}.{k}.layer_norm{i}" for k in range(len(self.layers(model))) for i in (1, 2)]

    def keeps(self, model: nn.Module, hidden: Index, heads: Sequence[Index], neurons: Sequence[Index]) -> list[Keep]:
        """The cut to these channels of the stream and these heads and neurons of each block, without what stays whole.

        Args:
            hidden, heads, neurons: ascending; one of `heads` and of `neurons` per block.
        """
        made = []
        if len(hidden) < self.hidden(model):
            made += [Keep(path, axis, hidden) for path, axis in self._stream(model)]
        for k, (block, h, n) in enumerate(zip(self.layers(model), heads, neurons, strict=True)):
            at = f"{self.blocks}.{k}"
            if len(h) < self.heads(model)[k]:
                made.append(Keep(f"{at}.self_attn", "heads", h))
            if len(n) < block.mlp.fc1.out_features:
                made += [Keep(f"{at}.mlp.fc1", "out", n), Keep(f"{at}.mlp.fc2", "in", n)]
        return made

    def _stream(self, model: nn.Module) -> Iterator[tuple[str, Axis]]:
        """Everything that makes or reads channels of the stream."""
        yield from ((f"{self.embeddings}.{p}", "out") for p in self.parts)
        yield from ((path, "out") for path in (*self.norms, *self.block_norms(model)))
        for k in range(len(self.layers(model))):
            at = f"{self.blocks}.{k}"
            yield from ((f"{at}.self_attn.{p}_proj", "in") for p in "qkv")
            yield from ((f"{at}.self_attn.out_proj", "out"), (f"{at}.mlp.fc1", "in"), (f"{at}.mlp.fc2", "out"))
        yield self.projection, "in"


_IMAGE = Tower(
    "image", "vision_model.embeddings", ("patch_embedding", "class_embedding", "position_embedding"),
    "vision_model.encoder.layers", ("vision_model.pre_layrnorm", "vision_model.post_layernorm"), "visual_projection",
)  # fmt: skip
_TEXT = Tower(
    "text", "text_model.embeddings", ("token_embedding", "position_embedding"), "text_model.encoder.layers",
    ("text_model.final_layer_norm",), "text_projection",
)  # fmt: skip


def towers(model: nn.Module) -> tuple[Tower, Tower]:
    """The image tower and the text tower of transformers' ``CLIPModel``, whole or cut before.

    Raises:
        UserError: another model.
    """
    known = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    for tower in (_IMAGE, _TEXT):
        inside = [f"{tower.embeddings}.{p}" for p in tower.parts]
        of_block = [f"{tower.blocks}.0.{p}" for p in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm1")]
        missing = [p for p in (*inside, *of_block, *tower.norms, tower.projection) if p not in known]
        if missing:
            raise UserError(
                f"{type(model).__name__} has no {missing[0]}: an image-text model built like transformers' CLIPModel "
                "is needed"
            )
    return _IMAGE, _TEXT


def inherited(model: nn.Module, tower: Tower, depth: int = 0, width: int = 0) -> list[Keep | Edit]:
    """The edits to a shallower and narrower tower by hand: every step-th block, leading slices of tensors.

    Block i is the model's block i·step, step = ⌊depth of the model / depth⌋. A width keeps the leading channels of the
    stream, the leading heads (of unchanged width) and the leading neurons of every MLP in proportion.

    Args:
        depth: blocks that stay; width: channels of the stream that stay; 0 leaves them as they are.

    Returns:
        edits, to be applied in this order; none where nothing is lost.

    Raises:
        UserError: more than the model has, or a width that is no multiple of a head's.

    Source: TinyCLIP (ICCV 2023), manual inheritance.
    """
    have, hidden, head = len(tower.layers(model)), tower.hidden(model), tower.head_dim(model)
    depth, width = depth or have, width or hidden
    if not 1 <= depth <= have or not 1 <= width <= hidden:
        raise UserError(
            f"the {tower.name} tower has {have} blocks of width {hidden}; it cannot keep {depth} of width {width}"
        )
    if width != hidden and width % head:
        raise UserError(f"the {tower.name} tower's heads are {head} wide, so a width is a multiple of it; got {width}")
    edits = (Depth(tower.blocks, tuple(i * (have // depth) for i in range(depth))),) if depth < have else ()
    if width == hidden:
        return list(edits)
    shallow = Plan.identity(model).then(*edits).build(model)
    heads = [tuple(range(min(h, width // head))) for h in tower.heads(shallow)]
    neurons = [tuple(range(max(1, round(n * width / hidden)))) for n in tower.neurons(shallow)]
    return [*edits, *tower.keeps(shallow, tuple(range(width)), heads, neurons)]


def tell_sizes(model: Any) -> None:
    """Writes each tower's sizes into its configuration where one says them: blocks alike, heads that fill the stream.

    With it `from_pretrained` of transformers opens what is saved. A tower of uneven blocks keeps its old configuration.
    """
    for tower in towers(model):
        config = model.get_submodule(tower.blocks.rpartition(".")[0]).config
        hidden, head = tower.hidden(model), tower.head_dim(model)
        (heads, *other), (neurons, *others) = set(tower.heads(model)), set(tower.neurons(model))
        if not other and not others and heads * head == hidden:
            config.hidden_size, config.num_attention_heads, config.intermediate_size = hidden, heads, neurons
