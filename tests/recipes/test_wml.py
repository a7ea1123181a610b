"""The exact checks of the WML card (a–i; c stands in test_weights), each through the recipe's own code."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from kit import SHARES, base_network, gradients, images, learner, peer_set, shake, state
from table import Row
from torch import Tensor
from torch.func import functional_call

from stillhouse.models import ModelSpec
from stillhouse.recipes.wml.rules import DML, WML, Seen
from stillhouse.students.norms import frozen_statistics
from stillhouse.students.peers import Nested, Tree
from stillhouse.system import Clock, Gradients
from stillhouse.weights import MirrorDescent

# -- more rows of the contract table -----------------------------------------------------------------------------------

CNN = {"base": ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 8, 16]})}

ROWS = [
    Row("wml", "merge", {"merge_epochs": 1.0}),
    Row("wml", "nested", {"share": "nested", "trunk": (), "optimizer": "sgd", "lr": 0.05}),
    Row("wml", "none-fd-after", {"share": "none", "trunk": (), "hypergradient": "fd", "at": "after"}),
    Row("wml", "batchnorm", {"trunk": ()}, CNN),
    Row("wml", "nested-batchnorm", {"share": "nested", "trunk": ()}, CNN),
    Row("wml", "ema", {"ema": 0.9, "ramp": 0.5}),
    Row("wml", "two-pass", {"two_pass": True, "share": "none", "trunk": ()}),
    Row("wml", "micro", {}, micro_batch=10),
    Row("wml", "dml", {"rule": "dml"}),
    Row("wml", "kdcl-general", {"rule": "kdcl-general"}),
    Row("wml", "one", {"rule": "one"}),
    Row("wml", "okddip", {"rule": "okddip", "ratios": (0.0, 0.25, 0.5)}),
    Row("wml", "sandwich", {"rule": "sandwich", "share": "nested", "trunk": (), "lr": 1e-3}),
]


# (left, right): these two runs give the same bytes. Only rounding could part them, and there is none: m·(1/m)·CE is
# exact for m a power of two (here 2), and 0·teaching adds zeros to the gradient.
_APART = {"share": "none", "trunk": ()}
ZERO = [
    (
        Row("wml", "alpha 0, eta 0", {**_APART, "alpha": 0.0, "eta": 0.0}),
        Row("wml", "independent", {**_APART, "rule": "independent"}),
    ),
    *(
        (
            Row("wml", f"{rule}, alpha 0", {**_APART, "rule": rule, "alpha": 0.0}),
            Row("wml", "independent", {**_APART, "rule": "independent"}),
        )
        for rule in ("dml", "kdcl-mean", "kdcl-minlogit")
    ),
]

# Plain SGD: an adaptive optimiser turns a gradient that is zero but for rounding into a whole step.
_SGD = {"optimizer": "sgd", "lr": 0.05}
JOINT = [
    Row("wml", "independent", {**_SGD, "rule": "independent"}),
    Row("wml", "tree", _SGD),
    Row("wml", "uneven", {**_SGD, "batch": 31, "outer_batch": 15}),
    Row("wml", "after", {**_SGD, "at": "after", "share": "none", "trunk": ()}),
    Row("wml", "dml", {**_SGD, "rule": "dml", "merge_epochs": 1.0}),
]

# -- the golden vector of the card ------------------------------------------------------------------------------------

Z = torch.tensor([[[2, 0, -1], [0, 1, 0]], [[1, 0.5, 0], [0.5, 0, 1]], [[0, 0, 0], [-1, 2, 0]]], dtype=torch.float64)
Y = torch.tensor([0, 2])
OMEGA = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def near(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-7)


def test_golden_vector():
    label, teach = WML().per_peer(Z, Y, 0.5, 2.0)
    near(label * 2, [0.860645, 0.680270, 1.634229])
    near(label + teach, [0.890719, 0.839207, 1.423788])
    seen = Seen(Z, Y, 0.5, 2.0, OMEGA, [], None)
    near(sum(WML()(seen)) / 3, 0.981879)  # type: ignore[arg-type]  # M · L1
    system = learner("none")
    system.omega.data = OMEGA.clone()
    outer = system.outer_loss(Z, system.omega, Y)
    outer.backward()
    near(outer, 0.826871)  # type: ignore[arg-type]
    near(system.omega.grad, [-0.122654, -0.417464, 0.416744])
    MirrorDescent([system.omega], lr=0.5, floor=0.0, clip=None).step()
    near(system.omega.data, [0.499816, 0.347519, 0.152666])


# -- a, b: the hypergradient ------------------------------------------------------------------------------------------


def inner_terms(z: Tensor, y: Tensor, alpha: float, T: float, detach: bool) -> Tensor:
    """L_a of equation (2), written out peer by peer with PyTorch's own losses."""
    rows = []
    for i in range(len(z)):
        teacher = F.log_softmax((z[i].detach() if detach else z[i]) / T, -1)
        kls = [F.kl_div(F.log_softmax(z[j] / T, -1), teacher, reduction="batchmean", log_target=True)
               for j in range(len(z)) if j != i]  # fmt: skip
        rows.append((1 - alpha) * F.cross_entropy(z[i], y) + alpha * T**2 * torch.stack(kls).sum())
    return torch.stack(rows)


def stepped_outer(system, omega: Tensor, train, held, gamma: float) -> Tensor:
    """L2(θ − γ S ∇L1(θ, ω), ω), with S from who shares what."""
    peers, c = system.peers, system.cfg
    params = {k: p.detach().requires_grad_() for k, p in peers.trained().items()}
    shared = "trunk." if isinstance(peers, Tree) else "weights." if isinstance(peers, Nested) else "-"
    with frozen_statistics(peers):
        z = functional_call(peers, params, (train["input"],))
        loss = (omega * inner_terms(z, train["label"], c.alpha, c.temperature, c.detach)).sum()
        grads = torch.autograd.grad(loss, list(params.values()))
        scale = [1 / len(peers) if k.startswith(shared) and peers.grad_scale else 1.0 for k in params]
        moved = {k: p - gamma * s * g for (k, p), s, g in zip(params.items(), scale, grads, strict=True)}
        with torch.no_grad():
            z = functional_call(peers, moved, (held["input"],))
            return F.cross_entropy(torch.tensordot(omega, z, 1), held["label"])


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("share", SHARES)
def test_hypergradient_is_the_total_derivative_of_one_step(share, detach, averaged):
    train, held, gamma = images(6), images(5, seed=1), 0.05
    system = learner(share, detach=detach, at="after", gamma=gamma)
    assert bool(system.peers.grad_scale) == (share != "none")
    if not averaged:
        system.peers.grad_scale = {}
    h = system.hypergradient(train, held, Clock())
    expected, eps = [], 1e-6
    for i in range(3):
        unit = eps * torch.eye(3, dtype=torch.float64)[i]
        omega = system.omega.detach()
        ahead, behind = (stepped_outer(system, omega + s * unit, train, held, gamma) for s in (1, -1))
        expected.append((ahead - behind) / (2 * eps))
    torch.testing.assert_close(h.total, torch.stack(expected), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(h.outer, stepped_outer(system, system.omega.detach(), train, held, gamma))
    assert h.indirect.abs().min() > 1e-4  # the second term takes part


@pytest.mark.parametrize("share", SHARES)
def test_before_and_after_agree_in_sign_and_order(share):
    train, held = images(8), images(8, seed=1)
    found = {
        at: learner(share, at=at, gamma=0.01).hypergradient(train, held, Clock()).total for at in ("before", "after")
    }
    a, b = (h - h.mean() for h in found.values())
    assert (a.argsort() == b.argsort()).all() and (a.sign() == b.sign()).all()
    assert not torch.equal(a, b)


@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("share", SHARES)
def test_grad_jvp_and_fd_give_the_same_inner_products(share, detach, at):
    train, held = images(6), images(5, seed=1)

    def products(mode):
        system = learner(share, hypergradient=mode, at=at, detach=detach, gamma=0.1)
        return system.hypergradient(train, held, Clock()).indirect

    by = {mode: products(mode) for mode in ("grad", "jvp", "fd")}
    torch.testing.assert_close(by["jvp"], by["grad"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by["fd"], by["grad"], rtol=1e-5, atol=1e-6 * float(by["grad"].abs().max()))


def test_second_term_can_be_left_out_and_gamma_follows_the_learning_rate():
    train, held = images(6), images(5, seed=1)
    off = learner("tree", second_term=False).hypergradient(train, held, Clock())
    on = learner("tree", lr=0.1, lr_warmup=0.0).hypergradient(train, held, Clock(steps=10))
    given = learner("tree", gamma=0.3).hypergradient(train, held, Clock(steps=10))
    assert not off.indirect.any() and torch.equal(off.total, off.direct)
    torch.testing.assert_close(on.total, given.total)  # m · lr = 0.3
    torch.testing.assert_close(on.direct, off.direct)


@pytest.mark.parametrize("mode", ["grad", "jvp", "fd"])
@pytest.mark.parametrize("share", SHARES)
def test_hypergradient_leaves_everything_as_it_was(share, mode):
    system = learner(share, hypergradient=mode, at="after", neumann=1)
    gradients(system, images(4))
    before, grads = state(system), {k: p.grad.clone() for k, p in system.named_parameters() if p.grad is not None}
    rng, flags = torch.get_rng_state(), [m.training for m in system.modules()]
    system.importance({"train": images(6), "held_out": images(5, seed=1)}, Clock())
    assert state(system) == before and torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in system.modules()] == flags
    after = {k: p.grad for k, p in system.named_parameters() if p.grad is not None}
    assert after.keys() == grads.keys() and all(torch.equal(after[k], g) for k, g in grads.items())


# -- d: special cases of the inner loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3])
def test_even_importance_is_dml(m):
    """ω = 1/M, α = 1/M: M·L1/(1−α) is the DML loss with 1/(M−1), in value and gradient (T = 1 as in DML)."""
    g = torch.Generator().manual_seed(m)
    z = torch.randn(m, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    y, omega = torch.arange(4), torch.full((m,), 1 / m, dtype=torch.float64)
    ours = sum(WML()(Seen(z, y, 1 / m, 1.0, omega, [], None))) / (1 - 1 / m)
    reference = z.new_zeros(())
    for i in range(m):
        reference = reference + F.cross_entropy(z[i], y)
        for j in range(m):
            if j != i:
                p = F.softmax(z[j].detach(), -1)
                reference = reference + F.kl_div(F.log_softmax(z[i], -1), p, reduction="batchmean") / (m - 1)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (ours, reference)))
    dml = 2 * sum(DML()(Seen(z, y, 0.5, 1.0, omega, [], None)))  # α = ½: both parts with weight ½
    torch.testing.assert_close(dml, reference)


def test_gradient_by_hand():
    """∂L1/∂z_i = [ω_i (1−α)(q_i − y) + α T Σ_{j≠i} ω_j (p_i − p_j)] / n, teachers detached."""
    z = Z.clone().requires_grad_()
    alpha, T = 0.3, 2.0
    (found,) = torch.autograd.grad(sum(WML()(Seen(z, Y, alpha, T, OMEGA, [], None))) / 3, z)
    q, p, y = Z.softmax(-1), (Z / T).softmax(-1), F.one_hot(Y, 3)
    expected = torch.stack([
        OMEGA[i] * (1 - alpha) * (q[i] - y) + alpha * T * sum(OMEGA[j] * (p[i] - p[j]) for j in range(3) if j != i)
        for i in range(3)
    ]) / 2  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_no_teaching_and_nothing_shared_is_independent_training():
    system = learner("none", alpha=0.0)
    system.omega.data.fill_(1 / 3)
    batch = images(6)
    found = gradients(system, batch)
    for i in range(3):
        alone = system.peers.student(i).train()
        F.cross_entropy(alone(batch["input"]), batch["label"]).backward()
        for name, p in alone.named_parameters():
            torch.testing.assert_close(found[f"peers.bodies.{i}.{name}"], p.grad)


# -- e, i: pruned peers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,cut", [("resnet", "layer1"), ("cnn", "block1")])
@pytest.mark.parametrize("share", SHARES)
def test_masked_forward_is_sliced_forward(share, kind, cut):
    base = base_network(kind)
    peers = peer_set(share, base=base, cut=(cut,), moved=False).eval()
    x = images(7)["input"]
    together = peers(x)
    for i, plan in enumerate(peers.plans):
        masked = plan.masked(base).eval()(x)
        torch.testing.assert_close(together[i], masked, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(plan.build(base).eval()(x), masked, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together[1], together[0]) and not torch.allclose(together[2], together[1])


@pytest.mark.parametrize("share", SHARES)
def test_students_compute_what_their_peers_compute(share):
    peers = peer_set(share)
    peers(images(8)["input"])  # running statistics move
    shake(peers, 5, 0.1)
    x = images(7, seed=2)["input"]
    together = peers.eval()(x)
    for i in range(3):
        torch.testing.assert_close(peers.student(i)(x), together[i], rtol=1e-9, atol=1e-9)


def test_smaller_masks_lie_in_larger_ones():
    peers = peer_set("nested", (0.0, 0.3, 0.5, 0.7))
    kept = [{(e.module, e.axis): set(e.index) for e in plan.edits} for plan in peers.plans]
    for wide, thin in itertools.pairwise(kept):
        for key, index in wide.items():
            assert thin.get(key, index) <= index
        assert wide.keys() <= thin.keys()
    assert len(kept[3]) and sum(map(len, kept[3].values())) < sum(map(len, kept[1].values()))


# -- f, g: facts that the choices rest on -----------------------------------------------------------------------------


def test_ensemble_loss_is_below_the_weighted_losses():
    system, weighted = learner("none"), learner("none", outer="weighted_ce")
    for seed in range(5):
        z = 3 * torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y = torch.arange(6) % 4
        a, b = (s.outer_loss(z, system.omega, y) for s in (system, weighted))
        assert a < b
        torch.testing.assert_close(b, sum(w * F.cross_entropy(zi, y) for w, zi in zip(system.omega, z)))


def test_a_filter_before_batch_norm_has_no_radial_gradient():
    """Why the gate form of the score must not be used on such weights."""
    base, batch = base_network(), images(8)
    base.bn1.eps = 1e-14
    F.cross_entropy(base(batch["input"]), batch["label"]).backward()
    radial = (base.conv1.weight * base.conv1.weight.grad).sum((1, 2, 3))
    assert radial.abs().max() < 1e-12 < 1e-6 < (base.conv1.weight * base.conv1.weight.grad).abs().sum()


# -- the importance Update --------------------------------------------------------------------------------------------


def test_importance_gives_the_hypergradient_and_its_notes():
    system = learner("tree")
    batch = {"train": images(6), "held_out": images(3, seed=1)}
    found = system.importance(batch, Clock())
    some = {k: v[::2] for k, v in batch["train"].items()}  # as many as there are held-out samples
    h = system.hypergradient(some, batch["held_out"], Clock())
    assert isinstance(found, Gradients) and torch.equal(found.grads[0], h.total)
    torch.testing.assert_close(found.notes["entropy"], -(system.omega * system.omega.log()).sum().detach())
    torch.testing.assert_close(found.notes["h_direct"] + found.notes["h_indirect"], h.total - h.total.mean())


@pytest.mark.parametrize("share", ["nested", "none"])
def test_views_give_every_peer_its_own_augmentation(share):
    system, batch, held = learner(share, views=True), images(6, copies=3), images(5, seed=1)
    z = system.peers(batch["input"])
    for i in range(3):
        torch.testing.assert_close(z[i], system.peers(batch["input"][:, i])[i])
    assert not torch.allclose(z[1], system.peers(batch["input"][:, 0])[1])
    h = system.hypergradient(batch, held, Clock())
    fd = learner(share, views=True, hypergradient="fd").hypergradient(batch, held, Clock())
    torch.testing.assert_close(h.indirect, fd.indirect, rtol=1e-5, atol=1e-6 * float(h.indirect.abs().max()))
    plain = learner(share).hypergradient(images(6), held, Clock())
    torch.testing.assert_close(h.direct, plain.direct)  # the held-out input is one view for all


# Peers with a shared trunk see the same input.
@pytest.mark.parametrize("share,views", [*((s, False) for s in SHARES), ("nested", True), ("none", True)])
@pytest.mark.parametrize("rule", ["wml", "dml", "kdcl-linear"])
def test_two_passes_give_the_gradients_of_one(share, rule, views):
    batch = images(6, copies=3 if views else 0)
    one, two = (learner(share, rule, two_pass=p, views=views) for p in (False, True))
    a, b = (gradients(s, batch) for s in (one, two))
    assert a.keys() == b.keys() and any(g.abs().max() > 1e-3 for g in a.values())
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for (name, x), y in zip(one.named_buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, n=name: f"{n}: {m}")
    assert all(int(v) == 1 for k, v in two.named_buffers() if k.endswith("num_batches_tracked"))
