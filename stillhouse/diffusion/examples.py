"""Clean samples x_0 with their conditions, for what trains on data: pixels in [−1, 1], or latents made beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.named import is_function, load
from stillhouse.data.samples import Samples, digest
from stillhouse.data.sources import Drawn
from stillhouse.diffusion.denoiser import Condition
from stillhouse.errors import UserError
from stillhouse.export import read_weights
from stillhouse.models import import_object
from stillhouse.system import Batch, fold, map_tensors, walk


@dataclass(frozen=True)
class Examples:
    """Samples and conditions in memory.

    Attributes:
        x0: (N, …) float32. conditions: of as many: labels (N,), embeddings (N, l, d), a mapping of such, or None.
        name: for reports.

    Raises:
        UserError: none at all, numbers that are not finite, or conditions of another count.

    Example:
        >>> some = Examples(torch.zeros(5, 1, 2, 2), torch.arange(5))
        >>> len(some.rows([0, 3])), some.rows([0, 3]).conditions.tolist()
        (2, [0, 3])
    """

    x0: Tensor
    conditions: Condition = None
    name: str = "tensors"

    def __post_init__(self) -> None:
        counts = {len(t) for t in walk(self.conditions)} | {len(self.x0)}
        if len(self.x0) == 0 or len(counts) > 1:
            raise UserError(f"{self.name}: samples and conditions must be equally many and at least one, got {counts}")
        if not all(bool(t.isfinite().all()) for t in (self.x0, *walk(self.conditions))):
            raise UserError(f"{self.name}: samples or conditions hold NaN or infinity; clean the data first")

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def fingerprint(self) -> str:
        return digest("examples", *(t.contiguous().cpu().numpy() for t in (self.x0, *walk(self.conditions))))

    def rows(self, index: Sequence[int] | Tensor) -> Examples:
        """Some of them."""
        at = torch.as_tensor(index)
        return Examples(self.x0[at], map_tensors(self.conditions, lambda t: t[at]), self.name)

    def split(self, part: float = 0.1, seed: int = 0) -> tuple[Examples, Examples]:
        """The rest, and a random part of them."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(fold(seed, "examples")))
        held = max(1, round(part * len(self)))
        return self.rows(order[held:]), self.rows(order[:held])

    def noised(self, size: int, times: Callable[[int, torch.Generator], Tensor]) -> Drawn:
        """Batches drawn with repetition: "input" x_0, "noise" ε, "time" t from ``times(n, generator)``, "condition"."""
        name = f"noised examples {self.fingerprint}"
        return Drawn(partial(self._draw, times), size, name, steps_per_epoch=-(-len(self) // size))

    def _draw(self, times: Callable[[int, torch.Generator], Tensor], n: int, generator: torch.Generator) -> Batch:
        some = self.rows(torch.randint(len(self), (n,), generator=generator))
        made = {"input": some.x0, "noise": torch.randn(some.x0.shape, generator=generator)}
        made |= {"time": times(n, generator), "chance": torch.rand(n, generator=generator)}
        return made if some.conditions is None else {**made, "condition": some.conditions}


def pixels(samples: Samples) -> tuple[Tensor, Tensor]:
    """All images of a set in [−1, 1], whatever normalisation it has, and their labels."""
    batch, holder = samples.take(np.arange(len(samples))), samples
    while not hasattr(holder, "mean") and hasattr(holder, "parent"):
        holder = holder.parent
    x, mean, std = batch["input"], getattr(holder, "mean", None), getattr(holder, "std", None)
    if mean is not None and std is not None:
        x = x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    return (2 * x - 1).clamp(-1, 1), batch["label"]


def load_examples(name: str, shape: Sequence[int], *, seed: int = 0) -> tuple[Examples, Examples]:
    """Training and held-out examples named by ``--data``, for samples of this shape.

    Args:
        name: a set of labelled images that `stillhouse.data.load` knows, at the teacher's size, conditioned on the
            class; a .safetensors file with ``x0`` (N, …) and the conditions (``label``, or what the network calls
            them: ``encoder_hidden_states``, ``pooled_projections``, …), for latents and texts that were encoded once;
            or ``package.module:function`` that returns (x0, conditions). Of the last two a tenth is held out.

    Raises:
        UserError: nothing there, or another shape than the teacher's.
    """
    if name.endswith(".safetensors"):
        tensors = read_weights(Path(name))[0]
        if "x0" not in tensors:
            raise UserError(f"--data {name}: expected a tensor 'x0', got {sorted(tensors)}")
        parts = Examples(tensors.pop("x0").float(), _conditions(tensors), name).split(seed=seed)
    elif is_function(name):
        make = import_object(name, "--data")
        try:
            found = make()
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"--data {name} raised {type(error).__name__}: {said}") from None
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            raise UserError(f"--data {name} must return (x0, conditions) of N rows, got {type(found).__name__}")
        parts = Examples(found[0].float(), found[1], name).split(seed=seed)
    else:
        if len(shape) != 3:
            raise UserError(f"--data {name}: images do not fit a teacher of {tuple(shape)}; give a .safetensors file")
        data = load(name, image_size=int(shape[-1]), seed=seed)
        parts = (Examples(*pixels(data.train), data.name), Examples(*pixels(data.test), data.name))
    if tuple(parts[0].x0.shape[1:]) != tuple(shape):
        raise UserError(
            f"--data {name}: samples are {tuple(parts[0].x0.shape[1:])}, the teacher's {tuple(shape)}; "
            "encode them as it was trained"
        )
    return parts


def _conditions(tensors: Mapping[str, Any]) -> Condition:
    if not tensors:
        return None
    return tensors["label"].long() if set(tensors) == {"label"} else dict(tensors)
