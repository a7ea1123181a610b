"""Quantised distillation on real data; on built-in digits the claims of the card over seeds.

stillhouse run quantized_distillation --out runs/quantised
stillhouse run quantized_distillation --teacher runs/r18/students/p00 --student stillhouse:resnet20 --data cifar10 --bits 2 --out runs/two-bits
"""  # noqa: E501

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.plain import train_teacher
from stillhouse.recipes.quantized_distillation.config import Config
from stillhouse.recipes.quantized_distillation.quantizers import Bucketed
from stillhouse.recipes.quantized_distillation.recipe import distill, layers_of
from stillhouse.recipes.quantized_distillation.sizes import account, reduction
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.students.parametrized import bake, parametrize_weights
from stillhouse.students.plan import Plan
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import Results, claim, difference, table, trials

OPTIONS = TeacherOptions
PRESET = Config(
    bits=2, teacher_epochs=15, student_epochs=30, epochs=15, batch=64, optimizer="adamw", lr=3e-3, quantised_lr=2e-3,
    weight_decay=0.01,
)  # fmt: skip
TINY = replace(PRESET, epochs=1, student_epochs=1, teacher_epochs=1)
TEACHER = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [32, 64, 192]})
STUDENT = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [12, 24, 56]})
QD = {"method": "qd", "backward": "plain", "auto_bits": False}
DQ = {"method": "dq", "auto_bits": False}
ARMS: dict[str, dict[str, Any]] = {  # all that their names say, whatever the flags are
    "QD, 2 bits": {**QD, "bits": 2},
    "QD, 2 bits, exact": {**QD, "bits": 2, "backward": "exact"},
    "DQ, 2 bits": {**DQ, "bits": 2},
    "DQ, 2 bits, auto": {**DQ, "bits": 2, "auto_bits": True},
    "cycle, 2 bits": {**QD, "bits": 2, "method": "cycle"},
    "QD, 4 bits": {**QD, "bits": 4},
    "DQ, 4 bits": {**DQ, "bits": 4},
}


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT, teacher: ModelSpec | None = TEACHER) -> Family:
    """One run of about a second on 192 digits, for the contract table."""
    models = [teacher.build(seed=fold(run.seed, "teacher"))] if teacher else []
    return distill(run, load("digits", limit=192), student, models, cfg)


def main(run: Run, options: TeacherOptions, cfg: Config, command: str) -> Report | None:
    """One student as the command makes it; without flags also every arm on digits, over seeds."""
    data = options.load_data("digits")
    if options.own:
        if not options.teacher and cfg.kd:
            raise UserError("--teacher is missing: give a trained network (RUN/students/NAME, timm:NAME, …), or --kd 0")
        student = options.spec(data, "stillhouse:cnn")
        network = options.network(student, run.seed)
        teachers, look = options.teachers(data, fresh=bool(cfg.teacher_epochs))
        family = distill(run, data, student, teachers, cfg, network=network, **look)
    else:
        family = distill(run, data, STUDENT, TEACHER.build(seed=fold(run.seed, "teacher")), cfg)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        arms = compare(run, cfg, options.children())
        if report is not None:
            report.claims += claims(arms, list(options.children()))
            columns = {"accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3), "file, bytes": ("bytes", 1.0, 0)}
            note = "mean ± standard deviation over seeds; arms of a seed start from the same full-precision student"
            report.tables.append(table("Digits", arms, columns, note))
    return report


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    """The report of one run: the student in full precision and quantised, and where its bytes are."""
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    students = [s for s in students if s.role != "ensemble"]
    for s in students:
        s.metrics.pop("importance", None)
    name, small = family.members[-1].name, family.members[-1]
    assert small.plan is not None
    size = account(small.model, small.plan, run.folder / "students" / name)
    rows = family.logs
    lines = {k: ([r["step"] for r in rows if k in r], [r[k] for r in rows if k in r]) for k in ("label", "kd")}
    gap, off = size["tensors"] - size["claimed"], family.cost["baked_difference"]
    report = Report(
        system="quantized_distillation",
        title=f"{cfg.method}, {cfg.bits} bits · {family.spec.name if family.spec else 'student'} on {data.name}",
        command=command, seed=run.seed, environment=environment(),
        metrics={"accuracy": students[-1].metrics["accuracy"], "task": metrics.get("task")}, students=students,
        claims=[
            Claim("bytes of the tensors on disk − bytes claimed", gap == 0, gap, 0.0, [run.seed]),
            Claim("largest difference of logits, baked − with projectors", off <= 1e-5, off, 1e-5, [run.seed]),
        ],
        cost=family.cost, notes=[*data.notes, *family.notes], tables=size_tables(size, cfg),
        curves=[Curve("Loss with quantised weights, as weighted", "step", "loss", lines)],
    )  # fmt: skip
    return report


def size_tables(size: dict[str, Any], cfg: Config) -> list[Table]:
    """What the student takes, and which layer takes how much of it."""
    full, share = size["full"], 100 * size["quantised_share"]
    paper = f"the paper's figure, Huffman code of {size['huffman_bits']:.3f} bits and 64 bits a bucket"
    rows = [
        ["full precision, float32", full, 1.0],
        ["claimed: codes, points, scales, zeros, the rest", size["claimed"], full / size["claimed"]],
        ["tensors on disk", size["tensors"], full / size["tensors"]],
        ["file, with its header", size["file"], full / size["file"]],
        [paper, size["huffman"], full / size["huffman"]],
    ]
    shown = [[what, f"{b:,.0f}", f"{times:.2f}"] for what, b, times in rows]
    note = f"{share:.1f} % of the parameters are quantised"
    if cfg.bucket > 0:
        note += f"; a long tensor alone would shrink {reduction(cfg.bits, cfg.bucket):.1f} times"
    each = [[r["path"], f"{r['values']:,}", r["bits"], r["groups"], f"{r['bytes']:,}"] for r in size["layers"]]
    return [
        Table("Size", ["what", "bytes", "times smaller"], shown, note),
        Table("Layers", ["layer", "weights", "bits", "buckets", "bytes"], each),
    ]


# -- the claims of the card --------------------------------------------------------------------------------------


def compare(run: Run, cfg: Config, seeds: Any) -> Results:
    """Every arm on every seed, those of a seed from one teacher and one student; arm → one result per seed."""
    found = trials(run, {"arms": partial(once, cfg)}, seeds)["arms"]
    return {arm: [row[arm] for row in found] for arm in found[0]}


def once(cfg: Config, run: Run) -> dict[str, dict[str, float]]:
    """One seed: teacher, student in full precision, then all that quantises it."""
    data, rows = load("digits"), dict[str, dict[str, float]]()
    teacher = TEACHER.build(seed=fold(run.seed, "teacher"))
    train_teacher(run, "teacher", teacher, data, cfg.plain())
    cfg = replace(cfg, teacher_epochs=0.0)
    rows["teacher"] = judged(teacher, data)
    student: nn.Module | None = None
    for k, (arm, changes) in enumerate(ARMS.items()):
        child = run.child(f"arm{k}", quiet=True)
        how = replace(cfg, student_epochs=cfg.student_epochs if student is None else 0.0, **changes)
        network = copy.deepcopy(student)
        family = distill(child, data, STUDENT, teacher, how, network=network)
        if student is None:
            student = family["full"].model
            rows["full precision"] = judged(student, data, family, "full", child)
            for bits in (2, 4):
                rows[f"rounded, {bits} bits"] = judged(rounded(student, bits, cfg.bucket)[0], data)
        rows[arm] = judged(family[f"q{how.bits}"].model, data, family, f"q{how.bits}", child)
    return rows


def rounded(model: nn.Module, bits: int, bucket: int) -> tuple[nn.Module, Plan]:
    """The network with its weights quantised and nothing trained: what the paper calls post-mortem."""
    plan, model = Plan.identity(model), copy.deepcopy(model)
    parametrize_weights(model, layers_of(model), lambda path, layer: Bucketed(bits, bucket))
    return model, plan.then(*bake(model))


def judged(
    model: nn.Module, data: Data, family: Family | None = None, name: str = "", run: Run | None = None
) -> dict[str, float]:
    z, y = predict(model, data.test)
    found = {k: v for k, v in classification(z, y).items() if k in ("accuracy", "nll")}
    if family is not None and run is not None and run.main:
        member = family[name]
        plan = member.plan or Plan.identity(member.model)
        family.save(run.folder)
        found["bytes"] = account(member.model, plan, run.folder / "students" / name)["file"]
    return found


def claims(arms: Results, seeds: list[int]) -> list[Claim]:
    """The card's claims with the card's thresholds, in points of accuracy."""

    def gain(text: str, a: str, b: str, least: float) -> Claim:
        return claim(f"{text}, accuracy in points", difference(arms[a], arms[b], "accuracy", 100.0), least, seeds)

    return [
        gain("QD − rounding after training, 2 bits", "QD, 2 bits", "rounded, 2 bits", 5.0),
        gain("DQ − rounding after training, 2 bits", "DQ, 2 bits", "rounded, 2 bits", 2.0),
        gain("QD at 4 bits − full precision", "QD, 4 bits", "full precision", -2.0),
    ]
