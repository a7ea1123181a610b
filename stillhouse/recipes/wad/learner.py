"""What the student learns in a round: labels, and weighed pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call, logits_of
from stillhouse.recipes.wad.config import Config
from stillhouse.recipes.wad.views import jitter
from stillhouse.students.whitened import Whitened
from stillhouse.system import Batch, Clock, System, Terms, Update


class WAD(System):
    """mean CE(f(x_l), y) + β·mean_u w(u)·CE(f(x_u), ŷ(u)); the weights are not normalised.

    ŷ and w stand by pool position, so that they follow the samples whatever their order.

    Args:
        student: f, gives logits (n, K).
        cfg: settings.
        n: samples in the whole pool.
    """

    pseudo: Tensor
    weight: Tensor

    def __init__(self, student: nn.Module, cfg: Config, n: int):
        super().__init__()
        self.student, self.cfg = student, cfg
        self.register_buffer("pseudo", torch.zeros(n, dtype=torch.long))
        self.register_buffer("weight", torch.zeros(n))

    def updates(self) -> Sequence[Update]:
        optimizer: Any = partial(torch.optim.Adam, lr=self.cfg.lr)
        if self.cfg.optimizer == "sgd":
            optimizer = partial(torch.optim.SGD, lr=self.cfg.lr, momentum=0.9, nesterov=True)
        return [Update("learn", list(self.student.parameters()), optimizer)]

    def logits(self, x: Tensor, clock: Clock, what: str) -> Tensor:
        """What the student says of inputs changed at random; whitened first, as in the authors' code."""
        c, network = self.cfg, self.student
        if isinstance(network, Whitened):
            x, network = network.front(x), network.body
        x = jitter(x, clock.generator(what), flip=c.flip, shift=c.shift, noise=c.noise, shared=c.shared)
        return logits_of(call(network, x))

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        few = batch["labelled"]
        terms = {"label": O.cross_entropy(self.logits(few["input"], clock, "labelled"), few["label"]).mean()}
        if self.cfg.beta > 0:
            pool = batch["pool"]
            u, at = self.logits(pool["input"], clock, "pool"), pool["id"]
            terms["pool"] = self.cfg.beta * (self.weight[at] * O.cross_entropy(u, self.pseudo[at])).mean()
        return Terms(**terms)

    def outcome(self) -> nn.Module:
        return self.student
