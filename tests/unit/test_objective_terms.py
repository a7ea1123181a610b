from functools import partial

import pytest
import torch
from torch import nn

from stillhouse import objectives as O
from stillhouse.comparisons import KNOWN, Objective, taps_of
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
    torch.testing.assert_close(terms.terms["kd"], 0.3 * T**2 * (p * (p / q).log()).sum(-1).mean())
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


# -- objectives as text, and their comparison --------------------------------------------------------------------------


class Maps(nn.Module):
    """Two convolutions and a head; channels and stride as given."""

    def __init__(self, a: int, b: int, stride: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Conv2d(1, a, 3, padding=1), nn.Conv2d(a, b, 3, stride, padding=1)
            self.head = nn.Linear(b, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


IMAGES = {"input": torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "label": torch.arange(6) % 3}


def pair(*objectives, **options):
    teacher = Frozen(Maps(4, 6, 1, seed=9), taps=taps_of(objectives))
    return Distill(Maps(3, 5, 2), teacher, objectives=objectives, example=IMAGES, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kd", Objective("kd", 1.0)),
        ("kd:0.5?T=2&ramp=0.3", Objective("kd", 0.5, options={"T": 2.0, "ramp": 0.3})),
        ("attention:layer3", Objective("attention", 1.0, "layer3", "layer3")),
        ("feature:layer3=body.2:100", Objective("feature", 100.0, "layer3", "body.2")),
        ("feature:fc:in=head:in:1e-2", Objective("feature", 0.01, "fc:in", "head:in")),
        ("flow:a>b=c>d:3", Objective("flow", 3.0, "a>b", "c>d")),
    ],
)
def test_objectives_are_read_and_written(text, expected):
    assert Objective.parse(text) == expected
    assert Objective.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kdd:1", "did you mean 'kd'"),
        ("kd:layer3:1", "compares logits"),
        ("feature:1", "say which"),
        ("kd:1?Q=3", "no option 'Q'"),
        ("kd:1?T=hot", "needs a number"),
        ("kd:-1", ">= 0"),
        ("feature:a:b:1", "2 paths"),
        ("flow:a=b:1", "EARLY>LATE"),
        ("simkd:layer2:1", "takes no path"),
    ],
)
def test_objectives_that_are_none(text, words):
    with pytest.raises(UserError, match=words):
        Objective.parse(text)


PLACES = {"same": ":second:0.7", "positions": ":second:0.7", "channels": ":second:0.7", "structure": ":second:0.7",
          "both": ":second:0.7", "flow": ":first>second:0.7", "logits": ":0.7", "labelled": ":0.7"}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, known in KNOWN.items() if known[0] in PLACES])
def test_every_objective_moves_the_student_and_leaves_the_teacher_alone(name):
    system = pair(f"{name}{PLACES[KNOWN[name][0]]}", label=0.0)
    terms = system.learn(IMAGES, Clock()).terms
    assert list(terms) == [name]
    terms[name].backward()
    moved = [p.grad for p in system.student.first.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in moved)
    assert system.teacher.unchanged()


def test_a_sum_of_objectives_is_the_sum_of_what_they_say():
    system = pair("kd:0.5?T=2", "feature:first=second:3", "attention:second:10", "kd:0.25?T=1", label=0.2)
    terms = system.learn(IMAGES, Clock()).terms
    z, said = system.student(IMAGES["input"]), system.teacher(IMAGES)
    assert sorted(terms) == ["attention", "feature", "kd", "kd 3", "label"]
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    close(terms["label"], 0.2 * nn.functional.cross_entropy(z, IMAGES["label"]))
    close(terms["kd"], 0.5 * O.kl(said.logits, z, 2.0).mean())
    close(terms["kd 3"], 0.25 * O.kl(said.logits, z, 1.0).mean())
    first = system.student.first(IMAGES["input"])
    projected = system.comparisons["1"].sides[0](first)  # 3 → 6 channels, both of 8×8
    close(terms["feature"], 3 * (projected - said["second"]).square().mean())
    second = system.student.second(first.relu())  # 4×4 against 8×8: the teacher's map is pooled
    pooled = nn.functional.adaptive_avg_pool2d(said["second"], 4)
    close(terms["attention"], 10 * O.attention_transfer(pooled, second).mean())
    assert [row[3] for row in system.described] == ["–", "24 parameters", "–", "–"]


def test_weights_follow_the_run():
    o = Objective.parse("kd:2?ramp=0.5&until=0.8")
    assert [o.at(Clock(step=s, steps=10)) for s in (0, 2, 5, 7, 8)] == [0.0, 0.8, 2.0, 2.0, 0.0]


def test_projectors_are_drawn_from_the_seed():
    a, b, c = (pair("feature:second:1", seed=s).comparisons["0"].sides[0].weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_features_that_cannot_be_compared_are_told_before_the_first_step():
    with pytest.raises(UserError, match=r"feature:head=second.*\(6, 3\).*\(6, 6, 8, 8\)"):
        pair("feature:head=second:1")
    with pytest.raises(UserError, match=r"no module 'secnd'.*did you mean"):
        pair("feature:secnd=second:1")
    with pytest.raises(UserError, match="example="):
        Distill(Maps(3, 5, 2), Frozen(Maps(4, 6, 1)), objectives=["attention:second:1"])
    with pytest.raises(UserError, match="something to learn from"):
        Distill(net(), None, objectives=[], label=0)
