"""Distiller on real data; on built-in digits, or on sentences, the card's claims over seeds.

stillhouse run distiller_mi_alpha --out runs/mi              # the bound on Gaussians, losses on digits, the recommender
stillhouse run distiller_mi_alpha --data sst2 --limit 5000 --out runs/mi-text          # the losses between two encoders
stillhouse run distiller_mi_alpha --data mine.jsonl --teacher hf:bert-base-uncased --student bert --out runs/mine
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import nn

from stillhouse.comparisons import Objective
from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.plain import train_teacher
from stillhouse.recipes.distiller_mi_alpha import studies
from stillhouse.recipes.distiller_mi_alpha.config import Config
from stillhouse.recipes.distiller_mi_alpha.recipe import distill
from stillhouse.recipes.distiller_mi_alpha.studies import Pair
from stillhouse.report import Claim, Curve, Report
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import Results, mean, table, trials

OPTIONS = TeacherOptions
PRESET = Config(intermediate_weight=0.1, teacher_epochs=40, epochs=80, batch=64, lr=3e-3, weight_decay=0.01, clip=5.0)
TEXT = replace(PRESET, teacher_epochs=3, epochs=4, lr=1e-3)  # for encoders from scratch
TINY = replace(PRESET, epochs=2, teacher_epochs=2, mixup=0.4)
STUDENT = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [8, 8]})
Arms = Mapping[str, Mapping[str, Any]]
ARMS: dict[str, dict[str, Any]] = {
    "KD": {"intermediate": "none"},
    "KD + MSE": {"intermediate": "mse"},
    "KD + MI 0.1": {"intermediate": "mi", "alpha": 0.1},
    "KD + MI 0.9": {"intermediate": "mi", "alpha": 0.9},
}
MORE: dict[str, dict[str, Any]] = {
    "KD + cosine": {"intermediate": "cosine"},
    "KD + CKA": {"intermediate": "cka"},
    "KD + Gram": {"intermediate": "gram"},
    "KD + MI 0.9, EMD": {"intermediate": "mi", "alpha": 0.9, "layer_map": "emd"},
    "KD + MI 0.9, mixup": {"intermediate": "mi", "alpha": 0.9, "mixup": 0.4},
}


def tiny(run: Run, cfg: Config = TINY, student: ModelSpec = STUDENT, text: bool = False) -> Family:
    """One run of about a second on 192 digits or 96 made-up sentences, for the contract table."""
    data = load("digits", limit=192)
    pair = studies.made_up_sentences() if text else Pair(data, data, studies.few_digits(0).teacher, student)
    return distill(run, pair.learns, pair.student, pair.teacher.build(seed=fold(run.seed, "teacher")), cfg)


def main(run: Run, options: TeacherOptions, cfg: Config, command: str) -> Report | None:
    """One distillation as the command makes it; without networks also the claims, over seeds."""
    data = options.load_data("digits")
    text, networks = hasattr(data.train, "tokenizer"), bool(options.model or options.teacher)
    if networks or (options.own and not text):
        if not options.teacher:
            raise UserError("--teacher is missing: give a trained network (RUN/students/NAME, hf:NAME, timm:NAME, …)")
        student = options.spec(data, "stillhouse:cnn", "bert")
        network = options.network(student, run.seed)
        teachers, look = options.teachers(data, fresh=bool(cfg.teacher_epochs))
        family = distill(run, data, student, teachers, cfg, network=network, **look)
        return describe(run, family, data, command)
    arms, make = (ARMS, lambda seed: studies.encoders(data, options)) if text else (ARMS | MORE, studies.few_digits)
    if text:  # what the user did not set is set for encoders that start from scratch
        cfg = replace(TEXT, **{k: v for k, v in asdict(cfg).items() if v != getattr(Config(), k)})
    pair, seeds = make(run.seed), list(options.children())
    teacher = taught(run, pair, cfg)
    family = distill(run, pair.learns, pair.student, teacher, replace(cfg, teacher_epochs=0.0))
    report = describe(run, family, pair.learns, command)
    layers = trials(run, {"layers": partial(once, make, cfg, arms)}, seeds)["layers"]
    results: Results = {arm: [row[arm] for row in layers] for arm in arms}
    made = None
    if not text:
        made = run.memo("estimates", lambda: {str(s): studies.estimates(s) for s in seeds})
        short = replace(cfg, epochs=min(60.0, cfg.epochs))
        found = trials(run, {"tasks": lambda child: {"rows": studies.run_rows(child, students, arms, short)}}, seeds)
        rows = [row for result in found["tasks"] for row in result["rows"]]
    if report is not None:
        report.claims += of_layers(results, seeds)
        report.tables.append(layers_table(results))
        if made:
            extra = [studies.of_estimates(made, seeds), studies.of_recommender(rows, list(arms), seeds)]
            report.claims += [c for claims, _ in extra for c in claims]
            report.tables += [t for _, t in extra]
    return report


def describe(run: Run, family: Family, data: Data, command: str) -> Report | None:
    """Saves and measures on the main process; the losses by step as weighted, and the student's gradient."""
    report = None
    if run.main:
        family.save(run.folder)
        measured, metrics, _ = family.measure(data, run.folder, run.device)
        lines: dict[str, dict[str, Any]] = {"losses": {}, "gradient": {}}
        for name in sorted({k for r in family.logs for k in r} - {"step", "epoch", "accuracy"}):
            rows = [r for r in family.logs if name in r]
            which = "gradient" if name == "student_gradient" else "losses"
            lines[which][name] = ([r["step"] for r in rows], [r[name] for r in rows])
        curves = [Curve("Losses, as weighted (mi: −Î, nats)", "step", "loss", lines["losses"]),
                  Curve("Norm of the student's gradient", "step", "norm", lines["gradient"])]  # fmt: skip
        name = family.spec.name if family.spec else type(family.members[0].model).__name__
        title = f"Distiller · {type(family.base).__name__} into {name} on {data.name}"
        report = Report(
            system="distiller_mi_alpha", title=title, command=command, seed=run.seed, environment=environment(),
            metrics=metrics, claims=[], students=measured, cost=family.cost, notes=[*data.notes, *family.notes],
            curves=curves,
        )  # fmt: skip
    run.barrier()
    return report


# -- the claims of the card ---------------------------------------------------------------------------------------


def taught(run: Run, pair: Pair, cfg: Config) -> nn.Module:
    """The teacher, trained on labels in a stage of its own."""
    teacher = pair.teacher.build(seed=fold(run.seed, "teacher"))
    train_teacher(run, "teacher", teacher, pair.teaches, cfg.plain(()))
    return teacher


def students(run: Run, pair: Pair, cfg: Config, arms: Arms) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A teacher, and one student per arm under it."""
    teacher, found = taught(run, pair, cfg), {}
    for k, (arm, changes) in enumerate(arms.items()):
        family = one(run.child(f"arm{k}", quiet=True), pair, teacher, cfg, changes)
        found[arm] = family["student"].model
    return teacher, found


def one(run: Run, pair: Pair, teacher: nn.Module, cfg: Config, changes: Mapping[str, Any]) -> Family:
    return distill(run, pair.learns, pair.student, teacher, replace(cfg, teacher_epochs=0.0, **changes))


def once(make: Callable[[int], Pair], cfg: Config, arms: Arms, run: Run) -> dict[str, dict[str, Any]]:
    """One seed: a teacher, and one student per arm; how good it is and what its layers know of the teacher's."""
    pair, rows = make(run.seed), {}
    teacher = taught(run, pair, cfg)
    t, y = predict(teacher, pair.learns.test)
    for k, (arm, changes) in enumerate(arms.items()):
        began = time.monotonic()
        family = one(run.child(f"arm{k}", quiet=True), pair, teacher, cfg, changes)
        z, model = family.logits(pair.learns.test)[0][0], family["student"].model
        pairs = [Objective.parse(o) for o in replace(cfg, intermediate="mi").on_layers(model, teacher)[0]]
        places = [(str(o.student), str(o.teacher)) for o in pairs]
        own = classification(z, y)
        rows[arm] = {
            "accuracy": own["accuracy"], "nll": own["nll"], "teacher": classification(t, y)["accuracy"],
            "agreement": float((z.argmax(1) == t.argmax(1)).float().mean()),
            "r2": studies.probe(model, teacher, places, pair.teaches.train, pair.learns.test),
            "before": family.cost.get("bound_before"), "bound": family.cost.get("bound"),
            "seconds": time.monotonic() - began,
        }  # fmt: skip
    return rows


def of_layers(arms: Results, seeds: list[int]) -> list[Claim]:
    """The card's claims about students, with the card's thresholds."""
    claims = []
    for arm in ("KD + MI 0.1", "KD + MI 0.9"):
        rise = min(r["bound"] - r["before"] for r in arms[arm])
        closer = mean(arms[arm], "r2") - mean(arms["KD"], "r2")
        points = 100 * (mean(arms[arm], "accuracy") - mean(arms["KD"], "accuracy"))
        claims += [
            Claim(f"{arm}: Î on test samples rises in training, nats, least over seeds", rise > 0, rise, 0.0, seeds),
            Claim(
                f"{arm}: R² of the teacher's features from the student's − KD's", closer >= 0.05, closer, 0.05, seeds
            ),
            Claim(f"{arm} − KD, accuracy in points", points >= -1, points, -1.0, seeds),
        ]
    return claims


def layers_table(arms: Results) -> Any:
    columns = {
        "student %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3), "agrees %": ("agreement", 100.0, 2),
        "R² to the teacher": ("r2", 1.0, 3), "Î before": ("before", 1.0, 2), "Î after": ("bound", 1.0, 2),
        "teacher %": ("teacher", 100.0, 2), "seconds": ("seconds", 1.0, 1),
    }  # fmt: skip
    return table("Losses of layers beside KD", arms, columns)
