"""A system's flags: from the words of a command line to its options and Config, and back to what a run depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stillhouse import recipes
from stillhouse.errors import UserError

if TYPE_CHECKING:
    from stillhouse.options import Options


def parse_flags(system: str, flags: Sequence[str]) -> tuple[Options, Any]:
    """Options and the system's Config from the command line; wrong flags raise a one-line UserError."""
    import tyro

    from stillhouse.options import Options as Every

    package = recipes.find(system)
    experiment = recipes.experiment(system)
    Options = getattr(experiment, "OPTIONS", Every)
    brings = {"student", *Options.BRINGS}  # --student: another word for --model
    own = any(f.startswith("--") and f[2:].split("=")[0].replace("-", "_") in brings for f in flags)
    preset = package.Config() if own else experiment.PRESET
    both = dataclasses.make_dataclass(
        "Flags",
        [("options", Options), ("config", package.Config, dataclasses.field(default=preset))],
        frozen=True,
    )
    both.__doc__ = f"{package.TITLE}. Without --model and --data: the built-in experiment."
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            made: Any = tyro.cli(
                both,
                prog=f"stillhouse run {system}",
                args=merged(flags, package.Config, Options),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(one_line(shown.getvalue())) from None
    return made.options, made.config


def refuse_idle(flags: Sequence[str], options: Options, config: Any) -> None:
    """Raises UserError where a flag was given that does nothing beside the others (`Options.idle`)."""
    given = {word.partition("=")[0].replace("_", "-").replace("--no-", "--", 1) for word in flags}
    for name, why in options.idle(config).items():
        if (flag := f"--{name.replace('_', '-')}") in given:
            raise UserError(f"{flag} does nothing here: {why}; drop it")


def merged(flags: Sequence[str], *kinds: type) -> list[str]:
    """The flags with repeats of those that take several values joined.

    Example:
        >>> from stillhouse.options import Options
        >>> merged(["--track", "a", "--seed", "1", "--track=b"], Options)
        ['--seed', '1', '--track', 'a', 'b']
    """
    several = {
        f"--{f.name.replace('_', '-')}" for kind in kinds for f in dataclasses.fields(kind) if "tuple" in str(f.type)
    }
    kept: list[str] = []
    lists: dict[str, list[list[str]]] = {name: [] for name in several}
    at = kept
    for word in flags:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            if name.replace("_", "-") in several:
                at = [value] if equals else []
                lists[name.replace("_", "-")].append(at)
                continue
            at = kept
        at.append(word)
    for name, found in lists.items():
        # One value each time is how one repeats a flag; otherwise the last one counts, as for every other flag.
        values = [v for vs in found for v in vs] if all(len(vs) == 1 for vs in found) else found[-1]
        kept += [name, *values] if found else []
    return kept


def one_line(box: str) -> str:
    """The text of an error that was drawn as a box over several lines."""
    text = re.sub(r"[\u2500-\u257f]+|-{9,}", " ", box)
    text = text.split("For full helptext")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # What a Config's own check said is one sentence that was wrapped; anything else is a list.
    between = " " if any(line.startswith("Error parsing") for line in lines) else "; "
    return re.sub(r"\s+", " ", between.join(lines[1:] or lines)).rstrip("; ") + "; see --help"


def settings(options: Options, config: Any) -> dict[str, Any]:
    """What a run's result depends on, as JSON."""
    from stillhouse.files import strict

    values = {**dataclasses.asdict(options), **dataclasses.asdict(config)}
    for name in ("out", "quiet", "track"):
        values.pop(name)
    return strict(json.loads(json.dumps(values, default=str)))  # as run.json will have them: inf is null there


def configured(system: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """All settings of a system's Config with these ones, as run.json has them; None where it refuses them.

    What is idle under them has its default: pipelines that differ in nothing else are one.
    """
    try:
        config = recipes.find(system).Config
        fields = {f.name for f in dataclasses.fields(config)}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in fields}
        made = config(**given)
        plain = {f.name: f.default for f in dataclasses.fields(config) if f.name in getattr(made, "idle", {})}
        return json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(made, **plain)), default=str))
    except (UserError, TypeError, ValueError):
        return None
