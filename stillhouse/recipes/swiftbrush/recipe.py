"""SwiftBrush over live objects: a frozen denoiser and conditions, no images.

The built-in experiment::

    stillhouse run swiftbrush --out runs/swiftbrush

From Python, with a diffusion model of your own::

    teacher = Denoiser.of(unet, scheduler, null=10)
    sampler = distill(run, teacher, torch.arange(10), (1, 8, 8), Config(t_init=0.7))
    images = sampler.sample(torch.tensor([3, 7]), torch.Generator().manual_seed(0))
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.diffusion.lora import Adapted, check_twin
from stillhouse.diffusion.prompts import Prompts, check_labels
from stillhouse.diffusion.sampling import OneStep, Sampler, one_step_spec
from stillhouse.diffusion.score import ScoreDistillation
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.swiftbrush.config import Config
from stillhouse.system import Batch, fold, map_tensors

__all__ = ["Config", "Prompts", "distill"]


class Student(nn.Module):
    """The one-step model as `ScoreDistillation` calls it."""

    def __init__(self, model: OneStep):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch["noise"], batch.get("condition"))


def distill(
    run: Run,
    teacher: Denoiser,
    conditions: Condition,
    shape: Sequence[int],
    cfg: Config | None = None,
    *,
    start: Denoiser | None = None,
    spec: ModelSpec | None = None,
) -> Sampler:
    """Trains a one-step generator by the difference of the teacher's and its own score.

    Args:
        run: folder, seed, device.
        teacher: the diffusion model; never changed. The generator begins as a copy of its network.
        conditions: of the prompts, as the teacher takes them: labels (P,), embeddings (P, l, d), a mapping; or None.
        shape: of one sample (of one latent).
        cfg: settings.
        start: what generator and fake begin as, where that is not the teacher itself.
        spec: how that network is built again; found by itself for classes of diffusers.

    Returns:
        A `Sampler` with the member ``one-step``: ``sampler.sample(conditions, generator)``.

    Raises:
        UserError: no prompts, labels out of range, a start at which a network that predicts noise divides by next to
            nothing, LoRA targets that match nothing.
    """
    cfg, began = cfg or Config(), time.monotonic()
    source = Prompts(conditions, shape, cfg.batch)
    check_labels(teacher, conditions)
    example = {"noise": torch.zeros(1, *shape)}
    if conditions is not None:
        example["condition"] = map_tensors(conditions, lambda c: c[:1])
    teacher.check(example["noise"], example.get("condition"))
    base = start or teacher
    student = OneStep.of(base, cfg.t_init, shape)
    fake: Denoiser | None = None
    if cfg.fake == "lora":
        how = {"rank": cfg.rank, "alpha": cfg.lora_alpha, "targets": cfg.lora_targets}
        fake = Adapted(base, **how, seed=fold(run.seed, "lora"))  # type: ignore[arg-type]
        check_twin(base, fake, torch.ones(1, *shape), example.get("condition"))
    elif cfg.fake == "copy":
        fake = base.trainable_copy()
    system = ScoreDistillation(
        Student(student), teacher, fake, cfg.scores(), cfg.batch,
        generator=cfg.update(cfg.lr), fake_update=cfg.update(cfg.fake_lr, cfg.fake_repeat),
    )  # fmt: skip
    fit(run, "swiftbrush", system, source, steps=cfg.steps, settings=cfg)
    made: Any = system.outcome()
    model: OneStep = made.model.cpu().to(memory_format=torch.contiguous_format).eval()
    sampler = Sampler([Member("one-step", model, spec=spec_of(model, spec))], example, logs=run.log("swiftbrush"))
    trained = sum(p.numel() for u in system.updates() for p in u.params)
    sampler.cost = {"trained_params": trained, "params": count_params(model), "seconds": time.monotonic() - began}
    return sampler


def spec_of(model: OneStep, spec: ModelSpec | None) -> ModelSpec | None:
    """How the model is built again; None for a network of the user's own, which nothing on disk knows."""
    try:
        return one_step_spec(model, spec or ModelSpec.of(model.network))
    except UserError:
        return None
