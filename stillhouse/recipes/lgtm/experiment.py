"""LGTM on real data; on built-in digits the claims of the card over seeds.

stillhouse run lgtm --out runs/lgtm
stillhouse run lgtm --data sst2 --teacher bert --model bag --lr 3e-3 --teacher-lr 1e-3 --compare --out runs/sst2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import plain
from stillhouse.data import Batches, Data, load, split, together
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.objectives import cross_entropy
from stillhouse.recipes.lgtm.recipe import Config, distill, helpful, parts
from stillhouse.recipes.lgtm.system import LGTM, Params, answer, norm, trained
from stillhouse.report import Claim, Curve, Image, Report, Table, grid
from stillhouse.system import Batch, Clock, fold, map_tensors
from stillhouse.teacher_options import TeacherOptions
from stillhouse.teachers import read_by_teachers
from stillhouse.trials import Arm, Results, claim, difference, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images or sentences, a student and a teacher, which is trained too."""

    compare: bool = False  # on your own data: also labels alone, a fixed teacher and the other settings, over seeds

    def idle(self, config: Any) -> Mapping[str, str]:
        """Comparisons run every form of the influence."""
        if not self.own:
            return {"compare": "the built-in experiment compares anyway"}
        return {} if self.compare else super().idle(config)


PRESET = Config(epochs=60, batch=32, lr=3e-3, teacher_lr=3e-3)
TINY = replace(PRESET, epochs=2, batch=32)
TEACHER = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [64, 64]})
STUDENT = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [12]})
ARMS: dict[str, Mapping[str, Any]] = {
    "co-trained": {"influence": "none"},
    "LGTM, released": {"influence": "released", "derivative": "fd"},
    "LGTM, student's loss": {"influence": "sgd", "derivative": "fd"},
    "LGTM, exact": {"influence": "exact", "derivative": "autograd"},
    "LGTM, exact, strength 10": {"influence": "exact", "derivative": "autograd", "strength": 10.0},
}
COLUMNS = {
    "student %": ("accuracy", 100.0, 2),
    "NLL": ("nll", 1.0, 3),
    "teacher %": ("teacher", 100.0, 2),
    "influence / own gradient": ("influence", 1.0, 4),
    "ms a step": ("ms", 1.0, 1),
}
BATCHES = 50  # of the check that the influence is a descent direction


class Task(NamedTuple):
    """What is compared: data with a held-out part, and networks by seed."""

    data: Data
    teacher: Callable[[int], nn.Module]
    student: ModelSpec
    look: Mapping[str, Any]


def digits(seed: int) -> Task:
    """300 digits to learn from, 100 held-out ones, all 539 test digits."""
    whole = load("digits")
    _, some = split(whole.train, 400 / len(whole.train), seed=fold("some", seed))
    train, judge = split(some, 100 / 400, seed=fold("judge", seed))
    data = Data("digits 300/100", train, whole.test, held_out=judge)
    return Task(data, lambda s: TEACHER.build(seed=fold(s, "teacher")), STUDENT, {})


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT, teacher: ModelSpec = TEACHER) -> Family:
    """One run of about a second on 128 digits, for the contract table."""
    return distill(run, load("digits", limit=128), student, teacher.build(seed=fold(run.seed, "teacher")), cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it; with the built-in data or --compare also all arms, over seeds."""
    seeds = list(options.children())
    if options.own:
        trained_already = options.teacher_weights or any((Path(t) / "plan.json").exists() for t in options.teacher)
        if cfg.zero_heads and trained_already:
            raise UserError("--teacher is trained already, and its head would be set to zero; add --no-zero-heads")
        data = options.load_data("digits")
        task = Task(data, partial(pupil, options, data), options.spec(data, "stillhouse:cnn"), {})
        tasks = dict.fromkeys(seeds, task) if options.compare else {}
        network = options.network(task.student, run.seed)
    else:
        tasks = {s: digits(s) for s in seeds}
        task, network = tasks[run.seed], None
    family = distill(run, task.data, task.student, task.teacher(run.seed), cfg, network=network)
    report = describe(run, family, task.data, cfg, command) if run.main else None
    run.barrier()
    if tasks:
        arms = trials(run, arms_of(tasks, cfg), seeds)
        note = f"mean ± standard deviation over seeds; {len(parts(task.data, cfg, run.seed)[0])} training samples"
        if report is not None:
            report.tables.append(table("Arms", arms, COLUMNS, note))
            times = mean(arms["LGTM, released"], "ms") / mean(arms["co-trained"], "ms")
            report.notes.append(f"a step of LGTM as released takes {times:.1f} times as long as one of co-training")
        if not options.own:
            slope = {"slope": partial(descent, tasks, cfg)}
            found = trials(run, slope, seeds)["slope"]
            if report is not None:
                report.claims += claims(arms, found, seeds)
                report.tables.append(slopes(found))
    return report


def pupil(options: OPTIONS, data: Data, seed: int) -> nn.Module:
    """The teacher by name, with published weights and a fresh head where ``--pretrained`` asks for them."""
    if len(options.teacher) != 1:
        raise UserError(f"one --teacher is needed, and it is trained with the student, got {len(options.teacher)}")
    name = options.teacher[0]
    if options.pretrained and name.partition(":")[0] in ("torchvision", "timm") and not options.teacher_weights:
        stem = options.stem if name.startswith("torchvision") else "keep"
        return ModelSpec(name, len(data.classes), tuple(data.shape), stem).build(seed=seed, pretrained=True)
    models, look = replace(options, seed=seed).teachers(data, fresh=True)
    if look:
        raise UserError("--teacher-size: student and teacher read the same batch here; give --image-size for both")
    return models[0].requires_grad_(True)


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    rows = [r for r in family.logs if "student" in r]
    steps = [float(r["step"]) for r in rows]
    keys = {"student": "student L_s", "teacher": "teacher L_t", "held_out": "student, held out, one step ahead"}
    lines = {label: (steps, [r[k] for r in rows]) for k, label in keys.items() if k in rows[0]}
    curves = [Curve("Losses", "step", "nats", lines)]
    if "influence" in rows[0]:
        share = {"influence": (steps, [r["influence"] for r in rows])}
        curves.append(Curve("Influence against the teacher's own gradient", "step", "ratio of norms", share))
    name = family.spec.name if family.spec else type(family.members[0].model).__name__
    images, tables = samples_that_help(family, data, cfg, run)
    return Report(
        system="lgtm", title=f"LGTM · {type(family.base).__name__} with {name} on {data.name}", command=command,
        seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students, cost=family.cost,
        notes=[*data.notes, *family.notes], curves=curves, images=images, tables=tables,
    )  # fmt: skip


def samples_that_help(family: Family, data: Data, cfg: Config, run: Run) -> tuple[list[Image], list[Table]]:
    """The training samples whose distillation helps or harms the student most on held-out data."""
    student = family.members[0].model
    ids, found = helpful(student, family.base, data, cfg, seed=run.seed, device=run.device)
    for model in (student, family.base):
        model.cpu()
    order = found.argsort(descending=True)
    most = [*order[:8].tolist(), *order[-8:].tolist()]
    batch: Batch = parts(data, cfg, run.seed)[0].take(ids[most].numpy())
    tokenizer = getattr(data.train, "tokenizer", None)
    what = [f"{i}" for i in batch["id"].tolist()]
    if tokenizer is not None:
        what = tokenizer.batch_decode(batch["input"]["input_ids"], skip_special_tokens=True)
    named = [data.classes[y] for y in batch["label"].tolist()]
    rows: list[list[Any]] = [[w, y, f"{float(found[k]):+.2e}"] for w, y, k in zip(what, named, most, strict=True)]
    note = "⟨∇F, ∇KL_i⟩: to first order, what a step on the sample takes off the held-out loss, per unit of step size"
    tables = [Table("Samples that help the student most, and least", ["sample", "label", "influence"], rows, note)]
    x = batch["input"]
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] not in (1, 3):
        return [], tables
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    picture = grid((x - low) / (high - low).clamp(min=1e-6), columns=8, captions=named)
    return [Image("Samples that help the student most (first row), and least", picture)], tables


# -- the claims of the card --------------------------------------------------------------------------------------


def arms_of(tasks: Mapping[int, Task], cfg: Config) -> dict[str, Arm]:
    """Labels alone, a fixed teacher, both trained together, and LGTM in its three forms."""
    made: dict[str, Arm] = {
        "labels alone": partial(alone, tasks, cfg, (), 1.0),
        "fixed teacher": partial(alone, tasks, cfg, ("kd:1?T=1",), 0.0),
    }
    return made | {arm: partial(both, tasks, replace(cfg, **changes)) for arm, changes in ARMS.items()}


def alone(tasks: Mapping[int, Task], cfg: Config, objective: tuple[str, ...], label: float, run: Run) -> dict[str, Any]:
    """A plain student; its teacher, where it has one, learned the labels for as many passes and is fixed."""
    task = tasks[run.seed]
    data = Data(task.data.name, parts(task.data, cfg, run.seed)[0], task.data.test)
    teacher = task.teacher(run.seed)
    if objective:
        plain.train_teacher(run, "teacher", teacher, data, replace(cfg.teachers(), teacher_epochs=cfg.epochs))
    settings = replace(cfg.plain(objective, label), teacher_epochs=0.0)
    family = plain.distill(run, data, task.student, teacher, settings)
    return judged(family, task, teacher if objective else None)


def both(tasks: Mapping[int, Task], cfg: Config, run: Run) -> dict[str, Any]:
    task = tasks[run.seed]
    teacher = task.teacher(run.seed)
    family = distill(run, task.data, task.student, teacher, cfg)
    shares = [r["influence"] for r in family.logs if "influence" in r]
    return judged(family, task, teacher) | {"influence": float(np.median(shares)) if shares else None}


def judged(family: Family, task: Task, teacher: nn.Module | None) -> dict[str, Any]:
    z, y = predict(family["student"].model, task.data.test)
    own = classification(z, y)
    found = {"accuracy": own["accuracy"], "nll": own["nll"], "ms": 1e3 * family.cost["seconds"] / family.cost["steps"]}
    if teacher is not None:
        read = read_by_teachers(task.data.test.take(np.arange(1)))
        found["teacher"] = classification(*predict(teacher, task.data.test, read=read))["accuracy"]
    return found


def descent(tasks: Mapping[int, Task], cfg: Config, run: Run) -> dict[str, Any]:
    """In a run that is a third done: part of the batches in which a small step by the influence lowers F.

    F is the held-out loss of the student after its next AdamW step under that teacher, all in float64 and eval mode.
    """
    task = tasks[run.seed]
    train, judge = parts(task.data, cfg, run.seed)
    student, teacher = task.student.build(seed=run.seed), task.teacher(run.seed)
    system = LGTM(student, teacher, replace(cfg, influence="none"), plain.schedule(task.data, cfg.plain(), cfg.epochs))
    source = together(train=Batches(train, cfg.batch), held_out=Batches(judge, cfg.batch, seed_with="held out"))
    third = max(1, round(cfg.epochs * source.steps_per_epoch / 3))
    fit(run, "start", system, source, steps=third, settings=cfg)
    system.cpu().double().eval()
    found: dict[str, Any] = {"cosine": []}
    for k in range(BATCHES):
        clock = Clock(seed=fold(run.seed, "descent"), step=third + k, steps=3 * third, steps_per_epoch=3 * third)
        batch = {name: double(b) for name, b in source.batch(clock).items()}
        directions = {}
        for how in ("exact", "sgd", "released"):
            system.cfg = replace(cfg, influence=how)
            directions[how], before = system.influence(batch["train"], batch["held_out"], clock)
            after = foreseen_loss(system, batch, clock, directions[how])
            found.setdefault(how, []).append(float(after < before))
        a, b = (torch.cat([g.flatten() for g in directions[how]]) for how in ("exact", "released"))
        found["cosine"].append(float(torch.cosine_similarity(a, b, dim=0)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def double(batch: Batch) -> Batch:
    return map_tensors(batch, lambda t: t.double() if t.is_floating_point() else t)


def foreseen_loss(system: LGTM, batch: Mapping[str, Batch], clock: Clock, direction: list[Tensor]) -> Tensor:
    """F when the teacher has gone 1e-4 of the length of its weights against a direction."""
    teacher, theta, train, held = trained(system.teacher), trained(system.student), batch["train"], batch["held_out"]
    size = 1e-4 * norm(list(teacher.values())) / norm(direction).clamp(min=1e-300)
    moved = {k: p.detach() - size * g for (k, p), g in zip(teacher.items(), direction, strict=True)}
    leaves: Params = {k: p.detach().requires_grad_() for k, p in theta.items()}
    t = answer(system.teacher, moved, train[system.read])
    loss = system.student_loss(t, answer(system.student, leaves, train["input"]), train["label"])
    after = dict(zip(theta, system.foreseen(torch.autograd.grad(loss, list(leaves.values())), clock), strict=True))
    with torch.no_grad():
        return cross_entropy(answer(system.student, after, held["input"]), held["label"]).mean()


def claims(arms: Results, found: list[dict[str, Any]], seeds: list[int]) -> list[Claim]:
    """The card's claims with the card's thresholds."""
    exact, released = (mean(found, how) for how in ("exact", "released"))
    made = [
        Claim("a small step along the exact influence lowers F: part of the batches", exact >= 0.9, exact, 0.9, seeds),
        Claim("the same along the released form: part of the batches", released > 0.5, released, 0.5, seeds),
    ]
    for arm in ("LGTM, exact", "LGTM, released"):
        gain = difference(arms[arm], arms["co-trained"], "accuracy", 100.0)
        made.append(claim(f"{arm} − co-trained, accuracy in points", gain, -0.5, seeds))
    return made


def slopes(found: list[dict[str, Any]]) -> Table:
    names = {"exact": "exact", "sgd": "student's loss, plain step", "released": "released"}
    rows: list[list[Any]] = [[label, f"{100 * mean(found, how):.0f} %"] for how, label in names.items()]
    rows.append(["cosine of released and exact", f"{mean(found, 'cosine'):.2f}"])
    note = f"{BATCHES} batches a seed, a third of the way through; F: the held-out loss after the student's next step"
    return Table("Batches in which a small step along the influence lowers F", ["form", "measured"], rows, note)
