"""Trained networks as feature extractors for a task they were not trained for, and how these are opened by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data import Data, Samples
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.export import read_weights
from stillhouse.files import read_json
from stillhouse.models import ModelSpec, import_object
from stillhouse.outcomes import PLAN, load
from stillhouse.system import map_tensors
from stillhouse.taps import head, tap
from stillhouse.teacher_options import filled, published
from stillhouse.teachers import Normalisation


class Encoder(nn.Module):
    """Inputs → features (n, d) of a trained network; frozen, in eval mode whatever ``train()`` says.

    Features are what the network's classifier reads; those of a network that does not end in a linear layer are what it
    gives. Maps (n, d, h, w) and tokens (n, t, d) are averaged over their positions.

    Args:
        network: any module; kept by reference, set to eval mode and to ``requires_grad=False``.
        example: a batch of inputs as they will come.
        name: for reports.
        at: another place to take features from, as for `stillhouse.tap`.
        shape: (channels, height, width) that the network was made for, where the inputs may have another: one channel
            is repeated, several are averaged to one, and other sizes are scaled.
        normalize: (from_mean, from_std, to_mean, to_std), as for `stillhouse.Frozen`.

    Raises:
        UserError: a path that does not exist, channels that cannot be brought together, no features.

    Example:
        >>> made = Encoder(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4))
        >>> made.at, made(torch.zeros(5, 4)).shape, made.classifies
        ('2:in', torch.Size([5, 3]), True)
    """

    def __init__(
        self,
        network: nn.Module,
        example: Any,
        *,
        name: str = "",
        at: str | None = None,
        shape: tuple[int, ...] | None = None,
        normalize: Normalisation | None = None,
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.shape, self.normalize = name or type(network).__name__, shape, normalize
        example = map_tensors(example, lambda t: t[:2])
        ready = map_tensors(example, self._prepare)
        self.classifies = True
        if at is None:
            try:
                at = f"{head(network, ready)}:in"
            except UserError:
                at, self.classifies = "", False
        self.at = at
        self.width = self(example).shape[1]

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode."""
        return super().train(False)

    def _prepare(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() != 4:
            return x
        ends = [torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, 1, 1) for v in self.normalize or ()]
        if ends:
            x = x * ends[1] + ends[0]
        if self.shape is not None:
            x = self._fit(x, self.shape)
        return (x - ends[2]) / ends[3] if ends else x

    def _fit(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if x.shape[1] != shape[0]:
            if x.shape[1] == 1:
                x = x.expand(-1, shape[0], -1, -1)
            elif shape[0] == 1:
                x = x.mean(1, keepdim=True)
            else:
                raise UserError(f"{self.name} reads {shape[0]} channels, the data have {x.shape[1]}")
        if x.shape[2:] != shape[1:]:
            x = F.interpolate(x, size=shape[1:], mode="bilinear", align_corners=False, antialias=True)
        return x

    @torch.no_grad()
    def answer(self, x: Any) -> tuple[Tensor, Tensor | None]:
        """Features (n, d), and the network's own logits where it classifies."""
        with tap(self.network, self.at) as seen:
            out = call(self.network, map_tensors(x, self._prepare))
        f = seen[self.at]
        f = f.mean((2, 3)) if f.dim() == 4 else f.mean(1) if f.dim() == 3 else f.flatten(1)
        return f, logits_of(out) if self.classifies else None

    def forward(self, x: Any) -> Tensor:
        return self.answer(x)[0]


@torch.no_grad()
def encode(
    encoder: Encoder, samples: Samples, *, batch_size: int = 256, device: Any = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Features (N, d) of every sample, in order and without augmentation, and the source's probabilities (N, Z).

    Returns:
        float32 on the CPU; None in place of the probabilities where the network does not classify.

    Raises:
        UserError: features that are not finite.
    """
    features, probabilities = [], []
    encoder.to(device)
    with evaluating(encoder):
        for start in range(0, len(samples), batch_size):
            batch = samples.take(np.arange(start, min(start + batch_size, len(samples))), view=None)
            f, z = encoder.answer(map_tensors(batch["input"], lambda t: t.to(device)))
            features.append(f.float().cpu())
            if z is not None:
                probabilities.append(z.float().softmax(-1).cpu())
    encoder.cpu()
    every = torch.cat(features)
    if not bool(every.isfinite().all()):
        raise UserError(
            f"{encoder.name}: sample {int((~every.isfinite()).any(1).nonzero()[0])} has features not finite"
        )
    return every, torch.cat(probabilities) if probabilities else None


class Probed(nn.Module):
    """A classifier: an encoder and a linear layer on its features; logits (n, C) = W φ(x) + b.

    Args:
        encoder: φ.
        weight, bias: (C, d) and (C,), float64 or float32; kept as float32.
    """

    def __init__(self, encoder: Encoder, weight: Any, bias: Any):
        super().__init__()
        self.encoder = encoder
        weight, bias = (torch.as_tensor(v, dtype=torch.float32) for v in (weight, bias))
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.load_state_dict({"weight": weight, "bias": bias})
        self.requires_grad_(False).eval()

    def forward(self, x: Any) -> Tensor:
        return self.head(self.encoder(x))


def open_encoder(text: str, data: Data, flag: str = "--sources") -> Encoder:
    """A trained network by name.

    Args:
        text: ``RUN/students/NAME``; ``timm:NAME`` or ``torchvision:NAME`` with their published weights;
            ``package.module:function``, which gives a trained network; any of the last three or ``stillhouse:NAME``
            with ``=FILE.safetensors`` for weights. ``@PATH`` behind it takes the features there.
        data: what it is to read.
        flag: for errors.

    Raises:
        UserError: nothing there, weights that do not fit or cannot be had.
    """
    whole, _, at = text.partition("@")
    name, _, weights = whole.partition("=")
    example = data.train.take(np.arange(min(2, len(data.train))))["input"]
    source = name.partition(":")[0]
    how: dict[str, Any] = {"name": name, "at": at or None}
    if (Path(name) / PLAN).exists():
        shape = read_json(Path(name) / PLAN).get("shape")
        return Encoder(load(name), example, shape=tuple(shape) if shape else None, **how)
    if ":" not in name:
        raise UserError(
            f"{flag} {text}: no {Path(name) / PLAN}; expected RUN/students/NAME, timm:NAME, module:function …"
        )
    if weights:
        tensors, _ = read_weights(Path(weights))
        shape = first_shape(tensors, data)
        spec = ModelSpec(name, classes_in(tensors, ModelSpec(name, len(data.classes), shape).build(), shape), shape)
        return Encoder(filled(spec.build(), Path(weights)), example, shape=shape, **how)
    if source == "stillhouse":
        raise UserError(f"{flag} {text}: has no published weights; give {name}=FILE.safetensors or RUN/students/NAME")
    if source in ("timm", "torchvision"):
        classes, look = published(name, data)
        if not classes:
            raise UserError(f"{flag} {text}: there are no published weights; give {name}=FILE.safetensors")
        shape = (3, *data.shape[1:])
        return Encoder(ModelSpec(name, classes, shape).build(pretrained=True), example, shape=shape, **how, **look)
    made = import_object(name, flag)
    network = made if isinstance(made, nn.Module) else ModelSpec(name, len(data.classes), tuple(data.shape)).build()
    return made if isinstance(made, Encoder) else Encoder(network, example, **how)


def first_shape(tensors: dict[str, Tensor], data: Data) -> tuple[int, ...]:
    """The data's shape with the channels that the first convolution among the weights reads."""
    first = next((t for t in tensors.values() if t.dim() == 4), None)
    return tuple(data.shape) if first is None or len(data.shape) != 3 else (first.shape[1], *data.shape[1:])


def classes_in(tensors: dict[str, Tensor], network: nn.Module, shape: tuple[int, ...]) -> int:
    """Rows of the classifier among the weights of a network of this structure."""
    path = head(network, torch.zeros(1, *shape))
    classifier = tensors.get(f"{path}.weight", network.get_submodule(path).weight)
    assert isinstance(classifier, Tensor)
    return len(classifier)
