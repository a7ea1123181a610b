"""Checkpoints: what is written is what is read, and nothing damaged, foreign or newer is taken for good."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.checkpoint import Checkpoints, checksum, difference, load_optimizer, optimizer_state
from stillhouse.errors import UserError

IDENTITY = {"stage": "s", "seed": 0, "data": "abc"}


def tensors(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    shared = torch.randn(4, 3, generator=g)
    return {
        "system/w": shared,
        "system/tied": shared,  # the same memory twice
        "system/t": shared.t(),  # not contiguous
        "system/half": torch.randn(3, generator=g).bfloat16(),
        "system/count": torch.tensor(step),
        "system/flag": torch.tensor([True, False]),
        "system/empty": torch.zeros(0, 2),
    }


def write(kept: Checkpoints, *steps: int) -> None:
    for step in steps:
        kept.write(tensors(step), {"step": step, "identity": IDENTITY}, [{"step": step - 1, "loss": 0.5}])


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    kept = Checkpoints(tmp_path / "stage")
    write(kept, 1, 2, 3)
    return kept


def reread(kept: Checkpoints, **identity: object) -> tuple[dict[str, torch.Tensor], dict]:
    found = kept.read({**IDENTITY, **identity})
    assert found is not None
    return found


def test_what_is_written_is_what_is_read(kept):
    found, facts = reread(kept)
    want = tensors(3)
    assert found.keys() == want.keys() and facts == {"step": 3, "identity": IDENTITY}
    assert all(torch.equal(found[k], want[k]) and found[k].dtype == want[k].dtype for k in want)
    assert kept.open(kept.previous)[1]["step"] == 2
    assert sorted(p.name for p in kept.folder.iterdir()) == [
        "checkpoint.safetensors",
        "log.jsonl",
        "previous.safetensors",
    ]


def test_none_yet_means_a_fresh_log(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.log.write_text('{"step": 0}\n')
    assert kept.read(IDENTITY) is None and not kept.log.exists()
    assert kept.describe() == "there is no checkpoint yet"


def test_the_last_one_removed_goes_on_from_the_one_before(kept):
    kept.last.unlink()
    assert reread(kept)[1]["step"] == 2
    assert [json.loads(r)["step"] for r in kept.log.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.5, -1])
def test_truncated(kept, keep):
    raw = kept.last.read_bytes()
    kept.last.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError) as caught:
        reread(kept)
    text = str(caught.value)
    assert f"checkpoint {kept.last} is damaged" in text and "\n" not in text
    assert f"remove {kept.last.name} to go on from {kept.previous} (step 2)" in text
    assert kept.describe() == f"the last good checkpoint is {kept.previous} (step 2)"


@given(st.integers(0, 10**9), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_found(tmp_path_factory, where, bit):
    kept = Checkpoints(tmp_path_factory.mktemp("flip"))
    write(kept, 1)
    raw = bytearray(kept.last.read_bytes())
    raw[where % len(raw)] ^= 1 << bit
    kept.last.write_bytes(raw)
    try:
        found, facts = kept.open(kept.last)
    except UserError as error:
        assert "\n" not in str(error)
    else:  # the only bits that may change unseen are padding of the header
        assert facts["step"] == 1 and facts["identity"] == IDENTITY
        assert checksum(found) == checksum(tensors(1))


def test_both_damaged(kept):
    for path in (kept.last, kept.previous):
        path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"and so is previous\.safetensors"):
        reread(kept)


def test_newer_format(kept):
    raw = kept.last.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"]["version"] = "99"
    text = json.dumps(header).encode()
    kept.last.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with pytest.raises(UserError, match=r"written by a newer Stillhouse \(format 99\); .*pip install -U"):
        reread(kept)


def test_other_settings_and_other_data_are_shown(kept):
    with pytest.raises(UserError, match=r'data "abc" → "xyz", seed 0 → 1; resume with the same ones'):
        reread(kept, data="xyz", seed=1)
    many = {f"settings.k{i}": i for i in range(9)}
    assert difference({}, many).endswith("and 3 more") and "k0 null → 0" in difference({}, many)


def test_the_log_is_cut_at_the_checkpoint_also_in_mid_line(kept):
    with open(kept.log, "a") as log:
        log.write('{"step": 3, "loss": 1}\n{"step": 4, "lo')
    reread(kept)
    assert [json.loads(r)["step"] for r in kept.log.read_text().splitlines()] == [0, 1, 2]


def test_strays_of_a_kill_in_mid_write_are_swept_by_the_main_process_only(kept):
    strays = [kept.folder / n for n in (".0123.safetensors", ".ab.jsonl", "previous.tmp")]
    for stray in strays:
        stray.write_bytes(b"half")
    other = Checkpoints(kept.folder, main=False)
    reread(other)
    assert all(s.exists() for s in strays)
    reread(kept)
    assert not any(s.exists() for s in strays) and kept.last.exists() and kept.previous.exists()


@pytest.mark.parametrize("where", ["fsync", "replace", "link"])
def test_no_space_keeps_the_good_one_and_says_which(kept, monkeypatch, where):
    import shutil

    def full(*args: object, **kw: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError) as caught:
        write(kept, 4)
    monkeypatch.undo()
    text = str(caught.value)
    assert "cannot save step 4" in text and "space" in text.lower() and "\n" not in text
    assert f"the last good checkpoint is {kept.last} (step 3)" in text
    assert reread(kept)[1]["step"] == 3
    write(kept, 4)
    assert reread(kept)[1]["step"] == 4


def test_a_file_system_without_hard_links(kept, monkeypatch):
    def never(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", never)
    write(kept, 4)
    assert kept.open(kept.previous)[1]["step"] == 3 and reread(kept)[1]["step"] == 4


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimisers_go_on_bit_for_bit(kind):
    def start() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = torch.nn.Linear(3, 2)
        options = {"lr": 0.1} | ({"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {})
        return net, kind(net.parameters(), **options)

    def step(net: torch.nn.Linear, optimizer: torch.optim.Optimizer, k: int) -> None:
        optimizer.zero_grad()
        x = torch.from_numpy(np.random.default_rng(k).normal(size=(4, 3))).float()
        net(x).square().mean().backward()
        optimizer.step()

    net, optimizer = start()
    for k in range(6):
        if k == 3:
            saved = {n: v.clone() for n, v in net.state_dict().items()}
            state, scalars = optimizer_state(optimizer)
            state = {n: v.clone() for n, v in state.items()}
            scalars = json.loads(json.dumps(scalars))
        step(net, optimizer, k)
    again, fresh = start()
    again.load_state_dict(saved)
    load_optimizer(fresh, state, scalars)
    for k in range(3, 6):
        step(again, fresh, k)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
