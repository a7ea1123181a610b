"""Random views of a batch of images, drawn from a generator: SimCLR's, and those the student learns from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def view(x: Tensor, generator: torch.Generator, *, crop: float = 0.2, flip: bool = True, colour: float = 0.4) -> Tensor:
    """One view of each image: a random part of it scaled back, mirrored, brighter or darker, more or less contrast.

    Args:
        x: (n, C, h, w), as the encoder reads it (normalised); other inputs come back as they are.
        generator: everything is drawn from it, on the CPU.
        crop: least part of the area; the sides' ratio lies in 3/4…4/3. 1 does not crop.
        flip: mirror half of them.
        colour: brightness is shifted and contrast scaled by up to so much of each image's own spread.

    Returns:
        (n, C, h, w).
    """
    if x.dim() != 4:
        return x
    n = len(x)
    u = torch.rand(n, 7, generator=generator, dtype=torch.float64)
    area, ratio = crop + (1 - crop) * u[:, 0], (4 / 3) ** (2 * u[:, 1] - 1)
    if crop >= 1:
        ratio = torch.ones_like(ratio)
    wide, high = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    mirror = torch.where(u[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones(n, dtype=torch.float64)
    zero = torch.zeros_like(wide)
    across = torch.stack([wide * mirror, zero, (2 * u[:, 2] - 1) * (1 - wide)], 1)
    down = torch.stack([zero, high, (2 * u[:, 3] - 1) * (1 - high)], 1)
    where = F.affine_grid(torch.stack([across, down], 1).to(x), list(x.shape), align_corners=False)
    x = F.grid_sample(x, where, mode="bilinear", padding_mode="reflection", align_corners=False)
    if colour:
        mean, spread = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        shift, scale = ((2 * u[:, k] - 1).mul(colour).to(x).view(-1, 1, 1, 1) for k in (5, 6))
        x = mean + (x - mean) * (1 + scale) + shift * spread
    return x


def jitter(
    x: Tensor,
    generator: torch.Generator,
    *,
    flip: bool = True,
    shift: int = 2,
    noise: float = 0.15,
    shared: bool = True,
) -> Tensor:
    """The student's input: mirrored, shifted by up to `shift` pixels with reflected borders, Gaussian noise added.

    Args:
        x: (n, C, h, w); other inputs only get the noise.
        generator: on the CPU.
        shared: one mirroring and one shift for the whole batch.

    Returns:
        the shape of `x`; `x` itself where nothing is asked for.
    """
    if x.dim() == 4 and (flip or shift):
        n, _, h, w = x.shape
        draws = 1 if shared else n
        u = torch.rand(draws, 3, generator=generator, dtype=torch.float64).expand(n, 3)
        top, left = ((u[:, k] * (2 * shift + 1)).floor().long() for k in (0, 1))
        rows, columns = top[:, None] + torch.arange(h), left[:, None] + torch.arange(w)
        if flip:
            columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
        padded = F.pad(x, (shift,) * 4, mode="reflect") if shift else x
        which = torch.arange(n)[:, None, None]
        x = padded.movedim(1, 3)[which, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()
    if noise:
        x = x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    return x
