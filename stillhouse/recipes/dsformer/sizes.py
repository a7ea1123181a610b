"""How many atoms each layer gets, so that the bytes of all of them together are what was asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.recipes.dsformer.config import Config
from stillhouse.students.dense_sparse import Blocks, factorise, oriented, stored_bytes
from stillhouse.students.edits import Factor
from stillhouse.students.edits_sparse import DenseSparse


@dataclass(frozen=True)
class Layer:
    """A chosen layer: rows and columns of its weight, r and t (0: low rank), bytes of a value, and bytes asked for."""

    module: str
    rows: int
    columns: int
    value: int
    block: int
    nonzeros: int
    asked: float
    rank: int = 0

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.block, self.nonzeros)

    def stored(self, rank: int | None = None) -> int:
        """Bytes of the two factors; the bias stays beside them."""
        r = self.rank if rank is None else rank
        if not self.nonzeros:
            return self.value * r * (self.rows + self.columns)
        return stored_bytes(self.rows, self.columns, r, self.blocks, self.value)

    @property
    def edit(self) -> Factor | DenseSparse:
        """What a plan says of it; its values come from training."""
        if not self.nonzeros:
            return Factor(self.module, self.rank)
        return DenseSparse(self.module, self.rank, self.block, self.nonzeros, sweeps=0)


def layers_of(model: nn.Module, paths: Sequence[str], cfg: Config) -> list[Layer]:
    """The chosen layers with their ranks, which meet ``cfg.ratio`` in sum; with several t, each layer's best.

    Raises:
        UserError: the ratio leaves some layer no atom; says the smallest that does.
    """
    choices = (0,) if cfg.method == "svd" else cfg.nonzeros
    weights: dict[str, Tensor] = {p: model.get_submodule(p).weight for p in paths}  # type: ignore[misc]
    tried: dict[str, list[Layer]] = {}
    for path, w in weights.items():
        rows, columns = w.shape
        asked = cfg.ratio * w.nbytes
        tried[path] = [Layer(path, rows, columns, w.element_size(), cfg.block, t, asked) for t in choices]
    least, path = max((min(x.stored(1) for x in tried[p]) / w.nbytes, p) for p, w in weights.items())
    if least > cfg.ratio:
        shape = "×".join(map(str, weights[path].shape))
        raise UserError(
            f"ratio {cfg.ratio} leaves {path} ({shape}) not one atom; the smallest possible is {least + 5e-4:.3f}: "
            f"give --ratio {least + 5e-4:.3f} or more, or --skip it"
        )
    found = []
    for path, w in weights.items():
        able = [replace(x, rank=largest(x)) for x in tried[path] if x.stored(1) <= x.asked]
        found.append(able[0] if len(able) == 1 else min(able, key=partial(residual, w, cfg.sweeps)))
    return filled_up(found)


def largest(layer: Layer) -> int:
    """The most atoms that stay within the bytes asked for."""
    most = int(layer.asked) // (layer.value * min(layer.rows, layer.columns)) + 1
    return bisect_right(range(1, most + 1), layer.asked, key=layer.stored)


def residual(w: Tensor, sweeps: int, layer: Layer) -> float:
    """‖W − D·S‖_F after the factorisation before training."""
    d, s = factorise(w, layer.rank, layer.blocks, sweeps)
    return float((oriented(w.detach().to(d)) - d @ s).norm())


def filled_up(layers: Sequence[Layer]) -> list[Layer]:
    """One atom more for the layers that miss most of what they asked for, as long as the sum stays within all."""
    made = list(layers)
    left = sum(x.asked for x in made) - sum(x.stored() for x in made)
    for k in sorted(range(len(made)), key=lambda k: made[k].stored() / made[k].asked):
        more = made[k].stored(made[k].rank + 1) - made[k].stored()
        if more <= left:
            made[k], left = replace(made[k], rank=made[k].rank + 1), left - more
    return made
