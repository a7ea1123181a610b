"""Objectives: pure functions, one value per sample."""

from stillhouse.objectives.ensembles import (
    error_covariance,
    general_weights,
    kdcl_linear,
    kdcl_mean,
    kdcl_minlogit,
    kdcl_naive,
    linear_weights,
)
from stillhouse.objectives.features import attention_transfer, cosine, mse
from stillhouse.objectives.logits import (
    cross_entropy,
    kl,
    mean_of_others,
    pairwise_kl,
    soft_cross_entropy,
    upcast,
)

__all__ = [
    "attention_transfer",
    "cosine",
    "cross_entropy",
    "error_covariance",
    "general_weights",
    "kdcl_linear",
    "kdcl_mean",
    "kdcl_minlogit",
    "kdcl_naive",
    "kl",
    "linear_weights",
    "mean_of_others",
    "mse",
    "pairwise_kl",
    "soft_cross_entropy",
    "upcast",
]
