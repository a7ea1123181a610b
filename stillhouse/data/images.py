"""Image files (and image columns) as `Samples`, decoded when taken."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from stillhouse.data.policies import augmented, split_augment
from stillhouse.data.samples import Samples, digest, draws, normalise, packed
from stillhouse.errors import UserError

IMAGE_AUGMENTS = ("none", "flip", "resized-crop-flip")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
BOX = tuple[float, float, float, float]


def centre_box(width: int, height: int, size: int) -> BOX:
    """The centred square to scale to size × size: all of the short side, or 7/8 of it from 128 pixels on."""
    side = min(width, height) * (0.875 if size >= 128 else 1.0)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, u: Sequence[float]) -> BOX:
    """A random part of the picture, as in Inception training (Szegedy et al. 2015).

    Args:
        u: uniform numbers: area (8…100 %), aspect ratio (3/4…4/3, log-uniform), column, row.
    """
    area = width * height * (SCALE[0] + u[0] * (SCALE[1] - SCALE[0]))
    ratio = math.exp(math.log(RATIO[0]) + u[1] * math.log(RATIO[1] / RATIO[0]))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = u[2] * (width - w), u[3] * (height - h)
    return left, top, left + w, top + h


class Images(Samples):
    """Image files, decoded to RGB, cut and scaled to a square when taken.

    Evaluation takes the centre (the short side, or 7/8 of it from 128 pixels on).

    Args:
        files: (N) paths.
        y: (N,) labels.
        classes: class names.
        image_size: side of the input in pixels.
        augment: "none", "flip" (centre, mirrored half of the time) or "resized-crop-flip"; with a policy behind it as
            "resized-crop-flip+randaugment" (`stillhouse.data.policies`).
        mean, std: three numbers each, for inputs in 0…1; by default those of ImageNet.
        skip_bad: decode everything now, leave out what cannot be read and list it in `skipped`.

    Raises:
        UserError: an image cannot be decoded (the file is named), when it is taken.
    """

    def __init__(
        self,
        files: Sequence[Any],
        y: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        *,
        image_size: int = 224,
        augment: str = "resized-crop-flip",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        skip_bad: bool = False,
    ):
        self.base, self.policy = split_augment(augment, IMAGE_AUGMENTS)
        if image_size < 1:
            raise UserError(f"image_size must be a positive number of pixels, got {image_size}")
        self.files, self.labels = list(files), np.asarray(y, dtype=np.int64)
        self.classes, self.shape = tuple(classes), (3, image_size, image_size)
        self.size, self.augment, self.mean, self.std = image_size, augment, tuple(mean), tuple(std)
        self.skipped: list[str] = []
        if skip_bad:
            good = [i for i in range(len(self.files)) if self._readable(i)]
            self.files, self.labels = [self.files[i] for i in good], self.labels[good]

    @cached_property
    def fingerprint(self) -> str:
        stats = [(p.parent.name, p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in map(Path, self.files)]
        return digest(
            "images",
            stats,
            self.labels,
            self.classes,
            self.size,
            self.augment,
            self.mean,
            self.std,
            SCALE,
            RATIO,
        )

    def _open(self, i: int) -> Image.Image:
        return Image.open(self.files[i])

    def _where(self, i: int) -> str:
        return str(self.files[i])

    def _decode(self, i: int) -> Image.Image:
        try:
            with self._open(i) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"cannot read image {self._where(i)}: {cause}; replace it, or count and skip such files "
                "with skip_bad=True (--skip-bad)"
            ) from error

    def _readable(self, i: int) -> bool:
        try:
            self._decode(i)
        except UserError:
            self.skipped.append(self._where(i))
            return False
        return True

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        ids = np.asarray(ids, dtype=np.int64)
        random = view is not None and self.base != "none"
        u = draws(seed, view if view is not None else 0, ids, 5).tolist() if random else None
        out = np.empty((len(ids), 3, self.size, self.size), np.uint8)
        for row, i in enumerate(ids.tolist()):
            picture = self._decode(i)
            box = centre_box(*picture.size, self.size)
            if u is not None and self.base == "resized-crop-flip":
                box = random_box(*picture.size, u[row])
            pixels = np.asarray(picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
            mirrored = u is not None and u[row][4] < 0.5
            out[row] = (pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1)
        if view is not None and self.policy:
            out = augmented(self.policy, out, seed, view, ids)
        return packed(normalise(out, self.mean, self.std), self.labels[ids], ids)


class Rows(Images):
    """The image column of a Hugging Face data set; one row is decoded at a time.

    Args:
        table: a ``datasets.Dataset`` whose column `image` is of type Image.
        image: name of that column.
        y: (N,) labels.
        classes: class names.
        options: as for `Images`.
    """

    def __init__(self, table: Any, image: str, y: np.ndarray, classes: Sequence[str], **options: Any):
        from datasets import Image as ImageColumn

        self.table = table.select_columns([image]).cast_column(image, ImageColumn(decode=False))
        self.column = image
        super().__init__(range(len(table)), y, classes, **options)

    @cached_property
    def fingerprint(self) -> str:
        return digest(
            "rows",
            self.table._fingerprint,
            self.files,
            self.labels,
            self.size,
            self.augment,
            self.mean,
            self.std,
        )

    def _open(self, i: int) -> Image.Image:
        cell = self.table[self.files[i]][self.column]
        if not cell or not (cell.get("bytes") or cell.get("path")):
            raise ValueError("the cell is empty")
        return Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])

    def _where(self, i: int) -> str:
        return f"in row {self.files[i]}, column {self.column!r}"


def usual_size(samples: Sequence[Path], at_most: int = 224) -> int:
    """Input side for a folder: 224, or the largest short side of up to 64 files rounded up to 8."""
    some = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, 64).astype(int))] if samples else []
    shorts = []
    for path in some:
        try:
            with Image.open(path) as picture:  # reads the header only
                shorts.append(min(picture.size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # reported, or skipped, where it is decoded
    return min(at_most, -(-max(shorts) // 8) * 8) if shorts else at_most
