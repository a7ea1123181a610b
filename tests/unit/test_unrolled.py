"""Unrolled gradient steps: the walk back against the whole graph, finite differences and closed forms, in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.bilevel import unrolled

D, T = torch.float64, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class Problem:
    """A small convolutional net with dropout; two blocks of images and soft labels in turn; one idle parameter."""

    def __init__(self, dropout: float = 0.0, relu: bool = False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            act = nn.ReLU() if relu else nn.Tanh()
            self.net = nn.Sequential(
                nn.Conv2d(1, 3, 3), act, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(12, 4)
            ).double()
            self.net.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=D)))
        self.params = {k: p.detach().clone().requires_grad_() for k, p in self.net.named_parameters()}
        self.x = draw(2, 3, 1, 6, 6, seed=1).requires_grad_()
        self.y = draw(2, 3, 4, seed=2).requires_grad_()
        self.rates = torch.linspace(0.1, 0.5, T, dtype=D).requires_grad_()
        self.unused = torch.zeros(3, dtype=D, requires_grad=True)
        self.real, self.labels = draw(7, 1, 6, 6, seed=3), torch.arange(7) % 4

    def inner(self, p: dict[str, Tensor], k: int, x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        z = functional_call(self.net.train(), p, (x[k % 2],))
        return -(y[k % 2] * F.log_softmax(z, -1)).sum(-1).mean()

    def outer(self, p: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(self.net.eval(), p, (self.real,)), self.labels) + (p["idle"] ** 2).sum()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.y, self.rates, *self.params.values(), self.unused]

    def loss(self, **how) -> Tensor:
        return self.outer(unrolled(self.inner, self.params, self.rates, self.x, self.y, self.unused, **how))

    def grads(self, **how) -> list[Tensor]:
        found = torch.autograd.grad(self.loss(**how), self.leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.leaves)]


def by_hand(p: Problem, momentum: float) -> list[Tensor]:
    """The same loop, written plainly, with torch's own graph."""
    theta, b = dict(p.params), None
    for k in range(T):
        loss = p.inner(theta, k, p.x, p.y, p.unused)
        g = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
        g = [torch.zeros_like(t) if u is None else u for t, u in zip(theta.values(), g)]
        b = g if b is None else [momentum * v + u for v, u in zip(b, g)]
        theta = {n: t - p.rates[k] * v for (n, t), v in zip(theta.items(), b)}
    found = torch.autograd.grad(p.outer(theta), p.leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, p.leaves)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "how", [{"mode": "graph"}, {}, {"segment": 1}, {"segment": 2}, {"segment": 3}, {"segment": 9}], ids=str
)
def test_gradients_are_those_of_the_whole_graph(momentum, how):
    p = Problem()
    expected, found = by_hand(p, momentum), p.grads(momentum=momentum, **how)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)
    assert all(float(e.abs().max()) > 1e-4 for e in expected[:-1]) and not expected[-1].any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_are_finite_differences(momentum):
    p = Problem()
    found = p.grads(momentum=momentum)
    for leaf, g in zip(p.leaves[:-1], found):
        spot = int(g.abs().argmax())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.view(-1)[spot] += sign * 1e-5
                values.append(p.loss(momentum=momentum))
                leaf.view(-1)[spot] -= sign * 1e-5
        torch.testing.assert_close(g.view(-1)[spot], (values[0] - values[1]) / 2e-5, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("how", [{}, {"segment": 1}])
def test_dropout_draws_the_same_masks_on_the_way_back(how):
    p = Problem(dropout=0.5)
    before = torch.get_rng_state()
    a, b = p.grads(seed=3, mode="graph"), p.grads(seed=3, **how)
    for e, f in zip(a, b, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)
    other = p.grads(seed=4, **how)
    assert not torch.allclose(other[0], b[0]) and not torch.allclose(b[0], Problem().grads()[0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("segment", [1, 2])
def test_losses_on_the_way(momentum, segment):
    """Weights after 2, 3 and 5 steps, each with a loss of its own (mid-trajectory matching)."""
    p = Problem()

    def grads(**how) -> tuple[Tensor, ...]:
        marks = [2, 3, 5]
        found = unrolled(p.inner, p.params, p.rates, p.x, p.y, p.unused, momentum=momentum, at=marks, **how)
        loss = sum((i + 1) * p.outer(theta) for i, theta in enumerate(found))
        return torch.autograd.grad(loss, p.leaves[:-1], retain_graph=True)

    for e, f in zip(grads(mode="graph"), grads(segment=segment), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)
    last = unrolled(p.inner, p.params, p.rates, p.x, p.y, p.unused, momentum=momentum, at=[1, T])[1]
    whole = unrolled(p.inner, p.params, p.rates, p.x, p.y, p.unused, momentum=momentum)
    assert all(torch.equal(last[k], whole[k]) for k in whole)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_quadratic_closed_form(momentum):
    """ℓ = a(θ−x)²/2: θ_T − x = c_T (θ_0 − x), with c the recursion of a linear second-order system."""
    a, eta = 0.7, torch.tensor([0.3, 0.2, 0.4], dtype=D, requires_grad=True)
    x, start = (torch.tensor(v, dtype=D, requires_grad=True) for v in (2.0, -1.0))
    theta = unrolled(lambda p, k, x: a * (p["w"] - x) ** 2 / 2, {"w": start}, eta, x, momentum=momentum)["w"]
    c, v = 1.0, 0.0
    for e in eta.tolist():
        v = momentum * v + a * c
        c -= e * v
    assert float(theta.detach()) == pytest.approx(2 - 3 * c, abs=1e-14)
    theta.backward()
    assert float(x.grad) == pytest.approx(1 - c, abs=1e-14) and float(start.grad) == pytest.approx(c, abs=1e-14)
    if not momentum:
        others = [(1 - 0.14) * (1 - 0.28), (1 - 0.21) * (1 - 0.28), (1 - 0.21) * (1 - 0.14)]
        torch.testing.assert_close(eta.grad, torch.tensor([-a * -3 * o for o in others], dtype=D))


def test_what_wrt_and_rates_are_made_of_gets_its_gradient():
    """A learned size shared by all steps, as softplus(r), and images as a function of others."""
    p = Problem()
    r, base = torch.tensor(-1.0, dtype=D, requires_grad=True), draw(2, 3, 1, 6, 6, seed=5).requires_grad_()

    def loss(mode: str) -> Tensor:
        rates = F.softplus(r).expand(T)
        theta = {k: v.detach() for k, v in p.params.items()}
        return p.outer(unrolled(p.inner, theta, rates, base.sin(), p.y.detach(), p.unused.detach(), mode=mode))

    for e, f in zip(*(torch.autograd.grad(loss(m), [r, base]) for m in ("graph", "reverse")), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)
        assert e.abs().max() > 1e-4


def test_attention_can_be_differentiated_twice():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).double()
    x = draw(2, 3, 8).requires_grad_()
    params, rates = dict(net.named_parameters()), torch.full((2,), 0.1, dtype=D)

    def g(mode: str) -> Tensor:
        theta = unrolled(lambda p, k, x: (functional_call(net, p, (x,)) ** 3).mean(), params, rates, x, mode=mode)
        return torch.autograd.grad(sum((t**2).sum() for t in theta.values()), x)[0]

    torch.testing.assert_close(g("reverse"), g("graph"), rtol=1e-10, atol=1e-12)


def graph_of(loss: Tensor) -> int:
    """Functions in a loss's graph."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        f = todo.pop()
        if f is not None and f not in seen:
            seen.add(f)
            todo += [g for g, _ in f.next_functions]
    return len(seen)


def test_the_graph_does_not_grow_with_the_steps():
    p = Problem()

    def size(steps: int, mode: str) -> int:
        rates = torch.full((steps,), 0.1, dtype=D, requires_grad=True)
        return graph_of(p.outer(unrolled(p.inner, p.params, rates, p.x, p.y, p.unused, mode=mode)))

    assert size(3, "reverse") == size(12, "reverse")
    assert size(12, "graph") > 3 * size(3, "graph")


@pytest.mark.parametrize("segment,most", [(0, 11), (1, 37), (36, 37)])
def test_few_copies_of_the_weights_are_alive(segment, most):
    """36 steps: 6 kept ones and the 5 between two of them; counted where the inner loss is called."""
    alive, counts = weakref.WeakSet(), []

    def inner(p: dict[str, Tensor], k: int) -> Tensor:
        alive.add(p["w"].untyped_storage())
        counts.append(sum(s.nbytes() == 8000 for s in alive))
        return (p["w"] ** 2).sum()

    start, rates = torch.ones(1000, dtype=D), torch.full((36,), 0.01, dtype=D, requires_grad=True)
    unrolled(inner, {"w": start}, rates, segment=segment)["w"].sum().backward()
    assert most - 2 <= max(counts) <= most + 2  # the one at work, and the one that comes of it


def test_nothing_is_kept_without_gradients_and_inputs_stay():
    p = Problem()
    before = [t.detach().clone() for t in p.leaves]
    with torch.no_grad():
        theta = unrolled(p.inner, p.params, p.rates, p.x, p.y, p.unused)
    assert not any(t.requires_grad for t in theta.values())
    p.grads()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, p.leaves))
    loss = p.loss()
    with torch.no_grad():
        p.x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "how,what",
    [
        ({"rates": torch.tensor(0.1)}, "rates must hold one step size per step"),
        ({"mode": "tesla"}, "'reverse' or 'graph'"),
        ({"segment": -1}, "segment >= 0"),
        ({"at": [0, 2]}, "ascending numbers in 1…2"),
        ({"at": [3]}, "ascending numbers in 1…2"),
        ({"inner": lambda p, k: p["w"]}, "a scalar function of params; at step 0 it has shape"),
        ({"inner": lambda p, k: torch.ones(())}, "does not depend on params"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_mistakes_are_named(how, what):
    given = {"inner": lambda p, k: p["w"].sum(), "params": {"w": torch.ones(2)}, "rates": torch.ones(2), **how}
    with pytest.raises(ValueError, match=what):
        unrolled(given.pop("inner"), given.pop("params"), given.pop("rates"), **given)
