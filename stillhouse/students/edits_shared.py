"""Plan edits that share weights: layers mixed from one dictionary, and fused layers taken apart for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import UserError
from stillhouse.students.dictionary import Mix, matrix_pca
from stillhouse.students.edits import module_at, put_at


@dataclass(frozen=True)
class Dictionary:
    """Linear layers of one shape whose weights are mixes of a few shared matrices, W_l = Σ_s c_ls D_s + A_l·B_l.

    They start from `matrix_pca` of the layers' weights, with A and B zero. On disk the dictionary stands once, under
    the first layer's name, beside the codes and the thin factors.

    Attributes:
        modules: paths of the layers.
        atoms: S, matrices in the dictionary.
        ranks: of A·B, one for each layer; empty for none.
    """

    kind: ClassVar[str] = "dictionary"
    modules: tuple[str, ...]
    atoms: int
    ranks: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """The first of the layers, which holds the dictionary."""
        return self.modules[0]

    def apply(self, model: nn.Module) -> nn.Module:
        layers = [module_at(model, p, (nn.Linear,), "mixed from a dictionary") for p in self.modules]
        for path, layer in zip(self.modules, layers, strict=True):
            if parametrize.is_parametrized(layer, "weight"):
                raise UserError(f"{path}: its weight is already a function of others; bake it first")
            if layer.weight.shape != layers[0].weight.shape:
                shapes = [tuple(x.weight.shape) for x in (layers[0], layer)]
                raise UserError(f"{path}: a dictionary has one shape, {self.module} has {shapes[0]}, this {shapes[1]}")
        if not 0 <= self.atoms <= len(layers):
            raise UserError(f"{self.module}: {len(layers)} layers take 0 to {len(layers)} atoms, got {self.atoms}")
        ranks, full = self.ranks or (0,) * len(layers), min(layers[0].weight.shape)
        if len(ranks) != len(layers) or not all(0 <= r <= full for r in ranks):
            raise UserError(f"{self.module}: {len(layers)} ranks of 0 to {full} are needed, got {list(ranks)}")
        found = matrix_pca([x.weight for x in layers], self.atoms)
        atoms = nn.Parameter(found.atoms.to(layers[0].weight), layers[0].weight.requires_grad)
        for layer, rank in zip(layers, ranks, strict=True):
            parametrize.register_parametrization(layer, "weight", Mix(atoms, rank))
        return model

    @property
    def _held(self) -> list[str]:
        """Names of the dictionary among the network's tensors; all stand for the first."""
        return [f"{m}.parametrizations.weight.0.atoms" for m in self.modules]

    def encode(self, tensors: dict[str, Tensor]) -> None:
        """Leaves one of the names of the dictionary."""
        for name in self._held[1:]:
            del tensors[name]

    def decode(self, tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        """Puts the dictionary under all its names."""
        for name in self._held[1:]:
            tensors[name] = tensors[self._held[0]]

    def facts(self) -> dict[str, Any]:
        return {"modules": list(self.modules), "atoms": self.atoms, "ranks": list(self.ranks)}


class Joint(nn.Module):
    """Several layers that read the same input, their outputs side by side along the last axis."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        for k, part in enumerate(parts):
            self.add_module(str(k), part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], -1)


@dataclass(frozen=True)
class Split:
    """A fused linear layer, such as the queries, keys and values of one attention, as a `Joint` of its parts.

    transformers' Conv1D, whose weight is (in, out), becomes linear layers; with one size it is only turned.

    Attributes:
        module: path of the layer.
        sizes: outputs of each part, in order; they add up to the layer's.
    """

    kind: ClassVar[str] = "split"
    module: str
    sizes: tuple[int, ...]

    def apply(self, model: nn.Module) -> nn.Module:
        layer = module_at(model, self.module, (nn.Module,), "split")
        turned = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
        if not turned and not isinstance(layer, nn.Linear):
            raise UserError(f"{self.module}: a {type(layer).__name__} cannot be split; expected Linear or Conv1D")
        weight = layer.weight.detach().T if turned else layer.weight.detach()
        if min(self.sizes, default=0) < 1 or sum(self.sizes) != len(weight):
            raise UserError(f"{self.module}: parts {list(self.sizes)} must add up to its {len(weight)} outputs")
        moved: bool = layer.weight.requires_grad
        parts: list[nn.Module] = []
        for w, b in zip(weight.split(self.sizes), self._biases(layer), strict=True):
            part = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, device="meta")
            part.weight = nn.Parameter(w.clone(memory_format=torch.contiguous_format), moved)
            if b is not None:
                part.bias = nn.Parameter(b.clone(), moved)
            parts.append(part)
        return put_at(model, self.module, parts[0] if len(parts) == 1 else Joint(*parts))

    def _biases(self, layer: Any) -> list[Tensor | None]:
        if layer.bias is None:
            return [None] * len(self.sizes)
        return list(layer.bias.detach().split(self.sizes))

    def facts(self) -> dict[str, Any]:
        return {"module": self.module, "sizes": list(self.sizes)}
