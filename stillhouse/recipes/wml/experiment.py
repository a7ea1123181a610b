"""WML on real data: the family of one run, and on built-in digits the four claims over several seeds.

stillhouse run wml --out runs/wml                    # digits: the family and the claims, about two minutes
stillhouse run wml --data cifar10 --model torchvision:resnet18 --stem small --out runs/r18
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.data import Data, Relabelled, Samples, load, split
from stillhouse.engine import Run
from stillhouse.evaluate import environment
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.options import ImageOptions
from stillhouse.recipes.wml.recipe import Config, distill
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.system import fold
from stillhouse.trials import mean, table, trials

OPTIONS = ImageOptions
# What `stillhouse run wml` does without a model or data: the digits experiment of the card.
PRESET = Config(
    ratios=(0.0, 0.5, 0.75, 0.875), trunk=("2",), epochs=60, batch=64, optimizer="adamw", lr=3e-3, weight_decay=0.0,
    temperature=2.0, outer_every=2, outer_batch=150, warmup=5, eta=0.2, gamma=1.5,
)  # fmt: skip
# The smallest settings that touch everything, for the contract table.
TINY = replace(PRESET, ratios=(0.0, 0.5), epochs=2, warmup=0, outer_every=2, batch=32)

MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [64, 64]})


def main(run: Run, options: ImageOptions, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it: train, save the students, measure; the report, on the main process."""
    own = options.own
    data = options.load_data("digits")
    base = options.spec(data, "stillhouse:cnn") if own else MLP
    network = base.build(seed=run.seed, pretrained=True) if options.pretrained else None
    family = distill(run, data, base, cfg, network=network)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not own and cfg.rule == "wml":
        arms = run_arms(run, cfg, options.children())
        if report is not None:
            report.claims += claims(arms, options.children())
            report.tables += tables(arms)
            report.notes.append("Claims are measured on 300 training and 150 held-out digits, the students on 1,258.")
    return report


def tiny(run: Run, cfg: Config = TINY, base: ModelSpec = MLP) -> Family:
    """One run of a second or less on 192 digits, for the contract table."""
    return distill(run, load("digits", limit=192), base, cfg)


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    """The report of one family: who is how good, how large and how fast, and how training went."""
    family.save(run.folder)
    students, metrics, matrices = family.measure(data, run.folder, run.device)
    name = family.spec.name if family.spec else type(family.base).__name__
    report = Report(
        system="wml",
        title=f"{cfg.rule} · {name} on {data.name}",
        command=command,
        seed=run.seed,
        environment=environment(),
        metrics=metrics,
        claims=[],
        students=students,
        cost=family.cost,
        matrices=matrices,
        curves=curves(family),
        tables=[budget_table(family)],
        notes=[*data.notes, *family.notes],
    )
    if cfg.share == "tree":
        share = family.cost["trained_share"]
        text = "a tree run trains fewer parameters than its students apart (share of their sum)"
        report.claims.append(Claim(text, share < 1, share, 1.0, [run.seed]))
    worst = max(abs(b["miss"]) for b in family.budgets)
    text = "every student meets its budget within 1 %, or within one channel's cost (largest relative miss)"
    report.claims.append(Claim(text, all(b["met"] for b in family.budgets), worst, 0.01, [run.seed]))
    return report


def budget_table(family: Family) -> Table:
    """What each student was asked to give up and what it came to."""
    rows = []
    for m, b in zip(family.members, family.budgets, strict=True):
        asked = f"{100 * b['ratio']:.1f} % of {b['base']:,} {b['measure']}"
        rows.append([m.name, asked, f"{b['target']:,.0f}", f"{b['reached']:,}", f"{100 * b['miss']:+.2f} %"])
    return Table("Budgets", ["student", "gives up", "target", "reached", "miss"], rows)


def curves(family: Family) -> list[Curve]:
    """Losses (label and teaching apart), importance and accuracy over the steps of all stages."""
    rows, names = [r for r in family.logs if "ce" in r], [m.name for m in family.members]
    steps = [r["step"] for r in rows]

    def each(title: str, label: str, key: str) -> Curve:
        return Curve(title, "step", label, {n: (steps, [r[key][i] for r in rows]) for i, n in enumerate(names)})

    return [
        Curve(
            "Loss, label and teaching parts",
            "step",
            "loss",
            {k: (steps, [r[k] for r in rows]) for k in ("label", "teach")},
        ),
        each("Cross-entropy of each peer in training", "nats", "ce"),
        each("Importance ω", "weight", "omega"),
    ]


# -- the claims of the card --------------------------------------------------------------------------------------


def small_digits(noise: float, seed: int) -> Data:
    """300 training, 150 held-out and the remaining digits as test, as the card has it; optional label noise."""
    whole = load("digits")
    rest, judge = split(whole.train, 150 / len(whole.train), seed=fold("held", seed))
    _, learn = split(rest, 300 / len(rest), seed=fold("train", seed))
    parts: list[Samples] = [learn, judge]
    if noise:
        parts = [Relabelled(part, noise=noise, seed=fold("noise", k, seed)) for k, part in enumerate(parts)]
    return Data("digits 300/150", parts[0], whole.test, held_out=parts[1])


def poison(ids: Tensor, y: Tensor) -> Tensor:
    """Four peers, the last of which learns labels that have nothing to do with the images."""
    wrong = torch.tensor([fold("poison", int(i)) % 10 for i in ids])
    return torch.stack([y, y, y, wrong])


def run_arms(run: Run, cfg: Config, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Every arm on every seed, each a resumable run of its own; arm → one result per seed."""
    uniform = {"eta": 0.0}
    equal = {"ratios": (0.75,) * 4, "init": "fresh"}
    arms: dict[str, tuple[Mapping[str, Any], float, bool]] = {
        "independent": ({"rule": "independent"}, 0, False),
        "uniform mutual": (uniform, 0, False),
        "WML": ({}, 0, False),
        "WML without the second term": ({"second_term": False}, 0, False),
        "poisoned peer: uniform": ({**uniform, **equal}, 0, True),
        "poisoned peer: WML": (equal, 0, True),
        "30 % label noise: independent": ({"rule": "independent"}, 0.3, False),
        "30 % label noise: uniform": (uniform, 0.3, False),
        "30 % label noise: WML": ({}, 0.3, False),
    }

    def once(changes: Mapping[str, Any], noise: float, poisoned: bool, child: Run) -> dict[str, Any]:
        data, began = small_digits(noise, child.seed), time.monotonic()
        family = distill(child, data, MLP, replace(cfg, **changes), labels=poison if poisoned else None)
        return {**family.evaluate(data), **family.cost, "seconds": time.monotonic() - began}

    return trials(run, {arm: partial(once, *settings) for arm, settings in arms.items()}, seeds)


def claims(arms: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int]) -> list[Claim]:
    """Claims 1–3 of the card, as measured, holding or not."""
    gain = mean(arms["uniform mutual"], "ensemble_nll") - mean(arms["WML"], "ensemble_nll")
    poisoned = arms["poisoned peer: WML"]
    omegas = [list(r["importance"].values()) for r in poisoned]
    bad = max(o[-1] for o in omegas)
    least = min(min(o[:-1]) - o[-1] for o in omegas)
    rescue = mean(arms["poisoned peer: uniform"], "ensemble_nll") - mean(poisoned, "ensemble_nll")
    points = 100 * (mean(arms["WML"], "mean_accuracy") - mean(arms["uniform mutual"], "mean_accuracy"))
    s = list(seeds)
    return [
        Claim("1. test NLL of the ω-ensemble: uniform mutual − WML, nats", gain > 0.01, gain, 0.01, s),
        Claim("2. a poisoned peer's importance, largest over seeds, is below 0.5/m", bad < 0.125, bad, 0.125, s),
        Claim("2. … and below every other peer's (smallest margin over seeds)", least > 0, least, 0.0, s),
        Claim("2. … and WML's ensemble NLL beats uniform's (uniform − WML, nats)", rescue > 0, rescue, 0.0, s),
        Claim("3. clean labels: mean peer accuracy, WML − uniform, points", points >= -0.2, points, -0.2, s),
    ]


def tables(arms: Mapping[str, list[dict[str, Any]]]) -> list[Table]:
    columns = {
        "mean peer accuracy %": ("mean_accuracy", 100.0, 1),
        "ensemble accuracy %": ("ensemble_accuracy", 100.0, 1),
        "ensemble NLL": ("ensemble_nll", 1.0, 3),
        "trained parameters": ("trained_params", 1.0, 0),
        "seconds": ("seconds", 1.0, 1),
    }
    note = "mean ± standard deviation over seeds; independent and uniform arms see the same 300 labels as WML"
    return [table("Arms on small digits", arms, columns, note)]
