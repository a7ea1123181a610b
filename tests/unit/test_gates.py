"""Hard-concrete gates: their distribution, their expectation, and the budget that closes them."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.students.gates import Budget, HardConcrete


@pytest.mark.parametrize("a", [-2.0, 0.0, 1.5])
def test_the_part_that_opens_is_the_probability(a):
    gates = HardConcrete(100_000, start=a)
    z = gates(torch.Generator().manual_seed(0)).detach()
    want = 1 / (1 + math.exp(-(a + 2 / 3 * math.log(11))))
    assert abs(float((z > 0).float().mean()) - want) < 0.01
    assert torch.allclose(gates.open_probability(), torch.tensor(want), atol=1e-6)
    assert float(z.min()) == 0 and float(z.max()) == 1 and gates.open_probability().shape == (100_000,)
    if a == 0:
        assert abs(want - 0.8318) < 1e-4


def test_eval_is_fixed_and_training_follows_its_generator():
    gates = HardConcrete(3, 4, start=0.5)
    same = [gates(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], gates(torch.Generator().manual_seed(4)))
    fixed = gates.eval()()
    assert torch.equal(fixed, gates()) and torch.allclose(fixed, torch.sigmoid(torch.tensor(0.75)) * 1.2 - 0.1)


def test_the_gradient_is_that_of_the_stretched_sigmoid():
    gates = HardConcrete(50, start=0.0).double()
    u = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = gates(torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(z.sum(), gates.log_alpha)
    s, inner = torch.sigmoid(u.logit() * 1.5), (z.detach() > 0) & (z.detach() < 1)
    assert inner.any() and not inner.all() and torch.allclose(grad, s * (1 - s) * 1.5 * 1.2 * inner)


def test_kept_gates_are_the_likeliest():
    gates = HardConcrete(4)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([3.0, -9.0, 4.0, -8.0]))
    assert gates.kept().tolist() == [True, False, True, False] == gates.kept(2).tolist()
    assert gates.kept(3).tolist() == [True, False, True, True]
    gates.clamp_()
    assert gates.log_alpha.min().item() == pytest.approx(math.log(0.01))


def test_the_budget_is_one_sided_and_ascends():
    budget = Budget(10.0)
    assert budget(torch.tensor(0.6), 0.5).item() == 0
    budget(torch.tensor(0.3), 0.5).backward()
    assert torch.allclose(budget.first.grad, torch.tensor(0.2)) and torch.allclose(
        budget.second.grad, torch.tensor(0.04)
    )
    torch.optim.SGD(budget.parameters(), lr=1.0, maximize=True).step()
    assert budget.first.item() > 10


def test_gates_close_until_the_budget_is_met():
    torch.manual_seed(0)
    gates, budget, worth = HardConcrete(50, start=3.0), Budget(1.0), torch.linspace(0, 1, 50)
    down = torch.optim.Adam(gates.parameters(), lr=0.1)
    up = torch.optim.Adam(budget.parameters(), lr=0.1, maximize=True)
    for _ in range(300):
        down.zero_grad()
        up.zero_grad()
        loss = ((1 - gates()) * worth).sum() / 50 + budget(1 - gates.open_probability().mean(), 0.5)
        loss.backward()
        down.step()
        up.step()
        gates.clamp_()
    kept = gates.kept()
    assert 1 - float(gates.open_probability().detach().mean()) >= 0.48
    assert float(worth[kept].mean()) > float(worth[~kept].mean())  # what is worth more stays


def test_no_gates():
    with pytest.raises(UserError, match="at least 1"):
        HardConcrete(0)
