"""The codes of a MASA network while it is trained: made by a small network from one embedding per block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.students.dictionary import codes


def unit_rows(c: Tensor) -> Tensor:
    """Rows with Σ_s c_s² = 1: a mix then varies as much as its atoms do."""
    return c / c.norm(dim=-1, keepdim=True).clamp(min=1e-12)


class Coefficients(nn.Module):
    """c_l^p = H_p · GELU(B · GELU(A e_l)) for block l and each kind p of projection.

    At the start every row is another random direction with Σ_s c² = 1, as long as there are no more blocks than
    `hidden`: the heads are what gives that. A block whose code began near zero would stay behind.

    Args:
        blocks: L. atoms: S of each kind. embedding, hidden: widths of e_l and of the MLP.
        seed: of the first weights.
    """

    def __init__(self, blocks: int, atoms: Mapping[str, int], embedding: int = 32, hidden: int = 64, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(blocks, embedding))
            self.trunk = nn.Sequential(nn.Linear(embedding, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
            self.heads = nn.ModuleDict({kind: nn.Linear(hidden, s, bias=False) for kind, s in atoms.items()})
            for layer in self.trunk[::2]:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
            with torch.no_grad():
                back = torch.linalg.pinv(self.trunk(self.embedding))  # (hidden, L)
                for kind, s in atoms.items():
                    self.heads[kind].weight.copy_((back @ unit_rows(torch.randn(blocks, s))).T)  # type: ignore

    def forward(self) -> dict[str, Tensor]:
        """kind -> (L, S)."""
        h = self.trunk(self.embedding)
        return {kind: head(h) for kind, head in self.heads.items()}


class Coded(nn.Module):
    """A network with dictionaries whose codes come from `Coefficients`; `finish` writes them down and drops the rest.

    Args:
        model: with `Dictionary` edits. paths: kind -> its layers, one per block. coefficients: what makes the codes.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, Sequence[str]], coefficients: Coefficients):
        super().__init__()
        self.model, self.coefficients, self._paths = model, coefficients, dict(paths)
        for layer in self._layers():
            codes(layer).requires_grad_(False)

    def _layers(self) -> list[nn.Module]:
        return [self.model.get_submodule(p) for each in self._paths.values() for p in each]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.coefficients()
        own = {
            f"{path}.parametrizations.weight.original0": c
            for kind, each in self._paths.items()
            for path, c in zip(each, made[kind], strict=True)
        }
        return functional_call(self.model, own, args, kwargs)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The network alone, with the codes as its own; it computes what this does."""
        made = self.coefficients()
        rows = [c for kind in self._paths for c in made[kind]]
        for layer, c in zip(self._layers(), rows, strict=True):
            codes(layer).copy_(c).requires_grad_(True)
        return self.model
