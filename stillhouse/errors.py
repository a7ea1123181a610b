"""Errors that are the user's to mend: one line that says what was expected, what came, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked for. The command prints its one line and exits with code 2."""


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved itself. The command exits with code 130."""


class NotFinite(UserError):
    """A loss became NaN or infinite; the message names the step and the last good checkpoint."""


def did_you_mean(name: str, known: Iterable[str], limit: int = 8) -> str:
    """A closing clause for an error about an unknown name.

    Args:
        name: what the user wrote.
        known: the names that would have been right.
        limit: how many known names to list when none is close.

    Example:
        >>> did_you_mean("wlm", ["wml", "dml"])
        "did you mean 'wml'?"
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(known[:limit]) + (f", … ({len(known) - limit} more)" if len(known) > limit else "")
    return f"known: {shown}" if known else "none are known here"


def need(extra: str, package: str) -> UserError:
    """The error for a missing optional dependency: names the extra that brings it."""
    return UserError(f"{package} is not installed; run: pip install 'stillhouse[{extra}]'")
