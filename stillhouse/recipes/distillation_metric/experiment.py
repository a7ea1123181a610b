"""What students are worth beside their teacher: scored as they come, or trained as a ladder; the claims on digits.

stillhouse run distillation_metric --out runs/ds                                  # digits: a ladder, and the claims
stillhouse run distillation_metric --data cifar10 --teacher runs/a/students/p00 \\
    --student runs/a/students/p50 runs/b/students/student --alpha 0.2 --out runs/ds   # trained models, scored
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import call, classification, count_bytes, environment, evaluating, logits_of, predict, spread
from stillhouse.export import read_tensors
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.options import ImageOptions
from stillhouse.outcomes import Member
from stillhouse.outcomes import load as load_model
from stillhouse.recipes.distillation_metric.recipe import Config, distill, ladder
from stillhouse.report import Claim, DistillationReport, Rated, Report, Table, rate
from stillhouse.report.rating import rating
from stillhouse.score import Interval, distillation_score, paired_bootstrap, pareto
from stillhouse.students.plan import Plan
from stillhouse.system import fold
from stillhouse.trials import claim, difference, trials


@dataclass(frozen=True)
class OPTIONS(ImageOptions):
    """Images, a teacher and students that are trained already."""

    BRINGS: ClassVar[tuple[str, ...]] = (*ImageOptions.BRINGS, "teacher", "student")

    model: str | None = None  # the teacher of a ladder, to be trained: stillhouse:NAME, torchvision:NAME, …
    teacher: str | None = None  # a trained teacher: RUN/students/NAME, or package.module:function
    student: tuple[str, ...] = ()  # trained students, likewise; they are scored, and nothing is trained

    def idle(self, config: Config) -> dict[str, str]:
        """What is of a teacher to be trained, beside a trained one; what is of training, where nothing is trained."""
        found = dict[str, str]()
        if self.teacher:
            of_fresh = ("model", "pretrained", "stem", "teacher_epochs")
            found |= dict.fromkeys(of_fresh, "--teacher is trained already")
        if self.student:
            of_training = [f.name for f in fields(config) if f.name != "alpha"]
            found |= dict.fromkeys((*of_training, "augment"), "--student scores trained models, and nothing is trained")
        return found


PRESET = Config()
TINY = replace(PRESET, hidden=(4, 16), epochs=2, teacher_epochs=2)
TEACHER = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [256, 128]})
ALPHAS = [k / 1000 for k in range(1001)]


def tiny(run: Run, cfg: Config = TINY) -> Family:
    """One run of about a second on 192 digits, for the contract table."""
    return distill(run, load("digits", limit=192), TEACHER, cfg=cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """Scores trained students, or trains a ladder and scores it; without flags also the claims over seeds."""
    data = options.load_data("digits")
    if options.student and not options.teacher:
        raise UserError("--teacher is missing: students are scored beside their teacher")
    if options.student:
        family = as_family(options, data)
    elif options.teacher:
        family = distill(run, data, opened(options.teacher, data).model, cfg=replace(cfg, teacher_epochs=0.0))
    else:
        spec = options.spec(data, "stillhouse:cnn") if options.own else TEACHER
        family = distill(run, data, spec, cfg=cfg, network=options.network(spec, run.seed))
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = list(options.children())
        arms = trials(run, {"ladder": partial(once, cfg)}, seeds)
        if report is not None:
            report.claims += claims(arms["ladder"], seeds, cfg)
            report.tables += [over_seeds(arms["ladder"], cfg), collapse(arms["ladder"])]
    return report


def as_family(options: OPTIONS, data: Data) -> Family:
    """The named students with the named teacher as their base."""
    teacher, members = opened(str(options.teacher), data), [opened(name, data) for name in options.student]
    for k, m in enumerate(members):
        if sum(other.name == m.name for other in members) > 1:
            m.name = f"{m.name}-{k}"
    return Family.of(data, members, teacher.model, teacher.spec, base_name="teacher")


def opened(name: str, data: Data) -> Member:
    """A trained network with how it is built again."""
    folder = Path(name)
    if (folder / "plan.json").exists():
        facts = read_tensors(folder)[1]
        spec = ModelSpec.from_json(facts["base"]) if "name" in (facts.get("base") or {}) else None
        member = Member(folder.name, load_model(folder), Plan.from_json(facts), spec=spec)
    elif ":" in name and name.partition(":")[0] not in ("stillhouse", "torchvision", "timm"):
        spec = ModelSpec(name, len(data.classes), tuple(data.shape))
        member = Member(name.partition(":")[2], spec.build().eval(), spec=spec)
    else:
        raise UserError(f"{name}: expected a trained network, RUN/students/NAME or package.module:function")
    x = data.test.take(np.arange(min(2, len(data.test))))["input"]
    with torch.no_grad(), evaluating(member.model):
        found = logits_of(call(member.model, x)).shape[1]
    if found != len(data.classes):
        raise UserError(f"{name} gives {found} logits, but {data.name} has {len(data.classes)} classes")
    return member


def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    students = [s for s in students if s.role != "ensemble"]  # the ladder is no ensemble
    for s in students:
        s.metrics.pop("importance", None)
    report = Report(
        "distillation_metric", f"Students beside {type(family.base).__name__} on {data.name}", command, run.seed,
        environment(), {k: v for k, v in metrics.items() if k.startswith("base")}, [], students, family.cost,
        notes=[*data.notes, *family.notes],
    )  # fmt: skip
    rate(report, cfg.alpha)
    _, made = rating(report.students, cfg.alpha)
    if made is not None:
        report.tables.append(by_alpha(made))
    return report


def by_alpha(made: DistillationReport) -> Table:
    """Who has the least DS, for every α."""
    steps = made.path()
    ends = [*(at for at, _ in steps[1:]), 1.0]
    rows = [
        [f"{at:.3f} … {end:.3f}", m.name, f"{100 * m.size / made.teacher.size:.2f} %", f"{100 * m.score:.2f} %"]
        for (at, m), end in zip(steps, ends, strict=True)
    ]
    note = "least DS; α weighs size against lost score, so sizes only fall from row to row"
    return Table("Which model for which α", ["α", "model", "size ratio", "score"], rows, note)


# -- the claims of the card --------------------------------------------------------------------------------------


def once(cfg: Config, run: Run) -> dict[str, Any]:
    """The ladder on digits for one seed: bytes and accuracy of everything, and what guessing gives."""
    data = load("digits")
    family = distill(run, data, TEACHER, cfg=replace(cfg, alone=True))
    z, y = family.logits(data.test)
    smallest = ladder(data, cfg)[f"h{min(cfg.hidden)}"].build(seed=fold(run.seed, "untrained"))
    accuracy = [classification(a, y)["accuracy"] for a in z]
    found = {m.name: [m.weight_bytes, a] for m, a in zip(family.members, accuracy, strict=True)}
    named = [f"h{h}" for h in cfg.hidden]
    return {
        "teacher": [count_bytes(family.base), classification(*predict(family.base, data.test))["accuracy"]],
        "students": found,
        "untrained": [count_bytes(smallest), classification(*predict(smallest, data.test))["accuracy"]],
        "chance": float(y.bincount().max()) / len(y),
        "accuracy": sum(found[n][1] for n in named) / len(named),
        "accuracy_alone": sum(found[f"{n}-alone"][1] for n in named) / len(named),
    }


def report_of(result: Mapping[str, Any], alpha: float) -> DistillationReport:
    """One seed's students beside its teacher."""
    students = [Rated(name, *found) for name, found in result["students"].items()]
    return DistillationReport(Rated("teacher", *result["teacher"]), students, alpha, chance=result["chance"])


def gains(result: Mapping[str, Any], cfg: Config) -> dict[str, float]:
    """DS of each student trained alone minus DS of the same student distilled: what distillation itself achieved."""
    made = report_of(result, cfg.alpha)
    ds = dict(zip(result["students"], made.ds, strict=True))
    return {f"h{h}": ds[f"h{h}-alone"] - ds[f"h{h}"] for h in cfg.hidden}


def claims(results: Sequence[Mapping[str, Any]], seeds: list[int], cfg: Config) -> list[Claim]:
    """The card's four, the first in its two readings."""
    gain = [sum(g.values()) / len(g) for g in (gains(r, cfg) for r in results)]
    points = difference(results, results, ("accuracy", "accuracy_alone"), 100.0)
    rising, off, least = 0, 0, 1.0
    for result in results:
        made = report_of(result, cfg.alpha)
        models = [made.best(a) for a in ALPHAS]
        rising += sum(b.size > a.size for a, b in itertools.pairwise(models))
        front = {m.name for m, on in zip(made.students, made.front, strict=True) if on}
        every = [(1.0, 1.0), *zip(made.sizes, made.scores, strict=True)]
        front |= {"teacher"} if pareto(every)[0] else set()
        off += sum(m.name not in front for m in models[1:-1])
        big, score = result["teacher"]
        for size, _ in result["students"].values():
            guess = [(distillation_score(size, big, result["chance"], score, a, True, result["chance"]), a)
                     for a in ALPHAS if a <= 0.5]  # fmt: skip
            least = min(least, *(ds - a for ds, a in guess))
    return [
        claim("DS alone − DS distilled, mean over students", spread_of(gain), 0.0, seeds),
        claim("distilled − alone, accuracy in points, mean over students", points, -0.5, seeds),
        Claim("values of α at which the best student grows, over all tables", rising == 0, rising, 0.0, seeds),
        Claim("values of α in (0, 1) whose best student is off the front", off == 0, off, 0.0, seeds),
        Claim("least DS_adj − α of a constant answer of any student's size, α ≤ 0.5", least > 0, least, 0.0, seeds),
    ]


def spread_of(values: Sequence[float]) -> Interval:
    """Mean over seeds with its bootstrap interval."""
    return paired_bootstrap(lambda x: x, values)


def over_seeds(results: Sequence[Mapping[str, Any]], cfg: Config) -> Table:
    """Every model of the ladder, mean over seeds."""
    rows: list[list[Any]] = []
    made = [report_of(r, cfg.alpha) for r in results]
    gained = [gains(r, cfg) for r in results]
    for k, name in enumerate(results[0]["students"]):
        ds, adjusted = ([m[k] for m in ms] for ms in ([m.ds for m in made], [m.ds_adj for m in made]))
        accuracy = [100 * r["students"][name][1] for r in results]
        gain = pm([g[name] for g in gained], 4) if name in gained[0] else "–"
        size = f"{100 * made[0].sizes[k]:.2f}"
        rows.append([name, size, pm(accuracy, 2), pm(ds, 3), pm(adjusted, 3), gain])
    rows.append(
        [
            "teacher",
            "100.00",
            pm([100 * r["teacher"][1] for r in results], 2),
            f"{cfg.alpha:.3f}",
            f"{cfg.alpha:.3f}",
            "–",
        ]
    )
    heads = ["model", "size ratio %", "accuracy %", made[0].title, "DS_adj", "DS gained by distilling"]
    note = "mean ± standard deviation over seeds; bytes of weights; alone: labels without the teacher"
    return Table("The ladder on digits", heads, rows, note)


def collapse(results: Sequence[Mapping[str, Any]]) -> Table:
    """What DS says of students that know nothing, raw and corrected."""
    rows = []
    for what in ("a constant answer", "untrained"):
        for alpha in (0.2, 0.5):
            pairs = []
            for r in results:
                (size, score), (big, top) = r["untrained"], r["teacher"]
                score = r["chance"] if what == "a constant answer" else score
                pairs.append([distillation_score(size, big, score, top, alpha, True, c) for c in (None, r["chance"])])
            raw, adjusted = ([p[i] for p in pairs] for i in (0, 1))
            rows.append([what, f"{alpha:g}", pm(raw, 3), pm(adjusted, 3), "yes" if min(adjusted) > alpha else "no"])
    heads = ["smallest student, as", "α", "DS", "DS_adj", "DS_adj above α: worse than doing nothing"]
    return Table("Students that know nothing", heads, rows, "a raw ratio of accuracies hides part of a collapse")


def pm(values: Sequence[float], digits: int) -> str:
    found = spread(values)
    return f"{found['mean']:.{digits}f}" + (f" ± {found['std']:.{digits}f}" if len(values) > 1 else "")
