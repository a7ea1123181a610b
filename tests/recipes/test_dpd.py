"""The card's exact checks of DPD, its claims in exact processes, bad input, and its rows of the contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.control import ActorCritic, Learner, Rollout, Spaces, advantages, clipped, find_environment, log_prob
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.recipes.dpd import ddpg
from stillhouse.recipes.dpd.borrow import advantage, best_of, distance, weighted, weights
from stillhouse.recipes.dpd.experiment import CARTPOLE, TINY
from stillhouse.recipes.dpd.mdp import random_mdps, study, values
from stillhouse.recipes.dpd.recipe import DPD, Config, distill, make_learners, source
from stillhouse.system import Clock, fold

THREE = {"learners": 3, "normalise": "own", "optimizer": "shared", "target": "sample", "over_batch": True,
         "normalise_weights": False, "unit": "reward", "anneal": True, "entropy_weight": 0.01, "widths": (6,),
         "minibatches": 3}  # fmt: skip
OVER_DDPG = {"base": "ddpg", "steps": 40, "buffer": 30, "batch": 8, "warmup": 3}
ROWS = [
    Row("dpd", "three in Pendulum", THREE, {"env": "Pendulum-v1"}),
    Row("dpd", "ddpg", OVER_DDPG, {"env": "Pendulum-v1"}),
]
ZERO = [(Row("dpd", "never distilled", {"every": 0}), Row("dpd", "weight 0", {"weight": 0.0}))]
JOINT = [Row("dpd", "joint", {"normalise": "none", "minibatches": 3})]

SPACES = {True: Spaces((3,), 4), False: Spaces((3,), 2, False, (None, None), (None, None), action_shape=(2,))}


def system(discrete: bool = True, names: str = "ab", **changes) -> DPD:
    torch.manual_seed(0)
    learners = {n: Learner(ActorCritic((3,), SPACES[discrete].outputs, (8,)).double(), SPACES[discrete]) for n in names}
    for one in learners.values():
        for p in one.parameters():
            nn.init.normal_(p, std=0.8)
    return DPD(learners, Config(states=7, **changes)).double()


def batch(names: str = "ab", n: int = 7) -> dict:
    torch.manual_seed(1)
    return {k: {"drawn": {"obs": torch.randn(n, 3, dtype=torch.float64)}} for k in names}


# -- check 1 and 2: the weights -----------------------------------------------------------------------------------


def test_alpha_zero_weighs_all_states_alike():
    xi = torch.tensor([-5.0, 0.0, 80.0], dtype=torch.float64)
    assert torch.equal(weights(xi, 0.0), torch.full((3,), 1 / 3, dtype=torch.float64))
    net, states = system(alpha=0.0), batch()["b"]["drawn"]["obs"]
    a, b = net.learners["a"], net.learners["b"]
    mean = distance(b(states)[0], a(states)[0], True, "kl").mean()
    assert torch.allclose(net.distil("a", batch(), Clock()).total, mean, atol=1e-14)


@pytest.mark.parametrize("unit", ["reward", "spread"])
def test_weights_know_only_the_difference_of_the_values(unit):
    peer, own = torch.randn(2, 9, dtype=torch.float64)
    w = weights(advantage(peer, own, unit), 0.7)
    assert torch.allclose(weights(advantage(peer + 41.0, own + 41.0, unit), 0.7), w, atol=1e-12)
    assert w.sum() == pytest.approx(1, abs=1e-12)


def test_a_unit_of_spread_does_not_know_the_size_of_rewards():
    peer, own = torch.randn(2, 9, dtype=torch.float64)
    assert torch.allclose(advantage(1e4 * peer, 1e4 * own, "spread"), advantage(peer, own, "spread"), atol=1e-6)
    assert torch.allclose(advantage(peer, own, "reward"), peer - own)


def test_the_weight_of_a_state_rises_with_the_peers_value_and_falls_with_the_own():
    peer = torch.linspace(-30, 30, 61, dtype=torch.float64).requires_grad_()
    own = torch.zeros(61, dtype=torch.float64)
    w = weights(advantage(peer, own), 0.5, normalise=False) * 61
    assert (w.diff() >= 0).all() and w[0] == 0.01 and w[-1] == 100 and w[30] == 1
    assert torch.allclose(w[28:33], torch.exp(0.5 * (peer - own).detach()[28:33]))
    assert (weights(advantage(own, peer), 0.5).diff() <= 0).all()


def test_unnormalised_weights_leave_a_better_learner_alone():
    """A peer that is worse everywhere: normalised weights are merely equal, unnormalised ones at most 0.01."""
    xi = torch.full((8,), -50.0)
    assert weights(xi, 1.0).sum() == pytest.approx(1)
    assert torch.allclose(weights(xi, 1.0, normalise=False).sum(), torch.tensor(0.01))


def test_the_reversed_sign_is_the_weight_of_the_other_side():
    """The control weighs by V − Ṽ; the system's own sign is Ṽ − V."""
    seen = batch()
    for reverse in (False, True):
        net = system(reverse=reverse, unit="reward", alpha=2.0)
        states = seen["b"]["drawn"]["obs"]
        (out, v), (peer, better) = net.learners["a"](states), net.learners["b"](states)
        w = ((v - better if reverse else better - v) * 2.0).exp().clamp(0.01, 100)
        d = (peer.softmax(-1) * (peer.log_softmax(-1) - out.log_softmax(-1))).sum(-1)
        assert torch.allclose(net.distil("a", seen, Clock()).total, (w / w.sum() * d).sum(), atol=1e-12)


# -- check 3: what the loss moves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("kind", ["kl", "auto"])
def test_only_the_own_actor_gets_a_gradient(discrete, kind):
    net = system(discrete, distance=kind)
    net.distil("a", batch(), Clock()).total.backward()
    a, b = net.learners["a"], net.learners["b"]
    assert all(p.grad is None or not p.grad.any() for p in [*b.parameters(), *a.network.critic.parameters()])
    assert all(p.grad.any() for p in a.network.actor.parameters())
    assert not torch.is_grad_enabled() or weights(torch.ones(2, requires_grad=True), 1.0).grad_fn is None


def test_the_gradient_at_the_logits_by_hand():
    """∂L_D/∂z_i = w_i (softmax(z_i) − softmax(z̃_i)); squared: 2 w_i (μ − μ̃)/d."""
    z, peer = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    w = weights(torch.randn(5, dtype=torch.float64), 1.0)
    (ours,) = torch.autograd.grad(weighted(w, distance(peer, z, True, "kl")), z)
    assert torch.allclose(ours, w.unsqueeze(-1) * (z.softmax(-1) - peer.softmax(-1)), atol=1e-14)
    (ours,) = torch.autograd.grad(weighted(w, distance(peer, z, False, "squared")), z)
    assert torch.allclose(ours[:, :2], w.unsqueeze(-1) * 2 * (z - peer)[:, :2] / 2, atol=1e-14)
    assert not ours[:, 2:].any()  # the spread is not matched by the squared distance


# -- check 4: shapes --------------------------------------------------------------------------------------------


def test_weights_and_distances_are_one_number_per_state():
    d = torch.tensor([3.0, 5.0, 7.0])
    for i in range(3):
        assert weighted(torch.eye(3)[i], d) == d[i]
    with pytest.raises(ValueError, match=r"both be \(n,\), got \(3, 1\) and \(3,\)"):
        weighted(torch.eye(3)[0].unsqueeze(-1), d)


# -- check 5: without distillation ------------------------------------------------------------------------------


def test_without_distillation_a_pair_is_two_learners_on_their_own(tmp_path):
    """Bit for bit, when the running statistics are not shared."""
    for how in ("none", "own"):
        cfg = replace(TINY, every=0, normalise=how)
        pair = distill(Run(tmp_path / how, device="cpu", quiet=True), CARTPOLE, cfg)
        env = find_environment(CARTPOLE)
        for name in "ab":
            one = DPD(make_learners(0, env[2], [name], cfg), cfg)
            run = Run(tmp_path / f"{how}-{name}", device="cpu", quiet=True)
            fit(run, "dpd", one, source(one, env, cfg), steps=cfg.updates)
            mine, ours = one.learners[name].network.state_dict(), pair[name].model.network.state_dict()
            assert all(torch.equal(mine[k], ours[k]) for k in mine)


def test_a_learner_on_its_own_is_ppo_written_out(tmp_path):
    """The whole of TINY by a plain loop over the same environments: rollouts, advantages, Adam, clipping."""
    cfg = replace(TINY, learners=1, normalise="none", every=0)
    policy = distill(Run(tmp_path, device="cpu", quiet=True), CARTPOLE, cfg)
    env = find_environment(CARTPOLE)
    one = make_learners(0, env[2], ["a"], cfg)["a"]
    rollout = Rollout("a", env, one, envs=cfg.envs, steps=cfg.horizon)
    adam = torch.optim.Adam(one.parameters(), lr=cfg.lr, eps=1e-5, fused=True)
    for step in range(cfg.updates):
        clock = Clock(stage="dpd", step=step, steps=cfg.updates)
        b = rollout.batch(clock)
        shape = (cfg.horizon, cfg.envs)
        with torch.no_grad():
            out, v = one(b["obs"])
            following = one(b["following"])[1]
            old = log_prob(out, b["action"], True)
            columns = [x.view(shape) for x in (b["reward"], v, following, b["terminated"], b["ended"])]
            gained = advantages(*columns, cfg.gamma, cfg.lam).flatten()
        for epoch in range(cfg.epochs):
            order = torch.randperm(len(v), generator=clock.generator("order", "a", epoch))
            for rows in order.tensor_split(cfg.minibatches):
                out, value = one(b["obs"][rows])
                a = gained[rows]
                a = (a - a.mean()) / (a.std(correction=0) + 1e-8)
                loss = clipped(log_prob(out, b["action"][rows], True) - old[rows], a, cfg.clip).mean()
                loss = loss + cfg.value_weight * ((value - (gained + v)[rows]) ** 2).mean()
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(one.parameters(), cfg.max_norm)
                adam.step()
    mine, ours = one.network.state_dict(), policy["a"].model.network.state_dict()
    assert all(torch.allclose(mine[k], ours[k], atol=1e-5) for k in mine)
    start = make_learners(0, env[2], ["a"], cfg)["a"].network.state_dict()
    assert max((mine[k] - start[k]).abs().max() for k in mine) > 1e-3


# -- further parts of the method --------------------------------------------------------------------------------


def test_states_are_the_peers():
    net, seen = system(), batch()
    changed = {**seen, "a": {"drawn": {"obs": seen["a"]["drawn"]["obs"] + 5}}}
    assert torch.equal(net.distil("a", seen, Clock()).total, net.distil("a", changed, Clock()).total)
    assert not torch.equal(net.distil("b", seen, Clock()).total, net.distil("b", changed, Clock()).total)


def test_of_several_peers_the_one_with_the_largest_value_teaches_each_state():
    outs, seen = torch.randn(3, 6, 4), torch.randn(3, 6)
    out, value = best_of(list(outs), list(seen))
    for i in range(6):
        k = int(seen[:, i].argmax())
        assert torch.equal(out[i], outs[k, i]) and value[i] == seen[k, i]
    net, states = system(names="abc"), batch("abc")
    every = torch.cat([states[k]["drawn"]["obs"][:4] for k in "bc"])  # half of the 7 from each, rounded up
    peer, value = best_of(*zip(*[net.learners[k](every) for k in "bc"], strict=True))
    own, v = net.learners["a"](every)
    w = weights(advantage(value, v, "spread"), 0.5)
    expected = weighted(w, distance(peer, own, True, "kl"))
    assert torch.allclose(net.distil("a", states, Clock()).total, expected, atol=1e-12)


def test_processes_share_the_states_of_a_step():
    net, seen = system(), batch()
    whole = net.distil("a", seen, Clock()).total
    parts = [net.distil("a", seen, Clock(rank=r, world=2)).total for r in range(2)]
    assert torch.allclose(sum(parts) / 2, whole, atol=1e-14) and not torch.allclose(parts[0], parts[1])


def test_a_sampled_target_is_the_peers_sample_and_the_released_code_divides_once_more():
    net, seen = system(False, target="sample", alpha=0.0), batch()
    states = seen["b"]["drawn"]["obs"]
    mean, log_std = net.learners["b"](states)[0].chunk(2, -1)
    noise = torch.randn(mean.shape, generator=Clock().generator("target", "a"))
    target = mean + log_std.exp() * noise
    expected = ((net.learners["a"](states)[0][:, :2] - target) ** 2).mean()
    plain = net.distil("a", seen, Clock()).total
    assert torch.allclose(plain, expected, atol=1e-12)
    net.cfg = replace(net.cfg, over_batch=True)
    assert torch.allclose(net.distil("a", seen, Clock()).total, plain / 7)


def test_updates_are_due_as_the_settings_say():
    net = system(every=3, warmup=4)
    assert [u.name for u in net.updates()] == ["improve_a", "improve_b", "distil_a", "distil_b"]
    assert [k for k in range(12) if net.updates()[2].due(k)] == [6, 9]
    assert [u.name for u in system(every=0).updates()] == ["improve_a", "improve_b"]

    def same(how: str) -> bool:
        a, _, distil, _ = system(optimizer=how).updates()
        return a.optimizer(a.params) is distil.optimizer(distil.params)

    assert same("shared") and not same("separate")


def test_return_curves_carry_on_where_no_episode_ended():
    net = system(steps=4 * 2048)
    net.returns[0, :, 1] = torch.tensor([30.0, 2.0])
    net.returns[0, :, 3] = torch.tensor([20.0, 1.0])
    assert net.curve("a") == [0.0, 15.0, 15.0, 20.0]


# -- the form over deterministic policy gradients ---------------------------------------------------------------


def ddpg_pair(names: str = "ab", **changes) -> ddpg.DDPG:
    torch.manual_seed(0)
    spaces = Spaces((3,), 2, False, (-2.0, 0.0), (2.0, 1.0), action_shape=(2,))
    cfg = Config(base="ddpg", states=7, batch=5, widths=(8,), **changes)
    learners = ddpg.make_learners(0, spaces, list(names), cfg)
    for one in learners.values():
        for p in one.network.parameters():
            nn.init.normal_(p, std=0.8)
    return ddpg.DDPG(learners, cfg).double()


def test_the_advantage_of_ddpg_takes_both_values_at_the_peers_action():
    net, states = ddpg_pair(unit="reward"), torch.randn(6, 3, dtype=torch.float64)
    a, b = (net.learners[n].network for n in "ab")
    action, xi = net.compare("a", states, Clock())
    assert torch.equal(action, b.act(states))
    assert torch.allclose(xi, b.value(states, b.act(states)) - a.value(states, b.act(states)))
    w = weights(xi, 0.5)
    loss = net.distil("a", {"b": {"drawn": {"obs": states}}}, Clock()).total
    assert torch.allclose(loss, (w * ((a.act(states) - b.act(states)) ** 2).mean(-1)).sum(), atol=1e-12)
    loss.backward()
    assert all(p.grad is None for p in [*b.parameters(), *a.critic.parameters()])
    assert all(p.grad.any() for p in a.actor.parameters())


def test_the_critic_learns_the_bellman_target_and_the_target_follows():
    net = ddpg_pair()
    one, n = net.learners["a"], 5
    torch.manual_seed(2)
    rows = {"obs": torch.randn(n, 3), "action": torch.rand(n, 2), "reward": torch.randn(n)}
    rows = {k: v.double() for k, v in {**rows, "following": torch.randn(n, 3)}.items()}
    rows["terminated"] = torch.tensor([0, 1, 0, 0, 1]).bool()
    nn.init.normal_(one.target.critic[-1].weight)
    following = one.target.value(rows["following"], one.target.act(rows["following"]))
    goal = rows["reward"] + net.cfg.gamma * torch.where(rows["terminated"], 0.0, following)
    expected = ((one.network.value(rows["obs"], rows["action"]) - goal) ** 2).mean()
    batch = {"a": {"drawn": rows, "return": torch.zeros(0)}}
    assert torch.allclose(net.criticise("a", batch, Clock()).total, expected, atol=1e-12)
    parts = [net.criticise("a", batch, Clock(rank=r, world=2)).total for r in range(2)]
    assert torch.allclose(sum(parts) / 2, expected, atol=1e-12)
    worth = one.network.value(rows["obs"], one.network.act(rows["obs"]))
    assert torch.allclose(net.improve("a", batch, Clock()).total, -worth.mean(), atol=1e-12)
    before = [p.clone() for p in one.target.parameters()]
    one.follow(0.25)
    for old, now, fast in zip(before, one.target.parameters(), one.network.parameters(), strict=True):
        assert torch.allclose(now, 0.75 * old + 0.25 * fast, atol=1e-12)


def test_deterministic_actions_stay_inside_their_bounds():
    one = ddpg_pair().learners["a"]
    nn.init.normal_(one.network.actor[-1].weight, std=5.0)
    nn.init.zeros_(one.network.actor[-1].bias)
    obs = 10 * torch.randn(200, 3, dtype=torch.float64)
    for action in (one.network.act(obs), one.choose(obs, 5 * torch.randn(200, 2, dtype=torch.float64))):
        assert (action >= torch.tensor([-2.0, 0.0])).all() and (action <= torch.tensor([2.0, 1.0])).all()
        assert action[:, 0].min() < -1 and action[:, 0].max() > 1


# -- exact processes --------------------------------------------------------------------------------------------


def test_values_solve_the_bellman_equation():
    p, r, logits = random_mdps(3, 0)
    assert torch.allclose(p.sum(-1), torch.ones(3, 20, 4, dtype=torch.float64))
    policy = logits[:, 0].softmax(-1)
    v = values(p, r, policy, 0.9)
    backed = (policy * (r + 0.9 * torch.einsum("nsat,nt->nsa", p, v))).sum(-1)
    assert torch.allclose(v, backed, atol=1e-10)


def test_the_hybrid_and_a_copy_made_where_the_peer_is_better_lose_in_no_state():
    found = study(n=10, seed=3)
    assert found["hybrid"] >= -1e-9 and found["copy"] >= -0.01 and 0.3 < found["behind"] < 0.7


# -- a user's own things ----------------------------------------------------------------------------------------

MINE = """
import gymnasium
import torch
from torch import nn


def env():
    return gymnasium.make("Pendulum-v1", max_episode_steps=20)


class Net(nn.Module):
    def __init__(self, shape, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(*shape, 5), nn.ReLU())
        self.out, self.value = nn.Linear(5, outputs), nn.Linear(5, 1)

    def forward(self, obs):
        h = self.body(obs)
        return self.out(h), self.value(h)


def wrong(shape):
    return Net(shape, 7)


def constant():
    return 3
"""
SMALL = ["--steps", "64", "--envs", "2", "--horizon", "16", "--minibatches", "2", "--epochs", "1", "--every", "1",
         "--episodes", "2", "--states", "16", "--device", "cpu", "--quiet"]  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_for_dpd.py").write_text(MINE)
    return tmp_path


def test_an_environment_and_a_network_of_the_users(mine, capsys):
    own = ["--env", "mine_for_dpd:env", "--model", "mine_for_dpd:Net"]
    assert invoke(["run", "dpd", *own, *SMALL, "--out", "r"]) == 0, capsys.readouterr().err
    assert invoke(["export", "r", "--to", "onnx"]) == 0, capsys.readouterr().err
    found = stillhouse.load("r/students/a")
    assert found.act([0.0, 1.0, 0.0]).shape == (1,)
    report = stillhouse.Report.read("r")
    assert [s.name for s in report.students] == ["a", "b"] and "return" in report.students[0].metrics
    assert report.curves and report.cost["env_steps"] == 128


def test_a_live_network(tmp_path):
    cfg = replace(TINY, steps=32, every=1, warmup=0)
    policy = distill(
        Run(tmp_path, quiet=True, device="cpu"), CARTPOLE, cfg, network=lambda shape, k: ActorCritic(shape, k, (5,))
    )
    assert policy.act([0.0] * 4) in (0, 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--env", "CartPol-v1"], "no environment 'CartPol-v1'; did you mean 'CartPole-v1'"),
        (["--env", "mine_for_dpd:constant"], "environment mine_for_dpd:constant: observations must be a Box"),
        (["--env", "Blackjack-v1"], "observations must be a Box or Discrete space, got Tuple"),
        (["--env", "CartPole-v1", "--model", "mine_for_dpd:wrong"], "(logits (n, 2), values (n,)), got (n, 7)"),
        (["--env", "CartPole-v1", "--model", "mine_for_dpd:constant"], "returned int, expected a torch.nn.Module"),
        (["--env", "CartPole-v1", "--distance", "squared"], "squared distance has no meaning for discrete actions"),
        (["--env", "CartPole-v1", "--target", "sample"], "--target sample is for the squared distance"),
        (["--steps", "10"], "steps must cover one rollout of envs × horizon = 512, got 10"),
        (["--minibatches", "1000"], "minibatches must be at most envs × horizon = 512, got 1000"),
        (["--gamma", "1.5"], "gamma must lie in [0, 1], got 1.5"),
        (["--every", "-1"], "every must be at least 0, got -1"),
        (["--env", "CartPole-v1", "--base", "ddpg"], "need continuous actions with bounds; use --base ppo"),
        (["--data", "mnist"], "name it with --env"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(flags, said, mine, capsys):
    assert invoke(["run", "dpd", *flags, "--out", "r", "--device", "cpu", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_flags_the_claims_are_measured(tmp_path, capsys):
    """A short form of the built-in experiment: arms, claims, curves of every arm, the saved policies."""
    flags = [*SMALL[:-3], "--seeds", "1", "--device", "cpu", "--quiet"]
    assert invoke(["run", "dpd", *flags, "--out", str(tmp_path / "r")]) == 0, capsys.readouterr().err
    report = stillhouse.Report.read(tmp_path / "r")
    assert len(report.claims) == 5 and report.claims[0].holds and report.claims[1].holds
    assert set(report.curves[0].series) == {"independent", "DPD", "reversed sign"}
    assert (tmp_path / "r/students/b/plan.json").exists()


def test_seeds_of_learners_differ():
    found = make_learners(0, SPACES[True], ["a", "b"], Config())
    a, b = (found[n].network.actor[1].weight for n in "ab")
    assert not torch.equal(a, b) and fold(0, "learner", "a") != fold(0, "learner", "b")
    with pytest.raises(UserError, match="squared"):
        make_learners(0, SPACES[True], ["a"], Config(distance="squared"))
