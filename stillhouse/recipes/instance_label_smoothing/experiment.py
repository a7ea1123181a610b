"""Instance-specific label smoothing on real data; on built-in digits the claims of the card over seeds.

stillhouse run instance_label_smoothing --out runs/beta
stillhouse run instance_label_smoothing --model torchvision:resnet34 --stem small --data cifar10 --out runs/r34
stillhouse run instance_label_smoothing --rule generations --generations 3 --data fashion-mnist --out runs/generations
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stillhouse.calibration import certainty, fit_temperature
from stillhouse.data import Data, Relabelled, Samples, load, split
from stillhouse.engine import Run
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.options import ClassifierOptions
from stillhouse.recipes.instance_label_smoothing.recipe import Config, distill, teacher_quality
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.system import fold
from stillhouse.trials import Results, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(ClassifierOptions):
    """Images or sentences."""

    seeds: int = 6  # seeds for the claims of the built-in experiment


PRESET = Config(held_out=0.0, epochs=100, batch=64, optimizer="adamw", lr=3e-3, weight_decay=1e-4)
TINY = replace(PRESET, epochs=2, held_out=0.2, batch=32)
MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [64, 32]})
BINS = 20
NOISE = {"clean": 0.0, "20 % wrong": 0.2}
ARMS: dict[str, dict[str, Any]] = {
    "CE": {"rule": "plain"},
    "label smoothing": {"rule": "smoothing"},
    "Beta": {"rule": "beta"},
    "Beta, by chance": {"rule": "beta", "assign": "random"},
    "generation 1": {"rule": "generations", "generations": 2},
}
CHAIN = 4  # generations of the diversity table


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = MLP) -> Family:
    """One run of about a second on 192 digits, for the contract table."""
    return distill(run, load("digits", limit=192), student, cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it; without --model and --data also the claims, over seeds."""
    own = options.own
    data = options.load_data("digits") if own else few_digits(run.seed, 0.0)[0]
    spec = options.spec(data, "stillhouse:cnn") if own else MLP
    family = distill(run, data, spec, cfg, network=options.network(spec, run.seed))
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not own:
        found = {
            noise: trials(run, {f"{noise}, {a}": partial(once, part, cfg, how) for a, how in ARMS.items()},
                          options.children())
            for noise, part in NOISE.items()
        }  # fmt: skip
        by_noise = {noise: {a: rows[f"{noise}, {a}"] for a in ARMS} for noise, rows in found.items()}
        chain = trials(run, {"chain": partial(generation_rows, cfg)}, options.children())["chain"]
        if report is not None:
            report.claims += claims(by_noise, cfg, list(options.children()))
            report.tables += [arm_table(noise, rows) for noise, rows in by_noise.items()]
            report.tables.append(chain_table([c["rows"] for c in chain]))
    return report


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    family.save(run.folder)
    students, metrics, matrices = family.measure(data, run.folder, run.device)
    rows = [[n, *(f"{q[k]:.4f}" for k in ("uncertainty", "diversity", "confidence"))]
            for n, q in teacher_quality(family, data).items()]  # fmt: skip
    note = "on the training samples: mean entropy in nats; spread and mean over samples of the confidence in the label"
    name = family.spec.name if family.spec else type(family.base).__name__
    names = sorted({k for r in family.logs for k in r} - {"step", "epoch", "generation"})
    lines: dict[str, Any] = {
        n: ([r["step"] for r in family.logs if n in r and not r["generation"]],
            [r[n] for r in family.logs if n in r and not r["generation"]]) for n in names
    }  # fmt: skip
    return Report(
        system="instance_label_smoothing", title=f"{cfg.rule} · {name} on {data.name}", command=command,
        seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students, cost=family.cost,
        matrices=matrices, curves=[Curve("First network", "step", "nats; accuracy as a fraction", lines)],
        tables=[Table("How it would teach", ["network", "uncertainty", "diversity", "confidence"], rows, note)],
        notes=[*data.notes, *family.notes],
    )  # fmt: skip


# -- the claims of the card --------------------------------------------------------------------------------------


def few_digits(seed: int, noise: float) -> tuple[Data, Samples]:
    """300 training digits, 20 % of them wrongly labelled when asked, all 539 test digits; and 300 clean others."""
    whole = load("digits")
    rest, learn = split(whole.train, 300 / len(whole.train), seed=fold("learn", seed))
    _, judge = split(rest, 300 / len(rest), seed=fold("judge", seed))
    train: Samples = Relabelled(learn, noise=noise, seed=fold("noise", seed)) if noise else learn
    return Data("digits 300", train, whole.test), judge


def once(noise: float, cfg: Config, how: Mapping[str, Any], run: Run) -> dict[str, float]:
    """One arm: the last network's quality, as it is and after temperature scaling on the 300 others."""
    data, judge = few_digits(run.seed, noise)
    family = distill(run, data, MLP, replace(cfg, **how))
    return quality(family.members[-1].model, data, judge)


def quality(model: Any, data: Data, judge: Samples) -> dict[str, float]:
    z, y = predict(model, data.test)
    T = fit_temperature(*predict(model, judge))
    return {
        **classification(z, y, BINS), "ece_scaled": classification(z / T, y, BINS)["ece"], "temperature": T,
        "nll_scaled": classification(z / T, y)["nll"], **certainty(z, y),
    }  # fmt: skip


def generation_rows(cfg: Config, run: Run) -> dict[str, list[dict[str, float]]]:
    """A chain of generations on clean digits: each one's quality on test samples, and as a teacher."""
    data, judge = few_digits(run.seed, 0.0)
    family = distill(run, data, MLP, replace(cfg, rule="generations", generations=CHAIN))
    seen = teacher_quality(family, data)
    rows = [{**quality(m.model, data, judge), "teaches": seen[m.name]["diversity"]} for m in family.members]
    return {"rows": rows}


def claims(found: Mapping[str, Results], cfg: Config, seeds: list[int]) -> list[Claim]:
    """The card's claims with the card's thresholds."""
    noisy = found["20 % wrong"]
    gain = 100 * (mean(noisy["Beta"], "accuracy") - mean(noisy["CE"], "accuracy"))
    rank = 100 * (mean(noisy["Beta"], "accuracy") - mean(noisy["Beta, by chance"], "accuracy"))
    made = [
        Claim("20 % wrong labels: Beta − CE, accuracy in points", gain >= 1, gain, 1.0, seeds),
        Claim("20 % wrong labels: Beta − Beta by chance, accuracy in points", rank >= 0, rank, 0.0, seeds),
    ]
    for noise, arms in found.items():
        for other in ("label smoothing", "Beta, by chance"):
            less = mean(arms["Beta"], "nll") - mean(arms[other], "nll")
            made.append(Claim(f"{noise}: NLL of Beta − {other}, nats", less < 0, less, 0.0, seeds))
    return made


def arm_table(noise: str, arms: Results) -> Table:
    columns = {
        "accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3), "ECE": ("ece", 1.0, 3),
        "ECE, scaled": ("ece_scaled", 1.0, 3), "NLL, scaled": ("nll_scaled", 1.0, 3),
        "uncertainty": ("uncertainty", 1.0, 3), "diversity": ("diversity", 1.0, 3),
    }  # fmt: skip
    note = (
        "mean ± standard deviation over seeds, on test samples; scaled: one temperature, fitted on 300 other digits; "
        f"ECE with {BINS} bins; diversity: spread over samples of the confidence in the true class"
    )
    return table(f"300 digits, {noise}", arms, columns, note)


def chain_table(chain: list[list[dict[str, float]]]) -> Table:
    arms = {f"generation {k}": [rows[k] for rows in chain] for k in range(CHAIN)}
    columns = {
        "accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3), "uncertainty": ("uncertainty", 1.0, 3),
        "diversity": ("diversity", 1.0, 3), "diversity on its training samples": ("teaches", 1.0, 4),
    }  # fmt: skip
    return table("Generations on clean digits", arms, columns)
