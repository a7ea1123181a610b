"""HierarchicalPrune on digits: three of eight blocks of a DiT removed and the rest repaired; or a user's own.

stillhouse run hierarchical_prune --out runs/pruned
stillhouse run hierarchical_prune --model sd3/transformer --data latents.safetensors --budget 0.8 --out runs/mine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.denoising import train_denoiser
from stillhouse.diffusion.digits import NULL, digits, digits_judge, digits_transformer
from stillhouse.diffusion.examples import Examples, load_examples, pixels
from stillhouse.diffusion.loading import load_teacher, plain
from stillhouse.diffusion.metrics import Judge
from stillhouse.diffusion.sampling import ManySteps, Sampler
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.models import import_library
from stillhouse.options import Options
from stillhouse.recipes.hierarchical_prune import shown
from stillhouse.recipes.hierarchical_prune.config import Config
from stillhouse.recipes.hierarchical_prune.impact import impacts, predictions, scorer, squared
from stillhouse.recipes.hierarchical_prune.parts import FINE, Part, between, choose, find_parts, left, taken_out
from stillhouse.recipes.hierarchical_prune.recipe import distill, sampled
from stillhouse.report import Claim, Report
from stillhouse.system import fold
from stillhouse.trials import Arm, Results, claim, difference, slug, table, trials

# What `stillhouse run hierarchical_prune` does without a model; the last two blocks stay, as in the release.
PRESET = Config(budget=0.7, high=-3, steps=120, batch=64, lr=1e-3, decay=True)
TINY = replace(
    PRESET, budget=0.8, high=2, sensitivity="impact", steps=4, batch=6, calibration=4, sample_steps=2, lr=1e-2,
    feature=0.1, task=0.1, drop=0.5,
)  # fmt: skip
TEACHER: dict[str, Any] = {"steps": 400, "batch": 64, "lr": 2e-3, "ema": 0.99}
SAMPLES, DRAWS = 500, 5
FULL, MASK, ALL = "tail learns, rates by impact", "tail learns, one rate", "everything learns, one rate"
ARMS: dict[str, dict[str, Any]] = {
    FULL: {}, MASK: {"sensitivity": "mask"}, ALL: {"sensitivity": "mask", "train": "all"},
}  # fmt: skip
LOWEST, RANDOM = "lowest impact", f"random, mean of {DRAWS}"
CUTS: dict[str, dict[str, Any]] = {
    "impact × position, last two stay": {"mode": "position", "high": -3},
    "impact × position": {"mode": "position"},
    LOWEST: {"mode": "least-drop", "components": ("block",)},
    "by hand: 4, 5, 6": {"mode": "manual", "blocks": (4, 5, 6)},
    "least drop of components": {"mode": "least-drop"},
    "hybrid: block 6, then components": {"mode": "hybrid", "blocks": (6,)},
}


def main(run: Run, options: Options, cfg: Config, command: str) -> Report | None:
    if options.own:
        return own(run, options, cfg, command)
    train, test = (Examples(*pixels(part), "digits") for part in (digits().train, digits().test))
    judge, seeds = digits_judge(run), options.children()
    homes = {s: run if s == run.seed else run.child(f"given-{s}", seed=s, quiet=True) for s in seeds}
    teachers = {s: teacher_of(home) for s, home in homes.items()}

    def repaired(changes: Mapping[str, Any], child: Run) -> dict[str, Any]:
        sampler = distill(child, teachers[child.seed], train, replace(cfg, **changes))
        return measured(child, sampler, sampled(teachers[child.seed], test, cfg), test, judge)

    def as_it_is(child: Run) -> dict[str, Any]:
        whole = sampled(teachers[child.seed], test, cfg)
        return {"error": squared(*predictions(whole, test, drawn(child))), **judged(child, whole, judge), "stays": 1.0}

    arms: dict[str, Arm] = {
        "whole network": as_it_is,
        **{name: partial(repaired, changes) for name, changes in ARMS.items()},
    }
    results = trials(run, arms, seeds)
    cuts = {"removed": lambda child: removed_only(child, sampled(teachers[child.seed], test, cfg), train, test, cfg)}
    removed = trials(run, cuts, seeds)["removed"]
    picked = {name: [r[name] for r in removed] for name in ("whole", *CUTS, RANDOM)}
    sampler = distill(run.child(f"{slug(FULL)}-{run.seed}", quiet=True), teachers[run.seed], train, cfg)  # is loaded
    report = None
    if run.main:
        whole, one = sampled(teachers[run.seed], test, cfg), results[FULL][0]
        sampler.save(run.folder)
        rows = shown.students(run, sampler, whole, one)
        report = Report(
            "hierarchical_prune", "Digits from five of eight blocks", command, run.seed, environment(), dict(one),
            claims(results, picked, list(seeds)), rows, sampler.cost, shown.curves(sampler), notes=sampler.notes,
            images=[shown.samples(run, sampler, whole, Examples(test.x0[:10], torch.arange(10)), plain)],
            tables=[*tables(results, picked), shown.impact_table(of_every_part(run, whole, train, cfg))],
        )  # fmt: skip
    run.barrier()
    return report


def tiny(run: Run, cfg: Config = TINY) -> Sampler:
    """A few steps with an untrained teacher of four narrow blocks, for the contract table."""
    network = digits_transformer(16, 4, 2)
    return distill(run, Denoiser.of(network, flow_scheduler(), null=NULL), Examples(*pixels(digits().train)), cfg)


def flow_scheduler() -> Any:
    return import_library("diffusers").FlowMatchEulerDiscreteScheduler()


def teacher_of(run: Run) -> Denoiser:
    """A class-conditional flow-matching transformer of eight blocks, trained once per run folder."""
    network = digits_transformer(seed=fold(run.seed, "teacher"))
    return train_denoiser(run, "teacher", network, flow_scheduler(), digits().train, null=NULL, **TEACHER)


# -- digits ----------------------------------------------------------------------------------------------------------


def measured(run: Run, sampler: Sampler, whole: ManySteps, test: Examples, judge: Judge | None) -> dict[str, Any]:
    """Errors on the test examples, removed only, repaired and packed; what the judge says of samples; what froze."""
    student: Any = sampler["student"].model
    plan = sampler["student"].plan
    assert plan is not None
    models: dict[str, Any] = {"pruned": plan.build(whole), "": student}
    if len(sampler) > 1:
        models["nf4"] = sampler["student-nf4"].model
    said = {name: predictions(model, test, drawn(run)) for name, model in {"whole": whole, **models}.items()}
    found: dict[str, Any] = {"whole_error": squared(*said["whole"])}
    for name in models:
        found[f"{name}_error".lstrip("_")] = squared(*said[name])
        found[f"{name}_distance".lstrip("_")] = squared(said[name][0], said["whole"][0])
    found |= judged(run, student, judge) if judge is not None else {}
    gone = plan.edits[0].module if plan.edits else "-"
    then, now = dict(whole.named_parameters()), dict(student.named_parameters())
    early = list(takewhile(lambda n: not n.startswith(f"{gone}."), then))  # all before the first removed part
    found |= {"early": len(early), "early_moved": sum(not torch.equal(then[n], now[n]) for n in early)}
    return {**found, **{k: sampler.cost[k] for k in ("trained_params", "stays")}}


def judged(run: Run, model: ManySteps, judge: Judge) -> dict[str, float]:
    """What a classifier of real digits says of samples, evenly over the classes."""
    labels = torch.arange(SAMPLES) % 10
    x = model.sample(labels, torch.Generator().manual_seed(fold(run.seed, "judged"))).clamp(-1, 1)
    return {k: v for k, v in judge(x, labels).items() if k in ("fd", "accuracy")}


def drawn(run: Run) -> torch.Generator:
    return torch.Generator().manual_seed(fold(run.seed, "test"))


def removed_only(run: Run, whole: ManySteps, train: Examples, test: Examples, cfg: Config) -> dict[str, Any]:
    """The error on the test digits after each way of choosing, without repair."""
    every, total = find_parts(whole), sum(p.numel() for p in whole.parameters())
    measure = partial(impacts, run, whole, lambda: scorer(run, whole, train, cfg), cfg.leaves)

    def after(gone: Sequence[Part]) -> dict[str, Any]:
        with taken_out(whole, [p.edit(cfg.leaves) for p in gone]):
            error = squared(*predictions(whole, test, drawn(run)))
        text = " ".join(f"{p.block}{'' if p.component == 'block' else '.' + p.component}" for p in gone)
        return {"error": error, "stays": left(gone, every, total), "removed": text}

    found = {"whole": after([])}
    for name, how in CUTS.items():
        kinds = how.get("components", ("block",) if how["mode"] == "position" else FINE)
        free = between(every, kinds, 0, how.get("high", -1))
        way = {"mode": how["mode"], "budget": cfg.budget, "named": how.get("blocks", ())}
        gone = choose(every, free, total, measure=measure, **way)
        found[name] = after(gone)
    blocks, g = [p for p in every if p.component == "block"], torch.Generator().manual_seed(fold(run.seed, "random"))
    count = len(found[LOWEST]["removed"].split())
    draws = [after([blocks[i] for i in torch.randperm(len(blocks), generator=g)[:count]]) for _ in range(DRAWS)]
    found[RANDOM] = {k: sum(d[k] for d in draws) / DRAWS for k in ("error", "stays")}
    return found


def of_every_part(run: Run, whole: ManySteps, train: Examples, cfg: Config) -> dict[Part, float]:
    """ΔP of all parts."""
    every = find_parts(whole)
    found = impacts(run, whole, lambda: scorer(run, whole, train, cfg), cfg.leaves, every, ())
    return {p: found[p.module] for p in every}


def claims(results: Results, picked: Results, seeds: list[int]) -> list[Claim]:
    """The claims of the card, as measured, holding or not."""
    share = max(r["distance"] / r["pruned_distance"] for r in results[FULL])
    moved = sum(r["early_moved"] for name in (FULL, MASK) for r in results[name])
    random = difference(picked[RANDOM], picked[LOWEST], "error")
    return [
        Claim("L_out after repair over L_out after removal, largest over seeds", share <= 0.6, share, 0.6, seeds),
        Claim("tensors before the first removed part that repair changed", moved == 0, moved, 0, seeds),
        claim("error without 3 random blocks − without the 3 of lowest impact", random, 0.0, seeds),
    ]


def tables(results: Results, picked: Results) -> list[Any]:
    first = {
        "error": ("error", 1.0, 4), "to the teacher": ("distance", 1.0, 4), "removed only": ("pruned_distance", 1.0, 4),
        "in 4 bits": ("nf4_distance", 1.0, 4), "FD": ("fd", 1.0, 1), "class accuracy %": ("accuracy", 100.0, 1),
        "numbers that learn": ("trained_params", 1.0, 0), "parameters left %": ("stays", 100.0, 1),
    }  # fmt: skip
    second = {"error": ("error", 1.0, 4), "parameters left %": ("stays", 100.0, 1)}
    note = "mean ± standard deviation over seeds; error: MSE of the velocity on the test digits"
    return [
        table("Repaired", results, first, f"{note}; to the teacher: L_out, MSE to the teacher's velocity"),
        table("Removed and not repaired", picked, second, note),
    ]


# -- the user's own --------------------------------------------------------------------------------------------------


def own(run: Run, options: Options, cfg: Config, command: str) -> Report | None:
    """One run with a user's teacher and data."""
    if options.model is None or options.data is None:
        raise UserError("pruning a network of yours takes --model, the network with its scheduler, and --data")
    kind = None if cfg.prediction == "auto" else cfg.prediction
    loaded = load_teacher(options.model, prediction=kind, null_class=cfg.null_class)
    train, test = load_examples(options.data, loaded.shape, seed=run.seed)
    sampler = distill(run, loaded.denoiser, train, cfg)
    report = None
    if run.main:
        whole, few = sampled(loaded.denoiser, test, cfg), test.rows(torch.arange(min(1024, len(test))))
        found = measured(run, sampler, whole, few, None)
        sampler.save(run.folder)
        report = Report(
            "hierarchical_prune", f"{options.model} with {found['stays']:.0%} of its parameters", command, run.seed,
            environment(), found, [], shown.students(run, sampler, whole, found), sampler.cost,
            shown.curves(sampler), notes=[*loaded.notes, *sampler.notes],
            images=[shown.samples(run, sampler, whole, few.rows(torch.arange(min(8, len(few)))), loaded.decode)],
        )  # fmt: skip
        if sampler["student"].spec is None:
            report.notes.append("the network is no class of diffusers: load it with stillhouse.load(folder, base=...)")
    run.barrier()
    return report
