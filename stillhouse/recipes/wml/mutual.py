"""The System of online distillation: peers, a teaching rule, and the importance that WML learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse import weights
from stillhouse.bilevel import Hypergradient, one_step
from stillhouse.data import Samples
from stillhouse.evaluate import predict
from stillhouse.objectives.logits import cross_entropy, upcast
from stillhouse.recipes.wml.config import Config
from stillhouse.recipes.wml.rules import KDCL, Rule, Seen
from stillhouse.students.norms import frozen_statistics
from stillhouse.students.peers import PeerSet, Tree
from stillhouse.system import Batch, Clock, Gradients, System, Terms, Update, fold
from stillhouse.teachers import EMA


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
            updates.append(Update("importance", [self.omega], step, every=c.outer_every, start=self.first, whole=True))
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
        which = self.rule.choose(len(self.peers), clock)
        if self.cfg.two_pass:
            return self.mutual_two_pass(batch, clock, which)
        x, features, trunk = batch["input"], list[Tensor](), None
        if "trunk" in self.rule.wants and isinstance(self.peers, Tree):
            z, features, trunk = self.peers.boundary(x)
        elif "features" in self.rule.wants:
            z, features = self.peers.with_features(x)
        else:
            z = self.peers(x, only=which)
        seen = self.see(z, batch, clock, features, trunk)
        label, teach = self.rule(seen)
        return Terms(label=label, teach=teach).note(**self.notes(z, seen, which))

    def mutual_two_pass(self, batch: Batch, clock: Clock, which: Sequence[int] | None) -> Gradients:
        """The same gradient with one peer's activations alive at a time.

        The loss sees the network only through the logits: its gradient there, (m, n, c), is enough to run
        every peer's backward pass alone. Exact without dropout.
        """
        with torch.no_grad():
            z = self.peers(batch["input"], only=which)
        z.requires_grad_()
        seen = self.see(z, batch, clock)
        label, teach = self.rule(seen)
        (dz,) = torch.autograd.grad(label + teach, z)
        params = list(self.peers.trained().values())
        total: list[Tensor | None] = [None] * len(params)
        with frozen_statistics(self.peers):  # they moved in the first pass
            for i, dzi in zip(which or range(len(self.peers)), dz, strict=True):
                zi = self.peers(batch["input"], only=[i])
                for k, g in enumerate(torch.autograd.grad(zi, params, dzi[None].to(zi.dtype), allow_unused=True)):
                    if g is not None:
                        before = total[k]
                        total[k] = g if before is None else before + g
        grads = total + [None] * len(list(self.rule.parameters()))
        return Gradients(grads, label=label, teach=teach, **self.notes(z, seen, which))

    @torch.no_grad()
    def notes(self, z: Tensor, seen: Seen, which: Sequence[int] | None) -> dict[str, Tensor]:
        """Cross-entropy, accuracy and importance of every peer; NaN for one that sat this step out."""
        accuracy = (z.argmax(-1) == seen.y).float().mean(-1)
        ce, right = (torch.full((len(self.peers),), math.nan, device=z.device) for _ in range(2))
        rows = list(which or range(len(self.peers)))
        ce[rows], right[rows] = seen.ce.float(), accuracy
        return {"ce": ce, "accuracy": right, "omega": self.omega.clone()}

    # -- the outer problem --------------------------------------------------------------------------------

    def importance(self, batch: Batch, clock: Clock) -> Gradients:
        """Equation (4): how each peer's importance moves the held-out loss of the weighted ensemble."""
        held_out = batch["held_out"]
        # As many training samples, evenly spaced: processes that share the batch then choose the same ones together.
        every = max(1, len(batch["train"]["label"]) // len(held_out["label"]))
        h = self.hypergradient({k: v[::every] for k, v in batch["train"].items()}, held_out, clock)
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
        seed = fold(clock.seed, clock.stage, clock.step, clock.rank, "hypergradient")

        def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
            # The same dropout in every pass, else differences between passes would measure it.
            with torch.random.fork_rng([x.device] if x.is_cuda else []):
                torch.manual_seed(seed)
                return upcast(functional_call(self.peers, (params, buffers), (x,)))

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
                inner_mean=lambda tensors: clock.all_mean(tensors, len(train["label"])),
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
        last = clock.position == clock.steps_per_epoch - 1
        if isinstance(self.rule, KDCL) and self.rule.held_out and last and self.held_out is not None:
            z = [predict(Peer(self.peers, i), self.held_out, device=clock.device) for i in range(len(self.peers))]
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
