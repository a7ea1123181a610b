"""A pipeline on real data; on built-in digits one pipeline in full, and several beside each other over seeds.

stillhouse run pipeline --out runs/pipeline
stillhouse run pipeline --steps prune:0.5,distill,quantize:int8 --model runs/r18/students/p00 --data cifar10 --out runs/small
stillhouse run pipeline --steps train:60,prune:0.5,distill:30,quantize:int4,export:onnx --model torchvision:resnet18 --stem small --data cifar10 --out runs/all
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import continued
from stillhouse.recipes.pipeline.recipe import Config, distill
from stillhouse.report import Claim, Curve, Report, Student, Table
from stillhouse.report.units import milliseconds, percent, scaled
from stillhouse.students.plan import Plan
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions, filled
from stillhouse.trials import Results, claim, difference, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images or sentences, a network to start from, and perhaps a teacher that is another."""

    weights: Path | None = None  # .safetensors with the state dict of --model


BASE = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [16, 32, 64]})
PRESET = Config(
    steps=("train:30", "prune:0.5", "distill:15", "quantize:int8", "export:torch-export"), batch=64, optimizer="adamw",
    lr=3e-3, quantize_lr=1e-3, weight_decay=0.01, quantize_epochs=5,
)  # fmt: skip
TINY = replace(PRESET, steps=("train:1", "prune:0.5", "distill:1", "quantize:int8?train=1"))
ARMS: dict[str, tuple[str, ...]] = {
    "prune, distil, int8": ("prune:0.5", "distill:15", "quantize:int8"),
    "prune, distil, int8 untrained": ("prune:0.5", "distill:20", "quantize:int8?train=0"),
    "prune, distil, int4": ("prune:0.5", "distill:15", "quantize:int4"),
    "prune twice, distil, int4": ("prune:0.3", "distill:8", "prune:0.3", "distill:7", "quantize:int4"),
    "factor, distil, int8": ("factor:0.5", "distill:15", "quantize:int8"),
    "2:4, distil, int8": ("sparsify:2:4", "distill:15", "quantize:int8"),
    "prune, factor, 2:4, distil, int4": ("prune:0.3", "factor:0.3", "sparsify:2:4", "distill:15", "quantize:int4"),
}


def tiny(run: Run, cfg: Config = TINY, base: ModelSpec = BASE, teacher: ModelSpec | None = None) -> Family:
    """One run of about a second on 192 digits, for the contract table."""
    other = teacher.build(seed=fold(run.seed, "teacher")) if teacher else None
    return distill(run, load("digits", limit=192), base, cfg, teacher=other)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One pipeline as the command makes it; without flags also several of them on digits, over seeds."""
    if options.model and (Path(options.model) / "tokenizer.json").exists():  # a text student reads as it learned to
        options = replace(options, tokenizer=options.tokenizer or options.model)
    data, own = options.load_data("digits"), options.own or bool(options.teacher)
    if own:
        spec, network, plan = given(options, data, cfg, run.seed)
        teachers, look = options.teachers(data)
        family = distill(run, data, spec, cfg, teacher=teachers or None, network=network, plan=plan, **look)
    else:
        family = distill(run, data, BASE, cfg)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not own:
        arms = compare(run, cfg, options.children())
        if report is not None:
            report.claims += claims(arms, list(options.children()))
            columns = {
                "accuracy %": ("accuracy", 100.0, 2), "file, bytes": ("bytes", 1.0, 0),
                "parameters": ("params", 1.0, 0),
                "MACs": ("macs", 1.0, 0), "latency ms": ("latency_ms", 1.0, 3),
            }  # fmt: skip
            note = "mean ± standard deviation over seeds; those of a seed start from one base, and all train 20 epochs"
            report.tables.append(table("Pipelines on digits", arms, columns, note))
    return report


def given(options: OPTIONS, data: Data, cfg: Config, seed: int) -> tuple[ModelSpec, nn.Module, Plan | None]:
    """The user's network: a student of another run with its plan, or one by name, with weights or to be trained."""
    name = options.model or "stillhouse:cnn"
    if student := continued(name):
        return student
    spec = options.spec(data, name)
    source = spec.name.partition(":")[0]
    trained = options.pretrained or options.weights or cfg.parsed[0].name == "train" or "." in source
    if not (trained or options.teacher):
        raise UserError(
            f"--model {name} has no trained weights to start from; begin the steps with train, or give --pretrained, "
            "--weights FILE, a folder RUN/students/NAME or a --teacher"
        )
    network = options.network(spec, seed) or spec.build(seed=seed)
    return spec, filled(network, options.weights) if options.weights else network, None


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    """The report of one pipeline, stage by stage."""
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    students = [s for s in students if s.role != "ensemble"]
    for s in students:
        for spare in ("importance", "ece", "compression", "speedup"):  # so that a terminal has room for the bytes
            s.metrics.pop(spare, None)
    rows = family.logs
    keys = ("label", "kd")
    lines = {k: ([r["step"] for r in rows if k in r], [r[k] for r in rows if k in r]) for k in keys}
    stages, cost = family.cost["stages"], {k: v for k, v in family.cost.items() if k != "stages"}
    return Report(
        system="pipeline", title=f"{' → '.join(s.text for s in cfg.parsed)} · {data.name}", command=command,
        seed=run.seed, environment=environment(), students=students, cost=cost, notes=[*data.notes, *family.notes],
        metrics={"accuracy": students[-1].metrics["accuracy"], "task": metrics.get("task")}, claims=[],
        tables=[stage_table(family, stages, students)],
        curves=[Curve("Loss, as weighted", "step", "loss", {k: v for k, v in lines.items() if v[0]})],
    )  # fmt: skip


def stage_table(family: Family, stages: Sequence[dict[str, Any]], students: Sequence[Student]) -> Table:
    """One row per stage: what it did, and what the student is then."""
    by_name, rows = {s.name: s for s in students}, []
    for stage in stages:
        s, seconds = by_name.get(stage["stage"]), f"{stage['seconds']:.1f}"
        if s is None:
            rows.append([stage["stage"], stage["what"], *[""] * 6, seconds])
            continue
        nonzero = sum(int((p != 0).sum()) for p in family[s.name].model.parameters())
        size = [scaled(s.metrics["bytes"], "B"), scaled(s.params), scaled(nonzero), scaled(s.macs)]
        speed, right = milliseconds(s.latency_ms), percent(s.metrics["accuracy"], 2)
        rows.append([s.name, stage["what"], *size, speed, right, seconds])
    columns = ["stage", "what it did", "file", "parameters", "not zero", "MACs", "latency", "accuracy", "seconds"]
    note = "MACs and latency are those of dense float32 layers: zeros are not skipped, codes are decoded once"
    return Table("Stage by stage", columns, rows, note)


# -- pipelines beside each other ------------------------------------------------------------------------------------


def compare(run: Run, cfg: Config, seeds: Sequence[int]) -> Results:
    """Every pipeline on every seed, those of a seed from one base; arm → one result per seed."""
    found = trials(run, {"arms": partial(once, cfg)}, seeds)["arms"]
    return {arm: [row[arm] for row in found] for arm in found[0]}


def once(cfg: Config, run: Run) -> dict[str, dict[str, float]]:
    """One seed: a base that is trained once, and every pipeline from it."""
    data, rows = load("digits"), dict[str, dict[str, float]]()
    trained = distill(run.child("base", quiet=True), data, BASE, replace(cfg, steps=("train:30",)))
    rows["base"] = judged(trained, data, run.child("base", quiet=True))
    for k, (arm, steps) in enumerate(ARMS.items()):
        child, network = run.child(f"arm{k}", quiet=True), BASE.build()
        network.load_state_dict(trained.members[-1].model.state_dict())
        rows[arm] = judged(distill(child, data, BASE, replace(cfg, steps=steps), network=network), data, child)
    return rows


def judged(family: Family, data: Data, run: Run) -> dict[str, float]:
    """The last student: quality, size on disk, cost."""
    if run.main:
        family.save(run.folder)
    run.barrier()
    row = replace(family, members=family.members[-1:], base_name="").measure(data, run.folder)[0][-1]
    keys = ("accuracy", "bytes", "params", "macs", "latency_ms")
    return {k: float(row.number(k) or 0) for k in keys}


def claims(arms: Results, seeds: list[int]) -> list[Claim]:
    """What one may expect of the composition; thresholds are ours, set before it was run on these seeds."""
    smaller = mean(arms["base"], "bytes") / mean(arms["prune, distil, int8"], "bytes")
    four = mean(arms["base"], "bytes") / mean(arms["prune, distil, int4"], "bytes")

    def gain(text: str, a: str, b: str, least: float) -> Claim:
        return claim(f"{text}, accuracy in points", difference(arms[a], arms[b], "accuracy", 100.0), least, seeds)

    trained, plain = "prune, distil, int8", "prune, distil, int8 untrained"
    return [
        gain("prune 0.5 + distil + int8 − base", trained, "base", -1.0),
        gain("prune 0.5 + distil + int4 − base", "prune, distil, int4", "base", -2.0),
        gain("2:4 + distil + int8 − base", "2:4, distil, int8", "base", -1.0),
        gain("quantisation that trains − one that does not, 8 bits, equal epochs", trained, plain, -0.5),
        Claim("base's file / file after prune 0.5 + distil + int8", smaller >= 5, smaller, 5.0, seeds),
        Claim("base's file / file after prune 0.5 + distil + int4", four >= 8, four, 8.0, seeds),
    ]
