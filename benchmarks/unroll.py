"""Differentiating through T gradient steps: peak memory against T, and time, beside full-graph unrolling.

    .venv/bin/python benchmarks/unroll.py --out runs/unroll           # writes unroll.json and unroll.png there
    .venv/bin/python benchmarks/unroll.py --quick

The other side is the unrolling of trajectory matching written plainly in PyTorch: one flat weight vector, a list of its
versions, ``create_graph=True`` at every step, one backward pass. Both sides have the same network, samples and outer
loss. Memory is the peak of the resident set above what was there before the outer step, each point in a process of its
own; time is that of one outer step, both sides in one process in turn, one thread.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import table, write
from rounds import side_by_side

import torch  # isort: skip
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.bilevel import unrolled
from stillhouse.evaluate import environment
from stillhouse.models import ModelSpec

Args = argparse.Namespace
Row = tuple[str, float, str, bool | None]  # what, value, to reach, reached
SIDES = {"graph, plain PyTorch": -1, "reverse": 0, "reverse, every step's weights": 1}  # side → segment


class Problem:
    """Images and soft labels to learn, a network, and the outer loss on a real batch."""

    def __init__(self, args: Args, steps: int):
        g = torch.Generator().manual_seed(0)
        shape = (args.channels, args.size, args.size)
        self.net: nn.Module = ModelSpec(args.model, 10, shape, options=args.options).build()
        self.x = torch.randn(args.samples, *shape, generator=g).to(args.device).requires_grad_()
        self.y = torch.eye(10)[torch.arange(args.samples) % 10].to(args.device).requires_grad_()
        self.rates = torch.full((steps,), 0.01, device=args.device, requires_grad=True)
        self.real = torch.randn(args.batch, *shape, generator=g).to(args.device)
        self.labels = (torch.arange(args.batch) % 10).to(args.device)
        self.params = {k: p.detach().to(args.device) for k, p in self.net.named_parameters()}

    @property
    def learned(self) -> list[Tensor]:
        return [self.x, self.y, self.rates]

    def inner(self, params: dict[str, Tensor], k: int, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.net, params, (x,)), y)

    def outer(self, params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(self.net, params, (self.real,)), self.labels)

    def ours(self, segment: int) -> tuple[Tensor, ...]:
        final = unrolled(self.inner, self.params, self.rates, self.x, self.y, segment=segment)
        return torch.autograd.grad(self.outer(final), self.learned)

    def plain(self) -> tuple[Tensor, ...]:
        """As trajectory matching is usually written."""
        sizes = [p.numel() for p in self.params.values()]

        def named(flat: Tensor) -> dict[str, Tensor]:
            return {k: v.view_as(p) for (k, p), v in zip(self.params.items(), flat.split(sizes), strict=True)}

        student = [torch.cat([p.reshape(-1) for p in self.params.values()]).requires_grad_(True)]
        for k in range(len(self.rates)):
            loss = F.cross_entropy(functional_call(self.net, named(student[-1]), (self.x,)), self.y)
            grad = torch.autograd.grad(loss, student[-1], create_graph=True)[0]
            student.append(student[-1] - self.rates[k] * grad)
        return torch.autograd.grad(self.outer(named(student[-1])), self.learned)

    def side(self, name: str) -> Callable[[], tuple[Tensor, ...]]:
        return self.plain if SIDES[name] < 0 else lambda: self.ours(SIDES[name])


# -- memory -----------------------------------------------------------------------------------------------------------


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


def peak(args: Args) -> int:
    """Bytes that one outer step of `args.side` with `args.steps` steps takes at its peak."""
    Problem(args, 2).side(args.side)()  # libraries, kernels, buffers
    step = Problem(args, args.steps).side(args.side)
    before = memory(args.device, reset=True)
    step()
    return memory(args.device) - before


def measured(args: Args, side: str, steps: int) -> float:
    """`peak` in a process of its own, in MiB."""
    # Every larger tensor gets pages of its own and gives them back, so that resident memory is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    flags = [f"--{k}={getattr(args, k)}" for k in ("model", "width", "size", "channels", "samples", "batch", "device")]
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps), *flags]
    said = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    return float(said.split()[-1]) / 2**20


def do_memory(args: Args, found: dict[str, Any]) -> list[Row]:
    points = found["memory_mib"] = {side: {} for side in SIDES}
    for side in SIDES:
        for steps in args.points:
            points[side][steps] = measured(args, side, steps)
            print(f"  {side}, T = {steps}: {points[side][steps]:.1f} MiB", flush=True)
    first, last = args.points[0], args.points[-1]
    rows: list[Row] = []
    slopes = {s: (p[last] - p[first]) / (last - first) for s, p in points.items()}
    for side, flat in zip(list(SIDES)[1:], (True, False), strict=True):
        growth = points[side][last] / points[side][first]
        reach = ("≤ 1.25", growth <= 1.25) if flat else ("", None)
        rows.append((f"{side}: peak memory, T = {last} / T = {first}", growth, *reach))
        share = slopes[side] / slopes["graph, plain PyTorch"]
        rows.append((f"{side} / graph: memory per further step", share, "≤ 0.05", share <= 0.05))
    growth = points["graph, plain PyTorch"][last] / points["graph, plain PyTorch"][first]
    rows.append((f"graph, plain PyTorch: peak memory, T = {last} / T = {first}", growth, "", None))
    saved = points["graph, plain PyTorch"][last] / points["reverse"][last]
    rows.append((f"graph / reverse: peak memory at T = {last}", saved, "", None))
    return rows


def draw(points: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for side, line in points.items():
        axes.plot(list(line), list(line.values()), marker="o", label=side)
    axes.set(xlabel="inner steps T", ylabel="peak memory of an outer step, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# -- time -------------------------------------------------------------------------------------------------------------


def do_time(args: Args, found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for steps in args.timed:
        problem = Problem(args, steps)
        a, b = problem.ours(0), problem.plain()
        off = max(float((u - v).abs().max() / v.abs().max()) for u, v in zip(a, b, strict=True))
        t = side_by_side({side: problem.side(side) for side in SIDES}, args.repeats, args.warmup)
        found["seconds"] = {**found.get("seconds", {}), steps: {k: v.seconds for k, v in t.items()}}
        plain = t["graph, plain PyTorch"]
        for side in list(SIDES)[1:]:
            ratio = plain.times_faster_than(t[side])
            rows.append((f"{side} / graph, T = {steps}: time of an outer step", ratio, "", None))
            print(f"  T = {steps}, {side}: {t[side].median:.3f} s, graph {plain.median:.3f} s", flush=True)
        rows.append((f"largest relative difference of the two gradients, T = {steps}", off, "≤ 1e-3", off <= 1e-3))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stillhouse:convnet")
    parser.add_argument("--width", type=int, default=64, help="of the ConvNet")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--samples", type=int, default=10, help="synthetic images of a step")
    parser.add_argument("--batch", type=int, default=64, help="real images of an outer step")
    parser.add_argument("--points", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="T, for memory")
    parser.add_argument("--timed", type=int, nargs="+", default=[10, 40], help="T, for time")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for unroll.json and unroll.png")
    parser.add_argument("--quick", action="store_true", help="width 32, 16×16 images, T to 16, 3 rounds")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.width, args.size, args.points, args.timed, args.repeats = 32, 16, [2, 16], [8], 3
    args.options = {"width": args.width} if args.model == "stillhouse:convnet" else {}
    if args.side:
        print(peak(args))
        return
    found: dict[str, Any] = {}
    print("memory …", flush=True)
    rows = do_memory(args, found)
    print("time …", flush=True)
    rows += do_time(args, found)
    told = {True: "yes", False: "**no**", None: ""}
    cells = [[what, f"{v:.3g}", reach, told[met]] for what, v, reach, met in rows]
    print("\n" + table(["what", "measured", "to reach", "reached"], cells))
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "side", "steps")}
        facts = {"rows": rows, **found, "settings": settings, "environment": environment()}
        write(args.out / "unroll.json", facts)
        draw(found["memory_mib"], args.out / "unroll.png")
        print(f"\n{args.out / 'unroll.json'}, {args.out / 'unroll.png'}")


if __name__ == "__main__":
    main()
