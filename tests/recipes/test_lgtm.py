"""LGTM: the card's exact checks, what is moved and what is not, mistakes in one line."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn
from torch.func import functional_call

from stillhouse import plain
from stillhouse.bilevel import along, mixed, step
from stillhouse.cli import invoke
from stillhouse.data import Batches, Data, load
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.outcomes import load as load_student
from stillhouse.recipes.lgtm.experiment import STUDENT, TEACHER, TINY, digits
from stillhouse.recipes.lgtm.recipe import Config, distill, helpful, parts
from stillhouse.recipes.lgtm.system import LGTM, norm, trained
from stillhouse.run import Run
from stillhouse.system import Clock
from stillhouse.text import bert_spec, sentence_data, small_tokenizer

CNN = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 8, 16]})
ROWS = [
    Row("lgtm", "released", {"influence": "released", "derivative": "fd", "teacher_epochs": 1.0}),
    Row("lgtm", "batch norm", {"influence": "sgd", "alpha_student": 0.5}, {"student": CNN, "teacher": CNN}),
    Row("lgtm", "micro", {"zero_heads": False}, micro_batch=10),
]
_NONE = Row("lgtm", "co-trained", {"influence": "none"})
ZERO = [
    (Row("lgtm", "strength 0", {"strength": 0.0}), _NONE),
    (Row("lgtm", "strength 0, released", {"influence": "released", "strength": 0.0}), _NONE),
]
_SGD = {"optimizer": "sgd", "lr": 0.05, "teacher_lr": 0.05}
JOINT = [Row("lgtm", f"sgd, {how}", {**_SGD, "influence": how}) for how in ("exact", "released", "none")]

C = 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(width, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, C)).double()


TRAIN = {"input": draw(6, 4, seed=1), "label": torch.arange(6) % C}
HELD = {"input": draw(5, 4, seed=2), "label": (torch.arange(5) + 1) % C}
CLOCK = Clock()


def pair(mover=None, **settings):
    """Student and teacher in float64; the student's optimiser has the past that `mover` gives it."""
    cfg = Config(**{"lr": 0.3, "teacher_lr": 0.2, "clip": 0.0, "alpha_student": 0.8, **settings})
    system = LGTM(network(4, 3), network(6, 4), cfg)
    if mover is not None:
        system.mover = mover(list(system.student.parameters()))
        for k in range(3):  # moments that are not zero
            for i, p in enumerate(system.student.parameters()):
                p.grad = draw(*p.shape, seed=100 + 10 * k + i)
            system.mover.step()
    return system


SGD = partial(torch.optim.SGD, lr=0.3)
ADAMW = partial(torch.optim.AdamW, lr=0.3, weight_decay=0.1)


def through(system, rule):
    """dF/dθ_t by autograd through the whole step, which `rule(name, p, g)` makes."""
    theta, phi = trained(system.student), trained(system.teacher)
    leaves = {k: p.detach().requires_grad_() for k, p in theta.items()}
    t = functional_call(system.teacher, phi, (TRAIN["input"],))
    s = functional_call(system.student, leaves, (TRAIN["input"],))
    p = (t / system.cfg.temperature).softmax(-1)
    q = (s / system.cfg.temperature).log_softmax(-1)
    a = system.cfg.alpha_student
    loss = a * (p * (p.log() - q)).sum(-1).mean() + (1 - a) * F.cross_entropy(s, TRAIN["label"])
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    after = {k: rule(k, v, g) for (k, v), g in zip(leaves.items(), grads, strict=True)}
    outer = F.cross_entropy(functional_call(system.student, after, (HELD["input"],)), HELD["label"])
    return torch.autograd.grad(outer, list(phi.values())), outer.detach()


def assert_close(found, expected, rtol=1e-6, atol=1e-12):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=atol)
    assert max(b.abs().max() for b in expected) > 1e-5


# -- the card's exact checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["exact", "sgd"])
@pytest.mark.parametrize(("derivative", "rtol"), [("autograd", 1e-9), ("fd", 1e-5)])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_1_the_influence_is_the_derivative_through_a_plain_step(how, derivative, rtol, T):
    system = pair(SGD, influence=how, derivative=derivative, temperature=T, radius=1e-3)
    expected, outer = through(system, lambda k, p, g: p - 0.3 * g)
    found, value = system.influence(TRAIN, HELD, CLOCK)
    assert_close(found, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(value, outer)


@pytest.mark.parametrize(("derivative", "rtol"), [("autograd", 1e-8), ("fd", 1e-4)])
def test_1_exact_goes_through_adamw_with_its_moments_and_its_clip(derivative, rtol):
    system = pair(ADAMW, influence="exact", derivative=derivative, radius=1e-3, clip=0.05)
    state = {k: copy.deepcopy(system.mover.state[p]) for k, p in trained(system.student).items()}
    total = norm(through_gradients(system))
    assert total > 0.05  # so that the clip is felt

    def rule(k, p, g):
        m = 0.9 * state[k]["exp_avg"] + 0.1 * g
        v = 0.999 * state[k]["exp_avg_sq"] + 0.001 * g * g
        t = float(state[k]["step"]) + 1
        return p * (1 - 0.3 * 0.1) - 0.3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    def clipped(system):
        theta, phi = trained(system.student), trained(system.teacher)
        leaves = {k: p.detach().requires_grad_() for k, p in theta.items()}
        t = functional_call(system.teacher, phi, (TRAIN["input"],))
        s = functional_call(system.student, leaves, (TRAIN["input"],))
        loss = system.student_loss(t, s, TRAIN["label"], detach=False)
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        size = torch.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * 0.05 / (size + 1e-6) for g in grads]
        after = {k: rule(k, p, g) for (k, p), g in zip(leaves.items(), grads, strict=True)}
        outer = F.cross_entropy(functional_call(system.student, after, (HELD["input"],)), HELD["label"])
        return torch.autograd.grad(outer, list(phi.values()))

    found, _ = system.influence(TRAIN, HELD, CLOCK)
    assert_close(found, clipped(system), rtol=rtol, atol=rtol * 1e-2)
    plain_step, _ = replaced(system, influence="sgd").influence(TRAIN, HELD, CLOCK)
    cosine = torch.cosine_similarity(flat(plain_step), flat(found), dim=0)
    assert cosine < 0.999  # AdamW turns it: the plain form is another direction


def through_gradients(system):
    s, t = system.student(TRAIN["input"]), system.teacher(TRAIN["input"]).detach()
    loss = system.student_loss(t, s, TRAIN["label"])
    return torch.autograd.grad(loss, list(system.student.parameters()))


def replaced(system, **changes):
    system.cfg = replace(system.cfg, **changes)
    return system


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("derivative", ["autograd", "fd"])
def test_2_no_direction_no_influence(derivative, monkeypatch):
    system, alone = pair(ADAMW, derivative=derivative), pair(ADAMW, influence="none")
    zero = {k: torch.zeros_like(p) for k, p in trained(system.student).items()}
    monkeypatch.setattr(system, "direction", lambda *a: (zero, torch.zeros(())))
    both = {"train": TRAIN, "held_out": HELD}
    a, b = system.teach(both, CLOCK), alone.teach(both, CLOCK)
    assert all(torch.equal(x, y) for x, y in zip(a.grads, b.grads, strict=True))


def test_3_the_released_form_needs_the_students_part_in_the_teachers_loss():
    system = pair(ADAMW, influence="released", alpha_teacher=0.0, derivative="fd")
    found, _ = system.influence(TRAIN, HELD, CLOCK)
    assert not any(g.any() for g in found)
    found, _ = replaced(system, alpha_teacher=0.4).influence(TRAIN, HELD, CLOCK)
    assert all(g.abs().max() > 1e-6 for g in found)


@pytest.mark.parametrize("how", ["exact", "sgd", "released"])
@pytest.mark.parametrize("derivative", ["autograd", "fd"])
def test_4_nothing_is_moved_by_looking_ahead(how, derivative):
    def normed(width):
        return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, C)).double()

    cfg = Config(influence=how, derivative=derivative, lr=0.1, teacher_lr=0.1)
    system = LGTM(normed(4), normed(6), cfg).train()
    system.updates()[1].optimizer(list(system.student.parameters()))
    before = copy.deepcopy(system.state_dict())
    found, _ = system.influence(TRAIN, HELD, CLOCK)
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())
    assert all(m.training for m in system.modules()) and not system.mover.state
    assert all(p.grad is None for p in system.parameters()) and all(g.isfinite().all() for g in found)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd, decay": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_5_the_virtual_step_is_the_real_one(name):
    params = [nn.Parameter(draw(3, 2)), nn.Parameter(draw(4, seed=1))]
    real = OPTIMIZERS[name]([{"params": params[:1], "lr": 0.05}, {"params": params[1:]}])
    for k in range(4):
        grads = [draw(*p.shape, seed=10 * k + i) for i, p in enumerate(params)]
        if k == 2:
            grads[0][0] = 0.0
        before = [p.detach().clone() for p in params]
        state = copy.deepcopy(real.state_dict())
        foreseen = step(real, params, grads)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert str(real.state_dict()) == str(state)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        real.step()
        for a, b in zip(foreseen, params, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(step(real, params, [None, grads[1]])[0], params[0].detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_5_it_is_differentiable_also_where_a_gradient_is_zero(name):
    params = [nn.Parameter(draw(5))]
    real = OPTIMIZERS[name](params)
    g = draw(5, seed=7)
    if name.startswith("adam"):  # the derivative of the root at 0
        zero = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(step(real, params, [zero])[0].sum(), zero)
        assert bool(slope.isfinite().all())
    params[0].grad = draw(5, seed=8)
    real.step()
    assert torch.autograd.gradcheck(lambda u: step(real, params, [u])[0], (g.requires_grad_(),))


def test_5_the_factor_is_on_the_first_learning_rate():
    p = nn.Parameter(torch.ones(1))
    real = torch.optim.SGD([p], lr=0.5)
    real.param_groups[0].update(initial_lr=0.5, lr=0.1)
    assert step(real, [p], [torch.ones(1)]).__getitem__(0).item() == pytest.approx(0.9)
    assert step(real, [p], [torch.ones(1)], 0.5)[0].item() == pytest.approx(0.75)


def test_6_zero_heads_begin_with_the_same_answer(tmp_path, monkeypatch):
    seen = {}

    def first(self, batch, clock):
        x = batch["train"]["input"]
        if not seen:
            seen.update(s=self.student(x).detach(), t=self.teacher(x).detach())
            seen["loss"] = self.student_loss(seen["t"], seen["s"], batch["train"]["label"])
        return plainly(self, batch, clock)

    plainly = LGTM.teach
    monkeypatch.setattr(LGTM, "teach", first)
    made(tmp_path)
    assert not seen["s"].any() and not seen["t"].any() and seen["loss"] == 0
    assert torch.equal(seen["s"].softmax(-1), torch.full_like(seen["s"], 0.1))


def test_a_teacher_that_is_trained_keeps_its_head(tmp_path, capsys):
    cfg = replace(TINY, teacher_epochs=3.0, epochs=1.0, batch=115, teacher_lr=3e-3)
    teacher = TEACHER.build(seed=3)
    made(tmp_path / "first", cfg, teacher=teacher)
    assert teacher[-1].weight.abs().max() > 5e-3  # three steps and one: it was not zeroed in between
    made(tmp_path / "a").save(tmp_path / "a")
    flags = ["--data", "digits", "--limit", "64", "--epochs", "1", "--teacher", str(tmp_path / "a/students/student")]
    common = ["run", "lgtm", *flags, "--model", "stillhouse:mlp", "--quiet", "--out"]
    assert invoke([*common, str(tmp_path / "b")]) == 2 and "--no-zero-heads" in capsys.readouterr().err
    assert invoke([*common, str(tmp_path / "c"), "--no-zero-heads"]) == 0


@pytest.mark.parametrize("how", ["exact", "sgd", "released"])
def test_7_the_error_of_differences_falls_with_the_square_of_their_radius(how):
    def at(**changes):
        return flat(pair(ADAMW, influence=how, **changes).influence(TRAIN, HELD, CLOCK)[0])

    right = at(derivative="autograd")
    errors = [float((at(derivative="fd", radius=r) - right).norm() / right.norm()) for r in (0.4, 0.2, 0.1)]
    assert errors[2] < 0.05
    for wide, narrow in itertools.pairwise(errors):
        assert wide / narrow == pytest.approx(4.0, rel=0.2)


# -- the released form, signs and order --------------------------------------------------------------------------------


def test_the_released_form_by_hand():
    system = pair(ADAMW, influence="released", derivative="fd", radius=0.01)
    student, teacher = system.student, system.teacher
    after = copy.deepcopy(student)
    mover = ADAMW(list(after.parameters()))
    mover.load_state_dict(copy.deepcopy(system.mover.state_dict()))
    t = teacher(TRAIN["input"]).detach()
    system.student_loss(t, after(TRAIN["input"]), TRAIN["label"]).backward()
    mover.step()
    v = torch.autograd.grad(F.cross_entropy(after(HELD["input"]), HELD["label"]), list(after.parameters()))
    size = 0.01 / flat(v).norm()
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(student)
        with torch.no_grad():
            for p, u in zip(moved.parameters(), v, strict=True):
                p += sign * size * u
        z = teacher(TRAIN["input"])
        q = moved(TRAIN["input"]).detach().softmax(-1)
        kl = (q * (q.log() - z.log_softmax(-1))).sum(-1).mean()
        loss = 0.4 * kl + 0.6 * F.cross_entropy(z, TRAIN["label"])
        ends.append(torch.autograd.grad(loss, list(teacher.parameters())))
    expected = [-0.2 * (a - b) / (2 * size) for a, b in zip(*ends, strict=True)]
    assert_close(system.influence(TRAIN, HELD, CLOCK)[0], expected, rtol=1e-8)


def test_a_step_along_the_influence_lowers_the_held_out_loss_as_foretold():
    system = pair(SGD, influence="exact")
    found, before = system.influence(TRAIN, HELD, CLOCK)
    with torch.no_grad():
        for p, g in zip(system.teacher.parameters(), found, strict=True):
            p -= 1e-4 * g
    _, after = system.influence(TRAIN, HELD, CLOCK)
    assert float((before - after) / (1e-4 * flat(found).square().sum())) == pytest.approx(1.0, rel=1e-3)


def test_the_gradient_is_the_teachers_own_and_the_influence():
    system = pair(ADAMW, strength=2.5)
    got = system.teach({"train": TRAIN, "held_out": HELD}, CLOCK)
    s, t = system.student(TRAIN["input"]).detach(), system.teacher(TRAIN["input"])
    q = s.softmax(-1)
    own = 0.4 * (q * (q.log() - t.log_softmax(-1))).sum(-1).mean() + 0.6 * F.cross_entropy(t, TRAIN["label"])
    own = torch.autograd.grad(own, list(system.teacher.parameters()))
    found, _ = system.influence(TRAIN, HELD, CLOCK)
    assert_close(got.grads, [a + 2.5 * b for a, b in zip(own, found, strict=True)], rtol=1e-9)
    torch.testing.assert_close(got.notes["influence"], 2.5 * norm(found) / norm(own))


def test_the_student_learns_from_the_teacher_that_has_moved(tmp_path):
    """One step by hand: the teacher's AdamW step first, then the student's against it."""
    cfg = replace(TINY, influence="none", zero_heads=False, epochs=1.0, batch=115, clip=0.0, lr_warmup=0.0)
    data = load("digits", limit=128)
    train, _ = parts(data, cfg, 0)
    student, teacher = STUDENT.build(seed=0), TEACHER.build(seed=5)
    batch = Batches(train, 115).batch(Clock(steps_per_epoch=1))
    movers = [
        torch.optim.AdamW(m.parameters(), lr=r, weight_decay=0.01)
        for m, r in ((teacher, cfg.teacher_lr), (student, cfg.lr))
    ]
    system = LGTM(student, teacher, cfg)
    system.teacher_loss(student(batch["input"]).detach(), teacher(batch["input"]), batch["label"]).backward()
    movers[0].step()
    t = teacher(batch["input"]).detach()
    system.student_loss(t, student(batch["input"]), batch["label"]).backward()
    movers[1].step()
    family = made(tmp_path, cfg, data=data, teacher=TEACHER.build(seed=5))
    for mine, theirs in ((student, family["student"].model), (teacher, family.base)):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-7)


# -- bilevel's further functions ---------------------------------------------------------------------------------------


def test_mixed_is_the_block_of_the_hessian():
    x, y = {"x": draw(3)}, {"y": draw(2, seed=1), "idle": draw(1, seed=2)}
    m, v = draw(3, 2, seed=3), {"x": draw(3, seed=4)}

    def loss(a, b):
        return (a["x"].sin() @ m @ b["y"].exp()) + (a["x"] ** 2).sum() + b["y"].sum()

    expected = (v["x"] * x["x"].cos()) @ m * y["y"].exp()
    for mode, rtol in (("autograd", 1e-12), ("fd", 1e-4)):
        got = mixed(loss, x, y, v, mode=mode)
        torch.testing.assert_close(got[0], expected, rtol=rtol, atol=1e-9)
        assert not got[1].any() and not got[0].requires_grad
    with pytest.raises(ValueError, match="mode"):
        mixed(loss, x, y, v, mode="no")


def test_along_gives_every_inner_product_at_once():
    model = network(4, 3)
    params = dict(model.named_parameters())
    v = {k: draw(*p.shape, seed=i) for i, (k, p) in enumerate(params.items())}

    def losses(p):
        return F.cross_entropy(functional_call(model, p, (TRAIN["input"],)), TRAIN["label"], reduction="none")

    each = [torch.autograd.grad(x, list(params.values()), retain_graph=True) for x in losses(params)]
    expected = torch.stack([sum((a * b).sum() for a, b in zip(g, v.values(), strict=True)) for g in each])
    torch.testing.assert_close(along(losses, params, v), expected)


def test_a_virtual_step_of_another_optimizer_is_refused():
    p = nn.Parameter(torch.ones(1))
    for optimizer in (torch.optim.Adagrad([p]), torch.optim.AdamW([p], amsgrad=True)):
        with pytest.raises(UserError, match="SGD, Adam and AdamW"):
            step(optimizer, [p], [torch.ones(1)])


# -- a whole run -------------------------------------------------------------------------------------------------------


def made(folder, cfg=TINY, data=None, student=STUDENT, teacher=None, **options):
    network = teacher or TEACHER.build(seed=3)
    run = Run(folder, quiet=True, device="cpu", log_every=1, **options)
    return distill(run, data or load("digits", limit=128), student, network, cfg)


def test_the_held_out_part_is_of_the_training_data_and_the_test_part_is_never_seen(tmp_path, monkeypatch):
    data = load("digits", limit=128)
    train, judge = parts(data, TINY, 0)
    ids = [set(s.take(np.arange(len(s)))["id"].tolist()) for s in (train, judge)]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == set(range(128)) and len(judge) == 13
    own = Data("own", train, data.test, held_out=judge)
    assert parts(own, TINY, 0) == (train, judge)
    monkeypatch.setattr(data.test, "take", lambda *a, **k: pytest.fail("the test part was read in training"))
    family = made(tmp_path, data=data)
    assert all(np.isfinite(r["held_out"]) for r in family.logs)


def test_without_the_teacher_it_is_plain_training_bit_for_bit(tmp_path):
    cfg = replace(TINY, alpha_student=0.0, influence="none", zero_heads=False)
    data = load("digits", limit=128)
    student = made(tmp_path / "a", cfg, data)["student"].model
    train = Data("rest", parts(data, cfg, 0)[0], data.test)
    run = Run(tmp_path / "b", quiet=True, device="cpu")
    other = plain.distill(run, train, STUDENT, TEACHER.build(seed=3), cfg.plain())["student"].model
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), other.parameters(), strict=True))


def test_the_influence_changes_the_run_and_is_logged(tmp_path):
    with_it, without = made(tmp_path / "a"), made(tmp_path / "b", replace(TINY, influence="none"))
    assert with_it.logs[-1]["influence"] > 0 and "influence" not in without.logs[-1]
    pairs = zip(with_it["student"].model.parameters(), without["student"].model.parameters(), strict=True)
    assert not all(torch.equal(p, q) for p, q in pairs)


def test_the_influence_of_each_sample(tmp_path):
    data = load("digits", limit=64)
    student, teacher = STUDENT.build(seed=1), TEACHER.build(seed=2)
    ids, found = helpful(student, teacher, data, TINY, seed=7)
    train, judge = parts(data, TINY, 7)
    assert ids.tolist() == list(range(len(train)))
    held, batch = judge.take(np.arange(len(judge))), train.take(ids.numpy())
    params = list(student.parameters())
    v = torch.autograd.grad(F.cross_entropy(student(held["input"]), held["label"]), params)
    p = teacher(batch["input"]).detach().softmax(-1)
    each = (p * (p.log() - student(batch["input"]).log_softmax(-1))).sum(-1)
    by_hand = [flat(torch.autograd.grad(e, params, retain_graph=True)) @ flat(v) for e in each]
    torch.testing.assert_close(found, torch.stack(by_hand), rtol=1e-4, atol=1e-6)
    few, _ = helpful(student, teacher, data, TINY, seed=7, most=10)
    assert len(few) <= 10


def test_the_saved_student_is_read_back(tmp_path):
    family = made(tmp_path)
    family.save(tmp_path)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(load_student(tmp_path / "students/student")(x), family["student"].model(x))


def test_the_digits_of_the_experiment():
    task = digits(0)
    assert (len(task.data.train), len(task.data.held_out), len(task.data.test)) == (300, 100, 539)
    ids = [set(s.take(np.arange(len(s)))["id"].tolist()) for s in (task.data.train, task.data.held_out)]
    assert not ids[0] & ids[1]


def test_a_transformer_teaches_one_with_another_vocabulary(tmp_path):
    words = [f"{a} {b}" for a in ("so", "very", "not", "hardly") for b in ("good", "bad", "dull", "fine", "odd")]
    rows = [{"text": w, "label": str(i % 2)} for i, w in enumerate(words)]
    tokenizers = {"input": small_tokenizer(words), "teacher": small_tokenizer(words, "char")}
    data = sentence_data({"train": rows}, "words", tokenizers=tokenizers, length=16)
    sizes = {"width": 8, "layers": 1, "heads": 2, "length": 16}
    student, large = (bert_spec(len(t), 2, **sizes) for t in tokenizers.values())
    teacher = large.build(seed=1)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, student, teacher, replace(TINY, batch=8))
    family.save(tmp_path)
    rows, _, _ = family.measure(data, tmp_path)
    assert [r.name for r in rows] == ["teacher", "student"]
    model = load_student(tmp_path / "students/student")
    x = data.test.take(np.arange(3))
    assert model(**x["input"]).logits.shape == (3, 2)
    _, influence = helpful(family["student"].model, teacher, data, TINY)
    assert influence.isfinite().all() and influence.abs().max() > 0


@pytest.mark.data
def test_sentences(tmp_path, data_root):
    flags = ["--data", "sst2", "--limit", "60", "--length", "16", "--width", "8", "--layers", "1", "--epochs", "1"]
    assert invoke(
        ["run", "lgtm", *flags, "--teacher", "bert", "--model", "bag", "--quiet", "--out", str(tmp_path / "x")]
    ) == 0  # fmt: skip
    ids = torch.ones(2, 4, dtype=torch.long)
    assert load_student(tmp_path / "x/students/student")(input_ids=ids, attention_mask=ids).shape == (2, 2)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"alpha_student": 1.2}, "alpha_student"), ({"alpha_teacher": -1.0}, "alpha_teacher"),
        ({"temperature": 0.0}, "temperature"), ({"radius": 0.0}, "radius"), ({"held_out": 1.0}, "held_out"),
        ({"strength": -1.0}, "strength"), ({"lr": -1.0}, "lr"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings, word):
    with pytest.raises(UserError, match=word):
        Config(**settings)


def test_networks_that_do_not_fit(tmp_path):
    one = STUDENT.build()
    cases = {
        r"student gives 4 logits.*10 classes": {"student": ModelSpec("stillhouse:mlp", 4, (1, 8, 8))},
        r"teacher 0 gives 4 logits.*10 classes": {"teacher": ModelSpec("stillhouse:mlp", 4, (1, 8, 8)).build()},
        r"student cannot take inputs of shape \(1, 8, 8\)": {
            "student": ModelSpec("torchvision:resnet18", 10, (3, 8, 8))
        },
        r"teacher 0 cannot take inputs": {"teacher": ModelSpec("torchvision:resnet18", 10, (3, 8, 8)).build()},
        r"share parameters": {"student": one, "teacher": one},
        r"teacher has no trainable parameter": {"teacher": TEACHER.build().requires_grad_(False)},
    }
    for k, (match, options) in enumerate(cases.items()):
        with pytest.raises(UserError, match=match):
            made(tmp_path / str(k), **options)
    assert not list(tmp_path.glob("*/stages"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["one --teacher", "0"]),
        (["--teacher", "stillhouse:mlp", "--teacher", "stillhouse:cnn"], ["one --teacher", "2"]),
        (["--teacher", "stillhouse:mlp", "--teacher-size", "16"], ["--teacher-size"]),
        (["--teacher", "stillhouse:mlp", "--influence", "some"], ["influence"]),
        (["--teacher", "stillhouse:mlp", "--held-out", "2"], ["held_out"]),
        (["--teacher", "stillhouse:mlp", "--radius", "0.1"], ["--radius does nothing", "autograd"]),
        (["--teacher", "x", "--influence", "none", "--derivative", "fd"], ["--derivative does", "--influence none"]),
        (["--teacher", "x", "--strength", "0", "--influence", "sgd"], ["--influence does", "--strength 0"]),
    ],
    ids=lambda v: " ".join(v)[:60],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = ["run", "lgtm", "--data", "digits", "--limit", "64", "--epochs", "1", "--quiet"]
    code = invoke([*common, *flags, "--out", str(tmp_path / "x")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said
