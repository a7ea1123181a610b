"""Labelled sentences: reading them, their ids and masks, classifiers by name, and features of tokens."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.cli import invoke
from stillhouse.comparisons import as_map
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.evaluate import call, logits_of, predict
from stillhouse.models import ModelSpec
from stillhouse.options import ClassifierOptions
from stillhouse.system import Clock
from stillhouse.teachers import Frozen
from stillhouse.text import Bag, bag_spec, bert_spec, hub_classifier, sentence_data, small_tokenizer, text_spec
from stillhouse.text.classifiers import labels_in_order
from stillhouse.text.sentences import names_text, open_rows, read_jsonl

GOOD, BAD = "a good and quiet film", "bad , so bad"
ROWS = [{"text": GOOD, "label": "pos"}, {"text": BAD, "label": "neg"}] * 6


def data(**how):
    return sentence_data({"train": ROWS, "test": ROWS[:4]}, "films", **how)


def written(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_ids_masks_and_the_cut():
    d = data(length=16)
    batch = d.train.take(np.array([0, 1]))
    ids, mask = batch["input"]["input_ids"], batch["input"]["attention_mask"]
    assert ids.shape == mask.shape == (2, 8) and mask.sum(1).tolist() == [6, 5]
    assert d.train.tokenizer.decode(ids[0][:5]) == GOOD and (ids[mask == 0] == 0).all()
    assert d.classes == ("neg", "pos") and batch["label"].tolist() == [1, 0]
    short = data(length=4)
    assert short.train.take(np.array([0]))["input"]["input_ids"].shape == (1, 4)
    assert any("cut" in n for n in short.notes)
    assert short.train.fingerprint != d.train.fingerprint


def test_padding_changes_nothing():
    """A sentence has the same logits alone and beside longer ones."""
    d = data(length=32)
    long = sentence_data({"train": [*ROWS, {"text": " ".join([GOOD] * 4), "label": "pos"}], "test": ROWS}, "long",
                         tokenizers={"input": d.train.tokenizer}, length=32)  # fmt: skip
    for spec in (bag_spec(len(d.train.tokenizer), 2, 8), bert_spec(len(d.train.tokenizer), 2, width=16, heads=2)):
        model = spec.build(seed=0).eval()
        with torch.no_grad():
            alone = logits_of(call(model, long.train.take(np.array([0]))["input"]))
            beside = logits_of(call(model, long.train.take(np.array([0, 12]))["input"]))
        assert torch.allclose(alone[0], beside[0], atol=1e-6)


def test_pairs_and_a_second_tokenizer():
    rows = [{"text": "a b", "pair": "c", "label": k} for k in (0, 1)] * 3
    one, two = small_tokenizer(["a b c"]), small_tokenizer(["a b c"], level="char")
    d = sentence_data({"train": rows, "test": rows}, "pairs", tokenizers={"input": one, "teacher": two})
    batch = d.train.take(np.array([0]))
    assert one.decode(batch["input"]["input_ids"][0][:5]) == "a b </s> c </s>"
    assert batch["teacher"]["input_ids"].shape == (1, 8) and batch["teacher"]["attention_mask"].sum() == 6


def test_no_test_part_is_set_apart_by_class():
    d = sentence_data({"train": ROWS}, "films")
    assert len(d.train) == 10 and sorted(d.test.labels) == [0, 1] and any("set apart" in n for n in d.notes)
    assert len(sentence_data({"train": ROWS}, "films", limit=4).train) == 4


def test_names():
    assert [names_text(s) for s in ("sst2", "x.jsonl.gz", "hf:a/b?text=s", "hf:a/b", "digits")] == [True] * 3 + [
        False
    ] * 2


def test_files_and_folders(tmp_path):
    written(tmp_path / "train.jsonl", ROWS)
    written(tmp_path / "valid.jsonl", ROWS[:2])
    parts = open_rows(str(tmp_path))
    assert set(parts) == {"train", "held_out"} and len(open_rows(str(tmp_path / "train.jsonl"))["train"]) == 12
    assert open_rows(f"hf:{tmp_path / 'train.jsonl'}?text=text")["train"][1] == {"text": BAD, "label": "neg"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}], '{"text": "…", "label": …}'),
        ([], "no sentences"),
    ],
    ids=["no label", "empty"],
)
def test_bad_files(tmp_path, rows, said):
    with pytest.raises(UserError, match=said.replace("{", r"\{")):
        read_jsonl(written(tmp_path / "x.jsonl", rows))


def test_bad_sentences():
    with pytest.raises(UserError, match="sentence 1 has no text"):
        sentence_data({"train": [ROWS[0], {"text": " ", "label": "neg"}], "test": ROWS}, "films")
    with pytest.raises(UserError, match="no training sentence has"):
        sentence_data({"train": ROWS, "test": [{"text": "x", "label": "other"}]}, "films")
    with pytest.raises(UserError, match="expected bag, bert"):
        text_spec("torchvision:resnet18", data())
    with pytest.raises(UserError, match="multiple"):
        bert_spec(10, 2, width=10, heads=4)


def test_folders_of_transformers(tmp_path):
    """A classifier with its tokenizer from a local folder; its head is replaced where classes differ."""
    d = data()
    model = bert_spec(len(d.train.tokenizer), 2, width=16, layers=1, heads=2).build(seed=3)
    model.save_pretrained(tmp_path)
    d.train.tokenizer.save_pretrained(tmp_path)
    spec, loaded = hub_classifier(str(tmp_path), 2, 64)
    x = d.train.take(np.arange(2))["input"]
    assert torch.equal(call(model.eval(), x).logits, call(loaded, x).logits)
    again = spec.build()
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(call(again.eval(), x).logits, call(loaded, x).logits)
    assert hub_classifier(str(tmp_path), 5)[1].config.num_labels == 5
    with pytest.raises(UserError, match="--length 128"):
        hub_classifier(str(tmp_path), 2, 512)
    with pytest.raises(UserError, match="hf:nowhere/at-all"):
        hub_classifier("nowhere/at-all", 2)


def test_classes_in_another_order_are_refused():
    model = nn.Linear(1, 2)
    model.config = type("C", (), {"id2label": {0: "POS", 1: "NEG"}})()
    with pytest.raises(UserError, match="order"):
        labels_in_order(model, ("neg", "pos"), "teacher x")
    labels_in_order(model, ("pos", "neg"), "teacher x")
    labels_in_order(model, ("a", "b"), "teacher x")  # names that say nothing


def test_token_features_are_means_over_own_tokens():
    f, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.allclose(as_map(f, {"attention_mask": mask})[0], f[0, :2].mean(0))
    assert torch.equal(as_map(f, {"attention_mask": mask}, token=0), f[:, 0])
    assert as_map(f, torch.zeros(2, 3)).shape == (2, 4, 3, 1)  # no mask: tokens of a vision transformer
    assert as_map(f[:, 0], {"attention_mask": mask}).shape == (2, 4)


def test_distilling_between_tokenizers():
    """Student and teacher read other ids, of other lengths, and their features are compared by sentence."""
    one, two = small_tokenizer([GOOD, BAD]), small_tokenizer([GOOD, BAD], level="char")
    d = data(tokenizers={"input": one, "teacher": two}, length=40)
    teacher = bert_spec(len(two), 2, width=16, layers=1, heads=2).build(seed=1)
    student: nn.Module = Bag(len(one), 2, width=4)
    batch = d.train.take(np.arange(4))
    names = ["kd:0.5", "feature:hidden=bert.encoder.layer.0:1", "rkd-distance:hidden=bert.encoder.layer.0:1?token=0"]
    ask = Frozen(teacher, taps=["bert.encoder.layer.0"], input="teacher")
    system = Distill(student, ask, objectives=names, example=batch)
    terms = system.learn(batch, Clock()).terms
    assert set(terms) == {"label", "kd", "feature", "rkd-distance"} and all(torch.isfinite(t) for t in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in system.parameters())
    assert predict(teacher, d.test, read="teacher")[0].shape == (4, 2)


def test_a_spec_builds_the_same_bag_again():
    spec = bag_spec(7, 3, 5)
    assert isinstance(ModelSpec.from_json(spec.to_json()).build(), Bag)


def own_code(tmp_path, monkeypatch, body):
    (tmp_path / "mine.py").write_text("calls = []\n" + body)
    monkeypatch.chdir(tmp_path)


def test_a_function_of_ones_own_is_called_once(tmp_path, monkeypatch):
    """Whether it gives sentences or images."""
    answer = "[{'text': w + ' film', 'label': w} for w in ('good', 'bad')] * 6"
    pictures = "np.zeros((20, 1, 8, 8), 'float32'), np.arange(20) % 2"
    body = f"import numpy as np\ndef rows():\n    calls.append(1)\n    return {answer}\n"
    own_code(tmp_path, monkeypatch, f"{body}def images():\n    calls.append(1)\n    return {pictures}\n")
    text = ClassifierOptions(Path("x"), data="mine:rows").load_data("digits")
    calls = importlib.import_module("mine").calls
    assert text.classes == ("bad", "good") and len(calls) == 1
    assert ClassifierOptions(Path("x"), data="mine:images").load_data("digits").shape == (1, 8, 8) and len(calls) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--data", "mine:broken"], "mine:broken raised ValueError: no such table"),
     (["--data", "mine:rows", "--image-size", "8"], "of images"),
     (["--data", "mine:rows", "--label-noise", "2"], "label_noise must be a fraction"),
     (["--data", "mine:rows", "--model", "torchvision:resnet18"], "expected bag, bert")],
    ids=["raises", "image size", "noise", "model"],
)  # fmt: skip
def test_mistakes_with_ones_own_sentences_are_one_line(tmp_path, monkeypatch, capsys, flags, words):
    own_code(tmp_path, monkeypatch, "def rows():\n    return [{'text': w, 'label': w} for w in ('good', 'bad')] * 6\n"
             "def broken():\n    raise ValueError('no such table')\n")  # fmt: skip
    assert invoke(["distill", *flags, "--teacher", "bag", "--teacher-epochs", "1", "--quiet", "--out", "run"]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_labels_of_sentences_can_be_noisy(tmp_path):
    written(tmp_path / "train.jsonl", ROWS)
    clean, noisy = (
        ClassifierOptions(Path("x"), data=str(tmp_path), label_noise=n).load_data("digits") for n in (0, 0.5)
    )
    assert (clean.train.labels != noisy.train.labels).sum() == 5 and any("wrong" in n for n in noisy.notes)
    assert noisy.train.tokenizer.get_vocab() == clean.train.tokenizer.get_vocab()
