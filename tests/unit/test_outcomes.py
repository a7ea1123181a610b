"""What runs give: saved, read back, refused when damaged; arms of a comparison; pictures of samples."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import nn

import stillhouse
from stillhouse.data import Drawn, together
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.outcomes import DataSet, Member, Models, Queries, Query, describe, example_inputs, load
from stillhouse.report import grid
from stillhouse.run import Run
from stillhouse.system import Clock
from stillhouse.trials import mean, table, trials

# -- models ------------------------------------------------------------------------------------------------------------


def two() -> Models:
    specs = [ModelSpec("stillhouse:mlp", 3, (4,), options={"widths": [w]}) for w in (5, 2)]
    members = [Member(f"w{s.options['widths'][0]}", s.build(seed=i).eval(), spec=s) for i, s in enumerate(specs)]
    return Models(members, torch.zeros(1, 4))


def test_models_of_different_structure_come_back(tmp_path):
    made, x = two(), torch.randn(3, 4)
    made.save(tmp_path)
    for m in made:
        assert torch.equal(load(tmp_path / "students" / m.name)(x), m.model(x))
    rows = made.rows(tmp_path, {"w5": {"reward": 7.0}})
    assert [(r.name, r.params, r.macs, r.metrics.get("reward")) for r in rows] == [
        ("w5", 4 * 5 + 5 + 5 * 3 + 3, 4 * 5 + 5 * 3, 7.0),
        ("w2", 4 * 2 + 2 + 2 * 3 + 3, 4 * 2 + 2 * 3, None),
    ]
    assert rows[0].metrics["bytes"] == (tmp_path / "students/w5/model.safetensors").stat().st_size


def test_a_live_model_says_that_it_needs_its_base(tmp_path):
    Models([Member("line", nn.Linear(3, 2))], torch.zeros(1, 3)).save(tmp_path)
    with pytest.raises(UserError, match="live Linear"):
        load(tmp_path / "students/line")
    assert isinstance(load(tmp_path / "students/line", base=nn.Linear(3, 2)), nn.Linear)


def test_a_whole_run_is_not_one_thing(tmp_path):
    two().save(tmp_path)
    with pytest.raises(UserError, match="students/w2"):
        load(tmp_path)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(1, 3, 8, 8),
        (torch.zeros(1, 2), torch.zeros([], dtype=torch.int64)),
        {"ids": torch.zeros(1, 7, dtype=torch.int64), "more": (torch.zeros(1),)},
    ],
)
def test_inputs_are_described_and_made_again(inputs):
    again = example_inputs(json.loads(json.dumps({"inputs": describe(inputs)})), "plan.json")

    def same(a, b):
        if isinstance(a, torch.Tensor):
            assert b.dtype == a.dtype and b.shape == (torch.Size([2, *a.shape[1:]]) if a.dim() else a.shape)
            return
        keys = a if isinstance(a, dict) else range(len(a))
        assert len(a) == len(b)
        for k in keys:
            same(a[k], b[k])

    same(inputs, again)


BAD = [
    {"inputs": 3},
    {"inputs": {"shape": [1, -2], "dtype": "float32"}},
    {"inputs": {"shape": [1], "dtype": "Tensor"}},
    {"shape": ["x"]},
    {},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_inputs_that_are_none(bad):
    with pytest.raises(UserError, match=r"plan\.json"):
        example_inputs(bad, "plan.json")


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_library_models_are_built_again_from_their_configuration(library):
    module = pytest.importorskip(library)
    if library == "diffusers":
        net = module.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), 
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, num_class_embeds=3,
        )  # fmt: skip
    else:
        net = module.T5ForConditionalGeneration(
            module.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        )
    spec = ModelSpec.from_json(json.loads(json.dumps(ModelSpec.of(net).to_json())))
    again = spec.build(seed=1)
    assert type(again) is type(net)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(spec.build(seed=1).parameters(), again.parameters(), strict=True))


def test_other_models_have_no_configuration():
    with pytest.raises(UserError, match="Linear"):
        ModelSpec.of(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no class 'UNet9'"):
        ModelSpec("diffusers:UNet9", 1, ()).build()


# -- data sets and queries ---------------------------------------------------------------------------------------------


def small() -> DataSet:
    tensors = {"images": torch.rand(3, 1, 4, 4), "labels": torch.rand(3, 2), "labels.text": torch.zeros(1)}
    return DataSet(tensors, {"method": "none", "classes": ["a", "b"]}, {"preview": grid(tensors["images"])})


def test_a_data_set_comes_back_and_counts_its_bytes(tmp_path):
    made = small()
    made.save(tmp_path)
    again = stillhouse.load(tmp_path / "dataset")
    assert again.facts == made.facts and again.pictures == made.pictures
    assert all(torch.equal(again[k], v) for k, v in made.tensors.items())
    assert again.bytes() == {"images": 192, "labels": 28, "total": 220}
    with pytest.raises(KeyError, match="images"):
        again["pixels"]


def test_queries_come_back(tmp_path):
    made = Queries([Query("1", {"laser": 1.5, "cat": -0.25}, "lasers"), Query("2", {}, "")], {"index": "x"})
    made.save(tmp_path)
    again = stillhouse.load(tmp_path / "queries")
    assert again == made and next(iter(again)).terms["cat"] == -0.25


def test_damaged_and_newer_outcomes_are_refused(tmp_path):
    small().save(tmp_path)
    facts = tmp_path / "dataset/dataset.json"
    good = facts.read_text()
    facts.write_text(good.replace('"none"', '"some"'))
    with pytest.raises(UserError, match="not of the same save"):
        load(tmp_path / "dataset")
    data = DataSet({}, {})
    data.facts["format"] = 99
    data.save(tmp_path)
    with pytest.raises(UserError, match="newer Stillhouse"):
        load(tmp_path / "dataset")
    queries = tmp_path / "queries/queries.json"
    Queries([Query("1", {"a": 1.0})]).save(tmp_path)
    queries.write_text(queries.read_text().replace("1.0", '"much"'))
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "queries")
    queries.write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "queries")


# -- arms, sources, pictures -------------------------------------------------------------------------------------------


def test_trials_are_read_back_and_see_their_seeds(tmp_path):
    calls = []

    def arm(run: Run) -> dict[str, float]:
        calls.append((run.folder.name, run.seed))
        return {"x": run.seed / 4, "only": 1.0}

    run = Run(tmp_path, quiet=True, device="cpu")
    first = trials(run, {"One (1)": arm, "two": lambda r: {"x": 0.5}}, [1, 3])
    assert first == {"One (1)": [{"x": 0.25, "only": 1.0}, {"x": 0.75, "only": 1.0}], "two": [{"x": 0.5}] * 2}
    assert trials(run, {"One (1)": arm}, [1, 3])["One (1)"] == first["One (1)"]
    assert calls == [("one--1--1", 1), ("one--1--3", 3)]
    assert mean(first["One (1)"], "x") == 0.5
    shown = table("t", first, {"x %": ("x", 100, 1), "only": ("only", 1, 0)})
    assert shown.rows == [["One (1)", "50.0 ± 35.4", "1"], ["two", "50.0 ± 0.0", "–"]]


def test_drawn_batches_depend_on_the_clock_alone_and_ranks_share_them():
    source = Drawn(lambda n, g: {"noise": torch.randn(n, 2, generator=g)}, 5, "noise")
    whole = source.batch(Clock(step=3))["noise"]
    assert torch.equal(whole, source.batch(Clock(step=3, micro=1, turn=2))["noise"])
    assert not torch.equal(whole, source.batch(Clock(step=4))["noise"])
    parts = [source.batch(Clock(step=3, rank=r, world=2))["noise"] for r in range(2)]
    assert torch.equal(torch.cat(parts), whole) and len(parts[0]) == 3
    assert source.fingerprint != Drawn(source.make, 5, "other").fingerprint


def test_repeats_of_an_update_draw_apart():
    draws = [torch.rand(3, generator=Clock(turn=t).generator("noise")) for t in (0, 1, 2)]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_together_hands_on_the_state_of_its_sources():
    class Counter:
        steps_per_epoch, fingerprint, n = 1, "counter", 0

        def batch(self, clock):
            self.n += 1
            return {"input": torch.tensor([self.n])}

        def state_dict(self):
            return {"n": torch.tensor(self.n)}

        def load_state_dict(self, state):
            self.n = int(state["n"])

    plain = Drawn(lambda n, g: {"x": torch.zeros(n)}, 1, "zeros")
    assert not hasattr(together(a=plain), "state_dict")
    both = together(a=Counter(), plain=plain, b=Counter())
    both.batch(Clock())["a"]
    assert {k: int(v) for k, v in both.state_dict().items()} == {"a/n": 1, "b/n": 0}
    again = together(a=Counter(), plain=plain, b=Counter())
    again.load_state_dict(both.state_dict())
    assert int(again.batch(Clock())["a"]["input"]) == 2 and int(again.batch(Clock())["b"]["input"]) == 1


def test_a_grid_shows_every_image_in_its_place():
    images = torch.zeros(3, 1, 2, 2)
    images[1] = 1.0
    page = np.asarray(Picture.open(io.BytesIO(grid(images, columns=2, side=4))))
    assert page.shape == (20, 20, 3)
    assert page[5, 5].tolist() == [0] * 3 and page[5, 13].tolist() == [255] * 3 and page[13, 5].tolist() == [0] * 3
    assert page[13, 13].tolist() == [255] * 3  # nothing there
    taller = np.asarray(Picture.open(io.BytesIO(grid(images, columns=2, side=4, captions=["a", "b", "c"]))))
    assert taller.shape[0] == 20 + 2 * 12
    with pytest.raises(ValueError, match="captions"):
        grid(images, captions=["a"])
