"""The command: exit codes, and one line for every mistake a user can make."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stillhouse
from stillhouse.cli import invoke

TINY = ["--data", "digits", "--limit", "64", "--model", "stillhouse:mlp", "--ratios", "0", "0.5", "--batch", "32",
        "--epochs", "1", "--warmup", "0", "--lr", "0.01", "--quiet", "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own, with no real data and no way to download any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command that must fail; gives its one line."""

    def run(*argv: object, code: int = 2) -> str:
        capsys.readouterr()
        got = invoke([str(a) for a in argv])
        said = capsys.readouterr()
        assert got == code, (got, said)
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("stillhouse: error: "), said.err
        assert "Traceback" not in said.err + said.out
        assert len(lines[0]) < 600, lines[0]
        return lines[0]

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny finished run; tests copy it before they spoil it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert invoke(["run", "wml", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def spoiled(finished, tmp_path) -> Path:
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def says(line: str, *words: str) -> None:
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"


def pictures(folder: Path, classes: dict[str, int], size: int = 16) -> Path:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def module(text: str, name: str = "mine") -> str:
    """A module of the user's in the current folder; its name is new every time."""
    unique = f"{name}_{abs(hash((text, os.getcwd()))):x}"
    Path(f"{unique}.py").write_text("import numpy as np, torch\nfrom torch import nn\n" + text)
    return unique


# -- commands and flags ----------------------------------------------------------------------------------------


def test_help_version_and_no_arguments(capsys, refused):
    for argv in (["--help"], ["--version"], ["run", "--help"], ["export", "--help"], ["run", "wml", "--help"]):
        with pytest.raises(SystemExit) as stop:
            invoke(argv)
        assert stop.value.code == 0, argv
    assert stillhouse.__version__ in capsys.readouterr().out
    says(refused(), "COMMAND", "--help")


@pytest.mark.parametrize("argv", [["--help"], ["list"], ["list", "--json"], ["--version"]])
def test_light_commands_do_not_load_torch(argv):
    code = (
        "import sys; from stillhouse.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as s: assert not s.code, s.code\n"
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'timm', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *argv], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_list_and_show(capsys):
    assert invoke(["list"]) == 0 and "wml" in capsys.readouterr().out
    assert invoke(["list", "--json"]) == 0
    (card,) = [c for c in json.loads(capsys.readouterr().out) if c["name"] == "wml"]
    assert card["family"] == "model"


def test_mistyped_commands_systems_and_flags(refused):
    says(refused("rum", "wml"), "no command 'rum'", "did you mean 'run'")
    says(refused("run", "wlm", "--out", "x"), "no system 'wlm'", "did you mean 'wml'")
    says(refused("show", "dlm"), "no system 'dlm'")
    says(refused("run"), "system")
    says(refused("run", "wml"), "--out")
    says(refused("run", "wml", "--out", "x", "--ratois", "0"), "--ratois")
    says(refused("run", "wml", "--out", "x", "--epochs", "many"), "--epochs", "many")
    says(refused("run", "wml", "--out", "x", "--precision", "fp64"), "--precision", "fp64")
    says(refused("run", "wml", "--out", "x", "--share", "trees"), "--share", "trees")
    says(refused("export", "x", "--to", "tflite"), "tflite", "onnx")
    assert not Path("x").exists()  # a mistake in the flags leaves nothing behind


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ratios", "0", "1.5"], ["ratios", "[0, 1)", "1.5"]),
        (["--ratios", "0", "-0.1"], ["ratios", "-0.1"]),
        (["--ratios", "0.5", "0.5"], ["ratios", "repeat", "--init fresh"]),
        (["--ratios"], ["ratios"]),
        (["--ratios", "0", "0.97"], ["0.97", "reach"]),
        (["--trunk", "9"], ["trunk", "'9'"]),
        (["--trunk", "1", "1", "1"], ["trunk", "one per peer", "3"]),
        (["--alpha", "2"], ["alpha", "2"]),
        (["--alpha", "nan"], ["alpha", "nan"]),
        (["--batch", "0"], ["batch", "0"]),
        (["--batch", "-3"], ["batch", "-3"]),
        (["--epochs", "-1"], ["epochs", "-1"]),
        (["--held-out", "0"], ["held-out", "0.1"]),
        (["--rule", "wmll"], ["rule", "wmll", "did you mean"]),
        (["--rule", "sandwich"], ["--share nested"]),
        (["--micro-batch", "0"], ["micro_batch", "at least 1"]),
        (["--log-every", "0"], ["log_every", "at least 1"]),
        (["--checkpoint-every", "0"], ["checkpoint_every", "at least 1"]),
        (["--workers", "-1"], ["workers", "at least 0"]),
        (["--device", "tpu"], ["device", "tpu"]),
        (["--limit", "0"], ["limit", "0"]),
        (["--limit", "3"], ["limit=3", "10 classes"]),
        (["--label-noise", "1"], ["label_noise", "[0, 1)"]),
        (["--augment", "mixup"], ["augment", "mixup"]),
        (["--image-size", "0"], ["image_size", "0"]),
        (["--track", "nonesuch"], ["nonesuch"]),
        (["--stem", "small"], ["stem"]),
        (["--precision", "fp16", "--lr", "1e30"], ["not finite at step", "checkpoint"]),
        (["--data", "digit"], ["unknown data 'digit'", "did you mean 'digits'"]),
        (["--data", "folder:nowhere"], ["nowhere", "does not exist"]),
        (["--data", "nomodule:f"], ["nomodule"]),
        (["--model", "resnet18"], ["SOURCE:NAME"]),
        (["--model", "stillhouse:mpl"], ["did you mean 'mlp'"]),
        (["--model", "torchvision:resnet81"], ["torchvision:resnet81", "did you mean"]),
        (["--model", "timm:resnett18"], ["timm:resnett18", "did you mean"]),
        (["--model", "os:nothing"], ["'nothing'"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_bad_values(refused, flags, words):
    says(refused("run", "wml", *TINY, *flags, "--out", "out"), *words)


def test_cuda_without_cuda(refused):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    says(refused("run", "wml", *TINY, "--device", "cuda", "--out", "out"), "cuda", "--device cpu")


def test_unknown_layer_suggests_near_ones(refused):
    cnn = [*TINY[:4], "--model", "stillhouse:cnn", *TINY[6:]]
    says(refused("run", "wml", *cnn, "--trunk", "blok1", "--out", "out"), "blok1", "did you mean 'block1'")


# -- data ---------------------------------------------------------------------------------------------------------


def test_image_folders(refused, capsys):
    def run(path: Path, *flags: str) -> list[object]:
        model = ["--model", "stillhouse:cnn", "--image-size", "16", *TINY[6:], "--ratios", "0"]
        return ["run", "wml", "--data", f"folder:{path}", *model, *flags, "--out", f"out{path.name}"]

    empty = Path("empty")
    empty.mkdir()
    says(refused(*run(empty)), "empty", "one folder per class")
    says(refused(*run(pictures(Path("one"), {"cats": 4}))), "one class", "cats", "two")
    flat = Path("flat")
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    says(refused(*run(flat)), "no class folders")
    gap = pictures(Path("gap"), {"cats": 4, "dogs": 4})
    (gap / "fish").mkdir()
    says(refused(*run(gap)), "fish", "no images")
    bad = pictures(Path("bad"), {"cats": 12, "dogs": 12})
    for broken in (bad / "cats" / "3.png", bad / "dogs" / "5.png"):
        broken.write_bytes(broken.read_bytes()[:60])
    says(refused(*run(bad)), ".png", "cannot read image", "--skip-bad")
    assert invoke([str(a) for a in run(bad, "--skip-bad")]) == 0  # the refused run left the folder free
    notes = " ".join(json.loads(Path("outbad/report.json").read_text())["notes"])
    assert sum(map(int, re.findall(r"skipped (\d+) unreadable", notes))) == 2
    assert "cats/3.png" in notes and "dogs/5.png" in notes


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_offline(refused, monkeypatch, name):
    import socket

    def never(*args: object, **kw: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    line = refused("run", "wml", "--data", name, *TINY[4:], "--out", "out")
    says(line, name, "STILLHOUSE_DATA", "could not be downloaded")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(): x = np.zeros((9, 4), 'f4'); x[3, 1] = np.nan; return x, np.arange(9) % 2", ["x[3]", "NaN"]),
        ("def f(): return np.zeros((9, 4), 'f4'), np.arange(8) % 2", ["8 labels", "9 inputs"]),
        ("def f(): return np.zeros((9, 4), 'f4'), np.zeros(9, int)", ["class"]),
        ("def f(): return np.zeros((9, 4), 'f4'), np.zeros((9, 2))", ["one integer label"]),
        ("def f(): return np.zeros((9, 4), 'f4'), np.arange(9) / 2", ["integer labels"]),
        ("def f(): return np.zeros((9, 4), 'f4'), np.arange(9) % 2 - 1", ["-1"]),
        ("def f(): return 'hello'", ["str", "expected"]),
        ("def f(): raise RuntimeError('no disk\\nno luck')", ["RuntimeError", "no disk"]),
        ("def f(): return np.zeros((0, 4), 'f4'), np.zeros(0, int)", []),
        ("f = 3", ["int"]),
        ("import nothing_of_the_kind", ["nothing_of_the_kind"]),
    ],
    ids=lambda v: v[:50] if isinstance(v, str) else "",
)
def test_users_own_data(refused, text, words):
    name = module(text)
    says(refused("run", "wml", "--data", f"{name}:f", *TINY[4:], "--ratios", "0", "--out", "out"), name, *words)


# -- models ---------------------------------------------------------------------------------------------------------

LINEAR = "nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, {c}))"
WRAP = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = {net}
    def forward(self, x):
        z = self.net(x)
        return {out}
def build(): return Net()
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"def build(): return {LINEAR.format(c=7)}", ["10 classes", "(2, 7)"]),
        ("def build(): return nn.Linear(5, 10)", ["cannot take inputs of shape (1, 8, 8)"]),
        ("def build(): return 3", ["returned int", "torch.nn.Module"]),
        ("def build(): raise ValueError('bad\\ntwo lines')", ["ValueError", "bad two lines"]),
        ("def build(width): return nn.Linear(1, 1)", ["width"]),
        (WRAP.format(net=LINEAR.format(c=10), out="'logits'"), ["returned a str", "logits"]),
        (WRAP.format(net=LINEAR.format(c=10), out="{'scores': z}"), ["scores", "logits"]),
        (WRAP.format(net=LINEAR.format(c=10), out="z.sum()"), ["()", "(2, 10)"]),
        (WRAP.format(net=LINEAR.format(c=10), out="z * float('nan')"), ["NaN"]),
        ("import nothing_of_the_kind", ["nothing_of_the_kind"]),
    ],
    ids=lambda v: v[-60:] if isinstance(v, str) else "",
)
def test_users_own_models(refused, text, words):
    name = module(text)
    flags = [*TINY[:4], "--model", f"{name}:build", *TINY[6:]]
    says(refused("run", "wml", *flags, "--out", "out"), *words)


@pytest.mark.parametrize("out", ["(z, z)", "{'logits': z, 'loss': None}", "[z]"])
def test_models_that_return_a_tuple_or_dict_work(out):
    name = module(WRAP.format(net=LINEAR.format(c=10), out=out))
    assert invoke(["run", "wml", *TINY[:4], "--model", f"{name}:build", *TINY[6:], "--out", "out"]) == 0


# -- folders, resuming -------------------------------------------------------------------------------------------------


def test_out_folders(refused, finished):
    Path("file").write_text("x")
    says(refused("run", "wml", *TINY, "--out", "file"), "file", "is a file")
    says(refused("run", "wml", *TINY, "--out", "file/below"), "file/below", "cannot be made")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("x")
    says(refused("run", "wml", *TINY, "--out", "full"), "not empty", "new folder")
    assert Path("full/letter.txt").read_text() == "x"
    says(refused("run", "wml", *TINY, "--out", finished), "this very run", f"stillhouse resume {finished}")
    says(refused("run", "wml", *TINY, "--alpha", "0.25", "--out", finished), "alpha 0.5 → 0.25")


def test_read_only_folder(refused, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", _raise(OSError(13, "Permission denied")))
    says(refused("run", "wml", *TINY, "--out", "locked/run"), "locked/run", "Permission denied")


def _raise(error: Exception) -> Callable[..., None]:
    def fail(*args: object, **kw: object) -> None:
        raise error

    return fail


def test_resume_what_cannot_be(refused, spoiled):
    says(refused("resume", "nowhere"), "nowhere", "no run to resume")
    path = spoiled / "run.json"
    saved = json.loads(path.read_text())

    def write(**changes: object) -> None:
        path.write_text(json.dumps({**saved, **changes}))

    write(format=99)
    says(refused("resume", spoiled), "newer Stillhouse", "format 99", "pip install -U")
    write(settings={**saved["settings"], "alpha": 0.1})
    says(refused("resume", spoiled), "alpha 0.1 → 0.5")
    write(flags=[*saved["flags"], "--knob", "3"])
    says(refused("resume", spoiled), "--knob")
    write(system="wmx")
    says(refused("resume", spoiled), "no system 'wmx'")
    write(system="../../etc")
    says(refused("resume", spoiled), "no system")
    for text in ('{"format": 1}', "[]", "3", "{", "", '{"format": "x", "system": 1, "flags": 2, "settings": 3}'):
        path.write_text(text)
        says(refused("resume", spoiled), "run.json")


def test_resume_with_damaged_or_foreign_checkpoints(refused, spoiled):
    path = spoiled / "stages" / "mutual" / "checkpoint.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    says(refused("resume", spoiled), str(path), "damaged")
    flipped = bytearray(raw)
    flipped[-5] ^= 4
    path.write_bytes(flipped)
    says(refused("resume", spoiled), str(path), "checksum")
    (size,) = struct.unpack("<Q", raw[:8])
    newer = raw[8 : 8 + size].replace(b'"version":"1"', b'"version":"9"')
    path.write_bytes(raw[:8] + newer + raw[8 + size :])
    says(refused("resume", spoiled), "newer Stillhouse", "format 9")
    path.write_bytes(raw)
    plans = spoiled / "plans.json"
    good = plans.read_text()
    for text in ("{", "[]", "{}", good.replace('"plans"', '"plan"')):
        plans.write_text(text)
        says(refused("resume", spoiled), "plans")
    plans.write_text(good)
    assert invoke(["resume", str(spoiled)]) == 0


def test_resume_with_other_data(refused):
    text = "def f(): r = np.random.default_rng({seed}); return r.normal(size=(90, 1, 8, 8)), np.arange(90) % 10"
    name = module(text.format(seed=0))
    flags = ["--data", f"{name}:f", *TINY[4:]]
    assert invoke(["run", "wml", *flags, "--out", "out"]) == 0
    Path(f"{name}.py").write_text("import numpy as np\n" + text.format(seed=1))
    del sys.modules[name]
    says(refused("resume", "out"), "other settings", "data", "→")


def test_a_cache_of_another_teacher(tmp_path):
    """Only from Python, and refused there in one line; see test_cache.py for the rest."""
    import torch

    from stillhouse.data import load
    from stillhouse.data.cache import SignalCache
    from stillhouse.errors import UserError
    from stillhouse.teachers import Frozen

    data = load("digits", limit=32).train
    first, second = (Frozen(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))) for _ in range(2))
    SignalCache.create(tmp_path / "c", n=32, classes=10, teacher_fingerprint=first.fingerprint,
                       data_fingerprint=data.fingerprint).fill(first, data)  # fmt: skip
    with pytest.raises(UserError, match=first.fingerprint) as caught:
        SignalCache.open(tmp_path / "c", teacher_fingerprint=second.fingerprint, data_fingerprint=data.fingerprint)
    assert "\n" not in str(caught.value)


def test_no_space(refused, monkeypatch):
    import errno

    plain = os.fsync
    calls = []

    def full(fd: int) -> None:
        calls.append(1)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(fd)

    monkeypatch.setattr(os, "fsync", full)
    line = refused("run", "wml", *TINY, "--checkpoint-every", "1", "--epochs", "9", "--out", "out")
    says(line, "space")
    monkeypatch.undo()


# -- reports, comparisons, exports -----------------------------------------------------------------------------------


def test_reports_of_what_is_none(refused, spoiled):
    Path("empty").mkdir()
    says(refused("report", "nowhere"), "nowhere")
    says(refused("report", "empty"), "empty", "report.json")
    says(refused("compare", spoiled), "two or more")
    says(refused("compare", spoiled, "empty"), "empty", "report.json")
    for text in ("{", "[]", "{}", '{"format": 99}'):
        (spoiled / "report.json").write_text(text)
        says(refused("report", spoiled), "report.json")


def test_exports_of_what_is_none(refused, spoiled):
    Path("empty").mkdir()
    says(refused("export", "nowhere", "--to", "onnx"), "nowhere", "no students")
    says(refused("export", "empty", "--to", "onnx"), "empty", "no students")
    says(refused("export", spoiled, "--to", "onnx", "--student", "p5"), "no student 'p5'", "did you mean 'p50'")
    says(refused("export", spoiled, "--to", "onnx", "--student", "../p50"), "no student")
    student = spoiled / "students" / "p50"
    for name in ("plan.json", "model.safetensors"):
        raw = (student / name).read_bytes()
        for spoilt in (raw[:20], raw[: len(raw) // 2], b"", b"[]", b"{}", raw.replace(b"p50", b"p51"), raw[::-1]):
            if spoilt == raw:
                continue
            (student / name).write_bytes(spoilt)
            says(refused("export", spoiled, "--to", "safetensors", "--student", "p50"), "p50")
        (student / name).unlink()
        says(refused("export", student, "--to", "safetensors"), "p50" if name != "plan.json" else "no students")
        (student / name).write_bytes(raw)
    assert invoke(["export", str(student), "--to", "safetensors", "--out", "here"]) == 0
    assert [p.name for p in Path("here").iterdir()] == ["p50.safetensors"]


def test_missing_extra(refused, finished, monkeypatch):
    plain = builtins.__import__

    def without(name: str, *args: object, **kw: object) -> object:
        if name.split(".")[0] == "onnx":
            raise ImportError("No module named 'onnx'", name="onnx")
        return plain(name, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    line = refused("export", finished, "--to", "onnx", "--out", "here")
    says(line, "onnx is not installed", "pip install 'stillhouse[export]'")


def hostile(student: Path, **changes: object) -> None:
    """Rewrites plan.json and makes model.safetensors agree with it, as an attacker would."""
    from stillhouse.export import read_weights, save_student

    plan = {**json.loads((student / "plan.json").read_text()), **changes}
    save_student(student, _Bag(read_weights(student / "model.safetensors")[0]), plan_json=plan)


class _Bag:
    def __init__(self, state: dict):
        self.state = state

    def state_dict(self) -> dict:
        return self.state


@pytest.mark.parametrize(
    "changes",
    [
        {"base": {"name": "stillhouse:../../x", "classes": 10, "shape": [1, 8, 8]}},
        {"base": {"name": "stillhouse:mlp", "classes": 10, "shape": [1, 8, 8], "options": {"widths": [3]}}},
        {"base": {"name": "stillhouse:mlp", "classes": 10}},
        {"base": {"name": 3}},
        {"base": 3},
        {"shape": "wide"},
        {"version": 99},
        {"edits": "none"},
        {"edits": [{"op": "nothing"}]},
    ],
    ids=str,
)
def test_hostile_plans(refused, spoiled, changes):
    student = spoiled / "students" / "p50"
    assert set(changes) <= set(json.loads((student / "plan.json").read_text()))
    hostile(student, **changes)
    refused("export", student, "--to", "safetensors", "--out", "here")
    assert not list(Path("here").glob("*.safetensors"))


def test_names_from_files_cannot_write_elsewhere(refused, spoiled, tmp_path):
    before = set(tmp_path.rglob("*"))
    report = json.loads((spoiled / "report.json").read_text())
    for row in report.get("students", []):
        row["name"] = "../../../escaped"
        row["path"] = "../../../escaped"
    (spoiled / "report.json").write_text(json.dumps(report))
    invoke(["report", str(spoiled)])
    assert not list(tmp_path.rglob("*escaped*")) and not list(tmp_path.parent.glob("escaped*"))
    assert all(p.is_relative_to(spoiled) for p in set(tmp_path.rglob("*")) - before)


# -- the code itself ------------------------------------------------------------------------------------------------


def test_nothing_pickled_is_ever_loaded():
    """No pickle, no torch.load, and numpy only with allow_pickle=False, anywhere in the package."""
    for path in Path(stillhouse.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name.split(".")[0] for a in node.names} | {(getattr(node, "module", "") or "").split(".")[0]}
                assert not names & {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}, where
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("torch.load", "eval", "exec", "torch.hub.load"), where
                if name in ("np.load", "numpy.load", "np.lib.format.open_memmap", "np.lib.format.read_array"):
                    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert given.get("allow_pickle", "False") == "False", where
                    assert name != "np.load" or "allow_pickle" in given, where
