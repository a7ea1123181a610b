"""Run: a folder, a seed and a device; where stages are trained, remembered and resumed."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.errors import UserError, need
from stillhouse.files import inside, read_json, strict, write_json
from stillhouse.objectives import scale_gradient

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """A folder, a seed and a device: where stages are trained, remembered and resumed.

    Args:
        folder: where checkpoints, logs and results go; made when missing.
        seed: everything random is a function of it.
        device: "auto" (GPU when there is one), "cpu", "cuda", "mps".
        precision: "fp32", or autocast to "bf16" / "fp16" (with loss scaling).
        compile: pass the System's modules through ``torch.compile``.
        channels_last: keep convolutions and images in channels-last memory order, which is faster; None does so
            where the System has convolutions.
        micro_batch: largest number of samples in one forward pass; a step stays one global batch.
        workers: threads that prepare batches ahead, for data that is read from files.
        checkpoint_every: steps between checkpoints; None saves once a minute. Never changes the result.
        log_every: steps between rows of the log.
        track: names of trackers for Accelerate ("tensorboard", "wandb", …).
        quiet: print nothing.

    Example:
        >>> import tempfile
        >>> Run(tempfile.mkdtemp(), seed=1).seed
        1
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "fp32",
        compile: bool = False,
        channels_last: bool | None = None,
        micro_batch: int | None = None,
        workers: int = 0,
        checkpoint_every: int | None = None,
        log_every: int = 10,
        track: Sequence[str] = (),
        quiet: bool = False,
    ):
        if precision not in ("fp32", *DTYPES):
            raise UserError(f"precision must be fp32, bf16 or fp16, got {precision!r}")
        at_least = {"micro_batch": (micro_batch, 1), "checkpoint_every": (checkpoint_every, 1)}
        for name, (value, least) in {**at_least, "log_every": (log_every, 1), "workers": (workers, 0)}.items():
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be made: {error.strerror}") from None
        self.seed, self.precision, self.compile = seed, precision, compile
        self.channels_last, self.micro_batch, self.workers = channels_last, micro_batch, workers
        self.checkpoint_every, self.log_every, self.quiet = checkpoint_every, log_every, quiet
        self.track = tuple(track)
        self.accelerator = _accelerator(device, self.track, self.folder)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def child(self, name: str, *, seed: int | None = None, quiet: bool = False) -> Run:
        """A run in a subfolder with the same settings: one arm of a comparison, one seed of several."""
        other = object.__new__(Run)
        other.__dict__.update(self.__dict__)
        other.folder = inside(self.folder / "arms", name)
        other.folder.mkdir(parents=True, exist_ok=True)
        other.seed = self.seed if seed is None else seed
        other.quiet = self.quiet or quiet
        return other

    def stage(self, name: str) -> Path:
        return inside(self.folder / "stages", name)

    def log(self, name: str) -> list[dict[str, Any]]:
        """The rows logged by stage `name`: ``{"step": …, "epoch": …, "label": …, …}``, oldest first."""
        path = self.stage(name) / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def memo(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that is made once and read back when the run is resumed."""
        path = inside(self.folder, f"{name}.json")
        if path.exists():
            return read_json(path)
        value = json.loads(json.dumps(strict(make())))  # as it will be read back
        if self.main:
            write_json(path, value)
        return value

    def all_mean(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """Mean over processes of each tensor, weighted by each process's sample count."""
        if self.world == 1:
            return list(tensors)
        dtype = torch.promote_types(torch.float32, tensors[0].dtype)
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
        flat = torch.cat([flat * count, flat.new_tensor([count])])
        torch.distributed.all_reduce(flat)
        flat = flat[:-1] / flat[-1]
        return [
            part.view_as(t).to(t.dtype)
            for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
        ]

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes in the order of their ranks, for a loss that compares samples of the whole batch.

        Only the own rows carry a gradient, times the number of all rows over that of the own: averaged over processes
        as `all_mean` does, it is the gradient of the loss on the whole batch.

        Args:
            rows: (n, …), this process's share; the shares may differ in n.
        """
        if self.world == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world)]
        torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(c) for c in counts]
        padded = torch.cat([rows.detach(), rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        found = [part[:n] for part, n in zip(parts, sizes, strict=True)]
        found[self.rank] = scale_gradient(rows, sum(sizes) / len(rows))
        return torch.cat(found)

    def close(self) -> None:
        """Ends the trackers and, with several processes, the process group."""
        if self.track:
            self.accelerator.end_training()
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()


def _accelerator(device: str, track: Sequence[str], folder: Path) -> Any:
    from accelerate import Accelerator

    if device not in ("auto", "cpu") and not device.startswith(("cuda", "mps", "xpu")):
        raise UserError(f"device must be auto, cpu, cuda or mps, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} was asked for, but torch sees no CUDA device; use --device cpu")
    try:
        made = Accelerator(cpu=device == "cpu", log_with=list(track) or None, project_dir=str(folder / "track"))
    except ValueError as error:
        raise UserError(f"--track {' '.join(track)}: {error}") from None
    if track:
        made.init_trackers("stillhouse")
        for name in set(track) - {"all"} - {t.name for t in made.trackers}:  # Accelerate passes these over in silence
            raise (
                need("track", name) if name == "tensorboard" else UserError(f"{name} is not installed; pip install it")
            )
    return made


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop reads after each step; a second one is final."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
