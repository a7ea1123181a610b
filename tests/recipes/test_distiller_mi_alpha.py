"""Distiller: the bound's exact checks, critics, layer maps, the pipeline's stages, and the contract's rows."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from table import Row
from torch import nn

from stillhouse.cli import invoke
from stillhouse.comparisons import KNOWN, Objective
from stillhouse.critics import Critic
from stillhouse.data import load
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.models import CNN, ModelSpec, ResNet
from stillhouse.objectives import leave_one_out, mutual_information, soft_cross_entropy
from stillhouse.recipes.distiller_mi_alpha import augment, maps, studies
from stillhouse.recipes.distiller_mi_alpha.config import Config
from stillhouse.recipes.distiller_mi_alpha.experiment import TINY
from stillhouse.recipes.distiller_mi_alpha.pipeline import Pipeline
from stillhouse.recipes.distiller_mi_alpha.recipe import distill
from stillhouse.run import Run
from stillhouse.system import Clock
from stillhouse.teachers import Frozen

_SHORT = {"epochs": 1.0, "teacher_epochs": 1.0}
ROWS = [
    Row("distiller_mi_alpha", "text", {**_SHORT, "edits": ("words:0.2",)}, {"text": True}),
    Row("distiller_mi_alpha", "emd, positions", {**_SHORT, "layer_map": "emd", "critic": "transformer", "mixup": 0.0,
                                                 "alpha": 0.1}, {"text": True}),
    Row("distiller_mi_alpha", "mse and labels", {"intermediate": "mse", "label": 0.5, "pseudo": 0.5}),
]  # fmt: skip
ZERO = [
    (
        Row("distiller_mi_alpha", "weight 0", {"intermediate_weight": 0.0}),
        Row("distiller_mi_alpha", "no layers", {"intermediate": "none"}),
    )
]
_SGD = {"optimizer": "sgd", "lr": 0.05, "teacher_epochs": 0.0, "mixup": 0.0}
JOINT = [
    Row("distiller_mi_alpha", "sgd, mse", {**_SGD, "intermediate": "mse"}),
    Row("distiller_mi_alpha", "sgd, cosine", {**_SGD, "intermediate": "cosine", "layer_map": "last"}),
]

B = 7
G = torch.Generator().manual_seed(3)
F = 3 * torch.randn(B, B, generator=G, dtype=torch.float64)
C = torch.randn(B, generator=G, dtype=torch.float64)
ALL = (0.0, 0.1, 0.5, 0.9, 1.0)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def by_hand(f, c, alpha):
    """The card's formula, loop by loop, without logarithms of sums."""
    n, found = len(f), []
    f, c = f.tolist(), c.tolist()
    m = [[sum(math.exp(f[i][k]) for k in range(n) if k != j) / (n - 1) for j in range(n)] for i in range(n)]
    M = [[alpha * m[i][j] + (1 - alpha) * math.exp(c[i]) for j in range(n)] for i in range(n)]
    for i in range(n):
        others = [j for j in range(n) if j != i]
        pairs = sum(f[i][i] - math.log(M[i][j]) for j in others) / (n - 1)
        found.append(1 + pairs - sum(math.exp(f[i][j]) / M[i][i] for j in others) / (n - 1))
    return torch.tensor(found, dtype=torch.float64)


# -- the bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALL)
def test_the_bound_is_the_formula(alpha):
    close(mutual_information(F, C, alpha), by_hand(F, C, alpha))


def test_leave_one_out_leaves_out_the_column_also_where_it_is_nearly_everything():
    f = F.clone()
    f[2, 5], f[3, 1], f[3, 4] = 60.0, 40.0, 40.0  # one share of 1 − 1e-24; two equal largest
    wanted = [
        [math.log(sum(math.exp(f[i, k]) for k in range(B) if k != j) / (B - 1)) for j in range(B)] for i in range(B)
    ]
    close(leave_one_out(f), torch.tensor(wanted, dtype=torch.float64))


def test_alpha_one_has_a_marginal_term_of_exactly_one():
    m = leave_one_out(F)
    strangers = (F - m.diagonal()[:, None]).exp().masked_fill(torch.eye(B, dtype=torch.bool), 0).sum(1) / (B - 1)
    close(strangers, torch.ones(B, dtype=torch.float64))
    off = ~torch.eye(B, dtype=torch.bool)
    close(mutual_information(F, C, 1.0).mean(), (F.diagonal()[:, None] - m)[off].mean())


@pytest.mark.parametrize("size", [0.1, 10.0, 1e4])
def test_alpha_one_never_exceeds_log_of_the_strangers(size):
    for f in (size * F, size * torch.eye(B, dtype=torch.float64), size * (torch.eye(B).double() - 1)):
        assert float(mutual_information(f, C, 1.0).mean()) <= math.log(B - 1) + 1e-9
    sharp = mutual_information(1e4 * torch.eye(B, dtype=torch.float64), C, 1.0)
    assert float(sharp.mean()) == pytest.approx(math.log(B - 1))  # reached, so the cap is not merely loose


def test_alpha_zero_is_the_single_sample_bound():
    off = ~torch.eye(B, dtype=torch.bool)
    wanted = 1 + (F.diagonal() - C).mean() - (F - C[:, None])[off].exp().mean()
    close(mutual_information(F, C, 0.0).mean(), wanted)


def test_shifting_a_row_changes_nothing_at_alpha_one_and_something_below():
    shift = torch.linspace(-3, 5, B, dtype=torch.float64)[:, None]
    close(mutual_information(F + shift, C, 1.0), mutual_information(F, C, 1.0))
    assert not torch.allclose(mutual_information(F + shift, C, 0.5), mutual_information(F, C, 0.5))
    close(mutual_information(F + shift, C + shift[:, 0], 0.5), mutual_information(F, C, 0.5))


@pytest.mark.parametrize("alpha", ALL)
def test_the_order_of_the_pairs_does_not_matter(alpha):
    p = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    close(mutual_information(F[p][:, p], C[p], alpha), mutual_information(F, C, alpha)[p])


@pytest.mark.parametrize("alpha", ALL)
def test_the_gradient_is_that_of_finite_differences(alpha):
    given = [F.clone().requires_grad_(), C.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda f, c: mutual_information(f, c, alpha), given, atol=1e-7)


def test_large_scores_do_no_harm_where_the_bound_is_finite():
    f = torch.full((4, 4), -800.0).fill_diagonal_(900.0).requires_grad_()
    value = mutual_information(f, torch.zeros(4), 0.9).mean()
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(f.grad).all()


@pytest.mark.parametrize(
    ("f", "c", "alpha", "word"),
    [(F[:, :5], C, 0.5, "(7, 5)"), (F, C[:3], 0.5, "(3,)"), (F[:2, :2], C[:2], 0.5, "B >= 3"), (F, C, 1.5, "1.5")],
)
def test_the_bound_refuses(f, c, alpha, word):
    with pytest.raises(UserError) as said:
        mutual_information(f, c, alpha)
    assert word in str(said.value) and "\n" not in str(said.value)


def test_the_scores_of_the_gaussians_are_densities():
    from scipy.stats import norm

    g = torch.Generator().manual_seed(1)
    scores, baseline = studies.gaussian_scores(g, 5)
    x, noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    y = 0.9 * x + math.sqrt(0.19) * noise
    wanted = norm.logpdf(y[:, None], 0.9 * x[None], math.sqrt(0.19)).sum(2)
    np.testing.assert_allclose(scores.numpy(), wanted)  # row: y, column: x
    np.testing.assert_allclose(baseline.numpy(), norm.logpdf(y).sum(1))


# -- critics ------------------------------------------------------------------------------------------------------

FEATURES = {
    "vectors": (torch.randn(5, 6, generator=G), torch.randn(5, 9, generator=G), 0),
    "maps": (torch.randn(5, 3, 4, 4, generator=G), torch.randn(5, 8, 2, 2, generator=G), 0),
    "positions": (torch.randn(5, 7, 6, generator=G), torch.randn(5, 4, 9, generator=G), 2),
    "maps, read": (torch.randn(5, 3, 4, 4, generator=G), torch.randn(5, 8, 2, 2, generator=G), 1),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_a_score_is_of_one_pair_and_the_baseline_of_the_teacher_alone(kind):
    s, t, layers = FEATURES[kind]
    critic = Critic(s, t, width=4, hidden=8, layers=layers).eval()
    scores, baseline = critic(s, t)
    assert scores.shape == (5, 5) and baseline.shape == (5,)
    other = s.clone()
    other[2] += 1
    changed, same = critic(other, t)
    assert torch.equal(same, baseline)
    columns = (changed - scores).abs().amax(0) > 1e-6
    assert columns.tolist() == [False, False, True, False, False]  # column = student
    part, few = critic(s[:3], t[:3])  # no example sees another one
    torch.testing.assert_close(part, scores[:3, :3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(few, baseline[:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [0, 2])
def test_padding_is_not_read(layers):
    s, t, _ = FEATURES["positions"]
    critic = Critic(s, t, width=4, hidden=8, layers=layers).eval()
    longer = torch.cat([t, torch.zeros(5, 3, 9)], 1)
    torch.testing.assert_close(critic(s, longer), critic(s, t), rtol=1e-5, atol=1e-6)


def test_the_transformer_critic_reads_the_order_of_positions():
    s, t, _ = FEATURES["positions"]
    read, mean = (Critic(s, t, width=4, hidden=8, layers=k).eval() for k in (2, 0))
    assert not torch.allclose(read(s.flip(1), t)[0], read(s, t)[0], atol=1e-4)
    torch.testing.assert_close(mean(s.flip(1), t)[0], mean(s, t)[0], rtol=1e-5, atol=1e-6)


# -- one interface ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(4, width), nn.Tanh()), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.block(x))


BATCH = {"input": torch.randn(6, 4, generator=G), "label": torch.arange(6) % 3}


def system(*objectives, kind=Distill, **how):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = Net(5), Net(8)
    ask = Frozen(teacher, taps=["block", "block:in"])
    return kind(student, ask, objectives=objectives, label=0.0, example=BATCH, seed=1, **how)


def test_mi_is_an_objective_like_the_others():
    made = system("mi:block=block:2?alpha=0.1&width=4&hidden=8")
    value = made.learn(BATCH, Clock()).terms["mi"]
    comparison, s, t = made.comparisons["0"], made.student.block(BATCH["input"]), made.teacher(BATCH)["block"]
    torch.testing.assert_close(value, -2 * mutual_information(*comparison.critic(s, t), 0.1).mean())
    assert torch.equal(comparison.bound(s, t), mutual_information(*comparison.critic(s, t), 0.1))
    value.backward()
    assert all(p.grad.abs().max() > 0 for p in (made.student.block[0].weight, comparison.critic.baseline.last.weight))
    with pytest.raises(UserError, match="alpha must be a number in"):
        system("mi:block:1?alpha=2")


def test_pkd_and_what_else_is_new_by_hand():
    t, s = torch.randn(5, 4, generator=G, dtype=torch.float64), torch.randn(5, 4, generator=G, dtype=torch.float64)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (t, s)]
    pkd, _ = Config(intermediate="pkd").on_layers(CNN((1, 8, 8), 3), CNN((1, 8, 8), 3))
    term = Objective.parse(pkd[0])
    assert term.options == {"token": 0.0}
    close(term.weight * KNOWN[term.name][1](t, s), (unit[0] - unit[1]).square().sum(1))
    close(KNOWN["logit-mse"][1](t, s, T=2.0), ((t - s) / 2).square().mean(1))
    close(KNOWN["pseudo"][1](t, s), -s.log_softmax(1)[torch.arange(5), t.argmax(1)])
    close(KNOWN["softmax"][1](t, s), -(t.softmax(1) * s.log_softmax(1)).sum(1))


def test_the_loss_of_the_logits_has_no_factor_of_the_temperature():
    z = torch.randn(5, 4, generator=G, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 4, generator=G, dtype=torch.float64)
    o = Objective.parse(*Config(temperature=3.0, prediction_weight=2.0).on_logits())
    (got,) = torch.autograd.grad((o.weight * KNOWN["kd"][1](t, z, **o.options)).sum(), z)
    (wanted,) = torch.autograd.grad((2 * soft_cross_entropy(t, z, 3.0) / 9).sum(), z)
    close(got, wanted)
    assert Config(prediction="mse", temperature=2.0).on_logits() == ["logit-mse:1.0?T=2.0"]
    assert Config(prediction="none", pseudo=0.5).on_logits() == ["pseudo:0.5"]


# -- layer maps ---------------------------------------------------------------------------------------------------


def test_layer_maps_of_12_and_4():
    assert [j for _, j in maps.skip(4, 12)] == [0, 3, 6, 9, 12]
    assert [j for _, j in maps.skip(4, 12, "attention")] == [2, 5, 8, 11]
    assert [j for _, j in maps.last(4, 12)] == [8, 9, 10, 11, 12]
    assert maps.last(4, 12, "attention") == [(0, 8), (1, 9), (2, 10), (3, 11)]
    assert [j for _, j in maps.skip(4, 6)] == [0, 1, 3, 4, 6] and [j for _, j in maps.skip(4, 6, "attention")] == [
        0,
        2,
        3,
        5,
    ]
    assert maps.skip(4, 2, "attention") == [(0, 0), (1, 0), (2, 0), (3, 1)]  # int(), towards zero
    assert maps.every(2, 2, "attention") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(UserError, match="take skip"):
        maps.last(4, 2)


def test_the_plan_is_the_cheapest():
    cost = torch.randn(4, 4, generator=G, dtype=torch.float64)
    plan = maps.transport(cost)
    close(plan.sum(0), torch.full((4,), 0.25, dtype=torch.float64))
    close(plan.sum(1), torch.full((4,), 0.25, dtype=torch.float64))
    best = min(sum(float(cost[i, p[i]]) for i in range(4)) / 4 for p in itertools.permutations(range(4)))
    assert float((plan * cost).sum()) == pytest.approx(best)
    wide = maps.transport(torch.tensor([[0.0, 0.0, 5.0, 5.0], [5.0, 5.0, 0.0, 0.0]]))
    torch.testing.assert_close(wide, torch.tensor([[0.25, 0.25, 0, 0], [0, 0, 0.25, 0.25]]))
    assert torch.isfinite(maps.transport(torch.tensor([[math.nan, 1.0]]))).all()


def test_layers_are_found():
    import timm

    bert = studies.made_up_sentences().teacher.build()
    assert maps.layers_of(bert) == ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert maps.attention_of(bert, "bert.encoder.layer.1") == "bert.encoder.layer.1.attention"
    assert maps.layers_of(CNN((1, 8, 8), 3)) == [None, "block1", "block2", "hidden"]
    assert maps.layers_of(ResNet((3, 8, 8), 3, 8)) == [None, "layer1", "layer2", "layer3"]
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert maps.layers_of(vit) == ["patch_embed", "blocks.0", "blocks.1"]
    assert maps.attention_of(vit, "blocks.0") == "blocks.0.attn"
    with pytest.raises(UserError, match="--student-layers"):
        maps.layers_of(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(UserError, match="no attention"):
        maps.attention_of(CNN((1, 8, 8), 3), "block1")


# -- the pipeline -------------------------------------------------------------------------------------------------


def test_pairs_of_layers_are_added_and_share_a_critic():
    one, two = "mi:block=block:1?width=4&hidden=8", "mi:block:in=block:in:1?width=4&hidden=8"
    again = "mi:block=block:0.5?width=4&hidden=8"
    made = system("kd:1?T=1", one, two, again, kind=Pipeline)
    a, b, c = (made.comparisons[k].critic for k in "123")
    assert a is c and a is not b  # features of the same sizes
    apart = system("kd:1?T=1", one, two, again, kind=Pipeline, share=False)
    assert apart.comparisons["1"].critic is not apart.comparisons["3"].critic
    terms = made.learn(BATCH, Clock())
    assert list(terms.terms) == ["kd", "mi"] and float(terms.notes["student_gradient"]) == 0
    plain = Distill.learn(made, BATCH, Clock()).terms
    torch.testing.assert_close(terms.terms["mi"], plain["mi"] + plain["mi 2"] + plain["mi 3"])
    terms.total.backward()
    made.after_step(Clock())
    norm = torch.cat([p.grad.flatten() for p in made.student.parameters()]).norm()
    torch.testing.assert_close(made.student_gradient, norm)


def test_emd_weighs_all_pairs_by_the_plan():
    pairs = [f"cosine:{a}={b}:1" for a in ("block", "block.0") for b in ("block", "head")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = Net(5), Frozen(Net(8), taps=["block", "head"])
    made = Pipeline(student, teacher, objectives=pairs, label=0.0, example=BATCH, emd=(2, 2))
    each = list(Distill.learn(made, BATCH, Clock()).terms.values())
    best = min((each[0] + each[3]) / 2, (each[1] + each[2]) / 2)
    torch.testing.assert_close(made.learn(BATCH, Clock()).terms["cosine"], best)


def test_mixed_images_have_one_share_and_order_and_labels_count_once():
    made = system("kd:1?T=1", "feature:block=block:1", kind=Pipeline, mixup=0.4)
    made.label = 1.0
    clock, plain = Clock(seed=5, step=3), system("kd:1?T=1", "feature:block=block:1", kind=Pipeline)
    plain.label = 1.0
    mixed = made.mixed(BATCH, clock)
    assert torch.equal(mixed["input"], made.mixed(BATCH, clock)["input"])
    assert not torch.equal(mixed["input"], made.mixed(BATCH, replace(clock, step=4))["input"])
    here, there, both = plain.learn(BATCH, clock).terms, plain.learn(mixed, clock).terms, made.learn(BATCH, clock).terms
    torch.testing.assert_close(both["label"], here["label"])
    for name in ("kd", "feature"):
        torch.testing.assert_close(both[name], (here[name] + there[name]) / 2)
    share, order = made.draw(6, clock)
    assert 0 <= share <= 1 and sorted(order.tolist()) == list(range(6))
    torch.testing.assert_close(mixed["input"], share * BATCH["input"] + (1 - share) * BATCH["input"][order])


def test_mixed_sentences_are_mixed_word_vectors_of_both_networks():
    pair = studies.made_up_sentences()
    student, teacher = pair.student.build(seed=1), pair.teacher.build(seed=2)
    batch = pair.learns.train.take(np.arange(6))
    made = Pipeline(student, Frozen(teacher), objectives=["kd:1?T=1"], label=0.0, example=batch, mixup=0.4,
                    teacher_model=teacher)  # fmt: skip
    mixed, ids = made.mixed(batch, Clock(seed=1)), batch["input"]["input_ids"]
    own, theirs = (m.get_input_embeddings()(ids) for m in (student, teacher))
    got = mixed["input"]["inputs_embeds"], mixed["mixed"]["inputs_embeds"]
    assert "input_ids" not in mixed["input"] and got[1].shape == theirs.shape and not got[1].requires_grad
    share, order = made.draw(6, Clock(seed=1))
    for found, plain in zip(got, (own, theirs), strict=True):
        torch.testing.assert_close(found, share * plain + (1 - share) * plain[order])
    mask = batch["input"]["attention_mask"]
    assert torch.equal(mixed["input"]["attention_mask"], mask | mask[order])
    made.learn(batch, Clock(seed=1)).total.backward()
    assert student.get_input_embeddings().weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="word vectors"):
        Pipeline(nn.Linear(2, 2), Frozen(teacher), objectives=["kd:1"], example=batch, mixup=0.4, teacher_model=teacher)


def test_the_bound_on_other_samples_is_that_of_the_critics(tmp_path):
    data = load("digits", limit=40)
    spec = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [8, 8]})
    student, teacher = spec.build(seed=1), spec.build(seed=2)
    made = Pipeline(student, Frozen(teacher, taps=["4"]), objectives=["mi:4=4:1?alpha=0.5"], label=0.0,
                    example=data.train.take(np.arange(4)))  # fmt: skip
    found = made.bound(data.test, 200)
    x = data.test.take(np.arange(400))["input"]
    with torch.no_grad():
        first = [nn.Sequential(*list(m)[:5]) for m in (student, teacher)]
        parts = [made.comparisons["0"].bound(*(m(p) for m in first)).mean() for p in x.split(200)]
    assert found == pytest.approx(float(sum(parts) / 2), rel=1e-6)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, spec, teacher, replace(TINY, teacher_epochs=0.0))
    assert {"bound", "bound_before"} <= set(family.cost) and family.cost["bound"] != family.cost["bound_before"]


# -- edits --------------------------------------------------------------------------------------------------------


def test_words_are_edited_one_at_a_time():
    words = ["a", "b", "c", "d", "e"]
    seen = {tuple(augment.edit_words(words, 0.3, np.random.default_rng(k), ["new"])) for k in range(300)}
    assert tuple(words) in seen and ("a", "c", "d", "e") in seen and ("a", "c", "b", "d", "e") in seen
    assert ("a", "new", "c", "d", "e") in seen and ("a", "b", "new", "c", "d", "e") in seen
    assert all(1 <= len(s) <= 10 and set(s) <= {*words, "new"} for s in seen)
    assert augment.edit_words(words, 0.0, np.random.default_rng(0), ["new"]) == words
    assert augment.edited(["x y z"] * 3, 0.5, 1) == augment.edited(["x y z"] * 3, 0.5, 1)


def shout(texts):
    return [t.upper() for t in texts]


def test_edits_double_the_training_part_in_their_order(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_edits.py").write_text("def louder(texts):\n    return [t + ' indeed' for t in texts]\n")
    data = studies.made_up_sentences(12).learns
    run = Run(tmp_path / "run", quiet=True, device="cpu")
    made = augment.augmented(run, data, ("words:0.5", "mine_edits:louder"))
    rows = made.train.rows
    assert len(made.train) == 2 * len(data.train) and made.test is data.test
    half = len(data.train)
    assert [r["label"] for r in rows[:half]] == [r["label"] for r in rows[half:]]
    assert all(r["text"].endswith(" indeed") for r in rows[half:]) and rows[:half] == list(data.train.rows)
    assert json.loads((run.folder / "augmented.json").read_text())[0] == [r["text"] for r in rows[half:]]
    with pytest.raises(UserError, match="no sentences"):
        augment.augmented(run, load("digits", limit=20), ("words:0.5",))


def test_a_masked_language_model_guesses_words(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from stillhouse.text.encoding import small_tokenizer

    texts = ["the film was great", "the plot was dull"] * 2
    tokenizer = small_tokenizer(texts)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    found = augment.guessed(texts, 1.0, 0, str(tmp_path / "lm"))
    assert len(found) == 4 and found == augment.guessed(texts, 1.0, 0, str(tmp_path / "lm")) and found != texts
    words = {w for t in texts for w in t.split()}
    assert all(set(t.split()) <= words and "[" not in t for t in found)
    assert augment.guessed(texts, 1e-9, 0, str(tmp_path / "lm")) == texts


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def opinions(tmp_path):
    rows = studies.made_up_sentences(40).learns.train.rows
    path = tmp_path / "opinions.jsonl"
    path.write_text("\n".join(json.dumps({"text": r["text"], "label": r["label"]}) for r in rows))
    return path


COMMON = ["--epochs", "1", "--teacher-epochs", "1", "--batch", "8", "--lr", "0.001", "--quiet", "--device", "cpu"]
SMALL = ["--length", "16", "--width", "8", "--layers", "2"]


def test_a_users_sentences_and_networks(opinions, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["run", "distiller_mi_alpha", "--data", str(opinions), "--teacher", "bert", "--student", "bert", *COMMON]
    argv += [*SMALL, "--layer-map", "last", "--features", "attention", "--alpha", "0.1", "--mixup", "0.4"]
    assert invoke([*argv, "--out", str(out)]) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["metrics"]["task"]["classes"] == 2 and math.isfinite(report["cost"]["bound"])
    assert any("attention=" in n for n in report["notes"]) and (out / "students/student/tokenizer.json").exists()


DIGITS = ["--data", "digits", "--limit", "64", "--teacher", "stillhouse:cnn", "--model", "stillhouse:mlp", *COMMON]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*DIGITS, "--alpha", "1.5"], ["alpha in [0, 1]", "1.5"]),
        ([*DIGITS, "--intermediate", "msee"], ["did you mean 'mse'"]),
        ([*DIGITS, "--intermediate", "kd"], ["no loss of layers 'kd'"]),
        ([*DIGITS, "--edits", "words:0.1"], ["no sentences"]),
        ([*DIGITS, "--edits", "words:2"], ["words:P", "words:2"]),
        ([*DIGITS, "--edits", "contextual:0.1"], ["--language-model"]),
        ([*DIGITS, "--batch", "2"], ["3 samples"]),
        ([*DIGITS, "--features", "attention"], ["no attention"]),
        ([*DIGITS, "--student-layers", "block9", "--layer-map", "last"], ["block9"]),
        ([*DIGITS, "--prediction", "none", "--intermediate", "none"], ["something to learn from"]),
        (["--data", "digits", *COMMON], ["--teacher is missing"]),
        ([*DIGITS, "--intermediate", "mse", "--alpha", "0.5"], ["--alpha does nothing", "--intermediate mi, not mse"]),
        ([*DIGITS, "--intermediate", "none", "--layer-map", "last"], ["--layer-map does nothing", "none"]),
        ([*DIGITS, "--prediction", "none", "--temperature", "2"], ["--temperature does nothing", "--prediction none"]),
        ([*DIGITS, "--language-model", "x"], ["--language-model does nothing", "contextual"]),
    ],
    ids=lambda v: " ".join(v)[-40:],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    assert invoke(["run", "distiller_mi_alpha", *flags, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and all(w in said for w in words), said


def test_r_squared_by_hand():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(60, 3))
    gram = np.hstack([x, np.ones((60, 1))])
    said = gram @ np.linalg.lstsq(gram, y, rcond=None)[0]
    wanted = 1 - ((y - said) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert studies.r_squared(x, y, x, y, ridge=0.0) == pytest.approx(wanted)
    assert studies.r_squared(x, y, x, np.tile(y.mean(0), (60, 1)) + 1, ridge=1e12) == pytest.approx(0, abs=1e-6)
