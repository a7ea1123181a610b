"""Objectives: pure functions, one value per sample."""

from stillhouse.objectives.adversarial import discrimination, scale_gradient
from stillhouse.objectives.ensembles import (
    error_covariance,
    general_weights,
    kdcl_linear,
    kdcl_mean,
    kdcl_minlogit,
    kdcl_naive,
    linear_weights,
)
from stillhouse.objectives.features import (
    attention_transfer,
    cosine,
    flow,
    mse,
    negative_mean,
    neuron_selectivity,
    overhaul,
    variational,
)
from stillhouse.objectives.information import leave_one_out, mutual_information
from stillhouse.objectives.injection import inject
from stillhouse.objectives.logits import (
    cross_entropy,
    decoupled_kl,
    dist,
    jensen_shannon,
    kl,
    mean_of_others,
    pairwise_kl,
    reverse_kl,
    soft_cross_entropy,
    standardise,
    symmetric_kl,
    upcast,
)
from stillhouse.objectives.ranking import plackett_luce, shortlist
from stillhouse.objectives.relations import class_activation, class_relation, gram, inter_channel, similarity
from stillhouse.objectives.structure import (
    cka,
    contrastive,
    nt_xent,
    probabilistic,
    relative_angle,
    relative_distance,
)
from stillhouse.objectives.targets import beta_draws, ranked_like, smoothed
from stillhouse.objectives.tokens import token_cross_entropy, token_mean, tokens_per_sequence

__all__ = [
    "attention_transfer",
    "beta_draws",
    "cka",
    "class_activation",
    "class_relation",
    "contrastive",
    "cosine",
    "cross_entropy",
    "decoupled_kl",
    "discrimination",
    "dist",
    "error_covariance",
    "flow",
    "general_weights",
    "gram",
    "inject",
    "inter_channel",
    "jensen_shannon",
    "kdcl_linear",
    "kdcl_mean",
    "kdcl_minlogit",
    "kdcl_naive",
    "kl",
    "leave_one_out",
    "linear_weights",
    "mean_of_others",
    "mse",
    "mutual_information",
    "negative_mean",
    "neuron_selectivity",
    "nt_xent",
    "overhaul",
    "pairwise_kl",
    "plackett_luce",
    "probabilistic",
    "ranked_like",
    "relative_angle",
    "relative_distance",
    "reverse_kl",
    "scale_gradient",
    "shortlist",
    "similarity",
    "smoothed",
    "soft_cross_entropy",
    "standardise",
    "symmetric_kl",
    "token_cross_entropy",
    "token_mean",
    "tokens_per_sequence",
    "upcast",
    "variational",
]
