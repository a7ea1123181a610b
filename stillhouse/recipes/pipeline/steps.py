"""What each step of a pipeline does to the network that goes through it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor, nn

from stillhouse.comparisons import Objective
from stillhouse.data import Batches, Data, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of
from stillhouse.objectives import cross_entropy
from stillhouse.plain import optimizer_of, schedule
from stillhouse.recipes.pipeline.config import Config, Step
from stillhouse.recipes.wml.recipe import batches_of
from stillhouse.students.build import plan_peers
from stillhouse.students.lowrank import fit_ranks
from stillhouse.students.norms import recalibrate
from stillhouse.students.packing import stored_bits
from stillhouse.students.parametrized import parametrize_weights, weight_layers
from stillhouse.students.patterns import nm_mask
from stillhouse.students.plan import Plan
from stillhouse.students.projectors import NM, Symmetric
from stillhouse.system import Teacher, fold
from stillhouse.teachers import Frozen

KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


class Line:
    """The network on its way: how it is now, its plan so far, who teaches it."""

    def __init__(self, run: Run, data: Data, cfg: Config, model: nn.Module, plan: Plan):
        self.run, self.data, self.cfg, self.model, self.plan = run, data, cfg, model, plan
        self.teacher: Teacher | None = None
        self.steps, self.notes, self.logs = 0, list[str](), list[dict[str, Any]]()

    def start(self) -> nn.Module:
        """A copy of the network as it is before the first step that changes it; the teacher, unless one is given."""
        before = copy.deepcopy(self.model).cpu().eval()
        if self.teacher is None:
            self.teacher = Frozen(before, copy=True)
        return before

    def learn(self, name: str, epochs: float, lr: float, taught: bool = True) -> str:
        """One stage of training, of whatever the network is now."""
        cfg = self.cfg
        plain, source = cfg.plain(lr, epochs), Batches(self.data.train, cfg.batch)
        kd = cfg.kd if taught else 0.0
        system = Distill(
            self.model, self.teacher if kd else None, objectives=[Objective("kd", kd, options={"T": cfg.temperature})],
            label=1 - kd, optimizer=optimizer_of(plain), lr=schedule(self.data, plain, epochs), clip=cfg.clip or None,
        )  # fmt: skip
        settings = {"stage": name, "epochs": epochs, "lr": lr, **{k: v for k, v in asdict(cfg).items() if k != "steps"}}
        fit(self.run, name, system, prefetch(source, self.run.workers), epochs=epochs, settings=settings)
        self.model.cpu()
        self.logs += [{**row, "step": self.steps + row["step"]} for row in self.run.log(name)]
        steps = max(1, round(epochs * source.steps_per_epoch))
        self.steps += steps
        return f"{steps} steps" + (f", teacher's weight {kd:g}" if kd else ", labels alone")

    def cut(self, made: Plan) -> None:
        """Applies edits to the network, and to its plan from the original base."""
        self.model, self.plan = made.build(self.model), self.plan.then(*made.edits)


def train(line: Line, name: str, step: Step) -> str:
    return line.learn(name, step.epochs(line.cfg.epochs), line.cfg.lr, taught=False)


def distil(line: Line, name: str, step: Step) -> str:
    return line.learn(name, step.epochs(line.cfg.epochs), line.cfg.lr)


def prune(line: Line, name: str, step: Step) -> str:
    """Structured pruning by WML's code: groups, scores, the cut that meets the budget; then batch norm anew."""
    cfg, samples = line.cfg, line.data.train
    some = max(32, min(512, 6_000_000 // math.prod(samples.shape)))
    ids = np.random.default_rng(fold(line.run.seed, "score")).permutation(len(samples))[:some]
    seen, ratio = samples.take(np.sort(ids)), float(step.value)

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(logits_of(call(model, seen["input"])), seen["label"]).mean()

    def make() -> dict[str, Any]:
        one = samples.take(np.arange(1))["input"]
        plans, budgets, whole = plan_peers(
            line.model, one, [ratio], loss=loss, score=cfg.score, measure=cfg.measure, scope=cfg.scope
        )
        budget = asdict(budgets[0]) | {"met": budgets[0].met, "miss": budgets[0].error}
        return {"plan": json.loads(plans[0].to_json()), "budget": budget, "whole": whole}

    made = line.run.memo(name, make)
    line.cut(Plan.from_json(made["plan"]))
    recalibrate(line.model, batches_of(samples, cfg.batch, line.run.seed))
    line.notes += [f"{name}: left whole: {w}" for w in made["whole"]]
    return told(made["budget"])


def factor(line: Line, name: str, step: Step) -> str:
    """Low rank: truncated singular value decompositions under one budget of parameters."""
    edits, budget = fit_ranks(line.model, float(step.value), exclude=line.cfg.exclude)
    line.cut(Plan.identity(line.model).then(*edits))
    recalibrate(line.model, batches_of(line.data.train, line.cfg.batch, line.run.seed))
    ranks = ", ".join(f"{e.module} {e.rank}" for e in edits)
    line.notes.append(f"{name}: ranks {ranks}")
    return told(asdict(budget) | {"met": budget.met, "miss": budget.error})


def told(b: dict[str, Any]) -> str:
    met = "" if b["met"] else ", budget missed"
    return f"{b['measure']} {b['base']:,} → {b['reached']:,} (asked {b['target']:,.0f}, {100 * b['miss']:+.2f} %{met})"


def sparsify(line: Line, name: str, step: Step) -> str:
    """N:M sparsity by magnitude; the mask stays as it is from here on, also where the network learns."""
    (n, m), paths = step.n_of_m, weight_layers(line.model, (nn.Linear, nn.Conv2d), (), line.cfg.exclude)
    shapes = {p: weight(line.model.get_submodule(p)).shape for p in paths}
    fits = [p for p in paths if shapes[p][1:].numel() % m == 0]
    if not fits:
        first = f"{paths[0]} has rows of {shapes[paths[0]][1:].numel()}" if paths else "there are no layers"
        raise UserError(f"sparsify:{n}:{m} needs layers whose rows {m} divides: {first}")
    parametrize_weights(line.model, fits, lambda path, layer: NM(n, m, mask=nm_mask(weight(layer), n, m)))
    left = [f"{p} (rows of {shapes[p][1:].numel()})" for p in paths if p not in fits]
    line.notes += [f"{name}: left dense, {m} does not divide them: {', '.join(left)}"] if left else []
    zeros = sum(shapes[p].numel() * (m - n) // m for p in fits)
    return f"{zeros:,} weights of {len(fits)} layers are zero"


def quantize(line: Line, name: str, step: Step) -> str:
    """Symmetric quantisation, per output channel or in buckets; trained through it under the teacher, or not at all."""
    bits, bucket, cfg = step.bits, int(step.options.get("bucket", 0)), line.cfg
    paths = weight_layers(line.model, KINDS, (), cfg.exclude)
    if not paths:
        raise UserError(f"{name}: {type(line.model).__name__} has no layer to quantise")
    parametrize_weights(line.model, paths, lambda path, layer: Symmetric(bits, bucket))
    epochs = step.options.get("train", cfg.quantize_epochs)
    said = line.learn(name, epochs, cfg.quantize_lr) if epochs else "not trained"
    stored = 0
    for path in paths:
        layer = line.model.get_submodule(path)
        w, chain = weight(layer), layer.parametrizations["weight"]  # type: ignore[index]
        pattern = next((p.pattern for p in chain if isinstance(p, NM)), None)
        stored += stored_bits(w.shape, Symmetric(bits, bucket).code(w), pattern) // 8
    return f"{len(paths)} weights in {stored:,} bytes; {said}"


def weight(layer: nn.Module) -> Tensor:
    w = layer.weight
    assert isinstance(w, Tensor)
    return w.detach()


DO: dict[str, Callable[[Line, str, Step], str]] = {
    "train": train, "prune": prune, "factor": factor, "sparsify": sparsify, "distill": distil, "quantize": quantize,
}  # fmt: skip
