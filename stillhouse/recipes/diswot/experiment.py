"""DisWOT on real data: the student that the search finds; on built-in digits the claims of the card over seeds.

stillhouse run diswot --out runs/diswot              # digits: all 54 students scored, 12 trained per seed
stillhouse run diswot --data cifar10 --model stillhouse:resnet56 --budget 200000 --out runs/s0
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse import objectives as O
from stillhouse.data import Data, load, split
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, evaluating, pareto, predict
from stillhouse.models import ModelSpec
from stillhouse.options import ImageOptions
from stillhouse.recipes.diswot.recipe import Config, Found, distill, train
from stillhouse.recipes.diswot.scoring import Scorer
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.search import UNITS, Search, kendall_interval, search, student
from stillhouse.spaces import Choices, named
from stillhouse.system import fold
from stillhouse.taps import ends, tap
from stillhouse.trials import table, trials

OPTIONS = ImageOptions
# What `stillhouse run diswot` does without a model or data.
PRESET = Config(space="resnet-small", strategy="all", teacher_epochs=30, epochs=30, batch=32)
# The smallest settings that touch everything, for the contract table.
TINY = replace(
    PRESET, strategy="evolution", evaluations=5, population=3, sample=2, best=1, repeats=1, score_batch=16, students=2,
    b1=10.0, b2=0.1, teacher_epochs=1, epochs=1,
)  # fmt: skip
SHAPE, LARGE, SMALL = (1, 8, 8), (3, 3, 3, 16), (1, 1, 1, 8)  # digits; the teacher; the student of the distiller arms
ARMS = {"KD": (0.0, 0.0), "KD + R": (1.0, 0.0), "KD + R + ICC": (1.0, 1.0)}  # factors of B1 and B2
B1, B2 = 3000.0, 1.0
TRAINED = 12


def main(run: Run, options: ImageOptions, cfg: Config, command: str) -> Report | None:
    """One search and what it found, and without --model and --data the claims; the report, on the main process."""
    own = options.own
    if not own and cfg.space not in ("resnet-small", "conv"):
        raise UserError(f"the built-in experiment has the spaces resnet-small and conv; give --data with {cfg.space}")
    data = options.load_data("digits") if own else few_digits(run.seed)
    spec = options.spec(data, "stillhouse:resnet56") if own else teacher_of(cfg)
    network = spec.build(seed=run.seed, pretrained=True) if options.pretrained else None
    found = distill(run, data, spec, cfg, network=network)
    report = describe(run, found, data, spec, cfg, command) if run.main else None
    run.barrier()
    if not own:
        results = trials(run, {"digits": lambda child: once(child, cfg)}, options.children())["digits"]
        if report is not None:
            claim(report, results, options.children())
    return report


def tiny(run: Run, cfg: Config = TINY, norm: bool = True) -> Found:
    """One run of about a second on 128 digits, for the contract table; without batch norm for several processes."""

    def make(arch: Any) -> ModelSpec:
        options = {"depths": [1, *arch], "widths": [4, 4, 8], "norm": norm}
        return ModelSpec("stillhouse.spaces:Stages", 10, SHAPE, options=options)

    space = Choices({"two": (1, 2), "three": (1, 2, 3)}, make)
    return distill(run, load("digits", limit=128), make((2, 3)), cfg, space=space)


def describe(run: Run, found: Found, data: Data, spec: ModelSpec, cfg: Config, command: str) -> Report:
    """The report of one search: the students, the ranking, how the best score grew, what it cost."""
    found.save(run.folder)
    students, metrics, matrices = found.measure(data, run.folder, run.device)
    seen = found.search
    assert seen is not None
    best = seen.curve()
    return Report(
        system="diswot",
        title=f"students of {spec.name} from {cfg.space} on {data.name}",
        command=command,
        seed=run.seed,
        environment=environment(),
        metrics=metrics,
        claims=[],
        students=students,
        cost=found.cost,
        curves=[Curve("Search", "evaluation", "best score so far", {cfg.strategy: (list(range(len(best))), best)})],
        tables=[ranking(seen)],
        matrices=matrices,
        notes=[*data.notes, *found.notes],
    )


def ranking(seen: Search, most: int = 20) -> Table:
    """The best students with their scores, and those no other student beats in score and cost."""
    found = [c for c in seen.ranking() if c.score is not None]
    front = pareto([(c.cost, c.score) for c in found])
    rows = [
        [rank, short(c.arch), _4(c.score), _4(c.parts["relation"]), _4(c.parts["semantic"]), f"{c.cost:,.6g}",
         "yes" if on else ""]
        for rank, (c, on) in enumerate(zip(found, front, strict=True), 1) if rank <= most or on
    ]  # fmt: skip
    note = (
        f"{len(found)} students scored; the first {most} and those on the front (none scores higher at no more cost); "
        f"budget {seen.limit:,.6g} {UNITS[seen.measure]}"
    )
    return Table("Ranking", ["rank", "student", "score", "R", "S", UNITS[seen.measure], "front"], rows, note)


def _4(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def short(arch: Any) -> str:
    return "-".join(map(str, arch)) if isinstance(arch, tuple) else str(arch)


# -- the claims of the card --------------------------------------------------------------------------------------


def teacher_of(cfg: Config) -> ModelSpec:
    """The largest network of the space."""
    spec = named(cfg.space, SHAPE, 10).build(LARGE)
    assert isinstance(spec, ModelSpec)
    return spec


def few_digits(seed: int) -> Data:
    """300 training digits, drawn by class, so that students differ; all 539 test digits."""
    whole = load("digits")
    _, learn = split(whole.train, 300 / len(whole.train), seed=fold("diswot digits", seed))
    return Data("digits 300", learn, whole.test, notes=whole.notes)


def once(run: Run, cfg: Config) -> dict[str, Any]:
    """One seed: the teacher; every student's score; twelve trained; three ways to distil into the smallest."""
    data, space, spec = few_digits(run.seed), named(cfg.space, SHAPE, 10), teacher_of(cfg)
    teacher = train(run, "teacher", spec.build(seed=run.seed), None, data, cfg, cfg.teacher_epochs)
    scorer = Scorer(run, space, data.train, teacher, spec, cfg)
    seen = search(run, space, scorer, SHAPE, strategy="all", settings=cfg)
    ranked = seen.ranking()
    others = np.random.default_rng(fold(run.seed, "which")).permutation(np.arange(1, len(ranked)))
    rows = [
        run.memo(f"trained{k}", lambda c=c, k=k: one_student(run, k, c, data, teacher, cfg))  # type: ignore[misc]
        for k, c in enumerate([ranked[0], *(ranked[i] for i in others[: TRAINED - 1])])
    ]
    arms = {name: distilled(run, name, data, teacher, cfg) for name in ARMS}
    accuracy = classification(*predict(teacher, data.test))["accuracy"]
    return {"teacher": accuracy, "scoring": seen.seconds, "scored": len(ranked), "rows": rows, "arms": arms}


def one_student(run: Run, k: int, c: Any, data: Data, teacher: nn.Module, cfg: Config) -> dict[str, Any]:
    """A student of the comparison, trained by plain KD."""
    began, plain = time.perf_counter(), replace(cfg, b1=0.0, b2=0.0)
    model, _ = student(named(cfg.space, SHAPE, 10), c.arch, fold(run.seed, "train", c.arch))
    model = train(run, f"student{k}", model, teacher, data, plain, cfg.epochs)
    seconds = time.perf_counter() - began
    accuracy = classification(*predict(model, data.test))["accuracy"]
    facts = {"arch": c.arch, "score": c.score, **c.parts, "params": c.cost, "scoring": c.seconds}
    return {**facts, "training": seconds, "accuracy": accuracy}


def distilled(run: Run, name: str, data: Data, teacher: nn.Module, cfg: Config) -> dict[str, float]:
    """One distiller arm: the smallest student's accuracy, and its R and ICC to the teacher, on the test digits."""
    r, icc = ARMS[name]
    arm = replace(cfg, b1=r * B1, b2=icc * B2)
    model, _ = student(named(cfg.space, SHAPE, 10), SMALL, fold(run.seed, "arms"))
    model = train(run, f"arm {len(name)}", model, teacher, data, arm, cfg.epochs)
    return {"accuracy": classification(*predict(model, data.test))["accuracy"], **apart(teacher, model, data)}


@torch.no_grad()
def apart(teacher: nn.Module, model: nn.Module, data: Data, size: int = 64) -> dict[str, float]:
    """R and ICC between two trained networks on batches of the test set, each normalising with its own statistics."""
    batches = [data.test.take(np.arange(i, i + size))["input"] for i in range(0, len(data.test) - size + 1, size)]

    def features(net: nn.Module) -> list[torch.Tensor]:
        with evaluating(net):
            where = ends(net, batches[0]).features
            with tap(net, where) as seen:
                found = []
                for x in batches:
                    net(x)
                    found.append(seen[where])
                return found

    pairs = list(zip(features(teacher), features(model), strict=True))
    found = {"R": O.similarity, "ICC": O.inter_channel}
    return {k: sum(float(f(t, s).mean()) for t, s in pairs) / len(pairs) for k, f in found.items()}


def claim(report: Report, results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """The card's claims as measured, holding or not, and their tables."""
    s = list(seeds)
    rows = [r["rows"] for r in results]
    share = [r["scoring"] / (r["scored"] * np.mean([x["training"] for x in r["rows"]])) for r in results]
    gain = [100 * (x[0]["accuracy"] - float(np.median([y["accuracy"] for y in x]))) for x in rows]
    ratio = [r["arms"]["KD + R"]["R"] / r["arms"]["KD"]["R"] for r in results]
    n = results[0]["scored"]
    report.claims += [
        Claim(f"a. scoring all {n} students, part of the time of training them, largest over seeds",
              max(share) <= 0.02, max(share), 0.02, s),
        Claim("b. best-scored student − median of 12 trained, accuracy in points, mean over seeds",
              float(np.mean(gain)) >= 0, float(np.mean(gain)), 0.0, s),
        Claim("distiller: R on test digits, KD + R over KD alone, mean over seeds",
              float(np.mean(ratio)) <= 0.7, float(np.mean(ratio)), 0.7, s),
    ]  # fmt: skip
    found = []
    for name, key, sign in (("−(R + S)", "score", 1), ("−R", "relation", -1), ("−S", "semantic", -1),
                            ("parameters", "params", 1)):  # fmt: skip
        pairs = [([sign * x[key] for x in r], [x["accuracy"] for x in r]) for r in rows]
        mean, low, high = kendall_interval(pairs, seed=s[0])
        best = np.mean([100 * (r[int(np.argmax(a))]["accuracy"] - np.median(b)) for r, (a, b) in zip(rows, pairs)])
        found.append([name, f"{mean:.2f}", f"{low:.2f} to {high:.2f}", f"{best:+.2f}"])
        report.metrics.update({"kendall_tau": mean} if key == "score" else {})
    note = f"{TRAINED} students per seed, {len(s)} seeds; no threshold: these are few students of nearly equal accuracy"
    columns = ["student ranked by", "Kendall τ with accuracy", "95 % bootstrap", "its first − median, points"]
    report.tables += [
        Table("c. Does the order agree with accuracy after distillation?", columns, found, note),
        trained(rows[0], s[0]),
        table(
            "Distillers, into the smallest student (1-1-1-8)",
            {name: [r["arms"][name] for r in results] for name in ARMS},
            {"accuracy %": ("accuracy", 100.0, 1), "R · 1000": ("R", 1000.0, 2), "ICC": ("ICC", 1.0, 3)},
            f"b1 = {B1:g}, b2 = {B2:g}; R and ICC to the teacher on test digits",
        ),
    ]
    report.metrics["teacher_accuracy"] = float(np.mean([r["teacher"] for r in results]))


def trained(rows: Sequence[Mapping[str, Any]], seed: int) -> Table:
    """The trained students of one seed, by score."""
    found = sorted(rows, key=lambda x: -x["score"])
    front = pareto([(x["params"], x["accuracy"]) for x in found])
    shown = [
        [k, short(tuple(x["arch"])), f"{x['score']:.4f}", f"{x['params']:,.0f}", f"{100 * x['accuracy']:.1f}",
         f"{x['scoring']:.3f}", f"{x['training']:.2f}", "yes" if on else ""]
        for k, (x, on) in enumerate(zip(found, front, strict=True), 1)
    ]  # fmt: skip
    columns = ["by score", "student", "score", "parameters", "accuracy %", "scoring s", "training s", "Pareto"]
    note = "Pareto: accuracy against parameters"
    return Table(f"The {len(rows)} trained students of seed {seed}", columns, shown, note)
