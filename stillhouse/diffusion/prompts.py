"""Data-free training: batches of noise and prompts, and lists of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.sources import Drawn
from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.errors import UserError
from stillhouse.system import Batch, Clock, map_tensors


class PromptsOnly(dict[str, Any]):
    """A batch of noise and prompts; asking it for images is an error."""

    def __missing__(self, key: str) -> Any:
        raise UserError(f"this run has prompts and noise only, no {key!r}: SwiftBrush never sees an image")


class Prompts(Drawn):
    """Batches of noise z (n, *shape) and conditions drawn with repetition from a list. There are no images to give.

    Args:
        conditions: of P prompts: labels (P,), embeddings (P, l, d), a mapping of such; None for none.
        shape: of one sample. batch_size: over all processes.

    Raises:
        UserError: an empty list; at training time, a key other than "index", "noise" and "condition".
    """

    def __init__(self, conditions: Condition, shape: Sequence[int], batch_size: int):
        count = 1 if conditions is None else count_of(conditions)
        if not count:
            raise UserError("the list of prompts is empty; give at least one condition")

        def make(n: int, generator: torch.Generator) -> Batch:
            made = {"index": torch.arange(n), "noise": torch.randn(n, *shape, generator=generator)}
            if conditions is None:
                return made
            rows = torch.randint(count, (n,), generator=generator)
            return {**made, "condition": map_tensors(conditions, lambda c: c[rows])}

        super().__init__(make, batch_size, f"noise and {count} prompts", steps_per_epoch=-(-count // batch_size))

    def batch(self, clock: Clock) -> Batch:
        return PromptsOnly(super().batch(clock))


def count_of(conditions: Condition) -> int:
    return len(next(iter(conditions.values())) if isinstance(conditions, Mapping) else conditions)


def check_labels(teacher: Denoiser, conditions: Condition) -> None:
    """Refuses labels that the teacher's network has no row for."""
    config = getattr(teacher.network, "config", None) or {}
    rows = config.get("num_class_embeds")
    if rows and isinstance(conditions, Tensor) and not conditions.is_floating_point():
        bad = conditions[(conditions < 0) | (conditions >= rows) | (conditions == teacher.null)]
        if len(bad):
            raise UserError(
                f"prompt {int(bad[0])} is no class of the teacher: it has {rows} (num_class_embeds), "
                f"of which {teacher.null} stands for none"
            )


def read_prompts(given: Sequence[str]) -> list[str]:
    """Prompts as given on the command line; a single one that is a file gives its lines, empty ones left out.

    Raises:
        UserError: a file without a prompt, or that is no UTF-8 text.
    """
    if len(given) != 1 or not Path(given[0]).is_file():
        return list(given)
    try:
        found = [line.strip() for line in Path(given[0]).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {given[0]} could not be read ({error}); expected a text with one prompt in a line"
        ) from None
    if not any(found):
        raise UserError(f"--prompts {given[0]} holds no prompt; expected one in a line")
    return [line for line in found if line]
