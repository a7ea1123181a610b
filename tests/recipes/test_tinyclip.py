"""TinyCLIP: the card's exact checks, inheritance, gates and their folding, pairs, and mistakes told before a step."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse import objectives as O
from stillhouse.cli import invoke
from stillhouse.data import Arrays, load
from stillhouse.engine import fit
from stillhouse.errors import UserError
from stillhouse.export import export
from stillhouse.recipes.tinyclip.experiment import ARMS, OPTIONS, PRESET, TINY, claims, given, small_clip, tiny
from stillhouse.recipes.tinyclip.gates import Gates
from stillhouse.recipes.tinyclip.measure import class_features, features, quality, retrieval, zero_shot
from stillhouse.recipes.tinyclip.recipe import Config, distill
from stillhouse.recipes.tinyclip.stages import manual_sizes, names_of, refresh
from stillhouse.recipes.tinyclip.system import PROJECTIONS, TinyClip
from stillhouse.run import Run
from stillhouse.students.gates import HardConcrete
from stillhouse.students.plan import Keep, Plan
from stillhouse.students.towers import inherited, towers
from stillhouse.system import Clock
from stillhouse.teachers import Frozen, state_fingerprint
from stillhouse.text.pairs import caption_data, open_pairs
from stillhouse.weights import linear_warmup

transformers = pytest.importorskip("transformers")

AUTO = {"inherit": "auto", "gate_lr": 2.0, "keep": (0.7, 0.4)}
ROWS = [
    Row("tinyclip", "gates", AUTO),
    Row("tinyclip", "fresh, mixed loss", {"inherit": "fresh", "alpha": 0.6, "scale": 0.0, "teacher_epochs": 0.0}),
    Row("tinyclip", "narrow", {"keep": (0.5,), "image_width": (8,), "text_width": (8,)}),
]
ZERO = [  # without the teacher's affinities a stage is InfoNCE alone, which the teacher's own training is
    (
        Row("tinyclip", "alpha 0", {"alpha": 0.0, "keep": (1.0,), "epochs": 2.0, "teacher_epochs": 0.0}),
        Row("tinyclip", "plain", {"keep": (1.0,), "epochs": 0.0, "teacher_epochs": 2.0}),
    ),
]
SGD = {"optimizer": "sgd", "lr": 0.01, "teacher_epochs": 0.0, "batch": 31}  # 31: the processes' shares differ
JOINT = [
    Row("tinyclip", "sgd", {**SGD, "keep": (0.5,), "alpha": 0.7, "scale": 0.0}),
    Row("tinyclip", "sgd, gates", {**SGD, "keep": (0.6,), "inherit": "auto", "gate_lr": 0.1, "mask_steps": 5}),
]


def clip(image_depth=2, text_depth=2, width=16, head=8, seed=0, double=True):
    data = open_pairs("digits", limit=20, length=8)
    model = small_clip(data, width, image_depth, text_depth, head).build(seed=seed).eval()
    with torch.no_grad():  # vectors that are not 0 and 1, so that what is cut or scaled shows
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.double() if double else model


def pairs(n=5, double=True):
    x = open_pairs("digits", limit=20, length=8).example(n)
    x["attention_mask"][1:, -1] = 0  # padding of unequal captions
    return {**x, "pixel_values": x["pixel_values"].double()} if double else x


def shaken(gates, seed=0, low=-2.5, high=3.0):
    """Gates in the middle of their range, so that some close and the others stay soft."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.modules():
            if isinstance(gate, HardConcrete):
                gate.log_alpha.copy_(torch.rand(gate.log_alpha.shape, generator=g) * (high - low) + low)
    return gates


# -- affinities -----------------------------------------------------------------------------------------------------


def affinities(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, n, generator=g, dtype=torch.float64) for _ in range(2)]


def test_where_student_and_teacher_agree_the_loss_is_the_entropy_and_its_gradient_zero():
    """(1)"""
    teacher, _ = affinities()
    student = teacher.clone().requires_grad_()
    loss = O.affinity_mimicking(teacher, student).mean()
    entropies = [torch.special.entr(a.softmax(1)).sum(1).mean() for a in (teacher, teacher.T)]
    torch.testing.assert_close(loss.detach(), sum(entropies) / 2)
    loss.backward()
    assert student.grad.abs().max() < 1e-15


def test_the_gradient_of_affinities_in_closed_form():
    """½ [softmax(A) − softmax(A')] / n of rows and of columns; the diagonal is no exception, T² is absent."""
    teacher, student = affinities()
    teacher.requires_grad_()
    student.requires_grad_()
    O.affinity_mimicking(teacher, student).mean().backward()
    n = len(student)
    by_hand = sum((student.softmax(d) - teacher.softmax(d)) / (2 * n) for d in (0, 1)).detach()
    torch.testing.assert_close(student.grad, by_hand)
    assert teacher.grad is None
    rows = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    columns = -(teacher.softmax(0) * student.log_softmax(0)).sum(0)
    torch.testing.assert_close(O.affinity_mimicking(teacher, student), (rows + columns) / 2)


def test_a_single_pair_has_nothing_to_mimic():
    """(5)"""
    teacher, student = affinities(1)
    assert O.affinity_mimicking(teacher, student).item() == 0.0 == O.info_nce(student).item()


def test_affinities_are_of_unit_vectors_of_any_width():
    g = torch.Generator().manual_seed(0)
    i, t = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    wanted = torch.stack([torch.stack([50 * F.cosine_similarity(a, b, dim=0) for b in t]) for a in i])
    torch.testing.assert_close(O.affinity(7 * i, t / 3, 50.0), wanted)
    labels = torch.arange(4)
    both = (F.cross_entropy(wanted, labels, reduction="none") + F.cross_entropy(wanted.T, labels, reduction="none")) / 2
    torch.testing.assert_close(O.info_nce(wanted), both)
    with pytest.raises(UserError, match="of one space"):
        O.affinity(i, torch.zeros(4, 2))
    with pytest.raises(UserError, match=r"are \(n, n\), got \(4, 2\)"):
        O.info_nce(torch.zeros(4, 2))


# -- inheritance by hand --------------------------------------------------------------------------------------------


def test_inheritance_of_the_same_sizes_is_the_identity():
    """(2)"""
    model = clip()
    for tower, depth in zip(towers(model), (2, 2), strict=True):
        assert inherited(model, tower) == inherited(model, tower, depth, 16) == []
    same = Plan.identity(model).then().build(model)
    assert state_fingerprint(same) == state_fingerprint(model)


@pytest.mark.parametrize(
    ("have", "keep", "source"), [(12, 9, range(9)), (12, 6, range(0, 12, 2)), (5, 2, (0, 2)), (6, 1, (0,))]
)
def test_every_step_th_block_from_the_front(have, keep, source):
    model = clip(image_depth=have)
    image, _ = towers(model)
    (edit,) = inherited(model, image, keep)
    assert edit.source == tuple(source)
    small = Plan.identity(model).then(edit).build(model)
    for i, k in enumerate(source):
        for a, b in zip(image.layers(small)[i].parameters(), image.layers(model)[k].parameters(), strict=True):
            assert torch.equal(a, b)
    assert small.config.vision_config.num_hidden_layers == keep and small.config.text_config.num_hidden_layers == 2
    assert model.config.vision_config.num_hidden_layers == have


def test_width_keeps_leading_slices_of_every_tensor():
    """The narrow student is a CLIPModel of the narrow configuration whose tensors are leading slices of the base's."""
    model = clip(image_depth=4, width=16, head=4)
    edits = [e for tower in towers(model) for e in inherited(model, tower, 2, 8)]
    small = Plan.identity(model).then(*edits).build(model)
    from stillhouse.students.towers import tell_sizes

    tell_sizes(small)
    plain = transformers.CLIPModel(small.config).double().eval()
    own, base = plain.state_dict(), model.state_dict()
    for name, value in own.items():
        source = name.replace("vision_model.encoder.layers.1.", "vision_model.encoder.layers.2.")
        value.copy_(base[source][tuple(slice(n) for n in value.shape)])
    x = pairs()
    for a, b in zip(small(**x)[:2], plain(**x)[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert small.config.vision_config.hidden_size == 8 and towers(small)[0].heads(small) == [2, 2]
    assert len(own) == len(small.state_dict())


def test_sizes_of_stages():
    model = clip(image_depth=6, text_depth=2)
    assert manual_sizes(model, Config(keep=(0.75, 0.5, 0.1))) == [
        [(5, 0), (2, 0)], [(3, 0), (1, 0)], [(1, 0), (1, 0)]
    ]  # fmt: skip
    cfg = Config(keep=(0.8, 0.4), image_depth=(6, 4), text_width=(16, 8))
    assert manual_sizes(model, cfg) == [[(6, 0), (2, 16)], [(4, 0), (1, 8)]]
    assert names_of((1.0, 0.5, 0.5)) == ["keep100", "keep50", "keep50b"]


def test_fresh_weights_are_fresh_seeded_and_of_the_same_shape():
    models = [Plan.identity(m).then(*inherited(m, towers(m)[0], 1, 8)).build(m) for m in (clip(),) * 3]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        refresh(model, seed)
    a, b, c = (m.vision_model.encoder.layers[0].mlp.fc1.weight for m in models)
    assert a.shape == (16, 8) and torch.equal(a, b) and not torch.equal(a, c)


# -- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.0, -1.0])
def test_the_part_of_open_gates_is_their_probability(a):
    """(3)"""
    z = HardConcrete(100_000, start=a)(torch.Generator().manual_seed(0))
    want = 1 / (1 + math.exp(-(a + 2 / 3 * math.log(11))))
    assert abs(float((z > 0).float().mean()) / want - 1) < 0.01
    assert a or abs(want - 0.8318) < 1e-4


def test_gates_settle_softly_and_as_many_close_as_expected():
    gate = HardConcrete(5).double()
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([3.0, -9.0, 0.5, -8.0, 0.2]))
    closed = round(5 - float(gate.open_probability().detach().sum()))
    assert closed == 2
    by_hand = torch.sigmoid(0.8 * gate.log_alpha.detach() * 1.5) * torch.tensor([1.0, 0, 1, 0, 1])
    torch.testing.assert_close(gate.settled(), by_hand)
    with torch.no_grad():
        gate.log_alpha.fill_(-20.0)
    assert int((gate.settled() > 0).sum()) == 1  # a block without a head or a neuron is not made


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_gates_settle_to_a_budget_by_neurons_alone(part):
    """Opened are the surest of the shut, shut the least sure of the open; each block keeps one."""
    model = clip(image_depth=2, text_depth=1)
    gates = shaken(Gates(model))
    before, asked = gates.settled(), part * gates.whole
    after = gates.settled(keep=asked)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.hidden, new.hidden) and all(map(torch.equal, old.heads, new.heads))
        assert all(bool((n > 0).any()) for n in new.neurons)
    copy_ = copy.deepcopy(model)
    kept = Plan.identity(copy_).then(*gates.fold_(copy_, after)).build(copy_)
    left, rest = sum(t.prunable(kept) for t in towers(kept)), 0
    for g, old, new in zip(gates.each, before, after, strict=True):
        for gate, was, now in zip(g.neurons, old.neurons, new.neurons, strict=True):
            opened, shut = (now > 0) & (was == 0), (now == 0) & (was > 0)
            assert not (opened.any() and shut.any())
            if opened.any() and (now == 0).any():
                assert gate.log_alpha[opened].min() >= gate.log_alpha[now == 0].max()
            rest += int((now == 0).sum()) if left < asked else int((now > 0).sum()) - 1
    widest = 2 * max(int((z.hidden != 0).sum()) for z in after)
    assert abs(left - asked) <= widest or rest == 0  # as nearly as neurons allow


def test_expected_weights_by_counting():
    model = clip(image_depth=2, text_depth=1)
    gates = shaken(Gates(model))
    total = 0.0
    for g in gates.each:
        q = [x.open_probability().tolist() for x in (g.hidden, *g.heads, *g.neurons)]
        blocks = len(g.heads)
        per_head = 4 * 8 * 16  # of q, k, v and output, over all of the stream
        total += sum(h * j * per_head / 16 for h in q[0] for b in q[1 : 1 + blocks] for j in b)
        total += 2 * sum(h * m for h in q[0] for b in q[1 + blocks :] for m in b)
    whole = sum(t.prunable(model) for t in towers(model))
    assert whole == 3 * (4 * 16 * 16 + 2 * 16 * 32) == gates.whole
    assert float(gates.sparsity().detach()) == pytest.approx(1 - total / whole, abs=1e-6)
    opened = Gates(model, whole=2 * whole, start=20.0)
    assert float(opened.sparsity().detach()) == pytest.approx(0.5, abs=1e-6)  # against what there was at first


def norm(x, layer, kept):
    """Layer norm over the kept channels alone, by selecting them."""
    out = torch.zeros_like(x)
    out[..., kept] = F.layer_norm(x[..., kept], (len(kept),), layer.weight[kept], layer.bias[kept], layer.eps)
    return out


def test_where_gates_multiply_by_hand():
    """The image tower with soft gates, written out: stream, per head, per neuron, and norms over open channels."""
    model, x = clip(), pairs()
    gates = shaken(Gates(model)).double().eval()
    z = gates.settled()
    with gates.on(model, z), torch.no_grad():
        found = model.get_image_features(pixel_values=x["pixel_values"]).pooler_output
    z, vision = z[0], model.vision_model
    kept = z.hidden.nonzero().flatten()
    assert 0 < len(kept) < 16 and float(z.hidden.max()) < 1
    with torch.no_grad():
        e = vision.embeddings
        patches = F.conv2d(x["pixel_values"], e.patch_embedding.weight, stride=e.patch_size).flatten(2).mT
        h = torch.cat([e.class_embedding.expand(len(patches), 1, -1), patches], 1) + e.position_embedding.weight
        h = norm(h * z.hidden, vision.pre_layrnorm, kept)
        for block, heads, neurons in zip(vision.encoder.layers, z.heads, z.neurons, strict=True):
            a, u = block.self_attn, norm(h, block.layer_norm1, kept)
            q, k, v = (p(u).unflatten(-1, (2, 8)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            context = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v * heads.view(-1, 1, 1)
            h = h + a.out_proj(context.transpose(1, 2).flatten(2)) * z.hidden
            m = block.mlp
            h = h + m.fc2(m.activation_fn(m.fc1(norm(h, block.layer_norm2, kept))) * neurons) * z.hidden
        wanted = model.visual_projection(norm(h[:, 0], vision.post_layernorm, kept))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_folded_model_answers_like_the_gated_one(seed):
    """(4), with causal mask and padding; its attention is as wide as its heads, not as its stream."""
    model, x = clip(image_depth=3), pairs()
    gates = shaken(Gates(model), seed).double().eval()
    values = gates.settled()
    with torch.no_grad():
        free = model(**x)
        with gates.on(model, values):
            wanted = model(**x)
        again = model(**x)
        small = Plan.identity(model).build(model)
        cut = gates.fold_(small, values)
        small = Plan.identity(small).then(*cut).build(small)
        found = small(**x)
    for key in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-10)
        assert torch.equal(free[key], again[key]) and (free[key] - wanted[key]).abs().max() > 1e-2
    image, _ = towers(small)
    assert image.hidden(small) == int((values[0].hidden > 0).sum()) < 16
    assert image.heads(small) == [int((h > 0).sum()) for h in values[0].heads]
    assert image.neurons(small) == [int((n > 0).sum()) for n in values[0].neurons]
    left = sum(t.prunable(small) for t in towers(small))
    expected = float((1 - gates.sparsity().detach()) * gates.whole)
    assert abs(left / expected - 1) < 0.25  # rounding of a few gates; the budget claim is of real sizes


def test_open_gates_change_nothing_and_cut_nothing():
    model, x = clip(), pairs()
    gates = Gates(model, start=100.0).double().eval()
    with torch.no_grad():
        wanted = model(**x).logits_per_image
        with gates.on(model, gates.settled()):
            torch.testing.assert_close(model(**x).logits_per_image, wanted)
    assert gates.fold_(model, gates.settled()) == []


def learner(cfg, gates=True, seed=0, **how):
    teacher, student = clip(seed=1, double=False), clip(seed=seed, double=False)
    made = Gates(student) if gates else None
    return TinyClip(student, Frozen(teacher, taps=PROJECTIONS), cfg, gates=made, **how)


def batch(n=6):
    return {"input": pairs(n, double=False), "label": torch.zeros(n), "id": torch.arange(n)}


def test_the_terms_by_hand():
    system = learner(Config(alpha=0.25, weight=2.0, scale=20.0), gates=False).eval()
    found = system.learn(batch(), Clock()).terms
    own, told = system.student(**batch()["input"]), system.teacher._model(**batch()["input"])
    a, b = (20 * m.image_embeds @ m.text_embeds.T for m in (own, told))
    soft = (F.cross_entropy(a, b.softmax(1)) + F.cross_entropy(a.T, b.T.softmax(1))) / 2
    hard = (F.cross_entropy(a, torch.arange(6)) + F.cross_entropy(a.T, torch.arange(6))) / 2
    torch.testing.assert_close(found["affinity"], 2 * 0.25 * soft)
    torch.testing.assert_close(found["contrast"], 2 * 0.75 * hard)
    assert set(found) == {"affinity", "contrast"}


def test_the_logit_scale_is_fixed_or_learned_within_its_bounds(tmp_path):
    fixed = learner(Config(), gates=False)
    assert float(fixed.student.logit_scale.detach()) == pytest.approx(math.log(50))
    assert not any(p is fixed.student.logit_scale for p in fixed.updates()[0].params)
    free = learner(Config(scale=0.0), gates=False, teacher_scale=math.log(30.0))
    assert any(p is free.student.logit_scale for p in free.updates()[0].params)
    own, told = free.student(**batch()["input"]), free.teacher._model(**batch()["input"])
    wanted = O.affinity_mimicking(O.affinity(told.image_embeds, told.text_embeds, 30.0), own.logits_per_image).mean()
    torch.testing.assert_close(free.learn(batch(), Clock()).terms["affinity"], wanted)
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.0)):
        free.student.logit_scale.data.fill_(value)
        free.after_step(Clock())
        assert float(free.student.logit_scale.detach()) == pytest.approx(kept)


class Same:
    """One batch again and again."""

    steps_per_epoch, fingerprint = 1, "same"

    def batch(self, clock):
        return batch()


def test_gates_descend_multipliers_ascend_and_neither_follows_the_schedule(tmp_path):
    cfg = Config(optimizer="sgd", gate_lr=0.5, lr=0.1, ramp_steps=0, clip=0.0, weight_decay=0.0)
    system = learner(cfg, target=0.6, schedule=linear_warmup(10))
    shaken(system.gates, low=2.0)
    before = {n: p.detach().clone() for n, p in system.named_parameters()}
    d = 0.6 - float(system.gates.sparsity().detach())
    probe = learner(cfg, target=0.6)
    shaken(probe.gates, low=2.0)
    probe.train()
    probe.learn(batch(), Clock(stage="s", steps=1)).total.backward()
    fit(Run(tmp_path, device="cpu", quiet=True), "s", system, Same(), steps=1)
    assert d > 0 and float(system.budget.first.detach()) == pytest.approx(10 + 0.5 * d, rel=1e-6)
    assert float(system.budget.second.detach()) == pytest.approx(10 + 0.5 * d * d, rel=1e-6)
    for name, p in probe.named_parameters():
        if p.grad is not None and not name.startswith("budget"):
            rate = 0.5 if name.startswith("gates") else 0.1 * 0.1  # the tenth of a warm-up over ten steps
            after = before[name] - rate * p.grad
            after = after.clamp(math.log(1e-2), math.log(1e2)) if name.startswith("gates") else after
            torch.testing.assert_close(dict(system.named_parameters())[name].detach(), after)
    system.target = 0.0  # above the target nothing pulls back
    assert system.learn(batch(), Clock(step=5)).terms["budget"].item() == 0.0


def test_the_wanted_sparsity_rises_from_what_is_gone():
    system = learner(Config(ramp_steps=10), target=0.5)
    system.gates.whole = round(system.gates.present / 0.75)
    found = [system.wanted(Clock(step=s)) for s in (0, 5, 10, 90)]
    assert found == pytest.approx([0.25, 0.375, 0.5, 0.5], abs=1e-4)


def test_one_draw_serves_the_batch_and_all_processes():
    system = learner(Config(), target=0.5).train()
    shaken(system.gates)
    seen = []
    plain = system.gates.on
    system.gates.on = lambda model, values: seen.append(values) or plain(model, values)
    for rank, step in ((0, 3), (1, 3), (0, 4)):
        system.learn(batch(), Clock(rank=rank, world=2, step=step))
    a, b, c = (v[0].hidden for v in seen)
    assert a.shape == (16,) and torch.equal(a, b) and not torch.equal(a, c)


def test_matrices_decay_and_vectors_do_not():
    system = learner(Config(), target=0.5)
    (update,) = system.updates()
    groups = update.optimizer(update.params).param_groups
    assert [(g["weight_decay"], g["maximize"], g["lr"]) for g in groups] == [
        (0.2, False, 1e-4), (0.0, False, 1e-4), (0.0, False, 0.02), (0.0, True, 0.02)
    ]  # fmt: skip
    assert all(p.dim() > 1 for p in groups[0]["params"]) and all(p.dim() <= 1 for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(update.params) and update.whole and update.clip == 5.0


# -- whole runs -----------------------------------------------------------------------------------------------------


def test_stages_follow_one_another_and_all_learn_from_the_first_model(tmp_path):
    data = open_pairs("digits", limit=64, length=8)
    spec = small_clip(data, 16, 4, 2, 8)
    network = spec.build(seed=3)
    before = state_fingerprint(network)
    cfg = replace(TINY, keep=(0.5, 0.25), teacher_epochs=0.0)
    made = distill(Run(tmp_path, quiet=True, device="cpu"), data, spec, cfg, network=network)
    first, second = made.members
    assert made.teacher is network and state_fingerprint(network) == before
    assert [len(towers(m.model)[0].layers(m.model)) for m in made] == [2, 1]
    alone = Plan.identity(network).then(*second.plan.edits).build(network)  # the plan goes back to the first model
    assert [p.shape for p in alone.parameters()] == [p.shape for p in second.model.parameters()]
    still = distill(
        Run(tmp_path / "b", quiet=True, device="cpu"), data, spec, replace(cfg, epochs=0.0), network=network
    )
    image = towers(network)[0]
    for a, b in zip(
        image.layers(still["keep25"].model)[0].parameters(), image.layers(network)[0].parameters(), strict=True
    ):
        assert torch.equal(a, b)
    start = Plan.identity(first.model).then(*inherited(first.model, image, 1)).build(first.model)
    moved = image.layers(second.model)[0].mlp.fc1.weight - image.layers(start)[0].mlp.fc1.weight
    far = image.layers(second.model)[0].mlp.fc1.weight - image.layers(network)[0].mlp.fc1.weight
    assert 0 < float(moved.detach().norm()) < float(far.detach().norm())  # it began at the stage before


@pytest.mark.parametrize("how", ["manual", "auto"])
def test_students_reload_and_open_in_transformers_where_they_can(how, tmp_path):
    made = tiny(Run(tmp_path, quiet=True, device="cpu"), replace(TINY, **(AUTO if how == "auto" else {})))
    made.save(tmp_path)
    last, x = made.members[-1], pairs(3, double=False)
    folder = tmp_path / "students" / last.name
    model = stillhouse.load(folder)
    with torch.no_grad():
        wanted = last.model(**x).logits_per_image
        assert torch.equal(model(**x).logits_per_image, wanted)
        assert (folder / "config.json").exists() == (how == "manual")
        if how == "manual":
            torch.testing.assert_close(transformers.CLIPModel.from_pretrained(folder)(**x).logits_per_image, wanted)
    assert all(isinstance(e, Keep) for e in last.plan.edits) == (how == "auto")
    assert made.sizes[-1]["kept"] == 0.5 if how == "manual" else made.sizes[-1]["kept"] < 0.8


@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_a_gated_student_exports_with_parity(to, tmp_path):
    pytest.importorskip("onnxruntime")
    model = clip(double=False)
    gates = shaken(Gates(model)).eval()
    small = Plan.identity(model).then(*gates.fold_(model, gates.settled())).build(model)
    x = open_pairs("digits", limit=20, length=8).example(4)
    x["attention_mask"].fill_(1)  # random masks of a parity check may leave a caption without a token
    assert export(small, x, to, tmp_path / "small").max_abs_diff < 1e-3


# -- measures -------------------------------------------------------------------------------------------------------


def test_retrieval_and_zero_shot_by_hand():
    image = F.normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    text = F.normalize(torch.tensor([[1.0, 0.0], [0.1, 1.0], [1.0, 0.3]]), dim=1)
    scores = image @ text.T
    by_row = (scores.argmax(1) == torch.arange(3)).double().mean()
    by_column = (scores.argmax(0) == torch.arange(3)).double().mean()
    assert retrieval(image, text) == {"recall_text": float(by_row), "recall_image": float(by_column)}
    assert retrieval(torch.ones(4, 2), torch.ones(4, 2)) == {"recall_text": 0.0, "recall_image": 0.0}  # ties
    assert retrieval(image, text, at=3) == {"recall_text": 1.0, "recall_image": 1.0}
    found = zero_shot(image, text[:2], np.array([0, 1, 1]), 10.0)
    z = 10 * image @ text[:2].T
    assert found["nll"] == pytest.approx(float(F.cross_entropy(z.double(), torch.tensor([0, 1, 1]))), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((z.argmax(1) == torch.tensor([0, 1, 1])).double().mean()))


def test_classes_are_means_of_their_captions_and_the_teacher_is_nearest_to_itself():
    data = open_pairs("digits", limit=64, length=8, templates=("a {}", "one {} here"))
    model = small_clip(data, 16, 2, 2, 8).build(seed=0).eval()
    ids = data.prompt(4)
    with torch.no_grad():
        said = model.get_text_features(**ids).pooler_output
    mean = F.normalize(F.normalize(said, dim=1).mean(0), dim=0)
    torch.testing.assert_close(class_features(model, data)[4], mean)
    told = features(model, data.test)
    own, other = (quality(m, data, told, 50.0)["affinity_loss"] for m in (model, small_clip(data, 16).build(seed=5)))
    assert own < other


# -- pairs ----------------------------------------------------------------------------------------------------------


def test_captions_of_classes():
    data = caption_data(load("digits", limit=30), ("the digit {}", "a {} on paper"), length=6)
    x = data.train.take(np.arange(4))
    said = data.tokenizer.batch_decode(x["input"]["input_ids"], skip_special_tokens=True)
    assert said == [f"the digit {y}" for y in x["label"].tolist()]
    views = [data.train.take(np.arange(20), view=v)["input"]["input_ids"] for v in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not (
        views[0].shape == views[2].shape and torch.equal(views[0], views[2])
    )
    alone = data.train.take(np.array([7]), view=0)["input"]["input_ids"][0]
    assert torch.equal(views[0][7][: len(alone)], alone)  # as in any batch
    assert data.prompts[2] == ("the digit 2", "a 2 on paper") and len(data.test) == 539
    with pytest.raises(UserError, match="stands for the class name"):
        caption_data(load("digits", limit=30), ("a digit",))


def folder_of_pairs(home, kind):
    from PIL import Image

    home.mkdir()
    rows, other = [], {"csv": "test", "jsonl": "valid"}[kind]
    for k in range(10):
        shade = 25 * k
        Image.new("RGB", (12, 12), (shade, 255 - shade, 90)).save(home / f"{k}.png")
        split = other if k > 7 else "train"
        rows.append({"file_name": f"{k}.png", "text": f"shade number {k}", "split": split})
    if kind == "csv":
        lines = ["file_name,text,split", *(f'{r["file_name"]},"{r["text"]}, yes",{r["split"]}' for r in rows)]
        (home / "captions.csv").write_text("\n".join(lines))
    else:
        rows.append({**rows[0], "text": ["another text", "a third"]})
        (home / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_ones_own(kind, tmp_path):
    data = open_pairs(str(folder_of_pairs(tmp_path / "mine", kind)), length=8)
    assert (len(data.train), len(data.test), data.shape, data.prompts) == (8, 2, (3, 16, 16), ())
    said = data.tokenizer.batch_decode(data.example(2)["input_ids"], skip_special_tokens=True)
    assert said == (
        [f"shade number {k}, yes" for k in (0, 1)] if kind == "csv" else ["shade number 0", "shade number 1"]
    )
    assert kind == "csv" or data.train.captions[0] == ("shade number 0", "another text", "a third")
    other = open_pairs(str(tmp_path / "mine"), length=8, statistics=([0.5] * 3, [0.25] * 3))
    raw = data.example()["pixel_values"] * torch.tensor(data.train.images.std).view(-1, 1, 1)
    raw = raw + torch.tensor(data.train.images.mean).view(-1, 1, 1)
    torch.testing.assert_close(other.example()["pixel_values"], (raw - 0.5) / 0.25, rtol=1e-4, atol=1e-5)


def test_pairs_of_a_local_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    rows = [{"picture": Image.new("RGB", (8, 8), (k, 0, 0)), "words": f"red {k}"} for k in range(10)]
    table = datasets.Dataset.from_dict(
        {k: [r[k] for r in rows] for k in rows[0]},
        features=datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")}),
    )
    table.save_to_disk(str(tmp_path / "set"))
    data = open_pairs(f"hf:{tmp_path / 'set'}?image=picture&text=words", image_size=8)
    assert (len(data.train), len(data.test), data.shape) == (8, 2, (3, 8, 8))
    with pytest.raises(UserError, match="no column 'word'"):
        open_pairs(f"hf:{tmp_path / 'set'}?image=picture&text=word")


@pytest.mark.data
def test_emoji(data_root):
    data = open_pairs("emoji-captions", length=16)
    assert (len(data.train), len(data.test), data.shape) == (1322, 153, (3, 32, 32))
    assert data.train.captions[0][:2] == ("grinning face", "grinning face face smile")
    assert float(data.example(8)["pixel_values"].abs().max()) == 1.0
    assert open_pairs("emoji-captions", length=16, image_size=16, limit=50).shape == (3, 16, 16)


# -- the user's way, and mistakes -----------------------------------------------------------------------------------

MINE = """
from transformers import CLIPConfig, CLIPModel

def clip(shape, vocabulary, length):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**sizes, "vocab_size": vocabulary, "max_position_embeddings": length, "eos_token_id": 1}
    image = {**sizes, "image_size": shape[1], "patch_size": 8, "num_channels": shape[0]}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
"""


def test_a_model_and_pairs_of_ones_own_and_a_student_of_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    folder_of_pairs(tmp_path / "photos", "jsonl")
    how = ["--data", "photos", "--length", "8", "--batch", "4", "--epochs", "1", "--device", "cpu", "--quiet"]
    first = ["--model", "mine:clip", "--keep", "1.0", "0.5", "--teacher-epochs", "1", "--out", "a"]
    assert invoke(["run", "tinyclip", *how, *first]) == 0
    report = json.loads((tmp_path / "a/report.json").read_text())
    rows = {s["name"]: s for s in report["students"]}
    assert list(rows) == ["teacher", "keep100", "keep50"] and "recall_text" in rows["keep50"]["metrics"]
    assert rows["keep50"]["metrics"]["compression"] > 1 and rows["keep50"]["latency_ms"] > 0
    assert rows["keep50"]["metrics"]["weight_bytes"] < rows["teacher"]["metrics"]["weight_bytes"]
    again = ["--model", "a/students/keep50", "--inherit", "auto", "--keep", "0.5", "--mask-steps", "3", "--out", "b"]
    assert invoke(["run", "tinyclip", *how, *again, "--gate-lr", "3", "--ramp-steps", "1"]) == 0
    model = stillhouse.load(tmp_path / "b/students/keep50")
    plan = json.loads((tmp_path / "b/students/keep50/plan.json").read_text())
    assert {e.get("kind", "keep") for e in plan["edits"]} == {"depth", "keep"} and plan["base"]["name"] == "mine:clip"
    assert len(towers(model)[0].layers(model)) == 1
    saved = OPTIONS(out=tmp_path / "c", model="hf:a/students/keep50", data="photos")
    spec, network, plan, data = given(saved, Config())  # a folder that transformers reads
    assert (
        spec.name == "transformers:CLIPModel"
        and network is not None
        and (data.shape, data.train.length) == ((3, 16, 16), 8)
    )
    assert data.tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained("a/students/keep50").get_vocab()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep": (0.5, 0.75)}, "keep: expected parts in"),
        ({"keep": ()}, "keep: expected parts in"),
        ({"alpha": 1.5}, "alpha in"),
        ({"image_depth": (3,)}, "expected a positive size for each of the 2 stages"),
        ({"inherit": "auto", "text_width": (8, 8)}, "sizes by hand are for --inherit manual"),
        ({"batch": 1}, "batch: expected a number from 2, got 1"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(UserError, match=says) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


class Other(nn.Module):
    def forward(self, **x):
        return x


def test_models_and_sizes_that_do_not_fit_are_told_before_a_step(tmp_path):
    data = open_pairs("digits", limit=20, length=8)
    fits = clip(double=False)
    large = small_clip(open_pairs("digits", limit=20, length=8, image_size=12), 16, 2, 2, 8)
    cases = [
        (Other(), {}, "Other has no vision_model.embeddings.patch_embedding: an image-text model"),
        (large, {}, r"cannot take the pairs of digits \(images \(1, 8, 8\)"),
        (fits, {"keep": (0.5,), "image_depth": (3,)}, "the image tower has 2 blocks of width 16; it cannot keep 3"),
        (fits, {"keep": (0.5,), "text_width": (12,)}, "the text tower's heads are 8 wide"),
    ]
    for model, changes, says in cases:
        with pytest.raises(UserError, match=says) as error:
            distill(Run(tmp_path, quiet=True, device="cpu"), data, model, replace(TINY, **changes))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "stages").exists()


def test_pairs_that_cannot_be_read(tmp_path):
    home = folder_of_pairs(tmp_path / "a", "jsonl")
    listed = home / "metadata.jsonl"
    for line, says in (
        ('{"file_name": "x.png", "text": "t"}', "x.png does not exist"),
        ('{"file_name": "0.png"}', "metadata.jsonl:1: expected an image under"),
        ("no json", "metadata.jsonl:1: no JSON"),
        ('{"file_name": "0.png", "text": "t", "split": "test"}', "lists no training pairs"),
    ):
        listed.write_text(line)
        with pytest.raises(UserError, match=says) as error:
            open_pairs(str(home))
        assert "\n" not in str(error.value)
    listed.unlink()
    with pytest.raises(UserError, match=r"holds no captions.jsonl"):
        open_pairs(str(home))
    images = Arrays(np.zeros((2, 1, 4, 4), np.uint8), [0, 0])
    from stillhouse.text.pairs import Pairs

    for captions, says in (([("a",)], "2 images have captions for 1"), ([("a",), (" ",)], "pair 1 has no caption")):
        with pytest.raises(UserError, match=says):
            Pairs(images, captions, data_tokenizer())


def data_tokenizer():
    return open_pairs("digits", limit=20, length=8).tokenizer


def arm(**changes):
    return [{"affinity_loss": 1.0, "accuracy": 0.5, "early": None, "sparsity": 0.25, "kept": 0.75, **changes}]


def test_arms_and_claims_are_of_the_settings_asked_for():
    for given_ in ({"inherit": "auto"}, {"inherit": "fresh", "alpha": 0.0}, {"image_depth": (3,), "text_width": (16,)}):
        made = {name: replace(replace(PRESET, **given_), **changes) for name, changes in ARMS.items()}
        assert [(c.inherit, c.alpha) for c in made.values()] == [
            ("manual", 1.0), ("manual", 1.0), ("fresh", 1.0), ("manual", 0.0), ("auto", 1.0)
        ]  # fmt: skip
    names = ("inherited + affinity", "fresh + affinity", "gates + affinity")
    found = claims({n: arm() for n in names}, 0.75, [0])  # a run too short for step 100, at another size
    assert len(found) == 4 and [c.value for c in found[-2:]] == pytest.approx([0.0, 0.0])
    assert len(claims({n: arm(early=2.0) for n in names}, 0.5, [0])) == 5


def test_the_command_says_what_is_missing(tmp_path, capsys):
    flags = ["--data", "digits", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert invoke(["run", "tinyclip", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert "--model is missing" in said and said.count("\n") == 0
    assert invoke(["run", "tinyclip", "--model", f"hf:{tmp_path}/nowhere", *flags[:-1], str(tmp_path / "b")]) == 2
    assert "cannot be had as a CLIPModel" in capsys.readouterr().err
    assert invoke(["run", "tinyclip", "--alpha", "2", "--out", str(tmp_path / "c")]) == 2
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    parts = {"text_config": {**sizes, "vocab_size": 9}, "vision_config": {**sizes, "image_size": 8, "patch_size": 4}}
    other = transformers.SiglipModel(transformers.SiglipConfig(**parts))
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    for k, (more, says) in enumerate([
        (["--model", f"hf:{tmp_path / 'other'}"], "is a model of type 'siglip'; expected a CLIPModel"),
        (["--data", "nowhere", "--teacher-epochs", "1"], "emoji-captions, a folder with captions.jsonl"),
        (["--teacher-epochs", "1", "--gate-lr", "1"], "--gate-lr does nothing here: it is of --inherit auto"),
        (["--model", "mine:clip", "--teacher-lr", "1"], "--teacher-lr does nothing here"),
        (["--teacher-epochs", "1", "--inherit", "auto", "--text-depth", "1", "1"], "by hand are for --inherit manual"),
    ]):  # fmt: skip
        assert invoke(["run", "tinyclip", *flags[:-1], str(tmp_path / str(k)), *more]) == 2
        said = capsys.readouterr().err.strip()
        assert says in said and said.count("\n") == 0, said
