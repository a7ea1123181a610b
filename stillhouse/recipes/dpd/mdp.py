"""The claim behind DPD on exact Markov decision processes: the better of two policies, state by state, and its copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.system import fold


def random_mdps(
    n: int, seed: int, states: int = 20, actions: int = 4, policies: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """n random processes and stochastic policies for each, float64.

    Returns:
        transitions (n, S, A, S), Dirichlet(1) rows; rewards (n, S, A), standard normal; logits (n, policies, S, A),
        normal with standard deviation 2.
    """
    g = torch.Generator().manual_seed(fold("mdp", seed))
    p = -torch.rand(n, states, actions, states, generator=g, dtype=torch.float64).clamp_min(1e-300).log()
    r = torch.randn(n, states, actions, generator=g, dtype=torch.float64)
    logits = 2 * torch.randn(n, policies, states, actions, generator=g, dtype=torch.float64)
    return p / p.sum(-1, keepdim=True), r, logits


def values(p: Tensor, r: Tensor, policy: Tensor, gamma: float) -> Tensor:
    """V = (I − γ P_π)⁻¹ r_π, exactly.

    Args:
        p: (n, S, A, S). r: (n, S, A). policy: (n, S, A) probabilities. gamma: discount.

    Returns:
        (n, S).

    Example:
        >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        >>> values(one, one[..., 0], one[..., 0], 0.5)
        tensor([[2.]], dtype=torch.float64)
    """
    moves = torch.einsum("nsa,nsat->nst", policy, p)
    gains = (policy * r).sum(-1)
    return torch.linalg.solve(torch.eye(p.shape[1], dtype=p.dtype) - gamma * moves, gains)


def study(n: int = 200, seed: int = 0, gamma: float = 0.9, tolerance: float = 1e-4) -> dict[str, Any]:
    """The hybrid of two policies, and a tabular softmax policy that is distilled towards it, in n processes.

    The hybrid follows in each state the policy with the higher value. The copy starts as the first policy and descends
    1[ξ(s) > 0] KL(π̃(·|s) ‖ π(·|s)) in every state, by gradient steps, until no KL exceeds `tolerance`; ξ is of the
    start and stays.

    Returns:
        ``hybrid``: least V_hybrid − max(V, Ṽ) over all states and processes; ``copy``: the same of the distilled
        policy at the end; ``dip``: least V − V_start on the way; ``behind``: part of states with ξ > 0; ``steps``.
    """
    p, r, logits = random_mdps(n, seed)
    own, peer = logits.softmax(-1).unbind(1)
    start, other = values(p, r, own, gamma), values(p, r, peer, gamma)
    best, behind = torch.maximum(start, other), other > start
    hybrid = values(p, r, torch.where(behind.unsqueeze(-1), peer, own), gamma)
    z, dip, steps, gap = logits[:, 0].clone(), 0.0, 0, torch.ones(1)
    while float(gap.max()) > tolerance and steps < 20_000:
        # ∂KL(π̃ ‖ softmax(z))/∂z = softmax(z) − π̃; its curvature is at most the largest probability.
        q = z.softmax(-1)
        z -= 1.9 * behind.unsqueeze(-1) * (q - peer) / q.amax(-1, keepdim=True)
        gap = (peer * (logits[:, 1].log_softmax(-1) - z.log_softmax(-1))).sum(-1)[behind]
        if steps < 100 or steps % 50 == 0:
            dip = min(dip, float((values(p, r, z.softmax(-1), gamma) - start).min()))
        steps += 1
    end = values(p, r, z.softmax(-1), gamma)
    found = {"hybrid": (hybrid - best).min(), "copy": (end - best).min(), "behind": behind.double().mean()}
    return {**{k: float(v) for k, v in found.items()}, "dip": dip, "processes": n, "steps": steps}
