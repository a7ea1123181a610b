"""The exact checks of the SLDD card, in float64, and what a user can get wrong."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import Tensor, nn
from torch.func import functional_call

import stillhouse
from stillhouse import Clock, ModelSpec, UserError
from stillhouse.cli import invoke
from stillhouse.data import from_arrays
from stillhouse.data.synthetic import Synthetic, inverse_softplus
from stillhouse.models import ConvNet, LeNet
from stillhouse.outcomes import DataSet
from stillhouse.recipes.soft_label_dataset_distillation import sentences
from stillhouse.recipes.soft_label_dataset_distillation.config import Config
from stillhouse.recipes.soft_label_dataset_distillation.experiment import TINY, tiny
from stillhouse.recipes.soft_label_dataset_distillation.labels import class_distances, initial_labels
from stillhouse.recipes.soft_label_dataset_distillation.nets import check_network, initialised
from stillhouse.recipes.soft_label_dataset_distillation.pictures import caption, preview
from stillhouse.recipes.soft_label_dataset_distillation.recipe import SoftLabels, distill
from stillhouse.recipes.soft_label_dataset_distillation.steps import Steps, label_loss
from stillhouse.recipes.soft_label_dataset_distillation.text_nets import Bag, BiLSTM, TextCNN
from stillhouse.recipes.soft_label_dataset_distillation.use import TwoClasses, accuracy, train_on
from stillhouse.text.sentences import open_rows, read_jsonl

NAME = "soft_label_dataset_distillation"
LENET = ModelSpec("stillhouse:convnet", 10, (1, 8, 8), options={"width": 4, "depth": 1})

ROWS = [
    Row(NAME, "hard", {"labels": "hard"}),
    Row(NAME, "unknown", {"start": "unknown", "weights": "xavier", "nets": 2}, {"base": LENET}),
    Row(NAME, "own weights", {"weights": "own", "momentum": 0.5, "segment": 2}, {"base": LENET}),
    Row(NAME, "pool", {"start": "pool", "weights": "own", "nets": 2, "label_init": "similar"}),
    Row(NAME, "text", {"weights": "xavier", "classes": (), "samples": 4, "batch": 32}, {"text": True}),
    Row(NAME, "one logit", {"one_logit": True, "classes": (), "batch": 32, "start": "unknown", "weights": "own"},
        {"text": True}),
    Row(NAME, "micro", {}, micro_batch=20),
]  # fmt: skip
# Labels that do not move are the method of 2018.
ZERO = [(Row(NAME, "soft, lr 0", {"lr": 0.0}), Row(NAME, "hard, lr 0", {"lr": 0.0, "labels": "hard"}))]
JOINT = [
    Row(NAME, "softmax regression", {"epochs": 3.0}),
    Row(NAME, "unknown start", {"epochs": 2.0, "start": "unknown", "weights": "xavier"}),
]

D, C, M, BLOCKS, PASSES = torch.float64, 4, 3, 2, 2
X = torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=D)
BATCH = {"input": X, "label": torch.arange(9) % C}


def network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(12, C)]
        return nn.Sequential(*layers).double()


def system(net: nn.Module | None = None, **changes) -> SoftLabels:
    cfg = Config(**{"samples": M, "blocks": BLOCKS, "passes": PASSES, "classes": (0, 2, 3), **changes})
    g = torch.Generator().manual_seed(2)
    labels = initial_labels(cfg, C, g) + 0.1 * torch.randn(M * BLOCKS, C, generator=g)  # not one-hot, some negative
    sizes = torch.tensor([0.3, 0.5, 0.1, 0.8])
    samples = torch.randn(M * BLOCKS, 1, 6, 6, generator=g)
    made = Synthetic(samples, labels, sizes, blocks=BLOCKS, learn_labels=cfg.labels == "soft")
    return SoftLabels(made, [net or network()], cfg).double().train()


def loss_by_hand(s: SoftLabels) -> Tensor:
    """Plain loop, torch's own graph, the labels' loss written out."""
    net, syn = s.nets[0], s.synthetic
    theta = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    for k in range(BLOCKS * PASSES):
        first = k % BLOCKS * M
        z = functional_call(net, theta, (syn.samples[first : first + M],))
        ell = -(syn.labels[first : first + M] * (z - z.logsumexp(1, keepdim=True))).sum() / M
        g = torch.autograd.grad(ell, list(theta.values()), create_graph=True)
        eta = torch.log1p(syn.raw_step_sizes.exp())[k]
        theta = {n: p - eta * u for (n, p), u in zip(theta.items(), g)}
    return F.cross_entropy(functional_call(net, theta, (X,)), BATCH["label"])


@pytest.mark.parametrize("segment", [1, 3])
def test_gradients_are_those_of_the_full_unroll(segment):
    s = system(segment=segment)
    params = list(s.synthetic.parameters())
    assert len(params) == 3
    value = s.distil(BATCH, Clock()).total
    expected = loss_by_hand(s)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found, wanted = torch.autograd.grad(value, params), torch.autograd.grad(expected, params)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-6, atol=1e-10)
        assert w.abs().max() > 1e-4


def test_gradients_are_finite_differences():
    """One pixel, one label entry, one raw step size."""
    s = system()
    params = list(s.synthetic.parameters())
    grads = torch.autograd.grad(s.distil(BATCH, Clock()).total, params)
    for p, g in zip(params, grads, strict=True):
        spot, values = int(g.abs().argmax()), []
        for sign in (1, -1):
            with torch.no_grad():
                p.view(-1)[spot] += sign * 1e-5
                values.append(s.distil(BATCH, Clock()).total)
                p.view(-1)[spot] -= sign * 1e-5
        torch.testing.assert_close(g.view(-1)[spot], (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-10)


def test_hard_labels_keep_idle_columns_equal_and_soft_ones_do_not():
    """Permutation symmetry: from w_0 = 0, classes that no hard label names have one common weight column."""
    g = torch.Generator().manual_seed(3)
    x, net = torch.randn(3, 7, generator=g, dtype=D), nn.Linear(7, 6).double()
    start = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    hard = torch.eye(6, dtype=D)[:3]
    for labels, equal in ((hard, True), (hard + 0.1 * torch.randn(3, 6, generator=g, dtype=D), False)):
        for steps in range(1, 11):
            final = Steps()(net, start, torch.full((steps,), 0.7, dtype=D), x, labels, 0)
            apart = (final["weight"][3:] - final["weight"][3:4]).abs().max()
            assert apart < 1e-12 if equal else apart > 1e-3
            assert (final["weight"][:3] - final["weight"][3]).abs().max() > 1e-2


def test_one_hot_labels_that_stay_are_plain_cross_entropy():
    s, plain = system(labels="hard"), network()
    s.synthetic.labels.copy_(torch.eye(C)[[0, 2, 3, 0, 2, 3]])
    assert [n for n, _ in s.synthetic.named_parameters()] == ["samples", "raw_step_sizes"]
    ids = torch.tensor([0, 2, 3])
    for k, eta in enumerate([0.3, 0.5, 0.1, 0.8]):
        first = k % 2 * M
        ell = F.cross_entropy(plain(s.synthetic.samples[first : first + M]), ids)
        torch.testing.assert_close(
            label_loss(plain(s.synthetic.samples[first : first + M]), s.synthetic.labels[:M]), ell
        )
        grads = torch.autograd.grad(ell, list(plain.parameters()))
        with torch.no_grad():
            for p, g in zip(plain.parameters(), grads, strict=True):
                p -= eta * g
    expected = F.cross_entropy(plain(X), BATCH["label"])
    torch.testing.assert_close(s.distil(BATCH, Clock()).total, expected, rtol=1e-7, atol=1e-9)


def test_one_step_from_zero_in_closed_form():
    """W = η X̃ᵀ(Ỹ − s/C)/m with s the row sums of Ỹ, of rank at most M."""
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(3, 7, generator=g, dtype=D), torch.randn(3, 6, generator=g, dtype=D)
    net = nn.Linear(7, 6, bias=False).double()
    final = Steps()(net, {"weight": torch.zeros(6, 7, dtype=D)}, torch.tensor([0.6], dtype=D), x, y, 0)["weight"]
    expected = 0.6 * x.T @ (y - y.sum(1, keepdim=True) / 6) / 3
    torch.testing.assert_close(final.T, expected, rtol=1e-13, atol=1e-14)
    assert torch.linalg.matrix_rank(final) == 3


def test_blocks_come_in_turn_and_every_step_has_its_own_size():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(x[0, 0].detach()))
            return super().forward(x)

    net, x = Spy(2, 2), torch.arange(6.0).repeat_interleave(2).view(6, 2)
    cfg = Config(samples=2, blocks=3, passes=2)
    made = Synthetic(x, torch.eye(2).repeat(3, 1), torch.full((cfg.steps,), 0.1), blocks=3)
    with torch.no_grad():
        Steps(3)(net, dict(net.named_parameters()), made.step_sizes, made.samples, made.labels, 0)
    assert seen == [0, 2, 4, 0, 2, 4] and made.step_sizes.shape == (6,)
    assert [made.rows(k).start for k in range(6)] == [0, 2, 4, 0, 2, 4]
    torch.testing.assert_close(
        F.softplus(inverse_softplus(torch.tensor([1e-3, 17.5, 200.0]))), torch.tensor([1e-3, 17.5, 200.0])
    )


def test_steps_are_in_train_mode_and_the_real_loss_in_eval_mode():
    modes = []

    class Spy(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            modes.append((len(x), self.training))
            return super().forward(x)

    net = network()
    net[4] = Spy(0.5)
    s = system(net)
    clock = Clock(seed=5)
    a, b, other = s.distil(BATCH, clock).total, s.distil(BATCH, clock).total, s.distil(BATCH, Clock(seed=6)).total
    assert set(modes) == {(M, True), (9, False)} and net[4].training
    assert torch.equal(a, b) and not torch.equal(a, other)
    grads = [torch.autograd.grad(v, list(s.synthetic.parameters())) for v in (a, b)]
    assert all(torch.equal(u, v) for u, v in zip(*grads, strict=True))  # the masks are drawn again on the way back


def test_labels_are_not_held_to_the_simplex():
    made = tiny_run(replace(TINY, epochs=30, lr=0.05, samples=5, classes=(0, 1, 2, 3, 4)))
    labels = made["labels"]
    assert labels.min() < -0.01 and (labels.sum(1) - 1).abs().max() > 0.01 and labels.shape == (10, 10)


def tiny_run(cfg: Config, **extra) -> DataSet:
    with tempfile.TemporaryDirectory() as folder:
        return tiny(stillhouse.Run(folder, quiet=True, device="cpu"), cfg, **extra)


# -- starts -----------------------------------------------------------------------------------------------------------


def test_label_initialisers():
    def start(how: str, **more) -> Tensor:
        cfg = Config(samples=3, classes=(3, 1), label_init=how, **more)
        return initial_labels(cfg, 5, torch.Generator().manual_seed(0), distances=DISTANCES)

    eye = torch.eye(5)[[3, 1, 3]]
    assert torch.equal(start("one-hot"), eye)
    assert torch.equal(start("one-hot", label_scale=2.0, label_shift=-1.0), 2 * eye - 1)
    torch.testing.assert_close(start("smooth"), 0.9 * eye + 0.02)
    assert not start("zeros").any() and (start("ones") == 1).all()
    assert set(start("bernoulli").unique().tolist()) <= {0.0, 1.0}
    assert 0 <= start("uniform").min() <= start("uniform").max() <= 1 and start("normal").min() < 0
    q = start("orthogonal")
    torch.testing.assert_close(q @ q.T, torch.eye(3), atol=1e-6, rtol=0)
    similar = start("similar")
    assert torch.equal(similar[0], 1 - DISTANCES[3] / DISTANCES.max())  # e_i + Σ_{j≠i} (1 − d_ij) e_j; d_ii = 0
    assert start("one-hot", blocks=2).shape == (6, 5)


DISTANCES = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]).sub(torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0])[:, None]).abs()


def test_class_distances_are_those_of_the_means():
    x = np.array([[0.0, 0], [2, 0], [1, 3], [1, 5]], np.float32)
    data = from_arrays(x, [0, 0, 1, 1], test=(x, [0, 0, 1, 1]), normalize=False)
    assert torch.equal(class_distances(data.train), torch.tensor([[0.0, 4.0], [4.0, 0.0]]))


def test_two_classes_with_one_logit_are_not_inverted():
    """Class 1's label is 1 and positive logits mean class 1 (the released code has both the other way)."""
    cfg = Config(samples=2, one_logit=True)
    y = initial_labels(cfg, 2, torch.Generator())
    assert y.tolist() == [[0.0], [1.0]]
    z = torch.tensor([[0.3], [-2.0]], dtype=D)
    torch.testing.assert_close(label_loss(z, y), F.binary_cross_entropy_with_logits(z, y.double()))
    torch.testing.assert_close(label_loss(z, torch.tensor([0, 1])), label_loss(z, y))
    real = torch.tensor([[1.7], [-0.4]], dtype=D)  # real-valued labels: softplus(z) − y z
    torch.testing.assert_close(label_loss(z, real), (torch.log1p(z.exp()) - real * z).mean())

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = np.array([[0.1], [0.6], [-0.1], [-0.7]], np.float32)  # 0.1 is positive, but below 0.5
    data = from_arrays(x, [1, 1, 0, 0], test=(x, [1, 1, 0, 0]), normalize=False)
    assert accuracy(Fixed(), data.test, one_logit=True) == 1.0
    assert TwoClasses(Fixed())(torch.tensor([[2.0]])).tolist() == [[0.0, 2.0]]


def test_xavier_weights_and_zero_biases():
    net = nn.Sequential(nn.Linear(300, 200), nn.GroupNorm(2, 200), nn.Conv2d(20, 30, 5))
    made = initialised(net, "xavier", 3)
    for layer, fans in ((made[0], 500), (made[2], 25 * 50)):
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fans) ** 0.5, rel=0.03) and not layer.bias.any()
    assert (made[1].weight == 1).all() and not torch.equal(made[0].weight, net[0].weight)
    assert torch.equal(made[0].weight, initialised(net, "xavier", 3)[0].weight)
    assert not any(p.any() for p in initialised(net, "zeros", 0)[0].parameters())
    before = torch.get_rng_state()
    own = [initialised(net, "own", s)[0].weight for s in (1, 1, 2)]
    assert (
        torch.equal(own[0], own[1]) and not torch.equal(own[0], own[2]) and torch.equal(before, torch.get_rng_state())
    )


def test_an_unknown_start_is_drawn_anew_and_a_pool_is_drawn_from():
    s = system(start="unknown", nets=2)
    (_, a), (_, b) = s.starts(Clock(step=1))
    (_, c), _ = s.starts(Clock(step=2))
    assert not torch.equal(a["0.weight"], b["0.weight"]) and not torch.equal(a["0.weight"], c["0.weight"])
    (_, again), _ = s.starts(Clock(step=1, rank=1, micro=1))
    assert torch.equal(a["0.weight"], again["0.weight"])
    known = system()
    assert next(iter(known.starts(Clock(step=3))))[1]["0.weight"] is known.nets[0].get_parameter("0.weight")
    pool = SoftLabels(known.synthetic, [network() for _ in range(3)], replace(known.cfg, start="pool", nets=20))
    assert {id(net) for net, _ in pool.starts(Clock())} == {id(net) for net in pool.nets}
    many = [v for net, _ in s.starts(Clock()) for v in [net]]
    assert many[0] is many[1] is s.nets[0]


# -- using a set ------------------------------------------------------------------------------------------------------


def test_training_on_a_set_does_what_it_was_learned_for(tmp_path):
    """The accuracy and the loss of the last outer step's successor are those of the reloaded set, in a fresh model."""
    made = tiny_run(TINY)
    made.save(tmp_path)
    again = stillhouse.load(tmp_path / "dataset")
    model = ModelSpec.from_json(again.facts["model"]).build(seed=77)
    before = [p.clone() for p in model.parameters()]
    net = train_on(again, model)
    theta = {k.removeprefix("start."): v for k, v in made.tensors.items() if k.startswith("start.")}
    final = Steps(**made.facts["steps"])(net, theta, made["step_sizes"], made["images"], made["labels"], 0)
    assert all(torch.equal(p, final[k]) for k, p in net.named_parameters()) and not net.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    own = train_on(again, model, start="model")
    assert not torch.equal(own.get_parameter("1.weight"), net.get_parameter("1.weight"))
    with pytest.raises(UserError, match="do not fit MLP, first at"):
        train_on(again, ModelSpec("stillhouse:mlp", 10, (1, 8, 8)).build())
    with pytest.raises(UserError, match="no training steps"):
        train_on(DataSet({"images": torch.zeros(1)}, {"method": "other"}), model)
    with pytest.raises(UserError, match="'set' or 'model'"):
        train_on(again, model, start="here")


def test_a_set_for_unknown_starts_draws_them_as_it_says():
    made = tiny_run(replace(TINY, start="unknown", weights="xavier"))
    assert not any(k.startswith("start.") for k in made.tensors)
    model = ModelSpec.from_json(made.facts["model"]).build()
    a, b, c = (train_on(made, model, seed=s).get_parameter("1.weight") for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_fewer_samples_than_classes_teach_all_classes(tmp_path):
    """Two samples, three classes on a line: the middle one is taught by soft labels alone."""
    g = np.random.default_rng(0)
    x = np.concatenate([g.normal(m, 0.1, (60, 1)) for m in (-1, 0, 1)]).astype(np.float32)
    y = np.repeat(np.arange(3), 60)
    data = from_arrays(x, y, test=(x, y), normalize=False)
    cfg = Config(
        samples=2, classes=(0, 2), passes=8, epochs=150, decay=0, lr=0.1, step_size=1.0, batch=180, weights="zeros"
    )
    net, found = nn.Linear(1, 3), {}
    import tempfile

    for labels in ("soft", "hard"):
        with tempfile.TemporaryDirectory() as folder:
            made = distill(
                stillhouse.Run(folder, quiet=True, device="cpu"),
                data,
                net,
                replace(cfg, labels=labels),
                kind="features",
            )
        found[labels] = accuracy(train_on(made, net), data.test)
    assert found["soft"] > 0.9


def test_pictures_and_captions():
    assert caption(torch.tensor([0.1, -2.0, 1.5]), ["a", "b", "c"]) == "b-2.0 c+1.5"
    made = tiny_run(replace(TINY, epochs=1))
    assert (preview(made) or b"")[:4] == b"\x89PNG"
    assert preview(DataSet({"embeddings": torch.zeros(1, 2, 3)}, {})) is None


# -- sentences --------------------------------------------------------------------------------------------------------


def test_sentences_are_cut_padded_and_decoded():
    table = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    known = sentences.vocabulary_of(["up", "right", "down"], table)
    assert known.ids(["up nowhere right right", ""], 3).tolist() == [[2, 1, 3], [0, 0, 0]]
    torch.testing.assert_close(known.table[:2], torch.tensor([[0.0, 0.0], [0.0, 1 / 3]]))
    assert torch.equal(known.embed(["down"], 2)[0], torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
    rows = torch.tensor([[[0.9, 0.2], [-5.0, 0.1], [0.1, 0.9]]])
    assert known.nearest(rows) == ["up down right"]  # smallest L2 distance, not largest product; never padding


def test_word_vectors_of_words_used_alike_are_alike():
    texts = [f"{s} is {w} today" for s in ("rain", "snow") for w in ("cold", "wet")] * 3
    texts += [f"a {s} of {w} sings" for s in ("flock", "pair") for w in ("birds", "larks")] * 3
    known = sentences.co_occurrence(texts, 50, 6)
    again = sentences.co_occurrence(texts, 50, 6)
    assert torch.equal(known.table, again.table) and known.table.shape == (2 + 13, 6)
    v = F.normalize(known.table, dim=1)
    near = lambda a, b: float(v[known.rows[a]] @ v[known.rows[b]])  # noqa: E731
    assert near("rain", "snow") > 0.9 and near("birds", "larks") > 0.9 and abs(near("rain", "birds")) < 0.1


def test_text_networks():
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.zeros(2, 4, 5)], 1)
    bag = Bag((7, 5), 3)
    torch.testing.assert_close(bag(padded), bag(x))
    torch.testing.assert_close(bag(x), bag.head(x.mean(1)))
    assert TextCNN((7, 5), 3, filters=4)(x).shape == (2, 3)
    assert torch.isfinite(bag(torch.zeros(1, 7, 5))).all()


def test_recurrent_networks_can_be_unrolled():
    """Gradients through an LSTM's steps against finite differences."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = BiLSTM((4, 3), 2, hidden=3, layers=2)
    start = {k: p.detach() for k, p in net.named_parameters()}
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def value(net: nn.Module, start: dict[str, Tensor], x: Tensor) -> Tensor:
        final = Steps()(net, start, torch.full((2,), 0.5, dtype=x.dtype), x, torch.eye(2, dtype=x.dtype), 0)
        return sum((p**2).sum() for p in final.values())

    torch.autograd.grad(value(net, start, x), x)  # float32 has kernels of its own
    net, start, x = net.double(), {k: p.double() for k, p in start.items()}, x.detach().double().requires_grad_()
    (g,) = torch.autograd.grad(value(net, start, x), x)
    step = torch.zeros_like(x)
    step.view(-1)[int(g.abs().argmax())] = 1e-5
    with torch.no_grad():
        expected = (value(net, start, x + step) - value(net, start, x - step)) / 2e-5
    torch.testing.assert_close(g.view(-1)[int(g.abs().argmax())], expected, rtol=1e-6, atol=1e-9)


def test_a_text_set_brings_its_words():
    made = tiny_run(replace(TINY, weights="xavier", classes=(), batch=32, epochs=2), text=True)
    known = sentences.vocabulary(made)
    assert known.words[:2] == ("<pad>", "<other>") and len(known.words) == len(known.table)
    assert len(made.facts["nearest_words"]) == len(made["labels"]) == 6
    assert all(w in known.rows for w in made.facts["nearest_words"][0].split())
    net = train_on(made, ModelSpec.from_json(made.facts["model"]).build())
    length = made.facts["shape"][0]
    assert net(known.embed(["the film is great !"], length)).shape == (1, 2)


@pytest.mark.data
def test_sst2(data_root):
    data = sentences.sentence_data(open_rows("sst2"), "sst2", words=500, width=8, length=16)
    assert (len(data.train), len(data.test), data.classes) == (6920, 872, ("negative", "positive"))
    assert data.shape == (16, 8) and data.train.labels.sum() == 3610 and data.test.labels.sum() == 444


# -- networks and mistakes --------------------------------------------------------------------------------------------


def test_lenet_and_convnet():
    assert LeNet((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert ConvNet((1, 28, 28), 10, 8)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    deep = ConvNet((3, 64, 64), 5, 8)
    assert sum(isinstance(m, nn.Conv2d) for m in deep) == 4 and deep(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert sum(p.numel() for p in ConvNet((3, 32, 32), 10).parameters()) == 320_010  # the published size
    with pytest.raises(UserError, match="at least 12 pixels"):
        LeNet((1, 8, 8), 10)


def test_running_statistics_are_refused_and_batch_statistics_are_not():
    with pytest.raises(UserError, match=r"running statistics .*track_running_stats=False"):
        check_network(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    check_network(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)))


@pytest.mark.parametrize(
    "changes,what",
    [
        ({"samples": 0}, "samples: expected a finite number of at least 1"),
        ({"step_size": 0.0}, "step_size: expected a number above 0"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\)"),
        ({"decay": 0.5}, "decay: expected at least 1 epoch"),
        ({"classes": (-1,)}, "class numbers from 0"),
        ({"pool": ("x",)}, "--start pool"),
        ({"start": "unknown", "weights": "zeros"}, "the same in every draw"),
        ({"nets": 2}, "start known has one network"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes, what):
    with pytest.raises(UserError, match=what):
        Config(**changes)


def test_data_and_models_that_do_not_fit(tmp_path):
    run = stillhouse.Run(tmp_path, quiet=True, device="cpu")
    data = from_arrays(np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 3)
    with pytest.raises(UserError, match="numbers from 0 to 2, got 7"):
        distill(run, data, nn.Linear(4, 3), Config(classes=(7,)))
    with pytest.raises(UserError, match=r"gives \(5,\) logits, expected 3"):
        distill(run, data, nn.Linear(4, 5), Config())
    with pytest.raises(UserError, match=r"Linear does not take inputs of shape \(4,\)"):
        distill(run, data, nn.Linear(5, 3), Config())
    with pytest.raises(UserError, match="one_logit: expected 2 classes, got 3"):
        distill(run, data, nn.Linear(4, 1), Config(one_logit=True))
    with pytest.raises(UserError, match="at most 3 samples per block"):
        distill(run, data, nn.Linear(4, 3), Config(samples=4, label_init="orthogonal"))
    with pytest.raises(UserError, match="--pool RUN/students/NAME"):
        distill(run, data, nn.Linear(4, 3), Config(start="pool"))
    with pytest.raises(UserError, match="one structure"):
        distill(run, data, nn.Linear(4, 3), Config(start="pool"), nets=[nn.Linear(4, 3), nn.Linear(4, 3, bias=False)])


def lines(path, *rows: object):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_bad_files_of_sentences_and_vectors(tmp_path):
    good = {"text": "fine", "label": "yes"}
    with pytest.raises(UserError, match=r"a.jsonl:2: no JSON"):
        read_jsonl(lines(tmp_path / "a.jsonl", good, "{"))
    with pytest.raises(UserError, match=r'a.jsonl:2: expected \{"text"'):
        read_jsonl(lines(tmp_path / "a.jsonl", good, {"text": 3, "label": 0}))
    with pytest.raises(UserError, match="holds no sentences"):
        read_jsonl(lines(tmp_path / "a.jsonl", ""))
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="label 'no', which no training sentence has"):
        sentences.sentence_data({"train": [good] * 9, "test": [{"text": "x", "label": "no"}]}, "mine")
    with pytest.raises(UserError, match=r"v.txt:2: 2 numbers, the lines before have 3"):
        sentences.read_vectors(lines(tmp_path / "v.txt", "a 1 2 3", "b 1 2"))
    with pytest.raises(UserError, match=r"v.txt:1: expected a word and numbers"):
        sentences.read_vectors(lines(tmp_path / "v.txt", "a 1 x 3"))
    with pytest.raises(UserError, match="no vector of any word"):
        sentences.read_vectors(lines(tmp_path / "v.txt", "a 1 2 3"), ["b"])
    with pytest.raises(UserError, match="class name 'cat'"):
        sentences.name_distances(["a", "cat"], lines(tmp_path / "v.txt", "a 1 2 3"))
    found = sentences.name_distances(["a", "b"], lines(tmp_path / "v.txt", "a 1 2 3", "b 1 2 7"))
    assert found.tolist() == [[0.0, 4.0], [4.0, 0.0]]


def test_the_command_on_a_file_of_sentences_and_on_mistakes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{w} number {i % 7}", "label": w} for i in range(40) for w in ("good", "bad")]
    lines(tmp_path / "mine.jsonl", *rows)
    fast = ["--epochs", "4", "--samples", "2", "--passes", "3", "--device", "cpu", "--quiet", "--width", "4"]
    code = invoke(["run", NAME, "--data", "mine.jsonl", "--model", "cnn", *fast, "--out", "run"])
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {"accuracy", "random_real_accuracy", "compression"} <= set(report["metrics"])
    assert report["tables"][0]["columns"][-1] == "nearest words"
    assert stillhouse.load(tmp_path / "run/dataset").facts["classes"] == ["bad", "good"]
    capsys.readouterr()
    for flags, said in (
        (["--data", "none.jsonl"], "cannot read none.jsonl"),
        (["--data", "digits", "--model", "stillhouse:cnn"], "normalises by running statistics"),
        (["--data", "digits", "--classes", "12"], "numbers from 0 to 9, got 12"),
        (["--start", "pool"], "--pool"),
        (["--step-size", "-1"], "step_size: expected a number above 0, got -1"),
    ):
        assert invoke(["run", NAME, *flags, "--out", "bad"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
