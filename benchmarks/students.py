"""What parametrised training costs, and how a pipeline stands beside torch-pruning and torchao at the same steps.

    .venv/bin/python benchmarks/students.py steps             # … pruning torchao semi all
    .venv/bin/python benchmarks/students.py all --quick       # small and short, to see that it works

`steps`: seconds of a training step with weights behind a projector against the same network with plain weights, side by
side in one process (a block of steps each in turn; the ratio is the median over the rounds). The codebook trains its
points alone. `pruning`: prune:0.5 and distil under the network before against torch-pruning (its magnitude pruner,
brought to the same MACs) and plain fine-tuning, from one trained base, at equal steps, batches and schedule. `torchao`:
quantisation-aware training of linear layers to 4 bits against torchao's, from one trained base, at equal steps (needs
`pip install torchao`; left out without it). `semi`: 2:4 sparse float16 layers through torch's semi-structured kernels
against dense ones, on a CUDA device (left out without one). Results are added to OUT/students.json.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import pm, read, table, write
from rounds import Stepper, side_by_side

import torch  # isort: skip
from torch import nn

from stillhouse.data import Batches, Data, from_arrays, load
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import classification, count_macs, count_params, environment, latency, predict
from stillhouse.models import ModelSpec
from stillhouse.plain import optimizer_of, schedule
from stillhouse.recipes.pipeline.experiment import BASE, PRESET
from stillhouse.recipes.pipeline.recipe import distill
from stillhouse.recipes.quantized_distillation.quantizers import Bucketed, first_points
from stillhouse.recipes.quantized_distillation.systems import PointDistill
from stillhouse.students.parametrized import bake, parametrize_weights, weight_layers
from stillhouse.students.patterns import nm_mask
from stillhouse.students.projectors import NM, Codebook, MinMax, Symmetric

Make = Callable[[str, Any], nn.Module]
PROJECTORS: dict[str, Make | None] = {
    "plain": None,
    "int8 per channel": lambda p, m: Symmetric(8, 0),
    "2 bits in buckets of 256": lambda p, m: MinMax(2, 256),
    "2 bits in buckets, exact gradient": lambda p, m: Bucketed(2, 256, "exact"),
    "2:4, mask found in every step": lambda p, m: NM(2, 4),
    "2:4, fixed mask": lambda p, m: NM(2, 4, mask=nm_mask(m.weight.detach())),
    "codebook of 4 points": lambda p, m: Codebook(2, first_points(m.weight, 4, 256), 256),
}
MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [64, 64]})


def stepper(spec: ModelSpec, make: Make | None, data: Data, batch: int, block: int) -> Stepper:
    model = spec.build()
    paths = [p for p in weight_layers(model) if model.get_submodule(p).weight[0].numel() % 4 == 0]  # all take 2:4
    how: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.9)}
    if make is not None:
        parametrize_weights(model, paths, make)
    points = make is PROJECTORS["codebook of 4 points"]
    kind: Any = PointDistill if points else Distill
    return Stepper(kind(model, None, objectives=[], label=1.0, **how), Batches(data.train, batch), block, device="cpu")


def do_steps(args: argparse.Namespace) -> list[list[str]]:
    """Rows: network, projector, seconds of a step, times the plain step."""
    sizes = [("digits CNN, batch 64", BASE, 64)]
    if not args.quick:
        sizes.append(("ResNet-20 of 32×32, batch 128", ModelSpec("stillhouse:resnet20", 10, (3, 32, 32)), 128))
    else:
        sizes.append(("ResNet-8 of 32×32, batch 32", ModelSpec("stillhouse:resnet8", 10, (3, 32, 32)), 32))
    rows = []
    for name, spec, batch in sizes:
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(2 * batch, *spec.shape, generator=g), torch.randint(0, 10, (2 * batch,), generator=g)
        data = from_arrays(x, y, test=(x[:16], y[:16]), name="random", normalize=False)
        block = 40 if spec is BASE else 5
        sides = {p: stepper(spec, make, data, batch, block) for p, make in PROJECTORS.items()}
        found = side_by_side(sides, 5 if args.quick else 15, 1)
        for p, t in found.items():
            ratio = 1 / t.times_faster_than(found["plain"])
            used = 1 / t.times_faster_than(found["plain"], processor=True)
            rows.append([name, p, f"{1e3 * t.median / block:.2f}", f"{ratio:.2f}", f"{used:.2f}"])
            print("  ", *rows[-1], sep=" | ", flush=True)
    return rows


# -- the same steps, other tools -----------------------------------------------------------------------------------


def train(model: nn.Module, data: Data, seed: int, epochs: float, lr: float) -> nn.Module:
    """Labels alone, with the optimiser, batches and schedule of the pipeline."""
    plain = PRESET.plain(lr, epochs)
    system = Distill(model, None, objectives=[], label=1.0, optimizer=optimizer_of(plain),
                     lr=schedule(data, plain, epochs), clip=PRESET.clip)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, seed=seed, quiet=True, device="cpu")
        fit(run, "train", system, Batches(data.train, PRESET.batch), epochs=epochs)
    return model.eval()


def judged(model: nn.Module, data: Data) -> dict[str, float]:
    z, y = predict(model, data.test)
    example = torch.zeros(1, *data.shape)
    return {
        "accuracy": classification(z, y)["accuracy"],
        "params": count_params(model),
        "macs": count_macs(model, example),
    }


def ours(model: nn.Module, data: Data, seed: int, steps: tuple[str, ...], **changes: Any) -> nn.Module:
    cfg = replace(PRESET, steps=steps, **changes)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, seed=seed, quiet=True, device="cpu")
        return distill(run, data, copy.deepcopy(model), cfg).members[-1].model


def by_torch_pruning(model: nn.Module, macs: float, data: Data) -> nn.Module:
    """torch-pruning's magnitude pruner, one step at a time until the MACs are at most these."""
    import torch_pruning

    model, example = copy.deepcopy(model), torch.zeros(1, *data.shape)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, example, importance=torch_pruning.importance.MagnitudeImportance(p=1), iterative_steps=100,
        pruning_ratio=0.9, ignored_layers=[last], global_pruning=False,
    )  # fmt: skip
    while count_macs(model, example) > macs:
        pruner.step()
    return model


def do_pruning(args: argparse.Namespace) -> list[list[str]]:
    """Rows: way, accuracy, parameters, MACs; means over seeds."""
    data, epochs, found = load("digits"), 5 if args.quick else 15, dict[str, list[dict[str, float]]]()
    for seed in range(args.seeds):
        base = train(BASE.build(seed=seed), data, seed, 10 if args.quick else 30, PRESET.lr)
        mine = ours(base, data, seed, ("prune:0.5", f"distill:{epochs}"))
        # Its convolutions may lose their outputs together with what reads them only: same network, same MACs.
        theirs = train(by_torch_pruning(base, judged(mine, data)["macs"], data), data, seed, epochs, PRESET.lr)
        plain = ours(base, data, seed, ("prune:0.5", f"distill:{epochs}"), kd=0.0)
        ways = {"base": base, "prune:0.5, distill": mine, "prune:0.5, labels alone": plain,
                "torch-pruning, plain fine-tuning": theirs}  # fmt: skip
        for way, model in ways.items():
            found.setdefault(way, []).append(judged(model, data))
    return [
        [way, pm([r["accuracy"] for r in rs], 2, 100), *(pm([r[k] for r in rs], 0) for k in ("params", "macs"))]
        for way, rs in found.items()
    ]


def do_torchao(args: argparse.Namespace) -> list[list[str]]:
    """Rows: way, accuracy, milliseconds of a step against plain; 4-bit weights in groups of 32, linear layers."""
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        print(f"  torchao is left out: {error}")
        return []
    data, epochs = load("digits"), 3 if args.quick else 10
    lr = PRESET.quantize_lr
    config = QATConfig(
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True), step="prepare"
    )
    found: dict[str, list[float]] = {}

    def projected(model: nn.Module) -> nn.Module:
        parametrize_weights(model, weight_layers(model, (nn.Linear,)), lambda p, m: Symmetric(4, 32))
        return model

    def faked(model: nn.Module) -> nn.Module:
        quantize_(model, config)
        return model

    for seed in range(args.seeds):
        base = train(MLP.build(seed=seed), data, seed, 10 if args.quick else 30, PRESET.lr)
        flat = projected(copy.deepcopy(base))
        bake(flat)
        ways = {
            "base": base,
            "ours, untrained": flat,
            "ours": train(projected(copy.deepcopy(base)), data, seed, epochs, lr),
            "torchao": train(faked(copy.deepcopy(base)), data, seed, epochs, lr),
        }
        for way, model in ways.items():
            found.setdefault(way, []).append(judged(model, data)["accuracy"])
    x = from_arrays(torch.randn(512, 1, 8, 8), torch.arange(512) % 10, test=(torch.randn(8, 1, 8, 8), range(8)))
    wide = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [512, 512]})
    made = {"base": wide.build(), "ours": projected(wide.build()), "torchao": faked(wide.build())}
    sides = {
        k: Stepper(Distill(m, None, objectives=[], label=1.0), Batches(x.train, 256), 20, device="cpu")
        for k, m in made.items()
    }
    times = side_by_side(sides, 5 if args.quick else 15, 1)
    ratio = {k: f"{1 / t.times_faster_than(times['base']):.2f}" for k, t in times.items()}
    return [[way, pm(rs, 2, 100), ratio.get(way, "")] for way, rs in found.items()]


@torch.no_grad()
def semi_structured(model: nn.Module) -> nn.Module:
    """The network with its linear layers 2:4 sparse by magnitude, in the form that 2:4 kernels read; CUDA, float16."""
    from torch.sparse import to_sparse_semi_structured

    for layer in [m for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 64]:
        masked = layer.weight * nm_mask(layer.weight)
        layer.weight = nn.Parameter(to_sparse_semi_structured(masked), requires_grad=False)
    return model


def do_semi(args: argparse.Namespace) -> list[list[str]]:
    """Rows: what, milliseconds dense and 2:4, times faster; float16, median of passes by events."""
    if not torch.cuda.is_available():
        print("  semi is left out: no CUDA device")
        return []
    import timm

    batch = 8 if args.quick else 64
    cases: dict[str, tuple[nn.Module, torch.Tensor]] = {
        f"linear {i} to {o}, {batch}·196 tokens": (nn.Linear(i, o), torch.randn(batch * 196, i))
        for i, o in ((768, 768), (768, 3072), (3072, 768), (4096, 4096))
    }
    for name in ("deit_small_patch16_224", "deit_base_patch16_224"):
        cases[f"{name}, batch {batch}"] = (timm.create_model(name), torch.randn(batch, 3, 224, 224))
    rows = []
    for what, (model, x) in cases.items():
        dense, x = model.cuda().half().eval(), x.cuda().half()
        times = [latency(m, x, repeats=100).median_ms for m in (dense, semi_structured(copy.deepcopy(dense)))]
        rows.append([what, f"{times[0]:.3f}", f"{times[1]:.3f}", f"{times[0] / times[1]:.2f}"])
        print("  ", *rows[-1], sep=" | ", flush=True)
    return rows


JOBS: dict[str, tuple[Callable[[argparse.Namespace], list[list[str]]], list[str]]] = {
    "steps": (do_steps, ["network", "weights", "ms a step", "× plain", "× plain, processor time"]),
    "pruning": (do_pruning, ["way", "accuracy %", "parameters", "MACs"]),
    "torchao": (do_torchao, ["way", "accuracy %", "step × plain (MLP of 512)"]),
    "semi": (do_semi, ["what", "ms dense", "ms 2:4", "times faster"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", choices=[*JOBS, "all"])
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3; 1 with --quick)")
    parser.add_argument("--out", default="runs/students")
    parser.add_argument("--quick", action="store_true", help="small and short")
    args = parser.parse_args()
    args.seeds = args.seeds or (1 if args.quick else 3)
    torch.set_num_threads(1)
    path = Path(args.out) / "students.json"
    for name in JOBS if "all" in args.jobs else args.jobs:
        do, columns = JOBS[name]
        rows = do(args)
        known = read(path) or {}
        write(
            path, {**known, name: {"quick": args.quick, "environment": environment(), "columns": columns, "rows": rows}}
        )
        print(f"\n### {name}\n\n{table(columns, rows)}\n", flush=True)


if __name__ == "__main__":
    main()
