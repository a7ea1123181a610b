"""The central types: System, Update, Terms, Gradients, Clock, Signals, Teacher, Source.

One step of training, in these words: a `Source` gives a batch for a `Clock`; every `Update` of the `System`
that is due calls its method with both and gets `Terms` (summed, differentiated) or `Gradients` (assigned).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
"""What a step sees: ``{"input": (n, …), "label": (n,), "id": (n,)}``, or a mapping of names to such batches."""


def fold(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine and in every process."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Clock:
    """Where a run stands. Everything random in a step is drawn from it, so nothing depends on history.

    Attributes:
        seed: the run's seed.
        stage: name of the running `fit`.
        step: optimiser steps done before this one in this stage (0-based).
        steps: steps in the whole stage.
        steps_per_epoch: steps in one pass over the source.
        rank, world: this process and the number of processes.
        micro, micros: which micro-batch of the step this is, and how many there are.
        turn: which of an Update's repeats this is, from 0.
        device: where the step runs.
    """

    seed: int = 0
    stage: str = ""
    step: int = 0
    steps: int = 1
    steps_per_epoch: int = 1
    rank: int = 0
    world: int = 1
    micro: int = 0
    micros: int = 1
    turn: int = 0
    device: str = "cpu"
    all_mean: Callable[[Sequence[Tensor], int], list[Tensor]] = field(
        default=lambda tensors, count: list(tensors), repr=False, compare=False
    )
    """``all_mean(tensors, count)``: mean over processes, weighted by each one's sample count."""
    all_rows: Callable[[Tensor], Tensor] = field(default=lambda rows: rows, repr=False, compare=False)
    """``all_rows(rows)``: the rows of all processes, for losses over the whole batch; see `Run.all_rows`."""

    @property
    def epoch(self) -> int:
        return self.step // max(1, self.steps_per_epoch)

    @property
    def position(self) -> int:
        """Index of this step's batch inside its epoch."""
        return self.step % max(1, self.steps_per_epoch)

    @property
    def progress(self) -> float:
        """Fraction of the stage that is done, in [0, 1)."""
        return self.step / max(1, self.steps)

    def generator(self, *names: object, device: str | torch.device = "cpu") -> torch.Generator:
        """A fresh generator seeded by (seed, stage, step, rank, micro, names, turn): the same after a resume."""
        g = torch.Generator(device=device)
        turn = [f"turn {self.turn}"] if self.turn else []
        g.manual_seed(fold(self.seed, self.stage, self.step, self.rank, self.micro, *names, *turn))
        return g


class Terms:
    """Named scalar losses of one update. Their sum is differentiated; each is logged under its own name.

    Each term must be a mean over the samples of the batch it was computed on, so that micro-batches and
    processes can be averaged by their sample counts.

    Args:
        terms: zero-dimensional tensors attached to the graph.

    Example:
        >>> t = Terms(label=torch.tensor(1.0), teach=torch.tensor(0.5)).note(accuracy=torch.tensor(0.9))
        >>> float(t.total), sorted(t.notes)
        (1.5, ['accuracy'])
    """

    def __init__(self, **terms: Tensor):
        for name, value in terms.items():
            if not isinstance(value, Tensor) or value.dim() != 0:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"Terms({name}=…) must be a scalar tensor, got {got}; take the mean first")
        self.terms = terms
        self.notes: dict[str, Tensor] = {}

    @property
    def total(self) -> Tensor:
        return torch.stack([t.float() if t.dtype != torch.float64 else t for t in self.terms.values()]).sum()

    def note(self, **values: Tensor) -> Terms:
        """Numbers (or small vectors) to log that are not differentiated."""
        self.notes.update({k: v.detach() for k, v in values.items()})
        return self


class Gradients:
    """Gradients computed by the method itself, one per parameter of the Update, assigned as they are.

    Args:
        grads: tensors shaped like the Update's parameters, in their order (None leaves a parameter alone).
        notes: numbers or small vectors to log.
    """

    def __init__(self, grads: Sequence[Tensor | None], **notes: Tensor):
        self.grads = list(grads)
        self.notes = {k: v.detach() for k, v in notes.items()}


Schedule = Callable[[Clock], float]


@dataclass(frozen=True)
class Update:
    """Who moves, by which method, with which optimiser, how often.

    Attributes:
        name: a method of the System, ``(batch, clock) -> Terms | Gradients``.
        params: the parameters it moves (and nobody else's).
        optimizer: builds the optimiser from the parameters, e.g. ``partial(torch.optim.SGD, lr=0.1)``.
        lr: factor on each group's learning rate as a function of the clock; None keeps it constant, as it does that of
            groups with ``constant=True`` (gates beside weights).
        every: due at steps that are multiples of this.
        start: not due before this step.
        repeat: how often it runs in a step when due; ``clock.turn`` counts, and parts what generators draw.
        clip: largest global gradient norm; None does not clip.
        maximize: ascend instead of descend.
        whole: give the method the whole local batch even when steps are split into micro-batches (for methods
            that are not a mean over samples, such as hypergradients).
    """

    name: str
    params: Sequence[Tensor]
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    lr: Schedule | None = None
    every: int = 1
    start: int = 0
    repeat: int = 1
    clip: float | None = None
    maximize: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", list(self.params))
        if not self.params:
            raise ValueError(f"Update({self.name!r}) has no parameters to move")
        if self.every < 1 or self.repeat < 1 or self.start < 0:
            raise ValueError(f"Update({self.name!r}): every and repeat must be >= 1 and start >= 0")

    def due(self, step: int) -> bool:
        return step >= self.start and step % self.every == 0


class System(nn.Module):
    """Everything that trains or remembers, as one module: students, projectors, learned weights, EMA copies.

    A subclass gives `updates` and `outcome`; `after_step` is for what must follow every step.
    """

    def updates(self) -> Sequence[Update]:
        raise NotImplementedError(f"{type(self).__name__} must say its updates()")

    def after_step(self, clock: Clock) -> None:
        """Called once after all updates of a step: EMA, clamps, mask refresh, target networks."""

    def outcome(self) -> Any:
        """What the run gives: a student, a family, a data set, a sampler, a policy."""
        return self


class Signals(dict[str, Any]):
    """What a teacher says about a batch: ``logits`` (n, c), features by tap path, more. Always detached.

    Example:
        >>> Signals(logits=torch.zeros(2, 3)).logits.shape
        torch.Size([2, 3])
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this teacher gives no {name!r}; it gives {sorted(self)}") from None


@runtime_checkable
class Teacher(Protocol):
    """Anything that answers a batch with `Signals`. Deliberately not a Module: never trained, saved, wrapped."""

    def __call__(self, batch: Batch) -> Signals: ...


@runtime_checkable
class Source(Protocol):
    """Batches as a function of the clock (seed, epoch, position, rank): stateless, so resuming is free.

    A source with real state (replay, environments) also has ``state_dict()`` / ``load_state_dict()`` with tensors,
    alike on every rank; the engine saves it with the checkpoint, and `together` hands it on.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the data or the way they are drawn changes; a resume under another one is refused."""
        ...

    def batch(self, clock: Clock) -> Batch:
        """This rank's share of the global batch at the clock's step."""
        ...


def walk(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a (nested) batch, in a fixed order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from walk(batch[key])
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from walk(item)


def map_tensors(batch: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same (nested) batch with every tensor replaced by ``fn(tensor)``; other leaves stay."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        return {k: map_tensors(batch[k], fn) for k in batch}
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(v, fn) for v in batch)
    return batch
