"""G2SD over live objects: a masked autoencoder, images, few labels, a small vision transformer.

stillhouse run g2sd --out runs/g2sd
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stillhouse.comparisons import Objective
from stillhouse.data import Batches, Data, mixing, prefetch, with_draws
from stillhouse.distill import Distill, TokenDistill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.plain import optimizer_of, schedule, train_teacher
from stillhouse.recipes.g2sd.config import Config
from stillhouse.recipes.g2sd.stages import Features, Generic, Pixels, held_out
from stillhouse.recipes.g2sd.start import built, check, few_labels, opened, with_decoder
from stillhouse.students.blocks import alike_blocks
from stillhouse.students.masked import Masked, Pooled, start_head
from stillhouse.system import Teacher, fold
from stillhouse.teachers import Asked, Ensemble, Frozen, Normalisation
from stillhouse.weights import by_layer

__all__ = ["Config", "distill"]


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    autoencoder: nn.Module | None,
    cfg: Config | None = None,
    *,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Teach `student` what `autoencoder` sees in all images, then what `teacher` says of the labelled ones.

    Args:
        run: folder, seed, device.
        data: training and test images.
        student: a timm VisionTransformer, with a distillation token where ``specific`` is "token": a live module
            (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        autoencoder: a trained ViTMAEForPreTraining or `Masked`; an untrained one, or a timm VisionTransformer, with
            ``teacher_epochs``. Frozen afterwards. May be None where nothing reads it: `Config.reads_autoencoder`.
        cfg: settings.
        teacher: the autoencoder fine-tuned to these classes, or any classifiers, which are averaged; None fine-tunes.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        normalize, resize: of the teacher's input where it differs from the student's, as in `teachers.Frozen`.

    Returns:
        A family of one, ``student``, with the teacher as its base.

    Raises:
        UserError: settings, images, patches or classes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, vit = built(run, student, network)
    own, few = with_decoder(run, data, vit, cfg), few_labels(run, data, cfg)
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher or ())
    asked = [Frozen(m, normalize=normalize, resize=resize) for m in models]
    masked = None
    if cfg.reads_autoencoder(taught=bool(models)):
        if autoencoder is None:
            raise UserError("autoencoder: None, but its features or its fine-tuned self are to be learned; give one")
        masked = opened(run, data, autoencoder, cfg)
    check(masked, own, asked, data, cfg)
    if masked is not None and cfg.teacher_epochs:
        pretrain(run, "autoencoder", data, masked, None, cfg.teacher_lr, cfg.teacher_epochs, cfg)
    if masked is not None and not models and cfg.specific != "labels":
        models = [fine_tuned(run, few, masked, cfg)]
        asked = [Frozen(models[0])]
    if cfg.generic != "none":
        said = masked if cfg.generic == "features" else None
        pretrain(run, "generic", data, own, said, cfg.generic_lr, cfg.generic_epochs, cfg)
    ask: Teacher | None = Ensemble(asked) if len(asked) > 1 else asked[0] if asked else None
    specialise(run, few, vit, ask, cfg)
    for model in filter(None, (vit, masked, *models)):
        model.cpu().eval()
    cost = {
        "trained_params": count_params(vit), "dropped_params": count_params(own) - count_params(vit),
        "autoencoder_params": count_params(masked) if masked is not None else 0,
        "teacher_params": sum(map(count_params, models)),
        "labels": len(few.train), "images": len(data.train), "seconds": time.monotonic() - began,
    }  # fmt: skip
    base = vit if ask is None else models[0] if len(models) == 1 and not (normalize or resize) else Asked(ask, models)
    return Family.of(
        data, [Member("student", vit, spec=spec)], base, spec, cost,
        logs=[{**row, "stage": s} for s in ("generic", "specific") for row in run.log(s)],
        base_name="teacher" if models else "",
    )  # fmt: skip


def fine_tuned(run: Run, data: Data, masked: Masked, cfg: Config) -> Pooled:
    """The autoencoder's encoder as a classifier, trained by labels alone."""
    teacher = Pooled(masked, len(data.classes), fold(run.seed, "teacher's head"))
    how = replace(cfg.moves(cfg.tune_lr, len(data.train)), teacher_epochs=cfg.tune_epochs)
    train_teacher(run, "teacher", teacher, data, how)
    return teacher


def pretrain(
    run: Run, name: str, data: Data, masked: Masked, teacher: Masked | None, lr: float, epochs: float, cfg: Config
) -> None:
    """Stage 1, on all images without labels: the teacher's features, or without a teacher the pixels."""
    how = cfg.moves(lr, len(data.train))
    moves: dict[str, Any] = {
        "optimizer": by_layer(masked, alike_blocks(masked)[0], 1.0, cfg.pretrains(how)), "clip": cfg.clip or None,
        "lr": schedule(data, how, epochs),
    }  # fmt: skip
    if not any(p.requires_grad for p in masked.parameters()):
        masked.requires_grad_(True)  # it was asked as a teacher before
    if teacher is None:
        system: Pixels | Generic = Pixels(masked, cfg.mask, **moves)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(run.seed, "predictor"))
            features = Features(teacher.to(run.device), cfg.mask, cfg.layer)
            system = Generic(masked, features, teacher.decoder_width, cfg.beta, **moves)
    source = with_draws(Batches(data.train, how.batch), masked.patches)
    watch = held_out(data.test, masked.patches)
    fit(run, name, system, prefetch(source, run.workers), epochs=epochs, evaluate=watch, settings=cfg)


def specialise(run: Run, data: Data, vit: Any, teacher: Teacher | None, cfg: Config) -> None:
    """Stage 2, on the labelled images: labels for the class token, the teacher's class for the distillation token."""
    how, token = cfg.moves(cfg.specific_lr, len(data.train)), cfg.specific == "token"
    start_head(vit.head, fold(run.seed, "head"))
    unplaced = None
    if hasattr(vit, "dist_token"):
        start_head(vit.head_dist, fold(run.seed, "head_dist"))
        with torch.no_grad():
            vit.pos_embed[:, 1] = 0  # the distillation token has no position, now and later
        unplaced = vit.pos_embed.register_hook(lambda g: g.index_fill(1, torch.tensor([1], device=g.device), 0))
    objectives = {"token": [Objective("pseudo", cfg.hard)], "nkd": [Objective("nkd")], "labels": []}[cfg.specific]
    fresh = ("dist_token",) if hasattr(vit, "dist_token") else ()
    system = (TokenDistill if token else Distill)(
        vit, teacher, objectives=objectives, label={"token": 1 - cfg.hard, "nkd": 0.0, "labels": 1.0}[cfg.specific],
        label_smoothing=cfg.label_smoothing, lr=schedule(data, how, cfg.specific_epochs), clip=cfg.clip or None,
        optimizer=by_layer(vit, alike_blocks(vit)[0], cfg.layer_decay, optimizer_of(how), fresh),
    )  # fmt: skip
    source = mixing(Batches(data.train, how.batch), len(data.classes), mixup=cfg.mixup, cutmix=cfg.cutmix)
    fit(run, "specific", system, prefetch(source, run.workers), epochs=cfg.specific_epochs, settings=cfg)
    if unplaced:
        unplaced.remove()
