"""Every objective of `stillhouse distill`, equal steps: CIFAR-10 (ResNet-56 into ResNet-20), SST-2 (BERT into BERT).

    .venv/bin/python benchmarks/objectives.py --cost --precision bf16 --out runs/objectives     # seconds, first, quiet
    .venv/bin/python benchmarks/objectives.py --seeds 3 --precision bf16 --out runs/objectives
    .venv/bin/python benchmarks/objectives.py --pair text --seeds 3 --out runs/objectives       # and with --cost
    .venv/bin/python benchmarks/objectives.py --quick --out /tmp/objectives    # a few minutes, to see that it works
    .venv/bin/python benchmarks/objectives.py --values     # loss values beside those of five libraries
    .venv/bin/python benchmarks/objectives.py --speed      # KD + one feature term: steps per second beside torchdistill

Every (arm, seed) is a run in a folder of its own under --out: an interrupted one is resumed, a finished one read back;
all arms of a seed come before the next seed. `--cost` times a step of every arm, a block of steps each in turn, and the
table takes its seconds from there. STILLHOUSE_DATA names the folder with data and weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import pm, read, remember, table, write
from objective_pairs import PAIRS, Arms, Task, asked
from objective_values import ALONE, APART, TOLERANCE, compared
from objective_values import PAIRS as VALUES
from perf_jobs import by_fit, by_torchdistill, images
from performance import memory
from rounds import Stepper, side_by_side

import torch  # isort: skip

from stillhouse.comparisons import KNOWN, Objective
from stillhouse.data import Batches, Data
from stillhouse.engine import Run
from stillhouse.evaluate import classification, environment, fidelity
from stillhouse.recipes.distill import distill
from stillhouse.trials import difference


def work(task: Task, out: str, device: str) -> dict[str, Any]:
    """Runs one task, or reads its result back."""
    torch.set_num_threads(1)
    folder, pair = task.folder(out), PAIRS[task.pair]

    def make() -> dict[str, Any]:
        data = pair.data(task)
        master = pair.teacher(out, data)
        cfg = pair.config(task, data)
        fresh, before = not (folder / "stages").exists(), memory(device, reset=True)
        run = Run(folder, seed=task.seed, device=device, precision=task.precision, quiet=True)
        family = distill(run, data, pair.student(data), master, cfg, normalize=pair.normalize)
        assert family.cost["steps"] == task.steps, (family.cost["steps"], task.steps)
        peak = memory(device) - before
        cost = {"peak_bytes": peak} if fresh else {}  # of a part of a run: of no use
        return {**judged(pair, family, master, data, run.device), **cost}

    objectives, label = pair.arms[task.arm]
    settings = {**asdict(task), "arm": [list(objectives), label]}
    return remember(folder / "result.json", settings, make)


def judged(pair: Any, family: Any, master: torch.nn.Module, data: Data, device: Any) -> dict[str, Any]:
    """The student on both test parts, and how close it is to its teacher on the first."""
    test, beside = pair.judged_on(data)
    (z,), y = family.logits(test, device)
    (other,), labels = family.logits(beside, device)
    t = asked(master, test, device, pair.normalize)
    found = {k: v for k, v in classification(z, y).items() if k in ("accuracy", "nll", "ece")}
    held = classification(other, labels)["accuracy"]
    return {**found, **fidelity(t, z), "held_out": held, "teacher": classification(t, y)["accuracy"]}


def run_all(tasks: Sequence[Task], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Results by arm, in the order of the seeds, `jobs` at a time, each in a process of its own (for its memory)."""
    results: dict[str, list[dict[str, Any]]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        done = [(task.folder(args.out) / "result.json").exists() for task in tasks]
        pending = {k: pool.submit(work, t, args.out, args.device) for k, t in enumerate(tasks) if not done[k]}
        for i, task in enumerate(tasks):
            try:
                r = work(task, args.out, args.device) if done[i] else pending[i].result()
            except Exception as error:
                args.failed.append(task)
                print(f"[{i + 1}/{len(tasks)}] FAILED {task}: {type(error).__name__}: {error}", flush=True)
                continue
            results.setdefault(task.arm, []).append(r)
            numbers = f"{100 * r['accuracy']:.2f} %, agrees {100 * r['teacher_agreement']:.2f} %, NLL {r['nll']:.3f}"
            print(f"[{i + 1}/{len(tasks)}] {task.arm} seed {task.seed}: {numbers}", flush=True)
    return results


HEADS = [
    "arm", "objectives", "accuracy %", "… minus labels (95 % over seeds)", "beside %", "agrees with the teacher %",
    "KL from the teacher", "NLL", "seconds (÷ labels)", "peak MiB",
]  # fmt: skip


def rows(results: dict[str, list[dict[str, Any]]], arms: Arms, times: dict[str, list[float]]) -> list[list[str]]:
    """One row per arm; `times`: seconds and times the labels' of what `--cost` has timed."""
    made, plain = [], {r["settings"]["seed"]: r for r in results.get("labels", [])}
    for arm, rs in results.items():
        objectives, label = arms[arm]
        text = " + ".join([*([f"{label:g} · labels"] if label else []), *objectives])
        both = [(r, plain[r["settings"]["seed"]]) for r in rs if r["settings"]["seed"] in plain]
        gain = "–"
        if both and arm != "labels":
            found = difference([a for a, _ in both], [b for _, b in both], "accuracy", 100)
            gain = f"{found.value:+.2f} ({found.low:+.2f} … {found.high:+.2f})"
        peaks = [r["peak_bytes"] for r in rs if "peak_bytes" in r]
        seconds = "{:.0f} ({:.2f})".format(*times[arm]) if arm in times else "–"
        made.append([
            arm, f"`{text}`", pm([r["accuracy"] for r in rs], 2, 100), gain, pm([r["held_out"] for r in rs], 2, 100),
            pm([r["teacher_agreement"] for r in rs], 2, 100), pm([r["teacher_kl"] for r in rs], 3),
            pm([r["nll"] for r in rs], 3), seconds, f"{max(peaks) / 2**20:.0f}" if peaks else "–",
        ])  # fmt: skip
    return made


def do_arms(args: argparse.Namespace) -> None:
    pair = PAIRS[args.pair]
    arms = args.arms or (pair.quick if args.quick else list(pair.arms))
    if unknown := set(arms) - set(pair.arms):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no arm of {args.pair}; it has {', '.join(pair.arms)}")
    how = (args.steps or pair.steps, args.batch or pair.batch, args.limit, args.precision)
    tasks = [Task(args.pair, arm, seed, *how) for seed in range(args.seeds) for arm in arms]
    if args.cost:
        do_cost(args, tasks[: len(arms)])
        return
    if args.pair == "text":
        pair.teacher(args.out, pair.data(tasks[0]))  # once, before several processes ask for it
    results = run_all(tasks, args)
    if results:
        best = next(iter(results.values()))[0]["teacher"]
        used = {Objective.parse(o).name for terms, _ in pair.arms.values() for o in terms}
        lines = [
            table(
                HEADS, rows(results, pair.arms, (read(Path(args.out) / args.pair / "cost.json") or {}).get("arms", {}))
            ),
            f"Mean ± standard deviation over {args.seeds} seeds; {how[0]} steps of {how[1]}, {args.precision}; "
            f"{pair.about}. The teacher has {100 * best:.1f} %. {args.jobs} run(s) at a time, device {args.device}; "
            f"seconds are {how[0]} times a step's, timed apart (--cost); memory is what a run that was not interrupted "
            "takes at its peak above what the data and the teacher take before it.",
            *([f"Not measured: {', '.join(sorted(set(KNOWN) - used))}."] if set(KNOWN) - used else []),
        ]
        text = "\n\n".join(lines)
        write(Path(args.out) / args.pair / "report.json", {"environment": environment(), "results": results})
        (Path(args.out) / args.pair / "report.md").write_text(text + "\n")
        print("\n" + text + "\n", flush=True)
    if args.failed:
        raise SystemExit(f"{len(args.failed)} run(s) failed; start again to repeat only these")


def do_cost(args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Seconds of a whole run of every arm, from blocks of steps that take turns; medians over the rounds."""
    pair, sides = PAIRS[args.pair], dict[str, Stepper]()
    data = pair.data(tasks[0])
    for task in tasks:
        learner = pair.learner(task, data, pair.teacher(args.out, data))
        source = Batches(data.train, task.batch)
        sides[task.arm] = Stepper(learner, source, args.block, device=args.device, precision=task.precision)
    times = side_by_side(sides, args.repeats, 1)
    found = {}
    for arm, t in times.items():
        ratio = 1 / t.times_faster_than(times["labels"], processor=True) if "labels" in times else float("nan")
        found[arm] = [t.median / args.block * tasks[0].steps, ratio]
        print(f"{arm}: {found[arm][0]:.1f} s for {tasks[0].steps} steps, {ratio:.2f} × labels", flush=True)
    write(Path(args.out) / args.pair / "cost.json", {"environment": environment(), "arms": found})


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
    lines.append(f"None of them has: {', '.join(f'`{name}`' for name in ALONE)}.")
    if missing := sorted({p.library for p in VALUES if not p.installed}):
        lines.append(f"Not installed, so left out: {', '.join(missing)}.")
    known = {f["objective"].split()[0] for f in found} | set(APART) | set(ALONE)
    if set(KNOWN) - known:
        lines.append(f"Not looked for: {', '.join(sorted(set(KNOWN) - known))}.")
    write(Path(args.out) / "values.json", {"environment": environment(), "values": found})
    print("\n\n".join(lines))
    if not all(f["agrees"] for f in found):
        raise SystemExit("some values differ without a reason")


def do_speed(args: argparse.Namespace) -> None:
    """KD and the mean squared difference of the last feature maps: a block of steps each in turn."""
    args.batch = args.batch or 128
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
    parser.add_argument("--pair", choices=PAIRS, default="images", help="images: CIFAR-10; text: SST-2")
    parser.add_argument("--arms", nargs="+", help="default: all of the pair")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, help="optimiser steps of every arm (default: 400)")
    parser.add_argument("--batch", type=int, help="samples per step (default: 64)")
    parser.add_argument("--limit", type=int, help="training samples (default: all)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--values", action="store_true", help="loss values beside those of other libraries")
    parser.add_argument("--speed", action="store_true", help="KD + one feature term beside torchdistill 1.1.5")
    parser.add_argument("--cost", action="store_true", help="time a step of every arm, for the table's seconds")
    parser.add_argument("--block", type=int, default=2, help="of --speed and --cost: steps of a block")
    parser.add_argument("--repeats", type=int, default=7, help="of --speed and --cost: timed rounds")
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
