"""The control leaf: environments that resume, rollouts, replay, PPO's formulas, policies as outcomes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from torch import nn

import stillhouse
from stillhouse.control import (
    Acting,
    ActorCritic,
    Environments,
    Learner,
    Policy,
    Rollout,
    Spaces,
    Statistics,
    advantages,
    clipped,
    discounted,
    divergence,
    entropy,
    find_environment,
    log_prob,
    play,
)
from stillhouse.control.networks import check_network, sample
from stillhouse.control.ppo import judged, losses, minibatch
from stillhouse.data import Drawn
from stillhouse.data.replay import Replay
from stillhouse.errors import UserError
from stillhouse.system import Clock

RNG = np.random.default_rng(0)


def t64(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


class Walk(gymnasium.Env):
    """A number that moves by the action and by a draw; over at 1, cut off after `limit` steps."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, continuous: bool = False, limit: int = 5, goal: float = 1e9, leaks: bool = False):
        self.action_space = Box(-0.5, 0.5, (1,), np.float32) if continuous else Discrete(2, start=3)
        self.limit, self.goal, self.leaks, self.secret, self.taken = limit, goal, leaks, 0.0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, float(self.np_random.normal())
        self.secret += 1.0  # not reset: only what leaks it shows it
        return self.seen(), {}

    def seen(self):
        return np.array([self.x + (self.secret if self.leaks else 0.0)], dtype=np.float32)

    def step(self, action):
        self.taken.append(action)
        self.x += float(np.sum(action)) - (3.5 if np.ndim(action) == 0 else 0) + float(self.np_random.normal())
        self.t += 1
        return self.seen(), self.x, self.x > self.goal, self.t >= self.limit, {}


def walk(**how):
    make = lambda: Walk(**how)  # noqa: E731
    return ("walk", make, Spaces.of(make(), "walk"))


def learner(spaces: Spaces, seed: int = 0, statistics: Statistics | None = None) -> Learner:
    torch.manual_seed(seed)
    made = Learner(ActorCritic(spaces.shape, spaces.outputs, (8,)), spaces, statistics)
    for p in made.network.actor.parameters():
        nn.init.normal_(p, std=0.7)
    return made


# -- formulas ---------------------------------------------------------------------------------------------------


def by_hand(r, v, nxt, term, end, gamma, lam):
    """Σ_l (γλ)^l δ_{t+l} up to the end of the episode, one sum per step."""
    T, N = r.shape
    delta = r + gamma * np.where(term, 0.0, nxt) - v
    out = np.zeros_like(r)
    for n in range(N):
        for t in range(T):
            factor = 1.0
            for k in range(t, T):
                out[t, n] += factor * delta[k, n]
                factor *= gamma * lam
                if end[k, n]:
                    break
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (0.97, 1.0), (0.9, 0.0), (1.0, 0.95)])
def test_advantages_are_the_double_sum(gamma, lam):
    r, v, nxt = (RNG.normal(size=(30, 4)) for _ in range(3))
    term = RNG.random((30, 4)) < 0.1
    end = term | (RNG.random((30, 4)) < 0.1)
    ours = advantages(*(torch.from_numpy(a) for a in (r, v, nxt, term, end)), gamma, lam)
    np.testing.assert_allclose(ours.numpy(), by_hand(r, v, nxt, term, end, gamma, lam), atol=1e-12)


def test_a_cut_off_episode_counts_the_value_it_was_cut_off_at_and_a_terminated_one_does_not():
    one, yes, no = torch.ones(1, 1), torch.tensor([[True]]), torch.tensor([[False]])
    assert advantages(one, 0 * one, 10 * one, no, yes, 0.5, 0.9).item() == 6
    assert advantages(one, 0 * one, 10 * one, yes, yes, 0.5, 0.9).item() == 1


def test_discounted_rewards_start_anew():
    r, end = t64(20, 3), torch.from_numpy(RNG.random((20, 3)) < 0.2)
    ours, total = discounted(r, end, 0.9), torch.zeros(3, dtype=torch.float64)
    for t in range(20):
        total = r[t] + 0.9 * total
        assert torch.allclose(ours[t], total)
        total = torch.where(end[t], torch.zeros_like(total), total)


def test_clipped_loss_and_where_its_gradient_is():
    """−A at r = 1; no gradient where the ratio has gone further than ε in the direction that the advantage wants."""
    log_ratio = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss = clipped(log_ratio, a, 0.2)
    r = log_ratio.detach().exp()
    assert torch.allclose(loss, torch.stack([-2 * r[0], torch.tensor(-1.2), -r[2], r[3], torch.tensor(0.8)]).double())
    loss.sum().backward()
    assert torch.allclose(log_ratio.grad, torch.stack([-2 * r[0], 0 * r[0], -r[2], r[3], 0 * r[0]]))


@pytest.mark.parametrize("discrete", [True, False])
def test_distributions_are_those_of_torch(discrete):
    peer, own = t64(50, 6), t64(50, 6).requires_grad_()

    def theirs(out):
        if discrete:
            return torch.distributions.Categorical(logits=out)
        mean, log_std = out.chunk(2, -1)
        return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)

    action = torch.from_numpy(RNG.integers(0, 6, 50)) if discrete else t64(50, 3)
    assert torch.allclose(log_prob(own, action, discrete), theirs(own).log_prob(action), atol=1e-12)
    assert torch.allclose(entropy(own, discrete), theirs(own).entropy(), atol=1e-12)
    expected = torch.distributions.kl_divergence(theirs(peer), theirs(own))
    assert torch.allclose(divergence(peer, own, discrete), expected, atol=1e-12)
    ours, autograd = (torch.autograd.grad(x.sum(), own)[0] for x in (divergence(peer, own, discrete), expected))
    assert torch.allclose(ours, autograd, atol=1e-12)
    assert divergence(peer.requires_grad_(), peer.detach(), discrete).requires_grad is False


def test_actions_are_drawn_from_the_distribution():
    spaces = Spaces((1,), 3)
    logits = torch.tensor([0.0, 1.0, -1.0])
    noise = Learner(nn.Identity(), spaces).noise((100_000,), torch.Generator().manual_seed(0))
    found = torch.bincount(sample(logits.expand(100_000, 3), noise, True)) / 100_000
    assert (found - logits.softmax(0)).abs().max() < 0.005
    out = torch.tensor([[1.0, 2.0, 0.0, float(np.log(2))]])
    assert torch.allclose(sample(out, torch.tensor([[1.0, -1.0]]), False), torch.tensor([[2.0, 0.0]]))


def test_statistics_in_pieces_are_those_of_all_rows():
    rows, sums = t64(70, 3).float() * 5 + 2, t64(70).float() * 9
    seen = Statistics((3,))
    assert torch.allclose(seen.normal(rows[:2]), rows[:2])  # as it comes it changes nothing
    for a, b in ((0, 10), (10, 11), (11, 70)):
        seen.update(rows[a:b], sums[a:b])
    assert torch.allclose(seen.mean, rows.mean(0), atol=1e-5)
    assert torch.allclose(seen.var, rows.var(0, correction=0), rtol=1e-5)
    assert float(seen.scale) == pytest.approx(float(sums.std(correction=0)), rel=1e-5)
    normal = seen.normal(rows)
    assert normal.mean().abs() < 1e-5 and normal.std() == pytest.approx(1, abs=0.01)


def test_values_are_in_rewards():
    spaces, seen = Spaces((1,), 2), Statistics((1,))
    seen.reward.copy_(torch.tensor([0.0, 9.0]))
    one = learner(spaces, statistics=seen)
    plain = Learner(one.network, spaces)
    assert torch.allclose(one(torch.ones(4, 1))[1], 3 * plain(torch.ones(4, 1))[1])


def test_an_epoch_of_minibatches_goes_through_all_rows_and_processes_share_them():
    clock = Clock(seed=3)
    for epoch in range(2):
        turns = [replace(clock, turn=4 * epoch + k) for k in range(4)]
        parts = [minibatch(30, 4, c, "a")[0] for c in turns]
        assert sorted(torch.cat(parts).tolist()) == list(range(30))
        for c in turns:
            both = [minibatch(30, 4, replace(c, rank=r, world=2), "a") for r in range(2)]
            assert torch.equal(both[0][0], both[1][0])
            assert torch.equal(torch.cat([mine for _, mine in both]), both[0][0])
    first, second = (minibatch(30, 1, replace(clock, turn=k), "a")[0] for k in range(2))
    assert not torch.equal(first, second)


def test_losses_of_a_fresh_rollout():
    """Ratios are 1: the policy loss is minus the normalised advantage; the value loss is that of its goal."""
    env = walk()
    one = learner(env[2])
    batch = Rollout("a", env, one, envs=3, steps=7, finish=lambda r: judged(one, r, 0.9, 0.8)).batch(Clock())
    rows = torch.arange(21)
    policy, value, h = losses(one, batch, rows, rows, 0.2)
    a = batch["advantage"]
    assert torch.allclose(policy, -(a - a.mean()) / (a.std(correction=0) + 1e-8), atol=1e-5)
    assert torch.allclose(value, a**2, atol=1e-5)  # goal − V is the advantage
    assert torch.allclose(h, entropy(one(batch["obs"])[0], True))


# -- environments -----------------------------------------------------------------------------------------------


def test_environments_go_on_from_their_state():
    def seed(i, episode):
        return 100 * i + episode

    def run(world, rows):
        return [world.step(a, seed) for a in rows]

    for continuous in (False, True):
        env = walk(continuous=continuous)
        plan = torch.rand(20, 3, 1) - 0.5 if continuous else torch.randint(2, (20, 3))
        whole = Environments(*env, 3)
        whole.wake(seed)
        expected = run(whole, plan)
        first, second = Environments(*env, 3), Environments(*env, 3)
        first.wake(seed)
        run(first, plan[:13])
        second.load_state_dict(first.state_dict())
        kept = second.state_dict()  # also before it is woken
        assert all(torch.equal(kept[k], v) for k, v in first.state_dict().items())
        second.wake(seed)
        for a, b in zip(expected[13:], run(second, plan[13:]), strict=True):
            assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def test_an_environment_that_remembers_between_episodes_is_refused_when_it_is_loaded():
    env = walk(leaks=True)
    world = Environments(*env, 1)
    world.wake(lambda i, e: e)
    for _ in range(7):
        world.step(torch.zeros(1, dtype=torch.int64), lambda i, e: e)
    again = Environments(*env, 1)
    again.load_state_dict(world.state_dict())
    with pytest.raises(UserError, match="not deterministic under its reset seed"):
        again.wake(lambda i, e: e)


def test_actions_reach_the_environment_as_its_space_wants_them():
    world = Environments(*walk(), 1)
    world.wake(lambda i, e: e)
    world.step(torch.tensor([1]), lambda i, e: e)
    assert world.envs[0].taken == [4]  # Discrete(2, start=3)
    world = Environments(*walk(continuous=True), 1)
    world.wake(lambda i, e: e)
    world.step(torch.tensor([[9.0]]), lambda i, e: e)
    assert world.envs[0].taken[0].tolist() == [0.5] and world.envs[0].taken[0].dtype == np.float32


def test_rows_of_a_rollout():
    """`following` is the state from before a reset, and is the next row's state where there was none."""
    env = walk(limit=4, goal=2.0)
    batch = Rollout("a", env, learner(env[2]), envs=2, steps=30).batch(Clock())
    rows = {k: v.view(30, 2, *v.shape[1:]) for k, v in batch.items()}
    go_on = ~rows["ended"][:-1]
    assert torch.equal(rows["following"][:-1][go_on], rows["obs"][1:][go_on])
    assert not torch.equal(rows["following"][:-1][~go_on], rows["obs"][1:][~go_on])
    assert (rows["terminated"] == (rows["following"][..., 0] > 2)).all() and rows["terminated"].any()
    assert (rows["ended"] & ~rows["terminated"]).any()  # cut off
    assert torch.equal(rows["return"].isnan(), ~rows["ended"])
    for i in range(2):
        totals, total = [], 0.0
        for reward, ended in zip(rows["reward"][:, i].tolist(), rows["ended"][:, i].tolist(), strict=True):
            total += reward
            if ended:
                totals.append(total)
                total = 0.0
        assert rows["return"][:, i][rows["ended"][:, i]].tolist() == pytest.approx(totals, rel=1e-5)


def test_rollouts_are_a_function_of_the_clock_and_alike_on_every_process():
    env = walk()

    def batches(clock, name="a", n=3):
        source = Rollout(name, env, learner(env[2]), envs=2, steps=6)
        return [source.batch(replace(clock, step=k)) for k in range(n)]

    base = batches(Clock(seed=1))
    for other in (Clock(seed=1), Clock(seed=1, rank=1, world=2)):
        for a, b in zip(base, batches(other), strict=True):
            assert all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)
    for different in (batches(Clock(seed=2)), batches(Clock(seed=1), "b")):
        assert not torch.equal(base[0]["obs"], different[0]["obs"])
    source = Rollout("a", env, learner(env[2]), envs=2, steps=6)
    source.batch(Clock(seed=1))
    again = Rollout("a", env, learner(env[2]), envs=2, steps=6)
    again.load_state_dict(source.state_dict())
    assert torch.equal(again.batch(Clock(seed=1, step=1))["obs"], base[1]["obs"])


def test_numbers_that_are_not_finite_are_refused():
    class Broken(Walk):
        def step(self, action):
            return self.seen(), float("nan"), False, False, {}

    spaces = Spaces.of(Broken(), "broken")
    with pytest.raises(UserError, match="broken gave a reward that is not finite"):
        Rollout("a", ("broken", Broken, spaces), learner(spaces), steps=2).batch(Clock())


def test_what_gymnasium_has_is_found():
    assert find_environment("CartPole-v1")[2] == Spaces((4,), 2)
    pendulum = find_environment("Pendulum-v1")[2]
    assert (pendulum.discrete, pendulum.outputs, pendulum.low, pendulum.high) == (False, 1, (-2.0,), (2.0,))
    lake = find_environment("FrozenLake-v1")[2]
    assert (lake.shape, lake.one_hot, lake.encode(3).argmax()) == ((16,), 16, 3)
    for spaces in (pendulum, lake):
        assert Spaces.from_json(json.loads(json.dumps(spaces.to_json()))) == spaces


class Old(Walk):
    def step(self, action):
        return super().step(action)[:4]


class OtherShape(Walk):
    observation_space = Box(-1, 1, (3,), np.float32)


class Plain(Walk):
    observation_space = Dict({"x": Box(-1, 1, (1,))})


class Several(Walk):
    def __init__(self):
        super().__init__()
        self.action_space = MultiDiscrete([2, 2])


def test_environments_that_cannot_be_used_are_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mine_for_control.py").write_text("def broken():\n    raise OSError('no licence')\nconstant = 3\n")
    for env, said in (
        ("CartPol-v1", r"no environment 'CartPol-v1'; did you mean 'CartPole-v1'"),
        ("CartPole-v7", r"no environment 'CartPole-v7'; did you mean"),
        ("mine_for_control:broken", "cannot be made: OSError: no licence"),
        ("mine_for_control:constant", "expected a function that returns an environment"),
        ("mine_for_control:brokn", "did you mean 'broken'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        (Old, r"step must return \(observation, reward, terminated, truncated, info\), got 4 values"),
        (OtherShape, r"reset gave an observation of shape \(1,\), its space says \(3,\)"),
        (Plain, "observations must be a Box or Discrete space"),
        (Several, "actions must be a Discrete or a float Box space"),
        (lambda: 3, "observations must be a Box or Discrete space, got None"),
    ):
        with pytest.raises(UserError, match=said) as error:
            find_environment(env)
        assert "\n" not in str(error.value)


class Wrong(nn.Module):
    def __init__(self, outputs, values=True):
        super().__init__()
        self.outputs, self.values = outputs, values

    def forward(self, obs):
        out = torch.zeros(len(obs), self.outputs)
        return (out, torch.zeros(len(obs), 1)) if self.values else out


def test_networks_that_do_not_fit_are_named_in_one_line():
    spaces = Spaces((4,), 2)
    check_network(Wrong(2), spaces, "mine")
    for network, said in (
        (Wrong(3), r"mine must return \(logits \(n, 2\), values \(n,\)\), got \(n, 3\), \(n, 1\)"),
        (Wrong(2, values=False), "mine must return .* got a Tensor"),
        (nn.Linear(5, 2), r"mine does not take observations \(n, 4\)"),
    ):
        with pytest.raises(UserError, match=said):
            check_network(network, spaces, "mine")


# -- replay -----------------------------------------------------------------------------------------------------


def count(n: int = 4) -> Drawn:
    """Batches whose rows are numbered by nothing but the draw."""
    return Drawn(lambda k, g: {"x": torch.rand(k, 2, generator=g), "y": torch.zeros(k)}, n, "count")


def test_replay_keeps_the_latest_rows():
    plain = [count().batch(Clock(step=k))["x"] for k in range(5)]
    replay = Replay(count(), ["x"], capacity=10, draw=400)
    for k in range(5):
        batch = replay.batch(Clock(step=k))
        latest = torch.cat(plain[: k + 1])[-10:]
        assert torch.equal(batch["x"], plain[k]) and set(batch["drawn"]) == {"x"}
        same = (batch["drawn"]["x"].unsqueeze(1) == latest).all(-1)
        assert same.any(1).all() and same.any(0).all()  # only rows that are there, and each of them


def test_replay_goes_on_from_its_state_and_draws_alike_on_every_process():
    env = walk()

    def make():
        return Replay(Rollout("a", env, learner(env[2]), envs=2, steps=3), ["obs", "action"], capacity=13, draw=5)

    whole, first, second = make(), make(), make()
    expected = [whole.batch(Clock(step=k)) for k in range(6)]
    for k in range(3):
        first.batch(Clock(step=k, rank=1, world=2))
    assert not second.state_dict()["cursor"]
    second.load_state_dict(first.state_dict())
    for k in range(3, 6):
        found = second.batch(Clock(step=k))
        assert torch.equal(found["obs"], expected[k]["obs"])
        assert all(torch.equal(found["drawn"][n], expected[k]["drawn"][n]) for n in ("obs", "action"))
    big = Replay(count(9), ["x"], capacity=4, draw=3)
    big.batch(Clock())
    assert torch.equal(big.rows["x"], count(9).batch(Clock())["x"][-4:])


def test_replay_mistakes():
    with pytest.raises(UserError, match="keeps and draws at least one row"):
        Replay(count(), ["x"], 0, 1)
    with pytest.raises(UserError, match=r"keep \['z'\], the source gives \['x', 'y'\]"):
        Replay(count(), ["z"], 4, 1).batch(Clock())


# -- policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_a_policy_is_saved_loaded_played_and_exported(env, tmp_path):
    name, make, spaces = find_environment(env)
    seen = Statistics(spaces.shape)
    seen.update(torch.randn(50, *spaces.shape), torch.randn(50))
    one = learner(spaces, statistics=seen)
    policy = Policy.of({"a": learner(spaces, 1), "b": one}, name, None, (8,))
    policy.scores = {"a": 1.0, "b": 2.0}
    policy.save(tmp_path)
    loaded = stillhouse.load(tmp_path / "students/b")
    assert isinstance(loaded, Acting) and loaded.spaces == spaces
    obs, _ = make().reset(seed=1)
    assert policy.best.name == "b"
    assert np.array_equal(policy.act(obs), loaded.act(obs)) and np.array_equal(policy.act(obs, "b"), loaded.act(obs))
    assert play(loaded, make, 2, 5) == play(policy["b"].model, make, 2, 5)
    out = one(torch.from_numpy(obs).unsqueeze(0))[0]
    expected = out.argmax() if spaces.discrete else out[:, :1].clamp(-2, 2)
    assert np.asarray(loaded.act(obs)).item() == pytest.approx(expected.item())
    found = stillhouse.export.export(loaded, torch.randn(2, *spaces.shape), "onnx", tmp_path / "b.onnx")
    assert found.max_rel_diff < 1e-5
    assert policy.rows(tmp_path, {"b": {"return": 1.0}})[1].metrics["return"] == 1.0


def test_a_policy_of_a_live_network_needs_it_to_be_loaded(tmp_path):
    spaces = Spaces((4,), 2)
    policy = Policy.of({"a": Learner(Wrong(2), spaces)}, "mine", None, (8,), live=True)
    policy.save(tmp_path)
    with pytest.raises(UserError, match="live Acting"):
        stillhouse.load(tmp_path / "students/a")
    assert stillhouse.load(tmp_path / "students/a", base=Acting(Wrong(2), spaces)).act(np.zeros(4)) == 0
