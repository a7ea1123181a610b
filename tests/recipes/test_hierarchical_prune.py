"""HierarchicalPrune: the exact checks of its card, its operators in DiT, SD3 and Flux, its mistakes, the user's way."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from table import Row
from torch import Tensor, nn

import stillhouse
from stillhouse import cli
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.digits import NULL, digits_transformer
from stillhouse.diffusion.examples import Examples, load_examples, pixels
from stillhouse.diffusion.process import VP, Flow, loss_weight, of_scheduler
from stillhouse.diffusion.sampling import ManySteps, trailing
from stillhouse.errors import Interrupted, UserError
from stillhouse.export import export
from stillhouse.recipes.hierarchical_prune.config import Config
from stillhouse.recipes.hierarchical_prune.experiment import TINY, tiny
from stillhouse.recipes.hierarchical_prune.impact import impacts, predictions, scorer, squared
from stillhouse.recipes.hierarchical_prune.parts import (
    FINE,
    Part,
    between,
    choose,
    find_parts,
    in_order,
    left,
    position_weight,
    remove,
    settled,
    taken_out,
)  # fmt: skip
from stillhouse.recipes.hierarchical_prune.recipe import distill, in_nf4
from stillhouse.recipes.hierarchical_prune.system import (
    Given,
    Repair,
    behind,
    block_outputs,
    common_start,
    rates,
    unfreeze,
)  # fmt: skip
from stillhouse.run import Run
from stillhouse.students.edits import Remove
from stillhouse.students.normalfloat import NormalFloat, normal_points
from stillhouse.students.packing import stored_bits
from stillhouse.students.plan import Plan
from stillhouse.students.removed import without
from stillhouse.system import Clock
from stillhouse.weights import by_module

diffusers = pytest.importorskip("diffusers")

ROWS = [
    Row(
        "hierarchical_prune",
        "hybrid",
        {
            "mode": "hybrid",
            "blocks": (1,),
            "components": ("ff", "attn"),
            "leaves": "zero",
            "budget": 0.7,
            "train": "all",
            "metric": "velocity",
            "pack": "none",
            "remeasure": 1,
            "optimizer": "sgd",
            "output": 0.0,
            "feature": 0.0,
            "task": 1.0,
        },
    ),
    Row(
        "hierarchical_prune",
        "listed",
        {"mode": "manual", "blocks": (2,), "train_blocks": (1, 3), "weighting": "cosmap"},
    ),
]
# With less than a quarter removed, auto is the mask; one round of measuring is as good as many when it suffices.
ZERO = [
    (
        Row("hierarchical_prune", "auto", {"sensitivity": "auto"}),
        Row("hierarchical_prune", "mask", {"sensitivity": "mask"}),
    ),
    (Row("hierarchical_prune", "one round", {"remeasure": 1}), Row("hierarchical_prune")),
]
JOINT = [Row("hierarchical_prune", "two processes", {"optimizer": "sgd", "lr": 0.1})]

WIDE = 12


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dit(layers: int = 4, *, double: bool = False) -> ManySteps:
    network = digits_transformer(16, layers, 2, seed=1).eval()
    with torch.no_grad():  # label tables and biases that are not 0, so that nothing is equal by chance
        for i, p in enumerate(network.parameters()):
            p.add_(0.1 * noise(*p.shape, seed=i))
    return ManySteps(network.double() if double else network, Flow(), "flow_prediction", (1, 8, 8), null=NULL, steps=2)


def sd3(**changes) -> nn.Module:
    sizes = {
        "sample_size": 4, "patch_size": 2, "in_channels": 2, "num_layers": 4, "attention_head_dim": 6,
        "num_attention_heads": 2, "joint_attention_dim": 10, "caption_projection_dim": WIDE,
        "pooled_projection_dim": 7, "out_channels": 2, "pos_embed_max_size": 4, **changes,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.SD3Transformer2DModel(**sizes).eval()


def flux() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=6, num_attention_heads=2,
            joint_attention_dim=10, pooled_projection_dim=7, guidance_embeds=False, axes_dims_rope=(2, 2, 2),
        ).eval()  # fmt: skip


TEXTS = {"encoder_hidden_states": noise(3, 5, 10, seed=2), "pooled_projections": noise(3, 7, seed=3)}
IMAGES = {
    "sd3": {"hidden_states": noise(3, 2, 4, 4), "timestep": torch.tensor([10.0, 500.0, 900.0]), **TEXTS},
    "flux": {
        "hidden_states": noise(3, 4, 4), "timestep": torch.tensor([0.1, 0.5, 0.9]), "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(5, 3), **TEXTS,
    },
}  # fmt: skip
BLOCK_INPUTS = {"hidden_states": noise(3, 4, WIDE), "encoder_hidden_states": noise(3, 5, WIDE, seed=1)}


def batch_of(n: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "input": noise(n, 1, 8, 8, dtype=dtype), "noise": noise(n, 1, 8, 8, seed=1, dtype=dtype),
        "time": torch.linspace(0.1, 0.9, n, dtype=dtype), "condition": torch.arange(n),
        "chance": torch.linspace(0, 0.9, n),
    }  # fmt: skip


def pair(removed: list[Remove], *, double: bool = True) -> tuple[ManySteps, ManySteps]:
    """Student and teacher."""
    whole = dit(double=double)
    whole.requires_grad_(False)
    return Plan.identity(whole).then(*removed).build(whole).requires_grad_(True), whole


def system_of(student: ManySteps, whole: ManySteps, blocks=(), **changes) -> Repair:
    how = {"weights": (1.0, 1.0, 1.0), "optimizer": partial(torch.optim.SGD, lr=0.1), **changes}
    return Repair(student, whole, [f"network.transformer_blocks.{i}" for i in blocks], **how)


# -- 1. nothing removed ----------------------------------------------------------------------------------------------


def test_without_removing_student_and_teacher_are_one():
    student, whole = pair([])
    system = system_of(student, whole, range(4), drop=0.5)
    terms = system.repair(batch_of(), Clock())
    assert [float(terms.terms[k].detach()) for k in ("out", "feature")] == [0, 0] and terms.terms["task"] > 0
    (terms.terms["out"] + terms.terms["feature"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in whole.parameters())


def test_the_students_own_dropping_stays_off_in_training():
    student, whole = pair([])
    for part in student.modules():
        if hasattr(part, "token_drop"):
            part.dropout_prob = 0.9  # as networks of diffusers have it, but more
    system = system_of(student, whole).train()
    assert system.training and not student.training
    assert float(system.repair(batch_of(), Clock()).terms["out"].detach()) == 0


# -- 2. what stands for a part ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "index"), [(sd3, 1), (sd3, 3), (flux, 0)], ids=["sd3", "sd3 last", "flux"])
def test_a_removed_block_gives_both_streams_back(make, index):
    network = make()
    gone = without(network.transformer_blocks[index], "input")
    text, image = gone(**BLOCK_INPUTS, temb=None, joint_attention_kwargs=None)
    assert torch.equal(text, BLOCK_INPUTS["encoder_hidden_states"]) and torch.equal(
        image, BLOCK_INPUTS["hidden_states"]
    )
    positional = gone(BLOCK_INPUTS["hidden_states"], BLOCK_INPUTS["encoder_hidden_states"], None)
    assert torch.equal(positional[0], text) and torch.equal(positional[1], image)
    assert gone.context_pre_only == (make is sd3 and index == 3)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_network_with_a_removed_block_is_the_network_without_it(kind):
    network = sd3() if kind == "sd3" else flux()
    for path in ("transformer_blocks.1", "transformer_blocks.0", "single_transformer_blocks.0", "transformer_blocks.3"):
        owner, _, index = path.rpartition(".")
        if not hasattr(network, owner) or int(index) >= len(getattr(network, owner)):
            continue
        edited = Plan.identity(network).then(Remove(path)).build(network)
        shorter = copy.deepcopy(network)
        del getattr(shorter, owner)[int(index)]
        with torch.no_grad():
            a, b, c = (m(**IMAGES[kind]).sample for m in (edited, shorter, network))
        assert torch.equal(a, b) and not torch.allclose(a, c)


@pytest.mark.parametrize("kind", ["sd3", "sd35", "flux", "dit"])
def test_every_part_can_be_removed_either_way(kind):
    network = {
        "sd3": sd3,
        "sd35": partial(sd3, num_layers=2, dual_attention_layers=(0,), qk_norm="rms_norm"),
        "flux": flux,
    }.get(kind, lambda: dit(2).network)()
    every, total = find_parts(network), sum(p.numel() for p in network.parameters())
    inputs = IMAGES["flux" if kind == "flux" else "sd3"]
    if kind == "dit":
        inputs = {"hidden_states": noise(3, 1, 8, 8), "timestep": inputs["timestep"], "class_labels": torch.arange(3)}
    with torch.no_grad():
        first = network(**inputs).sample
        for part in every:
            for leaves in ("input", "zero"):
                edited = Plan.identity(network).then(part.edit(leaves)).build(network)
                said = edited(**inputs).sample
                assert said.shape == first.shape and said.isfinite().all()
                assert not torch.equal(said, first), part
                stays = sum(p.numel() for p in edited.parameters())
                assert stays == total - part.params and math.isclose(left([part], every, total), stays / total)
    kinds = {p.component for p in every}
    assert {"sd3": {"ff_context", "w_norm1_context", "ff"}, "sd35": {"attn2"}, "flux": {"ff_context"}, "dit": {"ff"}}[
        kind
    ] <= kinds and {"block", "w_norm1", "attn"} <= kinds


def test_identity_of_attention_and_feed_forward_is_gated_and_added_and_is_not_zero():
    """h + g₁·LN(h)(1 + s₁)+b₁ with attn out of the way, by the block's own modulation; with zero nothing is added."""
    block, h = dit(1).network.transformer_blocks[0], noise(3, 16, 16)
    t, y = torch.tensor([1.0, 500.0, 900.0]), torch.arange(3)
    normed, gate, shift, scale, gate_ff = block.norm1(h, t, y, hidden_dtype=h.dtype)
    made = {}
    for leaves in ("input", "zero"):
        edited = copy.deepcopy(block)
        for name in ("attn1", "ff"):
            edited.set_submodule(name, without(getattr(block, name), leaves))
        made[leaves] = edited(h, timestep=t, class_labels=y)
    assert torch.equal(made["zero"], h)
    middle = h + gate[:, None] * normed
    second = block.norm3(middle) * (1 + scale[:, None]) + shift[:, None]
    assert torch.allclose(made["input"], middle + gate_ff[:, None] * second, atol=1e-6)


def test_a_removed_norm_has_gate_one_and_no_shift_or_scale():
    for norm, count in ((sd3().transformer_blocks[0].norm1, 5), (flux().single_transformer_blocks[0].norm, 2)):
        h = noise(3, 4, WIDE)
        found = without(norm, "input")(h, emb=noise(3, WIDE))
        assert len(found) == count == len(norm(h, emb=noise(3, WIDE)))
        assert torch.equal(found[0], nn.functional.layer_norm(h, (WIDE,), eps=1e-6))
        assert all(bool((v == k).all()) for v, k in zip(found[1:], (1, 0, 0, 1), strict=False))
    last = sd3().transformer_blocks[3].norm1_context  # the last block ends the text stream: one tensor
    assert torch.equal(without(last, "input")(h, noise(3, WIDE)), nn.functional.layer_norm(h, (WIDE,), eps=1e-6))


def test_joint_attention_gives_image_and_text_back_or_zeros():
    attn = sd3().transformer_blocks[0].attn
    image, text = without(attn, "input")(**BLOCK_INPUTS)
    assert torch.equal(image, BLOCK_INPUTS["hidden_states"]) and torch.equal(
        text, BLOCK_INPUTS["encoder_hidden_states"]
    )
    assert all(not t.any() for t in without(attn, "zero")(**BLOCK_INPUTS))
    assert type(without(attn, "zero")) is not type(without(attn, "input"))


def test_zeros_for_a_norm_or_a_block_of_streams_are_refused():
    for path in ("transformer_blocks.0", "transformer_blocks.0.norm1"):
        with pytest.raises(UserError, match="would wipe what passes through"):
            Plan.identity(sd3()).then(Remove(path, "zero")).build(sd3())


def test_the_first_block_of_a_dit_leaves_what_the_output_layers_read():
    whole = dit(2)
    first = next(p for p in find_parts(whole) if p.component == "block")
    assert first.keeps == ("norm1.emb",)
    plan = Plan.identity(whole).then(first.edit("input"))
    student = plan.build(whole)
    assert Plan.from_json(plan.to_json()) == plan
    x, t, y = noise(2, 1, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    net = whole.network
    with torch.no_grad():
        h = net.transformer_blocks[1](net.pos_embed(x), timestep=1000 * t, class_labels=y)
        emb = net.transformer_blocks[0].norm1.emb(1000 * t, y, hidden_dtype=h.dtype)
        shift, scale = net.proj_out_1(nn.functional.silu(emb)).chunk(2, dim=1)
        out = net.proj_out_2(net.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
        want = out.view(2, 4, 4, 2, 2, 1).permute(0, 5, 1, 3, 2, 4).reshape(2, 1, 8, 8)
        assert torch.allclose(student(x, t, y), want, atol=1e-6)


def test_taken_out_parts_are_back_afterwards_also_after_an_error():
    whole = dit(3)
    before, x = dict(whole.named_modules()), (noise(2, 1, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([1, 2]))
    with torch.no_grad():
        first = whole(*x)
        edits = [p.edit("zero") for p in find_parts(whole) if (p.block, p.component) in ((0, "block"), (2, "ff"))]
        with taken_out(whole, edits):
            assert not torch.equal(whole(*x), first)
        with pytest.raises(UserError), taken_out(whole, [*edits, Remove("network.transformer_blocks.1", "half")]):
            pass
        assert torch.equal(whole(*x), first)
    assert dict(whole.named_modules()) == before


# -- 3. rates and freezing -------------------------------------------------------------------------------------------


def train(student: ManySteps, whole: ManySteps, factors, blocks, steps: int = 3, **how) -> dict[str, Tensor]:
    paths = [f"network.transformer_blocks.{i}" for i in range(4)]
    unfreeze(student, paths, ["network.transformer_blocks.1"], factors, **how)
    optimizer = by_module(student, factors, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1))
    system = system_of(student, whole, blocks, optimizer=optimizer).train()
    (update,) = system.updates()
    adam = update.optimizer(update.params)
    for _ in range(steps):
        adam.zero_grad()
        system.repair(batch_of(), Clock()).total.backward()
        torch.nn.utils.clip_grad_norm_(update.params, 0.1)
        adam.step()
    return {k: v.clone() for k, v in student.state_dict().items()}


def test_a_rate_of_zero_is_freezing():
    removed, path = [Remove("network.transformer_blocks.1")], "network.transformer_blocks.2"
    zero = train(*pair(removed), {path: 0.0}, [3])
    student, whole = pair(removed)
    frozen = copy.deepcopy(student.state_dict())
    listed = train(student, whole, {}, [3], listed=(3,))
    tail = [k for k in zero if k.startswith("network.transformer_blocks.3")]
    assert all(torch.equal(zero[k], frozen[k]) for k in zero if k.startswith(path))
    assert any(not torch.equal(zero[k], frozen[k]) for k in tail)
    by_hand = train(*pair(removed), {path: 0.0}, [3])  # and nothing in it is drawn
    assert all(torch.equal(zero[k], by_hand[k]) for k in zero)
    # The same blocks frozen by their numbers, the output layers too: equal where both learn the same.
    only = train(*pair(removed), {path: 0.0, **dict.fromkeys(OUTPUTS, 0.0)}, [3])
    assert all(torch.equal(only[k], listed[k]) for k in only)


OUTPUTS = ("network.proj_out_1", "network.proj_out_2")


def test_rates_of_sensitivity():
    assert rates({"a": 1.0, "b": 2.0, "c": 4.0}) == {"a": 1.0, "b": 1.0, "c": 0.5}
    assert rates({"a": -1.0, "b": -2.0, "c": 4.0}) == {"a": 1.0, "b": 1.0, "c": 0.0}  # clipped below
    assert rates({"a": 0.0}) == {"a": 1.0} and rates({}) == {}
    student, _ = pair([])
    made = by_module(student, {"network.transformer_blocks.2": 0.25}, partial(torch.optim.AdamW, lr=1.0))
    found = {g["lr"]: sum(p.numel() for p in g["params"]) for g in made(list(student.parameters())).param_groups}
    assert found[0.25] == sum(p.numel() for p in student.network.transformer_blocks[2].parameters())


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_what_learns_lies_behind_the_first_removed_part(kind):
    network = sd3() if kind == "sd3" else flux()
    names = behind(Plan.identity(network).then(Remove("transformer_blocks.1")).build(network), ["transformer_blocks.1"])
    tops = {n.split(".")[0] for n in names}
    assert tops >= {"norm_out", "proj_out"} and not tops & {
        "pos_embed",
        "time_text_embed",
        "context_embedder",
        "x_embedder",
    }
    assert ("single_transformer_blocks" in tops) == (kind == "flux")
    assert {n.split(".")[1] for n in names if n.startswith("transformer_blocks")} == (
        {"2", "3"} if kind == "sd3" else set()
    )
    inner = behind(network, ["transformer_blocks.1.attn"])  # a part of a block: what follows in the block learns too
    first = "transformer_blocks.1."
    assert any(n.startswith(f"{first}ff") for n in inner)
    assert not any(n.startswith((f"{first}norm1", f"{first}attn")) for n in inner)


def test_the_early_part_is_the_teachers_to_the_bit_and_the_tail_is_not(tmp_path):
    made = tiny(Run(tmp_path, device="cpu", quiet=True), replace(TINY, mode="manual", blocks=(2,), sensitivity="mask"))
    student, teacher = made["student"].model, digits_transformer(16, 4, 2)
    now = {k.removeprefix("network."): v for k, v in student.state_dict().items()}
    for name, value in teacher.state_dict().items():
        early = name.startswith(("pos_embed", "transformer_blocks.0", "transformer_blocks.1"))
        if name in now and not name.startswith("transformer_blocks.2") and (early or value.is_floating_point()):
            assert torch.equal(now[name], value) == early or value.numel() == 0, name
    assert made.cost["trained_params"] == sum(
        v.numel() for k, v in teacher.named_parameters() if k.startswith(("transformer_blocks.3", "proj_out"))
    )


# -- 4. the index map ------------------------------------------------------------------------------------------------


def test_blocks_are_compared_by_their_original_numbers():
    student, whole = pair([Remove("network.transformer_blocks.1")])
    batch, process = batch_of(), Flow()
    terms = system_of(student, whole, [2, 3], weights=(0.0, 0.0, 2.0)).repair(batch, Clock()).terms
    x_t, t = process.add_noise(batch["input"], batch["noise"], batch["time"]), batch["time"]
    h: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", whole)):
        stream = model.network.pos_embed(x_t)
        for block in model.network.transformer_blocks:
            stream = block(stream, timestep=1000 * t, class_labels=batch["condition"])
            h[name].append(stream)
    want = 2 * sum((h["student"][i] - h["teacher"][i]).square().mean() for i in (2, 3))
    wrong = 2 * sum((h["student"][i] - h["teacher"][i - 1]).square().mean() for i in (2, 3))
    assert set(terms) == {"feature"} and torch.allclose(terms["feature"], want, rtol=1e-12)
    assert not torch.allclose(terms["feature"], wrong, rtol=1e-3)


def test_both_streams_count_and_a_missing_one_is_left_out():
    network = sd3()
    with torch.no_grad(), block_outputs(network, ["transformer_blocks.2", "transformer_blocks.3"]) as found:
        network(**IMAGES["sd3"])
    assert [tuple(t.shape) for t in found["transformer_blocks.2"]] == [(3, 5, WIDE), (3, 4, WIDE)]
    assert [tuple(t.shape) for t in found["transformer_blocks.3"]] == [(3, 4, WIDE)]
    assert not network.transformer_blocks[2]._forward_hooks


# -- the loss --------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self, a: float):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a * x


@pytest.mark.parametrize("weighting", ["one", "sigma_sqrt", "cosmap"])
def test_the_loss_and_its_gradient_in_closed_form(weighting):
    """v = a x_t: L_out = E w (a − b)² x_t², L_task = E w ((1 − σ a) x_t − x_0)²."""
    student, teacher = (ManySteps(Line(v), Flow(), "flow_prediction", (1, 8, 8)) for v in (0.7, 0.2))
    batch = {k: v for k, v in batch_of().items() if k != "condition"}
    s = batch["time"].view(-1, 1, 1, 1)
    system = Repair(
        student, teacher, [], weights=(3.0, 2.0, 0.0), weighting=weighting, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    terms = system.repair(batch, Clock())
    w = {"one": s**0, "sigma_sqrt": 1 / s**2, "cosmap": 2 / (math.pi * ((1 - s) ** 2 + s**2))}[weighting]
    x = (1 - s) * batch["input"] + s * batch["noise"]
    out, task = 2 * (w * (0.5 * x) ** 2).mean(), 3 * (w * ((1 - 0.7 * s) * x - batch["input"]) ** 2).mean()
    assert torch.allclose(terms.terms["out"], out, rtol=1e-12) and torch.allclose(terms.terms["task"], task, rtol=1e-12)
    terms.total.backward()
    by_hand = 2 * (w * 2 * 0.5 * x**2).mean() + 3 * (w * 2 * ((1 - 0.7 * s) * x - batch["input"]) * -s * x).mean()
    assert torch.allclose(student.network.a.grad, by_hand, rtol=1e-12) and teacher.network.a.grad is None


def test_conditions_are_dropped_for_both_alike():
    student, whole = pair([Remove("network.transformer_blocks.1")])
    system, batch = system_of(student, whole, drop=0.4), batch_of()
    gone = torch.where(batch["chance"] < 0.4, torch.full((5,), NULL), batch["condition"])
    assert int((gone == NULL).sum()) == 2 and torch.equal(system.dropped(student.denoiser, batch), gone)
    plain = system_of(student, whole).repair({**batch, "condition": gone}, Clock()).total
    assert torch.equal(system.repair(batch, Clock()).total, plain)
    texts = {"condition": {"a": torch.ones(5, 2, 3)}, "chance": batch["chance"]}
    denoiser = Denoiser(Line(1.0), Flow(), null={"a": torch.zeros(2, 3)})
    assert system.dropped(denoiser, texts)["a"].sum(dim=(1, 2)).tolist() == [0, 0, 6, 6, 6]


def test_times_of_flows():
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    shifted = Flow(shift=3.0)
    u = torch.rand(4, generator=g())
    assert torch.allclose(shifted.times(4, 0.0, 1.0, g()), 3 * u / (1 + 2 * u)) and shifted.at(0.5) == 0.75
    assert trailing(shifted, 2) == [1.0, 0.75] and trailing(Flow(), 4) == [1.0, 0.75, 0.5, 0.25]
    logit = torch.randn(4, generator=g()).sigmoid()
    assert torch.equal(Flow().drawn(4, "logit_normal", g()), logit)
    mode = Flow().drawn(20000, "mode", g())
    assert mode.min() >= 0 and mode.max() <= 1 and abs(float(mode.mean()) - 0.5) < 0.01
    assert torch.equal(Flow().drawn(4, "uniform", g()), u)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert of_scheduler(scheduler)[0].shift == 3.0
    assert torch.allclose(loss_weight("cosmap", torch.tensor([0.0])), torch.tensor([2 / math.pi]))


# -- the common start ------------------------------------------------------------------------------------------------


def calls_of(modules) -> list[int]:
    """How often each is called from now on."""
    counts = [0] * len(modules)

    def count(k: int, *_) -> None:
        counts[k] += 1

    for k, m in enumerate(modules):
        m.register_forward_hook(partial(count, k))
    return counts


@pytest.mark.parametrize(
    ("kind", "removed", "common"),
    [
        ("dit", "transformer_blocks.2", 2), ("dit", "transformer_blocks.2.ff", 2), ("dit", "transformer_blocks.0", 0),
        ("sd3", "transformer_blocks.2", 2), ("flux", "single_transformer_blocks.0", 2),
    ],
)  # fmt: skip
def test_blocks_before_the_first_change_are_computed_once(kind, removed, common):
    """Same terms and gradients, to the bit, and the student's first blocks are not called."""
    network, texts = {"dit": lambda: dit().network, "sd3": sd3, "flux": Packed}[kind](), kind != "dit"
    condition = TEXTS if texts else torch.arange(3)
    shape = {"dit": (1, 8, 8), "sd3": (2, 4, 4), "flux": (4, 4)}[kind]
    whole = ManySteps(network, Flow(), "flow_prediction", shape, null=None if texts else NULL).eval()
    path = f"network.{'inner.' if kind == 'flux' else ''}{removed}"
    every = find_parts(whole)
    blocks, gone = [p for p in every if p.component == "block"], [p for p in every if p.module == path]
    student = Plan.identity(whole).then(gone[0].edit("input")).build(whole)
    unfreeze(student, [b.module for b in blocks], [path], {})
    learn = [b.module for b in blocks[common + 1 :]]
    system = Repair(student, whole, learn, weights=(1.0, 1.0, 1.0), optimizer=partial(torch.optim.SGD, lr=0.1)).train()
    x, t = noise(3, *shape), torch.tensor([0.1, 0.5, 0.9])
    batch = {"input": x, "noise": noise(3, *shape, seed=1), "time": t, "condition": condition}
    before = dict(student.named_modules())

    def learned() -> tuple[dict[str, Tensor], list[Tensor | None]]:
        student.zero_grad()
        terms = system.repair(batch, Clock())
        terms.total.backward()
        return dict(terms.terms), [p.grad for p in student.parameters() if p.requires_grad]

    wanted, grads = learned()
    calls = [calls_of([m.get_submodule(b.module) for b in blocks]) for m in (student, whole)]
    with common_start(student, whole, blocks, gone, (x, t, condition)) as count:
        assert count == common and sum(isinstance(m, Given) for m in student.modules()) == common
        calls[0][:] = [0] * len(blocks)
        found, again = learned()
        assert calls[0][:common] == [0] * common and all(calls[0][k] for k in range(common + 1, len(blocks)))
        assert calls[1] == [1] * len(blocks)
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, again, strict=True)) and any(
        g is not None and g.any() for g in again
    )
    assert dict(student.named_modules()) == before and not any(isinstance(m, Given) for m in student.modules())


def test_nothing_is_common_behind_what_learns():
    """An embedder that learns feeds the first block, wherever the network keeps it."""
    student, whole = pair([Remove("network.transformer_blocks.2")])
    blocks = [p for p in find_parts(whole) if p.component == "block"]
    student.requires_grad_(False)
    student.network.transformer_blocks[3].requires_grad_(True)
    inputs = (noise(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0.2, 0.8]), torch.tensor([1, 2]))
    for module, count in ((None, 2), (student.network.pos_embed, 0), (student.network.transformer_blocks[1], 1)):
        if module is not None:
            module.requires_grad_(True)
        with (
            pytest.raises(ZeroDivisionError),
            common_start(student, whole, blocks, [blocks[2]], inputs) as found,
        ):
            assert found == count
            raise ZeroDivisionError
        assert not any(isinstance(m, Given) for m in student.modules())
        assert not any(m._forward_hooks for m in whole.modules())
        if module is not None:
            module.requires_grad_(False)


def test_a_run_takes_the_common_start_and_gives_the_same_student(tmp_path, monkeypatch):
    from contextlib import nullcontext

    from stillhouse.recipes.hierarchical_prune import recipe

    counts, plain = [], recipe.common_start

    def spied(*args):
        made = plain(*args)
        counts.append(made)
        return made

    cfg = replace(TINY, mode="manual", blocks=(2,), sensitivity="mask")
    monkeypatch.setattr(recipe, "common_start", spied)
    one = tiny(Run(tmp_path / "a", device="cpu", quiet=True), cfg)["student"].model
    monkeypatch.setattr(recipe, "common_start", lambda *_: nullcontext())
    two = tiny(Run(tmp_path / "b", device="cpu", quiet=True), cfg)["student"].model
    assert len(counts) == 1 and one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# -- 5. what is chosen -----------------------------------------------------------------------------------------------


def blocks_of(sizes: list[int], fine: tuple[str, ...] = ()) -> list[Part]:
    found = []
    for i, size in enumerate(sizes):
        found.append(Part(i, "block", f"b.{i}", size))
        found += [Part(i, c, f"b.{i}.{c}", size // len(fine)) for c in fine]
    return found


def test_removing_stops_at_the_first_ratio_below_the_budget():
    every = blocks_of([10, 20, 30, 40])
    order = [every[0], every[3], every[1], every[2]]
    for budget, count in ((1.0, 1), (0.9, 2), (0.91, 1), (0.5, 3), (0.51, 2), (0.3, 4)):
        made = remove(order, [], every, 100, budget)
        assert len(made) == count and left(made, every, 100) < budget <= left(made[:-1], every, 100), budget
    assert remove(order, [], every, 100, 0.3, most=2) == order[:2]


def test_late_blocks_are_cheap_and_the_weight_can_turn_the_order():
    assert [position_weight(i, 4) for i in (0, 2, 4)] == pytest.approx([1, math.exp(-0.5), math.exp(-1)])
    every = blocks_of([1, 1, 1, 1])
    impact = {"b.0": 1.0, "b.1": -1.2, "b.2": 1.3, "b.3": 5.0}
    assert [p.block for p in in_order(every, impact, "position", 4)] == [2, 1, 0, 3]  # .79, .93, 1, 2.4
    assert [p.block for p in in_order(every, impact, "least-drop", 4)] == [1, 0, 2, 3]  # best score after removal first
    assert [p.block for p in in_order(every, dict.fromkeys(impact, 1.0), "least-drop", 4)] == [3, 2, 1, 0]


def test_hybrid_takes_its_blocks_and_then_the_least_needed_components():
    every = blocks_of([40, 40, 40, 40], ("attn", "ff"))
    asked = []

    def measure(parts, removed):
        asked.append(([p.module for p in parts], [p.module for p in removed]))
        return {p.module: {"b.0.attn": 3.0, "b.0.ff": 2.0, "b.1.attn": 1.0, "b.1.ff": 9.0}[p.module] for p in parts}

    free = between(every, ("attn", "ff"), 0, -3)
    how = {"mode": "hybrid", "named": (3,), "measure": measure}
    assert [p.module for p in choose(every, free, 160, budget=0.7, **how)] == ["b.1.attn", "b.3"]
    assert asked == [(["b.0.attn", "b.0.ff", "b.1.attn", "b.1.ff"], [])]
    # Both components of a block gone: the block is.
    assert [p.module for p in choose(every, free, 160, budget=0.4, **how)] == ["b.0", "b.1.attn", "b.3"]
    assert [p.module for p in choose(every, (), 160, mode="manual", budget=0.1, named=(1, 1), measure=measure)] == [
        "b.1"
    ]
    with pytest.raises(UserError, match=r"budget 0.1 cannot be met: without all allowed parts 0.250"):
        choose(every, free, 160, budget=0.1, **how)


def test_remeasuring_asks_again_of_what_is_left():
    every, asked = blocks_of([10, 10, 10, 10]), []

    def measure(parts, removed):
        asked.append(([p.block for p in parts], [p.block for p in removed]))
        return {p.module: float(p.block) if not removed else -float(p.block) for p in parts}

    gone = choose(every, every, 40, mode="least-drop", budget=0.5, remeasure=1, measure=measure)
    assert asked == [([0, 1, 2, 3], []), ([1, 2, 3], [0]), ([1, 2], [0, 3])] and [p.block for p in gone] == [0, 2, 3]


def test_a_removed_block_and_its_parts_are_counted_once():
    every = blocks_of([40, 40], ("attn", "ff"))
    block, attn, ff, *_ = every
    assert settled([attn, block], every) == [block] and settled([ff, attn], every) == [block]
    assert left([attn, block], every, 80) == 0.5 and left([attn], every, 80) == 0.75
    assert remove([attn, block, ff], [block], every, 80, 0.1) == [block]


# -- impact ----------------------------------------------------------------------------------------------------------


def few() -> Examples:
    return Examples(noise(6, 1, 8, 8), torch.arange(6))


def test_impact_is_the_fall_of_the_score_at_the_samplers_settings(tmp_path):
    whole, cfg = dit(3), Config(calibration=5, sample_steps=2)
    run, part = Run(tmp_path, device="cpu", quiet=True, seed=4), find_parts(dit(3))[0]
    found = impacts(run, whole, lambda: scorer(run, whole, few(), cfg), "input", [part], ())
    from stillhouse.system import fold

    def samples(model):
        return model.sample(torch.arange(5), torch.Generator().manual_seed(fold(4, "calibration")))

    student = Plan.identity(whole).then(part.edit("input")).build(whole)
    assert (
        found[part.module] == pytest.approx(squared(samples(student), samples(whole)), rel=1e-9)
        and found[part.module] > 0
    )


def test_metrics_by_velocity_and_by_a_judge(tmp_path):
    whole, run = dit(3), Run(tmp_path, device="cpu", quiet=True)
    velocity = scorer(run, whole, few(), Config(metric="velocity"))
    said, wanted = predictions(whole, few(), torch.Generator().manual_seed(stillhouse.system.fold(0, "calibration")))
    assert velocity(whole) == pytest.approx(-squared(said, wanted), rel=1e-9)
    heard = []
    judged = scorer(
        run, whole, few(), Config(calibration=4), judge=lambda x, c: heard.append((x.shape, c)) or x[:, 0, 0, 0]
    )
    x = whole.sample(torch.arange(4), torch.Generator().manual_seed(stillhouse.system.fold(0, "calibration")))
    assert judged(whole) == pytest.approx(float(x[:, 0, 0, 0].double().mean()))
    assert heard[0][0] == (4, 1, 8, 8) and heard[0][1].tolist() == [0, 1, 2, 3]


def test_the_analysis_goes_on_where_it_was_stopped(tmp_path):
    whole, run, calls = dit(3), Run(tmp_path, device="cpu", quiet=True), []
    parts = [p for p in find_parts(whole) if p.component == "block"]

    def scoring(stop: int):
        def score(model):
            if len(calls) == stop:
                raise Interrupted("stopped")
            calls.append(1)
            return float(len(calls) ** 2)

        return lambda: score

    with pytest.raises(Interrupted):
        impacts(run, whole, scoring(3), "input", parts, ())
    found = impacts(run, whole, scoring(99), "input", parts, ())
    assert len(calls) == 4 and list(found.values()) == [1 - 4.0, 1 - 9.0, 1 - 16.0]
    assert impacts(run, whole, scoring(4), "input", parts, ()) == found


# -- four bits -------------------------------------------------------------------------------------------------------

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_points_are_those_of_qlora_and_every_weight_takes_the_nearest():
    assert torch.allclose(normal_points(), torch.tensor(NF4), atol=1e-6)
    w = noise(9, 21)
    made, flat = NormalFloat()(w).flatten(), w.flatten()
    for start in range(0, 189, 64):
        piece = flat[start : start + 64]
        levels = piece.abs().max() * torch.tensor(NF4)
        want = (piece[:, None] - levels).abs().min(1).values
        assert torch.allclose((made[start : start + 64] - piece).abs(), want, atol=1e-5)
    assert torch.equal(NormalFloat()(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_packed_weights_take_the_bytes_they_claim_and_come_back_to_the_bit(tmp_path):
    made = tiny(Run(tmp_path / "run", device="cpu", quiet=True))
    made.save(tmp_path)
    packed, plan = made["student-nf4"].model, made["student-nf4"].plan
    folder = tmp_path / "students" / "student-nf4"
    from safetensors.torch import load_file

    stored, packs = load_file(folder / "model.safetensors"), [e for e in plan.edits if e.kind == "pack"]
    linear = [n for n, m in packed.named_modules() if isinstance(m, nn.Linear)]
    assert [e.module for e in packs] == linear and all((e.bits, e.group) == (4, 64) for e in packs)
    for e in packs:
        layer = packed.get_submodule(e.module)
        mine = [v for k, v in stored.items() if k.startswith(f"{e.module}.weight")]
        claimed = stored_bits(layer.weight.shape, e.code(packed.state_dict()))
        assert sum(v.numel() * v.element_size() for v in mine) == claimed // 8
        scales = layer.weight.numel() / 64
        assert claimed <= 4 * layer.weight.numel() + 8 + 32 * (math.ceil(scales) + 16)  # 4.5 bits and the points
    back = stillhouse.load(folder)
    labels = torch.tensor([1, 7])
    a, b = (m.sample(labels, torch.Generator().manual_seed(1)) for m in (packed, back))
    assert torch.equal(a, b) and not torch.equal(
        a, made["student"].model.sample(labels, torch.Generator().manual_seed(1))
    )
    assert in_nf4(made["student"].model)[0] is not made["student"].model


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_the_student_exports_with_parity(tmp_path):
    made = tiny(Run(tmp_path / "run", device="cpu", quiet=True))
    export(made["student-nf4"].model, made.inputs, "torch-export", tmp_path / "student.pt2")


@pytest.mark.parametrize("mode", ["position", "least-drop"])
def test_sd3_is_pruned_repaired_packed_and_read_back(tmp_path, mode):
    network = sd3()
    teacher = Denoiser.of(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    data = Examples(noise(12, 2, 4, 4), {k: v.repeat(4, *[1] * (v.dim() - 1)) for k, v in TEXTS.items()})
    cfg = replace(TINY, mode=mode, budget=0.9, high=-1, lr=1e-3)
    made = distill(Run(tmp_path / "run", device="cpu", quiet=True), teacher, data, cfg)
    made.save(tmp_path)
    assert made.cost["stays"] < 0.9 and {"out", "feature", "task"} <= set(made.logs[0])
    for name in ("student", "student-nf4"):
        back = stillhouse.load(tmp_path / "students" / name)
        a, b = (m.sample(TEXTS, torch.Generator().manual_seed(0)) for m in (made[name].model, back))
        assert torch.equal(a, b) and a.shape == (3, 2, 4, 4) and back.process.shift == 3.0
    assert back.network.__class__.__name__ == "SD3Transformer2DModel"


def test_sd3_hears_the_time_it_was_trained_with():
    denoiser = Denoiser.of(sd3(), diffusers.FlowMatchEulerDiscreteScheduler())
    t = torch.tensor([0.01, 0.5, 0.9])
    said = denoiser.predict(IMAGES["sd3"]["hidden_states"], t, TEXTS)
    with torch.no_grad():
        assert torch.equal(said, denoiser.network(**IMAGES["sd3"]).sample)


class Packed(nn.Module):
    """Flux on samples (n, 4, 4): it wants ids beside its tokens, and times in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.inner = flux()

    def forward(self, x: Tensor, t: Tensor, **texts: Tensor) -> Tensor:
        ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3)}
        return self.inner(hidden_states=x, timestep=t, **texts, **ids).sample


def test_flux_in_a_module_of_ones_own(tmp_path):
    teacher = Denoiser(Packed(), Flow(1.0), "flow_prediction")
    data = Examples(noise(12, 4, 4), {k: v.repeat(4, *[1] * (v.dim() - 1)) for k, v in TEXTS.items()})
    cfg = replace(TINY, mode="hybrid", blocks=(2,), components=("attn", "ff", "ff_context"), budget=0.8, high=-1)
    made = distill(Run(tmp_path / "run", device="cpu", quiet=True), teacher, data, cfg)
    assert "inner.single_transformer_blocks.0" in made.notes[0] and made.cost["stays"] < 0.8
    made.save(tmp_path)
    folder = tmp_path / "students" / "student-nf4"
    base = ManySteps(Packed(), Flow(1.0), "flow_prediction", (4, 4), steps=TINY.sample_steps)
    back = stillhouse.load(folder, base=base)
    a, b = (m.sample(TEXTS, torch.Generator().manual_seed(0)) for m in (made["student-nf4"].model, back))
    assert torch.equal(a, b)


def test_noise_prediction_works_as_well(tmp_path):
    network = digits_transformer(16, 3, 2, seed=1)
    teacher = Denoiser(network, VP.linear(), "epsilon", null=NULL)
    made = distill(Run(tmp_path, device="cpu", quiet=True), teacher, few(), replace(TINY, high=1))
    assert made.inputs["t"].dtype == torch.int64
    made.save(tmp_path)
    back = stillhouse.load(tmp_path / "students" / "student")
    assert torch.equal(back.process.alpha_bar, VP.linear().alpha_bar)


# -- the user's way --------------------------------------------------------------------------------------------------

MINE = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from stillhouse.diffusion.digits import digits_transformer

def teacher():
    return digits_transformer(16, 4, 2, seed=5), FlowMatchEulerDiscreteScheduler()

def data():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10

def good(samples, labels):
    return -samples.square().flatten(1).mean(1)
"""
FAST = ["--steps", "2", "--batch", "4", "--calibration", "3", "--sample-steps", "1", "--quiet", "--device", "cpu"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine_hp.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_users_network_data_and_metric(place, capsys):
    flags = ["--model", "mine_hp:teacher", "--data", "mine_hp:data", "--metric", "mine_hp:good", "--high", "2", *FAST]
    assert cli.invoke(["run", "hierarchical_prune", "--out", "out", *flags]) == 0
    assert stillhouse.load("out/students/student-nf4").sample(torch.tensor([3])).shape == (1, 1, 8, 8)
    assert (place / "out/report.html").exists()


def test_a_users_sd3_folder_with_latents_and_texts_from_a_file(place, capsys):
    from safetensors.torch import save_file

    sd3().save_pretrained("sd3/transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained("sd3/scheduler")
    save_file(
        {"x0": noise(20, 2, 4, 4), **{k: v[:1].repeat(20, *[1] * (v.dim() - 1)) for k, v in TEXTS.items()}},
        "d.safetensors",
    )
    flags = ["--model", "sd3", "--data", "d.safetensors", "--budget", "0.9", "--high", "2", *FAST]
    assert cli.invoke(["run", "hierarchical_prune", "--out", "out", *flags]) == 0
    assert stillhouse.load("out/students/student").process.shift == 3.0


def test_examples_from_sets_of_images():
    train, test = load_examples("digits", (1, 8, 8))
    assert (len(train), len(test)) == (1258, 539) and float(train.x0.min()) == -1 and float(train.x0.max()) == 1
    from stillhouse.data import load
    from stillhouse.diffusion.digits import all_of, digits

    x, _ = pixels(load("digits", limit=100).train)  # a part of a normalised set
    assert len(x) == 100 and float(x.min()) == pytest.approx(-1, abs=1e-5)
    assert torch.allclose(train.x0, all_of(digits().train)[0], atol=1e-5)
    batch = train.noised(7, lambda n, g: torch.rand(n, generator=g)).batch(Clock(step=3))
    assert {k: len(v) for k, v in batch.items()} == dict.fromkeys(("input", "noise", "time", "chance", "condition"), 7)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0.0}, "budget"), ({"mode": "manual"}, "give --blocks"), ({"blocks": (1,)}, "drop them"),
        ({"components": ("fff",)}, "no component 'fff'.*ff"), ({"metric": "nice"}, "metric"), ({"steps": -1}, "steps"),
        ({"task": 0.0, "output": 0.0, "feature": 0.0}, "weights"), ({"drop": 1.0}, "drop"), ({"lr": 0.0}, "lr"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(changes, said):
    with pytest.raises(UserError, match=said) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"low": 3, "high": 2}, "blocks 0 to 3"), ({"mode": "manual", "blocks": (9,)}, "no block 9.*0 to 3"),
        ({"budget": 0.1, "high": 1}, "cannot be met"), ({"train_blocks": (7,)}, "no block 7"),
        ({"budget": 1.0, "mode": "manual", "blocks": (3,), "train_blocks": (3,)}, "nothing is left to learn"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_network(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        tiny(Run(tmp_path, device="cpu", quiet=True), replace(TINY, **changes))


def test_mistakes_of_the_command_are_one_line_and_code_2(place, capsys):
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(3, 1)}, "bad.safetensors")
    save_file({"x0": torch.zeros(3, 1, 8, 8), "label": torch.zeros(2)}, "few.safetensors")
    save_file({"x0": torch.zeros(3, 4, 8, 8)}, "other.safetensors")
    mine = ["--model", "mine_hp:teacher"]
    cases = {
        ("--data", "digits"): "takes --model",
        (*mine,): "and --data",
        (*mine, "--data", "bad.safetensors"): "tensor 'x0'",
        (*mine, "--data", "few.safetensors"): "equally many",
        (*mine, "--data", "other.safetensors"): "the teacher's (1, 8, 8)",
        (*mine, "--data", "mine_hp:good"): "raised TypeError",
        (*mine, "--data", "nothing"): "unknown data",
        (*mine, "--data", "mine_hp:data", "--metric", "mine_hp:goood"): "no 'goood'",
        (*mine, "--mode", "manual", "--blocks", "1", "--budget", "0.5"): "--budget does nothing here: --mode manual",
        (*mine, "--train-blocks", "3", "--train", "all"): "--train does nothing here: --train-blocks",
    }
    for k, (flags, said) in enumerate(cases.items()):
        assert cli.invoke(["run", "hierarchical_prune", "--out", f"bad{k}", *flags, *FAST]) == 2, flags
        err = capsys.readouterr().err.strip()
        assert said in err and len(err.splitlines()) == 1, err


def test_what_is_no_transformer_is_refused(tmp_path):
    run = Run(tmp_path, device="cpu", quiet=True)
    with pytest.raises(UserError, match=r"needs a torch.nn.Module"):
        distill(run, Denoiser(lambda x, t: x, Flow()), Examples(noise(3, 2)))
    with pytest.raises(UserError, match="no list of blocks"):
        distill(run, Denoiser(Line(1.0).float(), Flow(), "flow_prediction"), Examples(noise(3, 2)))
    with pytest.raises(UserError, match="NaN"):
        Examples(torch.full((2, 1), math.nan))
    assert len(FINE) == 6
