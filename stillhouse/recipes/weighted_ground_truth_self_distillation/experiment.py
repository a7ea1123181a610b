"""Weighted ground-truth self-distillation: the paper's toy table, two real tables over splits, networks on digits.

stillhouse run weighted_ground_truth_self_distillation --out runs/wgt
stillhouse run weighted_ground_truth_self_distillation --data mytables:load --steps 8 --out runs/mine
stillhouse run weighted_ground_truth_self_distillation --method last-layer --teacher runs/r18/students/p00 --data cifar10 --out runs/head
stillhouse run weighted_ground_truth_self_distillation --method networks --model stillhouse:resnet20 --data cifar10 --out runs/nets
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse import plain
from stillhouse.data import load, split
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.family import Family
from stillhouse.files import read_json
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Models
from stillhouse.recipes.weighted_ground_truth_self_distillation import closed
from stillhouse.recipes.weighted_ground_truth_self_distillation.config import RIDGES, Config
from stillhouse.recipes.weighted_ground_truth_self_distillation.problems import (
    TABLES,
    from_data,
    is_table,
    kernel_matrix,
    problem,
)
from stillhouse.recipes.weighted_ground_truth_self_distillation.recipe import kernel, last_layer, networks
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.students.plan import Plan
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import table, trials


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Tables, images or sentences; a trained network for its last layer."""

    data: str | None = None  # kernel: diabetes, breast_cancer or module:function giving (x, y); else as of classifiers
    seeds: int = 30  # random splits for the claims of the built-in experiment

    def idle(self, config: Config) -> dict[str, str]:
        """Also the options of other methods; the built-in experiment is of ``kernel``."""
        if not self.own and config.method == "kernel":
            return {}
        names = NOT_OF[config.method]
        if config.method == "kernel" and is_table(self.data or ""):
            names += ("image_size", "label_noise", "skip_bad")
        return dict.fromkeys(names, f"it is not of --method {config.method}") | config.idle


_TEACHER = ("teacher", "teacher_weights", "teacher_size")
_TEXT = ("tokenizer", "length", "width", "layers", "dropout")
NOT_OF: dict[str, tuple[str, ...]] = {
    "kernel": ("model", "student", "pretrained", "stem", "augment", *_TEACHER, *_TEXT),
    "last-layer": ("model", "student", "pretrained", "augment", "teacher_size"),
    "networks": ("pretrained", *_TEACHER),
}
PRESET = Config(steps=5, epochs=40, batch=32, lr=3e-3)
TINY = replace(PRESET, steps=3, epochs=2, held_out=0.3)
MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [32]})
CNN = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [8, 16, 32]})
NETS = 3  # seeds of the networks, which are reported and not claimed
SPLITS = (0.0, 0.2, 0.5)
TOY_RIDGE, TOY_GAMMA, PRINTED = 0.2, 80.0, {
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
}  # fmt: skip
TOY_Y = (
    0.38476636, 1.23339677, 1.33232242, 0.69201595, -0.29756146, -0.24189291, -0.79644858, -0.96164802, -0.4967251,
    -0.3469066, 0.55895127,
)  # fmt: skip


def tiny(run: Run, cfg: Config = TINY, model: ModelSpec = MLP) -> Models | Family:
    """One run of about a second: a real table, or 192 digits."""
    if cfg.method == "kernel":
        return kernel(run, problem("breast_cancer", run.seed), cfg)
    data = load("digits", limit=192)
    if cfg.method == "networks":
        return networks(run, data, model, cfg)
    return last_layer(run, data, model.build(seed=run.seed), cfg, spec=model)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it; without --model and --data also the paper's table and the claims."""
    if cfg.method == "kernel":
        name = options.data or "diabetes"
        labelled = None if is_table(name) else options.load_data(name)
        asked = from_data(labelled, run.seed) if labelled else problem(name, run.seed, options.limit)
        fitted = kernel(run, asked, cfg)
        report = describe_kernel(run, fitted, name, cfg, command) if run.main else None
    else:
        data = options.load_data("digits")
        made = deep(run, options, data, cfg)
        report = describe(run, made, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own and cfg.method == "kernel":
        splits = trials(run, {name: partial(once, name) for name in TABLES}, options.children())
        nets = trials(run, {"networks": partial(nets_once, cfg)}, list(options.children())[:NETS])["networks"]
        if report is not None:
            report.claims += [toy_claim(run.seed), *claims(splits, list(options.children()))]
            report.tables += [toy_table(), *split_tables(splits), nets_table(nets)]
            report.curves += [toy_curve()]
    return report


def deep(run: Run, options: OPTIONS, data: Any, cfg: Config) -> Family:
    """The networks named by ``--model``, or the last layer of the one named by ``--teacher``."""
    if cfg.method == "networks":
        return networks(run, data, options.spec(data, "stillhouse:cnn"), cfg)
    if len(options.teacher) != 1:
        raise UserError(f"--method last-layer needs one --teacher, the trained network, got {len(options.teacher)}")
    (model,), look = options.teachers(data)
    name, spec, plan = options.teacher[0], None, None
    if look:
        raise UserError(
            f"--teacher {name}: its published weights read another normalisation than {data.name} has, so its features "
            "would be others; train it on these data first, and give RUN/students/NAME"
        )
    if (Path(name) / "plan.json").exists():
        facts = read_json(Path(name) / "plan.json")
        plan = Plan.from_json(facts)
        spec = ModelSpec.from_json(facts["base"]) if "name" in facts["base"] else None
    elif not hasattr(data.train, "tokenizer"):
        stem = options.stem if name.startswith("torchvision:") else "keep"
        spec = ModelSpec(name, len(data.classes), tuple(data.shape), stem)
    return last_layer(run, data, model, cfg, spec=spec, plan=plan)


def describe(run: Run, made: Family, data: Any, cfg: Config, command: str) -> Report:
    made.save(run.folder)
    students, metrics, matrices = made.measure(data, run.folder, run.device)
    steps = [r for r in made.logs if "alpha" in r]
    tables = [step_table(steps)] if steps else []
    lines = {f"step {g + 1}": ([float(r["step"]) for r in made.logs if r.get("generation") == g and "validation" in r],
                               [r["validation"] for r in made.logs if r.get("generation") == g and "validation" in r])
             for g in range(cfg.steps)} if not steps else {}  # fmt: skip
    curves = [Curve("Accuracy on held-out samples", "step", "fraction", lines)] if lines else []
    name = made.spec.name if made.spec else type(made.base).__name__
    return Report(
        system="weighted_ground_truth_self_distillation", title=f"{cfg.method} · {name} on {data.name}",
        command=command, seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students,
        cost=made.cost, matrices=matrices, tables=tables, curves=curves, notes=[*data.notes, *made.notes],
    )  # fmt: skip


def describe_kernel(run: Run, made: Models, name: str, cfg: Config, command: str) -> Report:
    made.save(run.folder)
    best = made.logs[made.cost["best_step"] - 1]
    numbers = {k: v for k, v in best.items() if k.startswith("test")}
    rows = made.rows(run.folder, {"student": {k.removeprefix("test_"): v for k, v in numbers.items()}})
    shown = {part: ([float(r["step"]) for r in made.logs], [r[f"{part}_mse"] for r in made.logs])
             for part in ("validation", "test")}  # fmt: skip
    return Report(
        system="weighted_ground_truth_self_distillation", title=f"kernel ridge regression on {name}", command=command,
        seed=run.seed, environment=environment(), metrics=numbers, claims=[], students=rows, cost=made.cost,
        tables=[step_table(made.logs)], curves=[Curve("Error by step", "step", "mean squared error", shown)],
    )  # fmt: skip


def step_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = [k for k in rows[0] if k != "step"]
    cells = [[r["step"], *(f"{r[k]:.4f}" for k in keys)] for r in rows]
    return Table("Steps", ["step", *(k.replace("_", " ") for k in keys)], cells, "alpha: weight of the ground truth")


# -- (i) the paper's toy problem ----------------------------------------------------------------------------------


def toy_errors(alpha: float) -> list[float]:
    """Mean squared errors against sin 2πx on 101 points, of the steps 1 … 6 and of the limit."""
    x, grid = (torch.linspace(0, 1, n, dtype=torch.float64)[:, None] for n in (11, 101))
    y, K = torch.tensor(TOY_Y, dtype=torch.float64)[:, None], kernel_matrix(x, x, TOY_GAMMA)
    steps = closed.chain(closed.Kernel(K, TOY_RIDGE), y, [alpha] * 5)
    found = [s.coefficients for s in steps] + [closed.limit(closed.Kernel, K, y, TOY_RIDGE, alpha)]
    rows, truth = kernel_matrix(grid, x, TOY_GAMMA), torch.sin(2 * torch.pi * grid)
    return [closed.mse(rows @ c, truth) for c in found]


def toy_claim(seed: int) -> Claim:
    off = max(abs(a - b) for alpha, row in PRINTED.items() for a, b in zip(toy_errors(alpha), row, strict=True))
    return Claim("the toy table to 5 decimals (largest difference)", off <= 5e-6, off, 5e-6, [seed])


def toy_table() -> Table:
    rows = [[f"{alpha}", *(f"{v:.5f}" for v in toy_errors(alpha))] for alpha in (0.0, 0.25, 0.35)]
    note = "mean squared error against sin 2πx; the row printed as α = 0.25 in the official README is that of 0.35"
    return Table("Toy problem", ["α", *(f"step {k}" for k in range(1, 7)), "limit"], rows, note)


def toy_curve() -> Curve:
    """Pure self-distillation collapses, labels dampen that."""
    x = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
    d = torch.linalg.eigvalsh(kernel_matrix(x, x, TOY_GAMMA))
    steps = list(range(1, 41))
    lines = {f"α = {a}": (steps, [float(closed.shrinkage(d, TOY_RIDGE, a, k).sum()) for k in steps])
             for a in (0.0, 0.35, 1.0)}  # fmt: skip
    return Curve("Toy problem: effective degrees of freedom, trace(B)", "step", "trace", lines)


# -- (ii) two tables over random splits ---------------------------------------------------------------------------


def once(name: str, run: Run) -> dict[str, Any]:
    """One split: for every ridge the chains of all label weights, and the greedy one."""
    parts, targets = problem(name, run.seed).standardised()
    K, held, test = (kernel_matrix(x, parts[0], 1 / parts[0].shape[1]) for x in parts)
    (y, held_y, test_y), found = targets, {}

    def errors(steps: list[closed.Step], rows: Tensor, truth: Tensor) -> list[float]:
        return [closed.mse(rows @ s.coefficients, truth) for s in steps]

    for ridge in RIDGES:
        smoother = closed.Kernel(K, ridge)
        best = closed.greedy(smoother, y, held, held_y, 5)
        chains = {a: errors(closed.chain(smoother, y, [a] * 59), test, test_y) for a in SPLITS}
        far = closed.mse(test @ closed.after(K, y, ridge, 0.2, 400), test_y)
        end = closed.mse(test @ closed.limit(closed.Kernel, K, y, ridge, 0.2), test_y)
        found[str(ridge)] = {
            "greedy_validation": errors(best, held, held_y), "greedy_test": errors(best, test, test_y),
            "alphas": [s.alpha for s in best], "limit_gap": abs(far - end),
            **{f"alpha {a}": [*c[:5], c[-1]] for a, c in chains.items()},
        }  # fmt: skip
    return found


def claims(splits: Mapping[str, list[dict[str, Any]]], seeds: list[int]) -> list[Claim]:
    """The card's claims with the card's thresholds; of the shares the lower one of the two tables."""
    every = [row[str(r)] for rows in splits.values() for row in rows for r in RIDGES]
    worse = max(max(f["greedy_validation"]) - f["greedy_validation"][0] for f in every)
    gap = max(f["limit_gap"] for f in every)

    def least(ridge: float, holds: Any) -> float:
        return min(sum(map(holds, (r[str(ridge)] for r in rows))) / len(rows) for rows in splits.values())

    some = least(0.01, lambda f: min(f["alpha 0.0"][1:5]) < f["alpha 0.0"][0])
    wins = least(0.01, lambda f: f["greedy_test"][4] < f["greedy_test"][0])
    dampened = least(1.0, lambda f: f["alpha 0.0"][-1] > f["alpha 0.2"][-1])
    return [
        Claim("validation error of any greedy step − of step 1 (largest of all splits and ridges)", worse <= 1e-12,
              worse, 1e-12, seeds),
        Claim("|test error after 400 steps, α = 0.2 − that of ridge λ/0.2| (largest)", gap < 1e-10, gap, 1e-10, seeds),
        Claim("λ = 0.01: share of splits where a step 2 … 5 of α = 0 beats step 1", some >= 0.9, some, 0.9, seeds),
        Claim("λ = 0.01: share of splits where greedy step 5 beats step 1", wins >= 0.9, wins, 0.9, seeds),
        Claim("λ = 1: share of splits where after 60 steps α = 0 is worse than α = 0.2", dampened >= 0.9, dampened,
              0.9, seeds),
    ]  # fmt: skip


def split_tables(splits: Mapping[str, list[dict[str, Any]]]) -> list[Table]:
    made = []
    for name, found in splits.items():
        rows = []
        for ridge in RIDGES:
            at = [f[str(ridge)] for f in found]
            for label, key in [*((f"α = {a}", f"alpha {a}") for a in SPLITS), ("α*", "greedy_test")]:
                means = [sum(f[key][k] for f in at) / len(at) for k in range(len(at[0][key]))]
                cells = [f"{m:.3f}" for m in means] + ["–"] * (6 - len(means))
                rows.append([f"{ridge:g}", label, *cells])
        heads = ["λ", "label weight", *(f"step {k}" for k in range(1, 6)), "step 60"]
        note = f"mean test squared error over {len(found)} splits 60/20/20, standardised, RBF with γ = 1/d"
        made.append(Table(f"Kernel ridge regression on {name}", heads, rows, note))
    return made


# -- (iii) networks on digits -------------------------------------------------------------------------------------


def nets_once(cfg: Config, run: Run) -> dict[str, float]:
    """Three steps of a small network on 400 digits by an estimated and two fixed label weights; a refitted head."""
    whole = load("digits")
    _, few = split(whole.train, 500 / len(whole.train), seed=fold("nets", run.seed))
    learn, held = split(few, cfg.held_out, seed=fold("held out", run.seed))
    data, found = replace(whole, train=learn, held_out=held), dict[str, float]()
    fixed = replace(cfg, method="networks", steps=3, weight="fixed")
    arms = {"estimated": replace(fixed, weight="optimal"), **{f"{a:g}": replace(fixed, alpha=a) for a in (0.2, 0.0)}}
    for name, settings in arms.items():
        family = networks(run.child(f"weight-{name}", quiet=True), data, MLP, settings)
        scores = family.evaluate(data)
        found |= {f"{name}: {k}": v for k, v in scores["accuracy"].items()}
        if name == "estimated":
            found |= {f"weight {r['generation']}": r["label_weight"] for r in family.logs if "label_weight" in r}
    trained = CNN.build(seed=run.seed)
    how = plain.Plain(objective=(), label=1.0, teacher_epochs=20, batch=64, optimizer="adamw", lr=3e-3)
    plain.train_teacher(run, "trained", trained, data, how)
    refitted = last_layer(run, data, trained, replace(cfg, method="last-layer"), spec=CNN)
    before = Family([replace(refitted.members[0], model=trained)], refitted.shape, refitted.classes, trained)
    for name, family in (("as it came", before), ("refitted", refitted)):
        scores = family.evaluate(data)
        found |= {f"head {name}: accuracy": scores["mean_accuracy"], f"head {name}: NLL": scores["mean_nll"]}
    return found


def nets_table(rows: list[dict[str, float]]) -> Table:
    shown = {key: [{"value": r[key]} for r in rows] for key in rows[0]}
    made = table("Networks on 400 digits", shown, {"value": ("value", 1.0, 4)})
    note = f"{made.note} ({len(rows)}); label weight: test accuracy of g0, g1, g2; weight k: α̂ of step k; reported only"
    return replace(made, note=note)
