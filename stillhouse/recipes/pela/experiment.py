"""PELA on a user's trained network, and on built-in digits its arms over seeds.

stillhouse run pela --out runs/pela                          # digits: one student, and all arms over seeds
stillhouse run pela --model timm:deit_small_patch16_224 --pretrained --data folder:photos --out runs/thin
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.data import Data, Samples, load
from stillhouse.engine import Run
from stillhouse.evaluate import call, classification, environment, evaluating, fidelity, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.plain import train_first
from stillhouse.recipes.pela.config import Config
from stillhouse.recipes.pela.recipe import distill
from stillhouse.recipes.pela.system import deviation, feature_error
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.students.blocks import block_paths
from stillhouse.taps import tap
from stillhouse.teacher_options import TrainedOptions
from stillhouse.trials import Results, claim, difference, mean, table, trials

OPTIONS = TrainedOptions
PRESET = Config(ratio=6.0, epochs=8.0, teacher_epochs=40.0, batch=64, lr=1e-3, teacher_lr=2e-3)
TINY = replace(PRESET, epochs=1.0, teacher_epochs=1.0, tune_epochs=1.0, logits=0.5, batch=32)
VIT = {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
BASE = ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options=VIT)
SMALL = replace(BASE, options={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2})
OFF = {"feature": 0.0, "perturbation": 0.0}
LOW = {"labelled": 0.05}
ARMS: dict[str, dict[str, Any]] = {
    "SVD alone": {"epochs": 0.0},
    "SVD + CE": OFF,
    "SVD + PELA": {},
    "fresh factors + CE": {**OFF, "start": "fresh"},
    "5 % labels: SVD + CE": {**LOW, **OFF},
    "5 % labels: SVD + PELA": LOW,
    "c = 3: SVD alone": {"epochs": 0.0, "ratio": 3.0},
    "c = 3: SVD + PELA": {"ratio": 3.0},
}


def tiny(run: Run, cfg: Config = TINY, base: ModelSpec = SMALL) -> Family:
    """One run of about a second on 96 digits, for the contract table."""
    return distill(run, load("digits", limit=96), base, cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One thin network as the command makes it; without flags also every arm on digits, over seeds."""
    data = options.load_data("digits")
    spec, network, plan = BASE, None, None
    if options.own:
        spec, network, plan = options.trained(data, BASE.name, fresh=bool(cfg.teacher_epochs))
    family = distill(run, data, spec, cfg, network=network, plan=plan)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = options.children()
        arms = trials(run, {arm: partial(once, run, data, changes, cfg) for arm, changes in ARMS.items()}, seeds)
        if report is not None:
            report.claims += claims(arms, list(seeds))
            columns = {
                "accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3),
                "as its teacher %": ("agreement", 100.0, 2),
                "feature error": ("feature", 1.0, 4), "largest deviation": ("deviation", 1.0, 3),
                "teacher %": ("teacher", 100.0, 2),
            }  # fmt: skip
            note = "mean ± standard deviation over seeds; feature error: L_fm on the test digits"
            report.tables.append(table(f"Arms on digits at c = {cfg.ratio:g}", arms, columns, note))
    return report


def once(whole: Run, data: Data, changes: Mapping[str, Any], cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; the teacher is trained once per seed and is the same in every arm."""
    network = BASE.build(seed=run.seed)
    home = whole if run.seed == whole.seed else whole.child(f"given-{run.seed}", seed=run.seed, quiet=True)
    train_first(home, network, data, cfg)
    family = distill(run, data, BASE, replace(cfg, teacher_epochs=0.0, **changes), network=network)
    (z, *_), y = family.logits(data.test)
    t, _ = predict(network, data.test)
    student, same = family["student"].model, fidelity(t, z)["teacher_agreement"]
    deviations = [
        deviation(student.get_submodule(b["module"]), network.get_submodule(b["module"]).weight)  # type: ignore[arg-type]
        for b in family.budgets
    ]
    errors = block_errors(network, student, data.test)
    own = classification(z, y)
    return {
        "accuracy": own["accuracy"], "nll": own["nll"], "agreement": same, "teacher": classification(t, y)["accuracy"],
        "feature": sum(errors.values()) / len(errors), "deviation": max(float(d.detach()) for d in deviations),
    }  # fmt: skip


@torch.no_grad()
def block_errors(teacher: nn.Module, student: nn.Module, samples: Samples, most: int = 512) -> dict[str, float]:
    """MSE of every block's output on the first samples, without augmentation."""
    paths, x = block_paths(teacher), samples.take(np.arange(min(most, len(samples))))["input"]
    with evaluating(teacher), tap(teacher, paths) as t, evaluating(student), tap(student, paths) as s:
        call(teacher, x)
        call(student, x)
    return {p: float(feature_error(t[p], s[p], x).mean()) for p in paths}


def claims(arms: Results, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    alone, ce, pela, fresh, low_ce, low_pela, *_ = arms.values()
    share = mean(pela, "feature") / mean(ce, "feature")

    def points(text: str, a: Any, b: Any, least: float) -> Claim:
        return claim(f"{text}, accuracy in points", difference(a, b, "accuracy", 100.0), least, seeds)

    return [
        points("SVD + PELA − SVD alone", pela, alone, 1.0),
        points("SVD + CE − fresh factors + CE", ce, fresh, 1.0),
        points("5 % labels: PELA − CE", low_pela, low_ce, 0.5),
        Claim("feature error after PELA, as a part of that after CE", share <= 0.7, share, 0.7, list(seeds)),
    ]


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    rows = [
        [b["module"], f"{b['rows']}×{b['columns']}", b["rank"], f"{b['asked']:,.0f}", f"{b['kept']:,}",
         f"{100 * (b['kept'] / b['asked'] - 1):+.2f} %"]
        for b in family.budgets
    ]  # fmt: skip
    met = sum(b["met"] for b in family.budgets)
    names = [k for k in ("task", "feature", "logits", "perturbation") if any(k in r for r in family.logs)]
    lines: dict[str, Any] = {
        n: ([r["step"] for r in family.logs if n in r], [r[n] for r in family.logs if n in r]) for n in names
    }
    text = "layers that meet their budget within 1 %, or within one rank"
    name = family.spec.name if family.spec else type(family.base).__name__
    return Report(
        system="pela", title=f"{name} at 1/{cfg.ratio:g} of its weights on {data.name}", command=command, seed=run.seed,
        environment=environment(), metrics=metrics, students=students, cost=family.cost,
        claims=[Claim(text, met == len(rows), met, len(rows), [run.seed])],
        curves=[Curve("Losses of the intermediate stage, as weighted", "step", "loss", lines)] if lines else [],
        tables=[Table("Layers", ["layer", "weight", "rank", "weights asked for", "weights", "miss"], rows)],
        notes=[*data.notes, *family.notes],
    )  # fmt: skip
