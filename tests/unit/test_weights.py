import math

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.system import Clock
from stillhouse.weights import (
    MirrorDescent,
    constant,
    cosine,
    entropy,
    linear_warmup,
    mirror_descent,
    sigmoid_ramp,
    simplex,
    step,
)


def at(schedule, s, steps=100, per_epoch=10):
    return schedule(Clock(step=s, steps=steps, steps_per_epoch=per_epoch))


# -- schedules


def test_ramps_endpoints_and_closed_forms():
    assert at(constant(), 7) == 1.0 and at(constant(0.3), 99) == 0.3
    c = cosine()
    assert at(c, 0) == 1.0 and at(c, 100) == 0.0 and at(c, 500) == 0.0
    assert at(c, 25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    c = cosine(warmup_steps=20, final=0.1)
    assert [at(c, s) for s in (0, 19, 20)] == pytest.approx([1 / 20, 1, 1])
    assert at(c, 60) == pytest.approx(0.55) and at(c, 100) == pytest.approx(0.1)
    assert [at(linear_warmup(4), s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert at(linear_warmup(0), 0) == 1.0


def test_sigmoid_ramp_counts_epochs():
    r = sigmoid_ramp(80)
    assert at(r, 0) == pytest.approx(math.exp(-5)) and at(r, 800) == 1.0 and at(r, 5000) == 1.0
    assert at(r, 405) == pytest.approx(math.exp(-5 * (1 - 40.5 / 80) ** 2))  # fractional epochs
    assert at(r, 405) == at(r, 810, per_epoch=20)
    with pytest.raises(UserError):
        sigmoid_ramp(0)


def test_step_in_fractions_and_in_epochs():
    f, e = step([0.5, 0.75], 0.1), step([5, 7.5], 0.1)
    for s, factor in [(0, 1), (49, 1), (50, 0.1), (74, 0.1), (75, 0.01), (99, 0.01)]:
        assert at(f, s) == pytest.approx(factor) and at(e, s) == pytest.approx(factor)
    for bad in ([0.5, 2], [-1], [0.0]):
        with pytest.raises(UserError, match="milestones"):
            step(bad)


# -- mirror descent


def moved(p, h, **settings):
    w = nn.Parameter(torch.as_tensor(p, dtype=torch.float64).clone())
    w.grad = torch.as_tensor(h, dtype=torch.float64)
    MirrorDescent([w], **{"floor": 0.0, "clip": None, **settings}).step()
    return w.detach()


P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
H = torch.tensor([-0.122654, -0.417464, 0.416744], dtype=torch.float64)


def test_golden_step():
    expected = torch.tensor([0.499816, 0.347519, 0.152666], dtype=torch.float64)
    torch.testing.assert_close(moved(P, H, lr=0.5), expected, atol=1e-6, rtol=0)
    direct = P * (-0.5 * H).exp()
    torch.testing.assert_close(moved(P, H, lr=0.5), direct / direct.sum(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("centre", [True, False])
def test_stays_on_the_simplex_and_ignores_a_constant(centre):
    p = moved(P, 300 * H, lr=0.9, centre=centre)
    assert (p > 0).all() and abs(float(p.sum()) - 1) < 1e-12 and torch.isfinite(p).all()
    torch.testing.assert_close(moved(P, H + 1000, lr=0.5, centre=centre), moved(P, H, lr=0.5), atol=1e-10, rtol=0)
    torch.testing.assert_close(moved(P, H + 9, lr=0.5, clip=0.2), moved(P, H, lr=0.5, clip=0.2))


def test_fixed_point_iff_constant_on_the_support():
    torch.testing.assert_close(moved(P, [4.0, 4.0, 4.0], lr=0.7), P, atol=1e-15, rtol=0)
    edge = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(moved(edge, [2.0, 2.0, -50.0], lr=0.7), edge, atol=1e-15, rtol=0)
    assert (moved(P, [4.0, 4.0, 4.1], lr=0.7) - P).abs().max() > 1e-3
    assert (moved(edge, [2.0, 2.1, 0.0], lr=0.7) - edge).abs().max() > 1e-3


def test_first_order_change():
    eta = 1e-6
    change = (moved(P, H, lr=eta) - P) / eta
    torch.testing.assert_close(change, -P * (H - (P * H).sum()), atol=1e-6, rtol=0)


def test_centred_then_clipped_symmetrically_then_floored():
    h = torch.tensor([7.0, 4.0, 1.0], dtype=torch.float64)  # centred: 3, 0, -3
    clipped = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(moved(P, h, lr=0.3, clip=1.0), moved(P, clipped, lr=0.3))
    raw = moved(P, h.clamp(-1, 1), lr=0.3)
    torch.testing.assert_close(moved(P, h, lr=0.3, clip=1.0, centre=False), raw)
    rho = 0.1
    torch.testing.assert_close(moved(P, h, lr=0.3, floor=rho), (1 - rho) * moved(P, h, lr=0.3) + rho / 3)
    w = torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64)
    for _ in range(200):
        w = moved(w, [-1.0, 1.0, 1.0], lr=1.0, floor=0.06)
    assert float(w.min()) >= 0.02 - 1e-12


def test_in_place_state_free_dtype_kept_and_lr_of_the_group():
    w = simplex(4)
    assert w.dtype == torch.float32 and simplex(2, torch.float64).dtype == torch.float64
    place = w.data_ptr()
    optimizer = mirror_descent(0.5, floor=0.0, clip=None)([w])
    optimizer.step()
    assert torch.equal(w.detach(), torch.full((4,), 0.25))  # no gradient, no step, no decay
    optimizer.param_groups[0]["lr"] = 0.0
    w.grad = torch.tensor([1.0, 0, 0, 0])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((4,), 0.25))
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert w[0] < 0.15 and w.data_ptr() == place and w.dtype == torch.float32
    assert not optimizer.state and "weight_decay" not in optimizer.param_groups[0]


def test_what_is_not_on_the_simplex_is_refused():
    for bad in (torch.ones(3), torch.tensor([1.5, -0.5]), torch.full((2, 2), 0.25)):
        with pytest.raises(UserError, match="simplex"):
            MirrorDescent([nn.Parameter(bad)])
    for settings in ({"lr": -1}, {"floor": 1.0}, {"clip": 0.0}):
        with pytest.raises(UserError, match="MirrorDescent"):
            MirrorDescent([simplex(2)], **settings)
    with pytest.raises(UserError):
        simplex(0)


def test_entropy():
    assert float(entropy(torch.full((4,), 0.25))) == pytest.approx(math.log(4))
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0.0
    assert entropy(torch.full((3, 4), 0.25)).shape == (3,)
