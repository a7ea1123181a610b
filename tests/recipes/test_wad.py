"""WAD: the card's exact checks, the bank and the views by hand, growing, SimCLR's objective, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from table import Row
from torch import nn

import stillhouse
from stillhouse import objectives as O
from stillhouse.cli import invoke
from stillhouse.data import Arrays, Batches, Data, Samples, Subset, load, split
from stillhouse.data.pools import Joined, Labelled, Mismatch, Regrouped, Unlabelled, few, mismatch, part_of, unknowns
from stillhouse.errors import UserError
from stillhouse.flags import parse_flags
from stillhouse.models import ModelSpec
from stillhouse.recipes.wad.bank import NearestClass, fraction, gap, similarities, smallest, weights
from stillhouse.recipes.wad.encoders import features, whitened_pca
from stillhouse.recipes.wad.experiment import STUDENT, TINY, heard, task
from stillhouse.recipes.wad.growth import Growth
from stillhouse.recipes.wad.recipe import WAD, Config, distill
from stillhouse.recipes.wad.views import jitter, view
from stillhouse.run import Run
from stillhouse.students.whitened import contrast, whitened
from stillhouse.system import Clock

QUIET = {"flip": False, "shift": 0, "noise": 0.0}
SIMCLR = {"teacher": "simclr", "simclr_epochs": 1.0, "simclr_batch": 24, "projection": 8, "augmented": True}
ROWS = [
    Row("wad", "simclr", {**SIMCLR, "steps": 3, "rounds": 1, "shift": 2, "flip": True, "shared": False}),
    Row("wad", "whitened", {"whiten": True, "rounds": 1}),
]
LABELS = {**QUIET, "rounds": 0, "grow": 0.0}
ZERO = [(Row("wad", "beta 0", {**LABELS, "beta": 0.0}), Row("wad", "plain", LABELS, {"plain": True}))]
JOINT = [Row("wad", "joint", {**QUIET, "optimizer": "sgd", "lr": 0.05})]  # every process draws noise of its own
G = torch.Generator().manual_seed(0)


def system(n: int = 6, **settings) -> WAD:
    torch.manual_seed(0)
    return WAD(nn.Linear(3, 2).double(), Config(**{**QUIET, **settings}), n).double()


def batch(n: int = 4) -> dict:
    g = torch.Generator().manual_seed(1)
    x, u = (torch.randn(n, 3, generator=g, dtype=torch.float64) for _ in range(2))
    return {
        "labelled": {"input": x, "label": torch.arange(n) % 2},
        "pool": {"input": u, "id": torch.tensor([5, 0, 3, 1])},
    }


# -- check 1: the weight ------------------------------------------------------------------------------------------


def test_the_gap_is_the_product_form():
    s = torch.rand(50, 5, generator=G, dtype=torch.float64)
    first, second = s.sort(1, descending=True).values[:, :2].T
    assert torch.allclose(gap(s), first * (1 - second / first), atol=1e-15)
    assert torch.allclose(gap(s), first - second, atol=0)
    assert float(gap(-s).min()) >= 0  # also where all similarities are negative


def test_weight_variants():
    s = torch.tensor([[0.5, 0.2, 0.4], [-0.1, -0.3, -0.2]])
    assert torch.allclose(weights(s, "gap"), torch.tensor([0.1, 0.1]))
    assert torch.allclose(weights(s, "similarity"), torch.tensor([0.5, 0.0]))
    assert torch.allclose(weights(s, "product"), torch.tensor([0.05, 0.0]))
    assert torch.equal(weights(s, "none"), torch.ones(2))


# -- check 2 and 3: the ends of the weight ------------------------------------------------------------------------


def test_identical_banks_leave_the_labels_alone():
    """K classes with the same samples in the bank: every gap is 0, and so is the pool's part of loss and gradient."""
    bank = torch.randn(4, 3, generator=G, dtype=torch.float64)
    s = similarities(
        torch.randn(6, 3, generator=G).double(), bank.repeat(2, 1), torch.arange(2).repeat_interleave(4), 2
    )
    net = system()
    net.weight.copy_(weights(s, "gap"))
    net.pseudo.copy_(s.argmax(1))
    assert torch.equal(net.weight, torch.zeros(6, dtype=torch.float64))
    net.learn(batch(), Clock()).total.backward()
    few_ = batch()["labelled"]
    alone = O.cross_entropy(net.student(few_["input"]), few_["label"]).mean()
    (expected,) = torch.autograd.grad(alone, net.student.bias)
    assert torch.allclose(net.student.bias.grad, expected, atol=1e-15)


def test_weight_one_is_plain_pseudo_labelling():
    net, b = system(), batch()
    net.weight.fill_(1.0)
    net.pseudo.copy_(torch.tensor([1, 0, 1, 0, 1, 1]))
    net.learn(b, Clock()).total.backward()
    y, guess = torch.eye(2)[b["labelled"]["label"]], torch.eye(2)[torch.tensor([1, 1, 0, 0])]  # of positions 5, 0, 3, 1
    z, u = (net.student(b[k]["input"]).softmax(-1).detach() for k in ("labelled", "pool"))
    assert torch.allclose(net.student.bias.grad, (z - y).mean(0) + (u - guess).mean(0), atol=1e-12)


def test_weights_follow_the_samples_and_are_not_normalised():
    net, b = system(beta=0.5), batch()
    net.weight.copy_(torch.tensor([0.1, 0.2, 9.0, 0.3, 9.0, 0.4]))
    terms = net.learn(b, Clock()).terms
    each = O.cross_entropy(net.student(b["pool"]["input"]), torch.zeros(4, dtype=torch.long))
    expected = 0.5 * (torch.tensor([0.4, 0.1, 0.3, 0.2]) * each).sum() / 4
    assert float(terms["pool"].detach()) == pytest.approx(float(expected.detach()), abs=1e-12)


def test_changes_at_random_stand_behind_the_whitening():
    """The student gets jitter(W(g(x) − μ)); its weights alone are trained, and the finished one reads plain images."""
    data, made = task(0, 0.6)
    network, _ = whitened(STUDENT.build(seed=1), made.pool)
    noisy = Config(**{**QUIET, "noise": 0.5, "beta": 0.0})
    clock, few_ = Clock(), data.train.take(np.arange(6))
    terms = WAD(network, noisy, 1).learn({"labelled": few_}, clock).terms
    changed = jitter(network.front(few_["input"]), clock.generator("labelled"), flip=False, shift=0, noise=0.5)
    expected = O.cross_entropy(network.body(changed), few_["label"]).mean()
    assert torch.equal(terms["label"], expected)
    plain = WAD(network, Config(**{**QUIET, "beta": 0.0}), 1).learn({"labelled": few_}, clock).terms["label"]
    assert torch.equal(plain, O.cross_entropy(network(few_["input"]), few_["label"]).mean())


# -- check 4 and 5: growing ---------------------------------------------------------------------------------------


def test_what_is_taken_in_after_each_round():
    assert [fraction(0.1, 5, r) for r in range(1, 7)] == pytest.approx([0.064, 0.036, 0.016, 0.004, 0, 0], abs=1e-15)
    assert fraction(0.1, 0, 1) == 0


def test_the_smallest_losses_are_taken():
    losses = torch.tensor([0.5, 0.1, 0.1, 0.9, 0.0])
    assert smallest(losses, 0.6).tolist() == [4, 1, 2] and smallest(losses, 0.59).tolist() == [4, 1]
    assert smallest(losses, 0.0).tolist() == [] and len(smallest(torch.rand(10, generator=G), 0.3)) == 3


def growth() -> Growth:
    data, made = task(0, 0.6)
    return Growth(data.train, made.pool)


def test_moved_samples_leave_the_pool_and_stand_once_among_the_labelled():
    g = growth()
    network, n = STUDENT.build(), len(g.pool)
    pseudo, weight = torch.arange(n) % 4, torch.rand(n)
    for r, part in ((1, 0.1), (2, 0.05)):
        before = len(g.left)
        rows = g.easiest(network, pseudo, weight, part, r, "cpu")
        g.take_in(rows)
        assert len(g.left) == before - math.floor(part * before)
        assert all(
            row["label"] == row["position"] % 4 and row["weight"] == float(weight[row["position"]]) for row in rows
        )
    assert len(set(g.positions)) == len(g.positions) == len(g.known) - len(g.labelled)
    assert not set(g.positions) & set(g.left) and len(g.positions) + len(g.left) == n
    where = np.arange(len(g.labelled), len(g.known))
    took = g.known.take(where)
    assert torch.equal(took["input"], g.pool.take(g.positions)["input"])
    assert took["label"].tolist() == [int(p) % 4 for p in g.positions] == g.known.labels[where].tolist()


def test_the_easiest_are_the_students_least_losses():
    g, network = growth(), STUDENT.build(seed=2)
    pseudo = torch.randint(0, 4, (len(g.pool),), generator=G)
    g.take_in([{"position": 3, "label": 0, "round": 0}])
    rows = g.easiest(network, pseudo, torch.zeros(len(g.pool)), 0.02, 1, "cpu")
    with torch.no_grad():
        losses = O.cross_entropy(network.eval()(g.pool.take(np.arange(len(g.pool)))["input"]), pseudo)
    losses[3] = math.inf
    assert [row["position"] for row in rows] == losses.argsort()[: len(rows)].tolist() and len(rows) > 5


def test_what_the_bank_no_longer_believes_goes_back():
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]], np.float32)
    g = Growth(Arrays(x[:2], [0, 1]), Unlabelled(Arrays(x[2:], [0, 0])))
    g.take_in([{"position": 0, "label": 1, "round": 1}, {"position": 1, "label": 0, "round": 1}])
    g.give_back(torch.from_numpy(x[:2]), torch.from_numpy(x[2:]), 2)
    assert g.taken == {1: 0} and g.moved[-1] == {"position": 0, "label": 1, "round": 2, "given_back": True}
    # Itself is no witness: without it the sample 0 sees class 0, with it it would see its own wrong label.
    assert g.left.tolist() == [0]


# -- check 6: the pool --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("known", [50, 83])
def test_the_pool_has_the_asked_mismatch(ratio, known):
    made = mismatch(load("digits").train, (0, 1, 2, 3), 4, ratio, known=known, seed=1)
    n = len(made.pool)
    assert (~made.known).sum() == math.ceil(ratio * known / (1 - ratio) - 1e-9) == unknowns(ratio, known)
    assert abs((~made.known).mean() - ratio) <= 1 / n and made.ratio == pytest.approx((~made.known).mean())


def test_what_a_mismatch_set_holds():
    whole = load("digits").train
    made = mismatch(whole, (7, 2), 5, 0.5, seed=3)
    assert made.labelled.classes == ("7", "2") and made.labelled.labels.tolist().count(0) == 5
    assert len(made.labelled) == 10 and set(made.pool.take(np.arange(20))["label"].tolist()) == {-1}
    seen = {whole.x[i].tobytes(): int(whole.labels[i]) for i in range(len(whole))}
    pool = made.pool.take(np.arange(len(made.pool)))["input"]
    plain = whole.take(np.arange(len(whole)))["input"]
    old = [int(whole.labels[int((plain == x).flatten(1).all(1).nonzero()[0])]) for x in pool[:60]]
    assert [{7: 0, 2: 1}.get(c, -1) for c in old] == made.truth[:60].tolist()
    labelled = made.labelled.take(np.arange(10))
    mine = [int(whole.labels[int((plain == x).flatten(1).all(1).nonzero()[0])]) for x in labelled["input"]]
    assert [{7: 0, 2: 1}[c] for c in mine] == labelled["label"].tolist()
    assert not any(bool((pool == x).flatten(1).all(1).any()) for x in labelled["input"]) and len(seen) > 1000
    assert whole.labels.max() == 9  # the maker's labels are as they were


def test_a_pool_of_a_part_of_a_set():
    """Positions are those of the part, not of the set that it was cut from."""
    part, _ = split(load("digits").train, 0.5, seed=1)
    made = mismatch(part, (4, 5), 2, 0.5, known=20)
    x = made.pool.take(np.arange(40))["input"]
    every = part.take(np.arange(len(part)))
    labels = [int(every["label"][int((every["input"] == one).flatten(1).all(1).nonzero()[0])]) for one in x]
    assert [label in (4, 5) for label in labels] == made.known.tolist()


def test_joined_sets_keep_their_order_and_apart_from_one_another():
    a, b = Arrays(np.arange(3)[:, None], [0, 1, 0]), Arrays(np.arange(10, 14)[:, None], [1, 1, 0, 0])
    both = Joined([a, b])
    took = both.take(np.array([6, 0, 3, 2]))
    assert took["input"].flatten().tolist() == [13, 0, 10, 2] and took["label"].tolist() == [0, 0, 1, 0]
    assert took["id"].tolist() == [6, 0, 3, 2] and both.fingerprint != Joined([b, a]).fingerprint
    images = Arrays(np.random.default_rng(0).random((4, 1, 8, 8), np.float32), [0, 1, 0, 1], augment="crop-flip")
    twice = Joined([images, images]).take(np.arange(8), view=3, seed=1)["input"]
    assert torch.equal(twice[:4], images.take(np.arange(4), view=3, seed=1)["input"])
    assert not torch.equal(twice[:4], twice[4:])


def test_groups_of_classes():
    s = Regrouped(Arrays(np.arange(8)[:, None], [0, 1, 2, 3, 3, 2, 1, 0]), {"odd": [1, 3], "zero": [0]})
    assert s.take(np.arange(6))["input"].flatten().tolist() == [0, 1, 3, 4, 6, 7]
    assert s.labels.tolist() == [1, 0, 0, 0, 0, 1] and s.classes == ("odd", "zero")
    batch_ = Batches(Subset(s, np.array([1, 5])), 2).batch(Clock())
    assert sorted(zip(batch_["input"].flatten().tolist(), batch_["label"].tolist())) == [(1.0, 0), (7.0, 1)]


# -- check 7: the bank --------------------------------------------------------------------------------------------


def test_a_labelled_sample_is_as_similar_as_can_be_to_its_class():
    bank, labels = torch.randn(9, 4, generator=G, dtype=torch.float64), torch.arange(9) % 3
    s = similarities(3.7 * bank, bank, labels, 3)
    assert torch.allclose(s[torch.arange(9), labels], torch.ones(9, dtype=torch.float64), atol=1e-12)


def test_the_nearest_sample_counts_not_the_mean():
    x, bank = torch.randn(7, 4, generator=G, dtype=torch.float64), torch.randn(10, 4, generator=G, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 0, 1])
    s = similarities(x, bank, labels, 3, chunk=3)
    for u in range(7):
        for c in range(3):
            cosines = [float(x[u] @ bank[k] / x[u].norm() / bank[k].norm()) for k in range(10) if int(labels[k]) == c]
            assert float(s[u, c]) == pytest.approx(max(cosines), abs=1e-12)
    assert torch.equal(NearestClass(nn.Identity(), bank, labels, 3)(x), similarities(x, bank, labels, 3))


# -- encoders and views -------------------------------------------------------------------------------------------


def test_principal_components_are_white():
    data = load("digits", limit=300).train
    encoder = whitened_pca(data, 12)
    f = encoder(data.take(np.arange(300))["input"]).double()
    assert torch.allclose(f.mean(0), torch.zeros(12, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(f.T @ f / 300, torch.eye(12, dtype=torch.float64), atol=1e-3)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert whitened_pca(Subset(data, np.arange(5)), 12)(torch.zeros(1, 1, 8, 8)).shape == (1, 4)  # rank 4


def test_nt_xent_by_hand_and_its_gradient():
    a, b = (torch.randn(4, 3, generator=G, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = [v / v.norm() for v in [*a, *b]]
    expected = []
    for i in range(8):
        j = (i + 4) % 8
        others = sum(torch.exp(z[i] @ z[k] / 0.3) for k in range(8) if k != i)
        expected.append(-(z[i] @ z[j] / 0.3 - others.log()))
    by_hand = torch.stack([(expected[i] + expected[i + 4]) / 2 for i in range(4)])
    ours = O.nt_xent(a, b, 0.3)
    assert torch.allclose(ours, by_hand, atol=1e-12)
    for p, q in zip(torch.autograd.grad(ours.sum(), (a, b)), torch.autograd.grad(by_hand.sum(), (a, b))):
        assert torch.allclose(p, q, atol=1e-12)
    assert torch.allclose(O.nt_xent(b, a, 0.3), ours, atol=1e-12)
    with pytest.raises(UserError, match="two views"):
        O.nt_xent(a[:1], b[:1])


def test_a_view_without_anything_random_is_the_image():
    x = torch.rand(3, 2, 6, 5, generator=G)
    same = view(x, torch.Generator(), crop=1.0, flip=False, colour=0.0)
    assert torch.allclose(same, x, atol=1e-5)
    many = x.repeat(20, 1, 1, 1)
    seen = view(many, torch.Generator(), crop=1.0, flip=True, colour=0.0)
    apart = torch.stack([(seen - m).flatten(1).abs().amax(1) for m in (many, many.flip(3))])
    assert float(apart.amin(0).max()) < 1e-5 and 10 < int((apart[0] > 1e-3).sum()) < 50
    rows = torch.ones(2, 4)
    assert view(rows, torch.Generator()) is rows


def test_views_are_parts_of_the_image_and_a_function_of_the_generator():
    ramp = torch.arange(16.0).view(1, 1, 1, 16).expand(5, 1, 16, 16).contiguous()
    seen = view(ramp, torch.Generator().manual_seed(1), crop=0.2, flip=False, colour=0.0)
    steps = (seen[:, 0, 8, 1:] - seen[:, 0, 8, :-1])[:, 2:-2]
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), atol=1e-3) and bool((steps > 0).all())  # a scaled ramp
    assert len({round(float(s), 3) for s in steps[:, 0]}) == 5
    assert torch.equal(seen, view(ramp, torch.Generator().manual_seed(1), crop=0.2, flip=False, colour=0.0))


@pytest.mark.parametrize("shared", [True, False])
def test_the_students_input_is_a_shift_with_reflected_borders(shared):
    x = torch.rand(16, 1, 6, 6, generator=G)
    out = jitter(x, torch.Generator().manual_seed(4), flip=True, shift=2, noise=0.0, shared=shared)
    padded, found = torch.nn.functional.pad(x, (2,) * 4, mode="reflect"), []
    for k in range(16):
        windows = {
            (a, b, f): (w.flip(2) if f else w)
            for a in range(5) for b in range(5) for f in (0, 1)
            for w in [padded[k, :, a : a + 6, b : b + 6]]
        }  # fmt: skip
        found.append([place for place, w in windows.items() if torch.equal(w, out[k])])
    assert all(found) and (len({tuple(f) for f in found}) == 1) == shared
    assert jitter(x, torch.Generator(), flip=False, shift=0, noise=0.0) is x
    noise = jitter(x, torch.Generator(), flip=False, shift=0, noise=0.15) - x
    assert float(noise.std()) == pytest.approx(0.15, rel=0.15)


def test_features_are_of_the_plain_image_or_of_a_view_of_its_seed():
    data = load("digits", limit=30).train
    encoder, x = whitened_pca(data, 5), data.take(np.arange(30))["input"]
    plain = features(encoder, data, Config(augmented=False), seed=0, batch_size=7)
    assert torch.allclose(plain, encoder(x), atol=1e-5)
    one, again, other = (features(encoder, data, Config(), seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other) and not torch.allclose(one, plain)


# -- runs ---------------------------------------------------------------------------------------------------------


def run_of(tmp_path, **settings):
    data, made = task(0, 0.6)
    cfg = replace(TINY, **settings)
    return distill(Run(tmp_path, device="cpu", quiet=True), data, made.pool, STUDENT, None, cfg), made


def test_a_run_names_who_was_taken_in(tmp_path):
    grown, made = run_of(tmp_path, recheck=False)
    first, *_, last = grown.rounds
    taken = [row["position"] for row in grown.moved]
    assert len(first["left"]) == len(made.pool) and len(set(taken)) == len(taken) == grown.cost["taken_in"]
    assert sorted([*taken, *last["left"].tolist()]) == list(range(len(made.pool)))
    grown.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/moved.json").read_text()) == grown.moved
    found = heard(grown, made)
    assert 0 <= found["mass"] <= 1 and 0 <= found["wrong"] <= 1 and found["auroc"] == found["auroc_gap"]


def test_a_whitened_student_is_read_back_and_its_teacher_is_not_whitened(tmp_path):
    grown, made = run_of(tmp_path / "a", whiten=True)
    bare, _ = run_of(tmp_path / "b")
    assert torch.equal(grown.rounds[0]["similarity"], bare.rounds[0]["similarity"])  # the encoder sees plain images
    student = grown["student"].model
    data, _ = task(0, 0.6)
    both = torch.cat([d.take(np.arange(len(d)))["input"] for d in (data.train, made.pool)]).double()
    assert torch.allclose(student.front.mean.double(), contrast(both).flatten(1).mean(0), atol=1e-4)
    grown.save(tmp_path / "a")
    again, x = stillhouse.load(tmp_path / "a/students/student"), data.test.take(np.arange(4))["input"]
    assert torch.equal(again(x), student(x))


def test_ones_own_weights_and_encoder(tmp_path):
    data, made = task(0, 0.6)
    known = torch.from_numpy(made.known).float()
    encoder = nn.Flatten()
    cfg = replace(TINY, rounds=0)
    run = Run(tmp_path, device="cpu", quiet=True)
    grown = distill(run, data, made.pool, STUDENT, encoder, cfg, judge=lambda s: known)
    assert torch.equal(grown.rounds[0]["weight"], known) and heard(grown, made)["mass"] == 0
    x = torch.cat([d.take(np.arange(len(d)))["input"].flatten(1) for d in (data.train,)])
    assert torch.allclose(grown.base.bank, x)


def test_labels_of_the_pool_are_never_read(tmp_path):
    class Poisoned(Samples):
        def __init__(self, parent):
            self.parent, self.shape, self.classes = parent, parent.shape, parent.classes
            self.labels = np.full(len(parent), 99)

        @property
        def fingerprint(self):
            return "poisoned"

        def take(self, ids, *, view=None, seed=0):
            return self.parent.take(ids, view=view, seed=seed) | {"label": torch.full((len(ids),), 99)}

    data, made = task(0, 0.6)
    students = []
    for k, pool in enumerate((made.pool, Poisoned(made.pool))):
        grown = distill(Run(tmp_path / str(k), device="cpu", quiet=True), data, pool, STUDENT, None, TINY)
        students.append(grown["student"].model.state_dict())
    assert all(torch.equal(v, students[1][k]) for k, v in students[0].items())


# -- the command --------------------------------------------------------------------------------------------------

COMMON = ["run", "wad", "--data", "digits", "--model", "stillhouse:mlp", "--quiet", "--steps", "3", "--rounds", "1"]


def test_the_command_with_an_encoder_by_folder(tmp_path):
    flags = ["--targets", "0", "1", "2", "--per-class", "4", "--teacher", "pca"]
    first = [*COMMON, *flags, "--mismatch", "0.5", "--no-flip", "--out", str(tmp_path / "a")]
    assert invoke(first) == 0
    assert "AUROC" in (tmp_path / "a/report.html").read_text() and (tmp_path / "a/moved.json").exists()
    student = stillhouse.load(tmp_path / "a/students/student")
    assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    again = [*COMMON, "--pool", "digits", "--per-class", "3", "--encoder", str(tmp_path / "a/students/student")]
    assert invoke([*again, "--out", str(tmp_path / "b")]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--per-class", "--pool"]),
        (["--per-class", "3", "--targets", "1"], ["two different target classes", "[1]"]),
        (["--per-class", "3", "--targets", "1", "12"], ["class 12", "0…9"]),
        (["--per-class", "300"], ["300"]),
        (["--per-class", "3", "--mismatch", "1.0", "--targets", "1", "2"], ["mismatch ratio", "1.0"]),
        (["--pool", "digits", "--mismatch", "0.5"], ["--mismatch", "--pool"]),
        (["--per-class", "3", "--encoder", "nowhere"], ["--encoder nowhere", "plan.json"]),
        (["--grow", "2"], ["grow", "0 to 1"]),
        (["--weight", "gaps"], ["weight"]),
        (["--pool", "folder:/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--per-class", "3", "--teacher", "pca", "--simclr-epochs", "9"], ["--simclr-epochs does nothing", "pca"]),
        (["--per-class", "3", "--encoder", "x:y", "--components", "9"], ["--components does nothing", "--encoder"]),
        (["--per-class", "3", "--whiten", "--image-size", "80"], ["6400 numbers", "--image-size"]),
        (["--seeds", "0", "--per-class", "3"], ["--seeds", "got 0"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    code = invoke([*COMMON, *flags, "--out", str(tmp_path / "x")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


@pytest.mark.parametrize("flag", [["--per-class", "3"], ["--targets", "1", "2"], ["--pool", "digits"]])
def test_what_the_user_brings_is_not_the_built_in_experiment(flag):
    options, config = parse_flags("wad", [*flag, "--out", "x"])
    assert options.own and config == Config()
    options, config = parse_flags("wad", ["--out", "x"])
    assert not options.own and config != Config()


def test_a_pool_with_a_broken_image(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        home = tmp_path / "data" / "ab"[k % 2]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(home / f"{k}.png")
        (tmp_path / "pool").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pool" / f"{k}.png")
    (tmp_path / "pool/broken.png").write_bytes(b"no image")
    how = ["--teacher", "pca", "--no-augmented", "--components", "4"]
    flags = ["run", "wad", "--data", f"folder:{tmp_path}/data", "--pool", f"folder:{tmp_path}/pool", *how]
    few_steps = ["--steps", "2", "--rounds", "1", "--model", "stillhouse:mlp", "--quiet"]
    assert invoke([*flags, *few_steps, "--out", str(tmp_path / "a")]) == 2
    assert "--skip-bad" in capsys.readouterr().err
    assert invoke([*flags, *few_steps, "--skip-bad", "--out", str(tmp_path / "b")]) == 0


def test_mistakes_in_python(tmp_path):
    data, made = task(0, 0.6)
    run = Run(tmp_path, device="cpu", quiet=True)
    with pytest.raises(UserError, match="student gives 3 logits"):
        distill(run, data, made.pool, ModelSpec("stillhouse:mlp", 3, (1, 8, 8)), None, TINY)
    with pytest.raises(UserError, match=r"finite features \(n, d\)"):
        distill(run, data, made.pool, STUDENT, nn.Identity(), TINY)
    with pytest.raises(UserError, match="no labelled sample"):
        lacking = Labelled(data.train, np.zeros(len(data.train)), data.classes)
        distill(run, Data("x", lacking, data.test), made.pool, STUDENT, None, TINY)
    with pytest.raises(UserError, match="images"):
        rows = Arrays(np.random.default_rng(0).normal(size=(12, 5)), np.arange(12) % 2)
        spec = ModelSpec("stillhouse:mlp", 2, (5,))
        distill(run, Data("rows", rows, rows), rows, spec, None, replace(TINY, teacher="simclr"))
    with pytest.raises(UserError, match="the pool has 0 samples"):
        distill(run, data, Subset(made.pool, np.arange(0)), STUDENT, nn.Flatten(), TINY)
    with pytest.raises(UserError, match="no sample in the bank"):
        similarities(torch.eye(2), torch.eye(2), torch.zeros(2, dtype=torch.long), 2)
    with pytest.raises(UserError, match="do not fit"):
        similarities(torch.eye(2), torch.eye(3), torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(UserError, match="300"):
        few(part_of(load("digits").train, (0, 1)), 300)


def test_a_mismatch_set_is_for_judging_only():
    _, made = task(1, 0.8)
    assert isinstance(made, Mismatch) and made.ratio == pytest.approx(0.8, abs=1 / len(made.pool))
    assert not hasattr(made.pool.parent, "known")
