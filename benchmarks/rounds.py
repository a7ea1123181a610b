"""Times several ways to do a job side by side, a block of steps each in turn (ABAB…), in one process."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from stillhouse.engine import Run, fit
from stillhouse.system import Batch, Clock, Source, System

Side = Callable[[], object]


class Stepper:
    """`fit` as something that runs `block` further steps each time it is called.

    `fit` runs in a thread of its own; its source waits for the next call at the end of every block. So what is
    timed is the loop as users run it, without set-up, and only one side computes at a time.
    """

    def __init__(self, system: System, source: Source, block: int, **options: Any):
        self.system, self.source, self.block, self.options = system, source, block, options
        self.steps_per_epoch, self.fingerprint = source.steps_per_epoch, source.fingerprint
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def batch(self, clock: Clock) -> Batch:
        if clock.step % self.block == 0:
            if clock.step:
                self.done.release()
            self.go.acquire()
        return self.source.batch(clock)

    def _work(self) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                run = Run(folder, quiet=True, **self.options)
                fit(run, "timed", self.system, self, steps=1_000_000)
        except BaseException as error:
            self.error = error
        self.done.release()

    def __call__(self) -> None:
        if self.thread.ident is None:
            self.thread.start()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise RuntimeError("fit stopped") from self.error


@dataclass
class Timing:
    """Seconds of each block, by round: on the clock, and of processor time (which other programs disturb less)."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def times_faster_than(self, other: Timing, *, processor: bool = False) -> float:
        """Median over rounds of the other's time divided by this one's in the same round."""
        mine, theirs = (t.processor if processor else t.seconds for t in (self, other))
        return median(b / a for a, b in zip(mine, theirs, strict=True))


def side_by_side(sides: Mapping[str, Side], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Runs every side once per round, in an order that turns round with each, `warmup` rounds untimed first."""
    found = {name: Timing() for name in sides}
    for i in range(-warmup, repeats):
        order = list(sides) if i % 2 else list(sides)[::-1]
        for name in order:
            began, used = time.perf_counter(), time.process_time()
            sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 0:
                found[name].seconds.append(time.perf_counter() - began)
                found[name].processor.append(time.process_time() - used)
    return found
