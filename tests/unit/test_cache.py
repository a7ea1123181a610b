import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse import objectives as O
from stillhouse.data import cache as module
from stillhouse.data.cache import SignalCache
from stillhouse.errors import UserError
from stillhouse.system import Signals
from stillhouse.teachers import Cached

C = 20


class Fake:
    """Samples whose input says (id, view, seed), so that a signal tells where it came from."""

    def __init__(self, n=50, fingerprint="data", ids=None):
        self.ids = np.arange(n) if ids is None else np.asarray(ids)
        self.labels, self.fingerprint, self.shape = self.ids % C, fingerprint, (3,)
        self.classes = tuple(map(str, range(C)))

    def __len__(self):
        return len(self.ids)

    def take(self, ids, *, view=None, seed=0):
        own = torch.as_tensor(self.ids[ids])
        x = torch.stack([own, torch.full_like(own, -1 if view is None else view), torch.full_like(own, seed)], 1)
        return {"input": x.float(), "label": own % C, "id": own}


class Told:
    """A teacher that is a function of the input alone, and counts the samples it saw."""

    fingerprint = "teacher"

    def __init__(self, scale=3.0, stop_after=None):
        self.seen, self.scale, self.stop_after = 0, scale, stop_after

    def __call__(self, batch):
        x = batch["input"].double()
        self.seen += len(x)
        if self.stop_after is not None and self.seen > self.stop_after:
            raise KeyboardInterrupt
        wave = torch.arange(1, C + 1, dtype=torch.float64)
        z = torch.sin(wave * (x[:, :1] + 1) + 0.7 * x[:, 1:2] + 0.3 * x[:, 2:])
        return Signals(logits=(self.scale * z).float())


WHO: dict[str, Any] = {"teacher_fingerprint": "teacher", "data_fingerprint": "data"}


def make(folder, n=50, **settings):
    return SignalCache.create(folder, **WHO, n=n, **{"views": 2, "classes": C, **settings})


def truth(ids, views, seed=0):
    rows = [Told()(Fake(200).take(np.array([i]), view=v, seed=seed) | {})["logits"] for i, v in zip(ids, views)]
    return torch.cat(rows)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 800)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.0), ("float16", 2e-3)])
def test_dense_signals_come_back_by_id_and_view(tmp_path, small_shards, dtype, tolerance):
    filled = make(tmp_path, dtype=dtype).fill(Told(), Fake(), seed=7, batch_size=9)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    opened = SignalCache.open(tmp_path, **WHO, seed=7)
    ids, views = [49, 0, 7, 7, 31], [0, 1, 1, 0, 1]
    for cache in (filled, opened):
        got = cache.lookup(torch.tensor(ids), torch.tensor(views))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, truth(ids, views, 7), atol=tolerance, rtol=0)
    assert torch.equal(opened.lookup(np.array(ids), 1), opened.lookup(ids, [1] * 5))
    assert opened.complete and opened.seed == 7


def test_unaugmented_cache_asks_for_view_none(tmp_path):
    cache = make(tmp_path, views=0, dtype="float32").fill(Told(), Fake())
    torch.testing.assert_close(cache.lookup([3]), truth([3], [None]))
    with pytest.raises(UserError, match="un-augmented"):
        cache.lookup([3], [0])
    answer = Cached(cache)({"input": torch.zeros(1, 3), "id": torch.tensor([3]), "view": torch.tensor([5])})
    torch.testing.assert_close(answer.logits, truth([3], [None]))


def test_a_part_of_a_set_is_found_by_its_parents_ids(tmp_path, small_shards):
    ids = np.random.default_rng(0).permutation(200)[:50]
    cache = make(tmp_path, dtype="float32").fill(Told(), Fake(ids=ids))
    torch.testing.assert_close(cache.lookup(ids[[3, 40]], [1, 0]), truth(ids[[3, 40]], [1, 0]))
    absent = next(i for i in range(200) if i not in set(ids))
    assert cache.has(ids[:5], 1) and not cache.has([ids[0], absent], 1) and not cache.has(ids[:5], 2)


# -- top-k


@pytest.mark.parametrize("k", [1, 5, C - 1])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_topk_keeps_the_top_spreads_the_rest_and_obeys_its_bound(tmp_path, k, dtype):
    cache = make(tmp_path, topk=k, dtype=dtype).fill(Told(), Fake())
    ids = list(range(50))
    z, got = truth(ids, [1] * 50).double(), cache.lookup(ids, 1).double()
    slack = 2e-3 if dtype == "float16" else 1e-6
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(50, dtype=torch.float64), atol=4 * slack, rtol=0)
    log_p = z.log_softmax(-1)
    top = log_p.topk(k, -1)
    torch.testing.assert_close(got.gather(1, top.indices), top.values, atol=4 * slack, rtol=0)
    tail = got.scatter(1, top.indices, math.nan)
    rest = 1 - top.values.exp().sum(-1, keepdim=True)
    expected = (rest / (C - k)).expand(50, C)[~tail.isnan()]
    torch.testing.assert_close(tail[~tail.isnan()].exp(), expected, atol=slack, rtol=4 * slack)
    error = O.kl(z, got)
    assert (error <= rest.squeeze(1) * math.log(C - k) + 4 * slack).all()
    if k == 5:
        assert error.max() > 10 * slack  # it is an approximation, and the test can see it
    if k == C - 1:
        assert error.max() < 4 * slack


def test_topk_of_a_confident_teacher_keeps_the_small_tail(tmp_path):
    cache = make(tmp_path, topk=3, dtype="float32").fill(Told(scale=40.0), Fake())
    got = cache.lookup(range(50), 0)
    assert got.isfinite().all() and (got.min(-1).values > -200).all()
    z = Told(scale=40.0)(Fake().take(np.arange(50), view=0))["logits"].double()
    rest = z.log_softmax(-1).sort(-1, descending=True).values[:, 3:].logsumexp(-1)
    torch.testing.assert_close(got.min(-1).values.double(), rest - math.log(C - 3), atol=1e-4, rtol=0)


# -- bounds, resuming


def test_size_is_told_before_anything_is_written_and_is_an_upper_bound(tmp_path, small_shards):
    cases: list[tuple[str, dict[str, Any]]] = [
        ("a", {}),
        ("b", {"topk": 3}),
        ("c", {"dtype": "float32", "views": 0}),
    ]
    for sub, settings in cases:
        needed = make(tmp_path / "probe" / sub, **settings).needed
        with pytest.raises(UserError, match=f"needs {needed} bytes.*max_bytes={needed - 1}"):
            make(tmp_path / sub, max_bytes=needed - 1, **settings)
        assert not (tmp_path / sub).exists()
        make(tmp_path / sub, max_bytes=needed, **settings).fill(Told(), Fake())
        assert sum(f.stat().st_size for f in (tmp_path / sub).iterdir()) <= needed


def test_a_killed_fill_goes_on_where_it_stopped(tmp_path, small_shards):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make(whole).fill(Told(), Fake())
    with pytest.raises(KeyboardInterrupt):
        make(broken).fill(Told(stop_after=60), Fake())
    cache = make(broken)
    assert not cache.complete and not cache.has([0], 0)
    for act in (lambda: cache.lookup([0], 0), lambda: SignalCache.open(broken, **WHO)):
        with pytest.raises(UserError, match="incomplete"):
            act()
    again, told = Told(), []
    cache.fill(again, Fake(), progress=lambda done, total: told.append((done, total)))
    assert 0 < again.seen < 60 and told[-1] == (100, 100) and told == sorted(told)
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in broken.iterdir()}
    idle = Told()
    make(broken).fill(idle, Fake())
    assert idle.seen == 0


def test_a_damaged_shard_is_named_and_mended_by_filling_again(tmp_path, small_shards):
    make(tmp_path).fill(Told(), Fake())
    path = sorted(tmp_path.glob("view0001-*"))[1]
    good = path.read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:40], None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(UserError, match=path.name):
            SignalCache.open(tmp_path, **WHO)
        teacher = Told()
        make(tmp_path).fill(teacher, Fake())
        assert path.read_bytes() == good and teacher.seen < 20
    first = sorted(tmp_path.glob("view0000-*"))[0]
    first.write_bytes(b"")
    make(tmp_path).fill(Told(), Fake())
    assert SignalCache.open(tmp_path, **WHO).has([0], 0)


def test_a_large_cache_is_verified_when_a_shard_is_first_read(tmp_path, small_shards, monkeypatch):
    make(tmp_path).fill(Told(), Fake())
    monkeypatch.setattr(module, "_VERIFY_AT_OPEN", 0)
    path = sorted(tmp_path.glob("view0001-*"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    cache = SignalCache.open(tmp_path, **WHO)
    cache.lookup([0], 0)
    with pytest.raises(UserError, match=path.name):
        cache.lookup([0], 1)


# -- refusals


def test_another_teacher_other_data_seed_or_version_are_refused(tmp_path):
    make(tmp_path).fill(Told(), Fake(), seed=3)
    with pytest.raises(UserError, match=r"teacher 'teacher'.*'else'"):
        SignalCache.open(tmp_path, teacher_fingerprint="else", data_fingerprint="data")
    with pytest.raises(UserError, match=r"data 'data'.*'else'"):
        SignalCache.open(tmp_path, teacher_fingerprint="teacher", data_fingerprint="else")
    with pytest.raises(UserError, match=r"seed 3.*4"):
        SignalCache.open(tmp_path, **WHO, seed=4)
    for change in ({"views": 3}, {"topk": 2}, {"dtype": "float32"}, {"n": 49}):
        with pytest.raises(UserError, match=f"with {next(iter(change))}"):
            make(tmp_path, **change)
    head = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**head, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        SignalCache.open(tmp_path, **WHO)
    (tmp_path / "cache.json").write_text(json.dumps({k: v for k, v in head.items() if k != "shards"}))
    with pytest.raises(UserError, match=r"cache.json is damaged.*shards"):
        SignalCache.open(tmp_path, **WHO)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache.json"):
        SignalCache.open(tmp_path, **WHO)
    with pytest.raises(UserError, match=r"cache.json"):
        SignalCache.open(tmp_path / "nowhere", **WHO)


def test_fill_refuses_what_the_cache_is_not_for(tmp_path):
    cache = make(tmp_path)
    other = Told()
    other.fingerprint = "else"
    for teacher, samples, word in [
        (other, Fake(), "teacher"),
        (Told(), Fake(fingerprint="x"), "data"),
        (Told(), Fake(49), "n 50"),
    ]:
        with pytest.raises(UserError, match=word):
            cache.fill(teacher, samples)
    cache.fill(Told(), Fake(), seed=1)
    with pytest.raises(UserError, match="seed 1"):
        cache.fill(Told(), Fake(), seed=2)


@pytest.mark.parametrize(
    "logits, word",
    [
        (lambda n: torch.zeros(n, C + 1), r"\(50, 21\)"),
        (lambda n: torch.full((n, C), math.nan), "not finite"),
        (lambda n: torch.full((n, C), 7e4), "float16"),
    ],
)
def test_bad_teacher_signals_are_refused(tmp_path, logits, word):
    with pytest.raises(UserError, match=word):
        make(tmp_path).fill(lambda batch: Signals(logits=logits(len(batch["id"]))), Fake())
    assert not list(tmp_path.glob("*.safetensors"))


def test_unknown_ids_views_and_settings(tmp_path):
    cache = make(tmp_path).fill(Told(), Fake())
    for ids, views, word in [
        ([50], [0], "no sample 50"),
        ([-1], [0], "no sample -1"),
        ([0], [2], "view 2"),
        ([0], [-1], "view -1"),
        ([0], None, "say which"),
    ]:
        with pytest.raises(UserError, match=word):
            cache.lookup(ids, views)
    for settings in ({"topk": 0}, {"topk": C}, {"classes": 1}, {"views": -1}, {"n": 0}, {"dtype": "float8"}):
        with pytest.raises(UserError, match="SignalCache"):
            make(tmp_path / "x", **settings)
