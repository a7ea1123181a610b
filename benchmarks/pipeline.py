"""One WML run against the classical pipeline: train the base, prune it for each budget, fine-tune each with KD.

    .venv/bin/python benchmarks/pipeline.py --data fashion-mnist --out runs/pipeline
    .venv/bin/python benchmarks/pipeline.py --quick --out /tmp/pipeline

Both give students of the same budgets (pruning is ours on torch-pruning's graph) from the same data. They are compared
twice. `steps`: S optimiser steps in all, where a WML step moves all M students at once; the pipeline gives S/2 to
the base and the rest to the M students in equal parts. `compute`: the pipeline gets as many steps as cost the same
multiply-accumulates as the WML run (a backward pass counted as two forward passes; WML with its trunk once per step
and its outer steps, KD with the teacher's forward pass), divided in the same way. Every part is resumable.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from common import pm, remember, table, write
from online import Task, load_data
from online_arms import SETTINGS

import torch  # isort: skip
from torch import nn

from stillhouse.data import Batches, Data, split
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import classification, count_macs, count_params, environment, predict
from stillhouse.models import ModelSpec
from stillhouse.objectives import cross_entropy
from stillhouse.recipes.wml.recipe import Config, batches_of, distill, make_peers, part_data
from stillhouse.students.norms import recalibrate
from stillhouse.students.prune import find_groups, fit_budget, score_groups
from stillhouse.teachers import Frozen
from stillhouse.weights import cosine

NAMES = ("WML", "pipeline, equal steps", "pipeline, equal compute")


def optimiser(cfg: Config) -> Any:
    """The optimiser of the WML run, also for the pipeline."""
    if cfg.optimizer == "adamw":
        return partial(torch.optim.AdamW, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay)


def judged(model: nn.Module, data: Data, run: Run) -> dict[str, Any]:
    z, y = predict(model, data.test, device=run.device)
    model.cpu()
    found = classification(z, y)
    size = {"params": count_params(model), "macs": count_macs(model, torch.zeros(1, *data.shape))}
    return {"accuracy": found["accuracy"], "nll": found["nll"], **size}


def wml(run: Run, data: Data, spec: ModelSpec, cfg: Config, steps: int) -> dict[str, Any]:
    """The students of one WML run of `steps` steps, and what a sample of it costs in multiply-accumulates."""
    train, held, _ = part_data(data, cfg, run.seed)
    cfg = Config(**{**vars(cfg), "epochs": steps / (len(train) // cfg.batch)})
    family = distill(run, data, spec, cfg)
    peers, *_ = make_peers(run, spec.build(seed=run.seed), train, cfg)
    example = torch.zeros(1, *data.shape)
    forward = count_macs(peers, example)  # the trunk once
    updates = steps // cfg.outer_every if held is not None else 0
    outer = updates * (3 + 3) * forward  # backward and forward on held-out data; a forward-mode pass, about 3 forwards
    total = cfg.batch * (3 * forward * steps + outer)
    return {"students": [judged(m.model, data, run) for m in family], "macs": total, "steps": steps}


def pipeline(run: Run, data: Data, spec: ModelSpec, cfg: Config, sizes: list[int], steps: int) -> dict[str, Any]:
    """Train the base, prune it to the parameters or multiply-accumulates of `sizes`, fine-tune each with KD."""
    source, example = Batches(data.train, cfg.batch), torch.zeros(1, *data.shape)
    warm, m = cosine(round(0.05 * steps / 2)), len(sizes)
    alone = steps // 2
    base = Distill(spec.build(seed=run.seed), None, alpha=0.0, optimizer=optimiser(cfg), lr=warm, clip=cfg.clip)
    fit(run, "base", base, source, steps=alone)
    teacher = base.student.cpu().eval()
    recalibrate(teacher, batches_of(data.train, cfg.batch, run.seed))
    ids = np.sort(np.random.default_rng(run.seed).permutation(len(data.train))[:512])
    seen = data.train.take(ids)
    groups, _ = find_groups(teacher, example, scope=cfg.scope)
    scores = score_groups(
        teacher, groups, cfg.score, lambda net: cross_entropy(net(seen["input"]), seen["label"]).mean()
    )
    whole, students = count_macs(teacher, example), []
    macs = cfg.batch * 3 * whole * alone
    each = (steps - alone) // m
    for i, size in enumerate(sizes):
        ratio = max(0.0, 1 - size / whole)
        plan, _ = fit_budget(teacher, example, groups, scores, ratio, layer_bound=cfg.layer_bound)
        learner = Distill(
            plan.build(teacher), Frozen(teacher, copy=True), alpha=cfg.alpha, T=cfg.temperature,
            optimizer=optimiser(cfg), lr=cosine(round(0.05 * each)), clip=cfg.clip,
        )  # fmt: skip
        fit(run, f"student{i}", learner, source, steps=each)
        student = learner.student.cpu().eval()
        recalibrate(student, batches_of(data.train, cfg.batch, run.seed))
        macs += cfg.batch * (3 * count_macs(student, example) + whole) * each
        students.append(judged(student, data, run))
    return {"students": students, "base": judged(teacher, data, run), "macs": macs, "steps": alone + each * m}


def compare(args: argparse.Namespace, name: str, seed: int, steps: int) -> dict[str, dict[str, Any]]:
    """All three on one seed."""
    setting = SETTINGS[name]
    data = load_data(Task(name, "clean", "wml", seed, steps, {}))
    if args.quick and len(data.train) > 600:
        data.train = split(data.train, 600 / len(data.train), seed=0)[1]
    cfg, folder = setting.cfg, Path(args.out) / name / f"seed{seed}"
    spec = ModelSpec(setting.model, len(data.classes), tuple(data.shape), options=setting.options)

    def part(which: str, make: Any) -> dict[str, Any]:
        run = Run(folder / which, seed=seed, device=args.device, quiet=True)
        found = remember(folder / which / "result.json", {"steps": steps, "quick": args.quick}, partial(make, run))
        accuracies = ", ".join(f"{100 * s['accuracy']:.1f}" for s in found["students"])
        print(f"{name} seed {seed} {which}: {accuracies} % in {found['steps']} steps", flush=True)
        return found

    one = part("wml", lambda run: wml(run, data, spec, cfg, steps))
    sizes = [s["macs"] for s in one["students"]]
    equal = part("steps", lambda run: pipeline(run, data, spec, cfg, sizes, steps))
    more = max(1, round(equal["steps"] * one["macs"] / equal["macs"]))
    compute = part("compute", lambda run: pipeline(run, data, spec, cfg, sizes, more))
    return dict(zip(NAMES, (one, equal, compute), strict=True))


def rows(results: list[dict[str, dict[str, Any]]]) -> list[list[str]]:
    made = []
    for way in NAMES:
        found = [r[way] for r in results]
        cost = [f"{fmean(f['steps'] for f in found):,.0f}", f"{fmean(f['macs'] for f in found) / 1e12:.3g}"]
        if "base" in found[0]:
            made.append([way, "base (not pruned)", *numbers([f["base"] for f in found]), "", ""])
        for i in range(len(found[0]["students"])):
            made.append(
                [way, f"student {i}", *numbers([f["students"][i] for f in found]), *(cost if not i else ["", ""])]
            )
        means = [fmean(s["accuracy"] for s in f["students"]) for f in found]
        made.append([f"**{way}**", "**mean**", pm(means, 2, 100), "", "", "", "", ""])
    return made


def numbers(students: list[dict[str, Any]]) -> list[str]:
    sizes = [f"{fmean(s[k] for s in students):,.0f}" for k in ("params", "macs")]
    return [pm([s["accuracy"] for s in students], 2, 100), pm([s["nll"] for s in students], 3), *sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SETTINGS, default=["digits"])
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 5 for digits, else 3)")
    parser.add_argument("--steps", type=int, help="optimiser steps in all (default: by data set)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/pipeline")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 40 steps, 600 samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["way", "model", "accuracy %", "NLL", "parameters", "MACs", "steps", "training TMACs"]
    for name in args.data:
        seeds = args.seeds or (2 if args.quick else SETTINGS[name].seeds)
        steps = args.steps or (40 if args.quick else SETTINGS[name].steps)
        results = [compare(args, name, seed, steps) for seed in range(seeds)]
        text = f"### {name}: one WML run of {steps} steps, {seeds} seed(s)\n\n" + table(columns, rows(results))
        write(Path(args.out) / name / "report.json", {"environment": environment(), "results": results})
        (Path(args.out) / name / "report.md").write_text(text + "\n")
        print("\n" + text + "\n", flush=True)


if __name__ == "__main__":
    main()
