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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse import weights
from stillhouse.bilevel import Hypergradient, one_step
from stillhouse.data import Batches, Data, Samples, prefetch, split, together
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params, evaluating, logits_of, predict
from stillhouse.family import Family, Member, names_of
from stillhouse.models import ModelSpec
from stillhouse.objectives.logits import cross_entropy
from stillhouse.recipes.wml.rules import KDCL, Rule, Seen, make_rule
from stillhouse.students.build import build_peers, check_base, choose_trunks, plan_peers
from stillhouse.students.norms import frozen_statistics, recalibrate
from stillhouse.students.peers import PeerSet, Tree
from stillhouse.students.plan import Plan
from stillhouse.system import Batch, Clock, Gradients, Source, System, Terms, Update, fold
from stillhouse.teachers import EMA


@dataclass(frozen=True)
class Config:
    """Settings of one peer-set run; every field is a flag."""

    ratios: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)  # part of the budget that each peer gives up; 0 stays whole
    rule: str = "wml"  # wml, independent, dml, cl-ilr, kdcl-{mean,naive,linear,minlogit,general}, one, okddip, sandwich
    share: Literal["tree", "nested", "none"] = "tree"  # what peers share: a trunk, every weight, nothing
    trunk: tuple[str, ...] = ()  # last shared module, one for all or one per peer; empty takes about 40 % of the MACs
    measure: Literal["macs", "params"] = "macs"  # what ratios are a part of
    score: Literal["snip", "l1", "bn"] = "snip"  # importance of channels
    scope: Literal["inside", "all"] = "inside"  # prune inside residual blocks only, or coupled block outputs too
    layer_bound: float = 0.9  # largest part of a layer that may go
    round_to: int = 1  # keep multiples of this many channels
    init: Literal["inherit", "fresh"] = "inherit"  # peers start from the base's weights, or each from a seed of its own
    alpha: float = 0.5  # weight of teaching against labels
    ramp: float = 0.0  # part of the run over which alpha grows from 0 (sigmoid ramp; the literature uses 80/300)
    temperature: float = 3.0  # T of every KL
    detach: bool = True  # WML: no gradient to the teaching side
    eta: float = 0.1  # mirror-descent step of the importance; 0 keeps it uniform
    floor: float = 0.02  # part of the importance that is always uniform
    clip_h: float = 1.0  # clip of the centred hypergradient
    outer: Literal["ensemble", "weighted_ce"] = "ensemble"  # held-out loss that the importance minimises
    outer_every: int = 10  # steps between importance updates
    warmup: float = 1.0  # epochs before the first importance update
    hypergradient: Literal["jvp", "grad", "fd"] = "jvp"  # how its inner products are taken
    at: Literal["before", "after"] = "before"  # outer gradient before or after the virtual inner step
    second_term: bool = True  # False keeps only the direct term of the hypergradient
    neumann: int = 0  # further terms of the implicit hypergradient
    gamma: float = 0.0  # inner step size of the hypergradient; 0 takes m times the learning rate
    held_out: float = 0.1  # part of the training data that the importance is judged on
    outer_batch: int = 0  # held-out samples per importance update; 0 takes the batch size
    epochs: float = 30.0  # passes over the training data
    merge_epochs: float = 0.0  # further passes with the held-out part merged in and the importance frozen
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has Nesterov momentum 0.9
    lr: float = 0.1  # learning rate at the top of its cosine
    lr_warmup: float = 0.05  # part of the run over which the learning rate rises
    weight_decay: float = 5e-4  # of all trained weights
    clip: float = 5.0  # largest gradient norm
    ema: float = 0.0  # decay of an exponential moving average of the weights; 0 has none
    views: bool = False  # every peer sees another augmentation of each image (KDCL); not with share tree
    two_pass: bool = False  # one peer's activations in memory at a time, for one more forward pass

    def __post_init__(self) -> None:
        check_config(self)


def check_config(c: Config) -> None:
    """One line for every setting that cannot be."""
    if not c.ratios:
        raise UserError("ratios: expected at least one number in [0, 1), got none")
    for r in c.ratios:
        if not 0 <= r < 1:
            raise UserError(f"ratios: expected numbers in [0, 1) (part of the budget given up), got {r}")
    ranges: dict[str, tuple[float, float]] = {
        "alpha": (0, 1), "ramp": (0, 1), "floor": (0, 1), "held_out": (0, 0.9), "ema": (0, 1), "lr_warmup": (0, 1),
        "eta": (0, math.inf), "lr": (0, math.inf), "weight_decay": (0, math.inf), "epochs": (0, math.inf),
        "merge_epochs": (0, math.inf), "temperature": (1e-3, math.inf), "clip_h": (1e-9, math.inf),
        "clip": (1e-9, math.inf), "layer_bound": (0, 1), "outer_every": (1, math.inf), "batch": (1, math.inf),
        "round_to": (1, math.inf), "outer_batch": (0, math.inf), "neumann": (0, 100), "warmup": (0, math.inf),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= getattr(c, name) <= high or math.isnan(getattr(c, name)):
            raise UserError(f"{name}: expected a number from {low} to {high}, got {getattr(c, name)}")
    if c.init == "inherit" and c.share != "nested" and len(set(c.ratios)) < len(c.ratios):
        raise UserError(f"ratios {c.ratios} repeat: equal peers would stay equal for ever; give --init fresh")
    if c.views and c.share == "tree":
        raise UserError("views: peers with a shared trunk must see the same input; use --share none or nested")
    if c.two_pass and c.rule in ("one", "okddip"):
        raise UserError(f"two_pass: rule {c.rule} needs the peers' features, which are not stored; drop --two-pass")
    if c.trunk and len(c.trunk) not in (1, len(c.ratios)):
        raise UserError(f"trunk: expected one module or one per peer ({len(c.ratios)}), got {len(c.trunk)}")


class Mutual(System):
    """Peers that learn labels and one another by a rule; with rule ``wml`` their importance is learned too.

    Args:
        peers: the students.
        cfg: settings.
        rule: who teaches whom.
        held_out: samples that ``kdcl-general`` takes its error covariance from.
        labels: gives each peer labels of its own: ``(ids, y) -> (m, n)``.

    Attributes:
        search: whether the importance is learned; False freezes it.
        first: step of the first importance update.
        done, total: steps of earlier stages and of all, so that schedules run over the whole plan.
    """

    def __init__(
        self,
        peers: PeerSet,
        cfg: Config,
        rule: Rule,
        *,
        held_out: Samples | None = None,
        labels: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.peers, self.rule, self.cfg = peers, rule, cfg
        self.omega = weights.simplex(len(peers))
        self.ema = EMA(peers, cfg.ema) if cfg.ema else None
        self.held_out, self.labels = held_out, labels
        self.search = cfg.rule == "wml" and cfg.eta > 0 and len(peers) > 1
        self.first, self.done, self.total = 0, 0, 1
        if rule.averages:
            peers.average_shared()

    def updates(self) -> Sequence[Update]:
        c = self.cfg
        move = partial(torch.optim.SGD, momentum=0.9, nesterov=True) if c.optimizer == "sgd" else torch.optim.AdamW
        learn = partial(move, lr=c.lr, weight_decay=c.weight_decay)
        params = [*self.peers.trained().values(), *self.rule.parameters()]
        updates = [Update("mutual", params, learn, lr=self.rate, clip=c.clip)]
        if self.search:
            step = weights.mirror_descent(c.eta, c.floor, c.clip_h)
            updates.append(
                Update("importance", [self.omega], step, every=c.outer_every, start=self.first, whole=True)
            )
        return updates

    def overall(self, clock: Clock) -> Clock:
        """The clock over all stages."""
        return replace(clock, step=self.done + clock.step, steps=max(self.total, clock.steps))

    def rate(self, clock: Clock) -> float:
        """Factor on the learning rate: warm-up, then a cosine."""
        return weights.cosine(round(self.cfg.lr_warmup * self.total))(self.overall(clock))

    def alpha(self, clock: Clock) -> float:
        """α after its ramp, exp(−5(1−t)²) over the first `ramp` of the run."""
        t = self.overall(clock).progress / self.cfg.ramp if self.cfg.ramp else 1.0
        return self.cfg.alpha * math.exp(-5 * (1 - min(t, 1.0)) ** 2)

    def see(self, z: Tensor, batch: Batch, clock: Clock, features: Any = (), trunk: Tensor | None = None) -> Seen:
        y = batch["label"] if self.labels is None else self.labels(batch["id"], batch["label"])
        return Seen(z, y, self.alpha(clock), self.cfg.temperature, self.omega.detach(), list(features), trunk)

    # -- the inner problem --------------------------------------------------------------------------------

    def mutual(self, batch: Batch, clock: Clock) -> Terms | Gradients:
        """Equation (1), or another rule's loss, on the training batch."""
        batch = batch["train"]
        if self.cfg.two_pass:
            return self.mutual_two_pass(batch, clock)
        x, features, trunk = batch["input"], list[Tensor](), None
        if "trunk" in self.rule.wants and isinstance(self.peers, Tree):
            z, features, trunk = self.peers.boundary(x)
        elif "features" in self.rule.wants:
            z, features = self.peers.with_features(x)
        else:
            z = self.peers(x)
        seen = self.see(z, batch, clock, features, trunk)
        label, teach = self.rule(seen)
        return Terms(label=label, teach=teach).note(**self.notes(z, seen))

    def mutual_two_pass(self, batch: Batch, clock: Clock) -> Gradients:
        """The same gradient with one peer's activations alive at a time.

        The loss sees the network only through the logits: its gradient there, (m, n, c), is enough to run
        every peer's backward pass alone. Exact without dropout.
        """
        with torch.no_grad():
            z = self.peers(batch["input"])
        z.requires_grad_()
        seen = self.see(z, batch, clock)
        label, teach = self.rule(seen)
        (dz,) = torch.autograd.grad(label + teach, z)
        params = list(self.peers.trained().values())
        total: list[Tensor | None] = [None] * len(params)
        with frozen_statistics(self.peers):  # they moved in the first pass
            for i in range(len(self.peers)):
                zi = self.peers(batch["input"], only=[i])
                for k, g in enumerate(torch.autograd.grad(zi, params, dz[i : i + 1].to(zi.dtype), allow_unused=True)):
                    if g is not None:
                        before = total[k]
                        total[k] = g if before is None else before + g
        grads = total + [None] * len(list(self.rule.parameters()))
        return Gradients(grads, label=label, teach=teach, **self.notes(z, seen))

    @torch.no_grad()
    def notes(self, z: Tensor, seen: Seen) -> dict[str, Tensor]:
        return {"ce": seen.ce, "accuracy": (z.argmax(-1) == seen.y).float().mean(-1), "omega": self.omega.clone()}

    # -- the outer problem --------------------------------------------------------------------------------

    def importance(self, batch: Batch, clock: Clock) -> Gradients:
        """Equation (4): how each peer's importance moves the held-out loss of the weighted ensemble."""
        h = self.hypergradient(batch["train"], batch["held_out"], clock)
        omega = self.omega.detach()
        return Gradients(
            [h.total],
            outer=h.outer,
            h_direct=h.direct - h.direct.mean(),
            h_indirect=h.indirect - h.indirect.mean(),
            entropy=weights.entropy(omega),
        )

    def hypergradient(self, train: Batch, held_out: Batch, clock: Clock) -> Hypergradient:
        c, m = self.cfg, len(self.peers)
        assert not isinstance(self.rule, KDCL)
        x, y = train["input"], self.see(self.omega, train, clock).y
        alpha = self.alpha(clock)
        buffers = dict(self.peers.named_buffers())

        def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.peers, (params, buffers), (x,)).float()

        def terms(z: Tensor, fixed: Tensor) -> Tensor:
            label, teach = self.rule.per_peer(z, y, alpha, c.temperature, teacher=fixed)  # type: ignore[operator]
            return label + teach

        with frozen_statistics(self.peers):
            return one_step(
                lambda p: logits(p, x),
                terms,
                lambda p, w: self.outer_loss(logits(p, held_out["input"]), w, held_out["label"]),
                self.peers.trained(),
                self.omega,
                lr=(c.gamma or m * c.lr * self.rate(clock)) if c.second_term else 0.0,
                mode=c.hypergradient,
                at=c.at,
                scale=self.peers.grad_scale,
                neumann=c.neumann,
                all_mean=lambda tensors: clock.all_mean(tensors, len(held_out["label"])),
            )

    def outer_loss(self, z: Tensor, omega: Tensor, y: Tensor) -> Tensor:
        """Equation (3): cross-entropy of the ω-weighted logits (or the ω-weighted cross-entropies)."""
        if self.cfg.outer == "weighted_ce":
            return (omega * cross_entropy(z, y).mean(-1)).sum()
        return cross_entropy(torch.einsum("m,mnc->nc", omega, z), y).mean()

    # -- around the step ----------------------------------------------------------------------------------

    def after_step(self, clock: Clock) -> None:
        if self.ema is not None:
            self.ema.update(self.peers, clock)
        if isinstance(self.rule, KDCL) and self.rule.held_out and clock.position == clock.steps_per_epoch - 1:
            assert self.held_out is not None
            was = self.training
            z = [predict(Peer(self.peers, i), self.held_out, device=clock.device) for i in range(len(self.peers))]
            self.train(was)
            self.rule.refresh(torch.stack([a for a, _ in z]).to(clock.device), z[0][1].to(clock.device))

    def ensemble_weights(self) -> Tensor:
        return self.rule.weights(self.omega).detach().cpu()

    def outcome(self) -> PeerSet:
        """The trained peers (their moving average when there is one)."""
        if self.ema is None:
            return self.peers
        model = self.ema.model
        assert isinstance(model, PeerSet)
        return model


class Peer(nn.Module):
    """One member of a peer set as a network."""

    def __init__(self, peers: PeerSet, i: int):
        super().__init__()
        self.peers, self.i = peers, i

    def forward(self, x: Tensor) -> Tensor:
        return self.peers(x, only=[self.i])[0]


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
    spec = base if isinstance(base, ModelSpec) else None
    if network is None:
        network = base.build(seed=run.seed) if isinstance(base, ModelSpec) else base
    peers, notes, miss = make_peers(run, network, train, cfg)
    widths, channels = feature_sizes(peers, train)
    rule = make_rule(cfg.rule, cfg.share, len(peers), widths, channels, cfg.detach)
    learner = Mutual(peers, cfg, rule, held_out=held, labels=labels)

    def source(samples: Samples) -> Source:
        parts: dict[str, Source] = {"train": Batches(samples, cfg.batch, copies=len(peers) if cfg.views else 1)}
        if held is not None:
            parts["held_out"] = Batches(held, cfg.outer_batch or cfg.batch, augment=False)
        return prefetch(together(**parts), run.workers) if run.workers else together(**parts)

    stages = [("mutual", source(train), cfg.epochs)]
    if cfg.merge_epochs:
        stages.append(("merge", source(data.train) if carved else stages[0][1], cfg.merge_epochs))
    lengths = [max(1, round(epochs * s.steps_per_epoch)) for _, s, epochs in stages]
    learner.first = round(cfg.warmup * stages[0][1].steps_per_epoch)
    learner.total = sum(lengths)
    for (name, stage, _), steps in zip(stages, lengths, strict=True):
        learner.search = learner.search and name == "mutual"
        fit(run, name, learner, stage, steps=steps, settings=cfg)
        learner.done += steps
    family = harvest(run, learner, data, network, spec, [s for s, _, _ in stages])
    family.notes += notes
    seconds = time.monotonic() - began
    family.cost.update(worst_budget_error=miss, samples=len(train), steps=sum(lengths), seconds=seconds)
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


def make_peers(run: Run, base: nn.Module, train: Samples, cfg: Config) -> tuple[PeerSet, list[str], float]:
    """Prune `base` to every ratio and put the peers together; the plans are made once and kept in the run folder."""
    ids = np.random.default_rng(fold(run.seed, "score")).permutation(len(train))[:512]
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
        said = [f"{b.measure} budget {b.target:.4g}: reached {b.reached} ({100 * b.error:+.2f} %)" for b in budgets]
        miss = max(abs(b.error) for b in budgets)
        return {"plans": [json.loads(p.to_json()) for p in plans], "budgets": said, "whole": left, "miss": miss}

    made = run.memo("plans", make)
    plans = [Plan.from_json(p) for p in made["plans"]]
    seeds = [fold(run.seed, "peer", i) for i in range(len(plans))]
    peers = build_peers(
        base, plans, example, share=cfg.share, trunks=trunks, fresh=cfg.init == "fresh", seeds=seeds
    )
    shared = [f"shared trunk: {', '.join(trunks[0])}"] if trunks else []
    return peers, [*shared, *made["budgets"], *(f"left whole: {w}" for w in made["whole"])], made["miss"]


def feature_sizes(peers: PeerSet, train: Samples) -> tuple[list[int], int]:
    """Width of each peer's features, and channels of the shared trunk's output."""
    x = train.take(np.arange(min(2, len(train))))["input"]
    with torch.no_grad(), evaluating(peers):
        if isinstance(peers, Tree):
            _, features, trunk = peers.boundary(x)
            return [f.shape[1] for f in features], trunk.shape[1]
        return [f.shape[1] for f in peers.with_features(x)[1]], 0


def harvest(
    run: Run, learner: Mutual, data: Data, base: nn.Module, spec: ModelSpec | None, stages: Sequence[str]
) -> Family:
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
    logs = [row for stage in stages for row in run.log(stage)]
    return Family(members, tuple(data.shape), tuple(data.classes), base, spec, cost, logs=logs)


def batches_of(samples: Samples, size: int, seed: int, limit: int = 64) -> Iterator[Tensor]:
    """Inputs of up to `limit` batches in a seeded order, without augmentation."""
    order = np.random.default_rng(fold(seed, "recalibrate")).permutation(len(samples))
    for k in range(min(limit, max(1, len(samples) // size))):
        yield samples.take(order[k * size : (k + 1) * size])["input"]
