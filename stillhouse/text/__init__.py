"""Text: tasks with rationales, parsers, tokenizers, batches in several views, sequence-to-sequence students."""

from stillhouse.text.arithmetic import evaluate, same_value
from stillhouse.text.classifiers import Bag, bag_spec, bert_spec, hub_classifier, text_spec
from stillhouse.text.encoding import Codec, small_tokenizer
from stillhouse.text.language import Training, language_model, language_models, llama_spec, nats, train_language_model
from stillhouse.text.parsers import KINDS, Kind
from stillhouse.text.sentences import Sentences, open_rows, sentence_data
from stillhouse.text.seq2seq import (
    Answerer,
    TextMember,
    TextModels,
    generate,
    gru_spec,
    load,
    t5_spec,
    token_nll,
    with_adapters,
)
from stillhouse.text.tasks import PAIR, Example, Task, open_task, parse_report, shuffled
from stillhouse.text.views import View, Views, encode, model_inputs
from stillhouse.text.windows import Corpus, Windows, corpus

__all__ = [
    "KINDS",
    "PAIR",
    "Answerer",
    "Bag",
    "Codec",
    "Corpus",
    "Example",
    "Kind",
    "Sentences",
    "Task",
    "TextMember",
    "TextModels",
    "Training",
    "View",
    "Views",
    "Windows",
    "bag_spec",
    "bert_spec",
    "corpus",
    "encode",
    "evaluate",
    "generate",
    "gru_spec",
    "hub_classifier",
    "language_model",
    "language_models",
    "llama_spec",
    "load",
    "model_inputs",
    "nats",
    "open_rows",
    "open_task",
    "parse_report",
    "same_value",
    "sentence_data",
    "shuffled",
    "small_tokenizer",
    "t5_spec",
    "text_spec",
    "token_nll",
    "train_language_model",
    "with_adapters",
]
