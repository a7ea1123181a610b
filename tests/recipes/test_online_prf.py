"""Online distillation of queries: closed forms, limits and invariances of the student; pools and calls; mistakes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from table import Row

import stillhouse
from stillhouse.cli import invoke
from stillhouse.errors import UserError
from stillhouse.recipes.online_prf import evaluation
from stillhouse.recipes.online_prf.config import Config
from stillhouse.recipes.online_prf.recipe import distill, distill_query
from stillhouse.recipes.online_prf.student import (
    expand,
    features,
    lasso,
    learn,
    listwise,
    positive_ridge,
    ridge,
    softmax,
    standardised,
)
from stillhouse.recipes.online_prf.teachers import Latent, Passages, Training, TwoTower, save_reranker, train_bi_encoder
from stillhouse.retrieval import Collection, Scores, SparseIndex, Tokens, bm25, load_collection, load_reranker
from stillhouse.retrieval.rerank import BiEncoder
from stillhouse.run import Run
from stillhouse.system import Clock

ROWS = [
    Row("online_prf", "both signs", {"non_negative": False, "mix": 0.0}),
    Row("online_prf", "lasso, 3 rounds", {"student": "lasso", "rounds": 3}),
    Row("online_prf", "listwise", {"student": "listwise", "min_df": 2}),
]
JOINT = [Row("online_prf")]
SEEDLESS = True  # the fits are closed forms; the teacher's SVD has a seed of its own

N, V = 60, 30
WORDS = [f"w{j}" for j in range(V)]


def random_index(n: int = N, seed: int = 0) -> SparseIndex:
    rng = np.random.default_rng(seed)
    dense = rng.gamma(2.0, 1.0, (n, V)) * (rng.random((n, V)) < 0.4)
    texts = [" ".join(w for w, x in zip(WORDS, row) if x) or "w0" for row in dense]
    return SparseIndex(sp.csr_matrix(dense), WORDS, [f"d{i}" for i in range(n)], texts, Tokens("none", "none"))


INDEX = random_index()
DENSE = INDEX.by_doc.toarray()


class Linear:
    """A teacher that is itself a weighted bag of terms, of documents known by their text."""

    def __init__(self, theta: np.ndarray, index: SparseIndex = INDEX):
        self.scores = dict(zip(index.texts(index.ids), index.by_doc @ theta))
        self.asked: list[str] = []

    def __call__(self, query, texts):
        self.asked += list(texts)
        return [self.scores[t] for t in texts]


def theta_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(V)


def problem(k: int = 12, v: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.gamma(1.0, 1.0, (k, v)) * (rng.random((k, v)) < 0.6), rng.standard_normal(k)


QUERY = "w1 w2 w3"
BOTH = Config(k=20, terms=8, non_negative=False, ridge=5.0, refit_ridge=2.0)


# -- the fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("lam", [1e-3, 50.0])
def test_dual_is_primal_ridge(shape, lam):
    """Also against the normal equations with a free bias that is not penalised."""
    F, s = problem(*shape)
    Fc, sc = F - F.mean(0), s - s.mean()
    primal = np.linalg.solve(Fc.T @ Fc + lam * np.eye(shape[1]), Fc.T @ sc)
    dual = Fc.T @ np.linalg.solve(Fc @ Fc.T + lam * np.eye(shape[0]), sc)
    X = np.hstack([F, np.ones((shape[0], 1))])
    with_bias = np.linalg.solve(X.T @ X + lam * np.diag([1.0] * shape[1] + [0.0]), X.T @ s)[:-1]
    for other in (primal, dual, with_bias):
        np.testing.assert_allclose(ridge(F, s, lam), other, atol=1e-9)


def test_ridge_is_the_minimiser_of_the_pairwise_margin_mse():
    """Σ_{i<j} ((S_i − S_j) − (s_i − s_j))² + kλ‖θ‖² has gradient 0 there, by autograd."""
    F, s = problem()
    theta = torch.tensor(ridge(F, s, 3.0), requires_grad=True)
    S, target = torch.tensor(F) @ theta, torch.tensor(s)
    margins = (S[:, None] - S[None]) - (target[:, None] - target[None])
    loss = (margins**2).triu(1).sum() + len(s) * 3.0 * (theta**2).sum()
    (grad,) = torch.autograd.grad(loss, theta)
    assert grad.abs().max() < 1e-9


def test_the_limits_of_lambda():
    """0: the scores exactly (rank permitting). Large: θ ≈ F_cᵀ s_c / λ → 0. Infinite: 0."""
    F, s = problem()
    np.testing.assert_allclose((F - F.mean(0)) @ ridge(F, s, 0.0), s - s.mean(), atol=1e-9)
    covariance = (F - F.mean(0)).T @ (s - s.mean())
    np.testing.assert_allclose(1e9 * ridge(F, s, 1e9), covariance, rtol=1e-4, atol=1e-5)
    assert not ridge(F, s, math.inf).any() and not positive_ridge(F, s, math.inf).any()


def test_a_linear_teacher_is_recovered():
    """More documents than terms, λ → 0: θ is the teacher's, up to the scale of standardisation."""
    teacher = theta_of(1)
    s = DENSE @ teacher
    theta = learn(DENSE, s, Config(terms=V, ridge=1e-10, refit_ridge=1e-10, non_negative=False))
    np.testing.assert_allclose(theta * s.std(), teacher, atol=1e-8)


def test_positive_ridge_is_a_constrained_minimum():
    """Karush-Kuhn-Tucker: θ ≥ 0, gradient ≥ 0, and one of both is zero for every term."""
    F, s = problem()
    theta = positive_ridge(F, s, 2.0)
    Fc, sc = F - F.mean(0), s - s.mean()
    grad = Fc.T @ (Fc @ theta - sc) + 2.0 * theta
    assert (theta >= 0).all() and (grad > -1e-9).all() and np.abs(theta * grad).max() < 1e-9
    assert (theta > 0).any() and (grad > 1e-3).any()


def test_lasso_by_its_subgradient():
    F, s = problem(60, 10)
    theta, penalty = lasso(F, s, 0.05), 0.05
    grad = (F - F.mean(0)).T @ ((F - F.mean(0)) @ theta - (s - s.mean())) / len(s)
    assert np.abs(grad[theta != 0] + penalty * np.sign(theta[theta != 0])).max() < 0.01
    assert np.abs(grad[theta == 0]).max() <= penalty + 0.01 and (theta == 0).any() and (theta != 0).any()


def test_listwise_descends_the_kl_that_autograd_has():
    F, s = problem()
    theta, T = np.random.default_rng(5).standard_normal(F.shape[1]), 1.7
    x = torch.tensor(theta, requires_grad=True)
    p, z = torch.tensor(s / T).softmax(0), torch.tensor(F - F.mean(0)) @ x / T
    (grad,) = torch.autograd.grad(T * T * (p * (p.log() - z.log_softmax(0))).sum(), x)
    by_hand = T * ((F - F.mean(0)).T @ (softmax((F - F.mean(0)) @ theta / T) - softmax(s / T)))
    np.testing.assert_allclose(by_hand, grad.numpy(), atol=1e-12)
    first = listwise(F, s, T, steps=1, lr=0.1)  # Adam's first step is the gradient's sign
    at_zero = (F - F.mean(0)).T @ (np.full(len(s), 1 / len(s)) - softmax(s / T))
    np.testing.assert_allclose(first, -0.1 * np.sign(at_zero), atol=1e-6)
    fitted = softmax((F - F.mean(0)) @ listwise(F, s, 1.0, steps=2000))
    assert np.abs(fitted - softmax(s)).max() < 1e-3
    assert (listwise(F, s, 1.0, positive=True) >= 0).all()


@pytest.mark.parametrize("student", ["ridge", "lasso", "listwise"])
@pytest.mark.parametrize("positive", [False, True])
def test_a_shift_or_scale_of_the_scores_changes_nothing(student, positive):
    F, s = problem(20, 30)
    cfg = replace(BOTH, student=student, non_negative=positive)
    np.testing.assert_allclose(learn(F, 7.0 + 300 * s, cfg), learn(F, s, cfg), atol=1e-7)
    assert not np.allclose(learn(F, -s, cfg), learn(F, s, cfg))


def test_scores_that_are_all_alike_teach_nothing():
    F, _ = problem()
    assert not standardised(np.full(5, 0.1)).any()
    assert not learn(F, np.full(len(F), 0.1), BOTH).any()
    found = distill_query(QUERY, INDEX, lambda q, texts: [3.0] * len(texts), BOTH)
    assert found.query.terms == pytest.approx({"w1": 1 / 3, "w2": 1 / 3, "w3": 1 / 3}) and found.student == {}


# -- keeping a few terms -----------------------------------------------------------------------------------------


def test_the_terms_kept_are_those_that_move_the_scores_most():
    F, s = problem(12, 20)
    cfg = Config(terms=5, ridge=3.0, refit_ridge=1.0, non_negative=False)
    dense = ridge(F, standardised(s), 3.0)
    kept = set(np.argsort(-np.abs(dense) * F.std(0))[:5])
    theta = learn(F, s, cfg)
    assert set(np.flatnonzero(theta)) == kept
    np.testing.assert_allclose(theta[sorted(kept)], ridge(F[:, sorted(kept)], standardised(s), 1.0))


def test_with_room_for_all_terms_nothing_is_dropped():
    F, s = problem(12, 20)
    wide = learn(F, s, Config(terms=20, ridge=3.0, refit_ridge=1.0, non_negative=False))
    np.testing.assert_allclose(wide, ridge(F, standardised(s), 1.0))
    np.testing.assert_array_equal(wide, learn(F, s, Config(terms=999, ridge=3.0, refit_ridge=1.0, non_negative=False)))


def test_terms_of_too_few_documents_and_negative_ones_are_left_out():
    F, s = problem(12, 20)
    F[:, 3] = 0
    F[4, 3] = 9.0  # one document's own term, which explains its residual best
    s[4] = 5.0
    cfg = Config(terms=20, ridge=3.0, refit_ridge=1.0, non_negative=False)
    assert learn(F, s, cfg)[3] != 0 and learn(F, s, replace(cfg, min_df=2))[3] == 0
    assert (learn(F, s, cfg) < 0).any() and (learn(F, s, replace(cfg, non_negative=True)) >= 0).all()


def test_expand_by_hand():
    made = expand({"x": 3.0, "y": -1.0}, {"x": 2.0, "z": 2.0}, 0.4)
    assert made == pytest.approx({"x": 0.6 * 0.75 + 0.2, "z": 0.2, "y": -0.15})
    assert list(made) == ["x", "z", "y"] and list(expand({"x": -3.0}, {"y": 1.0}, 0.0)) == ["x"]


# -- a request ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"non_negative": True}, {"student": "lasso"}, {"student": "listwise"}])
def test_the_engine_executes_what_was_fitted(changes):
    """For every document of R₁: S(d) from the features is the engine's score of the executed query."""
    cfg = replace(BOTH, **changes)
    found = distill_query(QUERY, INDEX, Linear(theta_of(2)), cfg)
    docs = [d for d, _ in found.first]
    F, names = features(INDEX.weights(docs))
    by_features = F @ np.array([found.query.terms.get(t, 0.0) for t in names])
    engine = INDEX.scores(found.query.terms)
    np.testing.assert_allclose(by_features, engine[INDEX.positions(docs)], atol=1e-10)
    assert dict(found.second) == pytest.approx({d: engine[INDEX.positions([d])[0]] for d, _ in found.second})
    assert set(found.query.terms) <= set(names)


def test_pool_and_calls():
    """U ⊇ R₁, U = R₁ ∪ R₂, each document scored once, the final order the re-ranker's."""
    teacher = Linear(theta_of(2))
    found = distill_query(QUERY, INDEX, teacher, BOTH)
    first, second, final = ({d for d, _ in r} for r in (found.first, found.second, found.final))
    assert final == first | second and second - first
    assert len(teacher.asked) == len(set(teacher.asked)) == len(final) == found.calls
    assert found.final == sorted(found.final, key=lambda p: -p[1])
    assert [s for _, s in found.final] == [teacher.scores[t] for t in INDEX.texts([d for d, _ in found.final])]
    assert found.found[: len(first)] == [d for d, _ in found.first] and set(found.found) == final
    assert {d for d, _ in found.reranked} == first and found.rounds == 1 and found.query.text == QUERY


def test_without_a_student_the_query_is_the_question():
    """λ = ∞ and a > 0: the same ranking as before, and nothing new. a = 1 too."""
    for cfg in (replace(BOTH, ridge=math.inf, refit_ridge=math.inf), replace(BOTH, mix=1.0)):
        found = distill_query(QUERY, INDEX, Linear(theta_of(2)), cfg)
        assert [d for d, _ in found.second] == [d for d, _ in found.first] and found.calls == len(found.first)


def test_a_linear_teacher_finds_its_own_best_documents():
    """With all terms, λ → 0 and a = 0 the second stage is the teacher's ranking of the whole collection."""
    index, teacher = random_index(200, 3), theta_of(4)
    cfg = Config(k=60, terms=V, ridge=1e-9, refit_ridge=1e-9, mix=0.0, non_negative=False)
    found = distill_query(QUERY, index, Linear(teacher, index), cfg)
    best = np.argsort(-(index.by_doc @ teacher), kind="stable")[:60]
    assert [d for d, _ in found.second] == [index.ids[i] for i in best]
    assert [d for d, _ in found.final][:60] == [index.ids[i] for i in best]


def test_rounds_go_on_until_nothing_is_new():
    one = distill_query(QUERY, INDEX, Linear(theta_of(2)), BOTH)
    many = distill_query(QUERY, INDEX, Linear(theta_of(2)), replace(BOTH, rounds=50))
    assert 1 < many.rounds < 50 and set(one.found) < set(many.found)
    assert {d for d, _ in many.second} <= set(many.found)


def test_the_ranking_ignores_a_shift_or_scale_of_the_re_ranker():
    teacher = Linear(theta_of(2))
    moved = distill_query(QUERY, INDEX, lambda q, texts: [5 + 100 * x for x in teacher(q, texts)], BOTH)
    plain = distill_query(QUERY, INDEX, teacher, BOTH)
    assert [d for d, _ in moved.final] == [d for d, _ in plain.final]
    assert moved.query.terms == pytest.approx(plain.query.terms)


class Bare:
    """A user's engine with the five methods and nothing else; it knows no negative weights."""

    def __len__(self):
        return len(INDEX)

    def parse(self, text):
        return INDEX.parse(text)

    def search(self, query, k):
        assert min(query.values()) >= 0, "dynamic pruning"
        return INDEX.search(query, k)

    def weights(self, docs):
        return INDEX.weights(docs)

    def texts(self, docs):
        return INDEX.texts(docs)


def test_an_index_of_ones_own_that_takes_no_negative_weights():
    cfg = replace(BOTH, non_negative=True)
    assert (
        distill_query(QUERY, Bare(), Linear(theta_of(2)), cfg).query
        == distill_query(QUERY, INDEX, Linear(theta_of(2)), cfg).query
    )
    with pytest.raises(AssertionError, match="dynamic pruning"):
        distill_query(QUERY, Bare(), Linear(theta_of(2)), BOTH)


class Deaf(Bare):
    def search(self, query, k):
        return []


@pytest.mark.parametrize(
    ("query", "index", "cfg", "says"),
    [
        ("", INDEX, BOTH, "the query is empty"),
        (" \n", INDEX, BOTH, "the query is empty"),
        ("nobody knows", INDEX, BOTH, "'nobody knows' has no term that the index knows"),
        (QUERY, INDEX, replace(BOTH, k=61), "k = 61 is more than the 60 documents"),
        (QUERY, Deaf(), BOTH, "finds no document"),
        (QUERY, type("Empty", (Bare,), {"__len__": lambda self: 0})(), BOTH, "has no documents"),
    ],
)
def test_mistakes_in_a_request(query, index, cfg, says):
    with pytest.raises(UserError, match=says) as error:
        distill_query(query, index, Linear(theta_of(2)), cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 1}, "k must be at least 2"),
        ({"terms": 0}, "terms must be at least 1"),
        ({"rounds": 0}, "rounds"),
        ({"mix": 1.2}, "mix"),
        ({"ridge": -1.0}, "ridge must be 0 or more"),
        ({"refit_ridge": math.nan}, "refit_ridge"),
        ({"lasso": 0.0}, "lasso must be positive"),
        ({"temperature": -1.0}, "temperature"),
        ({"student": "forest"}, "student must be"),
    ],
)
def test_mistakes_in_settings(settings, says):
    with pytest.raises(UserError, match=says):
        Config(**settings)


# -- a set of requests -------------------------------------------------------------------------------------------

COLLECTION = Collection("made", dict(zip(INDEX.ids, INDEX._texts)), {"1": "w1 w2", "2": "w3", "3": "w4 w5"})


def test_an_interrupted_set_asks_for_nothing_twice_and_gives_the_same(tmp_path):
    whole, broken = Linear(theta_of(2)), Linear(theta_of(2))
    one = distill(Run(tmp_path / "whole", quiet=True), COLLECTION, INDEX, whole, BOTH)

    def breaking(query, texts):
        if query == "w3":
            raise MemoryError
        return broken(query, texts)

    breaking.name = Linear.__qualname__
    with pytest.raises(MemoryError):
        distill(Run(tmp_path / "broken", quiet=True), COLLECTION, INDEX, breaking, BOTH)
    two = distill(Run(tmp_path / "broken", quiet=True), COLLECTION, INDEX, broken, BOTH)
    assert two.queries == one.queries and broken.asked == whole.asked
    assert all(r.seconds["rerank"] > 0 for r in two.results.values())
    assert two.cost["reranker_calls"] == len(broken.asked) == sum(r.calls for r in two.results.values())
    with pytest.raises(UserError, match="scores of another re-ranker"):
        distill(Run(tmp_path / "broken", quiet=True), COLLECTION, INDEX, lambda q, t: [0.0] * len(t), BOTH)


def test_queries_come_back_and_can_be_executed(tmp_path):
    made = distill(Run(tmp_path, quiet=True), COLLECTION, INDEX, Linear(theta_of(2)), BOTH)
    made.save(tmp_path)
    back = stillhouse.load(tmp_path / "queries")
    assert back.queries == made.queries and back.facts["settings"]["terms"] == 8
    assert INDEX.search(back.queries[0].terms, 20) == made.results["1"].second


def test_a_query_without_known_terms_stops_or_is_left_out(tmp_path):
    odd = Collection("odd", COLLECTION.docs, {"1": "w1", "9": "unheard of"})
    with pytest.raises(UserError, match=r"query '9': .* no term that the index knows"):
        distill(Run(tmp_path, quiet=True), odd, INDEX, Linear(theta_of(2)), BOTH)
    found = distill(Run(tmp_path, quiet=True), odd, INDEX, Linear(theta_of(2)), BOTH, skip_bad=True)
    assert list(found.results) == ["1"] and "query '9' was left out" in found.notes[0]
    none = Collection("none", COLLECTION.docs, {"9": "unheard of"})
    with pytest.raises(UserError, match="none of the 1 queries"):
        distill(Run(tmp_path, quiet=True), none, INDEX, Linear(theta_of(2)), BOTH, skip_bad=True)


def test_pools_ask_the_re_ranker_equally_often(tmp_path):
    made = distill(Run(tmp_path, quiet=True), COLLECTION, INDEX, Linear(theta_of(2)), BOTH)
    pools = evaluation.pools(made.results, COLLECTION, INDEX)
    for id, r in made.results.items():
        first = [d for d, _ in r.first]
        assert pools["distilled"][id] == r.found and len(pools["Rocchio"][id]) == r.calls
        assert len(set(pools["Rocchio"][id])) == r.calls and pools["Rocchio"][id][: len(first)] == first
        ranked = INDEX.search(INDEX.parse(COLLECTION.queries[id]), r.calls)
        assert pools["deeper"][id] == [d for d, _ in ranked] and len(ranked) <= r.calls


def test_fidelity_of_a_linear_teacher_is_perfect(tmp_path):
    cfg = Config(k=60, terms=V, ridge=1e-9, refit_ridge=1e-9, non_negative=False)
    index = random_index(400, 3)
    docs = dict(zip(index.ids, index._texts))
    made = distill(
        Run(tmp_path, quiet=True), Collection("m", docs, {"1": "w1 w2"}), index, Linear(theta_of(4), index), cfg
    )
    found = evaluation.fidelity(made.results, index, cfg, [0])
    assert found["tau"] == found["tau_kept"] == 1.0 and found["tau_half"] < 1  # 30 documents do not fix 30 weights
    noise = evaluation.fidelity(made.results, index, replace(cfg, ridge=math.inf, refit_ridge=math.inf), [0])
    assert noise["tau"] == noise["tau_half"] == 0


# -- re-rankers of the experiment --------------------------------------------------------------------------------

DOCS = {
    "a": "radio waves in the ionosphere", "b": "radio noise of a receiver", "c": "transistor noise",
    "d": "waves in plasma and the ionosphere", "e": "transistor receiver circuits",
}  # fmt: skip


def test_latent_is_the_cosine_and_bm25():
    """With as many dimensions as documents the LSA is the plain cosine of (1 + ln tf) idf vectors."""
    index = bm25(DOCS)
    words = Tokens()(list(DOCS.values()))
    idf = {t: math.log(5 / sum(t in w for w in words)) for t in index.terms}
    vectors = np.array([[idf[t] * (t in w) for t in index.terms] for w in words])
    q = np.array([idf[t] * (t in ("radio", "nois")) for t in index.terms])
    teacher = Latent(index, weight=3.0, dims=99)
    basis = np.linalg.svd(vectors)[2][: min(vectors.shape) - 1]  # scikit-learn's dims stay below the smaller side
    left, right = vectors @ basis.T, basis @ q
    cosine = left @ right / np.linalg.norm(left, axis=1) / np.linalg.norm(right)
    expected = 3 * cosine + index.scores({"radio": 1.0, "nois": 1.0})
    np.testing.assert_allclose(teacher("noise radio", list(DOCS.values())), expected, atol=1e-3)
    lexical = teacher.weighing(0.0)("noise radio", list(DOCS.values()))
    np.testing.assert_allclose(lexical, index.scores({"radio": 1.0, "nois": 1.0}))
    with pytest.raises(UserError, match="another text"):
        teacher("noise", ["never seen"])


def test_passages_are_a_part_of_their_document_and_the_rest():
    docs = [list(range(1 + 10 * i, 10 + 10 * i)) for i in range(12)] + [[1, 2]]
    source = Passages(docs, 4)
    assert source.steps_per_epoch == 3
    seen = []
    for step in range(3):
        batch = source.batch(Clock(step=step))
        for q, d in zip(batch["query"].tolist(), batch["doc"].tolist()):
            q, d = [x for x in q if x], [x for x in d if x]
            whole = docs[q[0] // 10]
            assert len(q) == 3 and q == list(range(q[0], q[0] + 3)) and set(d) in (set(whole), set(whole) - set(q))
            seen.append(q[0] // 10)
    assert sorted(seen) == list(range(12))
    assert torch.equal(source.batch(Clock(step=2))["query"], source.batch(Clock(step=2))["query"])
    with pytest.raises(UserError, match="6 known words"):
        Passages([[1, 2]], 4)


def test_contrastive_loss_by_hand():
    system = TwoTower(5, 2, temperature=0.5)
    batch = {"query": torch.tensor([[1, 2], [3, 0]]), "doc": torch.tensor([[4, 0], [2, 3]])}
    w = system.table.weight
    mean = lambda ids: torch.stack([w[i] for i in ids]).mean(0)  # noqa: E731
    unit = torch.nn.functional.normalize
    q, d = unit(torch.stack([mean([1, 2]), w[3]])), unit(torch.stack([w[4], mean([2, 3])]))
    z = q @ d.T / 0.5
    expected = -(z.log_softmax(1).diag().mean() + z.log_softmax(0).diag().mean()) / 2
    assert torch.allclose(system.contrast(batch, Clock()).total, expected)


def test_a_bi_encoder_is_trained_saved_and_used(tmp_path):
    rng = np.random.default_rng(0)
    docs = {f"{t}-{i}": " ".join(f"topic{t}word{j}" for j in rng.permutation(8)) for t in range(10) for i in range(4)}
    how = Training(dims=16, epochs=60, batch=8)
    model = train_bi_encoder(Run(tmp_path / "run", quiet=True), docs, how)
    again = train_bi_encoder(Run(tmp_path / "run", quiet=True), docs, how)  # read back, not trained
    asked = ("topic3word0 topic3word1", ["topic5word4 topic5word6", "topic3word4 topic3word6", "topic1word0 unheard"])
    scores = save_reranker(model, tmp_path / "saved")(*asked)
    assert scores[1] > max(scores[0], scores[2])  # words of one topic go together
    np.testing.assert_array_equal(scores, BiEncoder(again)(*asked))
    np.testing.assert_allclose(scores, load_reranker(f"hf:{tmp_path / 'saved'}")(*asked), atol=1e-6)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)


def test_run_without_data_is_a_smoke_test(no_data, tmp_path, capsys):
    out = tmp_path / "out"
    assert invoke(["run", "online_prf", "--queries", "4", "--out", str(out), "--quiet"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert any("smoke test" in n for n in report["notes"]) and any("stand-in" in n for n in report["notes"])
    titles = [t["title"] for t in report["tables"]]
    assert titles[:3] == ["What was found", "Milliseconds per query", "Distilled queries"] and titles[3][:6] == "Query "
    assert len(stillhouse.load(out / "queries")) == 4
    assert len((out / "rankings" / "first.trec").read_text().splitlines()) > 4
    assert len((out / "scores.jsonl").read_text().splitlines()) >= 5


def own_files(home: Path) -> None:
    (home / "mine").mkdir()
    rows = [{"doc_id": d, "text": t} for d, t in DOCS.items()]
    (home / "mine" / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "mine" / "queries.jsonl").write_text('{"query_id": "1", "text": "receiver noise"}\n')
    (home / "prf_things.py").write_text(
        "from stillhouse.retrieval import bm25\n"
        "def score(query, texts): return [len(t) for t in texts]\n"
        "def short(query, texts): return [1.0]\n"
        "def engine(collection): return bm25(collection.docs, k1=2.0)\n"
        "def no_engine(collection): return object()\ndef broken(collection=None): raise KeyError('oh')\n"
    )


def test_run_on_ones_own_documents_index_and_re_ranker(no_data, tmp_path, monkeypatch, capsys):
    own_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    base = ["run", "online_prf", "--k", "2", "--quiet", "--data", "mine"]
    assert invoke([*base, "--model", "prf_things:score", "--index", "prf_things:engine", "--out", "a"]) == 0
    assert stillhouse.load("a/queries").facts["index"]["k1"] == 2.0
    report = json.loads(Path("a/report.json").read_text())
    assert not report["claims"] and "What was found" not in [t["title"] for t in report["tables"]]  # no judgements


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "nothing-there"], "no collection 'nothing-there'"),
        (["--data", "vaswani"], "STILLHOUSE_DATA"),
        (["--data", "mine", "--k", "6"], "k = 6 is more than the 5 documents"),
        (["--data", "mine", "--k", "2", "--model", "prf_things:short"], "shape (1,) for 2 documents"),
        (["--data", "mine", "--k", "2", "--index", "prf_things:no_engine"], "lacks parse, search, weights, texts"),
        (["--data", "mine", "--k", "2", "--index", "prf_things:broken"], "raised KeyError: 'oh'"),
        (["--data", "prf_things:broken"], "--data prf_things:broken raised KeyError"),
        (["--data", "mine", "--k", "2", "--model", "hf:./no"], "no folder no"),
        (["--data", "mine", "--k", "2", "--stemmer", "klingon"], "no stemmer 'klingon'"),
        (["--mix", "3"], "mix is the question's share"),
        (["--queries", "0"], "queries must be at least 1"),
    ],
)
def test_mistakes_on_the_command_line(no_data, tmp_path, monkeypatch, capsys, flags, says):
    own_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert invoke(["run", "online_prf", "--out", "out", "--quiet", *flags]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.strip().splitlines()) == 1


@pytest.mark.data
def test_vaswani_student_is_the_engine(data_root, tmp_path):
    """On real documents: the executed query scores R₁ as the features do, for the first 5 queries."""
    collection = load_collection("vaswani").first(5)
    index = bm25(collection.docs)
    scores = Scores(Latent(index, dims=20))
    made = distill(Run(tmp_path, quiet=True), collection, index, scores, Config(k=50))
    for r in made.results.values():
        docs = [d for d, _ in r.first]
        F, names = features(index.weights(docs))
        by_features = F @ np.array([r.query.terms.get(t, 0.0) for t in names])
        np.testing.assert_allclose(by_features, index.scores(r.query.terms)[index.positions(docs)], atol=1e-9)
        assert r.calls == len(r.final) and len(r.query.terms) <= 40 + len(index.parse(r.query.text))
