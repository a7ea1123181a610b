"""Teachers: callables batch -> `Signals`, never trained, never saved with the student, always in eval mode.

`EMA` is the exception that proves the rule: it is state, so it is a module of the System, and answers alike.
"""

from __future__ import annotations

import copy as copying
import hashlib
from collections import abc
from itertools import chain
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluate import call, logits_of
from stillhouse.system import Batch, Clock, Schedule, Signals, Teacher, fold, map_tensors, walk
from stillhouse.taps import tap

Normalisation = tuple[abc.Sequence[float], abc.Sequence[float], abc.Sequence[float], abc.Sequence[float]]
_LOGITS = ("logits", "mean_logits")
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def state_fingerprint(model: nn.Module, buffers: bool = True) -> str:
    """Hash of names, types, shapes and bytes of all parameters and, unless `buffers` is False, all buffers.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> state_fingerprint(net) == state_fingerprint(copying.deepcopy(net))
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    for kind in (model.named_parameters(), model.named_buffers() if buffers else ()):
        for name, tensor in kind:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _input(batch: Batch, key: str, who: str) -> Any:
    if key not in batch:
        raise UserError(f"{who}: the batch has no {key!r}; {did_you_mean(key, map(str, batch))}")
    return batch[key]


def _answer(model: nn.Module, x: Any, taps: abc.Sequence[str], batch_statistics: bool = False) -> Signals:
    """Logits (at least float32) and tapped features, detached; sets the mode of every module first.

    That is eval mode, also for dropout and stochastic depth; with `batch_statistics` all but the batch norms.
    """
    trains = {m: batch_statistics and isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()}
    if any(m.training != mode for m, mode in trains.items()):
        model.eval()
        for m in (m for m, mode in trains.items() if mode):
            m.train()
    with torch.no_grad():
        if not taps:
            return Signals(logits=_float(logits_of(call(model, x))))
        with tap(model, taps, detach=True) as features:
            logits = logits_of(call(model, x))
        return Signals({**{path: features[path] for path in taps}, "logits": _float(logits)})


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class Frozen:
    """A trained network as a teacher.

    The model is kept by reference, set to eval mode on every call and to ``requires_grad=False`` once; give
    ``copy=True`` where the same object is also trained (self-distillation).

    Args:
        model: any classifier; its output goes through `stillhouse.evaluate.logits_of`.
        taps: module paths whose outputs are given as well (see `stillhouse.taps.tap`).
        input: key of the batch it reads.
        normalize: (from_mean, from_std, to_mean, to_std), each one number per channel: undoes the student's
            normalisation of (n, c, h, w) and applies the teacher's.
        resize: side of the square to which images are resized (bilinear, antialiased).
        precision: "float32", "bfloat16" or "float16" autocast for its forward pass; None takes what is
            set around it.
        copy: work on a copy of the model.
        batch_statistics: batch norm normalises by the mean and variance of the batch asked about, as it does in
            training. Works on a copy, whose running statistics move and are kept nowhere; everything else
            stays in eval mode. An answer then depends on the whole batch: not for `Cached` signals.

    Example:
        >>> teacher = Frozen(nn.Linear(4, 3))
        >>> teacher({"input": torch.zeros(2, 4)}).logits.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        taps: abc.Sequence[str] = (),
        input: str = "input",
        normalize: Normalisation | None = None,
        resize: int | None = None,
        precision: Literal["float32", "bfloat16", "float16"] | None = None,
        copy: bool = False,
        batch_statistics: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise UserError(f"Frozen: needs a torch.nn.Module, got {type(model).__name__}; give the network itself")
        if precision is not None and precision not in _PRECISIONS:
            raise UserError(f"Frozen: unknown precision {precision!r}; {did_you_mean(precision, _PRECISIONS)}")
        model = copying.deepcopy(model) if copy or batch_statistics else model
        self._model, self._batch_statistics = model.eval().requires_grad_(False), batch_statistics
        self._taps, self._input, self._resize, self._precision = list(taps), input, resize, precision
        with tap(self._model, self._taps):
            pass  # an unknown path is said here, not at the first step
        self._follows = False  # the memory order of its inputs
        self._affine: tuple[Tensor, Tensor] | None = None
        if normalize is not None:
            m0, s0, m1, s1 = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in normalize)
            self._affine = (s0 / s1, (m0 - m1) / s1)
        self._normalize = None if normalize is None else [[float(x) for x in part] for part in normalize]
        self._weights = state_fingerprint(self._model)
        self._kept = state_fingerprint(self._model, buffers=False) if batch_statistics else self._weights

    @property
    def model(self) -> nn.Module:
        """The network, to look at: its weights are a teacher's and stay as they are."""
        return self._model

    @property
    def fingerprint(self) -> str:
        """Of the weights at construction and of everything else that shapes the answer."""
        settings = (self._input, self._normalize, self._resize, self._precision)
        batch = ("batch statistics",) if self._batch_statistics else ()
        return f"{fold(self._weights, type(self._model).__qualname__, *settings, *batch):016x}"

    def unchanged(self) -> bool:
        """Whether every parameter and buffer (with `batch_statistics`: every parameter) has the bytes it had."""
        return state_fingerprint(self._model, buffers=not self._batch_statistics) == self._kept

    def read(self, batch: Batch) -> Any:
        """What the network is given of a batch: its own key, in its own normalisation and size."""
        return map_tensors(_input(batch, self._input, "Frozen teacher"), self._prepare)

    def __call__(self, batch: Batch) -> Signals:
        x = self.read(batch)
        first = next(walk(x))
        weight = next(chain(self._model.parameters(), self._model.buffers()), None)
        if weight is not None and weight.device != first.device:
            self._model.to(first.device)
        if not self._follows and first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last):
            self._model.to(memory_format=torch.channels_last)  # the order of the inputs; the values stay
            self._follows = True
        if self._precision is None:
            return _answer(self._model, x, self._taps, self._batch_statistics)
        dtype = _PRECISIONS[self._precision]
        with torch.autocast(first.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            return _answer(self._model, x, self._taps, self._batch_statistics)

    @torch.no_grad()
    def _prepare(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if self._affine is not None:
            scale, shift = (t.to(x.device, x.dtype) for t in self._affine)
            x = x * scale + shift
        if self._resize is not None and x.shape[-2:] != (self._resize, self._resize):
            size = (self._resize, self._resize)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return x


class Ensemble:
    """Σ_k w_k z_k of several teachers ("logits"), or log Σ_k w_k softmax(z_k) ("probabilities").

    The answer's ``logits`` are the average chosen; ``mean_logits`` are Σ_k w_k z_k in both cases.

    Args:
        teachers: at least one. Features of the k-th are answered as ``K/PATH``, counted from 1.
        weights: one per teacher, not negative; divided by their sum. None weighs equally.
        average: what is averaged.

    Example:
        >>> both = Ensemble([Frozen(nn.Linear(4, 3)), Frozen(nn.Linear(4, 3))], average="probabilities")
        >>> round(float(both({"input": torch.zeros(1, 4)}).logits.exp().sum()), 4)
        1.0
    """

    def __init__(
        self,
        teachers: abc.Sequence[Teacher],
        weights: abc.Sequence[float] | None = None,
        average: Literal["logits", "probabilities"] = "logits",
    ):
        self._teachers = list(teachers)
        raw = [1.0] * len(self._teachers) if weights is None else [float(w) for w in weights]
        if not raw or len(raw) != len(self._teachers) or min(raw) < 0 or sum(raw) <= 0:
            raise UserError(
                f"Ensemble: needs one weight >= 0 per teacher and a positive sum, got {len(self._teachers)} "
                f"teachers and weights {raw}"
            )
        if average not in ("logits", "probabilities"):
            raise UserError(f"Ensemble: unknown average {average!r}; known: logits, probabilities")
        self._weights, self._average = [w / sum(raw) for w in raw], average

    @property
    def fingerprint(self) -> str:
        members = [getattr(t, "fingerprint", repr(t)) for t in self._teachers]
        return f"{fold(*members, *self._weights, self._average):016x}"

    def unchanged(self) -> bool:
        """Whether every member that can tell is unchanged."""
        return all(t.unchanged() for t in self._teachers if hasattr(t, "unchanged"))

    def __call__(self, batch: Batch) -> Signals:
        said = [t(batch) for t in self._teachers]
        z = [s["logits"] for s in said]
        features = {f"{k}/{p}": f for k, s in enumerate(said, 1) for p, f in s.items() if p not in _LOGITS}
        if len({tuple(t.shape) for t in z}) > 1:
            raise UserError(f"Ensemble: logits of one shape needed, got {[tuple(t.shape) for t in z]}")
        mean = torch.stack([w * t for w, t in zip(self._weights, z)]).sum(0).detach()
        if self._average == "logits":
            return Signals({**features, "logits": mean, "mean_logits": mean})
        logs = torch.stack([t.log_softmax(-1) for t in z])
        w = logs.new_tensor(self._weights).log().view(-1, *[1] * (logs.dim() - 1))
        return Signals({**features, "logits": (logs + w).logsumexp(0).detach(), "mean_logits": mean})


def read_by_teachers(batch: Batch) -> str:
    """The entry of a batch that teachers are given: ``teacher``, with token ids of their own, if it is there."""
    return "teacher" if "teacher" in batch else "input"


class Asked(nn.Module):
    """A teacher as a network, to be measured like one: what it answers to an input alone, and what that costs.

    Args:
        teacher: one that reads ``input`` or ``teacher`` of a batch.
        models: the networks behind it.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> Asked(Frozen(model), [model])(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, teacher: Teacher, models: abc.Sequence[nn.Module]):
        super().__init__()
        self.teacher, self.models = teacher, nn.ModuleList(models)

    def forward(self, *args: Any, **named: Any) -> Tensor:
        x = named or args[0]
        return self.teacher({"input": x, "teacher": x})["logits"]


class EMA(nn.Module):
    """Exponential moving average of a student: θ̄ ← d θ̄ + (1 − d) θ; buffers are copied (arXiv 1703.01780).

    A module, because it is state: it lives in the System and its state dict, stays in eval mode whatever
    ``train()`` says, and has no trainable parameter. Call `update` from ``after_step``.

    Args:
        student: is copied; may change afterwards.
        decay: d in [0, 1], or a function of the clock.
        taps, input: as for `Frozen`.
        batch_statistics: batch norm normalises by the batch asked about, as the student does in training; dropout
            and the like stay in eval mode.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(student.weight)
        >>> ema = EMA(student, decay=0.75)
        >>> _ = nn.init.zeros_(student.weight)
        >>> ema.update(student)
        >>> float(ema.model.weight)
        0.75
    """

    def __init__(
        self,
        student: nn.Module,
        decay: float | Schedule = 0.999,
        *,
        taps: abc.Sequence[str] = (),
        input: str = "input",
        batch_statistics: bool = False,
    ):
        super().__init__()
        if not callable(decay) and not 0 <= decay <= 1:
            raise UserError(f"EMA: decay must lie in [0, 1], got {decay}")
        self.model = copying.deepcopy(student).requires_grad_(False)
        self.decay, self._taps, self._input = decay, list(taps), input
        self._batch_statistics = batch_statistics
        self.eval()

    def train(self, mode: bool = True) -> EMA:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module, clock: Clock | None = None) -> None:
        """Move towards the student.

        Raises:
            UserError: a decay that needs the clock without one, or a student of another structure.
        """
        if callable(self.decay) and clock is None:
            raise UserError("EMA: its decay is a function of the clock; call update(student, clock)")
        d = self.decay(clock) if callable(self.decay) and clock is not None else self.decay
        assert isinstance(d, float | int)
        new = dict(student.named_parameters())
        for name, mean in self.model.named_parameters():
            if name not in new or new[name].shape != mean.shape:
                raise UserError(f"EMA: {name!r} of the average is not in the student; average the same network")
            mean.lerp_(new[name].detach().to(mean), 1 - d)
        fresh = dict(student.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(fresh[name])

    def forward(self, batch: Batch) -> Signals:
        x = _input(batch, self._input, "EMA teacher")
        return _answer(self.model, x, self._taps, self._batch_statistics)


class Sequence:
    """Teachers that take turns, such as checkpoints of one training run (arXiv 1910.09243).

    Args:
        teachers: in their order.
        starts: where each one AFTER the first begins: fractions of the stage, all in (0, 1), or
            steps, all >= 1.

    Raises:
        UserError: numbers that do not fit or do not increase.

    Example:
        >>> early, late = Frozen(nn.Linear(4, 3)), Frozen(nn.Linear(4, 3))
        >>> Sequence([early, late], [0.5]).at(Clock(step=5, steps=10)) is late
        True
    """

    def __init__(self, teachers: abc.Sequence[Teacher], starts: abc.Sequence[float]):
        self._teachers, self._starts = list(teachers), list(starts)
        fits = len(self._starts) == len(self._teachers) - 1 and self._starts == sorted(set(self._starts))
        self._fractions = all(0 < s < 1 for s in self._starts)
        if not fits or not (self._fractions or all(s >= 1 for s in self._starts)):
            raise UserError(
                f"Sequence: {len(self._teachers)} teachers need {len(self._teachers) - 1} increasing starts, "
                f"all fractions in (0, 1) or all steps >= 1; got {self._starts}"
            )

    def at(self, clock: Clock) -> Teacher:
        """The teacher whose turn it is."""
        now = clock.progress if self._fractions else clock.step
        return self._teachers[sum(now >= s for s in self._starts)]

    def unchanged(self) -> bool:
        """Whether every member that can tell is unchanged."""
        return all(t.unchanged() for t in self._teachers if hasattr(t, "unchanged"))


class Lookup(Protocol):
    """What `Cached` needs of a cache: `stillhouse.data.cache.SignalCache`."""

    views: int

    def has(self, ids: Any, views: Any = None) -> bool: ...
    def lookup(self, ids: Any, views: Any = None) -> Tensor: ...


class Cached:
    """Answers from a teacher-signal cache by ``batch["id"]`` and ``batch["view"]``, without the network.

    A cache of un-augmented signals (``views=0``) gives them for every view, the "fixed teacher" that Beyer et
    al. (arXiv 2106.05237) find weaker than a consistent one.

    Args:
        cache: a filled `SignalCache`.
        teacher: asked for batches the cache does not hold entirely; without it such a batch is an error.
    """

    def __init__(self, cache: Lookup, teacher: Teacher | None = None):
        self._cache, self._teacher = cache, teacher

    @property
    def fingerprint(self) -> str:
        return str(getattr(self._cache, "teacher_fingerprint", repr(self._cache)))

    def __call__(self, batch: Batch) -> Signals:
        ids = _input(batch, "id", "Cached teacher")
        views = _input(batch, "view", "Cached teacher") if self._cache.views else None
        if self._teacher is not None and not self._cache.has(ids, views):
            return self._teacher(batch)
        device = next((t.device for t in walk(batch.get("input"))), torch.device("cpu"))
        return Signals(logits=self._cache.lookup(ids, views).to(device, non_blocking=True))
