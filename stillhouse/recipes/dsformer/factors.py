"""The straight-through factorizer: the network computes with D·S, the optimiser moves what is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.distill import Distill
from stillhouse.recipes.dsformer.sizes import Layer
from stillhouse.students.dense_sparse import Blocks, dense_sparse, descended, factorise, fill, oriented, sweep, top
from stillhouse.students.edits_sparse import DenseSparse
from stillhouse.students.parametrized import parametrize_weights, projectors
from stillhouse.students.projectors import Projector
from stillhouse.system import Clock


class Top(Projector):
    """S ↦ its t largest magnitudes in every block of every column; the gradient goes to all of S."""

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks = blocks

    def values(self, w: Tensor) -> Tensor:
        return top(w, self.blocks)


class Factors(nn.Module):
    """What both modes share: the size of a layer's factors, and the layers that they end as."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer, self.tall = layer, layer.rows > layer.columns

    def product(self, d: Tensor, s: Tensor) -> Tensor:
        """D·S as the layer has it, (out, in)."""
        return (d @ s).T if self.tall else d @ s

    def factors(self, *originals: Tensor) -> tuple[Tensor, Tensor]:
        """D (m, r) and S (r, n), S with its zeros."""
        raise NotImplementedError

    def baked(self, path: str, plain: Any, *originals: Tensor) -> tuple[nn.Module, DenseSparse]:
        """The two layers, with the factors as they stand; see `parametrized.bake`."""
        made = dense_sparse(plain, self.layer.rank, self.layer.blocks)
        fill(made, *self.factors(*originals))
        edit = self.layer.edit
        assert isinstance(edit, DenseSparse)
        return made, edit


class ModeW(Factors, Projector):
    """Ŵ = D·S with (D, S) = Factor(W); ∂L/∂W := ∂L/∂Ŵ. The factors follow W by sweeps from where they were.

    Args:
        layer: sizes. w: the weight to begin with. sweeps: of the factorisation at the start.
    """

    d: Tensor
    s: Tensor

    def __init__(self, layer: Layer, w: Tensor, sweeps: int):
        super().__init__(layer)
        d, s = factorise(w, layer.rank, layer.blocks, sweeps)
        self.register_buffer("d", d.to(w.dtype))
        self.register_buffer("s", s.to(w.dtype))

    def values(self, w: Tensor) -> Tensor:
        return self.product(self.d, self.s)

    @torch.no_grad()
    def follow_(self, w: Tensor, sweeps: int) -> None:
        """Factor(W), from the factors of the step before."""
        for _ in range(sweeps):
            d, s = sweep(oriented(w), self.d, self.s, self.layer.blocks)
            self.d.copy_(d)
            self.s.copy_(s)

    def factors(self, *originals: Tensor) -> tuple[Tensor, Tensor]:
        return self.d, self.s


class ModeC(Factors):
    """Ŵ = D·Top_t(S̃): D has its own gradient, the dense shadow S̃ that of S."""

    def __init__(self, layer: Layer, sweeps: int):
        super().__init__(layer)
        self.top, self.sweeps = Top(layer.blocks), sweeps

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The first D and S̃, which `parametrize` makes parameters of; S̃ is dense, so that near places compete."""
        d, s = factorise(w, self.layer.rank, self.layer.blocks, self.sweeps)
        return d.to(w.dtype), descended(oriented(w).to(d), d, s).to(w.dtype)

    def forward(self, d: Tensor, shadow: Tensor) -> Tensor:
        return self.product(d, self.top(shadow))

    def factors(self, *originals: Tensor) -> tuple[Tensor, Tensor]:
        d, shadow = originals
        return d, self.top.values(shadow)


class Following(Distill):
    """`Distill` of a student with projectors; after every step those of mode W do `per_step` sweeps."""

    def __init__(self, *args: Any, per_step: int = 1, **how: Any):
        super().__init__(*args, **how)
        self.per_step = per_step

    def after_step(self, clock: Clock) -> None:
        for _, _, chain in projectors(self.student):
            if isinstance(chain[-1], ModeW):
                chain[-1].follow_(chain.original, self.per_step)


def on_weights(model: nn.Module, layers: Sequence[Layer], mode: str, sweeps: int) -> None:
    """Puts a factorizer on the weight of each of these layers, in place."""
    known = {x.module: x for x in layers}

    def make(path: str, plain: Any) -> nn.Module:
        return ModeW(known[path], plain.weight, sweeps) if mode == "W" else ModeC(known[path], sweeps)

    parametrize_weights(model, list(known), make)
