"""A classifier with several outputs per class, which are summed as probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of
from stillhouse.models import ModelSpec
from stillhouse.system import fold
from stillhouse.taps import head


class Grouped(nn.Module):
    """Class logits log Σ_k exp s_{c,k} of a network with C·S outputs s: softmax gives Σ_k softmax(s)_{c,k}.

    Args:
        body: a classifier; unless `subclasses` is 1 its head is replaced by a fresh one.
        head_at: path of its head, an `nn.Linear`.
        classes: C.
        subclasses: S; output c·S + k is subclass k of class c. 1 leaves the classifier as it is.
        seed: of the new head.

    Raises:
        UserError: no linear layer there.

    Example:
        >>> net = Grouped(nn.Sequential(nn.Linear(4, 2)), "0", classes=2, subclasses=3)
        >>> x = torch.ones(1, 4)
        >>> net.scores(x).shape, net(x).shape
        (torch.Size([1, 6]), torch.Size([1, 2]))
        >>> p = net.scores(x).softmax(-1).view(1, 2, 3).sum(-1)
        >>> bool(torch.allclose(net(x).softmax(-1), p))
        True
    """

    def __init__(self, body: nn.Module, head_at: str, classes: int, subclasses: int, seed: int = 0):
        super().__init__()
        self.body, self.classes, self.subclasses = body, classes, subclasses
        old = body.get_submodule(head_at)
        if not isinstance(old, nn.Linear):
            raise UserError(f"the head {head_at!r} must be an nn.Linear, got {type(old).__name__}")
        if subclasses > 1 or old.out_features != classes:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(fold("grouped head", seed))
                new = nn.Linear(old.in_features, classes * subclasses, old.bias is not None, dtype=old.weight.dtype)
            body.set_submodule(head_at, new.to(old.weight.device))

    def scores(self, inputs: Any) -> Tensor:
        """The C·S logits s, (n, C·S), of what the body is called with."""
        return logits_of(call(self.body, inputs))

    def group(self, scores: Tensor) -> Tensor:
        """Class logits (n, C) of s (n, C·S)."""
        return scores.unflatten(-1, (self.classes, self.subclasses)).logsumexp(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.group(logits_of(self.body(x)))


class GroupedText(Grouped):
    """`Grouped` for classifiers of token ids; the names are those that exporters and tokenizers know."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.group(self.scores({k: v for k, v in named.items() if v is not None}))


def grouped(classes: int, body: Mapping[str, Any], head_at: str, subclasses: int, text: bool = False) -> Grouped:
    """A `Grouped` around the network that `body` describes; what its ``plan.json`` names."""
    kind = GroupedText if text else Grouped
    return kind(ModelSpec.from_json(body).build(), head_at, classes, subclasses)


def grouped_head(
    student: nn.Module, inputs: Any, classes: int, subclasses: int, *, spec: ModelSpec | None = None, seed: int = 0
) -> tuple[Grouped, ModelSpec | None]:
    """The student with C·S outputs in place of its own, and how it is built again where `spec` says how it was.

    Args:
        student: a classifier that ends in an `nn.Linear`; it is used, not copied.
        inputs: one batch of its inputs.
        classes, subclasses: C and S.
        spec: how the student is built.
        seed: of the new head.

    Raises:
        UserError: the student does not end in a linear layer.
    """
    at = head(student, inputs)
    text = isinstance(inputs, Mapping)
    made = (GroupedText if text else Grouped)(student, at, classes, subclasses, seed)
    if spec is not None:
        how = {"body": spec.to_json(), "head_at": at, "subclasses": subclasses, "text": text}
        spec = ModelSpec("stillhouse.students.grouped:grouped", classes, spec.shape, options=how)
    return made, spec
