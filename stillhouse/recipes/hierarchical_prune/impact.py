"""What a part is worth: how much worse the network gets without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Condition
from stillhouse.diffusion.examples import Examples
from stillhouse.diffusion.process import target
from stillhouse.diffusion.sampling import ManySteps
from stillhouse.engine import Run
from stillhouse.models import import_object
from stillhouse.progress import Progress
from stillhouse.recipes.hierarchical_prune.config import Config
from stillhouse.recipes.hierarchical_prune.parts import Part, taken_out
from stillhouse.students.removed import Leaves
from stillhouse.system import fold, map_tensors
from stillhouse.trials import slug

Judge = Callable[[Tensor, Condition], Any]
Score = Callable[[ManySteps], float]


def scorer(run: Run, whole: ManySteps, examples: Examples, cfg: Config, judge: Judge | None = None) -> Score:
    """How good a network is, higher is better, always on the same noise and conditions.

    ``samples``: −MSE between its samples and those of the whole network. ``velocity``: −MSE of its prediction at
    noised examples. A judge: the mean of what it says of the samples.
    """
    few = examples.rows(torch.arange(min(cfg.calibration, len(examples))))
    few = Examples(few.x0.to(run.device), map_tensors(few.conditions, lambda c: c.to(run.device)))
    if judge is None and ":" in cfg.metric:
        judge = import_object(cfg.metric, "--metric")

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(fold(run.seed, "calibration"))

    if judge is None and cfg.metric == "velocity":
        return lambda model: -squared(*predictions(model, few, generator()))

    def samples(model: ManySteps) -> Tensor:
        return model.sample(few.conditions, generator(), len(few))

    if judge is not None:
        return lambda model: float(torch.as_tensor(judge(samples(model), few.conditions), dtype=torch.float64).mean())
    wanted = samples(whole)  # now: while parts are measured, `whole` is not
    return lambda model: -squared(samples(model), wanted)


def impacts(
    run: Run,
    whole: ManySteps,
    scoring: Callable[[], Score],
    leaves: Leaves,
    parts: Sequence[Part],
    removed: Sequence[Part],
) -> dict[str, float]:
    """ΔP = P(without the removed) − P(without them and the part), by path; each is kept and not measured twice.

    Args:
        scoring: gives the score; asked while the network is whole.
    """
    home, score = run.child("impact", quiet=True), scoring()
    state = "" if not removed else f"-{fold(*(p.module for p in removed)):x}"
    with taken_out(whole, [p.edit(leaves) for p in removed]):
        full = home.memo(f"full{state}", partial(score, whole))

        def alone(part: Part) -> float:
            with taken_out(whole, [part.edit(leaves)]):
                return score(whole)

        with Progress("impact", len(parts), 0, run.quiet or not run.main) as bar:
            found = {}
            for part in parts:
                found[part.module] = full - home.memo(slug(part.module) + state, partial(alone, part))
                bar.advance([])
    return found


@torch.no_grad()
def predictions(model: ManySteps, examples: Examples, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a network predicts at every example, noised at uniform times, and what it should, both (n, …)."""
    of, x0 = model.denoiser, examples.x0
    t = of.process.times(len(x0), 0.0, 1.0, generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    said = of.view(of.process.add_noise(x0, eps, t), t, examples.conditions).value
    return said, target(of.process, of.prediction, x0, eps, t)


def squared(a: Tensor, b: Tensor) -> float:
    """Mean squared difference over all elements, in float64."""
    return float((a.double() - b.double()).square().mean())
