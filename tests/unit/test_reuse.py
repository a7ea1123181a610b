"""SimKD: the teacher's classifier behind the student's body."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.recipes.distill.experiment import TINY
from stillhouse.recipes.distill.recipe import distill
from stillhouse.run import Run
from stillhouse.students.reuse import reuse_head

BODY = ModelSpec("stillhouse:resnet8", 10, (1, 8, 8), options={"width": 4})
TEACHER = ModelSpec("stillhouse:resnet8", 10, (1, 8, 8), options={"width": 8})
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_logits_are_the_teachers_head_on_projected_features():
    teacher = TEACHER.build(seed=1).eval()
    model, spec, paths = reuse_head(BODY.build(seed=0).eval(), teacher, X, BODY)
    model.eval()
    assert paths == ("projector", "layer3") and spec is not None
    assert torch.equal(model.head.weight, teacher.linear.weight) and not model.head.weight.requires_grad
    seen = {}
    model.projector.register_forward_hook(lambda m, a, out: seen.update(out=out))
    z = model(X)
    assert torch.allclose(z, seen["out"].mean((2, 3)) @ teacher.linear.weight.T + teacher.linear.bias, atol=1e-6)
    assert seen["out"].shape[1] == 32
    again = ModelSpec.from_json(spec.to_json()).build().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), z)


def test_perfect_features_give_the_teachers_logits():
    """Where the projector gives the teacher's own feature map, the student is the teacher."""
    teacher = TEACHER.build(seed=1).eval()
    model, _, _ = reuse_head(TEACHER.build(seed=1).eval(), teacher, X)
    model.projector = nn.Identity()
    assert torch.allclose(model(X), teacher(X), atol=1e-6)


def test_by_objective_from_run_to_reload(tmp_path):
    """Only the features teach, the head stays the teacher's, and the folder alone gives the student back."""
    teacher = TEACHER.build(seed=1)
    cfg = {**TINY.__dict__, "objective": ("simkd:1",), "label": 0.0, "teacher_epochs": 0.0, "epochs": 1.0}
    family = distill(
        Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=96), BODY, teacher, type(TINY)(**cfg)
    )
    student = family["student"].model
    assert torch.equal(student.head.weight, teacher.linear.weight)
    assert {k for row in family.logs for k in row} >= {"feature"} and "label" not in family.logs[-1]
    family.save(tmp_path)
    again = stillhouse.load(tmp_path / "students/student")
    assert torch.equal(again(X), student(X))


def test_a_teacher_without_such_a_head_is_refused():
    teacher = ModelSpec("stillhouse:cnn", 10, (1, 8, 8)).build()  # a hidden layer between features and head
    with pytest.raises(UserError, match="reads pooled features"):
        reuse_head(BODY.build(), teacher, X)
