"""Plain distillation on real data, and on built-in digits every objective beside labels alone.

stillhouse distill --out runs/distill                          # digits: one student, and all objectives over seeds
stillhouse distill --teacher runs/r18/students/p00 --student torchvision:resnet18 --data cifar10 --out runs/small
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from stillhouse.data import Data, load, split
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.plain import train_teacher
from stillhouse.recipes.distill.recipe import Config, distill
from stillhouse.report import Claim, Curve, Report
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import mean, table, trials

OPTIONS = TeacherOptions
PRESET = Config(epochs=40, teacher_epochs=40, batch=64, optimizer="adamw", lr=3e-3, weight_decay=0.01)
TINY = replace(PRESET, objective=("kd:0.5?T=4", "attention:block2:10"), epochs=1, teacher_epochs=1)
TEACHER = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [16, 32, 64]})
STUDENT = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 6, 12]})
ARMS: dict[str, tuple[tuple[str, ...], float]] = {  # objectives and the weight of the labels, as their papers have them
    "labels alone": ((), 1.0),
    "kd": (("kd:0.9?T=4",), 0.1),
    "kd, standardised logits": (("standardised:0.9?T=2",), 0.1),
    "dkd": (("dkd:1?T=4&beta=2",), 1.0),
    "dist": (("dist:1?T=1",), 1.0),
    "pld": (("pld:1?T=3",), 0.0),
    "feature": (("feature:block2:1",), 1.0),
    "attention": (("attention:block2:10",), 1.0),
    "relational": (("rkd-distance:hidden:5", "rkd-angle:hidden:10"), 1.0),
    "contrastive": (("contrastive:hidden:0.5",), 1.0),
    "kd + feature": (("kd:0.9?T=4", "feature:block2:1"), 0.1),
}


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT) -> Family:
    """One run of about a second on 192 digits, for the contract table."""
    return distill(run, load("digits", limit=192), student, TEACHER.build(seed=fold(run.seed, "teacher")), cfg)


def main(run: Run, options: TeacherOptions, cfg: Config, command: str) -> Report | None:
    """One distillation as the command makes it; without flags also every objective on digits, over seeds."""
    data = options.load_data("digits")
    if options.own:
        if not options.teacher:
            raise UserError("--teacher is missing: give a trained network (RUN/students/NAME, timm:NAME, …)")
        student = options.spec(data, "stillhouse:cnn")
        network = options.network(student, run.seed)
        teachers, looks = options.each_teacher(data, fresh=bool(cfg.teacher_epochs))
        family = distill(run, data, student, teachers, cfg, network=network, looks=looks)
    else:
        family = distill(run, data, STUDENT, TEACHER.build(seed=fold(run.seed, "teacher")), cfg)
    report = describe(run, family, data, command) if run.main else None
    run.barrier()
    if not options.own:
        arms = trials(run, {arm: partial(once, *terms, cfg) for arm, terms in ARMS.items()}, options.children())
        if report is not None:
            report.claims += claims(arms, list(options.children()))
            columns = {
                "student %": ("accuracy", 100.0, 2),
                "NLL": ("nll", 1.0, 3),
                "agrees with the teacher %": ("agreement", 100.0, 2),
                "teacher %": ("teacher", 100.0, 2),
            }
            note = "mean ± standard deviation over seeds; 150 labelled digits for the student, 1,108 for its teacher"
            report.tables.append(table("Objectives on digits", arms, columns, note))
    return report


def once(objective: tuple[str, ...], label: float, cfg: Config, run: Run) -> dict[str, Any]:
    """A student of 150 digits under a teacher that learned from the other 1,108 training digits."""
    whole = load("digits")
    rest, few = split(whole.train, 150 / len(whole.train), seed=fold("few", run.seed))
    teacher = TEACHER.build(seed=fold(run.seed, "teacher"))
    train_teacher(run, "teacher", teacher, Data("digits", rest, whole.test), cfg)
    # As many steps as over all training digits: eight passes over these cost one over those.
    settings = replace(cfg, objective=objective, label=label, teacher_epochs=0.0, epochs=8 * cfg.epochs)
    family = distill(run, Data("digits", few, whole.test), STUDENT, teacher, settings)
    z, y = family.logits(whole.test)
    t, _ = predict(teacher, whole.test)
    own = classification(z[0], y)
    same = (z[0].argmax(1) == t.argmax(1)).float().mean()
    return {
        "accuracy": own["accuracy"],
        "nll": own["nll"],
        "agreement": float(same),
        "teacher": classification(t, y)["accuracy"],
    }


def claims(arms: Mapping[str, list[dict[str, Any]]], seeds: list[int]) -> list[Claim]:
    """What a user may expect of a teacher where labels are few."""
    alone = arms["labels alone"]
    gain = 100 * (mean(arms["kd"], "accuracy") - mean(alone, "accuracy"))
    closer = 100 * (mean(arms["kd"], "agreement") - mean(alone, "agreement"))
    better = [a for a in ARMS if a != "labels alone" and mean(arms[a], "accuracy") >= mean(alone, "accuracy")]
    every = len(ARMS) - 1
    return [
        Claim("kd − labels alone, accuracy in points", gain >= 0.5, gain, 0.5, seeds),
        Claim("kd − labels alone, agreement with the teacher in points", closer >= 0.5, closer, 0.5, seeds),
        Claim("objectives that do not fall behind labels alone", len(better) == every, len(better), every, seeds),
    ]


def describe(run: Run, family: Family, data: Data, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    names = sorted({k for r in family.logs for k in r} - {"step", "epoch", "accuracy"})
    lines: dict[str, Any] = {
        n: ([r["step"] for r in family.logs if n in r], [r[n] for r in family.logs if n in r]) for n in names
    }
    name = family.spec.name if family.spec else type(family.members[0].model).__name__
    return Report(
        system="distill", title=f"{type(family.base).__name__} into {name} on {data.name}", command=command,
        seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students, cost=family.cost,
        notes=[*data.notes, *family.notes], curves=[Curve("Loss by objective, as weighted", "step", "loss", lines)],
    )  # fmt: skip
