"""Batches as a function of the clock: stateless, so resuming, workers and ranks cannot change them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.samples import Samples, digest
from stillhouse.errors import UserError
from stillhouse.system import Batch, Clock, Source, fold, map_tensors, walk


@lru_cache(maxsize=16)
def permutation(seed: int, n: int) -> np.ndarray:
    """0…n−1 in an order given by the seed; kept for the steps of one epoch, hence read-only."""
    order = np.random.default_rng(seed).permutation(n)
    order.setflags(write=False)
    return order


class Batches(Source):
    """Shuffled, augmented batches of a set.

    Position p of epoch e is ``permutation(seed, e)[p·B : (p+1)·B]``; a rank gets its contiguous share of it.
    Order and augmentation depend on the clock's seed and epoch, not on its stage or rank.

    Args:
        samples: what to draw from.
        batch_size: B, the GLOBAL batch; a smaller set is one batch when `drop_last`.
        shuffle: a new order every epoch; False keeps the set's.
        augment: draw augmented views; False gives the evaluation view.
        drop_last: leave out an incomplete last batch.
        views: K > 0 repeats the augmentations with period K epochs, so that cached teacher signals serve
            again (``view = epoch % K``); 0 never repeats (``view = epoch``).
        copies: k > 1 gives "input" as (n, k, …), each copy another augmentation (number view·k + copy).
        seed_with: folded into the seed, so that two sources over one set draw apart.

    The batch is ``{"input", "label", "id", "view"}``; "view", (n,) int64, is absent without augmentation, so
    that signals cached for an augmented view cannot be taken for those of the plain sample.

    Raises:
        UserError: an empty set, or a number out of range.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> source = Batches(Arrays(np.zeros((10, 3)), np.arange(10) % 2), 4)
        >>> source.steps_per_epoch, source.batch(Clock(steps_per_epoch=2))["input"].shape
        (2, torch.Size([4, 3]))
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        shuffle: bool = True,
        augment: bool = True,
        drop_last: bool = True,
        views: int = 0,
        copies: int = 1,
        seed_with: object = None,
    ):
        if not len(samples):
            raise UserError("there are no samples to draw batches from")
        for name, value, least in (("batch_size", batch_size, 1), ("views", views, 0), ("copies", copies, 1)):
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        self.samples, self.batch_size = samples, min(batch_size, len(samples))
        self.shuffle, self.augment, self.drop_last = shuffle, augment, drop_last
        self.views, self.copies, self.seed_with = views, copies, seed_with

    @property
    def steps_per_epoch(self) -> int:
        n, b = len(self.samples), self.batch_size
        return n // b if self.drop_last else -(-n // b)

    @cached_property
    def fingerprint(self) -> str:
        how = (
            self.batch_size,
            self.shuffle,
            self.augment,
            self.drop_last,
            self.views,
            self.copies,
            self.seed_with,
        )
        return digest("batches", self.samples.fingerprint, how)

    @property
    def one_thread(self) -> bool:
        return getattr(self.samples, "one_thread", False)

    def _seed(self, clock: Clock) -> int:
        return clock.seed if self.seed_with is None else fold(clock.seed, self.seed_with)

    def ids(self, clock: Clock) -> np.ndarray:
        """Positions in the set of the GLOBAL batch at this clock, all ranks together."""
        epoch, position = divmod(clock.step, self.steps_per_epoch)
        n = len(self.samples)
        order = permutation(fold(self._seed(clock), "order", epoch), n) if self.shuffle else np.arange(n)
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def num_samples(self, clock: Clock) -> int:
        """Samples in the global batch at this clock."""
        return len(self.ids(clock))

    def batch(self, clock: Clock) -> Batch:
        share = np.array_split(self.ids(clock), clock.world)[clock.rank]
        epoch = clock.step // self.steps_per_epoch
        view = (epoch % self.views if self.views else epoch) if self.augment else None
        out = self._take(share, view, 0, self._seed(clock))
        if self.copies > 1:
            others = [self._take(share, view, c, self._seed(clock))["input"] for c in range(1, self.copies)]
            out["input"] = torch.stack([out["input"], *others], dim=1)
        if view is not None:
            out["view"] = torch.full((len(share),), view, dtype=torch.int64)
        return out

    def _take(self, ids: np.ndarray, view: int | None, copy: int, seed: int) -> dict[str, Tensor]:
        return self.samples.take(ids, view=None if view is None else view * self.copies + copy, seed=seed)


class Weighted(Batches):
    """Batches drawn with replacement, each sample with probability w_i / Σ w; anew in every epoch.

    Args:
        samples: what to draw from.
        weights: (N,) not negative, not all zero.
        batch_size: B, the GLOBAL batch.
        draws: samples in one epoch; N by default, and at least B.

    Raises:
        UserError: weights that do not fit.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> source = Weighted(Arrays(np.zeros((3, 1)), [0, 1, 0]), [0, 1, 0], 4)
        >>> source.batch(Clock())["id"].tolist()
        [1, 1, 1, 1]
    """

    def __init__(self, samples: Samples, weights: Any, batch_size: int, *, draws: int | None = None):
        super().__init__(samples, batch_size, augment=False)
        self.batch_size, self.draws = batch_size, max(batch_size, draws or len(samples))
        self.weights = np.asarray(weights, np.float64)
        if self.weights.shape != (len(samples),) or not (self.weights >= 0).all() or not self.weights.sum() > 0:
            raise UserError(f"weights must be {len(samples)} numbers >= 0 and not all zero, got {self.weights.shape}")

    @property
    def steps_per_epoch(self) -> int:
        return self.draws // self.batch_size

    @cached_property
    def fingerprint(self) -> str:
        return digest("weighted", self.samples.fingerprint, self.weights, self.batch_size, self.draws)

    def ids(self, clock: Clock) -> np.ndarray:
        epoch, position = divmod(clock.step, self.steps_per_epoch)
        drawn = np.random.default_rng(fold(self._seed(clock), "weighted", epoch)).choice(
            len(self.samples), self.draws, p=self.weights / self.weights.sum()
        )
        return drawn[position * self.batch_size : (position + 1) * self.batch_size]


class Lazy(Mapping[str, Any]):
    """A batch whose parts are computed when first asked for, and then kept.

    Example:
        >>> Lazy({"a": lambda: 1, "b": lambda: 1 / 0}).map(lambda v: v + 1)["a"]
        2
    """

    def __init__(self, parts: Mapping[str, Callable[[], Any]]):
        self._parts, self._done = dict(parts), dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._done:
            self._done[name] = self._parts[name]()
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def map(self, fn: Callable[[Any], Any]) -> Lazy:
        """The same batch with `fn` applied to each part, still only when it is asked for."""
        return Lazy({name: partial(lambda n: fn(self[n]), name) for name in self._parts})


class Together(Source):
    """Several sources side by side; see `together`."""

    def __init__(self, sources: Mapping[str, Source]):
        if not sources:
            raise UserError("together() needs at least one named source, e.g. together(train=…, held_out=…)")
        self.sources = dict(sources)

    @property
    def first(self) -> Source:
        return next(iter(self.sources.values()))

    @property
    def steps_per_epoch(self) -> int:
        return self.first.steps_per_epoch

    @cached_property
    def fingerprint(self) -> str:
        return digest("together", [(name, source.fingerprint) for name, source in self.sources.items()])

    def num_samples(self, clock: Clock) -> int:
        """Samples in the first source's global batch."""
        return self.first.num_samples(own(clock, self.first))  # type: ignore[attr-defined]

    def batch(self, clock: Clock) -> Lazy:
        return Lazy({k: partial(s.batch, own(clock, s)) for k, s in self.sources.items()})


class TogetherWithState(Together):
    """Several sources side by side, some of which remember: replay, environments."""

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{k}/{n}": t for k, s in self._with_state() for n, t in s.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for k, s in self._with_state():
            s.load_state_dict({n.removeprefix(f"{k}/"): t for n, t in state.items() if n.startswith(f"{k}/")})

    def _with_state(self) -> Iterator[tuple[str, Any]]:
        return ((k, s) for k, s in self.sources.items() if hasattr(s, "state_dict"))


def own(clock: Clock, source: Source) -> Clock:
    """The clock with this source's epoch length, so that its epoch and position are the source's own."""
    return replace(clock, steps_per_epoch=source.steps_per_epoch)


def together(**sources: Source) -> Together:
    """One batch from several sources: a lazy mapping name → that source's batch at the same step.

    The epoch is the first source's; the others go through their own epochs at their own length. A part that
    a step never reads is never computed.

    Example:
        >>> from stillhouse.data.samples import Arrays
        >>> s = Arrays(np.zeros((8, 3)), np.arange(8) % 2)
        >>> both = together(train=Batches(s, 4), held_out=Batches(s, 2))
        >>> sorted(both.batch(Clock())), both.steps_per_epoch
        (['held_out', 'train'], 2)
    """
    kind = TogetherWithState if any(hasattr(s, "state_dict") for s in sources.values()) else Together
    return kind(sources)


class Drawn(Source):
    """Batches made from nothing but the clock: noise, prompts, states of a known world.

    The whole global batch is drawn, and a rank takes its contiguous share, so that several processes see together
    what one would.

    Args:
        make: ``make(n, generator) -> {"input": (n, …), …}``, tensors with n rows.
        batch_size: n, over all processes.
        name: says what is drawn; a resume under another name is refused.
        steps_per_epoch: there are no epochs; this is what counts as one.

    Example:
        >>> source = Drawn(lambda n, g: {"noise": torch.randn(n, 2, generator=g)}, 4, "noise")
        >>> source.batch(Clock())["noise"].shape
        torch.Size([4, 2])
    """

    def __init__(
        self, make: Callable[[int, torch.Generator], Batch], batch_size: int, name: str, steps_per_epoch: int = 1
    ):
        if batch_size < 1 or steps_per_epoch < 1:
            raise UserError(f"batch_size and steps_per_epoch must be positive, got {batch_size}, {steps_per_epoch}")
        self.make, self.batch_size, self.name = make, batch_size, name
        self._steps_per_epoch = steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    @property
    def fingerprint(self) -> str:
        return digest("drawn", self.name, self.batch_size)

    def num_samples(self, clock: Clock) -> int:
        return self.batch_size

    def batch(self, clock: Clock) -> Batch:
        whole = self.make(self.batch_size, replace(clock, rank=0, micro=0, turn=0).generator("drawn", self.name))
        return map_tensors(whole, lambda t: torch.tensor_split(t, clock.world)[clock.rank])


class Prefetched(Source):
    """A source whose next batches are computed by threads; see `prefetch`."""

    def __init__(self, source: Source, workers: int, ahead: int):
        self.source, self.ahead = source, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="stillhouse-prefetch")
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Batch]] = {}
        self._run: tuple[object, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        return self.source.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def num_samples(self, clock: Clock) -> int:
        return self.source.num_samples(clock)  # type: ignore[attr-defined]

    def batch(self, clock: Clock) -> Batch:
        last = min(clock.step + self.ahead, clock.steps - 1)
        wanted = [clock.step, *range(clock.step + 1, last + 1)]
        with self._lock:
            run = (clock.seed, clock.stage, clock.rank, clock.world, clock.steps, clock.steps_per_epoch)
            for step in list(self._pending):
                if run != self._run or step not in wanted:
                    self._pending.pop(step).cancel()
            self._run = run
            for step in wanted:
                if step not in self._pending:
                    self._pending[step] = self._pool.submit(self.source.batch, replace(clock, step=step))
            now = self._pending[clock.step]
        return now.result()


def prefetch(source: Source, workers: int = 1, ahead: int = 2) -> Source:
    """The same source, its next batches computed by threads while the step runs.

    Same batches, same order; an error surfaces at the step whose batch it is. Of `together` only the first
    source is prefetched, the others stay lazy. Sources over a user's `Dataset` come back as they are: its
    transforms draw from global generators that the model draws from too.

    Args:
        source: stateless (no ``state_dict``).
        workers: threads (decoding releases the interpreter lock); 0 gives the source back.
        ahead: batches to have ready or under way, at most up to the stage's last step.
    """
    if workers < 0 or ahead < 0:
        raise UserError(f"prefetch: workers and ahead must not be negative, got {workers} and {ahead}")
    if hasattr(source, "state_dict"):
        raise UserError("a source with state cannot be prefetched: its batches depend on the steps before")
    if not workers or not ahead or getattr(source, "one_thread", False):
        return source
    if isinstance(source, Together):
        name, *_ = source.sources
        return Together(source.sources | {name: prefetch(source.first, workers, ahead)})
    return Prefetched(source, workers, ahead)


def lazily(batch: Batch, fn: Callable[[Tensor], Tensor]) -> Lazy:
    """`fn` of every tensor, part by part as they are asked for: a part of a joint batch may never be."""
    return Lazy({key: lambda key=key: map_tensors(batch[key], fn) for key in batch})  # type: ignore[misc]


def one_piece(pieces: int, i: int, t: Tensor) -> Tensor:
    return torch.tensor_split(t, pieces)[i]


def count_of(batch: Batch) -> int:
    """Samples in a batch: the length of its first tensor; of the first part of a joint batch."""
    first = batch[next(iter(batch))]
    while isinstance(first, Mapping):
        first = first[next(iter(first))]
    return len(first) if isinstance(first, Tensor) else len(next(walk(first)))
