"""Stillhouse: distillation in one library and one command. One run, a whole family of smaller models.

``import stillhouse`` stays cheap: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "stillhouse.engine": ("fit",),
    "stillhouse.run": ("Run",),
    "stillhouse.system": (
        "Batch",
        "Clock",
        "Gradients",
        "Signals",
        "Source",
        "System",
        "Teacher",
        "Terms",
        "Update",
    ),
    "stillhouse.errors": ("Interrupted", "NotFinite", "UserError"),
    "stillhouse.family": ("Family",),
    "stillhouse.outcomes": ("DataSet", "Member", "Models", "Queries", "Query", "load"),
    "stillhouse.models": ("ModelSpec",),
    "stillhouse.students.plan": ("Keep", "Plan"),
    "stillhouse.students.norms": ("recalibrate",),
    "stillhouse.students.peers": ("Nested", "PeerSet", "Separate", "Tree"),
    "stillhouse.students.prune": ("find_groups", "fit_budget", "score_groups"),
    "stillhouse.bilevel": ("Hypergradient", "one_step", "unrolled"),
    "stillhouse.taps": ("tap",),
    "stillhouse.teachers": ("EMA", "Cached", "Ensemble", "Frozen"),
    "stillhouse.distill": ("Distill",),
    "stillhouse.evaluate": ("agreement", "classification", "count_macs", "count_params", "latency", "predict"),
    "stillhouse.score": ("distillation_score", "paired_bootstrap"),
    "stillhouse.report": (
        "Claim",
        "Curve",
        "DistillationReport",
        "Image",
        "Matrix",
        "Rated",
        "Report",
        "Student",
        "Table",
        "compare",
    ),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_MODULES = (
    "bilevel",
    "data",
    "evaluate",
    "export",
    "objectives",
    "recipes",
    "report",
    "students",
    "teachers",
    "weights",
)

__all__ = sorted([*_WHERE, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"stillhouse.{name}")
    raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
