"""The score: how alike an untrained student and the teacher see one batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from stillhouse import objectives as O
from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating, logits_of
from stillhouse.models import ModelSpec
from stillhouse.search import student
from stillhouse.spaces import Arch, StudentSpace, frozen
from stillhouse.system import fold
from stillhouse.taps import Ends, ends, tap

if TYPE_CHECKING:
    from stillhouse.data import Samples
    from stillhouse.recipes.diswot.config import Config
    from stillhouse.run import Run


class Look(NamedTuple):
    """What a network makes of a batch: its last feature map (n, …) and g = ∂CE/∂w of its classifier, (K, C)."""

    features: Tensor
    gradient: Tensor

    @property
    def dead(self) -> bool:
        """Nothing reaches the classifier: a cell without a path from its input to its output."""
        return not bool(self.features.any()) or not bool(self.gradient.any())


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Convolution and linear weights ~ N(0, 1), their biases 0; scale 1 and shift 0 of normalisations; in place."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, _ConvNd | nn.Linear):
                m.weight.copy_(torch.randn(m.weight.shape, generator=draws))
                if m.bias is not None:
                    m.bias.zero_()
            elif isinstance(m, _BatchNorm | nn.GroupNorm | nn.LayerNorm) and m.weight is not None:
                m.weight.fill_(1.0)
                if m.bias is not None:
                    m.bias.zero_()
    return model


def look(model: nn.Module, batch: Mapping[str, Any], where: Ends | None = None, *, statistics: bool = True) -> Look:
    """One forward pass, and a backward pass as far as the classifier's weight; nothing accumulates anywhere.

    Args:
        model: a network that may be changed: its running statistics move.
        batch: {"input", "label"}.
        where: its feature map and classifier; None finds them.
        statistics: normalise with the batch's mean and variance (train mode of batch norm; dropout stays off), as the
            score wants it of random networks; a trained network normalises with its own.
    """
    where = where or _ends(model, batch)
    model.eval().requires_grad_(False)
    for m in model.modules():
        if isinstance(m, _BatchNorm) and statistics:
            m.train()
    head = model.get_submodule(where.head)
    assert isinstance(head, nn.Linear)
    head.weight.requires_grad_(True)
    with tap(model, where.features, detach=True) as seen:
        loss = O.cross_entropy(logits_of(model(batch["input"])), batch["label"]).mean()
    (gradient,) = torch.autograd.grad(loss, head.weight)
    return Look(seen[where.features], gradient)


def compare(teacher: Look, student: Look, by_class: bool = False) -> dict[str, float]:
    """R and S of one batch: ``relation`` and ``semantic``, both 0 for equal networks.

    Args:
        by_class: compare the classes' gradients with one another (ours, for unequal channels) instead of the channels.
    """
    semantic = O.class_relation if by_class else O.class_activation
    return {
        "relation": float(O.similarity(teacher.features, student.features).mean()),
        "semantic": float(semantic(teacher.gradient, student.gradient).mean()),
    }


class Scorer:
    """``score(arch)``: −(R + S), −R or −S, the mean over several random initialisations and batches.

    Batch and teacher of a repetition are the same for all students; the student's weights are a function of (seed,
    architecture, repetition).

    Args:
        run: seed and device. space: of the students. samples: where batches are drawn from.
        teacher: never changed; random weights are put into a copy. spec: how to build it again, where known.
        cfg: metric, semantic, init, scoring, repeats, score_batch.

    Raises:
        UserError: a teacher without a linear classifier or a feature map; settings that do not fit.
    """

    def __init__(
        self,
        run: Run,
        space: StudentSpace,
        samples: Samples,
        teacher: nn.Module,
        spec: ModelSpec | None,
        cfg: Config,
    ):
        self.run, self.space, self.cfg = run, space, cfg
        self.batches, self.looks = [], []
        for r in range(cfg.repeats):
            ids = np.random.default_rng(fold(run.seed, "score batch", r)).permutation(len(samples))[: cfg.score_batch]
            batch = {k: v.to(run.device) for k, v in samples.take(ids).items()}
            self.batches.append(batch)
            self.where = _ends(teacher, batch)
            self.looks.append(look(self._teacher(r, teacher, spec), batch, self.where, statistics=not self.trained))
        if any(t.dead for t in self.looks):
            raise UserError("nothing reaches the teacher's classifier: its features or its gradient are all zero")
        self.by_class, self.notes = self._variant()

    @property
    def trained(self) -> bool:
        return self.cfg.scoring == "trained"

    def _teacher(self, r: int, teacher: nn.Module, spec: ModelSpec | None) -> nn.Module:
        seed = fold(self.run.seed, "teacher", r)
        if self.trained or self.cfg.init == "normal":
            model = copy.deepcopy(teacher)
        elif spec is None:
            raise UserError("init own: give the teacher by name (a ModelSpec), so that it can be initialised again")
        else:
            model = spec.build(seed=seed)
        return (model if self.trained or self.cfg.init == "own" else randomise(model, seed)).to(self.run.device)

    def _variant(self) -> tuple[bool, list[str]]:
        """Whether S compares classes, which it must for the whole space if any student's channels differ."""
        cfg, c = self.cfg, self.looks[0].gradient.shape[1]
        if cfg.semantic != "auto":
            return cfg.semantic == "class", []
        rng = Random(fold(self.run.seed, "widths"))
        for _ in range(8):
            arch = frozen(self.space.random(rng))
            other = self._look(arch, 0).gradient.shape[1]
            if other != c:
                said = (
                    f"S compares classes instead of channels (our variant): the teacher ends in {c} channels, student "
                    f"{arch} in {other}"
                )
                return True, [] if cfg.metric == "relation" else [said]
        return False, []

    def _look(self, arch: Arch, r: int) -> Look:
        seed = fold(self.run.seed, "student", arch, r)
        model, _ = student(self.space, arch, seed)
        model = model.to(self.run.device)
        return look(randomise(model, seed) if self.cfg.init == "normal" else model, self.batches[r])

    def __call__(self, arch: Arch) -> dict[str, float | None]:
        """``score``, and its parts ``relation`` and ``semantic``; all None for a student nothing passes through."""
        found: list[dict[str, float]] = []
        for r, teacher in enumerate(self.looks):
            mine = self._look(arch, r)
            if mine.dead:
                return {"score": None, "relation": None, "semantic": None}
            if mine.gradient.shape[1] != teacher.gradient.shape[1] and not self.by_class:
                raise UserError(
                    f"student {arch} ends in {mine.gradient.shape[1]} channels, the teacher in "
                    f"{teacher.gradient.shape[1]}: S cannot compare them; give --semantic class"
                )
            found.append(compare(teacher, mine, self.by_class))
        parts = {k: sum(f[k] for f in found) / len(found) for k in found[0]}
        if not all(np.isfinite(v) for v in parts.values()):
            raise UserError(
                f"the score of {arch} is not finite: without batch norm, weights ~ N(0, 1) make features explode; give "
                "--init own"
            )
        wanted = {"both": ("relation", "semantic")}.get(self.cfg.metric, (self.cfg.metric,))
        return {"score": -sum(parts[k] for k in wanted), **parts}


def _ends(model: nn.Module, batch: Mapping[str, Any]) -> Ends:
    x = batch["input"][:2]
    device = next(model.parameters()).device
    with evaluating(model):
        return ends(model, x.to(device))
