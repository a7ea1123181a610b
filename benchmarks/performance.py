"""What the loop, the outer step, the shared trunk, low memory and cached teachers cost or save, as ratios.

    .venv/bin/python benchmarks/performance.py fit                  # … torchdistill outer tree memory cached cli, all
    .venv/bin/python benchmarks/performance.py all --quick          # small and short, to see that it works
    .venv/bin/python benchmarks/performance.py fit torchdistill --device cuda --student torchvision:resnet18 --batch 512

Both sides of a ratio run in one process, a block of steps each in turn, one thread; a ratio is the median over the
rounds. Run it on a quiet machine. Each result goes to OUT/NAME.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import read, table, write
from rounds import Stepper, Timing, side_by_side

import torch  # isort: skip
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data import Batches, Data, from_arrays, together
from stillhouse.data.cache import SignalCache
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import count_params, environment
from stillhouse.models import ModelSpec
from stillhouse.recipes.wml.recipe import Config, Mutual, feature_sizes, make_peers
from stillhouse.recipes.wml.rules import make_rule
from stillhouse.teachers import Cached, Frozen

Args = argparse.Namespace
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
ALPHA, T = 0.5, 4.0


def network(name: str, args: Args, seed: int = 0) -> nn.Module:
    stem = "small" if name.startswith("torchvision:resnet") else "keep"
    return ModelSpec(name, 10, (3, args.size, args.size), stem).build(seed=seed).to(args.device)


def images(args: Args) -> Data:
    """Random images in memory; what they show does not matter to the time."""
    g = torch.Generator().manual_seed(0)
    n = max(args.samples, 2 * args.batch)
    x = torch.randn(n, 3, args.size, args.size, generator=g)
    y = torch.randint(0, 10, (n,), generator=g)
    return from_arrays(x, y, test=(x[:256], y[:256]), name="random", normalize=False)


def loop(steps: Callable[[], Any], block: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(block):
            steps()

    return run


def by_hand(args: Args, data: Data) -> Callable[[], None]:
    """The plain PyTorch loop for knowledge distillation on tensors in memory."""
    x, y = (t.to(args.device) if args.device == "cuda" else t for t in data.train.take(range(len(data.train))).values() if 1) if False else in_memory(data)  # noqa: E501
    student, teacher = network(args.student, args).train(), network(args.teacher, args, 1).eval()
    optimizer = SGD(student.parameters())
    g = torch.Generator().manual_seed(0)

    def batches() -> Any:
        while True:
            yield from torch.randperm(len(x), generator=g).split(args.batch)[: len(x) // args.batch]

    draw = batches()

    def step() -> None:
        ids = next(draw)
        images, labels = x[ids].to(args.device), y[ids].to(args.device)
        with torch.no_grad():
            target = teacher(images)
        logits = student(images)
        soft = F.kl_div(
            F.log_softmax(logits / T, 1), F.log_softmax(target / T, 1), reduction="batchmean", log_target=True
        )
        loss = (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * T * T * soft
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return loop(step, args.block)


def in_memory(data: Data) -> tuple[Tensor, Tensor]:
    import numpy as np

    whole = data.train.take(np.arange(len(data.train)))
    return whole["input"], whole["label"]


def by_fit(args: Args, data: Data, fast: bool = False) -> Stepper:
    """The same job through `fit`; `fast` with compiled networks in bfloat16, channels last."""
    teacher = network(args.teacher, args, 1)
    options: dict[str, Any] = {"device": args.device}
    if fast:
        teacher.to(memory_format=torch.channels_last).compile()
        options |= {"compile": True, "precision": "bf16", "channels_last": True}
    system = Distill(network(args.student, args), Frozen(teacher), alpha=ALPHA, T=T, optimizer=SGD)
    return Stepper(system, Batches(data.train, args.batch, augment=False), args.block, **options)


def by_torchdistill(args: Args, data: Data) -> Callable[[], None]:
    """The same job through torchdistill's box, as its example scripts run it."""
    from torchdistill.core.distillation import DistillationBox

    loader = {
        "dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler},
        "kwargs": {"batch_size": args.batch, "drop_last": True, "num_workers": 0},
    }  # fmt: skip
    kd = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
          "teacher_module_io": "output", "temperature": T, "alpha": 1 - ALPHA, "reduction": "batchmean"}  # fmt: skip
    config = {
        "num_epochs": 1, "train_data_loader": loader,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {
            "sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}}},
    }  # fmt: skip
    device = torch.device(args.device)
    teacher, student = network(args.teacher, args, 1), network(args.student, args)
    sets = {"train": torch.utils.data.TensorDataset(*in_memory(data))}
    box = DistillationBox(teacher, student, sets, config, device, None, False, 1)

    def batches() -> Any:
        for epoch in itertools.count():
            box.pre_epoch_process(epoch=epoch)
            box.teacher_model.eval()
            yield from box.train_data_loader

    draw = batches()

    def step() -> None:
        x, y, supp = next(draw)
        x, y = x.to(device), y.to(device)
        box.post_forward_process(loss=box.forward_process(x, targets=y, supp_dict=supp))

    return loop(step, args.block)


# -- the subcommands: each gives rows (what, value, to reach, met) -----------------------------------------------

Row = tuple[str, float, str, bool | None]


def speed(args: Args, sides: dict[str, Any], repeats: int | None = None) -> dict[str, Timing]:
    times = side_by_side(sides, repeats or args.repeats, args.warmup)
    for name, t in times.items():
        print(f"  {name}: {t.median:.3f} s a block", flush=True)
    return times


def do_fit(args: Args) -> list[Row]:
    data = images(args)
    t = speed(args, {"hand": by_hand(args, data), "fit": by_fit(args, data)})
    ratio = t["fit"].times_faster_than(t["hand"])
    return [("fit against a hand-written loop, throughput", ratio, "≥ 0.97", ratio >= 0.97)]


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
        ("torchdistill against the hand-written loop", hand, "(0.86 elsewhere)", None),
    ]
