"""Weighted Mutual Learning and its relatives over one peer set.

The whole run, on built-in digits::

    stillhouse run wml --out runs/wml

From Python, with a network and data of your own::

    run = stillhouse.Run("runs/mine", seed=0)
    data = stillhouse.data.from_arrays(x, y)
    family = stillhouse.recipes.wml.distill(run, data, base, Config(ratios=(0, 0.5), epochs=30))
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Batches, Data, Samples, prefetch, split, together
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params, evaluating, logits_of
from stillhouse.family import Family, names_of
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.objectives.logits import cross_entropy
from stillhouse.outcomes import Member
from stillhouse.recipes.wml.config import Config
from stillhouse.recipes.wml.mutual import Mutual
from stillhouse.recipes.wml.rules import make_rule
from stillhouse.students.build import build_peers, check_base, choose_trunks, plan_peers
from stillhouse.students.norms import recalibrate
from stillhouse.students.peers import PeerSet, Tree
from stillhouse.students.plan import Plan
from stillhouse.system import Source, fold

__all__ = ["Config", "Mutual", "distill"]


def distill(
    run: Run,
    data: Data,
    base: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    labels: Callable[[Tensor, Tensor], Tensor] | None = None,
    network: nn.Module | None = None,
) -> Family:
    """Train a family of pruned peers of `base` together on `data`.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        base: the largest network: a live module, or a `ModelSpec` (then students can be loaded from their folders
            alone). Never changed.
        cfg: settings.
        labels: labels of their own for the peers, ``(ids, y) -> (m, n)``.
        network: the base with weights of its own (pretrained ones, say) where `base` is only a `ModelSpec`.

    Returns:
        The family: dense pruned students with recalibrated normalisation, their importance, the ensemble.

    Raises:
        UserError: settings or data that cannot be; a budget that cannot be reached.
    """
    cfg = cfg or Config()
    began = time.monotonic()
    train, held, carved = part_data(data, cfg, run.seed)
    spec, network = spec_and_network(base, network, run.seed)
    peers, budgets, notes = make_peers(run, network, train, cfg)
    widths, channels = feature_sizes(peers, train)
    with torch.random.fork_rng(devices=[]):  # some rules have weights of their own
        torch.manual_seed(fold(run.seed, "rule"))
        rule = make_rule(cfg.rule, cfg.share, len(peers), widths, channels, cfg.detach)
    learner = Mutual(peers, cfg, rule, held_out=held, labels=labels)

    def source(samples: Samples) -> Source:
        parts: dict[str, Source] = {"train": Batches(samples, cfg.batch, copies=len(peers) if cfg.views else 1)}
        if held is not None:
            parts["held_out"] = Batches(held, cfg.outer_batch or -(-cfg.batch // 2), augment=False)
        return prefetch(together(**parts), run.workers) if run.workers else together(**parts)

    stages = [("mutual", source(train), cfg.epochs)]
    if cfg.merge_epochs:
        stages.append(("merge", source(data.train) if carved else stages[0][1], cfg.merge_epochs))
    lengths = [max(1, round(epochs * s.steps_per_epoch)) for _, s, epochs in stages]
    learner.first = round(cfg.warmup * stages[0][1].steps_per_epoch)
    learner.total = sum(lengths)
    logs: list[dict[str, Any]] = []
    for (name, stage, _), steps in zip(stages, lengths, strict=True):
        learner.search = learner.search and name == "mutual"
        if name == "merge" and carved:
            learner.held_out = None  # no longer held out
        fit(run, name, learner, stage, steps=steps, settings=cfg)
        logs += [{**row, "step": learner.done + row["step"]} for row in run.log(name)]
        learner.done += steps
    family = harvest(run, learner, data, network, spec)
    family.budgets, family.notes, family.logs = budgets, notes, logs
    family.cost.update(samples=len(train), steps=sum(lengths), seconds=time.monotonic() - began)
    return family


def part_data(data: Data, cfg: Config, seed: int) -> tuple[Samples, Samples | None, bool]:
    """Training samples, held-out samples if the rule wants any, and whether these were carved out of the former."""
    wants = cfg.rule == "kdcl-general" or (cfg.rule == "wml" and cfg.eta > 0 and len(cfg.ratios) > 1)
    if not wants:
        return data.train, None, False
    if data.held_out is not None:
        return data.train, data.held_out, False
    if cfg.held_out <= 0:
        raise UserError(f"rule {cfg.rule} judges the peers on held-out data: give --held-out above 0 (0.1 is usual)")
    train, held = split(data.train, cfg.held_out, seed=seed)
    return train, held, True


def make_peers(
    run: Run, base: nn.Module, train: Samples, cfg: Config
) -> tuple[PeerSet, list[dict[str, Any]], list[str]]:
    """Prune `base` to every ratio and put the peers together; the plans are made once and kept in the run folder."""
    # All scoring samples go through the network at once: fewer of them where images are large.
    some = max(32, min(512, 6_000_000 // math.prod(train.shape)))
    ids = np.random.default_rng(fold(run.seed, "score")).permutation(len(train))[:some]
    seen = train.take(np.sort(ids))
    example = seen["input"][:2]
    check_base(base, example, len(train.classes))
    trunks = choose_trunks(base, example, cfg.trunk, len(cfg.ratios)) if cfg.share == "tree" else []

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(logits_of(model(seen["input"])), seen["label"]).mean()

    def make() -> dict[str, Any]:
        plans, budgets, left = plan_peers(
            base, example[:1], cfg.ratios, trunks=trunks, loss=loss, score=cfg.score, measure=cfg.measure,
            scope=cfg.scope, layer_bound=cfg.layer_bound, round_to=cfg.round_to,
        )  # fmt: skip
        facts = [{**asdict(b), "miss": b.error, "met": b.met} for b in budgets]
        return {"plans": [json.loads(p.to_json()) for p in plans], "budgets": facts, "whole": left}

    made = run.memo("plans", make)
    try:
        plans = [Plan.from_json(p) for p in made["plans"]]
    except (TypeError, KeyError) as error:
        raise UserError(f"{run.folder / 'plans.json'} is damaged ({error!r}); remove it to make it again") from None
    seeds = [fold(run.seed, "peer", i) for i in range(len(plans))]
    peers = build_peers(base, plans, example, share=cfg.share, trunks=trunks, fresh=cfg.init == "fresh", seeds=seeds)
    notes = [f"left whole: {w}" for w in made["whole"]]
    if trunks:
        least = min(trunks, key=lambda t: len(t))
        notes.insert(0, f"shared trunk: {', '.join(least)}; ratios refer to the peers' own tails")
    return peers, made["budgets"], notes


def feature_sizes(peers: PeerSet, train: Samples) -> tuple[list[int], int]:
    """Width of each peer's features, and channels of the shared trunk's output."""
    x = train.take(np.arange(min(2, len(train))))["input"]
    with torch.no_grad(), evaluating(peers):
        if isinstance(peers, Tree):
            _, features, trunk = peers.boundary(x)
            return [f.shape[1] for f in features], trunk.shape[1]
        return [f.shape[1] for f in peers.with_features(x)[1]], 0


def harvest(run: Run, learner: Mutual, data: Data, base: nn.Module, spec: ModelSpec | None) -> Family:
    """Dense students with recalibrated normalisation, their importance and what the run cost."""
    peers, omega = learner.outcome(), learner.ensemble_weights()
    members = []
    for i, name in enumerate(names_of(learner.cfg.ratios)):
        model = peers.student(i)
        recalibrate(model, batches_of(data.train, learner.cfg.batch, run.seed))
        members.append(Member(name, model, peers.plans[i], float(omega[i])))
    separate = sum(count_params(m.model) for m in members)
    trained = sum(p.numel() for p in learner.peers.trained().values())
    cost = {"trained_params": trained, "separate_params": separate, "trained_share": trained / separate}
    return Family(members, tuple(data.shape), tuple(data.classes), base, spec, cost)


def batches_of(samples: Samples, size: int, seed: int, limit: int = 64) -> Iterator[Tensor]:
    """Inputs of up to `limit` batches in a seeded order, without augmentation."""
    order = np.random.default_rng(fold(seed, "recalibrate")).permutation(len(samples))
    for k in range(min(limit, max(1, len(samples) // size))):
        yield samples.take(order[k * size : (k + 1) * size])["input"]
