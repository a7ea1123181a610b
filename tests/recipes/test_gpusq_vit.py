"""GPUSQ-ViT: the card's exact checks, patterns and their bytes, ranges of activations, and mistakes."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import Batches, load
from stillhouse.engine import fit
from stillhouse.errors import UserError
from stillhouse.export import export, read_tensors
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.objectives import where_agreed
from stillhouse.outcomes import Member, Models
from stillhouse.recipes.gpusq_vit.experiment import SMALL, TINY
from stillhouse.recipes.gpusq_vit.layers import broken_groups, choose, late_blocks, stored, weight_of
from stillhouse.recipes.gpusq_vit.recipe import Config, distill
from stillhouse.recipes.gpusq_vit.stages import mask, quantize, sparsify
from stillhouse.recipes.gpusq_vit.system import Sensed, factors
from stillhouse.run import Run
from stillhouse.students.activations import FakeQuantize, Inputs, calibrate, fake_quantizers, follow_ranges, set_mode
from stillhouse.students.edits import Pack
from stillhouse.students.parametrized import bake, parametrize_weights, projectors, weight_name
from stillhouse.students.patterns import Pattern
from stillhouse.students.plan import Plan, unpacked
from stillhouse.students.projectors import NM, Half, Symmetric
from stillhouse.system import Clock
from stillhouse.taps import tap
from stillhouse.teachers import Frozen, state_fingerprint

ROWS = [
    Row("gpusq_vit", "int8, shares, dense answers", {"bits": 8, "weighting": "share", "labels": "dense"}),
    Row("gpusq_vit", "one-shot, ranges fixed", {"epochs": 0.0, "ranges": 0.0, "percentile": 99.0, "head": True}),
]
ZERO = [  # with β = γ = 0 nothing is left of either teacher: plain training of the masked, then quantised network
    (
        Row("gpusq_vit", "beta gamma 0", {"beta": 0.0, "gamma": 0.0}),
        Row("gpusq_vit", "beta gamma 0, T 9", {"beta": 0.0, "gamma": 0.0, "temperature": 9.0, "weighting": "share"}),
    ),
]
# Few weights: one that lies between two codes, or between two float16 numbers, may fall to either by a rounding.
SGD = {"optimizer": "sgd", "lr": 0.01, "quantized_lr": 0.01, "teacher_epochs": 0.0}
FEW = replace(SMALL, options={**SMALL.options, "embed_dim": 8, "depth": 2})
JOINT = [Row("gpusq_vit", "sgd", SGD, {"base": FEW})]

G = torch.Generator().manual_seed(0)
X = torch.randn(4, 1, 8, 8, generator=G)


def vit(double=True, seed=0, classes=3, **options):
    made = replace(SMALL, classes=classes, options={**SMALL.options, **options}).build(seed=seed)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made.double() if double else made


def batch(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64), "label": torch.arange(n) % 3}


def sparse_student(base, cfg):
    layers = choose(base, batch()["input"].to(next(base.parameters())), cfg)
    student = copy.deepcopy(base)
    mask(student, {p: cfg.sparsity.mask(student.get_submodule(p).weight.detach()) for p in layers.sparse}, cfg)
    return student, layers


def system_of(base, student, compare, **how):
    return Sensed(student, Frozen(base, taps=compare), compare=compare, optimizer=torch.optim.SGD, **how)


# -- the card's exact checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "pattern"), [(8, "2:4"), (4, "4:8:2"), (2, "1:4")])
def test_quantised_zeros_stay_zero(bits, pattern):
    """(1) in every group at most n of m codes are not zero, and what the mask put out is exactly zero."""
    p = Pattern.parse(pattern)
    layer = nn.Linear(32, 12)
    keep = p.mask(layer.weight.detach())
    parametrize_weights(layer, [""], lambda *_: NM(p.n, p.m, keep, unit=p.unit))
    parametrize_weights(layer, [""], lambda *_: Symmetric(bits, 0))
    assert (layer.weight[~keep] == 0).all() and (layer.weight != 0).any()
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = layer.weight.detach() / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4) and p.broken(codes.round()) == 0
    assert codes.abs().max() <= 2 ** (bits - 1) - 1 + 1e-4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_fake_quantisation_is_one_inside_the_range(bits):
    """(2) mask = |x| <= s (2^{b−1}−1), s = limit/(2^{b−1}−1); values are whole steps, clipped."""
    most = 2 ** (bits - 1) - 1
    q = FakeQuantize(bits).double()
    q.limit.fill_(1.3)
    x = (2 * torch.randn(4000, generator=G, dtype=torch.float64)).requires_grad_()
    x.data[:3] = torch.tensor([1.3, -1.3, 1.3 + 1e-9])
    up = torch.randn(4000, generator=G, dtype=torch.float64)
    y = q(x)
    (grad,) = torch.autograd.grad((y * up).sum(), x)
    assert torch.equal(grad != 0, x.abs() <= 1.3) and torch.equal(grad, up * (x.abs() <= 1.3))
    s = 1.3 / most
    torch.testing.assert_close(y, s * torch.clip(torch.round(x / s), -most, most), rtol=0, atol=1e-12)
    assert 2 * most - 4 < len(y.unique()) <= 2 * most + 1 and (q(torch.zeros(2)) == 0).all()
    with torch.no_grad():
        assert torch.equal(q(x), y)  # the exported path is the trained one


@pytest.mark.parametrize("how", ["inverse", "share", "none"])
def test_equal_errors_weigh_one_and_small_ones_more(how):
    """(3) all ℓ_i equal gives w_i = 1 and the unweighted loss; the mean is 1; the smaller error weighs more."""
    assert factors([0.3] * 4, how) == pytest.approx([1.0] * 4, abs=1e-15) and factors([0.7], how) == [1.0]
    errors = [0.1, 0.2, 0.7]
    w = factors(errors, how)
    assert sum(w) / 3 == pytest.approx(1.0)
    wanted = {"inverse": [3 / e / (10 + 5 + 10 / 7) for e in errors], "share": [(1 - e) * 1.5 for e in errors]}
    assert w == pytest.approx(wanted.get(how, [1.0] * 3))
    assert all(torch.isfinite(torch.tensor(factors([0.0, 0.1], how)))) and factors([0.0, 0.0], how) == [1.0, 1.0]
    base, compare = vit(), ["blocks.1", "blocks.2"]
    student, _ = sparse_student(base, Config())
    plain = system_of(base, student, compare).learn(batch(), Clock()).terms["feature"]
    even = system_of(base, student, compare, weights=factors([0.2, 0.2], how)).learn(batch(), Clock()).terms["feature"]
    torch.testing.assert_close(plain, even)
    w = factors([0.1, 0.9], how)
    other = system_of(base, student, compare, weights=w).learn(batch(), Clock()).terms["feature"]
    assert torch.allclose(other, plain) == (how == "none")


def test_a_student_that_is_its_teacher_has_no_soft_and_no_feature_loss():
    """(4) and its gradient is that of the labels alone."""
    base = vit()
    student, compare = copy.deepcopy(base), late_blocks(base)
    system = system_of(base, student, compare)
    terms = system.learn(batch(), Clock())
    assert terms.terms["soft"].item() == pytest.approx(0, abs=1e-12) and terms.terms["feature"].item() == 0
    terms.total.backward()
    alone = vit()
    F.cross_entropy(alone(batch()["input"]), batch()["label"]).backward()
    for a, b in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert terms.notes["agree"] == 1


@pytest.mark.parametrize(
    ("bits", "pattern", "part"),
    [(16, "2:4", 36 / 64), (8, "2:4", 20 / 32), (4, "4:8:2", 20 / 32), (4, "2:4", 24 / 32), (16, "4:8:2", 34 / 64)],
)
def test_storage_is_what_the_formula_says_in_the_file(bits, pattern, part, tmp_path):
    """(5) 36/64 and 20/32, of the bytes that lie on disk."""
    p = Pattern.parse(pattern)
    assert p.share(bits) == part
    base = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Conv2d(4, 8, 2))
    net = copy.deepcopy(base)
    for make in (
        lambda path, m: NM(p.n, p.m, p.mask(m.weight.detach()), unit=p.unit),
        lambda path, m: Half() if bits == 16 else Symmetric(bits, 0),
    ):
        parametrize_weights(net, ["0", "2"], make)
    member = Member("small", net, Plan.identity(base).then(*bake(net)))
    Models([member], torch.zeros(1, 64)).save(tmp_path)
    file, _ = read_tensors(tmp_path / "students/small")
    for path in ("0", "2"):
        held = file[f"{path}.weight"].nbytes + file[f"{path}.weight_places"].nbytes
        assert held == part * base.get_submodule(path).weight.numel() * bits / 8
    rows = stored(member, tmp_path)
    assert [r["held"] / r["dense"] for r in rows] == [part, part]
    assert all(r["claimed"] == r["held"] + r["scales"] for r in rows)
    assert [r["scales"] for r in rows] == ([0, 0] if bits == 16 else [4 * 48, 4 * 8])  # no points, no zeros
    again = stillhouse.load(tmp_path / "students/small", base=base)
    assert torch.equal(again[0].weight, net[0].weight) and torch.equal(again[2].weight, net[2].weight)
    assert member.weight_bytes == sum(t.nbytes for t in file.values())


# -- patterns -----------------------------------------------------------------------------------------------------


def test_pairs_stay_or_go_together():
    p, w = Pattern(4, 8, 2), torch.randn(6, 4, 2, 2, generator=G)
    pairs = w.reshape(6, -1, 4, 2)
    kept = p.mask(w).reshape(6, -1, 4, 2)
    assert torch.equal(kept[..., 0], kept[..., 1]) and (kept[..., 0].sum(-1) == 2).all()
    size = pairs.abs().sum(-1)
    assert (size.masked_fill(~kept[..., 0], torch.inf).amin(-1) >= size.masked_fill(kept[..., 0], -1).amax(-1)).all()
    masked = torch.where(p.mask(w), w, 0.0)
    assert p.broken(masked) == 0 and p.broken(w) == 6 * 2 and p.bits == 2 and Pattern(4, 8).bits == 3
    places = p.places(masked)
    assert torch.equal(p.placed(p.kept(masked, places), places, w.shape), masked) and len(places) == w.numel() // 4
    with pytest.raises(UserError, match="not have the pattern 4:8 in units of 2"):
        p.places(w)


def test_the_format_is_that_of_the_semi_structured_kernels():
    """Our kept values are those torch hands to CUTLASS; its metadata and ours give the same matrix back."""
    w = torch.randn(32, 64, generator=G).half()
    w = torch.where(Pattern().mask(w.float()), w, torch.zeros((), dtype=w.dtype))
    values, meta = sparse_semi_structured_from_dense_cutlass(w)
    places = Pattern().places(w)
    kept = Pattern().kept(w, places)
    assert torch.equal(values.reshape(-1), kept) and 8 * meta.nbytes == 2 * len(places)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), Pattern().placed(kept, places, w.shape))


@pytest.mark.parametrize(
    ("text", "words"),
    [("2of4", "reads N:M or N:M:UNIT"), ("5:4", "0 < n <= m"), ("0:4", "0 < n"), ("3:8:2", "a unit that divides both")],
)
def test_patterns_that_cannot_be(text, words):
    with pytest.raises(UserError, match=words) as error:
        Config(pattern=text)
    assert "\n" not in str(error.value)


def test_the_axis_is_the_reduction_of_the_matrix_product():
    """Of a convolution (in, kh, kw), flattened; of nn.MultiheadAttention's packed weight the input."""
    conv = nn.Conv2d(3, 4, 4, 4)
    x = torch.randn(2, 3, 8, 8, generator=G)
    keep = Pattern().mask(conv.weight.detach())
    with torch.no_grad():
        conv.weight.mul_(keep)
    patches = F.unfold(x, 4, stride=4)  # (n, in·kh·kw, positions)
    flat = conv.weight.reshape(4, -1)
    assert ((flat.view(4, -1, 4) != 0).sum(-1) == 2).all()
    torch.testing.assert_close(flat @ patches + conv.bias[:, None], conv(x).flatten(2), rtol=1e-4, atol=1e-5)
    attention = nn.MultiheadAttention(8, 2)
    assert weight_name(attention) == "in_proj_weight"
    parametrize_weights(attention, [""], lambda *_: NM())
    assert ((attention.in_proj_weight.view(24, 2, 4) != 0).sum(-1) == 2).all()


# -- the loss -----------------------------------------------------------------------------------------------------


def test_the_whole_loss_by_hand():
    base, b = vit(), batch()
    student, _ = sparse_student(base, Config())
    compare, w = ["blocks.1", "blocks.2"], [1.5, 0.5]
    system = system_of(base, student, compare, weights=w, alpha=0.7, beta=3.0, gamma=2.0, T=3.0)
    found = system.learn(b, Clock()).terms
    with tap(base, compare) as t, tap(student, compare) as s:
        zt, zs = base(b["input"]), student(b["input"])
    same = zt.argmax(1) == zs.argmax(1)
    assert 0 < same.sum() < len(same)  # so that the mask matters
    each = [(t[p] - s[p])[same].square().mean() for p in compare]  # over agreeing samples, not over all
    log_p, log_q = (zt / 3).log_softmax(1), (zs / 3).log_softmax(1)
    wanted = {
        "hard": 0.7 * F.cross_entropy(zs, b["label"]),
        "soft": 3.0 * 9 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True),
        "feature": 2.0 * (1.5 * each[0] + 0.5 * each[1]),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
    system.after_step(Clock())
    torch.testing.assert_close(system.errors, torch.stack(each).detach().float())
    system.learn(b, Clock())
    system.after_step(Clock())  # a running mean of the same is the same
    torch.testing.assert_close(system.errors, torch.stack(each).detach().float())


def test_nobody_agrees():
    t, z = torch.eye(3), torch.eye(3)[[1, 2, 0]]
    values = torch.ones(3, requires_grad=True)
    found = where_agreed(values, t, z)
    found.mean().backward()
    assert (found == 0).all() and (values.grad == 0).all()
    with pytest.raises(UserError, match="where_agreed"):
        where_agreed(torch.ones(2), t, z)


def test_shares_of_two_processes_add_to_the_whole():
    g = torch.Generator().manual_seed(1)
    t, z, v = torch.randn(10, 3, generator=g), torch.randn(10, 3, generator=g), torch.rand(10, generator=g)
    whole = where_agreed(v, t, z).mean()
    share = (t.argmax(1) == z.argmax(1)).float().mean()
    parts = [where_agreed(v[i], t[i], z[i], share).mean() * len(v[i]) / 10 for i in (slice(0, 3), slice(3, 10))]
    torch.testing.assert_close(sum(parts), whole)


def test_answers_of_the_dense_network_stand_in_for_labels():
    base, other, b = vit(), vit(seed=5), batch()
    student, layers = sparse_student(base, Config())
    system = system_of(base, student, layers.compare, beta=0.0, gamma=0.0, answers=Frozen(other))
    wanted = F.cross_entropy(student(b["input"]), other(b["input"]).argmax(1))
    torch.testing.assert_close(system.learn(b, Clock()).terms["hard"], wanted)
    asked, teacher = [], Frozen(base, taps=layers.compare)

    def counted(batch):
        asked.append(1)
        return teacher(batch)

    same = Sensed(student, counted, answers=counted, compare=layers.compare, optimizer=torch.optim.SGD)
    same.learn(b, Clock())
    assert len(asked) == 1  # the teacher's own answers are not asked for twice
    soft = {**b, "label": torch.full((12, 3), 1 / 3, dtype=torch.float64)}  # mixed labels; the mask takes predictions
    mixed = system_of(base, student, layers.compare).learn(soft, Clock()).terms
    plain = system_of(base, student, layers.compare).learn(b, Clock()).terms
    torch.testing.assert_close(mixed["feature"], plain["feature"])


ADAM = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.5)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [ADAM, MOMENTUM], ids=["adam", "momentum"])
def test_the_pattern_holds_after_every_step(optimizer, tmp_path):
    cfg, base = Config(bits=4), vit(double=False, classes=10)
    student, layers = sparse_student(base, cfg)
    before = {p: student.get_submodule(p).weight.detach() != 0 for p in layers.sparse}
    parametrize_weights(student, layers.sparse, lambda path, m: Symmetric(4))
    system = Sensed(student, Frozen(base, taps=layers.compare), compare=layers.compare, optimizer=optimizer)
    seen, plain = [], system.after_step

    def spied(clock):
        plain(clock)
        seen.append([(p, student.get_submodule(p).weight.detach()) for p in layers.sparse])

    system.after_step = spied
    source = Batches(load("digits", limit=64).train, 16)
    fit(Run(tmp_path, quiet=True, device="cpu"), "s", system, source, steps=4)
    assert len(seen) == 4
    for step in seen:
        for path, w in step:
            assert (w[~before[path]] == 0).all() and cfg.sparsity.broken(w) == 0
    first, last = dict(seen[0]), dict(seen[-1])
    assert any(not torch.equal(first[p], last[p]) for p in layers.sparse)


# -- ranges of activations ----------------------------------------------------------------------------------------


def test_calibration_and_following():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    for path in ("0", "2"):
        net = Inputs(path, 4).apply(net)
    batches = [torch.tensor([[1.0, -3.0]]), torch.tensor([[5.0, 0.0]])]
    calibrate(net, batches, momentum=0.5)
    (_, first), _ = fake_quantizers(net)
    assert first.limit == 0.5 * 3 + 0.5 * 5
    set_mode(net, "follow")
    net.eval()(torch.full((1, 2), 9.0))
    follow_ranges(net, Clock(), 0.5)
    assert first.limit == 4  # looking does not move it
    net.train()(torch.full((1, 2), 6.0))
    net(torch.full((1, 2), -8.0))  # two micro-batches are one step
    follow_ranges(net, Clock(), 0.5)
    assert first.limit == 0.5 * 4 + 0.5 * 8 and first.seen is None
    set_mode(net, "follow")
    net(torch.full((1, 2), 2.0))
    two = Clock(world=2, all_rows=lambda rows: torch.cat([rows, 5 * rows]))
    follow_ranges(net, two, 0.5)
    assert first.limit == 0.5 * 6 + 0.5 * 10  # the largest of all processes
    x = torch.arange(1.0, 101.0)
    some = FakeQuantize(8, percentile=90.0)
    some.note(x)
    assert some.seen == 90
    first.limit.zero_()
    with pytest.raises(UserError, match="0: calibration saw nothing but zeros"):
        calibrate(net, [torch.zeros(1, 2)])
    with pytest.raises(UserError, match="2 to 8 bits"):
        FakeQuantize(1)


def test_ranges_follow_in_the_first_part_alone(tmp_path):
    base = vit(double=False, classes=10)
    student = copy.deepcopy(base)
    for path in ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1"):
        student = Inputs(path, 8).apply(student)
    data = load("digits", limit=64)
    calibrate(student, [data.train.take(np.arange(8))["input"]])
    how = {"compare": [], "gamma": 0.0, "ranges": 0.5, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    system = Sensed(student, Frozen(base), **how)
    seen, plain = [float(next(fake_quantizers(student))[1].limit)], system.after_step

    def spied(clock):
        plain(clock)
        seen.append(float(next(fake_quantizers(student))[1].limit))

    system.after_step = spied
    fit(Run(tmp_path, quiet=True, device="cpu"), "s", system, Batches(data.train, 16), steps=6)
    assert len(set(seen[:4])) == 4 and len(set(seen[3:])) == 1


def test_layers_that_are_not_called_or_cannot_be_quantised_are_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    net = Idle()
    for path in ("used", "idle"):
        net = Inputs(path, 8).apply(net)
    with pytest.raises(UserError, match="idle: its input cannot be quantised, the network does not call it"):
        calibrate(net, [torch.ones(1, 2)])

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(UserError, match="Odd with its own forward"):
        Inputs("0", 8).apply(nn.Sequential(Odd(2, 2)))
    with pytest.raises(UserError, match="a ReLU cannot be given quantised inputs"):
        Inputs("0", 8).apply(nn.Sequential(nn.ReLU()))


# -- which layers -------------------------------------------------------------------------------------------------


def test_layers_of_library_networks():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    deit = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=6, embed_dim=24, num_heads=2)
    found = choose(deit, torch.zeros(2, 3, 32, 32), Config())
    assert len(found.quantized) == 6 * 4 + 1 and found.quantized == found.sparse and "head" not in found.quantized
    assert found.compare == ["blocks.4", "blocks.5"]
    assert "head" in choose(deit, torch.zeros(2, 3, 32, 32), Config(head=True)).quantized
    two = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
    assert len(choose(two, torch.zeros(2, 3, 32, 32), Config()).quantized) == 9
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 2, 1, 2),
                             num_heads=(1, 2, 2, 2))  # fmt: skip
    found = choose(swin, torch.zeros(2, 3, 56, 56), Config())
    assert found.compare == ["layers.3.blocks.0", "layers.3.blocks.1"]
    assert len(found.quantized) == 1 + 6 * 4 + 3 and not any("head" in p for p in found.quantized)
    net = torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=3)
    found = choose(net, torch.zeros(2, 3, 16, 16), Config())
    assert len(found.quantized) == 1 + 3 * 4 and not any("heads" in p for p in found.quantized)
    assert found.compare == ["encoder.layers.encoder_layer_2"]


def test_rows_that_do_not_divide_stay_dense_and_are_quantised():
    net = vit(double=False)
    net.patch_embed.proj = nn.Conv2d(1, 16, 5, 1)
    found = choose(net, torch.zeros(2, 1, 6, 6), Config(include=("patch_embed", "blocks.0")))
    assert found.left_dense == ["patch_embed.proj (rows of 25)"] and found.sparse == found.quantized[1:]
    with pytest.raises(UserError, match=r"8 divides: patch_embed\.proj has rows of 25"):
        choose(net, X, Config(bits=4, include=("patch_embed",)))
    with pytest.raises(UserError, match="no list of blocks"):
        choose(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 3)), X, Config())


# -- what comes out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Family, object]:
    folder = tmp_path_factory.mktemp("gpusq")
    base = replace(SMALL, options={**SMALL.options, "depth": 1}).build(seed=0)
    before = state_fingerprint(base)
    cfg = replace(TINY, bits=4, teacher_epochs=0.0)
    family = distill(Run(folder, quiet=True, device="cpu"), load("digits", limit=96), base, cfg)
    assert state_fingerprint(base) == before and family.base is base  # the teacher is never moved
    family.save(folder)
    return family, folder


def test_a_family_of_two(made, tmp_path):
    family, folder = made
    assert [m.name for m in family] == ["sparse", "int4"] and family.cost["baked_difference"] == 0
    cfg = Config(bits=4)
    paths = choose(family.base, X, cfg).sparse
    assert len(paths) == 4 + 1
    for m in family:
        assert broken_groups(m.model, paths, cfg) == 0 and not list(projectors(m.model))
        again = stillhouse.load(folder / "students" / m.name, base=family.base)
        with torch.no_grad():
            assert torch.equal(again(X), m.model(X))
        assert Plan.from_json(m.plan.to_json()) == m.plan
    sparse, small = (m.model for m in family)
    layer = small.blocks[0].attn.qkv
    assert len(layer.weight[0].unique()) <= 15 and layer.inputs.limit > 0
    assert torch.equal(sparse.blocks[0].attn.qkv.weight.half().float(), sparse.blocks[0].attn.qkv.weight)
    rows = {m.name: stored(m, folder) for m in family}
    shares = {name: {r["held"] / r["dense"] for r in each} for name, each in rows.items()}
    assert shares == {"int4": {20 / 32}, "sparse": {34 / 64}}
    whole = sum(4 * np.prod(r["shape"]) for r in rows["int4"])
    assert whole / sum(r["held"] for r in rows["int4"]) == 12.8  # float32 over sparse 4 bits, as the card has it
    files = [(folder / "students" / m.name / "model.safetensors").stat().st_size for m in family]
    assert files[0] > files[1]
    errors = [b["error"] for b in family.budgets]
    assert [b["module"] for b in family.budgets] == ["blocks.0"] and errors[0] > 0


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_the_student_is_exported_with_parity(made, to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    assert export(made[0]["int4"].model, X[:1], to, tmp_path / "int4").max_rel_diff < 1e-4


def test_errors_are_handed_on_after_a_resume(made, tmp_path):
    """ℓ_i are part of the finished stage: whoever reads it back gets the same weights."""
    data, cfg = load("digits", limit=96), replace(TINY, teacher_epochs=0.0)
    base = vit(double=False, classes=10).eval()
    layers = choose(base, X, replace(cfg, compare=("blocks.0", "blocks.2")))
    cfg = replace(cfg, compare=tuple(layers.compare))
    run = Run(tmp_path, quiet=True, device="cpu")
    first = sparsify(run, data, base, layers, cfg)
    again = sparsify(run, data, vit(double=False, classes=10).eval(), layers, cfg)  # read from the folder
    assert first.errors == again.errors and len(set(first.errors)) == 2
    assert state_fingerprint(first.model) == state_fingerprint(again.model)
    measured = sparsify(run, data, base, layers, replace(cfg, epochs=0.0))
    assert len(measured.errors) == 2 and min(measured.errors) > 0 and measured.errors != first.errors
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        plain = Sensed.__init__

        def spied(self, student, teacher, **how):
            seen.append((teacher, how["weights"]))
            plain(self, student, teacher, **how)

        patch.setattr(Sensed, "__init__", spied)
        quantize(run, data, base, first, layers, cfg)
    ((teacher, weights),) = seen
    assert weights == factors(first.errors)
    with torch.no_grad():  # the second teacher is the sparse network, not the dense one
        assert torch.equal(teacher({"input": X}).logits, first.model(X)) and not torch.allclose(base(X), first.model(X))


def test_packed_attention_of_torch(tmp_path):
    """nn.MultiheadAttention: its packed weight is masked, quantised, stored; its output projection's input too."""
    torchvision = pytest.importorskip("torchvision")
    base = torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=3).eval()
    nn.init.normal_(base.heads.head.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 3, 16, 16, generator=G)
    layers, cfg = choose(base, x, Config()), Config()
    student, plan = copy.deepcopy(base), Plan.identity(base)
    inputs = [Inputs(p, 8) for p in layers.quantized]
    for edit in inputs:
        student = edit.apply(student)
    calibrate(student, [x])
    with torch.no_grad():
        close = (student(x) - base(x)).abs().max() / base(x).abs().max()
    assert 0 < close < 0.05  # eight bits of activations are nearly the same
    mask(student, {p: cfg.sparsity.mask(weight_of(base, p)) for p in layers.sparse}, cfg)
    parametrize_weights(student, layers.quantized, lambda path, m: Symmetric(8))
    want = student(x).detach()
    made = plan.then(*inputs, *bake(student))
    assert torch.equal(student(x), want)
    packed = [e for e in made.edits if isinstance(e, Pack) and e.weight == "in_proj_weight"]
    assert len(packed) == 3 and all(e.sparse[:2] == (2, 4) for e in packed)
    Models([Member("m", student, made)], x[:1]).save(tmp_path)
    file, _ = read_tensors(tmp_path / "students/m")
    name = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    assert file[name].nbytes + file[f"{name}_places"].nbytes == 48 * 16 * 20 / 32
    with torch.no_grad():
        assert torch.equal(stillhouse.load(tmp_path / "students/m", base=base)(x), want)


def test_a_student_goes_on(made, tmp_path):
    """A sparse student is the base of another run: its plan goes from the first base, without the old codes."""
    spec = SMALL
    data, cfg = load("digits", limit=64), replace(TINY, teacher_epochs=0.0, epochs=0.0, quantized_epochs=0.0)
    first = distill(Run(tmp_path / "a", quiet=True, device="cpu"), data, spec, cfg)
    network, plan = unpacked(copy.deepcopy(first["sparse"].model), first["sparse"].plan)
    run = Run(tmp_path / "b", quiet=True, device="cpu")
    second = distill(run, data, spec, replace(cfg, bits=3), network=network, plan=plan)
    second.save(tmp_path / "b")
    again = stillhouse.load(tmp_path / "b/students/int3")
    with torch.no_grad():
        assert torch.equal(again(X), second["int3"].model(X))


# -- the user's own, and mistakes ---------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.end = nn.Linear(16, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.layers:
            x = block(x)
        return self.end(x.mean(1))


def net(classes):
    return Net(classes)
"""


def test_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_small_vit.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--model", "own_small_vit:net", "--data", "digits", "--limit", "64", "--device", "cpu", "--quiet"]
    short = ["--teacher-epochs", "1", "--epochs", "1", "--quantized-epochs", "1", "--bits", "8"]
    assert invoke(["run", "gpusq_vit", *flags, *short, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    report = stillhouse.files.read_json(tmp_path / "run/report.json")
    held = {c["text"]: c for c in report["claims"]}
    assert all(c["holds"] for c in held.values()), held
    assert any("sparse: bytes" in t and c["value"] == 36 / 64 for t, c in held.items())
    assert any("int8: bytes of sparse" in t and c["value"] == 20 / 32 for t, c in held.items())
    small = stillhouse.load(tmp_path / "run/students/int8")
    assert small(X).shape == (4, 10) and not isinstance(getattr(small.end, "inputs", None), FakeQuantize)
    again = ["--model", str(tmp_path / "run/students/sparse"), *flags[2:], *short[2:], "--teacher-epochs", "0"]
    assert invoke(["run", "gpusq_vit", *again, "--out", str(tmp_path / "again")]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher-epochs", "0", "--model", SMALL.name], ["has no trained weights"]),
        ([], ["--model is missing", "--teacher-epochs"]),
        (["--bits", "9"], ["2 to 8", "9"]),
        (["--pattern", "5:4"], ["0 < n <= m"]),
        (["--percentile", "0"], ["percentile"]),
        (["--alpha", "0", "--beta", "0", "--gamma", "0"], ["nothing to learn"]),
        (["--teacher-epochs", "1", "--exclude", "blocs"], ["no module 'blocs'", "blocks"]),
        (["--teacher-epochs", "1", "--compare", "blocks.9"], ["no module 'blocks.9'"]),
        (["--teacher-epochs", "1", "--exclude", "*"], ["there are no layers"]),
        (["--model", "stillhouse:mlp", "--teacher-epochs", "1"], ["no list of blocks"]),
        (["--quantized-lr", "-1"], ["quantized_lr: expected a number from 0, got -1.0"]),
        (["--gamma", "0", "--weighting", "share"], ["--weighting does nothing here", "--gamma 0"]),
        (["--include", "blocks.0", "--head"], ["--head does nothing here"]),
        (["--teacher-epochs", "1", "--include", "norm"], ["norm: LayerNorm is not supported"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = ["--data", "digits", "--limit", "64", "--quiet", "--device", "cpu", "--out", str(tmp_path / "x")]
    code = invoke(["run", "gpusq_vit", *common, *flags])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_all_arms_learn_from_the_data_of_the_command(tmp_path, monkeypatch):
    from stillhouse.recipes.gpusq_vit import experiment

    monkeypatch.setattr(experiment, "BASE", replace(SMALL, options={**SMALL.options, "depth": 1}))
    flags = ["--limit", "64", "--seeds", "1", "--teacher-epochs", "1", "--epochs", "1", "--quantized-epochs", "1"]
    out = ["--batch", "32", "--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]
    assert invoke(["run", "gpusq_vit", *flags, *out]) == 0


def test_wrong_classes_are_told_before_a_step(tmp_path):
    with pytest.raises(UserError, match="gives 3 logits, but digits has 10 classes"):
        distill(Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=32), vit(double=False), TINY)
    assert not (tmp_path / "stages").exists()
    spec = ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options={**SMALL.options, "embed_dim": 6})
    with pytest.raises(UserError, match=r"8 divides: blocks\.0\.attn\.qkv has rows of 6"):
        cfg = replace(TINY, include=("blocks.0.attn",))
        distill(Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=32), spec, cfg)
