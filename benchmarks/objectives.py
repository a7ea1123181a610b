"""Every objective of `stillhouse distill` on CIFAR-10: ResNet-56 with published weights into ResNet-20, equal steps.

    .venv/bin/python benchmarks/objectives.py --seeds 3 --jobs 2 --out runs/objectives
    .venv/bin/python benchmarks/objectives.py --quick --out /tmp/objectives    # a few minutes, to see that it works
    .venv/bin/python benchmarks/objectives.py --values     # loss values beside torchdistill's and timm's
    .venv/bin/python benchmarks/objectives.py --speed      # KD + one feature term: steps per second beside torchdistill

Every (arm, seed) is a run in a folder of its own under --out: an interrupted one is resumed, a finished one read back.
Students learn from batches 1–4. The teacher's weights have seen all five training batches, so it is judged, and
agreement with it is measured, on the first 1,000 official test images (standard error near 0.8 points); batch 5, which
no student has seen, stands beside it for the students alone. STILLHOUSE_DATA names the folder with data and weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common import pm, remember, table, write
from objective_values import ALONE, APART, TOLERANCE, compared
from perf_jobs import by_fit, by_torchdistill, images
from performance import memory
from rounds import side_by_side

import torch  # isort: skip

import numpy as np

from stillhouse.comparisons import KNOWN, Objective
from stillhouse.data import Data, Samples, load
from stillhouse.data.named import CIFAR10_MEAN, CIFAR10_STD
from stillhouse.engine import Run
from stillhouse.evaluate import classification, environment, fidelity
from stillhouse.models import ModelSpec
from stillhouse.recipes.distill import Config, distill
from stillhouse.teacher_options import filled
from stillhouse.teachers import Frozen
from stillhouse.trials import difference

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the published weights were trained with
# Objectives and the weight of the labels: those of the papers or of the code most compare with (RepDistiller), brought
# to our definitions: where that code takes the mean over positions or over n² pairs, the weight is divided by these.
ARMS: dict[str, tuple[tuple[str, ...], float]] = {
    "labels": ((), 1.0),
    "kd": (("kd:0.9?T=4",), 0.1),
    "reverse": (("reverse:0.9?T=4",), 0.1),
    "symmetric": (("symmetric:0.9?T=4",), 0.1),
    "js": (("js:3.6?T=4",), 0.1),  # near agreement JS is a quarter of KL
    "standardised": (("standardised:9?T=2",), 0.1),
    "dist": (("dist:1?T=4&beta=2&gamma=2",), 1.0),
    "dkd": (("dkd:1?T=4&alpha=1&beta=2&ramp=0.08",), 1.0),
    "pld": (("pld:1?T=3",), 0.0),  # holds the label's cross-entropy itself
    "logit-mse": (("logit-mse:1",), 0.1),
    "pseudo": (("pseudo:0.9",), 0.1),
    "feature": (("feature:layer2:100",), 1.0),
    "cosine": (("cosine:linear:in:1",), 1.0),
    "softmax": (("softmax:linear:in:1",), 1.0),
    "overhaul": (("overhaul:layer3:0.001",), 1.0),  # behind the last ReLU: the sum before it is no module here
    "vid": (("vid:layer3:1",), 1.0),
    "attention": (("attention:layer1:1", "attention:layer2:4", "attention:layer3:16"), 1.0),  # 1000 / positions
    "nst": (("nst:layer3:50",), 1.0),
    "icc": (("icc:layer3:2.5",), 1.0),
    "similarity": (("similarity:layer3:3000",), 1.0),
    "rkd": (("rkd-distance:linear:in:25", "rkd-angle:linear:in:50"), 1.0),
    "pkt": (("pkt:linear:in:234",), 1.0),  # 30,000 / batch
    "cka": (("cka:layer3:1",), 1.0),
    "mi": (("mi:linear:in:1",), 1.0),
    "contrastive": (("contrastive:linear:in:0.8",), 1.0),
    "flow": (("flow:layer1>layer2:50", "flow:layer2>layer3:50"), 1.0),
    "simkd": (("simkd:1",), 0.0),
    "kd + attention": (("kd:0.9?T=4", "attention:layer1:1", "attention:layer2:4", "attention:layer3:16"), 0.1),
}
QUICK = ["labels", "kd", "attention", "simkd"]
OWN = (CIFAR10_MEAN, CIFAR10_STD, *IMAGENET)
SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Task:
    """One run; everything that its result depends on."""

    arm: str
    seed: int
    steps: int
    batch: int
    limit: int | None

    def folder(self, out: str) -> Path:
        return Path(out) / self.arm.replace(" ", "") / f"seed{self.seed}"


def teacher() -> torch.nn.Module:
    """ResNet-56 with the weights of the data folder."""
    path = Path(os.environ.get("STILLHOUSE_DATA", "")) / "resnet-cifar10-weights" / "resnet56.safetensors"
    return filled(ModelSpec("stillhouse:resnet56", 10, SHAPE).build(), path)


@torch.no_grad()
def asked(model: torch.nn.Module, samples: Samples, device: Any) -> torch.Tensor:
    """The teacher's logits, its input normalised as its weights expect."""
    frozen, parts = Frozen(model.to(device), normalize=OWN), []
    for start in range(0, len(samples), 500):
        batch = samples.take(np.arange(start, min(start + 500, len(samples))))
        parts.append(frozen({"input": batch["input"].to(device)}).logits.float().cpu())
    return torch.cat(parts)


def work(task: Task, out: str, device: str) -> dict[str, Any]:
    """Runs one task, or reads its result back."""
    torch.set_num_threads(1)
    folder = task.folder(out)

    def make() -> dict[str, Any]:
        data, master = load("cifar10", limit=task.limit, seed=task.seed), teacher()
        objectives, label = ARMS[task.arm]
        steps_per_epoch = len(data.train) // task.batch
        cfg = Config(objective=objectives, label=label, batch=task.batch, epochs=task.steps / steps_per_epoch)
        fresh, before = not (folder / "stages").exists(), memory(device, reset=True)
        run = Run(folder, seed=task.seed, device=device, quiet=True)
        family = distill(run, data, ModelSpec("stillhouse:resnet20", 10, SHAPE), master, cfg, normalize=OWN)
        assert family.cost["steps"] == task.steps, (family.cost["steps"], task.steps)
        peak = memory(device) - before
        cost = {"seconds": family.cost["seconds"], "peak_bytes": peak} if fresh else {}  # of a part of a run: of no use
        return {**judged(family, master, data, run.device), **cost}

    settings = {"seed": task.seed, "steps": task.steps, "batch": task.batch, "limit": task.limit, "arm": ARMS[task.arm]}
    return remember(folder / "result.json", settings, make)


def judged(family: Any, master: torch.nn.Module, data: Data, device: Any) -> dict[str, Any]:
    """The student on the official test images and on batch 5, and how close it is to its teacher on the former."""
    test = data.extra["test_first1000"]
    (z,), y = family.logits(test, device)
    (other,), labels = family.logits(data.test, device)
    t = asked(master, test, device)
    found = {k: v for k, v in classification(z, y).items() if k in ("accuracy", "nll", "ece")}
    held = classification(other, labels)["accuracy"]
    return {**found, **fidelity(t, z), "held_out": held, "teacher": classification(t, y)["accuracy"]}


def run_all(tasks: Sequence[Task], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Results by arm, in the order of the seeds, `jobs` at a time, each in a process of its own (for its memory)."""
    results: dict[str, list[dict[str, Any]]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for i, future in enumerate([pool.submit(work, task, args.out, args.device) for task in tasks]):
            task = tasks[i]
            try:
                r = future.result()
            except Exception as error:
                args.failed.append(task)
                print(f"[{i + 1}/{len(tasks)}] FAILED {task}: {type(error).__name__}: {error}", flush=True)
                continue
            results.setdefault(task.arm, []).append(r)
            numbers = f"{100 * r['accuracy']:.2f} %, agrees {100 * r['teacher_agreement']:.2f} %, NLL {r['nll']:.3f}"
            print(f"[{i + 1}/{len(tasks)}] {task.arm} seed {task.seed}: {numbers}", flush=True)
    return results


HEADS = [
    "arm", "objectives", "accuracy %", "… minus labels (95 % over seeds)", "batch 5 %", "agrees with the teacher %",
    "KL from the teacher", "NLL", "seconds", "peak MiB",
]  # fmt: skip


def rows(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """One row per arm."""
    made, plain = [], {r["settings"]["seed"]: r for r in results.get("labels", [])}
    for arm, rs in results.items():
        objectives, label = ARMS[arm]
        text = " + ".join([*([f"{label:g} · labels"] if label else []), *objectives])
        both = [(r, plain[r["settings"]["seed"]]) for r in rs if r["settings"]["seed"] in plain]
        gain = "–"
        if both and arm != "labels":
            found = difference([a for a, _ in both], [b for _, b in both], "accuracy", 100)
            gain = f"{found.value:+.2f} ({found.low:+.2f} … {found.high:+.2f})"
        seconds, peaks = ([r[k] for r in rs if k in r] for k in ("seconds", "peak_bytes"))
        made.append([
            arm, f"`{text}`", pm([r["accuracy"] for r in rs], 2, 100), gain, pm([r["held_out"] for r in rs], 2, 100),
            pm([r["teacher_agreement"] for r in rs], 2, 100), pm([r["teacher_kl"] for r in rs], 3),
            pm([r["nll"] for r in rs], 3), f"{fmean(seconds):.0f}" if seconds else "–",
            f"{max(peaks) / 2**20:.0f}" if peaks else "–",
        ])  # fmt: skip
    return made


def do_arms(args: argparse.Namespace) -> None:
    arms = args.arms or (QUICK if args.quick else list(ARMS))
    tasks = [Task(arm, seed, args.steps, args.batch, args.limit) for arm in arms for seed in range(args.seeds)]
    results = run_all(tasks, args)
    if results:
        best = next(iter(results.values()))[0]["teacher"]
        used = {Objective.parse(o).name for terms, _ in ARMS.values() for o in terms}
        lines = [
            table(HEADS, rows(results)),
            f"Mean ± standard deviation over {args.seeds} seeds; {args.steps} steps of {args.batch}, batches 1–4, "
            f"crops and flips; {args.jobs} run(s) at a time, device {args.device}. Accuracy, agreement, KL and NLL are "
            f"on the first 1,000 official test images, where the teacher has {100 * best:.1f} %; the teacher has seen "
            "batch 5, the students have not. Seconds and memory are of runs that were not interrupted; memory is what "
            "a run takes at its peak above what the data and the teacher take before it.",
            *([f"Not measured: {', '.join(sorted(set(KNOWN) - used))}."] if set(KNOWN) - used else []),
        ]
        text = "\n\n".join(lines)
        write(Path(args.out) / "report.json", {"environment": environment(), "results": results})
        (Path(args.out) / "report.md").write_text(text + "\n")
        print("\n" + text + "\n", flush=True)
    if args.failed:
        raise SystemExit(f"{len(args.failed)} run(s) failed; start again to repeat only these")


def do_values(args: argparse.Namespace) -> None:
    """Every loss that a peer has as well: equal to 1e-5, or in the stated relation to ours."""
    found = compared()
    cells = [
        [f["objective"], f["there"], f"{f['ours']:.6f}", f"{f['theirs']:.6f}", f"{f['miss']:.1e}",
         ("equal" if f["equal"] else f"as explained: {f['why']}") if f["agrees"] else "**NOT EXPLAINED**"]
        for f in found
    ]  # fmt: skip
    heads = ["objective", "there", "ours", "theirs", "relative miss", f"within {TOLERANCE:g}"]
    lines = [table(heads, cells), *(f"- `{name}`: {why}." for name, why in APART.items())]
    lines.append(f"Neither has: {', '.join(f'`{name}`' for name in ALONE)}.")
    known = {f["objective"].split()[0] for f in found} | set(APART) | set(ALONE)
    if set(KNOWN) - known:
        lines.append(f"Not looked for: {', '.join(sorted(set(KNOWN) - known))}.")
    write(Path(args.out) / "values.json", {"environment": environment(), "values": found})
    print("\n\n".join(lines))
    if not all(f["agrees"] for f in found):
        raise SystemExit("some values differ without a reason")


def do_speed(args: argparse.Namespace) -> None:
    """KD and the mean squared difference of the last feature maps: a block of steps each in turn."""
    args.samples, args.size, args.student, args.teacher = 2048, 32, "stillhouse:resnet20", "stillhouse:resnet56"
    if args.quick:
        args.samples, args.size, args.student, args.teacher = 256, 16, "stillhouse:resnet8", "stillhouse:resnet20"
        args.batch, args.repeats = 32, 3
    data = images(args)
    sides = {"torchdistill": by_torchdistill(args, data, "layer3"), "fit": by_fit(args, data, layer="layer3")}
    t = side_by_side(sides, args.repeats, 2)
    wall, used = (t["fit"].times_faster_than(t["torchdistill"], processor=p) for p in (False, True))
    cells = [
        [
            "fit against torchdistill, KD + feature, throughput",
            f"{wall:.3f}",
            "≥ 1.0",
            "yes" if wall >= 1 else "**no**",
        ],
        ["… by processor time", f"{used:.3f}", "", ""],
    ]
    write(Path(args.out) / "speed.json", {"environment": environment(), "wall": wall, "processor": used})
    print(table(["what", "measured", "to reach", "reached"], cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=3120, help="optimiser steps of every arm (312 are an epoch)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=int, help="training images (default: 40,000)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--values", action="store_true", help="loss values beside torchdistill 1.1.5 and timm")
    parser.add_argument("--speed", action="store_true", help="KD + one feature term beside torchdistill 1.1.5")
    parser.add_argument("--block", type=int, default=2, help="of --speed: steps of a block")
    parser.add_argument("--repeats", type=int, default=7, help="of --speed: timed rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/objectives")
    parser.add_argument("--quick", action="store_true", help="four arms, 2 seeds, 8 steps on 1,000 images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.failed = []
    if args.quick:
        args.seeds, args.steps, args.limit = 2, 8, 1000
    if args.values or args.speed:
        for do in [do_values] * args.values + [do_speed] * args.speed:
            do(args)
    else:
        do_arms(args)


if __name__ == "__main__":
    main()
