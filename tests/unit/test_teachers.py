import copy

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.system import Clock, Signals, Teacher
from stillhouse.teachers import EMA, Cached, Ensemble, Frozen, Sequence, state_fingerprint


def cnn(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
        )


def batch(n=6, seed=0):
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {
        "input": x,
        "label": torch.arange(n) % 5,
        "id": torch.arange(n),
        "view": torch.zeros(n, dtype=torch.long),
    }


# -- Frozen


def test_frozen_is_a_teacher_in_eval_mode_and_never_changes():
    net = cnn()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    teacher, b = Frozen(net), batch()
    assert isinstance(teacher, Teacher) and not isinstance(teacher, nn.Module)
    expected = copy.deepcopy(net).eval()(b["input"])
    for _ in range(3):
        net.train()  # somebody else's mistake
        net[1].train()
        signals = teacher(b)
    assert isinstance(signals, Signals) and torch.equal(signals.logits, expected)
    assert not signals.logits.requires_grad and not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert teacher.unchanged()
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])


def test_one_submodule_in_train_mode_is_put_back():
    net = cnn()
    teacher = Frozen(net)
    net[1].train()
    teacher(batch())
    assert not net[1].training and teacher.unchanged()


def test_unchanged_sees_one_bit_and_one_buffer():
    net = cnn()
    teacher = Frozen(net)
    with torch.no_grad():
        net[5].bias[0] = torch.nextafter(net[5].bias[0], torch.tensor(9.0))
    assert not teacher.unchanged()
    net = cnn()
    other = Frozen(net)
    net[1].running_mean[0] += 1
    assert not other.unchanged()


def test_copy_leaves_the_original_trainable():
    net = cnn()
    teacher = Frozen(net, copy=True)
    assert all(p.requires_grad for p in net.parameters()) and net.training
    with torch.no_grad():
        net[5].weight.zero_()
    assert teacher.unchanged() and teacher(batch()).logits.std() > 0


def test_fingerprint_follows_weights_and_settings_only():
    a = Frozen(cnn())
    stats = ([0.5] * 3, [0.2] * 3, [0.1] * 3, [0.3] * 3)
    assert a.fingerprint == Frozen(cnn(), taps=["0"]).fingerprint == Frozen(copy.deepcopy(cnn())).fingerprint
    different = [
        Frozen(cnn(1)),
        Frozen(cnn(), normalize=stats),
        Frozen(cnn(), resize=9),
        Frozen(cnn(), input="x"),
    ]
    assert len({a.fingerprint, *(t.fingerprint for t in different)}) == 5
    half = nn.Linear(2, 2).bfloat16()
    assert state_fingerprint(half) != state_fingerprint(half.float())


def test_taps_come_with_the_logits_detached():
    net = cnn()
    signals = Frozen(net, taps=["0", "5:in"])(batch())
    assert set(signals) == {"0", "5:in", "logits"} and signals["0"].shape == (6, 4, 6, 6)
    assert not any(v.requires_grad for v in signals.values())
    torch.testing.assert_close(net[5](signals["5:in"]), signals.logits)
    with pytest.raises(UserError, match="no module 'lay'"):
        Frozen(net, taps=["lay"])


def test_normalize_undoes_the_students_and_applies_the_teachers():
    net, b = cnn(), batch()
    m0, s0, m1, s1 = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.3, 0.2, 0.1], [0.9, 0.8, 0.7]
    raw = b["input"] * torch.tensor(s0).view(3, 1, 1) + torch.tensor(m0).view(3, 1, 1)
    expected = net.eval()((raw - torch.tensor(m1).view(3, 1, 1)) / torch.tensor(s1).view(3, 1, 1))
    got = Frozen(net, normalize=(m0, s0, m1, s1))(b).logits
    torch.testing.assert_close(got, expected.detach())
    same = Frozen(net, normalize=(m0, s0, m0, s0))(b).logits
    torch.testing.assert_close(same, Frozen(net)(b).logits)


def test_resize_precision_input_key_and_inputs_by_name():
    net, b = cnn(), batch()
    small = {"input": nn.functional.interpolate(b["input"], size=(5, 5))}
    assert Frozen(net, resize=8)(small).logits.shape == (6, 5)
    low = Frozen(net, precision="bfloat16")(b).logits
    full = Frozen(net)(b).logits
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Frozen(net, precision="float32")(b).logits, full)
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        Frozen(net, precision="bfloat")  # type: ignore[arg-type]
    assert torch.equal(Frozen(net, input="raw")({"raw": b["input"]}).logits, full)
    with pytest.raises(UserError, match=r"no 'inputs'.*did you mean 'input'"):
        Frozen(net, input="inputs")(b)

    class Named(nn.Module):
        def forward(self, ids, mask):
            return {"logits": (ids * mask).float()}

    answer = Frozen(Named())({"input": {"ids": torch.ones(2, 3), "mask": torch.zeros(2, 3)}})
    assert torch.equal(answer.logits, torch.zeros(2, 3))
    with pytest.raises(UserError, match="Module"):
        Frozen(lambda x: x)  # type: ignore[arg-type]


# -- Ensemble, Sequence, EMA


def test_ensemble_averages_logits_or_probabilities():
    a, b, x = Frozen(cnn(0)), Frozen(cnn(1)), batch()
    za, zb = a(x).logits, b(x).logits
    torch.testing.assert_close(Ensemble([a, b])(x).logits, (za + zb) / 2)
    torch.testing.assert_close(Ensemble([a, b], [3, 1])(x).logits, 0.75 * za + 0.25 * zb)
    mixed = Ensemble([a, b], [3, 1], "probabilities")(x).logits
    torch.testing.assert_close(mixed.exp(), 0.75 * za.softmax(-1) + 0.25 * zb.softmax(-1))
    torch.testing.assert_close(Ensemble([a, b], [1, 0], "probabilities")(x).logits, za.log_softmax(-1))
    assert Ensemble([a, b]).unchanged() and Ensemble([a, b]).fingerprint != Ensemble([b, a]).fingerprint
    for bad in ([1.0], [1, -1], [0, 0]):
        with pytest.raises(UserError, match="Ensemble"):
            Ensemble([a, b], bad)
    with pytest.raises(UserError, match="Ensemble"):
        Ensemble([])


def test_sequence_takes_turns():
    ts = [Frozen(cnn(i)) for i in range(3)]
    by_fraction, by_step = Sequence(ts, [0.5, 0.75]), Sequence(ts, [50, 75])
    for s, which in [(0, 0), (49, 0), (50, 1), (75, 2), (99, 2)]:
        assert by_fraction.at(Clock(step=s, steps=100)) is ts[which] is by_step.at(Clock(step=s, steps=1000))
    assert by_step.unchanged()
    for bad in ([0.5], [0.5, 0.5], [0.75, 0.5], [0.5, 3]):
        with pytest.raises(UserError, match="Sequence"):
            Sequence(ts, bad)


def test_ema_formula_buffers_and_eval():
    student = cnn().double()
    ema = EMA(student, decay=0.9)
    mean = {k: v.clone() for k, v in student.named_parameters()}
    for k in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=p.dtype))
        student[1].running_mean += 1
        student[1].num_batches_tracked += 1
        ema.update(student)
        mean = {n: 0.9 * mean[n] + 0.1 * p.detach() for n, p in student.named_parameters()}
    for n, p in ema.model.named_parameters():
        torch.testing.assert_close(p, nn.Parameter(mean[n], requires_grad=False), atol=1e-12, rtol=0)
    assert torch.equal(ema.state_dict()["model.1.running_mean"], student[1].running_mean)
    assert int(ema.state_dict()["model.1.num_batches_tracked"]) == 3
    system = nn.ModuleDict({"student": student, "ema": ema}).train()
    assert system["student"].training and not any(m.training for m in ema.modules())
    assert not any(p.requires_grad for p in ema.parameters()) and "ema.model.5.weight" in system.state_dict()
    x = {"input": batch()["input"].double()}
    ema.model.train()
    frozen = state_fingerprint(ema)
    assert not ema(x).logits.requires_grad and ema(x).logits.dtype == torch.float64
    assert state_fingerprint(ema) == frozen and isinstance(ema, Teacher)


def test_ema_decay_by_the_clock_and_its_errors():
    student = nn.Linear(2, 2)
    ema = EMA(student, decay=lambda clock: 0.0 if clock.step == 0 else 1.0)
    with torch.no_grad():
        student.weight.fill_(3.0)
    ema.update(student, Clock(step=1))
    assert not torch.equal(ema.get_parameter("model.weight"), student.weight)
    ema.update(student, Clock(step=0))
    assert torch.equal(ema.get_parameter("model.weight"), student.weight)
    with pytest.raises(UserError, match="clock"):
        ema.update(student)
    with pytest.raises(UserError, match="weight"):
        EMA(student).update(nn.Linear(3, 2))
    with pytest.raises(UserError, match="decay"):
        EMA(student, decay=1.5)


# -- Cached


class Known:
    views, teacher_fingerprint = 2, "abc"

    def has(self, ids, views=None):
        return bool((views < 2).all())

    def lookup(self, ids, views=None):
        if not self.has(ids, views):
            raise UserError("unknown view")
        return ids[:, None].float() + 10 * views[:, None] + torch.zeros(3)


def test_cached_answers_by_id_and_view_and_falls_back_whole():
    asked = []

    def live(b):
        asked.append(b)
        return Signals(logits=torch.full((len(b["id"]), 3), -1.0))

    b = {"input": torch.zeros(2, 1), "id": torch.tensor([4, 5]), "view": torch.tensor([1, 0])}
    assert Cached(Known(), live)(b).logits[:, 0].tolist() == [14.0, 5.0] and not asked
    beyond = {**b, "view": torch.tensor([1, 7])}
    assert Cached(Known(), live)(beyond).logits[:, 0].tolist() == [-1.0, -1.0] and len(asked) == 1
    with pytest.raises(UserError, match="unknown view"):
        Cached(Known())(beyond)
    with pytest.raises(UserError, match="no 'view'"):
        Cached(Known())({"input": b["input"], "id": b["id"]})
    assert Cached(Known()).fingerprint == "abc"
