"""WAD on real data; on built-in digits the claims of the card over seeds.

stillhouse run wad --out runs/wad
stillhouse run wad --data fashion-mnist --targets 0 1 2 3 --per-class 20 --mismatch 0.6 --model stillhouse:cnn --out runs/mine
stillhouse run wad --data folder:labelled --pool folder:everything --encoder timm:vit_small_patch14_dinov2 --out runs/photos
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import Batches, Data, Samples, load
from stillhouse.data.pools import Mismatch, few, mismatch, part_of
from stillhouse.distill import Distill
from stillhouse.encoders import open_encoder
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment
from stillhouse.models import ModelSpec
from stillhouse.options import ImageOptions
from stillhouse.outcomes import Member
from stillhouse.recipes.wad.bank import gap
from stillhouse.recipes.wad.recipe import WAD, Config, Grown, distill
from stillhouse.report import Claim, Curve, Report, Table
from stillhouse.trials import Results, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(ImageOptions):
    """Images with few labels, and a pool."""

    BRINGS: ClassVar[tuple[str, ...]] = (*ImageOptions.BRINGS, "targets", "per_class", "mismatch", "pool", "encoder")

    seeds: int = 5  # seeds for the claims of the built-in experiment
    targets: tuple[int, ...] = ()  # classes of interest, by number (default: all); the others count as unknown
    per_class: int | None = None  # labelled samples of each class of interest; of the rest a pool is made
    mismatch: float | None = None  # part of the made pool that is of other classes (default: as it comes)
    pool: str | None = None  # a pool of your own: folder:PATH of image files at any depth, or as --data
    encoder: str | None = None  # a trained network as the teacher: RUN/students/NAME, timm:NAME, module:function, …

    def idle(self, config: Any) -> Mapping[str, str]:
        """Settings of teachers that are made here do nothing beside one that is brought."""
        of_made = [f.name for f in fields(config) if f.name.startswith("simclr_")]
        of_made += ["teacher", "components", "body", "projection"]
        return {**super().idle(config), **(dict.fromkeys(of_made, "--encoder is the teacher") if self.encoder else {})}


PRESET = Config(
    teacher="pca", augmented=False, steps=100, batch=32, lr=3e-3, flip=False, shift=0, noise=0.15, components=20
)
TINY = replace(PRESET, rounds=2, steps=5, grow=0.4, recheck=True, batch=16)
TARGETS, PER_CLASS, RATIO = (0, 1, 2, 3), 5, 0.6
STUDENT = ModelSpec("stillhouse:mlp", len(TARGETS), (1, 8, 8), options={"widths": [32]})
SIMCLR: Mapping[str, Any] = {
    "teacher": "simclr", "augmented": True, "simclr_epochs": 60.0, "crop": 0.5, "colour": 0.2, "projection": 64,
}  # fmt: skip
ARMS: dict[str, Mapping[str, Any]] = {
    "labels only": {"beta": 0.0, "grow": 0.0},
    "unweighted": {"weight": "none"},
    "WAD": {},
    "S1": {"weight": "similarity"},
    "S1 · gap": {"weight": "product"},
    "WAD, nobody taken in": {"grow": 0.0},
    "WAD, SimCLR teacher": SIMCLR,
    "oracle": {},
    "oracle · gap": {},
}


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One run as the command makes it; without --model and --data also the claims."""
    if options.own:
        data, pool, made = own_task(options)
        encoder = open_encoder(options.encoder, data, "--encoder") if options.encoder else None
        spec = options.spec(data, "stillhouse:cnn")
        grown = distill(run, data, pool, spec, encoder, cfg, network=options.network(spec, run.seed))
    else:
        data, made = task(run.seed, RATIO)
        grown = distill(run, data, made.pool, STUDENT, None, cfg)
    report = describe(run, grown, data, made, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = list(options.children())
        results: dict[float, Results] = {}
        for ratio in (0.6, 0.8):
            arms = {f"{arm}, m = {ratio}": partial(once, arm, ratio, cfg) for arm in ARMS}
            found = trials(run, arms, seeds)
            results[ratio] = {arm: found[f"{arm}, m = {ratio}"] for arm in ARMS}
        if report is not None:
            report.claims += claims(results, seeds)
            report.tables += [*(arm_table(results[m], m) for m in results), differences(results)]
    return report


def own_task(options: OPTIONS) -> tuple[Data, Samples, Mismatch | None]:
    """The user's data as labelled samples and a pool, with what is known of the pool where it was made here."""
    whole = options.load_data("digits")
    targets = options.targets or tuple(range(len(whole.classes)))
    if options.pool is None and options.per_class is None:
        raise UserError("which samples have no label? give --per-class N, or --pool with further samples")
    if options.pool is not None and options.mismatch is not None:
        raise UserError("--mismatch is for a pool made of the data; with --pool the pool is taken as it comes")
    train: Samples = part_of(whole.train, targets)
    test = part_of(whole.test, targets)
    if (pool := options.open_pool(options.pool, whole)) is not None:
        if options.per_class is not None:
            train, _ = few(train, options.per_class, options.seed)
        return Data(whole.name, train, test, notes=whole.notes), pool, None
    others = int((~np.isin(whole.train.labels, targets)).sum())
    share = others / max(1, len(whole.train) - len(targets) * (options.per_class or 0))
    ratio = share if options.mismatch is None else options.mismatch
    made = mismatch(whole.train, targets, options.per_class or 1, ratio, seed=options.seed)
    parts = f"{len(made.pool)} in the pool, {100 * made.ratio:.1f} % of other classes"
    note = f"{len(made.labelled)} labelled samples; {parts}"
    return Data(whole.name, made.labelled, test, notes=(*whole.notes, note)), made.pool, made


def task(seed: int, ratio: float) -> tuple[Data, Mismatch]:
    """Digits 0 to 3 with 5 labels each; a pool of which the part `ratio` shows 4 to 9."""
    whole = load("digits")
    made = mismatch(whole.train, TARGETS, PER_CLASS, ratio, seed=seed)
    return Data("digits 0 to 3", made.labelled, part_of(whole.test, TARGETS)), made


def tiny(run: Run, cfg: Config = TINY, plain: bool = False) -> Grown:
    """One run of about a second for the contract table; `plain` trains the student on the labels by `Distill`."""
    whole = load("digits")
    made = mismatch(whole.train, (1, 3), 4, 0.5, known=40, seed=run.seed)
    data = Data("digits 1 and 3", made.labelled, part_of(whole.test, (1, 3)))
    spec = replace(STUDENT, classes=2)
    if not plain:
        return distill(run, data, made.pool, spec, None, cfg)
    network = spec.build(seed=run.seed)
    (how,) = WAD(network, cfg, 1).updates()
    alone = Distill(network, None, objectives=(), optimizer=how.optimizer)
    fit(run, "round1", alone, Batches(data.train, cfg.batch, augment=False), steps=cfg.steps)
    student = Member("student", network.eval(), spec=spec)
    return Grown([student], tuple(data.shape), tuple(data.classes), network, spec)


def once(arm: str, ratio: float, cfg: Config, run: Run) -> dict[str, Any]:
    """A student of one arm: how good it is, and how much the unknown samples were heard."""
    data, made = task(run.seed, ratio)
    known = torch.from_numpy(made.known).float()
    judges: dict[str, Any] = {"oracle": lambda s: known, "oracle · gap": lambda s: known * gap(s)}
    grown = distill(run, data, made.pool, STUDENT, None, replace(cfg, **ARMS[arm]), judge=judges.get(arm))
    z, y = grown.logits(data.test)
    found = classification(z[0], y)
    return {"accuracy": found["accuracy"], "nll": found["nll"], **heard(grown, made)}


def heard(grown: Grown, made: Mismatch) -> dict[str, float | None]:
    """Whether weights tell known from unknown samples, what part of the weight unknown ones have, wrong additions.

    AUROC and mass are those of the first round, before anything is taken in.
    """
    from sklearn.metrics import roc_auc_score

    first = grown.rounds[0]
    known, w, s = made.known[first["left"]], first["weight"].double().numpy(), first["similarity"]
    out: dict[str, float | None] = {"auroc": None, "auroc_first": None, "mass": None, "wrong": None}
    if known.any() and not known.all():
        out["auroc"] = float(roc_auc_score(known, w))
        out["auroc_first"] = float(roc_auc_score(known, s.amax(1).numpy()))
        out["auroc_gap"] = float(roc_auc_score(known, gap(s).numpy()))
    if w.sum() > 0:
        out["mass"] = float(w[~known].sum() / w.sum())
    right = made.truth[first["left"]] == first["pseudo"].numpy()
    out["pseudo"] = float(right[known].mean()) if known.any() else None
    inside = {row["position"]: row["label"] for row in grown.moved if not row.get("given_back")}
    for row in grown.moved:
        if row.get("given_back"):
            inside.pop(row["position"], None)
    if inside:
        out["wrong"] = float(np.mean([made.truth[p] != label for p, label in inside.items()]))
    return out


def claims(results: Mapping[float, Results], seeds: list[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""

    def points(a: str, b: str, m: float) -> float:
        return 100 * (mean(results[m][a], "accuracy") - mean(results[m][b], "accuracy"))

    at6, at8 = points("WAD", "unweighted", 0.6), points("WAD", "unweighted", 0.8)
    oracle, auroc = points("oracle", "WAD", 0.6), mean(results[0.6]["WAD"], "auroc")
    mass = mean(results[0.6]["WAD"], "mass")
    return [
        Claim("m = 0.6, accuracy: WAD − unweighted, points", at6 >= -0.2, at6, -0.2, seeds),
        Claim("m = 0.8, accuracy: WAD − unweighted, points", at8 > 0, at8, 0.0, seeds),
        Claim("m = 0.6: AUROC of the weights, known against unknown", auroc >= 0.7, auroc, 0.7, seeds),
        Claim("m = 0.6, accuracy: oracle − WAD, points", oracle >= -0.5, oracle, -0.5, seeds),
        Claim("m = 0.6: part of the weight that unknown samples have, below m", mass < 0.6, mass, 0.6, seeds),
    ]


def arm_table(results: Results, ratio: float) -> Table:
    columns = {
        "student %": ("accuracy", 100.0, 2),
        "NLL": ("nll", 1.0, 3),
        "AUROC of the weights": ("auroc", 1.0, 3),
        "unknown samples' part of the weight %": ("mass", 100.0, 1),
        "wrong among those taken in %": ("wrong", 100.0, 1),
    }
    note = "mean ± standard deviation over seeds; AUROC and part of the weight in the first round"
    return table(f"Digits 0 to 3, {100 * ratio:.0f} % of the pool unknown", results, columns, note)


def differences(results: Mapping[float, Results]) -> Table:
    """Accuracy less the unweighted arm's, paired by seed, with standard errors."""
    rows: list[list[Any]] = []
    for arm in ARMS:
        row: list[Any] = [arm]
        for found in results.values():
            pairs = zip(found[arm], found["unweighted"], strict=True)
            d = np.array([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs])
            error = d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else float("nan")
            row.append(f"{d.mean():+.2f} ± {error:.2f}")
        rows.append(row)
    columns = ["arm", *(f"m = {m}" for m in results)]
    return Table("Accuracy less the unweighted arm's, points", columns, rows, "paired by seed; ± standard error")


def describe(run: Run, grown: Grown, data: Data, made: Mismatch | None, command: str) -> Report:
    """The report of one run: the student, the weights, and who was taken in."""
    grown.save(run.folder)
    students, metrics, _ = grown.measure(data, run.folder, run.device)
    steps = [r["step"] for r in grown.logs]
    terms: dict[str, Any] = {
        k: (steps, [r[k] for r in grown.logs]) for k in ("label", "pool") if grown.logs and k in grown.logs[0]
    }
    curves = [Curve("Loss, labels and pool", "step", "loss", terms), weight_curve(grown, made)]
    rows = []
    for r, seen in enumerate(grown.rounds, 1):
        new = [row for row in grown.moved if row["round"] == r]
        back = sum(bool(row.get("given_back")) for row in new)
        w: Tensor = seen["weight"]
        rows.append([r, len(seen["left"]), f"{float(w.mean()):.4f}" if len(w) else "–", len(new) - back, back])
    columns = ["round", "in the pool", "mean weight", "taken in after it", "given back before it"]
    tables = [Table("Rounds", columns, rows, "moved.json names every sample that was taken in")]
    if made is not None:
        facts = {k: v for k, v in heard(grown, made).items() if v is not None}
        shown = {
            "auroc": "AUROC of the weights, known against unknown", "auroc_first": "AUROC of S1",
            "auroc_gap": "AUROC of S1 − S2", "mass": "unknown samples' part of the weight",
            "pseudo": "pseudo-labels of known samples that are right", "wrong": "wrong among those taken in",
        }  # fmt: skip
        found: Sequence[list[Any]] = [[text, f"{facts[k]:.4f}"] for k, text in shown.items() if k in facts]
        note = f"the pool was made here, so that it is known: {100 * made.ratio:.1f} % unknown; not used in training"
        tables.append(Table("How the pool was judged", ["", "value"], list(found), note))
    return Report(
        system="wad", title=f"{data.name}, {len(data.train)} labels and a pool of {grown.cost['pool']}",
        command=command, seed=run.seed, environment=environment(), metrics=metrics, claims=[], students=students,
        cost=grown.cost, notes=[*data.notes, *grown.notes], curves=curves, tables=tables,
    )  # fmt: skip


def weight_curve(grown: Grown, made: Mismatch | None) -> Curve:
    """The weights of the first round in descending order; of known and unknown samples apart where that is known."""
    first = grown.rounds[0]
    w = first["weight"].numpy()
    groups = {"all": np.ones(len(w), bool)}
    if made is not None:
        known = made.known[first["left"]]
        groups = {"known classes": known, "unknown classes": ~known}
    series = {}
    for name, mine in groups.items():
        values = np.sort(w[mine])[::-1][:: max(1, int(mine.sum()) // 100)]
        if len(values):
            series[name] = (np.linspace(0, 100, len(values)).tolist(), values.tolist())
    return Curve("Weights in the first round, largest first", "% of the samples", "weight", series)
