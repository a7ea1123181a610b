"""Policies: environments, rollouts, actor-critic networks, PPO as pure functions, and policies as outcomes."""

from stillhouse.control.environments import Environments, Spaces, find_environment
from stillhouse.control.networks import ActorCritic, Learner, Statistics, divergence, entropy, log_prob
from stillhouse.control.policy import Acting, Policy, play
from stillhouse.control.ppo import advantages, clipped, discounted
from stillhouse.control.rollout import Rollout

__all__ = [
    "Acting",
    "ActorCritic",
    "Environments",
    "Learner",
    "Policy",
    "Rollout",
    "Spaces",
    "Statistics",
    "advantages",
    "clipped",
    "discounted",
    "divergence",
    "entropy",
    "find_environment",
    "log_prob",
    "play",
]
