"""A data set in its parts, and the ways a user's own objects become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.samples import Arrays, Samples, Subset, digest
from stillhouse.data.wrapped import Wrapped
from stillhouse.errors import UserError, did_you_mean
from stillhouse.system import fold, walk


@dataclass
class Data:
    """Training and test part of a labelled data set, checked against each other.

    Attributes:
        name: what it is called in reports.
        train, test: never the same samples.
        held_out: part of the training data set apart by its maker; None where a recipe is to `split` its own.
        extra: further test parts by name.
        notes: what the reader of a report must know about the parts.

    Raises:
        UserError: an empty part, fewer than two classes, parts that differ in classes or shape, labels out of
            range, NaN or infinity among the first samples; the part (and the sample) is named.
    """

    name: str
    train: Samples
    test: Samples
    held_out: Samples | None = None
    extra: dict[str, Samples] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Samples]:
        held_out = {"held_out": self.held_out} if self.held_out is not None else {}
        return {"train": self.train, "test": self.test, **held_out, **self.extra}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.train.shape

    @property
    def fingerprint(self) -> str:
        return digest("data", *(f"{k}:{v.fingerprint}" for k, v in self.parts.items()))

    @property
    def facts(self) -> dict[str, Any]:
        """What kind of task it is, as reports keep it: name, samples, classes, a constant answer's accuracy, input."""
        share = float(np.bincount(self.train.labels).max()) / len(self.train)
        sizes = {"train": len(self.train), "test": len(self.test), "classes": len(self.classes), "chance": share}
        return {"data": self.name, **sizes, "inputs": math.prod(self.shape), "text": hasattr(self.train, "tokenizer")}

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            check_part(f"data {self.name!r}, part {name!r}", part, self.train)


def check_part(where: str, part: Samples, train: Samples) -> None:
    """Refuses a part that is empty, unlike the training part, or has bad labels or numbers."""
    if not len(part):
        raise UserError(f"{where} is empty; give at least one sample")
    c = len(part.classes)
    if c < 2:
        raise UserError(f"{where} has {c} class ({', '.join(part.classes)}); at least two are needed")
    if part.classes != train.classes:
        here, there = set(part.classes) - set(train.classes), set(train.classes) - set(part.classes)
        parts = [f"only here: {sorted(here)[:5]}"] * bool(here) + [f"only in train: {sorted(there)[:5]}"] * bool(there)
        raise UserError(f"{where} has other classes than train ({'; '.join(parts) or 'in another order'})")
    if part.shape != train.shape:
        raise UserError(f"{where} has inputs of shape {part.shape}, train has {train.shape}; make them equal")
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= c))
    if len(wrong):
        raise UserError(
            f"{where}: sample {wrong[0]} has label {part.labels[wrong[0]]}, expected 0…{c - 1} ({c} classes)"
        )
    for values in walk(part.take(np.arange(min(8, len(part))))["input"]):
        bad = torch.nonzero(~torch.isfinite(values.flatten(1)).all(1)).flatten()
        if len(bad):
            raise UserError(f"{where}: sample {int(bad[0])} holds NaN or infinity; clean the data first")


def divide(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of the rest and of a stratified part of ``fraction · N`` samples; see `split`."""
    if not 0.0 < fraction < 1.0:
        raise UserError(f"the fraction to split off must lie between 0 and 1, got {fraction}")
    if len(labels) < 2:
        raise UserError(f"cannot split {len(labels)} sample(s) in two; at least two are needed")
    classes, counts = np.unique(labels, return_counts=True)
    want = counts * fraction
    most = np.maximum(counts - 1, 0)
    sizes = np.clip(np.floor(want).astype(int), np.minimum(1, most), most)
    short = max(0, round(len(labels) * fraction) - int(sizes.sum()))
    largest_remainder = np.argsort(sizes - want, kind="stable")
    sizes[[c for c in largest_remainder if sizes[c] < most[c]][:short]] += 1
    if not sizes.any():  # every class has a single sample
        sizes[0] = 1
    rng = np.random.default_rng(fold(seed, "split"))
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, sizes)]
    part = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), part), part


def split(samples: Samples, fraction: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Splits off a part stratified by label, the same for the same seed. Both keep the parent's ids.

    Per class the part gets ``fraction · count`` samples (largest remainders, in sum ``round(fraction · N)``),
    moved where needed so that a class of two or more has samples in both.

    Args:
        samples: the set.
        fraction: size of the second part, in (0, 1).
        seed: chooses the samples.

    Returns:
        (rest, part).

    Example:
        >>> rest, part = split(Arrays(np.zeros((20, 2)), np.arange(20) % 2), 0.1)
        >>> len(rest), sorted(part.labels.tolist())
        (18, [0, 1])
    """
    rest, part = divide(samples.labels, fraction, seed)
    return Subset(samples, rest), Subset(samples, part)


def numpy_of(x: Any, what: str = "x") -> np.ndarray:
    """A numeric array; every non-finite value is an error that names the sample."""
    try:
        x = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    except (ValueError, TypeError) as error:
        raise UserError(f"{what} cannot be read as one array: {error}") from error
    if x.dtype.kind == "f" and x.ndim:
        for start in range(0, len(x), 4096):  # in pieces: the mask of all at once may not fit
            bad = ~np.isfinite(x[start : start + 4096]).all(axis=tuple(range(1, x.ndim)))
            if bad.any():
                raise UserError(f"{what}[{start + int(bad.argmax())}] holds NaN or infinity; clean the data first")
    return x


def channels_first(x: np.ndarray) -> tuple[np.ndarray, bool]:
    """(N, C, H, W) from images in either order or (N, H, W) uint8; and whether channels came last."""
    if x.ndim == 3 and x.dtype == np.uint8:
        return x[:, None], False
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return x.transpose(0, 3, 1, 2), True
    return x, False


def statistics(x: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per index of axis 1 in units of the scaled input; a constant one gets 1."""
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    axes = (0, *range(2, x.ndim))
    pieces = [x[i : i + 4096].astype(np.float64) / scale for i in range(0, len(x), 4096)]
    count = x.size / x.shape[1]
    mean = sum(p.sum(axes) for p in pieces) / count
    where = (1, -1, *(1,) * (x.ndim - 2))
    std = np.sqrt(sum(((p - mean.reshape(where)) ** 2).sum(axes) for p in pieces) / count)
    return mean.tolist(), np.where(std > 1e-8, std, 1.0).tolist()


def names_and_labels(y: Any, classes: Sequence[str] | None) -> tuple[Any, Sequence[str] | None]:
    """Labels given as words become positions in the (sorted) class names; others stay as they are."""
    words = np.asarray(y) if not isinstance(y, Tensor) else None
    if words is None or words.dtype.kind not in "US":
        return y, classes
    known = list(classes) if classes is not None else sorted(set(words.tolist()))
    position = {name: i for i, name in enumerate(known)}
    for i, word in enumerate(words.tolist()):
        if word not in position:
            raise UserError(f"label {word!r} of sample {i} is not among the classes; {did_you_mean(word, known)}")
    return np.array([position[w] for w in words.tolist()]), known


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    test_fraction: float = 0.2,
    held_out: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    augment: str = "none",
    normalize: bool = True,
    name: str = "arrays",
    seed: int = 0,
) -> Data:
    """`Data` from arrays or tensors in memory.

    Args:
        x: (N, …) floats, or uint8 images as (N, H, W), (N, H, W, C) or (N, C, H, W).
        y: (N,) labels: integers 0…C−1, or words.
        test: (x, y) of the test part; without it a stratified `test_fraction` of the samples is set apart.
        held_out: (x, y) of a held-out part of the training data.
        classes: class names; by default the numbers (or words) that occur.
        augment: "none", "flip" or "crop-flip" (images only).
        normalize: subtract mean and divide by standard deviation per channel or feature of the TRAINING part.
        name: for reports.
        seed: chooses the test part.

    Raises:
        UserError: lengths, labels or shapes that do not fit; NaN or infinity anywhere (the index is named).

    Example:
        >>> data = from_arrays(np.random.default_rng(0).normal(size=(50, 4)), np.arange(50) % 2)
        >>> data.shape, len(data.train), len(data.test)
        ((4,), 40, 10)
    """
    given = {"train": (x, y)} | ({"test": test} if test else {}) | ({"held_out": held_out} if held_out else {})
    arrays, notes = {}, []
    for part, (inputs, targets) in given.items():
        inputs, last = channels_first(numpy_of(inputs, "x" if part == "train" else f"{part} x"))
        targets, classes = names_and_labels(targets, classes)
        arrays[part] = Arrays(inputs, targets, classes=classes)
        if last and part == "train":
            notes.append("images read as (N, H, W, C)")
    if classes is None:
        classes = max((a.classes for a in arrays.values()), key=len)
    if test is None:
        rest, part_ = divide(arrays["train"].labels, test_fraction, seed)
        whole = arrays["train"]
        arrays["train"], arrays["test"] = (Arrays(whole.x[i], whole.labels[i]) for i in (rest, part_))
        notes.append(f"test: {len(part_)} of the {len(whole)} samples, set apart by class with seed {seed}")
    mean, std = statistics(arrays["train"].x) if normalize and len(arrays["train"]) else (None, None)
    finish = partial(Arrays, classes=classes, mean=mean, std=std)
    done = {k: finish(a.x, a.labels, augment="none" if k == "test" else augment) for k, a in arrays.items()}
    return Data(name, done["train"], done["test"], done.get("held_out"), notes=tuple(notes))


def is_samples(obj: Any) -> bool:
    return all(hasattr(obj, k) for k in ("take", "labels", "shape", "classes"))


def is_pair(obj: Any) -> bool:
    """(x, y) of arrays, tensors or plain lists of labels."""
    arrays = np.ndarray | Tensor
    return (
        isinstance(obj, tuple | list)
        and len(obj) == 2
        and isinstance(obj[0], arrays)
        and isinstance(obj[1], np.ndarray | Tensor | list | tuple)
    )


def as_data(obj: Any, name: str, *, augment: str | None = None, seed: int = 0) -> Data:
    """What a user has, as `Data`.

    Args:
        obj: `Data`; one part (a fifth becomes the test part); (train, test) or (train, held_out, test); or a
            dict with keys train, test and perhaps held_out. A part is a map-style torch Dataset, a DataLoader
            (its dataset is used), `Samples`, or (x, y) arrays.
        name: for reports and errors.
        augment: for (x, y) arrays only.
        seed: chooses the test part where none is given.

    Raises:
        UserError: anything else; the error says what came.
    """
    if isinstance(obj, Data):
        return obj
    if isinstance(obj, Mapping):
        wrong = [k for k in obj if k not in ("train", "test", "held_out")]
        if wrong or "train" not in obj:
            hint = did_you_mean(str(wrong[0]), ["train", "test", "held_out"]) if wrong else "'train' is missing"
            raise UserError(
                f"{name}: a dict of data needs train and test (and perhaps held_out), got {list(obj)}; {hint}"
            )
        parts = dict(obj)
    elif isinstance(obj, tuple | list) and not is_pair(obj):
        keys = {2: ("train", "test"), 3: ("train", "held_out", "test")}.get(len(obj))
        if keys is None:
            raise UserError(f"{name}: expected (train, test) or (train, held_out, test), got {len(obj)} things")
        parts = dict(zip(keys, obj))
    else:
        parts = {"train": obj}
    parts = {k: v for k, v in parts.items() if v is not None or k == "train"}
    if all(is_pair(p) for p in parts.values()):
        rest = {k: v for k, v in parts.items() if k != "train"}
        return from_arrays(*parts["train"], **rest, augment=augment or "none", name=name, seed=seed)
    if augment is not None:
        raise UserError(f"{name}: augment={augment!r} applies to arrays; augment inside your data set instead")
    made = {k: as_samples(v, f"{name}, part {k!r}") for k, v in parts.items()}
    if "test" not in made:
        rest_, part = divide(made["train"].labels, 0.2, seed)
        whole = made["train"]
        note = f"test: {len(part)} of the {len(whole)} samples, set apart by class with seed {seed}"
        return Data(name, Subset(whole, rest_, own_ids=True), Subset(whole, part, own_ids=True), notes=(note,))
    return Data(name, made["train"], made["test"], made.get("held_out"))


def as_samples(obj: Any, where: str) -> Samples:
    """One part of a user's data as `Samples`; see `as_data`."""
    if is_samples(obj):
        return obj
    if isinstance(obj, torch.utils.data.DataLoader):
        obj = obj.dataset
    if is_pair(obj):
        raise UserError(f"{where} is (x, y) arrays while others are data sets; give all parts in one form")
    if isinstance(obj, str | bytes | int | float) or obj is None or not hasattr(obj, "__getitem__"):
        raise UserError(
            f"{where} is {type(obj).__name__}; expected a map-style torch Dataset, a DataLoader over one, "
            "Samples, or (x, y) arrays"
        )
    return Wrapped(obj, name=where)
