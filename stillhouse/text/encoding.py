"""Text as token ids: small tokenizers made offline, tokenizers by name, and a codec with budgets that reports cuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stillhouse.errors import UserError, need
from stillhouse.text.tasks import PAIR

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5


def small_tokenizer(
    texts: Iterable[str], level: Literal["word", "char"] = "word", min_count: int = 1, lower: bool = False
) -> Any:
    """A word- or character-level tokenizer of these texts, as transformers has them (`PreTrainedTokenizerFast`).

    Words are what stands between blanks; decoding joins them by one blank. Characters are decoded as they are. Ids are
    by falling frequency, then by the alphabet, so the same texts give the same file.

    Args:
        texts: what the vocabulary is taken from.
        level: word or char.
        min_count: rarer words become ``<unk>``.
        lower: read everything in lower case.

    Raises:
        UserError: no text at all; transformers is not installed.

    Example:
        >>> t = small_tokenizer(["a b a"])
        >>> t("a c b")["input_ids"], t.decode([3, 4])
        ([3, 2, 4, 1], 'a b')
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise need("text", error.name or "transformers") from None
    count: Counter[str] = Counter()
    for text in texts:
        text = text.lower() if lower else text
        count.update(text.replace(PAIR, " ").split() if level == "word" else text.replace(PAIR, ""))
    if not count:
        raise UserError("a tokenizer needs text, and all texts are empty")
    kept = sorted((w for w, k in count.items() if k >= min_count), key=lambda w: (-count[w], w))
    vocabulary = {w: i for i, w in enumerate([*SPECIAL, *(w for w in kept if w not in SPECIAL)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[2]))
    if lower:
        raw.normalizer = normalizers.Lowercase()
    if level == "word":
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=SPECIAL[0], eos_token=SPECIAL[1], unk_token=SPECIAL[2],
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@dataclass
class Cuts:
    """How many texts were longer than their budget, and by how much."""

    what: str
    limit: int
    texts: int
    cut: int
    longest: int
    worst: str

    def __str__(self) -> str:
        return (
            f"{self.cut} of {self.texts} {self.what} are longer than {self.limit} tokens and were cut; the longest, "
            f"{self.worst}, by {self.longest - self.limit}"
        )


@dataclass
class Codec:
    """A tokenizer with budgets.

    Attributes:
        tokenizer: of transformers, with an end-of-sequence and a padding token.
        start: id that decoding begins with.
        max_input, max_target: most tokens of an input, prefix and end included, and of a target, end included.
        strict: refuse texts that are too long instead of cutting them.
        cuts: what was cut, by what was encoded.
    """

    tokenizer: Any
    start: int
    max_input: int = 1024
    max_target: int = 256
    strict: bool = False
    cuts: dict[str, Cuts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("pad", "eos"):
            if getattr(self.tokenizer, f"{name}_token_id", None) is None:
                raise UserError(f"{type(self.tokenizer).__name__} has no {name} token; set tokenizer.{name}_token")

    @classmethod
    def of(cls, model: Any, tokenizer: Any, **budgets: Any) -> Codec:
        """The codec of a sequence-to-sequence model: it knows what decoding begins with.

        Raises:
            UserError: the model does not say, or has fewer embeddings than the tokenizer has tokens.
        """
        config = getattr(model, "config", model)
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            raise UserError(
                f"{type(model).__name__} has no decoder_start_token_id: a sequence-to-sequence model is needed (T5, "
                "BART, …), not a decoder or an encoder alone"
            )
        size = getattr(config, "vocab_size", None)
        if size is not None and len(tokenizer) > size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, {type(model).__name__} embeds {size}; they do not belong "
                "together"
            )
        return cls(tokenizer, start, **budgets)

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    def inputs(
        self, texts: Sequence[str], prefix: str = "", where: Sequence[str] = (), what: str = ""
    ) -> list[list[int]]:
        """Ids of prefix + text; what is too long loses the end of the TEXT, never of the prefix; its end token stays.

        Args:
            where: of each text, for messages.
            what: name under which cuts are counted (and refused where `strict`); without one they are only made.

        Raises:
            UserError: the prefix alone does not fit; with `strict`, a text is too long: names the longest.
        """
        if prefix:
            needed = len(self._ids([prefix])[0])
            if needed > self.max_input:
                raise UserError(
                    f"the prefix {prefix!r} has {needed} tokens with its end, max_input is {self.max_input}: nothing "
                    "of the text would be left"
                )
        ids = self._ids([prefix + t for t in texts])
        return self._cut(ids, self.max_input, what, where)

    def targets(self, texts: Sequence[str], what: str = "targets", where: Sequence[str] = ()) -> list[list[int]]:
        """Ids of the texts as targets, each with its end token; an empty text is the end token alone."""
        return self._cut(self._ids(texts), self.max_target, what, where)

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """Texts of ids without special tokens; −100 counts as padding."""
        clean = [[self.pad if i == -100 else int(i) for i in row] for row in ids]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in clean]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [t.replace(PAIR, f" {self.tokenizer.eos_token} ") for t in texts]
        found = self.tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"] if texts else []
        return [row if row and row[-1] == self.eos else [*row, self.eos] for row in found]

    def _cut(self, ids: list[list[int]], limit: int, what: str, where: Sequence[str]) -> list[list[int]]:
        long = [i for i, row in enumerate(ids) if len(row) > limit]
        if long and what:
            worst = max(long, key=lambda i: len(ids[i]))
            name = where[worst] if where and where[worst] else f"example {worst}"
            self.cuts[what] = cuts = Cuts(what, limit, len(ids), len(long), len(ids[worst]), name)
            if self.strict:
                raise UserError(
                    f"{name}: {cuts.longest} tokens, {cuts.longest - limit} more than the {limit} allowed for {what} "
                    f"({cuts.cut} of {cuts.texts} are too long); raise the limit, or cut them with --too-long cut"
                )
        return [row if len(row) <= limit else [*row[: limit - 1], self.eos] for row in ids]

    def notes(self) -> list[str]:
        """One sentence for every kind of text of which some were cut."""
        return [str(c) for c in self.cuts.values()]


def vocabulary_texts(splits: Iterable[Iterable[Any]], prefixes: Mapping[str, str]) -> list[str]:
    """Everything a student is to read and write: prefixes, inputs, labels and rationales of the examples."""
    texts = list(prefixes.values())
    for examples in splits:
        for e in examples:
            texts += [e.input, e.label or "", e.rationale, e.taught]
    return texts
