"""PELA: the card's exact checks, which layers are chosen, and mistakes told before a step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.export import export
from stillhouse.models import ModelSpec
from stillhouse.recipes.pela.experiment import SMALL, TINY
from stillhouse.recipes.pela.layers import rank_for, refresh, thin_layers
from stillhouse.recipes.pela.recipe import Config, distill, thinned
from stillhouse.recipes.pela.system import Pela, deviation, feature_error
from stillhouse.run import Run
from stillhouse.students.activations import Inputs
from stillhouse.students.blocks import alike_blocks, block_lists, block_paths
from stillhouse.students.edits import Factor, factorised
from stillhouse.students.lowrank import choose
from stillhouse.students.plan import Plan
from stillhouse.system import Clock
from stillhouse.teachers import Frozen, state_fingerprint

ROWS = [
    Row("pela", "few labels", {"labelled": 0.3, "tune_epochs": 0.0}),
    Row("pela", "fresh, one rank", {"start": "fresh", "rank": 3, "tune_epochs": 0.0, "compare": ("blocks.1",)}),
]
OFF = {"feature": 0.0, "logits": 0.0, "perturbation": 0.0}
ZERO = [  # with a = b = g = 0 the intermediate stage is plain training, which the fine-tuning stage is
    (
        Row("pela", "a b g 0", {**OFF, "epochs": 2.0, "tune_epochs": 0.0}),
        Row("pela", "plain", {**OFF, "epochs": 0.0, "tune_epochs": 2.0}),
    ),
]
# The network is not trained first: singular vectors of weights that differ by rounding differ by more than rounding.
SGD = {"optimizer": "sgd", "lr": 0.01, "teacher_epochs": 0.0}
JOINT = [
    Row("pela", "sgd", {**SGD, "tune_epochs": 0.0}),
    Row("pela", "sgd, few labels", {**SGD, "tune_epochs": 0.0, "labelled": 0.5}),
]


def vit(depth=2, seed=0, double=True):
    options = {"patch_size": 4, "embed_dim": 16, "depth": depth, "num_heads": 2}
    model = ModelSpec("timm:vit_tiny_patch16_224", 3, (1, 8, 8), options=options).build(seed=seed)
    return model.double() if double else model


def batch(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64)
    return {"input": x, "label": torch.arange(n) % 3}


def parts(ratio=2.0, **settings):
    """A network, its thin copy moved away from it, and the System of both."""
    base = vit()
    layers = thin_layers(base, choose(base), ratio)
    student = thinned(base, layers)
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    blocks = block_paths(base)
    given = {"task": 0.0, "feature": 0.0, "logits": 0.0, "perturbation": 0.0, **settings}
    system = Pela(
        student, Frozen(base, taps=blocks), base, blocks=blocks, pairs=[t.module for t in layers],
        optimizer=torch.optim.SGD, **given,
    )  # fmt: skip
    return base, student, layers, system


# -- the card's exact checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_start_leaves_the_discarded_singular_values(dtype):
    """(1) ‖BA − W‖² = Σ_{i>r} s_i²; and the singular values are split evenly between the two factors."""
    base = vit(double=dtype == torch.float64)
    layers = thin_layers(base, choose(base), 3.0)
    student = thinned(base, layers)
    assert len(layers) == 8
    for t in layers:
        w, pair = base.get_submodule(t.module).weight, student.get_submodule(t.module)
        s = torch.linalg.svdvals(w)
        made = pair[1].weight @ pair[0].weight
        torch.testing.assert_close((made - w).square().sum(), s[t.rank :].square().sum())
        torch.testing.assert_close(pair[0].weight.norm(dim=1), s[: t.rank].sqrt())
        torch.testing.assert_close(pair[1].weight.norm(dim=0), s[: t.rank].sqrt())
        assert torch.equal(pair[1].bias, base.get_submodule(t.module).bias) and pair[0].bias is None


def test_a_full_rank_gives_identical_outputs():
    """(2) c so small that r = min(in, out)."""
    base = vit(double=False).eval()
    student = copy.deepcopy(base)
    for path in choose(base):
        layer = base.get_submodule(path)
        r = rank_for(layer, 0.2)
        assert r == min(layer.in_features, layer.out_features)
        student = Factor(path, r).apply(student)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(student(x), base(x), rtol=0, atol=1e-5)


def test_the_bound_touches_one_entry_of_each_product():
    """(3) ∂L_wp/∂(BA) is nonzero at the largest deviation alone, on either side of ε, and is 2(max − ε)/P·sign."""
    base, student, layers, system = parts(perturbation=1.0)
    for epsilon in (1e-3, 10.0):  # the maximum is above the one and below the other
        system.epsilon = epsilon
        student.zero_grad()
        system.bound().backward()
        for t in layers:
            w, (first, second) = base.get_submodule(t.module).weight, student.get_submodule(t.module).children()
            away = (second.weight @ first.weight - w).detach()
            i, j = divmod(int(away.abs().argmax()), t.columns)
            at = away[i, j]
            slope = 2 * (at.abs() - epsilon) * at.sign() / len(layers)
            by_row, by_column = torch.zeros_like(second.weight), torch.zeros_like(first.weight)
            by_row[i], by_column[:, j] = slope * first.weight[:, j], slope * second.weight[i]
            torch.testing.assert_close(second.weight.grad, by_row)
            torch.testing.assert_close(first.weight.grad, by_column)
    assert all(p.grad is None for p in base.parameters())


def test_the_bound_is_the_largest_entry_and_no_induced_norm():
    w = torch.zeros(2, 2, dtype=torch.float64)
    pair = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)).double()
    with torch.no_grad():
        pair[0].weight.copy_(torch.eye(2))
        pair[1].weight.copy_(torch.tensor([[3.0, -4.0], [0.5, 1.0]]))
    assert deviation(pair, w).item() == 4.0  # ord=inf would say 7, the Frobenius norm 5.1


def test_the_bound_pulls_to_epsilon_from_both_sides():
    base = nn.Sequential(nn.Linear(4, 4)).double()
    pair = factorised(base[0], 4)
    with torch.no_grad():
        pair[1].weight.add_(0)
    system = Pela(
        nn.Sequential(pair), Frozen(base), base, blocks=[], pairs=["0"], perturbation=1.0, epsilon=0.3,
        optimizer=torch.optim.SGD,
    )  # fmt: skip
    torch.testing.assert_close(system.bound(), torch.tensor(0.09, dtype=torch.float64))  # no hinge: (0 − ε)²


def test_without_weights_it_is_the_task_alone():
    """(4) a = b = g = 0."""
    _, student, _, system = parts(task=1.0)
    plain = copy.deepcopy(student)
    found = system.learn(batch(), Clock())
    assert list(found.terms) == ["task"]
    found.total.backward()
    F.cross_entropy(plain(batch()["input"]), batch()["label"]).backward()
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_the_pair_has_as_many_parameters_as_the_card_says():
    """(5) r·(in + out) + out, r = ⌊in·out / (c(in + out))⌋."""
    base = vit()
    layers = thin_layers(base, choose(base), 2.0)
    student = thinned(base, layers)
    for t in layers:
        layer = base.get_submodule(t.module)
        assert t.rank == (layer.in_features * layer.out_features) // (2 * (layer.in_features + layer.out_features))
        count = sum(p.numel() for p in student.get_submodule(t.module).parameters())
        assert count == t.rank * (layer.in_features + layer.out_features) + layer.out_features
        assert t.met and t.kept <= t.asked
    assert rank_for(nn.Linear(768, 3072), 2.0) == 307 and rank_for(nn.Linear(768, 768), 1.5) == 256
    assert rank_for(nn.Linear(16, 12), 8.0) == 1  # guarded


# -- the terms ----------------------------------------------------------------------------------------------------


def test_every_term_by_hand():
    base, student, layers, system = parts(task=0.5, feature=0.3, logits=0.2, perturbation=0.7, epsilon=0.01)
    b = batch()
    z, t, f_s, f_t = student(b["input"]), base(b["input"]), {}, {}
    for model, seen in ((student, f_s), (base, f_t)):
        h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(b["input"]))))
        for k, block in enumerate(model.blocks):
            h = seen[k] = block(h)
    each = [(f_s[k] - f_t[k]).square().mean() for k in f_s]
    far = [
        (student.get_submodule(x.module)[1].weight @ student.get_submodule(x.module)[0].weight
         - base.get_submodule(x.module).weight).abs().max()
        for x in layers
    ]  # fmt: skip
    wanted = {
        "task": 0.5 * F.cross_entropy(z, b["label"]),
        "feature": 0.3 * sum(each) / 2,
        "logits": 0.2 * (z - t).square().mean(),
        "perturbation": 0.7 * sum((d - 0.01) ** 2 for d in far) / len(far),
    }
    found = system.learn(b, Clock()).terms
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_few_labels_and_all_features():
    """The label term sees the labelled part only, the others the other part only; gradients add."""
    *_, system = parts(task=1.0, feature=1.0, logits=0.5)
    few, every = batch(3, seed=1), batch(6, seed=2)
    both = system.learn({"labelled": few, "every": every}, Clock()).terms
    torch.testing.assert_close(both["task"], system.learn(few, Clock()).terms["task"])
    torch.testing.assert_close(both["feature"], system.learn(every, Clock()).terms["feature"])
    torch.testing.assert_close(both["logits"], system.learn(every, Clock()).terms["logits"])
    system.feature = system.logits = 0.0
    system._blocks = []
    torch.testing.assert_close(system.learn({"labelled": few, "every": {}}, Clock()).terms["task"], both["task"])


def test_the_pooled_vector_of_a_swin_is_compared_as_its_release_does():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 3}
    base = timm.create_model("swin_tiny_patch4_window7_224", **sizes).double().eval()
    student, path = copy.deepcopy(base), "head.global_pool"
    with torch.no_grad():
        student.norm.weight.mul_(1.5)
    system = Pela(
        student, Frozen(base, taps=[path]), base, blocks=[path], pairs=[], task=0.0, feature=1.0,
        optimizer=torch.optim.SGD,
    )  # fmt: skip
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = (m.forward_features(x).mean((1, 2)) for m in (base, student))
    found = system.learn({"input": x}, Clock()).terms["feature"]
    torch.testing.assert_close(found, (t - s).square().mean())


def test_padding_of_sentences_says_nothing():
    g = torch.Generator().manual_seed(0)
    t, s = (torch.randn(2, 4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = feature_error(t, s, {"attention_mask": mask})
    torch.testing.assert_close(found[0], (t[0, :2] - s[0, :2]).square().mean())
    torch.testing.assert_close(found[1], (t[1] - s[1]).square().mean())
    torch.testing.assert_close(feature_error(t, s), (t - s).square().mean((1, 2)))


def test_the_network_stays_as_it_was_and_is_not_saved(tmp_path):
    base = vit(double=False).train()
    base.head = nn.Linear(16, 10)
    before = state_fingerprint(base)
    cfg = replace(TINY, teacher_epochs=0.0, tune_epochs=0.0)
    run = Run(tmp_path, quiet=True, device="cpu")
    family = distill(run, load("digits", limit=64), base, cfg)
    assert state_fingerprint(base) == before and family.base is base
    from stillhouse.checkpoint import Checkpoints

    kept = Checkpoints(run.stage("intermediate"))
    names = kept.open(kept.last)[0]
    assert {k.split("/")[1].split(".")[0] for k in names if k.startswith("system/")} == {"student"}


def test_fresh_factors_are_fresh_and_seeded():
    base = vit()
    layers = thin_layers(base, choose(base), 2.0)
    made = [thinned(base, layers) for _ in range(4)]
    for model, seed in zip(made, (0, 0, 1), strict=False):
        refresh(model, layers, seed)
    weights = [m.blocks[0].attn.qkv[0].weight for m in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[0], made[0].blocks[1].attn.qkv[0].weight)
    assert torch.equal(made[0].blocks[0].norm1.weight, base.blocks[0].norm1.weight)


# -- which layers -------------------------------------------------------------------------------------------------


def test_layers_by_name():
    base = vit()
    every = [f"blocks.{k}.{p}" for k in (0, 1) for p in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert choose(base) == every
    assert choose(base, skip=["attn.proj"]) == [p for p in every if "attn.proj" not in p]
    assert choose(base, skip=["blocks.0"]) == every[4:]
    assert choose(base, skip=["*.fc?"]) == [p for p in every if "fc" not in p]
    assert choose(base, include=["blocks.1.mlp"]) == every[6:]
    assert choose(base, least_outputs=17) == [p for p in every if p.endswith(("qkv", "fc1"))]


def test_library_networks_keep_their_ends():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    deit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
    assert len(choose(deit)) == 8 and not any("head" in p for p in choose(deit))
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 2, 1, 1),
                             num_heads=(1, 2, 2, 2))  # fmt: skip
    chosen = choose(swin)
    assert len(chosen) == 5 * 3 and not any(w in p for p in chosen for w in ("attn.proj", "downsample", "head"))
    config = transformers.BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48,
                                     vocab_size=60, num_labels=12)  # fmt: skip
    bert = transformers.BertForSequenceClassification(config)
    chosen = choose(bert)
    assert len(chosen) == 2 * 6 + 1 and "bert.pooler.dense" in chosen and "classifier" not in chosen
    x = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    for model, inputs in ((deit, (torch.randn(2, 3, 32, 32),)), (swin, (torch.randn(2, 3, 56, 56),)), (bert, x)):
        small = thinned(model.eval(), thin_layers(model, choose(model), 2.0))
        with torch.no_grad():
            out = small(**inputs) if isinstance(inputs, dict) else small(*inputs)
        assert torch.isfinite(out.logits if hasattr(out, "logits") else out).all()


def test_layers_that_others_read_or_share_stay_whole():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    chosen = choose(net)
    assert chosen and not any("out_proj" in p for p in chosen)
    path = "encoder.layers.encoder_layer_0.self_attention.out_proj"
    with pytest.raises(UserError, match=f"{path}: MultiheadAttention reads the weight"):
        choose(net, include=[path])
    tied = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    tied["b"].weight = tied["a"].weight
    assert choose(tied) == ["c"]
    with pytest.raises(UserError, match="b: its weight is tied"):
        choose(tied, include=["b"])


def test_blocks_are_found():
    base = vit(3)
    assert block_lists(base) == ["blocks"] and block_paths(base) == ["blocks.0", "blocks.1", "blocks.2"]
    assert alike_blocks(base)[0] == "blocks"
    thin = thinned(base, thin_layers(base, choose(base), 2.0))
    for path in ("blocks.0.mlp.fc1.0", "blocks.0.mlp.fc1.1"):  # a layer with a part of its own is not a block
        thin = Inputs(path, 8).apply(thin)
    assert block_lists(thin) == ["blocks"]
    with pytest.raises(UserError, match="no list of blocks"):
        block_paths(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(UserError, match="no module 'block'"):
        alike_blocks(base, "block")
    base.blocks[1].mlp.fc1 = nn.Linear(16, 8)
    with pytest.raises(UserError, match="block 1 has other parameters"):
        alike_blocks(base, "blocks")


# -- what it gives ------------------------------------------------------------------------------------------------


def test_the_student_of_a_bert_reloads_and_is_not_taken_for_a_plain_one(tmp_path):
    pytest.importorskip("transformers")
    from stillhouse.outcomes import Member, Models
    from stillhouse.text.classifiers import bert_spec

    spec = bert_spec(60, 3, width=24, layers=2, heads=2, length=8)
    base = spec.build(seed=0).eval()
    layers = thin_layers(base, choose(base), 2.0)
    student = thinned(base, layers).eval()
    plan = Plan.identity(base).then(*(t.edit for t in layers))
    x = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    Models([Member("thin", student, plan), Member("whole", base)], x, spec).save(tmp_path)
    again = stillhouse.load(tmp_path / "students/thin")
    with torch.no_grad():
        assert torch.equal(again(**x).logits, student(**x).logits)
    assert not (tmp_path / "students/thin/config.json").exists()  # from_pretrained would fill in fresh layers
    assert (tmp_path / "students/whole/config.json").exists()


def test_thin_students_compose_and_export(tmp_path):
    """Thin twice: the plan goes from the first base; the exported program answers as the student."""
    run, data = Run(tmp_path / "a", quiet=True, device="cpu"), load("digits", limit=64)
    cfg = replace(TINY, tune_epochs=0.0)
    first = distill(run, data, SMALL, cfg)
    first.save(tmp_path / "a")
    from stillhouse.recipes.pela.experiment import OPTIONS

    home = tmp_path / "a/students/student"
    again = replace(cfg, teacher_epochs=0.0, modules=("blocks.0.mlp.fc1.1",), ratio=1.2, epochs=1.0)
    spec, network, plan = OPTIONS(out=tmp_path, model=str(home)).trained(data, SMALL.name)
    family = distill(Run(tmp_path / "b", quiet=True, device="cpu"), data, spec, again, network=network, plan=plan)
    family.save(tmp_path / "b")
    model = stillhouse.load(tmp_path / "b/students/student")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), family["student"].model(x))
    assert len(model.blocks[0].mlp.fc1[1]) == 2
    parity = export(model, torch.zeros(2, 1, 8, 8), "torch-export", tmp_path / "thin.pt2")
    assert parity.max_abs_diff < 1e-5


def test_export_to_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    base = SMALL.build(seed=0).eval()
    student = thinned(base, thin_layers(base, choose(base), 2.0)).eval()
    assert export(student, torch.zeros(2, 1, 8, 8), "onnx", tmp_path / "thin.onnx").max_abs_diff < 1e-4


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ratio": 1.0}, "ratio: expected a number above 1, got 1.0"),
        ({"labelled": 0.0}, "labelled in"),
        ({"epsilon": -1.0}, "epsilon: expected a number from 0, got -1.0"),
        ({"task": 0.0, "feature": 0.0, "perturbation": 0.0}, "nothing to learn"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(UserError, match=says) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


def test_a_rank_that_does_not_pay_names_the_largest_that_does():
    base = vit()
    with pytest.raises(UserError, match=r"attn.qkv: rank 12 does not pay.*48×16 up to rank 11: give --rank 11"):
        thin_layers(base, choose(base), 2.0, rank=12)
    assert [t.rank for t in thin_layers(base, ["blocks.0.attn.qkv"], 2.0, rank=11)] == [11]
    with pytest.raises(UserError, match=r"0: rank 1 does not pay.*: --skip it"):
        thin_layers(nn.Sequential(nn.Linear(1, 12)), ["0"], 2.0)


def test_wrong_networks_and_names_are_told_before_a_step(tmp_path):
    run, data = Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=32)
    cases = [
        (vit(double=False), {}, "gives 3 logits, but digits has 10 classes"),
        (SMALL, {"skip": ("atn",)}, "no module 'atn'"),
        (SMALL, {"modules": ("blocks.0.norm1",)}, "blocks.0.norm1: LayerNorm is not supported"),
        (SMALL, {"compare": ("blocks.7",)}, "no module 'blocks.7'"),
        (ModelSpec("stillhouse:mlp", 10, (1, 8, 8)), {}, "no list of blocks"),
        (replace(SMALL, shape=(1, 12, 12)).build(), {}, r"cannot take inputs of shape \(1, 8, 8\) of digits"),
    ]
    for base, changes, says in cases:
        with pytest.raises(UserError, match=says) as error:
            distill(run, data, base, replace(TINY, **changes))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "stages").exists()


class Reads(nn.Module):
    """A block that reads its layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.flat, self.layer, self.end = nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.end(F.linear(self.flat(x), self.layer.weight))


def test_a_network_that_reads_weights_itself(tmp_path):
    cfg = replace(TINY, modules=("layer",), compare=("flat",))
    with pytest.raises(UserError, match="Reads does not run with two layers in place of one"):
        distill(Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=32), Reads(), cfg)


def test_all_arms_learn_from_the_data_of_the_command(tmp_path, monkeypatch):
    from stillhouse.recipes.pela import experiment

    monkeypatch.setattr(experiment, "BASE", SMALL)
    monkeypatch.setattr(experiment, "ARMS", {k: {"epochs": 0.0} for k in experiment.ARMS})
    flags = ["--limit", "64", "--seeds", "1", "--ratio", "2", "--teacher-epochs", "1", "--epochs", "1", "--batch", "32"]
    out = ["--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]
    assert invoke(["run", "pela", *flags, *out]) == 0


OWN = """
import torch
from stillhouse.recipes.pela.experiment import SMALL


def net():
    model = SMALL.build(seed=5)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model
"""


def test_a_network_of_ones_own_is_taken_as_it_comes_and_goes_on(tmp_path, monkeypatch, capsys):
    """A function may give trained weights; what is made of it is the base of further runs, quantised ones too."""
    (tmp_path / "own_thin_vit.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    how = ["--data", "digits", "--limit", "64", "--device", "cpu", "--quiet", "--batch", "32", "--epochs", "1"]

    def run(*flags):
        code = invoke(["run", *flags, *how])
        return code, capsys.readouterr().err.strip()

    assert run("pela", "--model", "own_thin_vit:net", "--out", "a") == (0, "")
    short = ("--quantized-epochs", "0", "--bits", "8")
    assert run("gpusq_vit", "--model", "a/students/student", "--out", "b", *short) == (0, "")
    assert run("pela", "--model", "b/students/int8", "--out", "c", "--modules", "blocks.0.mlp.fc1.1", "--ratio", "1.2",
               "--compare", "blocks.0") == (0, "")  # fmt: skip
    assert stillhouse.load("c/students/student")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    for flags, words in (
        (["--weights", "x.safetensors"], "--weights does nothing here: --model a/students/student has its own weights"),
        (["--seeds", "2"], "--seeds does nothing here"),
        (["--rank", "2", "--ratio", "3"], "--ratio does nothing here: --rank gives all layers one rank"),
        (["--perturbation", "0", "--epsilon", "1"], "--epsilon does nothing here"),
    ):
        code, said = run("pela", "--model", "a/students/student", "--out", "d", *flags)
        assert code == 2 and words in said and "\n" not in said


def test_published_weights_must_be_for_these_classes(tmp_path, capsys):
    flags = ["--model", "timm:vit_tiny_patch16_224", "--pretrained", "--data", "digits", "--out", str(tmp_path / "a")]
    assert invoke(["run", "pela", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert "published weights are for 1000 classes, digits has 10" in said and "--teacher-epochs" in said
    assert invoke(["run", "pela", "--weights", "no.safetensors", "--out", str(tmp_path / "b")]) == 2
    assert "no.safetensors does not exist" in capsys.readouterr().err


def test_the_command_says_what_is_missing(tmp_path, capsys):
    flags = ["--data", "digits", "--device", "cpu", "--teacher-epochs", "0", "--out", str(tmp_path / "run")]
    assert invoke(["run", "pela", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert "has no trained weights" in said and said.count("\n") == 0
    assert invoke(["run", "pela", "--ratio", "0.5", "--out", str(tmp_path / "other")]) == 2
