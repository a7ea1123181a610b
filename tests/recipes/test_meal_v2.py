"""MEAL V2: the card's exact checks, what reaches whom from the discriminator, and mistakes told before a step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

from stillhouse import objectives as O
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.data.cache import SignalCache
from stillhouse.errors import UserError
from stillhouse.files import read_json
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.outcomes import load as load_student
from stillhouse.recipes.meal_v2.experiment import NOISE, STUDENT, TINY, Noisy, few_digits
from stillhouse.recipes.meal_v2.recipe import Config, distill
from stillhouse.recipes.meal_v2.system import Discriminator, Meal, apart
from stillhouse.run import Run
from stillhouse.system import Clock, Signals
from stillhouse.teachers import Cached, Ensemble, Frozen, state_fingerprint
from stillhouse.text import bert_spec, sentence_data, small_tokenizer

MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [16]})
ROWS = [
    Row("meal_v2", "joint", {"discriminator": "joint", "label": 0.5}),
    Row("meal_v2", "cached crops", {"cache": 4, "crops": 2, "topk": 5}),
    Row("meal_v2", "cutmix", {"cutmix": 1.0, "label": 0.5}),
    Row("meal_v2", "trained already", {"student_epochs": 0.0, "teacher_epochs": 0.0, "discriminator": "none"}),
]
ZERO = [
    (Row("meal_v2", "push 0", {"push": 0.0}), Row("meal_v2", "no discriminator", {"discriminator": "none"})),
    (
        Row("meal_v2", "push 0, joint", {"push": 0.0, "discriminator": "joint"}),
        Row("meal_v2", "no discriminator", {"discriminator": "none"}),
    ),
]
JOINT = [  # the tiny teachers have batch norm, but as teachers they are in eval mode
    Row("meal_v2", f"mlp, {how}", {"discriminator": how, "teacher_epochs": 0.0}, {"student": MLP})
    for how in ("adversarial", "joint")
]

N, C = 6, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BATCH = {
    "input": draw(N, 4, seed=9),
    "label": torch.arange(N) % C,
    "id": torch.arange(N),
    "view": torch.zeros(N).long(),
}


def linear(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, C).double()


class Said:
    """A teacher whose mean probabilities and mean logits have nothing to do with each other."""

    def __init__(self, logits, mean_logits):
        self.says = Signals(logits=logits, mean_logits=mean_logits)

    def __call__(self, batch):
        return self.says


def meal(teacher=None, student=None, **settings):
    teacher = teacher or Ensemble([Frozen(linear(k)) for k in (1, 2, 3)], average="probabilities")
    return Meal(student or linear(0), teacher, Config(**settings), C).double()


def gradients(system):
    """Of the student's bias (= Σ_n ∂L/∂s_n) and of the discriminator."""
    system.zero_grad()
    system.learn(BATCH, Clock()).total.backward()
    of_d = [p.grad.clone() for p in system.discriminator.parameters()] if system.discriminator is not None else []
    return system.student.bias.grad.clone(), of_d


# -- the card's exact checks --------------------------------------------------------------------------------------


def test_one_teacher_that_is_the_student_gives_no_gradient():
    """(1) K = 1 and t = s ⇒ ∂L_kl = 0."""
    same = Ensemble([Frozen(linear(0))], average="probabilities")
    grad, _ = gradients(meal(same, discriminator="none"))
    assert grad.abs().max() < 1e-15
    assert gradients(meal(discriminator="none"))[0].abs().max() > 1e-3


def test_mean_probabilities_sum_to_one_and_are_less_sure_than_their_members():
    """(2) Σ q = 1 and H(q) ≥ mean_k H(softmax t^k), strictly where teachers differ."""
    members = [Frozen(linear(k)) for k in (1, 2, 3)]
    q = Ensemble(members, average="probabilities")(BATCH).logits.softmax(-1)
    each = torch.stack([m(BATCH).logits.softmax(-1) for m in members])
    torch.testing.assert_close(q, each.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(q.sum(-1), torch.ones(N, dtype=q.dtype))
    gap = torch.special.entr(q).sum(-1) - torch.special.entr(each).sum(-1).mean(0)
    assert (gap > 1e-3).all()


def test_probabilities_are_averaged_for_the_target_and_logits_for_the_discriminator():
    members = [Frozen(linear(k)) for k in (1, 2, 3)]
    said = Ensemble(members, average="probabilities")(BATCH)
    torch.testing.assert_close(said.mean_logits, torch.stack([m(BATCH).logits for m in members]).mean(0))
    weighted = Ensemble(members[:2], [3, 1], "probabilities")(BATCH).mean_logits
    torch.testing.assert_close(weighted, 0.75 * members[0](BATCH).logits + 0.25 * members[1](BATCH).logits)
    q, t = draw(N, C, seed=3).log_softmax(-1), draw(N, C, seed=4)
    system = meal(Said(q, t), label=0.0)
    s = system.student(BATCH["input"])
    terms = system.learn(BATCH, Clock()).terms
    assert sorted(terms) == ["discriminator", "soft"]
    torch.testing.assert_close(terms["soft"], -(q.exp() * s.log_softmax(-1)).sum(-1).mean())
    rows = system.discriminator(torch.cat([s, t]))
    targets = torch.tensor([[1.0, 0.0]] * N + [[0.0, 1.0]] * N, dtype=torch.float64)
    torch.testing.assert_close(terms["discriminator"], F.binary_cross_entropy_with_logits(rows, targets))


def test_gradient_of_the_soft_loss_by_hand():
    """(3) ∂L_kl/∂s = (softmax(s) − q)/n, through the bias its sum over the batch."""
    system = meal(discriminator="none")
    q = system.teacher(BATCH).logits.softmax(-1)
    by_hand = (system.student(BATCH["input"]).softmax(-1) - q).mean(0)
    torch.testing.assert_close(gradients(system)[0], by_hand, rtol=1e-12, atol=1e-14)


def test_teachers_have_the_same_bytes_after_an_epoch(tmp_path):
    """(4) parameters and batch-norm statistics; the student's own statistics do move."""
    spec = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, 8]})
    teachers = [spec.build(seed=k).train() for k in (1, 2)]
    student = spec.build(seed=0)
    before, statistics = [state_fingerprint(t) for t in teachers], student.block1[1].running_mean.clone()
    cfg = replace(TINY, epochs=1, student_epochs=0.0, teacher_epochs=0.0)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), few_digits(0, 96), student, teachers, cfg)
    assert [state_fingerprint(t) for t in teachers] == before
    assert not torch.equal(family["student"].model.block1[1].running_mean, statistics)


def test_swapped_rows_with_swapped_targets_are_the_same_loss():
    """(5) … and swapped rows alone are not."""
    a, b = draw(N, 2, seed=1), draw(N, 2, seed=2)
    swapped = O.discrimination(b.flip(-1), a.flip(-1))  # (0, 1) for what now stands first
    torch.testing.assert_close(O.discrimination(a, b), swapped)
    assert not torch.allclose(O.discrimination(a, b).mean(), O.discrimination(b, a).mean())
    for order in (torch.arange(2 * N), torch.arange(2 * N).roll(N)):  # the stacked form, in either order of the halves
        targets = torch.tensor([[1.0, 0.0]] * N + [[0.0, 1.0]] * N, dtype=torch.float64)
        stacked = F.binary_cross_entropy_with_logits(torch.cat([a, b])[order], targets[order])
        torch.testing.assert_close(O.discrimination(a, b).mean(), stacked)


def test_a_shortened_answer_sums_to_one_and_keeps_what_was_stored(tmp_path):
    """(6) top-k values are exact, the rest is spread evenly."""
    data = load("digits", limit=20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3)]
    teacher = Ensemble([Frozen(n) for n in nets], average="probabilities")
    who = {"teacher_fingerprint": teacher.fingerprint, "data_fingerprint": data.train.fingerprint}
    cache = SignalCache.create(tmp_path, **who, n=20, classes=10, views=0, topk=5, dtype="float32")
    cache.fill(teacher, data.train)
    batch = data.train.take(np.arange(20))
    told, q = Cached(cache)(batch).logits.exp(), teacher(batch).logits.exp()
    torch.testing.assert_close(told.sum(-1), torch.ones(20), rtol=1e-6, atol=1e-6)
    top = q.topk(5, -1)
    torch.testing.assert_close(told.gather(-1, top.indices), top.values, rtol=1e-5, atol=1e-7)
    rest = told.scatter(-1, top.indices, 0.0)
    expected = ((1 - top.values.sum(-1, keepdim=True)) / 5).expand(-1, 10).scatter(-1, top.indices, 0.0)
    torch.testing.assert_close(rest, expected, rtol=1e-4, atol=1e-6)


# -- the discriminator --------------------------------------------------------------------------------------------


def test_adversarial_reverses_what_the_student_gets_and_nothing_else():
    """Same loss, same gradient of D; the student's part has the other sign and scales with push."""
    teacher = Said(draw(N, C, seed=3).log_softmax(-1), draw(N, C, seed=4))
    soft, _ = gradients(meal(teacher, discriminator="none"))
    of_student, of_d = {}, {}
    for how in ("joint", "adversarial"):
        for push in (1.0, 2.5, 0.0):
            grad, of_d[how, push] = gradients(meal(teacher, discriminator=how, push=push, last_relu=False))
            of_student[how, push] = grad - soft
    assert of_student["joint", 1.0].abs().max() > 1e-5
    torch.testing.assert_close(of_student["adversarial", 1.0], -of_student["joint", 1.0])
    torch.testing.assert_close(of_student["joint", 2.5], 2.5 * of_student["joint", 1.0])
    assert of_student["adversarial", 0.0].abs().max() == 0
    first = of_d["joint", 1.0]
    assert max(g.abs().max() for g in first) > 1e-5
    for grads in of_d.values():
        assert all(torch.equal(a, b) for a, b in zip(grads, first, strict=True))


def test_joint_gradient_at_the_logits_is_that_of_the_loss_itself():
    teacher = Said(draw(N, C, seed=3).log_softmax(-1), draw(N, C, seed=4))
    system = meal(teacher, discriminator="joint", last_relu=False)
    s = draw(N, C, seed=5).requires_grad_()
    O.discrimination(*system.scores(s, teacher.says)).mean().backward()
    free = s.detach().clone().requires_grad_()
    rows = system.discriminator(torch.cat([free, teacher.says.mean_logits]))
    targets = torch.tensor([[1.0, 0.0]] * N + [[0.0, 1.0]] * N, dtype=torch.float64)
    F.binary_cross_entropy_with_logits(rows, targets).backward()
    assert s.grad.abs().max() > 1e-5
    torch.testing.assert_close(s.grad, free.grad)


def test_descending_against_the_discriminator_hides_the_student():
    """A fixed D, a free s: reversed steps raise L_d, joint ones lower it."""
    for how, rises in (("adversarial", True), ("joint", False)):
        teacher = Said(draw(N, C, seed=3).log_softmax(-1), draw(N, C, seed=4))
        system, s = meal(teacher, discriminator=how, last_relu=False), draw(N, C, seed=5).requires_grad_()
        losses = []
        for _ in range(5):
            loss = O.discrimination(*system.scores(s, teacher.says)).mean()
            losses.append(float(loss.detach()))
            (grad,) = torch.autograd.grad(loss, s)
            s = (s - 0.5 * grad).detach().requires_grad_()
        assert (losses[-1] > losses[0]) is rises


def test_the_last_relu_bounds_the_loss():
    """With outputs >= 0 every zero target costs at least log 2: L_d >= log(2)/2. Without it L_d can vanish."""
    sure = torch.tensor([[50.0, -50.0]] * N), torch.tensor([[-50.0, 50.0]] * N)
    assert O.discrimination(*sure).max() < 1e-20
    assert O.discrimination(*(t.relu() for t in sure)).min() >= math.log(2) / 2
    assert isinstance(Discriminator(10)[-1], nn.ReLU) and isinstance(Discriminator(10, 8, False)[-1], nn.Linear)


def test_widths_of_the_discriminator():
    def widths(classes, **k):
        return [m.out_features for m in Discriminator(classes, **k) if isinstance(m, nn.Linear)]

    assert widths(1000) == [125, 15, 2] and widths(10) == [8, 8, 2] and widths(10, narrowest=1) == [1, 1, 2]


def test_cached_answers_show_probabilities_to_the_discriminator():
    q = draw(N, C, seed=3).log_softmax(-1)
    system, s = meal(discriminator="joint"), draw(N, C, seed=5)
    mine, theirs = system.scores(s, Signals(logits=q))
    torch.testing.assert_close(mine, system.discriminator(s.softmax(-1)))
    torch.testing.assert_close(theirs, system.discriminator(q.exp()))


# -- labels, views, caches ----------------------------------------------------------------------------------------


def small(folder, data, cfg, seed=0):
    spec = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, 8]})
    student, teachers = STUDENT.build(seed=7), [spec.build(seed=k) for k in (1, 2)]
    return distill(Run(folder, quiet=True, device="cpu", seed=seed), data, student, teachers, cfg)["student"].model


UNTAUGHT = replace(TINY, student_epochs=0.0, teacher_epochs=0.0, epochs=2.0)


def test_labels_teach_nothing(tmp_path):
    """Other labels, the same student; with a label weight another one."""

    class Wrong(Noisy):
        def take(self, ids, **k):
            batch = super().take(ids, **k)
            return {**batch, "label": 9 - batch["label"]}

    right = few_digits(0, 96)
    wrong = replace(right, train=Wrong(right.train.parent, NOISE))
    for label in (0.0, 0.5):
        cfg = replace(UNTAUGHT, label=label)
        made = [state_fingerprint(small(tmp_path / f"{k}{label}", d, cfg)) for k, d in enumerate((right, wrong))]
        assert (made[0] == made[1]) is (label == 0)


def test_answers_cached_per_view_are_the_live_ones_and_those_of_the_clean_image_are_not(tmp_path):
    cfg = replace(UNTAUGHT, discriminator="none")
    live, kept, clean = (
        small(tmp_path / str(c), few_digits(0, 96), replace(cfg, cache=c)).head.weight.detach() for c in (-1, 2, 0)
    )
    torch.testing.assert_close(kept, live, rtol=1e-4, atol=1e-6)
    assert (clean - live).abs().max() > 1e-4


def test_crops_become_samples_with_their_own_view():
    batch = {
        "input": draw(2, 3, 4),
        "label": torch.tensor([4, 1]),
        "id": torch.tensor([7, 8]),
        "view": torch.tensor([5, 5]),
    }
    flat = apart(batch, 3)
    assert torch.equal(flat["input"][4], batch["input"][1, 1])
    assert flat["label"].tolist() == [4, 4, 4, 1, 1, 1] and flat["id"].tolist() == [7, 7, 7, 8, 8, 8]
    assert flat["view"].tolist() == [15, 16, 17, 15, 16, 17]
    assert apart(batch, 1) is batch


def test_noise_is_a_function_of_the_view_alone():
    s = few_digits(0, 50).train
    one, many = s.take(np.array([3]), view=2, seed=1), s.take(np.arange(5), view=2, seed=1)
    assert torch.equal(one["input"][0], many["input"][3])
    assert not torch.equal(one["input"], s.take(np.array([3]), view=3, seed=1)["input"])
    assert torch.equal(s.take(np.array([3]))["input"], s.parent.take(np.array([3]))["input"])
    spread = (many["input"] - s.parent.take(np.arange(5))["input"]).std()
    assert abs(float(spread) - NOISE) < 0.1 * NOISE


def test_one_step_for_both_at_a_rate_that_falls_once():
    """The released settings: SGD with momentum 0.9, no weight decay, a tenth of the rate after 100 of 180 epochs."""
    system = meal()
    (update,) = system.updates()
    optimizer = update.optimizer(update.params)
    assert {id(p) for p in update.params} == {id(p) for p in system.parameters()}
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 0.0)
    rates = [update.lr(Clock(step=s, steps=180)) for s in (0, 99, 100, 179)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1])


# -- a user's own -------------------------------------------------------------------------------------------------


def test_a_saved_student_is_fine_tuned_and_reloads(tmp_path, capsys):
    """Student and teachers from folders of other runs; the result stands in a folder like theirs."""
    family = small_family(tmp_path)
    flags = ["--model", str(tmp_path / "s/students/student"), "--teacher", str(tmp_path / "s/students/student")]
    run = ["run", "meal_v2", "--data", "digits", "--limit", "64", "--epochs", "1", "--batch", "32", "--quiet"]
    assert invoke([*run, *flags, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "student" in shown and (tmp_path / "out/students/student/plan.json").exists()
    again = load_student(tmp_path / "out/students/student")
    assert type(again) is type(family["student"].model) and not again.training


def test_teachers_are_reported_as_they_are_asked(tmp_path):
    """A teacher of another size can read the data only when resized; the base is the mean of all."""
    sizes, data = {"options": {"widths": [16]}}, few_digits(0, 64)
    large = [ModelSpec("stillhouse:mlp", 10, (1, 12, 12), **sizes) for _ in range(2)]
    teachers = [spec.build(seed=k) for k, spec in enumerate(large)]
    family = distill(Run(tmp_path / "a", quiet=True, device="cpu"), data, MLP, teachers, UNTAUGHT, resize=12)
    x = data.test.take(np.arange(7))["input"]
    asked = torch.stack([Frozen(t, resize=12)({"input": x}).logits.softmax(-1) for t in teachers]).mean(0)
    torch.testing.assert_close(family.base(x).softmax(-1), asked)
    assert family.base_name == "mean of the teachers"
    Models([Member("t", teachers[0], spec=large[0])], torch.zeros(1, 1, 12, 12)).save(tmp_path / "t")
    flags = ["--teacher", str(tmp_path / "t/students/t"), "--teacher-size", "12", "--student-epochs", "1"]
    run = ["run", "meal_v2", "--data", "digits", "--limit", "64", "--model", "stillhouse:mlp", "--epochs", "1"]
    assert invoke([*run, *flags, "--batch", "32", "--quiet", "--out", str(tmp_path / "out")]) == 0
    report = read_json(tmp_path / "out/report.json")
    (told,) = [row for row in report["tables"][0]["rows"] if row[0] == "teacher 0"]
    assert f"{100 * report['students'][0]['metrics']['accuracy']:.2f}" == told[1]


def test_sentences(tmp_path):
    words = [f"{a} {b}" for a in ("so", "very", "not", "hardly") for b in ("good", "bad", "dull", "fine", "odd")]
    rows = [{"text": w, "label": str(i % 2)} for i, w in enumerate(words)]
    tokenizers = {"input": small_tokenizer(words), "teacher": small_tokenizer(words, "char")}
    data = sentence_data({"train": rows}, "words", tokenizers=tokenizers, length=16)
    student, teacher = (bert_spec(len(t), 2, width=8, layers=1, heads=2, length=16) for t in tokenizers.values())
    cfg = replace(UNTAUGHT, cache=0, batch=8)
    teachers = [teacher.build(seed=k) for k in (1, 2)]
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, student, teachers, cfg)
    family.save(tmp_path)
    rows, _, _ = family.measure(data, tmp_path)
    assert [r.name for r in rows] == ["mean of the teachers", "student"]
    with pytest.raises(UserError, match="are of images"):
        distill(Run(tmp_path / "b", quiet=True), data, student, teachers, replace(cfg, cache=-1, cutmix=1.0))


def small_family(tmp_path):
    family = distill(
        Run(tmp_path / "s", quiet=True, device="cpu"), few_digits(0, 96), MLP, [MLP.build(seed=1)], UNTAUGHT
    )
    family.save(tmp_path / "s")
    return family


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--teacher is missing"]),
        (["--teacher", "stillhouse:cnn", "--teacher-epochs", "1"], ["stillhouse:mlp", "no trained weights"]),
        (["--discriminator", "both"], ["adversarial", "joint"]),
        (["--topk", "5"], ["topk", "--cache"]),
        (["--crops", "3", "--batch", "64"], ["multiples of crops"]),
        (["--soft", "0"], ["nothing to learn"]),
        (["--cutmix", "1", "--cache", "0"], ["cutmix", "cache -1"]),
        (["--drop", "1"], ["0 < drop < 1"]),
        (["--discriminator", "none", "--push", "2"], ["--push does nothing", "--discriminator none"]),
        (["--teacher", "runs/nowhere"], ["--teacher runs/nowhere", "plan.json", "RUN/students/NAME"]),
        (["--teacher", "stillhouse:cnn", "--teacher-epochs", "1", "--teacher-size", "9"], ["--teacher-size"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = ["run", "meal_v2", "--model", "stillhouse:mlp", "--data", "digits", "--limit", "64", "--quiet"]
    assert invoke([*common, *flags, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and all(w in said for w in words), said


def test_teachers_are_checked_before_anything_is_trained(tmp_path):
    run, data, net = Run(tmp_path, quiet=True, device="cpu"), few_digits(0, 64), MLP.build()
    with pytest.raises(UserError, match=r"teacher 0 gives 4 logits.*10 classes"):
        distill(run, data, MLP, [replace(MLP, classes=4).build()], UNTAUGHT)
    with pytest.raises(UserError, match="not the student itself"):
        distill(run, data, net, [net], UNTAUGHT)
    with pytest.raises(UserError, match="got 0"):
        distill(run, data, net, [], UNTAUGHT)
    with pytest.raises(UserError, match="two scores"):
        O.discrimination(torch.zeros(3, 2), torch.zeros(3, 3))
