"""What a report of HierarchicalPrune shows: students beside their teacher, samples, curves, impacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse.diffusion.examples import Examples
from stillhouse.diffusion.sampling import ManySteps, Sampler
from stillhouse.engine import Run
from stillhouse.evaluate import count_bytes, count_macs, count_params, latency
from stillhouse.recipes.hierarchical_prune.parts import CHILDREN, Part
from stillhouse.report import Curve, Image, Student, Table, grid
from stillhouse.system import fold

SAID = ("error", "distance", "fd", "accuracy", "stays")


def students(run: Run, sampler: Sampler, whole: ManySteps, found: Mapping[str, Any]) -> list[Student]:
    """The teacher's row, and those of the saved students."""
    packed = {k.removeprefix("nf4_"): v for k, v in found.items() if k.startswith("nf4_")}
    named = {"student": {k: v for k, v in found.items() if k in SAID}, "student-nf4": packed}
    speed = latency(whole, sampler.inputs)
    about = {"weight_bytes": count_bytes(whole), "latency_p10": speed.p10_ms, "latency_p90": speed.p90_ms}
    about |= {"threads": speed.threads, "error": found["whole_error"]}
    cost = (count_params(whole), count_macs(whole, sampler.inputs), speed.median_ms)
    return [Student("teacher", None, *cost, about, role="base"), *sampler.rows(run.folder, named)]


def samples(run: Run, sampler: Sampler, whole: ManySteps, some: Examples, decode: Callable[[Tensor], Tensor]) -> Image:
    """The same noise by the teacher, by it without the removed parts, and by the students, a row each."""
    plan = sampler["student"].plan
    assert plan is not None
    models: list[Any] = [whole, plan.build(whole), *(m.model for m in sampler)]
    seed, n = fold(run.seed, "shown"), len(some)
    rows = [m.sample(some.conditions, torch.Generator().manual_seed(seed), n) for m in models]
    text = "The same noise by the teacher, without the removed parts, repaired, and in 4 bits (a row each)"
    return Image(text, grid(torch.cat([decode(x) for x in rows]), columns=n, side=48))


def curves(sampler: Sampler) -> list[Curve]:
    """The weighted terms of the loss over the steps."""
    names = [k for k in ("task", "out", "feature") if any(k in r for r in sampler.logs)]
    lines: dict[str, Any] = {
        n: ([r["step"] for r in sampler.logs], [r[n] for r in sampler.logs]) for n in names
    }  # fmt: skip
    return [Curve("Repair: terms as weighted", "step", "loss", lines)] if lines else []


def impact_table(impact: Mapping[Part, float]) -> Table:
    """ΔP by component and block."""
    blocks = range(1 + max(p.block for p in impact))
    at = {(p.component, p.block): value for p, value in impact.items()}
    kinds = [c for c in ("block", *CHILDREN) if any(k == c for k, _ in at)]
    rows = [[c, *(f"{1000 * at[c, b]:.2f}" if (c, b) in at else "–" for b in blocks)] for c in kinds]
    note = "1000 ΔP: how much the score falls when the part is removed alone"
    return Table("What each part is worth", ["component", *(f"block {b}" for b in blocks)], rows, note)
