"""Measures against closed forms and hand counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import (
    agreement,
    call,
    classification,
    count_macs,
    count_params,
    diversity,
    environment,
    latency,
    logits_of,
    pareto,
    predict,
    spread,
)


def logits_with(confidence: float, top: int, classes: int = 2) -> Tensor:
    """Logits whose softmax is `confidence` at `top` and equal elsewhere."""
    rest = (1 - confidence) / (classes - 1)
    return torch.tensor([confidence if c == top else rest for c in range(classes)], dtype=torch.float64).log()


# -- quality ------------------------------------------------------------------------------------------------------


def test_uniform_logits_have_closed_forms() -> None:
    found = classification(torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["nll"] == pytest.approx(math.log(3))
    assert found["ece"] == pytest.approx(0, abs=1e-12)  # confidence 1/3, right one time in three
    assert found["brier"] == pytest.approx((2 / 3) ** 2 + 2 * (1 / 3) ** 2)


def test_nll_and_brier_by_hand() -> None:
    z = torch.stack([logits_with(0.8, 0), logits_with(0.7, 1)]) + 5.0  # a constant changes nothing
    found = classification(z, torch.tensor([0, 0]))
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.3)) / 2)
    assert found["brier"] == pytest.approx((2 * 0.2**2 + 2 * 0.7**2) / 2)


def test_ece_weighs_bins_and_takes_the_gap_inside_each() -> None:
    # Bin (0.6, 0.8]: two of confidence 0.7, one right: |0.5 − 0.7|. Bin (0.8, 1]: three of 0.9, all right: |1 − 0.9|.
    z = torch.stack([logits_with(0.7, 0)] * 2 + [logits_with(0.9, 0)] * 3)
    y = torch.tensor([0, 1, 0, 0, 0])
    assert classification(z, y, bins=5)["ece"] == pytest.approx(2 / 5 * 0.2 + 3 / 5 * 0.1)
    # In one bin the two errors have opposite signs and partly cancel: |4/5 − (2·0.7 + 3·0.9)/5|.
    assert classification(z, y, bins=1)["ece"] == pytest.approx(abs(0.8 - 0.82))


def test_ece_bins_are_open_below_and_closed_above() -> None:
    z = torch.stack([torch.zeros(4, dtype=torch.float64), logits_with(0.26, 0, 4)])
    y = torch.tensor([0, 1])
    # 1/4 belongs to (0, 1/4], 0.26 to (1/4, 1/2]: apart, so the gaps 0.75 and 0.26 do not cancel.
    assert classification(z, y, bins=4)["ece"] == pytest.approx((0.75 + 0.26) / 2)
    assert classification(z, y, bins=1)["ece"] == pytest.approx(0.5 - 0.255)


def test_large_float32_logits_lose_nothing() -> None:
    found = classification(torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 0]))
    assert found["nll"] == 500.0 and found["accuracy"] == 0.5 and found["brier"] == 1.0


def test_rows_of_nan_count_as_wrong() -> None:
    found = classification(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert found["accuracy"] == 0.5
    assert all(math.isnan(found[k]) for k in ("nll", "ece", "brier"))


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (torch.zeros(0, 3), torch.zeros(0), r"\(0, 3\)"),
        (torch.zeros(4, 3), torch.zeros(3), r"\(3,\)"),
        (torch.zeros(4), torch.zeros(4), r"\(4,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "0..2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "-1"),
    ],
)
def test_what_cannot_be_judged_is_said(logits: Tensor, labels: Tensor, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        classification(logits, labels)
    assert "\n" not in str(caught.value)


def test_agreement_is_the_share_of_equal_top_classes() -> None:
    tops = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1], [2, 2, 2, 2]])
    z = [nn.functional.one_hot(t, 3).float() * (i + 1) for i, t in enumerate(tops)]
    expected = torch.tensor([[1, 0.5, 0.25], [0.5, 1, 0], [0.25, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(agreement(z), expected, rtol=0, atol=0)
    with pytest.raises(UserError, match="same samples"):
        agreement([z[0], z[1][:2]])


def test_diversity_is_the_mean_distance_of_the_distributions() -> None:
    a, b = torch.tensor([[1e3, 0.0]] * 4), torch.tensor([[0.0, 1e3]] * 4)
    assert diversity([a, b]) == pytest.approx(math.sqrt(2))
    assert diversity([a, a, b]) == pytest.approx(2 / 3 * math.sqrt(2))  # of three pairs one is equal
    assert diversity([a, a + 7.0]) == 0.0  # the same distribution
    assert diversity([a]) == 0.0
    half = torch.zeros(4, 2)
    assert diversity([a, half]) == pytest.approx(math.sqrt(0.5))


# -- what a model returns -----------------------------------------------------------------------------------------


class Answer:
    def __init__(self, logits: Any):
        self.logits = logits


def test_logits_are_found_in_what_models_return() -> None:
    z = torch.zeros(2, 3, requires_grad=True)
    for output in (z, {"logits": z, "loss": None}, Answer(z), (z, torch.zeros(2, 5)), [z]):
        assert logits_of(output) is z


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ({"out": torch.zeros(2, 3)}, "keys ['out']"),
        ((torch.zeros(2, 3, 4),), "(2, 3, 4)"),
        ((), "tuple of 0"),
        (None, "NoneType"),
        (Answer("no tensor"), "Answer"),
        ({"logits": 3}, "keys ['logits']"),
    ],
)
def test_other_returns_are_named(output: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        logits_of(output)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_inputs_go_by_name_or_by_position() -> None:
    class Minus(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    one, three = torch.tensor(1.0), torch.tensor(3.0)
    assert call(Minus(), {"b": one, "a": three}) == 2 and call(Minus(), (one, three)) == -2


class Samples:
    """Five samples that know whether they were asked for in order and without a view."""

    labels = torch.tensor([0, 1, 2, 0, 1])

    def __init__(self, n: int = 5, named: bool = False):
        self.n, self.named, self.views = n, named, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self.n

    def take(self, ids: Any, view: Any = None) -> dict[str, Any]:
        self.views.append(view)
        x = torch.as_tensor(np.asarray(ids)).float()[:, None]
        return {"input": {"x": x} if self.named else x, "label": self.labels[ids], "id": torch.as_tensor(ids)}


class Net(nn.Module):
    """Logits (id, 2·id, 3·id) in eval mode, something else in train mode; returned in the given wrapping."""

    def __init__(self, wrap: Any = lambda z: z):
        super().__init__()
        self.norm, self.drop, self.wrap = nn.BatchNorm1d(1), nn.Dropout(0.9), wrap
        self.norm.eps = 0.0

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.drop(self.norm(x)) * torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: (z, z.sum())])
def test_predict_is_in_order_and_leaves_every_mode(named: bool, wrap: Any) -> None:
    net, samples = Net(wrap).train(), Samples(named=named)
    net.norm.eval()  # a frozen norm inside a training network
    z, y = predict(net, samples, batch_size=2)
    torch.testing.assert_close(z, torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0, 3.0]))
    assert z.dtype == torch.float32 and not z.requires_grad and torch.equal(y, Samples.labels)
    assert net.training and net.drop.training and not net.norm.training
    assert samples.views == [None] * 3


def test_predict_leaves_modes_also_after_an_error() -> None:
    net = Net(lambda z: z[:, :, None]).train()
    with pytest.raises(UserError, match=r"\(5, 3, 1\) from Net"):
        predict(net, Samples())
    assert all(m.training for m in net.modules())
    with pytest.raises(UserError, match=r"n=2.*\(1, 3\)"):
        predict(Net(lambda z: z[:1]), Samples(), batch_size=2)
    with pytest.raises(UserError, match="at least one sample"):
        predict(Net(), Samples(0))


# -- size and speed -----------------------------------------------------------------------------------------------


def test_params_count_once_where_they_are_tied() -> None:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    assert count_params(nn.Sequential(first, second)) == 25 + 5 + 5
    assert count_params(nn.BatchNorm2d(4)) == 8  # buffers are no parameters


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(10, 4), (7, 10), 10 * 4),
        (nn.Linear(10, 4), (2, 3, 10), 3 * 10 * 4),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 3 * 9 * 8 * 36),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), (2, 3, 6, 6), 3 * 9 * 8 * 9),
        (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6), 9 * 8 * 16),  # depthwise, no padding: 4×4
        (nn.Conv2d(8, 4, 1, groups=2), (1, 8, 5, 5), 4 * 4 * 25),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)), (1, 1, 4, 4), 9 * 2 * 4 + 40),
    ],
)
def test_macs_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    layer.train()
    assert count_macs(layer, torch.zeros(shape)) == macs
    assert layer.training


def test_macs_of_attention_see_through_the_fused_kernel() -> None:
    n, d = 6, 8
    block = nn.TransformerEncoderLayer(d, 2, dim_feedforward=16, batch_first=True)
    attention = 3 * n * d * d + 2 * n * n * d + n * d * d  # q, k, v; scores and mixture; out
    before = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(block, torch.zeros(4, n, d)) == attention + 2 * n * d * 16
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_latency_is_ordered_and_puts_everything_back() -> None:
    net, seen = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), set()

    def note(module: nn.Module, inputs: Any) -> None:
        seen.add((torch.get_num_threads(), module.training, torch.is_inference_mode_enabled()))

    net.register_forward_pre_hook(note)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = latency(net.train(), torch.zeros(3, 4), threads=2, repeats=7, warmup=1)
        assert torch.get_num_threads() == 1 and net.training
        assert seen == {(2, False, True)}
        assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms
        assert (found.threads, found.batch, found.repeats, found.device) == (2, 3, 7, "cpu")
        with pytest.raises(RuntimeError):
            latency(net, torch.zeros(3, 5), threads=2)
        assert torch.get_num_threads() == 1 and net.training
    finally:
        torch.set_num_threads(before)
    for wrong in ({"threads": 0}, {"repeats": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            latency(net, torch.zeros(3, 4), **wrong)


def test_latency_is_the_median_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 1.0, 2.0, 3.0, 100.0])
    monkeypatch.setattr("stillhouse.evaluate._timed", lambda *_: next(times))
    found = latency(nn.Linear(2, 2), torch.zeros(1, 2), repeats=5, warmup=0)
    assert (found.median_ms, found.p10_ms, found.p90_ms) == (3.0, pytest.approx(1.4), pytest.approx(62.0))


# -- over seeds and over models -----------------------------------------------------------------------------------


def test_spread_is_that_of_a_sample() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found == {"mean": 3.0, "std": pytest.approx(math.sqrt(7.0)), "min": 1.0, "max": 6.0, "n": 3}
    assert math.isnan(spread([4.0])["std"]) and spread([4.0])["mean"] == 4.0
    with pytest.raises(UserError, match="at least one"):
        spread([])


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 0.5), (2, 0.9), (3, 0.8)], [True, True, False]),
        ([(1, 0.5), (1, 0.5)], [True, True]),  # equal points stay together
        ([(1, 0.5), (1, 0.6)], [False, True]),  # as cheap and worse
        ([(1, 0.5), (2, 0.5)], [True, False]),  # as good and dearer
        ([(None, 0.9), (1, math.nan), (2, 0.1), (math.inf, 1.0)], [False, False, True, False]),
        ([], []),
    ],
)
def test_pareto(points: list[Any], front: list[bool]) -> None:
    assert pareto(points) == front
    assert pareto(points[::-1]) == front[::-1]


def test_environment_names_what_numbers_depend_on() -> None:
    found = environment()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["cpu"] and found["cores"] >= 1 and found["devices"]
