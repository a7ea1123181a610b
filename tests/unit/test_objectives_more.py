"""Objectives of the distillation literature against NumPy written out loop by loop, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from stillhouse import objectives as O
from stillhouse.errors import UserError


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def close(found, expected, tol=1e-10):
    np.testing.assert_allclose(np.asarray(found.detach()), expected, atol=tol, rtol=0)


T, S = rand(6, 5), rand(6, 5, seed=1)
Y = torch.tensor([0, 4, 2, 2, 1, 3])

# -- logits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_kl_in_other_directions(tau):
    p, q = softmax(T.numpy() / tau), softmax(S.numpy() / tau)
    close(O.reverse_kl(T, S, tau), [tau**2 * kl(b, a) for a, b in zip(p, q)])
    close(O.symmetric_kl(T, S, tau), [tau**2 * (kl(a, b) + kl(b, a)) / 2 for a, b in zip(p, q)])
    for beta in (0.5, 0.2):
        m = beta * p + (1 - beta) * q
        expected = [tau**2 * (beta * kl(a, c) + (1 - beta) * kl(b, c)) for a, b, c in zip(p, q, m)]
        close(O.jensen_shannon(T, S, tau, beta), expected)
    assert O.jensen_shannon(1e3 * T, -1e3 * T, tau).max() <= tau**2 * np.log(2) + 1e-9


@pytest.mark.parametrize("loss", [O.reverse_kl, O.symmetric_kl, O.jensen_shannon, O.dist])
def test_teachers_are_detached_unless_asked(loss):
    t = T.clone().requires_grad_()
    loss(t, S.clone().requires_grad_()).sum().backward()
    assert t.grad is None
    loss(t, S, detach_teacher=False).sum().backward()
    assert t.grad.abs().max() > 0


def test_decoupled_parts_by_hand_and_kl_as_their_special_case():
    tau = 2.0
    p, q, y = softmax(T.numpy() / tau), softmax(S.numpy() / tau), Y.numpy()
    expected, whole = [], []
    for a, b, c in zip(p, q, y):
        binary = kl(np.array([a[c], 1 - a[c]]), np.array([b[c], 1 - b[c]]))
        others = kl(np.delete(a, c) / (1 - a[c]), np.delete(b, c) / (1 - b[c]))
        expected.append(tau**2 * (1.5 * binary + 6 * others))
        whole.append((1 - a[c]) * others + binary)
    close(O.decoupled_kl(T, S, Y, tau, alpha=1.5, beta=6.0), expected)
    close(O.kl(T, S, tau), tau**2 * np.array(whole))
    assert gradcheck(lambda s: O.decoupled_kl(T, s, Y, tau), S.clone().requires_grad_())


def test_standardised_logits():
    z = T.numpy()
    close(O.standardise(T), (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True), 1e-6)
    close(O.kl(O.standardise(T), O.standardise(3 * T + 5), 2.0), np.zeros(6), 1e-6)


def test_dist_against_numpy_correlations():
    p, q = softmax(T.numpy() / 2), softmax(S.numpy() / 2)
    inter = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T)])
    close(O.dist(T, S, T=2.0, beta=0.7, gamma=1.3), 4 * (0.7 * inter + 1.3 * intra), 1e-8)


# -- ranking -----------------------------------------------------------------------------------------------------------


def plackett_luce(t, s, y, tau):
    q = softmax(t / tau)
    order = [y, *(c for c in np.argsort(-t, kind="stable") if c != y)]
    value = 0.0
    for k, c in enumerate(order):
        value += q[c] * (np.log(sum(np.exp(s[j]) for j in order[k:])) - s[c])
    return value


def test_plackett_luce_against_the_double_loop():
    for tau in (1.0, 3.0):
        expected = [plackett_luce(t, s, y, tau) for t, s, y in zip(T.numpy(), S.numpy(), Y.numpy())]
        close(O.plackett_luce(T, S, Y, tau), expected)
    first = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    close(O.plackett_luce(T, S, Y, weights=first), F.cross_entropy(S, Y, reduction="none"))
    close(O.plackett_luce(T, S + 9, Y), O.plackett_luce(T, S, Y), 1e-9)


def test_plackett_luce_with_two_classes_is_weighted_cross_entropy():
    t, s, y = T[:, :2], S[:, :2], Y % 2
    q = softmax(t.numpy())[np.arange(6), y.numpy()]
    close(O.plackett_luce(t, s, y), q * F.cross_entropy(s, y, reduction="none").numpy())


def test_plackett_luce_gradient_does_not_see_the_names_of_classes():
    s = S.clone().requires_grad_()
    O.plackett_luce(T, s, Y).sum().backward()
    close(s.grad.sum(1), np.zeros(6))
    assert gradcheck(lambda z: O.plackett_luce(T, z, Y), S.clone().requires_grad_())
    names = torch.tensor([3, 0, 4, 1, 2])
    back = torch.argsort(names)
    close(O.plackett_luce(T[:, names], S[:, names], back[Y]), O.plackett_luce(T, S, Y))
    with pytest.raises(UserError, match="labels"):
        O.plackett_luce(T, S, Y[:3])


# -- features ----------------------------------------------------------------------------------------------------------

MAPS_T, MAPS_S = rand(3, 4, 2, 2, seed=2), rand(3, 4, 2, 2, seed=3)


def test_overhaul_asks_for_nothing_where_both_are_off():
    margin = torch.tensor([-1.0, -0.5, 0.0, -3.0], dtype=torch.float64)
    expected = []
    for t, s in zip(MAPS_T.numpy(), MAPS_S.numpy()):
        value = 0.0
        for c in range(4):
            for a, b in zip(t[c].ravel(), s[c].ravel()):
                a = max(a, float(margin[c]))
                value += 0.0 if b <= a <= 0 else (a - b) ** 2
        expected.append(value)
    close(O.overhaul(MAPS_T, MAPS_S, margin), expected)


def test_the_margin_is_the_mean_of_what_is_negative():
    norm = nn.BatchNorm2d(3).double().requires_grad_(False)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, -1.0, 5.0]).double()
    x = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = x * norm.weight + norm.bias
    found = O.negative_mean(norm).detach()
    for c in range(2):
        assert abs(float(draws[:, c][draws[:, c] < 0].mean()) - float(found[c])) < 0.01
    assert float(found[2]) == -1.5  # practically never negative: −3σ


def test_variational_is_a_gaussian_likelihood():
    raw = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    variance = np.log1p(np.exp(raw.numpy())) + 1e-5
    normal = torch.distributions.Normal(MAPS_S, torch.tensor(variance).sqrt().view(1, 4, 1, 1))
    expected = -(normal.log_prob(MAPS_T) + 0.5 * np.log(2 * np.pi)).mean((1, 2, 3))
    close(O.variational(MAPS_T, MAPS_S, raw), expected, 1e-9)


def test_neuron_selectivity_against_loops():
    other = rand(3, 2, 2, 2, seed=4)

    def patterns(f):
        flat = f.reshape(len(f), -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    expected = []
    for t, s in zip(MAPS_T.numpy(), other.numpy()):
        a, b = patterns(t), patterns(s)
        k = lambda u, v: np.mean([(x @ y) ** 2 for x in u for y in v])  # noqa: E731
        expected.append(k(a, a) + k(b, b) - 2 * k(a, b))
    close(O.neuron_selectivity(MAPS_T, other), expected)
    close(O.neuron_selectivity(MAPS_T, MAPS_T), np.zeros(3))


def test_flow_between_layers():
    late = rand(3, 5, 2, 2, seed=5)
    g = O.flow(MAPS_T, late)
    assert g.shape == (3, 4, 5)
    by_hand = sum(np.outer(MAPS_T[1, :, i, j], late[1, :, i, j]) for i in range(2) for j in range(2)) / 4
    close(g[1], by_hand)
    big = MAPS_T.repeat_interleave(2, 2).repeat_interleave(2, 3)
    close(O.flow(big, late), g)
    with pytest.raises(UserError, match="flow"):
        O.flow(MAPS_T, late[:2])


# -- structure ---------------------------------------------------------------------------------------------------------

A, B = rand(5, 7, seed=6), rand(5, 3, seed=7)


def huber(d):
    return np.where(np.abs(d) < 1, 0.5 * d**2, np.abs(d) - 0.5)


def test_relative_distances_and_angles_against_loops():
    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def angles(x):
        out = np.zeros((5, 5, 5))
        for i in range(5):
            for j in range(5):
                for k in range(5):
                    u, v = x[j] - x[i], x[k] - x[i]
                    out[i, j, k] = u @ v / max(np.linalg.norm(u) * np.linalg.norm(v), 1e-24)
        return out

    a, b = A.numpy(), B.numpy()
    close(O.relative_distance(A, B), huber(distances(b) - distances(a)).mean(1), 1e-8)
    close(O.relative_angle(A, B), huber(angles(b) - angles(a)).mean((1, 2)), 1e-8)
    close(O.relative_distance(A, 4 * A), np.zeros(5), 1e-8)


def test_probabilistic_against_loops():
    def neighbours(x):
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        near = (u @ u.T + 1) / 2
        return near / near.sum(1, keepdims=True)

    p, q = neighbours(A.numpy()), neighbours(B.numpy())
    close(O.probabilistic(A, B), [(a * np.log((a + 1e-7) / (b + 1e-7))).sum() for a, b in zip(p, q)], 1e-8)


def test_cka_against_the_centred_formula_and_its_invariances():
    a, b = (x.numpy() - x.numpy().mean(0) for x in (A, B))
    expected = 1 - np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    close(O.cka(A, B), [expected] * 5)
    q, _ = torch.linalg.qr(rand(3, 3, seed=8))
    close(O.cka(A, 5 * B @ q), [expected] * 5)
    close(O.cka(A, A), np.zeros(5))


def test_contrastive_is_softmax_over_the_batch():
    other = rand(5, 7, seed=9)
    t, s = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (A, other))
    expected = [-np.log(softmax((s @ t.T) / 0.2)[i, i]) for i in range(5)]
    close(O.contrastive(A, other, T=0.2), expected)
    with pytest.raises(UserError, match="projector"):
        O.contrastive(A, B)


@pytest.mark.parametrize(
    "loss", [O.relative_distance, O.relative_angle, O.probabilistic, O.cka, lambda t, s: O.contrastive(t, s)]
)
def test_gradients_reach_the_student_alone(loss):
    t, s = A.clone().requires_grad_(), rand(5, 7, seed=11).requires_grad_()
    loss(t, s).mean().backward()
    assert t.grad is None and torch.isfinite(s.grad).all() and s.grad.abs().max() > 0


# -- what has no reference above, and extreme inputs -------------------------------------------------------------------


def test_normalised_kd_against_loops():
    t, s, tau, gamma = T.numpy(), S.numpy(), 2.0, 1.5
    expected = []
    for a, b, y in zip(t, s, Y.numpy()):
        own = -softmax(a)[y] * np.log(softmax(b)[y])
        p, q = softmax(np.delete(a, y) / tau), softmax(np.delete(b, y) / tau)
        expected.append(own - gamma * tau**2 * (p * np.log(q)).sum())
    close(O.normalised_kd(T, S, Y, tau, gamma), expected)
    assert gradcheck(lambda z: O.normalised_kd(T, z, Y, tau), S.clone().requires_grad_())


@pytest.mark.parametrize("loss", [O.normalised_kd, O.decoupled_kl])
def test_the_label_of_mixed_targets_is_their_largest(loss):
    soft = 0.7 * F.one_hot(Y, 5).double() + 0.3 * F.one_hot((Y + 1) % 5, 5)
    close(loss(T, S, soft), loss(T, S, Y).numpy())


def rows_of_gram(x):
    g = np.array([[a @ b for b in x] for a in x])
    return g / np.linalg.norm(g, axis=1, keepdims=True)


def test_similarity_and_inter_channel_against_loops():
    t, s = MAPS_T.numpy(), rand(3, 4, 3, 3, seed=12)
    expected = ((rows_of_gram(t.reshape(3, -1)) - rows_of_gram(s.numpy().reshape(3, -1))) ** 2).mean(1)
    close(O.similarity(MAPS_T, s), expected)
    each = [
        ((rows_of_gram(a.reshape(4, -1)) - rows_of_gram(b.reshape(4, -1))) ** 2).sum() / 4 for a, b in zip(t, s.numpy())
    ]
    close(O.inter_channel(MAPS_T, s), each)


LOGITS = {
    "kl": O.kl, "reverse": O.reverse_kl, "symmetric": O.symmetric_kl, "js": O.jensen_shannon, "dist": O.dist,
    "standardised": lambda t, s: O.kl(O.standardise(t), O.standardise(s)), "mse": O.mse,
    **{f.__name__: (lambda t, s, f=f: f(t, s, torch.arange(len(t)) % t.shape[1]))
       for f in (O.decoupled_kl, O.normalised_kd, O.plackett_luce)},
}  # fmt: skip
FEATURES = {
    f.__name__: f
    for f in (O.mse, O.cosine, O.overhaul, O.relative_distance, O.relative_angle, O.probabilistic, O.cka, O.contrastive,
              O.similarity, O.inter_channel, O.attention_transfer, O.neuron_selectivity)
} | {"vid": lambda t, s: O.variational(t, s, torch.zeros(t.shape[1])),
     "flow": lambda t, s: O.mse(O.flow(t, t), O.flow(s, s))}  # fmt: skip


def gradient(loss, t, s):
    s = s.clone().requires_grad_()
    value = loss(t, s)
    assert value.shape == (len(t),) and value.isfinite().all()
    (g,) = torch.autograd.grad(value.sum(), s)
    assert g.isfinite().all()
    return g


@pytest.mark.parametrize("name", LOGITS)
def test_extreme_logits_stay_finite(name):
    """Half-precision logits near the end of their range, one sample, two classes, logits that are all equal."""
    for dtype in (torch.float16, torch.bfloat16):
        gradient(LOGITS[name], rand(4, 5).to(dtype), rand(4, 5, seed=1).to(dtype))
        if name != "mse":  # its gradient is as large as they are
            large = ((1e4 * rand(4, 5, seed=k)).clamp(-6e4, 6e4).to(dtype) for k in (0, 1))
            gradient(LOGITS[name], *large)
    a, b = rand(4, 5).float(), rand(4, 5, seed=1).float()
    for t, s in ((a[:1], b[:1]), (300 * a[:, :2], 300 * b[:, :2]), (a, 0 * b), (0 * a, b), (0 * a, 0 * b)):
        gradient(LOGITS[name], t, s)


@pytest.mark.parametrize("name", FEATURES)
def test_dead_features_and_a_batch_of_one_stay_finite(name):
    """A feature of zeros has no direction: it gets no gradient from one, rather than 1/eps times it."""
    t, s = rand(4, 4, 3, 3).float(), rand(4, 4, 3, 3, seed=1).float()
    dead, twins = s.clone(), s.clone()
    dead[0], twins[1] = 0, twins[0]
    for a, b in ((t[:1], s[:1]), (t, dead), (t, twins), (t, 0 * s), (0 * t, s), (0 * t, 0 * s), (t.half(), s.half())):
        assert gradient(FEATURES[name], a, b).abs().max() < 100


def test_relative_distances_do_not_see_what_all_samples_share():
    x, y = rand(8, 16).float() * 0.01, rand(8, 16, seed=1)
    exact = O.relative_distance(y, x.double() + 30)
    np.testing.assert_allclose(O.relative_distance(y, x + 30), exact, rtol=0.02)
    close(O.relative_distance(A[:1], B[:1]), [0.0])


def test_options_out_of_range_are_told():
    for beta in (0.0, 1.0):
        with pytest.raises(UserError, match="beta must lie between 0 and 1"):
            O.jensen_shannon(T, S, beta=beta)
    with pytest.raises(UserError, match="p must be at least 1"):
        O.attention_transfer(MAPS_T, MAPS_S, p=0.5)
