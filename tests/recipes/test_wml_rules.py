"""The checks of the online-baselines card: who teaches whom, and what is detached."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import base_network, gradients, images, learner
from torch import Tensor

from stillhouse.data import from_arrays
from stillhouse.errors import UserError
from stillhouse.objectives import ensembles
from stillhouse.recipes.wml.config import Config
from stillhouse.recipes.wml.rules import CLILR, DML, KDCL, NAMES, ONE, Independent, OKDDip, Sandwich, Seen, make_rule
from stillhouse.students.build import build_peers
from stillhouse.students.plan import Plan
from stillhouse.system import Clock

T, ALPHA = 2.0, 0.3
Y = torch.tensor([0, 3, 1, 2, 0])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(z: Tensor, features=(), trunk=None, T: float = T, y: Tensor = Y) -> Seen:
    omega = torch.full((len(z),), 1 / len(z), dtype=z.dtype)
    return Seen(z, y, ALPHA, T, omega, list(features), trunk)


def logits(m: int = 3) -> Tensor:
    return rand(m, 5, 4, seed=m).requires_grad_()


def grad(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value, z, retain_graph=True)[0]


def pull(z: Tensor, target: Tensor) -> Tensor:
    """Gradient in z of Σ_i mean_n T² KL(softmax(target_i/T) ‖ softmax(z_i/T)), the target held still."""
    return T * ((z / T).softmax(-1) - (target.expand_as(z) / T).softmax(-1)).detach() / z.shape[1]


def push(z: Tensor, y: Tensor = Y) -> Tensor:
    """Gradient in z of Σ_i CE_i."""
    return (z.softmax(-1) - F.one_hot(y, z.shape[-1])).detach() / z.shape[1]


# -- DML, CL-ILR ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [DML(), Independent(), make_rule("wml", "none", 1, [], 0)])
def test_one_peer_only_learns_labels(rule):
    z = logits(1)
    label, teach = rule(seen(z))
    scale = 1.0 if isinstance(rule, Independent) else 1 - ALPHA
    torch.testing.assert_close(label, scale * F.cross_entropy(z[0], Y))
    assert teach == 0 and torch.equal(grad(label + teach, z), grad(label, z))


def test_dml_pulls_to_the_mean_distribution_of_the_others():
    z = logits()
    label, teach = DML()(seen(z))
    p = (z / T).softmax(-1).detach()
    others = (p.sum(0) - p) / 2
    torch.testing.assert_close(grad(teach, z), ALPHA * T * (p - others) / 5)
    torch.testing.assert_close(grad(label, z), (1 - ALPHA) * push(z))


@pytest.mark.parametrize("rule", ["dml", "wml", "kdcl-mean"])
def test_identical_peers_stay_identical(rule):
    """With one start and one stream of data there is nothing to learn from a twin."""
    base = base_network()
    twins = build_peers(base, [Plan.identity(base)] * 2, images(2)["input"], share="none").train()
    system = learner("none", rule, twins, alpha=0.5)
    opt = torch.optim.SGD(list(twins.trained().values()), lr=0.1)
    alone = base_network()
    alone_opt = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        batch = images(6, seed=step)
        found = gradients(system, batch)
        for k, p in twins.trained().items():
            p.grad = found[f"peers.{k}"]
        opt.step()
        alone_opt.zero_grad()
        (0.5 * F.cross_entropy(alone(batch["input"]), batch["label"])).backward()
        alone_opt.step()
    a, b = (dict(body.named_parameters()) for body in twins.bodies)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for k, p in alone.named_parameters():
        torch.testing.assert_close(a[k], p, rtol=1e-9, atol=1e-9)


def test_cl_ilr_learns_from_the_mean_logits_of_the_others():
    z = logits()
    label, teach = CLILR()(seen(z))
    target = torch.stack([z[[1, 2]].mean(0), z[[0, 2]].mean(0), z[[0, 1]].mean(0)])
    torch.testing.assert_close(grad(teach, z), ALPHA * pull(z, target))
    torch.testing.assert_close(grad(label, z), (1 - ALPHA) * push(z))
    reference = sum(
        F.kl_div((z[i] / T).log_softmax(-1), (target[i] / T).softmax(-1), reduction="batchmean") for i in range(3)
    )
    torch.testing.assert_close(teach, ALPHA * T**2 * reference)


# -- KDCL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", KDCL.VARIANTS)
def test_kdcl_target_is_one_for_all_and_held_still(variant):
    z, rule = logits(), KDCL(variant, 3).double()
    target = rule.target(z, Y)
    label, teach = rule(seen(z))
    assert target.shape == (5, 4) and not target.requires_grad
    torch.testing.assert_close(grad(teach, z), ALPHA * pull(z, target))
    torch.testing.assert_close(grad(label, z), (1 - ALPHA) * push(z))


def test_kdcl_targets():
    z = logits().detach()
    ce = torch.stack([F.cross_entropy(a, Y, reduction="none") for a in z])
    torch.testing.assert_close(KDCL("mean", 3).target(z, Y), z.mean(0))
    naive = KDCL("naive", 3).target(z, Y)
    assert all(torch.equal(naive[n], z[ce[:, n].argmin(), n]) for n in range(5))
    low = KDCL("minlogit", 3).target(z, Y)
    true = z.gather(-1, Y.expand(3, 5).unsqueeze(-1))
    assert (low[torch.arange(5), Y] == 0).all() and (low <= (z - true) + 1e-12).all()
    torch.testing.assert_close(low, (z - true).min(0).values)
    linear = F.cross_entropy(KDCL("linear", 3).target(z, Y), Y)
    grid = [(a / 20, b / 20, 1 - (a + b) / 20) for a in range(21) for b in range(21 - a)]
    assert linear <= min(F.cross_entropy(torch.tensordot(torch.tensor(w, dtype=z.dtype), z, 1), Y) for w in grid) + 1e-9


class HeldOut:
    """Held-out samples in memory, as `predict` wants them."""

    def __init__(self, n: int = 12):
        batch = images(n, seed=9)
        self.x, self.y = batch["input"], batch["label"]
        self.labels, self.shape, self.classes = self.y.numpy(), tuple(self.x.shape[1:]), ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.y)

    def take(self, ids, view=None, seed=0):
        return {"input": self.x[ids], "label": self.y[ids], "id": torch.as_tensor(ids)}


@pytest.mark.parametrize("share", ["tree", "nested", "none"])
def test_kdcl_general_is_refreshed_from_held_out_data_each_epoch(share):
    system = learner(share, "kdcl-general")
    system.held_out = HeldOut()  # type: ignore[assignment]
    torch.testing.assert_close(system.ensemble_weights().float(), torch.full((3,), 1 / 3))
    modes = [m.training for m in system.modules()]
    for step, refreshed in ((0, False), (1, False), (2, True)):
        system.after_step(Clock(step=step, steps=6, steps_per_epoch=3))
        assert (system.ensemble_weights().std() > 1e-3) == refreshed
    assert [m.training for m in system.modules()] == modes
    with torch.no_grad():
        z = system.peers.eval()(HeldOut().x)
    error = z.softmax(-1) - F.one_hot(HeldOut().y, 3)
    c = torch.einsum("inc,jnc->ij", error, error) / 12
    c = c + 1e-3 * c.diagonal().mean() * torch.eye(3)
    w = torch.linalg.inv(c).sum(1) / torch.linalg.inv(c).sum()
    torch.testing.assert_close(system.ensemble_weights(), w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(system.rule.target(z, Y[:1]), torch.tensordot(system.rule.general, z, 1))  # type: ignore[operator, arg-type]


def test_kdcl_general_trusts_equal_errors_equally_and_bad_peers_less():
    torch.testing.assert_close(ensembles.general_weights(0.3 * torch.eye(4)), torch.full((4,), 0.25))
    y = torch.arange(200) % 4
    good = 3.0 * F.one_hot(y, 4) + rand(2, 200, 4)
    w = ensembles.general_weights(ensembles.error_covariance(torch.stack([*good, 3 * rand(200, 4, seed=5)]), y))
    assert w[2] < 0.1 < w[:2].min()


# -- ONE --------------------------------------------------------------------------------------------------------------


def test_gate_weights_sum_to_one_and_differ_by_sample():
    rule = ONE(3, 6).double()
    g = rule.mix(seen(logits(), trunk=3 * rand(5, 6, 2, 2)))
    torch.testing.assert_close(g.sum(-1), torch.ones(5, dtype=torch.float64))
    assert g.shape == (5, 3) and g.std(0).max() > 1e-3


def test_a_gate_frozen_at_one_mth_is_mean_target_distillation():
    z, rule = logits(), ONE(3, 6).double()
    for p in rule.gate[1].parameters():
        torch.nn.init.zeros_(p)  # ReLU(0) = 0: even weights
    label, teach = rule(seen(z, trunk=rand(5, 6, 2, 2)))
    without = label - (1 - ALPHA) * F.cross_entropy(z.mean(0), Y)
    torch.testing.assert_close(grad(without, z), (1 - ALPHA) * push(z))
    torch.testing.assert_close(grad(teach, z), ALPHA * pull(z, z.mean(0)))


def test_the_gate_learns_from_the_ensembles_labels_alone():
    z, rule = logits(), ONE(3, 6).double()
    label, teach = rule(seen(z, trunk=rand(5, 6, 2, 2)))
    params = list(rule.parameters())
    assert all(g is None for g in torch.autograd.grad(teach, params, allow_unused=True, retain_graph=True))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(label, params))


# -- OKDDip -----------------------------------------------------------------------------------------------------------


def test_attention_rows_sum_to_one_and_are_even_without_a_query():
    features = [rand(5, w, seed=w) for w in (6, 4, 7)]
    rule = OKDDip([6, 4, 7]).double()
    a = rule.attention(features)
    assert a.shape == (5, 2, 2) and a.std() > 1e-4
    torch.testing.assert_close(a.sum(-1), torch.ones(5, 2, dtype=torch.float64))
    for q in rule.query:
        torch.nn.init.zeros_(q.weight)
    z = logits()
    torch.testing.assert_close(rule.attention(features), torch.full((5, 2, 2), 0.5, dtype=torch.float64))
    _, teach = rule(seen(z, features))
    mean = z[:2].mean(0)
    reference = sum(F.kl_div((a / T).log_softmax(-1), (mean / T).softmax(-1), reduction="batchmean") for a in z)
    torch.testing.assert_close(teach, ALPHA * T**2 * reference)  # own prediction included; the leader learns the mean
    torch.testing.assert_close(grad(teach, z), grad(ALPHA * T**2 * reference, z))  # attached


def test_attention_learns_through_its_targets_and_the_leader_teaches_nobody():
    features, z = [rand(5, w, seed=w) for w in (6, 4, 7)], logits()
    rule = OKDDip([6, 4, 7]).double()
    label, teach = rule(seen(z, features))
    for p, g in zip(rule.parameters(), torch.autograd.grad(teach, list(rule.parameters()), retain_graph=True)):
        assert g.abs().max() > 1e-6, p.shape
    assert all(
        g is None for g in torch.autograd.grad(label, list(rule.parameters()), allow_unused=True, retain_graph=True)
    )
    torch.testing.assert_close(grad(teach, z)[2], (ALPHA * pull(z, z[:2].mean(0)))[2])  # only as a student
    louder = z.detach().clone()
    louder[2] += 5 * rand(5, 4, seed=8)
    louder.requires_grad_()

    def leader(z: Tensor) -> Tensor:
        """What the leader itself learns."""
        mean = (z[:2].mean(0) / T).softmax(-1)
        return ALPHA * T**2 * F.kl_div((z[2] / T).log_softmax(-1), mean, reduction="batchmean")

    quiet, loud = (grad(rule(seen(a, features))[1] - leader(a), a) for a in (z, louder))
    torch.testing.assert_close(quiet, loud)
    assert quiet[2].abs().max() < 1e-12 < 1e-4 < quiet[:2].abs().max()


# -- sandwich ---------------------------------------------------------------------------------------------------------


def test_sandwich_widest_learns_labels_alone_and_the_others_only_the_widest():
    z = logits()
    label, teach = Sandwich()(seen(z))
    g = grad(label + teach, z)
    torch.testing.assert_close(g[0], push(z)[0])
    torch.testing.assert_close(g[1:], ((z[1:].softmax(-1) - z[0].softmax(-1)) / 5).detach())  # T = 1
    torch.testing.assert_close(label, F.cross_entropy(z[0], Y))


def test_sandwich_gradients_add_up():
    system, batch = learner("nested", "sandwich"), images(6)
    assert not system.peers.grad_scale
    found = gradients(system, batch)
    z = system.peers(batch["input"])
    wide = z[0].softmax(-1).detach()
    parts = [F.cross_entropy(z[0], batch["label"]), *(F.cross_entropy(a, wide) for a in z[1:])]
    params = system.peers.trained()
    for part in parts:  # one backward pass each, as in the released code
        for (k, _), g in zip(
            params.items(), torch.autograd.grad(part, list(params.values()), retain_graph=True, allow_unused=True)
        ):
            if g is not None:
                found[f"peers.{k}"] -= g
    assert max(g.abs().max() for g in found.values()) < 1e-12


# -- what goes together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", NAMES)
def test_shared_weights_take_the_mean_gradient_but_for_sandwich(rule):
    share = {"sandwich": "nested"}.get(rule, "tree")
    system = learner(share, rule)
    assert bool(system.peers.grad_scale) == (rule != "sandwich")
    found = gradients(system, images(6))
    assert all(torch.isfinite(g).all() for g in found.values())
    assert max(g.abs().max() for g in found.values()) > 1e-4


WRONG = [
    ({"rule": "one", "share": "none"}, "--share tree, got none"),
    ({"rule": "one", "share": "nested"}, "--share tree, got nested"),
    ({"rule": "cl-ilr", "share": "none"}, "--share tree, got none"),
    ({"rule": "sandwich", "share": "tree"}, "--share nested, got tree"),
    ({"rule": "okddip", "ratios": (0.3,)}, "at least 2 peers"),
    ({"rule": "cl-ilr", "ratios": (0.3,)}, "at least 2 peers"),
    ({"rule": "one", "ratios": (0.3,)}, "at least 2 peers"),
    ({"rule": "wlm"}, "no rule 'wlm'.*wml"),
    ({"rule": "okddip", "two_pass": True}, "two_pass"),
    ({"rule": "one", "two_pass": True}, "two_pass"),
    ({"share": "tree", "views": True}, "views"),
    ({"share": "none", "ratios": (0.3, 0.3)}, "--init fresh"),
    ({"rule": "sandwich", "share": "nested", "ratios": (0.5, 0.0)}, "from the largest"),
    ({"rule": "kdcl-general", "held_out": 0.0}, "held"),
    ({"trunk": ("1", "2", "1")}, "trunk"),
    ({"trunk": ("99",)}, "99"),
]


@pytest.mark.parametrize("settings,says", WRONG)
def test_what_does_not_go_together_is_said(settings, says, tmp_path):
    from stillhouse.engine import Run
    from stillhouse.models import ModelSpec
    from stillhouse.recipes.wml.recipe import distill

    data = from_arrays(rand(60, 6).float().numpy(), (torch.arange(60) % 3).numpy())
    spec = ModelSpec("stillhouse:mlp", 3, (6,), options={"widths": [12, 12]})
    with pytest.raises(UserError, match=says):
        cfg = Config(**{"ratios": (0.0, 0.4), "epochs": 1.0, "batch": 16, **settings})
        distill(Run(tmp_path, device="cpu", quiet=True), data, spec, cfg)
