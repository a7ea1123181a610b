"""With which rank linear layers become two thin ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.edits import Factor, full_rank, largest_paying_rank
from stillhouse.system import fold


@dataclass(frozen=True)
class Thin:
    """One chosen layer: its path, rows and columns of its weight, the rank between, and the weights asked for."""

    module: str
    rows: int
    columns: int
    rank: int
    asked: float

    @property
    def edit(self) -> Factor:
        return Factor(self.module, self.rank)

    @property
    def kept(self) -> int:
        """Weights of the two thin layers, r·(in + out); the bias stays beside them."""
        return self.rank * (self.rows + self.columns)

    @property
    def met(self) -> bool:
        """Within 1 % of what was asked for, or within one rank."""
        return abs(self.kept - self.asked) <= max(0.01 * self.asked, self.rows + self.columns)


def rank_for(layer: nn.Linear, ratio: float) -> int:
    """r = ⌊in·out / (c·(in + out))⌋, at least 1 and at most min(in, out): the pair has 1/c of the weights.

    Example:
        >>> rank_for(nn.Linear(64, 192), 2.0)
        24
    """
    rows, columns = full_rank(layer)
    return max(1, min(int(rows * columns / (ratio * (rows + columns))), rows, columns))


def thin_layers(model: nn.Module, paths: Sequence[str], ratio: float, rank: int = 0) -> list[Thin]:
    """Ranks for the chosen layers: by `ratio`, or `rank` for all of them.

    Raises:
        UserError: a rank that does not make a layer smaller; says the largest that does.
    """
    made = []
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        rows, columns = full_rank(layer)
        most, r = largest_paying_rank(layer), rank or rank_for(layer, ratio)
        if r > most:
            cure = f"give --rank {most} or less, or --skip it" if most else "--skip it"
            raise UserError(
                f"{path}: rank {r} does not pay; two thin layers have fewer weights than one of {rows}×{columns} up to "
                f"rank {most}: {cure}"
            )
        made.append(Thin(path, rows, columns, r, rank * (rows + columns) if rank else rows * columns / ratio))
    return made


def refresh(model: nn.Module, layers: Sequence[Thin], seed: int) -> None:
    """Fresh weights in place of the singular vectors, as a new network would have, in place."""
    with torch.random.fork_rng(devices=[]):
        for thin in layers:
            torch.manual_seed(fold("thin", seed, thin.module))
            pair = model.get_submodule(thin.module)
            for part in pair.children():
                part.reset_parameters()  # type: ignore[operator]
