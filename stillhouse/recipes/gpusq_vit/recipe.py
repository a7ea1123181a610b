"""GPUSQ-ViT over live objects: a trained vision transformer, images, a number of bits.

family = distill(run, data, network, Config(bits=4))
family["sparse"].model     # plain layers, 2 of 4 (or 2 of 4 pairs of) weights zero; on disk float16 without the zeros
family["int4"].model       # the same zeros; weights and activations of four bits
"""

from __future__ import annotations

import time

import numpy as np
from torch import nn

from stillhouse.data import Data
from stillhouse.engine import Run
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.plain import check_classes, train_first
from stillhouse.recipes.gpusq_vit.config import Config
from stillhouse.recipes.gpusq_vit.layers import choose
from stillhouse.recipes.gpusq_vit.stages import quantize, sparsify
from stillhouse.recipes.gpusq_vit.system import factors
from stillhouse.students.plan import Plan
from stillhouse.taps import tap

__all__ = ["Config", "distill"]


def distill(
    run: Run,
    data: Data,
    base: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
    plan: Plan | None = None,
) -> Family:
    """Make `base` N:M sparse against itself, then quantise it against the sparse network.

    Args:
        run: folder, seed, device.
        data: training and test images.
        base: a trained module, or a `ModelSpec` (then students can be loaded from their folders alone). Nothing but
            ``teacher_epochs`` changes its weights.
        cfg: settings.
        network: the trained network where `base` is only a `ModelSpec`; plan: how it differs from the spec's.

    Returns:
        A family of two, ``sparse`` and ``intB`` with B bits; its base is the dense network. ``budgets`` has a row per
        compared layer: its feature error in the sparse stage, and its weight in the quantised one.

    Raises:
        UserError: settings, layers or classes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(base, network, run.seed)
    check_classes(network, [], data.train.take(np.arange(min(4, len(data.train)))), data)
    layers = choose(network, data.train.take(np.arange(2))["input"], cfg)
    with tap(network, layers.compare):
        pass  # an unknown path is said here
    train_first(run, network, data, cfg)
    sparse = sparsify(run, data, network, layers, cfg)
    small = quantize(run, data, network, sparse, layers, cfg)
    made = plan or Plan.identity(network)
    members = [
        Member("sparse", sparse.model, made.then(*sparse.edits), importance=0.0, spec=spec),
        Member(f"int{cfg.bits}", small.model, made.then(*small.edits), spec=spec),
    ]
    weights = factors(sparse.errors, cfg.weighting)
    left = ", ".join(layers.left_dense)
    notes = [f"left dense, {cfg.sparsity} does not divide them: {left}"] if left else []
    return Family.of(
        data, members, network, spec, base_name="dense", notes=notes,
        cost={"seconds": time.monotonic() - began, "baked_difference": max(sparse.gap, small.gap)},
        budgets=[{"module": p, "error": e, "weight": w} for p, e, w in zip(layers.compare, sparse.errors, weights)],
        logs=[{**r, "stage": s} for s in ("sparse", "quantized") for r in run.log(s)],
    )  # fmt: skip
