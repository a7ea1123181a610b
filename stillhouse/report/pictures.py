"""Samples as a picture: a grid of images with a line under each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PAD = 4


def grid(images: Tensor, *, columns: int = 10, captions: Sequence[str] = (), side: int = 64) -> bytes:
    """Images side by side as a PNG.

    Args:
        images: (n, 1 or 3, h, w), values in [0, 1]; what lies outside is cut off.
        columns: images in a row.
        captions: a short line under each image; none, or one each.
        side: pixels of an image's longer side in the picture; enlarged by whole numbers, so that pixels stay sharp.

    Raises:
        ValueError: another shape, or captions that do not match.

    Example:
        >>> import torch
        >>> grid(torch.zeros(3, 1, 8, 8), columns=2)[:4]
        b'\\x89PNG'
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"expected images (n, 1 or 3, h, w), got {tuple(images.shape)}")
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    n, _, h, w = images.shape
    times = max(1, side // max(h, w))
    pixels = (images.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(times, axis=1).repeat(times, axis=2).repeat(3 // images.shape[1], axis=3)
    columns = min(columns, n)
    line = 12 if captions else 0
    cell_h, cell_w = h * times + line + PAD, w * times + PAD
    page = np.full((-(-n // columns) * cell_h + PAD, columns * cell_w + PAD, 3), 255, np.uint8)
    corners = [(PAD + (i // columns) * cell_h, PAD + (i % columns) * cell_w) for i in range(n)]
    for (y, x), picture in zip(corners, pixels, strict=True):
        page[y : y + h * times, x : x + w * times] = picture
    sheet = Image.fromarray(page)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for (y, x), text in zip(corners, captions, strict=False):
        draw.text((x, y + h * times), text, fill=(90, 90, 90), font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
