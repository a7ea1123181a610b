"""The loop: what each field of an Update does, how steps are split, what stops it and what it remembers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.data import Batches, together
from stillhouse.data.samples import Arrays
from stillhouse.engine import fit
from stillhouse.errors import Interrupted, NotFinite, UserError
from stillhouse.run import Run
from stillhouse.system import Batch, Clock, Gradients, System, Terms, Update

SGD = partial(torch.optim.SGD, lr=0.1)


class Fixed:
    """Float64 batches as a function of the step; counts its calls; can turn to NaN at one step."""

    fingerprint = "fixed"

    def __init__(self, n: int = 8, steps_per_epoch: int = 4, nan_at: int | None = None):
        self.n, self.steps_per_epoch, self.nan_at, self.calls = n, steps_per_epoch, nan_at, 0

    def batch(self, clock: Clock) -> Batch:
        self.calls += 1
        g = torch.Generator().manual_seed(clock.step)
        x = torch.randn(self.n, 3, generator=g, dtype=torch.float64)
        if clock.step == self.nan_at:
            x[0, 0] = torch.nan
        return {"input": x, "label": (x.nan_to_num().sum(1) > 0).long()}


class Line(System):
    """A linear classifier in float64; `make` gives its updates, every method call is written down."""

    def __init__(self, make: Callable[[Line], Sequence[Update]] | None = None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(3, 2).double()
        self.other = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.make = make or (lambda s: [Update("learn", s.net.parameters(), SGD)])
        self.calls: list[tuple[str, int, int, int]] = []

    def updates(self) -> Sequence[Update]:
        return self.make(self)

    def seen(self, name: str, batch: Batch, clock: Clock) -> None:
        self.calls.append((name, clock.step, clock.micro, len(batch["input"])))

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        self.seen("learn", batch, clock)
        loss = nn.functional.cross_entropy(self.net(batch["input"]), batch["label"])
        return Terms(label=loss).note(size=torch.tensor(float(len(batch["input"]))))

    def climb(self, batch: Batch, clock: Clock) -> Terms:
        self.seen("climb", batch, clock)
        return Terms(height=self.other.sum())

    def assign(self, batch: Batch, clock: Clock) -> Gradients:
        self.seen("assign", batch, clock)
        return Gradients([torch.tensor([1.0, -2.0], dtype=torch.float64)], size=torch.tensor(3.0))

    def skip(self, batch: Batch, clock: Clock) -> Gradients:
        return Gradients([None])

    def evaluate_me(self) -> None: ...


def go(folder: Path, system: Line, source: Any = None, steps: int = 4, **options: Any) -> tuple[Line, list[dict]]:
    run = Run(folder, device="cpu", quiet=True, log_every=1, **options)
    fit(run, "stage", system, source or Fixed(), steps=steps)
    return system, run.log("stage")


def weights(system: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in system.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- one update -----------------------------------------------------------------------------------------------


def test_a_step_is_one_plain_optimiser_step(tmp_path):
    got, rows = go(tmp_path, Line())
    plain = Line()
    optimizer = SGD(plain.net.parameters())
    for step in range(4):
        optimizer.zero_grad()
        batch = Fixed().batch(Clock(step=step))
        loss = nn.functional.cross_entropy(plain.net(batch["input"]), batch["label"])
        loss.backward()
        optimizer.step()
        assert rows[step]["label"] == loss.item() and rows[step]["step"] == step
    assert same(weights(got), weights(plain))


@pytest.mark.parametrize("limit", [1, 3, 5, 7, 8, 99])
def test_micro_batches_equal_the_whole_batch_also_when_uneven(tmp_path, limit):
    whole, rows = go(tmp_path / "a", Line())
    split, parts = go(tmp_path / "b", Line(), micro_batch=limit)
    assert max((a - b).abs().max() for a, b in zip(weights(whole).values(), weights(split).values())) < 1e-14
    assert [r["label"] for r in parts] == pytest.approx([r["label"] for r in rows], abs=1e-14)
    sizes = [n for _, step, _, n in split.calls if step == 0]
    assert sum(sizes) == 8 and max(sizes) <= limit
    assert [m for _, step, m, _ in split.calls if step == 0] == list(range(len(sizes)))


def test_whole_updates_get_the_batch_unsplit(tmp_path):
    def make(s: Line) -> list[Update]:
        return [Update("learn", s.net.parameters(), SGD), Update("assign", [s.other], SGD, whole=True)]

    system, rows = go(tmp_path, Line(make), steps=1, micro_batch=3)
    assert [n for name, *_, n in system.calls if name == "assign"] == [8]
    assert [n for name, *_, n in system.calls if name == "learn"] == [3, 3, 2]
    assert rows[0]["size"] == 3.0  # not a sum over the pieces of another update


def test_every_start_and_repeat(tmp_path):
    def make(s: Line) -> list[Update]:
        return [
            Update("learn", s.net.parameters(), SGD, repeat=2),
            Update("climb", [s.other], SGD, every=3, start=2),
        ]

    system, _ = go(tmp_path, Line(make), steps=8)
    assert [step for name, step, *_ in system.calls if name == "climb"] == [3, 6]
    assert [step for name, step, *_ in system.calls if name == "learn"] == sorted([*range(8)] * 2)
    assert torch.allclose(system.other, torch.full((2,), -0.2, dtype=torch.float64))


def test_repeated_updates_log_their_last_pass_not_a_sum(tmp_path):
    _, rows = go(
        tmp_path,
        Line(lambda s: [Update("learn", s.net.parameters(), partial(torch.optim.SGD, lr=0.0), repeat=3)]),
        micro_batch=3,
    )
    _, once = go(tmp_path / "b", Line(lambda s: [Update("learn", s.net.parameters(), partial(SGD, lr=0.0))]))
    assert [r["label"] for r in rows] == pytest.approx([r["label"] for r in once])


def test_maximize_ascends(tmp_path):
    system, _ = go(tmp_path, Line(lambda s: [Update("climb", [s.other], SGD, maximize=True)]), steps=3)
    assert torch.allclose(system.other, torch.full((2,), 0.3, dtype=torch.float64))


def test_gradients_are_assigned_as_they_are_and_averaged_over_micro_batches(tmp_path):
    for limit in (None, 3):
        folder = tmp_path / str(limit)
        system, _ = go(folder, Line(lambda s: [Update("assign", [s.other], SGD)]), steps=2, micro_batch=limit)
        assert torch.allclose(system.other, torch.tensor([-0.2, 0.4], dtype=torch.float64), atol=1e-15)
        assert same(weights(system.net), weights(Line().net))


def test_none_leaves_a_parameter_alone_also_under_weight_decay(tmp_path):
    decay = partial(torch.optim.SGD, lr=0.1, weight_decay=1.0)
    system = Line(lambda s: [Update("skip", [s.other], decay)])
    with torch.no_grad():
        system.other.fill_(1.0)
    go(tmp_path, system)
    assert torch.equal(system.other, torch.ones(2, dtype=torch.float64))


def test_clip_bounds_the_global_norm(tmp_path):
    before = weights(Line().net)
    for clip in (0.01, 1e9):
        system, _ = go(tmp_path / str(clip), Line(lambda s, c=clip: [Update("learn", s.net.parameters(), SGD, clip=c)]))
        moved = torch.cat([(v - before[k]).flatten() for k, v in weights(system.net).items()]).norm()
        assert (moved <= 0.1 * 0.01 * 4 + 1e-12) == (clip < 1)


def test_lr_schedule_multiplies_each_groups_rate(tmp_path):
    def two(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.01}])

    def make(s: Line) -> list[Update]:
        s.twin = s.twin if hasattr(s, "twin") else nn.Parameter(torch.zeros(2, dtype=torch.float64))
        return [Update("both", [s.other, s.twin], two, lr=lambda c: 1 / (1 + c.step))]

    class Both(Line):
        def both(self, batch: Batch, clock: Clock) -> Gradients:
            return Gradients([torch.ones(2, dtype=torch.float64)] * 2)

    system, _ = go(tmp_path, Both(make), steps=3)
    total = 1 + 1 / 2 + 1 / 3
    assert torch.allclose(system.other, torch.full((2,), -0.1 * total, dtype=torch.float64))
    assert torch.allclose(system.twin, torch.full((2,), -0.01 * total, dtype=torch.float64))


def test_an_update_moves_its_own_parameters_only(tmp_path):
    class Mixed(Line):
        def learn(self, batch: Batch, clock: Clock) -> Terms:
            return Terms(both=self.net(batch["input"]).sum() + self.other.sum())

    def make(s: Line) -> list[Update]:
        return [Update("learn", s.net.parameters(), SGD), Update("climb", [s.other], SGD, start=99)]

    system, _ = go(tmp_path, Mixed(make))
    assert torch.equal(system.other, torch.zeros(2, dtype=torch.float64)) and system.other.grad is None


def test_returning_something_else_says_the_method(tmp_path):
    class Wrong(Line):
        def learn(self, batch: Batch, clock: Clock) -> Any:
            return torch.zeros(())

    with pytest.raises(TypeError, match=r"learn must return Terms or Gradients, got Tensor"):
        go(tmp_path, Wrong())


# -- lazy parts -----------------------------------------------------------------------------------------------


class Joint(System):
    def __init__(self, limit: bool):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.w = nn.Parameter(torch.zeros(1))

    def updates(self) -> Sequence[Update]:
        return [Update("learn", self.net.parameters(), SGD), Update("judge", [self.w], SGD, every=4, whole=True)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        train = batch["train"]
        return Terms(ce=nn.functional.cross_entropy(self.net(train["input"]), train["label"]))

    def judge(self, batch: Batch, clock: Clock) -> Terms:
        held = batch["held_out"]
        return Terms(outer=(self.w * len(held["label"])).sum())


@pytest.mark.parametrize("micro", [None, 3])
def test_parts_of_a_joint_batch_are_computed_only_when_an_update_asks(tmp_path, monkeypatch, micro):
    samples = Arrays(np.random.default_rng(0).normal(size=(32, 3)), np.arange(32) % 2)
    held = Arrays(np.zeros((8, 3), np.float32), np.arange(8) % 2)
    asked = []
    monkeypatch.setattr(held, "take", lambda *a, take=held.take, **k: asked.append(1) or take(*a, **k))
    run = Run(tmp_path, device="cpu", quiet=True, micro_batch=micro)
    fit(run, "s", Joint(True), together(train=Batches(samples, 8), held_out=Batches(held, 4)), steps=8)
    assert len(asked) == 2  # steps 0 and 4


# -- precision, compile ------------------------------------------------------------------------------------------


class Small(System):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        self.types: set[torch.dtype] = set()

    def updates(self) -> Sequence[Update]:
        return [Update("learn", self.net.parameters(), partial(torch.optim.AdamW, lr=1e-2), clip=5.0)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        z = self.net(batch["input"].float())
        self.types.add(z.dtype)
        return Terms(ce=nn.functional.cross_entropy(z.float(), batch["label"]))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_runs_and_learns(tmp_path, precision, dtype):
    run, system = Run(tmp_path, device="cpu", precision=precision, quiet=True, log_every=1), Small()
    fit(run, "s", system, Fixed(32), steps=60)
    losses = [r["ce"] for r in run.log("s")]
    assert system.types == {dtype} and system.net[0].weight.dtype is torch.float32
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_fp16_scale_is_remembered(tmp_path):
    def run(folder: Path, steps: int, every: int) -> dict[str, Tensor]:
        system = Small()
        options = {"device": "cpu", "precision": "fp16", "quiet": True, "checkpoint_every": every}
        fit(Run(folder, **options), "s", system, Stopping(steps), steps=12)
        return weights(system)

    whole = run(tmp_path / "a", 99, 99)
    with pytest.raises(RuntimeError, match="stop here"):
        run(tmp_path / "b", 7, 2)
    assert same(run(tmp_path / "b", 99, 2), whole)


class Stopping(Fixed):
    """Breaks off at a step, as a machine would."""

    def __init__(self, at: int, **kw: Any):
        super().__init__(**kw)
        self.at = at

    def batch(self, clock: Clock) -> Batch:
        if clock.step == self.at:
            raise RuntimeError("stop here")
        return super().batch(clock)


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path):
    eager, compiled = Small(), Small()
    fit(Run(tmp_path / "a", device="cpu", quiet=True), "s", eager, Fixed(), steps=3)
    fit(Run(tmp_path / "b", device="cpu", quiet=True, compile=True), "s", compiled, Fixed(), steps=3)
    assert weights(eager).keys() == weights(compiled).keys()
    for k, v in weights(eager).items():
        assert (weights(compiled)[k] - v).abs().max() < 1e-4


# -- remembering and stopping --------------------------------------------------------------------------------------


def test_a_finished_stage_is_loaded_without_asking_the_source(tmp_path):
    first, _ = go(tmp_path, Line())
    source, again = Fixed(), Line()
    again.net.weight.data.zero_()
    go(tmp_path, again, source)
    assert source.calls == 0 and again.calls == [] and same(weights(first), weights(again))
    assert again.training == first.training


def test_rows_are_neither_doubled_nor_missing_after_a_break(tmp_path):
    _, whole = go(tmp_path / "a", Line(), steps=11)
    for at in (5, 8, 10):
        folder = tmp_path / str(at)
        with pytest.raises(RuntimeError, match="stop here"):
            go(folder, Line(), Stopping(at), steps=11, checkpoint_every=2)
        system, rows = go(folder, Line(), Stopping(99), steps=11, checkpoint_every=2)
        assert rows == whole
        assert system.calls[0][1] == at // 2 * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [2, 5])  # 5 is the last step
def test_signals_save_and_stop_even_at_the_last_step(tmp_path, number, at):
    class Kicked(Fixed):
        def batch(self, clock: Clock) -> Batch:
            if clock.step == at:
                os.kill(os.getpid(), number)
            return super().batch(clock)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"after step \d of 6 of stage 'stage'"):
        go(tmp_path / "a", Line(), Kicked(), steps=6)
    assert signal.getsignal(number) is before
    resumed, rows = go(tmp_path / "a", Line(), steps=6)
    whole, expected = go(tmp_path / "b", Line(), steps=6)
    assert same(weights(resumed), weights(whole)) and rows == expected


def test_a_signal_while_the_last_checkpoint_is_written_is_not_lost(tmp_path, monkeypatch):
    from stillhouse.checkpoint import Checkpoints

    write = Checkpoints.write

    def kicked(self: Checkpoints, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(self, *args)

    monkeypatch.setattr(Checkpoints, "write", kicked)
    with pytest.raises(Interrupted):
        go(tmp_path, Line())
    monkeypatch.undo()
    assert go(tmp_path, Line())[0].calls == []


def test_evaluation_is_in_eval_mode_without_a_graph_and_logged_each_epoch(tmp_path):
    modes = []

    def judge(system: Line, clock: Clock) -> dict[str, float]:
        modes.append((system.training, torch.is_grad_enabled(), clock.step))
        return {"score": clock.step / 10}

    run = Run(tmp_path, device="cpu", quiet=True, log_every=4)
    fit(run, "s", Line(), Fixed(), steps=10, evaluate=judge)
    assert modes == [(False, False, 3), (False, False, 7), (False, False, 9)]
    assert [r["score"] for r in run.log("s") if "score" in r] == [0.3, 0.7, 0.9]


def test_epochs_and_steps(tmp_path):
    run, system = Run(tmp_path, device="cpu", quiet=True), Line()
    fit(run, "s", system, Fixed(steps_per_epoch=4), epochs=1.5)
    assert len(system.calls) == 6
    with pytest.raises(ValueError, match="either"):
        fit(run, "t", system, Fixed())


# -- not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("at", [0, 5, 9])
def test_nan_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path, at, log_every):
    run = Run(tmp_path, device="cpu", quiet=True, log_every=log_every, checkpoint_every=3)
    with pytest.raises(NotFinite) as caught:
        fit(run, "stage", Line(), Fixed(nan_at=at), steps=10)
    text = str(caught.value)
    assert f"the loss is not finite at step {at};" in text and "\n" not in text
    good = at // 3 * 3
    assert (f"(step {good})" in text) if good else ("no checkpoint yet" in text)
    resumed = Line()
    fit(run, "stage", resumed, Fixed(), steps=10)  # the same stage with mended data goes on from there
    assert resumed.calls[0][1] == good
    assert same(weights(resumed), weights(go(tmp_path / "b", Line(), steps=10)[0]))


def test_infinite_assigned_gradients_are_caught(tmp_path):
    class Bad(Line):
        def assign(self, batch: Batch, clock: Clock) -> Gradients:
            return Gradients([torch.full((2,), torch.inf if clock.step == 2 else 0.0, dtype=torch.float64)])

    with pytest.raises(NotFinite, match="at step 2"):
        go(tmp_path, Bad(lambda s: [Update("assign", [s.other], SGD)]))


def test_weights_spoiled_by_a_finite_loss_do_not_replace_a_good_checkpoint(tmp_path):
    class Spoiled(Line):
        def after_step(self, clock: Clock) -> None:
            if clock.step == 3:
                self.net.weight.data[0, 0] = torch.inf

    run = Run(tmp_path, device="cpu", quiet=True, checkpoint_every=2)
    with pytest.raises(NotFinite, match=r"weights are not finite after step 3; .*step 2\)"):
        fit(run, "stage", Spoiled(), Fixed(), steps=9)


# -- around it ---------------------------------------------------------------------------------------------------


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path, device="cpu", quiet=True, track=["tensorboard"], log_every=1)
    fit(run, "stage", Line(), Fixed(), steps=3)
    run.close()
    (events,) = tmp_path.glob("track/**/events.*")
    seen = EventAccumulator(str(events.parent))
    seen.Reload()
    assert [e.value for e in seen.Scalars("stage/label")] == pytest.approx([r["label"] for r in run.log("stage")])


def test_progress_is_one_plain_line_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stillhouse.progress.QUIET_SECONDS", -1.0)
    run = Run(tmp_path, device="cpu", log_every=1)
    fit(run, "stage", Line(), Fixed(), steps=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("stage: step 1 of 2") and "label" in lines[0]
    assert all("\x1b" not in line for line in lines)


def test_run_refuses_what_cannot_be(tmp_path):
    for options, words in [
        ({"precision": "fp64"}, "fp32, bf16 or fp16"),
        ({"micro_batch": 0}, "at least 1"),
        ({"device": "gpu"}, "auto, cpu, cuda or mps"),
        ({"log_every": 0}, "log_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"track": ["nonesuch"]}, "nonesuch"),
    ]:
        with pytest.raises(UserError, match=words):
            Run(tmp_path, **{"device": "cpu", **options})


def test_memo_gives_the_same_value_the_first_and_the_second_time(tmp_path):
    run = Run(tmp_path, device="cpu")
    value = {"a": (1, 2), "b": float("nan"), 3: np.float32(0.5)}
    first = run.memo("m", lambda: value)
    assert first == run.memo("m", lambda: 1 / 0) == {"a": [1, 2], "b": None, "3": 0.5}
    assert json.loads((tmp_path / "m.json").read_text()) == first


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/b", "", "a\0b", "c:x"])
def test_names_cannot_leave_the_run_folder(tmp_path, name):
    run = Run(tmp_path / "run", device="cpu")
    uses = [run.stage, run.child] + [partial(run.memo, make=dict)] * (name not in ("", ".."))  # those become ….json
    for use in uses:
        with pytest.raises(UserError, match="leave"):
            use(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
