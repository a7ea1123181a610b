"""DSFormer: the card's exact checks, what is stored, which size is met, and mistakes told before a step."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.export import WEIGHTS, export, read_weights
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.recipes.dsformer.experiment import SMALL, TINY, remainders
from stillhouse.recipes.dsformer.factors import Following, ModeC, ModeW, Top, on_weights
from stillhouse.recipes.dsformer.recipe import Config, distill, part
from stillhouse.recipes.dsformer.sizes import Layer, layers_of
from stillhouse.run import Run
from stillhouse.students import dense_sparse as ds
from stillhouse.students.dense_sparse import Blocks
from stillhouse.students.edits import Pack
from stillhouse.students.edits_sparse import DenseSparse
from stillhouse.students.lowrank import choose
from stillhouse.students.parametrized import bake, parametrize_weights, projectors
from stillhouse.students.plan import Plan
from stillhouse.system import Clock
from stillhouse.teachers import Frozen, state_fingerprint
from stillhouse.weights import cosine

FRESH = {"teacher_epochs": 0.0}
ROWS = [
    Row("dsformer", "mode C, one of 4", {"method": "C", "block": 4, "nonzeros": (1,)}),
    Row("dsformer", "best of several", {"nonzeros": (1, 4, 16), "freeze": 0.0}),
    Row("dsformer", "svd, labels alone", {"method": "svd", "kd": 0.0, **FRESH}),
    Row("dsformer", "micro", {**FRESH}, micro_batch=10),
]
ZERO = [  # without a search for places, both modes are the factorisation of the weights alone
    (Row("dsformer", "W, frozen", {"method": "W", "freeze": 1.0}), Row("dsformer", "fixed", {"method": "fixed"})),
    (Row("dsformer", "C, frozen", {"method": "C", "freeze": 1.0}), Row("dsformer", "fixed 2", {"method": "fixed"})),
]
# The network is not trained first: places of weights that differ by rounding differ by more than rounding.
JOINT = [Row("dsformer", f"sgd, {m}", {**FRESH, "optimizer": "sgd", "lr": 0.01, "method": m}) for m in ("W", "C")]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_of(w, rank, block, nonzeros, path="0"):
    return Layer(path, *w.shape, w.element_size(), block, nonzeros, 0.0, rank)


def net(rows=12, columns=20, double=True):
    model = nn.Sequential(nn.Linear(columns, rows), nn.Tanh(), nn.Linear(rows, columns))
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(draw(*p.shape, seed=k))
    return model.double() if double else model


def counts(s, blocks):
    """Non-zeros in every block of every column."""
    return [[int((part != 0).sum()) for part in column.split(blocks.block)] for column in s.T]


# -- the card's exact checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("shape", "rank", "blocks"),
    [((24, 40), 20, Blocks(8, 1)), ((24, 40), 18, Blocks(8, 3)), ((16, 48), 22, Blocks(4, 1)),
     ((30, 30), 8, Blocks(8, 8)), ((40, 24), 5, Blocks(16, 2))],
)  # fmt: skip
def test_the_residual_never_grows_over_30_sweeps(shape, rank, blocks, dtype, slack):
    """(1), from singular vectors and from a poor start with an atom that nobody uses."""
    w = ds.oriented(draw(*shape, dtype=dtype))
    starts = [ds.factorise(w, rank, blocks, sweeps=0)]
    d = F.normalize(draw(len(w), rank, seed=1, dtype=dtype), dim=0)
    d[:, 0] = 0
    starts.append((d, ds.top(draw(rank, w.shape[1], seed=2, dtype=dtype), blocks)))
    for d, s in starts:
        before = float((w - d @ s).norm())
        for _ in range(30):
            d, s = ds.sweep(w, d, s, blocks)
            after = float((w - d @ s).norm())
            assert after <= before * (1 + slack)
            before = after
        torch.testing.assert_close(d.norm(dim=0), torch.ones(rank, dtype=dtype))
        assert before < 0.99 * float(w.norm())


def test_both_steps_alone_never_grow():
    """The thresholded step at η = 1/‖G⁸‖^(1/8), and the least squares behind it, against an exact solver."""
    w, blocks = draw(20, 36), Blocks(8, 2)
    d, s = F.normalize(draw(20, 16, seed=1), dim=0), ds.top(draw(16, 36, seed=2), blocks)
    for _ in range(10):
        gram = d.T @ d
        eta = 1 / float(ds.largest_eigenvalue(gram))
        hard = ds.top(s - eta * d.T @ (d @ s - w), blocks)
        assert (w - d @ hard).norm() <= (w - d @ s).norm() + 1e-12
        best = torch.linalg.lstsq(hard.T, w.T).solution.T
        d, s = ds.sweep(w, d, s, blocks)
        torch.testing.assert_close((w - d @ s).norm(), (w - best @ hard).norm(), rtol=1e-6, atol=0)


def test_every_block_of_every_column_has_t_values():
    """(2); the last block, if it is shorter, as many as fit."""
    for rank, blocks, wanted in ((16, Blocks(8, 1), [1, 1]), (16, Blocks(4, 3), [3] * 4), (19, Blocks(8, 2), [2, 2, 2]),
                                 (17, Blocks(8, 2), [2, 2, 1])):  # fmt: skip
        s = ds.top(draw(rank, 30), blocks)
        assert all(c == wanted for c in counts(s, blocks)) and sum(wanted) == blocks.per_column(rank)
        _, s = ds.factorise(draw(20, 30, seed=3), rank, blocks, sweeps=4)
        assert all(c == wanted for c in counts(s, blocks))


def test_full_blocks_are_the_truncated_svd():
    """(3) t = b, r = q."""
    for shape, q in (((20, 50), 7), ((50, 20), 12), ((30, 30), 16)):
        w = draw(*shape)
        d, s = ds.factorise(w, q, Blocks(8, 8), sweeps=50)
        tail = torch.linalg.svdvals(w)[q:].norm()
        assert abs((ds.oriented(w) - d @ s).norm() / tail - 1) < 1e-4
    w, g = draw(20, 50), torch.Generator().manual_seed(5)  # and from a start that is not the singular vectors
    d, s = torch.randn(20, 7, generator=g, dtype=w.dtype), torch.zeros(7, 50, dtype=w.dtype)
    for _ in range(400):
        d, s = ds.sweep(w, d, s, Blocks(8, 8))
    assert abs((w - d @ s).norm() / torch.linalg.svdvals(w)[7:].norm() - 1) < 1e-4


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_the_identity_as_atoms_gives_the_weight(shape):
    """(4) r = m, D = I, t = b: in the sweep, and in the layers that stand for it."""
    w = draw(*shape)
    m, blocks = min(shape), Blocks(8, 8)
    eye = torch.eye(m, dtype=w.dtype)
    d, s = ds.sweep(ds.oriented(w), eye, ds.oriented(w), blocks)
    torch.testing.assert_close(d @ s, ds.oriented(w), rtol=0, atol=1e-4)  # the ridge of the least squares
    plain = nn.Linear(shape[1], shape[0]).double()
    with torch.no_grad():
        plain.weight.copy_(w)
    made = ds.dense_sparse(plain, m, blocks)
    ds.fill(made, eye, ds.oriented(w))
    x = draw(7, shape[1], seed=4)
    torch.testing.assert_close(made(x), plain(x), rtol=0, atol=1e-12)


def test_the_gradient_at_w_is_that_at_the_product():
    """(5), and that at the product is autograd's there."""
    for shape in ((12, 20), (20, 12)):
        w = draw(*shape).requires_grad_()
        mode = ModeW(layer_of(w, 10, 4, 1), w.detach(), sweeps=3)
        target = draw(*shape, seed=1)
        (mode(w).sin() * target).sum().backward()
        seen = mode.product(mode.d, mode.s).clone().requires_grad_()
        (seen.sin() * target).sum().backward()
        assert torch.equal(w.grad, seen.grad) and torch.equal(mode(w), seen)
        assert not mode.d.requires_grad and not torch.allclose(seen, w, atol=1e-2)


# -- the two modes ------------------------------------------------------------------------------------------------


def test_mode_c_has_exact_gradients_for_d_and_straight_ones_for_s():
    for shape in ((12, 20), (20, 12)):
        layer = layer_of(torch.zeros(shape, dtype=torch.float64), 8, 4, 1)
        mode, target = ModeC(layer, sweeps=3), draw(*shape, seed=1)
        d, shadow = (t.requires_grad_() for t in (draw(12, 8, seed=2), draw(8, 20, seed=3)))
        (mode(d, shadow).sin() * target).sum().backward()
        product = mode.product(d, ds.top(shadow, layer.blocks)).detach().requires_grad_()
        (product.sin() * target).sum().backward()
        g = product.grad if shape == (12, 20) else product.grad.T
        torch.testing.assert_close(d.grad, g @ ds.top(shadow.detach(), layer.blocks).T)
        torch.testing.assert_close(shadow.grad, d.detach().T @ g)  # places that are zero have one too
    top = Top(Blocks(4, 1))
    assert torch.equal(top(shadow), ds.top(shadow, Blocks(4, 1)))


def steps_of(mode, per_step=1, steps=4, decay=0.1):
    """A small system, trained by hand-made batches; what it computes with after every step."""
    model = net()
    layers = [layer_of(model.get_submodule(p).weight, 9, 4, 1, p) for p in ("0", "2")]
    on_weights(model, layers, mode, sweeps=3)
    system = Following(
        model, None, per_step=per_step, objectives=(),
        optimizer=partial(torch.optim.AdamW, lr=0.05, weight_decay=decay),
    )  # fmt: skip
    optimizer = system.updates()[0].optimizer(system.updates()[0].params)
    for k in range(steps):
        optimizer.zero_grad()
        system.learn({"input": draw(6, 20, seed=10 + k), "label": torch.arange(6)}, Clock(step=k)).total.backward()
        optimizer.step()
        system.after_step(Clock(step=k))
        yield model, layers


@pytest.mark.parametrize("mode", ["W", "C"])
def test_the_pattern_holds_after_every_step_and_baking_changes_nothing(mode):
    rows = []
    for model, layers in steps_of(mode, steps=4 if mode == "W" else 15):
        for (_, layer, chain), x in zip(projectors(model), layers, strict=True):
            kept = [p for n, p in chain.named_parameters(recurse=False)]
            d, s = chain[-1].factors(*kept)
            assert all(c == [1, 1, 1] for c in counts(s, x.blocks))
            torch.testing.assert_close(layer.weight, chain[-1].product(d, s), rtol=0, atol=0)
            rows.append(ds.places(s.detach(), x.blocks))
    assert any(not torch.equal(a, b) for a, b in zip(rows, rows[2:], strict=False))  # places move
    plain, x = copy.deepcopy(model).eval(), draw(5, 20, seed=99)
    edits = bake(model)
    assert [type(e) for e in edits] == [DenseSparse, DenseSparse] and not list(projectors(model))
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=0, atol=1e-12)
    assert isinstance(model[0].sparse, ds.Sparse) and model[0].sparse.weight.shape == (3, 20)


def test_mode_w_sweeps_from_where_it_was_and_decays_w_itself():
    """Two steps by hand: AdamW on W with ∂L/∂Ŵ, then J sweeps of the factors from those before."""
    model, blocks = net(), Blocks(4, 1)
    w = {p: model.get_submodule(p).weight.detach().clone() for p in ("0", "2")}
    f = {p: ds.factorise(v, 9, blocks, 3) for p, v in w.items()}
    for p in w:
        model.get_submodule(p).weight.requires_grad_(False)
    biases = [model[0].bias, model[2].bias]
    every = [*w.values(), *biases]
    optimizer = torch.optim.AdamW(every, lr=0.05, weight_decay=0.1)
    made = steps_of("W", per_step=2)
    for k in range(2):
        hats = {p: (d @ s if p == "0" else (d @ s).T).requires_grad_() for p, (d, s) in f.items()}
        h = F.linear(draw(6, 20, seed=10 + k), hats["0"], biases[0]).tanh()
        loss = F.cross_entropy(F.linear(h, hats["2"], biases[1]), torch.arange(6))
        grads = torch.autograd.grad(loss, [*hats.values(), *biases])
        for p, g in zip(every, grads, strict=True):
            p.grad = g
        optimizer.step()
        for p, v in w.items():
            for _ in range(2):
                f[p] = ds.sweep(ds.oriented(v), *f[p], blocks)
        student, _ = next(made)
        for p, v in w.items():
            chain = student.get_submodule(p).parametrizations["weight"]
            torch.testing.assert_close(chain.original, v, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(chain[-1].d @ chain[-1].s, f[p][0] @ f[p][1], rtol=1e-8, atol=1e-10)


def test_the_step_size_bound_is_never_too_small():
    for r, seed in ((2, 0), (9, 1), (40, 2)):
        a = draw(r, r // 2 + 1, seed=seed)
        gram = a @ a.T
        most = torch.linalg.eigvalsh(gram)[-1]
        assert most * (1 - 1e-12) <= ds.largest_eigenvalue(gram) <= most * r ** (1 / 16) * (1 + 1e-12)
    torch.testing.assert_close(ds.largest_eigenvalue(torch.eye(6).double()), torch.tensor(6.0).double() ** (1 / 16))


def test_unused_atoms_become_the_worst_columns():
    w = draw(6, 8)
    w[:, 3] *= 20
    d, s = F.normalize(draw(6, 4, seed=1), dim=0), torch.zeros(4, 8, dtype=torch.float64)
    s[0] = 1e-3
    made = ds._reseed(w, d.clone(), s, torch.tensor([True, True, True, False]))
    torch.testing.assert_close(made[:, 3], F.normalize(w[:, 3] - d @ s[:, 3], dim=0))
    assert torch.equal(made[:, :3], d[:, :3])


def test_weights_of_zeros_and_of_low_rank_stay_finite():
    for w in (torch.zeros(6, 9), draw(6, 1, dtype=torch.float32) @ draw(1, 9, seed=1, dtype=torch.float32)):
        d, s = ds.factorise(w, 5, Blocks(4, 1), sweeps=8)
        assert torch.isfinite(d).all() and torch.isfinite(s).all() and (w - d @ s).norm() <= 1e-4 * w.norm()


def test_ties_go_to_the_first_and_blocks_lie_along_the_column():
    s = torch.ones(6, 2)
    assert ds.places(s, Blocks(4, 1)).tolist() == [[0, 0], [4, 4]]
    assert ds.places(s, Blocks(4, 2)).tolist() == [[0, 0], [1, 1], [4, 4], [5, 5]]
    s = torch.tensor([[9.0, 0.1], [8.0, 0.2], [0.1, 7.0], [0.2, 6.0]])
    assert ds.places(s, Blocks(2, 1)).tolist() == [[0, 1], [3, 2]]  # not across the matrix, not along a row


def test_both_parts_of_a_training_share_one_schedule():
    whole = cosine(warmup_steps=2)
    said = [part(whole, 0, 10)(Clock(step=k, steps=6)) for k in range(6)]
    said += [part(whole, 6, 10)(Clock(step=k, steps=4)) for k in range(4)]
    assert said == [whole(Clock(step=k, steps=10)) for k in range(10)]


# -- what is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "bits"), [(Blocks(16, 1), 4), (Blocks(5, 2), 3), (Blocks(256, 3), 8), (Blocks(8, 8), 0)]
)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
def test_the_file_holds_what_is_claimed_and_loads_bit_for_bit(tmp_path, blocks, bits, shape):
    base = nn.Sequential(nn.Linear(shape[1], shape[0]))
    rank = 19
    edit = DenseSparse("0", rank, *blocks, sweeps=2)
    plan = Plan.identity(base).then(edit)
    student = plan.build(base).eval()
    assert Plan.from_json(plan.to_json()) == plan and blocks.bits == bits
    made = Models([Member("small", student, plan)], torch.zeros(1, shape[1]))
    made.save(tmp_path)
    disk = {k: v for k, v in read_weights(tmp_path / "students/small" / WEIGHTS)[0].items() if "bias" not in k}
    k = blocks.per_column(rank)
    assert sum(v.nbytes for v in disk.values()) == ds.stored_bytes(*shape, rank, blocks)
    assert ds.stored_bytes(*shape, rank, blocks) == 4 * (20 * rank + 33 * k) + (33 * k * bits + 7) // 8
    assert made["small"].weight_bytes == sum(v.nbytes for v in disk.values()) + 4 * shape[0]
    again = stillhouse.load(tmp_path / "students/small", base=base)
    own = student.state_dict()
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(v, own[n]) for n, v in again.state_dict().items())
    assert sum(p.numel() for p in student.parameters()) == 20 * rank + 33 * k + shape[0]  # in memory no zeros either


def test_places_in_a_file_stand_lowest_bits_first():
    base = nn.Sequential(nn.Linear(4, 2, bias=False))
    student = DenseSparse("0", 4, 4, 1, sweeps=0).apply(copy.deepcopy(base))
    s = torch.zeros(4, 4)
    s[[1, 3, 0, 2], range(4)] = 1.0
    student[0].sparse.fill(s)
    tensors = student.state_dict()
    DenseSparse("0", 4, 4, 1).encode(tensors)
    assert tensors["0.sparse.index"].tolist() == [1 + 3 * 4 + 0 * 16 + 2 * 64]
    assert torch.equal(student[0].sparse.matrix(), s)


def test_an_edit_approximates_the_weight_by_itself_and_composes():
    base = net(double=False)
    made = DenseSparse("0", 12, 4, 2).apply(copy.deepcopy(base))
    d, s = ds.factorise(base[0].weight, 12, Blocks(4, 2))
    x = draw(5, 20, dtype=torch.float32)
    torch.testing.assert_close(made[0](x), F.linear(x, d @ s, base[0].bias), rtol=1e-4, atol=1e-4)
    plan = Plan.identity(base).then(DenseSparse("0", 12, 4, 2, sweeps=0), Pack("0.dense", 4))
    twice = plan.build(base)
    assert "0.dense.weight_scale" in twice.state_dict() and plan.saved_bytes(twice) > 0


def test_values_train_at_their_places():
    model = DenseSparse("0", 8, 4, 1).apply(net())
    before = model[0].sparse.index.clone()
    model(draw(3, 20)).square().sum().backward()
    assert model[0].sparse.weight.grad.abs().min() > 0 and model[0].dense.weight.grad is not None
    assert torch.equal(model[0].sparse.index, before)


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["W", "svd"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.5])
def test_all_layers_together_meet_the_size(method, ratio):
    base = ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options={
        "patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}).build(seed=0)  # fmt: skip
    layers = layers_of(base, choose(base), Config(method=method, ratio=ratio, nonzeros=(4,)))
    asked, stored = sum(x.asked for x in layers), sum(x.stored() for x in layers)
    assert asked == pytest.approx(ratio * sum(base.get_submodule(x.module).weight.nbytes for x in layers))
    unit = min(x.stored(x.rank + 1) - x.stored() for x in layers)
    assert 0 <= asked - stored <= max(0.01 * asked, unit) and (method == "svd" or unit < 0.01 * asked or ratio == 0.1)
    for x in layers:
        assert x.stored(x.rank - 1) <= x.asked < x.stored(x.rank + 1)


def test_the_best_t_is_never_worse_than_the_svd():
    base = net(24, 60, double=False)
    with torch.no_grad():  # a spectrum that decays, and one that does not
        u, s, v = torch.linalg.svd(base[0].weight, full_matrices=False)
        base[0].weight.copy_(u * s * torch.exp(-torch.arange(24) / 3.0) @ v)
    cfg = Config(ratio=0.4, nonzeros=(1, 2, 4, 8), block=8)
    layers = layers_of(base, ["0", "2"], cfg)
    assert layers[0].nonzeros > layers[1].nonzeros
    assert all(own <= low * (1 + 1e-4) for own, low in (remainders(base, x, cfg.sweeps) for x in layers))


def test_a_size_too_small_names_the_smallest():
    base = net(12, 20, double=False)
    base.append(nn.Linear(20, 8))  # the smallest layer decides
    with pytest.raises(UserError, match=r"ratio 0.05 leaves 3 \(8×20\) not one atom; the smallest possible is") as e:
        layers_of(base, ["0", "2", "3"], Config(ratio=0.05))
    least = float(str(e.value).split("--ratio ")[1].split()[0])
    assert layers_of(base, ["3"], Config(ratio=least))[0].rank == 1
    with pytest.raises(UserError):
        layers_of(base, ["3"], Config(ratio=least - 0.002))


def test_of_several_t_the_one_that_fits_counts(tmp_path):
    """A size at which one atom with places is too much, but one without is not."""
    base = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    least = [ds.stored_bytes(12, 64, 1, Blocks(16, t)) / (4 * 12 * 64) for t in (1, 16)]
    cfg = replace(TINY, **FRESH, modules=("1",), nonzeros=(1, 16), ratio=sum(least) / 2, epochs=0.0)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=64), base, cfg)
    assert [(b["nonzeros"], b["rank"]) for b in family.budgets] == [(16, 1)]


# -- what it gives ------------------------------------------------------------------------------------------------


def test_the_network_stays_as_it_was_and_teaches(tmp_path, monkeypatch):
    base = SMALL.build(seed=3)
    before, asked, plain = state_fingerprint(base), [], Distill._ask
    monkeypatch.setattr(Distill, "_ask", lambda self, *a: asked.append(self.teacher.fingerprint) or plain(self, *a))
    data = load("digits", limit=64)
    family = distill(Run(tmp_path / "a", quiet=True, device="cpu"), data, base, replace(TINY, **FRESH))
    assert state_fingerprint(base) == before and set(asked) == {Frozen(base).fingerprint}
    asked.clear()
    distill(Run(tmp_path / "b", quiet=True, device="cpu"), data, base, replace(TINY, kd=0.0, **FRESH))
    assert not asked
    assert {b["module"].rpartition(".")[2] for b in family.budgets} == {"qkv", "proj", "fc1", "fc2"}
    assert isinstance(family["student"].model.head, nn.Linear)


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_students_export(tmp_path, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    base = SMALL.build(seed=0).eval()
    layers = layers_of(base, choose(base), Config(ratio=0.5, block=4, nonzeros=(1,)))
    student = Plan.identity(base).then(*(replace(x.edit, sweeps=3) for x in layers)).build(base).eval()
    assert export(student, torch.zeros(2, 1, 8, 8), to, tmp_path / "student").max_abs_diff < 1e-4


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_a_users_classifier_and_sentences(tmp_path, kind):
    """Their own folder of transformers and their own rows, by the command; the student loads from its folder."""
    transformers = pytest.importorskip("transformers")
    from stillhouse.text import small_tokenizer

    rows = [{"text": f"{w} film number {k}", "label": y} for k in range(12) for y, w in ((0, "bad"), (1, "good"))]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokens = small_tokenizer([r["text"] for r in rows])
    sizes = {"vocab_size": len(tokens), "num_labels": 2, "max_position_embeddings": 32}
    if kind == "Bert":
        sizes |= {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    else:
        sizes |= {"dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    home = tmp_path / "given"
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(home)
    tokens.save_pretrained(str(home))
    flags = ["--model", f"hf:{home}", "--pretrained", "--data", str(tmp_path / "mine.jsonl"), "--length", "16"]
    short = ["--epochs", "1", "--teacher-epochs", "0", "--batch", "8", "--sweeps", "2", "--quiet", "--device", "cpu"]
    assert invoke(["run", "dsformer", *flags, *short, "--out", str(tmp_path / "run")]) == 0
    student = stillhouse.load(tmp_path / "run/students/student")
    assert sum(isinstance(m, ds.Sparse) for m in student.modules()) == 7  # six of the block, and the pooler or its like
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [c["holds"] for c in report["claims"][1:]] == [True, True]


class Reads(nn.Module):
    """A block that reads its layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.flat, self.layer, self.end = nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.end(F.linear(self.flat(x), self.layer.weight))


def test_any_network_with_linear_layers(tmp_path):
    data, cfg = load("digits", limit=64), replace(TINY, **FRESH, modules=("1", "3"))
    mlp = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [16, 16]})
    family = distill(Run(tmp_path / "a", quiet=True, device="cpu"), data, mlp, cfg)
    assert [e.module for e in family["student"].plan.edits] == ["1", "3"]
    with pytest.raises(UserError, match="Reads does not run with two layers in place of one"):
        distill(Run(tmp_path / "b", quiet=True, device="cpu"), data, Reads(), replace(cfg, modules=("layer",)))


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ratio", "1.5"], ["ratio", "between 0 and 1", "1.5"]),
        (["--ratio", "0.001"], ["0.001", "smallest possible", "--ratio 0."]),
        (["--nonzeros", "17"], ["blocks of 2 to 256", "16, 17"]),
        (["--block", "1"], ["blocks of 2 to 256", "1"]),
        (["--freeze", "1.2"], ["freeze", "[0, 1]"]),
        (["--kd", "-1"], ["kd", "from 0"]),
        (["--modules", "blocks.0.norm1"], ["LayerNorm is not supported"]),
        (["--skip", "atn"], ["no module 'atn'"]),
        (["--teacher-epochs", "0"], ["has no trained weights", "--teacher-epochs N"]),
        (["--weight-decay", "-1"], ["weight_decay: expected a number from 0, got -1.0"]),
        (["--method", "C", "--per-step", "2"], ["--per-step does nothing here", "--method W"]),
        (["--method", "svd", "--nonzeros", "4"], ["--nonzeros does nothing here", "svd"]),
        (["--kd", "0", "--temperature", "4"], ["--temperature does nothing here"]),
    ],
    ids=lambda v: " ".join(v)[:30],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = ["--data", "digits", "--limit", "64", "--model", "timm:vit_tiny_patch16_224", "--quiet"]
    common += ["--teacher-epochs", "1"]
    code = invoke(["run", "dsformer", *common, "--device", "cpu", "--out", str(tmp_path / "x"), *flags])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_edits_say_what_does_not_fit():
    for edit, says in (
        (DenseSparse("1", 4), "1: a Tanh cannot be dense × sparse"),
        (DenseSparse("0", 0), "0: dense × sparse needs a rank from 1"),
        (DenseSparse("0", 4, 4, 5), "blocks of 2 to 256"),
        (DenseSparse("9", 4), "no module '9'"),
    ):
        with pytest.raises(UserError, match=says):
            edit.apply(net())
    model = net()
    parametrize_weights(model, ["0"], lambda p, m: ModeC(layer_of(m.weight, 4, 4, 1), 1))
    assert model[0].weight.shape == (12, 20)
