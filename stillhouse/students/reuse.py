"""SimKD: the student's body behind which the teacher's own classifier reads (Chen et al., CVPR 2022)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating
from stillhouse.models import ModelSpec
from stillhouse.taps import ends, tap

FACTOR = 2  # the projector's inner width is the teacher's divided by this, as in the paper


class ReusedHead(nn.Module):
    """z = W_t · mean over positions of P(f(x)) + b_t

    f is the body up to its last feature map, P a projector of three convolutions (1×1, 3×3, 1×1, batch norm and ReLU
    behind each) to the teacher's width, W_t and b_t the teacher's classifier, which stays as it is.

    Args:
        body: a classifier; its own head is taken out.
        at: path of its last feature map, as for `tap`.
        head_at: path of its head.
        channels: of that map.
        width: the teacher's.
        classes: outputs.
    """

    def __init__(self, body: nn.Module, at: str, head_at: str, channels: int, width: int, classes: int):
        super().__init__()
        self.body, self.at = body, at
        body.set_submodule(head_at, nn.Identity())
        inner = max(1, width // FACTOR)
        self.projector = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, classes).requires_grad_(False)

    def forward(self, x: Any) -> Tensor:
        with tap(self.body, self.at) as features:
            call(self.body, x)
        return self.head(self.projector(features[self.at]).mean((2, 3)))


def reused(shape: tuple[int, ...], classes: int, body: Mapping[str, Any], options: Mapping[str, Any]) -> ReusedHead:
    """A `ReusedHead` around the network that `body` describes; what its ``plan.json`` names."""
    return ReusedHead(ModelSpec.from_json(body).build(), classes=classes, **options)


def reuse_head(
    student: nn.Module, teacher: nn.Module, inputs: Any, spec: ModelSpec | None = None, teacher_inputs: Any = None
) -> tuple[ReusedHead, ModelSpec | None, tuple[str, str]]:
    """The student behind the teacher's classifier, for SimKD.

    It learns from features alone: mean squared error between projected features and the teacher's, at the teacher's
    last feature map, without labels.

    Args:
        student: a convolutional classifier; its body is used, not copied.
        teacher: a convolutional classifier that ends in pooling and one linear layer.
        inputs: one batch of inputs.
        spec: how the student is built again.
        teacher_inputs: one batch of the teacher's inputs where they differ.

    Returns:
        The new student, how it is built again, and the paths in student and teacher of what a ``feature`` objective of
        `Distill` compares.

    Raises:
        UserError: no feature map (n, C, H, W) before a linear classifier.

    Example:
        >>> net = lambda c: nn.Sequential(
        ...     nn.Conv2d(1, c, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3))
        >>> model, _, paths = reuse_head(net(4), net(8), torch.zeros(2, 1, 8, 8))
        >>> model(torch.zeros(2, 1, 8, 8)).shape, paths
        (torch.Size([2, 3]), ('projector', '2:in'))
    """
    found = []
    for who, model, x in (
        ("student", student, inputs),
        ("teacher", teacher, inputs if teacher_inputs is None else teacher_inputs),
    ):
        with evaluating(model):
            at = ends(model, x)
            with torch.no_grad(), tap(model, at.features) as features:
                call(model, x)
        shape = tuple(features[at.features].shape)
        if len(shape) != 4:
            raise UserError(f"simkd needs a feature map (n, C, H, W) in the {who}, got {shape}")
        found.append((at, shape[1]))
    (own, channels), (theirs, width) = found
    head = teacher.get_submodule(theirs.head)
    assert isinstance(head, nn.Linear)
    if head.in_features != width:
        raise UserError(
            f"simkd reuses a classifier that reads pooled features: the teacher's {theirs.head!r} reads "
            f"{head.in_features} numbers, its last feature map has {width} channels"
        )
    options: dict[str, Any] = {"at": own.features, "head_at": own.head, "channels": channels, "width": width}
    model = ReusedHead(student, classes=head.out_features, **options)
    model.head.load_state_dict(copy.deepcopy(head.state_dict() if head.bias is not None else _with_bias(head)))
    if spec is not None:
        build = {"body": spec.to_json(), "options": options}
        spec = ModelSpec("stillhouse.students.reuse:reused", head.out_features, spec.shape, options=build)
    return model, spec, ("projector", theirs.features)


def _with_bias(head: nn.Linear) -> dict[str, Tensor]:
    return {"weight": head.weight.detach(), "bias": torch.zeros(head.out_features)}
