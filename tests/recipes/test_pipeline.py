"""Pipelines: steps as text, budgets, one plan over all of them, files, exports, mistakes."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.evaluate import count_macs, count_params, predict
from stillhouse.export import export
from stillhouse.models import ModelSpec
from stillhouse.recipes.pipeline.config import Config, Step
from stillhouse.recipes.pipeline.deploy import answers, int8, session
from stillhouse.recipes.pipeline.experiment import BASE, OPTIONS, TINY, given, tiny
from stillhouse.recipes.pipeline.recipe import distill
from stillhouse.run import Run
from stillhouse.students.edits import Depth, Factor, Pack, Remove, largest_paying_rank
from stillhouse.students.lowrank import factorable, fit_ranks
from stillhouse.students.parametrized import bake, parametrize_weights, weight_layers
from stillhouse.students.plan import Keep, Plan, signature, unpacked
from stillhouse.students.projectors import Symmetric

MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [32, 32]})
EVERY = ("train:1", "prune:0.3", "factor:0.3", "sparsify:2:4", "distill:1", "quantize:int4?train=1&bucket=64")
_SGD = {"optimizer": "sgd", "lr": 0.02, "quantize_lr": 0.01}
ROWS = [Row("pipeline", "every step", {"steps": EVERY})]
ZERO = [
    (
        Row("pipeline", "weight 0", {"kd": 0.0}, {"teacher": MLP}),
        Row("pipeline", "labels alone", {"kd": 0.0}),
    )
]
# Without factors: a singular value decomposition makes more of a rounding than the table allows.
APART = tuple(s for s in EVERY if not s.startswith("factor"))
JOINT = [Row("pipeline", "mlp", {**_SGD, "steps": APART}, {"base": MLP})]
X = load("digits", limit=64).test.take(torch.arange(8).numpy())["input"]


def run(folder, **options):
    return Run(folder, quiet=True, device="cpu", **options)


# -- the steps as text -------------------------------------------------------------------------------------------


def test_steps_read_like_the_command_line_has_them():
    cfg = Config(steps=("prune:0.5,distill", "quantize:int8?train=0&bucket=128"))
    assert cfg.parsed == [
        Step("prune", "0.5"), Step("distill"), Step("quantize", "int8", {"train": 0.0, "bucket": 128.0}),
    ]  # fmt: skip
    assert [s.text for s in cfg.parsed] == ["prune:0.5", "distill", "quantize:int8"]
    assert Step.parse("sparsify:2:4").n_of_m == (2, 4) and Step.parse("quantize:4").bits == 4
    assert Step.parse("distill:7").epochs(3.0) == 7 and Step.parse("distill").epochs(3.0) == 3


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("prun:0.5", ["no step 'prun'", "prune"]),
        ("prune:1.5", ["'prune:1.5'", "prune:RATIO"]),
        ("prune", ["prune:RATIO"]),
        ("sparsify:4:2", ["sparsify:N:M"]),
        ("quantize:int9", ["quantize:intBITS (2 to 8)"]),
        ("quantize:int1", ["quantize:intBITS (2 to 8)"]),
        ("train,export:onnx-packed,quantize:int8", ["export:onnx-packed", "put quantize:int8 before it"]),
        ("quantize:int8?trian=0", ["no option 'trian'", "train"]),
        ("quantize:int8?train=x", ["needs a number", "'x'"]),
        ("prune:0.5?a=1", ["prune has no option 'a'"]),
        ("quantize:int8,prune:0.5", ["prune cannot follow quantize", "put prune first"]),
        ("sparsify:2:4,factor:0.5", ["factor cannot follow sparsify"]),
        ("quantize:int8,sparsify:2:4", ["sparsify cannot follow quantize"]),
        ("quantize:int8,quantize:int4", ["2 times"]),
        ("distill,train", ["train", "first"]),
        ("export:onnx", ["stillhouse export"]),
        ("export:tflite", ["export:onnx"]),
        (",", ["at least one"]),
    ],
)
def test_steps_that_cannot_be_are_one_line(steps, words, tmp_path, capsys):
    common = ["--data", "digits", "--model", "stillhouse:mlp", "--out", str(tmp_path / "x"), "--quiet"]
    code = invoke(["run", "pipeline", *common, "--steps", steps])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["no trained weights", "train"]),
        (["--steps", "train:1,prune:0.99"], ["cannot be reached", "at most"]),
        (["--steps", "train:1,factor:0.99"], ["cannot be reached", "at most"]),
        (["--steps", "train:1,sparsify:2:7"], ["rows 7 divides", "rows of 64"]),
        (["--steps", "train:1,quantize:int8", "--exclude", "nowhere"], ["no module 'nowhere'"]),
        (["--steps", "train:1,quantize:int8", "--exclude", "*"], ["no layer to quantise"]),
        (["--kd", "2"], ["kd in [0, 1]"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = ["--data", "digits", "--limit", "64", "--model", "stillhouse:mlp", "--quiet"]
    code = invoke(["run", "pipeline", *common, "--out", str(tmp_path / "x"), *flags])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


# -- ranks for a whole network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_ranks_meet_the_budget_and_every_layer_they_touch_gets_smaller(ratio):
    model = nn.Sequential(*(m for k in range(4) for m in (nn.Linear(96, 96), nn.ReLU())), nn.Linear(96, 10))
    edits, budget = fit_ranks(model, ratio)
    made = Plan.identity(model).then(*edits).build(model)
    assert count_params(made) == budget.reached <= budget.target == (1 - ratio) * count_params(model)
    assert budget.met and abs(budget.error) < 0.02
    for e in edits:
        layer = model.get_submodule(e.module)
        assert 1 <= e.rank <= largest_paying_rank(layer)


def test_ranks_go_where_the_energy_is():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 2) @ torch.randn(2, 64))  # of rank 2
    edits = {e.module: e.rank for e in fit_ranks(model, 0.6)[0]}
    assert edits["0"] == 2 and edits["1"] == 23
    made = Plan.identity(model).then(*fit_ranks(model, 0.6)[0]).build(model)
    assert torch.allclose(made[0](torch.ones(1, 64)), model[0](torch.ones(1, 64)), rtol=1e-3, atol=1e-3)


def test_a_small_ratio_leaves_the_best_layers_whole():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    edits, budget = fit_ranks(model, 0.05)
    assert 0 < len(edits) < 4 and budget.met  # all at a rank near the one that pays would lose more
    assert fit_ranks(model, 0.0)[0] == []


def test_layers_that_cannot_be_thin_are_left_out():
    tied = nn.Linear(32, 32)
    model = nn.ModuleDict({
        "tiny": nn.Linear(2, 2), "grouped": nn.Conv2d(32, 32, 3, groups=4), "a": tied, "b": tied,
        "attention": nn.MultiheadAttention(32, 4), "free": nn.Linear(32, 32),
    })  # fmt: skip
    model["b"] = nn.Linear(32, 32)
    model["b"].weight = tied.weight
    assert factorable(model) == ["free"]
    with pytest.raises(UserError, match="no layer that two thin ones"):
        fit_ranks(nn.Sequential(nn.Linear(2, 2)), 0.1)


# -- one plan over all steps ---------------------------------------------------------------------------------------


def test_cuts_of_cuts_are_one_cut_of_the_base():
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    first = Plan((Keep("0", "out", (0, 2, 4, 6, 7)), Keep("2", "in", (0, 2, 4, 6, 7))), signature(base))
    middle = first.build(base)
    second = Plan(
        (Keep("0", "out", (1, 3)), Keep("2", "in", (1, 3)), Keep("2", "out", (0, 5)), Keep("4", "in", (0, 5))),
        signature(middle),
    )
    both, x = first.then(*second.edits), torch.randn(3, 4)
    assert torch.equal(both.build(base)(x), second.build(middle)(x))
    assert [e.index for e in both.edits if e.module == "0"] == [(2, 6)]
    assert Plan.from_json(both.to_json()) == both
    split = first.then(Factor("4", 1), *second.edits[:2])  # with another edit between them they stay two cuts
    assert [type(e).__name__ for e in split.edits] == ["Keep", "Keep", "Factor", "Keep", "Keep"]
    assert split.build(base)[0].out_features == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every step once, on disk."""
    folder = tmp_path_factory.mktemp("pipeline")
    cfg = replace(TINY, steps=(*EVERY, "export:torch-export"))
    family = tiny(run(folder), cfg)
    family.save(folder)
    return family, folder


def test_every_stage_is_one_plan_from_the_base_and_loads_alone(whole):
    family, folder = whole
    assert [m.name for m in family] == ["1-train", "2-prune", "3-factor", "4-sparsify", "5-distill", "6-quantize"]
    for m in family:
        again = stillhouse.load(folder / "students" / m.name)
        with torch.no_grad():
            assert torch.equal(again(X), m.model(X)), m.name
        assert m.plan.signature == signature(BASE.build())
        assert type(again) is type(BASE.build()) and not any("arametri" in type(x).__name__ for x in again.modules())
    kinds = [type(e).__name__ for e in family["6-quantize"].plan.edits]
    assert sorted(set(kinds)) == ["Factor", "Keep", "Pack"] and kinds == sorted(
        kinds, key=["Keep", "Factor", "Pack"].index
    )


def test_every_step_does_what_it_says(whole):
    family, _ = whole
    example = torch.zeros(1, 1, 8, 8)
    params = {m.name: count_params(m.model) for m in family}
    macs = {m.name: count_macs(m.model, example) for m in family}
    assert abs(macs["2-prune"] / macs["1-train"] - 0.7) < 0.03  # channels of a small network are coarse
    assert 0.95 < params["3-factor"] / (0.7 * params["2-prune"]) <= 1
    assert not any("missed" in s["what"] for s in family.cost["stages"])  # within 1 %, or one channel, or one rank
    assert params["3-factor"] == params["6-quantize"] and macs["3-factor"] == macs["6-quantize"]
    for name in ("4-sparsify", "5-distill", "6-quantize"):  # the pattern survives training and quantisation
        for path, layer in family[name].model.named_modules():
            w = getattr(layer, "weight", None)
            if isinstance(layer, nn.Linear | nn.Conv2d) and w[0].numel() % 4 == 0:
                assert ((w.reshape(len(w), -1, 4) != 0).sum(-1) <= 2).all(), (name, path)
    before, after = (family[n].model.state_dict() for n in ("4-sparsify", "5-distill"))
    mask = before["hidden.1.0.weight"] != 0
    assert torch.equal(mask, after["hidden.1.0.weight"] != 0)
    assert not torch.equal(before["hidden.1.0.weight"], after["hidden.1.0.weight"])
    bits = {e.bits for e in family["6-quantize"].plan.edits if isinstance(e, Pack)}
    assert bits == {4} and len(family["6-quantize"].model.head.weight[0].unique()) <= 16


def test_files_shrink_as_they_should(whole):
    family, folder = whole
    sizes = [sum(t.nbytes for t in load_file(folder / f"students/{m.name}/model.safetensors").values()) for m in family]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == sizes[4] > 2 * sizes[5]
    exported = json.loads((folder / "6-quantize-torch-export.json").read_text())
    assert "6-quantize.pt2" in exported and (folder / "exports/6-quantize.pt2").exists()


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_the_last_student_is_exported_with_parity(whole, to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    assert export(whole[0].members[-1].model, X[:1], to, tmp_path / "student").max_rel_diff < 1e-4


def test_eight_bit_activations_in_onnxruntime(whole, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model, data = copy.deepcopy(whole[0]["1-train"].model), load("digits", limit=96)
    parametrize_weights(model, weight_layers(model), lambda path, layer: Symmetric(8, 0))
    bake(model)
    said = int8(model, data, tmp_path / "net.int8.onnx")
    assert "net.int8.onnx" in said and "top-1 of PyTorch on" in said and ort
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.int8.onnx").graph.initializer}
    small = [v for k, v in stored.items() if v.dtype == "int8" and v.ndim == 4]
    assert {v.shape for v in small} == {tuple(model.block1[0].weight.shape), tuple(model.block2[0].weight.shape)}
    want = model.head.weight.abs().amax(1).detach() / 127  # our scales, which it finds again
    scales = [torch.tensor(v) for v in stored.values() if v.shape == (10,) and v.dtype == "float32"]
    assert any(torch.allclose(s, want, rtol=1e-5) for s in scales)
    z, y = answers(session(tmp_path / "net.int8.onnx"), data.test)
    want, _ = predict(model, data.test)
    assert z.shape == want.shape and (z - want).abs().max() < 0.2 * want.abs().max() and len(y) == len(z)


def test_a_student_goes_on_in_another_pipeline(whole, tmp_path):
    """The plan of the second run begins at the base of the first."""
    family, folder = whole
    options = OPTIONS(out=tmp_path, model=str(folder / "students/6-quantize"))
    data = load("digits", limit=96)
    for steps in (("quantize:int2?train=0",), ("distill:1", "factor:0.2", "quantize:int8?train=0")):
        spec, network, plan = given(options, data, Config(), 0)
        assert spec.name == BASE.name
        with torch.no_grad():
            assert torch.equal(network.eval()(X), family["6-quantize"].model(X))
        more = distill(run(tmp_path / steps[0]), data, spec, replace(TINY, steps=steps), network=network, plan=plan)
        more.save(tmp_path / steps[0])
        for m in more:
            again = stillhouse.load(tmp_path / steps[0] / "students" / m.name)
            with torch.no_grad():
                assert torch.equal(again(X), m.model(X)), m.name


def test_a_layer_is_not_changed_behind_its_packing():
    """Its codes would not fit it: said where the plan is made, not where it is saved."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    plan = Plan.identity(net).then(Pack("1.0", 8))
    for edit in (Keep("1.0", "out", (0, 1)), Factor("1.0", 2), Remove("1"), Depth("1", (0, 0))):
        with pytest.raises(UserError, match=r"^1\.0: its weights are packed, .*unpacked\(network, plan\)$"):
            plan.then(edit)
    assert plan.then(Factor("0", 2), Pack("1.0", 4)).edits == (Factor("0", 2), Pack("1.0", 4))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "train:1", "--score", "l1"], ["--score does nothing", "no step is prune"]),
        (["--steps", "train:1,quantize:int8?train=0", "--quantize-lr", "0.1"], ["--quantize-lr", "that trains"]),
        (["--steps", "train:1,distill:2", "--epochs", "3"], ["--epochs does nothing", "open"]),
        (["--steps", "train:1,quantize:int8?train=2", "--quantize-epochs", "3"], ["--quantize-epochs", "open"]),
        (["--steps", "train,distill", "--kd", "0", "--temperature", "2"], ["--temperature", "--kd 0"]),
        (["--steps", "prune:0.5", "--lr", "0.1"], ["--lr does nothing", "no step is train or distill"]),
        (["--steps", "train,prune:0.5", "--kd", "0.5"], ["--kd does nothing", "asks the teacher"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_flags_that_do_nothing_are_one_line(flags, words, tmp_path, capsys):
    code = invoke(["run", "pipeline", "--data", "digits", "--out", str(tmp_path / "x"), *flags])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_a_missing_package_is_told_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    common = ["--data", "digits", "--model", "stillhouse:mlp", "--out", str(tmp_path / "x"), "--quiet"]
    assert invoke(["run", "pipeline", *common, "--steps", "train:1,export:onnx"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "onnxruntime is not installed" in said
    assert not (tmp_path / "x" / "stages").exists()


def test_a_live_network_of_ones_own(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    before = copy.deepcopy(network)
    family = distill(
        run(tmp_path), load("digits", limit=96), network, replace(TINY, steps=("prune:0.5", "quantize:int8?train=0"))
    )
    family.save(tmp_path)
    again = stillhouse.load(tmp_path / "students/2-quantize", base=before)
    with torch.no_grad():
        assert torch.equal(again(X), family.members[-1].model(X))
        assert torch.equal(family.base(X), before(X))
    assert again[1].out_features == 16


def test_the_teacher_is_the_network_before_the_pipeline(tmp_path, monkeypatch):
    from stillhouse.recipes.pipeline import steps

    seen, plain = [], steps.Distill

    def spied(student, teacher, **how):
        seen.append((teacher, how["label"]))
        return plain(student, teacher, **how)

    monkeypatch.setattr(steps, "Distill", spied)
    family = tiny(run(tmp_path / "a"))
    (none, one), (own, rest), (same, _) = seen  # train, distill, quantize
    assert none is None and one == 1 and own is same and rest == pytest.approx(0.1)
    with torch.no_grad():
        assert torch.allclose(own({"input": X}).logits, family["1-train"].model(X), atol=1e-5)
    seen.clear()
    tiny(run(tmp_path / "b"), teacher=MLP)
    with torch.no_grad():
        assert not torch.allclose(seen[1][0]({"input": X}).logits, family["1-train"].model(X))


def test_masks_do_not_stop_where_rows_do_not_divide(tmp_path):
    family = tiny(run(tmp_path), replace(TINY, steps=("train:1", "sparsify:2:4")))
    assert any("block1.0 (rows of 9)" in n for n in family.notes)


def test_unpacking_keeps_the_values():
    from stillhouse.recipes.quantized_distillation.experiment import rounded

    model, plan = rounded(MLP.build(seed=0), 4, 64)
    want = model(X)
    again, rest = unpacked(model, plan)
    assert torch.equal(again(X), want) and rest.edits == () and not dict(again.named_buffers())
    assert bake(again) == []
