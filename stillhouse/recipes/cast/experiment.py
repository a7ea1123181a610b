"""CAST on a user's language model; without one its arms over seeds, on the embedded text or on `--data`.

stillhouse run cast --out runs/cast                          # a small LLaMA: one sparse model, and all arms over seeds
stillhouse run cast --model hf:folder --data mine.txt --steps 2000 --out runs/sparse
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import nn

from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.models import ModelSpec
from stillhouse.options import LanguageOptions
from stillhouse.outcomes import Models, continued
from stillhouse.recipes.cast.config import Config
from stillhouse.recipes.cast.recipe import distill
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.score import Interval
from stillhouse.students.plan import Plan
from stillhouse.text.language import llama_spec, train_language_model
from stillhouse.text.windows import Corpus, corpus
from stillhouse.trials import Results, claim, difference, table, trials


@dataclass(frozen=True)
class OPTIONS(LanguageOptions):
    """A language model; the built-in experiment runs on any text."""

    BRINGS: ClassVar[tuple[str, ...]] = ("model",)


PRESET = Config(dense_steps=1200, dense_lr=8e-3, steps=400, batch=16)
TINY = replace(PRESET, dense_steps=3, steps=4, refresh=2, batch=4, lr=1e-3, reach=0.0)
SIZE = {"width": 64, "layers": 2, "heads": 4}
AST = {"method": "ste", "teach": 0.67, "temperature": 2.0}
CAST = {"method": "cast"}
ARMS: dict[str, dict[str, Any]] = {  # all that their names say, whatever the flags are
    "one-shot": {**CAST, "steps": 0},
    "fixed mask": {"method": "fixed", "lr": 4e-3},
    "AST": {**AST, "lr": 4e-3},
    "CAST": CAST,
}


def tiny(run: Run, cfg: Config = TINY, spec: ModelSpec | None = None) -> Models:
    """One run of about a second on the embedded text, for the contract table."""
    text = corpus(length=16, limit=4000)
    return distill(run, text, spec or llama_spec(text.vocabulary, width=16, layers=1, heads=2, length=16), cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One sparse model as the command makes it; without flags also every arm, over seeds."""
    text = options.corpus()
    spec, network, plan = given(options, text, cfg) if options.own else (small(text), None, None)
    models = distill(run, text, spec, cfg, network=network, plan=plan)
    report = describe(run, models, text, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = options.children()
        arms = compare(run, text, cfg, seeds)
        if report is not None:
            report.claims = claims(arms, seeds)
            report.tables.append(arms_table(arms))
    return report


def small(text: Corpus) -> ModelSpec:
    """The LLaMA of the built-in experiment."""
    return llama_spec(text.vocabulary, length=text.length, **SIZE)


def given(options: OPTIONS, text: Corpus, cfg: Config) -> tuple[ModelSpec, nn.Module | None, Plan | None]:
    """The user's trained model: of another run, a library's, their own, or one that is trained first."""
    if student := continued(options.model or ""):
        return student
    spec, network = options.network(text)
    if spec.name.startswith("transformers:") and network is None and not cfg.dense_steps:
        raise UserError(
            f"--model {options.model or 'llama'} has no trained weights, which CAST starts from; give --dense-steps N "
            "to train it first, or --model hf:NAME, RUN/students/NAME or package.module:function"
        )
    return spec, network, None


# -- the claims of the card --------------------------------------------------------------------------------------


def compare(run: Run, text: Corpus, cfg: Config, seeds: Sequence[int]) -> Results:
    """Every arm on every seed, those of a seed from one dense model."""
    return trials(run, {arm: partial(once, run, text, changes, cfg) for arm, changes in ARMS.items()}, seeds)


def once(whole: Run, text: Corpus, changes: Mapping[str, Any], cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; the dense model is trained once per seed."""
    spec = small(text)
    network = spec.build(seed=run.seed)
    home = whole if run.seed == whole.seed else whole.child(f"given-{run.seed}", seed=run.seed, quiet=True)
    train_language_model(home, "dense", network, text, cfg.dense(), steps=cfg.dense_steps)
    if home is whole and replace(cfg, **changes) == cfg:
        models = distill(whole, text, spec, cfg)  # it is there already
    else:
        models = distill(run, text, spec, replace(cfg, **{"dense_steps": 0, **changes}), network=network)
    return {**models.cost, "gap": abs(models.cost["pruned"] - models.cost["unpruned"])}


def claims(arms: Results, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims with the card's thresholds, as measured."""
    one_shot, fixed, _, cast = (arms[a] for a in ARMS)

    def most(text: str, key: str, limit: float) -> Claim:
        values = [r[key] for r in cast]
        return Claim(text, max(values) <= limit, max(values), limit, list(seeds))

    def better(text: str, other: Any, least: float) -> Claim:
        found: Interval = difference(other, cast, "pruned")
        return claim(f"{text}, nats per token", found, least, seeds)

    exact = min(r["exact"] / r["groups"] for r in cast)
    return [
        Claim("groups of weights with exactly n non-zeros, as a part of all", exact == 1, exact, 1.0, list(seeds)),
        most("largest of the seeds: masked over kept magnitude at the end", "left_in_masked", 0.05),
        most("largest of the seeds: |pruned − unpruned|, nats per token", "gap", 0.02),
        better("one-shot − CAST", one_shot, 0.02),
        better("fixed mask − CAST", fixed, -0.03),
    ]


def arms_table(arms: Results) -> Table:
    columns = {
        "dense, nats": ("dense", 1.0, 3), "unpruned, nats": ("unpruned", 1.0, 3), "pruned, nats": ("pruned", 1.0, 3),
        "masked / kept": ("left_in_masked", 1.0, 3), "reach, mean weights": ("reach_in_mean_weights", 1.0, 2),
        "seconds": ("seconds", 1.0, 0),
    }  # fmt: skip
    note = "mean ± standard deviation over seeds, on the test text; the arms of a seed start from one dense model"
    return table("Arms", arms, columns, note)


# -- the report --------------------------------------------------------------------------------------------------


def describe(run: Run, models: Models, text: Corpus, cfg: Config, command: str) -> Report:
    models.save(run.folder)
    cost = models.cost
    measured = {"dense": {"nll": cost["dense"]}, "sparse": {"nll": cost["pruned"]}}
    students = models.rows(run.folder, measured)
    students[0].role = "base"
    names = [k for k in ("label", "kd", "decay") if any(k in r for r in models.logs)]
    lines: dict[str, Any] = {
        n: ([r["step"] for r in models.logs if n in r], [r[n] for r in models.logs if n in r]) for n in names
    }
    kind = models.spec.name if models.spec else type(models["dense"].model).__name__
    return Report(
        system="cast", title=f"{kind} at {cfg.pattern} ({cfg.method}) on {text.name}", command=command,
        seed=run.seed, environment=environment(), metrics=measured["sparse"], students=students, cost=cost,
        claims=[
            Claim(
                "groups of weights with exactly n non-zeros", cost["exact"] == cost["groups"], cost["exact"],
                cost["groups"], [run.seed],
            )
        ],
        curves=[Curve("Losses, as weighted", "step", "loss", lines)] if lines else [],
        notes=[*text.notes, *models.notes],
    )  # fmt: skip
