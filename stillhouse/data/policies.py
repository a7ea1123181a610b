"""Augmentation policies for images of bytes, behind cropping and mirroring: AutoAugment, RandAugment, TrivialAugment.

As part of ``--augment``: ``crop-flip+randaugment``. Everything drawn is a function of (seed, view, sample), as in
`stillhouse.data.samples.draws`; the operations themselves are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError, did_you_mean
from stillhouse.system import fold

# Largest shear, shift (part of the width; pixels from 1 on), turn in degrees, change of brightness and the like, and
# bits that are dropped: AutoAugment (arXiv 1805.09501), RandAugment (1909.13719), TrivialAugment wide (2103.10158).
RANGES = {
    "autoaugment": (0.3, 150 / 331, 30.0, 0.9, 4),
    "randaugment": (0.3, 150 / 331, 30.0, 0.9, 4),
    "trivialaugment": (0.99, 32.0, 135.0, 0.99, 6),
}
POLICIES = tuple(RANGES)
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
OPS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
STRENGTH = 9 / 30  # of RandAugment, as torchvision has it: magnitude 9 of 0…30, twice per image
DRAWS = 5  # numbers per image
LARGE = 64  # from this size on AutoAugment takes its policy for ImageNet, below that for CIFAR-10


def split_augment(augment: str, known: Sequence[str]) -> tuple[str, str | None]:
    """``base+policy`` as its two parts; without a ``+`` there is no policy.

    Raises:
        UserError: a base or a policy that is not known.

    Example:
        >>> split_augment("flip+randaugment", ["none", "flip"])
        ('flip', 'randaugment')
    """
    base, plus, policy = augment.partition("+")
    if base not in known:
        raise UserError(f"unknown augment {augment!r} for this kind of data: {did_you_mean(base, known)}")
    if plus and policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r} in augment {augment!r}: {did_you_mean(policy, POLICIES)}")
    return base, policy or None


def augmented(policy: str, x: np.ndarray, seed: int, view: int, ids: np.ndarray) -> np.ndarray:
    """Images changed by a policy, each by its own draws.

    Args:
        policy: one of `POLICIES`.
        x: (n, C, H, W) uint8, C of 1 or 3.
        seed, view, ids: what the draws are a function of; ids (n,).

    Returns:
        (n, C, H, W) uint8.
    """
    from stillhouse.data.samples import draws  # that module offers these policies itself

    u = draws(fold(seed, "policy"), view, ids, DRAWS)
    rows = [_image(policy, torch.from_numpy(x[k]), u[k].tolist()) for k in range(len(x))]
    return torch.stack(rows).numpy() if rows else x


def _image(policy: str, x: Tensor, u: list[float]) -> Tensor:
    if policy == "trivialaugment":
        chosen = [(OPS[int(u[0] * len(OPS))], u[1], u[2] < 0.5)]
    elif policy == "randaugment":
        chosen = [(OPS[int(u[k] * len(OPS))], STRENGTH, u[k + 1] < 0.5) for k in (0, 2)]
    else:
        pairs = _learned("imagenet" if x.shape[-1] >= LARGE else "cifar10")
        pair = pairs[int(u[0] * len(pairs))]
        drawn = ((u[1], u[2]), (u[3], u[4]))
        chosen = [
            (name, (level or 0) / 9, sign < 0.5)
            for (name, p, level), (on, sign) in zip(pair, drawn, strict=True)
            if on <= p
        ]
    for name, strength, negative in chosen:
        x = operate(name, x, strength, negative, RANGES[policy])
    return x


@cache
def _learned(data: str) -> Any:
    """The pairs of operations that AutoAugment found: (name, probability, level of 0…9) twice."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    return AutoAugment(AutoAugmentPolicy(data)).policies


def operate(name: str, x: Tensor, strength: float, negative: bool, ranges: Sequence[float]) -> Tensor:
    """One operation on one image.

    Args:
        name: of `OPS`, or "Invert".
        x: (C, H, W) uint8.
        strength: 0…1, the part of the operation's range. negative: to the other side, where it has two.
        ranges: see `RANGES`.

    Returns:
        (C, H, W) uint8; strength 0 gives the image back, except of AutoContrast, Equalize and Invert, which have none.
    """
    from torchvision.transforms import functional as F

    shear, shift, turn, enhance, bits = ranges
    side = -1.0 if negative and name in SIGNED else 1.0
    size = x.shape[-1] if name == "TranslateX" else x.shape[-2]
    moved = side * strength * (shift if shift >= 1 else shift * size)
    angle = float(np.degrees(np.arctan(side * strength * shear)))
    amount = 1 + side * strength * enhance
    flat: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    match name:
        case "ShearX" | "ShearY":
            both = [angle, 0.0] if name == "ShearX" else [0.0, angle]
            return F.affine(x, **{**flat, "shear": both, "center": [0, 0]})
        case "TranslateX" | "TranslateY":
            return F.affine(x, **{**flat, "translate": [int(moved), 0] if name == "TranslateX" else [0, int(moved)]})
        case "Rotate":
            return F.rotate(x, side * strength * turn)
        case "Brightness":
            return F.adjust_brightness(x, amount)
        case "Color":
            return F.adjust_saturation(x, amount)
        case "Contrast":
            return F.adjust_contrast(x, amount)
        case "Sharpness":
            return F.adjust_sharpness(x, amount)
        case "Posterize":
            return F.posterize(x, 8 - round(strength * bits))
        case "Solarize":
            return F.solarize(x, 255 * (1 - strength)) if strength else x
        case "AutoContrast":
            return F.autocontrast(x)
        case "Equalize":
            return F.equalize(x)
        case "Invert":
            return F.invert(x)
    return x
