"""The exact checks of the ProlificDreamer card (1–4), the plug-ins, the command and its mistakes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from table import Row
from torch import Tensor, nn

import stillhouse
from stillhouse import Run, UserError, cli
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.digits import digits_scheduler, digits_unet
from stillhouse.diffusion.exact import Mixture, normal_quadrature
from stillhouse.diffusion.lora import Adapted
from stillhouse.diffusion.process import VP
from stillhouse.diffusion.score import ScoreDistillation
from stillhouse.objectives import inject
from stillhouse.recipes.prolificdreamer_vsd.experiment import TINY, claims, tiny
from stillhouse.recipes.prolificdreamer_vsd.recipe import Config, distill, renders
from stillhouse.recipes.prolificdreamer_vsd.scenes import Generator, Images, Scene, Student
from stillhouse.system import Clock, Update
from stillhouse.teachers import state_fingerprint

F64 = torch.float64
SYSTEM = "prolificdreamer_vsd"
SHAPE = (1, 8, 8)
ADAM = partial(Update, optimizer=partial(torch.optim.Adam, lr=0.01))


class Panned(Scene):
    """A renderer: each particle is a 12 × 12 picture, of which the camera (row, column) sees 8 × 8."""

    def __init__(self, particles: int, seed: int):
        super().__init__()
        self.canvas = nn.Parameter(torch.randn(particles, 1, 12, 12, generator=torch.Generator().manual_seed(seed)))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        corner = torch.randint(5, (n, 2), generator=generator)
        return {"camera": corner / 4.0, "view": (corner[:, 0] > 2).long()}

    def forward(self, particle: Tensor, camera: Tensor, view: Tensor) -> Tensor:
        at = (camera * 4).round().long()[:, :, None] + torch.arange(8, device=camera.device)
        rows, columns = at[:, 0, :, None], at[:, 1, None, :]
        return self.canvas[particle[:, None, None], 0, rows, columns][:, None]


def panned(particles: int, seed: int = 0) -> nn.Module:
    return Panned(particles, seed)


ROWS = [
    Row(SYSTEM, "sds", {"loss": "sds"}),
    Row(SYSTEM, "camera", {"renderer": "test_prolificdreamer_vsd:panned", "drop_camera": 0.5}),
    Row(SYSTEM, "generator", {"renderer": "stillhouse.recipes.prolificdreamer_vsd.scenes:Generator"}),
    Row(SYSTEM, "micro", {"batch": 3, "fake_repeat": 2}, micro_batch=2),
]
# The fake at its start is the teacher, so that without guidance the gradient is zero: free images stay where they are.
ZERO = [
    (
        Row(SYSTEM, "fake stays the teacher", {"kappa": 1.0, "fake_lr": 0.0}),
        Row(SYSTEM, "particles stay", {"kappa": 1.0, "lr": 0.0}),
    )
]
# Both optimisers are adaptive and turn rounding into parts of a step: so the particles' steps are small here.
JOINT = [
    Row(SYSTEM, "joint", {"batch": 4, "lr": 1e-3}),
    Row(SYSTEM, "joint uneven", {"batch": 3, "loss": "sds", "lr": 1e-3}),
]


def teacher_of(network: nn.Module | None = None) -> Denoiser:
    return Denoiser.of(network or digits_unet((8, 8)), digits_scheduler(), null=10)


def system_of(student: nn.Module, teacher: Denoiser, fake: Denoiser | None, n: int, cfg: Config) -> ScoreDistillation:
    return ScoreDistillation(student, teacher, fake, cfg.scores(), n, generator=ADAM, fake_update=ADAM)


def batch_of(n: int) -> dict[str, Tensor]:
    return {"index": torch.arange(n), "particle": torch.arange(n)}


# -- the exact checks of the card ---------------------------------------------------------------------------------


def test_1_with_one_particle_vsd_is_sds_sample_by_sample():
    """The exact score of a Dirac is the noise that was added."""
    process, g = VP.linear(), torch.Generator().manual_seed(0)
    teacher = Mixture(torch.randn(3, 5, generator=g, dtype=F64), 0.2, process)
    theta = torch.randn(1, 5, generator=g, dtype=F64)
    x0, t = theta.expand(200, 5), torch.randint(20, 981, (200,), generator=g)
    eps = torch.randn(200, 5, generator=g, dtype=F64)
    student = Student(Images(1, (5,)))
    vsd = system_of(student, teacher, Mixture(theta, 0.0, process), 200, Config(kappa=1))
    sds = system_of(student, teacher, None, 200, Config(kappa=1))
    found = sds.direction(x0, t, eps, {})
    torch.testing.assert_close(vsd.direction(x0, t, eps, {}), found, rtol=0, atol=1e-11)
    x_t = process.alpha(t)[:, None] * x0 + process.sigma(t)[:, None] * eps
    by_hand = (1 - process.alpha_bar[t])[:, None] * (teacher.view(x_t, t).eps - eps)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-12)
    two = Mixture(torch.cat([theta, theta + 1]), 0.0, process)  # with a second particle they part
    other = system_of(student, teacher, two, 200, Config(kappa=1)).direction(x0, t, eps, {})
    assert float((other - found).abs().max()) > 0.1


def test_2_the_surrogates_gradient_is_g_over_b_and_reaches_nobody_else():
    """Through a renderer: (∂x_0/∂θ)ᵀ g / B, on particles that are rendered twice."""
    teacher = teacher_of(digits_unet((8, 8), seed=1))
    fake = Adapted(teacher, rank=2, camera=2)
    scene = Panned(2, 0)
    system = system_of(Student(scene), teacher, fake, 4, Config(kappa=3.0))
    with torch.no_grad():
        for p in fake.parameters():
            p.add_(0.05)
    batch = renders(scene, torch.tensor([1, 2]), None, 2, 1, 4, torch.Generator().manual_seed(0))
    clock = Clock(seed=5)
    system.generator(batch, clock).total.backward()
    assert all(p.grad is None for p in [*teacher.network.parameters(), *system.fake_weights.parameters()])
    x0 = system.student(batch)
    t, eps = system.noise(batch, clock, x0, "student", 0.02, 0.98)
    g = system.direction(x0.detach(), t, eps, batch)
    assert float(g.abs().max()) > 1e-3
    (expected,) = torch.autograd.grad(x0, scene.canvas, g / 4)
    torch.testing.assert_close(scene.canvas.grad, expected, rtol=0, atol=1e-6)
    scene.canvas.grad = None
    system.fake(batch, clock).total.backward()
    assert scene.canvas.grad is None
    assert all(p.grad is not None for p in system.fake_weights.parameters())
    assert all(p.grad is None for p in teacher.network.parameters())


def expected_gradient(a: float, b: float, m: float, c: float, sds: bool, times: list[int]) -> Tensor:
    """E over z, ε and t of the gradient in (a, b) of x_0 = a + b z, through the System's own direction."""
    process = VP.linear()
    z, w = normal_quadrature(24)
    zz, ee, ww = z.repeat_interleave(24), z.repeat(24), w.repeat_interleave(24) * w.repeat(24)
    k = len(times)
    zs, es, ws = zz.repeat(k)[:, None], ee.repeat(k)[:, None], ww.repeat(k) / k
    t = torch.tensor(times).repeat_interleave(len(zz))
    theta = torch.tensor([a, b], dtype=F64, requires_grad=True)
    x0 = theta[0] + theta[1] * zs
    teacher = Mixture(torch.tensor([[m]], dtype=F64), c, process)
    fake = None if sds else Mixture(torch.tensor([[a]], dtype=F64), abs(b), process)
    system = system_of(Student(Images(1, (1,))), teacher, fake, len(t), Config(kappa=1))
    g = system.direction(x0.detach(), t, es, {})
    (inject(x0, g) * ws).sum().backward()
    return theta.grad


TIMES = [20, 100, 300, 500, 800, 980]


def test_3_affine_generator_where_the_expected_gradient_is_zero():
    """VSD: (m, ±c). SDS: (m, 0): it wants a point."""
    m, c = 0.7, 0.4
    zero = torch.zeros(2, dtype=F64)
    for b in (c, -c):
        torch.testing.assert_close(expected_gradient(m, b, m, c, False, TIMES), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_gradient(m, 0.0, m, c, True, TIMES), zero, rtol=0, atol=1e-12)
    assert abs(float(expected_gradient(m, c, m, c, True, TIMES)[1])) > 1e-3
    assert abs(float(expected_gradient(m + 0.3, c, m, c, False, TIMES)[0])) > 1e-3
    assert abs(float(expected_gradient(m, 0.5 * c, m, c, False, TIMES)[1])) > 1e-3


@pytest.mark.parametrize("sds", [False, True])
def test_3_affine_generator_by_hand(sds):
    """(σ³ α (a − m)/V, σ³ α b (1/V − 1/Q)), V = α²c² + σ², Q = α²b² + σ²; SDS has no 1/Q."""
    a, b, m, c, t = 0.2, 0.6, 0.7, 0.4, 300
    bar = float(VP.linear().alpha_bar[t])
    alpha, sigma = bar**0.5, (1 - bar) ** 0.5
    v, q = bar * c * c + 1 - bar, bar * b * b + 1 - bar
    by_hand = [sigma**3 * alpha * (a - m) / v, sigma**3 * alpha * b * (1 / v - (0 if sds else 1 / q))]
    assert expected_gradient(a, b, m, c, sds, [t]).tolist() == pytest.approx(by_hand, abs=1e-12)


def test_4_a_fake_that_says_what_the_guided_teacher_says_leaves_nothing():
    teacher = teacher_of()

    def guided(x, t, c):
        return teacher.view(x, t, c, 7.5).value

    fake = Denoiser(guided, teacher.process, "epsilon")
    system = system_of(Student(Images(4, SHAPE)), teacher, fake, 4, Config(kappa=7.5))
    x0, eps = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    batch = {"condition": torch.arange(4)}
    g = system.direction(x0, torch.tensor([20, 300, 600, 980]), eps, batch)
    assert not g.any()
    plain = system_of(Student(Images(4, SHAPE)), teacher, teacher, 4, Config(kappa=7.5))
    assert plain.direction(x0, torch.tensor([20, 300, 600, 980]), eps, batch).any()


def test_4_at_its_start_the_lora_is_the_teacher_so_that_the_gradient_is_guided_minus_conditional():
    teacher = teacher_of()
    fake = Adapted(teacher, camera=3)
    x0, eps = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([20, 300, 600, 980]), torch.arange(4)
    batch = {"condition": labels, "camera": torch.ones(4, 3)}
    one, guided = (
        system_of(Student(Images(4, SHAPE)), teacher, fake, 4, Config(kappa=k)).direction(x0, t, eps, batch)
        for k in (1.0, 3.0)
    )
    assert not one.any()
    x_t = teacher.process.add_noise(x0, eps, t)
    with torch.no_grad():
        yes = teacher.predict(x_t, t, labels)
        no = teacher.predict(x_t, t, torch.full((4,), 10))
    weight = (1 - teacher.process.alpha_bar[t]).float().view(4, 1, 1, 1)
    torch.testing.assert_close(guided, weight * 2 * (yes - no), rtol=1e-4, atol=1e-5)


# -- what the card says is easy to get wrong ------------------------------------------------------------------------


def test_the_times_are_those_of_the_code():
    """U{20..980}, after the first fifth U{20..500}; the fake's U{0..999}."""
    values = torch.zeros(60_000, 1)
    system = system_of(Student(Images(1, (1,))), teacher_of(), None, 60_000, Config())
    index = {"index": torch.arange(60_000)}
    for step, ends in ((0, (20, 980)), (19, (20, 980)), (20, (20, 500)), (99, (20, 500))):
        clock = Clock(step=step, steps=100)
        t, _ = system.noise(index, clock, values, "student", *system.scores.times(clock))
        assert (int(t.min()), int(t.max())) == ends
    t, _ = system.noise(index, Clock(), values, "fake", system.scores.fake_low, system.scores.fake_high)
    assert (int(t.min()), int(t.max())) == (0, 999)


def test_the_teacher_hears_view_words_and_the_fake_does_not():
    scene = Panned(4, 0)
    conditions = torch.tensor([10.0, 20.0])[:, None]
    viewed = torch.tensor([11.0, 12.0, 21.0, 22.0])[:, None]  # prompt by prompt, view by view
    batch = renders(scene, conditions, viewed, 4, 2, 40, torch.Generator().manual_seed(0))
    prompt, view = batch["particle"] // 2, batch["view"]
    assert {0, 1} == set(view.tolist())
    assert torch.equal(batch["condition"][:, 0], 10.0 * (prompt + 1))
    assert torch.equal(batch["teacher_condition"][:, 0], 10.0 * (prompt + 1) + 1 + view)
    heard = {}

    def listen(who, x, t, c):
        heard[who] = c
        return x

    teacher, fake = (Denoiser(partial(listen, who), VP.linear(), null=0.0) for who in ("teacher", "fake"))
    system_of(Student(scene), teacher, fake, 40, Config(kappa=1)).generator(batch, Clock())
    assert torch.equal(heard["teacher"], batch["teacher_condition"]) and torch.equal(heard["fake"], batch["condition"])
    with pytest.raises(UserError, match="which view it shows"):
        renders(Images(4, (1,)), conditions, viewed, 4, 2, 4, torch.Generator())


def test_particles_are_drawn_without_repetition_as_far_as_they_reach():
    scene = Images(5, (1,))
    for size in (3, 5, 13):
        found = renders(scene, None, None, 5, 5, size, torch.Generator().manual_seed(1))["particle"]
        counts = torch.bincount(found, minlength=5)
        assert int(counts.sum()) == size and int(counts.max() - counts.min()) <= 1


def test_the_users_network_is_left_as_it_was(tmp_path):
    network = digits_unet((8, 8))
    before, names = state_fingerprint(network), [n for n, _ in network.named_modules()]
    labels = torch.tensor([1, 2])
    made = distill(Run(tmp_path, device="cpu", quiet=True), teacher_of(network), labels, SHAPE, replace(TINY, steps=3))
    assert state_fingerprint(network) == before and [n for n, _ in network.named_modules()] == names
    assert made["particles"].shape == (4, *SHAPE) and made["prompt"].tolist() == [0, 0, 1, 1]


def test_a_teacher_that_predicts_v_gives_the_gradient_of_its_noise():
    """The same posterior mean, told as v and as ε."""
    process = VP.linear()
    exact = Mixture(torch.randn(3, 5, dtype=F64), 0.3, process)
    as_v = Denoiser(lambda x, t: exact.view(x, t).v, process, "v_prediction")
    as_eps = Denoiser(lambda x, t: exact.view(x, t).eps, process, "epsilon")
    x0, eps, t = torch.randn(6, 5, dtype=F64), torch.randn(6, 5, dtype=F64), torch.tensor([20, 100, 300, 500, 700, 980])
    one, two = (
        system_of(Student(Images(1, (5,))), d, None, 6, Config(kappa=1)).direction(x0, t, eps, {})
        for d in (as_v, as_eps)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_claims_are_reported_whether_they_hold_or_not():
    ring = {"ring VSD": [{"within": 0.09, "energy": 0.01}], "ring SDS": [{"within": 0.02, "energy": 0.03}]}
    found = {"VSD": [{"diversity": 0.5, "accuracy": 0.9}], "SDS": [{"diversity": 0.1, "accuracy": 0.7}]}
    assert [c.holds for c in claims(ring, found, [0])] == [True, True, False, True, False]


# -- the user's own -------------------------------------------------------------------------------------------------


def run(*flags: object) -> int:
    return cli.invoke(["run", SYSTEM, *map(str, flags), "--device", "cpu", "--quiet"])


SMALL = ("--steps", 2, "--particles", 2, "--rank", 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("teacher")
    digits_unet((8, 8)).save_pretrained(folder / "unet")
    digits_scheduler().save_pretrained(folder / "scheduler")
    return folder


def test_the_command_with_a_saved_teacher(saved, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--model", saved, "--prompts", 3, 7, "--null-class", 10, *SMALL, "--out", out) == 0, (
        capsys.readouterr().err
    )
    made = stillhouse.load(out / "dataset")
    assert made["particles"].shape == (4, *SHAPE) and made.facts["prompts"] == ["3", "7"]
    assert made.pictures["particles"][:4] == b"\x89PNG"
    report = json.loads((out / "report.json").read_text())
    assert len(report["images"]) == 1 and {c["title"] for c in report["curves"]} >= {"Loss of the fake score"}
    assert any("prediction_type epsilon" in n for n in report["notes"]), "an untrained teacher is said to be suspicious"


def test_the_command_with_a_function_and_a_renderer_that_loads_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_vsd.py").write_text(
        "from stillhouse.diffusion.digits import digits_scheduler, digits_unet\n"
        "def teacher():\n    return digits_unet((8, 8)), digits_scheduler(), {'null': 10}\n"
        "def wrong():\n    return digits_unet((8, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    flags = ("--model", "mine_vsd:teacher", "--renderer", f"{__name__}:panned", "--prompts", 3, *SMALL)
    assert run(*flags, "--out", out) == 0, capsys.readouterr().err
    scene = stillhouse.load(out / "students/scene")
    assert scene.canvas.shape == (2, 1, 12, 12) and not torch.equal(scene.canvas, Panned(2, 0).canvas)
    assert run("--model", "mine_vsd:wrong", *SMALL, "--out", tmp_path / "other") == 2
    assert "must return (network, scheduler) or a Denoiser" in capsys.readouterr().err
    sys.modules.pop("mine_vsd")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A text-to-image pipeline of diffusers with random weights, as save_pretrained leaves it."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pipeline")
    words = ["<|startoftext|>", "<|endoftext|>", *(c + e for c in "abcdefghijklmnopqrstuvwxyz" for e in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, cross_attention_dim=16,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12),
        unet=unet, scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "whole")  # fmt: skip
    return folder / "whole"


def test_the_command_with_a_whole_pipeline_texts_and_latents(pipeline, tmp_path, capsys):
    out = tmp_path / "run"
    prompts = ("a cat", "a dog")
    assert run("--model", pipeline, "--prompts", *prompts, *SMALL, "--out", out) == 0, capsys.readouterr().err
    made = stillhouse.load(out / "dataset")
    assert made["particles"].shape == (4, 4, 8, 8) and made.facts["prompts"] == list(prompts)


def test_mistakes_are_said_in_one_line(saved, pipeline, tmp_path, capsys, monkeypatch):
    v = tmp_path / "v"
    UNet2DModel(**{**digits_unet((8, 8)).config, "num_class_embeds": None}).save_pretrained(v)
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(v)
    (tmp_path / "bad_vsd.py").write_text(
        "import torch\nfrom diffusers import DDPMScheduler\n"
        "def net():\n    return torch.nn.Linear(8, 3), DDPMScheduler(), {'shape': (1, 8, 8)}\n"
        "def boom():\n    raise KeyError('x')\n"
        "class Dead(torch.nn.Module):\n    def forward(self, particle):\n        return torch.zeros(2, 1, 8, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    known = ("--model", saved, "--prompts", 1, "--null-class", 10)
    for flags, match in (
        (("--model", saved, "--null-class", 10), "the list of prompts is empty"),
        (("--model", saved, "--prompts", "1", " "), "has an empty prompt"),
        (("--model", saved, "--prompts", "cat"), "knows classes 0 to 10, got prompt 'cat'"),
        (("--model", saved, "--prompts", "10", "--null-class", 10), "knows classes 0 to 9, got prompt '10'"),
        (("--model", saved, "--prompts", 1), "--null-class"),
        (("--model", v, "--prompts", "a cat"), "takes no conditions, but prompts were given: a cat"),
        (
            ("--model", v, "--prediction", "epsilon"),
            "said to predict 'epsilon', but DDPMScheduler is set to 'v_prediction'",
        ),
        (("--model", tmp_path / "nothing"), "there is no such folder"),
        (("--model", tmp_path), "the folder has no config.json of a network"),
        (("--model", "bad_vsd:net"), "Linear is no denoiser for samples (1, 8, 8)"),
        (("--model", "bad_vsd:boom"), "raised KeyError"),
        ((*known, "--lora-targets", "to_w"), "matches no layer of UNet2DModel; did you mean"),
        ((*known, "--renderer", "bad_vsd:Dead"), "no parameters that train"),
        ((*known, "--renderer", "bad_vsd:boom"), "--renderer bad_vsd:boom raised KeyError"),
        (("--model", pipeline, "--prompts", "a cat", "--views", "from above"), "which view it shows"),
        (("--data", "digits"), "needs no data"),
        (("--kappa", "much"), "kappa"),
        ((*known, "--low", 0.9, "--late-high", 0.5), "parts of the way"),
    ):
        capsys.readouterr()
        assert run(*flags, *SMALL, "--out", tmp_path / "out") == 2, match
        said = capsys.readouterr().err
        assert match in said and said.count("\n") == 1, said
    sys.modules.pop("bad_vsd")


def test_a_renderer_that_gives_another_shape_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gives \(1, 4, 4\) for a sample, the teacher wants \(1, 8, 8\)"):
        distill(Run(tmp_path, quiet=True), teacher_of(), torch.tensor([1]), SHAPE, TINY, scene=Images(2, (1, 4, 4)))
    with pytest.raises(UserError, match="list of prompts is empty"):
        distill(Run(tmp_path, quiet=True), teacher_of(), torch.tensor([], dtype=torch.int64), SHAPE, TINY)


def test_a_generator_is_a_particle_too(tmp_path):
    made = tiny(Run(tmp_path, quiet=True), replace(TINY, renderer=f"{Generator.__module__}:Generator"))
    model = made["scene"].model
    x0 = model(torch.tensor([0, 0, 3]), torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    assert x0.shape == (3, *SHAPE) and not torch.equal(x0[0], x0[1])
