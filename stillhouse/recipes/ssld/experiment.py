"""SSLD on a user's teacher, student and pool, and on built-in digits pools of three sizes over seeds.

stillhouse run ssld --out runs/ssld                          # digits: one student, and all arms over seeds
stillhouse run ssld --data folder:labelled --pool folder:photos --teacher runs/big/students/student --out runs/small
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from stillhouse.data import Batches, Data, Subset, load
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.files import read_json
from stillhouse.models import ModelSpec
from stillhouse.plain import Plain, train_teacher
from stillhouse.recipes.ssld.config import Config
from stillhouse.recipes.ssld.recipe import distill
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import mean, table, trials
from stillhouse.weights import cosine


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images, a student, its teacher and a pool of images without labels."""

    BRINGS: ClassVar[tuple[str, ...]] = (*TeacherOptions.BRINGS, "pool", "fix_size")

    pool: str | None = None  # images without labels: folder:PATH (files at any depth), or data by name, labels not read
    fix_size: int | None = None  # side of the images that the student is for; its last layer is tuned to it at the end
    seeds: int = 6  # seeds for the claims of the built-in experiment

    def idle(self, config: Any) -> Mapping[str, str]:
        """Settings of the pool and of the tuning to another size do nothing without them."""
        found = dict(super().idle(config))
        if self.own and self.pool is None:
            found |= dict.fromkeys(("per_class", "radius"), "there is no --pool")
        if self.own and self.fix_size is None:
            found |= dict.fromkeys(("fix_epochs", "fix_lr"), "there is no --fix-size")
        return found


PRESET = Config(steps=1500, batch=64, per_class=0, lr=0.01, finetune_epochs=20, teacher_lr=0.1)
TINY = replace(PRESET, steps=0, epochs=1, batch=32, per_class=8, finetune_epochs=1, teacher_epochs=1)
TEACHER = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [16, 32, 64]})
STUDENT = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [10]})
LABELLED, SIZES = 150, (150, 400, 1200)  # labelled digits; labelled and unlabelled together
SOFT = {n: f"soft, {n} images" for n in SIZES}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {  # images in all, changes of the settings
    **{name: (n, {}) for n, name in SOFT.items()},
    "soft CE, 1200": (1200, {"objective": "ce"}),
    "true JS, 1200": (1200, {"objective": "js"}),
    "1200, no phase 2": (1200, {"finetune": "none"}),
    "1200, phase 2 on labels": (1200, {"finetune": "labels"}),
    "1200, teacher's running statistics": (1200, {"batch_statistics": False}),
    "400, the surest 25 per class of the rest": (1258, {"per_class": 25}),
}


def digits(seed: int, n: int, size: int | None = None) -> tuple[Data, Subset | None]:
    """150 labelled digits and n − 150 others, of 8 × 8 pixels or of `size`; larger pools hold the smaller ones."""
    whole = load("digits", image_size=size)
    order = np.random.default_rng(fold("order", seed)).permutation(len(whole.train))
    known, rest = Subset(whole.train, order[:LABELLED]), Subset(whole.train, order[LABELLED:n])
    return Data(f"digits, {LABELLED} labelled", known, whole.test), rest if len(rest) else None


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT, size: int | None = None) -> Family:
    """One run of about a second on 150 digits and a pool of 150, for the contract table; tuned to a size when asked."""
    data, pool = digits(0, 300)
    teacher = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, 8]}).build(seed=3)
    return distill(run, data, student, teacher, pool, cfg, larger=digits(0, LABELLED, size)[0] if size else None)


def trained_teacher(run: Run, cfg: Config, epochs: float = 40) -> nn.Module:
    """A network that learned all training digits with their labels; once per run folder."""
    teacher = TEACHER.build(seed=fold(run.seed, "teacher"))
    train_teacher(run, "teacher", teacher, load("digits"), Plain(teacher_epochs=epochs, batch=64, lr=cfg.teacher_lr))
    return teacher.cpu().eval()


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One distillation as the command makes it; without flags also every arm on digits, over seeds."""
    if options.own:
        family, data = brought(run, options, cfg)
    else:
        data, pool = digits(run.seed, 1258)
        family = distill(run, data, STUDENT, trained_teacher(run, cfg), pool, cfg)
    report = describe(run, family, data, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = options.children()
        arms = {f"labels, {LABELLED} images": partial(labels_alone, cfg)}
        arms |= {name: partial(once, run, *arm, cfg) for name, arm in ARMS.items()}
        found = trials(run, arms, seeds)
        if report is not None:
            report.claims += claims(found, list(seeds))
            columns = {"accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 4), "images": ("images", 1.0, 0),
                       "agreement %": ("agreement", 100.0, 2), "teacher %": ("teacher", 100.0, 2)}  # fmt: skip
            report.tables.append(table("Arms on digits, equal steps", found, columns))
    return report


def brought(run: Run, options: OPTIONS, cfg: Config) -> tuple[Family, Data]:
    """The user's own: teacher and student by name, the pool from a folder or by name."""
    data = options.load_data("digits")
    if hasattr(data.train, "tokenizer"):
        raise UserError(f"ssld is for images, {data.name} holds sentences; give them to stillhouse distill")
    if len(options.teacher) != 1:
        raise UserError(
            f"--teacher: expected one trained network (RUN/students/NAME, timm:NAME, …), got {len(options.teacher)}"
        )
    larger = replace(options, image_size=options.fix_size).load_data("digits") if options.fix_size else None
    (teacher,), look = options.teachers(data, fresh=bool(cfg.teacher_epochs))
    spec, pool = options.spec(data, "stillhouse:cnn"), options.open_pool(options.pool, data)
    network = options.network(spec, run.seed)
    return distill(run, data, spec, teacher, pool, cfg, larger=larger, network=network, **look), larger or data


def labels_alone(cfg: Config, run: Run) -> dict[str, Any]:
    """The student on the labelled digits, for as many steps as the two phases have together."""
    data, _ = digits(run.seed, LABELLED)
    student, source = STUDENT.build(seed=run.seed), Batches(data.train, cfg.batch)
    steps = cfg.steps + round(cfg.finetune_epochs * source.steps_per_epoch)
    sgd = partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)
    plain = Distill(student, None, objectives=[], optimizer=sgd, lr=cosine(round(cfg.warmup * steps)))
    fit(run, "labels", plain, source, steps=steps, settings=cfg)
    found = classification(*predict(student, data.test))
    return {"accuracy": found["accuracy"], "nll": found["nll"], "images": LABELLED}


def once(whole: Run, n: int, changes: Mapping[str, Any], cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; the teacher is trained once per seed."""
    teacher = trained_teacher(whole.child(f"teacher-{run.seed}", seed=run.seed, quiet=True), cfg)
    data, pool = digits(run.seed, n)
    family = distill(run, data, STUDENT, teacher, pool, replace(cfg, **changes))
    (z, *_), y = family.logits(data.test)
    t, _ = predict(teacher, data.test)
    own = classification(z, y)
    return {"accuracy": own["accuracy"], "nll": own["nll"], "images": family.cost["images"],
            "agreement": float((z.argmax(1) == t.argmax(1)).float().mean()),
            "teacher": classification(t, y)["accuracy"]}  # fmt: skip


def claims(arms: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    hard, few, some, many = (100 * mean(r, "accuracy") for r in list(arms.values())[:4])
    nll = mean(arms["soft CE, 1200"], "nll") - mean(arms[SOFT[1200]], "nll")
    s = list(seeds)
    return [
        Claim("150 images: the teacher − labels, accuracy in points", few >= hard, few - hard, 0.0, s),
        Claim("400 − 150 images, accuracy in points", some > few, some - few, 0.0, s),
        Claim("1200 − 400 images, accuracy in points", many > some, many - some, 0.0, s),
        Claim("1200 − 150 images, accuracy in points", many - few >= 2, many - few, 2.0, s),
        Claim("1200 images: test NLL of soft CE − symmetric KL", nll > 0, nll, 0.0, s),
    ]


def describe(run: Run, family: Family, data: Data, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    curves = []
    for phase in dict.fromkeys(r["phase"] for r in family.logs):
        rows = [r for r in family.logs if r["phase"] == phase]
        names = sorted({k for r in rows for k in r} - {"step", "epoch", "phase", "accuracy"})
        lines: dict[str, Any] = {n: ([r["step"] for r in rows], [r[n] for r in rows]) for n in names}
        curves.append(Curve(f"Loss, {phase}", "step", "loss", lines))
    return Report(
        system="ssld", title=f"{family.spec.name if family.spec else 'student'} on {data.name}", command=command,
        seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students, cost=family.cost,
        curves=curves, notes=[*data.notes, *family.notes], tables=pool_table(run, data),
    )  # fmt: skip


def pool_table(run: Run, data: Data) -> list[Table]:
    """How many images of each class were kept, and how sure the teacher was of the last of them."""
    if not (run.folder / "pool.json").exists():
        return []
    kept = read_json(run.folder / "pool.json")
    count, least = Counter(kept["class"]), dict(zip(kept["class"], kept["score"], strict=True))  # the last is the least
    rows = [[name, count[c], f"{least[c]:.3f}" if c in least else "–"] for c, name in enumerate(data.classes)]
    return [Table("The pool by the teacher's class", ["class", "images", "least sure"], rows)]
