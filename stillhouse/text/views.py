"""Batches of sequence-to-sequence examples in several views: one example, one prefix and target per view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.samples import digest
from stillhouse.data.sources import Batches
from stillhouse.errors import UserError
from stillhouse.objectives.tokens import IGNORE
from stillhouse.system import Batch, Clock
from stillhouse.text.encoding import Codec
from stillhouse.text.tasks import Example

Ids = Sequence[Sequence[int]]


@dataclass
class View:
    """The token ids of one view of all examples.

    Attributes:
        inputs, targets: ids per example, end tokens included.
        tensors: what the model reads beside them, by name, a row per example.
        pad, start: ids of padding and of the decoder's beginning.
    """

    inputs: Ids
    targets: Ids
    pad: int
    start: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, ids: np.ndarray, share: np.ndarray | None = None) -> dict[str, Tensor]:
        """The rows `share` of the global batch `ids` (default: all), padded to the longest of the GLOBAL batch.

        Returns:
            what the model is called with: ``input_ids``, ``attention_mask`` (n, s), ``decoder_input_ids`` (n, t), the
            `tensors`; ``labels`` (n, t), −100 at padding; ``tokens`` and ``sequences`` (n,), of the GLOBAL batch, so
            that ``tokens / sequences`` normalises a share of it by the whole.
        """
        share = ids if share is None else share
        inputs = padded([self.inputs[i] for i in share], max(len(self.inputs[i]) for i in ids), self.pad)
        longest = max(len(self.targets[i]) for i in ids)
        labels = padded([self.targets[i] for i in share], longest, IGNORE)
        lengths = torch.tensor([len(self.inputs[i]) for i in share], dtype=torch.int64)
        tokens = sum(len(self.targets[i]) for i in ids)
        return {
            "input_ids": inputs,
            "attention_mask": (torch.arange(inputs.shape[1]) < lengths[:, None]).long(),
            "decoder_input_ids": shifted_right(labels, self.start, self.pad),
            "labels": labels,
            "tokens": torch.full((len(share),), tokens, dtype=torch.int64),
            "sequences": torch.full((len(share),), len(ids), dtype=torch.int64),
            **{k: v[torch.tensor(share)] for k, v in self.tensors.items()},
        }

    @cached_property
    def fingerprint(self) -> str:
        flat = [np.asarray([i for row in rows for i in (*row, -1)], np.int64) for rows in (self.inputs, self.targets)]
        arrays = {k: v.numpy() for k, v in self.tensors.items()}
        return digest("view", flat[0], flat[1], self.pad, self.start, *[x for item in arrays.items() for x in item])


MODEL_READS_NOT = ("labels", "tokens", "sequences")


def model_inputs(view: Batch) -> dict[str, Any]:
    """What of a view's batch the model is called with."""
    return {k: view[k] for k in view if k not in MODEL_READS_NOT}


def shifted_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """Targets one position later behind the start token, −100 as padding: what a decoder is fed.

    Example:
        >>> shifted_right(torch.tensor([[7, 8, -100]]), 0, 5)
        tensor([[0, 7, 8]])
    """
    fed = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return fed.masked_fill(fed == IGNORE, pad)


def padded(rows: Ids, length: int, value: int) -> Tensor:
    out = torch.full((len(rows), length), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


class Views(Batches):
    """Shuffled batches of examples, each in all views: ``{"id": (n,), VIEW: {"input_ids", …}, …}`` (see `View.batch`).

    Order as in `Batches`, so arms with other views see the same examples in the same steps.

    Args:
        views: name → view, all of the same examples.
        batch_size: examples in the GLOBAL batch.

    Raises:
        UserError: no view, no example, or views of different length.

    Example:
        >>> view = View([[5, 1], [6, 7, 1]], [[1], [8, 1]], pad=0, start=0)
        >>> batch = Views({"predict": view}, 2).batch(Clock())
        >>> batch["predict"]["labels"].shape, batch["predict"]["tokens"].tolist()
        (torch.Size([2, 2]), [3, 3])
    """

    def __init__(self, views: Mapping[str, View], batch_size: int):
        sizes = {k: len(v) for k, v in views.items()}
        if not views or len(set(sizes.values())) > 1:
            raise UserError(f"views must be of the same examples and at least one, got lengths {sizes}")
        super().__init__(_Rows(views), batch_size, augment=False)  # type: ignore[arg-type]
        self.parts = dict(views)

    def batch(self, clock: Clock) -> dict[str, Any]:
        ids = self.ids(clock)
        share = np.array_split(ids, clock.world)[clock.rank]
        made = {name: view.batch(ids, share) for name, view in self.parts.items()}
        return {"id": torch.from_numpy(share.copy()), **made}


class _Rows:
    """The length and fingerprint of views, which is all that `Batches` asks of its samples here."""

    def __init__(self, views: Mapping[str, View]):
        self.views = views

    def __len__(self) -> int:
        return len(next(iter(self.views.values())))

    @cached_property
    def fingerprint(self) -> str:
        return digest("views", [(k, v.fingerprint) for k, v in self.views.items()])


def encode(codec: Codec, examples: Sequence[Example], prefix: str, targets: Sequence[str], what: str) -> View:
    """A view of the examples: ``prefix + input`` in, `targets` out; `what` they are, for the count of cuts."""
    where = [e.where for e in examples]
    inputs = codec.inputs([e.input for e in examples], prefix, where, f"inputs of {what}")
    return View(inputs, codec.targets(targets, what, where), codec.pad, codec.start, stacked(examples))


def stacked(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The examples' tensors by name, a row per example.

    Raises:
        UserError: an example lacks one, or its shape is another.
    """
    names = list(examples[0].tensors) if examples else []
    try:
        return {k: torch.stack([e.tensors[k] for e in examples]) for k in names}
    except (KeyError, RuntimeError) as error:
        raise UserError(f"all examples need the tensors {names} of the same shapes: {error}") from None
