"""CAST: AdamS, masks, scales, the end, what it gives, mistakes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of
from stillhouse.export import export
from stillhouse.recipes.cast import AdamS, Config, distill
from stillhouse.recipes.cast.experiment import ARMS, PRESET, TINY, tiny
from stillhouse.recipes.cast.layers import (
    Scaled,
    choose,
    finalise,
    find_mask,
    leftover,
    make_sparse,
    masks,
)
from stillhouse.recipes.cast.reach import derived, reach
from stillhouse.recipes.cast.recipe import Sparse
from stillhouse.run import Run
from stillhouse.students.parametrized import bake
from stillhouse.students.patterns import Pattern
from stillhouse.system import Clock
from stillhouse.teachers import Frozen
from stillhouse.text.language import llama_spec, nats
from stillhouse.text.windows import Windows, corpus
from stillhouse.weights import constant, cosine

ROWS = [
    Row("cast", "straight-through", {"method": "ste", "teach": 0.67, "temperature": 2.0}),
    Row("cast", "fixed mask in pairs", {"method": "fixed", "pattern": "4:8:2"}),
    Row("cast", "one-shot", {"steps": 0}),
]
ZERO = [(Row("cast", "weight 0", {"teach": 0.0}), Row("cast", "weight 0, softer", {"teach": 0.0, "temperature": 3.0}))]
# Adam's step is as long for a gradient that is zero but for rounding: steps of 1e-5 leave room below 1e-6 of it.
_SLOW = {"lr": 1e-5, "dense_lr": 1e-5, "decay": 1e-3}
JOINT = [Row("cast", "slow", _SLOW), Row("cast", "slow straight-through", {**_SLOW, "method": "ste"})]

DOUBLE = {"dtype": torch.float64}
G = torch.Generator().manual_seed(0)
TWO_FOUR = Pattern(2, 4)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=G, **DOUBLE))


def moved(p: nn.Parameter, optimizer: AdamS, grad: torch.Tensor) -> torch.Tensor:
    before = p.detach().clone()
    p.grad = grad
    optimizer.step()
    return p.detach() - before


# -- AdamS --------------------------------------------------------------------------------------------------------


def by_hand(w, mask, grads, *, lr, decay, steps, b1=0.9, b2=0.999, eps=1e-8):
    """One entry at a time, as the paper writes it."""
    out = w.clone().flatten()
    for i in range(len(out)):
        mean = square = 0.0
        for t, g in enumerate(grads):
            g = float(g.flatten()[i])
            mean = b1 * mean + (1 - b1) * g
            a, theta = t / steps, float(out[i])
            sign = (theta > 0) - (theta < 0)
            pulled = mean if mask.flatten()[i] else (1 - a) * mean + a * decay * sign
            square = b2 * square + (1 - b2) * pulled**2
            out[i] = theta - lr * (pulled / (1 - b1 ** (t + 1))) / (math.sqrt(square / (1 - b2 ** (t + 1))) + eps)
    return out.view_as(w)


def test_first_step_is_ten_learning_rates():
    """(1) lr/(1 − β₁) for kept and masked weights alike: v is made of a momentum that starts at zero."""
    p, g = weight(3, 4), torch.randn(3, 4, generator=G, **DOUBLE)
    mask = torch.rand(3, 4, generator=G) > 0.5
    step = moved(p, AdamS([p], {p: mask}, steps=100, lr=1e-3, eps=1e-14), g)
    torch.testing.assert_close(step, -1e-2 * g.sign(), rtol=1e-10, atol=0)


def test_kept_weights_without_gradient_never_move():
    """(2)"""
    p = weight(2, 4)
    before = p.detach().clone()
    optimizer = AdamS([p], {p: torch.ones(2, 4, dtype=torch.bool)}, steps=50, lr=0.1, decay=1.0)
    for _ in range(50):
        assert not moved(p, optimizer, torch.zeros_like(p)).any()
    assert torch.equal(p, before)


def test_masked_weights_without_gradient_go_to_the_floor():
    """(3) |θ| falls step by step until it is of the order of the learning rate, and stays there."""
    p = nn.Parameter(torch.tensor([[0.3, -0.2, 0.1, 0.0]], **DOUBLE))
    lr, steps = 1e-3, 1000
    optimizer = AdamS([p], {p: torch.zeros(1, 4, dtype=torch.bool)}, steps=steps, lr=lr, decay=1e-3)
    for _ in range(steps):
        before = p.detach().abs()
        moved(p, optimizer, torch.zeros_like(p))
        high = before > 2 * lr
        assert (p.detach().abs() <= before)[high].all() and (p.detach().abs()[~high] <= 2 * lr).all()
    assert (p.detach().abs() <= 2 * lr).all() and p[0, 3] == 0  # sign(0) = 0


@pytest.mark.parametrize(("decay", "kept"), [(0.0, 1.0), (0.3, 0.5), (2.0, 0.0)])
def test_every_step_as_the_paper_writes_it(decay, kept):
    """(5) with λ = 0 and all m = 1 it is Adam with v made of the momentum; and the mixed cases."""
    p, mask = weight(3, 4), torch.rand(3, 4, generator=G) < kept
    grads = torch.randn(20, 3, 4, generator=G, **DOUBLE)
    wanted = by_hand(p.detach(), mask, grads, lr=0.01, decay=decay, steps=25)
    optimizer = AdamS([p], {p: mask}, steps=25, lr=0.01, decay=decay)
    for g in grads:
        moved(p, optimizer, g)
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-14)


def test_weights_without_a_mask_take_adams_step():
    p, q = weight(3, 4), weight(5)
    twins = [nn.Parameter(x.detach().clone()) for x in (p, q)]
    ours = AdamS([{"params": [p, q]}], {}, steps=9, lr=0.01)
    theirs = torch.optim.Adam(twins, lr=0.01)
    for _ in range(9):
        for a, b in zip((p, q), twins, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=G, **DOUBLE)
        ours.step()
        theirs.step()
    for a, b in zip((p, q), twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_its_state_goes_on_where_it_was_and_knows_its_length():
    p, mask = weight(2, 4), torch.rand(2, 4, generator=G) > 0.5
    grads = torch.randn(8, 2, 4, generator=G, **DOUBLE)
    optimizer = AdamS([p], {p: mask}, steps=8, decay=0.1)
    for g in grads[:4]:
        moved(p, optimizer, g)
    q = nn.Parameter(p.detach().clone())
    again = AdamS([q], {q: mask}, steps=8, decay=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for g in grads[4:]:
        moved(p, optimizer, g)
        moved(q, again, g)
    assert torch.equal(p, q)
    longer = AdamS([q], {q: mask}, steps=9)
    with pytest.raises(UserError, match="of a training of 8 steps, not 9"):
        longer.load_state_dict(optimizer.state_dict())


def test_masks_are_aligned_with_their_weights_or_refused():
    p = weight(2, 4)
    flat = nn.Parameter(p.detach().flatten())
    good = torch.ones(2, 4, dtype=torch.bool)
    for params, given, says in [
        ([flat], {p: good}, "flattened or sharded"),
        ([p], {p: good.flatten()}, r"bool mask like it, got torch.bool \(8,\)"),
        ([p], {p: good.float()}, "bool mask"),
        ([nn.Parameter(p.detach().bfloat16())], {}, "float32 or float64"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            AdamS(params, given, steps=3)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="steps >= 1"):
        AdamS([p], {p: good}, steps=0)


# -- masks and scales ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1:4", "2:4", "3:5", "4:8:2"])
def test_masks_along_either_axis(text):
    pattern = Pattern.parse(text)
    w = torch.randn(6, 40, generator=G)
    mask = find_mask(w, pattern)
    assert torch.equal(find_mask(w.T, pattern, 0), mask.T)
    for group, kept in zip(w.view(-1, pattern.m), mask.view(-1, pattern.m), strict=True):
        units = group.abs().view(-1, pattern.unit).sum(1)
        best = units.topk(pattern.n // pattern.unit).indices
        assert set(kept.view(-1, pattern.unit).all(1).nonzero().flatten().tolist()) == set(best.tolist())
        assert kept.sum() == pattern.n
    assert find_mask(torch.ones(1, 4), TWO_FOUR).tolist() == [[True, True, False, False]]  # ties: still two


def conv1d(i: int, o: int) -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(o, i)
    return layer.double()


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6).double(), lambda: conv1d(8, 6)], ids=["Linear", "Conv1D"])
def test_scaling_starts_as_the_layer_and_folds(make):
    """(4) A = 1 is the layer itself; folding keeps the outputs; zeros stay; one factor per output and block."""
    base = nn.Sequential(make())
    x = torch.randn(5, 8, generator=G, **DOUBLE)
    model = copy.deepcopy(base)
    make_sparse(model, ["0"], "cast", TWO_FOUR, 2)
    assert torch.equal(model(x), base(x))  # dense: the mask is read by the optimiser alone
    chain = model[0].parametrizations.weight
    along = 0 if "Conv1D" in type(base[0]).__name__ else 1
    assert chain[0].scale.shape == ((2, 6) if along == 0 else (6, 2))
    with torch.no_grad():
        chain[0].scale.copy_(torch.rand(chain[0].scale.shape, generator=G, **DOUBLE) + 0.5)
    out = model(x)
    out.square().sum().backward()
    w, g = chain.original.detach(), torch.autograd.grad(base(x).sum(), base[0].weight)[0]
    scale = chain[0].scale.detach()
    rows = (w if along else w.T).view(6, 2, 4) * (scale if along else scale.T)[:, :, None]
    wanted = rows.view(6, 8) if along else rows.view(6, 8).T
    torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=1e-14, atol=0)
    upstream = (x.T @ (2 * out.detach())) if along == 0 else (2 * out.detach()).T @ x
    by_hand = ((upstream if along else upstream.T) * (w if along else w.T)).view(6, 2, 4).sum(2)
    torch.testing.assert_close(chain[0].scale.grad, by_hand if along else by_hand.T, rtol=1e-10, atol=1e-12)
    assert g.shape == w.shape
    bake(model)
    torch.testing.assert_close(model(x), out, rtol=1e-6, atol=1e-6)
    assert type(model[0]) is type(base[0]) and not hasattr(model[0], "parametrizations")


def test_no_factors_and_factors_that_do_not_fit():
    w = weight(3, 9)
    assert Scaled(w, w > 0, 0)(w) is w
    with pytest.raises(UserError, match="9 inputs cannot be cut into 2 blocks"):
        Scaled(w, w > 0, 2)


def test_the_end_prunes_by_the_last_masks_and_counts():
    model = nn.Sequential(nn.Linear(8, 6, bias=False).double(), conv1d(6, 4))
    make_sparse(model[:1], ["0"], "cast", TWO_FOUR)
    make_sparse(model, ["1"], "cast", Pattern(1, 2), 1)
    kept = {k: v.clone() for k, v in zip("ab", masks(model).values(), strict=True)}
    with torch.no_grad():
        for chain in (model[0].parametrizations.weight, model[1].parametrizations.weight):
            chain.original.copy_(torch.randn(chain.original.shape, generator=G, **DOUBLE))
    raw = model[0].parametrizations.weight.original.detach().clone()
    parts = [nn.Sequential(model[0]), nn.Sequential(model[1])]
    edits, found = finalise(parts[0], TWO_FOUR)
    assert found == {"groups": 12, "exact": 12} and edits[0].sparse == (2, 4, 1)
    assert torch.equal(model[0].weight, raw * kept["a"])
    edits, found = finalise(parts[1], Pattern(1, 2))
    assert found == {"groups": 12, "exact": 12} and edits[0].axis == 0
    assert torch.equal(model[1].weight != 0, kept["b"])


def test_a_kept_weight_of_zero_is_counted_and_more_than_n_is_an_error():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    nn.init.zeros_(model[0].weight[0])
    make_sparse(model, ["0"], "cast", TWO_FOUR)
    broken = copy.deepcopy(model)
    assert finalise(model, TWO_FOUR)[1] == {"groups": 2, "exact": 1}
    broken[0].parametrizations.weight[0].mask[0] = True
    with pytest.raises(AssertionError, match="mask is not 2:4"):
        finalise(broken, TWO_FOUR)


def test_what_is_left_in_masked_weights():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -2.0, 1.0, -0.5]]))
    make_sparse(model, ["0"], "cast", TWO_FOUR)
    assert leftover(model) == 0.75 / 3


# -- which layers -------------------------------------------------------------------------------------------------


def gpt2(width: int = 16, vocabulary: int = 40):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=width, n_layer=2, n_head=2, vocab_size=vocabulary, n_positions=32,
                                     bos_token_id=0, eos_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def test_scope_is_what_stands_in_the_blocks():
    transformers = pytest.importorskip("transformers")
    llama = llama_spec(40, width=16, layers=2, heads=2).build()
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    assert choose(llama, TWO_FOUR) == [f"model.layers.{k}.{n}" for k in (0, 1) for n in names]
    assert choose(llama, TWO_FOUR, skip=["*.mlp.*"]) == [f"model.layers.{k}.{n}" for k in (0, 1) for n in names[:4]]
    assert choose(llama, TWO_FOUR, modules=["*.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert [p.split("h.0.")[1] for p in choose(gpt2(), TWO_FOUR)[:4]] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]  # fmt: skip
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16))  # fmt: skip
    assert len(choose(opt, TWO_FOUR)) == 2 * 6


def test_layers_that_cannot_be_sparse_are_named():
    llama = llama_spec(40, width=24, layers=1, heads=2, hidden=20).build()
    with pytest.raises(UserError, match=r"down_proj: 8 does not divide its 20 inputs.*--skip model.layers.0.mlp.down"):
        choose(llama, Pattern(2, 8))
    assert len(choose(llama, Pattern(2, 8), skip=["*.down_proj"])) == 6
    with pytest.raises(UserError, match=r"no module 'mlp\.up'"):
        choose(llama, TWO_FOUR, modules=["mlp.up"])
    with pytest.raises(UserError, match="Embedding is not supported"):
        choose(llama, TWO_FOUR, modules=["model.embed_tokens"])
    with pytest.raises(UserError, match=r"convert the model with \.float"):
        choose(copy.deepcopy(llama).bfloat16(), TWO_FOUR)
    llama.model.layers[0].self_attn.q_proj.weight = llama.model.layers[0].self_attn.k_proj.weight
    with pytest.raises(UserError, match="q_proj: its weight is tied"):
        choose(llama, TWO_FOUR)
    with pytest.raises(UserError, match="no list of blocks"):
        choose(nn.Linear(4, 4), TWO_FOUR)


# -- how far ------------------------------------------------------------------------------------------------------


def test_reach_is_the_sum_of_rate_times_share():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    nn.init.constant_(model[0].weight, -0.5)
    nn.init.constant_(model[1].weight, 0.25)
    far = reach(model, ["0", "1"], 0.01, constant(), 100)
    assert far.way == pytest.approx(0.01 * 99 / 2) and far.least == pytest.approx(0.495 / 0.5)
    far.check(0.98, 0.01, 100)
    with pytest.raises(UserError, match=r"0.99 times the mean weight of 0; 3 times are needed: give --lr 0.0306") as e:
        far.check(3.0, 0.01, 100)
    assert "\n" not in str(e.value)
    reach(model, ["0", "1"], 0.0306, constant(), 100).check(3.0, 0.0306, 100)  # what it says is enough
    falling = reach(model, ["0"], 1.0, cosine(), 1000).way / 1000
    assert falling == pytest.approx(0.25 - 1 / math.pi**2, abs=1e-3)


# -- the system ---------------------------------------------------------------------------------------------------


def parts(method: str = "cast", **changes):
    cfg = Config(**{"method": method, "lr": 1e-3, **changes})
    base = llama_spec(20, width=8, layers=1, heads=2, length=6).build(seed=1).double()
    student = copy.deepcopy(base)
    make_sparse(student, choose(student, cfg.sparsity), method, cfg.sparsity, cfg.blocks)
    told = [f"kd:{cfg.teach}?T={cfg.temperature}"] if cfg.teach else []
    teacher = llama_spec(20, width=8, layers=1, heads=2, length=6).build(seed=2).double()
    system = Sparse(student, Frozen(teacher), cfg=cfg, objectives=told, label=1 - cfg.teach)
    rows = Windows(np.arange(40) * 7 % 20, 6, 20).take(np.arange(3))
    return base, student, teacher, system, rows


def test_the_loss_by_hand():
    """(1 − η) CE + η T² KL(teacher ‖ student), means over tokens; the forward pass is dense."""
    base, _, teacher, system, batch = parts(teach=0.3, temperature=2.0)
    terms = system.learn(batch, Clock(steps=10)).terms
    z, t = (logits_of(call(m, batch["input"])) for m in (base, teacher))
    log_p, log_q = (t / 2).log_softmax(-1), (z / 2).log_softmax(-1)
    ce = nn.functional.cross_entropy(z.flatten(0, 1), batch["label"].flatten())
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(terms["label"], 0.7 * ce, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms["kd"], 0.3 * 4 * kl, rtol=1e-10, atol=1e-12)
    *_, plain, batch = parts(teach=0.0)
    assert list(plain.learn(batch, Clock(steps=10)).terms) == ["label"]


def test_the_decay_of_the_straight_through_way_is_ramped():
    """Its gradient is d_t w where m = 0, and 0 elsewhere; d_t rises to its end."""
    _, student, _, system, batch = parts("ste", teach=0.0, ste_decay=0.5, ste_ramp=0.5)
    chain = student.model.layers[0].mlp.up_proj.parametrizations.weight
    for step, d in ((0, 0.0), (10, 0.125), (20, 0.25), (60, 0.5)):
        term = system.learn(batch, Clock(step=step, steps=80)).terms["decay"]
        (g,) = torch.autograd.grad(term, chain.original)
        torch.testing.assert_close(g, d * chain.original * ~chain[0].mask, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("method", "wanted"), [("cast", [0, 3, 6]), ("ste", [0, 3, 6]), ("fixed", [])])
def test_masks_are_chosen_before_every_third_step(method, wanted):
    _, student, _, system, batch = parts(method, refresh=3)
    chain = student.model.layers[0].mlp.up_proj.parametrizations.weight
    changed = []
    for step in range(8):
        with torch.no_grad():
            chain.original.copy_(torch.randn(chain.original.shape, generator=G, **DOUBLE))
        before = chain[0].mask.clone()
        system.learn(batch, Clock(step=step, steps=8))
        if not torch.equal(before, chain[0].mask):
            changed.append(step)
            assert torch.equal(chain[0].mask, TWO_FOUR.mask(chain.original))
    assert changed == wanted


@pytest.mark.parametrize("method", ["ste", "fixed"])
def test_the_pattern_holds_after_every_step(method, tmp_path, monkeypatch):
    seen = []
    plain = Sparse.after_step

    def after(self, clock):
        plain(self, clock)
        for path in choose(llama_spec(40, width=16, layers=1, heads=2).build(), TWO_FOUR):
            w = self.student.get_submodule(path).weight
            seen.append(int((w.view(-1, 4) != 0).sum(1).max()))

    monkeypatch.setattr(Sparse, "after_step", after)
    tiny(Run(tmp_path, quiet=True, device="cpu"), replace(TINY, method=method))
    assert len(seen) == 7 * TINY.steps and set(seen) == {2}


# -- what it gives ------------------------------------------------------------------------------------------------


def test_masked_weights_vanish_and_pruning_changes_nothing(tmp_path):
    """With room to move and a decay above the gradients, the end has nothing left to prune."""
    cfg = replace(TINY, steps=60, refresh=5, lr=0.0, decay=0.1, reach=3.0, teach=1 / 3)
    models = tiny(Run(tmp_path / "a", quiet=True, device="cpu"), cfg)
    cost = models.cost
    assert cost["left_in_masked"] < 0.05 and abs(cost["pruned"] - cost["unpruned"]) < 1e-3
    assert cost["reach_in_mean_weights"] == pytest.approx(4, rel=0.01) and cost["exact"] == cost["groups"] > 0
    assert not models.notes
    weak = tiny(Run(tmp_path / "b", quiet=True, device="cpu"), replace(cfg, decay=0.0))
    assert weak.cost["left_in_masked"] > 0.05 and "raise --decay (0), --steps or --lr" in weak.notes[0]


def test_what_is_left_open_is_derived_from_weights_and_gradients(tmp_path):
    """The rate gives a reach of 4 mean weights; λ is ten times the mean |gradient| on the first windows."""
    text = corpus(length=16, limit=4000)
    net = llama_spec(text.vocabulary, width=16, layers=1, heads=2, length=16).build(seed=3)
    cfg = replace(TINY, lr=0.0, steps=20, dense_steps=0)
    found, far = derived(Run(tmp_path, quiet=True, device="cpu"), net, paths := choose(net, TWO_FOUR), text, cfg)
    assert far.least == pytest.approx(4, rel=0.005)
    net.requires_grad_(True)
    batch = text.train.take(np.arange(cfg.batch))
    out = net(**batch["input"]).logits
    nn.functional.cross_entropy(out.flatten(0, 1), batch["label"].flatten()).backward()
    grads = torch.cat([net.get_submodule(p).weight.grad.abs().flatten() for p in paths])
    assert found.decay == pytest.approx(10 * float(grads.mean()), rel=0.05)


def test_the_text_and_the_teacher_share_the_loss(tmp_path):
    """In the first step, where student and teacher are one, the log has (1 − η) CE and a divergence of 0."""
    runs = {e: Run(tmp_path / str(e), quiet=True, device="cpu", log_every=1) for e in (0.0, 0.25)}
    first = {e: [tiny(run, replace(TINY, teach=e)), run.log("sparse")[0]][1] for e, run in runs.items()}
    assert first[0.25]["label"] == pytest.approx(0.75 * first[0.0]["label"], rel=1e-6) and "kd" not in first[0.0]
    assert first[0.25]["kd"] == pytest.approx(0.0, abs=1e-6)


def test_the_students_size_on_disk_is_the_size_claimed(tmp_path):
    models = tiny(Run(tmp_path / "run", quiet=True, device="cpu"))
    dense, sparse = models["dense"], models["sparse"]
    models.save(tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "students/sparse/model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sparse.weight_bytes
    inside = sum(sparse.model.get_submodule(p).weight.numel() for p in choose(dense.model, TWO_FOUR))
    assert dense.weight_bytes - sparse.weight_bytes == inside * 4 * (1 - 68 / 128)
    # from_pretrained would take packed weights for missing ones
    assert {p.parent.name for p in tmp_path.glob("students/*/config.json")} == {"dense"}
    again = stillhouse.load(tmp_path / "students/sparse")
    x = models.inputs
    with torch.no_grad():
        assert torch.equal(again(**x).logits, sparse.model(**x).logits)


def test_the_model_stays_as_it_was_and_the_student_exports(tmp_path):
    text = corpus(length=16, limit=4000)
    base = llama_spec(text.vocabulary, width=16, layers=1, heads=2, length=16).build(seed=3)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    models = distill(Run(tmp_path, quiet=True, device="cpu"), text, base, replace(TINY, dense_steps=0))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    student = models["sparse"].model
    assert models.cost["pruned"] == nats(student, text.test)
    for kind, name in (("torch-export", "a.pt2"), ("onnx", "a.onnx")):
        if kind == "onnx":
            pytest.importorskip("onnxruntime")
        assert export(student, text.example(2), kind, tmp_path / name).max_abs_diff < 1e-4


def test_gpt2_of_a_folder_by_the_command(tmp_path, capsys, monkeypatch):
    """The user's way: a folder of transformers with Conv1D layers, their tokenizer, their text; then that student."""
    from stillhouse.text.encoding import small_tokenizer

    words = "the still drips all night and the cask is full in the morning " * 60
    (tmp_path / "mine.txt").write_text(words)
    tokenizer = small_tokenizer([words], level="char")
    gpt2(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--data", str(tmp_path / "mine.txt"), "--length", "16", "--batch", "4", "--steps", "6", "--device", "cpu",
             "--quiet"]  # fmt: skip
    out = tmp_path / "run"
    assert invoke(["run", "cast", "--model", f"hf:{tmp_path / 'gpt2'}", *flags, "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    student = stillhouse.load(out / "students/sparse")
    for block in student.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            per = (layer.weight.T.reshape(-1, 4) != 0).sum(1)  # (in, out): groups run along the inputs
            assert (per == 2).all()
    again = ["--model", str(out / "students/sparse"), *flags, "--pattern", "1:4", "--out", str(tmp_path / "on")]
    assert invoke(["run", "cast", *again]) == 0, capsys.readouterr().err
    assert (stillhouse.load(tmp_path / "on/students/sparse").transformer.h[0].mlp.c_fc.weight != 0).sum() == 16 * 64 / 4


def test_an_own_model_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("ownlm.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, vocabulary):\n"
        "        super().__init__()\n"
        "        self.e, self.o = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)\n"
        "        self.blocks = nn.ModuleList(\n"
        "            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in 'ab')\n"
        "    def forward(self, input_ids):\n"
        "        x = self.e(input_ids)\n"
        "        for b in self.blocks: x = x + b(x)\n"
        "        return self.o(x)\n"
        "def build(vocabulary): return Net(vocabulary)\n"
    )
    flags = ["--model", "ownlm:build", "--limit", "4000", "--length", "16", "--batch", "4", "--steps", "3", "--device",
             "cpu", "--quiet", "--method", "fixed", "--lr", "1e-3"]  # fmt: skip
    assert invoke(["run", "cast", *flags, "--out", "run"]) == 0, capsys.readouterr().err
    assert (stillhouse.load("run/students/sparse").blocks[0][0].weight != 0).sum() == 64


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pattern": "2-4"}, "N:M or N:M:UNIT"),
        ({"pattern": "4:4"}, "leaves every weight"),
        ({"pattern": "4:8:3"}, "a unit that divides both"),
        ({"teach": 1.5}, r"teach in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"refresh": 0}, "refresh: expected a number from 1, got 0"),
        ({"decay": -1.0}, "decay: expected a number from 0"),
        ({"lr_warmup": 2.0}, "lr_warmup: expected a part"),
        ({"method": "fixed"}, "lr: method fixed needs one"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(UserError, match=says) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


def test_a_rate_too_small_and_another_length_at_resume(tmp_path):
    run = Run(tmp_path, quiet=True, device="cpu")
    with pytest.raises(UserError, match=r"reach: lr 1e-05 over 4 steps.*or --reach 0"):
        tiny(run, replace(TINY, lr=1e-5, reach=3.0))
    assert not (tmp_path / "stages/sparse").exists()
    tiny(run, TINY)
    with pytest.raises(UserError, match="steps 4 → 5") as error:
        tiny(run, replace(TINY, steps=5))
    assert "\n" not in str(error.value)


def test_arms_are_what_their_names_say_whatever_is_asked_for():
    for given in ({"method": "ste", "lr": 1e-3}, {"method": "fixed", "lr": 1e-3}, {}):
        made = {name: replace(replace(PRESET, **given), **changes) for name, changes in ARMS.items()}
        assert [c.method for c in made.values()] == ["cast", "fixed", "ste", "cast"]
        assert [c.steps for c in made.values()] == [0, *[PRESET.steps] * 3]


def test_the_command_says_what_is_missing(tmp_path, capsys):
    small = ["--limit", "3000", "--length", "8", "--device", "cpu", "--data", "python-reference"]
    for k, (flags, says) in enumerate([
        (["--model", "llama"], "has no trained weights, which CAST starts from"),
        (["--model", "llama", "--dense-steps", "1", "--steps", "2", "--lr", "1e-9", "--width", "16", "--layers", "1"],
         "--reach 0"),
        (["--model", "bert"], "no language model"),
        (["--pattern", "5:4"], "0 < n <= m"),
        (["--model", "llama", "--ste-decay", "1"], "--ste-decay does nothing here: it is of --method ste"),
        (["--model", "llama", "--steps", "0", "--lr", "1"], "--lr does nothing here: --steps 0 trains nothing"),
        (["--model", "llama", "--method", "fixed", "--lr", "1", "--refresh", "3"], "--method fixed chooses its masks"),
        (["--model", "llama", "--dense-lr", "1"], "--dense-lr does nothing here"),
    ]):  # fmt: skip
        assert invoke(["run", "cast", *small, *flags, "--out", str(tmp_path / str(k))]) == 2
        said = capsys.readouterr().err.strip()
        assert says in said and said.count("\n") == 0, said
