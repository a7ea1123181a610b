"""SSLD: the card's exact checks of its loss, its miner and its teacher, and mistakes told before a step."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from table import Row
from torch import nn

from stillhouse import objectives as O
from stillhouse.cli import invoke
from stillhouse.data import Arrays
from stillhouse.data.mining import mine, nearest, signatures, top_per_class
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, predict
from stillhouse.files import read_json
from stillhouse.models import ModelSpec
from stillhouse.outcomes import load as load_student
from stillhouse.recipes.ssld.experiment import TINY, digits
from stillhouse.recipes.ssld.recipe import OBJECTIVES, Config, LabelFree, distill
from stillhouse.recipes.ssld.size import LastLayer
from stillhouse.run import Run
from stillhouse.system import Clock, Signals
from stillhouse.teachers import Frozen, state_fingerprint
from stillhouse.weights import by_module

CNN = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, 8]})
ROWS = [
    Row("ssld", "labels", {"finetune": "labels", "objective": "ce", "stage_lr": ("1=0.1",)}),
    Row("ssld", "eval", {"finetune": "none", "batch_statistics": False, "objective": "js", "teacher_epochs": 0.0}),
    Row("ssld", "batch norm on both sides", {"teacher_epochs": 0.0}, {"student": CNN}),
    Row("ssld", "another size", {"finetune": "labels", "fix_epochs": 1.0}, {"student": CNN, "size": 12}),
]
JOINT = [Row("ssld", "mlp", {"batch_statistics": False, "teacher_epochs": 0.0})]

N, C = 7, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


T, S = draw(N, C, seed=1) * 2, draw(N, C, seed=2) * 2


# -- the loss (the card's exact checks 1 to 4) --------------------------------------------------------------------


def system(objective="symmetric", teacher=T):
    class Said:
        def __call__(self, batch):
            return Signals(logits=teacher)

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(S.clone())

        def forward(self, x):
            return self.s

    return LabelFree(Free(), Said(), objectives=[OBJECTIVES[objective]], label=0.0)


BATCH = {"input": torch.zeros(N, 1, dtype=torch.float64), "label": torch.full((N,), -1)}


def loss(objective="symmetric", teacher=T):
    return system(objective, teacher).learn(BATCH, Clock()).total


def test_it_is_zero_only_where_both_agree_and_symmetric():
    """(1)"""
    assert O.symmetric_kl(S, S).abs().max() < 1e-15
    assert O.symmetric_kl(T, S).min() > 1e-3
    torch.testing.assert_close(O.symmetric_kl(T, S), O.symmetric_kl(S, T))
    P, Q = S.softmax(-1), T.softmax(-1)
    by_hand = 0.5 * ((Q * (Q / P).log()).sum(-1) + (P * (P / Q).log()).sum(-1)).mean()
    torch.testing.assert_close(loss(), by_hand)


def test_gradient_by_hand():
    """(2) ½[(P − Q) + P∘(r − ⟨P, r⟩)]/n, r = log P − log Q; none to the teacher."""
    teacher = T.clone().requires_grad_()
    made = system(teacher=teacher)
    made.learn(BATCH, Clock()).total.backward()
    P, Q = S.softmax(-1), T.softmax(-1)
    r = P.log() - Q.log()
    by_hand = 0.5 * ((P - Q) + P * (r - (P * r).sum(-1, keepdim=True))) / N
    torch.testing.assert_close(made.student.s.grad, by_hand, rtol=1e-10, atol=1e-14)
    assert teacher.grad is None


def test_it_is_not_the_jensen_shannon_divergence():
    """(3) half Jeffreys >= 2 JS; JS is bounded by log 2 and half Jeffreys is not."""
    for k in range(20):
        t, s = draw(50, C, seed=2 * k) * k, draw(50, C, seed=2 * k + 1) * k
        assert (O.symmetric_kl(t, s) - 2 * O.jensen_shannon(t, s)).min() > -1e-12
    far = torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 30.0]])
    assert float(O.jensen_shannon(*far)) <= math.log(2) + 1e-6 < float(O.symmetric_kl(*far))
    assert len({round(float(loss(o).detach()), 6) for o in OBJECTIVES}) == 3
    torch.testing.assert_close(loss("js"), O.jensen_shannon(T, S).mean())
    P, Q = S.softmax(-1), T.softmax(-1)
    entropy = torch.special.entr(Q).sum(-1).mean()
    torch.testing.assert_close(loss("ce") + entropy, -(Q * P.log()).sum(-1).mean())


def test_shifts_do_not_matter():
    """(4) a constant added to s or to t."""
    shift = draw(N, 1, seed=3) * 10
    torch.testing.assert_close(O.symmetric_kl(T + shift, S), O.symmetric_kl(T, S))
    torch.testing.assert_close(O.symmetric_kl(T, S + shift), O.symmetric_kl(T, S))


def test_sure_half_precision_logits_stay_finite():
    t, s = torch.tensor([[40.0, 0.0]]).half(), torch.tensor([[0.0, 40.0]]).half()
    assert torch.isfinite(O.symmetric_kl(t, s)).all() and abs(float(O.symmetric_kl(t, s)) - 40) < 0.1


def test_no_label_is_read():
    other = {**BATCH, "label": torch.arange(N) % C}
    assert torch.equal(system().learn(other, Clock()).total, loss())
    assert system().learn(other, Clock()).notes == {}


# -- the miner (5) ------------------------------------------------------------------------------------------------


def test_the_surest_of_every_class():
    logits = draw(200, C, seed=4)
    score, best = logits.softmax(-1).max(-1)
    for k in (1, 7, 1000, 0):
        chosen = top_per_class(logits, k)
        assert len(set(chosen.tolist())) == len(chosen)
        assert best[chosen].tolist() == sorted(best[chosen].tolist())
        for c in range(C):
            mine_, every = score[chosen][best[chosen] == c], score[best == c].sort(descending=True).values
            torch.testing.assert_close(mine_, every[: k or None], rtol=0, atol=0)
    assert torch.equal(top_per_class(torch.zeros(4, 3), 2), torch.tensor([0, 1]))  # ties: in order


def images(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 1, 12, 12)).astype(np.float32)


class ByMean:
    """A teacher whose class is a function of the image."""

    def __call__(self, batch):
        x = batch["input"].flatten(1)
        return Signals(logits=torch.stack([x[:, :72].mean(1), x[:, 72:].mean(1)], -1) * 20)


def test_nothing_within_the_radius_of_the_test_set_is_kept():
    test, fresh = images(30, 0), images(60, 1)
    copies = [test[3] * 1.7 + 0.4, test[9] + 0.01 * images(1, 5)[0], test[20]]  # brighter, slightly noisy, the same
    pool = Arrays(np.concatenate([fresh[:40], np.stack(copies), fresh[40:]]), np.zeros(63, int), classes=("a", "b"))
    judge = Arrays(test, np.zeros(30, int), classes=("a", "b"))
    found = mine(ByMean(), pool, 12, against=[judge], radius=0.01)
    assert found.copies == 3 and not {40, 41, 42} & set(found.positions.tolist())
    assert nearest(signatures(pool), signatures(judge))[found.positions].min() > 0.01
    assert max(np.bincount(found.classes)) <= 12 and len(found.positions) <= 24
    logits = ByMean()(pool.take(found.positions)).logits
    assert (logits.argmax(-1).numpy() == found.classes).all()
    np.testing.assert_allclose(logits.double().softmax(-1).max(-1).values.numpy(), found.scores)
    for c in (0, 1):
        assert (np.diff(found.scores[found.classes == c]) <= 0).all()
    everything = mine(ByMean(), pool, against=[judge], radius=-1)
    assert len(everything.positions) == 63 and everything.copies == 0


def test_distances_are_the_smallest_cosine_distances():
    a, b = (torch.nn.functional.normalize(draw(n, 6, seed=n), dim=1) for n in (11, 9))
    by_hand = torch.stack([torch.stack([1 - (x * y).sum() for y in b]).min() for x in a])
    torch.testing.assert_close(nearest(a, b, block=4), by_hand)


def test_an_empty_or_emptied_pool_is_an_error():
    pool = Arrays(images(5, 0), np.zeros(5, int), classes=("a", "b"))
    with pytest.raises(UserError, match="lower the radius"):
        mine(ByMean(), pool, against=[pool])
    with pytest.raises(UserError, match="empty"):
        mine(ByMean(), Arrays(images(0, 0), np.zeros(0, int), classes=("a", "b")))


# -- the teacher (6) ----------------------------------------------------------------------------------------------


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 4))


def test_a_teacher_with_batch_statistics():
    """Weights unchanged; statistics move on a private copy only, and not at all in eval mode; dropout stays off."""
    net, x = network(), {"input": 3 * draw(16, 1, 8, 8).float() + 1}
    before = state_fingerprint(net)
    plain, batch = Frozen(net), Frozen(net, batch_statistics=True)
    first = batch(x).logits
    assert torch.equal(batch(x).logits, first)  # no dropout, and the answer does not depend on what moved
    own = batch._model
    assert own is not net and not torch.equal(own[1].running_mean, net[1].running_mean)
    assert batch.unchanged() and plain.unchanged() and state_fingerprint(net) == before
    plain(x)
    assert plain.unchanged() and state_fingerprint(net) == before
    by_hand = copy.deepcopy(net)
    by_hand[1].train()
    torch.testing.assert_close(first, by_hand(x["input"]))
    assert not torch.allclose(first, plain(x).logits)
    half = {"input": x["input"][:8]}
    assert not torch.allclose(batch(half).logits, first[:8]) and torch.allclose(plain(half).logits, plain(x).logits[:8])
    assert plain.fingerprint != batch.fingerprint
    with torch.no_grad():
        own[0].weight[0, 0, 0, 0] += 1
    assert not batch.unchanged()


def test_the_users_teacher_keeps_its_bytes_in_a_run(tmp_path):
    data, pool = digits(0, 300)
    teacher = CNN.build(seed=3).train()
    before = state_fingerprint(teacher)
    cfg = replace(TINY, teacher_epochs=0.0)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, CNN, teacher, pool, cfg)
    assert state_fingerprint(teacher) == before and family.cost["images"] > 150
    kept = read_json(tmp_path / "pool.json")
    assert max(np.bincount(kept["class"])) <= 8 and family.cost["images"] == 150 + len(kept["position"])


# -- phases -------------------------------------------------------------------------------------------------------


def test_steps_do_not_depend_on_the_size_of_the_pool(tmp_path):
    for n in (150, 300):
        data, pool = digits(0, n)
        cfg = replace(TINY, steps=5, teacher_epochs=0.0, finetune="none")
        run = Run(tmp_path / str(n), quiet=True, device="cpu", log_every=1)
        family = distill(run, data, CNN, CNN.build(seed=3), pool, cfg)
        assert family.cost["steps"] == 5 and len(run.log("label-free")) == 5 and not run.log("fine-tune")


def test_phase_two_sees_labelled_images_alone_at_a_hundredth_of_the_rate(tmp_path):
    data, pool = digits(0, 300)
    taught, labels = {}, {}
    for how in ("teacher", "labels"):
        run = Run(tmp_path / how, quiet=True, device="cpu", log_every=1)
        cfg = replace(TINY, teacher_epochs=0.0, finetune=how, finetune_epochs=1.0)
        distill(run, data, CNN, CNN.build(seed=3), pool, cfg)
        taught[how], labels[how] = run.log("label-free"), run.log("fine-tune")
        assert len(labels[how]) == 150 // 32
    assert taught["teacher"] == taught["labels"]
    assert "label" in labels["labels"][0] and "symmetric" in labels["teacher"][0]


def test_the_rate_of_phase_two_is_a_part_of_phase_ones(tmp_path):
    data, pool = digits(0, 300)
    spec, made = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [10]}), {}
    how = {"none": {"finetune": "none"}, "still": {"finetune_lr": 1e-9}, "fast": {"finetune_lr": 1.0}}
    for name, changes in how.items():
        run = Run(tmp_path / name, quiet=True, device="cpu")
        cfg = replace(TINY, teacher_epochs=0.0, **changes)
        made[name] = distill(run, data, spec, CNN.build(seed=3), pool, cfg)["student"].model[1].weight.detach()
    assert Config().finetune_lr == 0.01
    torch.testing.assert_close(made["still"], made["none"], rtol=0, atol=1e-7)
    assert (made["fast"] - made["none"]).abs().max() > 1e-4


def test_the_teacher_of_a_run_uses_the_statistics_of_the_batch_where_asked(tmp_path):
    data, _ = digits(0, 150)
    found = []
    for asked in (True, False):
        cfg = replace(TINY, teacher_epochs=0.0, batch_statistics=asked, finetune="none", lr=1e-9, weight_decay=0.0)
        run = Run(tmp_path / str(asked), quiet=True, device="cpu", log_every=1)
        student, teacher = CNN.build(seed=1).eval(), CNN.build(seed=3)
        distill(run, data, student, teacher, None, cfg)
        found.append([row["symmetric"] for row in run.log("label-free")])
    assert len(found[0]) == len(found[1]) > 1 and all(abs(a - b) > 1e-4 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("finetune", ["teacher", "labels", "none"])
def test_the_last_layer_alone_is_tuned_to_another_size(tmp_path, finetune):
    """What is before it keeps its bytes, batch-norm statistics too; images are seen as in a test, without changes."""
    (data, pool), (larger, _) = digits(0, 300), digits(0, 150, 12)
    larger = replace(larger, train=watched(larger.train))
    cfg = replace(TINY, teacher_epochs=0.0, finetune=finetune, fix_epochs=3.0, lr=0.5, fix_lr=0.1, weight_decay=0.1)
    before, after = (CNN.build(seed=1) for _ in range(2))
    teacher = CNN.build(seed=3)
    distill(Run(tmp_path / "a", quiet=True, device="cpu"), data, before, teacher, pool, cfg)
    run = Run(tmp_path / "b", quiet=True, device="cpu", log_every=1)
    family = distill(run, data, after, teacher, pool, cfg, larger=larger)
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]) is not name.startswith("head"), name
    assert all(p.requires_grad for p in after.parameters())
    assert family.shape == (1, 12, 12) and "12 × 12 pixels" in family.notes[-1] and "'head'" in family.notes[-1]
    rows = run.log("fix")
    assert len(rows) == 3 * (150 // 32) and ("label" in rows[0]) is (finetune == "labels")
    accuracy = classification(*predict(before, larger.test))["accuracy"]
    assert f"{accuracy:.1%} right before" in family.notes[-1]


def watched(part):
    """The same images, which would be shifted and mirrored if they were asked for a view."""
    x = part.take(np.arange(len(part)))["input"].numpy()

    class Watched(Arrays):
        def take(self, ids, *, view=None, seed=0):
            assert view is None
            return super().take(ids, view=view, seed=seed)

    return Watched(x, part.labels, classes=part.classes, augment="crop-flip")


def test_the_step_for_another_size_by_hand():
    """One step of SGD on the head: only its gradient of the mean loss, at features of a network in eval mode."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, C)).double()
    with torch.no_grad():
        net[1].running_mean.copy_(draw(4))
    x, before = draw(N, 3, seed=8), copy.deepcopy(net).eval()
    fixed = LastLayer(net, "3").train()

    class Said:
        def __call__(self, batch):
            return Signals(logits=T)

    learner = LabelFree(fixed, Said(), objectives=[OBJECTIVES["symmetric"]], label=0.0)
    (update,) = learner.updates()
    assert [p.shape for p in update.params] == [net[3].weight.shape, net[3].bias.shape]
    learner.train()
    learner.learn({"input": x, "label": BATCH["label"]}, Clock()).total.backward()
    h = before[:3](x)
    s = before[3](h).detach().requires_grad_()
    O.symmetric_kl(T, s).mean().backward()
    torch.testing.assert_close(net[3].weight.grad, s.grad.T @ h)
    assert torch.equal(net[1].running_mean, before[1].running_mean) and net[0].weight.grad is None


def test_a_teacher_of_another_size_is_measured_as_it_is_asked(tmp_path):
    data, pool = digits(0, 200)
    teacher = ModelSpec("stillhouse:mlp", 10, (1, 12, 12), options={"widths": [16]}).build(seed=3)
    cfg = replace(TINY, teacher_epochs=0.0, batch_statistics=False)
    student = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [10]}).build(seed=1)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, student, teacher, pool, cfg, resize=12)
    x = data.test.take(np.arange(5))["input"]
    torch.testing.assert_close(family.base(x), Frozen(teacher, resize=12)({"input": x}).logits)
    family.save(tmp_path)
    assert family.measure(data, tmp_path)[0][0].name == "teacher"
    assert read_json(tmp_path / "students/student/plan.json")["base"]["class"] == "MLP"


def test_learning_rates_by_module():
    """Deeper paths go before those above them; what is not named keeps its rate; factor 0 does not move."""
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    build = by_module(net, {"0": 0.5, "0.1": 0.0}, partial(torch.optim.SGD, lr=1.0))
    optimizer = build(list(net.parameters()))
    before = copy.deepcopy(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    pairs = [(net[0][0], before[0][0]), (net[0][1], before[0][1]), (net[1], before[1])]
    moved = [float((old.weight - new.weight).detach().mean()) for new, old in pairs]
    assert moved == pytest.approx([0.5, 0.0, 1.0])
    with pytest.raises(UserError, match="block9"):
        by_module(net, {"block9": 1.0}, torch.optim.SGD)


# -- a user's own -------------------------------------------------------------------------------------------------


def test_a_folder_of_photos_is_a_pool(tmp_path, capsys):
    g = np.random.default_rng(0)
    for k in range(24):
        for home in (f"data/{'ab'[k % 2]}", "photos/some/where"):
            (tmp_path / home).mkdir(parents=True, exist_ok=True)
            pixels = g.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / home / f"{k}.png")
    same = sorted((tmp_path / "data").rglob("*.png"))
    for path in same:  # every labelled and test image stands in the pool too
        (tmp_path / "photos" / f"copy{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    flags = ["--data", f"folder:{tmp_path}/data", "--pool", f"folder:{tmp_path}/photos", "--teacher", "stillhouse:cnn"]
    settings = ["--teacher-epochs", "1", "--epochs", "1", "--finetune-epochs", "1", "--batch", "8"]
    assert invoke(["run", "ssld", *flags, *settings, "--quiet", "--out", str(tmp_path / "out")]) == 0
    kept = read_json(tmp_path / "out/pool.json")
    assert kept["copies"] == 5 and len(kept["position"]) == 43  # a fifth of 24 images was set apart for the test
    assert (tmp_path / "out/students/student/model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--teacher", "expected one", "got 0"]),
        (["--teacher", "stillhouse:cnn", "stillhouse:mlp", "--teacher-epochs", "1"], ["expected one", "got 2"]),
        (["--teacher", "stillhouse:cnn", "--teacher-epochs", "1", "--pool", "folder:/nowhere"], ["/nowhere"]),
        (["--teacher", "stillhouse:cnn", "--teacher-epochs", "1", "--stage-lr", "block9=1"], ["block9", "block1"]),
        (["--stage-lr", "layer1"], ["MODULE=FACTOR"]),
        (["--finetune", "none", "--stage-lr", "head=1"], ["--stage-lr does nothing", "--finetune none"]),
        (["--teacher", "stillhouse:cnn", "--per-class", "9"], ["--per-class does nothing", "--pool"]),
        (["--fix-epochs", "9"], ["--fix-epochs does nothing", "--fix-size"]),
        (["--steps", "9", "--epochs", "9"], ["--epochs does nothing", "--steps"]),
        (["--teacher", "stillhouse:cnn", "--teacher-epochs", "1", "--fix-size", "12", "--model", "stillhouse:mlp"],
         ["student cannot take inputs of shape (1, 12, 12)"]),
        (["--objective", "jeffreys"], ["symmetric"]),
        (["--epochs", "0"], ["epochs", "positive"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    common = ["run", "ssld", "--data", "digits", "--limit", "64", "--quiet"]
    assert invoke([*common, *flags, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and all(w in said for w in words), said


def test_another_size_by_command(tmp_path):
    flags = ["--data", "digits", "--limit", "64", "--teacher", "stillhouse:cnn", "--teacher-epochs", "1"]
    short = ["--epochs", "1", "--finetune-epochs", "1", "--batch", "32", "--quiet", "--out", str(tmp_path / "x")]
    assert invoke(["run", "ssld", *flags, "--fix-size", "12", "--fix-epochs", "1", *short]) == 0
    assert read_json(tmp_path / "x/students/student/plan.json")["shape"] == [1, 12, 12]
    assert load_student(tmp_path / "x/students/student")(torch.zeros(2, 1, 12, 12)).shape == (2, 10)
    assert invoke(["resume", str(tmp_path / "x")]) == 0


def test_settings_out_of_range():
    for bad in ({"per_class": -1}, {"steps": -1}, {"lr": 0}, {"stage_lr": ("a=-1",)}, {"stage_lr": ("=1",)}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Config(**bad)
