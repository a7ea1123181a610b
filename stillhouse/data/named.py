"""Data by name: what `--data` accepts."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.data.external import open_folder, open_hub
from stillhouse.data.samples import Arrays, Relabelled, Subset
from stillhouse.data.sets import Data, as_data, from_arrays
from stillhouse.errors import UserError, did_you_mean

FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN, CIFAR10_STD = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FORMS = ("folder:PATH", "hf:NAME", "package.module:function")


@dataclass(frozen=True)
class Options:
    """What `load` was asked for beside the name."""

    root: Path | None
    image_size: int | None
    limit: int | None
    skip_bad: bool
    augment: str | None
    seed: int

    @property
    def cache(self) -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"

    @property
    def places(self) -> list[Path]:
        return [self.root, self.cache] if self.root else [self.cache]

    def offline(self, name: str, cause: BaseException) -> UserError:
        where = f"STILLHOUSE_DATA={self.root}" if self.root else "STILLHOUSE_DATA (not set)"
        reason = (str(cause).splitlines() or [""])[0].rstrip(":") or type(cause).__name__
        return UserError(
            f"{name} not found in {where} or {self.cache} and could not be downloaded: {reason}; "
            f"set STILLHOUSE_DATA to a folder that holds {name}/, or connect once to the internet"
        )


def load(
    spec: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    label_noise: float = 0.0,
    augment: str | None = None,
    seed: int = 0,
    given: Any = None,
) -> Data:
    """A data set by name.

    Args:
        spec: "digits", "fashion-mnist", "mnist", "cifar10"; ``folder:PATH`` (PATH/train/CLASS/* with
            PATH/val or PATH/test, or PATH/CLASS/*); ``hf:NAME``, ``hf:NAME/CONFIG`` or a local path, columns
            by ``?image=img&label=fine``; or ``package.module:function``, which returns what `as_data` takes.
        root: folder with the named sets; by default $STILLHOUSE_DATA, then a download to ~/.cache/stillhouse.
        image_size: side of the inputs in pixels.
        limit: keep the first `limit` TRAINING samples, the classes balanced.
        skip_bad: leave out images that cannot be decoded and say so in the notes.
        label_noise: fraction of TRAINING labels replaced by another class, in [0, 1).
        augment: training augmentation instead of the usual one; a policy may stand behind it, ``flip+randaugment``.
        seed: of the label noise and of test parts that have to be set apart (not of "digits", always 0).

        given: what the function that `spec` names gave, where it was called already.

    Raises:
        UserError: an unknown name, missing or bad data, an option that does not fit.

    Example:
        >>> data = load("digits")
        >>> data.shape, len(data.classes), len(data.train), len(data.test)
        ((1, 8, 8), 10, 1258, 539)
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be a positive number of samples, got {limit}")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be a positive number of pixels, got {image_size}")
    place = root or os.environ.get("STILLHOUSE_DATA")
    options = Options(Path(place).expanduser() if place else None, image_size, limit, skip_bad, augment, seed)
    data = opener(spec)(options) if given is None else open_function(spec, options, given)
    train, notes = data.train, list(data.notes)
    if limit is not None and limit < len(train):
        train = Subset(train, first_balanced(train.labels, limit), own_ids=True)
    if limit is not None and limit == len(train):  # a set may have kept to it while reading
        notes.append(f"train: the first {limit} samples, classes balanced")
    return with_noise(replace(data, train=train, notes=tuple(notes)), label_noise, seed)


def with_noise(data: Data, label_noise: float, seed: int) -> Data:
    """The data with a fraction of the training labels replaced by another class; 0 leaves them alone."""
    if not 0.0 <= label_noise < 1.0:
        raise UserError(f"label_noise must be a fraction in [0, 1), got {label_noise}")
    if not label_noise:
        return data
    train = Relabelled(data.train, noise=label_noise, seed=seed)
    return replace(data, train=train, notes=(*data.notes, f"{label_noise:.0%} of the training labels are wrong"))


def find(name: str) -> Path:
    """The folder of a set that Stillhouse does not download, in $STILLHOUSE_DATA.

    Raises:
        UserError: it is not there; says where it was looked for.
    """
    place = os.environ.get("STILLHOUSE_DATA")
    if not place:
        raise UserError(
            f"the data {name!r} are looked for in STILLHOUSE_DATA, which is not set; set it to their folder"
        )
    folder = Path(place).expanduser() / name
    if not folder.is_dir():
        raise UserError(f"the data {name!r} are not in STILLHOUSE_DATA={place}: there is no folder {folder}")
    return folder


def opener(spec: str) -> Callable[[Options], Data]:
    """The function that opens what `spec` names."""
    if spec in NAMED:
        return NAMED[spec]
    kind, colon, rest = spec.partition(":")
    if kind == "folder" and colon:
        return lambda o: open_folder(rest, o.image_size, o.augment, o.skip_bad, o.seed)
    if kind == "hf" and colon:
        return lambda o: open_hub(rest, o.image_size, o.augment, o.skip_bad, o.seed)
    if is_function(spec):
        return lambda o: open_function(spec, o)
    raise UserError(f"unknown data {spec!r}; {did_you_mean(spec, [*NAMED, *FORMS])}")


def is_function(spec: str) -> bool:
    """Whether `spec` has the form ``package.module:function``."""
    kind, colon, _ = spec.partition(":")
    return bool(colon) and kind not in ("folder", "hf") and kind.replace(".", "").replace("_", "").isalnum()


def first_balanced(labels: np.ndarray, limit: int) -> np.ndarray:
    """Sorted positions of the first `limit` samples taken round-robin over the classes."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    if limit < len(counts):
        raise UserError(f"limit={limit} is less than the {len(counts)} classes; each needs a sample")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(np.lexsort((labels, rank))[:limit])


def array_part(x: np.ndarray, y: np.ndarray, options: Options, **how: Any) -> Arrays:
    """(N, C, H, W) images at the asked size."""
    size = options.image_size
    if size is not None and x.shape[-2:] != (size, size):
        x = resized(x, size)
    return Arrays(x, y, **how)


def resized(x: np.ndarray, size: int) -> np.ndarray:
    """Images scaled to size × size with an antialiased bilinear filter, the dtype kept."""
    out = np.empty((*x.shape[:2], size, size), x.dtype)
    for start in range(0, len(x), 1024):
        piece = torch.from_numpy(x[start : start + 1024]).float()
        small = torch.nn.functional.interpolate(piece, (size, size), mode="bilinear", antialias=True)
        out[start : start + 1024] = (small.round() if x.dtype == np.uint8 else small).numpy()
    return out


def open_digits(options: Options) -> Data:
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels; the same 70 % train and 30 % test always."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (raw.images[:, None] / 16).astype(np.float32)
    if options.image_size:
        x = resized(x, options.image_size)
    augment = options.augment or "none"
    return from_arrays(x, raw.target, test_fraction=0.3, augment=augment, name="digits", seed=0)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzip-compressed or not."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if len(raw) < 4 or raw[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of unsigned bytes")
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from error


def find_idx(folders: list[Path]) -> dict[str, Path] | None:
    """The four official files, compressed or not, in the first folder that has them all."""
    stems = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    for folder in folders:
        found = {s: p for s in stems for p in (folder / f"{s}.gz", folder / s) if p.is_file()}
        if len(found) == len(stems):
            return found
    return None


def open_idx(options: Options, name: str, torch_name: str, classes: tuple[str, ...], mean: float, std: float) -> Data:
    """MNIST and its drop-in replacements: 60,000 training and 10,000 test images of 28 × 28."""
    folders = [p / sub for p in options.places for sub in (name, f"{torch_name}/raw", ".")]
    files = find_idx(folders[: 3 * len(options.places)])
    if files is None:
        import torchvision

        try:
            getattr(torchvision.datasets, torch_name)(str(options.cache), download=True)
        except Exception as error:
            raise options.offline(name, error) from error
        files = find_idx([options.cache / torch_name / "raw"])
        if files is None:
            raise options.offline(name, RuntimeError("the download is incomplete"))
    how: dict[str, Any] = {"classes": classes, "mean": [mean], "std": [std]}
    x = {k: read_idx(p) for k, p in files.items()}
    test = array_part(x["t10k-images-idx3-ubyte"][:, None], x["t10k-labels-idx1-ubyte"], options, **how)
    augment = options.augment or "none"
    images, labels = x["train-images-idx3-ubyte"][:, None], x["train-labels-idx1-ubyte"]
    return Data(name, array_part(images, labels, options, augment=augment, **how), test)


def decode_cifar(path: Path, wanted: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels of one packed batch.

    Args:
        path: npz of lossless WebP columns of 500 images each.
        wanted: sorted positions; only the columns that hold them are decoded. None takes all.
    """
    from PIL import Image

    try:
        with np.load(path, allow_pickle=False) as z:
            packed, offsets, labels = z["webp"], z["offsets"], z["labels"].astype(np.int64)
        rows = np.arange(len(labels)) if wanted is None else wanted
        each = len(labels) // (len(offsets) - 1)
        columns = {}
        for k in np.unique(rows // each).tolist():
            with Image.open(io.BytesIO(packed[offsets[k] : offsets[k + 1]].tobytes())) as picture:
                columns[k] = np.asarray(picture.convert("RGB")).reshape(each, 32, 32, 3)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; copy it again") from error
    x = np.empty((len(rows), 3, 32, 32), np.uint8)
    for k, column in columns.items():
        here = rows // each == k
        x[here] = column[rows[here] - k * each].transpose(0, 3, 1, 2)
    return x, labels[rows]


def packed_train(paths: list[Path], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Training images of several packed batches; with a limit only what it keeps is decoded."""
    if limit is None:
        parts = [decode_cifar(p) for p in paths]
    else:
        labels = []
        for path in paths:
            with np.load(path, allow_pickle=False) as z:
                labels.append(z["labels"])
        sizes = [len(y) for y in labels]
        every = np.concatenate(labels)
        kept = first_balanced(every, limit)
        starts = np.cumsum([0, *sizes])
        pieces = [kept[(kept >= a) & (kept < a + n)] - a for a, n in zip(starts, sizes)]
        parts = [decode_cifar(p, piece) for p, piece in zip(paths, pieces) if len(piece)]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def open_cifar10(options: Options) -> Data:
    """CIFAR-10: the official split where it is at hand, else batches 1–4 against batch 5 (see the notes)."""
    how: dict[str, Any] = {"classes": CIFAR10, "mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    augment = options.augment or "crop-flip"
    for folder in [p / sub for p in options.places for sub in ("cifar10", ".")]:
        files = [folder / f"train_batch_{k}.npz" for k in range(1, 6)]
        if not files[0].is_file():
            continue
        missing = [f.name for f in (*files, folder / "test_first1000.npz") if not f.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}; copy the whole cifar10 folder")
        train = array_part(*packed_train(files[:4], options.limit), options, augment=augment, **how)
        test = array_part(*decode_cifar(files[4]), options, **how)
        first = array_part(*decode_cifar(folder / "test_first1000.npz"), options, **how)
        notes = (
            "train: batches 1–4 of the training set",
            "test: batch 5 of the training set (not for weights trained on all five)",
            "test_first1000: the first 1,000 official test images",
        )
        return Data("cifar10", train, test, extra={"test_first1000": first}, notes=notes)
    folder = binary_cifar(options)
    parts = [read_binary_cifar(folder / f"data_batch_{k}.bin") for k in range(1, 6)]
    images, labels = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
    train = array_part(images, labels, options, augment=augment, **how)
    test = array_part(*read_binary_cifar(folder / "test_batch.bin"), options, **how)
    return Data("cifar10", train, test, notes=("official split",))


def binary_cifar(options: Options) -> Path:
    """The folder of the official binary version (the Python version is pickled, which is never loaded)."""
    name = "cifar-10-batches-bin"
    for folder in [p / sub / name for p in options.places for sub in (".", "cifar10")]:
        if (folder / "test_batch.bin").is_file():
            return folder
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(CIFAR10_URL, str(options.cache), md5=CIFAR10_MD5)
    except Exception as error:
        raise options.offline("cifar10", error) from error
    return options.cache / name


def read_binary_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label byte and 3,072 pixel bytes (red, green, blue planes)."""
    try:
        rows = np.fromfile(path, np.uint8).reshape(-1, 3073)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from error
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


def open_function(spec: str, options: Options, given: Any = None) -> Data:
    """What ``package.module:function`` gives (or gave), as data."""
    if options.image_size is not None:
        raise UserError(f"image_size does not apply to {spec}: your function decides the size of its inputs")
    obj = call_function(spec) if given is None else given
    try:
        return as_data(obj, spec, augment=options.augment, seed=options.seed)
    except UserError as error:
        raise error if spec in str(error) else UserError(f"{spec}: {error}") from None


def call_function(spec: str) -> Any:
    """Imports ``package.module:function`` (the current directory counts) and calls it.

    Raises:
        UserError: it is not there, or raises.
    """
    module_name, _, path = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        obj: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"cannot import {module_name!r} of {spec!r}: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(obj, name):
            raise UserError(
                f"{module_name!r} has no {path!r}; {did_you_mean(name, [k for k in dir(obj) if k[0] != '_'])}"
            )
        obj = getattr(obj, name)
    if callable(obj) and not hasattr(obj, "__getitem__"):
        try:
            obj = obj()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{spec} raised {type(error).__name__}: {error}") from error
    return obj


NAMED: dict[str, Callable[[Options], Data]] = {
    "digits": open_digits,
    "fashion-mnist": lambda o: open_idx(o, "fashion-mnist", "FashionMNIST", FASHION, 0.28604, 0.35302),
    "mnist": lambda o: open_idx(o, "mnist", "MNIST", tuple("0123456789"), 0.13066, 0.30811),
    "cifar10": open_cifar10,
}
