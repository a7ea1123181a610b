"""PLD on real data; on built-in digits the claims of the card over seeds, for classes and for lists.

stillhouse run pld --out runs/pld
stillhouse run pld --teacher torchvision:resnet50 --teacher-epochs 60 --model torchvision:resnet18 --stem small --data cifar10 --out runs/small
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import plain
from stillhouse.data import Data, load, split
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.objectives.logits import pearson
from stillhouse.recipes.pld.lists import lists_of
from stillhouse.recipes.pld.recipe import SURE, Config, distill
from stillhouse.report import Claim, Curve, Report
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import Results, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images (or lists), a student and its teachers."""

    seeds: int = 5  # seeds for the claims of the built-in experiment


PRESET = Config(temperature=3.0, teacher_epochs=30, epochs=100, batch=64, optimizer="adamw", lr=3e-3, weight_decay=0.01)
TINY = replace(PRESET, epochs=2, teacher_epochs=2)
TEACHER = ModelSpec("stillhouse:cnn", 10, (1, 8, 8))
STUDENT = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [12]})
RANKERS = "stillhouse.recipes.pld.lists"
CE, KD = ((), 1.0), (("kd:0.9?T=2",), 0.1)  # objectives and the weight of the labels
Arm = tuple[tuple[str, ...], float]


def pld(temperature: float, topk: int = 0) -> Arm:
    return (Config(temperature=temperature, topk=topk).objective,), 0.0


ARMS = {
    "CE": CE, "KD": KD, "PLD 1": pld(1.0), "PLD 3": pld(3.0), "ListMLE": pld(float("inf")),
    "PLD 3, top 3": pld(3.0, 3),
}  # fmt: skip
RANKED = {"lists: CE": CE, "lists: KD": KD, "lists: PLD 3": pld(3.0), "lists: ListMLE": pld(float("inf"))}


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT, lists: bool = False) -> Family:
    """One run of about a second on 192 digits, for the contract table; as lists of candidates when asked."""
    data = load("digits", limit=192)
    if not lists:
        return distill(run, data, student, TEACHER.build(seed=fold(run.seed, "teacher")), cfg)
    data = lists_of(data)
    teacher, small = rankers(data)
    return distill(run, data, small, teacher.build(seed=fold(run.seed, "teacher")), cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One distillation as the command makes it; without flags also the claims, over seeds."""
    data = options.load_data("digits")
    if options.own:
        if not options.teacher:
            raise UserError("--teacher is missing: give a trained network (RUN/students/NAME, timm:NAME, …)")
        student = options.spec(data, "stillhouse:cnn")
        network = options.network(student, run.seed)
        teachers, look = options.teachers(data, fresh=bool(cfg.teacher_epochs))
        family = distill(run, data, student, teachers, cfg, network=network, **look)
    else:
        family = distill(run, data, STUDENT, TEACHER.build(seed=fold(run.seed, "teacher")), cfg)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        arms = compare(run, cfg, options.children(), "classes", ARMS, few_digits)
        ranked = compare(run, cfg, options.children(), "lists", RANKED, few_lists)
        if report is not None:
            report.claims += claims(arms, ranked, list(options.children()))
            report.tables += tables(arms, ranked)
    return report


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    rows = [r for r in family.logs if "pld" in r]
    line = {"pld": ([float(r["step"]) for r in rows], [float(r["pld"]) for r in rows])}
    name = family.spec.name if family.spec else type(family.members[0].model).__name__
    return Report(
        system="pld", title=f"PLD · {type(family.base).__name__} into {name} on {data.name}", command=command,
        seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students, cost=family.cost,
        notes=[*data.notes, *family.notes], curves=[Curve("Loss", "step", "nats, weighted by rank", line)],
    )  # fmt: skip


# -- the claims of the card --------------------------------------------------------------------------------------


def few_digits(seed: int) -> tuple[Data, Data, ModelSpec, ModelSpec]:
    """200 digits for the student, 900 others for its teacher, all 539 test digits; and the two networks."""
    whole = load("digits")
    rest, few = split(whole.train, 200 / len(whole.train), seed=fold("few", seed))
    _, many = split(rest, 900 / len(rest), seed=fold("many", seed))
    return Data("digits 900", many, whole.test), Data("digits 200", few, whole.test), TEACHER, STUDENT


def few_lists(seed: int) -> tuple[Data, Data, ModelSpec, ModelSpec]:
    """The same digits as lists: find the one of eight that shows the query's number."""
    many, few, _, _ = few_digits(seed)
    return lists_of(many, seed), lists_of(few, seed), *rankers(lists_of(few, seed))


def rankers(data: Data) -> tuple[ModelSpec, ModelSpec]:
    """Teacher and student that score lists."""
    large, small = (ModelSpec(f"{RANKERS}:{n}", len(data.classes), tuple(data.shape)) for n in ("large", "small"))
    return large, small


def compare(run: Run, cfg: Config, seeds: Any, name: str, arms: Mapping[str, Arm], parts: Any) -> Results:
    """Every arm of a comparison on every seed, all of a seed under one teacher; arm → one result per seed."""
    found = trials(run, {name: partial(once, cfg, arms, parts)}, seeds)[name]
    return {arm: [row[arm] for row in found] for arm in arms}


def once(cfg: Config, arms: Mapping[str, Arm], parts: Any, run: Run) -> dict[str, dict[str, float]]:
    """One seed: a teacher on many samples, and one student per arm on few."""
    many, few, large, small = parts(run.seed)
    teacher = large.build(seed=fold(run.seed, "teacher"))
    plain.train_teacher(run, "teacher", teacher, many, cfg.as_plain())
    settings = replace(cfg.as_plain(), teacher_epochs=0.0)
    t, y = predict(teacher, few.test)
    sure = label_weight(teacher, few)
    rows = {}
    for k, (arm, (objective, label)) in enumerate(arms.items()):
        child = run.child(f"arm{k}", quiet=True)
        family = plain.distill(child, few, small, teacher, replace(settings, objective=objective, label=label))
        z, _ = family.logits(few.test)
        own = classification(z[0], y)
        rows[arm] = {
            "accuracy": own["accuracy"], "nll": own["nll"], "order": float(order_agreement(t, z[0], y).mean()),
            "mrr": float((1 / (1 + (z[0] > z[0].gather(1, y[:, None])).sum(1))).mean()),
            "teacher": classification(t, y)["accuracy"], "teacher_on_label": sure,
        }  # fmt: skip
    return rows


def label_weight(teacher: nn.Module, few: Data) -> float:
    """The teacher's mean probability of the label on the student's training samples, which it has not seen."""
    t, y = predict(teacher, few.train)
    return float(t.softmax(-1).gather(1, y[:, None]).mean())


def order_agreement(t: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation of two rows of logits without the label's: (n, C) twice and labels (n,) → (n,)."""
    others = torch.ones_like(t, dtype=torch.bool).scatter(1, y[:, None], False)
    a, b = (z[others].view(len(z), -1).argsort(1).argsort(1).double() for z in (t, s))
    return pearson(a, b)


def claims(arms: Results, ranked: Results, seeds: list[int]) -> list[Claim]:
    """The card's claims with the card's thresholds, then ours for lists."""

    def points(a: str, b: str) -> float:
        return 100 * (mean(arms[a], "accuracy") - mean(arms[b], "accuracy"))

    sure = min(r["teacher_on_label"] for r in arms["CE"])
    gain, close, listwise = points("PLD 3", "CE"), points("PLD 1", "CE"), points("PLD 3", "ListMLE")
    order = mean(arms["PLD 3"], "order") - mean(arms["CE"], "order")
    lists = mean(ranked["lists: PLD 3"], "order") - mean(ranked["lists: CE"], "order")
    found = 100 * (mean(ranked["lists: PLD 3"], "accuracy") - mean(ranked["lists: CE"], "accuracy"))
    text = f"PLD at τ = 1 within 1 point of CE where the teacher gives the label more than {SURE} (least: {sure:.3f})"
    return [
        Claim("PLD at τ = 3 − CE, accuracy in points", gain >= 0.5, gain, 0.5, seeds),
        Claim(text + ", points", abs(close) <= 1 or sure <= SURE, close, 1.0, seeds),
        Claim("PLD at τ = 3 − ListMLE (uniform weights), accuracy in points", listwise > 0, listwise, 0.0, seeds),
        Claim("Spearman's ρ with the teacher's other classes: PLD at τ = 3 − CE", order > 0, order, 0.0, seeds),
        Claim("lists: the same ρ over candidates: PLD at τ = 3 − CE", lists > 0, lists, 0.0, seeds),
        Claim("lists: right candidate first: PLD at τ = 3 − CE, points", found > 0, found, 0.0, seeds),
    ]


def tables(arms: Results, ranked: Results) -> list[Any]:
    common = {"NLL": ("nll", 1.0, 3), "ρ with the teacher": ("order", 1.0, 3), "teacher %": ("teacher", 100.0, 2)}
    sure = {"teacher on label": ("teacher_on_label", 1.0, 3)}
    note = "mean ± standard deviation over seeds; 200 digits for the student, 900 others for its teacher"
    lists = "mean ± standard deviation over seeds; lists of one right candidate and seven of other classes"
    return [
        table("Digits", arms, {"student %": ("accuracy", 100.0, 2), **common, **sure}, note),
        table("Lists", ranked, {"right first %": ("accuracy", 100.0, 2), "MRR": ("mrr", 1.0, 3), **common}, lists),
    ]
