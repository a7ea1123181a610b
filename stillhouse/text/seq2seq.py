"""Sequence-to-sequence models: by name, greedy answers, token losses, and students that lie in folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, need
from stillhouse.evaluate import evaluating, logits_of
from stillhouse.files import read_json
from stillhouse.models import ModelSpec, import_library, import_object
from stillhouse.objectives.tokens import IGNORE, token_cross_entropy
from stillhouse.outcomes import Member, Models
from stillhouse.outcomes import load as load_model
from stillhouse.system import fold, map_tensors
from stillhouse.text.encoding import Codec
from stillhouse.text.tasks import Example
from stillhouse.text.views import View, model_inputs, padded, stacked

T5_CLASS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration")


# -- by name ------------------------------------------------------------------------------------------------


def gru_spec(vocabulary: int, width: int = 128, patch: int = 0, dropout: float = 0.0) -> ModelSpec:
    """The small recurrent model of `text.gru` for a tokenizer of `small_tokenizer`."""
    options = {"vocabulary": vocabulary, "width": width, "patch": patch, "dropout": dropout}
    return ModelSpec("stillhouse.text.gru:GRUSeq2Seq", vocabulary, (), options=options)


def t5_spec(
    name: str, vocabulary: int, width: int = 128, layers: int = 2, heads: int = 4, dropout: float = 0.0
) -> ModelSpec:
    """A small T5 of this class, for a tokenizer of `small_tokenizer`, to be trained from scratch.

    Raises:
        UserError: another class, or a width that the heads do not divide.
    """
    if name not in T5_CLASS:
        raise UserError(
            f"transformers:{name} cannot be sized by --width and --layers; known: {', '.join(T5_CLASS)}; for others "
            "give package.module:function"
        )
    if width % heads:
        raise UserError(f"width {width} is no multiple of {heads} heads; give --width {heads * (width // heads + 1)}")
    import_library("transformers")
    sizes = {"vocab_size": vocabulary, "d_model": width, "d_kv": width // heads, "d_ff": 2 * width}
    depth = {"num_layers": layers, "num_decoder_layers": layers, "num_heads": heads, "dropout_rate": dropout}
    more = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "use_cache": False}
    return ModelSpec(f"transformers:{name}", vocabulary, (), options={**sizes, **depth, **more})


def pretrained(name: str) -> tuple[nn.Module, Any]:
    """A sequence-to-sequence model of transformers with its tokenizer, from the hub or a local folder.

    Raises:
        UserError: it is not there and cannot be downloaded, is of another kind, or transformers is not installed.
    """
    library, said = import_library("transformers"), f"--model hf:{name}"
    if not Path(name).expanduser().is_dir():
        if name.count("/") > 1 or name.startswith(("/", ".", "~")):
            raise UserError(f"{said}: there is no folder {name}")
        said += " cannot be had"
    where, how = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name, {}
    if where == name and not _hub_answers():
        how["local_files_only"] = True  # what an earlier download left; no minutes of retries
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(where, **how)
        model = library.AutoModelForSeq2SeqLM.from_pretrained(where, dtype=torch.float32, **how)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{said}: {reason}; connect once, or give the path of a local folder") from None
    return model, tokenizer


def _hub_answers() -> bool:
    """Whether the hub's name resolves; with a proxy the proxy knows, and we cannot tell."""
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
        return True
    except OSError:
        return False


def own_model(spec: str) -> tuple[nn.Module, Any]:
    """What ``package.module:function`` returns: a model, or (model, tokenizer); without one the tokenizer is None."""
    build = import_object(spec, "--model")
    try:
        made = build()
    except Exception as error:
        raise UserError(f"--model {spec} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {spec} returned {type(model).__name__}, expected a model or (model, tokenizer)")
    return model, tokenizer


def with_adapters(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """The model with LoRA adapters of this rank, which alone are trained; rank 0 gives it back as it is.

    ``merge_and_unload()`` of what is returned gives a plain model again. Source: Hu et al. 2021, arXiv 2106.09685.

    Raises:
        UserError: peft is not installed, or knows no layers of this model to adapt.
    """
    if not rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise need("diffusion", "peft") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, "lora"))
        try:
            return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="SEQ_2_SEQ_LM"))
        except (ValueError, AttributeError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"{type(model).__name__} takes no LoRA adapters: {said}") from None


# -- what a model says --------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: nn.Module,
    codec: Codec,
    texts: Sequence[str],
    *,
    prefix: str = "",
    max_new: int = 64,
    batch_size: int = 64,
    tensors: dict[str, Tensor] | None = None,
) -> list[str]:
    """Greedy decoding of ``prefix + text``, for each text.

    Args:
        model: has ``generate(input_ids, attention_mask, max_new_tokens)``; runs where its parameters are, in eval mode.
        codec: its tokenizer and budgets. max_new: most tokens of an answer.
        batch_size: texts at once; they are sorted by length, which changes nothing but the time.
        tensors: what the model reads beside the text, a row per text.

    Returns:
        decoded texts in the order given, without special tokens.
    """
    if not hasattr(model, "generate"):
        raise UserError(f"{type(model).__name__} has no generate(input_ids, attention_mask, max_new_tokens)")
    speak: Any = model.generate
    device = next(model.parameters()).device
    ids = codec.inputs(texts, prefix)
    order = np.argsort([len(row) for row in ids], kind="stable")
    said: list[str] = [""] * len(ids)
    # By position for the library's own interface: another way of decoding in a loaded generation config must not count.
    greedy = {"do_sample": False, "num_beams": 1} if hasattr(model, "generation_config") else {}
    with evaluating(model):
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            some = [ids[i] for i in rows]
            inputs = padded(some, max(map(len, some)), codec.pad).to(device)
            mask = (torch.arange(inputs.shape[1]) < torch.tensor([[len(r)] for r in some])).long().to(device)
            more = {k: v[torch.from_numpy(rows)].to(device) for k, v in (tensors or {}).items()}
            out = speak(input_ids=inputs, attention_mask=mask, max_new_tokens=max_new, **greedy, **more)
            for i, text in zip(rows, codec.decode(out.tolist()), strict=True):
                said[i] = text
    return said


@torch.no_grad()
def token_nll(model: nn.Module, view: View, batch_size: int = 64) -> float:
    """−log p per target token, in nats: Σ over all tokens of all examples, divided by their number."""
    device, total, tokens = next(model.parameters()).device, 0.0, 0
    with evaluating(model):
        for at in range(0, len(view), batch_size):
            batch = map_tensors(view.batch(np.arange(at, min(at + batch_size, len(view)))), lambda t: t.to(device))
            values = token_cross_entropy(logits_of(model(**model_inputs(batch))), batch["labels"])
            total += float(values.double().sum() if device.type != "mps" else values.sum())
            tokens += int((batch["labels"] != IGNORE).sum())
    return total / tokens


# -- students in folders ------------------------------------------------------------------------------------


@dataclass
class TextMember(Member):
    """A model that answers in text.

    Attributes:
        text: how it is asked: ``prefix``, ``explain`` (or None), ``behind``, ``max_input``, ``max_target``,
            ``max_generated``.
    """

    text: dict[str, Any] = field(default_factory=dict)


@dataclass
class TextModels(Models):
    """Models that answer in text, of one tokenizer. Their folders hold it too; those of models of transformers are also
    what ``AutoModelForSeq2SeqLM.from_pretrained`` reads.

    Attributes:
        tokenizer: of transformers.
    """

    def facts(self, m: Member) -> dict[str, Any]:
        return {**super().facts(m), "text": self.answerer(m.name).text}

    def answerer(self, name: str) -> Answerer:
        """A member, ready to answer."""
        m = cast(TextMember, self[name])
        return Answerer.of(m.model, self.tokenizer, m.text)


@dataclass
class Answerer:
    """A student that answers texts; see `load`.

    Attributes:
        model: in eval mode. codec: its tokenizer and budgets. text: how it is asked.
    """

    model: nn.Module
    codec: Codec
    text: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, text: dict[str, Any]) -> Answerer:
        """A model with its tokenizer, asked as `text` says (`TextMember`)."""
        return cls(model, Codec.of(model, tokenizer, **{k: int(text[k]) for k in ("max_input", "max_target")}), text)

    def answer(self, texts: Sequence[str], **how: Any) -> list[str]:
        """The answer to each text; no rationale is read, nor written unless the model writes it before its answer.

        Args:
            how: ``batch_size`` and ``tensors`` of `generate`.
        """
        prefix, longest = self.text.get("prefix", ""), int(self.text["max_generated"])
        said = generate(self.model, self.codec, texts, prefix=prefix, max_new=longest, **how)
        return [behind_phrase(s, self.text.get("behind", "")) for s in said]

    def explain(self, texts: Sequence[str], **how: Any) -> list[str]:
        """The rationale for each text, for inspection.

        Raises:
            UserError: the model was not taught any.
        """
        prefix = self.text.get("explain")
        if not prefix:
            raise UserError("this student was trained on labels alone; it has no rationales to give")
        return generate(self.model, self.codec, texts, prefix=prefix, max_new=self.codec.max_target, **how)

    def examples(self, examples: Sequence[Example], explain: bool = False) -> list[str]:
        """`answer`, or `explain`, for examples: reads their input and tensors, neither label nor rationale."""
        ask = self.explain if explain else self.answer
        return ask([e.input for e in examples], tensors=stacked(examples))


def behind_phrase(said: str, phrase: str) -> str:
    """What stands behind the last `phrase`; nothing where it is missing; all of it where there is no phrase."""
    if not phrase:
        return said
    _, found, tail = said.rpartition(phrase)
    return tail.strip() if found else ""


def load(folder: str | Path, base: nn.Module | None = None) -> Answerer:
    """A student with its tokenizer, from its folder alone; only JSON and safetensors are read.

    Args:
        base: as for `stillhouse.load`, where the run was given a live model that is not of transformers.

    Raises:
        UserError: no student of text, or a file that is missing or damaged.

    Example::

        student = stillhouse.text.load("runs/svamp/students/dss")
        student.answer(["Ann has 3 apples and eats one. How many are left?"])
    """
    model, facts = load_model(folder, base), read_json(Path(folder) / "plan.json")
    if "text" not in facts:
        raise UserError(f"{folder}: this student answers no text (plan.json has no 'text')")
    try:
        tokenizer = import_library("transformers").AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from None
    return Answerer.of(model, tokenizer, facts["text"])
