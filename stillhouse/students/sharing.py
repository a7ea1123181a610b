"""Blocks that share weights by stages, and lists of sources for networks of other depths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from stillhouse.errors import UserError


def even_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Sizes of `stages` runs of layers, as even as they get; ends are rounded, so that spare layers fall in the middle.

    Example:
        >>> even_stages(16, 5), even_stages(8, 4)
        ((3, 3, 4, 3, 3), (2, 2, 2, 2))
    """
    if not 1 <= stages <= layers:
        raise UserError(f"{layers} layers make 1 to {layers} stages, got {stages}")
    ends = [(2 * k * layers + stages) // (2 * stages) for k in range(stages + 1)]
    return tuple(b - a for a, b in itertools.pairwise(ends))


def spread(depth: int, blocks: int) -> tuple[int, ...]:
    """Sources for `depth` layers out of `blocks` blocks, in order, each used as often as the others.

    Spare layers go to the early blocks: n_m = ⌊d/M⌋ + [m < d mod M] (SWS, arXiv 2404.16897, for d ≥ M). Fewer layers
    than blocks take evenly spaced ones, the first and the last among them.

    Example:
        >>> spread(12, 5), spread(3, 5)
        ((0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4), (0, 2, 4))
    """
    if depth < 1 or blocks < 1:
        raise UserError(f"a network has at least one layer and one block to copy, got depth {depth} of {blocks} blocks")
    if depth >= blocks:
        counts = [depth // blocks + (m < depth % blocks) for m in range(blocks)]
        return tuple(m for m, n in enumerate(counts) for _ in range(n))
    last = max(1, depth - 1)
    return tuple((2 * j * (blocks - 1) + last) // (2 * last) for j in range(depth))


def starts(stages: Sequence[int]) -> tuple[int, ...]:
    """The first layer of every stage.

    Example:
        >>> starts((3, 3, 4))
        (0, 3, 6)
    """
    return tuple(sum(stages[:m]) for m in range(len(stages)))


def share_by_stage(blocks: Sequence[nn.Module], stages: Sequence[int]) -> None:
    """Gives all blocks of a stage the parameters and buffers of its first one, in place.

    The blocks stay modules of their own, so what is no tensor stays apart: the rate of stochastic depth, a layer's
    index. A shared parameter is one parameter for an optimiser; its gradient is the sum over the layers.

    Args:
        blocks: alike (`blocks.alike_blocks`). stages: sizes, which add up to the number of blocks.

    Raises:
        UserError: sizes that do not add up, or below 1.

    Example:
        >>> layers = [nn.Linear(2, 2) for _ in range(3)]
        >>> share_by_stage(layers, (2, 1))
        >>> layers[0].weight is layers[1].weight, layers[1].weight is layers[2].weight
        (True, False)
    """
    if min(stages, default=0) < 1 or sum(stages) != len(blocks):
        sizes = " ".join(map(str, stages))
        raise UserError(
            f"stages {sizes} are {sum(stages)} layers, but there are {len(blocks)}; sizes from 1 must add up"
        )
    for first, size in zip(starts(stages), stages, strict=True):
        owner = dict(blocks[first].named_modules())
        for block in blocks[first + 1 : first + size]:
            for name, module in block.named_modules():
                module._parameters.update(owner[name]._parameters)
                module._buffers.update(owner[name]._buffers)
