"""A few labelled samples beside a pool without labels: cutting them out of a labelled set, hiding labels, joining."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.external import images_in
from stillhouse.data.images import Images
from stillhouse.data.named import load
from stillhouse.data.samples import Samples, Subset, digest, inherit
from stillhouse.errors import UserError
from stillhouse.system import fold

NONE = -1  # the label of a sample without one


class Regrouped(Samples):
    """The samples of some classes under new labels: a part of a task, or classes put together.

    Args:
        parent: the labelled set.
        groups: new class name → the parent's classes in it, by number; samples of no group are left out.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> s = Regrouped(Arrays(np.zeros((6, 2)), [0, 1, 2, 3, 2, 1]), {"three": [3], "one or two": [1, 2]})
        >>> s.labels.tolist(), s.take(np.array([2]))["label"].tolist()
        ([1, 1, 0, 1, 1], [0])
    """

    def __init__(self, parent: Samples, groups: Mapping[str, Sequence[int]]):
        c = len(parent.classes)
        new = np.full(c, NONE)
        for label, (name, olds) in enumerate(groups.items()):
            for old in olds:
                if not 0 <= old < c or new[old] != NONE:
                    raise UserError(f"class {old} of group {name!r}: expected one of 0…{c - 1}, in one group only")
                new[old] = label
        self.positions = np.flatnonzero(new[parent.labels] != NONE)  # in the parent
        self.kept = Subset(parent, self.positions, own_ids=True)
        self.parent, self.shape = self.kept, parent.shape
        self.labels, self.classes = new[self.kept.labels], tuple(groups)

    @cached_property
    def fingerprint(self) -> str:
        return digest("regrouped", self.kept.fingerprint, self.labels, self.classes)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        batch = self.kept.take(ids, view=view, seed=seed)
        return batch | {"label": torch.from_numpy(self.labels[np.asarray(ids)])}

    def __getattr__(self, name: str) -> Any:
        return inherit(self, name)


def part_of(samples: Samples, classes: Sequence[int]) -> Regrouped:
    """Only these classes, with the labels 0…K−1 in the order given and their old names."""
    known = len(samples.classes)
    for c in classes:
        if not 0 <= c < known:
            raise UserError(f"class {c}: expected a class number 0…{known - 1}")
    return Regrouped(samples, {samples.classes[c]: [c] for c in classes})


class Unlabelled(Samples):
    """The same inputs without labels: every label is −1, and no class is named.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> Unlabelled(Arrays(np.zeros((2, 2)), [0, 1])).take(np.array([1]))["label"].tolist()
        [-1]
    """

    def __init__(self, parent: Samples):
        self.parent, self.shape, self.classes = parent, parent.shape, ()
        self.labels = np.full(len(parent), NONE)

    @cached_property
    def fingerprint(self) -> str:
        return digest("unlabelled", self.parent.fingerprint)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        return self.parent.take(ids, view=view, seed=seed) | {"label": torch.full((len(ids),), NONE)}

    def __getattr__(self, name: str) -> Any:
        return inherit(self, name)


class Labelled(Samples):
    """The same inputs under labels given for each, such as pseudo-labels.

    Args:
        parent: whatever labels it has, or none.
        labels: (N,) class numbers.
        classes: class names.
    """

    def __init__(self, parent: Samples, labels: Any, classes: Sequence[str]):
        self.parent, self.shape, self.classes = parent, parent.shape, tuple(classes)
        self.labels = np.array(labels, np.int64)  # a copy
        if self.labels.shape != (len(parent),) or (len(parent) and not self._fit()):
            raise UserError(f"needs {len(parent)} labels in 0…{len(classes) - 1}, got {self.labels.shape}")

    def _fit(self) -> bool:
        return bool(self.labels.min() >= 0 and self.labels.max() < len(self.classes))

    @cached_property
    def fingerprint(self) -> str:
        return digest("labelled", self.parent.fingerprint, self.labels, self.classes)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        labels = torch.from_numpy(self.labels[np.asarray(ids)])
        return self.parent.take(ids, view=view, seed=seed) | {"label": labels}

    def __getattr__(self, name: str) -> Any:
        return inherit(self, name)


class Joined(Samples):
    """Several sets one after the other, as one; ids are positions in it. Classes are those of the first.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> a, b = Arrays(np.zeros((2, 1)), [0, 1]), Arrays(np.ones((1, 1)), [1], classes=("0", "1"))
        >>> Joined([a, b]).take(np.array([2, 0]))["input"].flatten().tolist()
        [1.0, 0.0]
    """

    def __init__(self, parts: Sequence[Samples]):
        self.parts = [p for p in parts if len(p)] or list(parts[:1])
        self.parent, first = self.parts[0], self.parts[0]
        if any(p.shape != first.shape or p.classes not in ((), first.classes) for p in self.parts):
            raise UserError("only sets with inputs of one shape and with the same classes can be joined")
        self.shape, self.classes = first.shape, first.classes
        self.labels = np.concatenate([p.labels for p in self.parts])
        self.starts = np.cumsum([0, *(len(p) for p in self.parts)])

    @cached_property
    def fingerprint(self) -> str:
        return digest("joined", *(p.fingerprint for p in self.parts))

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        ids = np.asarray(ids, dtype=np.int64)
        which = np.searchsorted(self.starts, ids, side="right") - 1
        out: dict[str, Tensor] = {}
        for k in np.unique(which):
            mine = np.flatnonzero(which == k)
            # Two parts may have one parent; their numbers keep the augmentations of equal ids apart.
            batch = self.parts[k].take(ids[mine] - self.starts[k], view=view, seed=fold(seed, "part", k) if k else seed)
            for key in ("input", "label"):
                if key not in out:
                    out[key] = batch[key].new_empty((len(ids), *batch[key].shape[1:]))
                out[key][torch.from_numpy(mine)] = batch[key]
        return {**out, "id": torch.from_numpy(ids.copy())}

    def __getattr__(self, name: str) -> Any:
        return inherit(self, name)


def few(samples: Samples, per_class: int, seed: int = 0) -> tuple[Subset, Subset]:
    """`per_class` samples of every class, chosen by the seed, and the rest; both keep the parent's ids.

    Raises:
        UserError: a class has not more than `per_class` samples.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> some, rest = few(Arrays(np.zeros((20, 2)), np.arange(20) % 2), 3)
        >>> sorted(some.labels.tolist()), len(rest)
        ([0, 0, 0, 1, 1, 1], 14)
    """
    rng = np.random.default_rng(fold(seed, "few"))
    chosen = []
    for c, name in enumerate(samples.classes):
        here = np.flatnonzero(samples.labels == c)
        if per_class < 1 or len(here) <= per_class:
            raise UserError(f"class {name!r} has {len(here)} samples; {per_class} labelled ones and a rest are needed")
        chosen.append(rng.permutation(here)[:per_class])
    part = np.sort(np.concatenate(chosen))
    return Subset(samples, part), Subset(samples, np.setdiff1d(np.arange(len(samples)), part))


@dataclass
class Mismatch:
    """A task with few labels and a pool in which other classes are mixed.

    Attributes:
        labelled: of the target classes, labels 0…K−1.
        pool: without labels.
        known: (N,) whether each pool sample is of a target class. truth: (N,) its label, −1 for unknown ones. Both are
            for judging only.
        ratio: the part of unknown samples in the pool.
    """

    labelled: Samples
    pool: Unlabelled
    known: np.ndarray
    truth: np.ndarray
    ratio: float


def mismatch(
    samples: Samples, targets: Sequence[int], per_class: int, ratio: float, *, known: int | None = None, seed: int = 0
) -> Mismatch:
    """Few labels of the target classes; the rest of them and ⌈m·n/(1−m)⌉ samples of the other classes as the pool.

    Args:
        samples: a labelled set of all classes.
        targets: the classes of interest, by number.
        per_class: labelled samples of each.
        ratio: m, the part of the pool that is of other classes, in [0, 1).
        known: n, target-class samples in the pool; None takes all that are left, or as many as there are others for.
        seed: chooses.

    Raises:
        UserError: not enough samples, or classes and ratios that cannot be.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> made = mismatch(Arrays(np.zeros((100, 2)), np.arange(100) % 5), [1, 3], 2, 0.5)
        >>> len(made.labelled), len(made.pool), int(made.known.sum())
        (4, 72, 36)
    """
    if not 0 <= ratio < 1:
        raise UserError(f"the mismatch ratio must lie in [0, 1), got {ratio}")
    if len(set(targets)) < 2 or len(set(targets)) < len(targets):
        raise UserError(f"at least two different target classes are needed, got {list(targets)}")
    task = part_of(samples, targets)
    labelled, rest = few(task, per_class, seed)
    others = np.flatnonzero(~np.isin(samples.labels, list(targets)))
    n = len(rest) if known is None else known
    if known is None and ratio > 0:
        while n > 0 and unknowns(ratio, n) > len(others):
            n -= 1
    wanted = unknowns(ratio, n)
    if not 0 < n <= len(rest) or wanted > len(others):
        raise UserError(
            f"a pool of {n} known and {wanted} unknown samples is wanted; there are {len(rest)} and {len(others)}"
        )
    rng = np.random.default_rng(fold(seed, "mismatch"))
    inside = np.sort(rng.permutation(len(rest))[:n])
    outside = np.sort(rng.permutation(others)[:wanted])
    positions = np.concatenate([task.positions[rest.indices[inside]], outside])
    truth = np.concatenate([rest.labels[inside], np.full(wanted, NONE)])
    order = rng.permutation(len(positions))
    pool = Unlabelled(Subset(samples, positions[order], own_ids=True))
    truth = truth[order]
    alone = Labelled(Subset(task, labelled.indices, own_ids=True), labelled.labels, task.classes)
    return Mismatch(alone, pool, truth != NONE, truth, wanted / len(positions))


def unknowns(ratio: float, known: int) -> int:
    """⌈m·n/(1−m)⌉: unknown samples that make up the part m of a pool with n known ones.

    Example:
        >>> unknowns(0.6, 200), unknowns(0.0, 200)
        (300, 0)
    """
    return math.ceil(round(ratio * known / (1 - ratio), 9))  # 0.6·200/0.4 is 300.00000000000006


def open_pool(
    name: str, like: Samples, *, image_size: int | None = None, augment: str | None = None, skip_bad: bool = False
) -> Unlabelled:
    """A user's unlabelled inputs: a folder of image files at any depth, or data by name, whose labels are not read.

    Args:
        name: ``folder:PATH``, or what `stillhouse.data.load` takes (its training part is used).
        like: the labelled samples it goes with, for size and normalisation.
        augment: of the files. skip_bad: leave out images that cannot be read, instead of stopping.

    Raises:
        UserError: nothing there, or inputs of another shape.
    """
    kind, _, path = name.partition(":")
    folder = Path(path).expanduser()
    if kind == "folder" and folder.is_dir():
        files, size = images_in(folder), like.shape[-1]
        if not files:
            raise UserError(f"{folder} holds no images to take as a pool")
        normal: dict[str, Any] = {k: getattr(like, k, None) for k in ("mean", "std")}
        normal = normal if all(v is not None and len(v) == 3 for v in normal.values()) else {}
        normal |= {"image_size": size, "augment": augment or "resized-crop-flip", "skip_bad": skip_bad}
        parent: Samples = Images(files, np.zeros(len(files)), ["–"], **normal)
    else:
        parent = load(name, image_size=image_size, augment=augment, skip_bad=skip_bad).train
    if parent.shape != like.shape:
        raise UserError(f"the pool {name} has inputs of shape {parent.shape}, the labelled data {like.shape}")
    return Unlabelled(parent)
