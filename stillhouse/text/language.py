"""Language modelling: text by name as windows of token ids, decoder-only models, training and nats per token.

Logits are (n, t, C) and labels (n, t), so everything on logits in `stillhouse.objectives` gives a value per token, and
`stillhouse.distill.Distill` teaches these models as it teaches classifiers. Windows are full: a mean over a batch is a
mean over its tokens, however it is split over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.comparisons import Objective
from stillhouse.data import Batches, find, prefetch
from stillhouse.data.external import choose_splits, fetch
from stillhouse.data.samples import digest, draws
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.models import ModelSpec, import_library
from stillhouse.outcomes import Member, Models
from stillhouse.system import map_tensors
from stillhouse.teachers import Frozen
from stillhouse.text.encoding import small_tokenizer
from stillhouse.text.sentences import lines_of
from stillhouse.weights import cosine

TEST = 0.1  # the end of a text that has no test part of its own
NAMED: dict[str, tuple[str, str, str | None]] = {  # folder in $STILLHOUSE_DATA, its text, its test part
    "shakespeare": ("tiny-shakespeare", "input.txt.gz", None),
    "wikitext2": ("wikitext2-small", "valid.txt.gz", "test.txt.gz"),
    "names": ("names", "names.txt.gz", None),
}
EMBEDDED = "python-reference"


# -- text ---------------------------------------------------------------------------------------------------------


def open_text(spec: str) -> tuple[str, str | None]:
    """A text and, where it comes with one, its test part.

    Args:
        spec: ``python-reference`` (the language reference that Python's own help reads, 0.5 MB of English);
            ``shakespeare``, ``wikitext2``, ``names`` (in $STILLHOUSE_DATA); ``FILE.txt[.gz]``; of Hugging Face datasets
            ``hf:NAME?text=COLUMN``.

    Raises:
        UserError: it is none of these, cannot be read, or is empty.
    """
    parts: list[str | None]
    if spec == EMBEDDED:
        from pydoc_data.topics import topics

        parts = ["\n".join(topics[k] for k in sorted(topics)), None]
    elif spec in NAMED:
        folder, text, test = NAMED[spec]
        home = find(folder)
        parts = ["\n".join(lines_of(home / f)) if f else None for f in (text, test)]
    elif spec.startswith("hf:"):
        parts = list(_hub_text(spec.removeprefix("hf:")))
    elif spec.endswith((".txt", ".txt.gz")):
        parts = ["\n".join(lines_of(Path(spec))), None]
    else:
        known = [EMBEDDED, *NAMED, "FILE.txt", "hf:NAME?text=COLUMN"]
        raise UserError(f"--data {spec}: no text of this name; {did_you_mean(spec, known)}")
    if not (parts[0] or "").strip():
        raise UserError(f"{spec} holds no text")
    return str(parts[0]), parts[1]


def _hub_text(spec: str) -> tuple[str, str | None]:
    name, _, query = spec.partition("?")
    asked = {"text": "text", **dict(parse_qsl(query))}
    for key in asked:
        if key not in (known := ("text", "config", "train", "test")):
            raise UserError(f"unknown option {key!r} in hf:{spec}; {did_you_mean(key, known)}")
    tables = fetch(name, asked.get("config"))
    splits, column = choose_splits(tables, asked, spec), asked["text"]
    first = tables[splits["train"]]
    if column not in first.features:
        raise UserError(f"hf:{spec} has no column {column!r}; {did_you_mean(column, first.features)}")
    found = {part: "\n".join(map(str, tables[split][column])) for part, split in splits.items()}
    return found["train"], found.get("test")


class Windows:
    """A stream of token ids as windows of equal length, side by side; a set in the sense of `stillhouse.data.Samples`.

    ``take`` gives ``{"input": {"input_ids": (n, length)}, "label": (n, length), "id": (n,)}``: the label of a position
    is the token behind it, so nobody shifts again. An augmented view moves every window by a random part of its
    length: epochs cut the stream at other places.

    Args:
        tokens: (N,) ids.
        length: tokens of a window.
        vocabulary: number of ids.

    Raises:
        UserError: a stream that is shorter than one window, ids out of range.

    Example:
        >>> w = Windows(np.arange(10), 3, 10)
        >>> b = w.take(np.array([1]))
        >>> len(w), b["input"]["input_ids"].tolist(), b["label"].tolist()
        (3, [[3, 4, 5]], [[4, 5, 6]])
    """

    def __init__(self, tokens: np.ndarray, length: int, vocabulary: int):
        self.tokens, self.length, self.vocabulary = np.asarray(tokens, np.int64), length, vocabulary
        count = (len(self.tokens) - 1) // length if length > 0 else 0
        if count < 1:
            raise UserError(f"a text of {len(self.tokens)} tokens has no window of {length} and the token behind it")
        if self.tokens.min() < 0 or self.tokens.max() >= vocabulary:
            raise UserError(f"token ids must lie in 0…{vocabulary - 1}, got up to {self.tokens.max()}")
        self.labels = np.zeros(count, np.int64)  # windows have no classes
        self.shape: tuple[int, ...] = (length,)
        self.classes: tuple[str, ...] = ("text",)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        return digest("windows", self.tokens, self.length)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Any]:
        ids = np.asarray(ids, np.int64)
        at = ids * self.length
        if view is not None:
            moved = at + np.floor(draws(seed, view, ids, 1)[:, 0] * self.length).astype(np.int64)
            at = np.minimum(moved, len(self.tokens) - self.length - 1)
        rows = torch.from_numpy(self.tokens[at[:, None] + np.arange(self.length + 1)])
        inputs = {"input_ids": rows[:, :-1].contiguous()}
        return {"input": inputs, "label": rows[:, 1:].contiguous(), "id": torch.from_numpy(ids.copy())}


@dataclass
class Corpus:
    """Training and test windows of one text.

    Attributes:
        name: as reports have it. train, test: windows of different places.
        tokenizer: of transformers, saved with students. notes: what the reader of a report must know.
    """

    name: str
    train: Windows
    test: Windows
    tokenizer: Any
    notes: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int:
        return self.train.vocabulary

    @property
    def length(self) -> int:
        return self.train.length

    def example(self, n: int = 1) -> dict[str, Tensor]:
        """The first n test windows, as models are called with them."""
        return self.test.take(np.arange(min(n, len(self.test))))["input"]


def corpus(
    spec: str = EMBEDDED,
    *,
    length: int = 64,
    tokens: Literal["char", "word"] = "char",
    tokenizer: Any = None,
    limit: int | None = None,
) -> Corpus:
    """Windows of a text by name; without a test part of its own, the last tenth of the text is it.

    Args:
        spec: see `open_text`.
        length: tokens of a window.
        tokens: without a tokenizer: characters, or what stands between blanks and comes twice in the training text.
        tokenizer: of transformers.
        limit: read only so many characters of the text.

    Raises:
        UserError: what `open_text` or `Windows` refuse.
    """
    text, test = open_text(spec)
    notes: tuple[str, ...] = ()
    if limit is not None and limit < len(text):
        text, notes = text[:limit], (f"text: its first {limit} characters",)
    if test is None:
        cut = round((1 - TEST) * len(text))
        text, test = text[:cut], text[cut:]
        notes += (f"test: the last {TEST:.0%} of the text",)
    if tokenizer is None:
        tokenizer = small_tokenizer([text], level=tokens, min_count=2 if tokens == "word" else 1)
        notes += (f"tokens: {'characters' if tokens == 'char' else 'words that come twice in the training text'}",)
    train, held = (Windows(_ids(tokenizer, part), length, len(tokenizer)) for part in (text, test))
    return Corpus(spec, train, held, tokenizer, notes)


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


# -- models -------------------------------------------------------------------------------------------------------


def llama_spec(
    vocabulary: int,
    *,
    width: int = 96,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    hidden: int | None = None,
    length: int = 64,
) -> ModelSpec:
    """A small `transformers.LlamaForCausalLM`, to be trained from scratch.

    Args:
        vocabulary: tokens. width: of the residual stream. layers: blocks. heads: of the queries.
        kv_heads: of keys and values (grouped-query attention); as many as heads by default.
        hidden: of the gated MLP; by default 8/3 of the width, rounded up to a multiple of 8.
        length: longest text.

    Raises:
        UserError: heads that do not divide the width, or key-value heads that do not divide the heads.
    """
    kv_heads = kv_heads or heads
    if width % (2 * heads):
        near = 2 * heads * (width // (2 * heads) + 1)
        raise UserError(
            f"width {width} does not give {heads} heads an even number of channels each; give --width {near}"
        )
    if heads % kv_heads:
        raise UserError(f"{kv_heads} key-value heads do not divide {heads} heads")
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": hidden or -(-width // 3) * 8}
    depth = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    more: dict[str, Any] = {"max_position_embeddings": length, "use_cache": False, "tie_word_embeddings": False}
    more |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return ModelSpec("transformers:LlamaForCausalLM", vocabulary, (length,), options={**sizes, **depth, **more})


def causal(name: str, *, pretrained: bool = True) -> tuple[ModelSpec, nn.Module]:
    """A causal language model of transformers, by its name on the hub or its folder, in eval mode.

    Raises:
        UserError: it cannot be had.
    """
    transformers = import_library("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        config.use_cache = False
        kind = transformers.AutoModelForCausalLM
        if pretrained:
            model = kind.from_pretrained(name, config=config, use_safetensors=True, dtype=torch.float32)
        else:
            with torch.random.fork_rng(devices=[]):
                model = kind.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"hf:{name} cannot be had as a language model: {' '.join(str(error).split())[:200]}") from None
    return ModelSpec.of(model, (), int(config.vocab_size)), model.eval()


def language_model(name: str, text: Corpus, **sizes: Any) -> tuple[ModelSpec, nn.Module | None]:
    """How to build a language model by name, and with its weights where it comes with some.

    Args:
        name: ``llama`` (from scratch, of these sizes), ``hf:NAME`` or its folder, ``package.module:function``, which
            may take ``vocabulary`` and ``length``.
        text: what it is to read.
        sizes: of `llama_spec`.

    Raises:
        UserError: another name, or a model that does not fit the text.
    """
    source, _, rest = name.partition(":")
    model: nn.Module | None = None
    if name == "llama":
        return llama_spec(text.vocabulary, length=text.length, **sizes), None
    if source == "hf" and rest:
        spec, model = causal(rest)
    elif rest and source not in ("stillhouse", "torchvision", "timm"):
        options = {"vocabulary": text.vocabulary, "length": text.length}
        spec = ModelSpec(name, text.vocabulary, (text.length,), options=options)
    else:
        raise UserError(f"--model {name}: no language model; expected llama, hf:NAME or package.module:function")
    check_language_model(model or spec.build(), text, name)
    return spec, model


def check_language_model(model: nn.Module, text: Corpus, who: str = "the model") -> None:
    """Refuses a model that does not give a distribution over the text's tokens at every position.

    Raises:
        UserError: says what it gave, or what it raised.
    """
    example = text.example(2)
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), evaluating(model):
            found = tuple(logits_of(call(model, map_tensors(example, lambda t: t.to(device)))).shape)
    except UserError:
        raise
    except Exception as error:  # whatever a network raises about inputs it was not made for
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{who} cannot read input_ids of shape (2, {text.length}) of {text.name}: {why}") from None
    if len(found) != 3 or found[:2] != (len(example["input_ids"]), text.length) or found[2] < text.vocabulary:
        raise UserError(
            f"{who} gives {found} for input_ids (2, {text.length}); expected logits (2, {text.length}, C) with C of at "
            f"least {text.vocabulary}, the tokens of {text.name}"
        )


# -- training and measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a language model is trained; systems have these fields among their own."""

    steps: int = 300  # optimiser steps
    batch: int = 32  # windows per step, over all processes
    lr: float = 3e-3  # learning rate at the top of its cosine
    lr_warmup: float = 0.1  # part of the run over which the learning rate rises
    weight_decay: float = 0.1  # of weight matrices; biases and norms have none
    clip: float = 1.0  # largest gradient norm; 0 does not clip

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("lr", 0), ("weight_decay", 0), ("clip", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected a number from {least}, got {getattr(self, name)}")
        if not 0 <= self.lr_warmup <= 1:
            raise UserError(f"lr_warmup: expected a part of the run in [0, 1], got {self.lr_warmup}")


def adamw(params: Sequence[Tensor], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with β = (0.9, 0.95), as language models are trained; vectors (biases, norms) are not decayed."""
    groups = [[p for p in params if (p.dim() > 1) == matrix] for matrix in (True, False)]
    decays = (weight_decay, 0.0)
    made = [{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=True) if g]
    return torch.optim.AdamW(made, lr=lr, betas=(0.9, 0.95))


def train_language_model(
    run: Run,
    name: str,
    model: nn.Module,
    text: Corpus,
    cfg: Training,
    *,
    teacher: nn.Module | None = None,
    objectives: Sequence[Objective | str] = (),
    label: float = 1.0,
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
    system: Callable[..., Distill] = Distill,
    steps: int | None = None,
    settings: Any = None,
) -> Distill:
    """Train a language model in place, by the text alone or by a teacher as well; a stage of the run.

    label · mean CE + Σ_k w_k · mean O_k(teacher, student), means over tokens.

    Args:
        run: folder, seed, device. name: of the stage.
        model: gives logits (n, t, C) for ``input_ids``.
        cfg: settings. steps: instead of those of `cfg`. settings: kept with the checkpoint; `cfg` by default.
        teacher: a network over the same tokens; frozen, in eval mode.
        objectives: on logits, such as ``["kd:0.5?T=1"]``; see `stillhouse.comparisons`.
        label: weight of the text's own cross-entropy.
        optimizer: instead of `adamw`.
        system: what is trained, built as `Distill` is.
    """
    learner = system(
        model, Frozen(teacher) if teacher is not None and objectives else None, objectives=objectives, label=label,
        optimizer=optimizer or partial(adamw, lr=cfg.lr, weight_decay=cfg.weight_decay),
        lr=cosine(round(cfg.lr_warmup * (steps or cfg.steps))), clip=cfg.clip or None, seed=run.seed,
    )  # fmt: skip
    source = prefetch(Batches(text.train, cfg.batch), run.workers)
    fit(run, name, learner, source, steps=steps or cfg.steps, settings=cfg if settings is None else settings)
    model.cpu().eval()
    return learner


@torch.no_grad()
def nats(model: nn.Module, windows: Windows, *, limit: int | None = None, device: Any = "cpu") -> float:
    """−log p of the next token, mean over all tokens of the windows, in nats; exp of it is the perplexity.

    Args:
        model: is moved to `device` and back to the CPU; runs in eval mode.
        windows: what it is judged on. limit: only so many of them, spread evenly.

    Example:
        >>> class Even(nn.Module):
        ...     def forward(self, input_ids): return torch.zeros(*input_ids.shape, 4)
        >>> round(nats(Even(), Windows(np.arange(9) % 4, 2, 4)), 4)
        1.3863
    """
    count = len(windows) if limit is None else min(limit, len(windows))
    ids = np.linspace(0, len(windows) - 1, count).round().astype(np.int64)
    rows, total = max(1, 2**22 // (windows.length * windows.vocabulary)), 0.0
    model.to(device)
    with evaluating(model):
        for at in range(0, count, rows):
            batch = map_tensors(windows.take(ids[at : at + rows]), lambda t: t.to(device))
            values = O.cross_entropy(logits_of(call(model, batch["input"])), batch["label"])
            total += float(values.cpu().double().sum())
    model.cpu()
    return total / (count * windows.length)


def language_models(members: Iterable[Member], text: Corpus, **more: Any) -> Models:
    """Language models as an outcome, with the text's tokenizer; costs are those of one window."""
    made = list(members)
    for m in made:
        m.model.cpu().eval()
    return Models(made, text.example(), tokenizer=text.tokenizer, **more)


def measured(model: nn.Module, text: Corpus, device: Any = "cpu") -> Mapping[str, float]:
    """What a report says of a language model: ``nll`` in nats per token, and ``perplexity``, on the test windows."""
    value = nats(model, text.test, device=device)
    return {"nll": value, "perplexity": float(np.exp(min(value, 700.0)))}
