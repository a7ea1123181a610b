"""Teacher signals on disk: computed once, looked up by (sample id, view), bounded in size.

A folder holds ``cache.json`` (what it is, and a checksum per shard) and shards in safetensors. Shards and
header are replaced whole, so a fill that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError, did_you_mean
from stillhouse.files import atomic_write, read_json, write_json
from stillhouse.system import Teacher, map_tensors

if TYPE_CHECKING:
    from stillhouse.data.samples import Samples

_FORMAT, _VERSION = "stillhouse-signals", 1
_SHARD_BYTES, _MOST_SHARDS, _VERIFY_AT_OPEN = 32 << 20, 256, 256 << 20
_DTYPES = {"float16": np.float16, "float32": np.float32}
_STORED = {"F16": np.float16, "F32": np.float32, "U16": np.uint16, "I32": np.int32, "I64": np.int64}


class SignalCache:
    """A teacher's logits for every sample and view, dense or top-k: `create` and `fill` one, then `open` it.

    Dense: the logits as they are, rounded to `dtype`. Top-k: the k largest LOG-probabilities at temperature 1
    and the log of the remaining mass r, which a lookup spreads evenly over the other C − k classes. Then
    KL(teacher ‖ looked up) <= r · log(C − k) at T = 1, up to the rounding of `dtype`; at another T the result
    is an approximation without that bound, because the tempered tail is not even.

    Attributes:
        n, views, classes, topk, dtype: as given to `create`.
        seed: of the augmentation, once filled.
        needed: bytes of the complete cache (payload and headers).

    Example:
        >>> import tempfile
        >>> who = {"teacher_fingerprint": "t", "data_fingerprint": "d"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SignalCache.create(folder, **who, n=3, classes=10).complete
        False
    """

    def __init__(self, folder: str | Path, head: dict[str, Any]):
        self.folder, self._head = Path(folder), head
        self.teacher_fingerprint, self.data_fingerprint = head["teacher"], head["data"]
        self.n, self.views, self.classes = head["n"], head["views"], head["classes"]
        self.topk, self.dtype = head["topk"], head["dtype"]
        item, index = np.dtype(_DTYPES[self.dtype]).itemsize, np.dtype(self._index_type()).itemsize
        k = self.topk
        row = 8 + (self.classes * item if k is None else k * index + (k + 1) * item)
        total = max(1, self.views) * self.n * row
        self._rows = min(self.n, math.ceil(max(_SHARD_BYTES, total / _MOST_SHARDS) / row))
        self._parts = math.ceil(self.n / self._rows)
        self.needed = total + 1024 * (1 + max(1, self.views) * self._parts)
        self._open: dict[str, dict[str, np.ndarray]] = {}
        self._ids = self._order = np.empty(0, np.int64)

    # -- making and opening

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        teacher_fingerprint: str,
        data_fingerprint: str,
        n: int,
        classes: int,
        views: int = 1,
        topk: int | None = None,
        dtype: Literal["float16", "float32"] = "float16",
        max_bytes: int | None = None,
    ) -> SignalCache:
        """A cache to be filled: new, or the one begun in this folder with the same settings.

        Args:
            folder: is made where missing.
            teacher_fingerprint, data_fingerprint: of the teacher and of the samples.
            n: samples. classes: logits per sample.
            views: augmented views per sample; 0 for the un-augmented sample alone.
            topk: keep only so many classes; None keeps all.
            max_bytes: refuse a cache that would become larger, before anything is written.

        Raises:
            UserError: settings out of range, too large, or the folder holds another cache.
        """
        if n < 1 or views < 0 or classes < 2 or not (topk is None or 1 <= topk < classes):
            raise UserError(
                f"SignalCache: needs n >= 1, views >= 0, classes >= 2 and 1 <= topk < classes or None; got "
                f"n={n}, views={views}, classes={classes}, topk={topk}"
            )
        if dtype not in _DTYPES:
            raise UserError(f"SignalCache: unknown dtype {dtype!r}; {did_you_mean(dtype, _DTYPES)}")
        head: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "teacher": teacher_fingerprint}
        head |= {
            "data": data_fingerprint,
            "n": n,
            "views": views,
            "classes": classes,
            "topk": topk,
            "dtype": dtype,
        }
        cache = cls(folder, {**head, "seed": None, "shards": {}})
        if max_bytes is not None and cache.needed > max_bytes:
            raise UserError(
                f"the signal cache in {folder} needs {cache.needed} bytes, more than max_bytes={max_bytes}; "
                "raise it, or give topk=, dtype='float16' or fewer views"
            )
        if (cache.folder / "cache.json").exists():
            found = _read_head(cache.folder)
            for key, value in head.items():
                if found[key] != value:
                    raise UserError(
                        f"{folder} holds a signal cache with {key} {found[key]!r}, asked for {value!r}; "
                        "give another folder or delete this one"
                    )
            return cls(folder, found)
        cache._save()
        return cache

    @classmethod
    def open(
        cls, folder: str | Path, *, teacher_fingerprint: str, data_fingerprint: str, seed: int | None = None
    ) -> SignalCache:
        """A complete cache of this teacher on these data.

        Args:
            folder: where it was filled.
            teacher_fingerprint, data_fingerprint: must be those it was filled with.
            seed: if given, must be the seed its views were drawn with.

        Raises:
            UserError: missing, another teacher, other data, seed or version, incomplete, or a damaged shard
                (checked now for a cache up to 256 MiB, otherwise when a shard is first read).
        """
        cache = cls(folder, _read_head(Path(folder)))
        asked: dict[str, Any] = {"teacher": teacher_fingerprint, "data": data_fingerprint}
        if seed is not None and cache.views:
            asked["seed"] = seed
        for key, value in asked.items():
            if cache._head[key] != value:
                raise UserError(
                    f"the signal cache in {folder} was filled with {key} {cache._head[key]!r}, this run has "
                    f"{value!r}; fill a cache of its own for this {key}"
                )
        cache._require_complete()
        if cache.needed <= _VERIFY_AT_OPEN:
            for name in cache._names():
                cache._shard(name)
        cache._index()
        return cache

    @property
    def seed(self) -> int | None:
        return self._head["seed"]

    @property
    def complete(self) -> bool:
        return all(name in self._head["shards"] for name in self._names())

    # -- filling

    def fill(
        self,
        teacher: Teacher,
        samples: Samples,
        seed: int = 0,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
        device: str | torch.device = "cpu",
    ) -> SignalCache:
        """Ask the teacher about every sample in every view; shards that are there and sound are kept.

        Args:
            teacher: its logits (m, classes) are stored; they must be at temperature 1.
            samples: ``take(positions, view=v, seed=seed)``, with view None where ``views`` is 0.
            seed: of the augmentation; must be the seed of the runs that will look signals up.
            progress: called with (signals done, signals in all) after each shard.

        Raises:
            UserError: other samples, teacher or seed than the cache's; logits that are not finite, of another
                shape, or too large for float16; no space left.
        """
        self._check_source(teacher, samples, seed)
        self._head["seed"] = seed
        self._save()
        total, done = max(1, self.views) * self.n, 0
        for view in range(max(1, self.views)):
            for part in range(self._parts):
                rows = range(part * self._rows, min(self.n, (part + 1) * self._rows))
                if not self._sound(name := self._name(view, part)):
                    self._write(name, self._compute(teacher, samples, view, rows, batch_size, device))
                done += len(rows)
                if progress is not None:
                    progress(done, total)
        self._open.clear()
        self._ids = self._ids[:0]
        return self

    def _check_source(self, teacher: Teacher, samples: Samples, seed: int) -> None:
        told = getattr(teacher, "fingerprint", self.teacher_fingerprint)
        pairs = {
            "teacher": (told, self.teacher_fingerprint),
            "data": (samples.fingerprint, self.data_fingerprint),
            "n": (len(samples), self.n),
            "seed": (seed, seed if self.seed is None else self.seed),
        }
        for key, (came, expected) in pairs.items():
            if came != expected:
                raise UserError(
                    f"the signal cache in {self.folder} is for {key} {expected!r}, fill() got {came!r}; "
                    "create a cache of its own for it"
                )

    def _compute(
        self, teacher: Teacher, samples: Samples, view: int, rows: range, size: int, device: Any
    ) -> dict[str, np.ndarray]:
        ids, logits = [], []
        for start in range(rows.start, rows.stop, size):
            at = np.arange(start, min(start + size, rows.stop))
            batch = samples.take(at, view=view if self.views else None, seed=self.seed or 0)
            ids.append(torch.as_tensor(batch["id"]).long().cpu())
            batch = map_tensors({**batch, "view": torch.full((len(at),), view)}, lambda t: t.to(device))
            z = teacher(batch)["logits"].detach().float().cpu()
            if z.shape != (len(at), self.classes) or not bool(z.isfinite().all()):
                raise UserError(
                    f"signals from sample {int(ids[-1][0])} on: expected finite logits "
                    f"{(len(at), self.classes)}, got {tuple(z.shape)} with {int((~z.isfinite()).sum())} not "
                    "finite; check the teacher"
                )
            logits.append(z)
        return {"id": torch.cat(ids).numpy(), **self._packed(torch.cat(logits))}

    def _packed(self, z: Tensor) -> dict[str, np.ndarray]:
        if self.topk is None:
            if self.dtype == "float16" and float(z.abs().max()) > 65504:
                raise UserError("logits beyond 65504 do not fit float16; give dtype='float32' to the cache")
            return {"logits": z.numpy().astype(_DTYPES[self.dtype])}
        log_p = z.double().log_softmax(-1)
        top = log_p.topk(self.topk, -1)
        # The tail's mass is summed itself: 1 − Σ top would cancel for a confident teacher.
        rest = log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1, keepdim=True)
        values = torch.cat([top.values, rest], -1).clamp_min(-6e4)
        return {
            "index": top.indices.numpy().astype(self._index_type()),
            "log_p": values.numpy().astype(_DTYPES[self.dtype]),
        }

    # -- looking up

    def has(self, ids: Any, views: Any = None) -> bool:
        """Whether every (id, view) is in this cache."""
        try:
            self._places(ids, views)
        except UserError:
            return False
        return True

    def lookup(self, ids: Any, views: Any = None) -> Tensor:
        """Logits of samples in views.

        Args:
            ids: (m,) sample ids (tensor, array or list).
            views: (m,) views, or one int for all; None where there is only one.

        Returns:
            (m, classes) float32 on the CPU. From a top-k cache these are log-probabilities.

        Raises:
            UserError: unknown id or view, incomplete cache, damaged shard.
        """
        at, view = self._places(ids, views)
        out = np.empty((len(at), self.classes), np.float32)
        part, row = at // self._rows, at % self._rows
        group = view * self._parts + part
        for g in np.unique(group):
            mine = np.flatnonzero(group == g)
            shard = self._shard(self._name(int(g) // self._parts, int(g) % self._parts))
            if self.topk is None:
                out[mine] = shard["logits"][row[mine]]
                continue
            values = shard["log_p"][row[mine]].astype(np.float32)
            tail = values[:, -1:] - np.float32(math.log(self.classes - self.topk))
            dense = np.repeat(tail, self.classes, 1)
            np.put_along_axis(dense, shard["index"][row[mine]].astype(np.int64), values[:, :-1], 1)
            out[mine] = dense
        return torch.from_numpy(out)

    def _places(self, ids: Any, views: Any) -> tuple[np.ndarray, np.ndarray]:
        if not self._ids.size:
            self._index()
        wanted = torch.as_tensor(ids).reshape(-1).cpu().numpy().astype(np.int64)
        found = np.minimum(np.searchsorted(self._ids, wanted), self.n - 1)
        if (bad := wanted[self._ids[found] != wanted]).size:
            raise UserError(
                f"the signal cache in {self.folder} has no sample {int(bad[0])} (its {self.n} ids lie in "
                f"{self._ids[0]}..{self._ids[-1]}); fill it from the data that are trained on"
            )
        if views is None and self.views > 1:
            raise UserError(f"the signal cache in {self.folder} has {self.views} views; say which")
        view = torch.as_tensor(0 if views is None else views).reshape(-1).cpu().numpy().astype(np.int64)
        if views is not None and (bad := view[(view < 0) | (view >= self.views)]).size:
            known = f"views 0..{self.views - 1}" if self.views else "only un-augmented samples (view None)"
            raise UserError(
                f"the signal cache in {self.folder} has {known}, asked for view {int(bad[0])}; draw batches "
                f"with views={self.views} or fill more views"
            )
        return self._order[found], np.broadcast_to(view, wanted.shape)

    # -- files

    def _index_type(self) -> Any:
        return np.uint16 if self.classes <= 1 << 16 else np.int32

    def _name(self, view: int, part: int) -> str:
        return f"view{view:04d}-{part:05d}.safetensors"

    def _names(self) -> list[str]:
        return [self._name(v, p) for v in range(max(1, self.views)) for p in range(self._parts)]

    def _save(self) -> None:
        write_json(self.folder / "cache.json", self._head)

    def _write(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save

        raw = save(tensors)
        atomic_write(self.folder / name, raw)
        self._head["shards"][name] = zlib.crc32(raw)
        self._save()

    def _sound(self, name: str) -> bool:
        path, expected = self.folder / name, self._head["shards"].get(name)
        if expected is None or not path.is_file():
            return False
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        return crc == expected

    def _shard(self, name: str) -> dict[str, np.ndarray]:
        """The shard's arrays, mapped from disk; its checksum is verified the first time."""
        if name not in self._open:
            path = self.folder / name
            if not self._sound(name):
                raise UserError(f"{path} is damaged or missing; create() and fill() again to mend it")
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                told = json.loads(file.read(size))
            told.pop("__metadata__", None)
            start = {key: 8 + size + t["data_offsets"][0] for key, t in told.items()}
            self._open[name] = {
                key: np.memmap(path, _STORED[t["dtype"]], "r", start[key], tuple(t["shape"])) for key, t in told.items()
            }
        return self._open[name]

    def _index(self) -> None:
        """Read which sample stands in which row, the same in every view."""
        self._require_complete()
        ids = np.concatenate([self._shard(self._name(0, p))["id"] for p in range(self._parts)])
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]

    def _require_complete(self) -> None:
        if not self.complete:
            have, want = len(self._head["shards"]), len(self._names())
            raise UserError(f"the signal cache in {self.folder} is incomplete ({have} of {want} shards); fill() it")


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / "cache.json"
    if not path.exists():
        raise UserError(f"no cache.json in {folder}; make one with SignalCache.create(...).fill(...)")
    head = read_json(path)
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise UserError(f"{path} is no signal cache of Stillhouse; give another folder")
    if head.get("version") != _VERSION:
        raise UserError(
            f"{path} has version {head.get('version')!r}, this Stillhouse reads {_VERSION}; fill a new cache"
        )
    if lost := {"teacher", "data", "n", "views", "classes", "topk", "dtype", "seed", "shards"} - set(head):
        raise UserError(f"{path} is damaged (no {min(lost)!r}); delete the folder and fill it again")
    return head
