"""LELP on real data; on built-in digits, even against odd, the claims of the card over seeds.

stillhouse run lelp --out runs/lelp
stillhouse run lelp --data sst2 --teacher bert --teacher-epochs 4 --model bag --compare --out runs/sst2
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import nn

from stillhouse import plain
from stillhouse.data import Batches, Data, Samples, load, split
from stillhouse.data.pools import Labelled, Regrouped, open_pool
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, fidelity, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.recipes.lelp.recipe import Config, distill
from stillhouse.recipes.lelp.subclasses import Subclasses, SubclassTeacher, answers, head_of
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.score import Interval
from stillhouse.students.grouped import Grouped, grouped_head
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.teachers import Asked, Frozen, read_by_teachers
from stillhouse.trials import Arm, Results, claim, difference, table, trials


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images or sentences, a student and its teacher."""

    BRINGS: ClassVar[tuple[str, ...]] = (*TeacherOptions.BRINGS, "unlabelled")

    seeds: int = 6  # seeds for the claims of the built-in experiment, and for --compare
    compare: bool = False  # on your own data: also labels alone, plain distillation and other settings, over seeds
    unlabelled: str | None = None  # more training inputs: folder:PATH of images, or data by name, labels not read


PRESET = Config(teacher_epochs=20, epochs=60, batch=64, lr=3e-3)
TINY = replace(PRESET, subclasses=3, label=0.1, epochs=2, teacher_epochs=2)
TEACHER = ModelSpec("stillhouse:mlp", 2, (1, 8, 8), options={"widths": [64]})
STUDENT = ModelSpec("stillhouse:mlp", 2, (1, 8, 8), options={"widths": [16]})
GROUPS = {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}
Changes = Mapping[str, Any]
LELP: dict[str, Changes] = {
    "LELP S=1": {"subclasses": 1},
    "LELP S=5, β=0.5": {"subclasses": 5, "beta": 0.5},
    "LELP S=5, β=1": {"subclasses": 5, "beta": 1.0},
    "LELP S=10, β=0.5": {"subclasses": 10, "beta": 0.5},
    "LELP S=10, β=1": {"subclasses": 10, "beta": 1.0},
    "empty, S=5": {"subclasses": 5, "beta": float("inf")},
    "empty, S=10": {"subclasses": 10, "beta": float("inf")},
}
ABLATIONS: dict[str, Changes] = {
    "S=5 with what the head sees": {"subclasses": 5, "beta": 0.5, "null_space": False},
    "S=10 with what the head sees": {"subclasses": 10, "beta": 0.5, "null_space": False},
    "S=5 not rotated": {"subclasses": 5, "beta": 0.5, "rotate": False},
    "S=10 not rotated": {"subclasses": 10, "beta": 0.5, "rotate": False},
}
KD = {"KD T=1": "kd:1?T=1", "KD T=4": "kd:1?T=4"}
LONG = 4  # times as many steps, to see what is left of the gain


class Task(NamedTuple):
    """What is compared: the teacher's data and the student's, and networks by seed."""

    many: Data
    few: Data
    teacher: Callable[[int], nn.Module]
    student: ModelSpec
    look: Mapping[str, Any]
    hidden: np.ndarray | None = None  # sub-classes of few.train that no method but the oracle is told


def digits(seed: int) -> Task:
    """Even against odd: 900 digits for the teacher, 300 of them for the student, all 539 test digits."""
    whole = load("digits")
    _, many = split(whole.train, 900 / len(whole.train), seed=fold("many", seed))
    _, few = split(many, 300 / 900, seed=fold("few", seed))
    test = Regrouped(whole.test, GROUPS)
    taught, own = (Data(f"even or odd, {len(part)} digits", Regrouped(part, GROUPS), test) for part in (many, few))
    hidden = 5 * (few.labels % 2) + few.labels // 2
    return Task(taught, own, lambda s: TEACHER.build(seed=fold(s, "teacher")), STUDENT, {}, hidden)


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT, pool: bool = False) -> Family:
    """One run of about a second on even and odd digits, for the contract table; with unlabelled ones when asked."""
    few = load("digits", limit=192)
    data = Data("even or odd", Regrouped(few.train, GROUPS), Regrouped(few.test, GROUPS))
    more: Samples | None = open_pool("digits", data.train) if pool else None
    return distill(run, data, student, TEACHER.build(seed=fold(run.seed, "teacher")), cfg, unlabelled=more)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One distillation as the command makes it; with the built-in data or --compare also all arms, over seeds."""
    own, seeds = options.own, list(options.children())
    if own:
        if len(options.teacher) != 1:
            raise UserError(f"one --teacher is needed, for its embedding is read, got {len(options.teacher)}")
        data = options.load_data("digits")
        student = options.spec(data, "stillhouse:cnn")
        models, look = options.teachers(data, fresh=bool(cfg.teacher_epochs))
        more = options.open_pool(options.unlabelled, data)
        network = options.network(student, run.seed)
        family = distill(run, data, student, models[0], cfg, unlabelled=more, network=network, **look)

        def again(seed: int) -> nn.Module:
            return replace(options, seed=seed).teachers(data, fresh=bool(cfg.teacher_epochs))[0][0]

        tasks = {s: Task(data, data, again, student, look) for s in seeds} if options.compare else {}
    else:
        tasks = {s: digits(s) for s in seeds}
        data, teacher = tasks[run.seed].few, taught(run, tasks[run.seed], cfg, run.seed)
        family = distill(run, data, STUDENT, teacher, replace(cfg, teacher_epochs=0.0))
    report = describe(run, family, data, command) if run.main else None
    run.barrier()
    if tasks:
        arms = trials(run, arms_of(run, tasks, cfg, whole=not own), seeds)
        if report is not None:
            note = f"mean ± standard deviation over seeds; {len(tasks[seeds[0]].few.train)} samples for the student"
            note += "" if own else f"; long: {LONG} times as many steps"
            report.tables.append(table("Arms", arms, COLUMNS, note))
            report.claims += [] if own else claims(arms, seeds)
            report.tables += [] if own else [caught(run, family.base, cfg)]
    return report


COLUMNS = {
    "student %": ("accuracy", 100.0, 2),
    "NLL": ("nll", 1.0, 3),
    "agrees with the teacher %": ("teacher_agreement", 100.0, 2),
    "bits of sub-classes": ("subclass_bits", 1.0, 2),
    "teacher %": ("teacher", 100.0, 2),
    "seconds": ("seconds", 1.0, 1),
}


def describe(run: Run, family: Family, data: Data, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    rows = [r for r in family.logs if "subclasses" in r]
    steps = [float(r["step"]) for r in rows]
    loss = {"sub-classes": (steps, [float(r["subclasses"]) for r in rows])}
    same = {"student": (steps, [float(r["agreement"]) for r in rows])}
    name = family.spec.options["body"]["name"] if family.spec else type(family.members[0].model).__name__
    return Report(
        system="lelp", title=f"LELP · {type(family.base).__name__} into {name} on {data.name}", command=command,
        seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students, cost=family.cost,
        notes=[*data.notes, *family.notes],
        curves=[
            Curve("Loss", "step", "nats", loss),
            Curve("Same class as the teacher", "step", "part of the batch", same),
        ],
    )  # fmt: skip


# -- the claims of the card --------------------------------------------------------------------------------------


def taught(run: Run, task: Task, cfg: Config, seed: int) -> nn.Module:
    """The teacher of a seed, which all arms share; trained once."""
    model = task.teacher(seed)
    if cfg.teacher_epochs:
        plain.train_teacher(
            run.child(f"teacher-{seed}", seed=seed, quiet=True), "teacher", model, task.many, cfg.plain()
        )
    return model


def arms_of(run: Run, tasks: Mapping[int, Task], cfg: Config, whole: bool) -> dict[str, Arm]:
    """Labels alone, KD, LELP and its controls; with the oracle and the ablations where the sub-classes are known."""

    def once(learn: Callable[..., Any], times: int = 1) -> Arm:
        return partial(measured, run, tasks, cfg, learn, times)

    made = {"labels alone": once(partial(by_objective, ((), 1.0)))}
    made |= {arm: once(partial(by_objective, ((objective,), 0.0))) for arm, objective in KD.items()}
    made |= {arm: once(partial(by_subclasses, c)) for arm, c in LELP.items()}
    if not whole:
        return made
    made |= {arm: once(partial(by_subclasses, c)) for arm, c in ABLATIONS.items()}
    made |= {"oracle": once(by_oracle), "oracle, long": once(by_oracle, LONG)}
    made["KD T=1, long"] = once(partial(by_objective, ((KD["KD T=1"],), 0.0)), LONG)
    return made | {f"{arm}, long": once(partial(by_subclasses, LELP[arm]), LONG) for arm in list(LELP) if "0.5" in arm}


def measured(
    run: Run, tasks: Mapping[int, Task], cfg: Config, learn: Callable[..., Any], times: int, child: Run
) -> dict[str, Any]:
    """One student of one seed on the test data, beside its teacher."""
    task = tasks[child.seed]
    teacher, began = taught(run, task, cfg, child.seed), time.monotonic()
    student, facts = learn(child, task, teacher, replace(cfg, teacher_epochs=0.0, epochs=times * cfg.epochs))
    seconds = time.monotonic() - began
    z, y = predict(student, task.few.test)
    read = read_by_teachers(task.few.test.take(np.arange(1)))
    said = Asked(Frozen(teacher, input=read, **task.look), [teacher]) if task.look else teacher
    t, _ = predict(said, task.few.test, read=read)
    own = classification(z, y)
    known = {"teacher": classification(t, y)["accuracy"], "subclass_bits": facts.get("subclass_bits")}
    return {"accuracy": own["accuracy"], "nll": own["nll"], **fidelity(t, z), **known, "seconds": seconds}


Objectives = tuple[tuple[str, ...], float]  # and the weight of the labels


def by_objective(how: Objectives, run: Run, task: Task, teacher: nn.Module, cfg: Config) -> Any:
    family = plain.distill(run, task.few, task.student, teacher, cfg.plain(*how), **task.look)
    return family["student"].model, family.cost


def by_subclasses(changes: Changes, run: Run, task: Task, teacher: nn.Module, cfg: Config) -> Any:
    family = distill(run, task.few, task.student, teacher, replace(cfg, **changes), **task.look)
    return family["student"].model, family.cost


def by_oracle(run: Run, task: Task, teacher: nn.Module, cfg: Config) -> tuple[Grouped, Changes]:
    """The ten digits as labels, summed to two classes afterwards."""
    train = task.few.train
    network = task.student.build(seed=run.seed)
    student, _ = grouped_head(network, train.take(np.arange(2))["input"], 2, 5, seed=run.seed)
    told = Labelled(train, task.hidden, tuple(map(str, range(10))))
    settings = cfg.plain()
    system = Distill(
        student.body, None, objectives=(), optimizer=plain.optimizer_of(settings), clip=cfg.clip or None,
        lr=plain.schedule(task.few, settings, cfg.epochs),
    )  # fmt: skip
    fit(run, "oracle", system, Batches(told, cfg.batch), epochs=cfg.epochs, settings=cfg)
    return student.cpu().eval(), {}


def claims(arms: Results, seeds: list[int]) -> list[Claim]:
    """The card's claims with the card's thresholds, paired by seed."""

    def points(a: str, b: str) -> Interval:
        return difference(arms[a], arms[b], "accuracy", 100.0)

    made = []
    for s in (5, 10):
        name = f"LELP S={s}, β=0.5"
        made += [
            claim(f"{name} − KD at T = 1, accuracy in points", points(name, "KD T=1"), 0.4, seeds),
            claim(f"oracle − {name}, accuracy in points", points("oracle", name), 0.0, seeds),
            claim(f"{name} − the same head told nothing (empty), points", points(name, f"empty, S={s}"), 0.0, seeds),
        ]
    return made


def caught(run: Run, teacher: nn.Module, cfg: Config) -> Table:
    """Where the sub-classes of the targets fall: mean r within the own class, by the digit that no label names."""
    test = load("digits").test
    at, _ = head_of(teacher, test.take(np.arange(2))["input"], 2)
    found, _ = Subclasses.load(run.folder / "subclasses")
    h, _, y = answers(SubclassTeacher(teacher, at), test, np.arange(len(test)), run.device)
    r = (found.scores(h) / cfg.beta).softmax(-1)
    rows: list[list[Any]] = []
    for digit in [d for group in GROUPS.values() for d in group]:
        mine = r[y == digit, digit % 2].mean(0)
        rows.append([f"{digit} ({'odd' if digit % 2 else 'even'})", *(f"{100 * v:.0f}" for v in mine.tolist())])
    columns = ["digit", *(f"sub-class {k + 1}" for k in range(r.shape[-1]))]
    note = "mean part of each of its class's sub-classes in %, test digits; the teacher was told even and odd alone"
    return Table("Where the sub-classes fall", columns, rows, note)
