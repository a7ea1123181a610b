"""Copies of a network that cost less without training: its small weights set to zero, its weights in eight bits."""

from __future__ import annotations

import copy

import torch
from torch import nn

from stillhouse.students.parametrized import bake, parametrize_weights, weight_layers
from stillhouse.students.plan import Plan
from stillhouse.students.projectors import Symmetric


@torch.no_grad()
def pruned(model: nn.Module, share: float) -> nn.Module:
    """A copy whose smallest weights are zero: the `share` of all matrices and kernels with the least |w|.

    The zeros are stored and multiplied like other numbers: such a copy is as large as the network, until it is sliced.
    """
    made = copy.deepcopy(model)
    matrices = [p for p in made.parameters() if p.dim() > 1]
    every = torch.cat([p.abs().flatten() for p in matrices])
    count = round(share * len(every))
    if count:
        bound = every.kthvalue(count).values
        for p in matrices:
            p.mul_(p.abs() > bound)
    return made


def int8(model: nn.Module) -> tuple[nn.Module, Plan]:
    """A copy whose linear and convolutional weights are whole numbers in eight bits times a scale per output.

    Returns:
        the copy, which computes with the values in floating point, and the plan that stores it by its codes.
    """
    made = copy.deepcopy(model)
    parametrize_weights(made, weight_layers(made), lambda path, layer: Symmetric(8))
    edits = bake(made)
    return made.eval(), Plan.identity(model).then(*edits)
