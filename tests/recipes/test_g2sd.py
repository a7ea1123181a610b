"""G2SD: the card's exact checks, both kinds of masked autoencoders, the two stages, and mistakes told before a step."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse import objectives as O
from stillhouse.checkpoint import Checkpoints
from stillhouse.cli import invoke
from stillhouse.data import Arrays, Batches, load, mixing, with_draws
from stillhouse.data.samples import draws
from stillhouse.distill import Distill, TokenDistill
from stillhouse.errors import UserError
from stillhouse.export import export
from stillhouse.models import ModelSpec
from stillhouse.recipes.g2sd.config import Config
from stillhouse.recipes.g2sd.experiment import BASE, ENCODER, SMALL, TINY, sized, started
from stillhouse.recipes.g2sd.experiment import ZERO as NOTHING
from stillhouse.recipes.g2sd.recipe import distill
from stillhouse.recipes.g2sd.stages import Features, Generic, Pixels
from stillhouse.run import Run
from stillhouse.students.masked import HubMasked, Pooled, TimmMasked, as_masked, patches_of, sines, start_head, visible
from stillhouse.system import Clock, fold
from stillhouse.teachers import Frozen, state_fingerprint
from stillhouse.weights import by_layer, cosine

ROWS = [
    Row("g2sd", "pixels, normalised KD", {"generic": "pixels", "specific": "nkd"}),
    Row("g2sd", "all labels, no mixing", {"labelled": 1.0, "mixup": 0.0, "cutmix": 0.0}),
]
PLAIN = {"generic": "none", "specific": "labels"}  # no teacher of either stage is read
ZERO = [
    (
        Row("g2sd", "no stage asks", {**PLAIN, "teacher_epochs": 2.0}),
        Row("g2sd", "plain", {**PLAIN, "teacher_epochs": 0.0}),
    )
]
JOINT = [Row("g2sd", "sgd", {"optimizer": "sgd", "labelled": 1.0, "mixup": 0.0, "cutmix": 0.0})]
STUDENT, TEACHER = replace(BASE, options=SMALL), replace(ENCODER, options={**SMALL, "embed_dim": 32})
DEIT = "timm:deit_tiny_distilled_patch16_224"
MOVES = {"optimizer": torch.optim.SGD, "lr": None, "clip": None}


def masked(spec=TEACHER, decoder=(16, 2), seed=0, patch=2):
    """A masked autoencoder in float64, with every parameter away from its start."""
    torch.manual_seed(seed)
    spec = replace(spec, options={**spec.options, "patch_size": patch})
    made = TimmMasked(spec.build(seed=seed), (1, 8, 8), *decoder).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def hub(**sizes):
    transformers = pytest.importorskip("transformers")
    given = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "intermediate_size": 32, "decoder_hidden_size": 8, "mask_ratio": 0.5,
             "decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 2,
             "decoder_intermediate_size": 16}  # fmt: skip
    torch.manual_seed(1)
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**{**given, **sizes})).eval()


def batch(n=5, seed=0, patches=16):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64)
    noise = torch.rand(n, patches, generator=g, dtype=torch.float64)
    return {"input": x, "noise": noise, "label": torch.arange(n) % 10}


def made(folder, student, cfg):
    """The student of a run on 96 digits."""
    run = Run(folder, quiet=True, device="cpu")
    return distill(run, load("digits", limit=96), student, started(TEACHER, 0), cfg)["student"].model


# -- the card's exact checks --------------------------------------------------------------------------------------


def test_one_noise_shows_both_networks_the_same_patches():
    """(1), across widths and across libraries; and the noise is that of the batch, for both."""
    b = batch()
    keep, places = visible(b["noise"], 0.75)
    assert keep.shape == (5, 4) and torch.equal(keep, b["noise"].argsort(1)[:, :4])
    assert torch.equal(b["noise"].gather(1, keep).max(1).values < b["noise"].kthvalue(5).values, torch.ones(5).bool())
    for model in (masked(), masked(STUDENT), HubMasked(hub().double())):
        seen = []
        blocks = model.encoder_blocks
        model.encoder_blocks = lambda t, blocks=blocks, seen=seen: seen.append(t) or blocks(t)
        encoded, at = model.encode(b["input"], b["noise"], 0.75)
        assert torch.equal(at, places) and encoded.shape == (5, 5, model.width)
        tokens, one = model.embed(b["input"])
        assert torch.equal(seen[0][:, 1:], tokens[torch.arange(5)[:, None], keep])
        assert torch.equal(seen[0][:, :1], one.expand(5, -1, -1))
        assert torch.equal(keep.gather(1, at.gather(1, keep)), keep)  # a kept patch stands where its place says


def test_a_student_that_is_its_teacher_has_no_loss():
    """(2) same widths, the normalised decoder features as prediction."""
    teacher = masked()
    system = Generic(copy.deepcopy(teacher), Features(teacher, 0.75, 2), 16, 2.0, **MOVES).double()
    system.predictor = nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    assert float(system.loss(batch()).detach()) < 1e-25
    system.teacher.layer = 1
    assert float(system.loss(batch()).detach()) > 1e-3  # of another block


def test_smooth_l1_at_two():
    """(3) a quarter of e² below 2, |e| − 1 above; per sample; gradient e/2, then its sign."""
    e = torch.tensor([[-3.0, -1.5, 0.0], [0.5, 1.999, 4.0]], dtype=torch.float64)
    s = e.clone().requires_grad_()
    found = O.smooth_l1(torch.zeros_like(e), s, 2.0)
    each = torch.where(e.abs() < 2, 0.25 * e**2, e.abs() - 1)
    torch.testing.assert_close(found, each.mean(1))
    found.sum().backward()
    torch.testing.assert_close(s.grad, torch.where(e.abs() < 2, e / 2, e.sign()) / 3)
    t = e.clone().requires_grad_()
    O.smooth_l1(t, s, 2.0).sum().backward()
    assert t.grad is None


def test_the_target_is_normalised_per_token_and_stops_at_its_block():
    """(4) mean 0 and variance 1 of every token, class token included; neither norm nor pixel head of the decoder."""
    teacher, b = masked(decoder=(16, 3)), batch()
    y = Features(teacher, 0.75, 2)(b).target
    assert y.shape == (5, 17, 16) and not y.requires_grad
    torch.testing.assert_close(y.mean(-1), torch.zeros(5, 17, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(5, 17, dtype=torch.float64), atol=1e-4, rtol=0)
    encoded, _ = teacher.encode(b["input"], b["noise"], 0.75)
    x = teacher.reads(encoded)
    full = teacher.mask_token.repeat(5, 16, 1)
    for i in range(5):
        for k, patch in enumerate(visible(b["noise"], 0.75)[0][i]):
            full[i, patch] = x[i, 1 + k]
    h = torch.cat([x[:, :1], full], 1) + teacher.positions
    h = teacher.blocks[1](teacher.blocks[0](h))
    torch.testing.assert_close(y, F.layer_norm(h, (16,), eps=1e-6))
    with torch.no_grad():
        for p in [*teacher.norm.parameters(), *teacher.says.parameters(), *teacher.blocks[2].parameters()]:
            p.add_(1.0)
    assert torch.equal(Features(teacher, 0.75, 2)(b).target, y)


def test_the_loss_of_saying_nothing():
    """E SmoothL1_2(0, y), y ~ N(0, 1), in closed form."""
    density = math.exp(-2) / math.sqrt(2 * math.pi)  # of N(0, 1) at 2
    inside = math.erf(math.sqrt(2))
    closed = 0.25 * (inside - 4 * density) + 2 * density - (1 - inside)
    assert pytest.approx(closed, abs=5e-5) == NOTHING
    y = torch.randn(1, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(O.smooth_l1(y, torch.zeros_like(y), 2.0)) == pytest.approx(closed, abs=2e-3)


def test_a_teacher_that_says_the_label_gives_both_heads_one_target():
    """(5) without mixing; equal heads then have equal losses and gradients."""

    class Right(nn.Module):
        def forward(self, x):
            return 9 * F.one_hot(torch.arange(len(x)) % 10, 10).double()

    vit, b = STUDENT.build(seed=0).double(), batch()
    z = torch.randn(5, 10, dtype=torch.float64)
    heads = [z.clone().requires_grad_(), z.clone().requires_grad_()]
    system = TokenDistill(vit, Frozen(Right()), objectives=["pseudo:0.5"], label=0.5)
    vit.forward_head = lambda *_: tuple(heads)
    terms = system.learn(b, Clock()).terms
    torch.testing.assert_close(terms["label"], terms["pseudo"])
    sum(terms.values()).backward()
    torch.testing.assert_close(heads[0].grad, heads[1].grad)


# -- the generic stage --------------------------------------------------------------------------------------------


def test_every_token_is_supervised():
    teacher, b = masked(), batch()
    system = Generic(masked(STUDENT), Features(teacher, 0.75, 2), 16, 2.0, **MOVES).double()
    held = {}
    system.predictor.register_forward_hook(lambda m, a, out: held.update(z=out) or out.retain_grad())
    system.learn(b, Clock()).total.backward()
    z, y = held["z"], system.teacher(b).target
    assert z.shape == (5, 17, 16) and bool((z.grad.abs().amax(-1) > 0).all())
    torch.testing.assert_close(system.loss(b), F.smooth_l1_loss(z, y, beta=2.0))
    assert [type(m) for m in system.predictor] == [nn.Linear, nn.GELU, nn.Linear]
    assert all(p.grad is None for p in teacher.parameters())
    unread = {"encoder.dist_token", "encoder.head.weight", "encoder.head.bias", "encoder.head_dist.weight",
              "encoder.head_dist.bias", "norm.weight", "norm.bias", "says.weight", "says.bias"}  # fmt: skip
    assert {n for n, p in system.masked.named_parameters() if p.grad is None} == unread


def test_pixels_are_learned_where_they_are_hidden():
    own, b = masked(decoder=(16, 1)), batch()
    system = Pixels(own, 0.75, **MOVES)
    keep, _ = visible(b["noise"], 0.75)
    said = own.pixels(own.decode(*own.encode(b["input"], b["noise"], 0.75)))
    errors = []
    for i in range(5):
        for k in range(16):
            row, column = divmod(k, 4)
            true = b["input"][i, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            true = (true - true.mean()) / (true.var() + 1e-6).sqrt()
            if k not in keep[i]:
                errors.append((said[i, k] - true).square().mean())
    assert len(errors) == 5 * 12
    torch.testing.assert_close(system.loss(b), torch.stack(errors).mean())


def test_transformers_autoencoder_answers_as_in_its_library():
    model, b = hub(), batch()
    b = {k: v.float() for k, v in b.items()}
    own = as_masked(model, (1, 8, 8), (16, 1))
    assert (own.patches, own.patch, own.width, own.decoder_width, own.decoder_depth) == (16, 2, 16, 8, 3)
    with torch.no_grad():
        theirs = model(b["input"], noise=b["noise"])
        encoded, places = own.encode(b["input"], b["noise"], 0.5)
        torch.testing.assert_close(own.pixels(own.decode(encoded, places)), theirs.logits)
    assert torch.equal(places, theirs.ids_restore)
    x = torch.randn(2, 3, 8, 8)
    many = hub(num_channels=3)
    torch.testing.assert_close(patches_of(x, 2), many.patchify(x))
    first = Features(own, 0.5, 1)(b).target
    hooked = {}
    model.decoder.decoder_layers[0].register_forward_hook(lambda m, a, out: hooked.update(h=out))
    with torch.no_grad():
        model(b["input"], noise=b["noise"])
    h = hooked["h"][0] if isinstance(hooked["h"], tuple) else hooked["h"]
    model.config.mask_ratio = 0.75
    torch.testing.assert_close(first, F.layer_norm(h, (8,), eps=1e-6))


def test_a_whole_image_is_seen_as_the_network_itself_sees_it():
    """Nothing masked: the encoder's tokens are those of timm's own forward pass, and of fine-tuning."""
    own, b = masked(), batch()
    own.encoder.eval()
    encoded, places = own.encode(b["input"])
    torch.testing.assert_close(encoded, own.encoder.forward_features(b["input"]))
    assert torch.equal(places, torch.arange(16).expand(5, -1))
    pooled = Pooled(own, 3, seed=1).double()
    wanted = pooled.head(encoded[:, 1:].mean(1))
    torch.testing.assert_close(pooled(b["input"]), wanted)
    assert float(pooled.head.weight.detach().std()) < 4e-5 and not pooled.head.bias.any()
    assert not any(n.startswith(("masked.blocks", "masked.says", "masked.mask")) for n, _ in pooled.named_parameters())
    assert own.mask_token is not None  # the autoencoder itself keeps its decoder
    assert Pooled(as_masked(hub(), (1, 8, 8), (8, 1)), 3)(b["input"].float()).shape == (5, 3)


def test_positions_start_as_sines():
    encoder = started(TEACHER, 0)
    torch.testing.assert_close(encoder.pos_embed.data, sines((2, 2), 32, 1))
    assert not encoder.pos_embed[:, 0].any() and encoder.pos_embed.requires_grad
    assert len(encoder.pos_embed[0, 1:].unique(dim=0)) == 4


def test_noise_is_a_function_of_the_sample():
    samples = Arrays(np.zeros((12, 1, 8, 8), np.float32), np.arange(12) % 2)
    source = with_draws(Batches(samples, 6), 49)
    clock = Clock(stage="generic", step=1, steps_per_epoch=2)
    whole = source.batch(clock)
    parts = [source.batch(replace(clock, rank=r, world=2)) for r in range(2)]
    assert whole["noise"].shape == (6, 49) and torch.equal(whole["noise"], torch.cat([p["noise"] for p in parts]))
    assert not torch.equal(whole["noise"], source.batch(replace(clock, stage="other"))["noise"])
    assert not torch.equal(whole["noise"], source.batch(replace(clock, seed=1))["noise"])
    assert len(whole["noise"].unique()) == 6 * 49  # no sample has its neighbour's numbers
    assert (draws(3, 0, np.arange(4), 5) == draws(3, 0, np.arange(4), 16)[:, :5]).all()
    assert source.fingerprint != with_draws(Batches(samples, 6), 50).fingerprint != Batches(samples, 6).fingerprint


# -- the specific stage -------------------------------------------------------------------------------------------


def test_the_specific_loss_by_hand():
    vit, b = STUDENT.build(seed=0).double(), batch()
    teacher = ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build(seed=1).double()
    b["label"] = torch.rand(5, 10, dtype=torch.float64).softmax(1)
    system = TokenDistill(vit, Frozen(teacher), objectives=["pseudo:0.3"], label=0.7, label_smoothing=0.1)
    found = system.learn(b, Clock()).terms
    tokens = vit.forward_features(b["input"])
    z, z_dist = vit.head(tokens[:, 0]), vit.head_dist(tokens[:, 1])
    smooth = 0.9 * b["label"] + 0.01
    torch.testing.assert_close(found["label"], -0.7 * (smooth * z.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(found["pseudo"], 0.3 * F.cross_entropy(z_dist, teacher(b["input"]).argmax(1)))
    vit.train()
    torch.testing.assert_close(vit(b["input"]), (z + z_dist) / 2)  # also in training mode, once the stage is over


def test_the_distillation_token_stands_last_and_has_no_position(tmp_path):
    """The network that comes out, against one that adds positions first and the token behind all others."""
    cfg = replace(TINY, specific_epochs=3.0)
    vit = made(tmp_path, STUDENT, cfg)
    assert not vit.pos_embed[:, 1].any() and vit.pos_embed[:, 0].any() and not vit.pos_embed._backward_hooks
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        tokens = torch.cat([vit.cls_token.expand(3, -1, -1), vit.patch_embed(x)], 1)
        tokens = torch.cat([tokens + vit.pos_embed[:, [0, 2, 3, 4, 5]], vit.dist_token.expand(3, -1, -1)], 1)
        tokens = vit.norm(vit.blocks(tokens))
        wanted = (vit.head(tokens[:, 0]) + vit.head_dist(tokens[:, -1])) / 2
        torch.testing.assert_close(vit(x), wanted)


def test_learning_rates_by_layer():
    """Block l of L has decay^(L − l); embeddings decay^(L + 1); norm, heads and the new token the whole rate."""
    vit = STUDENT.build(seed=0)
    adamw = partial(torch.optim.AdamW, lr=8.0, weight_decay=0.1)
    groups = by_layer(vit, "blocks", 0.5, adamw, ("dist_token",))(list(vit.parameters())).param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    wanted = {"cls_token": (1.0, 0.0), "pos_embed": (1.0, 0.0), "patch_embed.proj.weight": (1.0, 0.1),
              "patch_embed.proj.bias": (1.0, 0.0), "blocks.0.attn.qkv.weight": (2.0, 0.1), "dist_token": (8.0, 0.0),
              "blocks.0.norm1.weight": (2.0, 0.0), "blocks.1.mlp.fc2.weight": (4.0, 0.1), "norm.weight": (8.0, 0.0),
              "head.weight": (8.0, 0.1), "head.bias": (8.0, 0.0), "head_dist.weight": (8.0, 0.1)}  # fmt: skip
    named = dict(vit.named_parameters())
    assert {n: found[id(named[n])] for n in wanted} == wanted and len(found) == len(named)
    for blocks, fresh, says in (("block", (), "no module 'block'"), ("blocks", ("token",), "no parameter 'token'")):
        with pytest.raises(UserError, match=says):
            by_layer(vit, blocks, 0.5, torch.optim.SGD, fresh)


def test_normalised_kd_by_hand():
    g = torch.Generator().manual_seed(0)
    t, s = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    y = torch.tensor([0, 5, 2, 2])
    p, q = t.softmax(1), s.softmax(1)
    T, gamma, each = 2.0, 0.7, []
    for i, k in enumerate(y):
        rest = [c for c in range(6) if c != k]
        a, b = (t[i, rest] / T).softmax(0), (s[i, rest] / T).softmax(0)
        each.append(-p[i, k] * q[i, k].log() - gamma * T**2 * (a * b.log()).sum())
    found = O.normalised_kd(t, s, y, T, gamma)
    torch.testing.assert_close(found, torch.stack(each))
    torch.testing.assert_close(O.normalised_kd(t, s, 0.8 * F.one_hot(y, 6).double() + 0.03, T, gamma), found)
    found.sum().backward()
    assert bool(torch.isfinite(s.grad).all()) and torch.autograd.gradcheck(lambda z: O.normalised_kd(t, z, y), s)
    far = torch.tensor([[500.0, 0.0, -500.0]])
    assert bool(torch.isfinite(O.normalised_kd(far, -far, torch.tensor([0]))).all())
    assert list(Distill(nn.Linear(4, 6), Frozen(nn.Linear(4, 6)), objectives=["nkd"], label=0.0).learn(
        {"input": torch.zeros(4, 4), "label": y}, Clock()).terms) == ["nkd"]  # fmt: skip


@pytest.mark.parametrize("how", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_mixed_images_carry_their_labels(how):
    """Images of one number each: what a mixed one holds of another is what its label says."""
    n, source = 8, Batches(Arrays(np.arange(8.0)[:, None, None, None] * np.ones((8, 1, 6, 6)), np.arange(8)), 8)
    both = mixing(source, n, **how)
    assert mixing(source, n) is source and both.steps_per_epoch == 1 and both.fingerprint != source.fingerprint
    parts = []
    for step in range(20):
        b = both.batch(Clock(step=step))
        assert torch.equal(b["input"], both.batch(Clock(step=step))["input"])
        own = source.batch(Clock(step=step))["label"]
        x, y = b["input"].flatten(1), b["label"]
        torch.testing.assert_close(y.sum(1), torch.ones(n))
        torch.testing.assert_close(x.mean(1), y @ torch.arange(8.0), rtol=1e-4, atol=1e-4)
        keep = y.gather(1, own[:, None])
        parts.append(round(float(keep.min()), 4))
        if "cutmix" in how:  # a rectangle of one other image, whole pixels of both
            assert all(len(row.unique()) <= 2 for row in x)
            assert abs(36 * parts[-1] - round(36 * parts[-1])) < 1e-2
        elif parts[-1] < 0.99:
            assert all(len(row.unique()) == 1 for row in x)
    assert len(set(parts)) > 10 and min(parts) >= 0 and max(parts) <= 1


def test_mixup_and_cutmix_take_turns():
    x = np.random.default_rng(0).normal(size=(8, 1, 6, 6)) + 100 * np.arange(8)[:, None, None, None]
    source = Batches(Arrays(x, np.arange(8)), 8)
    both = mixing(source, 8, mixup=1.0, cutmix=1.0)
    cut = 0
    for step in range(60):
        b, own = both.batch(Clock(step=step)), source.batch(Clock(step=step))
        unmixed = b["label"].gather(1, own["label"][:, None]) > 0.999  # a rectangle outside of the image
        cut += bool(((b["input"] == own["input"]).flatten(1).any(1) | unmixed[:, 0]).all())
    assert 18 < cut < 42
    with pytest.raises(UserError, match="must be 0 or positive, got -1 and 0"):
        mixing(source, 8, mixup=-1)
    with pytest.raises(UserError, match="are of images"):
        mixing(Batches(Arrays(np.zeros((4, 3)), np.arange(4) % 2), 2), 2, mixup=0.5).batch(Clock())


# -- the whole ----------------------------------------------------------------------------------------------------


def test_the_encoder_is_handed_over_and_the_decoder_dropped(tmp_path):
    run, data = Run(tmp_path / "run", quiet=True, device="cpu"), load("digits", limit=96)
    teacher = started(TEACHER, 0)
    auto = as_masked(teacher, (1, 8, 8), (16, 2))
    before = state_fingerprint(auto)
    classifier = ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build(seed=1)
    cfg = replace(TINY, teacher_epochs=0.0, layer_decay=1e-6)
    family = distill(run, data, STUDENT, auto, cfg, teacher=classifier)
    assert state_fingerprint(auto) == before and not auto.training and family.base is classifier
    assert not (tmp_path / "run/stages/teacher").exists()
    kept = Checkpoints(run.stage("generic"))
    tensors = kept.open(kept.last)[0]
    assert {k.split("/")[1].split(".")[0] for k in tensors if k.startswith("system/")} == {"masked", "predictor"}
    student = family["student"].model
    assert student.state_dict().keys() == STUDENT.build().state_dict().keys()
    # With almost no learning rate below the head, the blocks are still those of the generic stage.
    handed = tensors["system/masked.encoder.blocks.0.attn.qkv.weight"]
    handed = handed if isinstance(handed, torch.Tensor) else torch.as_tensor(handed)
    torch.testing.assert_close(student.blocks[0].attn.qkv.weight.data, handed, rtol=0, atol=1e-6)
    assert not torch.equal(handed, STUDENT.build(seed=0).blocks[0].attn.qkv.weight)
    assert family.cost["dropped_params"] > 0 and family.cost["trained_params"] == sum(
        p.numel() for p in student.parameters()
    )
    family.save(tmp_path / "run")
    again, x = stillhouse.load(tmp_path / "run/students/student"), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), student(x))
    assert export(again, torch.zeros(2, 1, 8, 8), "torch-export", tmp_path / "s.pt2").max_abs_diff < 1e-5
    pytest.importorskip("onnxruntime")
    assert export(again, torch.zeros(2, 1, 8, 8), "onnx", tmp_path / "s.onnx").max_abs_diff < 1e-4


def test_the_specific_stage_alone_needs_no_autoencoder(tmp_path):
    """With a teacher of one's own: the student is the one that a run with an autoencoder nobody reads gives."""
    teacher, data = ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build(seed=1), load("digits", limit=96)
    cfg = replace(TINY, generic="none")
    states = []
    for k, auto in enumerate((None, started(TEACHER, 0))):
        run = Run(tmp_path / str(k), quiet=True, device="cpu")
        family = distill(run, data, STUDENT, auto, cfg, teacher=teacher)
        assert family.cost["autoencoder_params"] == 0 and not run.stage("autoencoder").exists()
        assert family.base is teacher
        states.append(family["student"].model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    for changes, given in (({"generic": "features"}, teacher), ({"generic": "none"}, None)):
        with pytest.raises(UserError, match="autoencoder: None, but its features or its fine-tuned self"):
            distill(run, data, STUDENT, None, replace(TINY, **changes), teacher=given)


def test_labels_alone_are_plain_training(tmp_path):
    """No stage asks a teacher: what comes out is a network trained by its labels, bit for bit."""
    data = load("digits", limit=96)
    cfg = replace(TINY, **PLAIN, optimizer="sgd", mixup=0.0, cutmix=0.0, labelled=1.0, layer_decay=1.0, lr_warmup=0.0,
                  weight_decay=0.0, label_smoothing=0.0, teacher_epochs=0.0, specific_epochs=2.0)  # fmt: skip
    vit = STUDENT.build(seed=0)
    student = made(tmp_path, copy.deepcopy(vit), cfg)
    start_head(vit.head, fold(0, "head"))
    start_head(vit.head_dist, fold(0, "head_dist"))
    with torch.no_grad():
        vit.pos_embed[:, 1] = 0
    source, rate = Batches(data.train, 32), cfg.specific_lr * 32 / 256
    optimizer = torch.optim.SGD(vit.parameters(), lr=rate, momentum=0.9, nesterov=True)
    steps = 2 * source.steps_per_epoch
    for step in range(steps):
        clock = Clock(stage="specific", step=step, steps=steps, steps_per_epoch=source.steps_per_epoch)
        b = source.batch(clock)
        optimizer.param_groups[0]["lr"] = rate * cosine()(clock)
        optimizer.zero_grad()
        F.cross_entropy(vit(b["input"]), b["label"]).backward()
        vit.pos_embed.grad[:, 1] = 0
        optimizer.step()
    for (name, a), b in zip(student.named_parameters(), vit.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_users_own_by_name(tmp_path, monkeypatch):
    """A local folder of transformers, a student of one's own, without a fine-tuned teacher; as the command runs it."""
    hub().save_pretrained(tmp_path / "mae")
    sizes = "img_size=8, in_chans=1, num_classes=classes, patch_size=2, embed_dim=16, depth=1, num_heads=2"
    text = f"import timm\n\n\ndef small(classes):\n    return timm.create_model('{DEIT.partition(':')[2]}', {sizes})\n"
    (tmp_path / "mine_g2sd.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--data", "digits", "--limit", "64", "--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]
    own = [
        "--autoencoder",
        f"hf:{tmp_path / 'mae'}",
        "--model",
        "mine_g2sd:small",
        "--layer",
        "1",
        "--decoder",
        "16",
        "1",
    ]
    short = ["--generic-epochs", "1", "--specific-epochs", "1", "--tune-epochs", "1", "--batch", "32"]
    assert invoke(["run", "g2sd", *flags, *own, *short]) == 0
    assert stillhouse.load(tmp_path / "run/students/student")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert (tmp_path / "run/stages/teacher").exists() and not (tmp_path / "run/stages/autoencoder").exists()


def test_sizes_of_the_built_in_networks():
    class Of:
        classes = ("a", "b")

        def __init__(self, *shape):
            self.shape = shape

    assert [sized(BASE, Of(1, s, s)).options["patch_size"] for s in (8, 28, 32, 64, 224)] == [2, 4, 4, 8, 8]
    assert sized(BASE, Of(3, 24, 36)).options["patch_size"] == 4 and sized(BASE, Of(3, 28, 28)).classes == 2


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask": 1.0}, r"mask: expected a number in \[0, 1\), got 1.0"),
        ({"hard": 1.0}, r"hard: expected a number in \(0, 1\)"),
        ({"labelled": 0.0}, r"labelled: expected a number in \(0, 1\], got 0.0"),
        ({"layer": 0}, "layer: expected a number from 1, got 0"),
        ({"beta": 0.0}, "beta: expected a positive number"),
        ({"decoder": (33, 1)}, "decoder: expected a multiple of 32 as width and a depth from 1, got 33 and 1"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(UserError, match=says) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_told_before_a_step(tmp_path):
    run, data = Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=32)
    encoder, cfg = started(TEACHER, 0), replace(TINY, teacher_epochs=0.0)
    mlp = ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build()
    plain = replace(ENCODER, options=SMALL)
    fine = replace(STUDENT, options={**SMALL, "patch_size": 2})
    cases = [
        (STUDENT, mlp, {}, "need a VisionTransformer of timm, got MLP"),
        (mlp, encoder, {}, "need a VisionTransformer of timm, got MLP"),
        (fine, encoder, {}, "into 4 patches, the student into 16; they must see the same ones"),
        (STUDENT, encoder, {"layer": 3}, "the autoencoder's decoder has 2 blocks, got 3"),
        (STUDENT, encoder, {"mask": 0.9}, "leaves none to see"),
        (plain, encoder, {}, "VisionTransformer has no distillation token"),
        (STUDENT, encoder, {"tune_epochs": 0.0}, "tune_epochs: 0 leaves no teacher"),
        (STUDENT, hub(image_size=16), {}, "made for other images than"),
        (replace(STUDENT, classes=3), encoder, {}, "gives 3 logits, but digits has 10 classes"),
        (replace(STUDENT, shape=(1, 16, 16)), encoder, {}, "made for other images than"),
    ]
    for student, auto, changes, says in cases:
        with pytest.raises(UserError, match=says) as error:
            distill(run, data, student, auto, replace(cfg, **changes))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no distillation token; take a timm network"):
        TokenDistill(mlp, Frozen(mlp, copy=True), objectives=["pseudo:1"])
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "digits"], "--autoencoder is missing; give hf:FOLDER"),
        (["--autoencoder", "timm:vit_tiny_patch16_224"], "has no trained decoder"),
        (["--autoencoder", "hf:/nowhere"], "cannot be had as a ViTMAEForPreTraining"),
        (["--data", "digits", "--arms", "--model", DEIT], "--arms compares networks"),
        (["--mask", "2"], "mask: expected a number"),
        (["--data", "digits", "--autoencoder", "hf:x", "--teacher-lr", "1"], "--teacher-lr does nothing here"),
        (["--data", "digits", "--generic", "pixels", "--beta", "1"], "--beta does nothing here: --generic pixels"),
        (["--data", "digits", "--specific", "nkd", "--hard", "0.3"], "--hard does nothing here: --specific nkd"),
        (
            ["--data", "digits", "--generic", "none", "--teacher", "stillhouse:cnn", "--autoencoder", "hf:x"],
            "--autoencoder does nothing here: no stage reads the autoencoder",
        ),
    ],
)
def test_the_command_says_what_is_wrong(flags, says, tmp_path, capsys):
    assert invoke(["run", "g2sd", *flags, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and said.count("\n") == 0
