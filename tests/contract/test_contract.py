"""The contract: what holds for every recipe, in one table.

A new recipe joins by itself: its ``experiment.py`` gives ``TINY`` and ``tiny(run, cfg)``, and its outcome has
``save(folder)``. See rows.py for what else can be said of it (further rows, what weight 0 equals, several processes).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import JOINT, ROWS, SEEDLESS, ZERO
from table import Row
from torch import nn
from worker import answers_of

from stillhouse import engine, recipes
from stillhouse.data import Batches, load
from stillhouse.distill import Distill
from stillhouse.engine import fit
from stillhouse.errors import Interrupted
from stillhouse.models import ModelSpec
from stillhouse.run import Run
from stillhouse.teachers import Frozen

WORKER = Path(__file__).parent / "worker.py"
table = pytest.mark.parametrize("row", ROWS, ids=str)


@dataclasses.dataclass
class Made:
    """A row's run without interruption: the run folder, what it gave and everything it wrote."""

    folder: Path
    outcome: Any
    steps: int
    files: dict[str, bytes]


def written(outcome: Any, folder: Path) -> dict[str, bytes]:
    """Every file of the saved outcome, by path."""
    outcome.save(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def logs(folder: Path) -> dict[str, str]:
    return {p.parent.name: p.read_text() for p in sorted(folder.glob("stages/*/log.jsonl"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Row], Made]:
    """The uninterrupted run of a row, made once."""
    known: dict[str, Made] = {}

    def of(row: Row) -> Made:
        if repr(row) not in known:
            root, count = tmp_path_factory.mktemp("made"), []
            with pytest.MonkeyPatch.context() as patch:
                plain = engine._Fit.step
                patch.setattr(engine._Fit, "step", lambda *a: count.append(1) or plain(*a))
                outcome = row.make(root / "run")
            files = written(outcome, root / "saved")
            known[repr(row)] = Made(root / "run", outcome, len(count), files)
        return known[repr(row)]

    return of


def break_at(patch: pytest.MonkeyPatch, k: int, how: str) -> None:
    """Before step k (over all stages) of the next run: an exception, or SIGTERM."""
    plain, count = engine._Fit.step, []

    def step(*args: Any) -> bool:
        count.append(1)
        if len(count) == k + 1:
            if how == "crash":
                raise MemoryError("the machine went away")
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    patch.setattr(engine._Fit, "step", step)


@table
@pytest.mark.parametrize("how", ["crash", "SIGTERM"])
def test_resume_is_bit_identical(row, how, made, tmp_path):
    whole = made(row)
    for k in sorted({1, whole.steps // 2, whole.steps - 1} & set(range(1, whole.steps))):
        folder = tmp_path / str(k)
        with pytest.MonkeyPatch.context() as patch:
            break_at(patch, k, how)
            with pytest.raises((MemoryError, Interrupted)):
                row.make(folder, checkpoint_every=3)
        assert written(row.make(folder, checkpoint_every=2), tmp_path / f"saved{k}") == whole.files
        assert logs(folder) == logs(whole.folder)


@table
def test_same_seed_same_bytes_and_another_seed_others(row, made, tmp_path):
    whole = made(row)
    assert written(row.make(tmp_path / "again"), tmp_path / "a") == whole.files
    assert logs(tmp_path / "again") == logs(whole.folder)
    other = written(row.make(tmp_path / "other", seed=1), tmp_path / "b")
    assert other.keys() == whole.files.keys() and (other != whole.files) == (row.recipe not in SEEDLESS)


@table
def test_settings_round_trip_through_json(row, made):
    cfg = row.config()
    back = json.loads(json.dumps(dataclasses.asdict(cfg)))
    kinds = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    again = type(cfg)(**{k: tuple(v) if isinstance(kinds[k], tuple) else v for k, v in back.items()})
    assert again == cfg


@table
def test_settings_round_trip_through_the_command_line(row):
    from stillhouse.cli import parse_flags, settings

    flags = ["--out", "x"]
    for name, value in dataclasses.asdict(row.config()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    options, cfg = parse_flags(row.recipe, flags)
    assert cfg == row.config()
    assert json.loads(json.dumps(settings(options, cfg))) == settings(options, cfg)


def test_outcomes_reload_in_a_fresh_process(made, tmp_path):
    """From their folders alone: no run, no recipe, no base network at hand."""
    expected: dict[str, torch.Tensor] = {}
    folders: list[str] = []
    for row in ROWS:
        whole = made(row)
        for member in getattr(whole.outcome, "members", []):
            folder = tmp_path / str(row) / member.name
            folder.mkdir(parents=True)
            folders.append(str(folder))
            for name in ("plan.json", "model.safetensors"):
                (folder / name).write_bytes(whole.files[f"students/{member.name}/{name}"])
            with torch.no_grad():
                expected |= answers_of(member.model, json.loads((folder / "plan.json").read_text()), str(folder))
    subprocess.run([sys.executable, WORKER, "load", tmp_path / "answers", *folders], check=True, timeout=300)
    from safetensors.torch import load_file

    answers = load_file(tmp_path / "answers")
    assert answers.keys() == expected.keys()
    assert all(torch.equal(answers[k], v) for k, v in expected.items())


def test_data_sets_and_queries_reload_in_a_fresh_process(made, tmp_path):
    """From their folders alone; what was read is saved again, and has the same bytes."""
    folders: list[tuple[Path, dict[str, bytes]]] = []
    for row in ROWS:
        for home in ("dataset", "queries"):
            files = {k.partition("/")[2]: v for k, v in made(row).files.items() if k.startswith(f"{home}/")}
            if files:
                folders.append((tmp_path / str(row) / home, files))
    for folder, files in folders:
        folder.mkdir(parents=True)
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
    command = [sys.executable, WORKER, "again", tmp_path / "again", *(f for f, _ in folders)]
    subprocess.run(command, check=True, timeout=300)
    for i, (folder, files) in enumerate(folders):
        saved = tmp_path / "again" / str(i) / folder.name
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == files


@pytest.mark.parametrize(("left", "right"), ZERO, ids=lambda r: r.name)
def test_distillation_weight_zero_is_the_plain_baseline(left, right, made, tmp_path):
    a, b = made(left), made(right)
    assert a.files == b.files


# -- several processes -----------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The JOINT rows, run by two processes."""
    out = tmp_path_factory.mktemp("two")
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(
            [sys.executable, WORKER, "joint", out],
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        for p in both:
            _, said = p.communicate(timeout=240)
            assert p.returncode == 0, said[-3000:]
    finally:
        for p in both:
            p.kill()
    return out


@pytest.mark.parametrize("row", JOINT, ids=str)
def test_two_processes_equal_one_on_the_joint_batch(row, two, made, tmp_path):
    from safetensors.torch import load as tensors_of

    whole = made(row)
    ranks = [two / f"rank{r}" / str(row) for r in range(2)]
    for name, raw in whole.files.items():
        if name.endswith(".safetensors"):
            here, there = tensors_of(raw), [tensors_of((r / name).read_bytes()) for r in ranks]
            for key, value in here.items():
                assert torch.equal(there[0][key], there[1][key]), (name, key)
                assert (there[0][key] - value).abs().max() <= 1e-6, (name, key)
    importance = [json.loads((r / "importance.json").read_text()) for r in ranks]
    assert importance[0] == importance[1]
    assert importance[0] == pytest.approx([m.importance for m in getattr(whole.outcome, "members", [])], abs=1e-6)


def test_a_request_to_one_process_stops_both_at_the_same_step(two):
    said = [(two / f"rank{r}" / "stopped").read_text() for r in range(2)]
    assert said[0] == said[1] and re.match(r"stopped after step [56] of 20", said[0])


def test_bad_numbers_in_one_process_stop_both_with_the_same_step(two):
    said = [(two / f"rank{r}" / "not finite").read_text() for r in range(2)]
    assert said[0] == said[1] and "the loss is not finite at step 4;" in said[0] and "(step 3)" in said[0]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    flags = ["--data", "digits", "--limit", "64", "--model", "stillhouse:mlp", "--ratios", "0", "0.5", "--epochs", "1"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        "-m",
    ]
    command = [*launch, "stillhouse", "run", "wml", *flags, "--device", "cpu", "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        launched = subprocess.Popen(command, env=env, stdout=said, stderr=said, start_new_session=True)
        try:
            code = launched.wait(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launched.pid, signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert code == 0, text[-3000:]
    assert text.count("report:") == 1
    assert (tmp_path / "run" / "report.html").exists()


# -- teachers -----------------------------------------------------------------------------------------------------


def mlp(seed: int) -> nn.Module:
    return ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [16]}).build(seed=seed)


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def bytes_of(model: nn.Module) -> bytes:
    return b"".join(v.detach().numpy().tobytes() for v in model.state_dict().values())


def test_the_teacher_is_never_changed_nor_saved(tmp_path):
    teacher = ModelSpec("stillhouse:cnn", 10, (1, 8, 8)).build(seed=1)
    teacher.train()
    before, mode = bytes_of(teacher), teacher.training
    system = Distill(mlp(0), Frozen(teacher, copy=True), optimizer=SGD)
    run = Run(tmp_path, device="cpu", quiet=True)
    fit(run, "distill", system, Batches(load("digits", limit=64).train, 16), steps=6)
    assert bytes_of(teacher) == before and teacher.training == mode
    assert all(p.grad is None for p in teacher.parameters())
    kept = engine.Checkpoints(run.stage("distill"))
    assert {k.split("/")[1].split(".")[0] for k in kept.open(kept.last)[0] if k.startswith("system/")} == {"student"}


def test_distilling_with_weight_zero_is_plain_training_bit_for_bit(tmp_path):
    source = Batches(load("digits", limit=64).train, 16)
    system = Distill(mlp(0), Frozen(mlp(1)), alpha=0.0, optimizer=SGD)
    fit(Run(tmp_path, device="cpu", quiet=True, seed=3), "distill", system, source, steps=8)
    plain = mlp(0)
    optimizer = SGD(plain.parameters())
    for step in range(8):
        clock = engine.Clock(seed=3, stage="distill", step=step, steps=8, steps_per_epoch=source.steps_per_epoch)
        batch = source.batch(clock)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(batch["input"]), batch["label"]).backward()
        optimizer.step()
    assert bytes_of(system.outcome()) == bytes_of(plain)


def test_an_independent_peer_is_a_network_trained_alone(tmp_path):
    """share none, rule independent: each peer is plain training, bit for bit (its gradient norm not clipped)."""
    from stillhouse.data import together
    from stillhouse.recipes.wml.recipe import Config, distill

    data, base = load("digits", limit=64), mlp(0)
    cfg = Config(ratios=(0.0,), rule="independent", share="none", epochs=2, batch=16, clip=1e9, lr=0.05, lr_warmup=0.0)
    family = distill(Run(tmp_path, device="cpu", quiet=True), data, base, cfg)
    plain = mlp(0)
    source = together(train=Batches(data.train, 16))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay)
    from stillhouse.weights import cosine

    for step in range(8):
        clock = engine.Clock(stage="mutual", step=step, steps=8, steps_per_epoch=4)
        batch = source.batch(clock)["train"]
        optimizer.param_groups[0]["lr"] = 0.05 * cosine(0)(clock)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(batch["input"]), batch["label"]).backward()
        optimizer.step()
    assert bytes_of(family.members[0].model) == bytes_of(plain)


def test_every_recipe_is_in_the_table():
    assert {r.recipe for r in ROWS} == set(recipes.names())
    assert len({str(r) for r in ROWS}) == len(ROWS)
