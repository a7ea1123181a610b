"""The networks that a set is made for: where their weights come from, and which cannot be used."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating, logits_of
from stillhouse.models import ModelSpec
from stillhouse.outcomes import load
from stillhouse.recipes.soft_label_dataset_distillation.config import Config
from stillhouse.system import fold

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.modules.batchnorm._NormBase)


def networks(run: Run, model: nn.Module | ModelSpec, cfg: Config, nets: Sequence[nn.Module]) -> list[nn.Module]:
    """The network whose weights are w_0, or the pool."""
    if cfg.start == "pool":
        pool = [*nets] or [load(folder) for folder in cfg.pool]
        if not pool:
            raise UserError("start pool: give folders of trained networks with --pool RUN/students/NAME …")
        shapes = [{k: tuple(p.shape) for k, p in net.named_parameters()} for net in pool]
        if any(s != shapes[0] for s in shapes):
            raise UserError("pool: all networks must have one structure, these differ in their parameters")
    else:
        seed = fold(run.seed, "start")
        net = model.build(seed=seed) if isinstance(model, ModelSpec) else model
        keep = cfg.weights == "own" and cfg.start == "known"  # as it was built, or as the user gave it
        pool = [net if keep else initialised(net, cfg.weights, seed)]
    for net in pool:
        check_network(net)
    return pool


def check_output(net: nn.Module, example: Tensor, width: int) -> None:
    """The network must take the synthetic samples and give as many logits as a label has numbers."""
    with torch.no_grad(), evaluating(net):
        try:
            z = logits_of(net(example.to(next(net.parameters()).device)))
        except RuntimeError as error:
            what = f"{type(net).__name__} does not take inputs of shape {tuple(example.shape[1:])}"
            raise UserError(f"{what}: {' '.join(str(error).split())[:200]}") from None
    if z.shape != (1, width):
        raise UserError(
            f"{type(net).__name__} gives {tuple(z.shape[1:])} logits, expected {width}; give it as many outputs as "
            "classes (one with --one-logit)"
        )


def initialised(net: nn.Module, how: str, seed: int) -> nn.Module:
    """A copy of `net` with weights drawn from `seed`.

    Args:
        how: ``xavier`` normal with gain 1, biases 0 (normalisation and embedding tables stay as they are); ``zeros``
            for the same tensors; ``own`` what each layer's reset_parameters draws.
    """
    net = copy.deepcopy(net)
    if how == "own":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for m in net.modules():
                if callable(reset := getattr(m, "reset_parameters", None)):
                    reset()
        return net
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, NORMS):
                continue
            for p in m.parameters(recurse=False):
                if how == "xavier" and p.dim() > 1:
                    p.copy_(nn.init.xavier_normal_(torch.empty(p.shape), generator=g))
                else:
                    p.zero_()
    return net


def check_network(net: nn.Module) -> None:
    """Refuses running statistics: inside the unrolled steps they are neither weights nor data."""
    for name, m in net.named_modules():
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats and m.running_mean is not None:
            raise UserError(
                f"{type(net).__name__} normalises by running statistics ({name or type(m).__name__}), which have no "
                "meaning inside unrolled steps; use group or instance norm, or track_running_stats=False"
            )
