import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from stillhouse import objectives as O
from stillhouse.errors import UserError

# Golden vector: hand-derived numbers for three peers, two samples, three classes, T = 2.
Z = torch.tensor([[[2, 0, -1], [0, 1, 0]], [[1, 0.5, 0], [0.5, 0, 1]], [[0, 0, 0], [-1, 2, 0]]], dtype=torch.float64)
Y = torch.tensor([0, 2])
CE = torch.tensor([0.860645, 0.680270, 1.634229], dtype=torch.float64)
KL = torch.tensor([[0, 0.373296, 0.547496], [0.366635, 0, 0.631509], [0.546483, 0.666863, 0]]).double()
OMEGA = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def close(a, b, tol=1e-6):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


# -- cross-entropy and KL


def test_golden_vector():
    close(O.cross_entropy(Z, Y).mean(-1), CE)
    k = O.pairwise_kl(Z, T=2).mean(-1)
    close(k, KL)
    peers = 0.5 * CE + 0.5 * k.sum(1)  # what each peer learns and teaches
    close(peers, torch.tensor([0.890719, 0.839207, 1.423788], dtype=torch.float64))
    close((OMEGA * peers).sum(), torch.tensor(0.981879, dtype=torch.float64))
    w = OMEGA.clone().requires_grad_()
    outer = O.cross_entropy(torch.tensordot(w, Z, 1), Y).mean()
    close(outer.detach(), torch.tensor(0.826871, dtype=torch.float64))
    outer.backward()
    close(w.grad, torch.tensor([-0.122654, -0.417464, 0.416744], dtype=torch.float64))


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_kl_is_forward_per_sample_sum_over_classes_times_T_squared(T):
    t, s = rand(6, 5), rand(6, 5, seed=1)
    p, q = softmax(t.numpy() / T), softmax(s.numpy() / T)
    expected = T**2 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(O.kl(t, s, T).numpy(), expected, rtol=1e-12)
    assert not np.allclose(O.kl(s, t, T).numpy(), expected)
    entropy = -(p * np.log(p)).sum(-1) * T**2
    np.testing.assert_allclose(O.soft_cross_entropy(t, s, T).numpy(), expected + entropy, rtol=1e-12)
    close(O.kl(t, t + 7, T), torch.zeros(6, dtype=torch.float64), 1e-12)


def test_cross_entropy_labels_soft_targets_smoothing_and_peers():
    z, y = rand(4, 5), torch.tensor([0, 4, 2, 2])
    hot = torch.nn.functional.one_hot(y, 5).double()
    expected = -np.log(softmax(z.numpy())[np.arange(4), y])
    np.testing.assert_allclose(O.cross_entropy(z, y), expected, rtol=1e-12)
    close(O.cross_entropy(z, hot), O.cross_entropy(z, y), 1e-12)
    close(O.cross_entropy(z, y, 0.2), O.cross_entropy(z, 0.8 * hot + 0.2 / 5), 1e-12)
    many = O.cross_entropy(torch.stack([z, 2 * z]), y)
    assert many.shape == (2, 4)
    close(many[1], O.cross_entropy(2 * z, y), 1e-12)
    close(O.cross_entropy(torch.stack([z, z]), hot)[1], O.cross_entropy(z, y), 1e-12)
    for bad in (y[:3], hot[:, :4], y.view(4, 1)):
        with pytest.raises(UserError, match=r"\(4, 5\)"):
            O.cross_entropy(z, bad)


def test_gradients_against_finite_differences():
    t, s = rand(3, 4).requires_grad_(), rand(3, 4, seed=1).requires_grad_()
    y = torch.tensor([0, 1, 3])
    z = rand(3, 2, 4).requires_grad_()
    assert gradcheck(lambda s: O.cross_entropy(s, y, 0.1), (s,))
    assert gradcheck(lambda t, s: O.kl(t, s, 2.0, detach_teacher=False), (t, s))
    assert gradcheck(lambda s: O.kl(t.detach(), s, 2.0), (s,))
    assert gradcheck(lambda t, s: O.soft_cross_entropy(t, s, 2.0, detach_teacher=False), (t, s))
    assert gradcheck(lambda z: O.pairwise_kl(z, 2.0, detach=False), (z,))
    assert gradcheck(O.mean_of_others, (z,))
    assert gradcheck(lambda z: O.kdcl_minlogit(z, y[:2]), (z,))


def test_gradient_of_the_mutual_loss_by_hand():
    alpha, T, m = 0.4, 3.0, 4
    z, y = rand(m, 5, 6).requires_grad_(), torch.tensor([0, 1, 2, 3, 4])
    w = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    peers = (1 - alpha) * O.cross_entropy(z, y) + alpha * O.pairwise_kl(z, T).sum(1)
    (got,) = torch.autograd.grad((w[:, None] * peers).sum(), z, retain_graph=True)
    q, p = z.detach().softmax(-1), (z.detach() / T).softmax(-1)
    hot = torch.nn.functional.one_hot(y, 6)
    pull = torch.stack([sum(w[j] * (p[i] - p[j]) for j in range(m) if j != i) for i in range(m)])
    close(got, w.view(-1, 1, 1) * (1 - alpha) * (q - hot) + alpha * T * pull, 1e-12)
    (one,) = torch.autograd.grad(peers[1].sum(), z)  # peer 1 as a teacher moves the others
    for j in range(m):
        close(one[j], (1 - alpha) * (q[1] - hot) if j == 1 else alpha * T * (p[j] - p[1]), 1e-12)


def test_pairwise_is_the_single_kl_with_an_exactly_zero_diagonal():
    z, t = rand(3, 4, 5).float().requires_grad_(), rand(3, 4, 5, seed=2).float()
    for teacher in (None, t):
        k = O.pairwise_kl(z, 2.0, teacher=teacher)
        for j, i in itertools.product(range(3), range(3)):
            if i != j:
                close(k[j, i], O.kl((z if teacher is None else t)[j], z[i], 2.0))
        assert torch.equal(k.diagonal(), torch.zeros(4, 3))
        (g,) = torch.autograd.grad(k.diagonal().sum(), z)
        assert torch.equal(g, torch.zeros_like(z))
    same = z.detach()[:1].expand(3, 4, 5)
    assert torch.equal(O.pairwise_kl(same), torch.zeros(3, 3, 4))


def test_detached_teachers_get_no_gradient_and_no_forward_tangent():
    t, s = rand(3, 4).requires_grad_(), rand(3, 4, seed=1).requires_grad_()
    for loss in (O.kl, O.soft_cross_entropy):
        assert torch.autograd.grad(loss(t, s).sum(), t, allow_unused=True) == (None,)
        assert torch.autograd.grad(loss(t, s, detach_teacher=False).sum(), t)[0].abs().max() > 0
    z = rand(2, 3, 4).requires_grad_()
    (g,) = torch.autograd.grad(O.pairwise_kl(z)[0, 1].sum(), z)
    assert torch.equal(g[0], torch.zeros(3, 4, dtype=torch.float64)) and g[1].abs().max() > 0
    (g,) = torch.autograd.grad(O.pairwise_kl(z, detach=False)[0, 1].sum(), z)
    assert g[0].abs().max() > 0
    move = torch.zeros_like(z)
    move[0] = 1 + rand(3, 4, seed=5)
    tangent = torch.func.jvp(lambda z: O.pairwise_kl(z)[0, 1], (z.detach(),), (move,))[1]
    assert torch.equal(tangent, torch.zeros(3, dtype=torch.float64))
    tangent = torch.func.jvp(lambda z: O.pairwise_kl(z)[1, 0], (z.detach(),), (move,))[1]
    (g,) = torch.autograd.grad(O.pairwise_kl(z)[1, 0].sum(), z)
    close(tangent.sum(), (g * move).sum(), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    t, s = (30 * rand(4, 5)).to(dtype), (30 * rand(4, 5, seed=1)).to(dtype)
    z = torch.stack([t, s])
    y = torch.tensor([0, 1, 2, 3])
    for low, high in [
        (O.kl(t, s, 2), O.kl(t.float(), s.float(), 2)),
        (O.cross_entropy(s, y), O.cross_entropy(s.float(), y)),
        (O.cross_entropy(s, t.softmax(-1)), O.cross_entropy(s.float(), t.softmax(-1).float())),
        (O.pairwise_kl(z), O.pairwise_kl(z.float())),
        (O.mse(t, s), O.mse(t.float(), s.float())),
    ]:
        assert low.dtype == torch.float32 and torch.equal(low, high)
    assert O.kl(t.double(), s.double()).dtype == torch.float64


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"\(2, 3\).*\(2, 4\)"):
        O.kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="M, n, C"):
        O.pairwise_kl(torch.zeros(2, 3))
    with pytest.raises(UserError, match="pairwise_kl"):
        O.pairwise_kl(torch.zeros(2, 3, 4), teacher=torch.zeros(2, 1, 4))
    with pytest.raises(UserError, match=">= 2 peers"):
        O.mean_of_others(torch.zeros(1, 3, 4))


# -- targets of a group


def test_mean_of_others_and_kdcl_mean():
    z = rand(4, 3, 5)
    for i in range(4):
        close(O.mean_of_others(z)[i], torch.stack([z[j] for j in range(4) if j != i]).mean(0), 1e-12)
    pair = rand(2, 3, 5).float() * 1e4
    assert torch.equal(O.mean_of_others(pair), pair.flip(0))
    close(O.kdcl_mean(z), (O.mean_of_others(z) * 3 + z)[0] / 4, 1e-12)


def test_naive_takes_the_peer_with_the_smallest_loss_on_each_sample():
    z, y = rand(3, 7, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    losses = O.cross_entropy(z, y)
    target = O.kdcl_naive(z, y)
    close(O.cross_entropy(target, y), losses.min(0).values, 1e-12)
    assert len(set(losses.argmin(0).tolist())) > 1
    for n in range(7):
        assert torch.equal(target[n], z[losses[:, n].argmin(), n])


@pytest.mark.parametrize("case", ["random", "one dominates", "large", "useful and useless", "one class each"])
def test_linear_weights_satisfy_the_optimality_conditions(case):
    z, y = rand(4, 60, 5), torch.arange(60) % 5
    hot = torch.nn.functional.one_hot(y, 5).double()
    if case == "one dominates":
        z[2] = 6 * hot
        z[:2] *= 3
    if case == "large":
        z = 100 * z
    if case == "useful and useless":
        z[0], z[1] = z[0] + 2 * hot, z[1] + 3 * hot
    if case == "one class each":
        z = 4 * hot * torch.nn.functional.one_hot(torch.arange(60) % 4, 4).T[..., None]
    a = O.linear_weights(z, y)
    assert (a > 0).all() and abs(float(a.sum()) - 1) < 1e-12
    b = a.clone().requires_grad_()
    loss = O.cross_entropy(torch.tensordot(b, z, 1), y).mean()
    (g,) = torch.autograd.grad(loss, b)
    # Convex, so f(a) − f* <= <g, a> − min g: the Frank-Wolfe gap bounds the distance from the minimum.
    assert float((g * a).sum() - g.min()) < 1e-8 * max(1.0, float(loss.detach()))
    close(g[a > 1e-3], g[a > 1e-3].mean().expand(int((a > 1e-3).sum())), 1e-5 * max(1.0, float(g.abs().max())))
    assert float(loss.detach()) <= float(O.cross_entropy(z, y).mean(-1).min()) + 1e-8
    close(O.kdcl_linear(z, y), torch.tensordot(a, z, 1), 1e-12)


def test_linear_weights_in_corners():
    assert O.linear_weights(rand(1, 6, 3), torch.arange(6) % 3).tolist() == [1.0]
    same = rand(1, 6, 3).expand(3, 6, 3)
    close(O.linear_weights(same, torch.arange(6) % 3), torch.full((3,), 1 / 3, dtype=torch.float64), 1e-9)
    z = rand(2, 6, 3).requires_grad_()
    target = O.kdcl_linear(z, torch.arange(6) % 3)
    assert target.requires_grad and O.kdcl_linear(z.float(), torch.arange(6) % 3).dtype == torch.float32


def test_minlogit():
    z, y = rand(3, 8, 5), torch.arange(8) % 5
    target = O.kdcl_minlogit(z, y)
    shifted = z - z.gather(-1, y.expand(3, 8)[..., None])
    assert torch.equal(target.gather(1, y[:, None]), torch.zeros(8, 1, dtype=torch.float64))
    assert (target <= shifted).all() and torch.equal(target, shifted.min(0).values)
    right = target.softmax(-1).gather(1, y[:, None]).squeeze(1)
    assert (right >= z.softmax(-1).gather(-1, y.expand(3, 8)[..., None]).squeeze(-1).max(0).values - 1e-12).all()


def test_general_weights_closed_forms():
    eye = torch.eye(4, dtype=torch.float64)
    close(O.general_weights(3 * eye, ridge=0), torch.full((4,), 0.25, dtype=torch.float64), 1e-12)
    close(O.general_weights(3 * eye, ridge=0.7), torch.full((4,), 0.25, dtype=torch.float64), 1e-12)
    d = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    close(O.general_weights(d.diag(), ridge=0), (1 / d) / (1 / d).sum(), 1e-12)
    a = rand(5, 9)
    c = a @ a.T
    w = O.general_weights(c, ridge=0)
    close(c @ w, (w @ c @ w).expand(5), 1e-8)  # stationary on 1ᵀw = 1: all rows of Cw are equal
    assert abs(float(w.sum()) - 1) < 1e-12
    flat = torch.ones(3, 3, dtype=torch.float64)
    close(O.general_weights(flat, ridge=1e-3), torch.full((3,), 1 / 3, dtype=torch.float64), 1e-9)
    with pytest.raises(UserError, match="singular"):
        O.general_weights(flat, ridge=0)


def test_error_covariance_and_the_poisoned_peer():
    y = torch.arange(40) % 4
    z = rand(3, 40, 4) + 4 * torch.nn.functional.one_hot(y, 4)
    z[1] = rand(40, 4, seed=9)
    z[2] *= 2
    c = O.error_covariance(z, y)
    e = softmax(z.numpy()) - np.eye(4)[y]
    np.testing.assert_allclose(c, np.einsum("inc,jnc->ij", e, e) / 40, rtol=1e-10)
    w = O.general_weights(c)
    assert w.argmin() == 1 and w.argmax() == c.diagonal().argmin()


# -- features


def test_feature_losses_in_closed_form():
    t, s = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1)
    a, b = t.numpy().reshape(3, -1), s.numpy().reshape(3, -1)
    np.testing.assert_allclose(O.mse(t, s), ((a - b) ** 2).mean(1), rtol=1e-12)
    cos = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(O.cosine(t, s), 1 - cos, rtol=1e-10)
    close(O.cosine(t, -3 * t), torch.full((3,), 2.0, dtype=torch.float64), 1e-12)
    maps = [(f.numpy() ** 2).sum(1).reshape(3, -1) for f in (t, s)]
    q = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps]
    np.testing.assert_allclose(O.attention_transfer(t, s), ((q[0] - q[1]) ** 2).sum(1), rtol=1e-10)
    close(O.attention_transfer(t, 5 * t), torch.zeros(3, dtype=torch.float64), 1e-12)  # scale does not matter
    assert O.attention_transfer(t, rand(3, 7, 4, 4)).shape == (3,)  # channels may differ


def test_feature_losses_detach_differentiate_and_refuse():
    t, s = rand(2, 2, 3, 3).requires_grad_(), rand(2, 2, 3, 3, seed=1).requires_grad_()
    for loss in (O.mse, O.cosine, O.attention_transfer):
        assert torch.autograd.grad(loss(t, s).sum(), t, allow_unused=True) == (None,)
        assert gradcheck(lambda t, s, f=loss: f(t, s, detach_teacher=False), (t, s))
        with pytest.raises(UserError, match=r"\(2, 2, 3, 3\)"):
            loss(t, torch.zeros(2, 2, 4, 4))
    (g,) = torch.autograd.grad(O.attention_transfer(s.detach(), s).sum(), s)
    assert torch.isfinite(g).all()
