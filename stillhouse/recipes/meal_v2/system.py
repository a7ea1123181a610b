"""What learns: the student on the teachers' mean answer, and the discriminator beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call, logits_of
from stillhouse.recipes.meal_v2.config import Config
from stillhouse.system import Batch, Clock, Signals, System, Teacher, Terms, Update, fold
from stillhouse.weights import step


class Discriminator(nn.Sequential):
    """C → C/8 → C/64 → 2 with a ReLU behind every layer: 1×1 convolutions on C×1×1, written as linear layers."""

    def __init__(self, classes: int, narrowest: int = 8, last_relu: bool = True):
        a, b = (max(classes // k, narrowest) for k in (8, 64))
        layers = [nn.Linear(classes, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 2)]
        super().__init__(*layers, *([nn.ReLU()] if last_relu else []))


class Meal(System):
    """soft · CE(q, softmax(s)) + L_d [+ label · CE(y, softmax(s))], q the teachers' mean PROBABILITIES, detached.

    L_d = BCE(D([s; t̄]), [(1,0); (0,1)]) with t̄ the teachers' mean LOGITS. D descends L_d. The student gets push·∂L_d/∂s
    in ``joint`` mode and −push·∂L_d/∂s (gradient reversal) in ``adversarial`` mode. Where the teachers' answers are
    read from a cache, D sees probabilities, softmax(s) and q.

    Args:
        student: gives logits (n, C).
        teacher: answers with ``logits``, log q up to a constant, and with ``mean_logits``, or it is a cache.
        cfg: settings. classes: C. seed: of the discriminator's first weights.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, cfg: Config, classes: int, seed: int = 0):
        super().__init__()
        self.student, self.teacher, self.cfg = student, teacher, cfg
        self.discriminator: Discriminator | None = None
        if cfg.discriminator != "none":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(fold("discriminator", seed))
                self.discriminator = Discriminator(classes, cfg.narrowest, cfg.last_relu)

    def updates(self) -> Sequence[Update]:
        sgd = partial(torch.optim.SGD, lr=self.cfg.lr, momentum=0.9, weight_decay=self.cfg.weight_decay)
        return [Update("learn", [p for p in self.parameters() if p.requires_grad], sgd, lr=step([self.cfg.drop]))]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``soft``, ``discriminator`` and ``label``; notes what the discriminator gets right."""
        batch = apart(batch, self.cfg.crops)
        s, terms, notes = logits_of(call(self.student, batch["input"])), dict[str, Tensor](), dict[str, Tensor]()
        said = self.teacher(batch) if self.cfg.soft or self.discriminator is not None else Signals()
        if self.cfg.soft:
            terms["soft"] = self.cfg.soft * O.soft_cross_entropy(said.logits, s).mean()
        if self.discriminator is not None:
            mine, theirs = self.scores(s, said)
            terms["discriminator"] = O.discrimination(mine, theirs).mean()
            right = torch.cat([mine[:, 0] > mine[:, 1], theirs[:, 1] > theirs[:, 0]])
            notes["told_apart"] = right.float().mean()
        if self.cfg.label:
            terms["label"] = self.cfg.label * O.cross_entropy(s, batch["label"]).mean()
        return Terms(**terms).note(**notes)

    def scores(self, s: Tensor, said: Signals) -> tuple[Tensor, Tensor]:
        """D on the student's rows and on the teachers', (n, 2) each."""
        assert self.discriminator is not None
        live = "mean_logits" in said
        s, t = (O.upcast(s), said.mean_logits) if live else (O.upcast(s).softmax(-1), said.logits.softmax(-1))
        push = self.cfg.push if self.cfg.discriminator == "joint" else -self.cfg.push
        mine, theirs = self.discriminator(torch.cat([O.scale_gradient(s, push), t.to(s)])).chunk(2)
        return mine, theirs

    def outcome(self) -> nn.Module:
        return self.student


def apart(batch: Batch, crops: int) -> Batch:
    """(n, k, …) views of n images as n·k samples, each with its image's label and id and its own view number."""
    if crops == 1:
        return batch
    views = batch["view"].unsqueeze(1) * crops + torch.arange(crops, device=batch["view"].device)
    each = {k: batch[k].repeat_interleave(crops) for k in ("label", "id")}
    return {"input": batch["input"].flatten(0, 1), "view": views.flatten(), **each}
