"""Files that live without the run: they give what the network gives, or they do not take their place."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.export import Parity, export, read_tensors, read_weights, save_student, weights
from stillhouse.family import Family
from stillhouse.files import inside
from stillhouse.outcomes import Member
from stillhouse.students.plan import Plan

FORMATS = {"onnx": "net.onnx", "torch-export": "net.pt2", "safetensors": "net.safetensors"}
formats = pytest.mark.parametrize("to", FORMATS)
programs = pytest.mark.parametrize("to", ["onnx", "torch-export"])


@cache
def network(name: str) -> nn.Module:
    """A network of 10 classes whose weights and running statistics are not those it was made with."""
    import timm
    import torchvision

    torch.manual_seed(0)
    if name == "vit_tiny":
        net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10)
    else:
        net = getattr(torchvision.models, name)(num_classes=10)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if "running_var" in key:
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
            elif "running_mean" in key or key.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=g) / 10)
    return net


def runner(to: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Runs an exported program without any code of ours."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: torch.as_tensor(session.run(None, {name: x.numpy()})[0])
    program = torch.export.load(str(path)).module()
    return lambda x: program(x)


class Shifted(nn.Module):
    """z = scale·x in eager mode; the exported program adds ``shift``, as a wrong exporter would."""

    def __init__(self, shift: float, scale: float = 1.0):
        super().__init__()
        self.shift, self.scale = shift, nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        z = self.scale * x
        return z + self.shift if torch.compiler.is_exporting() else z


# -- the file gives what the network gives ------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_tiny"])
def test_exported_files_give_what_the_network_gives(tmp_path: Path, name: str, to: Any) -> None:
    net, path = network(name).train(), tmp_path / FORMATS[to]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    found = export(net, torch.zeros(2, 3, 32, 32), to, path)
    assert found.max_abs_diff <= 1e-5 and found.max_rel_diff <= found.max_abs_diff
    assert (found.path, found.format, found.bytes) == (str(path), to, path.stat().st_size)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert net.training and all(m.training for m in net.modules())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    if to == "safetensors":
        tensors, _ = read_weights(path)
        assert all(torch.equal(tensors[k], v) for k, v in state.items()) and set(tensors) == set(state)
        return
    run = runner(to, path)
    net.eval()
    for n in (1, 2, 5):  # any batch size, also one that the check did not try
        x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@programs
def test_a_fixed_batch_is_fixed(tmp_path: Path, to: Any) -> None:
    found = export(small(), torch.zeros(1, 4), to, tmp_path / FORMATS[to], batch=4)
    run = runner(to, tmp_path / FORMATS[to])
    assert run(torch.zeros(4, 4)).shape == (4, 3) and found.samples == 16
    with pytest.raises(Exception, match=r"(?i)dimension|shape|size|guard"):
        run(torch.zeros(5, 4))


@programs
@pytest.mark.parametrize("kind", ["mapping", "tuple"])
def test_several_inputs_go_by_name_or_by_position(tmp_path: Path, to: Any, kind: str) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"minus": a - 2 * b, "sum": (a + b).sum(1)}

    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    example = {"b": b, "a": a} if kind == "mapping" else (a, b)
    assert export(Two(), example, to, tmp_path / FORMATS[to]).max_abs_diff < 1e-6


def test_whole_numbers_stay_in_the_range_of_the_example(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
    assert export(net, torch.tensor([[0, 4, 2], [1, 1, 1]]), "onnx", tmp_path / "net.onnx").max_abs_diff < 1e-5


# -- or it does not take its place --------------------------------------------------------------------------------


def one_line(caught: pytest.ExceptionInfo[UserError], *words: str) -> str:
    said = str(caught.value)
    assert "\n" not in said and len(said) < 500
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"
    return said


@programs
def test_a_file_that_differs_is_kept_as_failed(tmp_path: Path, to: Any) -> None:
    path = tmp_path / FORMATS[to]
    path.write_bytes(b"the old one")
    with pytest.raises(UserError) as caught:
        export(Shifted(0.01), torch.zeros(2, 4), to, path)
    one_line(caught, to, "0.01", "allowed 0.0001", f"{path}.failed", "tolerance")
    assert path.read_bytes() == b"the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, path.name + ".failed"]
    x = torch.ones(3, 4)
    with pytest.raises(UserError, match="differs"):
        export(Shifted(math.nan), torch.zeros(2, 4), to, path)
    found = export(Shifted(0.01), torch.zeros(2, 4), to, path, tolerance=0.1)
    torch.testing.assert_close(runner(to, path)(x), x + 0.01)
    assert found.max_abs_diff == pytest.approx(0.01, rel=1e-3)


def test_weights_that_come_back_otherwise_are_kept_as_failed(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))  # same names and shapes
    with pytest.raises(UserError) as caught:
        export(small(), torch.zeros(2, 4), "safetensors", tmp_path / "net.safetensors", structure=other)
    one_line(caught, "safetensors", "net.safetensors.failed")
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors.failed"]
    with pytest.raises(UserError) as caught:
        export(small(), torch.zeros(2, 4), "safetensors", tmp_path / "net.safetensors", structure=nn.Linear(4, 3))
    one_line(caught, "structure")


def test_the_bound_is_relative_to_large_outputs_and_absolute_for_small_ones(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    found = export(Shifted(0.01, scale=1e3), torch.zeros(2, 4), "torch-export", path)  # outputs of some 10³
    assert found.max_abs_diff == pytest.approx(0.01, rel=0.05) and 2e-6 < found.max_rel_diff < 2e-5
    with pytest.raises(UserError, match="relative"):
        export(Shifted(1.0, scale=1e3), torch.zeros(2, 4), "torch-export", path)
    assert export(Shifted(5e-5, scale=1e-6), torch.zeros(2, 4), "torch-export", path).max_rel_diff < 1e-4
    with pytest.raises(UserError, match="relative"):
        export(Shifted(5e-4, scale=1e-6), torch.zeros(2, 4), "torch-export", path)


def test_a_large_output_does_not_excuse_a_small_one(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = Shifted(0.01), Shifted(0.0, scale=1e4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.small(x), self.large(x)

    with pytest.raises(UserError, match="differs"):
        export(Both(), torch.zeros(2, 4), "torch-export", tmp_path / "net.pt2")


@programs
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path: Path, to: Any) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    class FixesItsBatch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1)

    path = tmp_path / FORMATS[to]
    with pytest.raises(UserError) as caught:
        export(Branches(), torch.zeros(2, 4), to, path)
    one_line(caught, "Branches cannot be exported")
    with pytest.raises(UserError) as caught:
        export(FixesItsBatch(), torch.zeros(2, 4), to, path)
    one_line(caught, "FixesItsBatch", "batch=1 or another fixed size")
    assert not list(tmp_path.iterdir())
    export(FixesItsBatch(), torch.zeros(2, 4), to, path, batch=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"to": "onxx"}, "did you mean 'onnx'"), ({"batch": 0}, "got 0"), ({"batch": "any"}, "got 'any'")],
)
def test_settings_that_do_not_exist(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        export(small(), torch.zeros(1, 4), **{"to": "onnx", "path": tmp_path / "net.onnx", **settings})
    one_line(caught, says)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused_for_onnx(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float"):
        export(small().bfloat16(), torch.zeros(1, 4).bfloat16(), "onnx", tmp_path / "net.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    plain = builtins.__import__

    def without(name: str, *args: Any, **kw: Any) -> Any:
        if name == package:
            raise ImportError(f"No module named {name!r}", name=name)
        return plain(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as caught:
        export(small(), torch.zeros(1, 4), "onnx", tmp_path / "net.onnx")
    one_line(caught, f"{package} is not installed", "pip install 'stillhouse[export]'")
    assert not list(tmp_path.iterdir())


def test_parity_says_both_differences() -> None:
    said = str(Parity("a.onnx", "onnx", 4.7e-3, 3.1e-6, 8, 1000))
    assert "4.70e-03" in said and "3.10e-06" in said and "8 random samples" in said


# -- students -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("turned", torch.arange(6).reshape(2, 3).t())  # not contiguous
        self.register_buffer("short", torch.ones(2, dtype=torch.float16))


def test_a_student_comes_back_as_it_was(tmp_path: Path) -> None:
    net, plan = Tied(), {"name": "ω <p50>", "edits": [], "nothing": math.nan, "shape": (1, 2)}
    assert save_student(tmp_path / "new" / "p50", net, plan_json=plan) == tmp_path / "new" / "p50"
    state, again = read_tensors(tmp_path / "new" / "p50")
    assert again == {"name": "ω <p50>", "edits": [], "nothing": None, "shape": [1, 2]}
    assert set(state) == set(net.state_dict())
    for name, value in net.state_dict().items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
    fresh = Tied()
    fresh.load_state_dict(state)
    assert fresh.a.weight is fresh.b.weight
    assert sorted(p.name for p in (tmp_path / "new" / "p50").iterdir()) == ["model.safetensors", "plan.json"]


def test_the_same_student_gives_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for i in range(4):
        save_student(tmp_path / str(i), small(), plan_json={"name": "p50"})
        made.append([(tmp_path / str(i) / n).read_bytes() for n in ("model.safetensors", "plan.json")])
    assert all(m == made[0] for m in made)


def test_weights_have_storage_of_their_own() -> None:
    net = Tied()
    out = weights(net)
    with torch.no_grad():
        net.a.weight.zero_()
    assert out["a.weight"].abs().sum() > 0
    assert out["a.weight"].data_ptr() != out["b.weight"].data_ptr() and out["turned"].is_contiguous()
    with torch.device("meta"), pytest.raises(UserError, match="meta"):
        weights(nn.Linear(2, 2))

    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return {"step": 3}

    with pytest.raises(UserError, match="_extra_state"):
        weights(Extra())


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_student(tmp_path / "p50", small(), plan_json={"name": "p50"})


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
@pytest.mark.parametrize("spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"\x80" + raw[1:]])
def test_a_damaged_file_is_refused_by_name(student: Path, name: str, spoil: Callable[[bytes], bytes]) -> None:
    (student / name).write_bytes(spoil((student / name).read_bytes()))
    with pytest.raises(UserError) as caught:
        read_tensors(student)
    one_line(caught, str(student / name), "damaged")


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_missing_file_is_named(student: Path, name: str) -> None:
    (student / name).unlink()
    with pytest.raises(UserError) as caught:
        read_tensors(student)
    one_line(caught, str(student / name), "does not exist")


def test_a_plan_and_weights_of_different_saves_are_refused(student: Path, tmp_path: Path) -> None:
    save_student(tmp_path / "other", small(), plan_json={"name": "p70"})
    for name in ("plan.json", "model.safetensors"):
        kept = (student / name).read_bytes()
        (student / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(UserError) as caught:
            read_tensors(student)
        one_line(caught, str(student), "same save")
        (student / name).write_bytes(kept)
    (student / "plan.json").write_text(json.dumps({"name": "p50", "more": 1}))
    with pytest.raises(UserError, match="same save"):
        read_tensors(student)
    (student / "plan.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        read_tensors(student)


def test_a_pickle_is_no_student(student: Path) -> None:
    """A file that would run code when unpickled is refused, and the code does not run."""
    mark = student / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    torch.save({"weight": Evil()}, student / "model.safetensors")
    with pytest.raises(UserError, match="damaged"):
        read_tensors(student)
    np.save(student / "plan.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    (student / "plan.json").write_bytes((student / "plan.npy").read_bytes())
    with pytest.raises(UserError, match="damaged"):
        read_tensors(student)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/b", "a\\b", "..", ".", "", "C:out", "a\0b"])
def test_names_that_would_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    home = tmp_path / "run"
    family = Family([Member(name, small(), Plan((), ""), 1.0)], (4,), ("a", "b", "c"), small())
    with pytest.raises(UserError, match="would leave"):
        family.save(home)
    assert not list(tmp_path.iterdir())


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "p50").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link"):
        inside(tmp_path / "run", "p50")
