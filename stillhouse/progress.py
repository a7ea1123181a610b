"""What a person sees while a stage runs: a bar on a terminal, one line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET_SECONDS = 30.0


class Progress:
    """Progress of one stage.

    Args:
        title: the stage's name.
        total: steps in the stage.
        done: steps already done (after a resume).
        silent: print nothing.
    """

    def __init__(self, title: str, total: int, done: int, silent: bool):
        self.title, self.total, self.done, self.silent = title, total, done, silent
        self.began = self.spoke = time.monotonic()
        self.first = done
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if not self.silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, facts="")
            self.bar.start()
        return self

    def advance(self, rows: list[dict[str, Any]]) -> None:
        self.done += 1
        if self.silent:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, facts=facts(rows))
        elif time.monotonic() - self.spoke > QUIET_SECONDS:
            self.spoke = time.monotonic()
            rate = (self.done - self.first) / (self.spoke - self.began)
            left = (self.total - self.done) / rate
            print(
                f"{self.title}: step {self.done} of {self.total}, {left:.0f} s to go, {facts(rows)}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def facts(rows: list[dict[str, Any]]) -> str:
    """The newest scalar losses, short."""
    if not rows:
        return ""
    return " ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if isinstance(v, float) and k != "epoch")


@contextmanager
def without_bars(*libraries: Any) -> Iterator[None]:
    """Without the progress bars of diffusers or transformers, which would stand between the lines of a run.

    Args:
        libraries: the modules themselves.
    """
    loggers = [library.utils.logging for library in libraries]
    were = [log.is_progress_bar_enabled() for log in loggers]
    for log in loggers:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was in zip(loggers, were, strict=True):
            if was:
                log.enable_progress_bar()
