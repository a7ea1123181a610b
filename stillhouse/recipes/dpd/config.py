"""Settings of a DPD run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Config:
    """Settings of one DPD run; every field is a flag."""

    base: Literal["ppo", "ddpg"] = "ppo"  # what each learner improves by
    steps: int = 200_000  # environment steps of EACH learner
    learners: int = 2  # policies trained side by side; 1 is plain PPO
    envs: int = 8  # environments of each learner
    horizon: int = 256  # steps of each environment per PPO update
    epochs: int = 10  # passes over the rollout per PPO update
    minibatches: int = 32  # parts of the rollout, a gradient step each
    lr: float = 3e-4  # learning rate of Adam
    anneal: bool = False  # let the learning rate fall linearly to 0
    gamma: float = 0.99  # discount
    lam: float = 0.95  # lambda of the generalised advantages
    clip: float = 0.2  # epsilon of the clipped ratio
    value_weight: float = 0.5  # weight of the value loss
    entropy_weight: float = 0.0  # weight of the entropy bonus
    max_norm: float = 0.5  # largest gradient norm
    widths: tuple[int, ...] = (64, 64)  # hidden layers of the actor and of the critic
    normalise: Literal["shared", "own", "none"] = "shared"  # running statistics of observations and rewards
    every: int = 5  # updates per distillation step; 0 never distils
    warmup: int = 0  # updates before the first distillation step
    states: int = 512  # states of the peer per distillation step
    buffer: int = 100_000  # latest states of each learner that its peers draw from
    alpha: float = 0.5  # exponent of the weights, per unit of advantage
    unit: Literal["spread", "reward"] = "spread"  # unit of the advantage: the spread of the values, or rewards
    normalise_weights: bool = True  # weights of a batch sum to one; else a peer that is worse everywhere weighs little
    distance: Literal["auto", "kl", "squared"] = "auto"  # auto: KL for discrete, squared for continuous actions
    target: Literal["mean", "sample"] = "mean"  # squared distance to the peer's mean action, or to a sample
    weight: float = 1.0  # factor on the distillation loss
    distil_lr: float = 0.0  # learning rate of distillation; 0 takes lr
    optimizer: Literal["separate", "shared"] = "separate"  # Adam of distillation: its own, or that of PPO
    batch: int = 64  # ddpg: rows of the own replay per gradient step
    stride: int = 2  # ddpg: environment steps per gradient step
    critic_lr: float = 1e-3  # ddpg: learning rate of the critic
    critic_decay: float = 1e-2  # ddpg: L2 of the critic
    target_rate: float = 0.01  # ddpg: how fast the target networks follow
    noise: float = 0.1  # ddpg: exploration, in halves of the range of actions
    reverse: bool = False  # weigh states where the own policy thinks itself better: a control, not for use
    over_batch: bool = False  # a further 1/states in the loss, as in the released PPO code

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "learners": 1, "envs": 1, "horizon": 1, "epochs": 1, "minibatches": 1, "every": 0,
                    "warmup": 0, "states": 1, "buffer": 1, "lr": 0, "distil_lr": 0, "value_weight": 0, "weight": 0,
                    "entropy_weight": 0, "alpha": 0, "batch": 1, "stride": 1, "critic_lr": 0, "critic_decay": 0,
                    "target_rate": 0, "noise": 0}  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.clip <= 0 or self.max_norm <= 0:
            raise UserError(f"clip and max_norm must be above 0, got {self.clip} and {self.max_norm}")
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"widths must name at least one hidden layer, got {self.widths}")
        if self.rollout > self.steps:
            of = "stride" if self.base == "ddpg" else "envs × horizon"
            raise UserError(
                f"steps must cover one rollout of {of} = {self.rollout}, got {self.steps}; lower one of them"
            )
        if self.base == "ppo" and self.minibatches > self.rollout:
            raise UserError(f"minibatches must be at most envs × horizon = {self.rollout}, got {self.minibatches}")
        if self.learners > 26:
            raise UserError(f"learners must be at most 26, got {self.learners}")

    @property
    def rollout(self) -> int:
        """Environment steps of one learner per step of the run: a PPO update, or a DDPG gradient step."""
        return self.stride if self.base == "ddpg" else self.envs * self.horizon

    @property
    def updates(self) -> int:
        """Steps of a run."""
        return self.steps // self.rollout
