"""Image-text pairs: reading them, and as pixels and token ids for two-tower models."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import Arrays, Data, Images, Samples, Subset, find, load
from stillhouse.data.external import choose_splits, fetch
from stillhouse.data.images import Rows, usual_size
from stillhouse.data.named import resized
from stillhouse.data.samples import digest, draws
from stillhouse.data.sets import divide
from stillhouse.errors import UserError, did_you_mean
from stillhouse.system import fold
from stillhouse.text.encoding import small_tokenizer
from stillhouse.text.sentences import PART_OF, lines_of

TEMPLATES = ("a photo of a {}", "a picture of the {}", "an image showing a {}", "this is a {}", "one {}")
IMAGE_KEYS, TEXT_KEYS = ("file_name", "image", "file", "path"), ("text", "caption", "captions", "name")
ONE = ("pair",)  # the class of pairs without labels
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel
Captioned = tuple[Samples, list[tuple[str, ...]]]  # images, and the captions of each


class Pairs(Samples):
    """Images with captions, as two-tower models of transformers are called with them.

    ``take`` gives as ``input`` ``{"input_ids", "attention_mask", "pixel_values"}``: int64 (n, length), padded to the
    longest of the batch, and float32 (n, *shape). Of several captions of an image training draws one per view;
    evaluation has the first.

    Args:
        images: with their own normalisation and augmentation.
        captions: of each image, at least one.
        tokenizer: of transformers, with padding.
        length: most tokens, special ones included; longer captions lose their end.
        statistics: mean and deviation that the model's images are normalised by, instead of the images' own.

    Raises:
        UserError: an image without a caption, an empty one, a tokenizer without padding.
    """

    def __init__(
        self,
        images: Samples,
        captions: Sequence[Sequence[str]],
        tokenizer: Any,
        length: int = 77,
        statistics: Statistics | None = None,
    ):
        if len(images) != len(captions):
            raise UserError(f"{len(images)} images have captions for {len(captions)}; give captions for each image")
        bad = next((i for i, c in enumerate(captions) if not c or not all(t.strip() for t in c)), None)
        if bad is not None:
            raise UserError(f"pair {bad} has no caption, or an empty one; drop it or fill it in")
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise UserError(f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token")
        self.images, self.captions, self.tokenizer, self.length = images, captions, tokenizer, length
        self.statistics = statistics
        self.labels, self.classes, self.shape = images.labels, images.classes, images.shape
        number = {text: k for k, text in enumerate(dict.fromkeys(t for c in captions for t in c))}
        self._of = [np.array([number[t] for t in c]) for c in captions]
        self._ids = [np.asarray(row, np.int64) for row in _ids(tokenizer, list(number), length)]
        self.longer = sum(len(row) > length for row in _ids(tokenizer, list(number), None))

    @cached_property
    def fingerprint(self) -> str:
        texts = [np.concatenate([np.append(self._ids[k], -1) for k in of]) for of in self._of]
        return digest("pairs", self.images.fingerprint, np.concatenate(texts), self.statistics)

    @property
    def one_thread(self) -> bool:
        return getattr(self.images, "one_thread", False)

    def take(self, ids: np.ndarray, *, view: int | None = None, seed: int = 0) -> dict[str, Any]:
        ids = np.asarray(ids, dtype=np.int64)
        batch = self.images.take(ids, view=view, seed=seed)
        u = np.zeros(len(ids)) if view is None else draws(fold(seed, "caption"), view, ids, 1)[:, 0]
        rows = [self._ids[self._of[i][int(x * len(self._of[i]))]] for i, x in zip(ids, u, strict=True)]
        pixels = self._normalised(batch["input"])
        return {**batch, "input": {**padded(rows, self.tokenizer.pad_token_id), "pixel_values": pixels}}

    def _normalised(self, x: Tensor) -> Tensor:
        if self.statistics is None:
            return x
        own = getattr(self.images, "mean", None) or [0.0], getattr(self.images, "std", None) or [1.0]
        m0, s0, m1, s1 = (torch.tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in (*own, *self.statistics))
        return (x * s0 + m0 - m1) / s1


def _ids(tokenizer: Any, texts: list[str], length: int | None) -> list[list[int]]:
    cut = {"truncation": True, "max_length": length} if length else {}
    return tokenizer(texts, verbose=False, **cut)["input_ids"] if texts else []


def padded(rows: Sequence[np.ndarray], pad: int) -> dict[str, Tensor]:
    """Token ids of unequal length as ``input_ids`` and ``attention_mask``, (n, longest) int64."""
    lengths = np.array([len(r) for r in rows])
    own = np.arange(lengths.max(initial=1)) < lengths[:, None]
    ids = np.full(own.shape, pad, np.int64)
    ids[own] = np.concatenate(rows) if len(rows) else 0
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(own.astype(np.int64))}


@dataclass
class PairData:
    """Training and test pairs.

    Attributes:
        name: for reports. train, test: the pairs.
        prompts: of each class its captions, for zero-shot classification; empty where pairs have no classes.
        tokenizer: of both parts. notes: what a reader of reports must know.
    """

    name: str
    train: Pairs
    test: Pairs
    prompts: tuple[tuple[str, ...], ...] = ()
    tokenizer: Any = None
    notes: tuple[str, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.train.shape

    def example(self, n: int = 1) -> dict[str, Tensor]:
        """The first n training pairs as a model's input."""
        return self.train.take(np.arange(min(n, len(self.train))))["input"]

    def prompt(self, k: int) -> dict[str, Tensor]:
        """The captions of class k as token ids."""
        rows = _ids(self.tokenizer, list(self.prompts[k]), self.train.length)
        return padded([np.asarray(r, np.int64) for r in rows], self.tokenizer.pad_token_id)


def pair_data(
    parts: Mapping[str, Captioned], name: str, *, prompts: Sequence[Sequence[str]] = (), tokenizer: Any = None,
    length: int = 77, statistics: Statistics | None = None, seed: int = 0, limit: int | None = None,
    notes: Sequence[str] = (),
) -> PairData:  # fmt: skip
    """`PairData` of images and their captions.

    Args:
        parts: ``train`` and perhaps ``test``, without which a fifth of the training pairs is set apart.
        prompts: of each class its captions. tokenizer: by default the words of the training captions, in lower case.
        length, statistics: see `Pairs`. seed: of the test part. limit: keep the first so many training pairs.

    Example:
        >>> images = Arrays(np.zeros((10, 1, 4, 4), np.uint8), np.zeros(10, int))
        >>> data = pair_data({"train": (images, [("a dot",)] * 10)}, "dots")
        >>> sorted(data.example()), len(data.train), len(data.test)
        (['attention_mask', 'input_ids', 'pixel_values'], 8, 2)
    """
    images, captions = parts["train"]
    notes = list(notes)
    made = dict(parts)
    if "test" not in parts:
        rest, part = divide(np.zeros(len(images), np.int64), 0.2, seed)
        made = {
            k: (Subset(images, at, own_ids=True), [captions[i] for i in at])
            for k, at in (("train", rest), ("test", part))
        }
        notes.append(f"test: {len(part)} of {len(images)} pairs, set apart with seed {seed}")
    images, captions = made["train"]
    if limit is not None and limit < len(images):
        made["train"] = Subset(images, np.arange(limit), own_ids=True), captions[:limit]
        notes.append(f"train: the first {limit} pairs")
    if tokenizer is None:
        texts = [t for c in (*made["train"][1], *prompts) for t in c]
        tokenizer = small_tokenizer(dict.fromkeys(texts), lower=True)
        notes.append("tokens: the words of the training captions")
    train, test = (Pairs(*made[k], tokenizer, length, statistics) for k in ("train", "test"))
    if train.shape != test.shape:
        raise UserError(f"{name}: training images are {train.shape}, test images {test.shape}; make them equal")
    if train.longer:
        notes.append(f"{train.longer} training captions are longer than {length} tokens and were cut")
    return PairData(name, train, test, tuple(map(tuple, prompts)), tokenizer, tuple(notes))


def caption_data(data: Data, templates: Sequence[str] = TEMPLATES, **how: Any) -> PairData:
    """Pairs made from labelled images: every image with the captions of its class, ``template.format(class name)``.

    Raises:
        UserError: a template without ``{}``.

    Example:
        >>> data = caption_data(load("digits", limit=50), ("the digit {}",))
        >>> data.prompts[3], data.tokenizer.decode(data.example()["input_ids"][0], skip_special_tokens=True)[:9]
        (('the digit 3',), 'the digit')
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template {template!r}: {{}} stands for the class name; write it somewhere")
    if not templates:
        raise UserError("captions of classes need at least one template, such as 'a photo of a {}'")
    of = [tuple(t.replace("{}", c) for t in templates) for c in data.classes]
    parts = {k: (s, [of[y] for y in s.labels]) for k, s in (("train", data.train), ("test", data.test))}
    notes = (*data.notes, "captions: made from class names and templates")
    return pair_data(parts, data.name, prompts=of, notes=notes, **how)


def open_pairs(spec: str, *, image_size: int | None = None, templates: Sequence[str] = TEMPLATES, seed: int = 0,
               limit: int | None = None, augment: str | None = None, **how: Any) -> PairData:  # fmt: skip
    """Pairs by name.

    Args:
        spec: ``emoji-captions`` (in $STILLHOUSE_DATA); a folder with images and ``captions`` or ``metadata``
            ``.jsonl`` or ``.csv`` (columns file_name, text and perhaps split); of Hugging Face datasets
            ``hf:NAME?image=COLUMN&text=COLUMN``; or labelled images as of `stillhouse.data.load`, whose captions are
            made of class names and `templates`.
        image_size: side of the images; limit: of training pairs; how: see `pair_data`.

    Raises:
        UserError: none of these; rows without image or caption.
    """
    how = {**how, "seed": seed}
    images = {"image_size": image_size, "augment": augment or "none"}
    if spec == "emoji-captions":
        return pair_data(emoji(image_size, augment or "none"), spec, limit=limit, **how)
    if spec.startswith("hf:") and "text" in dict(parse_qsl(spec.partition("?")[2])):
        return pair_data(hub_pairs(spec.removeprefix("hf:"), images), spec, limit=limit, **how)
    if listed := listing(Path(spec)):
        return pair_data(folder_pairs(listed, images), spec, limit=limit, **how)
    if Path(spec).is_dir():
        raise UserError(f"{spec} holds no captions.jsonl, captions.csv or metadata.jsonl; or folder:{spec} for classes")
    try:
        data = load(spec, image_size=image_size, limit=limit, augment=augment, seed=seed)
    except UserError as error:
        if "unknown data" not in str(error):
            raise
        more = "emoji-captions, a folder with captions.jsonl, hf:NAME?text=COLUMN"
        raise UserError(f"{error}; with captions of their own: {more}") from None
    return caption_data(data, templates, **how)


def emoji(image_size: int | None = None, augment: str = "none") -> dict[str, Captioned]:
    """The parts of emoji-captions; an emoji's captions are its name, and its name with each two of its keywords."""
    home = find("emoji-captions")
    rows = [json.loads(line) for line in lines_of(home / "captions.jsonl.gz")]
    with np.load(home / "images.npz", allow_pickle=False) as z:
        x = z["images"].transpose(0, 3, 1, 2)
    x = resized(x, image_size) if image_size else x
    look: dict[str, Any] = {"classes": ONE, "mean": [0.5] * 3, "std": [0.5] * 3}
    parts: dict[str, Captioned] = {}
    for part in ("train", "test"):
        mine = [r for r in rows if r["split"] == part]
        at = np.array([r["index"] for r in mine])
        words = [[r["keywords"][i : i + 2] for i in range(0, len(r["keywords"]), 2)] for r in mine]
        texts = [(r["name"], *(" ".join((r["name"], *w)) for w in ws)) for r, ws in zip(mine, words, strict=True)]
        how = augment if part == "train" else "none"
        parts[part] = Arrays(x[at], np.zeros(len(at), np.int64), augment=how, **look), texts
    return parts


def listing(folder: Path) -> Path | None:
    """The file in a folder that says which image has which caption."""
    names = (f"{stem}{end}" for stem in ("captions", "metadata") for end in (".jsonl", ".jsonl.gz", ".csv"))
    return next((folder / n for n in names if (folder / n).is_file()), None) if folder.is_dir() else None


def folder_pairs(listed: Path, how: Mapping[str, Any]) -> dict[str, Captioned]:
    """Parts of a folder with images and a list of captions; an image in several rows has several captions."""
    lines = lines_of(listed)
    rows: list[tuple[str, Mapping[str, Any]]] = []
    if listed.suffix == ".csv":
        rows = [(f"{listed}, row {n}", r) for n, r in enumerate(csv.DictReader(io.StringIO("\n".join(lines))), 2)]
    for number, line in enumerate(() if rows or listed.suffix == ".csv" else lines, 1):
        try:
            rows += [(f"{listed}:{number}", json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{listed}:{number}: no JSON ({error.msg})") from None
    parts: dict[str, dict[Path, list[str]]] = {}
    for where, row in rows:
        keys = [next((k for k in known if isinstance(row, Mapping) and row.get(k)), None)
                for known in (IMAGE_KEYS, TEXT_KEYS)]  # fmt: skip
        if None in keys:
            raise UserError(f"{where}: expected an image under {IMAGE_KEYS} and a caption under {TEXT_KEYS}")
        path, texts = listed.parent / str(row[keys[0]]), row[keys[1]]  # type: ignore[index]
        if not path.is_file():
            raise UserError(f"{where}: the image {path} does not exist")
        split = PART_OF.get(str(row.get("split") or "train"), "held_out")
        parts.setdefault(split, {}).setdefault(path, []).extend([texts] if isinstance(texts, str) else texts)
    if "train" not in parts:
        raise UserError(f"{listed} lists no training pairs")
    size = how["image_size"] or usual_size(list(parts["train"]))
    made: dict[str, Captioned] = {}
    for part, found in judged(parts).items():
        look = {**how, "image_size": size, **({"augment": "none"} if part == "test" else {})}
        images = Images(list(found), np.zeros(len(found), np.int64), ONE, **look)
        made[part] = images, [tuple(c) for c in found.values()]
    return made


def judged(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Training and test part alone; what was held out is the test part where there is no other."""
    test = parts.get("test", parts.get("held_out"))
    return {"train": parts["train"]} | ({} if test is None else {"test": test})


def hub_pairs(spec: str, how: Mapping[str, Any]) -> dict[str, Captioned]:
    """``NAME?image=COLUMN&text=COLUMN&train=SPLIT&test=SPLIT`` of Hugging Face datasets or a local path."""
    name, _, query = spec.partition("?")
    asked, known = dict(parse_qsl(query)), ("image", "text", "config", "train", "test")
    for key in asked:
        if key not in known:
            raise UserError(f"unknown option {key!r} in hf:{spec}; {did_you_mean(key, known)}")
    tables = fetch(name, asked.get("config"))
    image, text = asked.get("image", "image"), asked["text"]
    parts: dict[str, Captioned] = {}
    for part, split in judged(choose_splits(tables, asked, spec)).items():
        table = tables[split]
        for column in (image, text):
            if column not in table.features:
                raise UserError(f"hf:{spec} has no column {column!r}; {did_you_mean(column, table.features)}")
        texts = [(c,) if isinstance(c, str) else tuple(c) for c in table[text]]
        look = {**how, "image_size": how["image_size"] or 224, **({"augment": "none"} if part == "test" else {})}
        parts[part] = Rows(table, image, np.zeros(len(table), np.int64), ONE, **look), texts
    return parts
