"""Quantised distillation: the quantisers' closed forms and gradients, both systems, sizes on disk, mistakes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from table import Row
from torch import nn

import stillhouse
from stillhouse import Clock, Frozen
from stillhouse.cli import invoke
from stillhouse.data import Batches, load
from stillhouse.distill import Distill
from stillhouse.engine import fit
from stillhouse.errors import UserError
from stillhouse.export import export
from stillhouse.flags import parse_flags
from stillhouse.models import ModelSpec
from stillhouse.objectives import cross_entropy, kl
from stillhouse.recipes.quantized_distillation import quantizers
from stillhouse.recipes.quantized_distillation.config import Config
from stillhouse.recipes.quantized_distillation.experiment import ARMS, PRESET, STUDENT, TEACHER, TINY, rounded, tiny
from stillhouse.recipes.quantized_distillation.quantizers import Bucketed, bits_for, first_points, shared_points
from stillhouse.recipes.quantized_distillation.recipe import distill, layers_of
from stillhouse.recipes.quantized_distillation.sizes import account, huffman_length, reduction
from stillhouse.recipes.quantized_distillation.stages import Stages, gradient_norms, part_of
from stillhouse.recipes.quantized_distillation.systems import PointDistill, QuantizedDistill, asked, weights_of
from stillhouse.run import Run
from stillhouse.students.packing import grouped
from stillhouse.students.parametrized import bake, parametrize_weights, projectors, strip
from stillhouse.students.plan import Plan
from stillhouse.students.projectors import Codebook
from stillhouse.weights import cosine

MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [16]})
_SGD = {"optimizer": "sgd", "teacher_epochs": 0.0, "lr": 0.05, "quantised_lr": 0.01}
ROWS = [
    Row("quantized_distillation", "dq auto", {"method": "dq", "auto_bits": True, "bits": 3}),
    Row("quantized_distillation", "cycle", {"method": "cycle", "epochs": 2.0, "reduction": "elements"}),
    Row("quantized_distillation", "stochastic, exact, asked at random",
        {"rounding": "stochastic", "backward": "exact", "ask": "random", "bucket": 0}),
]  # fmt: skip
ZERO = [
    (
        Row("quantized_distillation", "weight 0", {"kd": 0.0}),
        Row("quantized_distillation", "labels alone", {"kd": 0.0, "teacher_epochs": 0.0}, {"teacher": None}),
    )
]
JOINT = [
    Row("quantized_distillation", f"mlp {method}", {**_SGD, "method": method}, {"student": MLP, "teacher": MLP})
    for method in ("qd", "dq")
]

G = torch.Generator().manual_seed(0)
W = torch.randn(7, 60, generator=G)  # 420 values: a full bucket of 256 and one that is filled up
CLOCK = Clock(seed=3, stage="weights", step=5, steps=10)


# -- the quantiser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group", [256, 64, 1000, 0, -1])
def test_uniform_quantiser(bits, group):
    """At most s scaled values in a bucket, an error of half a step at most, and Q(Q(v)) = Q(v)."""
    q, s = Bucketed(bits, group), 2**bits
    made, code = q(W), q.code(W)
    rows, was = grouped(made, group), grouped(W, group)
    u = (rows - code.zero[:, None]) / code.scale[:, None]
    assert all(len((r * (s - 1)).round().unique()) <= s for r in u)
    assert ((u * (s - 1)) - (u * (s - 1)).round()).abs().max() < 1e-4
    alpha, beta = was.amax(1) - was.amin(1), was.amin(1)
    assert torch.equal(code.scale, alpha) and torch.equal(code.zero, beta)
    assert ((rows - was).abs().amax(1) <= alpha / (2 * (s - 1)) + 1e-6).all()
    assert torch.allclose(q(made), made, atol=1e-6)
    by_hand = torch.tensor([round(float(x) * (s - 1)) for x in ((was[0] - beta[0]) / alpha[0])]) / (s - 1)
    assert torch.allclose(rows[0], alpha[0] * by_hand + beta[0], atol=1e-6)  # Python's round is half to even, too


def test_buckets_and_their_degenerate_cases():
    assert len(Bucketed(2, 256).code(W).scale) == 2 and len(Bucketed(2, 1000).code(W).scale) == 1
    flat = torch.full((3, 4), 0.7)
    assert torch.equal(Bucketed(2, 5).code(flat).scale, torch.ones(3)) and torch.equal(Bucketed(2, 5)(flat), flat)
    half = Bucketed(1, -1)(torch.tensor([0.0, 0.5, 1.0]))
    assert half.tolist() == [0.0, 0.0, 1.0]  # ties to even


@pytest.mark.parametrize("group", [64, 256, 0, -1])
def test_exact_gradient_is_that_of_scale_and_zero_with_the_rounding_held_still(group):
    w, up = W.clone().requires_grad_(), torch.randn(W.shape, generator=G)
    q = Bucketed(2, group, "exact")
    made = q(w)
    assert torch.equal(made, Bucketed(2, group)(W))  # the value is the quantised one, to the bit
    (grad,) = torch.autograd.grad((made * up).sum(), w)
    x = W.double().requires_grad_()
    rows = grouped(x, group)
    beta, alpha = rows.min(1, keepdim=True).values, rows.max(1, keepdim=True).values - rows.min(1, keepdim=True).values
    u = (rows - beta) / alpha
    rho = ((u * 3).round() / 3 - u).detach()
    want = (alpha * (u + rho) + beta).reshape(-1)[: W.numel()].view(W.shape)
    assert torch.allclose(want.float(), made, atol=1e-6)
    (reference,) = torch.autograd.grad((want * up).sum(), x)
    assert torch.allclose(grad.double(), reference, atol=1e-5)
    # And as the card writes it: g everywhere, ± Σ g (q − u) at the bucket's largest and smallest value.
    g = up.double().reshape(-1)
    card, flat = g.clone(), W.reshape(-1)
    size = {64: 64, 256: 256, 0: 60, -1: 420}[group]
    for k in range(math.ceil(420 / size)):
        part = slice(k * size, min(420, (k + 1) * size))
        extra = (g[part] * rho.reshape(-1)[part]).sum()
        card[k * size + int(flat[part].argmax())] += extra
        card[k * size + int(flat[part].argmin())] -= extra
    assert torch.allclose(grad.double().reshape(-1), card, atol=1e-5)


def test_plain_and_truncated_gradients():
    w, up = (3 * W).requires_grad_(), torch.randn(W.shape, generator=G)
    (plain,) = torch.autograd.grad((Bucketed(2)(w) * up).sum(), w)
    assert torch.equal(plain, up)
    cut = Bucketed(2, 256, "truncated")
    made = cut(w)
    assert made.abs().max() <= 1 and torch.equal(made, Bucketed(2)(w.detach().clamp(-1, 1)))
    (grad,) = torch.autograd.grad((made * up).sum(), w)
    assert torch.equal(grad, up * (w.abs() <= 1)) and (grad == 0).any()


def test_stochastic_rounding_is_unbiased_in_training_and_nearest_in_eval():
    q, w = Bucketed(2, -1, stochastic=True), torch.rand(2000, generator=G)
    w[:2] = torch.tensor([0.0, 1.0])
    draws = []
    for seed in range(200):
        q.seed = seed
        draws.append(q(w))
    mean = torch.stack(draws).mean(0)
    assert (mean - w).abs().mean() < 0.02 and (draws[0] != draws[1]).any()
    assert ((draws[0] * 3) - (draws[0] * 3).round()).abs().max() < 1e-5
    assert ((draws[0] - w).abs() < 1 / 3 + 1e-6).all()
    q.seed = 0
    assert torch.equal(q(w), draws[0])
    assert torch.equal(q.eval()(w), Bucketed(2, -1)(w))
    net = nn.Sequential(nn.Linear(8, 4)).train()
    want = Bucketed(2, -1)(net[0].weight.detach())
    parametrize_weights(net, ["0"], lambda path, m: Bucketed(2, -1, stochastic=True))
    bake(net)  # in training mode, and still to the nearest: what is saved does not depend on a draw
    assert torch.equal(net[0].weight, want)


# -- points ----------------------------------------------------------------------------------------------------------


def test_gradient_of_the_points_is_that_of_alpha_p_plus_beta():
    points = torch.tensor([0.05, 0.3, 0.55, 0.9])
    book, up = Codebook(2, points, 64), torch.randn(W.shape, generator=G)
    made = book(W)
    (grad,) = torch.autograd.grad((made * up).sum(), book.points)
    rows, p = grouped(W.double(), 64), points.double().requires_grad_()
    beta, alpha = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)
    index = ((rows - beta) / alpha)[..., None].sub(points.double()).abs().argmin(-1)
    want = (alpha * p[index] + beta).reshape(-1)[:420].view(W.shape)
    assert torch.allclose(made.double(), want, atol=1e-6)
    (reference,) = torch.autograd.grad((want * up).sum(), p)
    assert torch.allclose(grad.double(), reference, atol=1e-4)
    scatter = torch.zeros(4, dtype=torch.float64)
    flat, a = index.reshape(-1)[:420], alpha.expand_as(rows).reshape(-1)[:420]
    scatter.index_add_(0, flat, a * up.double().reshape(-1))
    assert torch.allclose(grad.double(), scatter, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_uniform_first_points_are_the_uniform_quantiser(bits):
    book = Codebook(bits, first_points(W, 2**bits, 64, "uniform"), 64)
    assert torch.allclose(book(W), Bucketed(bits, 64)(W), atol=1e-6)


def test_percentiles_share_the_values_out():
    points = first_points(W, 5, 256)
    rows = grouped(W, 256)
    u = ((rows - rows.amin(1, keepdim=True)) / (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True))).reshape(-1)
    ordered = u[:420].sort().values
    for k, p in enumerate(points):
        at = k * 419 / 4
        low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
        assert low - 1e-6 <= p <= high + 1e-6
    assert points[0] == 0 and points[-1] == 1 and torch.equal(points, points.sort().values)


@pytest.mark.parametrize(
    ("norms", "count", "want"),
    [
        ([1, 1, 1], 4, [4, 4, 4]),
        ([3, 1], 4, [5, 3]),
        ([1, 0, 0, 0], 8, [20, 4, 4, 4]),
        ([1, 1, 1, 1, 1.2], 5, [5, 5, 5, 5, 5]),
        ([1, 1, 2], 5, [5, 4, 6]),  # 2 + 2, 2 + 2, 2 + 4: one is missing, the smallest gets it
        ([29, 29, 42], 5, [5, 5, 5]),  # 2 + 3, 2 + 3, 2 + 4: one too many, from the largest
        ([0, 0], 4, [4, 4]),
    ],
)
def test_points_are_shared_by_gradient(norms, count, want):
    assert shared_points(norms, count) == want and sum(want) == count * len(norms)


def test_sharing_is_guarded():
    assert max(shared_points([1.0, *[0.0] * 9], 128)) == 256 and sum(shared_points([1.0, *[0.0] * 9], 128)) == 1280
    assert min(shared_points([1.0, 0.0, 0.0], 2)) == 2
    assert [bits_for(n) for n in (2, 3, 4, 5, 16, 17, 256)] == [1, 2, 2, 3, 4, 5, 8]


# -- the systems -------------------------------------------------------------------------------------------------


def nets(seed=0, layer=Bucketed, bits=2, bucket=64):
    student, teacher = MLP.build(seed=seed), MLP.build(seed=seed + 1)
    parametrize_weights(student, ["1", "3"], lambda path, m: layer(bits, bucket))
    return student, Frozen(teacher)


def batch(n=32):
    return Batches(load("digits", limit=64).train, n).batch(CLOCK)


@pytest.mark.parametrize("reduction", ["batch", "elements"])
def test_loss_and_gradient_are_taken_at_the_quantised_weights(reduction):
    cfg, b = Config(reduction=reduction), batch()
    student, teacher = nets()
    system = QuantizedDistill(student, teacher, cfg, **weights_of(cfg, 10))
    system.learn(b, CLOCK).total.backward()
    plain = copy.deepcopy(student)
    bake(plain)
    z, t = plain(b["input"]), teacher(b).logits
    divide = 10 if reduction == "elements" else 1  # the released code's KL is the mean over samples and classes
    loss = 0.3 * cross_entropy(z, b["label"]).mean() + 0.7 * kl(t, z, 2.0).mean() / divide
    loss.backward()
    for path in ("1", "3"):
        at_quantised = plain.get_submodule(path).weight.grad
        master = student.get_submodule(path).parametrizations["weight"].original.grad
        assert torch.allclose(master, at_quantised, atol=1e-6) and at_quantised.abs().sum() > 0
    if reduction == "elements":
        old = nn.functional.kl_div((z / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="none").mean()
        assert torch.allclose(4 * old, kl(t, z, 2.0).mean() / 10, atol=1e-6)


def test_the_step_moves_the_masters_and_keeps_the_running_statistics(tmp_path):
    student = STUDENT.build(seed=0)
    parametrize_weights(student, ["block1.0", "head"], lambda path, m: Bucketed(2, 64))
    cfg = Config()
    before = copy.deepcopy(student)
    system = QuantizedDistill(student, Frozen(TEACHER.build(seed=1)), cfg, **weights_of(cfg, 10))
    fit(Run(tmp_path, quiet=True, device="cpu"), "s", system, Batches(load("digits", limit=64).train, 32), steps=3)
    master = student.head.parametrizations["weight"].original
    assert len(master.unique()) > 4 * 10 and not torch.equal(master, before.head.parametrizations["weight"].original)
    assert len(student.head.weight[0].unique()) <= 8
    norm = student.block1[1]
    assert norm.num_batches_tracked == 3
    alone = copy.deepcopy(before).train()  # what it sees in the first step is the quantised network's activation
    x = Batches(load("digits", limit=64).train, 32).batch(Clock(stage="s", steps=3))["input"]
    flat = copy.deepcopy(before)
    bake(flat)
    alone.block1(x)
    assert torch.allclose(alone.block1[1].running_mean, 0.1 * flat.block1[0](x).mean((0, 2, 3)), atol=1e-6)


def test_sixteen_bits_are_plain_distillation(tmp_path):
    """The card's check 5: with 2^16 levels the loss curve is that of plain distillation within 1e-3."""
    cfg = Config()
    curves = []
    for bits in (0, 16):
        student, teacher = MLP.build(seed=0), Frozen(MLP.build(seed=1))
        how = {"optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9), "lr": cosine(), **weights_of(cfg, 10)}
        if bits:
            parametrize_weights(student, ["1", "3"], lambda path, m: Bucketed(8, 256))
            for _, _, chain in projectors(student):
                chain[0].bits = bits  # more than a file has codes for
            system = QuantizedDistill(student, teacher, cfg, **how)
        else:
            system = Distill(student, teacher, **how)
        run = Run(tmp_path / str(bits), quiet=True, device="cpu", log_every=1)
        fit(run, "s", system, Batches(load("digits", limit=300).train, 32), steps=40)
        curves.append([r["label"] + r["kd"] for r in run.log("s")])
    gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
    assert max(gaps) < 1e-3 and max(gaps) > 0 and curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("ask", ["cutoff", "random", "wrong"])
def test_samples_that_are_not_asked_learn_from_their_label(ask):
    cfg, b = Config(ask=ask, cutoff=2.8), batch()
    b["input"] *= 4  # so that the student is surer of some than of others
    student, teacher = nets()
    z = student(b["input"]).detach()
    chosen = asked(z, b["label"], cfg, CLOCK)
    assert 0 < chosen.sum() < len(chosen)
    p = z.softmax(-1)
    entropy = -(p * p.log2()).sum(-1)
    if ask == "cutoff":
        assert torch.equal(chosen, entropy > 2.8)
    elif ask == "wrong":
        assert torch.equal(chosen, z.argmax(-1) != b["label"])
    else:
        rates = torch.stack([asked(z, b["label"], cfg, replace(CLOCK, step=k)).float() for k in range(400)]).mean(0)
        assert (rates - entropy / math.log2(10)).abs().max() < 0.15
    terms = QuantizedDistill(student, teacher, cfg, **weights_of(cfg, 10)).learn(b, CLOCK).terms
    ce, teach = cross_entropy(z, b["label"]), kl(teacher(b).logits, z, 2.0)
    assert torch.allclose(terms["label"], torch.where(chosen, 0.3 * ce, ce).mean(), atol=1e-6)
    assert torch.allclose(terms["kd"], 0.7 * (teach * chosen).sum() / len(ce), atol=1e-6)


def test_the_teachers_share_is_the_same_whoever_is_asked():
    """The KL divided by the classes, whose number is the data's, and by all samples of the batch."""
    assert [weights_of(Config(reduction=r), 4)["objectives"][0].weight for r in ("batch", "elements")] == [0.7, 0.175]
    b, (student, teacher) = batch(), nets()
    terms = [
        QuantizedDistill(student, teacher, cfg, **weights_of(cfg, 10)).learn(b, CLOCK).terms
        for cfg in (Config(reduction="elements"), Config(reduction="elements", ask="cutoff", cutoff=0.0))
    ]
    for name in ("label", "kd"):
        torch.testing.assert_close(terms[0][name], terms[1][name])


def test_nobody_asked_is_plain_cross_entropy():
    cfg, b = Config(ask="cutoff", cutoff=9.0), batch()
    student, teacher = nets()
    terms = QuantizedDistill(student, teacher, cfg, **weights_of(cfg, 10)).learn(b, CLOCK)
    assert terms.terms["kd"].item() == 0
    assert torch.allclose(terms.total, cross_entropy(student(b["input"]), b["label"]).mean(), atol=1e-6)


def test_points_move_alone_and_stay_in_order(tmp_path):
    student = MLP.build(seed=0)
    before, cfg = copy.deepcopy(student), Config(method="dq")
    parametrize_weights(student, ["1", "3"], lambda path, m: Codebook(2, first_points(m.weight, 4, 64), 64))
    system = PointDistill(student, Frozen(before, copy=True), **weights_of(cfg, 10),
                          optimizer=partial(torch.optim.SGD, lr=0.5))  # fmt: skip
    (update,) = system.updates()
    assert {tuple(p.shape) for p in update.params} == {(4,)} and len(update.params) == 2
    fit(Run(tmp_path, quiet=True, device="cpu"), "s", system, Batches(load("digits", limit=64).train, 32), steps=4)
    for path in ("1", "3"):
        chain = student.get_submodule(path).parametrizations["weight"]
        assert torch.equal(chain.original, before.get_submodule(path).weight)
        assert torch.equal(chain[0].points, chain[0].points.sort().values)
        assert not torch.allclose(chain[0].points, first_points(chain.original, 4, 64))
        assert torch.equal(student.get_submodule(path).bias, before.get_submodule(path).bias)
    with torch.no_grad():
        chain[0].points.copy_(torch.tensor([0.9, 0.1, 0.4, 0.2]))
    system.after_step(CLOCK)
    torch.testing.assert_close(chain[0].points.detach(), torch.tensor([0.1, 0.2, 0.4, 0.9]))
    with pytest.raises(UserError, match="codebook"):
        PointDistill(before, None, objectives=[], label=1.0)


def test_truncated_masters_come_back():
    student, teacher = nets(layer=lambda b, g: Bucketed(b, g, "truncated"))
    system = QuantizedDistill(student, teacher, Config(), **weights_of(Config(), 10))
    original = student[1].parametrizations["weight"].original
    with torch.no_grad():
        original[0, 0] = 5.0
    system.after_step(CLOCK)
    assert original[0, 0] == 1.0 and original.abs().max() <= 1


def test_gradient_norms_are_of_the_mean_over_five_batches(tmp_path):
    model, source, run = MLP.build(seed=0), Batches(load("digits", limit=200).train, 16), Run(tmp_path, quiet=True)
    model[1].weight.requires_grad_(False)
    found = gradient_norms(model, ["1", "3"], source, run)
    assert not model[1].weight.requires_grad and all(p.grad is None for p in model.parameters())
    model[1].weight.requires_grad_(True)
    for k in range(5):
        b = source.batch(Clock(run.seed, "norms", step=k, steps_per_epoch=source.steps_per_epoch))
        (nn.functional.cross_entropy(model(b["input"]), b["label"]) / 5).backward()
    assert found == pytest.approx([float(model[i].weight.grad.norm()) for i in (1, 3)], rel=1e-5)


def test_a_cycle_follows_one_schedule_and_moves_weights_onto_the_points(tmp_path):
    whole = cosine()
    parts = [part_of(whole, k, 3)(Clock(step=s, steps=4)) for k in range(3) for s in range(4)]
    assert parts == pytest.approx([whole(Clock(step=s, steps=12)) for s in range(12)])
    family = tiny(Run(tmp_path, quiet=True, device="cpu"), replace(TINY, method="cycle", epochs=2.0))
    stages = {p.name for p in (tmp_path / "stages").iterdir()}
    assert stages == {"teacher", "full", "weights0", "points0", "weights1"}  # ends on weights
    assert len(family["q2"].model.head.weight[0].unique()) <= 8


# -- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"method": "dq", "auto_bits": True}, {"bits": 5, "bucket": 0}], ids=str)
def test_size_on_disk_is_the_size_claimed_and_the_file_gives_the_student_back(changes, tmp_path):
    family = tiny(Run(tmp_path, quiet=True, device="cpu"), replace(TINY, **changes))
    family.save(tmp_path)
    small = family.members[-1]
    assert family.cost["baked_difference"] == 0
    size = account(small.model, small.plan, tmp_path / "students" / small.name)
    assert size["tensors"] == size["claimed"] and size["claimed"] < size["file"] < size["claimed"] + 6000
    full = account(family["full"].model, Plan.identity(family["full"].model), tmp_path / "students/full")
    assert full["claimed"] == full["tensors"] == size["full"] > 2 * size["tensors"]
    by_hand = sum(-(-r["values"] * r["bits"] // 8) + 4 * 2 ** r["bits"] + 8 * r["groups"] for r in size["layers"])
    assert by_hand + size["unquantised"] == size["claimed"]
    again = stillhouse.load(tmp_path / "students" / small.name)
    x = load("digits", limit=64).test.take(torch.arange(5).numpy())["input"]
    with torch.no_grad():
        assert torch.equal(again(x), small.model(x))
    values = sum(r["values"] for r in size["layers"])
    paper = (
        size["unquantised"] * 8 + values * size["huffman_bits"] + 64 * sum(r["groups"] for r in size["layers"])
    ) / 8
    assert size["huffman"] == pytest.approx(paper) and 0 < size["huffman_bits"] <= max(
        r["bits"] for r in size["layers"]
    )


def test_huffman_and_reduction():
    assert huffman_length([8, 4, 2, 1, 1]) == pytest.approx((8 * 1 + 4 * 2 + 2 * 3 + 2 * 4) / 16)
    assert huffman_length([1] * 16) == 4 and huffman_length([7]) == 0 and huffman_length([0, 3, 3]) == 1
    counts = [5, 9, 12, 13, 16, 45]  # the textbook's example: 224 bits for 100 symbols
    assert huffman_length(counts) == pytest.approx(2.24)
    assert reduction(2, 256) == pytest.approx(8192 / 576)


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_the_student_is_exported_with_parity(to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    model, _ = rounded(STUDENT.build(seed=0).eval(), 2, 64)
    found = export(model, torch.zeros(1, 1, 8, 8), to, tmp_path / "student")
    assert found.max_rel_diff < 1e-4


def test_the_report_counts_the_bytes_that_lie_on_disk(tmp_path):
    family = tiny(Run(tmp_path, quiet=True, device="cpu"), replace(TINY, teacher_epochs=0.0, bits=2))
    family.save(tmp_path)
    rows = {r.name: r for r in family.measure(load("digits", limit=64), tmp_path)[0]}
    size = account(family["q2"].model, family["q2"].plan)
    statistics = sum(b.nbytes for n, b in family["q2"].model.named_buffers() if "running" in n or "tracked" in n)
    assert rows["q2"].metrics["weight_bytes"] == size["claimed"] - statistics
    assert rows["q2"].metrics["weight_bytes"] < rows["full"].metrics["weight_bytes"] / 4


def test_text_students_quantise_their_embeddings(tmp_path):
    from stillhouse.text.classifiers import Bag

    bag = Bag(40, 2, width=8)
    made, plan = rounded(bag, 2, 64)
    assert [e.module for e in plan.edits] == ["embed", "hidden.0", "head"] and len(made.embed.weight[:8].unique()) <= 4


class Attending(nn.Module):
    """A network with torch's own attention, whose queries, keys and values are one parameter."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 10)

    def forward(self, x):
        rows = x.flatten(1, 2)
        return self.head(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(
    "changes", [{}, {"method": "dq", "auto_bits": True}, {"method": "cycle", "epochs": 2}], ids=str
)
def test_attention_of_torch_is_quantised_with_its_packed_projections(changes, tmp_path):
    cfg = Config(**{"kd": 0.0, "student_epochs": 0, "epochs": 1, "bits": 2, "bucket": 64, "batch": 32, **changes})
    run, base = Run(tmp_path, quiet=True, device="cpu"), Attending()
    family = distill(run, load("digits", limit=64), base, [], cfg)
    small = family["q2"].model
    packed = {e.name for e in family["q2"].plan.edits if e.module == "attention"}
    most = 2 ** family["q2"].plan.edits[0].bits
    assert (
        packed == {"attention.in_proj_weight"} and len(small.attention.in_proj_weight.flatten()[:64].unique()) <= most
    )
    assert len(small.attention.out_proj.weight.flatten().unique()) <= most and family.cost["baked_difference"] == 0
    assert "3 layers, 88.9 % of the parameters" in family.notes[0]
    family.save(tmp_path)
    x = load("digits", limit=64).test.take(torch.arange(5).numpy())["input"]
    with torch.no_grad():
        assert torch.equal(stillhouse.load(tmp_path / "students/q2", base=Attending())(x), small(x))
    assert layers_of(nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=4), nn.Linear(8, 8)])) == ["0.out_proj", "1"]


def test_points_are_learned_from_the_unquantised_student(tmp_path, monkeypatch):
    seen, plain = [], Stages.fit

    def spied(self, name, system, epochs):
        seen.append((name, system, copy.deepcopy(system.student)))
        return plain(self, name, system, epochs)

    monkeypatch.setattr(Stages, "fit", spied)
    tiny(Run(tmp_path, quiet=True, device="cpu"), replace(TINY, method="dq", teacher_epochs=0.0))
    (_, full, _), (name, points, student) = seen
    assert name == "points" and points.teacher is not full.teacher
    b, coarse = batch(), student.eval()(batch()["input"])
    strip(student)
    assert torch.allclose(student(b["input"]), points.teacher(b).logits, atol=1e-5)
    assert not torch.allclose(coarse, points.teacher(b).logits, atol=1e-2)


def test_every_setting_reaches_its_stage(tmp_path, monkeypatch):
    systems, made = {}, {}

    def spied(self, name, system, epochs):
        systems[name], self.last = system, name
        made[name] = [copy.deepcopy(chain[0]) for _, _, chain in projectors(system.student)]

    monkeypatch.setattr(Stages, "fit", spied)
    how = {"lr": 0.3, "quantised_lr": 0.2, "point_lr": 0.1, "bits": 3, "bucket": 32, "temperature": 3.0, "clip": 2.0}
    uses = {"backward": "exact", "rounding": "stochastic", "points": "uniform", "method": "cycle", "epochs": 2.0}
    distill(Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=64), MLP, MLP.build(), Config(**how, **uses))
    assert list(systems) == ["full", "weights0", "points0", "weights1"]
    for name, system in systems.items():
        (update,) = system.updates()
        optimizer = update.optimizer([nn.Parameter(torch.zeros(1))])
        assert optimizer.defaults["lr"] == {"f": 0.3, "w": 0.2, "p": 0.1}[name[0]]
        assert update.clip == 2.0 and system.objectives[0].options == {"T": 3.0}
    for q in made["weights0"]:
        assert (q.bits, q.group, q.backward_style, q.stochastic) == (3, 32, "exact", True)
    for book in made["points0"]:
        assert book.group == 32 and torch.equal(book.points.detach(), torch.arange(8).float() / 7)


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--teacher is missing"]),
        (["--bits", "9"], ["1 to 8", "9"]),
        (["--bucket", "-3"], ["bucket", "-3"]),
        (["--auto-bits"], ["auto_bits", "dq"]),
        (["--kd", "1.5"], ["kd in [0, 1]"]),
        (["--kd", "0", "--exclude", "blok1"], ["no module 'blok1'", "block1"]),
        (["--kd", "0", "--include", "pool"], ["AdaptiveAvgPool2d is not supported"]),
        (["--kd", "0", "--exclude", "*"], ["no layer to quantise"]),
        (["--kd", "0", "--epochs", "0"], ["epochs > 0"]),
        (["--kd", "0", "--ask", "wrong"], ["--ask does nothing here", "--kd 0 asks no teacher"]),
        (["--method", "dq", "--backward", "exact"], ["--backward does nothing here", "--method qd"]),
        (["--points", "uniform"], ["--points does nothing here", "--method dq"]),
        (["--cutoff", "1"], ["--cutoff does nothing here", "--ask cutoff"]),
        (
            ["--teacher", "runs/none/students/p00", "--student", "stillhouse:mlp"],
            ["no runs/none/students/p00/plan.json", "RUN/students/NAME"],
        ),
        (
            ["--kd", "0", "--model", "torchvision:mobilenet_v3_small"],
            ["cannot take inputs", "(1, 8, 8)", "digits"],
        ),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = ["--data", "digits", "--limit", "64", "--quiet", "--out", str(tmp_path / "x")]
    code = invoke(["run", "quantized_distillation", *common, *flags])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


@pytest.mark.parametrize("flags", [["--teacher", "stillhouse:mlp"], ["--student", "stillhouse:mlp"]], ids=str)
def test_a_network_of_ones_own_is_not_trained_as_that_of_the_built_in_experiment(flags):
    options, cfg = parse_flags("quantized_distillation", ["--out", "x", *flags])
    assert options.own and cfg == Config() and not cfg.teacher_epochs
    options, cfg = parse_flags("quantized_distillation", ["--out", "x", "--method", "dq"])
    assert not options.own and cfg == replace(PRESET, method="dq")


@pytest.mark.parametrize(
    "given", [{"method": "dq", "auto_bits": True}, {"backward": "exact"}, {"method": "cycle"}], ids=str
)
def test_arms_are_what_their_names_say_whatever_is_asked_for(given):
    for arm, changes in ARMS.items():
        cfg = replace(replace(PRESET, **given), **changes)
        method, bits = arm.split(",")[0].lower(), int(arm.split()[1])
        assert (cfg.method, cfg.bits) == (method, bits) and cfg.auto_bits == arm.endswith("auto")
        assert method != "qd" or cfg.backward == ("exact" if arm.endswith("exact") else "plain")


def test_a_teacher_is_asked_for_where_one_is_needed(tmp_path):
    run, data = Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=64)
    with pytest.raises(UserError, match="a teacher is needed"):
        distill(run, data, MLP, [], Config())
    with pytest.raises(UserError, match=r"student gives 4 logits.*10 classes"):
        distill(run, data, ModelSpec("stillhouse:mlp", 4, (1, 8, 8)), MLP.build(), Config())
    own = Config(method="dq", student_epochs=0, epochs=1, bits=2)
    assert distill(run, data, MLP.build(seed=1), [], own).base_name == ""


def test_empty_tensors_are_refused():
    with pytest.raises(UserError, match="no values to quantise"):
        Bucketed(2)(torch.zeros(0, 3))
    assert quantizers.MOST == 256
