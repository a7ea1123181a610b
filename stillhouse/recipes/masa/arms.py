"""The arms of MASA's built-in experiment: from scratch against other ways to save, and fits without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from stillhouse.engine import Run
from stillhouse.evaluate import count_params
from stillhouse.models import ModelSpec
from stillhouse.recipes.masa.config import Config
from stillhouse.recipes.masa.fitting import fitted
from stillhouse.recipes.masa.recipe import calibration, from_scratch, shared, train
from stillhouse.report import Claim, Table
from stillhouse.students.blocks import alike_blocks
from stillhouse.students.dictionary import leftovers, thin
from stillhouse.students.edits import Factor
from stillhouse.students.moments import second_moments
from stillhouse.students.projections import projections
from stillhouse.students.sharing import share_by_stage
from stillhouse.text.language import llama_spec, measured, nats
from stillhouse.text.windows import Corpus
from stillhouse.trials import Results, claim, difference, table, trials

SIZE = {"width": 64, "layers": 6, "heads": 4}
RATIOS = (0.5, 0.4, 0.3, 0.2, 0.1)
SCRATCH: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "MASA-QKV": {"variant": "qkv"},
    "MASA-QKVO": {"variant": "qkvo"},
    "low rank": {},
    "pairs of layers": {},
}
FITS: dict[str, dict[str, Any]] = {
    **{f"fit, {100 * r:g} % fewer": {"ratio": r} for r in RATIOS},
    "fit at 20 %, not whitened": {"whiten": False},
    "fit at 20 %, no dictionary": {},
}
PARTS = 200  # test windows on which a fit is judged


def small(text: Corpus) -> ModelSpec:
    """The LLaMA of the built-in experiment; at its usual 0.02 so narrow a network takes most of its steps to start."""
    spec = llama_spec(text.vocabulary, length=text.length, **SIZE)
    return replace(spec, options={**spec.options, "initializer_range": 0.1})


def compare(run: Run, text: Corpus, cfg: Config, seeds: Sequence[int]) -> Results:
    """Every arm on every seed; all are trained alike."""
    cfg = replace(cfg, way="train")
    arms = {arm: partial(scratch, run, arm, cfg, text) for arm in SCRATCH}
    fits = {arm: partial(closed, run, arm, replace(cfg, variant="qkvo", **how), text) for arm, how in FITS.items()}
    return trials(run, {**arms, **fits}, seeds)


def scratch(whole: Run, arm: str, cfg: Config, text: Corpus, run: Run) -> dict[str, Any]:
    """One arm from scratch: what it reaches and how many attention weights it has."""
    model = vanilla(whole, run.seed, cfg, text) if arm == "vanilla" else small(text).build(seed=run.seed)
    if arm.startswith("MASA"):  # what this run's own seed has trained is read back
        own = replace(cfg, **SCRATCH[arm])
        model, _ = from_scratch(whole if own == cfg and run.seed == whole.seed else run, model, text, own)
    elif arm != "vanilla":
        if arm == "low rank":
            model = low_rank(model, replace(cfg, variant="qkvo"), run.seed)
        else:
            attention = [block.self_attn for block in alike_blocks(model)[1]]
            share_by_stage(attention, (2,) * (len(attention) // 2))  # type: ignore[arg-type]
        train(run, "train", model, text, cfg, cfg.steps)
    return {**measured(model, text), "attention": attention_values(model), "params": count_params(model)}


def attention_values(model: nn.Module) -> int:
    """Stored values of all blocks' attention, shared ones once."""
    return sum(p.numel() for p in {p for n, p in model.named_parameters() if "self_attn" in n})


def vanilla(whole: Run, seed: int, cfg: Config, text: Corpus) -> nn.Module:
    """The plain network of a seed, trained once for all arms."""
    model = small(text).build(seed=seed)
    home = whole.child(f"given-{seed}", seed=seed, quiet=True)
    train(home, "vanilla", model, text, replace(Config(), **moves(cfg)), cfg.steps)
    return model


def moves(cfg: Config) -> dict[str, Any]:
    """The loop's part of the settings, which is all that a plain network depends on."""
    return {k: getattr(cfg, k) for k in ("optimizer", "steps", "batch", "lr", "lr_warmup", "weight_decay", "clip")}


def low_rank(model: nn.Module, cfg: Config, seed: int) -> nn.Module:
    """Attention of one rank, or one more, everywhere: as many values as the shared one has, or a few fewer."""
    budget = attention_values(shared(model, cfg, seed)[0])
    paths = [p for each in projections(model, cfg.variant)[1].values() for p in each]
    first: Any = model.get_submodule(paths[0])  # all have its shape
    units = budget // (first.in_features + first.out_features)
    for k, path in enumerate(paths):
        model = Factor(path, units // len(paths) + (k < units % len(paths))).apply(model)
    return model


def closed(whole: Run, arm: str, cfg: Config, text: Corpus, run: Run) -> dict[str, Any]:
    """One fit to the plain network of a seed, and how whitened leftovers compare with plain ones at its ranks."""
    model = vanilla(whole, run.seed, cfg, text)
    batches = calibration(text, cfg)
    student, _, parts = fitted(model, batches, cfg, (0,) if arm.endswith("no dictionary") else ())
    plain, value = nats(model, text.test, limit=PARTS), nats(student, text.test, limit=PARTS)
    found = {"nll": value, "perplexity": float(torch.tensor(value).exp()), "worse": value - plain,
             "attention": sum(p.stored for p in parts), "params": count_params(student)}  # fmt: skip
    if cfg.whiten:
        moments = second_moments(model, [p for part in parts for p in part.paths], batches)
        pairs = [errors(model, student, p, moments[p]) for part in parts for p, r in zip(part.paths, part.ranks) if r]
        found |= {"matrices": len(pairs), "not worse": len([1 for a, b in pairs if a <= b * (1 + 1e-6)])}
        found["gain"] = sum(a / b for a, b in pairs) / max(1, len(pairs))
    return found


@torch.no_grad()
def errors(model: nn.Module, student: nn.Module, path: str, moment: torch.Tensor) -> tuple[float, float]:
    """E‖(R − Z) x‖² on the calibration samples for one matrix: of the whitened Z, and of the plain one of its rank."""
    left, right = leftovers(student.get_submodule(path))
    before, after = (m.get_submodule(path).weight for m in (model, student))
    missed: Any = before - after  # type: ignore[operator]
    rest = missed + left @ right
    a, b = thin(rest, left.shape[1])
    one, two = (float((e @ moment * e).sum()) for e in (missed, rest - a @ b))
    return one, two


def claims(arms: Results, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    qkvo, low = arms["MASA-QKVO"], arms["low rank"]
    made = [
        claim("low rank − MASA-QKVO at the same attention weights, nats", difference(low, qkvo, "nll"), -0.01, seeds),
        claim("vanilla − MASA-QKV, nats", difference(arms["vanilla"], arms["MASA-QKV"], "nll"), -0.06, seeds),
    ]
    fits = [arms[a] for a in FITS if "%" in a and a.endswith("fewer")]
    count = sum(r["matrices"] for rows in fits for r in rows)
    good = sum(r["not worse"] for rows in fits for r in rows)
    text = "fitted matrices whose whitened rest errs no more than a plain one of its rank, on the calibration samples"
    made.append(Claim(text, good == count, good, count, list(seeds)))
    rises = [b["nll"] - a["nll"] for one, two in pairwise(fits) for a, b in zip(one, two)]
    made.append(Claim("largest rise of the loss as the budget grows, nats", max(rises) <= 0.01, max(rises), 0.01,
                      list(seeds)))  # fmt: skip
    return made


def arms_tables(arms: Results, text: Corpus) -> list[Table]:
    columns = {
        "nats": ("nll", 1.0, 4), "perplexity": ("perplexity", 1.0, 3), "attention weights": ("attention", 1.0, 0),
        "all weights": ("params", 1.0, 0),
    }  # fmt: skip
    note = "mean ± standard deviation over seeds; test windows; all trained alike"
    more = {"nats worse than vanilla": ("worse", 1.0, 4), "whitened / plain error": ("gain", 1.0, 3)}
    fits = {a: arms[a] for a in FITS}
    return [
        table(f"From scratch on {text.name}", {a: arms[a] for a in SCRATCH}, columns, note),
        table(f"Without training, from vanilla on {text.name}", fits, {**columns, **more},
              f"mean ± standard deviation over seeds; {PARTS} test windows; error: at the same ranks"),
    ]  # fmt: skip
