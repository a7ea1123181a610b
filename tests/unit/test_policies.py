"""AutoAugment, RandAugment and TrivialAugment: torchvision's operations, drawn from (seed, view, sample)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms import autoaugment as theirs

from stillhouse.data import Arrays, load
from stillhouse.data.policies import OPS, POLICIES, RANGES, SIGNED, augmented, operate
from stillhouse.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32)).astype(np.uint8)
ENHANCE = ("Brightness", "Color", "Contrast", "Sharpness")
SPACES = {
    "autoaugment": (AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (32, 32)), 10),
    "randaugment": (RandAugment()._augmentation_space(31, (32, 32)), 31),
    "trivialaugment": (TrivialAugmentWide()._augmentation_space(31), 31),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [*OPS, "Invert"])
def test_operations_are_torchvisions_over_their_whole_range(policy, name):
    space, bins = SPACES[policy]
    if name not in space:
        pytest.skip(f"{policy} has no {name} in torchvision")
    values, signed = space[name]
    assert signed == (name in SIGNED)
    x = torch.from_numpy(IMAGES[0])
    for level in (*range(0, bins, 4), bins - 1):
        magnitude = float(values[level]) if values.ndim else 0.0
        for negative in (False, True) if signed else (False,):
            want = theirs._apply_op(x, name, -magnitude if negative else magnitude, InterpolationMode.NEAREST, None)
            got = operate(name, x, level / (bins - 1), negative, RANGES[policy])
            if name == "Solarize" and level == 0:
                want = x  # theirs turns white pixels black at no strength
            least = 1 if name in ENHANCE else 0  # strengths in float32 there, in float64 here
            assert got.dtype == torch.uint8 and int((got.int() - want.int()).abs().max()) <= least, (level, negative)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_gets_the_same_alone_and_in_any_batch(policy):
    many = augmented(policy, IMAGES, 3, 1, np.arange(40))
    one = augmented(policy, IMAGES[7:8], 3, 1, np.array([7]))
    other = augmented(policy, IMAGES, 3, 2, np.arange(40))
    assert np.array_equal(many[7], one[0]) and many.dtype == np.uint8
    assert (many != IMAGES).any((1, 2, 3)).mean() > 0.4 and (many != other).any((1, 2, 3)).mean() > 0.5


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    augmented("randaugment", IMAGES, 0, 0, np.arange(40))
    assert torch.equal(before, torch.get_rng_state())


def test_training_views_have_the_policy_and_evaluation_does_not():
    plain = Arrays(IMAGES, np.arange(40) % 2, augment="crop-flip")
    both = Arrays(IMAGES, np.arange(40) % 2, augment="crop-flip+randaugment")
    ids = np.arange(40)
    assert torch.equal(plain.take(ids)["input"], both.take(ids)["input"])
    cropped = plain.take(ids, view=0)["input"]
    behind = augmented("randaugment", (cropped * 255).round().byte().numpy(), 0, 0, ids)
    assert torch.equal(both.take(ids, view=0)["input"], torch.from_numpy(behind).float() / 255)
    assert plain.fingerprint != both.fingerprint


@pytest.mark.parametrize(
    ("augment", "said"),
    [("crop-flip+randaug", "did you mean 'randaugment'"), ("crop+randaugment", "crop-flip"), ("flip+", "policy ''")],
)
def test_mistakes_are_one_line(augment, said):
    with pytest.raises(UserError, match=said) as error:
        Arrays(IMAGES, np.arange(40) % 2, augment=augment)
    assert "\n" not in str(error.value)


def test_only_images_of_bytes():
    with pytest.raises(UserError, match="uint8 images"):
        load("digits", augment="flip+randaugment")
