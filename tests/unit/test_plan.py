"""Plan: slicing, sharing, serialisation and refusals, on networks small enough to check by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.errors import UserError
from stillhouse.students.attention import HeadAttention, resize_heads
from stillhouse.students.plan import Keep, Plan, bare_copy, signature, take


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.PReLU(6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    ).double()


def conv_plan(net: nn.Module) -> Plan:
    kept = (0, 1, 4)
    edits = [Keep(n, "out", kept) for n in ("0", "1", "2", "3")] + [Keep("5", "in", kept)]
    return Plan(tuple(edits), signature(net), {"model": "test:conv"})


X = torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).view(2, 3, 4, 4)


def test_build_slices_weights_buffers_and_attributes() -> None:
    net = conv_net()
    net.train()(X * 3 + 1)  # so that the running statistics are not the initial ones
    small = conv_plan(net).build(net)
    assert torch.equal(small[0].weight, net[0].weight[[0, 1, 4]])
    assert torch.equal(small[1].running_var, net[1].running_var[[0, 1, 4]])
    assert torch.equal(small[3].weight, net[3].weight[[0, 1, 4]])
    assert torch.equal(small[5].weight, net[5].weight[:, [0, 1, 4]])
    assert torch.equal(small[7].weight, net[7].weight)
    assert (small[0].out_channels, small[1].num_features, small[2].num_parameters) == (3, 3, 3)
    assert (small[3].groups, small[3].in_channels, small[3].out_channels, small[5].in_channels) == (3, 3, 3, 3)
    assert list(small.state_dict()) == list(net.state_dict())
    assert all(p.is_contiguous() and p.is_leaf for p in small.parameters())


def test_masked_equals_sliced_and_the_base_is_untouched() -> None:
    net = conv_net()
    net.train()(X * 3 + 1)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    plan = conv_plan(net)
    small, full = plan.build(net).eval(), plan.masked(net).eval()
    torch.testing.assert_close(small(X), full(X), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(full(X), net.eval()(X))
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_a_view_shares_the_base_and_its_gradients_reach_it() -> None:
    net = conv_net().eval()
    plan = conv_plan(net)
    slices, small = plan.slices(net), plan.build(net)
    names = {n for n, _ in net.named_parameters()} | {n for n, _ in net.named_buffers()}
    assert set(slices) == names and slices["7.weight"] == ()

    def view(w: Tensor) -> Tensor:
        tensors = dict(net.named_parameters()) | dict(net.named_buffers()) | {"5.weight": w}
        return functional_call(small, {n: take(t, slices[n]) for n, t in tensors.items()}, X)

    torch.testing.assert_close(view(net[5].weight), small(X), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(view(net[5].weight).square().sum(), net[5].weight)
    gone = [2, 3, 5]
    assert grad[:, gone].abs().max() == 0 and grad[:, [0, 1, 4]].abs().max() > 0


def test_take_has_the_right_gradient() -> None:
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    cut = ((0, torch.tensor([0, 2])), (1, torch.tensor([1, 3])))
    torch.testing.assert_close(take(w, cut), w[[0, 2]][:, [1, 3]])
    assert torch.autograd.gradcheck(lambda t: take(t, cut), (w,))


def test_identity() -> None:
    net = conv_net().eval()
    same = Plan.identity(net).build(net)
    assert same is not net and torch.equal(same(X), net(X))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(same.parameters(), net.parameters()))


@pytest.mark.parametrize("index", [(0,), (0, 1, 2), (1, 3, 5), (0, 1, 3, 4, 5)])
def test_json_round_trip(index: tuple[int, ...]) -> None:
    net = conv_net()
    plan = Plan((Keep("0", "out", index),), signature(net), {"model": "a:b", "options": {"n": 1}})
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(plan.to_json())) == plan


def test_json_writes_ranges() -> None:
    index = (*range(16), 17, *range(20, 32))
    text = Plan((Keep("0", "out", index),), "x").to_json()
    assert json.loads(text)["edits"][0]["keep"] == "0-15,17,20-31"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"format": "other"}, "not a plan"),
        ({"edits": [{"module": "0"}]}, "axis"),
        ({"edits": [{"module": "0", "axis": "out", "keep": "a-b"}]}, "0-15,17"),
        ({"edits": [{"module": "0", "axis": "up", "keep": "1"}]}, "axis"),
        ({"edits": [{"module": "0", "axis": "out", "keep": "3,1"}]}, "ascending"),
    ],
)
def test_json_refusals(change: dict, says: str) -> None:
    data = json.loads(conv_plan(conv_net()).to_json())
    with pytest.raises(UserError, match=says):
        Plan.from_json(data | change)
    with pytest.raises(UserError):
        Plan.from_json("{not json")


def test_another_base_is_refused_by_its_first_differing_parameter() -> None:
    plan = conv_plan(conv_net())
    other = conv_net()
    other[5] = nn.Conv2d(6, 8, 1)
    with pytest.raises(UserError, match=r"'5\.weight' \(8, 6, 1, 1\) is the first.*test:conv"):
        plan.build(other)
    with pytest.raises(UserError, match="the plan's base has more"):
        plan.slices(conv_net()[:6])


def test_bad_edits_are_refused() -> None:
    net = conv_net()
    for edit, says in [
        (Keep("9", "out", (0,)), "no module '9'"),
        (Keep("0", "out", (0, 6)), "only 6"),
        (Keep("4", "out", (0,)), "ReLU cannot lose"),
        (Keep("7", "heads", (0,)), "no heads"),
    ]:
        with pytest.raises(UserError, match=says):
            Plan((edit,), signature(net)).build(net)
    with pytest.raises(UserError, match="twice"):
        Plan((Keep("0", "out", (0,)), Keep("0", "out", (1,))), signature(net)).build(net)
    with pytest.raises(UserError, match="not empty"):
        Keep("0", "out", ())


def test_tied_weights_must_be_cut_together() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(UserError, match="tied"):
        Plan((Keep("0", "out", (0, 1)),), signature(net)).build(net)


def test_hooks_are_not_copied() -> None:
    net = conv_net()
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    bare_copy(net)(X)
    conv_plan(net).build(net)(X)
    assert not seen
    net(X)
    assert seen == [1]


def test_transposed_convolution_and_frozen_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 2, 2)).double()
    net[0].weight.requires_grad_(False)
    plan = Plan((Keep("0", "out", (1, 2)), Keep("1", "in", (1, 2))), signature(net))
    small = plan.build(net)
    assert small[0].weight.shape == (3, 2, 2, 2) and not small[0].weight.requires_grad
    torch.testing.assert_close(small(X), plan.masked(net)(X), rtol=1e-12, atol=1e-12)


# -- heads of nn.MultiheadAttention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@torch.no_grad()
def test_all_heads_of_torch_attention(bias: bool, batch_first: bool, weights: bool) -> None:
    """HeadAttention on whole tensors is nn.MultiheadAttention, for every way of calling it."""
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first).double()
    same = resize_heads(bare_copy(whole), "", 3)
    assert type(same) is HeadAttention and list(same.state_dict()) == list(whole.state_dict())
    q, kv = torch.randn(4, 4, 12).double(), torch.randn(4, 4, 12).double()
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    padded = torch.zeros(4, 4, dtype=torch.bool)
    padded[:, 3] = True
    for args in ((q, q, q), (q, kv, kv), (q, kv, q), (q[0], q[0], q[0])):
        pad = padded if args[0].dim() == 3 else padded[0]
        for masks in (
            {},
            {"attn_mask": causal},
            {"attn_mask": causal < 0, "is_causal": True},
            {"key_padding_mask": pad},
        ):
            for mean in (True, False):
                a, b = (m(*args, need_weights=weights, average_attn_weights=mean, **masks) for m in (same, whole))
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    mixed = {"attn_mask": causal < 0, "key_padding_mask": padded, "need_weights": weights}
    torch.testing.assert_close(same(q, q, q, **mixed), whole(q, q, q, **mixed), rtol=1e-10, atol=1e-10)
    with pytest.raises(UserError, match="one mask per head"):
        same(q, q, q, attn_mask=torch.zeros(12, 4, 4))


def test_heads_of_torch_attention_are_rows_and_columns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.attn = nn.MultiheadAttention(12, 3, 0.25, batch_first=True).double()  # type: ignore[assignment]
    net.attn.in_proj_weight.requires_grad_(False)
    plan = Plan((Keep("attn", "heads", (0, 2)),), signature(net))
    small, rows = plan.build(net).train().attn, [0, 1, 2, 3, 8, 9, 10, 11]
    for a, b in zip(small.in_proj_weight.chunk(3), net.attn.in_proj_weight.chunk(3), strict=True):
        assert torch.equal(a, b[rows])
    assert torch.equal(small.out_proj.weight, net.attn.out_proj.weight[:, rows])
    assert torch.equal(small.out_proj.bias, net.attn.out_proj.bias)
    assert (small.num_heads, small.head_dim, small.embed_dim, small.out_proj.in_features) == (2, 4, 12, 8)
    assert (small.dropout, small.batch_first, small.in_proj_weight.requires_grad) == (0.25, True, False)
    assert type(net.attn) is nn.MultiheadAttention and type(Plan.identity(net).build(net).attn) is type(net.attn)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    masked = plan.masked(net).eval().attn
    torch.testing.assert_close(small.eval()(x, x, x)[0], masked(x, x, x)[0], rtol=1e-12, atol=1e-12)
    # Dropout: with all values one, the output before out_proj is the mean over kept weights, 1 in expectation.
    with torch.no_grad():
        small.in_proj_bias[-8:] = 1.0
        small.in_proj_weight[-8:] = 0.0
        small.out_proj.weight.zero_().fill_diagonal_(1.0)
        small.out_proj.bias.zero_()
        long = torch.zeros(8, 200, 12, dtype=torch.float64)
        for need in (True, False):
            assert torch.allclose(
                small.eval()(long, long, long, need_weights=need)[0][..., :8], torch.tensor(1.0).double()
            )
            out = small.train()(long, long, long, need_weights=need)[0][..., :8]
            assert out.std() > 0.01 and abs(out.mean() - 1) < 0.01
    for edit in (Keep("attn", "out", (0,)), Keep("attn.out_proj", "in", (0,))):
        with pytest.raises(UserError, match="attn"):
            Plan((edit,), signature(net)).build(net)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_export_of_a_vit_without_some_heads(format: str, tmp_path) -> None:
    from torchvision.models import VisionTransformer

    from stillhouse.export import export

    torch.manual_seed(0)
    net = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10).eval()
    nn.init.normal_(net.heads.head.weight)
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1)]
    plan = Plan((Keep(names[0], "heads", (1,)), Keep(names[1], "heads", (0, 2, 3))), signature(net))
    parity = export(plan.build(net), torch.randn(2, 3, 32, 32), format, tmp_path / "vit")  # type: ignore[arg-type]
    assert parity.max_abs_diff < 1e-4 and parity.samples >= 8
