"""MASA over live objects: a transformer, and text or images.

models = distill(run, text, model, Config(variant="qkvo"))
models["student"].model      # all its layers mix a few shared matrices
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Batches, Data, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member, Models
from stillhouse.plain import check_classes
from stillhouse.recipes.masa.codes import Coded, Coefficients, unit_rows
from stillhouse.recipes.masa.config import Config
from stillhouse.recipes.masa.fitting import fitted
from stillhouse.students.dictionary import Mix, codes
from stillhouse.students.edits import Edit
from stillhouse.students.edits_shared import Dictionary
from stillhouse.students.plan import Plan
from stillhouse.students.projections import projections
from stillhouse.students.sharing import spread
from stillhouse.system import fold, map_tensors
from stillhouse.text.language import check_language_model
from stillhouse.text.windows import Corpus
from stillhouse.weights import cosine

__all__ = ["Config", "Shared", "distill"]


@dataclass
class Shared(Models):
    """The student, the network it was made from, and for the closed form what was chosen for every matrix."""

    base: nn.Module | None = None
    matrices: list[dict[str, Any]] = field(default_factory=list)


def distill(
    run: Run,
    data: Corpus | Data,
    base: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    plan: Plan | None = None,
) -> Shared:
    """A transformer whose attention matrices are mixes of shared ones, trained so or fitted to a trained network.

    Args:
        run: folder, seed, device.
        data: text as windows, or images or sentences with labels.
        base: a live module, or a `ModelSpec` (then the student can be loaded from its folder alone). Trained for
            ``way="fit"``; only ``base_steps`` changes its weights.
        cfg: settings.
        network: the network with weights where `base` is only a `ModelSpec`; plan: how it differs from the spec's.

    Returns:
        Models with one member, ``student``.

    Raises:
        UserError: settings, layers or data that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(base, network, run.seed)
    if shared_already := [p for p, m in network.named_modules() if isinstance(m, Mix)]:
        path = shared_already[0].partition(".parametrizations")[0]
        raise UserError(f"{path}: its weight is already a function of shared ones; give the network from before")
    matrices: list[dict[str, Any]] = []
    if cfg.way == "fit":
        check(network, data)
        if cfg.base_steps:
            train(run, "base", network, data, cfg, cfg.base_steps)
        where = run.device if run.device.type == "cuda" else torch.device("cpu")  # others have no float64
        student, edits, parts = fitted(network.to(where).eval(), calibration(data, cfg, where), cfg)
        check(student, data)
        matrices = [row for p in parts for row in p.rows()]
        asked = (1 - cfg.ratio) * sum(len(p.paths) * p.shape.numel() for p in parts)
        cost = {"asked_values": asked, "stored_values": sum(p.stored for p in parts)}
    else:
        student, edits = from_scratch(run, network, data, cfg)
        cost = {"steps": cfg.steps, "trained_params": count_params(student)}
    for model in (student, network):
        model.cpu().eval()
    inputs = data.example() if isinstance(data, Corpus) else data.train.take(np.arange(1))["input"]
    made = (plan or Plan.identity(network)).then(*edits)
    return Shared(
        [Member("student", student, made, spec=spec)], inputs, spec, {**cost, "seconds": time.monotonic() - began},
        logs=run.log("shared"), tokenizer=getattr(data if isinstance(data, Corpus) else data.train, "tokenizer", None),
        base=network, matrices=matrices,
    )  # fmt: skip


def from_scratch(run: Run, network: nn.Module, data: Corpus | Data, cfg: Config) -> tuple[nn.Module, list[Edit]]:
    """A copy of the network trained with dictionaries, and the edits that make its structure."""
    student, edits, paths = shared(network, cfg, run.seed)
    check(student, data)
    if cfg.coefficients == "free":
        train(run, "shared", student, data, cfg, cfg.steps)
        return student, edits
    coded = coded_by(student, paths, cfg, run.seed)
    train(run, "shared", coded, data, cfg, cfg.steps)
    return coded.finish(), edits


def check(model: nn.Module, data: Corpus | Data) -> None:
    """Refuses a network that does not fit the data."""
    if isinstance(data, Corpus):
        check_language_model(model, data)
    else:
        check_classes(model, [], data.train.take(np.arange(2)), data)


def calibration(data: Corpus | Data, cfg: Config, device: Any = "cpu") -> list[Any]:
    """Inputs of training samples, spread evenly, in batches."""
    count = min(cfg.calibration, len(data.train))
    ids = np.linspace(0, len(data.train) - 1, count).round().astype(np.int64)
    batches = [data.train.take(ids[at : at + cfg.batch])["input"] for at in range(0, count, cfg.batch)]
    return [map_tensors(b, lambda t: t.to(device)) for b in batches]


@torch.no_grad()
def shared(network: nn.Module, cfg: Config, seed: int) -> tuple[nn.Module, list[Edit], dict[str, list[str]]]:
    """A copy with fresh dictionaries: atoms are the first weights of evenly spaced layers, codes have norm 1.

    Returns:
        The copy, its edits, and kind -> paths of the layers.
    """
    edits: list[Edit] = []
    splits, paths = projections(network, cfg.variant, blocks=cfg.blocks, named=cfg.projections)
    student, layers = Plan.identity(network).then(*splits).build(network), len(next(iter(paths.values())))
    atoms = cfg.atoms or max(1, layers // 3)
    if atoms > layers:
        raise UserError(f"atoms: {layers} layers take 1 to {layers}, got {atoms}; fewer than the layers save weights")
    for kind, each in paths.items():
        first = torch.stack([student.get_submodule(each[k]).weight for k in spread(atoms, layers)])  # type: ignore[misc]
        edits.append(Dictionary(tuple(each), atoms))
        student = edits[-1].apply(student)
        draws = torch.Generator().manual_seed(fold(seed, "codes", kind))
        found = unit_rows(torch.randn(layers, atoms, generator=draws))
        for path, code in zip(each, found, strict=True):
            layer: Any = student.get_submodule(path)
            layer.parametrizations["weight"][0].atoms.copy_(first)
            codes(layer).copy_(code)
    return student.requires_grad_(True), [*splits, *edits], paths


def coded_by(student: nn.Module, paths: dict[str, list[str]], cfg: Config, seed: int) -> Coded:
    """The network with its codes from an MLP."""
    atoms = {kind: len(codes(student.get_submodule(each[0]))) for kind, each in paths.items()}
    blocks = len(next(iter(paths.values())))
    return Coded(student, paths, Coefficients(blocks, atoms, cfg.embedding, cfg.hidden, fold(seed, "coefficients")))


def train(run: Run, name: str, model: nn.Module, data: Corpus | Data, cfg: Config, steps: int) -> None:
    """Next tokens or labels alone, in place; a stage of the run."""
    coding = set(map(id, model.coefficients.parameters())) if isinstance(model, Coded) else set[int]()
    learner = Distill(
        model.requires_grad_(True) if name == "base" else model, None, objectives=(), clip=cfg.clip or None,
        lr=cosine(round(cfg.lr_warmup * steps)), optimizer=partial(optimizer, cfg=cfg, coding=coding),
    )  # fmt: skip
    fit(run, name, learner, prefetch(Batches(data.train, cfg.batch), run.workers), steps=steps, settings=cfg)
    model.cpu().eval()


def optimizer(params: Sequence[Tensor], *, cfg: Config, coding: set[int]) -> torch.optim.Optimizer:
    """AdamW with β = (0.9, 0.999), or SGD; matrices and atoms decay, and what makes codes does not and moves slower."""
    kinds: dict[tuple[float, float], list[Tensor]] = {}
    for p in params:
        slow = id(p) in coding
        how = (cfg.lr * (cfg.code_lr if slow else 1), 0.0 if slow or p.dim() < 2 else cfg.weight_decay)
        kinds.setdefault(how, []).append(p)
    groups = [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in kinds.items()]
    return torch.optim.AdamW(groups) if cfg.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
