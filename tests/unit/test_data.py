"""Samples, sources, splits, and the data a user brings."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stillhouse.data import (
    Arrays,
    Batches,
    Data,
    Relabelled,
    Subset,
    Wrapped,
    as_data,
    from_arrays,
    prefetch,
    split,
    together,
)
from stillhouse.data.samples import crop_flip, draws
from stillhouse.data.sources import Lazy, Prefetched
from stillhouse.errors import UserError
from stillhouse.system import Batch, Clock, Source, map_tensors


def pictures(n: int = 30, classes: int = 3, augment: str = "crop-flip") -> Arrays:
    x = np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    return Arrays(x, np.arange(n) % classes, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], augment=augment)


def clock(source: Source, step: int = 0, **fields: Any) -> Clock:
    return replace(Clock(steps_per_epoch=source.steps_per_epoch, steps=100), step=step, **fields)


def same(a: Batch, b: Batch) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# -- samples


def test_take_scales_and_normalises() -> None:
    s, ids = pictures(), np.array([7, 2, 2])
    batch = s.take(ids)
    mean, std = np.array(s.mean)[:, None, None], np.array(s.std)[:, None, None]
    want = (s.x[ids] / 255.0 - mean) / std
    assert batch["input"].dtype == torch.float32
    np.testing.assert_allclose(batch["input"].numpy(), want, atol=1e-5)
    assert batch["label"].tolist() == [1, 2, 2] and batch["label"].dtype == torch.int64
    assert batch["id"].tolist() == [7, 2, 2] and batch["id"].dtype == torch.int64


def test_take_leaves_float_data_and_the_arguments_alone() -> None:
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    s = Arrays(x.copy(), np.arange(6) % 2, mean=[1.0] * 4, std=[2.0] * 4)
    ids = np.array([3, 1])
    batch = s.take(ids)
    np.testing.assert_allclose(batch["input"].numpy(), (x[[3, 1]] - 1) / 2, rtol=1e-6)
    batch["id"].zero_(), batch["input"].zero_(), batch["label"].fill_(9)
    np.testing.assert_array_equal(s.x, x)
    assert ids.tolist() == [3, 1] and s.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert s.take(np.array([], dtype=int))["input"].shape == (0, 4)


def test_augmentation_is_keyed_by_seed_view_and_id() -> None:
    s = pictures()
    together_ = s.take(np.arange(30), view=3, seed=5)["input"]
    for i in (0, 11, 29):
        assert torch.equal(s.take(np.array([i]), view=3, seed=5)["input"][0], together_[i])
    assert torch.equal(s.take(np.arange(29, -1, -1), view=3, seed=5)["input"].flip(0), together_)
    assert not torch.equal(s.take(np.arange(30), view=4, seed=5)["input"], together_)
    assert not torch.equal(s.take(np.arange(30), view=3, seed=6)["input"], together_)
    assert not torch.equal(s.take(np.arange(30))["input"], together_)


def test_draws_are_uniform_and_uncorrelated() -> None:
    u = draws(0, 1, np.arange(20000), 3)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01 and np.abs(u.var(0) - 1 / 12).max() < 0.002
    v = draws(0, 2, np.arange(20000), 3)
    table = np.corrcoef(np.hstack([u, v, np.roll(u, 1, axis=0)]).T) - np.eye(9)
    assert np.abs(table).max() < 0.03


def test_crop_flip_against_a_slow_reference() -> None:
    n, pad = 40, 4
    x = np.random.default_rng(1).integers(1, 256, (n, 3, 6, 10), dtype=np.uint8)
    u = draws(0, 0, np.arange(n), 3)
    want = np.zeros_like(x)
    for i in range(n):
        top, left = int(u[i, 0] * 9) - pad, int(u[i, 1] * 9) - pad
        for r in range(6):
            for c in range(10):
                col = 9 - c if u[i, 2] < 0.5 else c
                if 0 <= r + top < 6 and 0 <= c + left < 10:
                    want[i, :, r, col] = x[i, :, r + top, c + left]
    np.testing.assert_array_equal(crop_flip(x.copy(), u), want)
    flipped = crop_flip(x.copy(), u, pad=0)
    np.testing.assert_array_equal(flipped, np.where((u[:, 2] < 0.5)[:, None, None, None], x[..., ::-1], x))


def test_subset_keeps_the_parents_ids_and_augmentation() -> None:
    s = pictures()
    half = Subset(Subset(s, np.arange(0, 30, 2)), np.arange(5, 10))
    assert half.indices.tolist() == [10, 12, 14, 16, 18] and half.parent is s
    batch = half.take(np.array([4, 0]), view=2)
    assert batch["id"].tolist() == [18, 10] and half.labels.tolist() == [1, 0, 2, 1, 0]
    assert torch.equal(batch["input"], s.take(np.array([18, 10]), view=2)["input"])
    alone = Subset(s, np.arange(10, 20), own_ids=True)
    assert alone.take(np.array([3]))["id"].tolist() == [3]
    nested = Subset(alone, np.array([3, 4]))
    assert nested.take(np.array([1]))["id"].tolist() == [4]
    assert torch.equal(nested.take(np.array([1]))["input"], s.take(np.array([14]))["input"])
    assert half.mean == s.mean and half.augment == "crop-flip"


def test_fingerprints_follow_content() -> None:
    a, b = pictures(), pictures()
    assert a.fingerprint == b.fingerprint
    b.x[-1, -1, -1, -1] ^= 1
    other = [
        Arrays(b.x, b.labels, mean=b.mean, std=b.std, augment=b.augment),
        Arrays(a.x, (a.labels + 1) % 3, mean=a.mean, std=a.std, augment=a.augment),
        Arrays(a.x, a.labels, mean=a.mean, std=[1.0] * 3, augment=a.augment),
        pictures(augment="flip"),
        Subset(a, np.arange(30)),
        Relabelled(a, labels={0: 2}),
    ]
    assert len({a.fingerprint, *(s.fingerprint for s in other)}) == 7


def test_label_noise_has_its_exact_rate_and_is_deterministic() -> None:
    s = pictures(1000, 5, "none")
    noisy = Relabelled(s, noise=0.3, seed=1)
    wrong = noisy.labels != s.labels
    assert wrong.sum() == 300 and np.array_equal(noisy.clean, s.labels)
    shift = (noisy.labels - s.labels)[wrong] % 5
    assert set(shift) == {1, 2, 3, 4} and np.bincount(shift)[1:].min() > 50
    assert np.array_equal(noisy.labels, Relabelled(s, noise=0.3, seed=1).labels)
    assert not np.array_equal(noisy.labels, Relabelled(s, noise=0.3, seed=2).labels)
    ids = np.flatnonzero(wrong)[:4]
    assert noisy.take(ids)["label"].tolist() == noisy.labels[ids].tolist()
    assert torch.equal(noisy.take(ids)["input"], s.take(ids)["input"])
    assert Relabelled(s, labels={7: 0}).take(np.array([7, 8]))["label"].tolist() == [0, 3]


class Noisy(Dataset):
    """Random transforms as users write them, from all three global generators."""

    targets = torch.arange(9) % 3

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([i, torch.rand(()).item(), random.random(), np.random.rand()]), i % 3


def test_wrapped_makes_a_users_random_transforms_functions_of_the_sample() -> None:
    s = Wrapped(Noisy())
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)[1].copy()  # type: ignore[index]
    batch = s.take(np.array([4, 7]), view=1, seed=2)
    fresh = Wrapped(Noisy())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]
    assert torch.equal(fresh.take(np.array([7]), view=1, seed=2)["input"][0], batch["input"][1])
    for view, seed in ((2, 2), (1, 3), (None, 2)):
        other = s.take(np.array([4, 7]), view=view, seed=seed)["input"]
        assert (other[:, 1:] != batch["input"][:, 1:]).all()
    assert s.fingerprint == fresh.fingerprint and s.labels.tolist() == [0, 1, 2] * 3


def test_wrapped_reads_dicts_subsets_and_does_not_trust_wrong_targets() -> None:
    rows = [{"pixel_values": np.full((4, 5, 3), 255, np.uint8), "labels": i % 2} for i in range(4)]
    s = Wrapped(rows)
    assert s.shape == (3, 4, 5) and float(s.take(np.array([0]))["input"].max()) == 1.0
    part = torch.utils.data.Subset(TensorDataset(torch.rand(6, 2), torch.arange(6) % 3), [5, 1, 0])
    assert Wrapped(part).labels.tolist() == [2, 1, 0]

    class Shifted(Noisy):
        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return super().__getitem__(i)[0], (i + 1) % 3

    assert Wrapped(Shifted()).labels.tolist() == [1, 2, 0] * 3


# -- sources


def test_each_epoch_is_a_permutation_and_epochs_differ() -> None:
    b = Batches(pictures(), 7, drop_last=False)
    assert b.steps_per_epoch == 5
    epochs = [[i for p in range(5) for i in b.batch(clock(b, 5 * e + p))["id"].tolist()] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(30)) and epochs[0] != epochs[1]
    assert b.num_samples(clock(b, 4)) == 2 and b.num_samples(clock(b, 5)) == 7
    cut = Batches(pictures(), 7)
    assert cut.steps_per_epoch == 4
    assert cut.batch(clock(cut, 3))["id"].tolist() == epochs[0][21:28]
    straight = Batches(pictures(), 7, shuffle=False)
    assert straight.batch(clock(straight, 5))["id"].tolist() == list(range(7, 14))


def test_batches_depend_on_seed_and_step_only() -> None:
    b, again = Batches(pictures(), 7), Batches(pictures(), 7)
    for step in range(3):
        b.batch(clock(b, step))
    assert same(b.batch(clock(b, 9)), again.batch(clock(again, 9)))  # no history
    assert same(b.batch(clock(b, 9, stage="x", micro=1, micros=2)), again.batch(clock(again, 9)))
    assert not same(b.batch(clock(b, 9, seed=1)), again.batch(clock(again, 9)))
    apart = Batches(pictures(), 7, seed_with="b")
    assert not same(apart.batch(clock(b, 9)), b.batch(clock(b, 9)))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_global_batch(world: int) -> None:
    b = Batches(pictures(), 7)
    whole = b.batch(clock(b, 6))
    shares = [b.batch(clock(b, 6, rank=r, world=world)) for r in range(world)]
    assert same({k: torch.cat([s[k] for s in shares]) for k in whole}, whole)
    sizes = [len(s["id"]) for s in shares]
    assert sum(sizes) == 7 and max(sizes) - min(sizes) <= 1


def test_views_repeat_and_copies_differ() -> None:
    s = pictures()
    b = Batches(s, 30, views=2)
    first, third = b.batch(clock(b, 0)), b.batch(clock(b, 2))
    assert first["view"].tolist() == [0] * 30 and b.batch(clock(b, 1))["view"].tolist() == [1] * 30
    order = torch.argsort(first["id"]), torch.argsort(third["id"])
    assert torch.equal(first["input"][order[0]], third["input"][order[1]])
    free = Batches(s, 30)
    assert free.batch(clock(free, 5))["view"].unique().tolist() == [5]
    assert "view" not in Batches(s, 30, augment=False).batch(Clock())
    k = Batches(s, 10, copies=3)
    batch = k.batch(clock(k, 0))
    assert batch["input"].shape == (10, 3, 3, 8, 8)
    assert not torch.equal(batch["input"][:, 0], batch["input"][:, 1])
    again = s.take(batch["id"].numpy(), view=2, seed=0)["input"]
    assert torch.equal(batch["input"][:, 2], again)
    plain = Batches(s, 10, copies=2, augment=False).batch(Clock())["input"]
    assert torch.equal(plain[:, 0], plain[:, 1])


def test_a_set_smaller_than_the_batch_is_one_batch() -> None:
    b = Batches(pictures(5), 64)
    assert b.steps_per_epoch == 1 and sorted(b.batch(clock(b, 3))["id"].tolist()) == [0, 1, 2, 3, 4]


def test_source_fingerprint_says_how_batches_are_drawn() -> None:
    s = pictures()
    made = [
        Batches(s, 7),
        Batches(s, 8),
        Batches(s, 7, views=2),
        Batches(s, 7, augment=False),
        Batches(s, 7, seed_with="x"),
        together(a=Batches(s, 7)),
        together(a=Batches(s, 7), b=Batches(s, 7)),
    ]
    assert len({m.fingerprint for m in made}) == len(made)
    assert Batches(pictures(), 7).fingerprint == made[0].fingerprint
    assert isinstance(made[0], Source) and isinstance(made[-1], Source)


class Counting(Batches):
    calls = 0

    def batch(self, clock: Clock) -> Batch:
        self.calls += 1
        return super().batch(clock)


def test_together_is_lazy_and_each_source_keeps_its_own_epochs() -> None:
    train, held = Counting(pictures(), 10), Counting(pictures(12), 4)
    both = together(train=train, held_out=held)
    assert both.steps_per_epoch == 3
    batch = both.batch(clock(both, 7))
    assert (train.calls, held.calls) == (0, 0) and list(batch) == ["train", "held_out"]
    assert batch["train"] is batch["train"] and (train.calls, held.calls) == (1, 0)
    moved = batch.map(lambda part: map_tensors(part, lambda t: t + 1))
    assert held.calls == 0 and isinstance(moved, Lazy)
    assert torch.equal(moved["held_out"]["id"], batch["held_out"]["id"] + 1) and held.calls == 1
    unequal = together(train=Batches(pictures(), 10), held_out=Batches(pictures(10), 2))
    seen = [i for s in range(5, 10) for i in unequal.batch(clock(unequal, s))["held_out"]["id"].tolist()]
    assert sorted(seen) == list(range(10))
    assert same(unequal.batch(clock(unequal, 7))["train"], Batches(pictures(), 10).batch(clock(train, 7)))
    assert unequal.num_samples(clock(unequal, 7)) == 10


def test_prefetch_gives_the_same_batches_in_any_order_of_steps() -> None:
    direct, ahead = Batches(pictures(), 7), prefetch(Batches(pictures(), 7), workers=2, ahead=3)
    assert isinstance(ahead, Prefetched) and ahead.fingerprint == direct.fingerprint
    for step in (0, 1, 2, 2, 3, 40, 41, 5):
        for c in (clock(direct, step), clock(direct, step, rank=1, world=2, micro=step % 2)):
            assert same(ahead.batch(c), direct.batch(c))
    both = prefetch(together(a=Batches(pictures(), 7), b=Counting(pictures(), 3)), 1, 2)
    assert same(both.batch(clock(direct, 4))["a"], direct.batch(clock(direct, 4)))
    assert both.sources["b"].calls == 0  # type: ignore[attr-defined]


def test_prefetch_errors_surface_at_their_own_step() -> None:
    class Broken(Batches):
        def batch(self, clock: Clock) -> Batch:
            if clock.step == 2:
                raise UserError("bad image")
            return super().batch(clock)

    s = prefetch(Broken(pictures(), 7), 1, 3)
    s.batch(clock(s, 0)), s.batch(clock(s, 1))
    with pytest.raises(UserError, match="bad image"):
        s.batch(clock(s, 2))
    s.batch(clock(s, 3))


def test_prefetch_leaves_alone_what_it_would_change() -> None:
    users = Batches(Subset(Wrapped(Noisy()), np.arange(6)), 3)
    assert prefetch(users, 2, 2) is users

    class Stateful(Batches):
        def state_dict(self) -> dict[str, int]:
            return {}

    with pytest.raises(UserError, match="state"):
        prefetch(Stateful(pictures(), 7), 1, 2)


# -- splits


def test_split_is_stratified_disjoint_complete_and_deterministic() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 30, 15, 5])
    s = Arrays(np.zeros((100, 2)), labels)
    rest, part = split(s, 0.1, seed=3)
    assert np.bincount(part.labels).sum() == 10
    assert np.abs(np.bincount(part.labels) - [5, 3, 1.5, 0.5]).max() <= 0.5
    assert sorted([*rest.indices, *part.indices]) == list(range(100))
    assert np.array_equal(part.indices, split(s, 0.1, seed=3)[1].indices)
    assert not np.array_equal(part.indices, split(s, 0.1, seed=4)[1].indices)


@pytest.mark.parametrize("fraction", [0.02, 0.98])
def test_split_keeps_every_class_in_both_parts(fraction: float) -> None:
    rest, part = split(Arrays(np.zeros((31, 2)), [*np.arange(30) % 3, 3]), fraction)
    assert set(part.labels[part.labels < 3]) == {0, 1, 2} == set(rest.labels[rest.labels < 3])
    assert 3 in rest.labels and len(rest) + len(part) == 31


# -- a user's own data


def xy(n: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(3.0, 5.0, (n, 6)), np.arange(n) % classes


def test_from_arrays_normalises_by_the_training_part() -> None:
    data = from_arrays(*xy())
    assert (len(data.train), len(data.test), data.shape, len(data.classes)) == (32, 8, (6,), 4)
    x = data.train.take(np.arange(32))["input"].double()
    assert x.mean(0).abs().max() < 1e-6 and (x.std(0, correction=0) - 1).abs().max() < 1e-5
    assert data.test.take(np.arange(8))["input"].double().mean(0).abs().max() > 1e-3
    assert data.train.take(np.arange(32))["id"].tolist() == list(range(32))
    raw = from_arrays(*xy(), normalize=False)
    whole = torch.cat([raw.train.take(np.arange(32))["input"], raw.test.take(np.arange(8))["input"]])
    assert torch.allclose(whole.sum(0), torch.tensor(xy()[0].sum(0), dtype=torch.float32), atol=1e-3)
    assert "set apart" in data.notes[0] and data.fingerprint != raw.fingerprint


def test_from_arrays_reads_images_in_either_order_and_words() -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 9, 3), dtype=np.uint8)
    y = np.array(["cat", "dog"] * 10)
    last = from_arrays(x, y, test=(x[:4], y[:4]), held_out=(x[4:8], y[4:8]))
    first = from_arrays(torch.from_numpy(x).permute(0, 3, 1, 2), y, test=(x[:4], y[:4]))
    assert last.shape == (3, 8, 9) and last.classes == ("cat", "dog") and last.held_out is not None
    ids = np.arange(20)
    assert torch.equal(last.train.take(ids)["input"], first.train.take(ids)["input"])
    grey = from_arrays(x[..., 0], [i % 2 for i in range(20)], augment="crop-flip")
    assert grey.shape == (1, 8, 9) and grey.train.augment == "crop-flip"  # type: ignore[attr-defined]


def test_as_data_takes_what_users_have() -> None:
    x, y = xy()
    sets = [TensorDataset(torch.tensor(x[i::3]), torch.tensor(y[i::3])) for i in range(3)]
    forms = {
        "pair of arrays": (x, y),
        "arrays by part": ((x, y), (x, y)),
        "torch sets": (sets[0], sets[1]),
        "with held out": (sets[0], sets[2], sets[1]),
        "loaders": [DataLoader(sets[0], 4), DataLoader(sets[1], 4)],
        "dict": {"train": sets[0], "test": sets[1], "held_out": None},
        "one set": sets[0],
        "samples": (Arrays(x, y), Arrays(x, y)),
    }
    made = {name: as_data(obj, name) for name, obj in forms.items()}
    assert all(d.shape == (6,) and len(d.classes) == 4 for d in made.values())
    held = made["with held out"].held_out
    assert held is not None and torch.equal(held.take(np.arange(13))["input"], sets[2].tensors[0].float())
    assert torch.equal(made["loaders"].test.take(np.arange(3))["input"], sets[1].tensors[0][:3].float())
    assert made["one set"].train.take(np.array([0]))["id"].tolist() == [0]
    assert as_data(made["dict"], "again") is made["dict"]


X, Y = xy()
BAD = X.copy()
BAD[17, 2] = np.nan
MISTAKES = [
    (lambda: from_arrays(X, Y[:-1]), r"39 labels for 40 inputs"),
    (lambda: from_arrays(BAD, Y), r"x\[17\] holds NaN"),
    (lambda: from_arrays(X, Y, test=(BAD, Y)), r"test x\[17\] holds NaN"),
    (lambda: from_arrays(X, Y - 1), r"y\[0\] is -1"),
    (lambda: from_arrays(X, np.eye(4)[Y]), r"argmax"),
    (lambda: from_arrays(X, Y + 0.5), r"integer labels"),
    (lambda: from_arrays(X, Y * 0), r"1 class"),
    (lambda: from_arrays(X, Y, classes=("a", "b")), r"label 2, expected 0…1"),
    (lambda: from_arrays(X[:, 0], Y), r"at least two axes"),
    (lambda: from_arrays(3.0, Y), r"at least two axes"),
    (lambda: from_arrays([[1, 2], [3]], [0, 1]), r"x cannot be read as one array"),
    (lambda: from_arrays(X[:1], Y[:1]), r"at least two are needed"),
    (lambda: from_arrays(X.astype(str), Y), r"numbers"),
    (lambda: from_arrays(X, Y, augment="flip"), r"needs images"),
    (lambda: from_arrays(X, Y, augment="flop"), r"did you mean 'flip'"),
    (lambda: from_arrays(X, Y, test=(X[:, :5], Y)), r"'test'.*shape \(5,\).*\(6,\)"),
    (lambda: from_arrays(X, Y, test=(X[:0], Y[:0])), r"'test'.*empty"),
    (lambda: from_arrays(X, np.array(["a", "b"] * 20), test=(X[:2], ["a", "z"])), r"label 'z' of sample 1"),
    (lambda: from_arrays(X, Y, test_fraction=1.0), r"between 0 and 1, got 1.0"),
    (lambda: split(Arrays(X, Y), 0.0), r"between 0 and 1, got 0.0"),
    (lambda: split(Arrays(X[:1], Y[:1]), 0.5), r"at least two"),
    (lambda: Data("d", Arrays(X, Y), Arrays(X, Y, classes="abcd")), r"'test' has other classes.*only here"),
    (lambda: Data("d", Arrays(X, Y), Arrays(BAD[10:], Y[10:])), r"'test'.*sample 7 holds NaN"),
    (lambda: Relabelled(Arrays(X, Y), noise=1.0), r"\[0, 1\)"),
    (lambda: Relabelled(Arrays(X, Y), labels={3: 4}), r"label 4 for sample 3"),
    (lambda: Batches(Arrays(X, Y), 0), r"batch_size must be at least 1"),
    (lambda: Batches(Subset(Arrays(X, Y), np.array([], int)), 4), r"no samples"),
    (lambda: together(), r"at least one"),
    (lambda: prefetch(Batches(Arrays(X, Y), 4), -1, 2), r"negative"),
    (lambda: as_data(3, "mine"), r"mine.*is int"),
    (lambda: as_data({"trian": 1}, "mine"), r"did you mean 'train'"),
    (lambda: as_data({"test": (X, Y)}, "mine"), r"'train' is missing"),
    (lambda: as_data((1, 2, 3, 4), "mine"), r"got 4 things"),
    (lambda: as_data((TensorDataset(torch.tensor(X), torch.tensor(Y)), (X, Y)), "m"), r"one form"),
    (lambda: as_data((Noisy(), Noisy()), "mine", augment="flip"), r"augment='flip' applies to arrays"),
    (lambda: as_data(iter([1]), "mine"), r"mine.*map-style"),
    (lambda: Wrapped([]), r"is empty"),
    (lambda: Wrapped([(X[0], "cat")]), r"sample 0 has the label 'cat'"),
    (lambda: Wrapped([{"text": "a", "label": 0}]), r"keys \['label', 'text'\]"),
    (lambda: Wrapped([X[0]]), r"sample 0 is ndarray"),
    (lambda: Wrapped([("words", 0)]), r"not numeric"),
    (lambda: Wrapped([(X[0], 0), (X[0, :2], 1)]).take(np.arange(2)), r"sample 1 has shape \(2,\)"),
    (lambda: Wrapped([(X[0], 0), None]), r"sample 1 is NoneType"),
]


@pytest.mark.parametrize("call, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named_in_one_line(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_modules_of_the_data_package_load_no_heavy_library() -> None:
    folder = Path(__file__).parents[2] / "stillhouse" / "data"
    for path in folder.glob("*.py"):
        top = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [t for t in top if any(w in t for w in ("sklearn", "torchvision", "datasets", "pickle"))]
