"""Flags that a system's run has beside the fields of its own Config: those of all systems, and those for images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.data import Data, Samples
    from stillhouse.engine import Run
    from stillhouse.models import ModelSpec
    from stillhouse.text.windows import Corpus


@dataclass(frozen=True)
class Options:
    """What to run on what, where and how; an experiment whose module says ``OPTIONS = …`` has a subclass."""

    BRINGS: ClassVar[tuple[str, ...]] = ("model", "data")  # the options with which a user brings something of theirs

    out: Path  # folder for the results; must not hold anything yet
    model: str | None = None  # your own: a library's by name, or package.module:function (stillhouse show SYSTEM)
    data: str | None = None  # your own: by name, a file or folder, or package.module:function (stillhouse show SYSTEM)
    seed: int = 0  # everything random is a function of it
    seeds: int = 3  # seeds for the claims of the built-in experiment
    device: str = "auto"  # auto, cpu, cuda, mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast type
    compile: bool = False  # torch.compile the networks
    channels_last: bool | None = None  # channels-last memory order (default: where there are convolutions)
    micro_batch: int | None = None  # most samples in one forward pass; steps stay one global batch
    workers: int = 0  # threads that read data ahead
    log_every: int = 10  # steps between rows of the log
    checkpoint_every: int | None = None  # steps between checkpoints (default: once a minute)
    track: tuple[str, ...] = ()  # trackers: tensorboard, wandb, …
    quiet: bool = False  # print only the result

    @property
    def own(self) -> bool:
        """Whether the user brought something (`BRINGS`); else the built-in experiment runs."""
        return any(getattr(self, name) not in (None, (), False) for name in self.BRINGS)

    def idle(self, config: Any) -> Mapping[str, str]:
        """Flags that do nothing beside these, and why: a Config's ``idle``. The built-in experiment has none."""
        return getattr(config, "idle", {}) if self.own else {}

    def run(self) -> Run:
        """The run these options describe."""
        from stillhouse.engine import Run
        from stillhouse.errors import UserError

        if self.seeds < 1:
            raise UserError(f"--seeds: expected 1 or more, got {self.seeds}")
        return Run(
            self.out,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
            compile=self.compile,
            channels_last=self.channels_last,
            micro_batch=self.micro_batch,
            workers=self.workers,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            track=self.track,
            quiet=self.quiet,
        )

    def children(self) -> Sequence[int]:
        """The seeds of a claim: this run's and the ones after it."""
        return list(range(self.seed, self.seed + self.seeds))


@dataclass(frozen=True)
class ImageOptions(Options):
    """Options of systems for image classifiers."""

    model: str | None = None  # stillhouse:NAME, torchvision:NAME, timm:NAME or package.module:function
    data: str | None = None  # digits, mnist, fashion-mnist, cifar10, folder:PATH, hf:NAME or package.module:function
    pretrained: bool = False  # start from the library's pretrained weights
    stem: Literal["keep", "small"] = "keep"  # small: a ResNet's stem for images of about 32 pixels
    image_size: int | None = None  # side of the square images, for folder: and hf: (default: at most 224)
    limit: int | None = None  # use only this many training samples, balanced over the classes
    label_noise: float = 0.0  # part of the training labels to replace by wrong ones
    augment: str | None = None  # none, flip, crop-flip, resized-crop-flip; + autoaugment, randaugment, trivialaugment
    skip_bad: bool = False  # count and skip images that cannot be read, instead of stopping

    def load_data(self, default: str, *, given: Any = None) -> Data:
        """The data named by ``--data``, or `default`; `given` is what its function gave, if it was called already."""
        from stillhouse.data import load

        return load(
            self.data or default,
            image_size=self.image_size,
            limit=self.limit,
            skip_bad=self.skip_bad,
            label_noise=self.label_noise,
            augment=self.augment,
            seed=self.seed,
            given=given,
        )

    def open_pool(self, name: str | None, data: Data) -> Samples | None:
        """Further inputs without labels by name, read as the data are; None where there is no name."""
        from stillhouse.data.pools import open_pool

        how: dict[str, Any] = {"image_size": self.image_size, "augment": self.augment, "skip_bad": self.skip_bad}
        return open_pool(name, data.train, **how) if name else None

    def spec(self, data: Data, default: str) -> ModelSpec:
        """The network named by ``--model``, or `default`, for these data."""
        from stillhouse.models import ModelSpec

        return ModelSpec(self.model or default, len(data.classes), tuple(data.shape), self.stem)

    def network(self, spec: ModelSpec, seed: int) -> nn.Module | None:
        """The network with its library's weights where ``--pretrained`` asks for them."""
        return spec.build(seed=seed, pretrained=True) if self.pretrained else None


@dataclass(frozen=True)
class ClassifierOptions(ImageOptions):
    """Options of systems for classifiers of images or of sentences."""

    model: str | None = None  # as for images; of text: bag, bert, hf:NAME or package.module:function
    data: str | None = None  # as for images; of text: sst2, FILE.jsonl, a folder of them, or hf:NAME?text=COLUMN
    tokenizer: str | None = None  # text: one of transformers (default: the model's own, or the words of the data)
    length: int = 64  # text: most tokens of a sentence
    width: int = 64  # text: of bag and bert, which start from scratch
    layers: int = 2  # text: of bert
    dropout: float = 0.1  # text: of bert

    def load_data(self, default: str, *, given: Any = None, teacher: str | None = None) -> Data:
        """The data named by ``--data``, or `default`: images, or sentences as token ids.

        Args:
            given: what its function gave, if it was called already.
            teacher: a further tokenizer; sentences then have its ids under ``teacher``.

        Raises:
            UserError: options of images with sentences, or what the data themselves are refused for.
        """
        from stillhouse.data.named import with_noise
        from stillhouse.errors import UserError
        from stillhouse.text.sentences import look, sentence_data, tokenizer_by_name

        name = self.data or default
        parts, given = look(name) if given is None else (None, given)
        if parts is None:
            return super().load_data(default, given=given)
        if self.image_size or self.augment or self.stem != "keep":
            raise UserError(f"--image-size, --augment and --stem are of images, and {name} holds sentences; drop them")
        own = self.tokenizer or (self.model or "").partition("hf:")[2]
        how: dict[str, Any] = {"length": self.length, "seed": self.seed, "limit": self.limit}
        data = sentence_data(parts, name, tokenizers={"input": tokenizer_by_name(own)} if own else None, **how)
        if teacher and teacher != own:
            both = {"input": data.train.tokenizer, "teacher": tokenizer_by_name(teacher)}  # type: ignore[attr-defined]
            data = sentence_data(parts, name, tokenizers=both, **how)
        return with_noise(data, self.label_noise, self.seed)

    def spec(self, data: Data, default: str, text_default: str = "bag") -> ModelSpec:
        """The network named by ``--model``, or the default for these data.

        Raises:
            UserError: a name that is not one of the kind of these data.
        """
        if hasattr(data.train, "tokenizer"):
            return self.text(self.model or text_default, data)
        return super().spec(data, default)

    def network(self, spec: ModelSpec, seed: int) -> nn.Module | None:
        """The network with published weights where ``--pretrained`` asks for them."""
        from stillhouse.text.classifiers import hub_classifier

        if not (self.model or "").startswith("hf:"):
            return super().network(spec, seed)
        name = (self.model or "").removeprefix("hf:")
        return hub_classifier(name, spec.classes, self.length)[1] if self.pretrained else None

    def text(self, name: str, data: Data) -> ModelSpec:
        """A classifier of sentences by name, of the asked width and depth."""
        from stillhouse.text.classifiers import text_spec

        return text_spec(name, data, width=self.width, layers=self.layers, dropout=self.dropout)


@dataclass(frozen=True)
class LanguageOptions(Options):
    """Options of systems for decoder-only language models."""

    model: str | None = None  # llama (from scratch), hf:NAME or its folder, package.module:function
    data: str | None = None  # python-reference, shakespeare, wikitext2, names, FILE.txt[.gz], hf:NAME?text=COLUMN
    tokenizer: str | None = None  # one of transformers (default: the model's own, or made from the text)
    tokens: Literal["char", "word"] = "char"  # of a tokenizer made from the text
    length: int = 64  # tokens of a window
    limit: int | None = None  # use only so many characters of the text
    width: int = 96  # of llama: the residual stream
    layers: int = 4  # of llama
    heads: int = 4  # of llama: of the queries
    kv_heads: int | None = None  # of llama: of keys and values (default: as many as heads)

    def corpus(self, default: str = "python-reference") -> Corpus:
        """The text named by ``--data``, or `default`, as windows of token ids."""
        from stillhouse.text.sentences import tokenizer_by_name
        from stillhouse.text.windows import corpus

        model = self.model or ""
        student = model if model and (Path(model) / "tokenizer.json").exists() else ""  # of another run
        own = self.tokenizer or student or model.partition("hf:")[2]
        tokenizer = tokenizer_by_name(own) if own else None
        return corpus(
            self.data or default, length=self.length, tokens=self.tokens, tokenizer=tokenizer, limit=self.limit
        )

    def network(self, text: Corpus) -> tuple[ModelSpec, nn.Module | None]:
        """The model named by ``--model`` (default: llama): how it is built, and with its weights where it has some."""
        from stillhouse.text.language import language_model

        sizes = {"width": self.width, "layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads}
        return language_model(self.model or "llama", text, **sizes)
