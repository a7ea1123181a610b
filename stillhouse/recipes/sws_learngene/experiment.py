"""SWS on a user's network, teacher and data, and on built-in digits against fresh networks, over seeds.

stillhouse run sws_learngene --out runs/sws                  # digits: four depths, and the arms over seeds
stillhouse run sws_learngene --model timm:vit_small_patch16_224 --depth 16 --teacher timm:levit_384 --data folder:photos --depths 6 9 12 --out runs/vits
stillhouse run sws_learngene --model runs/vits/students/learngene --data folder:photos --depths 7 --out runs/seven
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.files import read_json
from stillhouse.models import ModelSpec
from stillhouse.outcomes import continued
from stillhouse.recipes.sws_learngene.config import Config
from stillhouse.recipes.sws_learngene.gene import Gene
from stillhouse.recipes.sws_learngene.recipe import auxiliary, descend, distill, tune
from stillhouse.report import Claim, Curve, Report
from stillhouse.students.blocks import alike_blocks
from stillhouse.students.edits import Depth
from stillhouse.students.plan import unpacked
from stillhouse.students.sharing import spread
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import Results, claim, difference, table, trials

STAGE_1 = (
    "teacher", "teacher_weights", "teacher_size", "teacher_epochs", "teacher_lr", "pretrained", "depth", "stages",
    "genes", "alpha", "temperature", "element_mean", "epochs", "lr", "lr_warmup",
)  # fmt: skip


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images or sentences, a network with a list of blocks, and its teachers."""

    @property
    def gene(self) -> bool:
        """Whether the model is one of another run, and stage 1 is over."""
        return (Path(self.model or "") / "plan.json").exists()

    def idle(self, config: Any) -> Mapping[str, str]:
        over = dict.fromkeys(STAGE_1, "--model is of another run, whose blocks are taken as they are")
        return {**super().idle(config), **(over if self.gene else {})}


PRESET = Config(depths=(4, 6, 8, 10), genes=4, teacher_epochs=20.0, epochs=30.0, tune_epochs=6.0, batch=64, lr=2e-3,
                tune_lr=1e-3, label_smoothing=0.0)  # fmt: skip
TINY = replace(PRESET, depths=(1, 3), genes=2, teacher_epochs=1.0, epochs=1.0, tune_epochs=1.0, batch=32, mixup=0.8)
VIT = {"patch_size": 2, "embed_dim": 32, "num_heads": 4, "class_token": False, "global_pool": "avg", "fc_norm": False}
BASE = ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options={**VIT, "depth": 8})
SMALL = replace(BASE, options={**VIT, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 4})
TEACHER = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [16, 32, 64]})
FRESH_LR = 4e-3  # for fresh networks the best of 0.001, 0.002, 0.004, 0.008 on seed 100, with 4 and with 8 layers
ARMS = ("SWS", "fresh", "blocks in random order")


def tiny(run: Run, cfg: Config = TINY, base: ModelSpec = SMALL, teacher: ModelSpec = TEACHER) -> Family:
    """One run of about a second on 96 digits, for the contract table."""
    return distill(run, load("digits", limit=96), base, teacher.build(seed=fold(run.seed, "teacher")), cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """The learngene and the wanted networks as the command makes them; without flags also the arms, over seeds."""
    data = options.load_data("digits")
    if options.gene:
        family = descend(run, data, gene_of(options.model or "", cfg), cfg)
    elif options.own:
        if not options.teacher:
            raise UserError("--teacher is missing: give a trained network (RUN/students/NAME, timm:NAME, …)")
        spec = options.spec(data, "timm:vit_tiny_patch16_224", "bert")
        teachers, look = options.teachers(data, fresh=bool(cfg.teacher_epochs))
        family = distill(run, data, spec, teachers, cfg, network=options.network(spec, run.seed), **look)
    else:
        family = distill(run, data, BASE, TEACHER.build(seed=fold(run.seed, "teacher")), cfg)
    report = describe(run, family, data, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = options.children()
        arms = trials(run, {arm: partial(once, run, arm, cfg) for arm in ARMS}, seeds)
        if report is not None:
            report.claims += claims(arms, cfg.depths, list(seeds))
            now = {f"{d} layers %": (f"accuracy{d}", 100.0, 2) for d in cfg.depths}
            before = {f"{d} at the start %": (f"start{d}", 100.0, 1) for d in cfg.depths}
            note = "mean ± standard deviation over seeds; same steps in all arms, fresh networks at their own rate"
            report.tables.append(table("Depths on digits", arms, {**now, **before}, note))
    return report


def gene_of(folder: str, cfg: Config) -> Gene:
    """The learned blocks of another run, from their folder."""
    student = continued(folder)
    if student is None:
        raise UserError(f"{folder} holds no student: there is no plan.json")
    spec, network, plan = student
    network, plan = unpacked(network, plan)
    path, _ = alike_blocks(network, cfg.blocks)
    return Gene(network, path, plan, spec, tuple(read_json(Path(folder) / "plan.json")["classes"]))


def once(whole: Run, arm: str, cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed, all depths; teacher and auxiliary network are trained once per seed for all arms."""
    data, teacher = load("digits"), TEACHER.build(seed=fold(run.seed, "teacher"))
    home = whole if run.seed == whole.seed else whole.child(f"given-{run.seed}", seed=run.seed, quiet=True)
    aux, gene, _ = auxiliary(home, data, BASE, teacher, cfg)
    z, y = predict(aux, data.test)
    found = {
        "auxiliary": classification(z, y)["accuracy"],
        "teacher": classification(*predict(teacher, data.test))["accuracy"],
    }
    for d in cfg.depths if arm != ARMS[2] else (8,):
        net = start(arm, gene, d, run.seed)
        before, _ = predict(net, data.test)
        found[f"start{d}"] = classification(before, y)["accuracy"]
        found[f"apart{d}"] = float((before - z).abs().max())
        if arm == "fresh":
            tune(run, f"tune-{d}", data, net, gene.path, replace(cfg, tune_lr=FRESH_LR))
        else:  # what `descend` has trained for this run's own seed is read back
            tune(home if arm == "SWS" else run, f"tune-d{d:02d}", data, net, gene.path, cfg)
        found[f"accuracy{d}"] = classification(*predict(net, data.test))["accuracy"]
    return found


def start(arm: str, gene: Gene, depth: int, seed: int) -> nn.Module:
    """A network of `depth` layers before it is tuned."""
    if arm == "SWS":
        return gene.expand(spread(depth, len(gene)))
    if arm == "fresh":
        return replace(BASE, options={**VIT, "depth": depth}).build(seed=fold(seed, "fresh", depth))
    order = np.random.default_rng(fold(seed, "order", depth)).permutation(depth)
    return gene.expand([spread(depth, len(gene))[i] for i in order])


def claims(arms: Results, depths: Sequence[int], seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    sws, fresh, _ = arms.values()
    made = [
        claim(f"{d} layers: SWS − fresh, accuracy in points", difference(sws, fresh, f"accuracy{d}", 100.0), 3.0, seeds)
        for d in depths
    ]
    if 8 in depths:
        apart, text = (
            max(r["apart8"] for r in sws),
            "8 layers before tuning: largest difference from the auxiliary's logits",
        )
        made.append(Claim(text, apart <= 1e-6, apart, 1e-6, list(seeds)))
    if 6 in depths:
        least = 100 * min(r["start6"] for r in sws) - 10
        made.append(
            Claim("6 layers before tuning: accuracy above chance, points (least)", least > 10, least, 10.0, list(seeds))
        )
    return made


@torch.no_grad()
def describe(run: Run, family: Family, data: Data, command: str) -> Report:
    family.save(run.folder)
    students, metrics, matrices = family.measure(data, run.folder, run.device)
    aux = [r for r in family.logs if "name" not in r and "kd" in r]
    lines: dict[str, Any] = {"auxiliary": ([r["step"] for r in aux], [r["kd"] for r in aux])} if aux else {}
    tuned = {r["name"]: [x for x in family.logs if x.get("name") == r["name"]] for r in family.logs if "name" in r}
    curves = [Curve("Auxiliary network: KL to the teacher", "step", "nats", lines)] if lines else []
    if tuned:
        each: dict[str, Any] = {n: ([r["step"] for r in rows], [r["label"] for r in rows]) for n, rows in tuned.items()}
        curves.append(Curve("Tuning: cross-entropy by depth", "step", "nats", each))
    sources = [
        f"{m.name}: blocks {' '.join(map(str, e.source))}"
        for m in family
        for e in (m.plan.edits[-1:] if m.plan else ())
        if isinstance(e, Depth) and m.name != "learngene"
    ]
    tuned_rows = [r.metrics["accuracy"] for r in students if r.role == "student" and r.name != "learngene"]
    metrics["mean_accuracy"] = sum(tuned_rows) / len(tuned_rows)
    stored, apart = family.cost["stored_params"], family.cost["separate_params"]
    name = family.spec.name if family.spec else type(family.base).__name__
    return Report(
        system="sws_learngene", title=f"{name} in {len(family) - 1} depths on {data.name}", command=command,
        seed=run.seed, environment=environment(), students=students, cost=family.cost, matrices=matrices, curves=curves,
        metrics={**metrics, "stored_share": stored / apart}, notes=[*data.notes, *family.notes, *sources],
        claims=[Claim("weights to keep, as a part of those of all depths apart", stored < apart, stored / apart, 1.0,
                      [run.seed])],
    )  # fmt: skip
