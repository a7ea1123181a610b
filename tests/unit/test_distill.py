from functools import partial

import pytest
import torch
from torch import nn

from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.system import Clock, Signals
from stillhouse.teachers import EMA, Frozen, Sequence


def net(seed=0, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def batches(n=5):
    g = torch.Generator().manual_seed(3)
    return [{"input": torch.randn(16, 4, generator=g), "label": torch.randint(3, (16,), generator=g)} for _ in range(n)]


def train(system: Distill) -> dict[str, torch.Tensor]:
    (update,) = system.updates()
    optimizer = update.optimizer(update.params)
    for step, b in enumerate(batches()):
        optimizer.zero_grad()
        assert update.name == "learn"
        system.learn(b, Clock(step=step, steps=5)).total.backward()
        optimizer.step()
    return system.outcome().state_dict()


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def test_alpha_zero_is_plain_training_bit_for_bit_and_does_not_ask():
    def never(batch):
        raise AssertionError("the teacher was called")

    got = train(Distill(net(), never, alpha=0, optimizer=SGD))
    plain = net()
    optimizer = SGD(plain.parameters())
    for b in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(b["input"]), b["label"]).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(got[name], value), name
    assert all(torch.equal(v, got[k]) for k, v in train(Distill(net(), None, alpha=0, optimizer=SGD)).items())


def test_terms_and_gradient_by_hand():
    student, teacher = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    x, y, alpha, T = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3, 0.3, 2.5
    system = Distill(student, Frozen(teacher), alpha=alpha, T=T)
    terms = system.learn({"input": x, "label": y}, Clock())
    s, t = student(x).detach(), teacher(x).detach()
    p, q = (t / T).softmax(-1), (s / T).softmax(-1)
    torch.testing.assert_close(terms.terms["label"], 0.7 * nn.functional.cross_entropy(s, y))
    torch.testing.assert_close(terms.terms["teach"], 0.3 * T**2 * (p * (p / q).log()).sum(-1).mean())
    terms.total.backward()
    hot = nn.functional.one_hot(y, 3)
    force = ((1 - alpha) * (s.softmax(-1) - hot) + alpha * T * (q - p)) / 7
    torch.testing.assert_close(student.weight.grad, force.T @ x)
    assert teacher.weight.grad is None
    assert float(terms.notes["accuracy"]) == pytest.approx(float((s.argmax(-1) == y).double().mean()))


def test_the_teacher_is_no_part_of_the_system_and_keeps_its_bytes():
    model = net(1)
    teacher = Frozen(model)
    system = Distill(net(), teacher, optimizer=SGD)
    assert len(list(system.parameters())) == len(list(net().parameters()))
    system.train()
    train(system)
    assert teacher.unchanged() and not model.training and model[0].weight.grad is None


def test_a_sequence_is_asked_by_the_clock():
    said = []

    def saying(name):
        def teacher(batch):
            said.append(name)
            return Signals(logits=torch.zeros(16, 3))

        return teacher

    train(Distill(net(), Sequence([saying("early"), saying("late")], [0.5]), optimizer=SGD))
    assert said == ["early"] * 3 + ["late"] * 2


def test_only_trainable_parameters_move():
    student = net()
    student[0].requires_grad_(False)
    (update,) = Distill(student, None, alpha=0, clip=2.0).updates()
    assert len(update.params) == 4 and update.clip == 2.0


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"bare Sequential.*Frozen"):
        Distill(net(), net())
    with pytest.raises(UserError, match="EMA"):
        Distill(net(), EMA(net()))
    with pytest.raises(UserError, match="needs a teacher"):
        Distill(net(), None)
    for bad in ({"alpha": 1.5}, {"alpha": -0.1}, {"T": 0}):
        with pytest.raises(UserError, match="alpha"):
            Distill(net(), Frozen(net()), **bad)
    shared = net()
    with pytest.raises(UserError, match="copy=True"):
        Distill(shared, Frozen(shared))
    for p in shared.parameters():
        p.requires_grad_(True)
    Distill(shared, Frozen(shared, copy=True))
    with pytest.raises(UserError, match=r"\(16, 5\).*\(16, 3\)"):
        Distill(net(), Frozen(net(classes=5))).learn(batches()[0], Clock())
