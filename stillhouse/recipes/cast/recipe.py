"""CAST over live objects: a trained language model, text, N:M.

models = distill(run, text, model, Config(steps=500))
models["sparse"].model       # plain layers, two non-zero weights in every four
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.distill import Distill
from stillhouse.engine import Run
from stillhouse.evaluate import count_params
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member, Models
from stillhouse.recipes.cast.adams import AdamS
from stillhouse.recipes.cast.config import Config
from stillhouse.recipes.cast.layers import (
    choose,
    finalise,
    leftover,
    make_sparse,
    masks,
    refresh_masks,
)
from stillhouse.recipes.cast.reach import derived
from stillhouse.students.edits import Pack
from stillhouse.students.plan import Plan
from stillhouse.system import Batch, Clock, Terms
from stillhouse.text.language import check_language_model, language_models, nats, train_language_model
from stillhouse.text.windows import Corpus

__all__ = ["AdamS", "Config", "Sparse", "distill"]

LEFT = 0.05  # of the kept weights' magnitude: with more of it in masked ones the end is a pruning after all


class Sparse(Distill):
    """(1 − η)·mean CE + η·mean T² KL(teacher ‖ student), over masks that are chosen anew every few steps.

    For the straight-through way also ½ d_t Σ_{m=0} w², whose gradient is the ramped decay d_t w of masked weights; it
    enters the momentum as every gradient does.

    Args:
        student: with `make_sparse`. cfg: settings. teacher, more: as in `Distill`.
    """

    def __init__(self, student: nn.Module, teacher: Any, *, cfg: Config, **more: Any):
        super().__init__(student, teacher, **more)
        self.cfg = cfg

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        cfg = self.cfg
        if cfg.method != "fixed" and clock.step % cfg.refresh == 0 and clock.micro == 0:
            refresh_masks(self.student, cfg.sparsity)
        terms = super().learn(batch, clock)
        if cfg.method == "ste" and cfg.ste_decay:
            d = cfg.ste_decay * min(1.0, clock.step / max(1.0, cfg.ste_ramp * clock.steps))
            far = torch.stack([(w * ~m).square().sum() for w, m in masks(self.student).items()]).sum()
            terms.terms["decay"] = d / 2 * far
        return terms


def distill(
    run: Run,
    text: Corpus,
    model: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    plan: Plan | None = None,
) -> Models:
    """Train a language model into N:M sparsity, itself as it was as the teacher.

    Args:
        run: folder, seed, device.
        text: what it is trained and judged on.
        model: a trained module, or a `ModelSpec` (then the student can be loaded from its folder alone). Nothing but
            ``dense_steps`` changes its weights.
        cfg: settings.
        network: the trained network where `model` is only a `ModelSpec`; plan: how it differs from the spec's.

    Returns:
        ``dense``, the model as it was, and ``sparse``. ``cost`` has the nats per token of both, of the unpruned forward
        pass (``unpruned``), the magnitude left in masked weights, the reach, and the groups of weights.

    Raises:
        UserError: settings, layers, a text or a learning rate that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(model, network, run.seed)
    paths = choose(network, cfg.sparsity, cfg.modules, cfg.skip)
    check_language_model(network, text)
    if cfg.dense_steps:
        train_language_model(run, "dense", network.requires_grad_(True), text, cfg.dense(), steps=cfg.dense_steps)
    network.cpu().eval()
    student, found = copy.deepcopy(network).requires_grad_(True), dict[str, Any]()
    if cfg.method == "cast" and cfg.steps:
        cfg, far = derived(run, network, paths, text, cfg)
        far.check(cfg.reach, cfg.lr, cfg.steps)
        found |= {"lr": cfg.lr, "decay": cfg.decay, "reach": far.way, "reach_in_mean_weights": far.least}
    make_sparse(student, paths, cfg.method, cfg.sparsity, cfg.blocks)
    if cfg.steps:
        train(run, student, network, text, cfg)
    edits, after = ended(run, student, network, text, cfg)
    cost = {
        **found, **after, "layers": len(paths), "steps": cfg.steps, "sparse_part": share(student, paths),
        "seconds": time.monotonic() - began,
    }  # fmt: skip
    made = (plan or Plan.identity(network)).then(*edits)
    members = [Member("dense", network, plan, spec=spec), Member("sparse", student, made, spec=spec)]
    return language_models(members, text, spec=spec, cost=cost, notes=advice(cost, cfg), logs=run.log("sparse"))


def train(run: Run, student: nn.Module, teacher: nn.Module, text: Corpus, cfg: Config) -> None:
    """The stage ``sparse``, in place."""

    def optimizer(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        if cfg.method != "cast":
            return torch.optim.Adam(params, lr=cfg.lr)
        assert cfg.decay is not None
        return AdamS(params, masks(student), steps=cfg.steps, lr=cfg.lr, decay=cfg.decay)

    told = [f"kd:{cfg.teach}?T={cfg.temperature}"] if cfg.teach else []
    train_language_model(
        run, "sparse", student, text, cfg.training(cfg.lr), teacher=teacher, objectives=told, label=1 - cfg.teach,
        optimizer=optimizer, system=partial(Sparse, cfg=cfg), settings=cfg,
    )  # fmt: skip


def ended(
    run: Run, student: nn.Module, network: nn.Module, text: Corpus, cfg: Config
) -> tuple[list[Pack], dict[str, Any]]:
    """Judges the student as it was trained, prunes and folds it in place, and judges it again."""
    judge = partial(nats, windows=text.test, device=run.device)
    left = leftover(student) if cfg.method == "cast" else None  # in the others masked weights never count
    found = {"left_in_masked": left, "unpruned": judge(student)}
    edits, counted = finalise(student, cfg.sparsity)
    return edits, {**found, **counted, "pruned": judge(student), "dense": judge(network)}


def advice(cost: Mapping[str, Any], cfg: Config) -> list[str]:
    """What to change where masked weights did not vanish."""
    left, gap = cost["left_in_masked"], cost["pruned"] - cost["unpruned"]
    if not cfg.steps or left is None or left <= LEFT:
        return []
    return [
        f"masked weights kept {100 * left:.0f} % of the others' magnitude, and the last pruning cost {gap:+.3f} nats: "
        f"raise --decay ({cfg.decay:g}), --steps or --lr"
    ]


def share(model: nn.Module, paths: Sequence[str]) -> float:
    """Part of the model's parameters that stands in the sparse layers."""
    weights: list[Any] = [model.get_submodule(p).weight for p in paths]
    return sum(w.numel() for w in weights) / count_params(model)
