"""Which linear layers become two thin ones, and with which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.edits import Factor, full_rank, largest_paying_rank
from stillhouse.students.lowrank import READERS, factorable
from stillhouse.students.parametrized import weight_layers
from stillhouse.system import fold

# Left whole by the released code; `classifier` is what transformers calls a head.
ENDS = ("norm", "head", "head_dist", "classifier", "cls", "patch_embed", "downsample")
FURTHER = {"SwinTransformer": ("attn.proj",)}  # by class of the network, as released


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


def choose(
    model: nn.Module, include: Sequence[str] = (), skip: Sequence[str] = (), least_outputs: int = 10
) -> list[str]:
    """Paths of the linear layers that are to be factorised.

    Args:
        include: paths or patterns; empty takes every linear layer outside `ENDS`.
        skip: names left whole: a path, a part of paths such as ``attn.proj``, or a pattern.
        least_outputs: layers with fewer outputs stay whole.

    Raises:
        UserError: a name the model does not have; a layer that is named and cannot be factorised; none is left.
    """
    paths = [n for n, _ in model.named_modules() if n]

    def under(word: str) -> list[str]:
        """The patterns for a name wherever it stands, of which some module is meant; the word itself if none is."""
        forms = [word, f"*.{word}", f"*.{word}.*"]
        return [f for f in forms if any(fnmatchcase(p, f) for p in paths)]

    usual = () if include else (*ENDS, *FURTHER.get(type(model).__name__, ()))
    left = [f for word in usual for f in under(word)] + [f for word in skip for f in under(word) or [word]]
    found = weight_layers(model, (nn.Linear,), include, left)
    able, chosen = set(factorable(model)), []
    for path in found:
        if path not in able and path in include:
            raise UserError(f"{path}: {_why(model, path)}; leave it out")
        if path in able and full_rank(model.get_submodule(path))[0] >= least_outputs:  # type: ignore[arg-type]
            chosen.append(path)
    if not chosen:
        raise UserError(f"{type(model).__name__} has no linear layer left to factorise; give --modules or fewer --skip")
    return chosen


def _why(model: nn.Module, path: str) -> str:
    """Why two thin layers cannot stand for this one."""
    names = path.split(".")
    for parent in (model.get_submodule(".".join(names[:k])) for k in reversed(range(len(names)))):
        if isinstance(parent, READERS):
            return f"{type(parent).__name__} reads the weight of this layer itself and cannot do with two"
    if not largest_paying_rank(model.get_submodule(path)):  # type: ignore[arg-type]
        return "no rank pays for a layer this small"
    return "its weight is tied to another layer's, or a function of others, so two thin layers would add weights"


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
