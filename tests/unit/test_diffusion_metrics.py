"""Distances between distributions, precision and recall, diversity, modes: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stillhouse.diffusion.metrics import (
    Judge,
    diversity,
    energy_distance,
    frechet_distance,
    frechet_gaussian,
    modes,
    precision_recall,
)
from stillhouse.errors import UserError


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(draws(d, d))[0]


def test_frechet_of_commuting_gaussians_by_hand():
    """For covariances with common axes: ‖m_a − m_b‖² + Σ (s_a − s_b)², in any rotation."""
    s_a, s_b = torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([2.0, 2.0, 3.0, 1.0]).double()
    m_a, m_b, q = draws(4), draws(4, seed=1), rotation(4)
    cov_a, cov_b = (q @ (s * s).diag() @ q.T for s in (s_a, s_b))
    expected = float((m_a - m_b).square().sum() + (s_a - s_b).square().sum())
    assert frechet_gaussian(m_a, cov_a, m_b, cov_b) == pytest.approx(expected, abs=1e-10)
    assert frechet_gaussian(m_b, cov_b, m_a, cov_a) == pytest.approx(expected, abs=1e-6)  # singular: root of rounding


def test_frechet_of_gaussians_that_do_not_commute():
    """tr (S_a S_b)^½ is the sum of the roots of the eigenvalues of S_a S_b."""
    x, y = draws(5, 9), draws(5, 9, seed=1)
    cov_a, cov_b, zero = x @ x.T, y @ y.T, torch.zeros(5)
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = float(cov_a.trace() + cov_b.trace() - 2 * cross)
    assert frechet_gaussian(zero, cov_a, zero, cov_b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_samples():
    x = draws(300, 4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x[:, [1, 0, 2, 3]]) > 1e-4
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * float(x.mean(0).square().sum() + torch.cov(x.T).trace()))
    assert frechet_distance(draws(50, 1), draws(40, 1) + 2) > 1  # one feature, unequal numbers


def test_energy_distance_by_hand():
    """Points {0, 1} and {0, 3}: E|a−b| = 6/4; pairs within: 1 and 3; V counts the zero pairs too."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    assert energy_distance(a, b) == pytest.approx(3.0 - 1 - 3)
    assert energy_distance(a, b, unbiased=False) == pytest.approx(3.0 - 0.5 - 1.5)


def test_energy_distance_of_normals_in_closed_form():
    """N(0,1) against N(μ,1): 2 E|D| − 4/√π with D ~ N(μ, 2)."""
    mu, n = 1.5, 4000
    mean = 2 / math.sqrt(math.pi) * math.exp(-(mu**2) / 4) + mu * math.erf(mu / 2)
    expected = 2 * mean - 4 / math.sqrt(math.pi)
    x, y = draws(n, 1), draws(n, 1, seed=1) + mu
    assert energy_distance(x, y) == pytest.approx(expected, abs=0.05)


def test_u_statistic_is_right_on_average_and_v_statistic_is_not():
    pairs = [(draws(20, 2, seed=2 * k), draws(20, 2, seed=2 * k + 1)) for k in range(200)]
    u = torch.tensor([energy_distance(a, b) for a, b in pairs])
    v = torch.tensor([energy_distance(a, b, unbiased=False) for a, b in pairs])
    assert abs(float(u.mean())) < 3 * float(u.std()) / 200**0.5
    assert bool((v >= -1e-12).all())
    # V − U = (mean distance within a)/n + (… b)/n, here 2·√π/20
    assert float((v - u).mean()) == pytest.approx(2 * math.sqrt(math.pi) / 20, rel=0.05)
    assert energy_distance(pairs[0][0], pairs[0][0], unbiased=False) == 0


def test_precision_falls_with_bad_samples_and_recall_with_missing_ones():
    real = draws(200, 2)
    assert precision_recall(real, real) == (1.0, 1.0)
    bad = torch.cat([real[:50], real[:50] + 1000])
    precision, recall = precision_recall(real, bad)
    assert precision == 0.5 and recall < 1
    halves = torch.cat([real, real + 100])
    assert precision_recall(halves, real) == (1.0, 0.5)


def test_precision_recall_radii_by_hand():
    """On 0, 1, 3, 7 with k = 1 the radii are 1, 1, 2, 4: the manifold is [−1, 5] ∪ [3, 11]."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    made = torch.tensor([[-1.0], [-1.1], [10.9], [11.1]])
    assert precision_recall(real, made, k=1)[0] == 0.5


def test_diversity_against_all_pairs():
    x, y = draws(30, 5), torch.arange(30) % 3
    unit = nn.functional.normalize(x, dim=1)
    groups = [unit[y == k] @ unit[y == k].T for k in range(3)]
    expected = torch.stack([1 - (g.sum() - g.trace()) / (10 * 9) for g in groups]).mean()
    assert diversity(x, y) == pytest.approx(float(expected), abs=1e-12)
    with pytest.raises(UserError, match="two samples"):
        diversity(x[:3], torch.arange(3))


def test_modes_of_a_true_mixture_and_of_a_collapsed_one():
    centres, c = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]), 0.1
    true = centres[torch.arange(6000) % 3] + c * draws(6000, 2).float()
    found = modes(true, centres, c)
    assert found["modes"] == 3 and found["share"] > 0.999 and found["within"] == pytest.approx(c, rel=0.03)
    found = modes(centres[torch.tensor([0, 0, 1])], centres, c)
    assert found == {"modes": 2.0, "share": 1.0, "within": 0.0}
    found = modes(torch.full((4, 2), 2.5), centres, c)
    assert found["modes"] == 0 and found["share"] == 0 and math.isnan(found["within"])


def test_a_mode_needs_its_part_of_the_samples():
    centres = torch.tensor([[0.0], [9.0]])
    points = torch.cat([torch.zeros(99, 1), torch.full((1, 1), 9.0)])
    assert modes(points, centres, 0.1)["modes"] == 1
    assert modes(points, centres, 0.1, least=0.005)["modes"] == 2


def test_judge_asks_the_classifier_in_eval_mode_and_in_parts():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 2))
    x, y = draws(70, 3).float(), torch.zeros(70, dtype=torch.int64)
    judge = Judge(net.train(), "0", x, at_once=16)
    logits, features = judge.look(x)
    assert torch.allclose(features, net[0](x), atol=1e-6) and torch.allclose(logits, net[2](net[0](x)), atol=1e-6)
    found = judge(x, y)
    assert found["fd"] == pytest.approx(0, abs=1e-6) and found["precision"] == found["recall"] == 1
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == 0).double().mean()))
    assert "accuracy" not in judge(x)


@pytest.mark.parametrize("measure", [frechet_distance, energy_distance, precision_recall])
def test_sets_that_do_not_fit_are_refused(measure):
    with pytest.raises(UserError, match="two sets of at least"):
        measure(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(UserError, match="two sets of at least"):
        measure(torch.zeros(9, 2), torch.zeros(1, 2))
