"""The law of capacity gap on a user's teachers and text, and on small networks of the built-in text over seeds.

stillhouse run capacity_gap_law --out runs/gap                       # five teachers, one size of student, over seeds
stillhouse run capacity_gap_law --sizes 40k 60k 90k --out runs/law   # three sizes: a law, if the minima are bracketed
stillhouse run capacity_gap_law --teacher hf:models/llama-7b --data wikitext2 --shape 3072 24 8192 --drop 4 4 --out runs/minima
stillhouse recommend --student-size 3B --law runs/law
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import count_bytes, count_macs, count_params, environment, latency, spread
from stillhouse.options import LanguageOptions
from stillhouse.outcomes import Member, continued
from stillhouse.recipes.capacity_gap_law.pilots import Pilot, law_of, minima, minima_of_means
from stillhouse.recipes.capacity_gap_law.recipe import Config, Pilots, distill, judged, prune, train_teachers
from stillhouse.recommend.law import CAVEAT, Best, short
from stillhouse.recommend.sizes import parse_size
from stillhouse.report import Claim, Curve, Report, Student, Table
from stillhouse.students.decoders import counted
from stillhouse.system import fold
from stillhouse.text.language import language_model, llama_spec, measured
from stillhouse.text.windows import Corpus, corpus
from stillhouse.trials import Results, claim, difference, trials


@dataclass(frozen=True)
class OPTIONS(LanguageOptions):
    """A text and teachers; without teachers the built-in ones, on the text."""

    BRINGS: ClassVar[tuple[str, ...]] = ("model", "teacher")

    teacher: tuple[str, ...] = ()  # teachers, as --model; also RUN/students/NAME, and llama:WIDTH from scratch

    def idle(self, config: Any) -> Mapping[str, str]:
        if self.own:
            return super().idle(config)
        return dict.fromkeys(("start", "units"), "the built-in experiment compares them; bring --teacher or --model")

    def teachers(self, text: Corpus, seed: int) -> list[Member]:
        """The networks named by ``--model`` and ``--teacher``."""
        made = [self._teacher(n, text, seed) for n in (*filter(None, [self.model]), *self.teacher)]
        counts = [[m.name for m in made[:k]].count(t.name) for k, t in enumerate(made)]
        return [replace(t, name=t.name + (f"-{n + 1}" if n else "")) for t, n in zip(made, counts, strict=True)]

    def _teacher(self, name: str, text: Corpus, seed: int) -> Member:
        source, _, rest = name.partition(":")
        if student := continued(name):
            spec, network, plan = student
            return Member(Path(name).name, network, plan, spec=spec)
        sizes = {"width": self.width, "layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads}
        if source == "llama" and rest:
            if not rest.isdigit():
                raise UserError(f"--teacher {name}: expected llama:WIDTH, such as llama:96")
            name, sizes["width"] = "llama", int(rest)
        spec, made = language_model(name, text, **sizes)
        model = made or spec.build(seed=fold(seed, "teacher", name, sizes["width"]))
        return Member(f"t{short(count_params(model))}".lower(), model, spec=spec)


PRESET = Config(sizes=("60k",), multiple=4, calibration=8, calibration_batch=16, teacher_steps=200, teacher_lr=3e-3,
                steps=100, batch=12, lr=2e-3, lr_warmup=0.05, chunk=0, judged=300)  # fmt: skip
TINY = replace(PRESET, sizes=("4k",), multiple=1, calibration=2, calibration_batch=2, teacher_steps=3, steps=4, batch=4,
               chunk=24)  # fmt: skip
GRID = ((48, 88), (56, 128), (64, 152), (80, 216), (112, 304))  # width and MLP of teachers: 1.3 to 8 times 60k
LAYERS = 3
ARMS = ("pruned", "fresh", "random units")


def tiny(run: Run, cfg: Config = TINY, layers: int = 2) -> Pilots:
    """One run of about a second on a few thousand characters, for the contract table."""
    text = corpus(length=16, limit=4000)
    sizes = [llama_spec(text.vocabulary, width=w, layers=layers, heads=2, hidden=2 * w, length=16) for w in (16, 24)]
    given = [Member(f"t{k}", s.build(seed=fold(run.seed, "teacher", k)), spec=s) for k, s in enumerate(sizes)]
    return distill(run, text, given, cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """The pilots as the command makes them; without teachers the built-in ones, and the arms over seeds."""
    first = next(iter(options.teacher), None)
    text = replace(options, model=options.model or first).corpus()  # read with the first teacher's tokenizer
    given = options.teachers(text, run.seed) if options.own else built_in(text, run.seed)
    found, seeds = distill(run, text, given, cfg), list(options.children())
    arms: Results = {}
    if not options.own:
        arms = trials(run, {arm: partial(once, run, text, arm, cfg) for arm in ARMS}, seeds)
        found.pilots = [Pilot(**p) for r in arms["pruned"] for p in r["pilots"]]
        found.law, found.why = law_of(found.pilots, cfg.counts, run.seed)
    report = describe(run, found, given, text, command) if run.main else None
    if report is not None and arms:
        report.claims = claims(arms, seeds)
        report.tables.append(compared(arms))
    run.barrier()
    return report


def built_in(text: Corpus, seed: int) -> list[Member]:
    """Untrained teachers of 1.3 to 8 times the students' 60 k."""
    sizes = {"layers": LAYERS, "heads": 4, "length": text.length}
    specs = [llama_spec(text.vocabulary, width=w, hidden=h, **sizes) for w, h in GRID]
    return [Member(f"w{s.options['hidden_size']}", s.build(seed=fold(seed, "teacher", k)), spec=s)
            for k, s in enumerate(specs)]  # fmt: skip


def once(whole: Run, text: Corpus, arm: str, cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; teachers are trained once per seed for all arms, with the pruned students."""
    home = whole if run.seed == whole.seed else whole.child(f"given-{run.seed}", seed=run.seed, quiet=True)
    given = built_in(text, run.seed)
    if arm == "pruned":
        pilots = distill(home, text, given, cfg).pilots
    elif arm == "fresh":
        train_teachers(home, text, given, cfg)
        pilots = distill(run, text, given, replace(cfg, teacher_steps=0, start="fresh")).pilots
    else:  # before training only
        train_teachers(home, text, given, cfg)
        how, sizes = replace(cfg, units="random"), [float(parse_size(s) or 0) for s in cfg.sizes]
        cut = [(t, prune(run, text, t, how, s)) for t in given for s in sizes if s < counted(t.model, cfg.counts)]
        return {f"start {m.name}": judged(run, m, text, cfg) for _, m in cut}
    found: dict[str, Any] = {"pilots": [asdict(replace(p, seed=run.seed)) for p in pilots]}
    found |= {f"{key} {p.name}": getattr(p, key) for p in pilots for key in ("start", "loss")}
    if arm == "pruned":
        found |= {f"teacher {t.name}": judged(run, t, text, cfg) for t in given}
    return found


def claims(arms: Results, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    pruned, fresh, random = arms.values()
    names = [p["name"] for p in pruned[0]["pilots"]]
    made = [
        claim(
            f"{n}: fresh − pruned start after the same steps, nats", difference(fresh, pruned, f"loss {n}"), 0.05, seeds
        )
        for n in names
    ]
    won = [sum(a[f"start {n}"] <= b[f"start {n}"] for n in names) for a, b in zip(pruned, random, strict=True)]
    text = (
        f"pairs of {len(names)} in which units by gradient are better than random ones before training, least of a seed"
    )
    return [*made, Claim(text, min(won) >= 0.8 * len(names), float(min(won)), 0.8 * len(names), list(seeds))]


def compared(arms: Results) -> Table:
    """The arms side by side, one row per pair of sizes."""
    pruned, fresh, random = arms.values()
    rows = []
    for p in pruned[0]["pilots"]:
        n = p["name"]
        cells = [(pruned, f"teacher {p['teacher']}"), (random, f"start {n}"), (pruned, f"start {n}"),
                 (fresh, f"loss {n}"), (pruned, f"loss {n}")]  # fmt: skip
        shown = [spread([r[key] for r in arm]) for arm, key in cells]
        rows.append([
            n, short(p["teacher_size"]), f"{p['teacher_size'] / p['student_size']:.2f}",
            *(f"{s['mean']:.3f}" + (f" ± {s['std']:.3f}" if s["n"] > 1 else "") for s in shown),
        ])  # fmt: skip
    heads = ["pair", "T", "T/S", "teacher", "random units, before", "pruned, before", "fresh, after", "pruned, after"]
    return Table("Nats per token of the test text", heads, rows, "mean ± standard deviation over seeds; same steps")


def describe(run: Run, found: Pilots, given: Sequence[Member], text: Corpus, command: str) -> Report:
    found.save(run.folder)
    metrics = {m.name: measured(m.model, text, run.device) for m in found}
    largest_first = sorted(given, key=lambda t: -count_params(t.model))
    students = [*(base_row(t, found, text, run) for t in largest_first), *found.rows(run.folder, metrics)]
    best: list[tuple[float, str, Best]] = [(size, str(k), b) for (size, k), b in sorted(minima(found.pilots).items())]
    best += [(size, "mean", b) for size, b in minima_of_means(found.pilots).items()]
    rows: list[list[Any]] = [
        [short(s), k, short(b.teacher), f"{b.teacher / s:.2f}", f"{b.loss:.4f}", "yes" if b.bracketed else "no"]
        for s, k, b in best
    ]
    heads = ["student", "seed", "best teacher", "T/S", "nats there", "bracketed"]
    tables = [Table("Best teacher by a parabola in log T", heads, rows)] if rows else []
    lines: dict[str, Any] = {
        f"{short(size)}, seed {seed}": tuple(zip(*sorted((p.teacher_size / p.student_size, p.loss) for p in found.pilots
                                             if (p.asked, p.seed) == (size, seed)), strict=True))
        for size, seed in sorted({(p.asked, p.seed) for p in found.pilots})
    }  # fmt: skip
    law, notes = found.law, [*text.notes, *found.notes]
    if law is not None:
        ends = law.interval or (law.a, law.a)
        notes.append(
            f"T* = {law.a:.3f} S {'−' if law.b < 0 else '+'} {short(abs(law.b))}, R² {law.r2:.4f}, a within "
            f"{ends[0]:.2f} … {ends[1]:.2f}; stillhouse recommend --law {run.folder}"
        )
    notes += [found.why] if found.why else []
    losses = [float(m["nll"]) for m in metrics.values()]
    return Report(
        system="capacity_gap_law", title=f"{len(found)} language models, pruned and distilled on {text.name}",
        command=command, seed=run.seed, environment=environment(), students=students, cost=found.cost,
        curves=[Curve("Nats per token by the teacher's size", "T / S", "nats", lines)], tables=tables,
        metrics={"best_nll": min(losses), "law": law.to_json() if law else None}, notes=[*notes, CAVEAT], claims=[],
    )  # fmt: skip


def base_row(teacher: Member, found: Pilots, text: Corpus, run: Run) -> Student:
    """A teacher's row of the report."""
    model, speed = teacher.model, latency(teacher.model, found.inputs)
    known = {**measured(model, text, run.device), "weight_bytes": count_bytes(model), "latency_p10": speed.p10_ms}
    cost = (count_params(model), count_macs(model, found.inputs), speed.median_ms)
    return Student(f"teacher {teacher.name}", None, *cost, {**known, "latency_p90": speed.p90_ms}, role="base")
