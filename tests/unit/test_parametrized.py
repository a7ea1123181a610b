"""Weights as functions: straight-through gradients, N:M patterns, quantisers and their codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.normalfloat import NormalFloat
from stillhouse.students.packing import Code, decode, encode, groups, pack, stored_bits, unpack
from stillhouse.students.parametrized import bake, parametrize_weights, projectors, strip, weight_layers
from stillhouse.students.patterns import nm_mask
from stillhouse.students.projectors import NM, Codebook, MinMax, Symmetric, straight_through

G = torch.Generator().manual_seed(0)
W = torch.randn(6, 16, generator=G)


def test_straight_through_gives_the_values_and_passes_the_gradient():
    w = W.clone().requires_grad_()
    values, passes = torch.randn(6, 16, generator=G), torch.rand(6, 16, generator=G) > 0.5
    up = torch.randn(6, 16, generator=G)
    out = straight_through(w, values, passes)
    assert torch.equal(out, values)  # exactly, which w + (v − w) is not
    assert torch.equal(torch.autograd.grad((out * up).sum(), w)[0], up * passes)
    _, tangent = torch.func.jvp(lambda a: straight_through(a, values, passes), (W,), (up,))
    assert torch.equal(tangent, up * passes)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_nm_keeps_the_largest_of_every_group(n, m):
    conv = torch.randn(5, 4, 2, 2, generator=G)
    for w in (W, conv):
        mask = nm_mask(w, n, m).reshape(len(w), -1, m)
        assert (mask.sum(-1) == n).all()
        sizes = w.abs().reshape(len(w), -1, m)
        assert (sizes.masked_fill(~mask, torch.inf).amin(-1) >= sizes.masked_fill(mask, -1).amax(-1)).all()
    assert nm_mask(torch.ones(1, 4)).tolist() == [[True, True, False, False]]  # ties: still n of m
    few = torch.randint(-2, 3, (50, 16), generator=G).float()  # many ties
    order = torch.argsort(few.view(50, -1, m).abs(), dim=-1, descending=True, stable=True)
    sorted_ = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :n], True).view(50, 16)
    assert torch.equal(nm_mask(few, n, m), sorted_)
    with pytest.raises(UserError, match="rows that 4 divides"):
        nm_mask(torch.ones(2, 6))


def test_the_pattern_holds_after_every_step():
    layer = nn.Linear(16, 6)
    parametrize_weights(layer, [""], lambda p, m: NM())
    step = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for k in range(5):
        step.zero_grad()
        (layer(torch.randn(8, 16, generator=G)) ** 2).sum().backward()
        assert (layer.parametrizations["weight"].original.grad != 0).all()  # weights that are out learn too
        step.step()
        assert ((layer.weight != 0).view(6, 4, 4).sum(-1) <= 2).all(), k
    fixed = nn.Linear(16, 6)
    mask = nm_mask(fixed.weight.detach())
    parametrize_weights(fixed, [""], lambda p, m: NM(mask=mask))
    fixed(torch.randn(8, 16, generator=G)).sum().backward()
    assert torch.equal(fixed.parametrizations["weight"].original.grad != 0, mask)


@pytest.mark.parametrize("make", [Symmetric, MinMax], ids=["symmetric", "min-max"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, -1, 5, 32, 1000])
def test_quantisers(make, bits, group):
    """At most 2^b values in a group, half a step of error, the same once more, and codes that give all of it back."""
    q = make(bits, group)
    made, code = q.values(W), q.code(W)
    steps = 2**bits - 1 if make is MinMax else 2 ** (bits - 1) - 1
    assert len(code.scale) == groups(W.shape, group) == {0: 6, -1: 1, 5: 20, 32: 3, 1000: 1}[group]
    each = code.scale[:, None].expand(-1, 16 if group == 0 else 96 if group in (-1, 1000) else group)
    half = each.reshape(-1)[:96].view(6, 16) / (2 * steps if make is MinMax else 2)
    assert ((made - W).abs() <= half * 1.0001 + 1e-6).all()
    assert torch.allclose(q.values(made), made, atol=1e-6)
    packed = encode(made, code)
    assert packed.numel() == -(-96 * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(decode(packed, code, W.shape), made)
    assert len(made.unique()) <= 2**bits * len(code.scale)
    known = code.stored()  # the points and zeros of a symmetric code are known without being stored
    assert known == (["scale"] if make is Symmetric else ["points", "scale", "zero"])
    parts = 2**bits + 2 * len(code.scale) if make is MinMax else len(code.scale)
    assert stored_bits(W.shape, code) == 8 * packed.numel() + 32 * parts


def test_zero_stays_zero_and_masks_survive():
    w = torch.where(nm_mask(W), W, torch.zeros(()))
    assert (Symmetric(4).values(w)[w == 0] == 0).all()
    assert (Symmetric(2, -1).values(torch.zeros(2, 4)) == 0).all() and (
        MinMax(2, 4).values(torch.ones(2, 4)) == 1
    ).all()


def test_uniform_codebook_is_the_uniform_quantiser_and_its_gradient_is_a_sum():
    points = torch.arange(4) / 3
    book = Codebook(2, points, group=32)
    assert torch.allclose(book(W), MinMax(2, 32).values(W), atol=1e-6)
    up = torch.randn(6, 16, generator=G)
    (grad,) = torch.autograd.grad((book(W) * up).sum(), book.points)
    code = MinMax(2, 32).code(W)
    index = MinMax(2, 32).index(W, code)
    alpha = code.scale[:, None].expand_as(index)
    want = torch.stack([(alpha * up.reshape(3, 32))[index == k].sum() for k in range(4)])
    assert torch.allclose(grad, want, atol=1e-5)
    with torch.no_grad():
        book.points.copy_(torch.tensor([0.9, 0.1, 0.5, 0.3]))
    book.sort_()
    assert torch.allclose(book.points, torch.tensor([0.1, 0.3, 0.5, 0.9]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_exact(bits):
    index = torch.randint(0, 2**bits, (37,), generator=G)
    packed = pack(index, bits)
    assert len(packed) == -(-37 * bits // 8) and torch.equal(unpack(packed, bits, 37), index)
    with pytest.raises(UserError, match="take"):
        unpack(packed[:-1], bits, 37)


def test_baking_changes_nothing_and_leaves_plain_layers():
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    parametrize_weights(net, ["0", "2"], lambda path, layer: NM())
    parametrize_weights(net, ["0"], lambda path, layer: Symmetric(4))  # on top: sparse, then quantised
    x = torch.randn(3, 16, generator=G)
    want = net(x)
    edit, sparse = bake(net)
    assert torch.equal(net(x), want) and not list(projectors(net)) and (edit.module, sparse.module) == ("0", "2")
    assert (edit.bits, edit.sparse, sparse.bits, sparse.sparse) == (4, (2, 4, 1), 0, (2, 4, 1))
    assert {type(m) for m in net} == {nn.Linear, nn.ReLU}
    code = edit.code(net.state_dict() and dict(net.named_buffers()))
    assert torch.equal(decode(encode(net[0].weight, code), code, net[0].weight.shape), net[0].weight)


def test_baking_or_stripping_a_copy_leaves_the_original_alone():
    """Deep copies share the class that torch makes for a parametrised layer."""
    net = nn.Sequential(nn.Linear(16, 8))
    before = net[0].weight.detach().clone()
    parametrize_weights(net, ["0"], lambda path, layer: Symmetric(2))
    want, copies = net(torch.ones(1, 16)), [copy.deepcopy(net) for _ in range(2)]
    bake(copies[0])
    assert torch.equal(copies[0](torch.ones(1, 16)), want)
    assert torch.equal(net(torch.ones(1, 16)), want) and torch.equal(copies[1](torch.ones(1, 16)), want)
    strip(copies[1])
    assert torch.equal(copies[1][0].weight, before) and torch.equal(net(torch.ones(1, 16)), want)
    assert not list(projectors(copies[1])) and len(list(projectors(net))) == 1


def test_choosing_layers():
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    assert weight_layers(net) == ["body.0", "body.2", "head"]
    assert weight_layers(net, exclude=["head"]) == weight_layers(net, include=["body"]) == ["body.0", "body.2"]
    assert weight_layers(net, include=["body.*"], exclude=["*.0"]) == ["body.2"]
    with pytest.raises(UserError, match=r"no module 'hea'.*head"):
        weight_layers(net, exclude=["hea"])
    with pytest.raises(UserError, match=r"body\.1: ReLU is not supported"):
        weight_layers(net, include=["body.1"])


def test_nothing_to_quantise_is_said():
    with pytest.raises(UserError, match="no values to quantise"):
        Code.empty(torch.Size([0, 3]), 4, 0)
    for quantizer in (Symmetric, NormalFloat):  # of one bit they could tell nothing apart but one sign
        for bits in (1, 9):
            with pytest.raises(UserError, match=f"{quantizer.__name__} quantisation needs 2 to 8 bits.*got {bits}"):
                quantizer(bits)
    with pytest.raises(UserError, match="1 to 8 bits"):
        MinMax(0)
