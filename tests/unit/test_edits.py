"""Plans with other edits than kept channels: what they build, that they compose, and that folders hold all of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.errors import UserError
from stillhouse.export import read_tensors
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.students.edits import Depth, Factor, Pack, Remove, factorised, largest_paying_rank
from stillhouse.students.packing import stored_bits
from stillhouse.students.parametrized import bake, parametrize_weights, weight_layers
from stillhouse.students.plan import Keep, Plan, signature
from stillhouse.students.projectors import MinMax, Symmetric

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    return ModelSpec("stillhouse:cnn", 10, (1, 8, 8)).build(seed=0).eval()


def mlp():
    return ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [24, 16]}).build(seed=0)


@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Conv2d(3, 8, 3, stride=2, padding=1)], ids=["linear", "conv"])
def test_factors_are_the_truncated_svd(layer):
    w = layer.weight.detach().flatten(1).double()
    s = torch.linalg.svdvals(w)
    for rank in (1, 3, 8):
        first, second = factorised(layer, rank)
        made = second.weight.detach().flatten(1).double() @ first.weight.detach().flatten(1).double()
        assert torch.allclose(((made - w) ** 2).sum(), (s[rank:] ** 2).sum(), atol=1e-6)
    x = torch.randn(2, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 7, 7)
    assert torch.allclose(factorised(layer, 8)(x), layer(x), atol=1e-5)  # the full rank loses nothing


def test_a_rank_that_does_not_fit_says_which_pays():
    with pytest.raises(UserError, match=r"1…6 .fewer weights from 2 down"):
        factorised(nn.Linear(6, 6), 7)
    assert largest_paying_rank(nn.Linear(4, 12)) == 2
    with pytest.raises(UserError, match="4 groups"):
        factorised(nn.Conv2d(4, 8, 3, groups=4), 1)


def test_depth_copies_and_unties():
    body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model = nn.Sequential(nn.Linear(2, 4), body)
    made = Plan((Depth("1", (0, 0, 2, 1)),), signature(model)).build(model)
    assert len(made[1]) == 4 and torch.equal(made[1][0].weight, made[1][1].weight)
    assert torch.equal(made[1][2].weight, body[2].weight) and torch.equal(made[1][3].weight, body[1].weight)
    with torch.no_grad():
        made[1][0].weight.zero_()
    assert made[1][1].weight.abs().sum() > 0 and body[0].weight.abs().sum() > 0


def test_depth_of_transformers_knows_its_layers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    made = Plan((Depth("model.layers", (0, 3)),), signature(model)).build(model).eval()
    assert made.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 4
    ids = torch.arange(6)[None]
    assert made(ids).logits.shape == (1, 6, 20)
    said = made.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False)  # the cache counts layers
    assert said.shape == (1, 9)


def test_what_is_removed_leaves_its_input_or_zero():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return x + self.inner(x)

    model, x = nn.Sequential(Residual(), nn.Linear(3, 2)), torch.randn(4, 3)
    base = signature(model)
    assert torch.equal(Plan((Remove("0"),), base).build(model)(x), model[1](x))
    assert torch.equal(Plan((Remove("0.inner"),), base).build(model)(x), model[1](x + x))
    assert torch.equal(Plan((Remove("0.inner", "zero"),), base).build(model)(x), model[1](x))


def composed(base):
    """Channels cut, then a layer factorised, then everything packed; baked, with its plan."""
    plan = Plan((Keep("1", "out", tuple(range(0, 24, 2))), Keep("3", "in", tuple(range(0, 24, 2)))), signature(base))
    plan = plan.then(Factor("3", 4))
    model = plan.build(base)
    layers = weight_layers(model)
    parametrize_weights(model, layers, lambda path, _: Symmetric(4) if path != "5" else MinMax(3, 16))
    want = model(X).detach()
    plan = plan.then(*bake(model))
    assert torch.equal(model(X), want)  # baked = parametrised, to the bit
    return plan, model


def test_pruned_then_factorised_then_packed_from_its_folder(tmp_path):
    base = mlp()
    plan, model = composed(base)
    assert [type(e).__name__ for e in plan.edits] == ["Keep", "Keep", "Factor", "Pack", "Pack", "Pack", "Pack"]
    assert Plan.from_json(plan.to_json()) == plan
    spec = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [24, 16]})
    Models([Member("small", model, plan)], X[:1], spec).save(tmp_path)
    again = stillhouse.load(tmp_path / "students/small")
    assert torch.equal(again(X), model(X))
    stored, _ = read_tensors(tmp_path / "students/small")
    for edit in (e for e in plan.edits if isinstance(e, Pack)):  # what is on disk is what is claimed, and no more
        mine = [t for k, t in stored.items() if k.rpartition(".")[0] == edit.module and "bias" not in k]
        shape = model.get_submodule(edit.module).weight.shape
        assert 8 * sum(t.nbytes for t in mine) == stored_bits(shape, edit.code(stored)) < 32 * shape.numel()


def test_a_plan_of_other_edits_shares_nothing():
    base = mlp()
    with pytest.raises(UserError, match=r"only kept channels.*factor"):
        Plan((Factor("1", 2),), signature(base)).slices(base)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Factor("9", 2), "no module '9'"),
        (Factor("2", 2), "a ReLU cannot be factorised; expected Linear or Conv2d"),
        (Depth("1", (0,)), "cannot be made deeper"),
        (Depth("", (0, 99)), "must name blocks 0…5"),
        (Remove("1", "noise"), "'input' or 'zero'"),
        (Pack("2", 4), "no weight to pack"),
    ],
    ids=["path", "kind", "not a list", "block", "leaves", "no weight"],
)
def test_edits_that_do_not_fit(edit, words):
    base = mlp()
    with pytest.raises(UserError, match=words):
        Plan((edit,), signature(base)).build(base)


def test_an_edit_of_a_later_version_is_named():
    text = Plan((Factor("1", 2),), "x").to_json().replace('"factor"', '"fold"')
    with pytest.raises(UserError, match="kind 'fold'"):
        Plan.from_json(text)


def test_another_base_is_refused():
    plan, _ = composed(mlp())
    with pytest.raises(UserError, match="another network"):
        plan.build(net())
