"""Environment steps per second of a DPD pair against stable-baselines3's PPO alone, side by side.

    .venv/bin/python benchmarks/control.py                        # CartPole-v1
    .venv/bin/python benchmarks/control.py --env HalfCheetah-v5 --horizon 256 --minibatches 32
    .venv/bin/python benchmarks/control.py --quick                # short, to see that it works

Same network, environments, steps per update, epochs and minibatches, on one thread in one process; a block of PPO
updates of each in turn. Steps of the pair are those of both learners together. Run it on a quiet machine. Results go
to OUT/control.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import read, table, write
from rounds import Stepper, side_by_side

import torch  # isort: skip

from stillhouse.control import find_environment
from stillhouse.evaluate import environment
from stillhouse.recipes.dpd.recipe import DPD, Config, make_learners, source


class Baseline:
    """stable-baselines3's PPO as something that runs `block` further updates each time it is called."""

    def __init__(self, env: str, cfg: Config, block: int, normalise: bool):
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import VecNormalize

        world: Any = make_vec_env(env, n_envs=cfg.envs, seed=0)
        if normalise:
            world = VecNormalize(world, gamma=cfg.gamma)
        widths = list(cfg.widths)
        self.steps = cfg.rollout * block
        self.model = PPO(
            "MlpPolicy", world, n_steps=cfg.horizon, batch_size=cfg.rollout // cfg.minibatches, n_epochs=cfg.epochs,
            learning_rate=cfg.lr, gamma=cfg.gamma, gae_lambda=cfg.lam, clip_range=cfg.clip, device="cpu", seed=0,
            policy_kwargs={"net_arch": {"pi": widths, "vf": widths}, "activation_fn": torch.nn.Tanh},
        )  # fmt: skip

    def __call__(self) -> None:
        self.model.learn(self.steps, reset_num_timesteps=False)


def ours(env: str, cfg: Config, block: int) -> Stepper:
    found = find_environment(env)
    system = DPD(make_learners(0, found[2], list("ab")[: cfg.learners], cfg), cfg)
    return Stepper(system, source(system, found, cfg), block, device="cpu")


def measure(args: argparse.Namespace) -> list[tuple[str, float]]:
    length = 10_000_000  # of the curves' memory, in steps; the benchmark never gets there
    cfg = Config(
        steps=length, envs=args.envs, horizon=args.horizon, epochs=args.epochs, minibatches=args.minibatches,
        every=args.every, widths=(64, 64), normalise="shared" if args.normalise else "none",
    )  # fmt: skip
    single = Config(**{**vars(cfg), "learners": 1, "every": 0})
    sides: Mapping[str, Any] = {
        "stable-baselines3 PPO": Baseline(args.env, cfg, args.block, args.normalise),
        "DPD, both learners": ours(args.env, cfg, args.block),
        "Stillhouse PPO alone": ours(args.env, single, args.block),
    }
    times = side_by_side(sides, args.repeats, args.warmup)
    steps = {name: cfg.rollout * args.block * (2 if name.startswith("DPD") else 1) for name in sides}
    rates = {name: steps[name] / t.median for name, t in times.items()}
    for name, rate in rates.items():
        print(f"  {name}: {rate:,.0f} environment steps a second", flush=True)
    base = times["stable-baselines3 PPO"]
    rows = []
    for name in list(sides)[1:]:
        factor = steps[name] / steps["stable-baselines3 PPO"]
        rows.append(
            (
                f"{name} / stable-baselines3 PPO, environment steps a second",
                factor * times[name].times_faster_than(base),
            )
        )
        rows.append(("… by processor time", factor * times[name].times_faster_than(base, processor=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=64, help="steps of each environment per update")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--minibatches", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="updates per distillation step")
    parser.add_argument("--normalise", action="store_true", help="running statistics on both sides")
    parser.add_argument("--block", type=int, default=4, help="updates of a block")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--out", default="runs/control")
    parser.add_argument("--quick", action="store_true", help="short blocks, 3 rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.block, args.repeats, args.warmup = 1, 3, 1
    rows = measure(args)
    path = Path(args.out) / "control.json"
    found = read(path) or {}
    found[args.env] = {"rows": rows, "settings": vars(args), "environment": environment()}
    write(path, found)
    print("\n" + table(["what", "measured"], [[what, f"{v:.2f}"] for what, v in rows]), flush=True)


if __name__ == "__main__":
    main()
