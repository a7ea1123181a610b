"""DSFormer on a user's trained network, and on built-in digits its arms over seeds.

stillhouse run dsformer --out runs/dsformer
stillhouse run dsformer --model hf:FOLDER --pretrained --data sst2 --ratio 0.3 --out runs/bert
stillhouse run dsformer --model bert --data sst2 --teacher-epochs 3 --compare --out runs/sst2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.evaluate import classification, environment, fidelity, predict
from stillhouse.export import WEIGHTS, read_weights
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import load as load_student
from stillhouse.plain import train_first
from stillhouse.recipes.dsformer.recipe import Config, distill
from stillhouse.recipes.dsformer.sizes import Layer, residual
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.students.plan import Plan
from stillhouse.teacher_options import TrainedOptions
from stillhouse.trials import Results, claim, difference, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(TrainedOptions):
    """Sentences or images, and a trained network."""

    compare: bool = False  # on your own data: also every other way to the same size, over seeds

    def idle(self, config: Any) -> Mapping[str, str]:
        given = ("weights", "pretrained")
        return {k: why for k, why in super().idle(config).items() if k in given or not self.compare}


PRESET = Config(nonzeros=(4,), teacher_epochs=40, epochs=6, batch=64, lr=1e-3, teacher_lr=2e-3)
TINY = replace(PRESET, teacher_epochs=1, epochs=2, sweeps=5, batch=32, freeze=0.25)
SIZES = {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}
BASE = ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options=SIZES)
SMALL = replace(BASE, options={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2})
BEST = "D·S, best t of each layer"
ARMS: dict[str, dict[str, Any]] = {
    "SVD": {"method": "svd", "epochs": 0.0},
    "SVD, fine-tuned": {"method": "svd"},
    "D·S, t = 1": {"method": "fixed", "nonzeros": (1,), "epochs": 0.0},
    "D·S, t = 1, fine-tuned": {"method": "fixed", "nonzeros": (1,)},
    "mode C, t = 1": {"method": "C", "nonzeros": (1,)},
    "mode W, t = 1": {"method": "W", "nonzeros": (1,)},
    "D·S, t = 4": {"method": "fixed", "nonzeros": (4,), "epochs": 0.0},
    "D·S, t = 4, fine-tuned": {"method": "fixed", "nonzeros": (4,)},
    "mode C, t = 4": {"method": "C", "nonzeros": (4,)},
    "mode W, t = 4": {"method": "W", "nonzeros": (4,)},
    BEST: {"method": "fixed", "nonzeros": (1, 2, 4, 8, 16), "epochs": 0.0},
}
Start = Callable[[Data, int], tuple[ModelSpec, nn.Module, Plan | None]]
COLUMNS = {
    "accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3), "as the network %": ("agreement", 100.0, 2),
    "weights, bytes": ("stored", 1.0, 0), "of the budget %": ("met", 100.0, 2),
    "‖W − D·S‖ / ‖W‖ at the start": ("residual", 1.0, 3),
}  # fmt: skip


def tiny(run: Run, cfg: Config = TINY, base: ModelSpec = SMALL) -> Family:
    """One run of about a second on 96 digits, for the contract table."""
    return distill(run, load("digits", limit=96), base, cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One network as the command makes it; without flags, or with --compare, also every arm over seeds."""
    data, made = options.load_data("digits"), partial(start, options, fresh=bool(cfg.teacher_epochs))
    spec, network, plan = made(data, run.seed)
    family = distill(run, data, spec, cfg, network=network, plan=plan)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if options.compare or not options.own:
        seeds = list(options.children())
        arms = trials(run, {a: partial(once, run, made, data, c, cfg) for a, c in ARMS.items()}, seeds)
        if report is not None:
            report.claims += claims(arms, seeds)
            note = f"mean ± standard deviation over seeds; the network has {100 * mean(arms['SVD'], 'teacher'):.2f} %"
            report.tables.append(table(f"Ways to {100 * cfg.ratio:g} % of the bytes", arms, COLUMNS, note))
    return report


def start(options: OPTIONS, data: Data, seed: int, *, fresh: bool) -> tuple[ModelSpec, nn.Module, Plan | None]:
    """The network of one seed, as it comes."""
    if not options.own:
        return BASE, BASE.build(seed=seed), None
    return replace(options, seed=seed).trained(data, BASE.name, fresh=fresh)


def once(whole: Run, made: Start, data: Data, changes: Mapping[str, Any], cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; the network is trained once per seed and is the same in every arm."""
    _, network, _ = made(data, run.seed)
    home = whole if run.seed == whole.seed else whole.child(f"given-{run.seed}", seed=run.seed, quiet=True)
    train_first(home, network, data, cfg)
    cfg = replace(cfg, teacher_epochs=0.0, **changes)
    family = distill(run, data, network, cfg)
    (z, *_), y = family.logits(data.test)
    t, _ = predict(network, data.test)
    own, rows = classification(z, y), family.budgets
    left = [remainders(network, Layer(**{k: v for k, v in b.items() if k != "stored"}), cfg.sweeps) for b in rows]
    return {
        "accuracy": own["accuracy"], "nll": own["nll"], "agreement": fidelity(t, z)["teacher_agreement"],
        "teacher": classification(t, y)["accuracy"], "stored": sum(b["stored"] for b in rows),
        "met": sum(b["stored"] for b in rows) / sum(b["asked"] for b in rows),
        "residual": sum(x for x, _ in left) / len(left), "against": max(x / low for x, low in left),
    }  # fmt: skip


def remainders(network: nn.Module, layer: Layer, sweeps: int) -> tuple[float, float]:
    """‖W − Ŵ‖/‖W‖ of a layer before training, and that of the truncated SVD with at most as many bytes."""
    w = network.get_submodule(layer.module).weight
    assert isinstance(w, nn.Parameter)
    s = torch.linalg.svdvals(w.detach().double())
    low = [float(s[q:].norm() / s.norm()) for q in (layer.stored() // (layer.value * sum(w.shape)), layer.rank)]
    return (residual(w, sweeps, layer) / float(w.detach().norm()) if layer.nonzeros else low[1]), low[0]


def claims(arms: Results, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    low = arms["SVD, fine-tuned"]
    gains = {a: difference(arms[a], low, "accuracy", 100.0) for a in arms if a.startswith("mode")}
    found = [claim(f"{a} − SVD, fine-tuned, accuracy in points", g, -0.5, seeds) for a, g in gains.items()]
    worst = max(r["against"] for r in arms[BEST])
    text = "largest error of a weight over that of its SVD of equal bytes, the best t of each layer"
    return [*found, Claim(text, worst <= 1 + 1e-4, worst, 1 + 1e-4, list(seeds))]


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    """The report of one run: sizes asked for and on disk, layer by layer, and the losses."""
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    home, rows = run.folder / "students" / "student", family.budgets
    disk = {k: v.nbytes for k, v in read_weights(home / WEIGHTS)[0].items() if not k.endswith("bias")}
    on_disk = [sum(n for k, n in disk.items() if k.startswith(f"{b['module']}.")) for b in rows]
    (z, *_), _ = family.logits(data.test)
    again, _ = predict(load_student(home, None if family.spec else family.base), data.test)
    asked, stored = (sum(b[k] for b in rows) for k in ("asked", "stored"))
    gap, off = sum(on_disk) - stored, float((again - z).abs().max())
    names = [k for k in ("label", "kd") if any(k in r for r in family.logs)]
    lines: dict[str, Any] = {n: (list(range(len(family.logs))), [r.get(n) for r in family.logs]) for n in names}
    table_rows = [
        [b["module"], f"{b['rows']}×{b['columns']}", b["rank"], f"{b['nonzeros']} of {b['block']}" if b["nonzeros"]
         else "–", f"{b['asked']:,.0f}", f"{b['stored']:,}", f"{n:,}"] for b, n in zip(rows, on_disk, strict=True)
    ]  # fmt: skip
    name = family.spec.name if family.spec else type(family.base).__name__
    return Report(
        system="dsformer", title=f"{name}, chosen weights in {100 * cfg.ratio:g} % of their bytes, on {data.name}",
        command=command, seed=run.seed, environment=environment(), metrics=metrics, students=students,
        claims=[
            Claim("|bytes of the chosen weights / bytes asked for − 1|", abs(stored / asked - 1) <= 0.01,
                  abs(stored / asked - 1), 0.01, [run.seed]),
            Claim("bytes of the chosen weights on disk − bytes claimed", gap == 0, gap, 0.0, [run.seed]),
            Claim("largest difference of logits, loaded from disk − as trained", off == 0, off, 0.0, [run.seed]),
        ],
        cost=family.cost, notes=[*data.notes, *family.notes],
        curves=[Curve("Losses, as weighted", "row of the log", "loss", lines)] if lines else [],
        tables=[Table("Layers", ["layer", "weight", "rank", "t of b", "bytes asked for", "bytes", "on disk"],
                      table_rows)],
    )  # fmt: skip
