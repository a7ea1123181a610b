"""MEAL V2 on a user's student and teachers, and on built-in digits its arms over seeds.

stillhouse run meal_v2 --out runs/meal                       # digits: one student, and all arms over seeds
stillhouse run meal_v2 --model runs/r18/students/p50 --teacher runs/r18/students/p00 --data cifar10 --out runs/better
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Data, Samples, load, split
from stillhouse.data.samples import digest
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import continued
from stillhouse.recipes.meal_v2.config import Config
from stillhouse.recipes.meal_v2.recipe import distill, train_on_labels
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions, filled
from stillhouse.teachers import Asked, Frozen
from stillhouse.trials import mean, table, trials


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images or sentences, a trained student and its teachers."""

    BRINGS: ClassVar[tuple[str, ...]] = (*TeacherOptions.BRINGS, "student_weights")

    student_weights: Path | None = None  # .safetensors with the state dict of --model, which may be RUN/students/NAME
    seeds: int = 5  # seeds for the claims of the built-in experiment


PRESET = Config(epochs=150, batch=64, lr=0.1, student_epochs=40, teacher_epochs=40, label_lr=0.1)
TINY = replace(PRESET, epochs=2, student_epochs=1, teacher_epochs=1, batch=32, label_lr=0.05)
STUDENT = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 6, 12]})
TEACHERS = [
    ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [w, 2 * w, 4 * w]}) for w in (12, 16, 24)
]  # fmt: skip
NOISE = 0.5  # of the digits' augmentation, in standard deviations of a pixel; set on seeds 100 to 102
PLAIN: dict[str, Any] = {"discriminator": "none"}
ARMS: dict[str, dict[str, Any]] = {
    "a. labels alone": {**PLAIN, "soft": 0.0, "label": 1.0},
    "b. mean of the teachers on the student's view": PLAIN,
    "c. mean of the teachers on the clean image": {**PLAIN, "cache": 0},
    "d. b + discriminator, adversarial": {"discriminator": "adversarial"},
    "d. b + discriminator, joint (released code)": {"discriminator": "joint"},
    "e. b + half a label": {**PLAIN, "label": 0.5},
}


class Noisy(Samples):
    """Another set with normal noise on the inputs of every view, a function of (seed, view, sample) alone."""

    def __init__(self, parent: Samples, size: float):
        self.parent, self.size = parent, size
        self.labels, self.shape, self.classes = parent.labels, parent.shape, parent.classes

    @property
    def fingerprint(self) -> str:
        return digest("noisy", self.parent.fingerprint, self.size)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        batch = self.parent.take(ids, view=view, seed=seed)
        if view is None:
            return batch
        streams = (np.random.default_rng([fold(seed, "noise", view), i]) for i in batch["id"].tolist())
        draws = [stream.standard_normal(self.shape) for stream in streams]
        noise = torch.from_numpy(np.stack(draws)).to(batch["input"])
        return {**batch, "input": batch["input"] + self.size * noise}


def few_digits(seed: int, n: int = 400) -> Data:
    """`n` training digits with noise as their augmentation, all of the test part."""
    whole = load("digits")
    _, few = split(whole.train, n / len(whole.train), seed=fold("few", seed))
    return Data(f"digits, {n} for training", Noisy(few, NOISE), whole.test)


def networks(seed: int) -> tuple[nn.Module, list[nn.Module]]:
    return STUDENT.build(seed=fold(seed, "student")), [
        t.build(seed=fold(seed, "teacher", k)) for k, t in enumerate(TEACHERS)
    ]


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT) -> Family:
    """One run of about a second on 96 digits, for the contract table."""
    small = [ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, k]}).build(seed=k) for k in (8, 9)]
    return distill(run, few_digits(0, 96), student, small, cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One fine-tuning as the command makes it; without flags also every arm on digits, over seeds."""
    if options.own:
        data = options.load_data("digits")
        family, teachers = brought(run, options, data, cfg)
    else:
        data = few_digits(run.seed)
        network, teachers = networks(run.seed)
        family = distill(run, data, STUDENT, teachers, cfg, network=network)
    report = describe(run, family, teachers, data, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = options.children()
        arms = trials(run, {arm: partial(once, run, changes, cfg) for arm, changes in ARMS.items()}, seeds)
        if report is not None:
            report.claims += claims(arms, list(seeds))
            columns = {"accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 4), "before %": ("before", 100.0, 2),
                       "teachers %": ("teachers", 100.0, 2)}  # fmt: skip
            report.tables.append(table("Arms on digits", arms, columns))
    return report


def brought(run: Run, options: OPTIONS, data: Data, cfg: Config) -> tuple[Family, list[nn.Module]]:
    """The user's own: the family, and every teacher as a network that reads the student's inputs."""
    if not options.teacher:
        raise UserError("--teacher is missing: give trained networks (RUN/students/NAME, timm:NAME, …), one flag each")
    teachers, look = options.teachers(data, fresh=bool(cfg.teacher_epochs))
    if student := continued(options.model or ""):
        spec, network, plan = student
    else:
        spec, network, plan = *started(run, options, data, cfg), None
    family = distill(run, data, spec, teachers, cfg, network=network, plan=plan, **look)
    return family, [Asked(Frozen(t, **look), [t]) for t in teachers] if look else teachers


def started(run: Run, options: OPTIONS, data: Data, cfg: Config) -> tuple[ModelSpec, nn.Module]:
    """A student that is no student of another run: how it is built, and with weights."""
    spec = options.spec(data, "stillhouse:cnn")
    if not (options.pretrained or options.student_weights or cfg.student_epochs):
        raise UserError(
            f"--model {spec.name} has no trained weights: MEAL V2 fine-tunes a trained network; give --pretrained, "
            "--student-weights FILE, a folder RUN/students/NAME, or --student-epochs N to train it first"
        )
    network = options.network(spec, run.seed) or spec.build(seed=run.seed)
    return spec, filled(network, options.student_weights) if options.student_weights else network


def once(whole: Run, changes: Mapping[str, Any], cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; student and teachers are trained once per seed and are the same in every arm."""
    data, (network, teachers) = few_digits(run.seed), networks(run.seed)
    train_on_labels(whole.child(f"given-{run.seed}", seed=run.seed, quiet=True), data, network, teachers, cfg)
    answers = [predict(t, data.test)[0] for t in teachers]
    settings = replace(cfg, student_epochs=0.0, teacher_epochs=0.0, **changes)
    family = distill(run, data, STUDENT, teachers, settings, network=network)
    (z, *_), y = family.logits(data.test)
    own, before = classification(z, y), run.memo("before", dict)
    q = torch.stack([a.softmax(-1) for a in answers]).mean(0).log()
    return {"accuracy": own["accuracy"], "nll": own["nll"], "before": before["accuracy"],
            "teachers": classification(q, y)["accuracy"]}  # fmt: skip


def claims(arms: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    a, b, c, *_, e = arms.values()

    def wins(other: list[dict[str, Any]]) -> int:
        return sum(mine["nll"] < theirs["nll"] for mine, theirs in zip(b, other, strict=True))

    need, s = 0.8 * len(seeds), list(seeds)
    gain = 100 * (mean(b, "accuracy") - mean(b, "before"))
    gap = 100 * abs(mean(b, "accuracy") - mean(e, "accuracy"))
    return [
        Claim("test NLL(b) < NLL(c): labels of the clean image lose (seeds)", wins(c) >= need, wins(c), need, s),
        Claim("test NLL(b) < NLL(a): going on with hard labels loses (seeds)", wins(a) >= need, wins(a), need, s),
        Claim("accuracy(b) − accuracy before, points", gain >= 1, gain, 1.0, s),
        Claim("|accuracy(b) − accuracy(e)|: labels add nothing, points", gap <= 0.5, gap, 0.5, s),
    ]


def describe(run: Run, family: Family, teachers: Sequence[nn.Module], data: Data, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    read = "input" if family.base_inputs is None else "teacher"
    found = [predict(t, data.test, device=run.device, read=read) for t in teachers]
    q = torch.stack([z.softmax(-1) for z, _ in found]).mean(0).log()
    rows = {"student before": run.memo("before", dict), "student after": students[-1].metrics}
    rows |= {f"teacher {k}": classification(*f) for k, f in enumerate(found)}
    rows["mean of the teachers' probabilities"] = classification(q, found[0][1])
    cells = [[k, f"{100 * r['accuracy']:.2f}", f"{r['nll']:.4f}", f"{r['ece']:.4f}"] for k, r in rows.items()]
    gain = rows["student after"]["accuracy"] - rows["student before"]["accuracy"]
    steps = [r["step"] for r in family.logs]
    names = sorted({k for r in family.logs for k in r} - {"step", "epoch"})
    lines: dict[str, Any] = {n: (steps, [r[n] for r in family.logs]) for n in names}
    told = {n: lines.pop(n) for n in ("told_apart",) if n in lines}
    curves = [Curve("Losses", "step", "loss", lines)]
    curves += [Curve("Rows the discriminator tells apart (0.5: it cannot)", "step", "part", told)] if told else []
    for model in teachers:
        model.cpu()
    return Report(
        system="meal_v2", title=f"{family.spec.name if family.spec else 'student'} on {data.name}", command=command,
        seed=run.seed, environment=environment(), metrics={**metrics, "gain": gain}, claims=[], students=students,
        cost=family.cost, curves=curves, notes=list(data.notes),
        tables=[Table("Before and after", ["network", "accuracy %", "NLL", "ECE"], cells)],
    )  # fmt: skip
