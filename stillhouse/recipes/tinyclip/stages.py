"""How a stage gets its smaller model: by hand, by learned gates, or fresh in the shape that hands would give."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import floor
from typing import Any

import torch
from torch import nn

from stillhouse.data import Batches, prefetch
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.recipes.tinyclip.config import Config
from stillhouse.recipes.tinyclip.gates import Gates
from stillhouse.recipes.tinyclip.system import TinyClip
from stillhouse.students.edits import Edit
from stillhouse.students.plan import Keep, Plan, bare_copy
from stillhouse.students.towers import inherited, tell_sizes, towers
from stillhouse.system import Teacher
from stillhouse.text.pairs import PairData
from stillhouse.weights import linear_warmup

Sizes = list[tuple[int, int]]  # depth and width of each tower; 0: as it is


def names_of(keep: Sequence[float]) -> list[str]:
    """Names of the stages' students by what they keep in per cent; repeats get a letter.

    Example:
        >>> names_of([0.75, 0.5, 0.5])
        ['keep75', 'keep50', 'keep50b']
    """
    stems = [f"keep{round(100 * k)}" for k in keep]
    return [s + ("" if s not in stems[:i] else chr(ord("a") + stems[:i].count(s))) for i, s in enumerate(stems)]


def manual_sizes(network: nn.Module, cfg: Config) -> list[Sizes]:
    """Depth and width of both towers after each stage; depths that are not named are parts of the whole, rounded."""
    named = ((cfg.image_depth, cfg.image_width), (cfg.text_depth, cfg.text_width))
    whole = [len(t.layers(network)) for t in towers(network)]
    return [
        [
            (depths[k] if depths else max(1, floor(part * blocks + 0.5)), widths[k] if widths else 0)
            for (depths, widths), blocks in zip(named, whole, strict=True)
        ]
        for k, part in enumerate(cfg.keep)
    ]


def by_hand(model: nn.Module, sizes: Sizes) -> list[Keep | Edit]:
    """The edits of both towers; none of one touches the other."""
    return [
        e for t, (depth, width) in zip(towers(model), sizes, strict=True) for e in inherited(model, t, depth, width)
    ]


def rehearse(network: nn.Module, stages: Sequence[Sizes]) -> None:
    """Goes through all stages without weights, so that sizes that cannot be are told before the first step."""
    model = bare_copy(network).to("meta")
    for sizes in stages:
        model = Plan.identity(model).then(*by_hand(model, sizes)).build(model)


def masked(
    run: Run, name: str, model: nn.Module, teacher: Teacher, data: PairData, cfg: Config, *, whole: int, target: float,
    teacher_scale: float,
) -> tuple[nn.Module, list[Keep], float]:  # fmt: skip
    """The mask phase of a stage.

    Args:
        model: stays as it is. whole: prunable weights of the first model, of which a part `target` is to go.

    Returns:
        the smaller model with the gates folded in; the cut; the expected sparsity that was reached.
    """
    student = bare_copy(model).requires_grad_(True)
    gates = Gates(student, whole)
    system = TinyClip(
        student, teacher, cfg, gates=gates, target=target, teacher_scale=teacher_scale,
        schedule=linear_warmup(cfg.mask_steps),
    )  # fmt: skip
    source = prefetch(Batches(data.train, cfg.batch), run.workers)
    fit(run, f"{name}-gates", system, source, steps=cfg.mask_steps, settings=cfg)
    system.cpu().eval()
    cut = gates.fold_(student, gates.settled(keep=(1 - target) * whole))
    return Plan.identity(student).then(*cut).build(student), cut, float(gates.sparsity().detach())


def refresh(model: Any, seed: int) -> None:
    """Fresh weights of the model's own class and sizes, in place.

    Raises:
        UserError: its configuration does not say its sizes: blocks of unequal widths.
    """
    tell_sizes(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config)).state_dict()
    own = model.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in fresh.items()}:
        raise UserError("--inherit fresh needs towers whose blocks are alike, such as those of a whole CLIPModel")
    model.load_state_dict(fresh)


def shape_of(model: nn.Module) -> dict[str, Any]:
    """What is left of both towers, for reports."""
    return {
        t.name: {"blocks": len(t.layers(model)), "hidden": t.hidden(model), "heads": t.heads(model),
                 "neurons": t.neurons(model)}
        for t in towers(model)
    }  # fmt: skip
