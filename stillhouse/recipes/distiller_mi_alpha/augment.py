"""Augmented copies of labelled sentences: words edited at random, guessed by a masked language model, your own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from stillhouse.data import Data
from stillhouse.engine import Run
from stillhouse.errors import UserError
from stillhouse.models import import_library, import_object
from stillhouse.system import fold
from stillhouse.text.sentences import Sentences, tokenizer_by_name

Texts = list[str]


def edit_words(words: Sequence[str], p: float, rng: np.random.Generator, vocabulary: Sequence[str]) -> list[str]:
    """Each word, with probability p, is deleted, swapped with the next one, replaced, or followed by a further one.

    The four are equally likely; new words are drawn from `vocabulary`; one word at least stays.

    Example:
        >>> edit_words(["all", "of", "it"], 0.0, np.random.default_rng(0), ["new"])
        ['all', 'of', 'it']
    """
    made: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        kind = rng.integers(4) if rng.random() < p else -1
        if kind == 1 and rest:
            word, rest[0] = rest[0], word
        new = [vocabulary[int(rng.integers(len(vocabulary)))]] if kind in (2, 3) else []
        made += {0: [], 2: new, 3: [word, *new]}.get(int(kind), [word])
    return made or list(words[:1])


def edited(texts: Sequence[str], p: float, seed: int) -> Texts:
    """`edit_words` of every text, with words of all of them."""
    vocabulary = sorted({w for t in texts for w in t.split()})
    draws = (np.random.default_rng(fold("words", seed, i)) for i in itertools.count())
    return [" ".join(edit_words(t.split(), p, rng, vocabulary)) for t, rng in zip(texts, draws)]


@torch.no_grad()
def guessed(texts: Sequence[str], p: float, seed: int, model: str, batch: int = 32, length: int = 128) -> Texts:
    """Each token, with probability p, is masked and drawn anew from what a masked language model says (contextual)."""
    tokenizer = tokenizer_by_name(model)
    try:
        network = import_library("transformers").AutoModelForMaskedLM.from_pretrained(model).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no masked language model {model!r}: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {model} has no mask; --language-model needs a masked language model")
    g, made = torch.Generator().manual_seed(fold("contextual", seed)), list[str]()
    for start in range(0, len(texts), batch):
        some = list(texts[start : start + batch])
        found = tokenizer(
            some, padding=True, truncation=True, max_length=length, return_tensors="pt", return_special_tokens_mask=True
        )
        special = found.pop("special_tokens_mask").bool()
        ids = found["input_ids"]
        chosen = (torch.rand(ids.shape, generator=g) < p) & ~special
        said = network(**{**found, "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id)}).logits.float()
        said[..., tokenizer.all_special_ids] = -torch.inf
        drawn = torch.multinomial(said.softmax(-1).flatten(0, 1), 1, generator=g).view(ids.shape)
        new = torch.where(chosen, drawn, ids)
        made += [t or old for t, old in zip(tokenizer.batch_decode(new, skip_special_tokens=True), some, strict=True)]
    return made


def stage(text: str, model: str) -> Callable[[Sequence[str], int], Texts]:
    """A step of an augmentation by its text: ``words:P``, ``contextual:P`` or ``package.module:function``.

    A function of yours gets the list of texts and gives as many: back-translation, for example.

    Raises:
        UserError: another name, or a probability out of (0, 1].
    """
    name, _, strength = text.partition(":")
    if name not in ("words", "contextual"):
        if not strength or strength.replace(".", "").isdigit():
            raise UserError(f"edits {text!r}: expected words:P, contextual:P or package.module:function")
        own = import_object(text, "--edits")
        return lambda texts, seed: [str(t) for t in own(list(texts))]
    try:
        p = float(strength)
    except ValueError:
        p = -1.0
    if not 0 < p <= 1:
        raise UserError(f"edits {text!r}: expected {name}:P with a probability P in (0, 1], such as {name}:0.1")
    if name == "words":
        return lambda texts, seed: edited(texts, p, seed)
    if not model:
        raise UserError(f"edits {text!r} needs --language-model, a masked language model of transformers")
    return lambda texts, seed: guessed(texts, p, seed, model)


def augmented(run: Run, data: Data, stages: Sequence[str], model: str = "") -> Data:
    """The data with every training sentence twice: as it is, and after all stages in their order, with its old label.

    Args:
        run: its folder remembers the new sentences, its seed chooses them.
        data: of `Sentences`.
        stages: see `stage`. model: of ``contextual``.

    Raises:
        UserError: data that are no sentences, a stage that is none, one that gives another number of sentences.
    """
    steps, train = [stage(s, model) for s in stages], data.train
    if not isinstance(train, Sentences):
        raise UserError(f"edits are of words, and {data.name} holds no sentences; images are augmented with --augment")

    def make() -> list[Texts]:
        parts = []
        for key in ("text", "pair"):
            texts = [str(r.get(key, "")) for r in train.rows]
            for k, step in enumerate(steps if any(texts) else ()):
                new = step(texts, fold(run.seed, "augment", k, key))
                if len(new) != len(texts):
                    raise UserError(f"edits {stages[k]!r} gave {len(new)} sentences for {len(texts)}")
                texts = [n if n.strip() else old for n, old in zip(new, texts, strict=True)]
            parts.append(texts)
        return parts

    texts, pairs = run.memo("augmented", make)
    copies = [{**r, "text": t, "pair": q} for r, t, q in zip(train.rows, texts, pairs, strict=True)]
    both = Sentences([*train.rows, *copies], train.classes, train.tokenizers, train.shape[0])
    note = f"train: every sentence twice, as it is and after {', '.join(stages)}"
    return replace(data, train=both, notes=(*data.notes, note))
