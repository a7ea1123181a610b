"""Learned networks for points in the plane, against a teacher in closed form: a gate that takes seconds."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
from torch import Tensor, nn

from stillhouse.data.sources import Drawn
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.denoising import Denoising
from stillhouse.diffusion.exact import Mixture
from stillhouse.engine import fit
from stillhouse.run import Run
from stillhouse.system import fold


class Planar(nn.Module):
    """A multilayer perceptron over (x, t, sin πt, cos πt, sin 2πt, cos 2πt) with SiLU, t in [0, 1].

    Example:
        >>> Planar()(torch.zeros(3, 2), torch.zeros(3)).shape
        torch.Size([3, 2])
    """

    def __init__(self, width: int = 96, depth: int = 3, size: int = 2):
        super().__init__()
        widths = [size + 5, *[width] * depth]
        hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, size))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angle = math.pi * timestep[:, None].to(sample.dtype)
        features = [angle / math.pi, angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()]
        return self.layers(torch.cat([sample, *features], 1))


def planar_denoiser(run: Run, teacher: Mixture, *, steps: int = 2500, batch: int = 256, lr: float = 3e-3) -> Denoiser:
    """A `Planar` network that has learned x̂_0 of a mixture in the plane, without its conditions; kept in the run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(run.seed, "planar"))
        network = Planar()
    learn = Denoising(
        Denoiser(network, teacher.process, "sample"), drop=0.0, ema=0.99, optimizer=partial(torch.optim.Adam, lr=lr)
    )
    points = Drawn(lambda n, g: {"input": teacher.sample(n, g)}, batch, "points of the mixture")
    return fit(run, "planar", learn, points, steps=steps).outcome()
