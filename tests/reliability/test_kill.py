"""Runs that are killed, stopped or out of space end like runs that nobody disturbed (benchmarks/reliability.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the script found with a few trials of each kind (the benchmark does 20)."""
    out = tmp_path_factory.mktemp("reliability") / "out"
    counts = ["--kills", "6", "--inside", "2", "--signals", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *counts, "--out", out], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return json.loads(done.stdout)


def test_killed_at_random_moments(found):
    assert len(found["random moments"]) == 6
    assert [r["end"] for r in found["random moments"]] == ["same"] * 6
    assert any("rows saved" in at for r in found["random moments"] for at in r["at"])  # some were in mid-training


def test_killed_inside_a_checkpoint(found):
    rows = found["inside a checkpoint"]
    assert [r["end"] for r in rows] == ["same"] * 2
    assert all(r["swept"] for r in rows)
    assert any(r["half-written file left"] for r in rows)


def test_asked_to_stop(found):
    rows = found["asked to stop"]
    assert [r["signal"] for r in rows] == ["SIGINT", "SIGTERM"]
    for row in rows:
        assert row["exit"] == 130 and row["told how to go on"] and row["end"] == "same", row


def test_full_disk(found):
    if not found["full disk"]:
        pytest.skip("mounting a small tmpfs is not permitted here")
    (row,) = found["full disk"]
    assert row["exit"] == 2 and row["one line"] and row["names the last good checkpoint"], row
    assert row["end"] == "same", row
