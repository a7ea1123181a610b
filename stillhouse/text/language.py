"""Language modelling: decoder-only models by name, their training, and nats per token.

Logits are (n, t, C) and labels (n, t), so everything on logits in `stillhouse.objectives` gives a value per token, and
`stillhouse.distill.Distill` teaches these models as it teaches classifiers. Windows are full: a mean over a batch is a
mean over its tokens, however it is split over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.comparisons import Objective
from stillhouse.data import Batches, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.models import ModelSpec, import_library
from stillhouse.outcomes import Member, Models
from stillhouse.progress import without_bars
from stillhouse.system import map_tensors
from stillhouse.teachers import Frozen
from stillhouse.text.windows import Corpus, Windows
from stillhouse.weights import cosine

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
            with without_bars(transformers):
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
