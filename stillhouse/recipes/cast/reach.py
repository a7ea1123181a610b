"""How far AdamS can carry weights, and the learning rate and the decay that follow from it and from the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of
from stillhouse.objectives import cross_entropy
from stillhouse.recipes.cast.config import Config
from stillhouse.system import Clock, Schedule, map_tensors
from stillhouse.text.windows import Corpus
from stillhouse.weights import cosine

AIM = 4.0  # the reach, in mean weights of a layer, that a learning rate of 0 stands for


@dataclass(frozen=True)
class Reach:
    """How far AdamS can carry a weight, Σ_t γ_t a_t, beside the weights it has to carry to zero.

    Attributes:
        way: Σ_t γ_t t/T. layers: path → mean |w|.
    """

    way: float
    layers: Mapping[str, float]

    @property
    def least(self) -> float:
        """The way in mean weights of the layer where that is least."""
        return self.way / max(self.layers.values()) if max(self.layers.values()) else float("inf")

    def check(self, wanted: float, lr: float, steps: int) -> None:
        """Raises UserError where the way is shorter than `wanted` mean weights of any layer."""
        if self.least < wanted:
            path = max(self.layers, key=self.layers.__getitem__)
            times = wanted / self.least if self.least else float("inf")
            raise UserError(
                f"reach: lr {lr:g} over {steps} steps carries a weight {self.way:.3g} far, {self.least:.2f} times the "
                f"mean weight of {path}; {wanted:g} times are needed: give --lr {1.01 * times * lr:.3g}, "
                f"{times:.3g} times the --steps, or --reach 0"
            )


def reach(model: nn.Module, paths: Sequence[str], lr: float, schedule: Schedule, steps: int) -> Reach:
    """The reach of AdamS on these layers; about 0.13 lr · steps with a cosine behind a warm-up."""
    way = sum(schedule(Clock(step=t, steps=steps)) * t / steps for t in range(steps))
    weights: dict[str, Any] = {p: model.get_submodule(p).weight for p in paths}
    return Reach(lr * way, {p: float(w.detach().abs().mean()) for p, w in weights.items()})


def derived(run: Run, network: nn.Module, paths: Sequence[str], text: Corpus, cfg: Config) -> tuple[Config, Reach]:
    """The settings with the learning rate and the decay that were left open, and how far a weight can go with them.

    Both are rounded: a resume on another machine must not fail in the last digit.
    """
    schedule = cosine(round(cfg.lr_warmup * cfg.steps))
    unit = reach(network, paths, 1.0, schedule, cfg.steps)
    lr = cfg.lr or float(f"{AIM / unit.least:.3g}")
    decay = float(f"{10 * mean_gradient(run, network, paths, text, cfg):.2g}") if cfg.decay is None else cfg.decay
    return replace(cfg, lr=lr, decay=decay), replace(unit, way=lr * unit.way)


def mean_gradient(run: Run, network: nn.Module, paths: Sequence[str], text: Corpus, cfg: Config) -> float:
    """mean |∂CE/∂w| over the weights of these layers, on the first windows of the training text."""
    count = min(cfg.batch, run.micro_batch or cfg.batch, len(text.train))
    batch = map_tensors(text.train.take(np.arange(count)), lambda t: t.to(run.device))
    layers: list[Any] = [network.to(run.device).get_submodule(p) for p in paths]
    network.requires_grad_(True)
    loss = cross_entropy(logits_of(call(network, batch["input"])), batch["label"]).mean()
    grads = torch.autograd.grad(loss, [x.weight for x in layers])
    network.cpu().requires_grad_(False)
    return sum(float(g.double().abs().sum()) for g in grads) / sum(g.numel() for g in grads)
