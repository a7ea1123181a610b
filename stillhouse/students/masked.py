"""Masked autoencoders: a vision transformer that reads some patches, and a decoder that speaks of all of them.

`Masked` is what the two kinds have in common: `TimmMasked` puts a decoder on a timm VisionTransformer, `HubMasked`
reads a ViTMAEForPreTraining of transformers. `as_masked` makes one of either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import UserError


def visible(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Which patches stay when a part `ratio` of them is masked: those with the least noise.

    Args:
        noise: (n, P). ratio: in [0, 1); ⌊P·(1 − ratio)⌋ patches stay.

    Returns:
        The kept ones' positions (n, k), in the order of their noise; and of every patch its place in that order, (n,
        P): kept ones are those with a place below k.

    Example:
        >>> visible(torch.tensor([[0.9, 0.1, 0.5, 0.7]]), 0.5)
        (tensor([[1, 2]]), tensor([[3, 0, 1, 2]]))
    """
    order = noise.argsort(dim=1, stable=True)
    return order[:, : int(noise.shape[1] * (1 - ratio))], order.argsort(1)


def patches_of(images: Tensor, size: int) -> Tensor:
    """(n, C, H, W) → (n, H/size · W/size, size² · C): the pixels of each patch, row by row, channels last.

    Example:
        >>> patches_of(torch.arange(16.0).view(1, 1, 4, 4), 2)[0, 1]
        tensor([2., 3., 6., 7.])
    """
    n, c, h, w = images.shape
    cut = images.view(n, c, h // size, size, w // size, size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // size) * (w // size), size * size * c)


class Masked(nn.Module):
    """A masked autoencoder (He et al., CVPR 2022, arXiv 2111.06377): what to mask is given as noise, never drawn.

    Two networks with the same noise see the same patches.

    Attributes:
        patches: P, the number of patches. patch: side of one in pixels. width: of the encoder.
        decoder_width, decoder_depth: D and blocks of the decoder.
    """

    patches: int
    patch: int
    width: int
    decoder_width: int
    decoder_depth: int

    def encode(self, images: Tensor, noise: Tensor | None = None, ratio: float = 0.0) -> tuple[Tensor, Tensor]:
        """The encoder on the visible patches.

        Args:
            images: (n, C, H, W). noise: (n, P); None masks nothing. ratio: part that is masked.

        Returns:
            (n, 1 + k, width), class token first, after the encoder's norm; and every patch's place, (n, P).
        """
        tokens, one = self.embed(images)
        if noise is None:
            noise = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        keep, places = visible(noise, ratio)
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        return self.encoder_blocks(torch.cat([one.expand(len(images), -1, -1), tokens], 1)), places

    def decode(self, encoded: Tensor, places: Tensor, until: int | None = None) -> Tensor:
        """The decoder's blocks on all tokens: the visible ones, and mask tokens where the others were.

        Args:
            encoded, places: of `encode`. until: blocks that are run; None runs all.

        Returns:
            (n, 1 + P, decoder_width), class token first; the decoder's own norm is not applied.
        """
        x, mask, positions = self.decoder_parts(encoded)
        hidden = mask.expand(len(x), places.shape[1] + 1 - x.shape[1], -1)
        tokens = torch.cat([x[:, 1:], hidden], 1).gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], 1) + positions
        for block in self.decoder_blocks()[:until]:
            x = block(x)
        return x

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patches with their positions (n, P, width), and the class token with its own (1, 1, width)."""
        raise NotImplementedError

    def encoder_blocks(self, tokens: Tensor) -> Tensor:
        """The encoder's blocks and its norm."""
        raise NotImplementedError

    def decoder_parts(self, encoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens as the decoder reads them, its mask token and its positions (1, 1 + P, D)."""
        raise NotImplementedError

    def decoder_blocks(self) -> Any:
        raise NotImplementedError

    def drop_decoder(self) -> None:
        """Removes the decoder, after which `encode` is all there is."""
        raise NotImplementedError

    def pixels(self, decoded: Tensor) -> Tensor:
        """Pixels of all patches out of the whole decoder's tokens, (n, P, patch² · C)."""
        raise NotImplementedError


class TimmMasked(Masked):
    """A timm VisionTransformer with a light decoder of its own.

    Args:
        encoder: with a class token and learned positions; a distillation token, where it has one, is not read.
        shape: of one image, (C, H, W).
        width, depth: of the decoder, with a head for every 32 channels.

    Raises:
        UserError: another network, or images that do not fit it.
    """

    def __init__(self, encoder: nn.Module, shape: tuple[int, ...], width: int, depth: int):
        from timm.models.vision_transformer import Block, VisionTransformer

        super().__init__()
        own: Any = encoder
        if not isinstance(own, VisionTransformer):
            raise UserError(f"masked autoencoders need a VisionTransformer of timm, got {type(own).__name__}")
        if own.cls_token is None or own.reg_token is not None or own.pos_embed is None or own.no_embed_class:
            raise UserError("masked autoencoders need a VisionTransformer with a class token and learned positions")
        _check(lambda: own.patch_embed(torch.zeros(1, *shape).to(own.pos_embed)), own, shape)
        self.encoder: Any = own
        self.patches, self.patch = own.patch_embed.num_patches, own.patch_embed.patch_size[0]
        self.width, self.decoder_width, self.decoder_depth = own.embed_dim, width, depth
        self.reads = nn.Linear(self.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sines(own.patch_embed.grid_size, width, 1), persistent=False)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 32), qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.says = nn.Linear(width, self.patch**2 * shape[0])

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.encoder.pos_embed
        tokens = self.encoder.patch_embed(images) + positions[:, self.encoder.num_prefix_tokens :]
        return tokens, self.encoder.cls_token + positions[:, :1]

    def encoder_blocks(self, tokens: Tensor) -> Tensor:
        return self.encoder.norm(self.encoder.blocks(self.encoder.norm_pre(tokens)))

    def decoder_parts(self, encoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.reads(encoded), self.mask_token, self.positions  # type: ignore[return-value]

    def decoder_blocks(self) -> Any:
        return self.blocks

    def drop_decoder(self) -> None:
        self.reads = self.blocks = self.norm = self.says = nn.Identity()  # type: ignore[assignment]
        self.mask_token = None  # type: ignore[assignment]

    def pixels(self, decoded: Tensor) -> Tensor:
        return self.says(self.norm(decoded))[:, 1:]


class HubMasked(Masked):
    """A ViTMAEForPreTraining of transformers; its own ``mask_ratio`` is not read."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, config = model, model.config
        self.patches, self.patch = model.vit.embeddings.patch_embeddings.num_patches, config.patch_size
        self.width = config.hidden_size
        self.decoder_width, self.decoder_depth = config.decoder_hidden_size, config.decoder_num_hidden_layers

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        own = self.model.vit.embeddings
        first, others = own.position_embeddings[:, :1], own.position_embeddings[:, 1:]
        return own.patch_embeddings(images) + others, own.cls_token + first

    def drop_decoder(self) -> None:
        self.model.decoder = nn.Identity()

    def encoder_blocks(self, tokens: Tensor) -> Tensor:
        own = self.model.vit
        for layer in own.layers if hasattr(own, "layers") else own.encoder.layer:
            tokens = _first(layer(tokens))
        return own.layernorm(tokens)

    def decoder_parts(self, encoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.model.decoder
        return own.decoder_embed(encoded), own.mask_token, own.decoder_pos_embed

    def decoder_blocks(self) -> Any:
        return [lambda x, layer=layer: _first(layer(x)) for layer in self.model.decoder.decoder_layers]

    def pixels(self, decoded: Tensor) -> Tensor:
        own = self.model.decoder
        return own.decoder_pred(own.decoder_norm(decoded))[:, 1:]


def _first(output: Any) -> Tensor:
    """A layer's tokens: older versions of transformers give a tuple."""
    return output[0] if isinstance(output, tuple) else output


def as_masked(model: nn.Module, shape: tuple[int, ...], decoder: tuple[int, int]) -> Masked:
    """The model as a masked autoencoder for images of `shape`: a ViTMAEForPreTraining, or a timm VisionTransformer.

    Args:
        decoder: width and depth of the fresh one that a VisionTransformer gets.

    Raises:
        UserError: another kind of model, or images it was not made for.
    """
    if isinstance(model, Masked) or type(model).__name__ == "ViTMAEForPreTraining":
        found = model if isinstance(model, Masked) else HubMasked(model)
        like = next(found.parameters())
        _check(lambda: found.embed(torch.zeros(1, *shape).to(like)), model, shape)
        return found
    return TimmMasked(model, shape, *decoder)


def _check(look: Callable[[], Any], model: nn.Module, shape: tuple[int, ...]) -> None:
    try:
        with torch.no_grad():
            look()
    except (ValueError, RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{type(model).__name__} was made for other images than {tuple(shape)}: {why}") from None


class Pooled(nn.Module):
    """A classifier on a copy of a masked autoencoder's encoder: a linear layer on the mean of its patches' tokens.

    The encoder's norm comes before the mean, as in timm; in MAE's own fine-tuning it comes after it. The head starts
    at almost nothing, from `seed`.
    """

    def __init__(self, masked: Masked, classes: int, seed: int = 0):
        super().__init__()
        self.masked, self.head = copy.deepcopy(masked).requires_grad_(True), nn.Linear(masked.width, classes)
        self.masked.drop_decoder()
        start_head(self.head, seed)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.masked.encode(images)[0][:, 1:].mean(1))


def start_head(head: nn.Linear, seed: int) -> None:
    """Almost nothing: normal weights with standard deviation 2e-5 and no bias, as MAE's fine-tuning starts."""
    nn.init.normal_(head.weight, std=2e-5, generator=torch.Generator(head.weight.device).manual_seed(seed))
    nn.init.zeros_(head.bias)


def sines(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Sine and cosine positions of a grid, (1, prefix + h·w, width), with zeros for what comes before it.

    Raises:
        UserError: a width that four does not divide.
    """
    from timm.layers import build_sincos2d_pos_embed

    if width % 4:
        raise UserError(f"positions by sine and cosine need a width that 4 divides, got {width}")
    return F.pad(build_sincos2d_pos_embed(list(grid), width), (0, 0, prefix, 0))[None]


@torch.no_grad()
def start_positions(encoder: nn.Module) -> None:
    """Gives a fresh timm VisionTransformer the positions that masked autoencoders start from; they stay trainable."""
    own: Any = encoder
    own.pos_embed.copy_(sines(own.patch_embed.grid_size, own.embed_dim, own.num_prefix_tokens))
