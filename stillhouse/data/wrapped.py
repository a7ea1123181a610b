"""Any map-style torch Dataset as `Samples`."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.samples import Samples, digest, packed
from stillhouse.errors import UserError
from stillhouse.system import fold

INPUT_KEYS = ("input", "pixel_values", "image", "img", "x")
LABEL_KEYS = ("label", "labels", "target", "y")


class Wrapped(Samples):
    """A torch Dataset whose items are (input, label) or dicts with input/pixel_values/image and label/labels.

    Inputs may be tensors, arrays or PIL images; uint8 becomes 0…1, otherwise nothing is normalised. Random
    transforms of the dataset stay its own: the global generators of torch, random and numpy are seeded per
    item from (seed, view, id) and restored afterwards, so they too are a function of the sample. They cannot
    be switched off for ``view=None``, which draws one fixed view: give evaluation parts without them.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        classes: class names; by default ``dataset.classes``, else the numbers up to the largest label.
        name: what to call it in errors.

    Raises:
        UserError: not map-style, items of another form, or an item that cannot be read (its index is named).

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> s = Wrapped(TensorDataset(torch.ones(6, 3), torch.arange(6) % 2))
        >>> s.shape, s.classes, s.take(np.array([1]))["label"].tolist()
        ((3,), ('0', '1'), [1])
    """

    one_thread = True  # it seeds the global generators, which other threads draw from

    def __init__(self, dataset: Any, *, classes: Sequence[str] | None = None, name: str = "your data set"):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UserError(
                f"{name} ({type(dataset).__name__}) must be map-style, with __len__ and __getitem__; "
                "an iterable one has no sample ids, so load it into a list or arrays first"
            )
        if not len(dataset):
            raise UserError(f"{name} ({type(dataset).__name__}) is empty")
        self.dataset, self.name, self._lock = dataset, name, threading.Lock()
        with restored_generators():
            self.shape = tuple(self._item(0, None, 0)[0].shape)
        self.labels = self._labels()
        known = classes if classes is not None else getattr(dataset, "classes", None)
        top = max(int(self.labels.max()) + 1, 0)
        self.classes = tuple(str(c) for c in (known if known is not None else range(top)))

    @cached_property
    def fingerprint(self) -> str:
        some = np.unique(np.linspace(0, len(self) - 1, 16).astype(np.int64))
        inputs = self.take(some)["input"].numpy()
        return digest("wrapped", type(self.dataset).__qualname__, self.labels, self.classes, self.shape, inputs)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        ids = np.asarray(ids, dtype=np.int64)
        inputs = []
        with self._lock, restored_generators():
            for i in ids.tolist():
                value, _ = self._item(i, view, seed)
                if tuple(value.shape) != self.shape:
                    raise UserError(
                        f"{self.name}: sample {i} has shape {tuple(value.shape)}, sample 0 has {self.shape}; "
                        "resize them to one shape in the data set's transform"
                    )
                inputs.append(value)
        stacked = torch.stack(inputs) if inputs else torch.empty(0, *self.shape)
        return packed(stacked, self.labels[ids], ids)

    def _item(self, i: int, view: int | None, seed: int) -> tuple[Tensor, Any]:
        seed_generators(fold(seed, "evaluate" if view is None else view, i))
        try:
            item = self.dataset[i]
        except Exception as error:
            raise UserError(f"{self.name}: reading sample {i} failed with {type(error).__name__}: {error}") from error
        if isinstance(item, Mapping):
            keys = [next((k for k in names if k in item), None) for names in (INPUT_KEYS, LABEL_KEYS)]
            if None in keys:
                raise UserError(
                    f"{self.name}: sample {i} is a dict with keys {sorted(map(str, item))}; expected one of "
                    f"{INPUT_KEYS} and one of {LABEL_KEYS}"
                )
            return as_input(item[keys[0]], self.name, i), item[keys[1]]
        if isinstance(item, tuple | list) and len(item) >= 2:
            return as_input(item[0], self.name, i), item[1]
        raise UserError(
            f"{self.name}: sample {i} is {type(item).__name__}; expected (input, label) or a dict with both"
        )

    def _label(self, i: int) -> int:
        label = self._item(i, None, 0)[1]
        try:
            whole = int(label)
            if whole == label:
                return whole
        except (TypeError, ValueError):
            pass
        raise UserError(f"{self.name}: sample {i} has the label {label!r:.60}; expected one integer 0…C−1")

    def _labels(self) -> np.ndarray:
        """The labels without reading every item where the dataset already lists them truthfully."""
        with restored_generators():
            listed = listed_labels(self.dataset)
            probe = sorted({0, len(self.dataset) // 2, len(self.dataset) - 1})
            if listed is not None and all(self._label(i) == listed[i] for i in probe):
                return listed
            return np.array([self._label(i) for i in range(len(self.dataset))], dtype=np.int64)


def listed_labels(dataset: Any) -> np.ndarray | None:
    """Labels as the torch data sets keep them (``targets``, ``labels``, TensorDataset, Subset), or None."""
    if isinstance(dataset, torch.utils.data.Subset):
        inner = listed_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices)]
    if isinstance(dataset, torch.utils.data.TensorDataset):
        values: Any = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        values = next((v for k in ("targets", "labels") if (v := getattr(dataset, k, None)) is not None), None)
    if values is None or callable(values):
        return None
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        return None
    return array.astype(np.int64) if array.shape == (len(dataset),) and array.dtype.kind in "iu" else None


def as_input(value: Any, name: str, i: int) -> Tensor:
    """float32 tensor; (H, W, C) pictures of PIL or uint8 arrays become (C, H, W) in 0…1."""
    if not isinstance(value, Tensor):
        picture = type(value).__module__.startswith("PIL.")
        value = np.array(value)
        if value.dtype.kind not in "biuf":
            raise UserError(
                f"{name}: the input of sample {i} is not numeric ({value.dtype}); add a transform to tensors"
            )
        if (picture or value.dtype == np.uint8) and value.ndim == 3 and value.shape[-1] in (1, 3, 4):
            value = value.transpose(2, 0, 1)
        elif picture and value.ndim == 2:
            value = value[None]
        value = torch.from_numpy(np.ascontiguousarray(value))
    value = value.detach().cpu()
    return value.float() / 255 if value.dtype == torch.uint8 else value.float()


def seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch every accelerator
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def restored_generators() -> Iterator[None]:
    """Leaves the global generators as they were found."""
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
