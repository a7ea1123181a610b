"""The rows of the contract table.

Every recipe is in the table as soon as its ``experiment.py`` has

* ``TINY``: the smallest Config that touches everything, and
* ``tiny(run, cfg) -> outcome``: that run in about a second, where ``outcome.save(folder)`` writes all it gives.

A recipe that has nothing more to say adds nothing. What more there is stands in its test file,
``tests/recipes/test_NAME.py``, as lists of `table.Row`:

* ``ROWS``: further settings that deserve the whole contract;
* ``ZERO``: pairs that must give the same bytes, such as distillation weight 0 and the plain baseline;
* ``JOINT``: rows that can be split over processes (no batch statistics; plain SGD, since an adaptive optimiser turns
  a gradient that is zero but for rounding into a whole step);
* ``SEEDLESS = True``: nothing in the system is random, so another seed gives the same bytes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from table import Row

from stillhouse import recipes

TEST_FILES = Path(__file__).parents[1] / "recipes"


def tests_of(recipe: str) -> Any:
    """The test file of a recipe as a module, under a name of its own (pytest imports it by itself), or None."""
    path = TEST_FILES / f"test_{recipe}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"contract_of_{recipe}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = {name: tests_of(name) for name in recipes.names()}
SEEDLESS = {name for name, tests in TESTS.items() if getattr(tests, "SEEDLESS", False)}


def said(what: str) -> list[Any]:
    return [row for tests in TESTS.values() for row in getattr(tests, what, [])]


ROWS: list[Row] = [Row(name) for name in recipes.names()] + said("ROWS")
ZERO: list[tuple[Row, Row]] = said("ZERO")
JOINT: list[Row] = said("JOINT")
