"""Shared by all tests: one thread, quiet libraries, and where the real data are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data; the tests that ask for it are marked `data`."""
    where = os.environ.get("STILLHOUSE_DATA")
    if not where or not Path(where).is_dir():
        pytest.skip(f"needs real data: STILLHOUSE_DATA is {where!r}, expected a folder")
    return Path(where)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    where = os.environ.get("STILLHOUSE_DATA", "")
    if not Path(where).is_dir() or not where:
        for item in items:
            if "data" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs real data: STILLHOUSE_DATA is {where!r}"))
