"""Automatic inheritance: gates on what two towers can lose, and their folding into the weights that stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.objectives import upcast
from stillhouse.students.cutting import Keep
from stillhouse.students.gates import HardConcrete, settled_value
from stillhouse.students.towers import Tower, towers


@dataclass
class Values:
    """Gates z of one tower in one pass: of the stream (hidden,), and per block of heads (h,) and neurons (m,)."""

    hidden: Tensor
    heads: list[Tensor]
    neurons: list[Tensor]


class TowerGates(nn.Module):
    """Hard-concrete gates of one tower: one vector for the whole residual stream, heads and neurons block by block.

    Args:
        model: with the tower. tower: where its parts are. start: first value of all gates' parameters; 10 is open.
    """

    def __init__(self, model: nn.Module, tower: Tower, start: float = 10.0):
        super().__init__()
        self.tower, self.head_dim = tower, tower.head_dim(model)
        self.hidden = HardConcrete(tower.hidden(model), start=start)
        self.heads = nn.ModuleList(HardConcrete(n, start=start) for n in tower.heads(model))
        self.neurons = nn.ModuleList(HardConcrete(n, start=start) for n in tower.neurons(model))

    def draw(self, generator: torch.Generator | None = None) -> Values:
        """One draw, for a whole batch."""
        hidden = self.hidden(generator)
        return Values(hidden, *([g(generator) for g in each] for each in (self.heads, self.neurons)))

    def settled(self) -> Values:
        """The gates for good; see `HardConcrete.settled`."""
        of = ([g.settled() for g in each] for each in (self.heads, self.neurons))  # type: ignore[operator]
        return Values(self.hidden.settled(), *of)

    def expected(self) -> Tensor:
        """Weights expected to stay: Σ_h q_h · Σ_blocks (4·head_dim·Σ_j q_j + 2·Σ_m q_m), q = P(z > 0)."""
        q = [[g.open_probability().sum() for g in each] for each in (self.heads, self.neurons)]  # type: ignore[operator]
        rows = torch.stack([4 * self.head_dim * h + 2 * n for h, n in zip(*q, strict=True)]).sum()
        return self.hidden.open_probability().sum() * rows


class Gates(nn.Module):
    """Gates of both towers under one budget.

    Args:
        model: a two-tower model, perhaps cut before.
        whole: prunable weights of the first model, which sparsity is counted against; None takes this one's.
        start: see `TowerGates`.
    """

    def __init__(self, model: nn.Module, whole: int | None = None, start: float = 10.0):
        super().__init__()
        self.of = nn.ModuleList(TowerGates(model, tower, start) for tower in towers(model))
        self.present = sum(tower.prunable(model) for tower in towers(model))
        self.whole = whole or self.present

    @property
    def each(self) -> list[TowerGates]:
        return list(self.of)  # type: ignore[arg-type]

    def sparsity(self) -> Tensor:
        """e = 1 − expected weights of both towers / all prunable weights."""
        return 1 - torch.stack([g.expected() for g in self.each]).sum() / self.whole

    def draw(self, generator: torch.Generator | None = None) -> list[Values]:
        return [g.draw(generator) for g in self.each]

    @torch.no_grad()
    def settled(self, keep: float | None = None) -> list[Values]:
        """The gates for good; see `HardConcrete.settled`.

        Args:
            keep: prunable weights that are to stay. Neurons are then opened, those with the largest a first, or shut,
                those with the smallest first, until that many do: as nearly as neurons allow, one per block at least.
        """
        values = [g.settled() for g in self.each]
        if keep is None:
            return values
        rows = [  # a, z, where it lies, what it weighs
            (a, float(z), layer, i, 2 * int((v.hidden != 0).sum()))
            for g, v in zip(self.each, values, strict=True)
            for gate, layer in zip(g.neurons, v.neurons, strict=True)
            for i, (a, z) in enumerate(zip(gate.log_alpha, layer, strict=True))  # type: ignore[arg-type]
        ]
        short = keep - sum(_weights(g, v) for g, v in zip(self.each, values, strict=True))
        opens = short > 0
        for a, z, layer, i, size in sorted(rows, key=lambda row: float(row[0]), reverse=opens):
            if size > 2 * abs(short):
                break
            if (z == 0) == opens and (opens or int((layer != 0).sum()) > 1):
                layer[i] = settled_value(a) if opens else torch.zeros_like(a)
                short -= size if opens else -size
        return values

    def clamp_(self) -> None:
        for gate in self.modules():
            if isinstance(gate, HardConcrete):
                gate.clamp_()

    @contextmanager
    def on(self, model: nn.Module, values: Sequence[Values]) -> Iterator[None]:
        """While it lasts, the model computes with these gates."""
        with ExitStack() as stack:
            for gates, z in zip(self.each, values, strict=True):
                stack.enter_context(gated(model, gates.tower, z))
            yield

    def fold_(self, model: nn.Module, values: Sequence[Values]) -> list[Keep]:
        """Puts the gates into the model's weights, in place; cut as returned it answers like the gated model."""
        for gates, z in zip(self.each, values, strict=True):
            fold_(model, gates.tower, z)
        return [k for g, z in zip(self.each, values) for k in g.tower.keeps(model, *_open(z))]


def _weights(gates: TowerGates, z: Values) -> int:
    """Prunable weights that stay with these gates."""
    heads, neurons = (sum(int((t != 0).sum()) for t in each) for each in (z.heads, z.neurons))
    return int((z.hidden != 0).sum()) * (4 * gates.head_dim * heads + 2 * neurons)


def _open(z: Values) -> tuple[Any, ...]:
    def index(t: Tensor) -> tuple[int, ...]:
        return tuple(t.nonzero().flatten().tolist())

    return index(z.hidden), [index(t) for t in z.heads], [index(t) for t in z.neurons]


@contextmanager
def gated(model: nn.Module, tower: Tower, z: Values) -> Iterator[None]:
    """While it lasts, the tower computes with these gates.

    The stream's gates multiply the embeddings (with positions) and every output of attention and MLP; heads' gates what
    each head gives, neurons' gates the activations. Layer norms take their statistics over the open channels alone,
    unscaled by soft gates, and leave zeros elsewhere.
    """
    opened, width = (z.hidden != 0).detach(), tower.head_dim(model)
    on: list[Any] = [model.get_submodule(tower.embeddings).register_forward_hook(lambda m, a, out: out * z.hidden)]
    for path in (*tower.norms, *tower.block_norms(model)):
        on.append(model.get_submodule(path).register_forward_hook(partial(_norm, opened)))
    for block, heads, neurons in zip(tower.layers(model), z.heads, z.neurons, strict=True):
        per_channel = heads.repeat_interleave(width)
        on += [
            block.self_attn.out_proj.register_forward_pre_hook(lambda m, a, by=per_channel: (a[0] * by,)),
            block.self_attn.register_forward_hook(lambda m, a, out: (out[0] * z.hidden, *out[1:])),
            block.mlp.fc2.register_forward_pre_hook(lambda m, a, by=neurons: (a[0] * by,)),
            block.mlp.register_forward_hook(lambda m, a, out: out * z.hidden),
        ]
    try:
        yield
    finally:
        for hook in on:
            hook.remove()


def _norm(opened: Tensor, norm: nn.LayerNorm, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """The layer norm over some channels, zero in the others; its sizes do not depend on how many are open."""
    x, own = upcast(args[0]), opened.to(args[0])
    count = own.sum().clamp(min=1)
    centred = (x - (x * own).sum(-1, keepdim=True) / count) * own
    scaled = centred * (centred.square().sum(-1, keepdim=True) / count + norm.eps).rsqrt()
    return ((scaled * norm.weight + norm.bias) * own).to(out.dtype)


@torch.no_grad()
def fold_(model: nn.Module, tower: Tower, z: Values) -> None:
    """Multiplies the gates into the embeddings and into the last layers of attention and MLP, in place.

    The projection to the shared space is only cut: nothing multiplies its input in `gated`.
    """
    width = tower.head_dim(model)
    for name in tower.parts:
        part = getattr(model.get_submodule(tower.embeddings), name)
        if isinstance(part, nn.Conv2d):
            part.weight.mul_(z.hidden.view(-1, 1, 1, 1))
            if part.bias is not None:
                part.bias.mul_(z.hidden)
        else:
            (part.weight if isinstance(part, nn.Embedding) else part).mul_(z.hidden)
    for block, heads, neurons in zip(tower.layers(model), z.heads, z.neurons, strict=True):
        for last, by in ((block.self_attn.out_proj, heads.repeat_interleave(width)), (block.mlp.fc2, neurons)):
            last.weight.mul_(z.hidden[:, None] * by)
            last.bias.mul_(z.hidden)
