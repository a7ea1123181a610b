"""Which pipelines to try on a new task, as commands."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillhouse.errors import UserError
from stillhouse.recommend.learn import Learner, Model, left_out
from stillhouse.recommend.runs import Configure, Recorded, Settings, merged

LEAST_RUNS, LEAST_PIPELINES, MOST_CANDIDATES = 8, 3, 512
RECORD = (
    "record more, on two tasks or more: stillhouse distill --data NAME --teacher … --student … --objective … "
    "--out runs/NAME-1, then other objectives, systems and data"
)


@dataclass
class Advice:
    """What an adviser says.

    Attributes:
        title: what was asked. commands: to run as they stand, best first, each with the reason beside it.
        notes: what it rests on and how far it can be trusted. facts: the same as JSON.
    """

    title: str
    commands: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """As text, a command on a line of its own."""
        said = [line for k, (why, what) in enumerate(self.commands, 1) for line in (f"{k}. {why}", f"   {what}")]
        return [self.title, *self.notes, "", *said]


def candidates(rows: Sequence[Recorded], configure: Configure) -> list[tuple[str, Settings]]:
    """The pipelines that were recorded, and where they are few, all further combinations of their choices."""
    found: dict[str, tuple[str, Settings]] = {r.pipeline: (r.system, r.settings) for r in rows}
    for system in sorted({r.system for r in rows}):
        mine = [r.settings for r in rows if r.system == system]
        values = {k: {json.dumps(s.get(k), sort_keys=True): s.get(k) for s in mine} for k in mine[0]}
        varied = {k: [v[key] for key in sorted(v)] for k, v in values.items() if len(v) > 1}
        if math.prod(map(len, varied.values())) > MOST_CANDIDATES:
            continue
        for choice in itertools.product(*varied.values()):
            made = configure(system, {**mine[0], **dict(zip(varied, choice, strict=True))})
            if made is not None:
                r = Recorded("", system, made, {}, 0.0)
                found.setdefault(r.pipeline, (system, made))
    return list(found.values())


def command(system: str, settings: Settings, defaults: Settings, more: Sequence[str]) -> str:
    """A command line with what differs from the defaults.

    Example:
        >>> command("distill", {"epochs": 5.0, "objective": ["kd:1", "dist:2"]}, {"epochs": 30.0}, ["--data", "digits"])
        'stillhouse distill --data digits --epochs 5.0 --objective kd:1 dist:2'
    """
    words = ["stillhouse", *([] if system == "distill" else ["run"]), system, *more]
    for key, value in settings.items():
        flag = key.replace("_", "-")
        if value == defaults.get(key) or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return shlex.join(words)


def enough(rows: Sequence[Recorded]) -> list[Recorded]:
    """The rows, seeds of one run `merged`.

    Raises:
        UserError: too few to learn from; says how many are needed and how to record them.
    """
    rows, pipelines = merged(rows), {r.pipeline for r in rows}
    if len(rows) < LEAST_RUNS or len(pipelines) < LEAST_PIPELINES:
        raise UserError(
            f"recommend needs {LEAST_RUNS} runs (seeds of one count once) of {LEAST_PIPELINES} pipelines, with scores "
            f"of teacher and student; found {len(rows)} of {len(pipelines)}; {RECORD}"
        )
    return rows


def advise(
    rows: Sequence[Recorded],
    facts: Mapping[str, float],
    flags: Callable[[str], Sequence[str]],
    configure: Configure,
    *,
    name: str = "the new task",
    top: int = 5,
    kind: Learner = "forest",
    without: Collection[str] = (),
) -> Advice:
    """The pipelines of which most is expected on a new task.

    Args:
        rows: of recorded runs, `read_runs`.
        facts: of the new task, `facts_of`; what is not known may be missing.
        flags: of the new task, as a system takes them.
        configure: see `Configure`.
        top: how many. kind: what learns.
        without: settings to be left out of the commands, such as the training of a teacher that is trained.

    Raises:
        UserError: too few runs to learn from; says how many are needed and how to record them.
    """
    rows = enough(rows)
    pipelines, tasks = {r.pipeline for r in rows}, sorted({r.task for r in rows})
    tested = left_out(rows, kind)
    notes = [
        f"Learned from {sum(r.runs for r in rows)} students of {len(pipelines)} pipelines on {len(tasks)} tasks.",
        _trust(tested, len(tasks)),
    ]
    model = Model(rows, kind)
    if mattered := model.matters():
        notes.append(f"What the ratio was told by most: {', '.join(mattered)}.")
    new = [Recorded(name, system, s, facts, 0.0) for system, s in candidates(rows, configure)]
    said, spread = model.predict(new)
    order = np.argsort(-said, kind="stable")[:top]
    picks, commands = [], []
    for k, i in enumerate(order, 1):
        r, seen = new[i], {other.task for other in rows if other.pipeline == new[i].pipeline}
        around = "" if math.isnan(spread[i]) else f" ± {spread[i]:.3f} over the trees"
        why = f"score ratio {said[i]:.3f} expected{around}; " + (
            f"tried on {len(seen)} tasks" if seen else "not tried yet"
        )
        shown = {key: v for key, v in r.settings.items() if key not in without}
        more = [*flags(r.system), "--out", f"runs/recommended-{k}"]
        line = command(r.system, shown, configure(r.system, {}) or {}, more)
        commands.append((why, line))
        picks.append({"expected": said[i], "spread": spread[i], "tasks": len(seen), "system": r.system,
                      "settings": dict(r.settings), "command": line})  # fmt: skip
    facts_json = {"runs": len(rows), "tasks": tasks, "left_out": tested, "candidates": len(new), "recommended": picks}
    return Advice(f"Pipelines to try on {name}", commands, notes, facts_json)


def _trust(tested: Mapping[str, float], tasks: int) -> str:
    if not tested:
        return f"All runs are of {tasks} task{'s' * (tasks > 1)}, too little to test the advice on a task left out."
    mean = float(np.mean(list(tested.values())))
    said = f"On a task left out, predicted and measured ratios have rank correlation {mean:.2f} (mean of {len(tested)})"
    return said + ("." if mean > 0 else ": no better than chance; take what follows as a list to try, not as an order.")
