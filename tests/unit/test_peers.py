"""Peer sets: what is shared is computed once, trained once and exported whole, for networks of several kinds."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.errors import UserError
from stillhouse.models import ModelSpec, ResNet
from stillhouse.students.build import build_peers, check_base, choose_trunks, plan_peers
from stillhouse.students.chain import find_head
from stillhouse.students.norms import frozen_statistics, recalibrate
from stillhouse.students.peers import Nested, PeerSet, Tree
from stillhouse.students.plan import Plan
from stillhouse.system import fold

SHAPE, CLASSES = (2, 8, 8), 3


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shake(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                g = torch.Generator().manual_seed(fold("shake", seed, name))
                t.add_(size * torch.rand(t.shape, generator=g).to(t))


def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet(SHAPE, CLASSES, 8, 4).double()
    shake(model)
    return model


def vit(dropout: float = 0.0) -> nn.Module:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "drop_rate": dropout}
    spec = ModelSpec("timm:vit_tiny_patch16_224", CLASSES, (2, 16, 16), options=options)
    model = spec.build(seed=0).double()
    shake(model, size=0.2)
    return model


def build(base: nn.Module, share: str, cut: Any = (), ratios=(0.0, 0.4, 0.6), x: Tensor | None = None) -> PeerSet:
    x = rand(2, *SHAPE) if x is None else x
    trunks = choose_trunks(base, x, cut, len(ratios)) if share == "tree" else []
    plans, _, _ = plan_peers(base, x[:1], ratios, trunks=trunks, score="l1")
    return build_peers(base, plans, x, share=share, trunks=trunks)  # type: ignore[arg-type]


def students_match(peers: PeerSet, x: Tensor) -> None:
    """Each student computes what its peer computes, together and alone, after weights and statistics have moved."""
    peers.train()
    peers(x)
    shake(peers, 3)
    peers.eval()
    together = peers(x)
    for i in range(len(peers)):
        torch.testing.assert_close(peers.student(i)(x), together[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(peers(x, only=[i])[0], together[i], rtol=1e-9, atol=1e-9)


# -- gradients and statistics of what is shared ------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["tree", "nested"])
def test_averaged_gradient_of_equal_peers_is_that_of_one(share):
    base, x, y = resnet().train(), rand(6, *SHAPE), torch.arange(6) % 3
    alone = copy.deepcopy(base)
    F.cross_entropy(alone(x), y).backward()
    trunks = choose_trunks(base, x, ("layer1",), 3) if share == "tree" else []
    for averaged, factor in ((True, 1), (False, 3)):
        peers = build_peers(base, [Plan.identity(base)] * 3, x, share=share, trunks=trunks).train()  # type: ignore[arg-type]
        if averaged:
            peers.average_shared()
        sum(F.cross_entropy(z, y) for z in peers(x)).backward()
        shared = {k: p.grad for k, p in peers.trained().items() if k in peers.users()}
        assert shared and set(peers.users().values()) == {3}
        for key, grad in shared.items():
            name = key.partition(".")[2].replace("/", ".")
            torch.testing.assert_close(grad, factor * alone.get_parameter(name).grad)


@pytest.mark.parametrize("share", ["tree", "nested", "none"])
def test_running_statistics_move_once_per_step(share):
    peers = build(resnet(), share, ("layer1",)).train()
    alone, x = peers.student(0).train(), rand(6, *SHAPE)
    peers(x)
    alone(x)
    counts = {k: int(v) for k, v in peers.named_buffers() if k.endswith("num_batches_tracked")}
    assert counts and set(counts.values()) == {1}
    found = peers.tensors(0)
    for name, value in alone.named_buffers():
        torch.testing.assert_close(found[name], value)
    with frozen_statistics(peers):
        before = {k: v.clone() for k, v in peers.named_buffers()}
        peers(rand(6, *SHAPE, seed=1))
    assert all(torch.equal(v, before[k]) for k, v in peers.named_buffers())


def test_peers_part_at_different_depths():
    peers = build(resnet(), "tree", ("layer2", "layer1", "layer1"), (0.0, 0.3, 0.5))
    assert isinstance(peers, Tree)
    users = peers.users()
    assert set(users.values()) == {3} and any("layer1" in k for k in users)
    assert not any("layer2" in k for k in peers.trained() if k.startswith("trunk."))  # one user: its own
    students_match(peers, rand(6, *SHAPE))
    peers = build(resnet(), "tree", ("layer1", "layer2", "layer2"), (0.0, 0.3, 0.5))
    by = {k.split(".")[1]: n for k, n in peers.users().items()}
    assert {n for k, n in by.items() if k.startswith("layer2")} == {2}
    assert {n for k, n in by.items() if k.startswith(("layer1", "conv1", "bn1"))} == {3}
    students_match(peers, rand(6, *SHAPE))


def test_trunk_is_computed_once_and_forgotten():
    peers = build(resnet(), "tree", ("layer1",)).eval()
    calls: list[int] = []
    assert isinstance(peers, Tree)
    peers.trunk["conv1"].register_forward_hook(lambda *a: calls.append(1))
    a = peers(rand(4, *SHAPE))
    b = peers(rand(4, *SHAPE, seed=1))
    assert len(calls) == 2 and not torch.equal(a, b) and not peers.memo


def test_one_peer_may_have_a_trunk():
    peers = build(resnet(), "tree", ("layer1",), (0.3,))
    assert isinstance(peers, Tree)
    z, features, h = peers.boundary(rand(4, *SHAPE))
    assert z.shape == (1, 4, CLASSES) and h.shape[:2] == (4, 4) and len(features) == 1
    students_match(peers, rand(4, *SHAPE))


@pytest.mark.parametrize("share", ["tree", "nested", "none"])
def test_features_are_what_the_head_reads(share):
    peers = build(resnet(), share, ("layer1",)).eval()
    z, features = peers.with_features(rand(4, *SHAPE))
    torch.testing.assert_close(z, peers(rand(4, *SHAPE)))
    for i in range(3):
        state = peers.tensors(i)
        torch.testing.assert_close(features[i] @ state["linear.weight"].T + state["linear.bias"], z[i])


@pytest.mark.parametrize("share", ["tree", "nested", "none"])
def test_functional_call_reaches_every_trained_weight(share):
    """What the hypergradient stands on: the peers as a function of their named parameters."""
    peers = build(resnet(), share, ("layer1",)).eval()
    x, params = rand(4, *SHAPE), {k: p.detach().clone() for k, p in peers.trained().items()}
    torch.testing.assert_close(functional_call(peers, params, (x,)), peers(x))
    for name, p in params.items():
        if name.endswith("weight"):
            moved = functional_call(peers, {**params, name: p + 0.5 * rand(*p.shape)}, (x,))
            assert not torch.allclose(moved, peers(x)), name


def test_nested_peers_share_all_but_norms_and_the_bias_of_the_head():
    peers, base = build(resnet(), "nested"), dict(resnet().named_parameters())
    own = {k for k in base if "bn" in k} | {"linear.bias"}
    for i in range(3):
        assert {k for k, _ in peers.bodies[i].named_parameters()} == own
    assert {k.removeprefix("weights.").replace("/", ".") for k in peers.users()} == base.keys() - own


# -- refusals ----------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(self.a(x)))


def test_a_part_that_runs_twice_cannot_be_shared():
    base, x = Twice(), rand(5, 4, dtype=torch.float32)
    plans = [Plan.identity(base)] * 2
    with pytest.raises(UserError, match=r"share.*'b'.*--share none"):
        Tree(base, plans, "head", trunks=[["a", "b"]] * 2, example=x)
    with pytest.raises(UserError, match="beginnings of one another"):
        Tree(base, plans, "head", trunks=[["a"], ["b"]], example=x)
    assert all(u != "a" for u in choose_trunks(base, x, (), 2)[0])


def test_a_trunk_whose_output_a_tail_overwrites_cannot_be_shared():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x).mul_(3.0))

    base = InPlace()
    with pytest.raises(UserError, match=r"cannot share up to 'a'.*in place"):
        Tree(base, [Plan.identity(base)] * 2, "head", trunks=[["a"]] * 2, example=rand(5, 4, dtype=torch.float32))


def test_trunk_names_are_checked():
    base, x = resnet(), rand(2, *SHAPE)
    with pytest.raises(UserError, match="layer1"):
        choose_trunks(base, x, ("layr1",), 2)
    with pytest.raises(UserError, match="nothing would be left"):
        choose_trunks(base, x, ("linear",), 2)


# -- transformers: parameters between the units -----------------------------------------------------------------------


CUTS = [
    ("blocks.1",),
    ("blocks.1", "blocks.2", "blocks.2"),
    ("blocks.2", "blocks.1", "blocks.0"),
    ("blocks.0", "blocks.1", "patch_embed"),
    ("patch_embed", "blocks.1", "blocks.0"),
    ("blocks.1", "patch_embed", "blocks.0"),
]


@pytest.mark.parametrize("cut", CUTS)
def test_position_embedding_is_shared_with_the_trunk(cut):
    x = rand(3, 2, 16, 16)
    peers = build(vit(), "tree", cut, (0.0, 0.3, 0.5), x)
    owners = [k for k in peers.trained() if k.endswith(("pos_embed", "cls_token"))]
    apart = 2 if "patch_embed" in cut else 1  # a peer that parts before the embedding keeps its own
    assert len(owners) == 2 * apart
    users = peers.users()
    assert sorted(users.get(k, 1) for k in owners) == ([1, 1, 2, 2] if apart == 2 else [3, 3])
    students_match(peers, x)


def test_averaged_gradient_reaches_the_position_embedding():
    base, x, y = vit().train(), rand(4, 2, 16, 16), torch.arange(4) % 3
    F.cross_entropy(base(x), y).backward()
    trunks = choose_trunks(base, x, ("blocks.1",), 3)
    peers = build_peers(base, [Plan.identity(base)] * 3, x, share="tree", trunks=trunks).train()
    peers.average_shared()
    sum(F.cross_entropy(z, y) for z in peers(x)).backward()
    torch.testing.assert_close(peers.get_parameter("bodies.0.pos_embed").grad, base.pos_embed.grad)


def test_a_frozen_base_parameter_is_no_obstacle():
    base, x = vit(), rand(3, 2, 16, 16)
    base.pos_embed.requires_grad_(False)
    base.patch_embed.requires_grad_(False)
    peers = build(base, "tree", ("blocks.1",), (0.0, 0.4), x)
    torch.testing.assert_close(peers.eval()(x)[0], base.eval()(x))


@pytest.mark.parametrize("share", ["nested", "none"])
def test_transformer_students(share):
    students_match(build(vit(), share, (), (0.0, 0.3, 0.5), rand(2, 2, 16, 16)), rand(3, 2, 16, 16))


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10).double()
    shake(model, size=0.2)
    return model


@pytest.mark.parametrize("share", ["tree", "nested", "none"])
def test_torchvision_transformer_loses_heads(share):
    from stillhouse.students.attention import HeadAttention

    x = rand(3, 3, 32, 32)
    cut = ("encoder.layers.encoder_layer_0",) if share == "tree" else ()
    peers = build(torchvision_vit(), share, cut, (0.0, 0.4, 0.6), x[:2])
    small = peers.student(2)
    assert sum(isinstance(m, HeadAttention) for m in small.modules()) == (1 if share == "tree" else 2)
    assert list(small.state_dict()) == list(torchvision_vit().state_dict())
    students_match(peers, x)
    params = {k: p.detach().clone() for k, p in peers.trained().items()}
    for name in [k for k in params if k.endswith(("in_proj_weight", "out_proj/weight", "out_proj.weight"))]:
        moved = functional_call(peers, {**params, name: params[name] + 0.5 * rand(*params[name].shape)}, (x,))
        assert not torch.allclose(moved, peers(x)), name


def test_fresh_peers_have_attention_of_their_own():
    base, x = torchvision_vit(), rand(2, 3, 32, 32)
    plans, _, _ = plan_peers(base, x[:1], (0.0, 0.5), score="l1")
    peers = build_peers(base, plans, x, share="none", fresh=True, seeds=(1, 2))
    name = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    for i, plan in enumerate(plans):
        assert not torch.isin(peers.tensors(i)[name], base.get_parameter(name)).any()
        assert peers.tensors(i)[name].shape == plan.build(base).get_parameter(name).shape


# -- networks of the libraries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["tree", "nested"])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:convnext_atto"])
def test_library_networks(name, share, tmp_path):
    from stillhouse.export import read_tensors, save_student

    spec = ModelSpec(name, 3, (3, 32, 32), "small" if "resnet" in name else "keep")
    base, x = spec.build(seed=0), rand(4, 3, 32, 32, dtype=torch.float32)
    peers = build(base, share, (), (0.0, 0.5), x[:2]).train()
    peers(x)
    peers.eval()
    with torch.no_grad():
        together = peers(x)
        for i in range(2):
            student = peers.student(i)
            close = {"rtol": 1e-4, "atol": 1e-5 * float(together[i].abs().max() + 1)}
            torch.testing.assert_close(student(x), together[i], **close)
            save_student(tmp_path / str(i), student, plan_json=json.loads(peers.plans[i].to_json()))
            tensors, facts = read_tensors(tmp_path / str(i))
            again = Plan.from_json(facts).build(spec.build(seed=1)).eval()
            again.load_state_dict(tensors)
            assert torch.equal(again(x), student(x))
    small, whole = (sum(p.numel() for p in peers.student(i).parameters()) for i in (1, 0))
    assert small < whole


def test_a_copy_of_nested_peers_is_independent():
    peers = build(resnet(), "nested").eval()
    assert isinstance(peers, Nested)
    x = rand(3, *SHAPE)
    before = peers(x)
    other = copy.deepcopy(peers)
    shake(other, 7)
    assert torch.equal(peers(x), before) and not torch.allclose(other(x), before)


def test_looking_at_a_network_leaves_every_module_in_its_mode():
    """A user's frozen batch norm stays frozen: modes are kept module by module, not set from the root."""
    model = resnet().train()
    model.get_submodule("bn1").eval()
    before = [m.training for m in model.modules()]
    x = rand(2, *SHAPE)
    check_base(model, x, CLASSES)
    find_head(model, x)
    choose_trunks(model, x, (), 2)
    recalibrate(model, [x])
    assert [m.training for m in model.modules()] == before and not all(before)
