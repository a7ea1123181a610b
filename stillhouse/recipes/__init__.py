"""One folder per published system; the folder's name is the recipe's name.

A folder's ``__init__.py`` says in plain constants what the recipe is (so that listing them loads nothing heavy):
TITLE, FAMILY (what gets smaller: model, data, sampler, policy, query, graph), GIVES, SOURCE (quality of the sources:
code-checked, reconstructed, …) and PAPER. Recipes import the library; the library never imports a recipe.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stillhouse.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Card:
    """What a recipe says of itself."""

    name: str
    title: str
    family: str
    gives: str
    source_quality: str
    paper: str
    page: Path


def names() -> list[str]:
    """All recipes, in the order of the alphabet."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def card(name: str) -> Card:
    """The card of one recipe; hyphens and underscores are the same."""
    module = find(name)
    page = Path(module.__file__ or "").parent / "README.md"
    short = module.__name__.rpartition(".")[2]
    return Card(short, module.TITLE, module.FAMILY, module.GIVES, module.SOURCE, module.PAPER, page)


def find(name: str) -> ModuleType:
    """The package of one recipe.

    Raises:
        UserError: there is none of that name.
    """
    name = name.replace("-", "_")
    if name not in names():
        raise UserError(f"no system {name!r}; {did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def comments(config: type) -> dict[str, str]:
    """What each field of a Config means: the comment that ends its line."""
    lines = textwrap.dedent(inspect.getsource(config)).splitlines()
    fields = {f.name for f in dataclasses.fields(config)}
    found = {}
    for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in fields:
            rest = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset :].decode()
            found[node.target.id] = rest.strip().removeprefix("#").strip()
    return found


def experiment(name: str) -> ModuleType:
    """The recipe's experiment module (this loads torch)."""
    return importlib.import_module(f"{find(name).__name__}.experiment")


def __getattr__(name: str) -> Any:
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
