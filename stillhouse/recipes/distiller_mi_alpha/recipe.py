"""Distiller over live objects: settings as a list of objectives, and one distillation by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stillhouse.comparisons import Objective
from stillhouse.data import Data
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.plain import distill as plainly
from stillhouse.plain import train_teacher
from stillhouse.recipes.distiller_mi_alpha.augment import augmented
from stillhouse.recipes.distiller_mi_alpha.config import Config
from stillhouse.recipes.distiller_mi_alpha.pipeline import Pipeline
from stillhouse.teachers import Normalisation


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teacher: nn.Module | Sequence[nn.Module],
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Teach `student` by the pipeline of `cfg`: edits of the text, mixing, the map of layers, both losses.

    Arguments, result and errors are those of `stillhouse.recipes.distill.distill`. With ``mi`` the outcome's ``cost``
    also has ``bound_before`` and ``bound``: what the critics find on the test samples, in nats.
    """
    cfg = cfg or Config()
    if network is None:
        network = student.build(seed=run.seed) if isinstance(student, ModelSpec) else student
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    pairs, sizes = cfg.on_layers(network, models[0])
    if len(models) > 1 and cfg.mixup:
        raise UserError(f"mixup knows the word vectors of one teacher, got {len(models)} teachers")
    if cfg.teacher_epochs:  # on the sentences as they are
        for k, model in enumerate(models):
            train_teacher(run, f"teacher{k or ''}", model, data, cfg.plain(()))
    taught = augmented(run, data, cfg.edits, cfg.language_model) if cfg.edits else data
    built: list[tuple[Pipeline, float | None]] = []
    emd = sizes if pairs and cfg.layer_map == "emd" else None
    teaches = any(Objective.parse(p).name == "mi" for p in pairs)

    def build(*given: Any, **how: Any) -> Pipeline:
        made = Pipeline(
            *given, emd=emd, mixup=cfg.mixup, teacher_model=models[0], share=emd is None, **how
        ).to(run.device)  # fmt: skip
        built.append((made, made.bound(data.test, cfg.batch) if teaches else None))
        return made

    settings = cfg.plain([*cfg.on_logits(), *pairs], teacher_epochs=0.0)
    how = {"network": network, "normalize": normalize, "resize": resize}
    family = plainly(run, taught, student, models, settings, system=build, **how)  # type: ignore[arg-type]
    system, before = built[0]
    if teaches:
        family.cost |= {"bound_before": before, "bound": system.to(run.device).bound(data.test, cfg.batch)}
    for model in (network, *models):
        model.cpu()
    return family
