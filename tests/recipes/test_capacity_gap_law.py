"""Law of capacity gap: the card's exact checks, decoders of several families, the law, the adviser, the user's way."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stillhouse
from stillhouse import objectives as O
from stillhouse.cli import invoke
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.export import export
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.capacity_gap_law.experiment import TINY
from stillhouse.recipes.capacity_gap_law.pilots import Pilot, law_of
from stillhouse.recipes.capacity_gap_law.recipe import Config, distill, prune
from stillhouse.recipes.capacity_gap_law.system import ChunkedDistill
from stillhouse.recommend import PUBLISHED, Law, best_teacher, fit_law, size_of
from stillhouse.recommend.sizes import parse_size
from stillhouse.run import Run
from stillhouse.students.attention import heads_of
from stillhouse.students.decoders import (
    Widths,
    counted,
    kept_units,
    mask_gradients,
    per_dimension,
    plan_of_size,
    plan_of_widths,
    reordered,
    units_of,
    widths_at,
)
from stillhouse.students.edits import Depth
from stillhouse.students.plan import Keep, Plan, signature
from stillhouse.system import Clock
from stillhouse.teachers import state_fingerprint
from stillhouse.text.windows import corpus

SHAPED = {"sizes": (), "shape": (12, 1, 16), "drop": (1, 0), "units": "random"}
ROWS = [
    Row("capacity_gap_law", "shape, ends dropped, random, fresh", {**SHAPED, "start": "fresh"}),
    Row("capacity_gap_law", "blocks counted", {"counts": "blocks", "sizes": ("2k",)}, {"layers": 3}),
]
ZERO = [  # with alpha 0 nothing is left of the teacher: its temperature is not read
    (
        Row("capacity_gap_law", "alpha 0", {"alpha": 0.0}),
        Row("capacity_gap_law", "alpha 0, T 9", {"alpha": 0.0, "temperature": 9.0}),
    ),
]
JOINT = [Row("capacity_gap_law", "sgd", {"optimizer": "sgd", "lr": 0.01, "teacher_steps": 0, "sizes": ("4k",)})]

V, T = 19, 10
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
LONG = {**SIZES, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
GPT2 = {
    "vocab_size": V,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OPTIONS = {
    "llama": ("LlamaForCausalLM", {**LONG, "num_key_value_heads": 2}),
    "tied": ("LlamaForCausalLM", {**LONG, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", {**LONG, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", {**LONG, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**LONG, "num_key_value_heads": 2, "head_dim": 4}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", LONG),
    "gpt_neox sequential": ("GPTNeoXForCausalLM", {**LONG, "use_parallel_residual": False}),
}
families = pytest.mark.parametrize("kind", OPTIONS)


def spec_of(kind, **more):
    name, options = OPTIONS[kind]
    return ModelSpec(f"transformers:{name}", V, (T,), options={**options, "use_cache": False, **more})


def near(kind):
    """In float64; RMS norms of transformers compute in float32 whatever they are given."""
    return {"rtol": 0, "atol": 1e-12 if kind.startswith("gpt") else 2e-6}


def decoder(kind="llama", double=True, seed=0, **more):
    model = spec_of(kind, **more).build(seed=seed).eval()
    with torch.no_grad():  # so that no two norms or biases are alike
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model.double() if double else model


def tokens(n=3, seed=0):
    ids = torch.randint(0, V, (n, T + 1), generator=torch.Generator().manual_seed(seed))
    return {"input": {"input_ids": ids[:, :-1]}, "label": ids[:, 1:]}


def loss(model, batch):
    return F.cross_entropy(model(**batch["input"]).logits.flatten(0, 1), batch["label"].flatten())


def logits(model, seed=0):
    with torch.no_grad():
        return model(**tokens(seed=seed)["input"]).logits


def drawn(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(u.size, generator=g, dtype=torch.float64) for u in units_of(model).groups]


# -- the card's exact checks --------------------------------------------------------------------------------------


@families
def test_reordering_without_slicing_changes_nothing(kind):
    """(1)"""
    model = decoder(kind)
    other = reordered(model, drawn(model))
    torch.testing.assert_close(logits(other), logits(model), **near(kind))
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 6  # norms of queries and keys stay, as do the inside of heads
    small = decoder(kind, double=False)
    torch.testing.assert_close(logits(reordered(small, drawn(small))), logits(small), rtol=0, atol=1e-5)


@families
def test_a_student_is_the_leading_slice_of_the_reordered_teacher(kind):
    model = decoder(kind)
    importance = drawn(model)
    widths = Widths(10, 3 if kind in ("llama", "mistral", "qwen2", "qwen3") else 7, 40)
    student = plan_of_widths(model, importance, widths).build(model)
    first = reordered(model, importance)
    falling = [v.sort(descending=True).values for v in importance]
    plan = plan_of_widths(first, falling, widths)
    assert all(e.index == tuple(range(len(e.index))) for e in plan.edits)
    torch.testing.assert_close(logits(plan.build(first)), logits(student), **near(kind))
    assert (logits(student) - logits(model)).abs().max() > 1e-3


def test_sparsity_of_a_dimension():
    """(2) and block weights left are (1 − p) of the whole, in the limit of wide models."""
    assert per_dimension(0.0) == 0.0 and per_dimension(0.6) == pytest.approx(0.3675, abs=5e-5)
    wide = {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 20, "num_key_value_heads": 20}
    model = ModelSpec("transformers:LlamaForCausalLM", V, (T,), options={**LONG, **wide}).build()
    units, importance = units_of(model), drawn(model)
    assert plan_of_widths(model, importance, widths_at(units, 0.0, 16)).edits == ()
    for p in (0.3, 0.6, 0.8):
        w = widths_at(units, p, 16)
        assert w.hidden % 8 == 0 and w.neurons % 8 == 0
        left = counted(plan_of_widths(model, importance, w).build(model), "blocks") / counted(model, "blocks")
        assert left == pytest.approx(1 - p, rel=0.06), p
    gone = per_dimension(0.995)  # beyond 90 % heads stay at a tenth and neurons go instead
    w = widths_at(units, 0.995, 16, multiple=1)
    assert w.heads == 6 and w.neurons == round(1920 * (1 - gone) - (6 - 60 * (1 - gone)) * 16 * 4 / 3)


def test_the_law_is_recovered_from_noisy_pilots():
    """(3) within 2 %."""
    draw = np.random.default_rng(0)
    points = [(s, 2.5 * s - 1e6 + draw.normal(0, 0.02) * s) for s in np.linspace(1e7, 1e8, 12)]
    law = fit_law(points)
    assert law.a == pytest.approx(2.5, rel=0.02) and law.r2 > 0.99
    assert law.interval[0] <= 2.5 <= law.interval[1] and law.interval[1] - law.interval[0] < 0.2
    assert law.teachers == (min(t for _, t in points), max(t for _, t in points))
    again = fit_law(points)
    assert again == law and Law.from_json(json.loads(json.dumps(law.to_json()))) == law


def test_soft_cross_entropy_of_a_student_like_its_teacher():
    """(4) the teacher's entropy, and no gradient; elsewhere the gradient of the KL divergence."""
    model, batch = decoder(), tokens()
    teacher = copy.deepcopy(model)
    system = token_distill(model, teacher, alpha=1.0)
    terms = system.learn(batch, Clock())
    p = logits(teacher).flatten(0, 1).softmax(1)
    assert float(terms.total.detach()) == pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=1e-12)
    terms.total.backward()
    assert max(float(q.grad.abs().max()) for q in model.parameters()) < 1e-12
    other = decoder(seed=1)
    grads = []
    for fn in (O.soft_cross_entropy, O.kl):
        z = other(**batch["input"]).logits
        grads.append(torch.autograd.grad(fn(logits(teacher), z).mean(), other.lm_head.weight)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_mask_gradients_of_heads_and_neurons_are_finite_differences(kind):
    """(5)"""
    step = 1e-4 if kind != "llama" else 1e-2  # see `near`
    model, batch = decoder(kind), tokens()
    units, found = units_of(model), mask_gradients(model, loss, [batch])
    for k, group in enumerate((*units.heads, *units.neurons)):
        if k % 3 != 1:  # one block of both
            continue
        reads = next(m.module for m in group.members if m.axis in ("heads", "in"))
        if reads == group.members[0].module:
            reads = f"{reads}.{next(s.layer for s in heads_of(model.get_submodule(reads))[1] if s.axis == 'in')}"
        block = units_of(model).groups[0].size // group.size if group in units.heads else 1
        differences = []
        for u in range(min(group.size, 6)):
            ends = []
            for eps in (step, -step):

                def scale(m, args, at=slice(u * block, (u + 1) * block), eps=eps):
                    x = args[0].clone()
                    x[..., at] *= 1 + eps
                    return (x, *args[1:])

                handle = model.get_submodule(reads).register_forward_pre_hook(scale)
                with torch.no_grad():
                    ends.append(float(loss(model, batch)))
                handle.remove()
            differences.append(abs(ends[0] - ends[1]) / (2 * step))
        values = found[1 + k][: len(differences)]
        ratio = torch.tensor(differences, dtype=torch.float64) / values
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-5 if kind != "llama" else 1e-2, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt_neox sequential"])
def test_mask_gradients_of_the_stream_sum_over_depth(kind):
    """(5) one vector at the embedding and after every residual addition, by autograd through a forward of our own."""
    model, batch = decoder(kind), tokens()
    mask = torch.ones(16, dtype=torch.float64, requires_grad=True)
    body = model.base_model
    embed = body.embed_tokens if kind == "llama" else body.embed_in
    h = embed(batch["input"]["input_ids"]) * mask
    place = {"position_embeddings": body.rotary_emb(h, torch.arange(T)[None]), "attention_mask": None}
    for block in body.layers:
        attention = block.self_attn if kind == "llama" else block.attention
        a = attention(block.input_layernorm(h), **place)[0]
        if kind == "gpt_neox":
            h = (h + a + block.mlp(block.post_attention_layernorm(h))) * mask
        else:
            h = (h + a) * mask
            h = (h + block.mlp(block.post_attention_layernorm(h))) * mask
    z = model.get_output_embeddings()((body.norm if kind == "llama" else body.final_layer_norm)(h))
    torch.testing.assert_close(z, logits(model))
    value = F.cross_entropy(z.flatten(0, 1), batch["label"].flatten())
    (wanted,) = torch.autograd.grad(value, mask)
    torch.testing.assert_close(mask_gradients(model, loss, [batch])[0], wanted.abs() / wanted.norm())


def test_importance_is_a_mean_of_absolute_values_and_leaves_the_model_alone():
    model, batches = decoder("gpt2"), [tokens(seed=s) for s in range(2)]
    model.train()
    model.transformer.wte.weight.requires_grad_(False)
    before, asked = state_fingerprint(model), [p.requires_grad for p in model.parameters()]
    both = mask_gradients(model, loss, batches)
    assert state_fingerprint(model) == before and model.training
    assert [p.requires_grad for p in model.parameters()] == asked and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    joint = {"input": {"input_ids": torch.cat([b["input"]["input_ids"] for b in batches])}}
    joint["label"] = torch.cat([b["label"] for b in batches])
    assert all(float(a.norm()) == pytest.approx(1.0) and (a >= 0).all() for a in both)
    apart = [(a - b).abs().max() for a, b in zip(both, mask_gradients(model, loss, [joint]), strict=True)]
    assert min(apart[0], *apart[4:]) > 1e-3  # the absolute value is taken of every batch
    with pytest.raises(UserError, match="at least one batch"):
        mask_gradients(model, loss, [])
    with pytest.raises(UserError, match="calibration text is nan"):
        mask_gradients(model, lambda m, b: loss(m, b) * math.nan, batches)


# -- cutting ------------------------------------------------------------------------------------------------------


@families
def test_cut_heads_and_neurons_answer_as_masked_ones(kind):
    """Nothing but the removed units changes: with groups of queries, packed and transposed projections alike."""
    model = decoder(kind)
    units = units_of(model)
    edits = [Keep(units.heads[1].name, "heads", (1,))]
    edits += [Keep(m.module, m.axis, tuple(range(3, 15))) for m in units.neurons[0].members]
    plan = Plan(tuple(edits), signature(model))
    student = plan.build(model)
    torch.testing.assert_close(logits(student), logits(plan.masked(model)), **near(kind))
    assert (logits(student) - logits(model)).abs().max() > 1e-3 and count_params(student) < count_params(model)
    ids = student.generate(tokens()["input"]["input_ids"][:, :4], max_new_tokens=3, do_sample=False, use_cache=True)
    again = student.generate(tokens()["input"]["input_ids"][:, :4], max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(ids, again)


@families
def test_sizes_are_met_and_plans_survive_json(kind):
    model = decoder(kind, double=False, **({"n_inner": 200} if kind == "gpt2" else {"intermediate_size": 200}))
    importance = mask_gradients(model, loss, [tokens()])
    for counts, part in (("all", 0.3), ("all", 0.9), ("blocks", 0.5)):
        size = part * counted(model, counts)
        plan, w = plan_of_size(model, importance, size, counts=counts, multiple=1)
        student = Plan.from_json(plan.to_json()).build(model)
        assert counted(student, counts) == pytest.approx(size, rel=0.01)
        kept = kept_units(units_of(model), importance, w)
        assert [int(k.sum()) for k in kept] == [g.size for g in units_of(student).groups]
        assert all(k.any() for k in kept)
    assert counted(model) - counted(model, "blocks") == sum(
        p.numel() for n, p in model.named_parameters() if "embed" in n or "wte" in n or "wpe" in n or "lm_head" in n
    )


def test_the_most_important_stay_over_all_blocks_and_neurons_go_in_multiples():
    model = decoder(double=False, intermediate_size=32)
    units = units_of(model)
    values = [torch.rand(g.size, dtype=torch.float64) for g in units.groups]
    values[1] *= 0.001  # heads of the first block
    kept = kept_units(units, values, Widths(8, 4, 56), multiple=8)
    assert [int(k.sum()) for k in kept[1:4]] in ([1, 2, 1], [1, 1, 2]) and kept[1][values[1].argmax()]
    assert set(values[0][kept[0]].tolist()) == set(values[0].sort(descending=True).values[:8].tolist())
    assert all(int(k.sum()) % 8 == 0 and k.sum() >= 8 for k in kept[4:]) and sum(int(k.sum()) for k in kept[4:]) == 56
    for k, v in zip(kept[4:], values[4:], strict=True):
        assert v[k].min() >= v[~k].max() if (~k).any() else True
    with pytest.raises(UserError, match="cannot keep 2 heads of 6; give 3 to 6"):
        kept_units(units, values, Widths(8, 2, 56))


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen3", "gpt2", "gpt_neox"])
def test_even_students_are_read_by_transformers_too(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    teacher, spec = decoder(kind, double=False), spec_of(kind)
    heads = 1 if kind in ("llama", "qwen3") else 3
    plan = plan_of_widths(teacher, drawn(teacher), Widths(12, heads, 8, even=True))
    text = corpus_of(tmp_path)
    outcome = stillhouse.text.language.language_models([Member("even", plan.build(teacher), plan, spec=spec)], text)
    outcome.save(tmp_path)
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "students/even", dtype=torch.float32)
    assert type(hub) is type(teacher) and hub.config.hidden_size == 12
    torch.testing.assert_close(logits(hub.eval()), logits(outcome["even"].model))
    torch.testing.assert_close(logits(stillhouse.load(tmp_path / "students/even")), logits(hub))
    assert teacher.config.hidden_size == 16  # the teacher's own is left alone


def corpus_of(tmp_path, length=T):
    (tmp_path / "mine.txt").write_text("the cat sat on the mat; the dog sat on the log.\n" * 20)
    return corpus(str(tmp_path / "mine.txt"), length=length)


# -- distillation -------------------------------------------------------------------------------------------------


def token_distill(student, teacher, **how):
    how = {"alpha": 0.5, "T": 1.0, "chunk": 0, "optimizer": torch.optim.SGD, **how}
    return ChunkedDistill(student, teacher, **how)


@pytest.mark.parametrize(("alpha", "T"), [(0.5, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_chunks_give_the_loss_and_gradients_of_all_tokens_at_once(kind, alpha, T):
    teacher, batch = decoder(kind, seed=1), tokens()
    plain = decoder(kind)
    z, t = plain(**batch["input"]).logits.flatten(0, 1), logits(teacher).flatten(0, 1)
    soft = -(T**2) * ((t / T).softmax(1) * (z / T).log_softmax(1)).sum(1).mean()
    wanted = (1 - alpha) * F.cross_entropy(z, batch["label"].flatten()) + alpha * soft
    wanted.backward()
    for chunk in (0, 1, 7, 30, 1000):
        student = decoder(kind).train()
        for m in student.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        total = token_distill(student, teacher, alpha=alpha, T=T, chunk=chunk).learn(batch, Clock()).total
        total.backward()
        assert total.item() == pytest.approx(wanted.item(), rel=1e-12)
        for p, q in zip(student.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())


class Largest(TorchDispatchMode):
    """The largest number of rows of V numbers that any operation gives."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[-1] == V:
                self.rows = max(self.rows, t.numel() // V)
        return out


def test_logits_are_never_held_at_once():
    student, teacher, seen = decoder(), decoder(seed=1), {}
    for chunk in (0, 7):
        with Largest() as largest:
            token_distill(student, teacher, chunk=chunk).learn(tokens(), Clock()).total.backward()
        seen[chunk] = largest.rows
    assert seen[0] == 3 * T and seen[7] < 3 * T and seen[7] <= max(7, student.config.hidden_size)


def test_the_teacher_is_not_trained_and_with_alpha_zero_not_asked(tmp_path):
    text, teacher = corpus_of(tmp_path), decoder(double=False)
    before = state_fingerprint(teacher)
    cfg = replace(TINY, teacher_steps=0, sizes=("3k",), chunk=0)
    made = distill(Run(tmp_path / "a", device="cpu", quiet=True), text, teacher, cfg)
    assert state_fingerprint(teacher) == before and len(made) == 1
    assert made.pilots[0].student_size == pytest.approx(3000, rel=0.05)
    system = token_distill(decoder(), decoder(seed=1), alpha=0.0)
    system._teacher[0].forward = system._teacher[0].base_model.forward = lambda *a, **k: 1 / 0
    assert set(system.learn(tokens(), Clock()).terms) == {"label"}


def test_starts(tmp_path):
    """Pruned weights are the teacher's, fresh ones are not, of the same shape; ends go, the middle stays."""
    text, run = corpus_of(tmp_path), Run(tmp_path / "r", device="cpu", quiet=True)
    spec = spec_of("llama", num_hidden_layers=5, vocab_size=text.vocabulary)
    teacher = Member("t", spec.build(seed=3), spec=spec)
    cfg = replace(TINY, sizes=(), shape=(16, 4, 24), drop=(2, 1))
    student = prune(run, text, teacher, cfg)
    assert student.plan.edits == (Depth("model.layers", (2, 3)),) and student.model.config.num_hidden_layers == 2
    for k in range(2):
        for name, p in student.model.model.layers[k].named_parameters():
            assert torch.equal(p, teacher.model.model.layers[k + 2].get_parameter(name))
    narrow = prune(run, text, teacher, replace(cfg, shape=(8, 2, 12)))
    fresh = prune(run, text, teacher, replace(cfg, shape=(8, 2, 12), start="fresh"))
    shapes = [[tuple(p.shape) for p in m.model.parameters()] for m in (narrow, fresh)]
    assert shapes[0] == shapes[1] and narrow.model.config.num_key_value_heads == 1
    assert not torch.equal(narrow.model.lm_head.weight, fresh.model.lm_head.weight)
    kept = narrow.plan.edits[1].index
    assert torch.equal(narrow.model.lm_head.weight, teacher.model.lm_head.weight[:, list(kept)])
    again = Member("t", narrow.model, narrow.plan, spec=spec)  # a student of a student
    twice = prune(run, text, again, replace(cfg, shape=(8, 2, 8), drop=(0, 1)))
    torch.testing.assert_close(twice.plan.build(spec.build(seed=3)).lm_head.weight, twice.model.lm_head.weight)
    assert [tuple(p.shape) for p in twice.plan.build(spec.build()).parameters()] == [
        tuple(p.shape) for p in twice.model.parameters()
    ]


def test_the_importance_of_a_teacher_is_found_once_for_all_sizes(tmp_path, monkeypatch):
    from stillhouse.recipes.capacity_gap_law import recipe

    asked, plain, text = [], recipe.importance_of, corpus_of(tmp_path)
    monkeypatch.setattr(
        recipe, "importance_of", lambda run, t, model, cfg: asked.append(model) or plain(run, t, model, cfg)
    )
    teachers, cfg = [decoder(double=False), decoder("gpt2", double=False)], replace(TINY, teacher_steps=0, steps=1)
    made = distill(Run(tmp_path / "r", device="cpu", quiet=True), text, teachers, replace(cfg, sizes=("3k", "2500")))
    assert asked == teachers and len(made) == 4
    alone = prune(
        Run(tmp_path / "r", device="cpu", quiet=True),
        text,
        Member("t0", teachers[0], spec=made["3k-of-t0"].spec),
        cfg,
        2500,
    )
    assert alone.plan == made["2.5k-of-t0"].plan


def test_students_export(tmp_path):
    teacher = decoder(double=False, num_hidden_layers=1)
    plan, _ = plan_of_size(teacher, drawn(teacher), 0.6 * count_params(teacher), multiple=2)
    student = plan.build(teacher).eval()
    for to, suffix in (("onnx", ".onnx"), ("torch-export", ".pt2")):
        parity = export(student, tokens(2)["input"], to, tmp_path / f"s{suffix}")
        assert parity.max_rel_diff <= 1e-4


# -- the law ------------------------------------------------------------------------------------------------------


def test_the_best_teacher_is_the_bottom_of_a_parabola_in_the_logarithm():
    grid = [50.0, 90.0, 200.0, 420.0, 900.0]
    for at in (100.0, 150.0, 333.3):
        found = best_teacher({t: 1.7 + 0.3 * (math.log(t) - math.log(at)) ** 2 for t in grid})
        assert found.bracketed and found.teacher == pytest.approx(at, rel=1e-9) and found.loss == pytest.approx(1.7)
    assert best_teacher({50.0: 1.0, 90.0: 2.0, 200.0: 3.0}) == stillhouse.recommend.law.Best(50.0, 1.0, False)
    assert not best_teacher({t: -t for t in grid}).bracketed
    assert best_teacher({10.0: 1.0, 100.0: 1.0, 1000.0: 1.0}).bracketed is False
    for bad in ({1.0: 1.0, 2.0: 2.0}, {1.0: 1.0, 2.0: math.nan, 3.0: 1.0}):
        with pytest.raises(UserError, match="three teachers"):
            best_teacher(bad)


def pilots(sizes=(100.0, 200.0, 400.0), ratio=2.5, grid=(120, 200, 300, 500, 900, 1500, 2500), seeds=(0,)):
    return [
        Pilot(f"{s}-{t}", f"{t}", s, s, float(t), 3.0, 2.0 + (math.log(t) - math.log(ratio * s)) ** 2, seed)
        for s in sizes for t in grid for seed in seeds if t > s
    ]  # fmt: skip


def test_the_law_of_pilots():
    law, why = law_of(pilots(), "all")
    assert (
        why == "" and law.a == pytest.approx(2.5) and law.b == pytest.approx(0, abs=1e-6) and law.r2 == pytest.approx(1)
    )
    assert law.students == (100, 400) and law.teachers == (120, 2500) and len(law.points) == 3
    law, _ = law_of(pilots(seeds=(0, 1)), "blocks")
    assert len(law.points) == 6 and law.counts == "blocks"
    mixed = [replace(p, loss=p.teacher_size) if p.seed and p.asked == 100 else p for p in pilots(seeds=(0, 1))]
    law, why = law_of(mixed, "all")
    assert len(law.points) == 5 and "students of 100: not bracketed on 1 of 2 seeds" in why
    law, why = law_of(pilots(sizes=(100.0, 200.0)), "all")
    assert law is None and "of 2 tried 2 have" in why
    law, why = law_of(pilots(sizes=(100.0, 200.0, 1400.0)), "all")
    assert law is None and "of 3 tried 2 have" in why
    law, why = law_of(pilots(sizes=(10.0, 200.0, 400.0)), "all")
    assert law is None and why.startswith("students of 10: not bracketed")
    twins = [replace(p, teacher="other", loss=p.loss + 1) for p in pilots()]  # of each size another teacher
    assert law_of(pilots() + twins, "all")[0] == law_of(twins + pilots(), "all")[0]
    down = pilots(sizes=(50.0, 100.0, 150.0))  # the best teachers: 600, 500, 400
    down = [replace(p, loss=math.log(p.teacher_size / (700 - 2 * p.asked)) ** 2) for p in down]
    assert law_of(down, "all")[0] is None and "do not grow" in law_of(down, "all")[1]


def test_published_law_and_its_range():
    assert PUBLISHED.student(7e9) == pytest.approx((7e9 + 11.498e6) / 2.498) and PUBLISHED.teacher(2e7) == 5e7
    assert PUBLISHED.beyond(5e8, PUBLISHED.teacher(5e8)) == ""
    assert "teachers of 70M to 2.8B" in PUBLISHED.beyond(PUBLISHED.student(7e9), 7e9)
    assert "students of 0 to 3B" in PUBLISHED.beyond(4e9, PUBLISHED.teacher(4e9))
    assert "left out" in PUBLISHED.beyond(2e7, 5e7) and "left out" not in PUBLISHED.beyond(5e8, PUBLISHED.teacher(5e8))
    own = fit_law([(100.0, 270.0), (200.0, 520.0), (400.0, 1020.0)])
    assert own.teacher(50.0) == pytest.approx(145) and own.student(270.0) == pytest.approx(100)
    assert "students of 100 to 400 were fitted" in own.beyond(50.0, 145.0)
    for broken in ({}, {"a": 1}, [1], {**PUBLISHED.to_json(), "a": -1}, {**PUBLISHED.to_json(), "teachers": 3}):
        with pytest.raises(UserError, match="is no law"):
            Law.from_json(broken)


# -- the adviser --------------------------------------------------------------------------------------------------


def said(capsys, *argv, code=0):
    assert invoke(["recommend", *map(str, argv)]) == code
    out = capsys.readouterr()
    text = (out.err if code else out.out).strip()
    assert not code or "\n" not in text
    return text


def test_sizes_by_number_and_by_name(tmp_path):
    assert [parse_size(t) for t in ("7B", "6.7e9", "124m", "60_000", "60,000", "1.5k")] == [
        7e9, 6.7e9, 124e6, 60000, 60000, 1500
    ]  # fmt: skip
    assert [parse_size(t) for t in ("1,5B", "1,50", "12_", "x", "")] == [None] * 5  # half a comma is no thousand
    model = decoder(double=False)
    model.save_pretrained(tmp_path / "hub")
    assert size_of(f"hf:{tmp_path / 'hub'}") == count_params(model)
    assert size_of(f"hf:{tmp_path / 'hub'}", counts="blocks") == counted(model, "blocks") < count_params(model)
    assert size_of("torchvision:resnet18") == 11_689_512 and size_of("stillhouse:mlp") > 1000
    assert size_of("timm:resnet18") == 11_689_512


def test_the_adviser_says_size_basis_range_and_caveat(capsys, tmp_path):
    text = said(capsys, "--teacher", "7B")
    assert text.startswith("Student for a teacher of 7B: about 2.81B parameters (0.40 × the teacher)")
    for part in ("2.498 S − 11.5M", "R² 0.9957", "70M to 2.8B", "7B → 3B", "Extrapolated", "2.5 S", "does not say"):
        assert part in text
    text = said(capsys, "--student-size", "500M")
    assert text.startswith("Teacher for a student of 500M: about 1.24B") and "Extrapolated" not in text
    text = said(capsys, "--teacher", "1.2B", "--student-size", "5e8")
    assert "2.40 × the student" in text and "near the law's best teacher" in text
    assert "larger than" in said(capsys, "--teacher", "12B", "--student-size", "5e8")
    found = json.loads(said(capsys, "--teacher", "7B", "--json"))
    assert found["recommended"]["student"] == pytest.approx(PUBLISHED.student(7e9)) and found["extrapolated"]
    law = fit_law([(1e5, 3e5), (2e5, 5e5), (4e5, 9e5)], teachers=(1e5, 2e6))
    (tmp_path / "law.json").write_text(json.dumps({"format": 1, "law": law.to_json(), "why": "", "pilots": []}))
    text = said(capsys, "--student-size", "300k", "--law", tmp_path)
    assert "about 700k" in text and "own pilots" in text and "11.5M" not in text and "Extrapolated" not in text
    assert "Extrapolated: students of 100k to 400k were fitted" in said(
        capsys, "--student-size", "3M", "--law", tmp_path
    )


def test_mistakes_of_the_adviser_are_one_line(capsys, tmp_path):
    assert "or --teacher SIZE, or --student-size SIZE" in said(capsys, code=2)
    assert "expected a size (7B" in said(capsys, "--teacher", "big", code=2)
    assert "expected a number of parameters" in said(capsys, "--teacher", "0", code=2)
    assert "no model timm:" in said(capsys, "--teacher", "timm:nope", code=2)
    assert "cannot be had" in said(capsys, "--teacher", f"hf:{tmp_path}/none", code=2)
    assert "no law.json" in said(capsys, "--teacher", "7B", "--law", tmp_path, code=2)
    (tmp_path / "law.json").write_text(
        json.dumps({"format": 1, "law": None, "why": "one size was tried", "pilots": []})
    )
    assert "gave no law: one size was tried" in said(capsys, "--teacher", "7B", "--law", tmp_path, code=2)
    (tmp_path / "law.json").write_text(json.dumps({"law": {"a": 2}}))
    assert "is no law" in said(capsys, "--teacher", "7B", "--law", tmp_path, code=2)
    assert "drop them" in said(capsys, tmp_path, "--data", "digits", "--student-size", "7B", code=2)
    assert "pipelines need both" in said(capsys, "--data", "digits", code=2)
    assert "--student is for run folders" in said(capsys, "--teacher", "7B", "--student", "bert", code=2)


# -- the user's way -----------------------------------------------------------------------------------------------

MINE = """
def llama(vocabulary, length):
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=length, **sizes))
"""


def test_own_teachers_and_text_by_command(tmp_path, monkeypatch, capsys):
    """A function's model, a folder of transformers and a student of an earlier run; all saved to live alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gapmine.py").write_text(MINE)
    corpus_of(tmp_path)
    text = corpus("mine.txt", length=T, tokens="word")
    hub = ModelSpec("transformers:GPT2LMHeadModel", V, (T,), options={**GPT2, "vocab_size": text.vocabulary}).build()
    hub.save_pretrained(tmp_path / "hub")
    text.tokenizer.save_pretrained(tmp_path / "hub")
    short = ["--data", "mine.txt", "--length", "8", "--steps", "2", "--batch", "4", "--calibration", "1"]
    any_size = ["--multiple", "1", "--sizes"]
    run = ["run", "capacity_gap_law", *short, "--quiet", "--device", "cpu"]
    argv = [*run, "--teacher", "gapmine:llama", "llama:24", "--heads", "2", "--layers", "1", *any_size, "2k", "3k"]
    assert invoke([*argv, "--out", "one"]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "one/report.json").read_text())
    teachers = [s["name"].split()[1] for s in report["students"] if s["role"] == "base"]
    assert {s["name"] for s in report["students"] if s["role"] == "student"} == {
        f"{s}-of-{t}" for t in teachers for s in ("2k", "3k")
    } and len(teachers) == 2
    assert any("a law needs" in n for n in report["notes"])
    students = sorted((tmp_path / "one/students").iterdir())
    argv = [*run, "--model", str(students[-1]), *any_size, "1800", "--out", "two"]
    assert invoke(argv) == 0, capsys.readouterr().err
    (again,) = (tmp_path / "two/students").iterdir()
    assert count_params(stillhouse.load(again)) == pytest.approx(1800, rel=0.05)
    argv = [*run, "--teacher", "hf:hub", "--shape", "8", "2", "16", "--drop", "1", "0", "--out", "three"]
    assert invoke(argv) == 0, capsys.readouterr().err
    (small,) = (tmp_path / "three/students").iterdir()
    model = stillhouse.load(small)
    assert type(model).__name__ == "GPT2LMHeadModel" and len(model.transformer.h) == 2
    assert (small / "config.json").exists() and (small / "tokenizer.json").read_bytes() == (
        tmp_path / "hub/tokenizer.json"
    ).read_bytes()  # the text was read with the teacher's own


def test_the_built_in_experiment_reports_arms_curve_and_law(tmp_path, capsys):
    few = [
        "--teacher-steps",
        "1",
        "--steps",
        "1",
        "--calibration",
        "1",
        "--judged",
        "4",
        "--limit",
        "4000",
        "--length",
        "16",
    ]
    argv = ["run", "capacity_gap_law", *few, "--seeds", "2", "--quiet", "--device", "cpu", "--out", str(tmp_path / "x")]
    assert invoke(argv) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "x/report.json").read_text())
    law = json.loads((tmp_path / "x/law.json").read_text())
    assert len(report["claims"]) == 6 and [c["threshold"] for c in report["claims"]] == [0.05] * 5 + [4.0]
    assert len(law["pilots"]) == 10 and law["law"] is None and "a law needs 3 sizes" in law["why"]
    assert {p["seed"] for p in law["pilots"]} == {0, 1} and len({p["teacher_size"] for p in law["pilots"]}) == 5
    best, arms = report["tables"]
    assert (
        [r[1] for r in best["rows"]] == ["0", "1", "mean"]
        and {r[-1] for r in best["rows"]} <= {"yes", "no"}
        and len(arms["rows"]) == 5
    )
    curve = next(iter(report["curves"][0]["series"].values()))
    assert curve[0] == sorted(curve[0]) and len(curve[1]) == 5
    first = json.loads((tmp_path / "x/arms/pruned-0/result.json").read_text())
    other = json.loads((tmp_path / "x/arms/random-units-0/result.json").read_text())
    fresh = json.loads((tmp_path / "x/arms/fresh-0/result.json").read_text())
    name = first["pilots"][2]["name"]
    assert len({r[f"start {name}"] for r in (first, other, fresh)}) == 3


def test_mistakes_are_said_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = corpus_of(tmp_path)
    run = Run(tmp_path / "r", device="cpu", quiet=True)
    cfg = replace(TINY, teacher_steps=0)
    teacher = decoder(double=False)

    class Other(nn.Module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, V)

    t5 = ModelSpec(
        "transformers:BloomForCausalLM", V, (T,), options={"vocab_size": V, "hidden_size": 8, "n_head": 2, "n_layer": 1}
    )
    for what, changes, words in (
        (teacher, {"sizes": ("9k",)}, "no teacher is larger"),
        (teacher, {"sizes": ("50",)}, "cannot be pruned to 50"),
        (teacher, {"sizes": (), "shape": (8, 3, 8)}, "2 queries share a head"),
        (teacher, {"sizes": (), "shape": (99, 2, 8)}, "cannot keep 99 channels"),
        (teacher, {"drop": (2, 1)}, "nothing stays of 3 blocks"),
        (Other(), {}, "is no language model"),
        (t5.build(), {}, "is no language model whose heads"),
        ([], {}, "no teacher to prune"),
    ):
        with pytest.raises(UserError, match=words) as error:
            distill(run, text, what, replace(cfg, **changes))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "r/stages").exists()
    for flags, words in (
        (["--sizes", "big"], "expected numbers of parameters"),
        (["--alpha", "2"], "alpha in [0, 1]"),
        (["--shape", "1", "2"], "expected width, heads and neurons"),
        (["--chunk", "-1"], "chunk: expected at least 0"),
        (["--model", "resnet"], "no language model"),
        (["--teacher", "llama:x"], "such as llama:96"),
        (["--teacher", "timm:resnet18"], "no language model"),
        (["--data", "nothing"], "no text of this name"),
        (["--start", "fresh"], "--start does nothing here: the built-in experiment compares them"),
        (["--shape", "8", "2", "8"], "bring --teacher or --model for a shape"),
        (["--teacher", "llama:8", "--units", "random", "--calibration", "3"], "--units random reads no text"),
        (["--teacher", "llama:8", "--teacher-lr", "1"], "--teacher-lr does nothing here"),
    ):
        assert invoke(["run", "capacity_gap_law", "--out", str(tmp_path / "bad"), *flags]) == 2, flags
        err = capsys.readouterr().err.strip()
        assert "\n" not in err and words in err, err


def test_settings_say_what_is_wrong():
    for bad in (
        {"lr": -1.0},
        {"temperature": 0.0},
        {"drop": (-1, 0)},
        {"sizes": ("3B",), "shape": (1, 1, 1)},
        {"steps": 0},
    ):
        with pytest.raises(UserError):
            Config(**bad)
    assert asdict(Config())["alpha"] == 0.5
