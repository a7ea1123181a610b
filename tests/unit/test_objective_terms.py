from functools import partial

import pytest
import torch
from torch import nn

from stillhouse import objectives as O
from stillhouse.comparisons import KNOWN, RANGES, Comparison, Objective, as_map, grid, taps_of
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.system import Clock, Signals
from stillhouse.teachers import EMA, Ensemble, Frozen, Sequence


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kd:1?T=0", "T must be a positive number, got 0"),
        ("kd:1?T=-4", "T must be"),
        ("kd:1?T=inf", "T must be"),
        ("kd:1?T=nan", "T must be"),
        ("js:1?beta=1", "beta must be a number between 0 and 1"),
        ("kd:1?ramp=-1", r"ramp must be a part of the run in \[0, 1\]"),
        ("kd:1?until=0", r"until must be a part of the run in \(0, 1\]"),
        ("pld:1?topk=2.5", "topk must be a whole number"),
        ("attention:a:1?p=0.5", "p must be"),
        ("overhaul:a:1?margin=1", "margin must be"),
        ("contrastive:a:1?width=0", "width must be"),
    ],
)
def test_options_out_of_range_are_told(text, words):
    with pytest.raises(UserError, match=words):
        Objective.parse(text)


def test_every_option_has_a_range():
    for name, (_, _, defaults) in KNOWN.items():
        for key, value in defaults.items():
            fits, _ = RANGES.get(f"{name} {key}", RANGES[key])
            assert fits(value), (name, key)


def test_the_teacher_is_not_asked_past_until():
    asked = []

    def teacher(batch):
        asked.append(len(asked))
        return Signals(logits=torch.zeros(16, 3))

    system = Distill(net(), teacher, objectives=["kd:1?until=0.5", "js:1?until=0.3"], label=1.0)
    for step in range(10):
        terms = system.learn(batches(1)[0], Clock(step=step, steps=10))
        terms.total.backward()
        kd, js = (float(terms.terms[k].detach()) for k in ("kd", "js"))
        assert (kd == 0) == (step >= 5) and (js == 0) == (step >= 3)
    assert len(asked) == 5
    with pytest.raises(UserError, match="nothing is left to learn from"):
        Distill(net(), teacher, objectives=["kd:1?until=0.5"], label=0.0)


# -- tokens beside maps, channels last, margins ------------------------------------------------------------------------


def as_tokens(maps, front):
    """Patches row by row behind `front` class tokens of 1e6, as `as_map` leaves them."""
    flat = maps.flatten(2)
    return torch.cat([torch.full((*flat.shape[:2], front), 1e6), flat], 2).unsqueeze(-1)


@pytest.mark.parametrize("front", [0, 1, 2, 5])
@pytest.mark.parametrize(("side", "like"), [((8, 8), (5, 5)), ((6, 9), (2, 3)), ((4, 5), (7, 9))])
def test_tokens_become_rows_and_columns(front, side, like):
    maps = torch.arange(2 * 3 * side[0] * side[1], dtype=torch.float32).view(2, 3, *side)
    assert torch.equal(grid(as_tokens(maps, front), like), maps)


def test_tokens_that_are_no_grid_are_told():
    with pytest.raises(UserError, match="47 tokens are no grid of the proportions 7×7"):
        grid(torch.zeros(2, 3, 47, 1), (7, 7))


def test_a_transformer_is_compared_with_a_map_position_by_position():
    maps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    pooled = nn.functional.avg_pool2d(maps, 2)
    for s, t in (([as_tokens(maps, 1)], [pooled]), ([pooled], [as_tokens(maps, 1)]), ([maps], [as_tokens(pooled, 2)])):
        for name in ("feature", "attention", "nst"):
            value = Comparison(Objective.parse(f"{name}:a:1"), s, t, image=(32, 32))(s, t)
            torch.testing.assert_close(value, torch.zeros(2), atol=1e-6, rtol=0)
    turned = pooled.transpose(2, 3)  # a wrong order of the positions is seen
    both = [as_tokens(maps, 1)], [turned]
    assert Comparison(Objective.parse("feature:a:1"), *both, image=(32, 32))(*both).min() > 0.1


def test_maps_with_channels_last_are_turned():
    image, maps = torch.zeros(2, 3, 32, 32), torch.randn(2, 24, 8, 8)
    assert torch.equal(as_map(maps.permute(0, 2, 3, 1), image), maps) and as_map(maps, image) is maps
    flat = torch.randn(2, 24, 4, 8)
    assert torch.equal(as_map(flat.permute(0, 2, 3, 1), torch.zeros(2, 3, 16, 32)), flat)
    with pytest.raises(UserError, match="token=99: the sequence has 65 positions"):
        as_map(torch.zeros(2, 65, 4), image, token=99)


def test_overhaul_takes_its_margins_from_the_teachers_batch_norm():
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    teacher[1].bias.data = torch.tensor([-1.0, 0.0, 0.5, -2.0])
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    def said(text):
        asked = Frozen(teacher, taps=taps_of([text]))
        system = Distill(student, asked, objectives=[text], label=0.0, example=IMAGES)
        return system.learn(IMAGES, Clock()).terms["overhaul"], system

    value, system = said("overhaul:0=1:1")
    with torch.no_grad():
        t, s = teacher[:2](IMAGES["input"]), student[0](IMAGES["input"])
    torch.testing.assert_close(value, O.overhaul(t, s, O.negative_mean(teacher[1])).mean())
    assert system.described[0][3] == "margins of a batch norm" and not any("margin" in k for k in system.state_dict())
    torch.testing.assert_close(said("overhaul:0=1:1?margin=-0.5")[0], O.overhaul(t, s, -0.5).mean())
    assert abs(float(said("overhaul:0=1:1?margin=0")[0].detach()) - float(value.detach())) > 1e-3


def test_features_of_one_of_several_teachers():
    a, b = Maps(4, 6, 1, seed=9), Maps(2, 3, 1, seed=8)
    both = Ensemble([Frozen(a, taps=["second"]), Frozen(b, taps=["first"])])
    objectives = ["cka:second=1/second:1", "rkd-angle:second=2/first:1"]
    system = Distill(Maps(3, 5, 2), both, objectives=objectives, label=0.0, example=IMAGES)
    terms = system.learn(IMAGES, Clock()).terms
    s = system.student.second(system.student.first(IMAGES["input"]).relu())
    torch.testing.assert_close(terms["cka"], O.cka(a.second(a.first(IMAGES["input"]).relu()), s).mean())
    torch.testing.assert_close(terms["rkd-angle"], O.relative_angle(b.first(IMAGES["input"]), s).mean())
