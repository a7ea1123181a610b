"""What the experiment measures beside accuracy (bound on Gaussians, linear probe, recommender), and its data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.comparisons import as_map
from stillhouse.data import Arrays, Data, Samples, load, split
from stillhouse.engine import Run
from stillhouse.evaluate import call, classification, count_params, evaluating, predict
from stillhouse.models import ModelSpec
from stillhouse.objectives import mutual_information
from stillhouse.options import ClassifierOptions
from stillhouse.recommend import Recorded, facts_of, left_out, merged
from stillhouse.report import Claim, Table
from stillhouse.system import fold
from stillhouse.taps import tap

ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)
RHO, DIMS, BATCH, BATCHES = 0.9, 4, 64, 500


@dataclass(frozen=True)
class Pair:
    """What a comparison is made on: what teacher and student learn from, and both networks."""

    teaches: Data
    learns: Data
    teacher: ModelSpec
    student: ModelSpec


def few_digits(seed: int) -> Pair:
    """300 digits for the student, the other 958 for its teacher; the student has half the layers, an eighth as wide.

    At half the width the teacher's features can be read from any student's, R² above 0.94: nothing to tell apart.
    """
    whole = load("digits")
    rest, few = split(whole.train, 300 / len(whole.train), seed=fold("few", seed))
    large, small = (
        ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": w}) for w in ([64, 64, 64, 64], [8, 8])
    )
    return Pair(Data("digits 958", rest, whole.test), Data("digits 300", few, whole.test), large, small)


def encoders(data: Data, options: ClassifierOptions) -> Pair:
    """Sentences for both, a BERT of 4 layers from scratch and one of 2 layers at half its width."""
    large = replace(options, layers=4, width=options.width).text("bert", data)
    small = replace(options, layers=2, width=options.width // 2).text("bert", data)
    return Pair(data, data, large, small)


def made_up_sentences(n: int = 96) -> Pair:
    """A few made-up opinions and two tiny encoders, for tests."""
    from stillhouse.text.classifiers import bert_spec
    from stillhouse.text.sentences import sentence_data

    rng, words = np.random.default_rng(0), ("film", "plot", "actor", "scene", "end")
    kinds = {"good": ("great", "fine", "warm"), "bad": ("dull", "weak", "cold")}
    rows = [
        {"text": " ".join([*rng.choice(words, 2), rng.choice(kinds[label]), *rng.choice(words, 1)]), "label": label}
        for label in ("good", "bad") * (n // 2)
    ]
    data = sentence_data({"train": rows}, "opinions", length=16)
    size = len(data.train.tokenizer)  # type: ignore[attr-defined]
    large, small = (
        bert_spec(size, 2, width=w, layers=k, length=16, heads=2, dropout=0.0) for w, k in ((16, 2), (8, 1))
    )
    return Pair(data, data, large, small)


# -- the bound on Gaussians -------------------------------------------------------------------------------------


def gaussian_scores(g: torch.Generator, n: int = BATCH) -> tuple[Tensor, Tensor]:
    """F_ij = log p(y_i | x_j) and c_i = log p(y_i) of pairs with correlation ρ in each of d dimensions, float64.

    The best critic and the true baseline: what is left is the estimator. I(X; Y) = −d/2 log(1 − ρ²).
    """
    x, noise = torch.randn(2, n, DIMS, generator=g, dtype=torch.float64)
    y, spread = RHO * x + math.sqrt(1 - RHO**2) * noise, math.sqrt(1 - RHO**2)
    scores = torch.distributions.Normal(RHO * x[None], spread).log_prob(y[:, None]).sum(2)
    return scores, torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(1)


def estimates(seed: int, batches: int = BATCHES) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over batches of Î_α, by α."""
    g = torch.Generator().manual_seed(fold("gaussians", seed))
    drawn = [gaussian_scores(g) for _ in range(batches)]
    found = {}
    for alpha in ALPHAS:
        each = torch.stack([mutual_information(f, c, alpha).mean() for f, c in drawn])
        found[f"{alpha:g}"] = {"mean": float(each.mean()), "std": float(each.std()), "n": batches}
    return found


def of_estimates(made: Mapping[str, Mapping[str, Any]], seeds: list[int]) -> tuple[list[Claim], Table]:
    """The card's claims about the estimator, over all seeds' batches."""
    true = -DIMS / 2 * math.log(1 - RHO**2)
    rows = [[made[str(s)][f"{a:g}"] for s in seeds] for a in ALPHAS]
    means = [float(np.mean([r["mean"] for r in row])) for row in rows]
    stds = [float(np.sqrt(np.mean([r["std"] ** 2 for r in row]))) for row in rows]
    errors = [s / math.sqrt(sum(r["n"] for r in row)) for s, row in zip(stds, rows, strict=True)]
    high = max((m - true) / e for m, e in zip(means, errors, strict=True))
    steps = len(ALPHAS) - 1
    falls = [sum(b < a for a, b in itertools.pairwise(v)) for v in (means, stds)]
    claims = [
        Claim("Gaussians: mean Î falls at every step of α from 0 to 1", falls[0] == steps, falls[0], steps, seeds),
        Claim("Gaussians: spread of Î falls at every step of α", falls[1] == steps, falls[1], steps, seeds),
        Claim("Gaussians: largest mean Î above I, in standard errors", high <= 3, high, 3.0, seeds),
    ]
    cells = [[f"{a:g}", f"{m:.3f}", f"{s:.3f}", f"{e:.4f}"] for a, m, s, e in zip(ALPHAS, means, stds, errors)]
    note = f"ρ = {RHO} in {DIMS} dimensions, I = {true:.3f} nats; batches of {BATCH}, best critic, true baseline"
    return claims, Table("The bound on Gaussians", ["α", "mean Î", "s.d. of a batch", "s.e."], cells, note)


# -- what a student's layers know of the teacher's ---------------------------------------------------------------


@torch.no_grad()
def features(model: nn.Module, samples: Samples, paths: Sequence[str], read: str = "input") -> dict[str, np.ndarray]:
    """Outputs of modules on every sample, (n, d) each: means over positions."""
    found: dict[str, list[Tensor]] = {p: [] for p in paths}
    with evaluating(model):
        for start in range(0, len(samples), 256):
            x = samples.take(np.arange(start, min(start + 256, len(samples))), view=None)[read]
            with tap(model, list(paths), detach=True) as seen:
                call(model, x)
            for p in paths:
                f = as_map(seen[p], x)
                found[p].append(f.flatten(2).mean(2) if f.dim() > 2 else f)
    return {p: torch.cat(v).double().numpy() for p, v in found.items()}


def r_squared(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, ridge: float = 1e-3) -> float:
    """1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖² on the test part, ŷ of a ridge regression with penalty `ridge` · tr(XᵀX)/d.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 3))
        >>> r_squared(x, 2 * x + 1, x, 2 * x + 1, ridge=0.0) > 0.999999
        True
    """
    mean, level = x.mean(0), y.mean(0)
    z = x - mean
    gram = z.T @ z
    penalty = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    said = (x_test - mean) @ np.linalg.lstsq(gram + penalty, z.T @ (y - level), rcond=None)[0] + level
    return float(1 - ((y_test - said) ** 2).sum() / ((y_test - level) ** 2).sum())


def probe(
    student: nn.Module, teacher: nn.Module, pairs: Sequence[tuple[str, str]], train: Samples, test: Samples
) -> float:
    """Mean over pairs of layers of `r_squared` from the student's features to the teacher's."""
    mine, theirs = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    s, t = ([features(m, part, p) for part in (train, test)] for m, p in ((student, mine), (teacher, theirs)))
    return float(np.mean([r_squared(s[0][a], t[0][b], s[1][a], t[1][b]) for a, b in pairs]))


# -- the recommender ---------------------------------------------------------------------------------------------


def small_tasks(seed: int) -> dict[str, Data]:
    """Six tasks that packages bring: four of digits, wines and tumours by their measurements."""
    from sklearn.datasets import load_breast_cancer, load_wine

    whole = load("digits")
    parts = [p.take(np.arange(len(p))) for p in (whole.train, whole.test)]
    x, y = (np.concatenate([p[k].numpy() for p in parts]) for k in ("input", "label"))
    low = y < 5
    made = {"digits": (x, y), "0 to 4": (x[low], y[low]), "5 to 9": (x[~low], y[~low] - 5), "odd or even": (x, y % 2)}
    for name, opened in (("wine", load_wine), ("tumours", load_breast_cancer)):
        a, b = opened(return_X_y=True)
        made[name] = (((a - a.mean(0)) / a.std(0)).astype(np.float32), b)
    return {name: _parted(name, a, b, seed) for name, (a, b) in made.items()}


def _parted(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> Data:
    train, test = split(Arrays(x, y), 0.4, seed=fold(name, seed))
    return Data(name, train, test)


def recorded(data: Data, system: str, settings: Any, teacher: nn.Module, student: nn.Module) -> Recorded:
    """A run as the recommender sees it."""
    scores = [classification(*predict(m, data.test))["accuracy"] for m in (teacher, student)]
    sizes = [4.0 * count_params(m) for m in (teacher, student)]
    facts = facts_of(data.facts, scores[0], sizes[0], sizes[1] / sizes[0])
    return Recorded(data.name, system, settings, facts, scores[1] / scores[0])


def of_recommender(
    rows: Sequence[Mapping[str, Any]], arms: Sequence[str], seeds: list[int]
) -> tuple[list[Claim], Table]:
    """The card's claim about advice on a task left out."""
    made = [Recorded(**{k: r[k] for k in ("task", "system", "settings", "facts", "ratio")}) for r in rows]
    tested = left_out(merged(made))
    value = float(np.mean(list(tested.values()))) if tested else math.nan
    claim = Claim("recommender: rank correlation on a task left out, mean", value > 0, value, 0.0, seeds)
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    cells = []
    for task in tasks:
        ratios = {a: float(np.mean([r["ratio"] for r in rows if (r["task"], r["arm"]) == (task, a)])) for a in arms}
        rho = f"{tested[task]:.2f}" if task in tested else "–"
        cells.append([task, *(f"{ratios[a]:.3f}" for a in arms), rho])
    note = (
        "score of the student over the teacher's, mean over seeds; the rank correlation is of a model without this task"
    )
    return [claim], Table("Recorded runs for the recommender", ["task", *arms, "rank correlation"], cells, note)


def run_rows(run: Run, once: Any, arms: Mapping[str, Mapping[str, Any]], cfg: Any) -> list[dict[str, Any]]:
    """One row per task and arm: students of 100 samples under a teacher of all.

    Args:
        once: ``once(run, pair, cfg, arms)`` gives teacher, and arm → student.
    """
    rows: list[dict[str, Any]] = []
    for name, data in small_tasks(run.seed).items():
        few = split(data.train, min(0.9, 100 / len(data.train)), seed=fold("few", run.seed))[1]
        specs = [
            ModelSpec("stillhouse:mlp", len(data.classes), tuple(data.shape), options={"widths": w})
            for w in ([64, 64, 64, 64], [16, 16])
        ]
        pair = Pair(data, Data(name, few, data.test), *specs)
        child = run.child(f"task-{len(rows) // len(arms)}", quiet=True)
        teacher, students = once(child, pair, replace(cfg, batch=32), arms)
        for arm, student in students.items():
            settings = {**asdict(cfg), **arms[arm]}
            settings = {k: settings[k] for k in ("intermediate", "alpha", "layer_map", "mixup")}
            rows.append({"arm": arm, **asdict(recorded(pair.learns, "distiller_mi_alpha", settings, teacher, student))})
    return rows
