"""The jobs that benchmarks/performance.py times: the same distillation by hand, by `fit`, by torchdistill; WML."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common  # noqa: F401  (one thread)
import numpy as np
from rounds import Stepper

import torch  # isort: skip
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data import Batches, Data, from_arrays, together
from stillhouse.distill import Distill
from stillhouse.engine import Run
from stillhouse.models import ModelSpec
from stillhouse.recipes.wml.recipe import Config, Mutual, feature_sizes, make_peers
from stillhouse.recipes.wml.rules import make_rule
from stillhouse.teachers import Frozen

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
    x, y = in_memory(data)
    if args.device != "cpu":
        x, y = x.to(args.device), y.to(args.device)
    student, teacher = network(args.student, args).train(), network(args.teacher, args, 1).eval()
    optimizer = SGD(student.parameters())
    g = torch.Generator().manual_seed(0)

    def batches() -> Any:
        while True:
            yield from torch.randperm(len(x), generator=g).split(args.batch)[: len(x) // args.batch]

    draw = batches()

    def step() -> None:
        ids = next(draw)
        images, labels = x[ids], y[ids]
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
    whole = data.train.take(np.arange(len(data.train)))
    return whole["input"], whole["label"]


def by_fit(args: Args, data: Data, fast: bool = False, layer: str = "") -> Stepper:
    """The same job through `fit`; `fast` with compiled networks in bfloat16, channels last.

    `layer` adds the mean squared difference of that module's output, which has one shape in both networks.
    """
    teacher = network(args.teacher, args, 1)
    options: dict[str, Any] = {"device": args.device}
    if fast:
        teacher.to(memory_format=torch.channels_last).compile()
        options |= {"compile": True, "precision": "bf16"}
    how: dict[str, Any] = {"alpha": ALPHA, "T": T}
    if layer:
        example = {k: v.to(args.device) for k, v in data.train.take(np.arange(4)).items()}
        how = {"objectives": [f"kd:{ALPHA}?T={T}", f"feature:{layer}:1"], "label": 1 - ALPHA, "example": example}
    asked = Frozen(teacher, taps=[layer] if layer else [])
    system = Distill(network(args.student, args), asked, optimizer=SGD, **how)
    return Stepper(system, Batches(data.train, args.batch, augment=False), args.block, **options)


def by_torchdistill(args: Args, data: Data, layer: str = "") -> Callable[[], None]:
    """The same job through torchdistill's box, as its example scripts run it; `layer` as for `by_fit`."""
    from torchdistill.core.distillation import DistillationBox

    loader = {
        "dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler},
        "kwargs": {"batch_size": args.batch, "drop_last": True, "num_workers": 0},
    }  # fmt: skip
    kd = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
          "teacher_module_io": "output", "temperature": T, "alpha": 1 - ALPHA, "reduction": "batchmean"}  # fmt: skip
    terms: dict[str, Any] = {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
    hook: dict[str, Any] = {}
    if layer:
        hook = {"forward_hook": {"input": [], "output": [layer]}}
        ends = {side: {"is_from_teacher": side == "target", "module_path": layer, "io": "output"}
                for side in ("input", "target")}  # fmt: skip
        wrapper = {"key": "SimpleLossWrapper", "kwargs": ends}
        terms["feature"] = {"criterion": {"key": "MSELoss", "kwargs": {}}, "criterion_wrapper": wrapper, "weight": 1.0}
    config = {
        "num_epochs": 1, "train_data_loader": loader,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False, **hook},
        "student": {"forward_proc": "forward_batch_only", **hook},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
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


RATIOS = {4: (0.0, 0.3, 0.5, 0.7), 8: (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}


def learner(args: Args, data: Data, m: int = 4, **changes: Any) -> Mutual:
    """WML over m peers of the student network."""
    cfg = Config(**{"ratios": RATIOS[m], "lr": 0.01, "batch": args.batch, "outer_every": 10, **changes})
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, device="cpu")
        peers, *_ = make_peers(run, network(args.student, args).cpu(), data.train, cfg)
    rule = make_rule(cfg.rule, cfg.share, m, *feature_sizes(peers, data.train), cfg.detach)
    made = Mutual(peers.to(args.device), cfg, rule)
    made.total = 1_000_000
    return made


def pairs(args: Args, data: Data) -> Any:
    """Training and held-out batches, as the recipe has them."""
    held = Batches(data.test, -(-args.batch // 2), augment=False)
    return together(train=Batches(data.train, args.batch, augment=False), held_out=held)


def by_wml(args: Args, data: Data, m: int = 4, **changes: Any) -> Stepper:
    return Stepper(learner(args, data, m, **changes), pairs(args, data), args.outer_block, device=args.device)


def alone(args: Args, data: Data, students: Sequence[nn.Module]) -> Callable[[], None]:
    """The students of a family trained one after the other on labels, as many steps each."""
    source = Batches(data.train, args.batch, augment=False)
    each = [
        Stepper(
            Distill(s.train(), None, alpha=0.0, optimizer=SGD, clip=5.0), source, args.outer_block, device=args.device
        )
        for s in students
    ]

    def run() -> None:
        for one in each:
            one()

    return run
