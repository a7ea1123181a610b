"""The last linear layer of any network, distilled into itself by the closed forms: features frozen, head refitted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.calibration import fit_temperature
from stillhouse.data import Data, Samples, split
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.weighted_ground_truth_self_distillation import closed
from stillhouse.recipes.weighted_ground_truth_self_distillation.config import RIDGES, Config
from stillhouse.students.plan import Plan
from stillhouse.system import fold
from stillhouse.taps import head, tap


def best_chain(
    make: Callable[[float], closed.Smoother], y: Tensor, rows: Tensor, held_out: Tensor, cfg: Config
) -> tuple[float, list[closed.Step]]:
    """The chain of `cfg`, and its λ: as given, or that of `RIDGES` whose first step is best on the held-out samples.

    Args:
        make: ``make(ridge) -> Smoother``, the ridge relative to the kernel matrix's mean diagonal.
    """

    def error(ridge: float) -> float:
        return closed.mse(rows @ make(ridge).coefficients(y), held_out)

    ridge = cfg.ridge or min(RIDGES, key=error)
    if cfg.weight == "optimal":
        return ridge, closed.greedy(make(ridge), y, rows, held_out, cfg.steps, cfg.clip)
    return ridge, closed.chain(make(ridge), y, [cfg.alpha] * (cfg.steps - 1))


def parts(data: Data, cfg: Config, seed: int) -> tuple[Samples, Samples]:
    """Training samples without the held-out ones, and these; never of the test part."""
    if data.held_out is not None:
        return data.train, data.held_out
    return split(data.train, cfg.held_out, seed=fold(seed, "held out"))


def last_layer(
    run: Run, data: Data, model: nn.Module, cfg: Config | None = None, *, spec: ModelSpec | None = None,
    plan: Plan | None = None,
) -> Family:  # fmt: skip
    """The last linear layer of a trained network, refitted by the closed forms on its own frozen features.

    Its outputs are then regressions on the classes (0 or 1), divided by one temperature so that their softmax is
    calibrated on the held-out samples.

    Args:
        data: ``data.held_out`` should be samples that the network has not learned from either: on those it knows, the
            ridge and the temperature come out too small.
        model: a classifier whose logits are what an ``nn.Linear`` gives; its weights stay. spec, plan: how it is built
            again.

    Raises:
        UserError: logits that no linear layer gives, another number of classes, a head without a bias.

    Returns:
        ``student``: of the step with the least squared error on held-out samples; `model` is the family's base.
    """
    cfg, began = cfg or Config(method="last-layer"), time.monotonic()
    path = head(model, data.train.take(np.arange(1))["input"])
    made = deepcopy(model).cpu().eval()
    layer = made.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    if layer.out_features != len(data.classes) or layer.bias is None:
        raise UserError(
            f"the last linear layer, {path}, has {layer.out_features} outputs and bias {layer.bias is not None}; "
            f"expected the {len(data.classes)} classes of {data.name} and a bias"
        )
    learn, held = parts(data, cfg, run.seed)
    phi, y = features(model, path, learn, run.device)
    phi_held, y_held = features(model, path, held, run.device)
    middle, centre = phi.mean(0), y.mean(0)  # the bias is not shrunk
    rows, rows_held = phi - middle, phi_held - middle
    size = float(rows.square().sum(1).mean())
    ridge, steps = best_chain(lambda r: closed.Features(rows, r * size), y - centre, rows_held, y_held - centre, cfg)
    logs = [{"step": k + 1, "alpha": s.alpha, "validation_mse": closed.mse(rows_held @ s.coefficients, y_held - centre)}
            for k, s in enumerate(steps)]  # fmt: skip
    best = min(range(len(logs)), key=lambda k: logs[k]["validation_mse"])
    weight = steps[best].coefficients
    bias = centre - middle @ weight
    T = fit_temperature(phi_held @ weight + bias, y_held.argmax(1), smoothing=1 / (len(held) + 2))
    with torch.no_grad():
        layer.weight.copy_(weight.T / T)
        layer.bias.copy_(bias / T)
    cost = {"ridge": ridge * size, "best_step": best + 1, "temperature": T, "seconds": time.monotonic() - began}
    members = [Member("student", made, plan, spec=spec)]
    return Family.of(data, members, model, spec, cost, logs=logs, base_name="as it came")


def features(model: nn.Module, path: str, samples: Samples, device: Any, size: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs (N, d) of the module `path` on every sample, without augmentation, and the labels (N, C) as 0 or 1."""
    found, labels = [], []
    model.to(device)
    with torch.no_grad(), evaluating(model), tap(model, [f"{path}:in"]) as seen:
        for start in range(0, len(samples), size):
            batch = samples.take(np.arange(start, min(start + size, len(samples))))
            x = batch["input"]
            call(model, {k: v.to(device) for k, v in x.items()} if isinstance(x, Mapping) else x.to(device))
            found.append(seen[f"{path}:in"].double().cpu())
            labels.append(batch["label"])
    y = nn.functional.one_hot(torch.cat(labels), len(samples.classes)).double()
    return torch.cat(found), y
