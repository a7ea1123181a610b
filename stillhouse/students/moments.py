"""What a trained network's layers see and change on a few samples: second moments of inputs, drift between blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating
from stillhouse.objectives.logits import upcast
from stillhouse.taps import head, tap


@torch.no_grad()
def second_moments(model: nn.Module, paths: Sequence[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """A = E[x xᵀ] over all positions of what enters each of these layers; padding is left out.

    Layers that read the same tensor share one A.

    Args:
        model: in any mode; it is asked in eval mode.
        paths: of modules with inputs (…, in). batches: inputs, as the model is called with them.

    Returns:
        path -> (in, in), at least float32.

    Raises:
        UserError: no batch, or a layer that was never called.

    Example:
        >>> a = second_moments(nn.Sequential(nn.Linear(2, 1)), ["0"], [torch.tensor([[1.0, 2.0], [3.0, 0.0]])])
        >>> a["0"].tolist()
        [[5.0, 1.0], [1.0, 2.0]]
    """
    sums, counts = dict[str, Tensor](), dict[str, int]()
    same, last = dict[str, str](), dict[str, Any]()
    mask: Tensor | None = None

    def see(path: str, x: Tensor) -> None:
        if last.get("input") is x:
            same[path] = last["path"]
            return
        last.update(input=x, path=path)
        rows = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
        rows = upcast(rows)
        sums[path] = sums.get(path, 0) + rows.T @ rows
        counts[path] = counts.get(path, 0) + len(rows)

    hooks = [
        model.get_submodule(p).register_forward_pre_hook(lambda _, args, path=p: see(path, args[0])) for p in paths
    ]
    try:
        with evaluating(model):
            for inputs in batches:
                mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
                call(model, inputs)
                last.clear()
    finally:
        for hook in hooks:
            hook.remove()
    for path in paths:
        if same.get(path, path) not in sums:
            raise UserError(f"{path} was not called on the calibration samples, of which there must be some")
    means = {p: total / counts[p] for p, total in sums.items()}
    return {p: means[same.get(p, p)] for p in paths}


@torch.no_grad()
def lens_drift(model: nn.Module, blocks: Sequence[str], batches: Iterable[Any]) -> list[float]:
    """KL(p_l ‖ p_{l+1}) between consecutive blocks, p_l what the network's head makes of block l's output.

    A sample's hidden state is averaged over its positions and goes through the norms behind the last block and the head
    (the "logit lens"); the KL is averaged over samples.

    Args:
        model: gives logits by a linear layer. blocks: paths, in order. batches: inputs.

    Returns:
        One number fewer than blocks, in nats.
    """
    kept = list(batches)
    if not kept:
        raise UserError("the drift between blocks needs calibration samples, got none")
    top = model.get_submodule(head(model, kept[0]))
    ends, total, count = _norms_behind(model, blocks[-1], kept[0]), torch.zeros(len(blocks) - 1).double(), 0
    with evaluating(model):
        for inputs in kept:
            with tap(model, list(blocks)) as seen:
                call(model, inputs)
            said = []
            for path in blocks:
                h = _mean(seen[path], inputs)
                for norm in ends:
                    h = norm(h)
                said.append(upcast(top(h)).log_softmax(-1))
            p = torch.stack(said).double()
            total += (p[:-1].exp() * (p[:-1] - p[1:])).sum(-1).sum(1).cpu()
            count += p.shape[1]
    return (total / count).tolist()


def _mean(h: Tensor, inputs: Any) -> Tensor:
    """(n, d): mean over all positions but padding."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or mask.shape != h.shape[:-1]:
        return h.flatten(1, -2).mean(1)
    own = mask.unsqueeze(-1).to(h)
    return (h * own).sum(1) / own.sum(1).clamp(min=1)


def _norms_behind(model: nn.Module, last: str, inputs: Any) -> list[nn.Module]:
    """The normalisation layers that are called after the last block, in order."""
    found: list[nn.Module] = []
    hooks = [
        m.register_forward_hook(lambda m, _, __: found.append(m))
        for n, m in model.named_modules()
        if "norm" in type(m).__name__.lower() and not n.startswith(f"{last}.")
    ]
    hooks.append(model.get_submodule(last).register_forward_hook(lambda *_: found.clear()))
    try:
        with evaluating(model):
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def cut_runs(drift: Sequence[float], groups: int, least: int = 2) -> tuple[int, ...]:
    """Sizes of runs of consecutive blocks: the largest drifts become boundaries, as long as runs keep `least` blocks.

    Args:
        drift: between block l and l + 1. groups: runs wanted. least: blocks of the shortest run.

    Raises:
        UserError: more runs than the blocks allow.

    Example:
        >>> cut_runs([0.1, 0.9, 0.2, 0.8, 0.7], 2), cut_runs([9.0, 0.2, 0.1], 2)
        ((2, 4), (2, 2))
    """
    blocks = len(drift) + 1
    if not 1 <= groups <= blocks // least:
        raise UserError(f"{blocks} blocks make 1 to {blocks // least} runs of at least {least}, got {groups}")
    cuts: list[int] = []
    for at in sorted(range(1, blocks), key=lambda b: (-drift[b - 1], b)):
        ends = [0, *sorted([*cuts, at]), blocks]
        gaps = [b - a for a, b in itertools.pairwise(ends)]
        if min(gaps) >= least and sum(g // least for g in gaps) >= groups and len(cuts) < groups - 1:
            cuts.append(at)
    ends = [0, *sorted(cuts), blocks]
    return tuple(b - a for a, b in itertools.pairwise(ends))
