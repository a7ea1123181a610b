"""DistillWeighted on real data; on built-in digits which sources fit a new task, and the claims of the card over seeds.

stillhouse run distill_weighted --out runs/dw
stillhouse run distill_weighted --data fashion-mnist --per-class 20 --sources runs/a/students/p00 runs/b/students/p00 --out runs/mine
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import Arrays, Batches, Data, Samples, Subset, load, split
from stillhouse.data.pools import Labelled, Regrouped, Unlabelled, few, open_pool, part_of
from stillhouse.distill import Distill
from stillhouse.encoders import Encoder, encode, open_encoder
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.models import ModelSpec
from stillhouse.options import ImageOptions
from stillhouse.outcomes import Member
from stillhouse.recipes.distill_weighted.recipe import Chosen, Config, Weighted, distill
from stillhouse.recipes.distill_weighted.selection import Selection, weigh
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.similarity import METRICS, probe
from stillhouse.system import fold
from stillhouse.trials import Results, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(ImageOptions):
    """Images with few labels, source models and a student."""

    BRINGS: ClassVar[tuple[str, ...]] = (*ImageOptions.BRINGS, "sources", "per_class", "pool", "cache")

    seeds: int = 6  # seeds for the claims of the built-in experiment
    sources: tuple[str, ...] = ()  # trained networks: RUN/students/NAME, timm:NAME, module:function, NAME=FILE
    per_class: int | None = None  # labelled samples of each class; the rest of the training part is the pool
    pool: str | None = None  # unlabelled samples: folder:PATH of image files at any depth, or as --data
    cache: Path | None = None  # folder for the sources' answers, to try other powers without asking again


PRESET = Config(epochs=200, batch=64, labelled_batch=20, optimizer="adamw", lr=3e-3, weight_decay=0.0)
TINY = replace(PRESET, epochs=2, batch=32, tune=(1.0, 4.0))
SOURCES = ("all ten digits", "0 to 4", "odd or even", "random labels", "permuted pixels")
TARGET = (5, 6, 7, 8, 9)
STUDENT = ModelSpec("stillhouse:mlp", 5, (1, 8, 8), options={"widths": [16]})
ARMS: dict[str, Mapping[str, Any]] = {
    "labels only": {"label": 1.0},
    "p = 0": {"power": 0.0},
    "p = 1": {"power": 1.0},
    "p = 4": {"power": 4.0},
    "p = 12": {"power": 12.0},
    "p from 1, 4, 9, 12": {"tune": (1.0, 4.0, 9.0, 12.0)},
    "nearest": {"rule": "nearest"},
    "worst source": {"rule": "nearest"},
}


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it; without --model and --data also the claims."""
    if options.own:
        data, pool = own_task(options)
        sources = [open_encoder(name, data) for name in options.sources]
        if not sources and cfg.label < 1:
            raise UserError("--sources is missing: give trained networks (RUN/students/NAME, timm:NAME, …)")
        spec = options.spec(data, "stillhouse:cnn")
        network = options.network(spec, run.seed)
        made = distill(run, data, pool, spec, sources, cfg, network=network, cache=options.cache)
    else:
        data, pool, _ = task(run.seed)
        made = distill(run, data, pool, STUDENT, zoo(run, run.seed), cfg)
    report = describe(run, made, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = list(options.children())
        seen = trials(run, {"sources": partial(look, run)}, seeds)["sources"]
        arms = trials(run, {arm: partial(once, run, arm, cfg) for arm in ARMS}, seeds)
        if report is not None:
            report.claims += claims(seen, arms, seeds)
            report.tables += [
                of_sources(seen), of_metrics(seen),
                table("Students", arms, {"student %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3),
                      "the sources' mixture %": ("teacher", 100.0, 2)}),
            ]  # fmt: skip
    return report


def own_task(options: OPTIONS) -> tuple[Data, Samples]:
    """The user's data as a few labelled samples and a pool."""
    whole = options.load_data("digits")
    if options.per_class is None and options.pool is None:
        raise UserError("which samples have no label? give --per-class N, or --pool with further samples")
    train: Samples = whole.train
    rest: Samples = whole.train
    if options.per_class is not None:
        train, rest = few(whole.train, options.per_class, options.seed)
    if options.pool is not None:
        how: dict[str, Any] = {k: getattr(options, k) for k in ("image_size", "augment", "skip_bad")}
        rest = open_pool(options.pool, whole.train, **how)
    note = f"{len(train)} labelled samples, {len(rest)} in the pool"
    return Data(whole.name, train, whole.test, extra=whole.extra, notes=(*whole.notes, note)), Unlabelled(rest)


# -- digits: five sources, and a task of five other classes ----------------------------------------------------------


def task(seed: int) -> tuple[Data, Samples, Samples]:
    """Digits 5 to 9 with 4 labels each and a pool, from one half of the training digits; the other half for sources."""
    whole = load("digits")
    mine, others = split(whole.train, 0.5, seed=fold("halves", seed))
    labelled, rest = few(part_of(mine, TARGET), 4, seed)
    return Data("digits 5 to 9", labelled, part_of(whole.test, TARGET)), Unlabelled(rest), others


def of_source(name: str, half: Samples, seed: int) -> Samples:
    """What a source learns from."""
    everything = np.arange(len(half))
    rng = np.random.default_rng(fold("source", name, seed))
    if name == "0 to 4":
        return part_of(half, range(5))
    if name == "odd or even":
        return Regrouped(half, {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]})
    if name == "random labels":
        return Labelled(half, rng.integers(0, 10, len(half)), half.classes)
    if name == "permuted pixels":
        x = half.take(everything)["input"].flatten(1)[:, torch.from_numpy(rng.permutation(64))]
        return Arrays(x.reshape(-1, *half.shape), half.labels, classes=half.classes)
    return half


def zoo(run: Run, seed: int, names: Sequence[str] = SOURCES, epochs: float = 40) -> list[Encoder]:
    """The sources of a seed, trained once."""
    data, _, half = task(seed)
    home, example = run.child(f"zoo-{seed}", seed=seed, quiet=True), data.train.take(np.arange(2))["input"]
    made = []
    for name in names:
        samples = of_source(name, half, seed)
        spec = ModelSpec("stillhouse:mlp", len(samples.classes), samples.shape, options={"widths": [64, 32]})
        optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01)
        plain = Distill(spec.build(seed=fold(seed, name)), None, objectives=(), optimizer=optimizer)
        fit(home, name.replace(" ", "-"), plain, Batches(samples, 64), epochs=epochs)
        made.append(Encoder(plain.outcome().cpu(), example, name=name))
    return made


def tiny(run: Run, cfg: Config = TINY, plain: bool = False) -> Chosen:
    """One run of about a second for the contract table; `plain` trains the student on the labels by `Distill`."""
    data, pool, _ = task(run.seed)
    pool = Subset(pool, np.arange(96), own_ids=True)
    if not plain:
        return distill(run, data, pool, STUDENT, zoo(run, run.seed, SOURCES[:2], 2), cfg)
    network = STUDENT.build(seed=run.seed)
    (how,) = Weighted(network, None, replace(cfg, label=1.0)).updates()
    alone = Distill(network, None, objectives=(), optimizer=how.optimizer, lr=how.lr, clip=how.clip)
    steps = round(cfg.epochs * (len(pool) // cfg.batch))
    fit(run, "distill", alone, Batches(data.train, cfg.labelled_batch), steps=steps)
    student = Member("student", network.eval(), spec=STUDENT)
    return Chosen([student], tuple(data.shape), tuple(data.classes), network, STUDENT)


def look(root: Run, run: Run) -> dict[str, Any]:
    """Every similarity of every source, and how good a linear classifier on it really is."""
    data, _, _ = task(run.seed)
    labels, true = data.train.labels, data.test.labels
    scores: dict[str, list[float]] = {name: [] for name in METRICS}
    accuracy = []
    for source in zoo(root, run.seed):
        features, probabilities = encode(source, data.train)
        assert probabilities is not None
        for name, m in METRICS.items():
            scores[name].append(m.score((features if m.looks_at == "features" else probabilities).numpy(), labels))
        found = probe(features.numpy(), labels, len(TARGET))
        judged = encode(source, data.test)[0].numpy() @ found.weight.T + found.bias
        accuracy.append(float((judged.argmax(1) == true).mean()))
    return {"scores": scores, "accuracy": accuracy}


def once(root: Run, arm: str, cfg: Config, run: Run) -> dict[str, Any]:
    """A student of one arm, judged on the test digits 5 to 9."""
    data, pool, _ = task(run.seed)
    sources = zoo(root, run.seed)
    if arm == "worst source":  # by what its classifier really does: nobody would know without the test digits
        accuracy = root.child(f"sources-{run.seed}").memo("result", partial(look, root, run))["accuracy"]
        sources = [sources[int(np.argmin(accuracy))]]
    made = distill(run, data, pool, STUDENT, sources, replace(cfg, **ARMS[arm]))
    z, y = made.logits(data.test)
    found = classification(z[0], y)
    out = {"accuracy": found["accuracy"], "nll": found["nll"], "teacher": None, "power": None}
    if made.selection is not None:
        said = mixture(made.selection, sources, data.test)
        out |= {"teacher": float((said.argmax(1) == y).float().mean()), "power": made.selection.power}
    return out


def mixture(selection: Selection, sources: Sequence[Encoder], samples: Samples) -> Tensor:
    """Σ_s w_s q_s over the used sources, (N, C)."""
    said = [
        selection.weights[k] * predict(selection.teacher(sources[k], k), samples)[0].softmax(1) for k in selection.kept
    ]
    return torch.stack(said).sum(0)


def claims(seen: list[dict[str, Any]], arms: Results, seeds: list[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""

    def points(a: str, b: str) -> float:
        return 100 * (mean(arms[a], "accuracy") - mean(arms[b], "accuracy"))

    first = sum(int(np.argmax(r["scores"]["parc"])) == 0 for r in seen)
    need = len(seeds) - len(seeds) // 6
    labels, worst, uniform = (
        points("p = 12", "labels only"),
        points("nearest", "worst source"),
        points("p = 12", "p = 0"),
    )
    return [
        Claim("seeds in which PARC ranks the source of all ten digits first", first >= need, first, need, seeds),
        Claim("accuracy: p = 12 − labels only, points", labels >= 3, labels, 3.0, seeds),
        Claim("accuracy: nearest − worst source, points", worst >= 5, worst, 5.0, seeds),
        Claim("accuracy: p = 12 − p = 0, points", uniform >= 2, uniform, 2.0, seeds),
    ]


def of_sources(seen: list[dict[str, Any]]) -> Table:
    """Each source's similarity and the accuracy of its linear classifier, means over seeds."""
    names = ["parc", "leep", "nce", "h-score", "knn", "logistic"]
    rows: list[list[Any]] = []
    for k, source in enumerate(SOURCES):
        scores = [np.mean([r["scores"][m][k] for r in seen]) for m in names]
        right = [100 * r["accuracy"][k] for r in seen]
        rows.append([source, f"{np.mean(right):.1f}", *(f"{s:.3f}" for s in scores)])
    note = "means over seeds; the linear classifier is fitted on 20 labels and judged on the test digits 5 to 9"
    return Table("Similarity of the sources", ["source", "linear classifier %", *names], rows, note)


def of_metrics(seen: list[dict[str, Any]]) -> Table:
    """How well each similarity orders the sources."""
    from scipy.stats import spearmanr

    rows: list[list[Any]] = []
    for name in METRICS:
        best = sum(int(np.argmax(r["scores"][name])) == int(np.argmax(r["accuracy"])) for r in seen)
        order = np.nanmean([spearmanr(r["scores"][name], r["accuracy"]).statistic for r in seen])
        rows.append([name, f"{best} of {len(seen)}", f"{order:.2f}"])
    columns = ["similarity", "finds the best source", "rank correlation with the classifiers' accuracy"]
    return Table("Which similarity orders the sources best", columns, rows, "over seeds; five sources in each")


def describe(run: Run, made: Chosen, data: Data, cfg: Config, command: str) -> Report:
    """The report of one run: the sources, their weights for every power, the student."""
    made.save(run.folder)
    students, metrics, _ = made.measure(data, run.folder, run.device)
    steps = [r["step"] for r in made.logs]
    terms: dict[str, Any] = {
        k: (steps, [r[k] for r in made.logs]) for k in ("label", "teach") if made.logs and k in made.logs[0]
    }
    report = Report(
        system="distill_weighted", title=f"{cfg.rule} sources for {data.name}", command=command, seed=run.seed,
        environment=environment(), metrics=metrics, claims=[], students=students, cost=made.cost,
        notes=[*data.notes, *made.notes], curves=[Curve("Loss, labels and sources", "step", "loss", terms)],
    )  # fmt: skip
    s = made.selection
    if s is not None:
        rows = []
        for k, name in enumerate(s.names):
            right, used = s.held_out.get(str(k)), str(k) in s.C
            rest = [f"{s.C[str(k)]:g}" if used else "–", "–" if right is None else f"{100 * right:.1f}"]
            rows.append([name, f"{s.scores[k]:.4f}", f"{s.weights[k]:.4f}", *rest])
        columns = ["source", cfg.metric, "weight", "inverse penalty", "held-out labels %"]
        note = f"p = {s.power:g}; sources without an inverse penalty were dropped and never saw the pool"
        report.tables.append(Table("Sources", columns, rows, note))
        powers = [p / 2 for p in range(41)]
        lines = np.array([weigh(s.scores, replace(cfg, rule="weighted"), p) for p in powers]).T.tolist()
        series = {n: (powers, line) for n, line in zip(s.names, lines)}
        report.curves.append(Curve("Weight of each source by the power p", "p", "weight", series))
    return report
