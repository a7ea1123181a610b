"""Image folders and Hugging Face data sets as `Data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from stillhouse.data.images import Images, Rows, usual_size
from stillhouse.data.samples import Samples
from stillhouse.data.sets import Data, divide
from stillhouse.errors import UserError, did_you_mean, need

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
VALIDATION = ("val", "valid", "validation")


def folders_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def images_in(path: Path) -> list[Path]:
    return sorted(
        p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and p.is_file()
    )


def scan(path: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Files, labels and class names of PATH/CLASS/*; an empty class is an error."""
    classes = folders_in(path)
    if not classes:
        found = f"{len(images_in(path))} images but no class folders" if images_in(path) else "nothing to read"
        raise UserError(f"{path} holds {found}; expected {path}/CLASS/*.png (or .jpg …), one folder per class")
    files = [images_in(path / c) for c in classes]
    for name, inside in zip(classes, files):
        if not inside:
            raise UserError(f"class folder {path / name} holds no images ({', '.join(sorted(EXTENSIONS))})")
    if len(classes) < 2:
        raise UserError(f"{path} has one class folder ({classes[0]}); at least two classes are needed")
    labels = np.repeat(np.arange(len(classes)), [len(f) for f in files])
    return [p for inside in files for p in inside], labels, tuple(classes)


def open_folder(path: str, image_size: int | None, augment: str | None, skip_bad: bool, seed: int) -> Data:
    """ImageFolder layout: PATH/train + PATH/val and/or PATH/test, or PATH/CLASS/* split 80/20 by class.

    With both val and test, val becomes `held_out`. Inputs are RGB, normalised with ImageNet's statistics.
    """
    base = Path(path).expanduser()
    if not path or not base.is_dir():
        near = did_you_mean(base.name, folders_in(base.parent)) if path and base.parent.is_dir() else "give folder:PATH"
        raise UserError(f"image folder {str(base)!r} does not exist or is not a folder; {near}")
    inside = folders_in(base)
    notes: list[str] = []
    if "train" in inside:
        validation = next((v for v in VALIDATION if v in inside), None)
        names = {"train": "train"} | ({"test": "test"} if "test" in inside else {})
        if validation:
            names["held_out" if "test" in inside else "test"] = validation
        found = {part: scan(base / folder) for part, folder in names.items()}
        notes += [f"{part}: folder {folder}" for part, folder in names.items() if part != folder]
    else:
        found = {"train": scan(base)}
    files, labels, classes = found["train"]
    if "test" not in found:
        rest, part = divide(labels, 0.2, seed)
        found = {k: ([files[i] for i in ids], labels[ids], classes) for k, ids in (("train", rest), ("test", part))}
        notes.append(f"test: {len(part)} of the {len(files)} images, set apart by class with seed {seed}")
    size = image_size or usual_size(files)
    if not image_size:
        notes.append(f"inputs of {size} × {size} pixels, from the sizes of the images; image_size sets another")
    made: dict[str, Images] = {}
    for part_name, (paths, y, names_) in found.items():
        how = "none" if part_name == "test" else augment or "resized-crop-flip"
        made[part_name] = Images(paths, y, names_, image_size=size, augment=how, skip_bad=skip_bad)
    notes += skipped_notes(made, base)
    return Data(f"folder:{path}", made["train"], made["test"], made.get("held_out"), notes=tuple(notes))


def skipped_notes(parts: dict[str, Images], base: Path | None = None) -> list[str]:
    """One sentence per part on the images left out; a class left empty by it is an error."""
    notes = []
    for part, images in parts.items():
        if not images.skipped:
            continue
        left = np.bincount(images.labels, minlength=len(images.classes))
        if part == "train" and not left.all():
            gone = images.classes[int(left.argmin())]
            raise UserError(f"no readable image of class {gone!r} is left in train after skipping bad files")
        short = [str(Path(s).relative_to(base)) if base else s for s in images.skipped]
        more = ", …" if len(short) > 5 else ""
        notes.append(f"{part}: skipped {len(short)} unreadable image(s): {', '.join(short[:5])}{more}")
    return notes


def open_hub(spec: str, image_size: int | None, augment: str | None, skip_bad: bool, seed: int) -> Data:
    """``[OWNER/]NAME[/CONFIG]`` or a local path, with ``?image=…&label=…&config=…&train=…&test=…``."""
    name, _, query = spec.partition("?")
    asked = dict(parse_qsl(query))
    known = ("image", "label", "config", "train", "test")
    for key in asked:
        if key not in known:
            raise UserError(f"unknown option {key!r} in hf:{spec}; {did_you_mean(key, known)}")
    tables = fetch(name, asked.get("config"))
    names = choose_splits(tables, asked, spec)
    first = tables[names["train"]]
    image, label = choose_columns(first, asked, spec)
    labels, classes = column_labels({p: tables[s][label] for p, s in names.items()}, first.features[label], spec, label)
    rows = {p: (tables[s], labels[p]) for p, s in names.items()}
    notes = [f"{part}: split {split!r}" for part, split in names.items() if part != split]
    if "test" not in rows:
        rest, part_ = divide(labels["train"], 0.2, seed)
        rows = {p: (first.select(ids), labels["train"][ids]) for p, ids in (("train", rest), ("test", part_))}
        notes.append(f"test: {len(part_)} of the {len(first)} rows, set apart by class with seed {seed}")
    made: dict[str, Images] = {}
    for part, (table, y) in rows.items():
        how = "none" if part == "test" else augment or "resized-crop-flip"
        size = image_size or 224
        made[part] = Rows(table, image, y, classes, image_size=size, augment=how, skip_bad=skip_bad)
    held_out: Samples | None = made.get("held_out")
    return Data(f"hf:{spec}", made["train"], made["test"], held_out, notes=(*notes, *skipped_notes(made)))


def fetch(name: str, config: str | None) -> dict[str, Any]:
    """The splits of a data set from disk, the hub or its cache."""
    if not name:
        raise UserError("hf: needs a name, e.g. hf:uoft-cs/cifar10, or a local path")
    try:
        import datasets
    except ImportError:
        raise need("text", "datasets") from None
    local, parts = Path(name).expanduser(), name.split("/")
    try:
        if local.is_file():
            kind = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}.get(local.suffix, "")
            return dict(datasets.load_dataset(kind, data_files=str(local)))
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            saved = datasets.load_from_disk(str(local))
            return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if local.is_dir():
            return dict(datasets.load_dataset(str(local), config))
        if len(parts) == 3 and config is None:
            return dict(datasets.load_dataset("/".join(parts[:2]), parts[2]))
        return dict(datasets.load_dataset(name, config))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"cannot load hf:{name}: {reason:.200}; check the name (OWNER/NAME or OWNER/NAME/CONFIG), the "
            "connection, or give a local path"
        ) from error


def choose_splits(tables: dict[str, Any], asked: dict[str, str], spec: str) -> dict[str, str]:
    """Which split serves as train, test and held_out."""
    names: dict[str, str] = {}
    for part in ("train", "test"):
        if part in asked and asked[part] not in tables:
            raise UserError(f"hf:{spec} has no split {asked[part]!r}; {did_you_mean(asked[part], tables)}")
        if part in asked or part in tables:
            names[part] = asked.get(part, part)
    if "train" not in names and len(tables) == 1:
        names = {"train": next(iter(tables))}
    if "train" not in names:
        raise UserError(f"hf:{spec} has no train split but {sorted(tables)}; choose one with ?train=…")
    validation = next((v for v in VALIDATION if v in tables and v not in names.values()), None)
    if validation:
        names["held_out" if "test" in names else "test"] = validation
    return names


def choose_columns(table: Any, asked: dict[str, str], spec: str) -> tuple[str, str]:
    """The image and the label column: as asked, else the only ones of the fitting type."""
    import datasets

    features = table.features
    for key in ("image", "label"):
        if key in asked and asked[key] not in features:
            raise UserError(f"hf:{spec} has no column {asked[key]!r}; {did_you_mean(asked[key], features)}")
    images = [k for k, f in features.items() if isinstance(f, datasets.Image)]
    labels = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if not labels:
        labels = [k for k in ("label", "labels", "target", "class", "y") if k in features]
    chosen = []
    for what, found in (("image", images), ("label", labels)):
        if what not in asked and len(found) != 1:
            problem = f"{len(found)} {what} columns ({', '.join(found)})" if found else f"no {what} column"
            raise UserError(f"hf:{spec} has {problem}; choose with ?{what}=NAME among {sorted(features)}")
        chosen.append(asked.get(what) or found[0])
    return chosen[0], chosen[1]


def column_labels(
    columns: dict[str, Any], feature: Any, spec: str, name: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Integer labels per part and class names, from class labels, integers or words."""
    values = {part: list(column) for part, column in columns.items()}
    listed = getattr(feature, "names", None)
    if listed:
        return {p: np.asarray(v, dtype=np.int64) for p, v in values.items()}, tuple(listed)
    everything = [v for column in values.values() for v in column]
    if not all(isinstance(v, int | str) for v in everything) or len({type(v) for v in everything}) > 1:
        raise UserError(f"hf:{spec}: column {name!r} holds {type(everything[0]).__name__}; labels must be int or str")
    known = sorted(set(everything))
    position = {v: i for i, v in enumerate(known)}
    return {p: np.array([position[v] for v in col]) for p, col in values.items()}, tuple(str(k) for k in known)
