"""Finite labelled sets as pure functions of (which samples, augmentation view, seed)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.policies import augmented, split_augment
from stillhouse.errors import UserError
from stillhouse.system import fold

ARRAY_AUGMENTS = ("none", "flip", "crop-flip")
PAD = 4


class Samples(Protocol):
    """A finite labelled set; `take` is a pure function of its arguments.

    Attributes:
        labels: (N,) int64, the label of each sample by position.
        shape: shape of one input, e.g. (3, 32, 32).
        classes: class names; labels index into them.
    """

    labels: np.ndarray
    shape: tuple[int, ...]
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the content (of paths, sizes and times for folders) and of how it is drawn."""
        ...

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        """The samples at positions `ids` (each in 0…N−1), in that order.

        Args:
            ids: (n,) integer positions in this set.
            view: which augmentation to draw; None draws none (evaluation).
            seed: seed of the augmentation, which is a function of (seed, view, sample) alone.

        Returns:
            ``{"input": (n, *shape) float32, "label": (n,) int64, "id": (n,) int64}``. "id" is the position,
            except in a `Subset`, which gives its parent's.
        """
        ...


def digest(*parts: object) -> str:
    """A short content hash of arrays (dtype, shape and bytes) and printable parts."""
    h = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, np.ndarray):
            h.update(f"{part.dtype}{part.shape}".encode())
            h.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            h.update(str(part).encode())
        h.update(b"\x1f")
    return h.hexdigest()


def draws(seed: int, view: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) as a function of (seed, view, id, column), computed for all ids at once.

    A counter-based generator (the SplitMix64 finaliser of Steele, Lea & Flood 2014): a sample gets the same
    numbers alone, in any batch, in any worker and on any rank, which a stateful generator cannot give.

    Args:
        ids: (n,) integer sample ids.
        count: how many numbers each sample needs.

    Returns:
        (n, count) float64.

    Example:
        >>> many, one = draws(0, 3, np.arange(10), 2), draws(0, 3, np.array([7]), 2)
        >>> bool((many[7] == one[0]).all())
        True
    """
    counter: Any = ids.astype(np.uint64)[:, None] * np.uint64(max(16, count)) + np.arange(count, dtype=np.uint64)
    x: Any = counter * np.uint64(0x9E3779B97F4A7C15) + np.uint64(fold(seed, "augment", view))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def crop_flip(x: np.ndarray, u: np.ndarray, *, pad: int = PAD) -> np.ndarray:
    """Zero-pads by `pad`, cuts a window of the old size at a random place, mirrors half of the images.

    Args:
        x: (n, C, H, W) images.
        u: (n, 3) uniform numbers: row and column of the window, mirrored if u[:, 2] < 0.5.
        pad: padding in pixels; 0 only mirrors.

    Returns:
        (n, C, H, W), the dtype of `x`.
    """
    n, c, h, w = x.shape
    if pad and n:
        padded = np.zeros((n, c, h + 2 * pad, w + 2 * pad), x.dtype)
        padded[:, :, pad:-pad, pad:-pad] = x
        top, left = np.floor(u[:, :2] * (2 * pad + 1)).astype(np.intp).T
        windows = np.lib.stride_tricks.sliding_window_view(padded, (h, w), axis=(2, 3))
        x = windows[np.arange(n), :, top, left]
    mirrored = u[:, 2] < 0.5
    x[mirrored] = x[mirrored][..., ::-1]
    return x


def normalise(x: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """float32 ``(x − mean) / std`` along axis 1, uint8 scaled to 0…1 first. Overwrites a float32 `x`."""
    out = torch.from_numpy(x).float()
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    if mean is None or std is None:
        return out.div_(scale) if scale != 1.0 else out
    where = (-1, *(1,) * (x.ndim - 2))
    return out.sub_(torch.tensor(mean).mul_(scale).view(where)).div_(torch.tensor(std).mul_(scale).view(where))


def as_labels(y: Any, n: int, what: str = "y") -> np.ndarray:
    """(N,) int64 labels from a list, array or tensor, or a UserError that says what is wrong with them."""
    y = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if y.ndim != 1:
        hint = "; for one-hot rows give y.argmax(1)" if y.ndim == 2 else ""
        raise UserError(f"{what} must hold one integer label per sample, got shape {y.shape}{hint}")
    if len(y) != n:
        raise UserError(f"{what} has {len(y)} labels for {n} inputs; give one label per input")
    if y.dtype.kind not in "iub":
        raise UserError(f"{what} must hold integer labels 0…C−1, got {y.dtype}; convert them first")
    y = y.astype(np.int64)
    if n and y.min() < 0:
        raise UserError(f"{what}[{int(y.argmin())}] is {int(y.min())}; labels must be 0…C−1")
    return y


class Arrays(Samples):
    """A set in memory: uint8 (scaled to 0…1 when taken) or float32, normalised when taken.

    Args:
        x: (N, …) uint8 or float array or tensor; images as (N, C, H, W).
        y: (N,) integer labels in 0…C−1.
        classes: class names; by default the numbers up to the largest label.
        mean, std: per index of axis 1 (channel or feature), in units of the scaled input; None leaves it.
        augment: "none", "flip", or "crop-flip" (zero padding of 4 pixels), for (N, C, H, W) only; images of bytes may
            add a policy, "crop-flip+randaugment" (`stillhouse.data.policies`).

    Raises:
        UserError: x and y do not fit each other, or `augment` does not fit x.

    Example:
        >>> s = Arrays(np.full((4, 1, 2, 2), 255, np.uint8), [0, 1, 0, 1], mean=[0.5], std=[0.25])
        >>> float(s.take(np.array([2]))["input"].mean())
        2.0
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str = "none",
    ):
        x = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        if x.ndim < 2:
            raise UserError(f"x must be (N, …) with at least two axes, got shape {x.shape}; reshape it to (N, 1)")
        if x.dtype.kind not in "biuf":
            raise UserError(f"x must hold numbers, got {x.dtype}; convert it to float32 or uint8")
        self.x = np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32, copy=False))
        self.labels = as_labels(y, len(x))
        self.shape = tuple(int(d) for d in x.shape[1:])
        top = int(self.labels.max()) + 1 if len(x) else 0
        self.classes = tuple(classes) if classes is not None else tuple(str(i) for i in range(top))
        self.base, self.policy = split_augment(augment, ARRAY_AUGMENTS)
        if augment != "none" and len(self.shape) != 3:
            raise UserError(f"augment={augment!r} needs images (N, C, H, W), got x of shape {x.shape}; use 'none'")
        if self.policy and (self.x.dtype != np.uint8 or self.shape[0] not in (1, 3)):
            raise UserError(f"augment={augment!r} needs uint8 images of 1 or 3 channels, got {x.dtype} {x.shape}")
        self.augment, self.mean, self.std = augment, mean, std

    @cached_property
    def fingerprint(self) -> str:
        return digest("arrays", self.x, self.labels, self.classes, self.mean, self.std, self.augment, PAD)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        ids = np.asarray(ids, dtype=np.int64)
        x = self.x[ids]
        if view is not None and self.base != "none":
            x = crop_flip(x, draws(seed, view, ids, 3), pad=PAD if self.base == "crop-flip" else 0)
        if view is not None and self.policy:
            x = augmented(self.policy, x, seed, view, ids)
        return packed(normalise(x, self.mean, self.std), self.labels[ids], ids)


def packed(x: Tensor, labels: np.ndarray, ids: np.ndarray) -> dict[str, Tensor]:
    """A batch from its three parts; the ids are copied so that nobody writes into the caller's."""
    return {"input": x, "label": torch.from_numpy(labels), "id": torch.from_numpy(ids.copy())}


class Subset(Samples):
    """Some samples of another set, which keep the parent's ids (and so its augmentation and cached signals).

    Args:
        parent: the set to choose from.
        indices: (n,) positions in the parent.
        own_ids: number the samples 0…n−1 instead: for a set that stands alone (`limit`, a test part).

    Example:
        >>> s = Subset(Arrays(np.zeros((9, 2)), np.arange(9) % 3), np.array([5, 7]))
        >>> s.take(np.array([1]))["id"].tolist(), s.labels.tolist()
        ([7], [2, 1])
    """

    parent: Samples
    indices: np.ndarray
    own_ids: bool

    def __init__(self, parent: Samples, indices: np.ndarray, *, own_ids: bool = False):
        indices = np.asarray(indices, dtype=np.int64)
        if isinstance(parent, Subset) and not parent.own_ids:
            indices, parent = parent.indices[indices], parent.parent
        self.parent, self.indices, self.own_ids = parent, indices, own_ids
        self.labels = parent.labels[indices]
        self.shape, self.classes = parent.shape, parent.classes

    @cached_property
    def fingerprint(self) -> str:
        return digest("subset", self.parent.fingerprint, self.indices, self.own_ids)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        batch = self.parent.take(self.indices[ids], view=view, seed=seed)
        return batch | {"id": torch.tensor(ids, dtype=torch.int64)} if self.own_ids else batch

    def __getattr__(self, name: str) -> Any:
        return inherit(self, name)


class Relabelled(Samples):
    """The same inputs with other labels: symmetric label noise, or labels given per sample.

    ``round(noise · N)`` samples, chosen by the seed, get a label drawn evenly from the OTHER classes.

    Args:
        parent: the set whose labels are replaced.
        noise: fraction of labels to replace, in [0, 1).
        labels: position → label; applied after the noise.
        seed: chooses the samples and their labels.

    Attributes:
        clean: (N,) the parent's labels.

    Example:
        >>> s = Relabelled(Arrays(np.zeros((10, 2)), np.arange(10) % 5), noise=0.3)
        >>> int((s.labels != s.clean).sum())
        3
    """

    def __init__(self, parent: Samples, *, noise: float = 0.0, labels: Mapping[int, int] | None = None, seed: int = 0):
        if not 0.0 <= noise < 1.0:
            raise UserError(f"label noise must be a fraction in [0, 1), got {noise}")
        n, c = len(parent), len(parent.classes)
        if noise and c < 2:
            raise UserError(f"label noise needs at least two classes, got {c}")
        self.parent, self.clean, self.labels = parent, parent.labels, parent.labels.copy()
        self.shape, self.classes = parent.shape, parent.classes
        if noise:
            rng = np.random.default_rng(fold(seed, "label noise"))
            hit = rng.permutation(n)[: round(noise * n)]
            self.labels[hit] = (self.labels[hit] + rng.integers(1, c, len(hit))) % c
        for position, label in (labels or {}).items():
            if not (0 <= position < n and 0 <= label < c):
                raise UserError(f"label {label} for sample {position}: expected a sample 0…{n - 1}, a label 0…{c - 1}")
            self.labels[position] = label

    @cached_property
    def fingerprint(self) -> str:
        return digest("relabelled", self.parent.fingerprint, self.labels)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        batch = self.parent.take(ids, view=view, seed=seed)
        return batch | {"label": torch.from_numpy(self.labels[ids])}

    def __getattr__(self, name: str) -> Any:
        return inherit(self, name)


def inherit(child: Any, name: str) -> Any:
    """Facts about the inputs (their normalisation, augmentation, thread safety, tokenizer) come from the parent."""
    if name in {"mean", "std", "augment", "one_thread", "tokenizer"}:
        return getattr(child.parent, name)
    raise AttributeError(f"{type(child).__name__} has no attribute {name!r}")
