"""How good a two-tower model is: zero-shot classes, retrieval, and how near its affinities are to the teacher's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.evaluate import call, classification, evaluating
from stillhouse.system import map_tensors
from stillhouse.text.pairs import PairData, Pairs

Features = tuple[Tensor, Tensor]


@torch.no_grad()
def features(model: nn.Module, pairs: Pairs, device: Any = "cpu", batch: int = 256) -> Features:
    """Unit features of all images and of their first captions, (N, E) each, on the CPU."""
    image, text = [], []
    model.to(device)
    with evaluating(model):
        for start in range(0, len(pairs), batch):
            x = pairs.take(np.arange(start, min(start + batch, len(pairs))))["input"]
            said = call(model, map_tensors(x, lambda t: t.to(device)))
            image.append(F.normalize(said.image_embeds.float(), dim=1).cpu())
            text.append(F.normalize(said.text_embeds.float(), dim=1).cpu())
    model.cpu()
    return torch.cat(image), torch.cat(text)


@torch.no_grad()
def class_features(model: nn.Module, data: PairData) -> Tensor:
    """(C, E): of each class the mean of its captions' unit features, of length 1 again (Radford et al. 2021)."""
    pixels, found = data.example()["pixel_values"], []
    with evaluating(model):
        for k in range(len(data.prompts)):
            said = call(model, {**data.prompt(k), "pixel_values": pixels})
            found.append(F.normalize(F.normalize(said.text_embeds.float(), dim=1).mean(0), dim=0))
    return torch.stack(found)


def zero_shot(image: Tensor, classes: Tensor, labels: np.ndarray, scale: float) -> dict[str, float]:
    """Accuracy and NLL of naming each image by the class whose captions fit it best.

    Args:
        image: (N, E) and classes: (C, E), unit rows. labels: (N,). scale: g.
    """
    found = classification(O.affinity(image, classes, scale), torch.from_numpy(labels))
    return {k: found[k] for k in ("accuracy", "nll")}


def retrieval(image: Tensor, text: Tensor, at: int = 1) -> dict[str, float]:
    """How often an image's own caption is among the `at` best of all, and a caption's own image.

    Ties count against: every other that fits as well as the own one stands before it.

    Example:
        >>> retrieval(torch.eye(2), torch.eye(2))
        {'recall_text': 1.0, 'recall_image': 1.0}
    """
    scores = O.affinity(image, text)
    own = scores.diagonal()
    ahead = {"recall_text": (scores >= own[:, None]).sum(1), "recall_image": (scores >= own[None]).sum(0)}
    return {name: float((n <= at).double().mean()) for name, n in ahead.items()}


def affinity_loss(teacher: Features, student: Features, scale: float, batch: int = 128) -> float:
    """Mean L_affinity over batches of the pairs in their order; the last batch counts by its size."""
    wanted, own = (
        [O.affinity(i, t, scale) for i, t in zip(a.split(batch), b.split(batch))] for a, b in (teacher, student)
    )
    each = torch.cat([O.affinity_mimicking(a, b) for a, b in zip(wanted, own)])
    return float(each.mean())


def quality(model: nn.Module, data: PairData, teacher: Features, scale: float, device: Any = "cpu") -> dict[str, float]:
    """Everything above on the test pairs; zero-shot where there are classes, retrieval where there are none."""
    own = features(model, data.test, device)
    found = {"affinity_loss": affinity_loss(teacher, own, scale)}
    if data.prompts:
        return {**zero_shot(own[0], class_features(model, data), data.test.labels, scale), **found}
    return {**retrieval(*own), **found}
