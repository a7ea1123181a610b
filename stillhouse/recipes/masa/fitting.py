"""MASA without training: groups of blocks, matrix PCA, and a whitened low-rank rest under one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.recipes.masa.config import Config
from stillhouse.students.blocks import alike_blocks
from stillhouse.students.dictionary import allocate, leftovers, matrix_pca, root, spectrum, thin
from stillhouse.students.edits import Edit
from stillhouse.students.edits_shared import Dictionary
from stillhouse.students.moments import cut_runs, lens_drift, second_moments
from stillhouse.students.plan import Plan
from stillhouse.students.projections import projections
from stillhouse.students.sharing import starts


@dataclass
class Part:
    """One dictionary: the layers of one kind in one group of blocks.

    Attributes:
        kind, paths: of the layers. atoms: S. gains: `spectrum` of what each layer's mix leaves. whole: E‖W x‖² of each.
        ranks: of the rest of each.
    """

    kind: str
    paths: list[str]
    shape: torch.Size
    atoms: int
    gains: list[Tensor]
    whole: list[float]
    ranks: tuple[int, ...] = ()

    @property
    def dictionary(self) -> int:
        """Stored values of the dictionary and the codes: S·d·h + S·L."""
        return self.atoms * (self.shape.numel() + len(self.paths))

    @property
    def stored(self) -> int:
        """All stored values: S·d·h + S·L + Σ q_l (d + h)."""
        return self.dictionary + sum(self.ranks) * sum(self.shape)

    @property
    def most(self) -> int:
        """The largest rank that two thin factors store in fewer values than the matrix has."""
        return (self.shape.numel() - 1) // sum(self.shape)

    def rows(self) -> list[dict[str, Any]]:
        """A row per layer for the report; ``error``: the part of E‖W x‖² that is lost."""
        return [
            {"layer": p, "kind": self.kind, "atoms": self.atoms, "rank": r, "error": float(g[r:].sum()) / max(w, 1e-30)}
            for p, r, g, w in zip(self.paths, self.ranks, self.gains, self.whole, strict=True)
        ]


@torch.no_grad()
def fitted(
    network: nn.Module, batches: Sequence[Any], cfg: Config, choices: Sequence[int] = ()
) -> tuple[nn.Module, list[Edit], list[Part]]:
    """A copy of a trained network whose attention is shared, fitted in closed form.

    Args:
        network: trained; not changed. batches: inputs, as it is called with them.
        cfg: settings. choices: numbers of atoms to choose from, instead of those of `cfg`.

    Returns:
        The copy, the edits that make its structure from the network's, and what was chosen.

    Raises:
        UserError: layers that are not found, groups or a ratio that cannot be had.
    """
    splits, table = projections(network, cfg.variant, blocks=cfg.blocks, named=cfg.projections)
    home, each = alike_blocks(network, cfg.blocks)
    groups = cfg.groups or max(1, len(each) // 4)
    student = Plan.identity(network).then(*splits).build(network).eval()
    blocks = [f"{home}.{k}" for k in range(len(each))]
    sizes = cut_runs(lens_drift(student, blocks, batches) if groups > 1 else [0.0] * (len(each) - 1), groups)
    moments = second_moments(student, [p for ps in table.values() for p in ps], batches)
    layers: dict[str, Any] = {p: student.get_submodule(p) for ps in table.values() for p in ps}
    weights = {p: layer.weight.detach().clone() for p, layer in layers.items()}
    parts = [
        _part(kind, ps[at : at + size], weights, moments, cfg, choices)
        for at, size in zip(starts(sizes), sizes, strict=True)
        for kind, ps in table.items()
    ]
    _allocate(parts, cfg.ratio)
    edits: list[Edit] = [*splits, *(Dictionary(tuple(p.paths), p.atoms, p.ranks) for p in parts)]
    for edit in edits[len(splits) :]:
        student = edit.apply(student)
    for part in parts:
        _fill(part, layers, weights, moments, cfg)
    return student, edits, parts


def _fill(
    part: Part, layers: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor], cfg: Config
) -> None:
    """Puts the best rest of each rank into the layers of a part, whose factors are zero: their weight is the mix."""
    for path, rank in zip(part.paths, part.ranks, strict=True):
        if rank:
            rest = weights[path] - layers[path].weight
            for own, found in zip(leftovers(layers[path]), thin(rest, rank, _root(moments[path], cfg)), strict=True):
                own.copy_(found)


def _root(moment: Tensor, cfg: Config) -> Tensor | None:
    return root(moment, cfg.damping) if cfg.whiten else None


def _part(
    kind: str,
    paths: list[str],
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    cfg: Config,
    choices: Sequence[int],
) -> Part:
    """A dictionary with the number of atoms that leaves the least error within this part's own share of the budget."""
    own, shape = [weights[p] for p in paths], weights[paths[0]].shape
    roots = [_root(moments[p], cfg) for p in paths]
    whole = [float(spectrum(w, m).sum()) for w, m in zip(own, roots, strict=True)]
    budget = (1 - cfg.ratio) * len(paths) * shape.numel()
    choices = choices or ([cfg.atoms] if cfg.atoms else range(1, len(paths)))
    found: list[tuple[float, Part]] = []
    for s in choices:
        if s > len(paths):
            raise UserError(f"atoms: a group of {len(paths)} blocks takes at most {len(paths)}, got {s}")
        if s * (shape.numel() + len(paths)) > budget:
            continue
        basis = matrix_pca(own, s)
        mixes = (basis.codes @ basis.atoms.flatten(1)).view(-1, *shape)
        gains = [spectrum(w - mix, m) for w, mix, m in zip(own, mixes, roots, strict=True)]
        part = Part(kind, list(paths), shape, s, gains, whole)
        ranks = allocate(gains, [sum(shape)] * len(own), budget - part.dictionary, [part.most] * len(own))
        found.append((sum(float(g[r:].sum()) for g, r in zip(gains, ranks, strict=True)), part))
    if not found:
        least = min(choices, default=1)
        most = 1 - least * (shape.numel() + len(paths)) / (len(paths) * shape.numel())
        raise UserError(
            f"ratio {cfg.ratio} cannot be reached: a group of {len(paths)} blocks with {least} atoms gives up at most "
            f"{max(0.0, most):.3f} of its {kind}; give a smaller ratio or fewer --groups"
        )
    return min(found, key=lambda f: f[0])[1]


def _allocate(parts: Sequence[Part], ratio: float) -> None:
    """Ranks for all layers from what the dictionaries leave of the budget, over all kinds and groups at once."""
    budget = sum((1 - ratio) * len(p.paths) * p.shape.numel() - p.dictionary for p in parts)
    flat = [(p, g) for p in parts for g in p.gains]
    ranks = iter(allocate([g for _, g in flat], [sum(p.shape) for p, _ in flat], budget, [p.most for p, _ in flat]))
    for part in parts:
        part.ranks = tuple(next(ranks) for _ in part.paths)
