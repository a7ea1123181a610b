"""Distilled sets on real data, against as many random real samples, hard labels and the full data.

stillhouse run soft_label_dataset_distillation --out runs/sldd                          # digits: the claims of the card
stillhouse run soft_label_dataset_distillation --data fashion-mnist --model stillhouse:lenet --out runs/fashion
stillhouse run soft_label_dataset_distillation --data sst2 --samples 20 --passes 5 --out runs/text
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.evaluate import environment, spread
from stillhouse.models import ModelSpec
from stillhouse.options import ImageOptions
from stillhouse.outcomes import DataSet
from stillhouse.recipes.soft_label_dataset_distillation import arms as compared
from stillhouse.recipes.soft_label_dataset_distillation import sentences
from stillhouse.recipes.soft_label_dataset_distillation.arms import SOFTMAX
from stillhouse.recipes.soft_label_dataset_distillation.config import Config
from stillhouse.recipes.soft_label_dataset_distillation.pictures import label_table, preview, step_size_curve
from stillhouse.recipes.soft_label_dataset_distillation.recipe import distill
from stillhouse.report import Claim, Image, Report
from stillhouse.text.sentences import look
from stillhouse.trials import trials


@dataclass(frozen=True)
class SetOptions(ImageOptions):
    """Images or sentences."""

    model: str | None = None  # stillhouse:lenet, …:NAME or package.module:function; for sentences bag, cnn or lstm
    data: str | None = None  # images as everywhere; sst2, FILE.jsonl of {"text", "label"}, or a function of such rows
    vectors: Path | None = None  # word vectors, "word v1 v2 …" a line (default: learned on the training sentences)
    words: int = 5000  # sentences: size of the vocabulary
    width: int = 50  # sentences: size of a word vector learned here
    length: int = 32  # sentences: words; longer ones are cut


OPTIONS = SetOptions
PRESET = Config(
    samples=5, passes=10, classes=(0, 1, 2, 3, 4), weights="zeros", step_size=0.1, lr=0.02, epochs=300, decay=100,
    segment=1,
)  # fmt: skip
TINY = replace(PRESET, samples=3, blocks=2, passes=2, classes=(0, 3, 7), epochs=6, decay=2, batch=64)

NETWORKS = "stillhouse.recipes.soft_label_dataset_distillation.text_nets"


def tiny(run: Run, cfg: Config = TINY, base: ModelSpec = SOFTMAX, text: bool = False) -> DataSet:
    """One set of a second or less from 192 digits, or from 60 sentences, for the contract table."""
    if not text:
        data = load("digits", limit=192)
        nets = [base.build(seed=s) for s in range(3)] if cfg.start == "pool" else []
        return distill(run, data, base, cfg, nets=nets)
    subjects, ends = ("the film", "this story", "a plot", "the cast", "it"), ("!", ".", ", really")
    rows = [
        {"text": f"{s} is {word}{end}", "label": label}
        for label, words in (("bad", ("dull", "awful")), ("good", ("fine", "great")))
        for word in words for s in subjects for end in ends
    ]  # fmt: skip
    data = sentences.sentence_data({"train": rows}, "rows", width=8, length=6)
    spec = ModelSpec(f"{NETWORKS}:cnn", 1 if cfg.one_logit else 2, tuple(data.shape), options={"filters": 4})
    return distill(run, data, spec, cfg, kind="embeddings")


def main(run: Run, options: SetOptions, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it: learn a set, save it, train on it, compare; the report."""
    data, kind = open_data(options)
    spec = model_for(options, data, kind, cfg)
    net = spec.build(seed=run.seed, pretrained=options.pretrained)
    distances = None
    if cfg.label_init == "similar" and options.vectors is not None and kind != "embeddings":
        distances = sentences.name_distances(data.classes, options.vectors)
    began = time.monotonic()
    dataset = distill(run, data, net if options.pretrained else spec, cfg, distances=distances, kind=kind)
    report = describe(run, dataset, data, spec, cfg, command, time.monotonic() - began)
    if run.main:
        dataset.save(run.folder)
    run.barrier()
    seeds = list(options.children())
    if not options.own or options.data == "sst2":
        made = compared.text_arms(data, spec, cfg, kind) if options.own else compared.digits_arms(data, cfg)
        found = trials(run, made, seeds)
        claims = compared.text_claims if options.own else compared.digits_claims
        report.claims = claims(data, found, seeds)
        report.tables = [*compared.tables(found), *report.tables]
    else:
        real = run.memo("random real", lambda: compared.random_real(data, spec, cfg, kind, run))
        points = 100 * (report.metrics["accuracy"]["mean"] - real["accuracy"])
        report.metrics["random_real_accuracy"] = real["accuracy"]
        text = "test accuracy, distilled set − as many random real samples at their best constant step size, points"
        report.claims = [Claim(text, points > 0, points, 0.0, [run.seed])]
    return report if run.main else None


def open_data(options: SetOptions) -> tuple[Data, str]:
    """The data named by ``--data``, and what its samples are called."""
    how: dict[str, Any] = {k: getattr(options, k) for k in ("words", "width", "length", "vectors")}
    name = options.data or "digits"
    parts, given = look(name)
    if parts is not None:
        return sentences.sentence_data(parts, name, seed=options.seed, **how), "embeddings"
    data = options.load_data("digits", given=given)
    return data, "images" if len(data.shape) == 3 else "features"


def model_for(options: SetOptions, data: Data, kind: str, cfg: Config) -> ModelSpec:
    """The network named by ``--model``; else softmax regression (built-in digits), LeNet, an MLP or a bag of words."""
    if not options.own:
        return SOFTMAX
    usual = "stillhouse:lenet" if kind == "images" and min(data.shape[1:]) >= 12 else "stillhouse:mlp"
    name = options.model or ("bag" if kind == "embeddings" else usual)
    if kind == "embeddings" and name in ("bag", "cnn", "lstm"):
        name = f"{NETWORKS}:{name}"
    return replace(options.spec(data, name), name=name, classes=1 if cfg.one_logit else len(data.classes))


def stored_bytes(data: Data) -> int:
    """Bytes of the training inputs as they are stored: arrays in their own type, sentences as 16-bit word numbers."""
    samples: Any = data.train
    part = 1.0
    while hasattr(samples, "parent"):
        part, samples = part * len(samples) / len(samples.parent), samples.parent
    if hasattr(samples, "word_ids"):
        return 2 * samples.word_ids.size
    values = getattr(samples, "x", None)
    return int(part * values.nbytes) if values is not None else 4 * len(data.train) * int(np.prod(data.shape))


def describe(
    run: Run, dataset: DataSet, data: Data, spec: ModelSpec, cfg: Config, command: str, seconds: float
) -> Report:
    """The report of one set: what it is, how good a network trained on it is, how it was learned."""
    sizes, whole = dataset.bytes(), stored_bytes(data)
    own = sizes[dataset.facts["kind"]] + sizes["labels"] + sizes["step_sizes"]
    metrics: dict[str, Any] = {
        "accuracy": spread(compared.evaluate(run, dataset, data.test, spec, cfg)),
        "samples": len(dataset["labels"]),
        "training_steps": cfg.steps,
        "set_bytes": own,
        "full_data_bytes": whole,
        "compression": whole / own,
    }
    if cfg.start == "known":
        metrics["start_bytes"] = sizes["start"]
    title = f"{len(dataset['labels'])} distilled samples · {spec.name} on {data.name}"
    cost = {"learning_seconds": seconds, "outer_steps": len(data.train) // min(cfg.batch, len(data.train)) * cfg.epochs}
    report = Report("soft_label_dataset_distillation", title, command, run.seed, environment(), metrics, [], [], cost)
    picture = preview(dataset)
    if picture is not None:
        dataset.pictures["preview"] = picture
        report.images.append(
            Image("The distilled set, all samples on one scale; below each its largest labels", picture)
        )
    report.tables += label_table(dataset)
    report.curves += step_size_curve(dataset, run.log("distil"))
    report.notes += [*data.notes]
    if cfg.start == "known":
        report.notes.append("Known start: the set trains a network from its own starting weights, saved with it.")
    return report
