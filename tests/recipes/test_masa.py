"""MASA: the card's exact checks, the shared parts it brought, and mistakes told before a step."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.evaluate import count_bytes, count_params
from stillhouse.export import export
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.recipes.masa.codes import Coded, Coefficients
from stillhouse.recipes.masa.experiment import TINY, payload, tiny
from stillhouse.recipes.masa.fitting import fitted
from stillhouse.recipes.masa.recipe import Config, coded_by, distill, optimizer, shared
from stillhouse.run import Run
from stillhouse.students.dictionary import Mix, allocate, codes, leftovers, matrix_pca, root, spectrum, thin
from stillhouse.students.edits_shared import Dictionary, Split
from stillhouse.students.moments import cut_runs, lens_drift, second_moments
from stillhouse.students.parametrized import bake
from stillhouse.students.plan import Plan
from stillhouse.students.projections import projections
from stillhouse.text.language import llama_spec
from stillhouse.text.language import nats as nats_of
from stillhouse.text.windows import Windows, corpus

FIT = {"way": "fit", "variant": "qkvo", "ratio": 0.3}
ROWS = [
    Row("masa", "fitted", FIT),
    Row("masa", "free codes, images", {"coefficients": "free", "variant": "qkvo"}, {"images": True}),
]
ZERO = [  # a fit without training gives the same whatever the training settings are
    (Row("masa", "fit", FIT), Row("masa", "fit, other steps", {**FIT, "steps": 9, "coefficients": "free"})),
]
JOINT = [Row("masa", "sgd", {"optimizer": "sgd", "lr": 0.05}), Row("masa", "sgd free", {"optimizer": "sgd", "lr": 0.05,
         "coefficients": "free"})]  # fmt: skip


def llama(layers=3, kv=2, seed=0, double=True, width=16):
    spec = llama_spec(20, width=width, layers=layers, heads=2, kv_heads=kv, length=8)
    options = {**spec.options, "initializer_range": 0.3}
    model = replace(spec, options=options).build(seed=seed).eval()
    return model.double() if double else model


def tokens(n=3, seed=0):
    return {"input_ids": torch.randint(0, 20, (n, 8), generator=torch.Generator().manual_seed(seed))}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(model, kinds="qkvo", atoms=2, ranks=()):
    splits, paths = projections(model, kinds)
    edits = [*splits, *(Dictionary(tuple(p), atoms, ranks) for p in paths.values())]
    return Plan.identity(model).then(*edits), paths


def nll(model, x):
    return F.cross_entropy(model(**x).logits[:, :-1].flatten(0, 1), x["input_ids"][:, 1:].flatten())


# -- the card's exact checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
def test_as_many_atoms_as_layers_and_unit_codes_are_the_plain_network(double):
    """(1) S = L, C = I: bit for bit in the forward pass, and the atoms' gradients are the layers'."""
    model = llama(double=double)
    plan, paths = shares(model, atoms=3)
    student = plan.build(model)
    with torch.no_grad():
        for each in paths.values():
            layer = student.get_submodule(each[0])
            layer.parametrizations["weight"][0].atoms.copy_(torch.stack([model.get_submodule(p).weight for p in each]))
            for k, p in enumerate(each):
                codes(student.get_submodule(p)).copy_(torch.eye(3)[k])
    x = tokens()
    assert torch.equal(student(**x).logits, model(**x).logits)
    nll(student, x).backward()
    nll(model, x).backward()
    for each in paths.values():
        found = student.get_submodule(each[0]).parametrizations["weight"][0].atoms.grad
        torch.testing.assert_close(found, torch.stack([model.get_submodule(p).weight.grad for p in each]))


def test_codes_and_atoms_have_the_gradients_of_the_mix():
    """∂L/∂c_ls = ⟨D_s, ∂L/∂W_l⟩ and ∂L/∂D_s = Σ_l c_ls ∂L/∂W_l, with the rest A·B beside it."""
    model = llama()
    plan, paths = shares(model, "k", atoms=2, ranks=(1, 0, 2))
    student, x = plan.build(model), tokens()
    first = student.get_submodule(paths["k"][0])
    with torch.no_grad():
        for t in leftovers(first):
            t.copy_(randn(*t.shape))
    plain = copy.deepcopy(student)
    bake(plain)
    torch.testing.assert_close(nll(plain, x), nll(student, x), rtol=0, atol=0)
    nll(student, x).backward()
    nll(plain, x).backward()
    each = [student.get_submodule(p) for p in paths["k"]]
    grads = torch.stack([plain.get_submodule(p).weight.grad for p in paths["k"]])
    atoms = first.parametrizations["weight"][0].atoms
    torch.testing.assert_close(torch.stack([codes(m).grad for m in each]), grads.flatten(1) @ atoms.flatten(1).T)
    torch.testing.assert_close(atoms.grad, torch.einsum("ls,loi->soi", torch.stack([codes(m) for m in each]), grads))
    left, right = leftovers(first)
    torch.testing.assert_close(left.grad, grads[0] @ right.T)
    torch.testing.assert_close(right.grad, left.T @ grads[0])
    assert [m.parametrizations["weight"][0].rank for m in each] == [1, 0, 2]


@pytest.mark.parametrize("atoms", [0, 1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrix_pca_leaves_the_discarded_eigenvalues(atoms, dtype):
    """(2) and (3): the error, orthonormality, and the dense solution by an SVD of V."""
    own = [randn(6, 9, seed=s).to(dtype) for s in range(5)]
    basis = matrix_pca(own, atoms)
    v = torch.stack([w.flatten() for w in own])
    made = basis.codes @ basis.atoms.flatten(1) if atoms else torch.zeros_like(v)
    error = (v - made).square().sum()
    torch.testing.assert_close(error, basis.eigenvalues[atoms:].sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(basis.eigenvalues, torch.linalg.svdvals(v) ** 2, rtol=1e-5, atol=1e-5)
    flat = basis.atoms.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(atoms, dtype=dtype), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis.codes, v @ flat.T)
    if atoms:
        assert torch.linalg.matrix_rank(basis.atoms[0]) == 6  # not the SVD of each matrix: atoms are full-rank


def test_no_mean_is_taken_off():
    """Equal matrices need one atom, their direction; a centred PCA would leave nothing to share."""
    same = randn(3, 4)
    basis = matrix_pca([same, same, 2 * same], 2)
    torch.testing.assert_close(basis.codes[:, :1] * basis.atoms[0].flatten(), torch.stack([same, same, 2 * same])
                               .flatten(1))  # fmt: skip
    assert not basis.atoms[1].any()  # beyond the rank: zero, not noise blown up


def test_a_full_rank_rest_restores_the_weight():
    """(4), to 1e-4 in float32, also where the moments are nearly singular."""
    w = randn(12, 16).float()
    x = randn(9, 16, seed=1).float()  # fewer inputs than dimensions
    for whiten in (None, root(x.T @ x / 9)):
        left, right = thin(w, 12, whiten)
        assert (left @ right - w).abs().max() < 1e-4


def test_the_whitened_rest_is_the_best_of_its_rank():
    """E‖(R − Z)x‖² = Σ_{i>q} σ_i², never above the plain SVD's; the inputs are the second axis of the weight."""
    r, x = randn(7, 5), randn(400, 5, seed=1) * torch.tensor([5.0, 1.0, 0.2, 3.0, 0.01])
    a = x.T @ x / len(x)
    m = root(a, 0.0)
    torch.testing.assert_close(m @ m.T, a, rtol=1e-9, atol=1e-12)
    for q in (0, 1, 3):
        left, right = thin(r, q, m)
        plain_left, plain_right = thin(r, q)
        error, plain = ((r - z) @ x.T for z in (left @ right, plain_left @ plain_right))
        error, plain = (e.square().sum(0).mean() for e in (error, plain))
        torch.testing.assert_close(error, spectrum(r, m)[q:].sum())
        assert error <= plain and (q == 0 or error < 0.9 * plain)
        assert left.shape == (7, q) and right.shape == (q, 5)
    for seed in range(5):  # nor above any other of this rank
        other = randn(7, 1, seed=seed + 5) @ randn(1, 5, seed=seed + 9)
        assert ((r - other) @ m).square().sum() > spectrum(r, m)[1:].sum()


def test_dropping_the_coefficient_network_changes_nothing():
    """(5), bit for bit, with codes that have moved."""
    student, _, paths = shared(llama(double=False), Config(variant="qkvo", atoms=2), 0)
    coded = coded_by(student, paths, Config(variant="qkvo"), 0)
    with torch.no_grad():
        for p in coded.coefficients.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    before, names = coded(**tokens()).logits, {n for n, _ in coded.named_parameters() if "coefficients" in n}
    model = coded.finish()
    assert torch.equal(model(**tokens()).logits, before)
    assert names and not any("coefficients" in n for n, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert count_params(model) == count_params(student)


# -- from scratch -------------------------------------------------------------------------------------------------


def test_codes_start_distinct_and_with_norm_one():
    for make in (Coefficients(12, {"q": 4, "v": 3}, seed=s) for s in range(3)):
        for c in make().values():
            torch.testing.assert_close(c.square().sum(1), torch.ones(12), rtol=0, atol=1e-2)
            assert torch.cdist(c, c)[~torch.eye(12, dtype=bool)].min() > 1e-3
    assert not torch.equal(Coefficients(4, {"q": 2}, seed=0)()["q"], Coefficients(4, {"q": 2}, seed=1)()["q"])


def test_mixes_start_as_varied_as_the_weights_were():
    model = llama(layers=6, width=64)
    student, _, paths = shared(model, Config(variant="qkvo"), 0)
    for each in paths.values():
        assert len(codes(student.get_submodule(each[0]))) == 2  # a third of the layers
        made = torch.stack([student.get_submodule(p).weight for p in each])
        first = torch.stack([model.get_submodule(p).weight for p in each])
        torch.testing.assert_close(made.std((1, 2)), first.std((1, 2)), rtol=0.1, atol=0)
        assert torch.pdist(made.flatten(1)).min() > 0.1


def test_the_coefficient_network_learns_and_nothing_of_it_decays():
    student, _, paths = shared(llama(double=False), Config(atoms=2), 0)
    coded = coded_by(student, paths, Config(), 0)
    nll(coded, tokens()).backward()
    assert all(p.grad is not None and p.grad.any() for p in coded.coefficients.parameters())
    mine = set(map(id, coded.coefficients.parameters()))
    moved = [p for p in coded.parameters() if p.requires_grad]
    assert not any(p.requires_grad for n, p in student.named_parameters() if n.endswith("original0"))
    groups = optimizer(moved, cfg=Config(), coding=mine).param_groups
    assert sum(len(g["params"]) for g in groups) == len(moved)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in moved if p.dim() > 1} - mine
    assert {g["lr"] for g in groups for p in g["params"] if id(p) in mine} == {Config().lr * Config().code_lr}
    free = shared(llama(double=False), Config(atoms=2), 0)[0]
    groups = optimizer(list(free.parameters()), cfg=Config(), coding=set()).param_groups
    assert not any(g["weight_decay"] for g in groups for p in g["params"] if p.dim() == 1)


def test_a_kind_has_a_dictionary_of_its_own_and_savings_are_the_cards():
    """1 − S(dh + L)/(L·d·h) per kind; keys and values have their own shape under grouped queries."""
    model = llama(layers=6, kv=1)
    for variant, kinds in (("qkv", 3), ("qkvo", 4)):
        student, edits, paths = shared(model, Config(variant=variant), 0)
        assert len(edits) == kinds and all(e.atoms == 2 for e in edits)
        gone = sum((6 - 2) * model.get_submodule(each[0]).weight.numel() - 6 * 2 for each in paths.values())
        assert count_params(model) - count_params(student) == gone
    assert model.get_submodule(paths["k"][0]).weight.shape == (8, 16)


# -- without training ---------------------------------------------------------------------------------------------


def test_the_budget_is_met_and_counted_as_stored():
    """S·d·h + S·L + Σ q_l (d + h) <= (1 − ρ)·L·d·h, within one rank; size on disk is the size claimed."""
    model, cfg = llama(layers=4, kv=1, double=False), Config(way="fit", variant="qkvo", ratio=0.25, groups=2)
    student, edits, parts = fitted(model, [tokens()], cfg)
    asked = 0.75 * sum(len(p.paths) * p.shape.numel() for p in parts)
    stored = sum(p.stored for p in parts)
    assert asked - max(sum(p.shape) for p in parts) < stored <= asked
    assert len(parts) == 8 and {len(p.paths) for p in parts} == {2}
    assert count_params(model) - count_params(student) == sum(len(p.paths) * p.shape.numel() for p in parts) - stored
    plan = Plan.identity(model).then(*edits)
    assert sum(t.numel() for t in plan.encoded(student.state_dict()).values()) == count_params(student)
    for part in parts:
        basis = matrix_pca([model.get_submodule(p).weight for p in part.paths], part.atoms)
        for k, (path, rank) in enumerate(zip(part.paths, part.ranks, strict=True)):
            mix = (basis.codes[k] @ basis.atoms.flatten(1)).view(part.shape)
            made = student.get_submodule(path).weight - mix
            assert torch.linalg.matrix_rank(made, atol=1e-5) <= rank


def test_what_is_said_to_be_lost_is_lost():
    """The rows' error is E‖(W − Ŵ)x‖² / E‖W x‖² on the calibration samples."""
    model, cfg = llama(layers=4), Config(way="fit", variant="qkv", ratio=0.4, groups=1, damping=1e-12)
    x = tokens(8)
    student, _, parts = fitted(model, [x], cfg)
    moments = second_moments(model, [p for part in parts for p in part.paths], [x])
    for row in (r for part in parts for r in part.rows()):
        w, a = model.get_submodule(row["layer"]).weight, moments[row["layer"]]
        lost = w - student.get_submodule(row["layer"]).weight
        torch.testing.assert_close(
            torch.tensor(row["error"], dtype=torch.float64), (lost @ a * lost).sum() / (w @ a * w).sum(),
            rtol=1e-5, atol=1e-9,
        )  # fmt: skip


def test_the_number_of_atoms_is_the_one_that_leaves_least():
    model, x = llama(layers=4), [tokens()]
    cfg = Config(way="fit", variant="qkv", ratio=0.3, groups=1)
    chosen = fitted(model, x, cfg)[2]

    def left(parts):
        return [sum(float(g[r:].sum()) for g, r in zip(p.gains, p.ranks, strict=True)) for p in parts]

    alone = {s: [fitted(model, x, replace(cfg, atoms=s, projections=(f"{k}=self_attn.{k}_proj",)))[2][0] for k in "qkv"]
             for s in (1, 2)}  # fmt: skip
    for k, part in enumerate(chosen):
        best = min((1, 2), key=lambda s: left([alone[s][k]])[0])
        assert part.atoms == best


def test_ranks_go_where_they_take_off_most():
    gains = [torch.tensor([10.0, 6.0, 1.0]), torch.tensor([8.0, 7.0, 0.5])]
    assert allocate(gains, [1, 1], 3, [3, 3]) == [1, 2]
    assert allocate(gains, [4, 1], 6, [3, 3]) == [1, 2]  # per stored value
    assert allocate(gains, [1, 1], 100, [2, 1]) == [2, 1]
    assert allocate(gains, [5, 9], 4, [3, 3]) == [0, 0]


def test_moments_are_those_of_the_inputs():
    model, x = llama(), [tokens(2), tokens(4, seed=1)]
    _, paths = projections(model)
    found = second_moments(model, [*paths["q"], *paths["k"], *paths["o"]], x)
    seen = {p: [] for p in paths["q"] + paths["o"]}
    hooks = [model.get_submodule(p).register_forward_pre_hook(lambda _, a, p=p: seen[p].append(a[0].flatten(0, 1)))
             for p in seen]  # fmt: skip
    for batch in x:
        model(**batch)
    for hook in hooks:
        hook.remove()
    for p, rows in seen.items():
        rows = torch.cat(rows)
        torch.testing.assert_close(found[p], rows.T @ rows / 48)
    assert all(found[k] is found[q] for q, k in zip(paths["q"], paths["k"], strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_padding_is_left_out_of_moments_and_drift():
    from stillhouse.text.classifiers import bert_spec

    bert = bert_spec(20, 3, width=16, layers=3, heads=2, length=8).build(seed=0).eval()
    ids = tokens(2)["input_ids"]
    mask = (torch.arange(8) < torch.tensor([[5], [5]])).long()
    path = "bert.encoder.layer.1.attention.self.query"
    padded = second_moments(bert, [path], [{"input_ids": ids, "attention_mask": mask}])
    short = second_moments(bert, [path], [{"input_ids": ids[:, :5], "attention_mask": mask[:, :5]}])
    torch.testing.assert_close(padded[path], short[path], rtol=1e-4, atol=1e-5)
    blocks = [f"bert.encoder.layer.{k}" for k in range(3)]
    both = [lens_drift(bert, blocks, [{"input_ids": ids[:, :n], "attention_mask": mask[:, :n]}]) for n in (8, 5)]
    assert both[0] == pytest.approx(both[1], rel=1e-4) and len(both[0]) == 2


def test_the_drift_is_the_kl_between_what_the_head_says():
    model, x = llama(), tokens(4)
    found = lens_drift(model, [f"model.layers.{k}" for k in range(3)], [x])
    with torch.no_grad():
        hidden = model(**x, output_hidden_states=True).hidden_states
        last = {}
        hook = model.model.layers[2].register_forward_hook(lambda _, __, out: last.update(h=out))
        model(**x)
        hook.remove()
        states = [hidden[1], hidden[2], last["h"]]
        p = [model.lm_head(model.model.norm(h.mean(1))).log_softmax(-1) for h in states]
        wanted = [F.kl_div(b, a, log_target=True, reduction="batchmean").item() for a, b in pairwise(p)]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert lens_drift(model, ["model.layers.0", "model.layers.0"], [x]) == [0.0]


def test_runs_are_cut_where_the_drift_is_largest():
    assert cut_runs([0.1, 0.9, 0.2, 0.8, 0.1, 0.3, 0.2], 3) == (2, 2, 4)
    assert cut_runs([5.0, 0.1, 0.2, 0.1, 4.0], 2) == (3, 3)  # no run of one block
    assert cut_runs([0.1] * 5, 3) == (2, 2, 2) and cut_runs([], 1, least=1) == (1,)
    with pytest.raises(UserError, match="6 blocks make 1 to 3 runs of at least 2, got 4"):
        cut_runs([0.1] * 5, 4)


# -- whose layers -------------------------------------------------------------------------------------------------


def test_library_networks():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=5)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=20))
    config = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**config, vocab_size=20))
    hf_vit = transformers.ViTForImageClassification(transformers.ViTConfig(**config, image_size=32, patch_size=16))
    x = torch.randn(2, 3, 32, 32)
    for model, inputs in ((vit, x), (gpt, tokens()), (bert, tokens()), (hf_vit, x)):
        model.eval()
        plan, paths = shares(model, atoms=4)
        assert sorted(paths) == ["k", "o", "q", "v"] and all(len(p) == 4 for p in paths.values())
        student = plan.build(model)
        with torch.no_grad():
            one, two = (m(**inputs) if isinstance(inputs, dict) else m(inputs) for m in (model, student))
            one, two = (o.logits if hasattr(o, "logits") else o for o in (one, two))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)  # as many atoms as layers: nothing is lost
        assert Plan.from_json(plan.to_json()) == plan
        small, _, _ = fitted(model, [inputs], Config(way="fit", variant="qkvo", ratio=0.3, groups=1))
        assert count_params(small) < count_params(model)
    assert sum(e.kind == "split" for e in shares(gpt)[0].edits) == 8 and shares(vit)[0].edits[0].sizes == (24,) * 3
    assert shares(bert)[1]["o"][0] == "bert.encoder.layer.0.attention.output.dense"


def test_layers_that_are_not_found_are_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({k: nn.Linear(4, 4) for k in ("a", "b")})

        def forward(self, x):
            return self.attn["b"](self.attn["a"](x))

    net = nn.Sequential(Block(), Block())
    whole = nn.ModuleDict({"blocks": net})
    with pytest.raises(UserError, match=r"no layers that could be its 'q'; name them: --projections q=PATH .*attn.a"):
        projections(whole)
    assert projections(whole, named=("up=attn.a",))[1] == {"up": ["blocks.0.attn.a", "blocks.1.attn.a"]}
    with pytest.raises(UserError, match=r"'up=attn\.c': expected KIND=PATH"):
        projections(whole, named=("up=attn.c",))
    torchs = nn.ModuleDict({"layers": nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(2))})
    with pytest.raises(UserError, match="MultiheadAttention keeps queries, keys and values in one parameter"):
        projections(torchs)
    twice = nn.ModuleDict({"blocks": nn.ModuleList(
        nn.ModuleDict({n: nn.ModuleDict({"q_proj": nn.Linear(2, 2)}) for n in ("self_attn", "cross_attn")})
        for _ in range(2))})  # fmt: skip
    with pytest.raises(UserError, match=r"2 layers that could be its 'q': self_attn.q_proj, cross_attn.q_proj"):
        projections(twice)


# -- the edits ----------------------------------------------------------------------------------------------------


def test_a_shared_network_is_stored_once_and_read_back(tmp_path):
    spec = llama_spec(20, width=16, layers=3, heads=2, kv_heads=1, length=8)
    model = spec.build(seed=0).eval()
    plan, _ = shares(model, atoms=2, ranks=(2, 0, 1))
    student = plan.build(model).eval()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    member = Member("shared", student, plan)
    Models([member], tokens(), spec).save(tmp_path)
    again = stillhouse.load(tmp_path / "students/shared")
    assert torch.equal(again(**tokens()).logits, student(**tokens()).logits)
    assert count_params(again) == count_params(student) < count_params(model)
    assert payload(tmp_path / "students/shared/model.safetensors") == member.weight_bytes == count_bytes(student)
    atoms = [m.atoms for m in again.modules() if isinstance(m, Mix)]
    assert len({id(a) for a in atoms}) == 4 and len(atoms) == 12  # shared again, not copies
    assert not (tmp_path / "students/shared/config.json").exists()  # from_pretrained would fill in fresh layers


def test_exports_and_baking(tmp_path):
    model = llama(double=False)
    student = shares(model, atoms=2, ranks=(1, 1, 0))[0].build(model).eval()
    assert export(student, tokens(2), "torch-export", tmp_path / "a.pt2").max_abs_diff < 1e-5
    before = student(**tokens()).logits
    assert bake(student) == []
    assert torch.equal(student(**tokens()).logits, before)
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in model.named_parameters()] or (
        {n for n, _ in student.named_parameters()} == {n for n, _ in model.named_parameters()}
    )


def test_export_to_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    vit = ModelSpec("timm:vit_tiny_patch16_224", 3, (1, 8, 8), options={"patch_size": 4, "embed_dim": 16, "depth": 3,
                    "num_heads": 2}).build(seed=0).eval()  # fmt: skip
    student = shares(vit, atoms=1)[0].build(vit).eval()
    assert export(student, torch.zeros(2, 1, 8, 8), "onnx", tmp_path / "a.onnx").max_abs_diff < 1e-4


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Dictionary(("0", "1"), 3), "0: 2 layers take 0 to 2 atoms, got 3"),
        (Dictionary(("0", "2"), 1), r"2: a dictionary has one shape, 0 has \(4, 4\), this \(4, 2\)"),
        (Dictionary(("0", "9"), 1), "no module '9'"),
        (Dictionary(("0", "3"), 1), "3: a ReLU cannot be mixed from a dictionary; expected Linear"),
        (Dictionary(("0", "1"), 1, (1, 5)), "2 ranks of 0 to 4 are needed"),
        (Split("0", (1, 2)), r"parts \[1, 2\] must add up to its 4 outputs"),
        (Split("3", (4,)), "a ReLU cannot be split"),
    ],
)
def test_edits_that_cannot_be(edit, says):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 4), nn.ReLU())
    with pytest.raises(UserError, match=says) as error:
        Plan.identity(net).then(edit).build(net)
    assert "\n" not in str(error.value)
    done = Dictionary(("0", "1"), 1)
    with pytest.raises(UserError, match="0: its weight is already a function of others"):
        Plan.identity(net).then(done, done).build(net)


def test_a_split_layer_computes_the_same():
    net = nn.Sequential(nn.Linear(4, 9).double())
    net[0].weight.requires_grad_(False)
    parts = Plan.identity(net).then(Split("0", (2, 3, 4))).build(net)
    x = randn(5, 4)
    torch.testing.assert_close(parts(x), net(x))
    assert [p.weight.shape[0] for p in parts[0].children()] == [2, 3, 4]
    assert not any(p.weight.requires_grad for p in parts[0].children()) and parts[0].get_submodule("0").bias is not None


# -- the user's way -----------------------------------------------------------------------------------------------


def test_a_network_of_ones_own_is_not_changed(tmp_path):
    text = corpus(length=16, limit=4000)
    model = llama_spec(text.vocabulary, width=16, layers=4, heads=2, length=16).build(seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = Run(tmp_path, quiet=True, device="cpu")
    models = distill(run, text, model, replace(TINY, **FIT, base_steps=0))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert models.base is model and len(models.matrices) == 16 and models.tokenizer is text.tokenizer
    assert models.cost["stored_values"] <= models.cost["asked_values"]
    models = distill(Run(tmp_path / "b", quiet=True, device="cpu"), text, model, replace(TINY, steps=2))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert nats_of(models["student"].model, Windows(text.test.tokens, 16, text.vocabulary), limit=4) > 0


def test_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "ownmasa.py").write_text(
        "from stillhouse.text.language import llama_spec\n"
        "def net(vocabulary, length):\n"
        "    return llama_spec(vocabulary, width=16, layers=4, heads=2, length=length).build()\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "mine.txt", "--model", "ownmasa:net", "--length", "16", "--device", "cpu", "--quiet",
             "--batch", "4"]  # fmt: skip
    assert invoke(["run", "masa", *flags, "--model", "llama", "--way", "fit", "--out", "refused"]) == 2
    said = capsys.readouterr().err.strip()
    assert "starts from trained weights" in said and said.count("\n") == 0
    first = [*flags, "--steps", "2", "--variant", "qkvo", "--out", "one"]
    assert invoke(["run", "masa", *first]) == 0
    again = ["--data", "mine.txt", "--length", "16", "--device", "cpu", "--quiet", "--way", "fit"]
    assert invoke(["run", "masa", *again, "--model", "one/students/student", "--out", "two"]) == 2
    assert "its weight is already a function of shared ones" in capsys.readouterr().err
    fit = [*flags, "--way", "fit", "--base-steps", "2", "--ratio", "0.3", "--out", "three"]
    assert invoke(["run", "masa", *fit]) == 0
    assert stillhouse.load("three/students/student").config.num_hidden_layers == 4
    assert (tmp_path / "three/report.html").exists()
    digits = ["--data", "digits", "--limit", "40", "--model", "timm:vit_tiny_patch16_224", "--quiet", "--steps", "1",
              "--batch", "4", "--device", "cpu"]  # fmt: skip
    assert invoke(["run", "masa", *digits, "--projections", "q=attn.qk", "--out", "four"]) == 2
    assert "'q=attn.qk': expected KIND=PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "llama", "--ratio", "0.5"], "--ratio does nothing here: it is of --way fit"),
        (["--model", "hf:x", "--way", "fit", "--steps", "9"], "--steps does nothing here: it is of --way train"),
        (["--model", "hf:x", "--way", "fit", "--lr", "1"], "--lr does nothing here: --way fit trains nothing without"),
        (["--model", "llama", "--coefficients", "free", "--hidden", "9"], "--hidden does nothing here"),
        (["--layers", "12"], "--layers does nothing here: it is of --model llama"),
        (["--model", "llama", "--pretrained"], "--pretrained does nothing here: it is of images"),
        (["--data", "digits", "--length", "9"], "--length does nothing here: it is of text"),
    ],
)
def test_flags_that_would_do_nothing(flags, says, tmp_path, capsys):
    assert invoke(["run", "masa", *flags, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said and not (tmp_path / "run").exists()


def test_shared_weights_are_not_shared_or_quantised_again(tmp_path):
    """Codes of single layers would undo the sharing, and the plan would not fit what is saved."""
    from stillhouse.recipes.gpusq_vit.experiment import TINY as SPARSE
    from stillhouse.recipes.gpusq_vit.recipe import distill as sparsified

    data = load("digits", limit=64)
    models = tiny(Run(tmp_path / "a", quiet=True, device="cpu"), replace(TINY, **FIT), images=True)
    student, spec = models["student"], models.spec
    again = {"network": student.model, "plan": student.plan}
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.0: its weight is already a function of shared ones"):
        distill(Run(tmp_path / "b", quiet=True, device="cpu"), data, spec, replace(TINY, steps=1), **again)
    cfg = replace(SPARSE, teacher_epochs=0.0, epochs=0.0, quantized_epochs=0.0)
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.0: its weight is a mix from a dictionary that other"):
        sparsified(Run(tmp_path / "c", quiet=True, device="cpu"), data, spec, cfg, **again)
    run = Run(tmp_path / "d", quiet=True, device="cpu")
    family = sparsified(run, data, spec, replace(cfg, exclude=("*.attn.*",)), **again)
    family.save(tmp_path / "d")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for m in family:
            assert torch.equal(stillhouse.load(tmp_path / "d/students" / m.name)(x), m.model(x))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ratio": 1.5}, r"ratio: expected a part in \[0, 1\], got 1.5"),
        ({"steps": 0}, "steps: expected a number from 1, got 0"),
        ({"calibration": 0}, "calibration: expected a number from 1, got 0"),
        ({"atoms": -1}, "atoms: expected a number from 0, got -1"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(UserError, match=says) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_told_before_a_step(tmp_path):
    run, text = Run(tmp_path, quiet=True, device="cpu"), corpus(length=16, limit=4000)
    spec = llama_spec(text.vocabulary, width=16, layers=3, heads=2, length=16)
    cases = [
        (spec, {"atoms": 4}, "atoms: 3 layers take 1 to 3, got 4"),
        (spec, {**FIT, "base_steps": 0, "ratio": 0.9}, "ratio 0.9 cannot be reached: a group of 3 blocks with 1 atoms"),
        (spec, {**FIT, "base_steps": 0, "groups": 2}, "3 blocks make 1 to 1 runs of at least 2, got 2"),
        (llama_spec(9, width=16, layers=3, heads=2, length=16), {}, "cannot read input_ids|expected logits"),
    ]
    for base, changes, says in cases:
        with pytest.raises(UserError, match=says) as error:
            distill(run, text, base, replace(TINY, **changes))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="gives 3 logits, but digits has 10 classes"):
        vit = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
        distill(run, load("digits", limit=32), ModelSpec("timm:vit_tiny_patch16_224", 3, (1, 8, 8), options=vit), TINY)
    assert not (tmp_path / "stages").exists()


def test_images_and_text_have_one_recipe(tmp_path):
    models = tiny(Run(tmp_path, quiet=True, device="cpu"), replace(TINY, **FIT), images=True)
    assert models["student"].model.blocks[0].attn.qkv.get_submodule("0").weight.shape == (16, 16)
    assert {m["kind"] for m in models.matrices} == set("qkvo")
    assert isinstance(Coded(models["student"].model, {}, Coefficients(1, {})), nn.Module)
