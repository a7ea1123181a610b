"""Hypergradients against finite differences, explicit Hessians and unrolled steps, all in float64."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.bilevel import one_step

GAMMA, D = 0.07, torch.float64


def network() -> nn.Module:
    """Smooth, with a parameter that neither loss reaches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)).double()
        model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=D)))
    return model


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=D)
V = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=D)
Y = torch.arange(5) % 3
OMEGA = torch.tensor([0.7, 0.3], dtype=D)
SCALE = {"0.weight": 0.5, "0.bias": 0.25}


def problem(detach: bool = True):
    """Two 'peers', the halves of the output: each learns labels and, from the other, its distribution."""
    model = network()

    def predict(p: dict[str, Tensor], x: Tensor = X) -> Tensor:
        return functional_call(model, p, (x,)).view(len(x), 2, 3).transpose(0, 1)

    def terms(z: Tensor, fixed: Tensor) -> Tensor:
        t = fixed if detach else z
        rows = []
        for i in range(2):
            kl = F.kl_div(F.log_softmax(z[1 - i], -1), F.log_softmax(t[i], -1), reduction="batchmean", log_target=True)
            rows.append(F.cross_entropy(z[i], Y) + kl)
        return torch.stack(rows)

    def outer(p: dict[str, Tensor], w: Tensor) -> Tensor:
        return F.cross_entropy(torch.tensordot(w, predict(p, V), 1), Y[:4])

    return predict, terms, outer, dict(model.named_parameters())


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def split(vector: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([p.numel() for p in params.values()])
    return {k: v.view_as(p) for (k, p), v in zip(params.items(), parts, strict=True)}


def factors(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([torch.full((p.numel(),), SCALE.get(k, 1.0), dtype=D) for k, p in params.items()])


@pytest.mark.parametrize("mode", ["grad", "jvp", "fd"])
@pytest.mark.parametrize("detach", [True, False])
def test_after_is_the_total_derivative(mode, detach):
    predict, terms, outer, params = problem(detach)

    def total(omega: Tensor) -> Tensor:
        leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
        z = predict(leaves)
        g = torch.autograd.grad((omega * terms(z, z.detach())).sum(), list(leaves.values()), allow_unused=True)
        moved = {k: p if h is None else p - GAMMA * SCALE.get(k, 1.0) * h for (k, p), h in zip(leaves.items(), g)}
        return outer(moved, omega).detach()

    h = one_step(predict, terms, outer, params, OMEGA, lr=GAMMA, mode=mode, at="after", scale=SCALE)
    eps = 1e-5 * torch.eye(2, dtype=D)
    expected = torch.stack([(total(OMEGA + e) - total(OMEGA - e)) / 2e-5 for e in eps])
    torch.testing.assert_close(h.total, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(h.outer, total(OMEGA))
    torch.testing.assert_close(h.total, h.direct + h.indirect)
    assert h.indirect.abs().max() > 5e-4 and not h.total.requires_grad


@pytest.mark.parametrize("mode", ["grad", "jvp", "fd"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_neumann_equals_dense_hessian(order, mode):
    predict, terms, outer, params = problem()
    theta, s = flat(params.values()), factors(params)
    fixed = predict(params).detach()
    hessian = torch.autograd.functional.hessian(
        lambda t: (OMEGA * terms(predict(split(t, params)), fixed)).sum(), theta
    )
    jacobian = torch.autograd.functional.jacobian(lambda t: terms(predict(split(t, params)), fixed), theta)
    v = torch.autograd.functional.jacobian(lambda t: outer(split(t, params), OMEGA), theta)
    step = torch.eye(len(theta), dtype=D) - GAMMA * hessian * s  # I − γ H S
    summed = sum(torch.linalg.matrix_power(step, k) @ v for k in range(order + 1))
    expected = -GAMMA * jacobian @ (s * summed)
    h = one_step(predict, terms, outer, params, OMEGA, lr=GAMMA, mode=mode, scale=SCALE, neumann=order)
    torch.testing.assert_close(h.indirect, expected, rtol=1e-8, atol=1e-11)
    assert hessian.norm() > 0.1


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_neumann_at_a_stationary_point_is_the_unrolled_derivative(order):
    """There K+1 steps stay at θ, so differentiating through them gives the series exactly."""
    a = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=D), torch.tensor([[1.0, -0.2], [-0.2, 3.0]], dtype=D)
    b = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=D)
    scale, lr = torch.tensor([0.5, 1.0], dtype=D), 0.1

    def losses(x: Tensor) -> Tensor:
        return torch.stack([0.5 * (x - b[i]) @ a[i] @ (x - b[i]) for i in range(2)])

    def outer(x: Tensor, w: Tensor) -> Tensor:
        return (x**2).sum() + (w * x).prod()

    x = torch.linalg.solve(sum(w * m for w, m in zip(OMEGA, a)), sum(w * m @ c for w, m, c in zip(OMEGA, a, b)))

    def unrolled(omega: Tensor) -> Tensor:
        y = x
        for _ in range(order + 1):
            g = sum(w * m @ (y - c) for w, m, c in zip(omega, a, b))
            y = y - lr * scale * g
        return outer(y, omega)

    expected = torch.autograd.functional.jacobian(unrolled, OMEGA)
    found = one_step(
        lambda p: torch.stack([p["x"], p["y"]]), lambda out, _: losses(out),
        lambda p, w: outer(torch.stack([p["x"], p["y"]]), w), {"x": x[0], "y": x[1]}, OMEGA,
        lr=lr, neumann=order, scale={"x": 0.5},
    )  # fmt: skip
    torch.testing.assert_close(found.total, expected)


def test_no_inner_step_leaves_the_direct_term():
    predict, terms, outer, params = problem()
    h = one_step(predict, terms, outer, params, OMEGA, lr=0.0)
    expected = torch.autograd.functional.jacobian(lambda w: outer(params, w), OMEGA)
    torch.testing.assert_close(h.total, expected)
    assert not h.indirect.any()


def test_a_teacher_that_does_not_learn_gets_no_say_through_what_it_is():
    """With detached teachers L_i must not be differentiated in the teacher: else this term would not vanish."""
    predict, _, outer, params = problem()
    terms = lambda z, fixed: torch.stack([(fixed[0] ** 2).sum(), (z[1] ** 2).sum()])  # noqa: E731
    for mode in ("grad", "jvp", "fd"):
        h = one_step(predict, terms, outer, params, OMEGA, lr=GAMMA, mode=mode)  # type: ignore[arg-type]
        assert h.indirect[0] == 0 and h.indirect[1] != 0


def test_means_over_processes_are_taken_before_the_products():
    """Two halves of the data, averaged where `all_mean` says, give the derivative on all of it."""
    _, _, _, params = problem()

    def parts(rows: slice, held: slice):
        model = network()  # one for each thread: functional_call lends a module other tensors while it runs

        def predict(p):
            return functional_call(model, p, (X[:4][rows],)).view(-1, 2, 3).transpose(0, 1)

        def terms(z, fixed):
            return torch.stack([F.cross_entropy(z[i], Y[:4][rows]) for i in range(2)])

        def outer(p, w):
            z = functional_call(model, p, (V[held],)).view(-1, 2, 3).transpose(0, 1)
            return F.cross_entropy(torch.tensordot(w, z, 1), Y[:4][held])

        return predict, terms, outer

    whole = one_step(*parts(slice(0, 4), slice(0, 4)), params, OMEGA, lr=GAMMA, at="after", neumann=1)

    halves, barrier, found = (slice(0, 2), slice(2, 4)), threading.Barrier(2), {}
    table: dict[int, list[Tensor]] = {}

    def worker(rank: int) -> None:
        def all_mean(tensors):
            table[rank] = list(tensors)
            barrier.wait()
            means = [(a + b) / 2 for a, b in zip(table[0], table[1], strict=True)]
            barrier.wait()
            return means

        found[rank] = one_step(
            *parts(halves[rank], halves[rank]), params, OMEGA, lr=GAMMA, mode="grad", at="after", neumann=1,
            all_mean=all_mean,
        )  # fmt: skip

    threads = [threading.Thread(target=worker, args=(r,)) for r in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert set(found) == {0, 1}
    for rank in (0, 1):
        torch.testing.assert_close(found[rank].total, whole.total)


def test_inputs_stay_as_they_were_and_unknown_modes_are_named():
    predict, terms, outer, params = problem()
    before = {k: p.detach().clone() for k, p in params.items()}
    omega = OMEGA.clone().requires_grad_()
    one_step(predict, terms, outer, params, omega, lr=GAMMA, at="after", neumann=1)
    assert all(torch.equal(params[k], v) and params[k].grad is None for k, v in before.items())
    assert omega.grad is None and torch.equal(omega, OMEGA)
    with pytest.raises(ValueError, match="'grad', 'jvp' or 'fd'"):
        one_step(predict, terms, outer, params, OMEGA, lr=GAMMA, mode="vjp")  # type: ignore[arg-type]


def test_attention_has_a_forward_derivative():
    """The fused kernels have none; `jvp` must find another way and agree with backward mode."""
    q = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(3))

    def predict(p):
        return F.scaled_dot_product_attention(q * p["a"], q, q).mean((1, 2, 3))

    def outer(p, w):
        return p["a"].sum() + 0 * w.sum()

    def products(mode):
        theta = {"a": torch.ones(8)}
        return one_step(predict, lambda out, _: out**2, outer, theta, torch.ones(2), lr=1.0, mode=mode).indirect

    torch.testing.assert_close(products("jvp"), products("grad"))
    assert products("jvp").abs().max() > 1e-4
