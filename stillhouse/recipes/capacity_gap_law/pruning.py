"""A student cut from its teacher: by the gradients of masks, down to a size or to given widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of
from stillhouse.outcomes import Member
from stillhouse.recipes.capacity_gap_law.config import Config
from stillhouse.recommend.law import short
from stillhouse.students.decoders import Widths, counted, mask_gradients, plan_of_size, plan_of_widths, units_of
from stillhouse.students.edits import Depth
from stillhouse.students.hub import names_of
from stillhouse.students.plan import Plan
from stillhouse.system import fold, map_tensors
from stillhouse.text.windows import Corpus


def prune(
    run: Run, text: Corpus, teacher: Member, cfg: Config, size: float = 0.0, importance: Sequence[Tensor] | None = None
) -> Member:
    """A student cut from its teacher: blocks from both ends, then channels, heads and neurons by importance.

    Args:
        text: of which calibration windows are taken. size: parameters; 0 takes ``cfg.shape``.
        importance: of the teacher's units, as `importance_of` found it for another size.

    Raises:
        UserError: a size or shape that cannot be cut from this teacher.
    """
    model: Any = teacher.model
    path, units, (first, last) = names_of(model).blocks, units_of(model), cfg.drop
    depth = len(units.heads)
    if first + last >= depth:
        raise UserError(f"drop {first} {last}: nothing stays of {depth} blocks")
    importance = importance or importance_of(run, text, model, cfg)
    source = tuple(range(first, depth - last))
    ends = [Depth(path, source)] if len(source) < depth else []
    shallow = Plan.identity(model).then(*ends).build(model)
    kept = [importance[0], *(importance[1 + k * depth + i] for k in range(2) for i in source)]
    cut = (
        plan_of_size(shallow, kept, size, counts=cfg.counts, multiple=cfg.multiple)[0]
        if size
        else _shaped(shallow, kept, cfg.shape)
    )
    base = teacher.plan or Plan.identity(model)
    plan = base.then(*ends, *cut.edits)
    student = cut.build(shallow)
    if cfg.start == "fresh":  # the same structure, cut from a network that has learned nothing
        assert teacher.spec is not None
        student = plan.build(teacher.spec.build(seed=fold(run.seed, "fresh", teacher.name)))
    name = f"{short(size or counted(student, cfg.counts)).lower()}-of-{teacher.name}"
    return Member(name, student.requires_grad_(True), plan, spec=teacher.spec)


def _shaped(model: Any, importance: list[Tensor], shape: tuple[int, ...]) -> Plan:
    """The plan that leaves these widths in every block."""
    (width, heads, neurons), config = shape, model.config
    queries = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    if heads % queries:
        raise UserError(f"shape: {queries} queries share a head of keys and values, which {heads} heads do not fit")
    return plan_of_widths(model, importance, Widths(width, heads // queries, neurons, even=True))


def importance_of(run: Run, text: Corpus, model: Any, cfg: Config) -> list[Tensor]:
    """The importance of each group of units (`units_of`), by gradients on calibration windows, or drawn."""
    draw = np.random.default_rng(fold(run.seed, "calibration"))
    if cfg.units == "random":
        return [torch.from_numpy(draw.random(g.size)) for g in units_of(model).groups]
    count = min(cfg.calibration_batch, len(text.train))
    batches = [text.train.take(draw.choice(len(text.train), count, False)) for _ in range(cfg.calibration)]

    def loss(m: nn.Module, batch: Any) -> Tensor:
        b = map_tensors(batch, lambda t: t.to(run.device))
        return O.cross_entropy(logits_of(call(m, b["input"])), b["label"]).mean()

    found = mask_gradients(model.to(run.device), loss, batches)
    model.cpu()
    return found
