"""SwiftBrush on digits: one step from a teacher trained here, against SDS, one and 25 steps of the teacher.

stillhouse run swiftbrush --out runs/swiftbrush
stillhouse run swiftbrush --model path/to/pipeline --prompts prompts.txt --out runs/mine
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.diffusion.digits import NULL, SHAPE, digits_judge, digits_scheduler, digits_teacher, digits_unet
from stillhouse.diffusion.exact import Mixture, ring
from stillhouse.diffusion.loading import Loaded, load_teacher, plain
from stillhouse.diffusion.metrics import Judge, energy_distance, modes
from stillhouse.diffusion.planar import planar_denoiser
from stillhouse.diffusion.process import Flow
from stillhouse.diffusion.prompts import read_prompts
from stillhouse.diffusion.sampling import OneStep, Sampler, ddim
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.options import Options
from stillhouse.recipes.swiftbrush.recipe import Config, distill
from stillhouse.report import Claim, Curve, Image, Report, grid
from stillhouse.system import fold, map_tensors
from stillhouse.trials import Arm, Results, mean, slug, table, trials

# What `stillhouse run swiftbrush` does without a model: the digits experiment of the card.
PRESET = Config(
    t_init=0.7, kappa=2.0, steps=300, batch=32, lr=1e-4, fake_lr=1e-3, rank=8, lora_alpha=32.0,
    lora_targets=("attention", "convolutions"), ema=0.99,
)  # fmt: skip
# The smallest settings that touch everything, for the contract table.
TINY = replace(PRESET, steps=4, batch=4, rank=2, lora_targets=("attention",), drop=0.5)
# The fast gate: points in the plane.
RING = Config(
    t_init=0.7, fake="copy", guidance="none", weight="dmd", steps=1000, batch=256, lr=1e-3, fake_lr=2e-3, decay=True,
    beta1=0.0, fake_weight="one", drop=0.0, clip=1000.0, ema=0.0,
)  # fmt: skip
SAMPLES, POINTS = 2000, 5000
VSD, SDS, ONE, MANY = "one step, VSD", "one step, SDS", "teacher, one step", "teacher, 25 steps"


def main(run: Run, options: Options, cfg: Config, command: str) -> Report | None:
    if options.data is not None:
        raise UserError("swiftbrush takes no data, it never sees an image; give --model, and --prompts")
    if options.model is not None:
        return own(run, options.model, cfg, command)
    seeds = options.children()
    plane = ring_trials(run, seeds)
    teacher, judge = digits_teacher(run), digits_judge(run)
    results = digit_trials(run, teacher, judge, cfg, seeds)
    sampler = train(run.child(f"{slug(VSD)}-{run.seed}", quiet=True), teacher, cfg)  # its stage is finished: loaded
    report = None
    if run.main:
        sampler.save(run.folder)
        rows = sampler.rows(run.folder, {"one-step": results[VSD][0]})
        report = Report(
            "swiftbrush", "Digits in one step", command, run.seed, environment(), dict(results[VSD][0]),
            claims(results, plane, seeds), rows, sampler.cost, curves(sampler), tables=tables(results, plane),
            images=[pictures(run, teacher, sampler, cfg)],
        )  # fmt: skip
        report.notes.append("All images are cut to [-1, 1]. The training of the generator was given noise and labels.")
    run.barrier()
    return report


def tiny(run: Run, cfg: Config = TINY) -> Sampler:
    """A few steps from an untrained teacher of 20,000 weights, for the contract table."""
    teacher = Denoiser.of(digits_unet((8, 8)), digits_scheduler(), null=NULL)
    return distill(run, teacher, torch.arange(10), SHAPE, cfg)


# -- digits ------------------------------------------------------------------------------------------------------


def train(run: Run, teacher: Denoiser, cfg: Config) -> Sampler:
    return distill(run, teacher, torch.arange(10), SHAPE, cfg)


def digit_trials(run: Run, teacher: Denoiser, judge: Judge, cfg: Config, seeds: Sequence[int]) -> Results:
    """Both kinds of training on every seed, and the teacher itself."""

    def trained(how: Config, child: Run) -> dict[str, float]:
        sampler = train(child, teacher, how)
        return {**score(sampler.sample, judge, child.seed, 1), **sampler.cost}

    once = OneStep.of(teacher, cfg.t_init, SHAPE)
    arms: dict[str, Arm] = {
        VSD: partial(trained, cfg),
        SDS: partial(trained, replace(cfg, fake="none")),
        ONE: lambda child: {**score(once.sample, judge, child.seed, 1), "trained_params": 0},
    }
    results = trials(run, arms, seeds)
    slow = {MANY: lambda child: {**score(partial(many, teacher), judge, child.seed, 25), "trained_params": 0}}
    return {**results, **trials(run, slow, seeds[:1])}


def many(teacher: Denoiser, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The upper bound: 25 DDIM steps without guidance, x̂_0 cut to the pixels' range."""
    return ddim(teacher, torch.randn(len(labels), *SHAPE, generator=generator), labels, clip=1.0)


def score(sample: Callable[..., Tensor], judge: Judge, seed: int, passes: int) -> dict[str, float]:
    """What the judge says of `SAMPLES` samples, evenly over the classes, and what they took."""
    labels, began = torch.arange(SAMPLES) % 10, time.perf_counter()
    x = sample(labels, torch.Generator().manual_seed(fold(seed, "judged"))).clamp(-1, 1)
    seconds = (time.perf_counter() - began) * 1000 / SAMPLES
    return {**judge(x, labels), "nfe": passes, "seconds_per_1000": seconds}


def claims(results: Results, plane: Results, seeds: Sequence[int]) -> list[Claim]:
    """The claims of the card, as measured, holding or not."""
    s = list(seeds)
    part = mean(results[VSD], "fd") / mean(results[ONE], "fd")
    gap, right = mean(results[SDS], "fd") - mean(results[VSD], "fd"), mean(results[VSD], "accuracy")
    first = [r["start"] for r in plane[VSD]]
    worst = max(r["energy_v"] / r["start"] for r in plane[VSD])
    least = min(r["energy_v"] / start for r, start in zip(plane[SDS], first, strict=True))
    return [
        Claim("1. FD of VSD over FD of the teacher's one step", part <= 0.3, part, 0.3, s),
        Claim("2. FD of SDS - FD of VSD", gap > 0, gap, 0.0, s),
        Claim("3. class accuracy of VSD", right >= 0.8, right, 0.8, s),
        Claim("ring: energy distance of VSD over its start's, largest over seeds", worst <= 0.05, worst, 0.05, s),
        Claim("ring: energy distance of SDS over the start's, least over seeds", least >= 1, least, 1.0, s),
    ]


def tables(results: Results, plane: Results) -> list[Any]:
    columns = {
        "FD": ("fd", 1.0, 1),
        "class accuracy %": ("accuracy", 100.0, 1),
        "precision %": ("precision", 100.0, 1),
        "recall %": ("recall", 100.0, 1),
        "diversity in a class": ("diversity", 1.0, 3),
        "NFE": ("nfe", 1.0, 0),
        "s per 1000": ("seconds_per_1000", 1.0, 2),
        "trained parameters": ("trained_params", 1.0, 0),
    }
    points = {
        "energy distance": ("energy", 1.0, 4),
        "as V-statistic": ("energy_v", 1.0, 4),
        "modes held": ("modes", 1.0, 1),
        "share within 4 c %": ("share", 100.0, 1),
        "std within a mode": ("within", 1.0, 3),
    }
    digits = f"{SAMPLES} samples against 1,258 real training digits, features of a classifier of real digits; mean ± sd"
    text = f"8 Gaussians of standard deviation 0.1 on a circle, exact teacher, {POINTS} samples; mean ± sd over seeds"
    return [table("Digits", results, columns, digits), table("Ring", plane, points, text)]


def pictures(run: Run, teacher: Denoiser, sampler: Sampler, cfg: Config) -> Image:
    """Ten classes in the columns; in the rows the teacher in 25 steps and in one, and the student."""
    labels = torch.arange(10)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(fold(run.seed, "pictures"))

    once = OneStep.of(teacher, cfg.t_init, SHAPE)
    rows = [many(teacher, labels, generator()), once.sample(labels, generator())]
    more = labels.repeat(3)
    rows.append(sampler.sample(more, generator()))
    text = "Teacher in 25 steps, teacher in one step, and below the student in one step (three rows)"
    return Image(text, grid(plain(torch.cat(rows)), columns=10, side=48))


def curves(sampler: Sampler) -> list[Curve]:
    """Size of the gradient and loss of the fake over the steps."""
    rows = [r for r in sampler.logs if "size" in r]
    found = [
        Curve("Size of the gradient (RMS)", "step", "", {"g": ([r["step"] for r in rows], [r["size"] for r in rows])})
    ]
    if rows and "fake" in rows[0]:
        losses = {"fake": ([r["step"] for r in rows], [r["fake"] for r in rows])}
        found.append(Curve("Loss of the fake score", "step", "", losses))
    return found


# -- ring --------------------------------------------------------------------------------------------------------


def ring_trials(run: Run, seeds: Sequence[int]) -> Results:
    """The fast gate: VSD and SDS on every seed, from one network that has learned the exact teacher's x̂_0."""
    teacher = ring(Flow(1.0))
    start = planar_denoiser(run, teacher)

    def before(seed: int) -> float:
        sample = OneStep.of(start, RING.t_init, (2,)).sample
        return ring_score(sample, teacher, seed)["energy_v"]

    def trained(how: Config, child: Run) -> dict[str, float]:
        sampler = distill(child, teacher, None, (2,), how, start=start)
        return {**ring_score(sampler.sample, teacher, child.seed), "start": before(child.seed)}

    return trials(
        run.child("ring"), {VSD: partial(trained, RING), SDS: partial(trained, replace(RING, fake="none"))}, seeds
    )


def ring_score(sample: Callable[..., Tensor], teacher: Mixture, seed: int) -> dict[str, float]:
    """Modes and energy distance to true samples, unbiased and as V-statistic."""
    x = sample(None, torch.Generator().manual_seed(fold(seed, "judged")), POINTS)
    true = teacher.sample(POINTS, torch.Generator().manual_seed(fold("reference")))
    found = modes(x, teacher.means, float(teacher.std))
    return {**found, "energy": energy_distance(x, true), "energy_v": energy_distance(x, true, unbiased=False)}


# -- the user's own ----------------------------------------------------------------------------------------------


def own(run: Run, model: str, cfg: Config, command: str) -> Report | None:
    """One run with a user's teacher and prompts; the report shows what teacher and student make of the same noise."""
    kind = None if cfg.prediction == "auto" else cfg.prediction
    loaded = load_teacher(model, prediction=kind, null_class=cfg.null_class)
    prompts = read_prompts(cfg.prompts) or every_class(loaded)
    conditions = loaded.conditions(prompts)
    sampler = distill(run, loaded.denoiser, conditions, loaded.shape, cfg)
    report = None
    if run.main:
        sampler.save(run.folder)
        images = compare(run, loaded, prompts, conditions, sampler, cfg)
        report = Report(
            "swiftbrush", f"{model} in one step", command, run.seed, environment(), {"prompts": len(prompts)}, [],
            sampler.rows(run.folder, {"one-step": {"nfe": 1}}), sampler.cost, curves(sampler), images=images,
            notes=list(loaded.notes),
        )  # fmt: skip
        if sampler.members[0].spec is None:
            report.notes.append("the network is no class of diffusers: load it with stillhouse.load(folder, base=...)")
    run.barrier()
    return report


def every_class(loaded: Loaded) -> list[str]:
    """The class numbers of a class-conditional teacher but for its null class; nothing for others."""
    rows = (getattr(loaded.denoiser.network, "config", None) or {}).get("num_class_embeds") or 0
    return [str(k) for k in range(rows) if k != loaded.denoiser.null]


def compare(
    run: Run, loaded: Loaded, prompts: Sequence[str], conditions: Condition, sampler: Sampler, cfg: Config
) -> list[Image]:
    """Up to eight prompts: 25 guided steps of the teacher, one step of it, one step of the student."""
    n = min(8, len(prompts) or 8)
    some = None if conditions is None else map_tensors(conditions, lambda c: c[:n])
    noise = torch.randn(n, *loaded.shape, generator=torch.Generator().manual_seed(fold(run.seed, "pictures")))
    scale = cfg.kappa if loaded.denoiser.null is not None else 1.0
    model = sampler.members[0].model
    with torch.no_grad():
        rows = [
            ddim(loaded.denoiser, noise, some, kappa=scale),
            OneStep.of(loaded.denoiser, cfg.t_init, loaded.shape)(noise, some),
            model(noise, some),
        ]
    captions = [p[:12] for p in prompts[:n]] or [""] * n
    titles = ["Teacher in 25 steps", "Teacher in one step", "Student in one step"]
    return [Image(t, grid(loaded.decode(x), columns=8, captions=captions)) for t, x in zip(titles, rows, strict=True)]
