"""Weight-aware distillation over live objects: rounds of training on labels and weighed pseudo-labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Batches, Data, Samples, Subset, prefetch, together
from stillhouse.data.pools import Joined, Unlabelled
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.family import Family
from stillhouse.files import write_json
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.recipes.wad.bank import NearestClass, fraction, weights
from stillhouse.recipes.wad.config import Config
from stillhouse.recipes.wad.encoders import features, simclr, whitened_pca
from stillhouse.recipes.wad.growth import Growth
from stillhouse.recipes.wad.learner import WAD
from stillhouse.students.whitened import whitened
from stillhouse.system import fold

__all__ = ["WAD", "Config", "Grown", "distill"]


@dataclass
class Grown(Family):
    """The student, and what was thought of every pool sample.

    Attributes:
        rounds: of each round a mapping with ``left`` (positions in the pool), their ``weight``, ``pseudo`` label and
            ``similarity`` to each class.
        moved: one row for each sample taken in or given back: position, label, round, weight, loss.
    """

    rounds: list[dict[str, Any]] = field(default_factory=list)
    moved: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: str | Path) -> list[Path]:
        """The student, and ``moved.json``: which pool samples were taken in, when and why."""
        write_json(Path(folder) / "moved.json", self.moved)
        return super().save(folder)


def distill(
    run: Run,
    data: Data,
    pool: Samples,
    student: nn.Module | ModelSpec,
    encoder: nn.Module | None = None,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    judge: Callable[[Tensor], Tensor] | None = None,
) -> Grown:
    """Learn the classes of `data` from its few labels and a pool in which other classes may be mixed.

    Args:
        run: folder, seed, device.
        data: the labelled samples as its training part, K ≥ 2 classes; a test part of the same classes.
        pool: further inputs; their labels are never read.
        student: a live module (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        encoder: the teacher, inputs → features (n, d), frozen; None makes one by ``cfg.teacher``, without labels.
        cfg: settings.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        judge: weights of its own instead of ``cfg.weight``: similarities (N, K) of the whole pool → (N,) ≥ 0.

    Returns:
        A family of one, ``student``, with the encoder's nearest-neighbour classifier as base.

    Raises:
        UserError: settings, classes or an encoder that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    check(network, data, pool)
    grown = Growth(data.train, Unlabelled(Subset(pool, np.arange(len(pool)), own_ids=True)))
    both = Joined([Unlabelled(grown.labelled), grown.pool])
    if cfg.whiten:
        network, spec = whitened(network, both, spec)
    if encoder is None:
        body = ModelSpec(cfg.body, cfg.projection, tuple(data.shape))
        encoder = whitened_pca(both, cfg.components, run.seed) if cfg.teacher == "pca" else simclr(run, both, body, cfg)
    system, rounds, logs = WAD(network, cfg, len(pool)), [], []
    for r in range(1, cfg.rounds + 2):
        rounds.append(one_round(run, system, grown, encoder, cfg, r, judge))
        logs += [{**row, "step": row["step"] + (r - 1) * cfg.steps} for row in run.log(f"round{r}")]
        if part := fraction(cfg.grow, cfg.rounds, r):
            guess, weight = system.pseudo.cpu(), system.weight.cpu()
            easiest = partial(grown.easiest, network, guess, weight, part, r, run.device)
            grown.take_in(run.memo(f"taken{r}", easiest))
    system.cpu()
    network.eval()
    plain = features(encoder, data.train, replace(cfg, augmented=False), seed=0, device=run.device)
    base = NearestClass(encoder, plain, torch.as_tensor(data.train.labels), len(data.classes))
    cost: dict[str, Any] = {"samples": len(data.train), "pool": len(pool), "taken_in": len(grown.taken)}
    cost |= {"steps": cfg.steps * (cfg.rounds + 1), "seconds": time.monotonic() - began}
    return Grown(
        [Member("student", network, spec=spec)], tuple(data.shape), tuple(data.classes), base, spec, cost, logs=logs,
        base_name="encoder, nearest sample", rounds=rounds, moved=grown.moved,
    )  # fmt: skip


def one_round(
    run: Run, system: WAD, grown: Growth, encoder: nn.Module, cfg: Config, r: int, judge: Any = None
) -> dict[str, Any]:
    """Compares, weighs and trains on; gives what was thought of the samples that are left in the pool."""
    device = run.device
    of_labelled = features(encoder, grown.labelled, cfg, seed=fold(run.seed, "view", r, "labelled"), device=device)
    of_pool = features(encoder, grown.pool, cfg, seed=fold(run.seed, "view", r, "pool"), device=device)
    if cfg.recheck:
        grown.give_back(of_labelled, of_pool, r)
    s = grown.similarities(of_labelled, of_pool)
    system.pseudo.copy_(s.argmax(1))
    system.weight.copy_(weights(s, cfg.weight) if judge is None else judge(s))
    left = grown.left
    apart = f"round {r}" if r > 1 else None  # or every round would draw in the same order
    parts = {"labelled": Batches(grown.known, cfg.batch, augment=False, seed_with=apart)}
    if cfg.beta > 0:
        parts["pool"] = Batches(Subset(grown.pool, left), cfg.batch, augment=False, seed_with=f"pool {r}")
    fit(run, f"round{r}", system, prefetch(together(**parts), run.workers), steps=cfg.steps, settings=cfg)
    return {
        "left": left,
        "weight": system.weight.cpu()[left],
        "pseudo": system.pseudo.cpu()[left],
        "similarity": s[left],
    }


def check(network: nn.Module, data: Data, pool: Samples) -> None:
    """What must fit, before anything is trained."""
    if not len(pool) or pool.shape != data.shape:
        raise UserError(f"the pool has {len(pool)} samples of shape {pool.shape}; it needs some of shape {data.shape}")
    missing = set(range(len(data.classes))) - set(data.train.labels.tolist())
    if missing:
        raise UserError(f"class {data.classes[min(missing)]!r} has no labelled sample; every class needs one")
    with torch.no_grad(), evaluating(network):
        outputs = logits_of(call(network.cpu(), data.train.take(np.arange(1))["input"])).shape[1]
    if outputs != len(data.classes):
        raise UserError(f"the student gives {outputs} logits, but {data.name} has {len(data.classes)} classes")
