"""NormalFloat: codes of few bits whose points are quantiles of a normal distribution, as weights roughly have."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.students.packing import Code, grouped
from stillhouse.students.projectors import EPS, Quantizer


def normal_points(bits: int = 4) -> Tensor:
    """The 2^b points of NormalFloat in [−1, 1], (2^b,) float32 ascending, with an exact 0 and both ends.

    Φ⁻¹ at 2^{b−1} even steps from δ to 1/2 above zero, at one fewer below, over the largest; 1 − δ is the mean of
    1/2^{b+1} and 1/(2^{b+1} − 2).

    Source: Dettmers et al., QLoRA, arXiv 2305.14314 (NF4).

    Example:
        >>> points = normal_points()
        >>> len(points), float(points[7]), [round(float(p), 4) for p in points[-3:]]
        (16, 0.0, [0.5626, 0.723, 1.0])
    """
    half, twice = 2 ** (bits - 1), 2 ** (bits + 1)
    last = 1 - (1 / twice + 1 / (twice - 2)) / 2
    above = torch.special.ndtri(torch.linspace(last, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = torch.special.ndtri(torch.linspace(last, 0.5, half, dtype=torch.float64)[:-1])
    points = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (points / above.max()).float()


class NormalFloat(Quantizer):
    """scale_g · p_k, scale_g = max|w_g| over buckets of 64 values, p the points of `normal_points`: NF4 at 4 bits.

    Zero stays exactly zero. At 4 bits a weight takes 4 + 32/64 bits on disk.

    Args:
        bits: of a code, 2 to 8. group: values with one scale, see `Quantizer`.

    Example:
        >>> w = torch.tensor([[2.0, -0.1, 0.0, 1.1]])
        >>> [round(v, 3) for v in NormalFloat()(w)[0].tolist()]  # 2 · (1, −0.091, 0, 0.563)
        [2.0, -0.182, 0.0, 1.125]
    """

    points: Tensor
    least = 2

    def __init__(self, bits: int = 4, group: int = 64):
        super().__init__(bits, group)
        self.register_buffer("points", normal_points(bits), persistent=False)

    def code(self, w: Tensor) -> Code:
        scale = grouped(w.float(), self.group).abs().amax(1)
        scale = torch.where(scale < EPS, torch.ones_like(scale), scale)
        return Code(self.points.to(w.device), scale, torch.zeros_like(scale), self.bits, self.group)
