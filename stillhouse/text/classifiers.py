"""Classifiers of sentences: a bag of words, small encoders from scratch, and those of transformers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models import ModelSpec, import_library


class Bag(nn.Module):
    """Mean of word vectors, a hidden layer with ReLU, and the head (Joulin et al., 2017, with a hidden layer).

    z = W ReLU(V · Σ_t m_t E[x_t] / Σ_t m_t)

    Args:
        vocabulary: number of tokens.
        classes: number of outputs.
        width: of the word vectors and of the hidden layer.

    Example:
        >>> Bag(10, 2, width=4)(torch.tensor([[3, 4, 0]]), torch.tensor([[1, 1, 0]])).shape
        torch.Size([1, 2])
    """

    def __init__(self, vocabulary: int, classes: int, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (n, classes) for ids and their mask, (n, length) each."""
        own = attention_mask.unsqueeze(-1).to(self.embed.weight.dtype)
        mean = (self.embed(input_ids) * own).sum(1) / own.sum(1).clamp(min=1)
        return self.head(self.hidden(mean))


def bag_spec(vocabulary: int, classes: int, width: int = 32, length: int = 128) -> ModelSpec:
    """How to build a `Bag`."""
    options = {"vocabulary": vocabulary, "width": width}
    return ModelSpec("stillhouse.text.classifiers:Bag", classes, (length,), options=options)


def bert_spec(
    vocabulary: int,
    classes: int,
    *,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    length: int = 128,
    dropout: float = 0.1,
) -> ModelSpec:
    """A small BERT classifier of transformers, to be trained from scratch with a tokenizer whose padding is 0.

    Raises:
        UserError: a width that the heads do not divide.
    """
    if width % heads:
        near = heads * (width // heads + 1)
        raise UserError(f"width {width} is no multiple of {heads} heads; give a width of {near}")
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width}
    depth = {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": length}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    labels = {"id2label": {str(k): str(k) for k in range(classes)}, "label2id": {str(k): k for k in range(classes)}}
    options = {**sizes, **depth, **drop, **labels, "pad_token_id": 0}
    return ModelSpec("transformers:BertForSequenceClassification", classes, (length,), options=options)


def hub_classifier(
    name: str, classes: int, length: int = 128, *, pretrained: bool = True, trained: bool = False
) -> tuple[ModelSpec, nn.Module]:
    """A sequence classifier of transformers, by its name on the hub or its folder.

    Args:
        name: ``OWNER/NAME`` or a folder.
        classes: outputs; a pretrained model with another number gets a fresh head.
        length: most tokens of a sentence, for the record.
        pretrained: with its weights; else its configuration alone, with fresh ones.
        trained: refuse one whose weights are not all there, or are for other classes, as a teacher's must be.

    Returns:
        How to build its structure again, and the model in eval mode.

    Raises:
        UserError: it cannot be had, or is no classifier.
    """
    transformers = import_library("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.num_labels != classes and trained:
            raise UserError(f"hf:{name} gives {config.num_labels} classes, the data have {classes}")
        if config.num_labels != classes:
            config.num_labels = classes
        kind = transformers.AutoModelForSequenceClassification
        if pretrained:
            how = {"config": config, "use_safetensors": True, "output_loading_info": True}
            model, found = kind.from_pretrained(name, ignore_mismatched_sizes=True, **how)
            if trained and found["missing_keys"]:
                first = min(found["missing_keys"])
                raise UserError(f"hf:{name} is no trained classifier: it has no weights for {first!r}")
        else:
            with torch.random.fork_rng(devices=[]):
                model = kind.from_config(config)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"hf:{name} cannot be had as a classifier: {' '.join(str(error).split())[:200]}") from None
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 0 < longest < length:
        raise UserError(f"hf:{name} reads at most {longest} tokens, got length {length}; give --length {longest}")
    return ModelSpec.of(model, (length,), classes), model.eval()


def labels_in_order(model: Any, classes: tuple[str, ...], who: str) -> None:
    """Refuses a classifier whose label names are those of the data in another order.

    Raises:
        UserError: both orders, side by side.
    """
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    own = [str(named[k]).lower() for k in sorted(named)]
    wanted = [c.lower() for c in classes]
    if own != wanted and sorted(own) == sorted(wanted):
        raise UserError(f"the {who} has its classes in the order {own}, the data in {wanted}; reorder its head")


def text_spec(name: str, data: Any, *, width: int = 64, layers: int = 2, dropout: float = 0.1) -> ModelSpec:
    """How to build a classifier of sentences by name.

    Args:
        name: ``bag``, ``bert`` (both from scratch), ``hf:NAME``, or ``package.module:function``, which may take
            ``vocabulary``, ``classes`` and ``length``.
        data: `sentence_data`; its tokenizer, classes and length fit the model.
        width, layers, dropout: of ``bag`` and ``bert``.

    Raises:
        UserError: another name; a model with fewer embeddings than the tokenizer has tokens.
    """
    vocabulary, classes, length = len(data.train.tokenizer), len(data.classes), data.shape[0]
    if name == "bag":
        return bag_spec(vocabulary, classes, width, length)
    if name == "bert":
        return bert_spec(vocabulary, classes, width=width, layers=layers, length=length, dropout=dropout)
    source, _, rest = name.partition(":")
    if source == "hf" and rest:
        spec, model = hub_classifier(rest, classes, length, pretrained=False)
        embedded = getattr(model.config, "vocab_size", vocabulary)
        if embedded < vocabulary:
            raise UserError(f"{name} embeds {embedded} tokens, the tokenizer has {vocabulary}; give its own tokenizer")
        return spec
    if rest and source not in ("stillhouse", "torchvision", "timm"):
        return ModelSpec(name, classes, (length,), options={"vocabulary": vocabulary, "length": length})
    raise UserError(f"{name} is no classifier of sentences; expected bag, bert, hf:NAME or package.module:function")
