"""Plain distillation as a system: the contract's rows, the cache, teachers by name, mistakes told before a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from table import Row

from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.export import save_student
from stillhouse.models import ModelSpec
from stillhouse.recipes.distill.experiment import STUDENT, TEACHER, TINY
from stillhouse.recipes.distill.recipe import Config, distill
from stillhouse.run import Run
from stillhouse.students.plan import Plan

MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [16]})
_SGD = {"optimizer": "sgd", "lr": 0.05, "teacher_epochs": 0.0}

MANY = ("dkd:1", "pld:1", "vid:block1:1", "contrastive:hidden:1?width=8", "flow:block1>block2:1")
ROWS = [
    Row("distill", "many", {"objective": MANY}),
    Row("distill", "cached", {"objective": ("kd:0.9",), "cache": 2, "epochs": 3.0}),
]  # fmt: skip
ZERO = [
    (
        Row("distill", "weight 0", {"objective": ("kd:0", "attention:block2:0"), "label": 1.0}),
        Row("distill", "labels alone", {"objective": (), "label": 1.0}),
    )
]


def mlp(objective):
    """Without batch norm: a student that several processes can train."""
    return Row("distill", "+".join(objective), {**_SGD, "objective": objective}, {"student": MLP})


JOINT = [mlp(("kd:0.5?T=4",)), mlp(("dkd:0.1", "pld:0.5", "feature:1=hidden:1"))]


def made(folder, cfg, student=STUDENT, **options):
    teacher = TEACHER.build(seed=3)
    return distill(Run(folder, quiet=True, device="cpu", **options), load("digits", limit=96), student, teacher, cfg)


def test_a_cached_teacher_says_what_the_live_one_says(tmp_path):
    plain = {"objective": ("kd:0.9?T=2",), "teacher_epochs": 0.0, "epochs": 2.0}
    live = made(tmp_path / "live", replace(TINY, **plain))
    kept = made(tmp_path / "kept", replace(TINY, **plain, cache=0))
    a, b = (f["student"].model.state_dict() for f in (live, kept))
    assert all(
        torch.allclose(a[k], b[k], atol=1e-5) for k in a
    )  # digits are not augmented: every view is the plain one


def test_the_teacher_is_trained_once_and_reported_beside_the_student(tmp_path, capsys):
    folder = tmp_path / "run"
    common = ["distill", "--data", "digits", "--limit", "100", "--epochs", "1", "--quiet"]
    objectives = ["--objective", "kd:0.5", "--objective", "cka:hidden=1:0.1"]
    first = ["--teacher", "stillhouse:mlp", "--teacher-epochs", "2", *objectives]
    assert invoke([*common, *first, "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "teacher" in said and "student" in said and (folder / "stages/teacher").exists()
    assert (folder / "students/student/plan.json").exists()
    assert invoke([*common, "--teacher", str(folder / "students/student"), "--out", str(tmp_path / "second")]) == 0


TRAINED = ["--teacher-epochs", "1", "--teacher", "stillhouse:cnn"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--teacher is missing"]),
        (["--teacher", "timm:resnet18"], ["1000 classes", "--teacher-epochs"]),
        (["--teacher", "stillhouse:cnn"], ["no classes", "--teacher-weights"]),
        (["--teacher", "stillhouse:cnn", "--teacher-weights", "nowhere.safetensors"], ["nowhere.safetensors"]),
        ([*TRAINED, "--objective", "kdd:1"], ["did you mean 'kd'"]),
        ([*TRAINED, "--objective", "feature:block9:1"], ["block9", "block1"]),
        ([*TRAINED, "--teacher", "stillhouse:mlp", "--objective", "cka:block1:1"], ["averaged"]),
        ([*TRAINED, "--cache", "1", "--objective", "cka:block1:1"], ["cache", "logits only"]),
    ],
    ids=lambda v: " ".join(v)[:50],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    code = invoke(
        [
            "distill",
            "--data",
            "digits",
            "--limit",
            "64",
            "--epochs",
            "1",
            "--quiet",
            *flags,
            "--out",
            str(tmp_path / "x"),
        ]
    )
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_weights_of_another_network_are_named(tmp_path, capsys):
    other = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, 4]}).build()
    save_student(tmp_path / "w", other, plan_json={"plan": Plan.identity(other).to_json()})
    weights = str(tmp_path / "w/model.safetensors")
    code = invoke(
        [
            "distill",
            "--data",
            "digits",
            "--teacher",
            "stillhouse:cnn",
            "--teacher-weights",
            weights,
            "--out",
            str(tmp_path / "x"),
        ]
    )
    assert code == 2 and "block1.0.weight" in capsys.readouterr().err


def test_classes_are_checked_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"student gives 4 logits.*10 classes"):
        made(tmp_path, TINY, ModelSpec("stillhouse:cnn", 4, (1, 8, 8)))
    with pytest.raises(UserError, match="epochs"):
        Config(epochs=0)
