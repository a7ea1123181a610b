"""What the loop, the outer step, the shared trunk, low memory and cached teachers cost or save, as ratios.

    .venv/bin/python benchmarks/performance.py fit                  # … torchdistill outer tree memory cached cli all
    .venv/bin/python benchmarks/performance.py all --quick          # small and short, to see that it works
    .venv/bin/python benchmarks/performance.py fit torchdistill outer tree memory --device cuda \\
        --student torchvision:resnet18 --teacher torchvision:resnet34 --batch 512 --block 20

Both sides of a ratio run in one process, a block of steps each in turn, one thread; a ratio is the median over the
rounds. Run it on a quiet machine. Results are added to OUT/performance.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import read, table, write
from perf_jobs import SGD, Args, alone, by_fit, by_hand, by_torchdistill, by_wml, images, learner, network, pairs
from rounds import Stepper, Timing, side_by_side

import torch  # isort: skip

from stillhouse.data import Batches
from stillhouse.data.cache import SignalCache
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import count_params, environment
from stillhouse.teachers import Cached, Frozen

Row = tuple[str, float, str, bool | None]  # what, value, to reach, reached


def speed(args: Args, sides: dict[str, Any]) -> dict[str, Timing]:
    times = side_by_side(sides, args.repeats, args.warmup)
    for name, t in times.items():
        spread = f"{min(t.seconds):.3f} … {max(t.seconds):.3f}"
        print(f"  {name}: {t.median:.3f} s a block ({spread})", flush=True)
    return times


def do_fit(args: Args) -> list[Row]:
    data = images(args)
    t = speed(args, {"hand": by_hand(args, data), "fit": by_fit(args, data)})
    ratio = t["fit"].times_faster_than(t["hand"])
    used = t["fit"].times_faster_than(t["hand"], processor=True)
    return [
        ("fit against a hand-written loop, throughput", ratio, "≥ 0.97", ratio >= 0.97),
        ("… by processor time", used, "", None),
    ]


def do_torchdistill(args: Args) -> list[Row]:
    data = images(args)
    sides = {"torchdistill": by_torchdistill(args, data), "hand": by_hand(args, data), "fit": by_fit(args, data),
             "fit, compile + bf16": by_fit(args, data, fast=True)}  # fmt: skip
    t = speed(args, sides)
    eager, fast = (t[k].times_faster_than(t["torchdistill"]) for k in ("fit", "fit, compile + bf16"))
    hand = t["torchdistill"].times_faster_than(t["hand"])
    return [
        ("fit against torchdistill, eager", eager, "≥ 1.13", eager >= 1.13),
        ("fit with compile + bf16 against torchdistill, eager fp32", fast, "≥ 2", fast >= 2),
        ("… by processor time", t["fit"].times_faster_than(t["torchdistill"], processor=True), "", None),
        ("torchdistill against the hand-written loop", hand, "(0.86 elsewhere)", None),
    ]


def do_outer(args: Args) -> list[Row]:
    data = images(args)
    ways: dict[str, dict[str, Any]] = {"without": {"eta": 0.0}, "jvp": {}, "grad": {"hypergradient": "grad"}}
    sides = {f"M={m} {name}": by_wml(args, data, m, **how) for m in (4, 8) for name, how in ways.items()}
    t = speed(args, sides)
    rows: list[Row] = []
    for m in (4, 8):
        none, jvp, grad = (t[f"M={m} {k}"] for k in ("without", "jvp", "grad"))
        share = 1 - 1 / none.times_faster_than(jvp)
        reach = ("≤ 0.15", share <= 0.15) if m == 4 else ("", None)
        rows.append((f"outer step's share of run time, M={m}, every 10 steps, jvp", share, *reach))
        step = median((g - n) / (j - n) for g, j, n in zip(grad.seconds, jvp.seconds, none.seconds, strict=True))
        rows.append((f"time of one outer step, grad / jvp, M={m}", step, "", None))
    growth = t["M=4 jvp"].times_faster_than(t["M=8 jvp"])
    return [*rows, ("time of M=8 / M=4, jvp", growth, "≤ 2.3", growth <= 2.3)]


def do_tree(args: Args) -> list[Row]:
    data = images(args)
    system = learner(args, data, trunk=tuple(args.trunk))
    students = [system.peers.student(i).to(args.device) for i in range(len(system.peers))]
    parts = sum(map(count_params, students))
    share = sum(p.numel() for p in system.peers.trained().values()) / parts
    tree = Stepper(system, pairs(args, data), args.outer_block, device=args.device)
    t = speed(args, {"tree WML": tree, "one by one": alone(args, data, students)})
    wall = t["one by one"].times_faster_than(t["tree WML"])
    return [
        ("tree WML / its students one by one, wall", wall, "≤ 1.0", wall <= 1.0),
        ("tree WML / its students one by one, trained parameters", share, "< 0.8", share < 0.8),
    ]


def do_memory(args: Args) -> list[Row]:
    """Peak memory of a step above what was there before it, each side in a process of its own."""
    peak: dict[str, float] = {}
    for side in ("alone", "one-pass", "two-pass"):
        # Every larger tensor gets pages of its own and gives them back, so that resident memory is what is in use.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        flags = [f"--{k}={getattr(args, k)}" for k in ("student", "size", "device", "batch")]
        command = [sys.executable, __file__, "memory", "--side", side, *flags]
        peak[side] = float(
            subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1]
        )
        print(f"  {side}: {peak[side] / 2**20:.1f} MiB", flush=True)
    ratio = peak["two-pass"] / peak["alone"]
    return [
        ("two-pass mode / largest single peer, peak memory of a step", ratio, "≤ 1.25", ratio <= 1.25),
        ("one-pass mode / largest single peer, peak memory of a step", peak["one-pass"] / peak["alone"], "", None),
    ]


def peak_of(args: Args) -> int:
    """Bytes that one step takes at its peak: activations and gradients (momentum is there after the first step)."""
    data, small = images(args), argparse.Namespace(**{**vars(args), "batch": 2})

    def train(a: Args, folder: str) -> None:
        if args.side == "alone":
            fit(run(folder), "s", system, Batches(data.train, a.batch, augment=False), steps=2)
        else:
            fit(run(folder), "s", system, pairs(a, data), steps=2)

    def run(folder: str) -> Run:
        return Run(folder, quiet=True, device=args.device)

    system: Any
    if args.side == "alone":
        system = Distill(network(args.student, args), None, alpha=0.0, optimizer=SGD)
    else:
        system = learner(args, data, two_pass=args.side == "two-pass", eta=0.0)
    with tempfile.TemporaryDirectory() as folder:
        train(small, f"{folder}/warm")  # libraries, kernels, buffers
        before = memory(args.device, reset=True)
        train(args, f"{folder}/real")
    return memory(args.device) - before


def memory(device: str, reset: bool = False) -> int:
    """Bytes in use now, from where the peak is counted anew (`reset`), or that peak."""
    if device.startswith("cuda"):
        if not reset:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if reset:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is resident now
    key = "VmRSS:" if reset else "VmHWM:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def do_cached(args: Args) -> list[Row]:
    data, rows = images(args), list[Row]()
    teacher = Frozen(network("stillhouse:resnet56", args, 1))
    source = Batches(data.train, args.batch, views=1)
    with tempfile.TemporaryDirectory() as folder:
        cache = SignalCache.create(
            folder, n=len(data.train), classes=10, views=1,
            teacher_fingerprint=teacher.fingerprint, data_fingerprint=data.train.fingerprint,
        )  # fmt: skip
        cache.fill(teacher, data.train, batch_size=args.batch, device=args.device)
        for name in dict.fromkeys(["stillhouse:resnet8", args.student]):

            def side(who: Any, name: str = name) -> Stepper:
                system = Distill(network(name, args), who, optimizer=SGD)
                return Stepper(system, source, args.block, device=args.device)

            t = speed(args, {f"{name}, live": side(teacher), f"{name}, cached": side(Cached(cache))})
            ratio = t[f"{name}, cached"].times_faster_than(t[f"{name}, live"])
            rows.append((f"cached against live ResNet-56 teacher, student {name}", ratio, "≥ 3", ratio >= 3))
    return rows


def do_cli(args: Args) -> list[Row]:
    program, rows = Path(sys.executable).parent / "stillhouse", list[Row]()
    for words in ("--help", "list"):
        seconds = []
        for _ in range(args.repeats + 1):
            began = time.perf_counter()
            subprocess.run([program, words], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        value = median(seconds[1:])
        rows.append((f"stillhouse {words}, seconds", value, "< 0.5", value < 0.5))
    return rows


JOBS = {"fit": do_fit, "torchdistill": do_torchdistill, "outer": do_outer, "tree": do_tree, "memory": do_memory,
        "cached": do_cached, "cli": do_cli}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*JOBS, "all"])
    parser.add_argument("--student", default="stillhouse:resnet20", help="also the base of the WML peers")
    parser.add_argument("--teacher", default="stillhouse:resnet56")
    parser.add_argument("--trunk", nargs="*", default=[], help="for tree: last shared module")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--block", type=int, default=2, help="steps of a block")
    parser.add_argument("--outer-block", type=int, default=10, help="the same for outer and tree: a multiple of 10")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/performance")
    parser.add_argument("--quick", action="store_true", help="16×16 images, batch 32, ResNet-8 and -20, 3 rounds")
    parser.add_argument("--side", choices=("alone", "one-pass", "two-pass"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.student, args.teacher, args.size, args.batch = "stillhouse:resnet8", "stillhouse:resnet20", 16, 32
        args.samples, args.repeats, args.warmup = 256, 3, 1
    if args.side:
        print(peak_of(args))
        return
    path = Path(args.out) / "performance.json"
    for name in JOBS if "all" in args.what else args.what:
        print(f"{name} …", flush=True)
        rows = JOBS[name](args)
        found = read(path) or {}
        found[name] = {"rows": rows, "settings": vars(args), "environment": environment()}
        write(path, found)
        cells = [
            [what, f"{v:.3f}", reach, {True: "yes", False: "**no**", None: ""}[met]] for what, v, reach, met in rows
        ]
        print("\n" + table(["what", "measured", "to reach", "reached"], cells) + "\n", flush=True)


if __name__ == "__main__":
    main()
