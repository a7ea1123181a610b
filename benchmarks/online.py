"""Arms of online distillation on equal data, networks and numbers of optimiser steps.

    .venv/bin/python benchmarks/online.py --data digits --out runs/online --jobs 2
    .venv/bin/python benchmarks/online.py --data cifar10 --variants clean noise --tune --out runs/online --jobs 2
    .venv/bin/python benchmarks/online.py --quick --out /tmp/online        # a minute, to see that it works

Every (data, variant, arm, seed) is a run in a folder of its own under --out: an interrupted one is resumed, a
finished one read back. The table and the claims of the cards are printed and written to OUT/DATA/report.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import read, remember, write
from online_arms import ARMS, MUTUAL, SETTINGS, TRIED, TUNE_SEED, VARIANTS, WEIGHED
from online_report import Results, claims, text

import torch  # isort: skip

from stillhouse.data import Data, Relabelled, load, split
from stillhouse.engine import Run
from stillhouse.evaluate import classification, environment
from stillhouse.models import ModelSpec
from stillhouse.recipes.wml.experiment import poison
from stillhouse.recipes.wml.recipe import Config, distill, make_peers, part_data
from stillhouse.system import fold


@dataclass(frozen=True)
class Task:
    """One run; everything that its result depends on."""

    data: str
    variant: str
    arm: str
    seed: int
    steps: int
    changes: dict[str, Any]
    tuning: bool = False

    def folder(self, out: str) -> Path:
        point = "-".join(f"{k}{v}" for k, v in self.changes.items())
        name = f"tune/{self.arm}-{point}" if self.tuning else self.arm
        return Path(out) / self.data / self.variant / name / f"seed{self.seed}"


def load_data(task: Task) -> Data:
    """The data of a run; when tuning, its test part is made of training samples, so that no arm sees the test set."""
    noise = 0.3 if task.variant == "noise" else 0.0
    if task.data == "digits":  # 300 to learn, 150 held out for whoever asks, as in the card
        whole = load("digits")
        spare, part = split(whole.train, 450 / len(whole.train), seed=fold("digits", task.seed))
        learn, held = split(part, 1 / 3, seed=fold("held", task.seed))
        parts: list[Any] = [learn, held]
        if noise:
            parts = [Relabelled(p, noise=noise, seed=fold("noise", k, task.seed)) for k, p in enumerate(parts)]
        return Data("digits 300/150", parts[0], spare if task.tuning else whole.test, held_out=parts[1])
    how: dict[str, Any] = {"image_size": 16, "augment": "flip"} if task.data == "cifar10" else {}
    data = load(task.data, limit=10000, label_noise=noise, seed=task.seed, **how)
    if task.tuning:
        rest, judge = split(data.train, 0.1, seed=TUNE_SEED)
        return Data(data.name, rest, judge)
    return data


def configure(task: Task, data: Data) -> Config:
    """The arm's settings, with as many epochs as give the asked number of optimiser steps."""
    changes = {**ARMS[task.arm], **task.changes}
    if task.variant == "poison":
        equal = sorted(SETTINGS[task.data].cfg.ratios)[1]
        changes |= {"ratios": (equal,) * 4, "init": "fresh"}
    merged = round(changes.pop("merge", 0.0) * task.steps)
    cfg = replace(SETTINGS[task.data].cfg, **changes)
    train, _, _ = part_data(data, cfg, task.seed)

    def epochs(steps: int, samples: int) -> float:
        return steps / (samples // min(cfg.batch, samples))

    return replace(cfg, epochs=epochs(task.steps - merged, len(train)), merge_epochs=epochs(merged, len(data.train)))


def work(task: Task, out: str, device: str) -> dict[str, Any]:
    """Runs one task, or reads its result back."""
    torch.set_num_threads(1)
    folder = task.folder(out)

    def make() -> dict[str, Any]:
        data, setting = load_data(task), SETTINGS[task.data]
        cfg = configure(task, data)
        run = Run(folder, seed=task.seed, device=device, quiet=True)
        spec = ModelSpec(setting.model, len(data.classes), tuple(data.shape), options=setting.options)
        sharing = replace(cfg, share=task.changes.get("share", "tree"))
        make_peers(run, spec.build(seed=task.seed), data.train, sharing)  # kept in the folder: the same for all arms
        family = distill(run, data, spec, cfg, labels=poison if task.variant == "poison" else None)
        assert family.cost["steps"] == task.steps, (family.cost["steps"], task.steps)
        result = {**family.evaluate(data, run.device), **family.cost}
        _, held, _ = part_data(data, cfg, task.seed)
        if held is not None:
            z, y = family.logits(held, run.device)
            result["held_out_error"] = [1 - classification(a, y)["accuracy"] for a in z]
        return {k: list(v.values()) if isinstance(v, dict) else v for k, v in result.items()}

    settings = {"seed": task.seed, "steps": task.steps, "changes": task.changes}
    return remember(folder / "result.json", settings, make)


def run_all(tasks: Sequence[Task], args: argparse.Namespace) -> list[dict[str, Any] | None]:
    """Results in the order of the tasks, `jobs` at a time; None for one that failed, which stops nobody else."""
    results: list[dict[str, Any] | None] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for i, future in enumerate([pool.submit(work, task, args.out, args.device) for task in tasks]):
            try:
                results.append(future.result())
            except Exception as error:
                results.append(None)
                args.failed.append(tasks[i])
                print(f"[{i + 1}/{len(tasks)}] FAILED {tasks[i]}: {type(error).__name__}: {error}", flush=True)
            else:
                said(i, tasks, results[-1])
    return results


def said(i: int, tasks: Sequence[Task], r: Any) -> None:
    t = tasks[i]
    numbers = f"mean peer {100 * r['mean_accuracy']:.2f} %, ensemble {100 * r['ensemble_accuracy']:.2f} %"
    what = f"{t.data} {t.variant} {t.arm} seed {t.seed} {t.changes or ''}"
    print(f"[{i + 1}/{len(tasks)}] {what}: {numbers}, NLL {r['ensemble_nll']:.4f}, {r['seconds']:.0f} s", flush=True)


def tune(data: str, variant: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For every arm the settings with the best mean peer accuracy on samples set apart from the training data.

    First α and its ramp for every arm that teaches, then η and ρ (the floor) for those that move the importance.
    """
    path = Path(args.out) / data / variant / "tuned.json"
    steps = args.steps or SETTINGS[data].steps
    chosen: dict[str, dict[str, float]] = {arm: {} for arm in args.arms if arm in MUTUAL}
    scores: dict[str, list[tuple[float, dict[str, float]]]] = {arm: [] for arm in chosen}
    rounds = [
        (list(chosen), [{"alpha": a, "ramp": r} for a in args.alphas for r in args.ramps]),
        ([arm for arm in chosen if arm in WEIGHED], [{"eta": e, "floor": f} for e in args.etas for f in args.floors]),
    ]
    for arms, points in rounds:
        tasks = [
            Task(data, variant, arm, TUNE_SEED, steps, {**args.set, **chosen[arm], **point}, tuning=True)
            for arm in arms
            for point in points
        ]
        for task, result in zip(tasks, run_all(tasks, args), strict=True):
            if result is not None:
                choice = {k: v for k, v in task.changes.items() if k not in args.set}
                scores[task.arm].append((result["mean_accuracy"], choice))
        chosen = {arm: max(s, key=lambda pair: pair[0])[1] for arm, s in scores.items() if s}
    chosen = {**(read(path) or {}).get("chosen", {}), **chosen}
    write(path, {"chosen": chosen, "scores": scores})
    return chosen


def report(data: str, results: Results, args: argparse.Namespace) -> str:
    """Writes OUT/DATA/report.{json,md}; gives the Markdown."""
    held, folder = claims(results), Path(args.out) / data
    note = (
        f"Mean ± standard deviation over seeds; equal optimiser steps and batches; {args.jobs} run(s) at a time, "
        f"device {args.device}. Peers share a trunk (tree) except in `separate`."
    )
    flat = [{"variant": v, "arm": a, "results": rs} for (v, a), rs in results.items()]
    write(folder / "report.json", {"environment": environment(), "results": flat, "claims": held})
    made = text(data, results, held, note)
    (folder / "report.md").write_text(made + "\n")
    return made


def setting(pair: str) -> tuple[str, Any]:
    key, _, value = pair.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SETTINGS, default=["digits"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 5 for digits, else 3)")
    parser.add_argument("--steps", type=int, help="optimiser steps of every arm (default: by data set)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--tune", action="store_true", help="first choose α, its ramp, η and ρ per arm, with seed 100")
    for flag in ("--alphas", "--ramps", "--etas", "--floors"):
        parser.add_argument(flag, nargs="+", type=float, default=TRIED[flag[2:]], help="values to try with --tune")
    parser.add_argument("--share", choices=("tree", "none"), help="what peers share (one needs tree)")
    parser.add_argument(
        "--set", nargs="*", type=setting, default=[], metavar="KEY=VALUE", help="Config fields, all arms"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/online")
    parser.add_argument("--quick", action="store_true", help="tiny: digits, 2 seeds, 40 steps")
    args = parser.parse_args()
    args.failed = []
    args.set = dict(args.set) | ({"share": args.share} if args.share else {})
    if args.share == "none":
        args.arms = [a for a in args.arms if a != "one"]
    if args.quick:
        args.seeds, args.steps = args.seeds or 2, args.steps or 40
    for data in args.data:
        tuned: dict[str, dict[str, dict[str, float]]] = {}
        if args.tune:
            tuned = {v: tune(data, v, args) for v in args.variants if v != "poison"}
            tuned["poison"] = tuned.get("clean", {})
        steps, seeds = args.steps or SETTINGS[data].steps, range(args.seeds or SETTINGS[data].seeds)
        tasks = [
            Task(data, v, arm, seed, steps, {**args.set, **tuned.get(v, {}).get(arm, {})})
            for v in args.variants
            for arm in args.arms
            for seed in seeds
        ]
        results: Results = {}
        for task, result in zip(tasks, run_all(tasks, args), strict=True):
            if result is not None:
                results.setdefault((task.variant, task.arm), []).append(result)
        if results:
            print("\n" + report(data, results, args) + "\n", flush=True)
    if args.failed:
        raise SystemExit(f"{len(args.failed)} run(s) failed; start again to repeat only these")


if __name__ == "__main__":
    main()
