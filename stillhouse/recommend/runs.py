"""Recorded runs as rows: facts of task and models, the pipeline's settings, the student's score by its teacher's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.errors import UserError
from stillhouse.files import read_json
from stillhouse.report import Report
from stillhouse.report.rating import SCORES, basis
from stillhouse.score import score_ratio

Settings = Mapping[str, Any]
Configure = Callable[[str, Settings], Settings | None]
"""``configure(system, settings)``: all settings of the system with these ones, or None where it refuses them."""


@dataclass(frozen=True)
class Recorded:
    """One student of a recorded run.

    Attributes:
        task: name of the task; what is left out together when the advice is tested.
        system, settings: the pipeline, without what belongs to the task or the machine.
        facts: numbers about the task, the teacher and the student's size; see `facts_of`.
        ratio: the student's score over the teacher's.
        runs: how many recorded runs this is the mean of.
    """

    task: str
    system: str
    settings: Settings
    facts: Mapping[str, float]
    ratio: float
    runs: int = 1

    @property
    def pipeline(self) -> str:
        return json.dumps([self.system, dict(self.settings)], sort_keys=True)


def read_runs(folders: Iterable[str | Path], configure: Configure) -> tuple[list[Recorded], dict[str, int]]:
    """The rows of all runs in these folders and below them, and how many runs could not be used, by reason.

    Raises:
        UserError: a folder that is not there, a damaged report.
    """
    rows, unused = list[Recorded](), dict[str, int]()
    for folder in map(Path, folders):
        if not folder.exists():
            raise UserError(
                f"{folder} does not exist; give the --out folders of finished runs, or a folder that holds them"
            )
        for path in sorted({p.resolve() for p in folder.rglob("report.json")}):
            found = read_run(path.parent, configure)
            if isinstance(found, str):
                unused[found] = unused.get(found, 0) + 1
            else:
                rows += found
    return rows, unused


def read_run(folder: Path, configure: Configure) -> list[Recorded] | str:
    """The rows of one run, or why it has none."""
    report, run = Report.read(folder), folder / "run.json"
    if not run.exists():
        return "no run.json beside the report"
    task, known = report.metrics.get("task"), basis(report.students)
    if known is None:
        return "no teacher's score in the report"
    if not isinstance(task, Mapping):
        return "the report says nothing of its task (made by an older Stillhouse)"
    saved = read_json(run)
    settings = configure(report.system, saved.get("settings", {}) if isinstance(saved, Mapping) else {})
    if settings is None:
        return "settings that this Stillhouse does not know"
    score, size = known.teacher.number(known.score), known.teacher.number(known.size)
    name = f"{task.get('data')}, {task.get('train')} samples, {task.get('classes')} classes"
    rows = []
    for s in report.students:
        own, small = s.number(known.score), s.number(known.size)
        if s is known.teacher or s.role != "student" or own is None or not small or not score or not size:
            continue
        ratio = score_ratio(own, score, higher_is_better=SCORES[known.score])
        rows.append(Recorded(name, report.system, settings, facts_of(task, score, size, small / size), ratio))
    return rows or "no student's score in the report"


def facts_of(task: Mapping[str, Any], score: float = math.nan, size: float = math.nan, share: float = math.nan) -> dict:
    """Numbers about a task: what its report or `stillhouse.data.Data.facts` says, the teacher's score and size.

    Args:
        task: ``train``, ``classes``, ``chance``, ``inputs``, ``text``.
        score, size: of the teacher. share: the student's size over the teacher's.
    """
    logs = {k: float(task[k]) for k in ("train", "classes", "inputs") if task.get(k)}
    logs |= {"teacher_size": size, "size_ratio": share}
    plain = {
        "chance": float(task.get("chance", math.nan)),
        "text": float(bool(task.get("text"))),
        "teacher_score": score,
    }
    return {**{k: math.log10(v) if v > 0 else math.nan for k, v in logs.items()}, **plain}


def merged(rows: Iterable[Recorded]) -> list[Recorded]:
    """Rows of one pipeline on one task and pair of models, such as several seeds, as their mean."""
    groups: dict[Any, list[Recorded]] = {}
    for r in rows:
        models = (r.facts.get("teacher_size", math.nan), r.facts.get("size_ratio", math.nan))
        groups.setdefault((r.task, r.pipeline, str(models)), []).append(r)
    made = []
    for same in groups.values():
        facts = {k: float(np.mean([r.facts[k] for r in same])) for k in same[0].facts}
        ratio, runs = float(np.mean([r.ratio for r in same])), sum(r.runs for r in same)
        made.append(Recorded(same[0].task, same[0].system, same[0].settings, facts, ratio, runs))
    return made


def new_task(
    data: str, *, model: str | None = None, teacher: str | None = None, score: float | None = None, **options: Any
) -> tuple[str, dict[str, float]]:
    """A new task by the names that ``stillhouse distill`` takes: what it is called, and its facts.

    Args:
        data, model, teacher: as the command's flags. Of a teacher in a run's folder the report is read.
        score: the teacher's, where no report has it.
        options: further fields of `stillhouse.teacher_options.TeacherOptions`.

    Raises:
        UserError: data or a model that cannot be had.
    """
    from stillhouse.evaluate import count_params
    from stillhouse.teacher_options import TeacherOptions

    asked = TeacherOptions(
        out=Path("."), data=data, model=model, teacher=(teacher,) if teacher else (), **options
    )  # fmt: skip
    opened = asked.load_data(data)
    size = math.nan
    home = Path(teacher).resolve().parent.parent if teacher else Path()
    if teacher and (home / "report.json").exists():
        row = next((s for s in Report.read(home).students if s.path == f"students/{Path(teacher).name}"), None)
        if row is not None:
            size, score = row.number("weight_bytes") or size, score if score is not None else row.number("accuracy")
    small = 4.0 * count_params(asked.spec(opened, "stillhouse:cnn").build()) if model else math.nan
    facts = facts_of(opened.facts, math.nan if score is None else score, size, small / size)
    return opened.name, facts
