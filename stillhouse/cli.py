"""The command: list, show, run, resume, report, compare, recommend, export.

Exit codes: 0 success, 2 a mistake in what was asked (one line says which), 130 interrupted (and resumable).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stillhouse import __version__, recipes, recommending
from stillhouse.errors import Interrupted, UserError, did_you_mean
from stillhouse.flags import parse_flags, refuse_idle, settings

if TYPE_CHECKING:
    from stillhouse.options import Options

RUN_FORMAT = 1
FAMILIES = {
    "model": "Smaller models",
    "data": "Smaller data sets",
    "sampler": "Smaller or faster samplers",
    "policy": "Lighter policies",
    "query": "Better queries",
    "graph": "Smaller graphs",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if known:
            choices = re.findall(r"[\w-]+", known[2])
            message = f"no command {known[1]!r}; {did_you_mean(known[1], choices)}"
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``stillhouse`` command; always ends the process with its exit code."""
    sys.exit(invoke(list(sys.argv[1:] if argv is None else argv)))


def invoke(argv: list[str]) -> int:
    """Runs one command line and gives its exit code."""
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # of libraries we import; not the user's to mend
    try:
        if argv[:1] == ["distill"]:  # the plain thing has a command of its own
            argv = ["run", *argv]
        args = build_parser().parse_args(argv[:2] if argv[:1] == ["run"] else argv)
        if argv[:1] == ["run"]:
            args.flags = argv[2:]
        with _sigterm_interrupts():
            args.do(args)
        return 0
    except UserError as error:
        return said(2, f"stillhouse: error: {error}")
    except Interrupted as error:
        return said(130, f"stillhouse: {error}")
    except KeyboardInterrupt:
        return said(130, "stillhouse: interrupted; start the command again")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        return said(2, f"stillhouse: error: {error.strerror}: {error.filename or ''}".rstrip(": "))


def said(code: int, line: str) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        print(" ".join(line.split()), file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="stillhouse",
        description="Distillation in one command: one run, a whole family of smaller models.",
        epilog="Start here: stillhouse run wml --out runs/first    then open runs/first/report.html",
    )
    parser.add_argument("--version", action="version", version=f"stillhouse {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, do: Callable[[Any], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(do=do)
        return sub

    sub = command("list", do_list, "list the systems, grouped by what they make smaller")
    sub.add_argument("--json", action="store_true", help="name, title, family, gives, source_quality of each, as JSON")
    sub = command("show", do_show, "show a system: what it gives, when to use it and when not, cost, options")
    sub.add_argument("system", help="a name from: stillhouse list")
    command("distill", do_run, "distil any teacher into any student (its flags: stillhouse distill --help)")
    sub = command("run", do_run, "run a system (its flags: stillhouse run SYSTEM --help)")
    sub.add_argument("system", help="a name from: stillhouse list")
    sub = command("resume", do_resume, "go on with an interrupted run, bit for bit as if it had not stopped")
    sub.add_argument("folder", type=Path, help="the run's --out folder")
    sub = command("report", do_report, "print a run's report and draw its page again from report.json")
    sub.add_argument("folder", type=Path, help="the run's --out folder")
    sub.add_argument("--alpha", type=float, help="weight of size in the distillation score (default: as rated before)")
    sub = command("compare", do_compare, "compare the reports of several runs side by side")
    sub.add_argument("folders", type=Path, nargs="+", help="two or more runs' --out folders")
    sub.add_argument("--alpha", type=float, default=0.5, help="weight of size in the distillation score (default: 0.5)")
    sub.add_argument("--json", action="store_true", help="the comparison as JSON")
    sub = command("recommend", do_recommend, "say which pipelines to try on new data, or how large a teacher to take")
    recommending.add_flags(sub)
    sub = command("export", do_export, "export students to a deployable file and check it against PyTorch")
    sub.add_argument("folder", type=Path, help="a run's --out folder, or one student's folder in it")
    sub.add_argument(
        "--to", required=True, choices=["onnx", "onnx-packed", "torch-export", "safetensors"], help="file format"
    )
    sub.add_argument("--student", help="only this student (default: all)")
    sub.add_argument("--out", type=Path, help="folder for the files (default: RUN/exports)")
    return parser


# -- listing ------------------------------------------------------------------------------------------------


def do_list(args: argparse.Namespace) -> None:
    cards = [recipes.card(name) for name in recipes.names()]
    if args.json:
        keys = ("name", "title", "family", "gives", "source_quality")
        print(json.dumps([{k: getattr(c, k) for k in keys} for c in cards], indent=2))
        return
    for family, heading in FAMILIES.items():
        mine = [c for c in cards if c.family == family]
        if mine:
            print(f"{heading}\n")
            for c in mine:
                print(f"  {c.name:<24} {c.title}\n  {'':<24} gives {c.gives}\n")
    print("More about one: stillhouse show NAME")


def do_show(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    card = recipes.card(args.system)
    console = Console()
    console.print(Markdown(card.page.read_text()))
    facts = Table(show_header=False, box=None, title="In short", title_justify="left", padding=(0, 2, 0, 0))
    quality = f"{card.source_quality} ({card.paper})"
    for name, text in (
        ("gives", card.gives),
        ("sources", quality),
        ("run it", f"stillhouse run {card.name} --out DIR"),
    ):
        facts.add_row(name, text)
    options = Table("option", "default", "meaning", title=f"Options of {card.name}", title_justify="left")
    config = recipes.find(args.system).Config
    for field, meaning in recipes.comments(config).items():
        default = next(f for f in dataclasses.fields(config) if f.name == field).default
        options.add_row(f"--{field.replace('_', '-')}", shown_value(default), meaning)
    console.print("", facts, "", options, "Options of every system, and the defaults of the built-in experiment: ")
    console.print(f"  stillhouse run {card.name} --help", highlight=False)


def shown_value(value: Any) -> str:
    """A default as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# -- running ------------------------------------------------------------------------------------------------


def do_run(args: argparse.Namespace) -> None:
    options, config = parse_flags(args.system, args.flags)
    refuse_idle(args.flags, options, config)
    claim_folder(options, config, args.system, args.flags)
    execute(args.system, args.flags, options, config)


def do_resume(args: argparse.Namespace) -> None:
    from stillhouse.files import read_json

    path = args.folder / "run.json"
    if not path.exists():
        raise UserError(f"{args.folder} holds no run to resume (no run.json); start one with: stillhouse run SYSTEM")
    saved = check_run(read_json(path), path)
    options, config = parse_flags(saved["system"], saved["flags"])
    options = dataclasses.replace(options, out=args.folder)
    now = settings(options, config)
    if now != saved["settings"]:
        from stillhouse.checkpoint import difference

        raise UserError(
            f"{path}: its settings no longer mean what they did ({difference(saved['settings'], now)}); "
            "resume with the Stillhouse that began it, or start a new run"
        )
    execute(saved["system"], saved["flags"], options, config)


def check_run(saved: Any, path: Path) -> dict[str, Any]:
    """run.json as `claim_folder` wrote it, or one line that says what is wrong with it."""
    kinds = {"format": int, "system": str, "flags": list, "settings": dict}
    found = saved if isinstance(saved, dict) else {}
    if isinstance(found.get("format"), int) and found["format"] > RUN_FORMAT:
        raise UserError(
            f"{path} was written by a newer Stillhouse (format {found['format']}); pip install -U stillhouse"
        )
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise UserError(f"{path} is damaged ({name} is missing or no {kind.__name__}); start a new run")
    return {**found, "flags": [str(f) for f in found["flags"]]}


def execute(system: str, flags: Sequence[str], options: Options, config: Any) -> None:
    from rich.console import Console

    command = shlex.join(["stillhouse", "run", system, *flags])
    try:
        run = options.run()
        report = recipes.experiment(system).main(run, options, config, command)
        if report is not None:
            from stillhouse.report import summary, write

            page = write(report, options.out)
            Console().print(summary(report))
            print(f"report: {page.resolve()}")
    except (Interrupted, KeyboardInterrupt) as error:  # also while the report is written
        raise Interrupted(f"{str(error) or 'interrupted'}; go on with: stillhouse resume {options.out}") from None
    run.close()


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is Ctrl-C; while a stage trains, `fit` hears both itself and saves first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def claim_folder(options: Options, config: Any, system: str, flags: Sequence[str]) -> None:
    """Makes the out folder and notes the command in it; refuses a folder that holds something else."""
    from stillhouse.files import read_json, write_json

    if int(os.environ.get("RANK", "0")) != 0:
        return
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    # A kill may leave hidden files; a run that was refused before its first step leaves run.json alone.
    if out.exists() and {p.name for p in out.iterdir() if not p.name.startswith(".")} - {"run.json"}:
        if not (out / "run.json").exists():
            raise UserError(f"--out {out} is not empty; give a new folder")
        saved = check_run(read_json(out / "run.json"), out / "run.json")
        now = settings(options, config)
        if saved["system"] == system and saved["settings"] == now:
            raise UserError(f"--out {out} holds this very run; go on with it: stillhouse resume {out}")
        from stillhouse.checkpoint import difference

        what = difference({"system": saved["system"], **saved["settings"]}, {"system": system, **now})
        raise UserError(f"--out {out} holds a run with other settings ({what}); give a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from None
    write_json(
        out / "run.json",
        {
            "format": RUN_FORMAT,
            "stillhouse": __version__,
            "system": system,
            "flags": list(flags),
            "settings": settings(options, config),
        },
    )


# -- afterwards ---------------------------------------------------------------------------------------------


def do_report(args: argparse.Namespace) -> None:
    from rich.console import Console

    from stillhouse.report import Report, rate, summary, write

    report = rate(Report.read(args.folder), args.alpha)
    page = write(report, args.folder)
    Console().print(summary(report))
    print(f"report: {page.resolve()}")


def do_compare(args: argparse.Namespace) -> None:
    from rich.console import Console

    from stillhouse.report import Report, compare, read_arms

    if len(args.folders) < 2:
        raise UserError("compare needs two or more run folders")
    arms = [read_arms(f) for f in args.folders]
    reports, labels = [Report.read(f) for f in args.folders], [str(f) for f in args.folders]
    shown, facts = compare(reports, labels, alpha=args.alpha, arms=arms)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        Console().print(shown)


def do_recommend(args: argparse.Namespace) -> None:
    from stillhouse.files import strict

    advice = recommending.advice(args)
    print(json.dumps(strict(advice.facts), indent=2) if args.json else "\n".join(advice.lines()))


def do_export(args: argparse.Namespace) -> None:
    from stillhouse.export import SUFFIX, export
    from stillhouse.files import inside, read_json
    from stillhouse.outcomes import example_inputs, load

    folder: Path = args.folder
    if (folder / "plan.json").exists():
        students, home = [folder], folder.resolve().parent.parent
    else:
        students = sorted(p.parent for p in folder.glob("students/*/plan.json"))
        home = folder
    if args.student:
        known = [p.name for p in students]
        students = [p for p in students if p.name == args.student]
        if not students:
            raise UserError(f"{folder} has no student {args.student!r}; {did_you_mean(args.student, known)}")
    if not students:
        raise UserError(f"{folder} holds no students (no students/NAME/plan.json); give a run's --out folder")
    if args.to == "onnx-packed" and not args.student:  # of the others there is nothing to pack
        packed = [p for p in students if any(e.get("kind") == "pack" for e in read_json(p / "plan.json")["edits"])]
        students = packed or students
    for student in students:
        model, plan = load(student), student / "plan.json"
        example = example_inputs(read_json(plan), str(plan))
        target = inside(args.out or home / "exports", student.name + SUFFIX[args.to])
        target.parent.mkdir(parents=True, exist_ok=True)
        parity = export(model, example, args.to, target)
        print(
            f"{student.name}: {parity.path}  {parity.bytes / 1e6:.2f} MB  "
            f"max difference to PyTorch {parity.max_abs_diff:.2e} (relative {parity.max_rel_diff:.2e}) "
            f"over {parity.samples} samples"
        )
