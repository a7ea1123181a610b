"""Replay: a bounded memory of what another source gave, and uniform draws from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.samples import digest
from stillhouse.errors import UserError
from stillhouse.system import Batch, Clock, Source


class Replay(Source):
    """Another source's batches, each with rows drawn from the last `capacity` rows of all of them so far.

    A source with state: the rows kept, saved with the checkpoint together with the other source's own state. Rows are
    drawn with replacement, from the clock, over what is there including the newest batch. Every process must get the
    same rows from the other source, and then draws the same ones.

    Args:
        source: what is remembered; a batch is a flat mapping of tensors with one row per sample.
        keep: names of the tensors to keep.
        capacity: most rows kept; the oldest go first.
        draw: rows drawn per batch.

    The batch is that of the other source and ``drawn``: name → (draw, …).

    Raises:
        UserError: numbers out of range, or names that the source does not give.

    Example:
        >>> from stillhouse.data import Drawn
        >>> replay = Replay(Drawn(lambda n, g: {"x": torch.rand(n, generator=g)}, 2, "x"), ["x"], 3, 4)
        >>> _ = replay.batch(Clock(step=0))
        >>> replay.batch(Clock(step=1))["drawn"]["x"].shape, len(replay)
        (torch.Size([4]), 3)
    """

    def __init__(self, source: Source, keep: Sequence[str], capacity: int, draw: int):
        if capacity < 1 or draw < 1 or not keep:
            raise UserError(f"a replay keeps and draws at least one row, got capacity {capacity}, draw {draw}, {keep}")
        self.source, self.keep, self.capacity, self.draw = source, tuple(keep), capacity, draw
        self.rows: dict[str, Tensor] = {}
        self.cursor = self.count = 0  # where the next row goes, and how many there are

    def __len__(self) -> int:
        return self.count

    @property
    def steps_per_epoch(self) -> int:
        return self.source.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        return digest("replay", self.source.fingerprint, self.keep, self.capacity, self.draw)

    def num_samples(self, clock: Clock) -> int:
        return self.source.num_samples(clock)  # type: ignore[attr-defined]

    def batch(self, clock: Clock) -> Batch:
        fresh = self.source.batch(clock)
        if missing := [k for k in self.keep if k not in fresh]:
            raise UserError(f"replay is to keep {missing}, the source gives {sorted(fresh)}")
        self._push({k: fresh[k].detach().cpu() for k in self.keep})
        draws = replace(clock, rank=0, micro=0, turn=0).generator("replay", self.source.fingerprint)
        chosen = torch.randint(self.count, (self.draw,), generator=draws)
        return {**fresh, "drawn": {k: v[chosen].to(clock.device) for k, v in self.rows.items()}}

    def _push(self, fresh: Mapping[str, Tensor]) -> None:
        if not self.rows:
            self.rows = {k: v.new_zeros(self.capacity, *v.shape[1:]) for k, v in fresh.items()}
        n = min(len(next(iter(fresh.values()))), self.capacity)
        where = (self.cursor + torch.arange(n)) % self.capacity
        for k, v in fresh.items():
            self.rows[k][where] = v[len(v) - n :]
        self.cursor, self.count = (self.cursor + n) % self.capacity, min(self.count + n, self.capacity)

    # -- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The rows that are there, where the next one goes, and the other source's state under ``source/``."""
        inner: Any = self.source
        held = inner.state_dict() if hasattr(inner, "state_dict") else {}
        rows = {f"rows/{k}": v[: self.count] for k, v in self.rows.items()}
        return {**rows, "cursor": torch.tensor(self.cursor), **{f"source/{k}": v for k, v in held.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.cursor, self.count, self.rows = int(state["cursor"]), 0, {}
        for name, v in state.items():
            if name.startswith("rows/"):
                self.count = len(v)
                self.rows[name[5:]] = torch.cat([v, v.new_zeros(self.capacity - len(v), *v.shape[1:])])
        inner: Any = self.source
        if hasattr(inner, "load_state_dict"):
            inner.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("source/")})
