"""Structured pruning: groups, scores and budgets, on small nets by hand and on real architectures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.errors import UserError
from stillhouse.students.plan import Keep, Plan, signature, take
from stillhouse.students.prune import Group, find_groups, fit_budget, score_groups

ZOO = [
    "tv:resnet18",
    "tv:resnet50",
    "tv:mobilenet_v2",
    "tv:mobilenet_v3_small",
    "tv:vgg11_bn",
    "tv:convnext_tiny",
    "tv:efficientnet_b0",
    "timm:resnet18",
    "timm:mobilenetv3_small_100",
    "timm:vit_tiny_patch16_224",
    "timm:deit_tiny_patch16_224",
]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        size = {"img_size": 64} if "patch16" in name else {}
        return timm.create_model(name[5:], num_classes=10, **size)
    import torchvision

    return getattr(torchvision.models, name[3:])(num_classes=10)


def ce(images: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: F.cross_entropy(model(images), labels)


@dataclass
class Case:
    model: nn.Module
    x: Tensor
    groups: list[Group]
    whole: list[str]
    scores: list[Tensor]

    def fit(self, ratio: float, **options: object):
        return fit_budget(self.model, self.x[:1], self.groups, self.scores, ratio, **options)


@pytest.fixture(scope="module", params=ZOO)
def case(request: pytest.FixtureRequest) -> Case:
    model = make(request.param)
    side = 64 if "patch16" in request.param else 32
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, side, side, generator=g)
    with torch.no_grad():
        for p in model.parameters():  # zero-initialised branches and tiny layer scales would hide mistakes
            if p.dim() == 1 or p.numel() == max(p.shape):
                p.uniform_(0.5, 1.5, generator=g)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 1.0
        model.train()(x)
    groups, whole = find_groups(model, x[:1])
    scores = score_groups(model, groups, "snip", ce(x, torch.arange(4)))
    return Case(model.eval(), x, groups, whole, scores)


def macs(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x[:1])
    return counter.get_total_flops() // 2


def zeroed(plan: Plan, model: nn.Module) -> nn.Module:
    """A full-size copy with zeros where removed channels are read; written anew here, not with Plan.masked."""
    full = Plan.identity(model).build(model)
    with torch.no_grad():
        for e in plan.edits:
            m = full.get_submodule(e.module)
            if e.axis == "in":
                gone = sorted(set(range(m.weight.shape[1])) - set(e.index))
                m.weight[:, gone] = 0
            elif e.axis == "heads":
                proj = m.out_proj if isinstance(m, nn.MultiheadAttention) else m.proj
                for h in sorted(set(range(m.num_heads)) - set(e.index)):
                    proj.weight[:, h * m.head_dim : (h + 1) * m.head_dim] = 0
    return full


def removed(plan: Plan, model: nn.Module) -> set[tuple[str, str, int]]:
    out = set()
    for e in plan.edits:
        m = model.get_submodule(e.module)
        width = m.num_heads if e.axis == "heads" else m.weight.shape[1 if e.axis == "in" else 0]
        out |= {(e.module, e.axis, i) for i in set(range(width)) - set(e.index)}
    return out


@torch.no_grad()
def test_zoo_masked_equals_sliced_and_costs_are_exact(case: Case) -> None:
    plan, budget = case.fit(0.5)
    small, full = plan.build(case.model).eval(), zeroed(plan, case.model).eval()
    a, b, base = small(case.x), full(case.x), case.model(case.x)
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert (base - b).abs().max() > 1e-3 * b.abs().max()  # or the comparison would say nothing
    assert abs(budget.error) < 0.01
    assert budget.base == macs(case.model, case.x) and budget.reached == macs(small, case.x)
    assert list(small.state_dict()) == list(case.model.state_dict())


@torch.no_grad()
def test_zoo_params_view_and_json(case: Case) -> None:
    plan, budget = case.fit(0.2, measure="params")
    assert Plan.from_json(plan.to_json()) == plan
    small = plan.build(case.model).eval()
    assert budget.reached == sum(p.numel() for p in small.parameters()) and abs(budget.error) < 0.01
    slices = plan.slices(case.model)
    tensors = dict(case.model.named_parameters()) | dict(case.model.named_buffers())
    shared = functional_call(small, {n: take(t, slices[n]) for n, t in tensors.items()}, (case.x[:1],))
    torch.testing.assert_close(shared, small(case.x[:1]), rtol=0, atol=0)


def test_zoo_nested(case: Case) -> None:
    cuts = [removed(case.fit(r)[0], case.model) for r in (0.3, 0.5, 0.55, 0.7)]
    assert all(a < b for a, b in itertools.pairwise(cuts))


def test_zoo_leaves_stem_residual_stream_and_classifier_whole(case: Case) -> None:
    layers = [n for n, m in case.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    first, last = layers[0], layers[-1]
    makers = {m.module for g in case.groups for m in g.members if m.axis == "out"}
    said = {s.split(": ")[0]: s for s in case.whole}
    assert last not in makers and "outputs of the model" in said[last]
    if "features.0" not in makers:  # VGG has no residual stream, so its first layer may go
        assert first not in makers and first in said


def test_resnets_give_their_inner_convolutions() -> None:
    for name, inner in (("tv:resnet18", ["conv1"]), ("tv:resnet50", ["conv1", "conv2"])):
        net = make(name)
        blocks = [n for n, m in net.named_modules() if hasattr(m, "conv2") and n]
        groups, said = find_groups(net, torch.zeros(1, 3, 32, 32))
        assert [g.name for g in groups] == [f"{b}.{c}" for b in blocks for c in inner]
        assert sum("residual add" in s for s in said) >= len(blocks)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_heads(gated: bool) -> None:
    from timm.layers import Attention
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(16, 4, embed_dim=24, depth=2, num_heads=6, num_classes=3, qkv_bias=True).eval()
    if gated:
        net.blocks[1].attn = Attention(24, 6, gated=True, qkv_bias=True)
    x = torch.randn(2, 3, 16, 16)
    groups, _ = find_groups(net, x[:1])
    assert [(g.name, g.size) for g in groups] == [
        ("blocks.0.attn", 6), ("blocks.0.mlp.fc1", 96), ("blocks.1.attn", 6), ("blocks.1.mlp.fc1", 96),
    ]  # fmt: skip
    scores = [torch.tensor([1.0, 6, 2, 5, 3, 4]) / 100 if g.size == 6 else torch.ones(96) for g in groups]
    plan, budget = fit_budget(net, x[:1], groups, scores, 0.22, kappa=1.0)
    kept = {e.module: e.index for e in plan.edits if e.axis == "heads"}
    best, n = (1, 3, 5, 4, 2, 0), len(kept["blocks.0.attn"])
    assert 1 < n < 6 and all(index == tuple(sorted(best[: len(index)])) for index in kept.values())
    small = plan.build(net)
    attn = small.blocks[0].attn
    assert (attn.num_heads, attn.attn_dim, attn.qkv.out_features, attn.proj.in_features) == (n, 4 * n, 12 * n, 4 * n)
    torch.testing.assert_close(small(x), zeroed(plan, net)(x), rtol=1e-5, atol=1e-5)
    assert budget.reached == macs(small, x)
    l1 = score_groups(net, groups, "l1")[0]
    w = net.blocks[0].attn
    rows, columns = w.qkv.weight.view(3, 6, 4, 24).abs(), w.proj.weight.view(24, 6, 4).abs()
    torch.testing.assert_close(l1, (rows.sum((0, 2, 3)) + columns.sum((0, 2))).double(), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------- small nets, by hand


class Two(nn.Module):
    """A custom module with concatenation, flatten and a shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.bn, self.act = nn.BatchNorm2d(10), nn.ReLU()
        self.c = nn.Conv2d(10, 8, 3)
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        return self.fc(torch.flatten(self.act(self.c(x)), 1))


class Residual(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.norm = nn.Conv2d(8, 16, 3, padding=1), norm or nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(self.norm(self.one(x)).relu())
        return self.fc(x.mean((2, 3)))


X8 = torch.linspace(-2, 2, 4 * 3 * 64).view(4, 3, 8, 8).sin()


def test_concat_and_flatten() -> None:
    torch.manual_seed(0)
    net = Two()
    net.train()(X8)
    groups, _ = find_groups(net, X8[:1])
    assert {g.name: g.size for g in groups} == {"a": 4, "b": 6, "c": 8}
    members = {(m.module, m.axis): m.index for g in groups if g.name == "b" for m in g.members}
    assert members["bn", "out"] == tuple((4 + i,) for i in range(6)) == members["c", "in"]
    flat = {m.module: m.index for g in groups if g.name == "c" for m in g.members}["fc"]
    assert flat[2] == tuple(range(72, 108))
    plan, budget = fit_budget(net, X8[:1], groups, score_groups(net, groups, "l1"), 0.5)
    small = plan.build(net).eval()
    torch.testing.assert_close(small(X8), zeroed(plan, net).eval()(X8), rtol=1e-5, atol=1e-5)
    assert budget.reached == macs(small, X8)


def test_scopes() -> None:
    net = Residual()
    inside, said = find_groups(net, X8[:1])
    assert [g.name for g in inside] == ["one"]
    assert {s.split(":")[0] for s in said} == {"stem", "two", "fc"}
    groups, _ = find_groups(net, X8[:1], scope="all")
    assert {g.name for g in groups} == {"stem", "one"}
    stream = next(g for g in groups if g.name == "stem")
    assert {(m.module, m.axis) for m in stream.members} == {
        ("stem", "out"), ("two", "out"), ("one", "in"), ("fc", "in"),
    }  # fmt: skip
    net.train()(X8)
    plan, _ = fit_budget(net, X8[:1], groups, score_groups(net, groups, "l1"), 0.6)
    torch.testing.assert_close(plan.build(net).eval()(X8), zeroed(plan, net).eval()(X8), rtol=1e-5, atol=1e-5)


def test_ignore_only_and_unknown_paths() -> None:
    net = Two()
    groups, said = find_groups(net, X8[:1], ignore=["c"])
    assert groups == [] and sum("ignore='c'" in s for s in said) == 3
    assert [g.name for g in find_groups(net, X8[:1], ignore=["a"])[0]] == ["b", "c"]
    assert [g.name for g in find_groups(net, X8[:1], only=["b"])[0]] == ["b"]
    with pytest.raises(UserError, match="did you mean 'bn'"):
        find_groups(net, X8[:1], ignore=["bnn"])
    with pytest.raises(UserError, match="list of module paths"):
        find_groups(net, X8[:1], ignore="a")
    with pytest.raises(UserError, match="scope"):
        find_groups(net, X8[:1], scope="outside")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="example does not fit"):
        find_groups(net, X8[:1, :, :4, :4])


class Reads(nn.Module):
    """Something the trace cannot see: channels mixed by position, by softmax, by a recurrent layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=4 if how == "grouped" else 1)
        self.free, self.fc = nn.Linear(8, 6), nn.Linear(6, 4)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.how == "shuffle":
            x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        elif self.how == "softmax":
            x = x.softmax(1)
        elif self.how == "gru":
            x = self.gru(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, (8, 8))
        elif self.how == "output":
            return self.fc(self.free(x.mean((2, 3))).relu()), x
        return self.fc(self.free(self.two(x).mean((2, 3))).relu())


@pytest.mark.parametrize("how", ["shuffle", "softmax", "gru", "grouped", "output"])
def test_what_cannot_be_pruned_is_said_and_the_rest_goes_on(how: str) -> None:
    torch.manual_seed(0)
    groups, said = find_groups(Reads(how), X8[:1])
    assert "one" not in {g.name for g in groups} and "free" in {g.name for g in groups}
    paths = {s.split(": ")[0] for s in said}
    assert "one" in paths
    assert how != "gru" or "gru" in paths
    assert how != "grouped" or "not depthwise" in next(s for s in said if s.startswith("two:"))


def test_layer_norm_groups_run_though_their_statistics_move() -> None:
    net = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 3))
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    groups, _ = find_groups(net, x)
    assert [(g.name, g.size) for g in groups] == [("0", 10)]
    plan, _ = fit_budget(net, x[:1], groups, score_groups(net, groups, "l1"), 0.5)
    assert plan.build(net)[1].normalized_shape == (5,) and plan.build(net)(x).shape == (2, 3)


def test_parametrised_and_tied_layers_stay_whole() -> None:
    net = Residual()
    torch.nn.utils.parametrizations.weight_norm(net.two)
    groups, said = find_groups(net, X8[:1])
    assert groups == [] and any(s.startswith("two: its weights are parametrised") for s in said)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    tied[2].weight = tied[0].weight
    groups, said = find_groups(tied, torch.zeros(1, 6))
    assert groups == [] and any("shares its weights" in s for s in said)


def vit(**options: object) -> nn.Module:
    """A small torchvision ViT with random biases, for zeros would hide mistakes."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 10} | options
    net = VisionTransformer(32, 8, **sizes)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1 or not p.any():
                p.uniform_(-0.5, 0.5)
    return net.eval()


VIT_X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


@pytest.fixture(scope="module")
def vit_case() -> Case:
    net = vit()
    groups, whole = find_groups(net, VIT_X[:1])
    scores = score_groups(net, groups, "snip", ce(VIT_X, torch.arange(2)))
    return Case(net, VIT_X, groups, whole, scores)


@torch.no_grad()
def test_torchvision_vit_groups_and_head_scores(vit_case: Case) -> None:
    net, layer = vit_case.model, "encoder.layers.encoder_layer_{}.{}"
    wanted = [(layer.format(i, n), size) for i in (0, 1) for n, size in (("self_attention", 4), ("mlp.0", 64))]
    assert [(g.name, g.size) for g in vit_case.groups] == wanted
    assert not any("self_attention" in s for s in vit_case.whole)
    w = net.get_submodule(wanted[0][0])
    rows, columns = w.in_proj_weight.view(3, 4, 8, 32).abs(), w.out_proj.weight.view(32, 4, 8).abs()
    l1 = score_groups(net, vit_case.groups, "l1")[0]
    torch.testing.assert_close(l1, (rows.sum((0, 2, 3)) + columns.sum((0, 2))).double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.4, 0.5])
def test_torchvision_vit_meets_budgets_exactly(vit_case: Case, ratio: float, measure: str) -> None:
    net, x = vit_case.model, vit_case.x
    plan, budget = vit_case.fit(ratio, measure=measure)
    assert budget.met and {"heads", "out"} <= {e.axis for e in plan.edits}
    assert Plan.from_json(plan.to_json()) == plan
    small = plan.build(net)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one kernel is not counted
    found = [macs(m, x) if measure == "macs" else sum(p.numel() for p in m.parameters()) for m in (net, small)]
    torch.backends.mha.set_fastpath_enabled(fast)
    assert found == [budget.base, budget.reached]
    torch.testing.assert_close(small(x), zeroed(plan, net)(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small(x), plan.masked(net)(x), rtol=1e-5, atol=1e-5)
    assert (small(x) - net(x)).abs().max() > 1e-2
    slices = plan.slices(net)
    shared = functional_call(small, {n: take(p, slices[n]) for n, p in net.named_parameters()}, (x,))
    torch.testing.assert_close(shared, small(x), rtol=0, atol=0)
    assert [(n, t.shape) for n, t in small.state_dict().items()] == [
        (n, take(t, slices[n]).shape) for n, t in net.state_dict().items()
    ]


def test_torchvision_vit_plans_are_nested(vit_case: Case) -> None:
    def gone(plan: Plan) -> set[tuple[str, str, int]]:
        whole = {(g.name, m.axis): g.size for g in vit_case.groups for m in g.members[:1]}
        edits = [(e, whole[e.module, e.axis]) for e in plan.edits if (e.module, e.axis) in whole]
        return {(e.module, e.axis, i) for e, n in edits for i in set(range(n)) - set(e.index)}

    cuts = [gone(vit_case.fit(r)[0]) for r in (0.2, 0.4, 0.5, 0.6)]
    assert all(a < b for a, b in itertools.pairwise(cuts))


@torch.no_grad()
def test_a_cut_vit_can_be_cut_again(vit_case: Case) -> None:
    once = vit_case.fit(0.3)[0].build(vit_case.model)
    groups, _ = find_groups(once, VIT_X[:1])
    assert sum(g.members[0].axis == "heads" for g in groups) == 2
    plan, budget = fit_budget(once, VIT_X[:1], groups, score_groups(once, groups, "l1"), 0.4)
    twice = plan.build(once)
    torch.testing.assert_close(twice(VIT_X), plan.masked(once)(VIT_X), rtol=1e-5, atol=1e-5)
    assert budget.reached == macs(twice, VIT_X)


def test_gradients_of_a_cut_vit_have_tangents_and_those_of_the_masked_one() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    net, x = vit().double(), VIT_X.double()
    name = "encoder.layers.encoder_layer_0.self_attention"
    plan = Plan((Keep(name, "heads", (1, 3)),), signature(net))
    small, slices = plan.build(net), plan.slices(net)
    weights = dict(small.named_parameters())
    g = torch.Generator().manual_seed(1)
    move = {n: torch.randn(w.shape, generator=g, dtype=w.dtype) for n, w in weights.items()}
    loss = lambda w: functional_call(small, w, (x,)).sin().sum()  # noqa: E731
    small.train()  # in eval mode the whole heads of the other layer would take a fused kernel
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(loss, (weights,), (move,))
        grads = torch.autograd.grad(loss(weights), list(weights.values()))
        whole = plan.masked(net).train()
        full = torch.autograd.grad(whole(x).sin().sum(), list(whole.parameters()))
    torch.testing.assert_close(tangent, sum((a * b).sum() for a, b in zip(grads, move.values())))
    for (n, _), a, b in zip(net.named_parameters(), grads, full, strict=True):
        torch.testing.assert_close(a, take(b, slices[n]), msg=n)


def test_attention_without_a_packed_weight_or_with_extra_tokens_stays_whole() -> None:
    class Net(nn.Module):
        def __init__(self, **options: object) -> None:
            super().__init__()
            self.attn, self.fc = nn.MultiheadAttention(8, 4, batch_first=True, **options), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x[..., : self.attn.kdim]
            return self.fc(x + self.attn(x, y, y)[0])

    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    assert [g.name for g in find_groups(Net(), x)[0]] == ["attn"]
    for options in ({"kdim": 6, "vdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        groups, said = find_groups(Net(**options), x)
        assert groups == [] and any(s.startswith("attn: an nn.MultiheadAttention with kdim") for s in said)
        with pytest.raises(UserError, match=r"attn: .*no heads to cut"):
            Plan((Keep("attn", "heads", (0,)),), signature(Net(**options))).build(Net(**options))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")  # of torch, for the masked full network
def test_transformer_encoder_loses_heads_also_under_padding() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    groups, _ = find_groups(net, x)
    assert [g.size for g in groups] == [4, 16, 4, 16]
    plan, _ = fit_budget(net, x, groups, score_groups(net, groups, "l1"), 0.6)
    assert "heads" in {e.axis for e in plan.edits}
    small, full = plan.build(net), plan.masked(net)
    torch.testing.assert_close(small(x), full(x), rtol=1e-5, atol=1e-5)
    a, b = (m(x, src_key_padding_mask=padded)[~padded] for m in (small, full))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------- scores


def test_scores_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    groups, _ = find_groups(net, x)
    a, b = net[0].weight, net[2].weight
    (l1,) = score_groups(net, groups, "l1")
    torch.testing.assert_close(l1, a.abs().sum(1) + b.abs().sum(0))
    ga, gb = torch.autograd.grad(F.cross_entropy(net(x), y), [a, b])
    (snip,) = score_groups(net, groups, "snip", ce(x, y))
    torch.testing.assert_close(snip, (a * ga).abs().sum(1) + (b * gb).abs().sum(0))


def test_signed_sum_vanishes_before_batchnorm_but_the_absolute_does_not() -> None:
    torch.manual_seed(0)
    net = Residual().double().train()
    net.norm.eps = 1e-12  # the scale invariance is exact without eps
    nn.init.zeros_(net.one.bias)
    x = X8.double()
    w = net.one.weight
    (g,) = torch.autograd.grad(F.cross_entropy(net(x), torch.arange(4)), w)
    signed, absolute = (w * g).sum((1, 2, 3)).abs(), (w * g).abs().sum((1, 2, 3))
    assert (signed < 1e-8 * absolute).all() and absolute.min() > 1e-6


def test_scoring_leaves_no_trace() -> None:
    net = nn.Sequential(Residual(), nn.Dropout(0.5)).eval()
    net[0].one.weight.requires_grad_(False)
    net[0].norm.eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    rng = torch.get_rng_state()
    groups, _ = find_groups(net, X8[:1])
    first = score_groups(net, groups, "snip", ce(X8, torch.arange(4)))
    again = score_groups(net, groups, "snip", ce(X8, torch.arange(4)))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and first[0].sum() > 0
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not any(m.training for m in net.modules())
    assert not net[0].one.weight.requires_grad and net[0].two.weight.requires_grad


def test_bn_scores_and_their_refusal() -> None:
    net = Residual()
    nn.init.uniform_(net.norm.weight, -1, 1)
    groups, _ = find_groups(net, X8[:1])
    torch.testing.assert_close(score_groups(net, groups, "bn")[0], net.norm.weight.detach().abs().double())
    groups, _ = find_groups(Two(), X8[:1])
    with pytest.raises(UserError, match="c has none"):
        score_groups(Two(), groups, "bn")
    with pytest.raises(UserError, match="needs loss="):
        score_groups(net, groups, "snip")
    with pytest.raises(UserError, match="method must be"):
        score_groups(net, groups, "magic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="loss is nan"):
        score_groups(Two(), groups, "snip", lambda m: m(X8).sum() * float("nan"))


# ----------------------------------------------------------------- budgets


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def fit_mlp(net: nn.Module, ratio: float, **options: object):
    x = torch.zeros(1, net[0].in_features)
    groups, _ = find_groups(net, x)
    scores = options.pop("scores", None) or score_groups(net, groups, "l1")
    return fit_budget(net, x, groups, scores, ratio, **options)


def test_least_important_units_go_and_kappa_compares_layers() -> None:
    net = mlp(4, 10, 10, 4)
    scores = [torch.arange(1.0, 11.0), torch.arange(10.0, 110.0, 10.0)]
    plan, _ = fit_mlp(net, 0.4, scores=scores, kappa=1.0)
    kept = {(e.module, e.axis): e.index for e in plan.edits}
    n = len(kept["0", "out"])
    assert ("2", "out") not in kept and n < 10 and kept["0", "out"] == tuple(range(10 - n, 10))
    plan, _ = fit_mlp(net, 0.4, scores=scores, kappa=0.0)
    kept = {(e.module, e.axis): e.index for e in plan.edits}
    assert abs(len(kept["0", "out"]) - len(kept["2", "out"])) <= 1 and kept["2", "out"][-1] == 9


def test_layer_bound_and_round_to() -> None:
    net = mlp(8, 64, 64, 8)
    for bound, least in ((0.9, 7), (0.5, 32)):
        plan, _ = fit_mlp(net, 0.4, scores=[torch.zeros(64), torch.ones(64)], layer_bound=bound, kappa=1.0)
        assert min(len(e.index) for e in plan.edits) >= least
    for ratio in (0.3, 0.5, 0.7):
        plan, budget = fit_mlp(net, ratio, round_to=8)
        assert all(len(e.index) % 8 == 0 for e in plan.edits)
        assert abs(budget.error) < 0.3
    odd, _ = fit_mlp(mlp(8, 20, 8), 0.4, round_to=8)
    assert [len(e.index) for e in odd.edits] in ([16, 16], [8, 8])


def test_tiny_nets_get_as_near_as_they_can() -> None:
    net = mlp(4, 5, 4)
    plan, budget = fit_mlp(net, 0.5)
    assert len(plan.edits[0].index) in (2, 3) and budget.base == 40 and budget.target == 20
    assert budget.error == pytest.approx(budget.reached / 20 - 1)
    assert fit_mlp(net, 0.0)[0] == Plan.identity(net)


@pytest.mark.parametrize("measure", ["macs", "params"])
def test_whole_takes_a_trunk_out_of_the_budget(measure: str) -> None:
    net = mlp(16, 64, 64, 64, 8)
    x = torch.zeros(1, 16)
    groups, _ = find_groups(net, x, ignore=["0", "2"])
    assert [g.name for g in groups] == ["4"]
    scores = score_groups(net, groups, "l1")
    plan, budget = fit_budget(net, x, groups, scores, 0.5, measure=measure, whole=["0", "2"])
    small = plan.build(net)
    count = {
        "macs": small[4].weight.numel() + small[6].weight.numel(),
        "params": sum(p.numel() for layer in small[4:] for p in layer.parameters()),
    }
    base = {"macs": 64 * 64 + 64 * 8, "params": 64 * 64 + 64 + 64 * 8 + 8}
    assert budget.base == base[measure] and budget.reached == count[measure] and abs(budget.error) < 0.01
    assert torch.equal(small[2].weight, net[2].weight)
    free, _ = find_groups(net, x)
    with pytest.raises(UserError, match="whole= sets apart"):
        fit_budget(net, x, free, score_groups(net, free, "l1"), 0.5, whole=["0"])


def test_costs_are_per_sample() -> None:
    net = mlp(4, 8, 2)
    groups, _ = find_groups(net, torch.zeros(5, 4))
    _, budget = fit_budget(net, torch.zeros(5, 4), groups, score_groups(net, groups, "l1"), 0.5)
    assert (budget.base, budget.reached) == (48, 24)


def test_refusals() -> None:
    net = mlp(8, 32, 32, 8)
    fit = partial(fit_mlp, net)
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"\[0, 1\)"):
            fit(ratio)
    with pytest.raises(UserError, match=r"at most 0\.\d+ of macs can go.*layer_bound=0.2"):
        fit(0.8, layer_bound=0.2)
    for option, says in [
        ({"measure": "time"}, "measure"),
        ({"kappa": 2.0}, "kappa"),
        ({"layer_bound": 1.0}, "layer_bound"),
        ({"round_to": 0}, "round_to"),
        ({"whole": ["9"]}, "whole='9'"),
        ({"scores": [torch.ones(3)]}, "one tensor of shape"),
    ]:
        with pytest.raises(UserError, match=says):
            fit(0.5, **option)
    with pytest.raises(UserError, match="second value of find_groups"):
        fit_budget(net, torch.zeros(1, 8), [], [], 0.5)
