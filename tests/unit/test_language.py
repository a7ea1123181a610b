"""Text as windows of tokens, language models by name, training and nats per token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.data import Batches
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.options import LanguageOptions
from stillhouse.system import Clock
from stillhouse.text.language import (
    Training,
    adamw,
    check_language_model,
    language_model,
    llama_spec,
    nats,
    train_language_model,
)
from stillhouse.text.windows import Windows, corpus, open_text

TEXT = "the cat sat on the mat; the dog sat on the log.\n" * 12


@pytest.fixture
def text(tmp_path: Path):
    (tmp_path / "mine.txt").write_text(TEXT)
    return corpus(str(tmp_path / "mine.txt"), length=8)


def test_labels_are_the_next_tokens_of_the_same_stream():
    w = Windows(np.arange(101) % 7, 10, 7)
    whole = np.concatenate([w.take(np.array([i]))["input"]["input_ids"][0].numpy() for i in range(len(w))])
    assert len(w) == 10 and (whole == np.arange(100) % 7).all()
    b = w.take(np.arange(10))
    assert torch.equal(b["input"]["input_ids"][:, 1:], b["label"][:, :-1])
    assert b["label"][-1, -1] == 100 % 7  # the last token of all is a label and never an input


def test_views_move_windows_and_never_leave_the_stream():
    w = Windows(np.arange(95), 10, 95)
    starts = [w.take(np.arange(len(w)), view=v, seed=1)["input"]["input_ids"][:, 0] for v in range(30)]
    moved = torch.stack(starts) - torch.arange(len(w)) * 10
    assert moved[:, :-1].min() == 0 and moved[:, :-1].max() == 9 and moved[:, -1].max() == 4
    again = w.take(np.arange(len(w)), view=3, seed=1)["input"]["input_ids"][:, 0]
    assert torch.equal(again, starts[3]) and not torch.equal(starts[3], starts[4])


def test_processes_share_one_global_batch():
    source = Batches(Windows(np.arange(400) % 11, 8, 11), 6)
    whole = source.batch(Clock(step=2, steps_per_epoch=source.steps_per_epoch))["label"]
    ranks = [source.batch(Clock(step=2, steps_per_epoch=source.steps_per_epoch, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(whole, torch.cat([b["label"] for b in ranks]))


def test_nats_are_the_mean_over_tokens():
    class Known(nn.Module):
        """Probability 1/2 of the next number, the rest spread evenly."""

        def __init__(self):
            super().__init__()
            self.anything = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            p = torch.full((*input_ids.shape, 5), 0.125)
            return p.scatter(-1, (input_ids + 1)[..., None] % 5, 0.5).log()

    right, wrong = Windows(np.arange(41) % 5, 4, 5), Windows(np.zeros(41), 4, 5)
    assert nats(Known(), right) == pytest.approx(math.log(2)) and nats(Known(), wrong) == pytest.approx(math.log(8))
    assert nats(Known(), right, limit=3) == pytest.approx(math.log(2))


def test_corpus_parts_are_apart_and_decode_to_the_text(text):
    told = text.tokenizer.decode(text.train.tokens.tolist()) + text.tokenizer.decode(text.test.tokens.tolist())
    assert told == TEXT.rstrip("\n") and len(text.test.tokens) == pytest.approx(0.1 * len(TEXT), abs=1)
    words = corpus("python-reference", tokens="word", length=16, limit=20_000)
    assert words.vocabulary < 2000 and "first 20000" in words.notes[0]


def test_llama_trains_learns_from_a_teacher_and_resumes(text, tmp_path):
    spec = llama_spec(text.vocabulary, width=16, layers=1, heads=2, kv_heads=1, length=8)
    cfg, run = Training(steps=40, batch=8, lr=2e-2), Run(tmp_path / "run", quiet=True)
    model = spec.build()
    before = nats(model, text.test)
    train_language_model(run, "teacher", model, text, cfg)
    after = nats(model, text.test)
    assert before == pytest.approx(math.log(text.vocabulary), abs=0.3) and after < 0.7 * before
    pupil = spec.build(seed=1)
    train_language_model(run, "pupil", pupil, text, cfg, teacher=model, objectives=["kd:1?T=1"], label=0.0)
    assert nats(pupil, text.test) < 0.75 * before
    again = spec.build(seed=1)  # a finished stage is read, not trained
    train_language_model(run, "pupil", again, text, cfg, teacher=model, objectives=["kd:1?T=1"], label=0.0)
    assert all(torch.equal(a, b) for a, b in zip(pupil.parameters(), again.parameters(), strict=True))


def test_only_matrices_are_decayed():
    net = nn.Linear(3, 2)
    groups = adamw(list(net.parameters()), lr=0.1, weight_decay=0.5).param_groups
    assert [(g["weight_decay"], [p.dim() for p in g["params"]]) for g in groups] == [(0.5, [2]), (0.0, [1])]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: open_text("shakespear"), "did you mean"),
        (lambda t: open_text("nowhere.txt"), "nowhere.txt"),
        (lambda t: Windows(np.arange(4), 4, 9), "no window of 4"),
        (lambda t: Windows(np.arange(9), 4, 5), "0…4"),
        (lambda t: llama_spec(9, width=20, heads=4), "--width 24"),
        (lambda t: llama_spec(9, heads=4, kv_heads=3), "do not divide"),
        (lambda t: language_model("bert", t), "expected llama"),
        (lambda t: language_model("hf:/nowhere", t), "cannot be had"),
        (lambda t: check_language_model(nn.Linear(2, 2), t), "cannot read input_ids"),
        (lambda t: check_language_model(llama_spec(5, length=8).build(), t), "cannot read|expected logits"),
        (lambda t: Training(steps=0), "steps"),
        (lambda t: Training(lr_warmup=2), "lr_warmup"),
    ],
)
def test_mistakes_are_one_line(make, said, text):
    with pytest.raises(UserError, match=said) as error:
        make(text)
    assert "\n" not in str(error.value)


def test_a_folder_of_transformers_and_its_tokenizer(text, tmp_path):
    spec = llama_spec(text.vocabulary, width=16, layers=1, heads=2, length=8)
    spec.build().save_pretrained(tmp_path / "lm")
    text.tokenizer.save_pretrained(str(tmp_path / "lm"))
    options = LanguageOptions(out=tmp_path, model=f"hf:{tmp_path / 'lm'}", data=str(tmp_path / "mine.txt"), length=8)
    read = options.corpus()
    again, model = options.network(read)
    assert np.array_equal(read.train.tokens, text.train.tokens) and again.name == "transformers:LlamaForCausalLM"
    assert model is not None and nats(model, read.test) == pytest.approx(nats(spec.build(), text.test), abs=1e-5)


@pytest.mark.data
@pytest.mark.parametrize(("name", "least"), [("shakespeare", 1_000_000), ("names", 200_000)])
def test_texts_of_the_data_folder(name, least, data_root):
    assert len(open_text(name)[0]) > least


@pytest.mark.data
def test_wikitext_has_a_test_part(data_root):
    train, test = open_text("wikitext2")
    assert test is not None and len(train) > 1_000_000 and train[:500] != test[:500]
