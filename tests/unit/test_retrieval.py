"""Collections, weighted indexes, re-rankers and their scores, measures."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import bm25s
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from stillhouse.errors import UserError
from stillhouse.retrieval import (
    Collection,
    Index,
    Scores,
    SparseIndex,
    Tokens,
    bm25,
    load_collection,
    load_reranker,
    measure,
    recall,
    rocchio,
    save_trec,
    tau,
)
from stillhouse.retrieval.rerank import BiEncoder, Pairs

DOCS = {
    "a": "radio waves in the ionosphere and radio noise",
    "b": "noise of a transistor amplifier",
    "c": "a transistor in a radio receiver",
    "d": "digital computers and their memories",
    "e": "waves waves waves",
}


@pytest.fixture(scope="module")
def index() -> SparseIndex:
    return bm25(DOCS)


# -- the index ---------------------------------------------------------------------------------------------------


def by_hand(term: str, doc: str, k1: float = 1.2, b: float = 0.75) -> float:
    words = dict(zip(DOCS, Tokens()(list(DOCS.values()))))
    df = sum(term in w for w in words.values())
    tf, mean = words[doc].count(term), sum(map(len, words.values())) / len(words)
    return math.log(len(words) / df) * (k1 + 1) * tf / (tf + k1 * (1 - b + b * len(words[doc]) / mean))


def test_bm25_weights_are_the_formula(index):
    for doc, row in zip(DOCS, index.weights(list(DOCS))):
        assert set(row) == set(Tokens()([DOCS[doc]])[0])
        for term, weight in row.items():
            assert weight == pytest.approx(by_hand(term, doc), rel=1e-6)


def test_scores_are_those_of_the_engine(index):
    """A plain query by bm25s itself, and by our execution of it, repeated words counting twice."""
    words = Tokens()(list(DOCS.values()))
    engine = bm25s.BM25(k1=1.2, b=0.75, method="atire")
    engine.index(words, show_progress=False)
    query = "noise radio noise unheard"
    theirs = engine.get_scores([t for t in Tokens()([query])[0] if t in engine.vocab_dict])
    np.testing.assert_allclose(index.scores(index.parse(query)), theirs, rtol=1e-6)
    assert index.parse(query) == {"nois": 2.0, "radio": 1.0}


def test_a_weighted_query_is_executed_exactly_with_negative_weights(index):
    query = {"radio": 1.5, "nois": -0.7, "wave": 0.2, "not a term": 9.0}
    rows = index.weights(list(DOCS))
    expected = np.array([sum(query.get(t, 0) * w for t, w in r.items()) for r in rows])
    np.testing.assert_allclose(index.scores(query), expected, atol=1e-12)
    found = index.search(query, 5)
    positive = [(d, s) for d, s in zip(DOCS, expected) if s > 0]
    assert [d for d, _ in found] == [d for d, _ in sorted(positive, key=lambda p: -p[1])]
    assert "b" not in dict(found)  # it has only the term that counts against it


def test_equal_scores_stand_in_the_order_of_the_collection():
    index = SparseIndex(sp.csr_matrix(np.ones((6, 1))), ["t"], list("zyxwvu"), ["t"] * 6, Tokens())
    assert [d for d, _ in index.search({"t": 1.0}, 4)] == list("zyxw")


def test_learned_impacts_are_an_index_too():
    index = SparseIndex(sp.csr_matrix([[3.0, 0], [1.0, 2.0]]), ["x", "y"], ["1", "2"], ["x", "x y"], Tokens())
    assert isinstance(index, Index) and index.search({"x": 1.0, "y": 2.0}, 2) == [("2", 5.0), ("1", 3.0)]


def test_another_process_builds_the_same_index():
    """bm25s numbers its terms by Python's changing hashes; ours must not."""
    code = f"from stillhouse.retrieval import bm25; print(bm25({DOCS!r}).fingerprint)"
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.strip() == bm25(DOCS).fingerprint


def test_tokens():
    assert Tokens("none", "none")(["The Waves"]) == [["the", "waves"]]
    tokens = Tokens()
    assert tokens(["The Waves"]) == [["wave"]]
    assert tokens(["other words, of"]) == [["other", "word"]] and tokens(["of"]) == [[]]  # no memory of earlier texts
    for wrong in (Tokens("klingon"), Tokens("none", "klingon")):
        with pytest.raises(UserError, match="klingon"):
            wrong(["a text"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: bm25({}), "needs documents, got none"),
        (lambda: bm25({"a": "the of"}), "none of the 1 documents has a term"),
        (lambda: bm25(DOCS, k1=-1), "k1 >= 0"),
        (lambda: bm25(DOCS, method="bm25+"), "atire, lucene or robertson"),
        (lambda: bm25(DOCS).texts(["zz"]), "no document 'zz'"),
        (lambda: SparseIndex(sp.eye(2), ["a", "b"], [], [], Tokens()), "needs documents, got none"),
        (lambda: SparseIndex(sp.eye(2), ["a"], ["1", "2"], ["", ""], Tokens()), r"\(documents, terms\) = \(2, 1\)"),
    ],
)
def test_mistakes_with_an_index(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def test_rocchio_by_hand():
    moved = rocchio({"a": 2.0}, [{"a": 1.0, "b": 4.0}, {"b": 2.0, "c": 1.0}], terms=2, mix=0.25)
    # centroid a ½, b 3, c ½: b and (by the alphabet) a are kept, 3 and ½ of 3.5
    assert moved == pytest.approx({"a": 0.25 + 0.75 * 0.5 / 3.5, "b": 0.75 * 3 / 3.5})


# -- collections -------------------------------------------------------------------------------------------------


def lines(path: Path, rows: list) -> None:
    text = "\n".join(json.dumps(r) for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines(tmp_path / "docs.jsonl.gz", [{"doc_id": 1, "title": "T", "text": "one"}, {"doc_id": "2", "text": "two"}])
    lines(tmp_path / "queries.jsonl", [{"query_id": "q", "text": "which"}])
    (tmp_path / "qrels.tsv").write_text("query_id\tdoc_id\trelevance\nq\t2\t1\n")
    return tmp_path


@pytest.mark.parametrize("form", ["folder:{}", "{}"])
def test_a_folder_is_a_collection(folder, form):
    found = load_collection(form.format(folder))
    assert found.docs == {"1": "T one", "2": "two"} and found.queries == {"q": "which"}
    assert found.qrels == {"q": {"2": 1}} and found.name == folder.name
    (folder / "qrels.tsv").unlink()
    assert load_collection(str(folder)).qrels == {}


def test_a_function_is_a_collection(tmp_path, monkeypatch):
    (tmp_path / "my_texts.py").write_text(
        "from stillhouse.retrieval import Collection\n"
        "def made(): return Collection('mine', {'a': 'x'}, {'1': 'y'})\ndef other(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_collection("my_texts:made").name == "mine"
    with pytest.raises(UserError, match="returned int"):
        load_collection("my_texts:other")


def spoiled(name: str, text: str):
    def do(folder: Path) -> None:
        for path in folder.glob(f"{name}*"):
            path.unlink()
        (folder / name).write_text(text)

    return do


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "docs.jsonl.gz").unlink(), r"has no docs\.jsonl"),
        (lambda f: (f / "queries.jsonl").unlink(), r"has no queries\.jsonl"),
        (lambda f: (f / "docs.jsonl.gz").write_bytes(b"\x1f\x8b nothing"), "cannot be read"),
        (spoiled("docs.jsonl", '{"doc_id": "1", "text": " "}'), r"line 1: doc_id '1' has no text"),
        (spoiled("docs.jsonl", '{"doc_id": "1"}'), "has no text"),
        (spoiled("docs.jsonl", '{"text": "x"}'), "expected an object with 'doc_id'"),
        (spoiled("docs.jsonl", "\n{"), "line 2: not JSON"),
        (spoiled("docs.jsonl", '{"doc_id": 1, "text": "x"}\n{"doc_id": 1, "text": "y"}'), "line 2.*twice"),
        (spoiled("docs.jsonl", ""), r"docs\.jsonl is empty"),
        (spoiled("queries.jsonl", ""), r"queries\.jsonl is empty"),
        (spoiled("qrels.tsv", "q\t2"), "line 1: expected query_id, doc_id, relevance"),
        (spoiled("qrels.tsv", "a\tb\tc\nq\t2\tyes"), "whole number, got 'yes'"),
        (spoiled("qrels.tsv", "q\t9\t1"), "no document '9'"),
        (spoiled("qrels.tsv", "zz\t2\t1"), "no query 'zz'"),
    ],
)
def test_mistakes_in_a_folder(folder, spoil, says):
    spoil(folder)
    with pytest.raises(UserError, match=says) as error:
        load_collection(str(folder))
    assert "\n" not in str(error.value)


def test_mistakes_in_names(tmp_path, monkeypatch):
    for spec, says in (("vaswanni", "did you mean 'vaswani'"), ("folder:/no/where", "no folder /no/where")):
        with pytest.raises(UserError, match=says):
            load_collection(spec)
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="vaswani"):
        load_collection("vaswani")
    with pytest.raises(UserError, match="has no documents"):
        Collection("x", {}, {"1": "q"})
    with pytest.raises(UserError, match="document 'a' has no text"):
        Collection("x", {"a": ""}, {"1": "q"})


@pytest.mark.data
def test_vaswani_is_whole(data_root):
    found = load_collection("vaswani")
    assert (len(found.docs), len(found.queries)) == (11429, 93) and sum(map(len, found.qrels.values())) == 2083
    assert len(found.first(3).queries) == len(found.first(3).qrels) == 3


# -- re-rankers and their scores ---------------------------------------------------------------------------------


class Counting:
    """Scores a text by its length, and remembers what it was asked."""

    name = "counting"

    def __init__(self, answer=None):
        self.asked: list[tuple[str, list[str]]] = []
        self.answer = answer or (lambda texts: [float(len(t)) for t in texts])

    def __call__(self, query, texts):
        self.asked.append((query, list(texts)))
        return self.answer(texts)


def test_a_document_is_never_scored_twice(index):
    reranker = Counting()
    scores = Scores(reranker)
    first = scores("q", ["a", "b", "a"], index)
    assert scores("q", ["b", "c"], index) == {"b": first["b"], "c": float(len(DOCS["c"]))}
    assert reranker.asked == [("q", [DOCS["a"], DOCS["b"]]), ("q", [DOCS["c"]])] and scores.asked == 3
    scores("another", ["a"], index)
    assert scores.asked == 4


def test_scores_are_kept_in_a_file_that_may_be_cut(index, tmp_path):
    path, settings = tmp_path / "scores.jsonl", {"re-ranker": "counting"}
    first = Scores(Counting(), path, settings)
    first("q", ["a", "b"], index), first("q", ["c"], index)
    whole = path.read_bytes()
    again = Scores(Counting(), path, settings)
    assert again("q", ["c", "a"], index) == {d: float(len(DOCS[d])) for d in "ca"} and again.asked == 0
    assert again.seconds("q", ["a"]) > 0 and again.seconds("q", ["a"]) == 0
    path.write_bytes(whole[:-9])  # killed while writing the last line
    third = Scores(Counting(), path, settings)
    third("q", ["a", "b", "c"], index)
    assert third.asked == 1 and len(path.read_bytes().splitlines()) == 3
    assert Scores(Counting(), path, settings)("q", ["c"], index) == {"c": float(len(DOCS["c"]))}
    path.write_bytes(whole[:9])  # killed while writing the first line
    assert Scores(Counting(), path, settings).asked == 0
    path.write_bytes(whole)
    with pytest.raises(UserError, match="scores of another re-ranker"):
        Scores(Counting(), path, {"re-ranker": "other"})
    path.write_bytes(whole.replace(b'"docs"', b'"dogs"'))
    with pytest.raises(UserError, match="is damaged"):
        Scores(Counting(), path, settings)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda t: [1.0], r"shape \(1,\) for 2 documents"),
        (lambda t: [[1.0, 2.0], [1.0, 2.0]], r"shape \(2, 2\)"),
        (lambda t: [1.0, float("nan")], "document 'b' for 'q' is not finite"),
        (lambda t: torch.tensor([float("inf"), 0.0]), "document 'a'"),
        (lambda t: None, "2 numbers|shape"),
        (lambda t: ["good", "bad"], "must give 2 numbers, got list"),
    ],
)
def test_answers_that_are_no_scores(index, answer, says):
    with pytest.raises(UserError, match=says) as error:
        Scores(Counting(answer))("q", ["a", "b"], index)
    assert "\n" not in str(error.value)


def test_a_document_without_text_is_named():
    index = SparseIndex(sp.csr_matrix([[1.0]]), ["t"], ["7"], [" "], Tokens())
    with pytest.raises(UserError, match="document '7' has no text"):
        Scores(Counting())("q", ["7"], index)


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("cross-encoder")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nradio\nnoise\nwaves\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    return folder


def test_a_cross_encoder_from_a_folder(cross_encoder):
    """Its scores are the network's raw outputs on the pair, in eval mode."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reranker = load_reranker(f"hf:{cross_encoder}")
    assert isinstance(reranker, Pairs)
    texts = ["noise", "waves waves radio"]
    network = AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()
    tokens = AutoTokenizer.from_pretrained(cross_encoder)(["radio"] * 2, texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = network(**tokens).logits[:, 0].numpy()
    np.testing.assert_allclose(reranker("radio", texts), expected, atol=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-5


def test_a_bi_encoder_from_a_folder(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "radio": 1, "noise": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.array([[1.0, 1.0], [1.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)]).save(str(tmp_path / "m"))
    reranker = load_reranker(f"hf:{tmp_path / 'm'}")
    assert isinstance(reranker, BiEncoder)
    np.testing.assert_allclose(reranker("radio", ["noise", "radio"]), [0.6, 1.0], atol=1e-6)


def test_reranker_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_rerankers.py").write_text(
        "def plain(query, texts): return [1.0] * len(texts)\n"
        "def factory(): return plain\n"
        "class Kept:\n    def __call__(self, query, texts): return [2.0] * len(texts)\n"
        "thing = Kept()\nnumber = 3\ndef wrong(a, b, c): return 0\ndef nothing(): return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in (("plain", 1.0), ("factory", 1.0), ("Kept", 2.0), ("thing", 2.0)):
        assert load_reranker(f"my_rerankers:{name}")("q", ["a", "b"]) == [value] * 2
    for name, says in (("number", "is int"), ("wrong", "takes"), ("nothing", "gave NoneType"), ("plane", "plain")):
        with pytest.raises(UserError, match=says):
            load_reranker(f"my_rerankers:{name}")


def test_mistakes_in_names_of_rerankers(cross_encoder, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    two = tmp_path / "two"
    AutoModelForSequenceClassification.from_pretrained(cross_encoder, num_labels=2, ignore_mismatched_sizes=True)\
        .save_pretrained(two)  # fmt: skip
    AutoTokenizer.from_pretrained(cross_encoder).save_pretrained(two)
    (tmp_path / "empty").mkdir()
    for spec, says in (
        ("bert", "expected hf:NAME_OR_FOLDER"),
        ("hf:", "expected hf:NAME_OR_FOLDER"),
        ("hf:/no/where", "no folder /no/where"),
        (f"hf:{tmp_path / 'empty'}", "no re-ranker that can be loaded"),
        (f"hf:{two}", "has 2 outputs"),
    ):
        with pytest.raises(UserError, match=says) as error:
            load_reranker(spec)
        assert "\n" not in str(error.value)


# -- measures ----------------------------------------------------------------------------------------------------


def test_measures_by_hand(tmp_path):
    rankings = {"1": [("a", 3.0), ("b", 2.0), ("c", 1.0)], "2": [("a", 1.0)], "unjudged": [("a", 1.0)]}
    qrels = {"1": {"b": 1, "z": 1, "a": 0}, "2": {"a": 1}}
    best = 1 + 1 / math.log2(3)
    found = measure(rankings, qrels, ["nDCG@10", "R@2"])
    assert found["nDCG@10"] == pytest.approx(((1 / math.log2(3)) / best + 1) / 2)
    assert found["R@2"] == pytest.approx(0.75)
    assert recall({"1": "cb", "2": "b", "unjudged": "a"}, qrels) == pytest.approx(0.25)
    save_trec(tmp_path / "run.trec", {"1": [("a", 3.0)]}, "tag")
    assert (tmp_path / "run.trec").read_text() == "1 Q0 a 1 3.0 tag\n"


def test_tau_by_hand():
    assert tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx((5 - 1) / 6)
    assert tau([1, 2], [5, 5]) == 0


def test_mistakes_with_measures():
    with pytest.raises(UserError, match="none of the ranked queries"):
        measure({"1": [("a", 1.0)]}, {"2": {"a": 1}}, ["AP"])
    with pytest.raises(UserError, match="unknown measure"):
        measure({"1": [("a", 1.0)]}, {"1": {"a": 1}}, ["nGDC@10"])
    with pytest.raises(UserError, match="none of the pooled"):
        recall({"1": "a"}, {})
