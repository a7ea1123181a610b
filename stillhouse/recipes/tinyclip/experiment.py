"""TinyCLIP on a user's two-tower model and pairs, and on captioned digits its arms over seeds.

stillhouse run tinyclip --out runs/tinyclip                    # captioned digits: one student, and arms over seeds
stillhouse run tinyclip --model hf:clip-vit-base-patch32 --data photos --keep 0.75 0.5 --out runs/half
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import count_bytes, count_macs, count_params, environment, latency
from stillhouse.models import ModelSpec, import_library
from stillhouse.options import Options
from stillhouse.outcomes import continued
from stillhouse.progress import without_bars
from stillhouse.recipes.tinyclip.config import Config
from stillhouse.recipes.tinyclip.measure import features, quality
from stillhouse.recipes.tinyclip.recipe import Stages, distill, train
from stillhouse.report import Claim, Curve, Report, Student, Table
from stillhouse.students.plan import Plan
from stillhouse.students.towers import towers
from stillhouse.text.pairs import TEMPLATES, PairData, Statistics, open_pairs
from stillhouse.text.sentences import tokenizer_by_name
from stillhouse.trials import Results, claim, difference, table, trials


@dataclass(frozen=True)
class OPTIONS(Options):
    """Image-text pairs and a two-tower model."""

    model: str | None = None  # trained: hf:NAME, RUN/students/NAME or package.module:function (default: small, fresh)
    data: str | None = None  # emoji-captions, a folder with captions.jsonl, hf:NAME?text=COLUMN, or labelled images
    template: tuple[str, ...] = TEMPLATES  # captions of labelled images; {} is the class name, the first for evaluation
    tokenizer: str | None = None  # one of transformers (default: the model's own, or the words of the captions)
    length: int | None = None  # most tokens of a caption (default: what the model reads, 16 for a small one)
    image_size: int | None = None  # side of the square images (default: what the model or the data have)
    augment: str | None = None  # none, flip, crop-flip, resized-crop-flip (default: none)
    limit: int | None = None  # use only this many training pairs

    def pairs(
        self, default: str, *, image_size: int | None = None, length: int = 16, statistics: Statistics | None = None
    ) -> PairData:
        """The pairs named by ``--data``, or `default`, as a model of these sizes reads them."""
        name = self.tokenizer or (self.model or "").partition("hf:")[2]
        if not name and self.model and (Path(self.model) / "tokenizer.json").exists():
            name = self.model
        return open_pairs(
            self.data or default, image_size=self.image_size or image_size, templates=self.template, seed=self.seed,
            limit=self.limit, augment=self.augment, length=self.length or length, statistics=statistics,
            tokenizer=tokenizer_by_name(name) if name else None,
        )  # fmt: skip


# Gates need some 5 units of their rate to close and about 20 to follow a ramp (as published: 0.02 · 1000 steps).
PRESET = Config(keep=(0.5,), epochs=15.0, teacher_epochs=25.0, batch=128, lr=1e-3, teacher_lr=1e-3,
                mask_steps=250, ramp_steps=170, gate_lr=0.1)  # fmt: skip
MANUAL = {"inherit": "manual", "alpha": 1.0}
BY_HAND = ("image_depth", "text_depth", "image_width", "text_width")
ARMS: dict[str, dict[str, Any]] = {  # all that their names say, whatever the flags are
    "inherited alone": {**MANUAL, "epochs": 0.0},
    "inherited + affinity": MANUAL,
    "fresh + affinity": {**MANUAL, "inherit": "fresh"},
    "inherited + InfoNCE": {**MANUAL, "alpha": 0.0},
    "gates + affinity": {**MANUAL, "inherit": "auto", **dict.fromkeys(BY_HAND, ())},
}
TINY = replace(PRESET, keep=(1.0, 0.5), epochs=1.0, teacher_epochs=1.0, batch=32, mask_steps=4, ramp_steps=2)


def small_clip(data: PairData, width: int = 32, image_depth: int = 6, text_depth: int = 2, head: int = 8) -> ModelSpec:
    """A small CLIPModel for these pairs: images in about 16 patches, the tokenizer's words."""
    channels, side, _ = data.shape
    patch = next(p for p in (max(1, side // 4), *range(1, side + 1)) if side % p == 0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // head}
    t, shared = data.tokenizer, {"projection_dim": width}
    text = {"vocab_size": len(t), "max_position_embeddings": data.train.length, "num_hidden_layers": text_depth}
    ends = {"pad_token_id": t.pad_token_id, "eos_token_id": t.eos_token_id, "bos_token_id": t.eos_token_id}
    image = {"image_size": side, "patch_size": patch, "num_channels": channels, "num_hidden_layers": image_depth}
    options = {
        "text_config": {**sizes, **text, **ends, **shared},
        "vision_config": {**sizes, **image, **shared},
        **shared,
    }
    return ModelSpec("transformers:CLIPModel", 0, tuple(data.shape), options=options)


def tiny(run: Run, cfg: Config = TINY) -> Stages:
    """One run of about a second on 96 captioned digits, for the contract table."""
    data = open_pairs("digits", limit=96, templates=TEMPLATES[:2], length=8)
    return distill(run, data, small_clip(data, width=16, image_depth=2, text_depth=2, head=8), cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """Students as the command makes them; without flags also every arm on captioned digits, over seeds."""
    spec, network, plan, data = given(options, cfg)
    made = distill(run, data, spec, cfg, network=network, plan=plan)
    report = describe(run, made, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own:
        seeds = options.children()
        arms = trials(run, {arm: partial(once, run, data, changes, cfg) for arm, changes in ARMS.items()}, seeds)
        if report is not None:
            report.claims += claims(arms, cfg.keep[-1], list(seeds))
            columns = {
                "zero-shot %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3),
                "L_affinity, test": ("affinity_loss", 1.0, 3), "L_affinity, step 100": ("early", 1.0, 3),
                "prunable weights kept %": ("kept", 100.0, 1), "teacher %": ("teacher", 100.0, 2),
            }  # fmt: skip
            note = "mean ± standard deviation over seeds; L_affinity at step 100 is of the training batches 75 to 100"
            report.tables.append(table(f"Arms at {100 * cfg.keep[-1]:g} %, captioned digits", arms, columns, note))
    return report


def given(options: OPTIONS, cfg: Config) -> tuple[ModelSpec, nn.Module | None, Plan | None, PairData]:
    """The user's model and pairs: a model of transformers, a folder of a run, a function's, or a fresh small one."""
    name = options.model or ""
    if name.startswith("hf:"):
        network = hub_clip(name.removeprefix("hf:"))
        size, longest = network.config.vision_config, network.config.text_config.max_position_embeddings
        look = hub_statistics(name.removeprefix("hf:"))
        data = options.pairs("digits", image_size=size.image_size, length=longest, statistics=look)
        return ModelSpec.of(network, (size.num_channels, size.image_size, size.image_size)), network, None, data
    if student := continued(name):
        spec, network, plan = student
        towers(network)  # another kind of student is refused here
        positions: Any = network.get_submodule("text_model.embeddings.position_embedding")
        return spec, network, plan, options.pairs("digits", image_size=spec.shape[-1], length=positions.num_embeddings)
    data = options.pairs("digits")
    if not name and not cfg.teacher_epochs:
        raise UserError(
            "--model is missing: hf:NAME, a folder RUN/students/NAME or package.module:function; or give "
            "--teacher-epochs N to train a small one on the pairs first"
        )
    own = {"vocabulary": len(data.tokenizer), "length": data.train.length}
    return ModelSpec(name, 0, tuple(data.shape), options=own) if name else small_clip(data), None, None, data


def hub_clip(name: str) -> Any:
    """transformers' CLIPModel by its name on the hub or its folder."""
    transformers = import_library("transformers")
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        with without_bars(transformers):
            found = transformers.CLIPModel.from_pretrained(name, use_safetensors=True) if kind == "clip" else None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--model hf:{name} cannot be had as a CLIPModel: {why}") from None
    if found is None:  # from_pretrained would take what has the right names, and draw the other weights
        raise UserError(f"--model hf:{name} is a model of type {kind!r}; expected a CLIPModel, of type 'clip'")
    return found.eval()


def hub_statistics(name: str) -> Statistics | None:
    """Mean and deviation by which a published model's images are normalised, where it says them."""
    try:
        found = import_library("transformers").CLIPImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None
    return tuple(found.image_mean), tuple(found.image_std)


def once(whole: Run, data: PairData, changes: Mapping[str, Any], cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; the teacher is trained once per seed and is the same in every arm."""
    spec = small_clip(data)
    network = spec.build(seed=run.seed)
    home = whole if run.seed == whole.seed else whole.child(f"given-{run.seed}", seed=run.seed, quiet=True)
    train(home, "teacher", network, None, data, cfg, cfg.teacher_epochs, cfg.teacher_lr)
    made = distill(run, data, spec, replace(cfg, teacher_epochs=0.0, **changes), network=network)
    scale, size = logit_scale(network, cfg), made.sizes[-1]
    judge = partial(quality, data=data, teacher=features(network, data.test), scale=scale)
    last = [r for r in made.logs if r["stage"] == size["stage"]]
    early = [r["affinity"] for r in last if 75 <= r["step"] <= 100 and "affinity" in r]
    return {
        **judge(made.members[-1].model), "teacher": judge(network)["accuracy"], "kept": size["kept"],
        "sparsity": size["sparsity"], "early": sum(early) / len(early) if early else None,
    }  # fmt: skip


def logit_scale(teacher: Any, cfg: Config) -> float:
    """g with which students are judged."""
    return cfg.scale or float(teacher.logit_scale.exp())


def claims(arms: Results, keep: float, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not; that about step 100 where the students had so many."""
    own, fresh, gates = (arms[k] for k in ("inherited + affinity", "fresh + affinity", "gates + affinity"))
    short = min(r["sparsity"] - (1 - keep) for r in gates)
    miss = max(abs(r["kept"] / keep - 1) for r in gates)
    reached = all(r["early"] is not None for r in (*own, *fresh))

    def ahead(text: str, a: Any, b: Any, key: str, least: float, scale: float = 1.0) -> Claim:
        return claim(text, difference(a, b, key, scale), least, seeds)

    return [
        ahead("L_affinity on test pairs, fresh − inherited", fresh, own, "affinity_loss", 0.0),
        ahead("zero-shot accuracy, inherited − fresh, in points", own, fresh, "accuracy", -0.5, 100.0),
        *([ahead("L_affinity at step 100, fresh − inherited", fresh, own, "early", 0.1)] if reached else []),
        Claim("gates: expected sparsity − target, smallest of the seeds", short >= -0.02, short, -0.02, list(seeds)),
        Claim("gates: largest miss of the weights' budget after folding", miss <= 0.03, miss, 0.03, list(seeds)),
    ]


def describe(run: Run, made: Stages, data: PairData, cfg: Config, command: str) -> Report:
    made.save(run.folder)
    teacher: Any = made.teacher
    scale, told = logit_scale(teacher, cfg), features(teacher, data.test, run.device)
    judge = partial(quality, data=data, teacher=told, scale=scale)
    found, speed = {m.name: judge(m.model, device=run.device) for m in made}, latency(teacher, made.inputs)
    cost = (count_params(teacher), count_macs(teacher, made.inputs), speed.median_ms)
    own = {**judge(teacher, device=run.device), "weight_bytes": count_bytes(teacher)}
    students = made.rows(run.folder, found)
    for row in students:
        row.metrics.update(compression=cost[0] / row.params, speedup=speed.median_ms / row.latency_ms)  # type: ignore[operator]
    rows = [
        [r["stage"], t, r[t]["blocks"], r[t]["hidden"], *(" ".join(map(str, r[t][k])) for k in ("heads", "neurons")),
         f"{100 * r['kept']:.1f} %"]
        for r in made.sizes for t in ("image", "text")
    ]  # fmt: skip
    columns = ["stage", "tower", "blocks", "stream", "heads", "neurons", "prunable weights kept, both towers"]
    said = found[made.members[-1].name]
    return Report(
        system="tinyclip", title=f"An image-text model at {100 * cfg.keep[-1]:g} % on {data.name}", command=command,
        seed=run.seed, environment=environment(), cost=made.cost, claims=[],
        metrics={k: said[k] for k in said if k != "nll"},
        students=[Student("teacher", None, *cost, own, role="base"), *students],
        curves=[c for c in (curve(made, n) for n in ("affinity", "contrast", "sparsity")) if c.series],
        tables=[Table("Towers", columns, rows)], notes=made.notes,
    )  # fmt: skip


def curve(made: Stages, name: str) -> Curve:
    """One logged number over the steps of each stage that has it."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in made.logs:
        if name in row:
            xs, ys = lines.setdefault(row["stage"], ([], []))
            xs.append(row["step"])
            ys.append(row[name])
    return Curve(f"{name.capitalize()} of the training batches", "step", name, lines)
