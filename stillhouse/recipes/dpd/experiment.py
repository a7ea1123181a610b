"""DPD on CartPole and on exact processes, with its claims; or on an environment and a network of the user's.

stillhouse run dpd --out runs/dpd                                # the claims, about six minutes
stillhouse run dpd --env InvertedPendulum-v5 --out runs/pendulum
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from stillhouse.control.environments import find_environment
from stillhouse.control.policy import Policy, play
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import environment
from stillhouse.options import Options
from stillhouse.recipes.dpd.mdp import study
from stillhouse.recipes.dpd.recipe import Config, distill
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.system import fold
from stillhouse.trials import mean, table, trials

CARTPOLE = "CartPole-v1"
Series = dict[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class ControlOptions(Options):
    """Options of systems for policies."""

    BRINGS: ClassVar[tuple[str, ...]] = ("env", "model")
    env: str | None = None  # your environment: a name gymnasium knows, or package.module:function
    model: str | None = None  # your actor-critic: package.module:function (stillhouse show dpd)
    seeds: int = 5  # seeds for the claims of the built-in experiment
    episodes: int = 20  # episodes to judge each policy on at the end, without noise


OPTIONS = ControlOptions
# What `stillhouse run dpd` does without an environment of the user's: two learners on CartPole.
PRESET = Config(
    steps=30_000, envs=8, horizon=64, epochs=10, minibatches=8, lr=1e-3, gamma=0.98, widths=(32, 32),
    normalise="none", every=1, warmup=5, buffer=4096,
)  # fmt: skip
# The smallest settings that touch everything, for the contract table.
TINY = replace(
    PRESET, steps=192, envs=2, horizon=16, epochs=2, minibatches=2, widths=(8,), normalise="shared", every=2,
    warmup=1, states=16, buffer=48,
)  # fmt: skip


def tiny(run: Run, cfg: Config = TINY, env: str = CARTPOLE) -> Policy:
    return distill(run, env, cfg)


def main(run: Run, options: ControlOptions, cfg: Config, command: str) -> Report | None:
    """The user's environment or network; or the claims of the card."""
    if options.data is not None:
        raise UserError(f"--data {options.data}: policies learn in an environment; name it with --env")
    if options.own:
        policy = distill(run, options.env or CARTPOLE, cfg, network=options.model)
        return finish(run, policy, options, cfg, command)
    exact = run.memo("exact", lambda: study(seed=run.seed))
    arms = run_arms(run, cfg, options)
    # The arm's first seed is this run's own: what it trained is read back.
    policy = distill(run.child(f"dpd-{run.seed}", seed=run.seed, quiet=True), CARTPOLE, cfg)
    policy.cost["seconds"] = arms["DPD"][0]["seconds"]
    report = finish(run, policy, options, cfg, command)
    if report is not None:
        seeds = list(options.children())
        report.claims += [*exact_claims(exact, run.seed), *claims(arms, seeds)]
        report.curves = [*arm_curves(arms, cfg), *report.curves]
        report.tables += [arm_table(arms)]
        report.notes.append(
            f"On the way the distilled copies in exact processes fell up to {-exact['dip']:.2f} below their start "
            f"in one state; nothing is claimed about the way. {100 * exact['behind']:.0f} % of states were behind."
        )
    return report


def finish(run: Run, policy: Policy, options: ControlOptions, cfg: Config, command: str) -> Report | None:
    """Saves the policies and reports how they act without noise."""
    if run.main:
        policy.save(run.folder)
    run.barrier()
    if not run.main:
        return None
    make = find_environment(options.env or CARTPOLE)[1]
    played = {m.name: play(m.model, make, options.episodes, fold(run.seed, "judge")) for m in policy}
    returns = {name: p["return"] for name, p in played.items()}
    series: Series = {name: ([r["step"] for r in policy.logs], [r[name] for r in policy.logs]) for name in returns}
    curve = Curve("Return in training, each learner", "environment steps of each", "mean return", series)
    title = f"DPD · {cfg.learners} learners on {policy.environment}"
    metrics = {"best_return": max(returns.values()), "worst_return": min(returns.values())}
    notes = [f"Returns of the policies are over {options.episodes} episodes without noise; curves are with it."]
    rows = policy.rows(run.folder, played)
    cost = policy.cost
    return Report("dpd", title, command, run.seed, environment(), metrics, [], rows, cost, [curve], notes=notes)


# -- the claims of the card --------------------------------------------------------------------------------------


def run_arms(run: Run, cfg: Config, options: ControlOptions) -> dict[str, list[dict[str, Any]]]:
    """Independent learners, DPD and DPD with the sign reversed, on the same seeds and steps."""
    make = find_environment(CARTPOLE)[1]

    def once(changes: Mapping[str, Any], child: Run) -> dict[str, Any]:
        policy = distill(child, CARTPOLE, replace(cfg, **changes))
        names = [m.name for m in policy]
        curves = [[row[name] for row in policy.logs] for name in names]
        areas = sorted(sum(c) / len(c) for c in curves)
        ends = sorted(play(m.model, make, options.episodes, fold(child.seed, "judge"))["return"] for m in policy)
        found = {"worse": areas[0], "better": areas[-1], "worse_end": ends[0], "better_end": ends[-1]}
        return {**found, "curves": curves, "seconds": policy.cost["seconds"]}

    arms: dict[str, dict[str, Any]] = {"independent": {"every": 0}, "DPD": {}, "reversed sign": {"reverse": True}}
    return trials(run, {arm: partial(once, changes) for arm, changes in arms.items()}, options.children())


def exact_claims(exact: Mapping[str, float], seed: int) -> list[Claim]:
    n = exact["processes"]
    hybrid, copy = exact["hybrid"], exact["copy"]
    first = f"1. the hybrid is no worse than both policies in any state of {n} exact processes (least difference)"
    second = "1. … nor is a policy distilled only where the peer is better (least difference at convergence)"
    return [
        Claim(first, hybrid >= -1e-9, hybrid, -1e-9, [seed]),
        Claim(second, copy >= -0.01, copy, -0.01, [seed]),
    ]


def claims(arms: Mapping[str, Sequence[Mapping[str, Any]]], seeds: list[int]) -> list[Claim]:
    """The card's claims on learning, as measured, holding or not."""
    alone, dpd, control = (arms[a] for a in ("independent", "DPD", "reversed sign"))
    worse, better = (mean(dpd, k) / mean(alone, k) for k in ("worse", "better"))
    gain = mean(dpd, "worse") - mean(control, "worse")
    return [
        Claim("2. area under the return curve of the worse learner, DPD / independent", worse >= 1, worse, 1.0, seeds),
        Claim("2. … of the better learner, DPD / independent", better >= 0.95, better, 0.95, seeds),
        Claim("2. the reversed sign does not beat it: area of the worse, DPD − reversed", gain >= 0, gain, 0.0, seeds),
    ]


def arm_curves(arms: Mapping[str, Sequence[Mapping[str, Any]]], cfg: Config) -> list[Curve]:
    """Return curves, mean over seeds: of the worse and of the better learner by area, every arm."""
    steps = [(k + 1) * cfg.rollout for k in range(cfg.updates)]
    made = []
    for which, title in ((0, "Return of the worse learner"), (-1, "Return of the better learner")):
        series: Series = {}
        for arm, results in arms.items():
            lines = [sorted(r["curves"], key=sum)[which] for r in results]
            series[arm] = (steps, [sum(point) / len(point) for point in zip(*lines, strict=True)])
        made.append(Curve(f"{title}, mean over seeds", "environment steps of each", "mean return", series))
    return made


def arm_table(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    columns = {
        "area, worse learner": ("worse", 1.0, 1),
        "area, better learner": ("better", 1.0, 1),
        "final return, worse": ("worse_end", 1.0, 1),
        "final return, better": ("better_end", 1.0, 1),
        "seconds": ("seconds", 1.0, 0),
    }
    note = "mean ± standard deviation over seeds; area is the mean of the return curve; final returns without noise"
    return table("Arms on CartPole, two learners each", arms, columns, note)
