"""Teachers and fake scores in closed form: Gaussians, mixtures, particle sets; and quadrature over a normal."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.diffusion.process import Process
from stillhouse.errors import UserError


class Mixture(Denoiser):
    """The exact posterior mean under Σ_k π_k N(m_k, c² I), in the precision of x_t.

    r_k ∝ π_k N(x_t; α m_k, α² c² + σ²), x̂_0 = Σ_k r_k [m_k + α c²/(α² c² + σ²) (x_t − α m_k)]. A condition restricts
    k to one class; −1, which is its `null`, to none. With c = 0 this is the score of a noised set of particles.

    Args:
        means: (K, …). Read at every call and detached, so that the means may be particles that move.
        std: c.
        process: how noise is added.
        weights: π, (K,); None for equal ones.
        classes: (K,) integers; None numbers the components.

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> gaussian = Mixture(torch.tensor([[1.0]]), 0.5, Flow())
        >>> gaussian.view(torch.tensor([[0.5]]), torch.tensor([0.5])).x0  # 1 + 0.5·0.25/(0.25·0.25 + 0.25) · 0
        tensor([[1.]])
    """

    def __init__(
        self,
        means: Tensor,
        std: float | Tensor,
        process: Process,
        *,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ):
        super().__init__(self.predict, process, "sample", null=-1)
        self.means, self.std = means, std
        self.mix = torch.ones(len(means)) if weights is None else weights
        self.classes = torch.arange(len(means)) if classes is None else classes
        if len(self.mix) != len(means) or len(self.classes) != len(means):
            raise UserError(f"Mixture: {len(means)} means, {len(self.mix)} weights, {len(self.classes)} classes")

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition = None, *, camera: Tensor | None = None) -> Tensor:
        x, m = x_t.flatten(1), self.means.detach().to(x_t).flatten(1)
        a, s = (scale.flatten(1) for scale in self.process.scales(t, x))
        c2 = torch.as_tensor(self.std, dtype=x.dtype, device=x.device).square()
        spread = a * a * c2 + s * s
        logits = self.mix.to(x).log() - (x[:, None] - a[:, None] * m).square().sum(-1) / (2 * spread)
        if condition is not None:
            other = self.classes.to(condition.device) != condition[:, None]
            logits = logits.masked_fill(other & (condition >= 0)[:, None], -math.inf)
        mean = logits.softmax(1) @ m
        return (mean + a * c2 / spread * (x - a * mean)).view_as(x_t)

    def sample(self, n: int, generator: torch.Generator, condition: int = -1) -> Tensor:
        """n draws of the mixture, or of one class of it, (n, …) in the precision of the means."""
        mix = self.mix.double() if condition < 0 else self.mix.double() * (self.classes == condition)
        k = torch.multinomial(mix, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means.detach()[k] + self.std * noise


def ring(process: Process, k: int = 8, std: float = 0.1, dtype: torch.dtype = torch.float32) -> Mixture:
    """k Gaussians in the plane, evenly on the circle of radius 1; the class is the component.

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> ring(Flow()).means[2].round(decimals=3).abs().tolist()
        [0.0, 1.0]
    """
    angle = torch.arange(k, dtype=torch.float64) * (2 * math.pi / k)
    return Mixture(torch.stack([angle.cos(), angle.sin()], 1).to(dtype), std, process)


def normal_quadrature(n: int) -> tuple[Tensor, Tensor]:
    """Nodes z and weights w, (n,) float64, with Σ w f(z) = E f(Z), Z ~ N(0, 1), exact for degree 2n − 1.

    Example:
        >>> z, w = normal_quadrature(5)
        >>> round(float((w * z**4).sum()), 12)
        3.0
    """
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(z), torch.from_numpy(w / math.sqrt(2 * math.pi))
