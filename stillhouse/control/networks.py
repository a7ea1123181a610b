"""Actor-critic networks, running statistics, and the two kinds of action distributions as pure functions.

A distribution over actions is one tensor: logits (n, A) of discrete actions; means and log standard deviations side
by side, (n, 2d), of continuous ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.control.environments import Spaces
from stillhouse.errors import UserError
from stillhouse.objectives import kl, upcast

LOG_2PI = math.log(2 * math.pi)


def perceptron(sizes: Sequence[int], last_gain: float) -> nn.Sequential:
    """Linear layers with tanh between them, orthogonal weights with gain √2 (the last layer's is given), no bias."""
    layers: list[nn.Module] = [nn.Flatten()]
    pairs = list(itertools.pairwise(sizes))
    for k, (a, b) in enumerate(pairs):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight, last_gain if k == len(pairs) - 1 else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class ActorCritic(nn.Module):
    """Two perceptrons over one observation: what to do, (n, outputs), and what it is worth, (n,).

    Example:
        >>> out, value = ActorCritic((4,), 2)(torch.zeros(3, 4))
        >>> out.shape, value.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, shape: Sequence[int], outputs: int, widths: Sequence[int] = (64, 64)):
        super().__init__()
        sizes = [math.prod(shape), *widths]
        self.actor = perceptron([*sizes, outputs], 0.01)
        self.critic = perceptron([*sizes, 1], 1.0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(obs), self.critic(obs).squeeze(-1)


def check_network(network: nn.Module, spaces: Spaces, name: str) -> None:
    """Raises UserError unless the network gives (actions, value) of the right sizes for a batch of observations."""
    what = "logits" if spaces.discrete else "means"
    wants = f"({what} (n, {spaces.outputs}), values (n,))"
    try:
        with torch.no_grad():
            said = network(torch.zeros(2, *spaces.shape))
    except Exception as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"network {name} does not take observations (n, {_sizes(spaces.shape)}): {why}") from None
    if not isinstance(said, tuple) or len(said) != 2 or not all(isinstance(t, Tensor) for t in said):
        raise UserError(f"network {name} must return {wants}, got a {type(said).__name__}")
    if tuple(said[0].shape) != (2, spaces.outputs) or said[1].numel() != 2:
        got = ", ".join(f"(n, {_sizes(t.shape[1:])})" for t in said)
        raise UserError(f"network {name} must return {wants}, got {got}; the environment decides on the sizes")


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


class Statistics(nn.Module):
    """Running mean and variance of observations, and the spread of discounted rewards, as buffers.

    Observations become (o − mean)/√(var + 1e-8), clipped to ±10; values are given in units of rewards by `scale`, the
    root of the variance of discounted rewards. As it comes it changes nothing.

    Example:
        >>> seen = Statistics((1,))
        >>> seen.update(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 3.0]))
        >>> seen.normal(torch.tensor([[2.0]])).round(decimals=3), round(float(seen.scale), 3)
        (tensor([[1.]]), 1.0)
    """

    mean: Tensor
    var: Tensor
    reward: Tensor  # mean and variance of discounted rewards
    count: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("var", torch.ones(*shape))
        self.register_buffer("reward", torch.tensor([0.0, 1.0]))
        self.register_buffer("count", torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        return (self.reward[1] + 1e-8).sqrt()

    def normal(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) * (self.var + 1e-8).rsqrt()).clamp(-10, 10)

    @torch.no_grad()
    def update(self, obs: Tensor, rewards: Tensor) -> None:
        """Takes in observations (n, …) and discounted rewards (n,); equal to the statistics of all rows so far."""
        n, before = len(obs), float(self.count)
        share = n / (before + n)
        for mean, var, rows in ((self.mean, self.var, obs), (self.reward[0], self.reward[1], rewards)):
            rows = rows.float()
            gap = rows.mean(0) - mean
            spread = rows.var(0, correction=0)
            var.copy_((1 - share) * var + share * spread + share * (1 - share) * gap**2)
            mean.add_((share * gap).to(mean.dtype))
        self.count.add_(n)


class Learner(nn.Module):
    """A network in its environment: from raw observations to a distribution over actions and a value in rewards.

    Args:
        network: ``obs (n, …) -> (logits or means (n, outputs), values (n,))``.
        spaces: of the environment.
        statistics: how observations and values are scaled; several learners may share one; None leaves them.

    Example:
        >>> out, value = Learner(ActorCritic((4,), 2), Spaces((4,), 2))(torch.zeros(3, 4))
        >>> out.shape, value.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, network: nn.Module, spaces: Spaces, statistics: Statistics | None = None):
        super().__init__()
        self.network, self.spaces, self.statistics = network, spaces, statistics
        self.log_std = None if spaces.discrete else nn.Parameter(torch.zeros(spaces.outputs))

    @property
    def scale(self) -> Tensor | float:
        """Rewards per unit of the value network."""
        return 1.0 if self.statistics is None else self.statistics.scale

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        out, value = self.network(self._seen(obs))
        return self._distribution(out), upcast(value).reshape(len(obs)) * self.scale

    def _seen(self, obs: Tensor) -> Tensor:
        return obs if self.statistics is None else self.statistics.normal(obs)

    def _distribution(self, out: Tensor) -> Tensor:
        out = upcast(out)
        return out if self.log_std is None else torch.cat([out, self.log_std.expand_as(out)], -1)

    def actor(self, obs: Tensor) -> Tensor:
        """The distribution alone; our own network's critic is left out of it."""
        seen = self._seen(obs)
        known = isinstance(self.network, ActorCritic)
        return self._distribution(self.network.actor(seen) if known else self.network(seen)[0])  # type: ignore[operator]

    def noise(self, rows: Sequence[int], generator: torch.Generator) -> Tensor:
        """What `choose` turns into actions: Gumbel or Gaussian draws, (*rows, outputs)."""
        if self.spaces.discrete:
            uniform = torch.rand(*rows, self.spaces.outputs, generator=generator).clamp_(1e-20, 1 - 1e-7)
            return uniform.log_().neg_().log_().neg_()
        return torch.randn(*rows, self.spaces.outputs, generator=generator)

    def choose(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions (n,) or (n, outputs), a sample of the distribution: argmax of logits + Gumbel, or μ + σ·ε."""
        return sample(self.actor(obs), noise, self.spaces.discrete)


def sample(out: Tensor, noise: Tensor, discrete: bool) -> Tensor:
    """A draw from a distribution: argmax(logits + Gumbel noise), or μ + σ·Gaussian noise."""
    if discrete:
        return (out + noise).argmax(-1)
    mean, log_std = out.chunk(2, -1)
    return mean + log_std.exp() * noise


def log_prob(out: Tensor, action: Tensor, discrete: bool) -> Tensor:
    """log π(a) per row: of a class, or of a vector under a diagonal Gaussian (summed over its numbers).

    Args:
        out: (n, A) logits, or (n, 2d) means and log standard deviations.
        action: (n,) int64, or (n, d).
        discrete: which of the two.

    Example:
        >>> log_prob(torch.zeros(1, 2), torch.tensor([1]), True)
        tensor([-0.6931])
    """
    if discrete:
        return F.log_softmax(out, -1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
    mean, log_std = out.chunk(2, -1)
    return -(0.5 * ((action - mean) * (-log_std).exp()) ** 2 + log_std + 0.5 * LOG_2PI).sum(-1)


def entropy(out: Tensor, discrete: bool) -> Tensor:
    """Entropy per row, nats: −Σ p log p, or Σ_k log σ_k + d/2·(1 + log 2π)."""
    if discrete:
        log_p = F.log_softmax(out, -1)
        return -(log_p.exp() * log_p).sum(-1)
    _, log_std = out.chunk(2, -1)
    return (log_std + 0.5 * (1 + LOG_2PI)).sum(-1)


def divergence(peer: Tensor, own: Tensor, discrete: bool) -> Tensor:
    """KL(peer ‖ own) of two action distributions per row; the peer is detached.

    Gaussian: Σ_k log(σ/σ̃) + (σ̃² + (μ̃ − μ)²)/(2σ²) − ½, with ~ for the peer.

    Args:
        peer, own: (n, A) or (n, 2d).

    Example:
        >>> divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), discrete=False)
        tensor([0.5000])
    """
    if discrete:
        return kl(peer, own)
    (m, s), (mean, log_std) = peer.detach().chunk(2, -1), own.chunk(2, -1)
    return (log_std - s + ((2 * s).exp() + (m - mean) ** 2) * (-2 * log_std).exp() / 2 - 0.5).sum(-1)
