"""GPUSQ-ViT on a user's trained network, and on built-in digits its stages and its weights over seeds.

stillhouse run gpusq_vit --out runs/gpusq                    # digits: 4 bits, and every arm over seeds
stillhouse run gpusq_vit --model timm:deit_small_patch16_224 --pretrained --data folder:photos --bits 8 --out runs/small
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, fidelity, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.plain import train_first
from stillhouse.recipes.gpusq_vit.config import Config
from stillhouse.recipes.gpusq_vit.layers import broken_groups, choose, stored
from stillhouse.recipes.gpusq_vit.recipe import distill
from stillhouse.recipes.gpusq_vit.stages import Made, quantize, sparsify
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.teacher_options import TrainedOptions
from stillhouse.trials import Results, claim, difference, table, trials

OPTIONS = TrainedOptions
PRESET = Config(bits=4, teacher_epochs=20.0, epochs=5.0, quantized_epochs=5.0, batch=64, lr=1e-3, quantized_lr=1e-3,
                teacher_lr=2e-3)  # fmt: skip
TINY = replace(PRESET, teacher_epochs=1.0, epochs=1.0, quantized_epochs=1.0, batch=32, calibrate=64)
VIT = {"patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4}
BASE = ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options=VIT)
SMALL = replace(BASE, options={"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2})


def tiny(run: Run, cfg: Config = TINY, base: ModelSpec = SMALL) -> Family:
    """One run of about a second on 96 digits, for the contract table."""
    return distill(run, load("digits", limit=96), base, cfg)


def main(run: Run, options: TrainedOptions, cfg: Config, command: str) -> Report | None:
    """One network through both stages as the command makes it; without flags also every arm on digits, over seeds."""
    data = options.load_data("digits")
    spec, network, plan = BASE, None, None
    if options.model or options.pretrained or options.weights:
        spec, network, plan = options.trained(data, BASE.name, fresh=bool(cfg.teacher_epochs))
    elif options.own:
        if not cfg.teacher_epochs:
            raise UserError("--model is missing: name a trained network, or --teacher-epochs N to train a small one")
        spec = base_for(data)
    family = distill(run, data, spec, cfg, network=network, plan=plan)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = options.children()
        rows = trials(run, {"arms": partial(once, run, data, cfg)}, seeds)["arms"]
        arms = {arm: [row[arm] for row in rows] for arm in rows[0]}
        if report is not None:
            report.claims += claims(arms, cfg, list(seeds))
            columns = {"accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3), "as dense %": ("dense", 100.0, 2)}
            note = "mean ± standard deviation over seeds; arms of a seed have one dense network and one sparse stage"
            report.tables.append(table(f"Arms on digits, {cfg.sparsity}, {cfg.bits} bits", arms, columns, note))
    return report


def base_for(data: Data) -> ModelSpec:
    """The small transformer of the digits for other images: 16 patches."""
    options = {**VIT, "patch_size": max(1, min(data.shape[1:]) // 4)}
    return ModelSpec(BASE.name, len(data.classes), tuple(data.shape), options=options)


# -- the claims of the card --------------------------------------------------------------------------------------


def once(whole: Run, data: Data, cfg: Config, run: Run) -> dict[str, dict[str, float]]:
    """One seed: what is trained once, then every way to go on. What the run itself has trained is read back."""
    network = BASE.build(seed=run.seed)
    home = whole if run.seed == whole.seed else run
    train_first(home, network, data, cfg)
    layers = choose(network, data.train.take(np.arange(2))["input"], cfg)
    z, _ = predict(network, data.test)

    def judged(made: Made | nn.Module) -> dict[str, float]:
        model = made.model if isinstance(made, Made) else made
        own, y = predict(model, data.test)
        found = {k: v for k, v in classification(own, y).items() if k in ("accuracy", "nll")}
        found["dense"] = fidelity(z, own)["teacher_agreement"]
        return found | {"broken": 0.0 if model is network else broken_groups(model, layers.sparse, cfg)}

    def small(sparse: Made, **changes: Any) -> Made:
        same = run if changes else home
        return quantize(same, data, network, sparse, layers, replace(cfg, **changes), "-".join(["quantized", *changes]))

    sparse = sparsify(home, data, network, layers, cfg)
    return {
        "dense": judged(network),
        "sparse, one-shot": judged(sparsify(run, data, network, layers, replace(cfg, epochs=0.0))),
        "sparse, stage 1": judged(sparse),
        "quantised after stage 1, not trained": judged(small(sparse, quantized_epochs=0.0)),
        "stage 2, w = 1": judged(small(sparse, weighting="none")),
        "stage 2": judged(small(sparse)),
    }


def claims(arms: Results, cfg: Config, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims with the card's thresholds, as measured, holding or not."""
    _, shot, sparse, rounded, even, full = arms.values()

    def gain(text: str, a: Any, b: Any, least: float) -> Claim:
        return claim(f"{text}, accuracy in points", difference(a, b, "accuracy", 100.0), least, seeds)

    broken = sum(r["broken"] for rows in arms.values() for r in rows)
    return [
        gain("sparse stage − one-shot", sparse, shot, 0.5),
        gain(f"quantised stage − not trained, {cfg.bits} bits", full, rounded, 1.0),
        gain("with w_i − with w = 1", full, even, -0.3),
        Claim(f"groups of weights with more than {cfg.sparsity}, all arms", broken == 0, broken, 0.0, list(seeds)),
    ]


# -- the report --------------------------------------------------------------------------------------------------


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    """The report of one run: the dense network and both students, where their bytes are, what the layers lost."""
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    students = [s for s in students if s.role != "ensemble"]
    for s in students:
        s.metrics.pop("importance", None)
    sizes = {m.name: stored(m, run.folder) for m in family}
    small = f"int{cfg.bits}"
    gap, layers = family.cost["baked_difference"], choose(family.base, data.train.take(np.arange(2))["input"], cfg)
    broken = sum(broken_groups(m.model, layers.sparse, cfg) for m in family)
    off = sum(r["held"] + r["scales"] - r["claimed"] for r in sizes[small])
    found = [
        Claim("largest difference of logits, baked − with projectors", gap <= 1e-5, gap, 1e-5, [run.seed]),
        Claim(f"groups of weights with more than {cfg.sparsity}", broken == 0, broken, 0.0, [run.seed]),
        Claim(f"{small}: bytes of weights and scales in the file − by formula", off == 0, off, 0.0, [run.seed]),
    ]
    for name, bits in (("sparse", 16), (small, cfg.bits)):
        rows = [r for r in sizes[name] if r["pattern"] != "dense"]
        if not rows:  # a pattern that keeps all
            continue
        share, wanted = sum(r["held"] for r in rows) / sum(r["dense"] for r in rows), cfg.sparsity.share(bits)
        text = f"{name}: bytes of sparse weights in the file, as a part of dense ones of {bits} bits"
        found.append(Claim(text, abs(share / wanted - 1) <= 0.01, share, wanted, [run.seed]))
    lines: dict[str, Any] = {}
    for stage in ("sparse", "quantized"):
        rows = [r for r in family.logs if r["stage"] == stage]
        lines |= {f"{stage}: {k}": ([r["step"] for r in rows], [r[k] for r in rows])
                  for k in ("hard", "soft", "feature") if rows and k in rows[0]}  # fmt: skip
    name = family.spec.name if family.spec else type(family.base).__name__
    return Report(
        system="gpusq_vit", title=f"{name}, {cfg.sparsity} and {cfg.bits} bits, on {data.name}", command=command,
        seed=run.seed, environment=environment(), claims=found, students=students, cost=family.cost,
        metrics={"accuracy": students[-1].metrics["accuracy"], "task": metrics["task"]},
        curves=[Curve("Losses of both stages, as weighted", "step", "loss", lines)] if lines else [],
        tables=tables(family, sizes[small], small), notes=[*data.notes, *family.notes],
    )  # fmt: skip


def tables(family: Family, sizes: Sequence[dict[str, Any]], small: str) -> list[Table]:
    """Bytes of every layer of the quantised student, and what the compared layers lost in the first stage."""
    head = ["layer", "weight", "pattern", "values", "places", "scales", "of float32 %"]
    rows = []
    for r in sizes:
        part = 100 * (r["held"] + r["scales"]) / (4 * np.prod(r["shape"]))
        each = [f"{r[k]:,}" for k in ("values", "places", "scales")]
        rows.append([r["module"], "×".join(map(str, r["shape"])), r["pattern"], *each, f"{part:.2f}"])
    made = [Table(f"Layers of {small}, bytes in the file", head, rows)]
    if family.budgets:
        lost = [[b["module"], f"{b['error']:.3g}", f"{b['weight']:.3f}"] for b in family.budgets]
        note = "ℓ_i: running mean of the MSE in the sparse stage; w_i: its weight in the quantised stage"
        made.append(Table("Compared layers", ["layer", "ℓ_i", "w_i"], lost, note))
    return made
