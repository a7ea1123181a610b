"""The command ``recommend``: its flags, and which adviser they ask."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse import recipes
from stillhouse.errors import UserError
from stillhouse.flags import configured

if TYPE_CHECKING:
    from stillhouse.recommend import Advice

EPILOG = (
    "Record runs of several pipelines on two tasks or more (stillhouse distill --data … --objective … --out runs/a1), "
    "then: stillhouse recommend runs --data NAME --teacher … --student …. Every run with the scores of teacher and "
    "student is read; the commands come best first, and how well such advice did on tasks left out stands above them. "
    "Without folders and --data: the size of a student for --teacher SIZE, or of a teacher for --student-size SIZE, by "
    "the law of capacity gap (stillhouse show capacity_gap_law)."
)


def add_flags(sub: argparse.ArgumentParser) -> None:
    sub.epilog = EPILOG
    sub.add_argument("folders", type=Path, nargs="*", help="--out folders of finished runs, or folders that hold such")
    sub.add_argument("--data", help="the new data, as of: stillhouse distill --data")
    sub.add_argument("--student", "--model", dest="model", help="the student to be trained, as of --student")
    teacher = "the teacher: RUN/students/NAME, whose report is read, or a name; where a size is asked also 7B or 6.7e9"
    sub.add_argument("--teacher", help=teacher)
    sub.add_argument("--student-size", help="of the student that needs a teacher: 3B, 6e8, or a model by name")
    sub.add_argument("--law", type=Path, help="a capacity_gap_law run, whose law is taken instead of the published one")
    sub.add_argument("--teacher-score", type=float, help="its accuracy on the new data, where no report has it")
    sub.add_argument("--limit", type=int, help="use only this many training samples")
    sub.add_argument("--learner", choices=["forest", "boosting"], default="forest", help="(default: forest)")
    sub.add_argument("--top", type=int, default=5, help="how many pipelines (default: 5)")
    sub.add_argument("--json", action="store_true", help="the advice as JSON")


def advice(args: argparse.Namespace) -> Advice:
    """What the flags ask for: pipelines, where there are folders or data; else a size.

    Raises:
        UserError: flags of both, or too few of either.
    """
    if args.folders or args.data is not None:
        return _pipelines(args)
    from stillhouse.recommend import advise_size

    for flag, value in (("--student", args.model), ("--teacher-score", args.teacher_score), ("--limit", args.limit)):
        if value is not None:
            raise UserError(
                f"recommend: {flag} is for run folders and --data; a size is asked by --teacher or --student-size"
            )
    return advise_size(args.teacher, args.student_size, args.law)


def _pipelines(args: argparse.Namespace) -> Advice:
    from stillhouse.options import Options as Every
    from stillhouse.recommend import advise, enough, new_task, read_runs

    if args.student_size is not None or args.law is not None:
        raise UserError("recommend: --student-size and --law ask for a size, without run folders and --data; drop them")
    if not args.folders or args.data is None:
        raise UserError("recommend: pipelines need both, folders of recorded runs and --data; a size needs neither")
    rows, unused = read_runs(args.folders, configured)
    enough(rows)  # before data are loaded
    about = {"data": args.data, "model": args.model, "teacher": args.teacher, "limit": args.limit}
    name, facts = new_task(**about, score=args.teacher_score)

    def flags(system: str) -> list[str]:
        takes = {f.name for f in dataclasses.fields(getattr(recipes.experiment(system), "OPTIONS", Every))}
        given = {k: v for k, v in about.items() if v is not None and k in takes}
        return [word for k, v in given.items() for word in (f"--{k}", str(v))]

    trained = args.teacher and (Path(args.teacher) / "plan.json").exists()
    how = {"top": args.top, "kind": args.learner, "without": ("teacher_epochs",) if trained else ()}
    found = advise(rows, facts, flags, configured, name=name, **how)
    found.notes += [f"Not used: {count} × {reason}." for reason, count in unused.items()]
    return found
