"""The state of a growing task: which pool samples were taken in, under which label, and what the bank says of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.data import Samples, Subset
from stillhouse.data.pools import Joined, Labelled
from stillhouse.evaluate import predict
from stillhouse.recipes.wad.bank import similarities, smallest


@dataclass
class Growth:
    """Labelled samples, a pool, and what has gone from the one to the other.

    Attributes:
        labelled: of K classes. pool: ids are positions in it.
        taken: position in the pool → label, of the samples that count as labelled now.
        moved: one row for each sample taken in or given back: position, label, round, and why.
    """

    labelled: Samples
    pool: Samples
    taken: dict[int, int] = field(default_factory=dict)
    moved: list[dict[str, Any]] = field(default_factory=list)

    @property
    def positions(self) -> np.ndarray:
        """Of the samples taken in, ascending."""
        return np.array(sorted(self.taken), np.int64)

    @property
    def left(self) -> np.ndarray:
        """Positions of the samples still in the pool."""
        return np.setdiff1d(np.arange(len(self.pool)), self.positions)

    @property
    def names(self) -> np.ndarray:
        """Labels of the bank: of the labelled samples, then of those taken in."""
        return np.array([*self.labelled.labels, *(self.taken[p] for p in self.positions.tolist())], np.int64)

    @property
    def known(self) -> Samples:
        """All samples that count as labelled."""
        new = self.names[len(self.labelled) :]
        return Joined([self.labelled, Labelled(Subset(self.pool, self.positions), new, self.labelled.classes)])

    def similarities(self, of_labelled: Tensor, of_pool: Tensor) -> Tensor:
        """Of every pool sample to every class of the bank, (N, K), from features (n, d) and (N, d)."""
        bank = torch.cat([of_labelled, of_pool[self.positions]])
        return similarities(of_pool, bank, torch.from_numpy(self.names), len(self.labelled.classes))

    def take_in(self, rows: Sequence[dict[str, Any]]) -> None:
        """The rows of `easiest`."""
        self.taken |= {row["position"]: row["label"] for row in rows}
        self.moved += rows

    def give_back(self, of_labelled: Tensor, of_pool: Tensor, r: int) -> None:
        """Samples taken in whose nearest other sample of the bank now has another label go back to the pool."""
        at = self.positions
        if not len(at):
            return
        bank, names = torch.cat([of_labelled, of_pool[at]]), torch.from_numpy(self.names)
        itself = len(self.labelled) + torch.arange(len(at))
        said = similarities(of_pool[at], bank, names, len(self.labelled.classes), itself=itself).argmax(1)
        for p in at[(said != names[len(self.labelled) :]).numpy()].tolist():
            self.moved.append({"position": p, "label": self.taken.pop(p), "round": r, "given_back": True})

    def easiest(
        self, network: nn.Module, pseudo: Tensor, weight: Tensor, part: float, r: int, device: Any
    ) -> list[dict[str, Any]]:
        """The ⌊part·|left|⌋ samples whose pseudo-label the student finds easiest to believe.

        That is the least cross-entropy, in eval mode and of the plain input.

        Args:
            pseudo, weight: (N,) of the whole pool.
        """
        left = self.left
        z, _ = predict(network, Subset(self.pool, left), device=device)
        losses = O.cross_entropy(z, pseudo[left])
        rows = []
        for i in smallest(losses, part).tolist():
            p = int(left[i])
            row = {"position": p, "label": int(pseudo[p]), "round": r, "weight": float(weight[p])}
            rows.append({**row, "loss": float(losses[i])})
        return rows
