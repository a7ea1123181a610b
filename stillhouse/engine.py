"""The loop: `fit`, one stage of training, memoised in the folder of its `Run`.

Order of one step: clock → seed → batch → for each due Update: zero, (micro-batches: forward, backward | assign),
reduce over processes, clip, step → after_step → log → evaluate and checkpoint when due → stop cleanly when asked.

Why gradients are averaged by one flat all-reduce after backward, and not by DDP: most Systems here have several
Updates with different parameters, some of which assign gradients; one way serves them all, weighs unequal shares
by their sample counts exactly, and carries the stop request of any process along.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stillhouse.checkpoint import Checkpoints, load_optimizer, optimizer_state
from stillhouse.data.sources import count_of, lazily, one_piece
from stillhouse.errors import Interrupted, NotFinite
from stillhouse.progress import Progress
from stillhouse.run import DTYPES, Run, stop_requests
from stillhouse.system import Batch, Clock, Gradients, Source, System, Terms, Update, fold

S = TypeVar("S", bound=System)


def fit(
    run: Run,
    name: str,
    system: S,
    source: Source,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    evaluate: Callable[[S, Clock], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    settings: Any = None,
) -> S:
    """Train `system` on `source` for one stage; finished → loaded, interrupted → resumed, else trained.

    Args:
        run: the folder, seed and device.
        name: the stage's name in the run folder.
        system: trained in place and returned.
        source: batches as a function of the clock.
        steps, epochs: how long (one of them); a step is one global batch.
        evaluate: called after every epoch with the system in eval mode; its numbers are logged.
        evaluate_every: steps between calls of it instead of an epoch; it is always called after the last step.
        settings: a dataclass or mapping kept with the checkpoint; resuming under other settings is refused.

    Returns:
        The same system, trained.

    Raises:
        UserError: the checkpoint is damaged or belongs to other settings or data.
        NotFinite: a loss became NaN or infinite; the last good checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM arrived; the run saved itself.
    """
    if (steps is None) == (epochs is None):
        raise ValueError("fit() takes either steps or epochs")
    total = steps if steps is not None else max(1, round((epochs or 0) * source.steps_per_epoch))
    return _Fit(run, name, system, source, total, evaluate, settings, evaluate_every).go()


class _Fit:
    """One call of `fit`: the state of the loop, so that each part of a step is one short method."""

    def __init__(
        self,
        run: Run,
        name: str,
        system: Any,
        source: Source,
        steps: int,
        evaluate: Any,
        settings: Any,
        evaluate_every: int | None = None,
    ):
        self.run, self.name, self.system, self.source = run, name, system, source
        self.steps, self.evaluate = steps, evaluate
        self.evaluate_every = evaluate_every or source.steps_per_epoch
        self.system.to(run.device)
        convolves = any(p.dim() == 4 and p.shape[1] > 1 for p in system.parameters())
        self.channels_last = convolves if run.channels_last is None else run.channels_last
        if self.channels_last:
            self.system.to(memory_format=torch.channels_last)
        self.updates = list(system.updates())
        self.optimizers = {u.name: u.optimizer(u.params) for u in self.updates}
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        self.identity = _identity(run, name, system, source, steps, settings)
        self.checkpoints = Checkpoints(run.stage(name), run.main)
        self.rows: list[dict[str, Any]] = []
        self.pending: dict[str, Tensor] = {}
        self.bad = torch.tensor(steps, device=run.device)  # the first step with a bad loss
        self.clock = Clock(
            seed=run.seed,
            stage=name,
            steps=steps,
            steps_per_epoch=source.steps_per_epoch,
            rank=run.rank,
            world=run.world,
            device=str(run.device),
            all_mean=run.all_mean,
            all_rows=run.all_rows,
        )

    # -- the stage --------------------------------------------------------------------------------------

    def go(self) -> Any:
        try:
            return self.train()
        finally:
            if self.channels_last:  # the order is the loop's own; a model and its copy from disk must round alike
                self.system.to(memory_format=torch.contiguous_format)

    def train(self) -> Any:
        start = self.restore()
        self.system.train()
        if start >= self.steps:
            return self.system
        if self.run.compile:
            for child in self.system.children():
                child.compile()
        saved_at = time.monotonic()
        with (
            stop_requests() as stop,
            Progress(self.name, self.steps, start, not self.run.main or self.run.quiet) as bar,
        ):
            for step in range(start, self.steps):
                clock = dataclasses.replace(self.clock, step=step)
                stopping = self.step(clock, stop.is_set())
                done = step + 1
                self.log(clock, last=done == self.steps or stopping)
                bar.advance(self.rows)
                if self.evaluate and (done % self.evaluate_every == 0 or done == self.steps):
                    self.rows.append({"step": step, "epoch": clock.epoch, **self.measure(clock)})
                every = self.run.checkpoint_every
                due = done % every == 0 if every else self.elapsed(saved_at) > 60
                if due or stopping or done == self.steps:
                    self.save(done)
                    saved_at = time.monotonic()
                # Also when the stage is done, or when the request came while saving: what follows must not start.
                if stopping or (done == self.steps and self.agree(stop.is_set())):
                    raise Interrupted(f"stopped after step {done} of {self.steps} of stage {self.name!r}; all is saved")
        return self.system

    def elapsed(self, since: float) -> float:
        """Seconds since the last checkpoint; one process decides for all, or they would save apart."""
        if self.run.world == 1:
            return time.monotonic() - since
        value = torch.tensor([time.monotonic() - since], device=self.run.device)
        torch.distributed.broadcast(value, 0)
        return float(value)

    def agree(self, stop: bool) -> bool:
        """Whether any process was asked to stop."""
        return bool(self.run.all_mean([torch.tensor([float(stop)], device=self.run.device)], 1)[0] > 0)

    def measure(self, clock: Clock) -> dict[str, float]:
        self.system.eval()
        with torch.no_grad():
            values = dict(self.evaluate(self.system, clock))
        self.system.train()
        return values

    # -- one step ---------------------------------------------------------------------------------------

    def step(self, clock: Clock, stop: bool) -> bool:
        _seed(self.run.device, fold(clock.seed, clock.stage, clock.step, clock.rank))
        batch = self.source.batch(clock)
        due = [u for u in self.updates if u.due(clock.step)]
        stopping = stop if due else self.agree(stop)
        for update in due:
            for turn in range(update.repeat):
                stopping = self.apply(update, batch, dataclasses.replace(clock, turn=turn), stopping)
        self.system.after_step(clock)
        if self.run.world > 1:
            self.share_buffers()
        return stopping

    def apply(self, update: Update, batch: Batch, clock: Clock, stop: bool) -> bool:
        optimizer = self.optimizers[update.name]
        optimizer.zero_grad(set_to_none=True)
        if update.lr is not None:
            factor = update.lr(clock)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1.0 if group.get("constant") else factor)
        method = getattr(self.system, update.name)
        pieces, counts = self.split(batch, update)
        scaled = False
        for index, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            share = count / sum(counts)
            at = clock if len(pieces) == 1 else dataclasses.replace(clock, micro=index, micros=len(pieces))
            with self.autocast():
                result = method(self.to_device(piece), at)
            scaled |= self.gather(update, result, share, first=index == 0)
        stop = self.reduce(update, sum(counts), stop)
        if update.maximize:
            for p in update.params:
                if p.grad is not None:
                    p.grad.neg_()
        if scaled:
            self.scaler.unscale_(optimizer)
        if update.clip is not None:
            torch.nn.utils.clip_grad_norm_(update.params, update.clip)
        if scaled:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        return stop

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.run.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.run.device.type, dtype=DTYPES[self.run.precision])

    def gather(self, update: Update, result: Terms | Gradients, share: float, first: bool) -> bool:
        """Adds one micro-batch's gradients; returns whether they carry the loss scale."""
        if isinstance(result, Terms):
            total = result.total
            self.watch(total)
            loss = total if share == 1 else total * share
            one = len(self.updates) == 1
            self.scaler.scale(loss).backward(inputs=None if one else update.params)
            self.note({**result.terms, **result.notes}, share, first)
            return self.scaler.is_enabled()
        if not isinstance(result, Gradients):
            raise TypeError(f"{update.name} must return Terms or Gradients, got {type(result).__name__}")
        for p, g in zip(update.params, result.grads, strict=True):
            if g is not None:
                g = g.detach() if share == 1 else g.detach() * share
                p.grad = g.to(p.dtype) if p.grad is None else p.grad + g
                self.watch(g.sum())
        self.note(result.notes, share, first)
        return False

    def watch(self, value: Tensor) -> None:
        """Remembers the first step with a value that is not finite, without waiting for the device."""
        self.bad = torch.where(torch.isfinite(value.detach()) | (self.bad < self.now), self.bad, self.now)

    def note(self, values: Mapping[str, Tensor], share: float, first: bool) -> None:
        for key, value in values.items():
            value = value.detach() * share if value.is_floating_point() else value.detach()
            self.pending[key] = value if first or key not in self.pending else self.pending[key] + value

    def split(self, batch: Batch, update: Update) -> tuple[Sequence[Batch], list[int]]:
        limit = self.run.micro_batch
        if limit is None or update.whole:
            return [batch], [count_of(batch)]
        pieces = -(-count_of(batch) // limit)
        if pieces <= 1:
            return [batch], [count_of(batch)]
        parts = [lazily(batch, partial(one_piece, pieces, i)) for i in range(pieces)]
        return parts, [count_of(p) for p in parts]

    def to_device(self, batch: Batch) -> Batch:
        if self.run.device.type == "cpu" and not self.channels_last:
            return batch
        return lazily(batch, self.move)

    def move(self, t: Tensor) -> Tensor:
        t = t.to(self.run.device, non_blocking=True)
        image = self.channels_last and t.dim() == 4
        return t.contiguous(memory_format=torch.channels_last) if image else t

    def reduce(self, update: Update, count: int, stop: bool) -> bool:
        if self.run.world == 1:
            return stop
        # A parameter that no process has a gradient for keeps None, or weight decay would move it.
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in update.params]
        flags = [float(stop), *(float(p.grad is not None) for p in update.params)]
        *means, flag = self.run.all_mean([*grads, torch.tensor(flags, device=self.run.device)], count)
        stopped, *had = (flag > 0).tolist()
        for p, mean, some in zip(update.params, means, had, strict=True):
            p.grad = mean if some else None
        return bool(stopped)

    def share_buffers(self) -> None:
        """Running statistics follow process 0, as in DistributedDataParallel."""
        buffers = [b for b in self.system.buffers() if b.is_floating_point() and b.numel()]
        if buffers:
            flat = torch.cat([b.reshape(-1).float() for b in buffers])
            torch.distributed.broadcast(flat, 0)
            for b, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                b.copy_(part.view_as(b))

    # -- remembering ------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        return self._now

    def log(self, clock: Clock, last: bool) -> None:
        self._now = clock.step + 1
        if not last and clock.step % self.run.log_every:
            self.pending = {}
            return
        self.check(clock.step)
        row: dict[str, Any] = {"step": clock.step, "epoch": round(clock.step / clock.steps_per_epoch, 4)}
        row.update({k: v.tolist() for k, v in self.pending.items()})
        self.pending = {}
        self.rows.append(row)
        if self.run.track and self.run.main:
            flat = {k: v for k, v in row.items() if isinstance(v, int | float)}
            self.run.accelerator.log({f"{self.name}/{k}": v for k, v in flat.items()}, step=clock.step)

    def check(self, step: int, weights: bool = False) -> None:
        """Stops at a loss, or at weights, that are not finite; the first such step of any process is named."""
        if self.run.world > 1:
            torch.distributed.all_reduce(self.bad, torch.distributed.ReduceOp.MIN)
        what, first = "", int(self.bad)
        if first < self.steps:
            what = f"the loss is not finite at step {first}"
        elif weights and not all(torch.isfinite(p).all() for u in self.updates for p in u.params):
            what = f"the weights are not finite after step {step}"
        if what:
            hint = f"lower the learning rate or clip; {self.checkpoints.describe()}"
            raise NotFinite(f"stage {self.name!r}: {what}; {hint}")

    def save(self, done: int) -> None:
        self.check(done - 1, weights=True)  # bad weights must not take a good checkpoint's place
        if self.run.main:
            state = {f"system/{k}": v for k, v in self.system.state_dict().items()}
            facts: dict[str, Any] = {"step": done, "steps": self.steps, "identity": self.identity}
            for name, optimizer in self.optimizers.items():
                tensors, scalars = optimizer_state(optimizer)
                state.update({f"optimizer/{name}/{k}": v for k, v in tensors.items()})
                facts[f"optimizer/{name}"] = scalars
            if self.scaler.is_enabled():
                facts["scaler"] = self.scaler.state_dict()
            if hasattr(self.source, "state_dict"):
                state.update({f"source/{k}": v for k, v in self.source.state_dict().items()})
            self.checkpoints.write(state, facts, self.rows)
        self.rows = []
        self.run.barrier()

    def restore(self) -> int:
        self._now = 0
        found = self.checkpoints.read(self.identity)
        if found is None:
            return 0
        tensors, facts = found

        def under(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.system.load_state_dict(under("system/"))
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, under(f"optimizer/{name}/"), facts[f"optimizer/{name}"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(facts["scaler"])
        if hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(under("source/"))
        self._now = int(facts["step"])
        return self._now


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the generators a step can draw from; torch.manual_seed visits every backend, which takes 1 to 3 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _identity(run: Run, name: str, system: nn.Module, source: Source, steps: int, settings: Any) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    shapes = [(k, list(v.shape)) for k, v in system.state_dict().items()]
    facts = {
        "stage": name,
        "system": type(system).__name__,
        "tensors": f"{len(shapes)} tensors, {fold(shapes):x}",
        "data": source.fingerprint,
        "steps": steps,
        "seed": run.seed,
        "precision": run.precision,
        **{f"settings.{k}": v for k, v in dict(settings or {}).items()},
    }
    return json.loads(json.dumps(facts, default=str))
