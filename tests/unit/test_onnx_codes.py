"""Quantised students in ONNX and in torchao: the same values as integers, and small files."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse import onnx_codes
from stillhouse.cli import invoke
from stillhouse.errors import UserError
from stillhouse.export import export
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.onnx_codes import DECODE_AT_LOAD, Whole, scales, whole_numbers
from stillhouse.outcomes import Member
from stillhouse.students.kernels import to_torchao
from stillhouse.students.parametrized import bake, parametrize_weights, weight_layers
from stillhouse.students.plan import Plan
from stillhouse.students.projectors import MinMax, Symmetric

VIT = {"patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 1}
SPECS = {
    "cnn": ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [16, 32, 64]}),
    "mlp": ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [64, 64]}),
    "resnet8": ModelSpec("stillhouse:resnet8", 10, (3, 16, 16)),
    "vit": ModelSpec("timm:vit_tiny_patch16_224", 10, (1, 8, 8), options=VIT),
}


def quantized(name: str, bits: int = 8, group: int = 0, kind: type = Symmetric) -> nn.Module:
    """A network as a pipeline leaves it, with batch norms of both signs."""
    g, model = torch.Generator().manual_seed(1), SPECS[name].build(seed=0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
                m.weight.normal_(generator=g)
                m.running_var.uniform_(0.5, 2, generator=g)
                m.running_mean.normal_(generator=g)
    parametrize_weights(model, weight_layers(model), lambda path, layer: kind(bits, group))
    bake(model)
    return model.eval()


def inputs(name: str, n: int = 3) -> Tensor:
    return torch.randn(n, *SPECS[name].shape, generator=torch.Generator().manual_seed(2))


def exact_session(path):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.add_session_config_entry(*DECODE_AT_LOAD)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "bits", "group"), [("cnn", 8, 0), ("resnet8", 4, 0), ("mlp", 4, 32), ("vit", 8, -1)])
def test_the_file_has_integers_for_weights_and_the_same_answers(name, bits, group, tmp_path):
    onnx = pytest.importorskip("onnx")
    model, x = quantized(name, bits, group), inputs(name)
    found = export(model, x[:1], "onnx-packed", tmp_path / "net.onnx")
    assert found.max_rel_diff < 1e-5  # the values are the same; only their order of summation may differ
    session = exact_session(tmp_path / "net.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.tensor(answer), model(x), atol=1e-5, rtol=1e-5)
    graph = onnx.load(tmp_path / "net.onnx").graph
    kinds = {t.data_type for t in graph.initializer if t.name.endswith("_codes")}
    assert kinds == {onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.INT4}
    whole = whole_numbers(model)
    decoded = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert len(decoded) == len(whole) > 0
    stored = sum(len(t.raw_data) for t in graph.initializer if t.name.endswith("_codes"))
    assert stored == sum(-(-w.q.size * bits // 8) for w in whole.values())
    large = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) >= 2048]
    assert not large  # none is there as floats beside its codes


def test_which_weights_are_whole_numbers():
    names = {n for n, p in quantized("cnn").named_parameters() if n.endswith("weight") and p.dim() > 1}
    assert set(whole_numbers(quantized("cnn"))) == names
    assert not whole_numbers(SPECS["cnn"].build()) and not whole_numbers(quantized("cnn", 8, 0, MinMax))
    model = quantized("mlp", 4, 16)
    for name, whole in whole_numbers(model).items():
        w = model.get_parameter(name).detach().numpy().reshape(-1, 16)
        assert whole.block == 16 and np.abs(whole.q).max() == 7
        assert np.allclose(whole.q.reshape(-1, 16) * np.abs(w).max(1, keepdims=True) / 7, w, rtol=1e-6)
    assert onnx_codes.opset(quantized("mlp")) is None and onnx_codes.opset(model) == 21
    # Blocks of a kernel have no axis; bucket ends in the middle of a row neither.
    assert set(whole_numbers(quantized("cnn", 4, 32))) == {"hidden.1.weight", "head.weight"}
    assert "head.weight" not in whole_numbers(quantized("mlp", 4, 48))


def test_scales_take_up_a_factor_of_every_row_and_refuse_other_weights():
    q = np.array([[127, -3, 0, 64], [1, -127, 5, 0], [0, 0, 0, 0]], np.int8)
    s = np.array([[0.5], [0.25], [1.0]], np.float32)
    for factor in (1.0, np.array([[2.0], [-3.0], [7.0]], np.float32)):
        codes, scale, axis, block = scales(s * q * factor, Whole(q, 4))
        assert (axis, block) == (0, 0) and (scale > 0).all() and np.array_equal(scale[:, None] * codes, s * q * factor)
        turned, scale, axis, _ = scales(np.ascontiguousarray((s * q * factor).T), Whole(q, 4))
        assert axis == 1 and np.array_equal(turned * scale, (s * q * factor).T)
    other = s * q
    other[1, 2] += 0.01
    assert scales(other, Whole(q, 4)) is None and scales(s[:2] * q[:2], Whole(q, 4)) is None


def test_a_network_that_is_not_quantised_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    for model in (SPECS["mlp"].build(), quantized("mlp", 8, 0, MinMax)):
        with pytest.raises(UserError, match="has no weights of whole numbers and scales") as error:
            export(model, inputs("mlp"), "onnx-packed", tmp_path / "net.onnx")
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_command_packs_the_students_that_are_quantised(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    spec, model = SPECS["mlp"], SPECS["mlp"].build(seed=0).eval()
    small = copy.deepcopy(model)
    parametrize_weights(small, weight_layers(small), lambda path, layer: Symmetric(8))
    plan = Plan.identity(model).then(*bake(small))
    members = [Member("plain", model), Member("small", small.eval(), plan)]
    Family(members, spec.shape, tuple("abcdefghij"), model, spec).save(tmp_path)
    assert invoke(["export", str(tmp_path), "--to", "onnx-packed"]) == 0
    assert invoke(["export", str(tmp_path), "--to", "onnx"]) == 0
    files = {p.name: p.stat().st_size for p in (tmp_path / "exports").iterdir()}
    assert set(files) == {"small.packed.onnx", "plain.onnx", "small.onnx"}
    assert 3 * files["small.packed.onnx"] < 2 * files["small.onnx"]
    assert invoke(["export", str(tmp_path), "--to", "onnx-packed", "--student", "plain"]) == 2
    assert "has no weights of whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_torchao_multiplies_the_same_codes(name):
    torchao = pytest.importorskip("torchao.quantization")
    model, x = quantized(name), inputs(name)
    mine, rounded = copy.deepcopy(model), copy.deepcopy(model)
    paths = to_torchao(mine)
    assert paths == [p for p, m in model.named_modules() if type(m) is nn.Linear]
    torchao.quantize_(rounded, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        wanted = model(x)
        assert torch.allclose(mine(x), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(rounded(x), wanted, atol=1e-4)  # its own scales round once more
        weight = mine.get_submodule(paths[0]).weight
        assert weight.qdata.dtype == torch.int8 and int(weight.qdata.abs().max()) == 127
        to_torchao(fast := copy.deepcopy(model), activations=True)
        assert 0 < (fast(x) - wanted).abs().max() < 0.05 * wanted.abs().max()
    with pytest.raises(UserError, match="no linear layers of 8-bit"):
        to_torchao(quantized(name, 4))
