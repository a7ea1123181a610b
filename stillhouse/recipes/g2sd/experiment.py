"""G2SD on a user's autoencoder and images, and on built-in digits its arms over seeds.

stillhouse run g2sd --out runs/g2sd                          # digits: one student, and all arms over seeds
stillhouse run g2sd --autoencoder hf:facebook/vit-mae-base --model timm:deit_small_distilled_patch16_224 --data folder:photos --out runs/small
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, environment, predict
from stillhouse.family import Family
from stillhouse.models import ModelSpec, import_library
from stillhouse.recipes.g2sd.config import Config
from stillhouse.recipes.g2sd.recipe import distill, fine_tuned, pretrain
from stillhouse.recipes.g2sd.start import few_labels, opened
from stillhouse.report import Claim, Curve, Report
from stillhouse.students.masked import start_positions
from stillhouse.system import fold
from stillhouse.teacher_options import TeacherOptions
from stillhouse.trials import Results, claim, difference, mean, table, trials


@dataclass(frozen=True)
class OPTIONS(TeacherOptions):
    """Images, a small vision transformer, a masked autoencoder; the teacher is its fine-tuned self."""

    BRINGS: ClassVar[tuple[str, ...]] = (*TeacherOptions.BRINGS, "autoencoder")

    autoencoder: str | None = None  # hf:NAME or hf:FOLDER of a ViTMAEForPreTraining, timm:NAME, package.module:function
    arms: bool = False  # with --data alone: also every arm over seeds, on networks of the built-in experiment

    def idle(self, config: Any) -> Mapping[str, str]:
        if not self.own or self.arms:
            return {}
        found = dict(super().idle(config))
        if not config.reads_autoencoder(taught=bool(self.teacher)):
            why = "no stage reads the autoencoder: there is a teacher, or none is asked"
            found |= dict.fromkeys(("autoencoder", "teacher_epochs", "teacher_decoder", "tune_epochs", "tune_lr"), why)
        return found


PRESET = Config(
    layer=1, decoder=(32, 1), teacher_decoder=(32, 2), labelled=0.1, teacher_epochs=25.0, tune_epochs=100.0,
    generic_epochs=15.0, specific_epochs=150.0, batch=32, teacher_lr=1.6e-2, tune_lr=1.6e-2, generic_lr=1.6e-2,
    specific_lr=2.4e-2, mixup=0.8, cutmix=0.0,
)  # fmt: skip
TINY = replace(PRESET, layer=1, decoder=(16, 1), teacher_decoder=(16, 2), labelled=0.5, teacher_epochs=1.0,
               tune_epochs=1.0, generic_epochs=1.0, specific_epochs=1.0, cutmix=1.0)  # fmt: skip
VIT = {"patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 2}
BASE = ModelSpec("timm:deit_tiny_distilled_patch16_224", 10, (1, 8, 8), options=VIT)
TEACHER = {**VIT, "embed_dim": 64, "depth": 4, "num_heads": 4}
ENCODER = ModelSpec("timm:vit_base_patch16_224", 10, (1, 8, 8), options=TEACHER)
SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
# Fresh networks at the best of 3 rates with and without decay by layer, on seed 100.
FRESH = {"generic": "none", "specific_lr": 0.064, "layer_decay": 0.75}
ARMS: dict[str, dict[str, Any]] = {
    "GD + SD": {},
    "pixels + SD": {"generic": "pixels"},
    "scratch + SD": FRESH,
    "scratch + CE": {**FRESH, "specific": "labels"},
}
ZERO = 0.2471  # E SmoothL1_2(0, y) for y ~ N(0, 1): the loss of a predictor that says nothing


def tiny(run: Run, cfg: Config = TINY) -> Family:
    """One run of about a second on 96 digits, for the contract table."""
    spec, encoder = replace(BASE, options=SMALL), replace(ENCODER, options=SMALL)
    return distill(run, load("digits", limit=96), spec, started(encoder, run.seed), cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One student as the command makes it; without flags also every arm on digits, over seeds."""
    data = options.load_data("digits")
    if hasattr(data.train, "tokenizer"):
        raise UserError(f"g2sd is for images, and {data.name} holds sentences")
    if options.arms and (options.model or options.teacher or options.autoencoder):
        raise UserError("--arms compares networks of the built-in experiment; drop --model, --teacher, --autoencoder")
    spec, encoder = sized(BASE, data), sized(ENCODER, data)
    if options.own:
        spec = options.spec(data, spec.name) if options.model else spec
        teachers, look = options.teachers(data)
        network = options.network(spec, run.seed)
        read = cfg.reads_autoencoder(taught=bool(teachers))
        masked = autoencoder(options, encoder, data, cfg) if read else None
        family = distill(run, data, spec, masked, cfg, teacher=teachers, network=network, **look)
    else:
        family = distill(run, data, spec, started(encoder, run.seed), cfg)
    report = describe(run, family, data, cfg, command) if run.main else None
    run.barrier()
    if not options.own or options.arms:
        seeds = options.children()
        arms = trials(run, {arm: partial(once, run, data, changes, cfg) for arm, changes in ARMS.items()}, seeds)
        if report is not None:
            report.claims += claims(arms, list(seeds))
            columns = {
                "accuracy %": ("accuracy", 100.0, 2), "NLL": ("nll", 1.0, 3),
                "as its teacher %": ("agreement", 100.0, 2),
                "held-out loss of stage 1": ("generic", 1.0, 4), "teacher %": ("teacher", 100.0, 2),
            }  # fmt: skip
            labels = len(few_labels(run, data, cfg).train)
            note = f"mean ± standard deviation over seeds; {len(data.train)} images, {labels} labels"
            report.tables.append(table(f"Arms on {data.name}", arms, columns, note))
    return report


def sized(spec: ModelSpec, data: Data) -> ModelSpec:
    """The built-in network for these images: patches of about √side pixels, a power of two that divides it."""
    side = min(data.shape[1:])
    patch = max(p for p in (1, 2, 4, 8, 16) if p * p <= side and not any(s % p for s in data.shape[1:]))
    return replace(
        spec, classes=len(data.classes), shape=tuple(data.shape), options={**spec.options, "patch_size": patch}
    )


def started(spec: ModelSpec, seed: int) -> nn.Module:
    """An encoder that is still to be pre-trained."""
    encoder = spec.build(seed=fold(seed, "autoencoder"))
    start_positions(encoder)
    return encoder


def autoencoder(options: OPTIONS, default: ModelSpec, data: Data, cfg: Config) -> nn.Module:
    """The user's masked autoencoder, or one to be pre-trained.

    Raises:
        UserError: it cannot be had, or has no weights and no ``--teacher-epochs``.
    """
    name = options.autoencoder or ""
    source, _, rest = name.partition(":")
    if source == "hf":
        try:
            kind = import_library("transformers").ViTMAEForPreTraining
            return kind.from_pretrained(rest, use_safetensors=True)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"--autoencoder {name} cannot be had as a ViTMAEForPreTraining: {why}") from None
    if source in ("", "timm"):
        if not cfg.teacher_epochs:
            what = f"--autoencoder {name} has no trained decoder" if name else "--autoencoder is missing"
            raise UserError(f"{what}; give hf:FOLDER of a ViTMAEForPreTraining, or --teacher-epochs N to pre-train it")
        spec = ModelSpec(name, len(data.classes), tuple(data.shape)) if name else default
        return started(spec, options.seed)
    return ModelSpec(name, len(data.classes), tuple(data.shape)).build(seed=fold(options.seed, "autoencoder"))


def once(whole: Run, data: Data, changes: Mapping[str, Any], cfg: Config, run: Run) -> dict[str, Any]:
    """One arm on one seed; autoencoder and teacher are trained once per seed and are the same in every arm."""
    home = whole if run.seed == whole.seed else whole.child(f"given-{run.seed}", seed=run.seed, quiet=True)
    spec, encoder = sized(BASE, data), started(sized(ENCODER, data), run.seed)
    if changes:
        masked = opened(home, data, encoder, cfg)
        pretrain(home, "autoencoder", data, masked, None, cfg.teacher_lr, cfg.teacher_epochs, cfg)
        teacher = fine_tuned(home, few_labels(home, data, cfg), masked, cfg)
        family = distill(run, data, spec, masked, replace(cfg, teacher_epochs=0.0, **changes), teacher=teacher)
    else:  # autoencoder and teacher of this seed are those of its whole run
        family = distill(home, data, spec, encoder, cfg)
    (z, *_), y = family.logits(data.test)
    said = torch.tensor(home.memo("answers", lambda: predict(family.base, data.test)[0].argmax(1).tolist()))
    own, held_out = classification(z, y), [r["held out"] for r in family.logs if "held out" in r]
    return {
        "accuracy": own["accuracy"], "nll": own["nll"], "agreement": float((z.argmax(1) == said).float().mean()),
        "teacher": float((said == y).float().mean()), "generic": held_out[-1] if held_out else None,
    }  # fmt: skip


def claims(arms: Results, seeds: Sequence[int]) -> list[Claim]:
    """The card's claims, as measured, holding or not."""
    both, pixels, scratch, _ = arms.values()
    loss = mean(both, "generic")
    return [
        claim("GD + SD − scratch + SD, accuracy in points", difference(both, scratch, "accuracy", 100.0), 1.0, seeds),
        claim("GD + SD − pixels + SD, accuracy in points", difference(both, pixels, "accuracy", 100.0), -0.5, seeds),
        Claim(f"held-out loss of the generic stage, of {ZERO}", loss <= 0.6 * ZERO, loss, 0.6 * ZERO, list(seeds)),
    ]


@torch.no_grad()
def describe(run: Run, family: Family, data: Data, cfg: Config, command: str) -> Report:
    family.save(run.folder)
    students, metrics, _ = family.measure(data, run.folder, run.device)
    curves = []
    for stage, titles in (("generic", ("features", "pixels", "held out")), ("specific", ("label", "pseudo", "nkd"))):
        rows = [r for r in family.logs if r["stage"] == stage]
        lines: dict[str, Any] = {
            t: ([r["step"] for r in rows if t in r], [r[t] for r in rows if t in r])
            for t in titles
            if any(t in r for r in rows)
        }
        if lines:
            curves.append(Curve(f"Losses of the {stage} stage", "step", "loss", lines))
    name = family.spec.name if family.spec else type(family["student"].model).__name__
    return Report(
        system="g2sd", title=f"{name} from a masked autoencoder on {data.name}", command=command, seed=run.seed,
        environment=environment(), metrics=metrics, students=students, cost=family.cost, curves=curves,
        claims=[], notes=[*data.notes, *family.notes],
    )  # fmt: skip
