"""Distilling step-by-step on real data.

stillhouse run distilling_step_by_step --out runs/dss                  # odd or even: three arms, four sizes
stillhouse run distilling_step_by_step --data svamp --out runs/svamp   # rationales of a 540B model, from scratch
stillhouse run distilling_step_by_step --data mine.jsonl --model hf:google-t5/t5-small --precision bf16 --out runs/mine
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from stillhouse.data import load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.models import ModelSpec
from stillhouse.options import Options
from stillhouse.recipes.distilling_step_by_step import digits, rationales
from stillhouse.recipes.distilling_step_by_step.recipe import Config, distill
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.system import fold
from stillhouse.text import (
    Answerer,
    Codec,
    Example,
    Task,
    TextModels,
    encode,
    gru_spec,
    open_task,
    parse_report,
    small_tokenizer,
    t5_spec,
    token_nll,
)
from stillhouse.text.encoding import vocabulary_texts
from stillhouse.text.seq2seq import own_model, pretrained

IMAGES = ("digits", "mnist")


@dataclass(frozen=True)
class TextOptions(Options):
    """Options of systems for text."""

    model: str | None = None  # gru, transformers:T5ForConditionalGeneration, hf:NAME, a folder, module:function
    data: str | None = None  # svamp, cqa, jsonl:PATH, a folder, package.module:function; digits and mnist: built in
    task: str | None = None  # form of raw completions and of answers: text, cqa, svamp, asdiv, esnli, anli1
    vocabulary: Literal["word", "char"] = "word"  # of models from scratch: what stands between blanks, or characters
    width: int = 128  # of models from scratch
    layers: int = 2  # of a T5 from scratch, in encoder and decoder each
    dropout: float = 0.0  # of models from scratch
    valid: float = 0.1  # part of the training rows to select on, where the data has no such split
    test: float = 0.1  # part of the rows to test on, where the data has no such split
    subsample: float = 1.0  # part of the training rows to use


OPTIONS = TextOptions
PRESET = Config()
# The smallest settings that touch everything, for the contract table.
TINY = Config(steps=4, batch=6, lr=1e-2, eval_every=2, max_input=24, max_target=12, max_generated=4)


def main(run: Run, options: TextOptions, cfg: Config, command: str) -> Report | None:
    """The built-in experiments where nothing is brought along, or a student of the user's own task."""
    if options.data in (None, *IMAGES):
        if options.model is not None:
            raise UserError(f"--model {options.model} needs --data svamp, cqa, a JSONL file or package.module:function")
        return odd_or_even(run, options, cfg.settled(scratch=True), command)
    task = open_task(
        str(options.data), options.task, valid=options.valid, test=options.test, subsample=options.subsample
    )
    if options.data == "svamp" and options.model is None:
        return svamp(run, options, task, replace(cfg, steps=cfg.steps or rationales.STEPS), command)
    return own(run, options, task, cfg, command)


def tiny(run: Run, cfg: Config = TINY, model: str = "gru") -> TextModels:
    """Ten sums in words; a run of a second, for the contract table."""
    rows = [
        Example(f"{a} plus {b}", str(a + b), f"{a} and " + "one and " * b, str(a + b)) for a in range(5) for b in (1, 3)
    ]
    task = Task("sums", rows[:7], rows[7:9], rows[9:])
    tokenizer = small_tokenizer(vocabulary_texts([rows], {"a": cfg.predict, "b": cfg.explain, "c": cfg.behind}))
    spec = gru_spec(len(tokenizer), 8) if model == "gru" else t5_spec(model, len(tokenizer), 8, 1, 2)
    return distill(run, task, spec.build(seed=run.seed), tokenizer, cfg, spec)


# -- the built-in experiments -------------------------------------------------------------------------------------


def images(options: TextOptions) -> str:
    """MNIST where it is at hand, else the digits that come with scikit-learn."""
    place = os.environ.get("STILLHOUSE_DATA")
    return options.data or ("mnist" if place and (Path(place).expanduser() / "mnist").is_dir() else "digits")


def odd_or_even(run: Run, options: TextOptions, cfg: Config, command: str) -> Report | None:
    data, seeds = load(images(options)), options.children()
    task = digits.task_of(run, data, epochs=1 if len(data.train) > 10_000 else 30)
    found = digits.run_arms(run, task, cfg, seeds)
    made = digits.students(run, task, cfg)
    metrics = {
        n: {"accuracy": task.accuracy(made.answerer(n).examples(task.test), task.test)} for n in ("dss", "label-only")
    }
    report = written(run, made, task, command, metrics)
    if report is not None:
        report.seed = seeds
        report.claims, report.tables = digits.claims(found, seeds), digits.tables(found)
        report.tables.append(digits.rationales(made, task))
        report.curves = [digits.curve(found), losses(made)]
        report.notes += [digits.saved_labels(found), f"students: seed {run.seed}, {digits.GATE} labelled images"]
    return report


def svamp(run: Run, options: TextOptions, task: Task, cfg: Config, command: str) -> Report | None:
    cfg, seeds = replace(cfg.settled(scratch=True), eval_every=0), options.children()[:1]
    found = rationales.run_arms(run, task, cfg, seeds)
    made, masked = rationales.students(run, task, cfg), rationales.masked_task(task)
    said = {m.name: made.answerer(m.name).examples(masked.test) for m in made}
    metrics = {n: {"accuracy": rationales.accuracy(s, task.test)} for n, s in said.items()}
    report = written(run, made, task, command, metrics)
    if report is not None:
        report.claims, report.tables = rationales.claims(found, task, seeds), rationales.tables(found, task)
        report.tables.append(shown(made.answerer("dss"), masked))
        report.curves = [losses(made)]
        report.notes.append("numbers are masked (N1 is the problem's first), rationales are cut to 45 words; one seed")
    return report


# -- a task and a model of one's own ------------------------------------------------------------------------------


def network(options: TextOptions, task: Task, cfg: Config, seed: int) -> tuple[nn.Module, Any, ModelSpec | None, bool]:
    """Model, tokenizer, how it is built again (None: it says so itself), and whether it is trained from scratch."""
    name = options.model or "gru"
    library, _, kind = name.partition(":")
    if name != "gru" and library != "transformers":
        if library == "hf" or Path(name).expanduser().is_dir():
            return *pretrained(kind if library == "hf" else name), None, False
        model, tokenizer = own_model(name)
        if tokenizer is None:
            raise UserError(f"--model {name} returned a model alone; return (model, tokenizer)")
        return model, tokenizer, None, False
    texts = vocabulary_texts([task.train], {"a": cfg.predict, "b": cfg.explain})
    tokenizer = small_tokenizer([*texts, cfg.behind], options.vocabulary)
    sizes: dict[str, Any] = {"width": options.width, "dropout": options.dropout}
    if name == "gru":
        spec = gru_spec(len(tokenizer), **sizes)
    else:
        spec = t5_spec(kind, len(tokenizer), layers=options.layers, **sizes)
    return spec.build(seed=fold(seed, "student")), tokenizer, spec, True


def own(run: Run, options: TextOptions, task: Task, cfg: Config, command: str) -> Report | None:
    model, tokenizer, spec, scratch = network(options, task, cfg, run.seed)
    cfg = cfg.settled(scratch)
    codec = Codec.of(
        model, tokenizer, max_input=cfg.max_input, max_target=cfg.max_target, strict=cfg.too_long == "stop"
    )
    codec.inputs([e.input for e in task.test], cfg.prefixes()["predict"], [e.where for e in task.test], "test inputs")
    made = distill(run, task, model, tokenizer, cfg, spec)
    student = made.answerer("student")
    student.model.to(run.device)
    found: dict[str, Any] = {"accuracy": task.accuracy(student.examples(task.test), task.test)}
    if not cfg.behind:
        labels = [str(e.label) for e in task.test]
        view = encode(student.codec, task.test, student.text["prefix"], labels, "")
        found["nll"] = token_nll(student.model, view)
    examples = shown(student, task)
    student.model.cpu()
    report = written(run, made, task, command, {"student": found})
    if report is not None:
        known = parse_report(task.test, task.kind)
        if any(e.taught for e in task.test):
            report.metrics["teacher_accuracy"] = known["right"] / known["rows"]
        report.tables, report.curves = [task.report(), examples], [losses(made), *selection(made)]
        report.notes += codec.notes()
        if scratch:
            report.notes.append("trained from scratch: the published gain rests on a pre-trained T5 (--model hf:NAME)")
    return report


# -- what the reports share ---------------------------------------------------------------------------------------


def written(run: Run, made: TextModels, task: Task, command: str, metrics: dict[str, Any]) -> Report | None:
    """Saves the students; a report of them, on the main process."""
    report = None
    if run.main:
        made.save(run.folder)
        rows = made.rows(run.folder, metrics)
        first = dict(metrics[rows[0].name])
        claims: list[Claim] = []
        report = Report(
            "distilling_step_by_step", f"Distilling step-by-step: {task.name}", command, run.seed, environment(), first,
            claims, rows, notes=list(made.notes),
        )  # fmt: skip
    run.barrier()
    return report


def losses(made: TextModels) -> Curve:
    """The loss of each task over the steps."""
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for key, name in (("predict_nll", "label"), ("explain_nll", "rationale")):
        rows = [r for r in made.logs if key in r]
        if rows:
            series[name] = ([r["step"] for r in rows], [r[key] for r in rows])
    return Curve("Loss of each task in training", "step", "nats per token", series)


def selection(made: TextModels) -> list[Curve]:
    """Accuracy on valid, by which the weights were selected; none where there is no such split."""
    rows = [r for r in made.logs if "valid_accuracy" in r]
    series: dict[str, tuple[Sequence[float], Sequence[float]]]
    series = {"valid": ([r["step"] for r in rows], [100 * r["valid_accuracy"] for r in rows])}
    return [Curve("Accuracy on valid; the best weights are kept", "step", "per cent", series)] if rows else []


def shown(student: Answerer, task: Task, count: int = 8) -> Table:
    """Test examples with the student's answers and, where it was taught to, its reasons."""
    some = list(task.test[:count])
    rows = [[e.input[:300], str(e.label), a] for e, a in zip(some, student.examples(some), strict=True)]
    columns = ["input", "label", "answer"]
    if student.text["explain"]:
        rows = [[*row, reason] for row, reason in zip(rows, student.examples(some, explain=True), strict=True)]
        columns.append("decoded rationale")
    return Table(
        "Answers on test examples", columns, rows, "rationales are decoded for inspection; answers do not need them"
    )
