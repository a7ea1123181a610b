"""WML through whole runs: the importance's clock, one peer, merging, averages, transformers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kit import gradients, images, learner, peer_set, state
from safetensors.torch import load_file
from torch import Tensor

from stillhouse.data import Batches, Data, from_arrays
from stillhouse.engine import Run
from stillhouse.family import Family
from stillhouse.files import read_json
from stillhouse.models import ModelSpec
from stillhouse.outcomes import load
from stillhouse.recipes.wml.config import Config
from stillhouse.recipes.wml.recipe import distill
from stillhouse.recipes.wml.rules import NAMES
from stillhouse.students.plan import Plan
from stillhouse.system import Clock
from stillhouse.weights import MirrorDescent, cosine

SPEC = ModelSpec("stillhouse:mlp", 3, (6,), options={"widths": [16, 16]})
CFG = Config(
    ratios=(0.0, 0.5, 0.7), trunk=("2",), epochs=4.0, batch=18, outer_every=2, warmup=1.0, lr=0.3, weight_decay=0.01,
    eta=5.0, clip=50.0,
)  # fmt: skip


def data(n: int = 100) -> Data:
    """Noisy classes; 80 training samples, of which the recipe holds 8 out."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=g) + 1.5 * F.one_hot(y, 6)
    return from_arrays(x.numpy(), y.numpy(), test_fraction=0.2)


def train(folder: Any, cfg: Config = CFG, **settings: Any) -> tuple[Family, Run]:
    run = Run(folder, seed=3, device="cpu", quiet=True, log_every=1)
    return distill(run, data(), SPEC, replace(cfg, **settings)), run


# -- one peer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["tree", "nested", "none"])
def test_one_peer_is_label_training_bit_for_bit(share, tmp_path):
    cfg = replace(CFG, ratios=(0.5,), share=share, alpha=0.25, epochs=2.0)
    family, run = train(tmp_path, cfg)
    samples = data().train
    model = Plan.from_json(read_json(tmp_path / "plans.json")["plans"][0]).build(SPEC.build(seed=3)).train()
    source = Batches(samples, cfg.batch)
    steps = round(2 * source.steps_per_epoch)
    opt = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay)
    rate = cosine(round(cfg.lr_warmup * steps))
    for step in range(steps):
        clock = Clock(seed=3, stage="mutual", step=step, steps=steps, steps_per_epoch=source.steps_per_epoch)
        batch = source.batch(clock)
        opt.zero_grad()
        (0.75 * F.cross_entropy(model(batch["input"]), batch["label"], reduction="none").mean()).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip) < cfg.clip
        opt.param_groups[0]["lr"] = cfg.lr * rate(clock)
        opt.step()
    (member,) = family
    assert member.importance == 1.0 and all(row["omega"] == [1.0] for row in run.log("mutual"))
    for (name, a), b in zip(model.state_dict().items(), member.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# -- the importance ---------------------------------------------------------------------------------------------------


def test_importance_moves_when_it_is_due_and_only_then(tmp_path):
    family, run = train(tmp_path)
    rows = run.log("mutual")
    first = 4  # 72 samples, 18 a step: one epoch of warm-up
    assert [r["step"] for r in rows] == list(range(16))
    for row, after in itertools.pairwise(rows):
        due = row["step"] >= first and row["step"] % 2 == 0
        assert (after["omega"] != row["omega"]) == due, row["step"]
        assert ("entropy" in row) == ("outer" in row) == ("h_direct" in row) == due
        assert sum(row["omega"]) == pytest.approx(1, abs=1e-6) and min(row["omega"]) >= CFG.floor / 3 - 1e-6
        if due:
            expected = -sum(w * math.log(w) for w in row["omega"])
            assert row["entropy"] == pytest.approx(expected, abs=1e-5)
    assert all(w == pytest.approx(1 / 3) for w in rows[first]["omega"])
    assert max(rows[-1]["omega"]) - min(rows[-1]["omega"]) > 0.01
    last = [m.importance for m in family]  # one update (step 14) lies before the last row, none after
    assert last == pytest.approx(rows[-1]["omega"], abs=1e-7)


def test_importance_is_in_no_weight_optimiser():
    """Momentum and weight decay (0.3 here) never touch it; its optimiser has neither."""
    system = learner("tree", eta=0.5, weight_decay=0.3)
    weights, importance = system.updates()
    assert not any(p is system.omega for p in weights.params)
    assert len(importance.params) == 1 and importance.params[0] is system.omega and importance.whole
    made = importance.optimizer(importance.params)
    assert isinstance(made, MirrorDescent) and not any("decay" in k or "momentum" in k for k in made.param_groups[0])
    assert {id(p) for p in weights.params} == {id(p) for p in system.parameters() if p is not system.omega}
    opt = weights.optimizer(weights.params)
    before = system.omega.detach().clone()
    for p in weights.params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(system.omega, before)


@pytest.mark.parametrize("settings", [{"eta": 0.0}, {"rule": "dml"}, {"ratios": (0.5,)}])
def test_importance_stays_even_where_nothing_is_learned_about_it(settings, tmp_path):
    family, run = train(tmp_path, epochs=2.0, **settings)
    assert all(len(set(row["omega"])) == 1 and "outer" not in row for row in run.log("mutual"))
    assert family.cost["samples"] == 80  # and nothing is held out


def test_merging_freezes_the_importance_and_takes_the_held_out_part_in(tmp_path):
    family, run = train(tmp_path, merge_epochs=2.0, batch=8)
    search, merge = run.log("mutual"), run.log("merge")
    assert len(search) == 4 * 9 and len(merge) == 2 * 10  # 72 and 80 samples
    assert any("outer" in row for row in search) and not any("outer" in row for row in merge)
    assert all(row["omega"] == merge[0]["omega"] for row in merge)
    assert [m.importance for m in family] == pytest.approx(merge[0]["omega"])
    assert max(merge[0]["omega"]) - min(merge[0]["omega"]) > 1e-3
    assert family.cost["steps"] == 56


def test_weights_from_held_out_data_stay_when_it_is_trained_on(tmp_path):
    family, _ = train(tmp_path, rule="kdcl-general", merge_epochs=2.0, batch=8)
    kept = load_file(tmp_path / "stages" / "mutual" / "checkpoint.safetensors")["system/rule.general"]
    assert [m.importance for m in family] == kept.tolist() != [kept[0]] * 3


def test_merged_run_resumes_as_it_was(tmp_path):
    once, _ = train(tmp_path, merge_epochs=1.0)
    again, _ = train(tmp_path, merge_epochs=1.0)
    for a, b in zip(once, again, strict=True):
        assert a.importance == b.importance
        assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


# -- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["tree", "nested", "none"])
def test_average_is_what_comes_out(share, tmp_path):
    system = learner(share, ema=0.75)
    start = {k: p.detach().clone() for k, p in system.peers.named_parameters()}
    with torch.no_grad():
        for p in system.peers.trained().values():
            p.add_(1.0)
    system.after_step(Clock())
    out = system.outcome()
    assert out is not system.peers and not out.training
    for name, p in out.named_parameters():
        torch.testing.assert_close(p, start[name] + 0.25)
    x = images(4)["input"]
    for i in range(3):
        torch.testing.assert_close(out.student(i)(x), out(x)[i], rtol=1e-9, atol=1e-9)
    averaged, raw = out.student(1), system.peers.student(1)
    assert not torch.allclose(averaged(x), raw(x))


def test_averaged_family_is_another_one_and_loads_from_its_folder(tmp_path):
    raw, _ = train(tmp_path / "raw")
    mean, _ = train(tmp_path / "mean", ema=0.9)
    mean.save(tmp_path)
    x = data().test.take(range(len(data().test)))["input"]  # type: ignore[arg-type]
    for a, b in zip(raw, mean, strict=True):
        assert a.importance == b.importance  # the average watches, it does not take part
        assert not torch.allclose(a.model(x), b.model(x))
        assert torch.equal(load(tmp_path / "students" / b.name)(x), b.model(x))


# -- every rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", NAMES)
def test_every_rule_gives_a_family(rule, tmp_path):
    share = "nested" if rule == "sandwich" else "tree"
    family, run = train(tmp_path, rule=rule, share=share, epochs=3.0, weight_decay=0.0)
    rows = run.log("mutual")
    assert len(family) == 3 and all(math.isfinite(r["label"] + r["teach"]) for r in rows)
    assert sum(rows[-1]["ce"]) < sum(rows[0]["ce"])
    assert sum(m.importance for m in family) == pytest.approx(1, abs=1e-5)
    if rule == "kdcl-general":
        assert max(m.importance for m in family) - min(m.importance for m in family) > 1e-3


# -- transformers and dropout -----------------------------------------------------------------------------------------


def transformer(**options: Any) -> torch.nn.Module:
    given = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, **options}
    return ModelSpec("timm:vit_tiny_patch16_224", 3, (2, 8, 8), options=given).build(seed=0).double()


@pytest.mark.parametrize("share", ["tree", "none"])
def test_forward_mode_through_attention_and_dropout(share):
    """Every pass sees the same dropout: else differences of passes would measure it, and not the weights."""
    base = transformer(proj_drop_rate=0.3, pos_drop_rate=0.2)
    train_batch, held = images(6), images(5, seed=1)

    def products(mode: str) -> Tensor:
        peers = peer_set(share, base=base, cut=("blocks.0",))
        system = learner(share, peers=peers, hypergradient=mode, gamma=0.1)
        rng = torch.get_rng_state()
        found = system.hypergradient(train_batch, held, Clock(step=4)).indirect
        assert torch.equal(torch.get_rng_state(), rng)
        return found

    by = {mode: products(mode) for mode in ("grad", "jvp", "fd")}
    torch.testing.assert_close(by["jvp"], by["grad"], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(by["fd"], by["grad"], rtol=1e-5, atol=1e-6 * float(by["grad"].abs().max()))
    assert by["grad"].abs().min() > 0


def test_two_passes_share_the_position_embedding_too():
    base, batch = transformer(), images(6)
    found = []
    for two_pass in (False, True):
        peers = peer_set("tree", base=base, cut=("blocks.0",))
        found.append(gradients(learner("tree", "dml", peers, two_pass=two_pass), batch))
    assert any(k.endswith("pos_embed") and g.abs().max() > 1e-4 for k, g in found[0].items())
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_of_every_kind_keeps_the_state_loadable():
    for share in ("tree", "nested", "none"):
        a, b = learner(share, ema=0.5), learner(share, ema=0.5)
        gradients(a, images(4))
        a.after_step(Clock())
        b.load_state_dict(a.state_dict())
        assert state(a) == state(b)
