"""Data by name: built-in sets, image folders, Hugging Face data sets, a user's function."""

from __future__ import annotations

import gzip
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.data import Batches, Images, load, prefetch
from stillhouse.data.images import IMAGENET_MEAN, IMAGENET_STD, centre_box, random_box
from stillhouse.data.named import first_balanced, resized
from stillhouse.data.samples import Arrays, draws
from stillhouse.errors import UserError
from stillhouse.system import Clock

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def folder(base: Path, per_class: int = 5, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """BASE/CLASS/*.png of several sizes and modes, each of one colour."""
    for name in classes:
        (base / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            picture = Image.new("RGB", (20 + 4 * i, 30 - 3 * i), COLOURS[name])
            picture.convert("RGBA" if i == 1 else "RGB").save(base / name / f"{i}.png")
    return base


def spoil(path: Path) -> Path:
    """A file cut short in its pixel data."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:800])
    return path


@pytest.fixture()
def data_folder() -> Path:
    path = os.environ.get("STILLHOUSE_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip(f"STILLHOUSE_DATA={path or '(not set)'} is not a folder")
    return Path(path)


# -- names and options


def test_digits_are_split_once_and_for_all() -> None:
    data, again = load("digits"), load("digits", seed=5)
    assert data.shape == (1, 8, 8) and (len(data.train), len(data.test)) == (1258, 539)
    assert data.fingerprint == again.fingerprint and data.classes == tuple("0123456789")
    counts = np.bincount(data.train.labels) / (np.bincount(data.train.labels) + np.bincount(data.test.labels))
    assert np.abs(counts - 0.7).max() < 0.01
    x = data.train.take(np.arange(len(data.train)))["input"].double()
    assert x.mean().abs() < 1e-5 and (x.std(correction=0) - 1).abs() < 1e-5
    whole = torch.cat([x, data.test.take(np.arange(539))["input"].double()]).flatten(1)
    mean, std = data.train.mean[0], data.train.std[0]  # type: ignore[attr-defined]
    from sklearn.datasets import load_digits

    raw = load_digits().data / 16
    found = np.sort(((whole.numpy() * std) + mean) @ np.arange(1, 65))
    np.testing.assert_allclose(found, np.sort(raw @ np.arange(1, 65)), atol=1e-3)


def test_limit_noise_and_size() -> None:
    data = load("digits", limit=103, label_noise=0.3, image_size=4, augment="crop-flip")
    assert data.shape == (1, 4, 4) and len(data.train) == 103
    clean = load("digits", limit=103)
    assert np.bincount(clean.train.labels).tolist() == [11] * 3 + [10] * 7
    assert (data.train.labels != clean.train.labels).sum() == 31
    assert data.train.take(np.array([102]))["id"].tolist() == [102]
    assert np.array_equal(data.test.labels, clean.test.labels)
    text = " ".join(data.notes)
    assert "first 103 samples" in text and "30%" in text
    assert data.train.augment == "crop-flip" and data.test.augment == "none"  # type: ignore[attr-defined]
    assert len({load("digits", limit=k).fingerprint for k in (50, 60)}) == 2


def test_first_balanced_takes_the_first_of_each_class() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2, 0, 1, 1, 2])
    s = Arrays(np.zeros((10, 1)), labels)
    assert first_balanced(s.labels, 6).tolist() == [0, 1, 4, 5, 7, 9]
    assert first_balanced(s.labels, 9).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]  # rare classes run out


def test_resized_averages() -> None:
    x = np.zeros((1, 1, 4, 4), np.uint8)
    x[..., :2] = 200
    assert resized(x, 2).dtype == np.uint8 and resized(x, 1).tolist() == [[[[100]]]]


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ("digit", {}, "unknown data 'digit'; did you mean 'digits'"),
        ("imagenet", {}, "known: cifar10, digits"),
        ("folders:x", {}, "cannot import 'folders'"),
        ("digits", {"limit": 9}, "limit=9 is less than the 10 classes"),
        ("digits", {"limit": 0}, "limit must be a positive"),
        ("digits", {"label_noise": 1.0}, "label_noise must be a fraction"),
        ("digits", {"label_noise": -0.1}, "label_noise must be a fraction"),
        ("digits", {"augment": "cropflip"}, "did you mean 'crop-flip'"),
        ("digits", {"image_size": 0}, "image_size must be a positive"),
        ("no.such.module:f", {}, "cannot import 'no.such.module'"),
        ("json:dupms", {}, "'json' has no 'dupms'; did you mean"),
        ("json:dumps", {}, "json:dumps raised TypeError"),
        ("hf:", {}, "hf: needs a name"),
        ("folder:", {}, "does not exist"),
    ],
)
def test_mistakes(spec: str, options: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(spec, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_offline_says_where_it_looked_and_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets.utils as utils

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    for module in (utils, sys.modules["torchvision.datasets.mnist"]):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError) as caught:
        load(name)
    text = str(caught.value)
    assert f"{name} not found in STILLHOUSE_DATA={tmp_path}/nowhere" in text and "\n" not in text
    assert "could not be downloaded: no route" in text or "could not be downloaded: Error downloading" in text


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def test_idx_files_in_either_layout_and_a_damaged_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    x = {"train": rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)}
    x["t10k"] = x["train"][:20]
    for part, images in x.items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        labels = (np.arange(len(images)) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    data = load("mnist", root=tmp_path)
    assert data.shape == (1, 28, 28) and (len(data.train), len(data.test)) == (40, 20)
    got = data.train.take(np.array([7]))["input"][0, 0].numpy()
    np.testing.assert_allclose(got, (x["train"][7] / 255 - 0.13066) / 0.30811, atol=1e-5)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(x["train"])[:500])
    with pytest.raises(UserError, match=r"cannot read .*train-images-idx3-ubyte"):
        load("mnist", root=tmp_path)


def test_the_official_binary_cifar10(tmp_path: Path) -> None:
    base = tmp_path / "cifar-10-batches-bin"
    base.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (20, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(20) % 10
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        rows.tofile(base / f"{name}.bin")
    data = load("cifar10", root=tmp_path)
    assert (len(data.train), len(data.test), data.notes) == (100, 20, ("official split",))
    assert data.train.x[21].ravel().tolist() == rows[1, 1:].tolist()  # type: ignore[attr-defined]
    (base / "data_batch_3.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"cannot read .*data_batch_3\.bin"):
        load("cifar10", root=tmp_path)


# -- image folders


def test_folder_with_train_val_and_test(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        folder(tmp_path / part)
    data = load(f"folder:{tmp_path}")
    assert data.classes == ("blue", "green", "red") and data.held_out is not None
    assert data.shape == (3, 24, 24) and "24 × 24" in " ".join(data.notes)  # the largest short side
    batch = data.test.take(np.arange(15))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    for i, label in enumerate(batch["label"].tolist()):
        want = (torch.tensor(COLOURS[data.classes[label]]) / 255 - mean) / std
        assert (batch["input"][i] - want[:, None, None]).abs().max() < 1e-5
    (tmp_path / "test").rename(tmp_path / ".gone")
    two = load(f"folder:{tmp_path}", image_size=16)
    assert two.held_out is None and two.shape == (3, 16, 16) and "test: folder val" in two.notes


def test_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    data = load(f"folder:{folder(tmp_path)}", image_size=8)
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4] and len(data.test) == 3
    files = {p for part in (data.train, data.test) for p in part.files}  # type: ignore[attr-defined]
    assert len(files) == 15
    assert load(f"folder:{tmp_path}", image_size=8).fingerprint == data.fingerprint
    os.utime(sorted(files)[0], ns=(1, 1))
    assert load(f"folder:{tmp_path}", image_size=8).fingerprint != data.fingerprint


def test_image_augmentation_is_a_function_of_the_sample(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for path in files:
        Image.fromarray(noise).save(path)
    s = Images(files, np.arange(8) % 2, ("a", "b"), image_size=16)
    whole = s.take(np.arange(8), view=1, seed=4)["input"]
    assert torch.equal(s.take(np.array([5]), view=1, seed=4)["input"][0], whole[5])
    assert len({t.numpy().tobytes() for t in whole}) == 8  # equal pictures, different views
    plain = s.take(np.arange(8))["input"]
    assert all(torch.equal(p, plain[0]) for p in plain)
    flips = Images(files, np.arange(8) % 2, ("a", "b"), image_size=16, augment="flip")
    mirrored = draws(4, 1, np.arange(8), 5)[:, 4] < 0.5
    for i, got in enumerate(flips.take(np.arange(8), view=1, seed=4)["input"]):
        assert torch.equal(got, plain[0].flip(-1) if mirrored[i] else plain[0])
    direct, ahead = Batches(s, 3), prefetch(Batches(s, 3), 2, 2)
    for step in range(4):
        c = Clock(step=step, steps=4, steps_per_epoch=2)
        assert torch.equal(direct.batch(c)["input"], ahead.batch(c)["input"])


def test_crops_lie_inside_the_picture() -> None:
    for u in draws(0, 0, np.arange(500), 4).tolist():
        left, top, right, bottom = random_box(30, 20, u)
        assert 0 <= left < right <= 30 + 1e-9 and 0 <= top < bottom <= 20 + 1e-9
        assert (right - left) * (bottom - top) <= 600 + 1e-6
    assert centre_box(30, 20, 64) == (5, 0, 25, 20) and centre_box(160, 160, 224) == (10, 10, 150, 150)


def test_corrupt_images_are_named_or_counted(tmp_path: Path) -> None:
    folder(tmp_path)
    bad = [spoil(tmp_path / "red" / "zz.png"), tmp_path / "green" / "text.jpg"]
    bad[1].write_text("not an image")
    data = load(f"folder:{tmp_path}", image_size=8, skip_bad=True)
    assert len(data.train) + len(data.test) == 15
    notes = [n for n in data.notes if "skipped" in n]
    assert "red/zz.png" in " ".join(notes) and "green/text.jpg" in " ".join(notes)
    s = Images(bad, [0, 1], ("a", "b"), image_size=8)
    for i, path in enumerate(bad):
        with pytest.raises(UserError) as caught:
            s.take(np.array([i]))
        assert str(path) in str(caught.value) and "skip" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no readable image of class 'blue'"):
        for path in (tmp_path / "blue").glob("*.png"):
            path.write_text("x")
        load(f"folder:{tmp_path}", image_size=8, skip_bad=True)


def test_folder_mistakes(tmp_path: Path) -> None:
    folder(tmp_path / "good" / "train")
    folder(tmp_path / "good" / "val", classes=("red", "green"))
    folder(tmp_path / "one", classes=("red",))
    folder(tmp_path / "hole")
    (tmp_path / "hole" / "white").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    cases = {
        "god": "did you mean 'good'",
        "good": "'test' has other classes than train (only in train: ['blue'])",
        "one": "has one class folder (red)",
        "hole": f"class folder {tmp_path}/hole/white holds no images",
        "empty": "holds nothing to read; expected",
        "flat": "holds 1 images but no class folders",
        "flat/a.png": "is not a folder",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as caught:
            load(f"folder:{tmp_path}/{name}")
        assert message in str(caught.value), str(caught.value)
    with pytest.raises(UserError, match="unknown augment 'crop-flip'"):
        load(f"folder:{tmp_path}/good/train", augment="crop-flip")


# -- Hugging Face


def png(colour: tuple[int, int, int], size: tuple[int, int] = (12, 10)) -> dict:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def table(n: int = 12, words: bool = False):  # type: ignore[no-untyped-def]
    datasets = pytest.importorskip("datasets")
    names = list(COLOURS)
    kind = datasets.Value("string") if words else datasets.ClassLabel(names=names)
    features = datasets.Features({"img": datasets.Image(), "fine": kind, "note": datasets.Value("string")})
    labels = [names[i % 3] if words else i % 3 for i in range(n)]
    rows = {"img": [png(COLOURS[names[i % 3]]) for i in range(n)], "fine": labels, "note": ["x"] * n}
    return datasets.Dataset.from_dict(rows, features=features)


def test_hub_data_from_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "set"
    (base / "data").mkdir(parents=True)
    table(12).to_parquet(base / "data" / "train-00000-of-00001.parquet")
    table(6).to_parquet(base / "data" / "test-00000-of-00001.parquet")
    data = load(f"hf:{base}", image_size=8)
    assert data.classes == tuple(COLOURS) and (len(data.train), len(data.test)) == (12, 6)
    green = (torch.tensor((0.0, 1.0, 0.0)) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(data.test.take(np.array([4]))["input"][0, :, 3, 3], green, atol=1e-5)
    assert data.fingerprint == load(f"hf:{base}?image=img&label=fine", image_size=8).fingerprint
    assert load(f"hf:{base}", limit=6, image_size=8).train.labels.tolist() == [0, 1, 2] * 2
    for query, message in {
        "?image=imgg": "did you mean 'img'",
        "?label=note&image=img": "1 class",
        "?lable=fine": "did you mean 'label'",
        "?test=tset": "did you mean 'test'",
    }.items():
        with pytest.raises(UserError) as caught:
            load(f"hf:{base}{query}", image_size=8)
        assert message in str(caught.value), str(caught.value)


def test_hub_data_saved_to_disk_with_words_as_labels(tmp_path: Path) -> None:
    table(15, words=True).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="no label column; choose with"):
        load(f"hf:{tmp_path}/saved")
    data = load(f"hf:{tmp_path}/saved?label=fine", image_size=8)
    assert data.classes == ("blue", "green", "red") and (len(data.train), len(data.test)) == (12, 3)
    assert "set apart" in " ".join(data.notes)
    without = table(6).remove_columns("img")
    without.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(UserError, match="no image column"):
        load(f"hf:{tmp_path}/plain.parquet")


def test_hub_names_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def refuse(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("mnist", "a/b", "a/b/c", "a/b?config=c"):
        with pytest.raises(UserError, match=r"cannot load hf:.*Couldn't reach the Hub; check") as caught:
            load(f"hf:{name}")
        assert "\n" not in str(caught.value)
    assert asked[0] == ("mnist", None) and asked[-1] == asked[-2] == ("a/b", "c")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[text\]'"):
        load("hf:mnist")


# -- a user's function


def test_a_function_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mydata_for_test.py").write_text(
        "import numpy as np\n"
        "def loaders():\n    return np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) % 3\n"
        "def broken():\n    raise RuntimeError('no disk')\n"
        "def nothing():\n    return None\n"
        "ready = loaders()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    data = load("mydata_for_test:loaders", limit=6)
    assert data.name == "mydata_for_test:loaders" and data.shape == (5,) and len(data.train) == 6
    assert load("mydata_for_test:ready").shape == (5,)
    for name, message in {
        "broken": "raised RuntimeError: no disk",
        "nothing": "is NoneType",
        "loader": "did you mean 'loaders'",
    }.items():
        with pytest.raises(UserError) as caught:
            load(f"mydata_for_test:{name}")
        assert message in str(caught.value)
    with pytest.raises(UserError, match="image_size does not apply"):
        load("mydata_for_test:loaders", image_size=8)


# -- real data


def moments(samples: Arrays, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel of the scaled pixels, undoing the normalisation of `take`."""
    first, second = np.zeros(samples.shape[0]), np.zeros(samples.shape[0])
    for piece in np.array_split(ids, 1 + len(ids) // 2000):
        x = samples.take(piece)["input"].double()
        first, second = first + x.sum((0, 2, 3)).numpy(), second + x.square().sum((0, 2, 3)).numpy()
    n = len(ids) * samples.shape[1] * samples.shape[2]
    mean, std = first / n, np.sqrt(second / n - (first / n) ** 2)
    return mean * samples.std + samples.mean, std * samples.std  # type: ignore[operator]


@pytest.mark.data
@pytest.mark.parametrize("name, mean, std", [("mnist", 0.13066, 0.30811), ("fashion-mnist", 0.28604, 0.35302)])
def test_real_idx_sets(name: str, mean: float, std: float, data_folder: Path) -> None:
    data = load(name, root=data_folder)
    assert (len(data.train), len(data.test), data.shape) == (60000, 10000, (1, 28, 28))
    got = moments(data.train, np.arange(60000))  # type: ignore[arg-type]
    assert abs(got[0][0] - mean) < 2e-5 and abs(got[1][0] - std) < 2e-5
    counts = np.bincount(data.train.labels)
    assert counts.tolist() == [6000] * 10 if name == "fashion-mnist" else counts.min() == 5421


@pytest.mark.data
def test_real_cifar10(data_folder: Path) -> None:
    data = load("cifar10", root=data_folder)
    first = data.extra["test_first1000"]
    assert (len(data.train), len(data.test), len(first)) == (40000, 10000, 1000)
    assert data.classes[3] == "cat" and any("batch 5" in n for n in data.notes)
    both = np.bincount(data.train.labels) + np.bincount(data.test.labels)
    assert both.tolist() == [5000] * 10
    parts = [moments(p, np.arange(len(p))) for p in (data.train, data.test)]  # type: ignore[arg-type]
    mean = 0.8 * parts[0][0] + 0.2 * parts[1][0]
    np.testing.assert_allclose(mean, (0.49139968, 0.48215841, 0.44653091), atol=2e-6)
    some = load("cifar10", root=data_folder, limit=300)
    kept = first_balanced(data.train.labels, 300)
    assert np.bincount(some.train.labels).tolist() == [30] * 10
    assert torch.equal(some.train.take(np.arange(300))["input"], data.train.take(kept)["input"])
    assert load("cifar10", root=data_folder, limit=300, image_size=16).shape == (3, 16, 16)
