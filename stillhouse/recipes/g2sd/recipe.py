"""G2SD over live objects: a masked autoencoder, images, few labels, a small vision transformer.

stillhouse run g2sd --out runs/g2sd
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.comparisons import Objective
from stillhouse.data import Batches, Data, mixing, prefetch, split, with_draws
from stillhouse.distill import Distill, TokenDistill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes, optimizer_of, schedule, train_teacher
from stillhouse.recipes.g2sd.config import Config
from stillhouse.recipes.g2sd.stages import Features, Generic, Pixels, held_out
from stillhouse.students.blocks import alike_blocks
from stillhouse.students.masked import Masked, Pooled, TimmMasked, as_masked, start_head, start_positions
from stillhouse.system import Teacher, fold
from stillhouse.teachers import Asked, Ensemble, Frozen, Normalisation
from stillhouse.weights import by_layer

__all__ = ["Config", "distill"]


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    autoencoder: nn.Module,
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
            ``teacher_epochs``. Frozen afterwards.
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
    spec = student if isinstance(student, ModelSpec) else None
    if network is None and isinstance(student, ModelSpec):
        network = student.build(seed=run.seed)
        start_positions(network)
    vit: Any = student if network is None else network
    if len(data.shape) != 3:
        raise UserError(f"g2sd is for images (C, H, W), got {data.name} of shape {tuple(data.shape)}")
    masked = opened(run, data, autoencoder, cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(run.seed, "decoder"))
        own = TimmMasked(vit, data.shape, *cfg.decoder)
    few = few_labels(run, data, cfg)
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher or ())
    tuned = not models and cfg.specific != "labels"
    check(masked, own, tuned, data, cfg)
    asked = [Frozen(m, normalize=normalize, resize=resize) for m in models]
    check_classes(vit, asked, data.train.take(np.arange(2)), data)
    if cfg.teacher_epochs:
        pretrain(run, "autoencoder", data, masked, None, cfg.teacher_lr, cfg.teacher_epochs, cfg)
    if tuned:
        models = [fine_tuned(run, few, masked, cfg)]
        asked = [Frozen(models[0])]
    if cfg.generic != "none":
        said = masked if cfg.generic == "features" else None
        pretrain(run, "generic", data, own, said, cfg.generic_lr, cfg.generic_epochs, cfg)
    ask: Teacher | None = Ensemble(asked) if len(asked) > 1 else asked[0] if asked else None
    specialise(run, few, vit, ask, cfg)
    for model in (vit, masked, *models):
        model.cpu().eval()
    cost = {
        "trained_params": count_params(vit), "dropped_params": count_params(own) - count_params(vit),
        "autoencoder_params": count_params(masked), "teacher_params": sum(map(count_params, models)),
        "labels": len(few.train), "images": len(data.train), "seconds": time.monotonic() - began,
    }  # fmt: skip
    base = vit if ask is None else models[0] if len(models) == 1 and not (normalize or resize) else Asked(ask, models)
    return Family(
        [Member("student", vit, spec=spec)], tuple(data.shape), tuple(data.classes), base, spec, cost,
        logs=[{**row, "stage": s} for s in ("generic", "specific") for row in run.log(s)],
        base_name="teacher" if models else "",
    )  # fmt: skip


def opened(run: Run, data: Data, autoencoder: nn.Module, cfg: Config) -> Masked:
    """The autoencoder as it is, or with a fresh decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(run.seed, "teacher's decoder"))
        return as_masked(autoencoder, data.shape, cfg.teacher_decoder)


def few_labels(run: Run, data: Data, cfg: Config) -> Data:
    """The data with the labelled part of the training images alone."""
    if cfg.labelled == 1:
        return data
    return replace(data, train=split(data.train, cfg.labelled, seed=fold(run.seed, "labelled"))[1])


def fine_tuned(run: Run, data: Data, masked: Masked, cfg: Config) -> Pooled:
    """The autoencoder's encoder as a classifier, trained by labels alone."""
    teacher = Pooled(masked, len(data.classes), fold(run.seed, "teacher's head"))
    how = replace(cfg.moves(cfg.tune_lr, len(data.train)), teacher_epochs=cfg.tune_epochs)
    train_teacher(run, "teacher", teacher, data, how)
    return teacher


def check(masked: Masked, own: TimmMasked, tuned: bool, data: Data, cfg: Config) -> None:
    """Whether both networks cut an image into the same patches, and the settings fit them."""
    if cfg.generic == "features" and masked.patches != own.patches:
        raise UserError(
            f"the autoencoder cuts an image of {data.name} into {masked.patches} patches, the student into "
            f"{own.patches}; they must see the same ones, so give a student with another patch size"
        )
    if cfg.generic == "features" and cfg.layer > masked.decoder_depth:
        raise UserError(f"layer: the autoencoder's decoder has {masked.decoder_depth} blocks, got {cfg.layer}")
    if int(own.patches * (1 - cfg.mask)) < 1:
        raise UserError(f"mask: {cfg.mask} of {own.patches} patches leaves none to see; mask a smaller part")
    if cfg.specific == "token" and not hasattr(own.encoder, "dist_token"):
        raise UserError(
            f"the student {type(own.encoder).__name__} has no distillation token; give a network such as "
            "timm:deit_tiny_distilled_patch16_224, or --specific nkd"
        )
    if tuned and not cfg.tune_epochs:
        raise UserError("tune_epochs: 0 leaves no teacher for the specific stage; give a fine-tuned one, or epochs")


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
