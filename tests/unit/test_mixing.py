"""Mixup and cutmix: images and labels in the same parts, as a function of the clock."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.data import Arrays, Batches, mixing
from stillhouse.errors import UserError
from stillhouse.system import Clock

N, SIZE = 12, 16


def source(**how: float):
    """Sample k is an image of the number k, of class k."""
    x = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None, None, None], (N, 2, SIZE, SIZE))
    return mixing(Batches(Arrays(x, np.arange(N)), N), N, **how)


def clocks(count: int):
    return [Clock(seed=5, step=s, steps_per_epoch=1) for s in range(count)]


def test_nothing_asked_for_is_the_source_itself():
    plain = Batches(Arrays(np.zeros((4, 1, 2, 2)), np.arange(4)), 2)
    assert mixing(plain, 4) is plain


def test_mixup_takes_images_and_labels_in_the_same_parts():
    mixed = source(mixup=0.8)
    shares = []
    for clock in clocks(200):
        b = mixed.batch(clock)
        assert b["label"].shape == (N, N) and torch.allclose(b["label"].sum(1), torch.ones(N))
        numbers = torch.arange(N, dtype=torch.float32)
        torch.testing.assert_close(b["input"][:, 0, 0, 0], b["label"] @ numbers, rtol=1e-5, atol=1e-5)
        assert (b["input"] == b["input"][:, :1, :1, :1]).all()  # every pixel alike
        shares.append(float(b["label"][torch.arange(N), b["id"]].min()))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06) and min(shares) < 0.1 and max(shares) > 0.9  # Beta(.8, .8)


def test_cutmix_labels_are_the_areas():
    mixed = source(cutmix=1.0)
    areas = []
    for clock in clocks(200):
        b = mixed.batch(clock)
        own = (b["input"][:, 0] == b["id"].float().view(-1, 1, 1)).float().mean((1, 2))
        torch.testing.assert_close(b["label"][torch.arange(N), b["id"]], own, rtol=1e-5, atol=1e-6)
        for k in range(N):
            other = b["input"][k, 0][b["input"][k, 0] != b["id"][k]]
            assert len(other.unique()) <= 1  # one rectangle of one other image
        areas.append(1 - float(own.min()))
    assert max(areas) > 0.5 and min(areas) < 0.05


def test_both_take_turns_and_the_clock_decides():
    mixed = source(mixup=1.0, cutmix=1.0)
    flat = [bool((mixed.batch(c)["input"] == mixed.batch(c)["input"][:, :1, :1, :1]).all()) for c in clocks(60)]
    assert 15 < sum(flat) < 45
    a, b = (mixed.batch(Clock(seed=5, step=3, steps_per_epoch=1)) for _ in range(2))
    assert torch.equal(a["input"], b["input"]) and torch.equal(a["label"], b["label"])
    assert mixed.fingerprint != source(mixup=1.0).fingerprint


def test_mistakes():
    with pytest.raises(UserError, match="0 or positive"):
        source(mixup=-1.0)
    flat = mixing(Batches(Arrays(np.zeros((4, 3)), np.arange(4) % 2), 2), 2, mixup=1.0)
    with pytest.raises(UserError, match="images"):
        flat.batch(Clock())
