"""The plan edit for weights that are stored as dense × sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.students.dense_sparse import Blocks, dense_sparse, factorise, fill
from stillhouse.students.edits import module_at, put_at
from stillhouse.students.packing import pack, unpack


@dataclass(frozen=True)
class DenseSparse:
    """A linear layer as a dense one and a sparse one, W ≈ D·S with t values in each block of b rows of S's columns.

    On disk stand D, the values of S, and their places with ⌈log2 b⌉ bits each; the network holds no more than that
    either. See `students.dense_sparse`.

    Attributes:
        module: path of the layer.
        rank: columns of D.
        block, nonzeros: b and t; with t = b this is low rank, without places.
        sweeps: of the factorisation that the two layers start from; 0 leaves them empty, for weights from a file.
    """

    kind: ClassVar[str] = "dense-sparse"
    module: str
    rank: int
    block: int = 16
    nonzeros: int = 1
    sweeps: int = 50

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.block, self.nonzeros)

    def apply(self, model: nn.Module) -> nn.Module:
        layer = module_at(model, self.module, (nn.Linear,), "dense × sparse")
        self.blocks.check()
        if self.rank < 1:
            raise UserError(f"{self.module}: dense × sparse needs a rank from 1, got {self.rank}")
        made = dense_sparse(layer, self.rank, self.blocks)
        if self.sweeps:
            fill(made, *factorise(layer.weight, self.rank, self.blocks, self.sweeps))
        return put_at(model, self.module, made)

    @property
    def _index(self) -> str:
        return f"{self.module}.sparse.index" if self.module else "sparse.index"

    def encode(self, tensors: dict[str, Tensor]) -> None:
        """Puts the places into whole bytes."""
        if self.blocks.bits:
            tensors[self._index] = pack(tensors[self._index], self.blocks.bits)

    def decode(self, tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        """Takes the places out of the bytes."""
        if self.blocks.bits:
            shape = shapes[self._index]
            tensors[self._index] = unpack(tensors[self._index], self.blocks.bits, shape.numel()).byte().view(shape)

    def facts(self) -> dict[str, Any]:
        sizes = {"rank": self.rank, "block": self.block, "nonzeros": self.nonzeros}
        return {"module": self.module, **sizes, "sweeps": self.sweeps}
