"""Text: tasks with rationales, parsers, tokenizers, batches in several views, sequence-to-sequence students."""

from stillhouse.text.arithmetic import evaluate, same_value
from stillhouse.text.encoding import Codec, small_tokenizer
from stillhouse.text.parsers import KINDS, Kind
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

__all__ = [
    "KINDS",
    "PAIR",
    "Answerer",
    "Codec",
    "Example",
    "Kind",
    "Task",
    "TextMember",
    "TextModels",
    "View",
    "Views",
    "encode",
    "evaluate",
    "generate",
    "gru_spec",
    "load",
    "model_inputs",
    "open_task",
    "parse_report",
    "same_value",
    "shuffled",
    "small_tokenizer",
    "t5_spec",
    "token_nll",
    "with_adapters",
]
