"""MASA on a user's network and data, and on the embedded text its arms over seeds.

stillhouse run masa --out runs/masa                          # a small LLaMA: shared from the start, and all arms
stillhouse run masa --model hf:folder --data mine.txt --way fit --variant qkvo --ratio 0.2 --out runs/thinner
stillhouse run masa --model timm:vit_small_patch16_224 --data folder:photos --variant qkvo --out runs/vit
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.data import Data, load
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, count_bytes, count_macs, count_params, environment, latency, predict
from stillhouse.models import ModelSpec
from stillhouse.options import LanguageOptions
from stillhouse.outcomes import continued
from stillhouse.recipes.masa.arms import arms_tables, claims, compare, small
from stillhouse.recipes.masa.config import Config
from stillhouse.recipes.masa.recipe import Shared, distill
from stillhouse.report import Claim, Curve, Report, Student, Table
from stillhouse.students.parametrized import bake
from stillhouse.students.plan import Plan
from stillhouse.text.language import llama_spec, measured
from stillhouse.text.windows import EMBEDDED, NAMED, Corpus, corpus


@dataclass(frozen=True)
class OPTIONS(LanguageOptions):
    """Text or images, and a transformer."""

    pretrained: bool = False  # images: start from the library's published weights
    image_size: int | None = None  # images: side of the squares, for folder: and hf: (default: at most 224)

    @property
    def text(self) -> bool:
        """Whether ``--data`` names text."""
        name = self.data or EMBEDDED
        return name in (EMBEDDED, *NAMED) or name.startswith("hf:") or name.endswith((".txt", ".txt.gz"))

    def load(self) -> Corpus | Data:
        """The text, or the images, named by ``--data``."""
        if self.text:
            return self.corpus()
        return load(str(self.data), image_size=self.image_size, limit=self.limit, seed=self.seed)

    def idle(self, config: Any) -> Mapping[str, str]:
        sizes, words = ("width", "layers", "heads", "kv_heads"), ("tokenizer", "tokens", "length")
        if self.text:
            found = dict.fromkeys(("pretrained", "image_size"), "it is of images, and the data are text")
        else:
            found = dict.fromkeys((*sizes, *words), "it is of text, and --data names images")
        if self.model != "llama":
            found |= {name: found.get(name, "it is of --model llama") for name in sizes}
        return {**found, **super().idle(config)} if self.model or not self.text else found  # else all arms are run


PRESET = Config(steps=130, batch=16, base_steps=130, lr=4e-3)
TINY = replace(PRESET, steps=4, base_steps=3, batch=4, calibration=8, embedding=4, hidden=6)


def tiny(run: Run, cfg: Config = TINY, images: bool = False) -> Shared:
    """One run of about a second on the embedded text, or on digits, for the contract table."""
    if images:
        sizes = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
        vit = ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options=sizes)
        return distill(run, load("digits", limit=64), vit, cfg)
    text = corpus(length=16, limit=4000)
    spec = llama_spec(text.vocabulary, width=16, layers=3, heads=2, kv_heads=1, length=16)
    return distill(run, text, spec, cfg)


def main(run: Run, options: OPTIONS, cfg: Config, command: str) -> Report | None:
    """One network as the command makes it; of text, without --model, also every arm, over seeds."""
    data = options.load()
    spec, network, plan = given(options, data, cfg)
    models = distill(run, data, spec, cfg, network=network, plan=plan)
    report = describe(run, models, data, cfg, command) if run.main else None
    run.barrier()
    if isinstance(data, Corpus) and not options.model:
        seeds = options.children()
        arms = compare(run, data, cfg, seeds)
        if report is not None:
            report.claims += claims(arms, seeds)
            report.tables += arms_tables(arms, data)
    return report


def given(options: OPTIONS, data: Corpus | Data, cfg: Config) -> tuple[ModelSpec, nn.Module | None, Plan | None]:
    """The user's network: of another run, a library's, their own; with weights where it comes with some."""
    if found := continued(options.model or ""):
        return found
    if isinstance(data, Corpus):
        spec, network = options.network(data) if options.model else (small(data), None)
    else:
        spec = ModelSpec(options.model or "timm:vit_tiny_patch16_224", len(data.classes), tuple(data.shape))
        network = spec.build(seed=options.seed, pretrained=True) if options.pretrained else None
    own = spec.name.partition(":")[0] not in ("transformers", "timm", "torchvision", "stillhouse")  # may load weights
    if cfg.way == "fit" and network is None and not own and not cfg.base_steps:
        raise UserError(
            f"--way fit starts from trained weights, and {spec.name} has none; give hf:NAME, a folder "
            "RUN/students/NAME, --pretrained, or --base-steps N to train it first"
        )
    return spec, network, None


def quality(model: nn.Module, data: Corpus | Data, device: Any) -> Mapping[str, Any]:
    """Nats and perplexity of text, accuracy and NLL of images."""
    if isinstance(data, Corpus):
        return measured(model, data, device)
    found = classification(*predict(model, data.test, device=device))
    model.cpu()
    return {k: found[k] for k in ("accuracy", "nll", "ece")}


def describe(run: Run, models: Shared, data: Corpus | Data, cfg: Config, command: str) -> Report:
    models.save(run.folder)
    member, base = models["student"], models.base
    assert base is not None
    rows = models.rows(run.folder, {"student": quality(member.model, data, run.device)})
    baked = copy.deepcopy(member.model)
    bake(baked)
    before, once = latency(base, models.inputs), latency(baked, models.inputs)
    known = quality(base, data, run.device) if cfg.way == "fit" else {}
    params, macs = count_params(base), count_macs(base, models.inputs)
    rows.insert(0, Student("unshared", None, params, macs, before.median_ms,
                           {**known, "weight_bytes": count_bytes(base)}, role="base"))  # fmt: skip
    speeds = [
        ["unshared", count_bytes(base), macs, f"{before.median_ms:.2f}"],
        ["student, mixed in every call", rows[1].metrics["bytes"], rows[1].macs, f"{rows[1].latency_ms:.2f}"],
        ["student, mixed once", count_bytes(baked), count_macs(baked, models.inputs), f"{once.median_ms:.2f}"],
    ]
    tables = [Table("Size and speed", ["network", "bytes", "MACs", "ms for one sample"], speeds)]
    if models.matrices:
        cells = [[m["layer"], m["atoms"], m["rank"], f"{100 * m['error']:.2f} %"] for m in models.matrices]
        tables.append(Table("Matrices", ["layer", "atoms", "rank of the rest", "lost of E‖W x‖²"], cells))
    home = run.folder / "students/student/model.safetensors"
    stored = payload(home) / member.weight_bytes
    made = [Claim("bytes on disk behind the header, over those counted", stored == 1, stored, 1.0, [run.seed])]
    if models.matrices:
        share = models.cost["stored_values"] / models.cost["asked_values"]
        made.append(Claim("values stored, over those asked for", 0.99 <= share <= 1, share, 1.0, [run.seed]))
    steps, losses = [r["step"] for r in models.logs], [r["label"] for r in models.logs]
    name = models.spec.name if models.spec else type(base).__name__
    shown: dict[str, Any] = {k: rows[1].metrics[k] for k in ("nll", "perplexity", "accuracy") if k in rows[1].metrics}
    return Report(
        system="masa", title=f"{name} with shared attention on {data.name}", command=command, seed=run.seed,
        environment=environment(), students=rows, cost=models.cost, claims=made, tables=tables,
        metrics={"compression": params / count_params(member.model), **shown},
        curves=[Curve("Training loss", "step", "nats", {"shared": (steps, losses)})] if steps else [],
        notes=[*data.notes, *models.notes],
    )  # fmt: skip


def payload(path: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
