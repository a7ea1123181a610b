"""What stands before the first step of G2SD: its networks, the labelled images, and whether all of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.data import Data, split
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.plain import check_classes
from stillhouse.recipes.g2sd.config import Config
from stillhouse.students.masked import Masked, TimmMasked, as_masked, start_positions
from stillhouse.system import fold
from stillhouse.teachers import Frozen


def built(run: Run, student: nn.Module | ModelSpec, network: nn.Module | None) -> tuple[ModelSpec | None, Any]:
    """How the student is built again, and the student: as given, or fresh with the positions of masked autoencoders."""
    if not isinstance(student, ModelSpec):
        return None, student if network is None else network
    if network is None:
        network = student.build(seed=run.seed)
        start_positions(network)
    return student, network


def opened(run: Run, data: Data, autoencoder: nn.Module, cfg: Config) -> Masked:
    """The autoencoder as it is, or with a fresh decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(run.seed, "teacher's decoder"))
        return as_masked(autoencoder, data.shape, cfg.teacher_decoder)


def with_decoder(run: Run, data: Data, vit: nn.Module, cfg: Config) -> TimmMasked:
    """The student with the decoder of the generic stage."""
    if len(data.shape) != 3:
        raise UserError(f"g2sd is for images (C, H, W), got {data.name} of shape {tuple(data.shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(run.seed, "decoder"))
        return TimmMasked(vit, data.shape, *cfg.decoder)


def few_labels(run: Run, data: Data, cfg: Config) -> Data:
    """The data with the labelled part of the training images alone."""
    if cfg.labelled == 1:
        return data
    return replace(data, train=split(data.train, cfg.labelled, seed=fold(run.seed, "labelled"))[1])


def check(masked: Masked | None, own: TimmMasked, asked: Sequence[Frozen], data: Data, cfg: Config) -> None:
    """Whether the networks cut an image into the same patches and know the classes, and the settings fit them.

    Args:
        masked: the autoencoder, where it is read. own: the student. asked: the teachers that are given.
    """
    if cfg.generic == "features" and masked is not None and masked.patches != own.patches:
        raise UserError(
            f"the autoencoder cuts an image of {data.name} into {masked.patches} patches, the student into "
            f"{own.patches}; they must see the same ones, so give a student with another patch size"
        )
    if cfg.generic == "features" and masked is not None and cfg.layer > masked.decoder_depth:
        raise UserError(f"layer: the autoencoder's decoder has {masked.decoder_depth} blocks, got {cfg.layer}")
    if int(own.patches * (1 - cfg.mask)) < 1:
        raise UserError(f"mask: {cfg.mask} of {own.patches} patches leaves none to see; mask a smaller part")
    if cfg.specific == "token" and not hasattr(own.encoder, "dist_token"):
        raise UserError(
            f"the student {type(own.encoder).__name__} has no distillation token; give a network such as "
            "timm:deit_tiny_distilled_patch16_224, or --specific nkd"
        )
    if not asked and cfg.specific != "labels" and not cfg.tune_epochs:
        raise UserError("tune_epochs: 0 leaves no teacher for the specific stage; give a fine-tuned one, or epochs")
    check_classes(own.encoder, asked, data.train.take(np.arange(2)), data)
