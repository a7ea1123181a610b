"""The arms that a distilled set is compared with, and the claims of the card."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from stillhouse.data import Batches, Data, Samples, Subset
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.models import ModelSpec
from stillhouse.outcomes import DataSet
from stillhouse.recipes.soft_label_dataset_distillation.config import Config
from stillhouse.recipes.soft_label_dataset_distillation.labels import initial_labels, starting_classes
from stillhouse.recipes.soft_label_dataset_distillation.nets import networks
from stillhouse.recipes.soft_label_dataset_distillation.recipe import distill, make_system, pack
from stillhouse.recipes.soft_label_dataset_distillation.use import accuracy, train_on
from stillhouse.report import Claim, Table
from stillhouse.system import fold
from stillhouse.trials import Arm, Results, mean, table

SOFTMAX = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": []})
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def evaluate(run: Run, dataset: DataSet, samples: Samples, spec: ModelSpec, cfg: Config) -> list[float]:
    """Accuracy after training on the set: of one network for a known start, of 5 fresh ones, of each of the pool."""
    if cfg.start == "pool":
        nets = networks(run, spec, cfg, ())
    else:
        nets = [spec.build(seed=run.seed)] * (1 if cfg.start == "known" else 5)
    seeds = [fold(run.seed, "test", i) for i in range(len(nets))]
    return [
        accuracy(train_on(dataset, net.to(run.device), seed=s), samples, cfg.one_logit, run.device)
        for net, s in zip(nets, seeds, strict=True)
    ]


def learned(data: Data, spec: ModelSpec, cfg: Config, kind: str, run: Run) -> dict[str, Any]:
    began = time.monotonic()
    dataset = distill(run, data, spec, cfg, kind=kind)
    seconds = time.monotonic() - began
    found = evaluate(run, dataset, data.test, spec, cfg)
    return {"accuracy": sum(found) / len(found), "seconds": seconds, **columns_apart(dataset, spec, cfg)}


def columns_apart(dataset: DataSet, spec: ModelSpec, cfg: Config) -> dict[str, float]:
    """Largest difference between the trained weights of classes that no sample starts from (softmax regression)."""
    used = set(dataset.facts["starting_classes"])
    idle = [c for c in range(spec.classes) if c not in used]
    if spec.options.get("widths") != [] or len(idle) < 2:
        return {}
    with torch.no_grad():
        weight = train_on(dataset, spec.build()).get_parameter("1.weight")[idle]
        return {"apart": float((weight - weight[:1]).abs().max() / weight.abs().max())}


def random_real(data: Data, spec: ModelSpec, cfg: Config, kind: str, run: Run) -> dict[str, Any]:
    """As many random real samples of the starting classes, hard labels, the constant step size that fits best.

    The step size is chosen out of `RATES` by the accuracy on (up to 2,000) training samples.
    """
    hard = replace(cfg, labels="hard", label_init="one-hot", label_scale=1.0, label_shift=0.0, label_softmax=False)
    rng = np.random.default_rng(fold(run.seed, "random real"))
    classes = starting_classes(hard, len(data.classes)).tolist() * hard.blocks
    orders = {c: iter(rng.permutation(np.flatnonzero(data.train.labels == c))) for c in sorted(set(classes))}
    x = data.train.take(np.array([next(orders[c]) for c in classes]))["input"]
    y = initial_labels(hard, len(data.classes), torch.Generator())
    judges = Subset(data.train, np.sort(rng.permutation(len(data.train))[:2000]))

    def at(rate: float, samples: Samples) -> float:
        system = make_system(run, spec, replace(hard, step_size=rate), x, y, kind=kind)
        return float(np.mean(evaluate(run, pack(run, data, spec, system), samples, spec, hard)))

    best = max(RATES, key=lambda rate: at(rate, judges))
    return {"accuracy": at(best, data.test), "step_size": best}


def full_data(data: Data, spec: ModelSpec, run: Run) -> dict[str, Any]:
    """The same network trained on everything."""
    net = spec.build(seed=run.seed)
    optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-4)
    fit(run, "full", Distill(net, None, alpha=0.0, optimizer=optimizer), Batches(data.train, 64), epochs=30)
    return {"accuracy": accuracy(net, data.test, spec.classes == 1, run.device)}


def digits_arms(data: Data, cfg: Config) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for m in (3, 5, 10):
        for kind in ("soft", "hard"):
            made = replace(cfg, samples=m, classes=tuple(range(m)), labels=kind)
            arms[f"{m} samples, {kind} labels"] = partial(learned, data, SOFTMAX, made, "images")
    ten = replace(cfg, samples=10, classes=tuple(range(10)))
    arms["10 random real samples"] = partial(random_real, data, SOFTMAX, ten, "images")
    return {**arms, "full data": partial(full_data, data, SOFTMAX)}


def text_arms(data: Data, spec: ModelSpec, cfg: Config, kind: str) -> dict[str, Arm]:
    return {
        "learned": partial(learned, data, spec, cfg, kind),
        "random real": partial(random_real, data, spec, cfg, kind),
        "full data": partial(full_data, data, spec),
    }


def tables(arms: Results) -> list[Table]:
    columns = {"test accuracy %": ("accuracy", 100.0, 1), "seconds": ("seconds", 1.0, 0)}
    return [table("Arms", arms, columns)]


def text_claims(data: Data, arms: Results, seeds: list[int]) -> list[Claim]:
    """The card's claim on sentences."""
    points = 100 * (mean(arms["learned"], "accuracy") - mean(arms["random real"], "accuracy"))
    text = (
        f"{data.name} accuracy, learned sentences − as many random real ones at their best constant step size, points"
    )
    return [Claim(text, points >= 8, points, 8.0, seeds)]


def digits_claims(data: Data, arms: Results, seeds: list[int]) -> list[Claim]:
    """Claims (a) to (c) of the card, as measured, holding or not."""
    share = np.bincount(data.test.labels, minlength=10) / len(data.test)
    bound = float(share[:5].sum() + share[5:].max())
    soft5, hard5 = arms["5 samples, soft labels"], arms["5 samples, hard labels"]
    soft, hard = (mean(arms[f"10 samples, {kind} labels"], "accuracy") for kind in ("soft", "hard"))
    real, gain = mean(arms["10 random real samples"], "accuracy"), mean(soft5, "accuracy") - mean(hard5, "accuracy")
    apart = max(r["apart"] for r in hard5)
    worst, least = max(r["accuracy"] for r in hard5), min(r["accuracy"] for r in soft5)

    def at_least(text: str, value: float, threshold: float) -> Claim:
        return Claim(text, value >= threshold, value, threshold, seeds)

    def at_most(text: str, value: float, threshold: float) -> Claim:
        return Claim(text, value <= threshold, value, threshold, seeds)

    return [
        at_most("(a) 5 hard labels: weights of the 5 idle classes stay equal (largest relative gap)", apart, 1e-5),
        at_most("(a) … so accuracy ≤ share of classes 0–4 + largest other (largest over seeds)", worst, bound),
        at_least("(b) 5 soft labels for 10 classes: test accuracy (smallest over seeds)", least, 0.88),
        at_least("(b) 5 samples: test accuracy, soft − hard", gain, 0.27),
        at_least("(c) 10 samples: test accuracy, soft − hard", soft - hard, -0.01),
        at_least("(c) 10 samples: test accuracy, soft − random real", soft - real, 0.15),
        at_least("(c) 10 samples: test accuracy, hard − random real", hard - real, 0.15),
    ]
