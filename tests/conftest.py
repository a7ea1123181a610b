"""Shared by all tests: one thread, quiet libraries, and where the real data are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test wrote and had imported goes with it: another test's may have the same name."""
    yield
    base = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(base):
            del sys.modules[name]
    sys.path[:] = [p for p in sys.path if not p.startswith(base)]


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
