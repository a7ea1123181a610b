"""What students of library classes weigh and how long they take, against their teachers: eleven systems and a pipeline.

    .venv/bin/python benchmarks/sizes.py                          # all of them
    .venv/bin/python benchmarks/sizes.py --only pela masa         # some of them
    .venv/bin/python benchmarks/sizes.py --quick                  # small networks, to see that it works

Every system's own `distill` is called on a class of timm, torchvision, transformers or diffusers with the fewest steps
it allows (none, or one of two samples); the outcome is saved, and the student read back from its folder, as it is
shipped. Weights and inputs are random: bytes and times do not depend on training, and nothing here says how good a
student is.

Columns with ÷ are student ÷ teacher. Bytes: all files of the student's folder ÷ the teacher's float32 safetensors.
Latency: teacher and students in turn in one process on one CPU thread, in eval mode without gradients, a block of
passes each; the ratio is the median over the rounds. Parameters and MACs are those of the student as it is loaded:
zeros of N:M patterns count, sparse products are dense ones there. Results are added to OUT/sizes.json.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import read, table, write
from rounds import side_by_side

import torch  # isort: skip
from torch import nn

import stillhouse
from stillhouse.data import from_arrays
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.examples import Examples
from stillhouse.diffusion.sampling import ManySteps
from stillhouse.engine import Run
from stillhouse.evaluate import call, count_macs, count_params, environment, logits_of
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Members, Models
from stillhouse.recipes import capacity_gap_law as gap
from stillhouse.recipes import cast, dsformer, find, g2sd, gpusq_vit, masa, pela, pipeline, tinyclip
from stillhouse.recipes import hierarchical_prune as hierarchical
from stillhouse.recipes import quantized_distillation as quantized
from stillhouse.recipes import sws_learngene as sws
from stillhouse.system import map_tensors
from stillhouse.text import corpus, llama_spec
from stillhouse.text.pairs import caption_data


class Base(NamedTuple):
    """A teacher with fresh weights: two samples to call `distill` with, how it is built, an input of one sample."""

    data: Any
    spec: ModelSpec
    model: nn.Module
    inputs: Any


class Student(NamedTuple):
    """A member of what a system makes; `why` it is slower than its teacher, where the system's page explains it."""

    cfg: Any
    member: str
    why: str = ""


@dataclass(frozen=True)
class Case:
    """A system on a teacher; `distill` where it is called with more than the teacher's network and data."""

    system: str
    base: Callable[[bool], Base]
    students: dict[str, Student]  # by their settings
    distill: Callable[[Run, Base, Any], Members] | None = None


# -- teachers; small ones with --quick ---------------------------------------------------------------------------------


def vision(name: str, quick: bool) -> Base:
    """A classifier of images at the size of ImageNet's."""
    side, classes = (32, 10) if quick else (224, 1000)
    small = {"patch_size": 8, "embed_dim": 64, "num_heads": 2} if quick and name.startswith("timm:") else {}
    spec = ModelSpec(name, classes, (3, side, side), options=small)
    x, known = torch.randn(2, 3, side, side), [str(k) for k in range(classes)]
    data = from_arrays(x, [0, 1], test=(x, [0, 1]), classes=known, normalize=False)
    return Base(data, spec, spec.build(), x[:1])


def llama(quick: bool) -> Base:
    """20 M weights, 6 M of them in the embeddings; windows of 128."""
    sizes = {"width": 64, "layers": 4, "heads": 2} if quick else {"width": 384, "layers": 8, "heads": 6}
    text, spec = corpus(limit=10000, length=128), llama_spec(8000, **sizes, length=128)
    return Base(text, spec, spec.build(), text.example())


def clip(quick: bool) -> Base:
    """An image tower like DeiT-small's in 7 × 7 patches, a text tower of 8 blocks for CLIP's vocabulary."""
    side, words, parts = (28, 100, 32) if quick else (224, 49408, 256)
    x = torch.randn(4, 3, side, side)
    data = caption_data(from_arrays(x, [0, 1, 0, 1], test_fraction=0.5, normalize=False), length=77)

    def tower(width: int, depth: int, **more: Any) -> dict[str, Any]:
        width, depth = (64, 4) if quick else (width, depth)
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
        return {**sizes, "num_hidden_layers": depth, "projection_dim": parts, **more}

    ids = {"pad_token_id": data.tokenizer.pad_token_id, "eos_token_id": data.tokenizer.eos_token_id}
    text = tower(256, 8, vocab_size=words, max_position_embeddings=77, bos_token_id=ids["eos_token_id"], **ids)
    image = tower(384, 12, image_size=side, patch_size=side // 7)
    options = {"text_config": text, "vision_config": image, "projection_dim": parts}
    spec = ModelSpec("transformers:CLIPModel", 0, (3, side, side), options=options)
    tokens = torch.cat([torch.randint(5, words, (1, 76)), torch.tensor([[ids["eos_token_id"]]])], 1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": x[:1]}
    return Base(data, spec, spec.build(), inputs)


def sd3(quick: bool) -> Base:
    """One evaluation of a denoiser of 32 × 32 latents (images of 256), 77 embeddings of text beside them."""
    heads, side = (2, 8) if quick else (6, 32)
    sizes = {"sample_size": side, "pos_embed_max_size": side, "in_channels": 16, "out_channels": 16, "num_layers": 8}
    widths = {"num_attention_heads": heads, "attention_head_dim": 64, "caption_projection_dim": 64 * heads}
    texts = {"joint_attention_dim": 256, "pooled_projection_dim": 256}
    spec = ModelSpec("diffusers:SD3Transformer2DModel", 0, (16, side, side), options={**sizes, **widths, **texts})
    heard = {"encoder_hidden_states": torch.randn(2, 77, 256), "pooled_projections": torch.randn(2, 256)}
    data = Examples(torch.randn(2, *spec.shape), heard)
    made = denoiser(spec.build())
    model = ManySteps(made.network, made.process, made.prediction, spec.shape)
    one = data.rows([0])
    return Base(data, spec, model, {"x_t": one.x0, "t": torch.tensor([0.5]), "condition": one.conditions})


def denoiser(network: nn.Module) -> Denoiser:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return Denoiser.of(network, FlowMatchEulerDiscreteScheduler(shift=3.0))


# -- systems -----------------------------------------------------------------------------------------------------------


def of_resnet18(run: Run, base: Base, cfg: Any) -> Members:
    student = ModelSpec("torchvision:resnet18", base.spec.classes, base.spec.shape)
    return quantized.distill(run, base.data, student, base.model, cfg)


def of_deit_tiny(run: Run, base: Base, cfg: Any) -> Members:
    name, small = "timm:deit_tiny_distilled_patch16_224", {**base.spec.options}
    student = ModelSpec(name, base.spec.classes, base.spec.shape, options={**small, "embed_dim": 32} if small else {})
    return g2sd.distill(run, base.data, student, base.spec.build(), cfg, teacher=base.model)


def cases(quick: bool) -> list[Case]:
    deit = partial(vision, "timm:deit_small_patch16_224")
    resnet18, resnet34 = (partial(vision, f"torchvision:{name}") for name in ("resnet18", "resnet34"))
    none, one = {"epochs": 0, "batch": 2}, {"epochs": 1, "batch": 2}
    towers = tinyclip.Config(keep=(0.75, 0.5), **none)
    dictionary = {"variant": "qkvo", "calibration": 2, "batch": 2}
    bits8, bits4 = (gpusq_vit.Config(k, quantized_epochs=0, calibrate=2, **none) for k in (8, 4))
    depths = sws.Config((6, 9), tune_epochs=0, **one)
    decoders = {"decoder": (32, 1), "teacher_decoder": (64, 1), "layer": 1}  # dropped afterwards
    specific = g2sd.Config(**decoders, generic_epochs=1, specific_epochs=1, batch=2)
    removed = hierarchical.Config(budget=0.75, steps=0, batch=2)
    sizes = ("700k", "400k") if quick else ("10M", "5M")
    cut = gap.Config(sizes, calibration=1, calibration_batch=2, steps=1, batch=2, judged=2)
    steps = pipeline.Config(("prune:0.5", "distill:1", "quantize:int8?train=0"), batch=2)
    pairs, filled = "two products in place of one", "S is filled with zeros"
    mixes, inputs = "mixes in every call; bake() does so once", "its inputs are quantised in float32"
    return [
        Case("quantized_distillation", resnet34, {
            f"resnet18, {k} bits": Student(quantized.Config(bits=k, student_epochs=0, **one), f"q{k}")
            for k in (4, 2)}, of_resnet18),
        Case("tinyclip", clip, {"keep 0.75": Student(towers, "keep75"), "keep 0.5": Student(towers, "keep50")}),
        Case("pela", deit, {
            f"ratio {c}": Student(pela.Config(c, **none), "student", pairs) for c in (2, 4)}),
        Case("dsformer", deit, {
            "ratio 0.3, t = 4": Student(dsformer.Config(nonzeros=(4,), sweeps=2, **none), "student", filled)}),
        Case("masa", deit, {
            "qkvo, 4 for 12 blocks": Student(masa.Config(steps=1, **dictionary), "student", mixes),
            "qkvo, fitted, ratio 0.3": Student(masa.Config("fit", ratio=0.3, **dictionary), "student", mixes)}),
        Case("gpusq_vit", deit, {
            "2:4, float16": Student(bits8, "sparse"), "2:4, 8 bits": Student(bits8, "int8", inputs),
            "4:8 in pairs, 4 bits": Student(bits4, "int4", inputs)}),
        Case("cast", llama, {
            p: Student(cast.Config(pattern=p, steps=0, batch=2), "sparse") for p in ("2:4", "1:4")}),
        Case("sws_learngene", deit, {f"{d} of 12 blocks": Student(depths, f"d{d:02d}") for d in (6, 9)},
             lambda run, base, cfg: sws.distill(run, base.data, base.spec, base.model, cfg)),
        Case("g2sd", deit, {"deit_tiny_distilled": Student(specific, "student")}, of_deit_tiny),
        Case("hierarchical_prune", sd3, {
            "budget 0.75": Student(removed, "student"), "budget 0.75, nf4": Student(removed, "student-nf4")},
             lambda run, base, cfg: hierarchical.distill(run, denoiser(base.model.network), base.data, cfg)),
        Case("capacity_gap_law", llama, {f"{s} weights": Student(cut, f"{s.lower()}-of-t0") for s in sizes},
             lambda run, base, cfg: gap.distill(run, base.data, base.model, cfg)),
        Case("pipeline", resnet18, {
            "prune:0.5, distill": Student(steps, "2-distill"), "… quantize:int8": Student(steps, "3-quantize")}),
    ]  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------------------------------


def outcome_of(case: Case, base: Base, cfg: Any, home: Path) -> tuple[Members, dict[str, Path]]:
    """What the system made, and the folders of its members."""
    run = Run(home, quiet=True, device="cpu")
    if case.distill:
        made = case.distill(run, base, cfg)
    else:
        made = find(case.system).distill(run, base.data, base.spec, cfg, network=base.model)
    return made, {path.name: path for path in made.save(home)}


@torch.no_grad()
def loaded(kept: Path, trained: nn.Module, inputs: Any) -> tuple[nn.Module, int]:
    """The student from its folder alone, and the bytes of all files there; it must say what it said before."""
    student = stillhouse.load(kept)
    said, meant = (logits_of(call(m, inputs)) for m in (student, trained))
    torch.testing.assert_close(said, meant, rtol=1e-4, atol=1e-4)
    return student, sum(p.stat().st_size for p in kept.rglob("*") if p.is_file())


@torch.no_grad()
def latencies(sides: dict[str, nn.Module], inputs: Any, batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Of every network the milliseconds of a pass, and these ÷ the teacher's."""
    x = map_tensors(inputs, lambda t: t.repeat(batch, *[1] * (t.dim() - 1)))
    began = time.perf_counter()
    call(sides["teacher"], x)
    passes = max(1, int(0.05 / (time.perf_counter() - began)))

    def block(model: nn.Module) -> None:
        for _ in range(passes):
            call(model, x)

    found = side_by_side({k: partial(block, m) for k, m in sides.items()}, rounds)
    return {k: (1e3 * t.median / passes, 1 / t.times_faster_than(found["teacher"])) for k, t in found.items()}


def measured(case: Case, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per student."""
    base = case.base(args.quick)
    cfgs = {s.cfg: f"run{k}" for k, s in enumerate(case.students.values())}
    made = {cfg: outcome_of(case, base, cfg, folder / home) for cfg, home in cfgs.items()}
    whole = Models([Member("teacher", base.model.eval())], base.inputs).save(folder)[0] / "model.safetensors"
    every = {"teacher": (base.model, whole.stat().st_size)}
    for k, s in case.students.items():
        every[k] = loaded(made[s.cfg][1][s.member], made[s.cfg][0][s.member].model, base.inputs)
    sides = {k: model for k, (model, _) in every.items()}
    one = latencies(sides, base.inputs, 1, args.rounds)
    many = latencies(sides, base.inputs, args.batch, -(-args.rounds // 3))
    counts = {k: (count_params(m), count_macs(m, base.inputs), size) for k, (m, size) in every.items()}
    rows = []
    for k, s in case.students.items():
        ratios = [*(a / b for a, b in zip(counts[k], counts["teacher"], strict=True)), one[k][1], many[k][1]]
        about = {"system": case.system, "teacher": base.spec.name, "student": k, "ratios": ratios}
        facts = {name: (*counts[name], one[name][0], many[name][0]) for name in ("teacher", k)}
        rows.append({**about, "values": facts, "why": s.why if max(ratios[3:]) > 1.05 else ""})
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    params, _, _, ms, _ = row["values"]["teacher"]
    numbers = [f"{r:.3f}" for r in row["ratios"]]
    return [row["system"], f"{row['teacher']}, {params / 1e6:.1f} M", row["student"], *numbers, f"{ms:.1f}", row["why"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[c.system for c in cases(False)], help="systems")
    parser.add_argument("--batch", type=int, default=8, help="the larger batch")
    parser.add_argument("--rounds", type=int, help="timed at batch 1; a third of it at the larger one (default: 15)")
    parser.add_argument("--out", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--quick", action="store_true", help="small networks, 3 rounds")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 15)
    torch.set_num_threads(1)
    path, lines = args.out / "sizes.json", []
    for case in cases(args.quick):
        if args.only and case.system not in args.only:
            continue
        torch.manual_seed(0)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = measured(case, Path(folder), args)
        gc.collect()
        lines += [cells(row) for row in rows]
        print("\n".join(" | ".join(line) for line in lines[-len(rows) :]), flush=True)
        facts = {"quick": args.quick, "rounds": args.rounds, "batch": args.batch, "seconds": time.monotonic() - began}
        write(path, {**(read(path) or {}), case.system: {**facts, "environment": environment(), "rows": rows}})
    columns = ["system", "teacher", "student", "parameters ÷", "MACs ÷", "bytes ÷", "latency ÷, batch 1",
               f"latency ÷, batch {args.batch}", "teacher, ms", "why slower"]  # fmt: skip
    print("\n" + table(columns, lines))


if __name__ == "__main__":
    main()
