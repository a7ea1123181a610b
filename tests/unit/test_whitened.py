"""Contrast normalisation and ZCA whitening in front of a classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.data import Arrays, load
from stillhouse.errors import UserError
from stillhouse.export import export
from stillhouse.models import ModelSpec
from stillhouse.students.whitened import Whitened, Whitening, contrast, whitened

X = np.random.default_rng(0).normal(size=(300, 1, 3, 4)) * np.linspace(0.1, 4, 12).reshape(1, 1, 3, 4) + 1
DATA = Arrays(X, np.arange(300) % 2)


def test_contrast_is_the_same_for_a_brighter_image_of_other_contrast():
    x = torch.from_numpy(X)
    g = contrast(x)
    assert torch.allclose(g.flatten(1).mean(1), torch.zeros(300, dtype=x.dtype), atol=1e-12)
    assert torch.allclose(g.flatten(1).norm(dim=1), torch.full((300,), 55.0, dtype=x.dtype))
    assert torch.allclose(contrast(3.5 * x - 2), g, atol=1e-10)
    assert not contrast(torch.full((2, 1, 3, 4), 7.0)).any()


@pytest.mark.parametrize("epsilon", [0.1, 5.0])
def test_whitened_numbers_have_the_covariance_of_the_formula(epsilon):
    """cov(W g) = Σ (Σ + ε I)⁻¹, W symmetric (ZCA, and not the rotated numbers of PCA), mean 0."""
    front = Whitening((1, 3, 4)).double().find(DATA, epsilon)
    g = contrast(DATA.take(np.arange(300))["input"].double()).flatten(1)
    sigma = torch.cov(g.T)
    y = front(DATA.take(np.arange(300))["input"].double()).flatten(1)
    assert torch.allclose(torch.cov(y.T), sigma @ torch.linalg.inv(sigma + epsilon * torch.eye(12)), atol=1e-8)
    assert torch.allclose(front.matrix, front.matrix.T, atol=1e-12)
    inverse = torch.linalg.inv(sigma + epsilon * torch.eye(12, dtype=torch.float64))
    assert torch.allclose(front.matrix @ front.matrix, inverse, atol=1e-10)
    assert y.mean(0).abs().max() < 1e-8
    assert torch.allclose(
        Whitening((1, 3, 4)).double().find(DATA, epsilon, batch_size=7).matrix, front.matrix, atol=1e-9
    )


def test_the_layer_stands_in_front_and_is_built_again_by_name(tmp_path):
    digits = load("digits", limit=100)
    spec = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, 8]})
    made, known = whitened(spec.build(seed=1), digits.train, spec)
    x = digits.test.take(np.arange(5))["input"]
    made.eval()
    assert torch.equal(made(x), made.body(made.front(x)))
    assert all(not name.startswith("front") for name, _ in made.named_parameters())
    again = known.build()
    again.load_state_dict(made.state_dict())
    assert isinstance(again, Whitened) and torch.equal(again.eval()(x), made(x))
    for kind, name in (("torch-export", "one.pt2"), ("onnx", "one.onnx")):
        assert export(made, x[:2], kind, tmp_path / name).max_abs_diff < 1e-4


def test_mistakes():
    with pytest.raises(UserError, match=r"150528 numbers.*at most 4096"):
        Whitening((3, 224, 224))
    with pytest.raises(UserError, match="at least two samples"):
        whitened(nn.Flatten(), Arrays(X[:1], [0]))
