"""SwiftBrush: the exact checks of its card, its mistakes, and the command on a user's own teacher."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from table import Row
from torch import Tensor, nn

import stillhouse
from stillhouse import cli
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.digits import NULL, SHAPE, digits_scheduler, digits_unet
from stillhouse.diffusion.exact import Mixture, normal_quadrature
from stillhouse.diffusion.lora import Adapted, adapters
from stillhouse.diffusion.process import VP, Flow
from stillhouse.diffusion.prompts import Prompts, read_prompts
from stillhouse.diffusion.sampling import Moment, OneStep
from stillhouse.diffusion.score import ScoreDistillation
from stillhouse.errors import UserError
from stillhouse.recipes import swiftbrush
from stillhouse.recipes.swiftbrush.experiment import PRESET, RING, TINY, tiny
from stillhouse.recipes.swiftbrush.recipe import Config, Student, distill
from stillhouse.run import Run
from stillhouse.system import Batch, Clock

ROWS = [
    Row("swiftbrush", "sds", {"fake": "none"}),
    Row("swiftbrush", "copy", {"fake": "copy", "fake_repeat": 2, "guidance": "teacher_only", "decay": True}),
]
# Without guidance to give, nobody getting any is the same.
ZERO = [
    (Row("swiftbrush", "kappa 1 on both", {"kappa": 1.0}), Row("swiftbrush", "none", {"guidance": "none"})),
    (
        Row("swiftbrush", "kappa 1 on the teacher", {"kappa": 1.0, "guidance": "teacher_only"}),
        Row("swiftbrush", "none", {"guidance": "none"}),
    ),
]
JOINT = [
    Row("swiftbrush", "two processes", {"optimizer": "sgd", "lr": 0.1, "fake_lr": 0.1}),
    Row("swiftbrush", "two processes, a copy", {"optimizer": "sgd", "lr": 0.1, "fake_lr": 0.1, "fake": "copy"}),
]

STABLE = VP(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0))


def unet_teacher(**changes) -> Denoiser:
    return Denoiser.of(digits_unet((8, 8), seed=3, **changes), digits_scheduler(), null=NULL)


def system_of(teacher: Denoiser, cfg: Config, student: nn.Module | None = None, fake: Denoiser | None = None):
    """The System as `distill` builds it, for one look at its parts."""
    student = student if student is not None else Student(OneStep.of(teacher, cfg.t_init, SHAPE))
    how = {"generator": cfg.update(cfg.lr), "fake_update": cfg.update(cfg.fake_lr)}
    return ScoreDistillation(student, teacher, fake, cfg.scores(), cfg.batch, **how)


def batch_of(n: int, seed: int = 0) -> Batch:
    return Prompts(torch.arange(10), SHAPE, n).batch(Clock(seed=seed, steps=9))


# -- 1. the goal, by quadrature ------------------------------------------------------------------------------------

CENTRES, C = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64), 0.3
T_TEST = 400


def eps_of(x: Tensor, means: Tensor, std: Tensor, alpha: float, sigma: float) -> Tensor:
    """−σ ∇ log Σ_k N(x; α m_k, α² c_k² + σ²), by autograd: not the code under test."""
    x = x.detach().requires_grad_(True)
    v = alpha**2 * std.square() + sigma**2
    logp = torch.logsumexp(-(x[:, None] - alpha * means).square() / (2 * v) - v.log() / 2, 1)
    return -sigma * torch.autograd.grad(logp.sum(), x)[0]


class Affine(nn.Module):
    """x_0 = a_y + b_y z: a generator whose distribution is known in full."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, batch: Batch) -> Tensor:
        y = batch["condition"]
        return self.a[y, None] + self.b[y, None] * batch["noise"]


class PerClass(Mixture):
    """An exact score with a width of its own for each class (there is one component in each)."""

    def predict(self, x_t, t, condition=None, *, camera=None):
        a, s = self.process.scales(t, x_t)
        b, m = self.std.detach(), self.means.detach().flatten()
        v = a * a * b.square() + s * s
        mean = m + a * b.square() / v * (x_t - a * m)
        weight = -(x_t - a * m).square() / (2 * v) - v.log() / 2
        if condition is not None:
            other = torch.arange(len(m)) != condition[:, None]
            weight = weight.masked_fill(other & (condition >= 0)[:, None], -math.inf)
        return (weight.softmax(1) * mean).sum(1, keepdim=True)


def expected_gradient(a: Tensor, b: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """E over z, ε and y of the gradient that moves (a, b), at one t, with the exact scores of teacher and generator."""
    process = VP.linear()
    student = Affine(a, b)
    teacher = Mixture(CENTRES[:, None], C, process)
    fake = PerClass(student.a[:, None], student.b, process)
    system = system_of(teacher, cfg, student, fake)
    z, w = normal_quadrature(40)
    y, i, j = (g.flatten() for g in torch.meshgrid(torch.arange(4), torch.arange(40), torch.arange(40), indexing="ij"))
    batch = {"condition": y, "noise": z[i, None]}
    x0 = student(batch)
    t = torch.full((len(y),), T_TEST)
    g = system.direction(x0.detach(), t, z[j, None], batch)
    ((w[i] * w[j])[:, None] / 4 * g * x0).sum().backward()
    return student.a.grad, student.b.grad


@pytest.mark.parametrize("kappa", [1.0, 3.0, 7.0])
def test_the_goal_of_guidance_on_both_sides_is_the_unguided_distribution(kappa):
    cfg = Config(kappa=kappa, guidance="both")
    b = torch.full((4,), C, dtype=torch.float64)
    for gradient in expected_gradient(CENTRES, b, cfg):
        assert gradient.abs().max() < 1e-12
    shifted = expected_gradient(CENTRES + 0.2, b, cfg)[0]  # elsewhere it is not zero, and it leads back
    assert (shifted > 1e-4).all()


def test_gradient_of_a_gaussian_generator_in_closed_form():
    """κ = 1: E ∂/∂a_y = ¼ σ³ α (a − m)/(α² c² + σ²) and E ∂/∂b_y = ¼ σ³ α b [1/(α²c²+σ²) − 1/(α²b²+σ²)]."""
    a, b = CENTRES + torch.tensor([0.3, -0.1, 0.2, 0.0]), torch.tensor([0.1, 0.5, 0.3, 0.2], dtype=torch.float64)
    got_a, got_b = expected_gradient(a, b, Config(guidance="none"))
    process, t = VP.linear(), torch.tensor([T_TEST])
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    v, u = alpha**2 * C**2 + sigma**2, alpha**2 * b**2 + sigma**2
    assert torch.allclose(got_a, sigma**3 * alpha * (a - CENTRES) / v / 4, atol=1e-12)
    assert torch.allclose(got_b, sigma**3 * alpha * b * (1 / v - 1 / u) / 4, atol=1e-12)


def test_guidance_of_the_teacher_alone_leaves_a_drift():
    """At the teacher's own distribution g = σ² (κ − 1) (ε(y) − ε(∅)), sample by sample."""
    process, kappa = VP.linear(), 3.0
    teacher = Mixture(CENTRES[:, None], C, process)
    system = system_of(teacher, Config(kappa=kappa, guidance="teacher_only"), nn.Identity(), teacher)
    y, t = torch.arange(4).repeat(5), torch.full((20,), T_TEST)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(20, 1, generator=g, dtype=torch.float64) for _ in range(2))
    alpha, sigma = float(process.alpha(t)[0]), float(process.sigma(t)[0])
    x_t, std = (alpha * x0 + sigma * eps).flatten(), torch.full((4,), C, dtype=torch.float64)
    free = eps_of(x_t, CENTRES, std, alpha, sigma)
    given = torch.stack([eps_of(x[None], CENTRES[k, None], std[:1], alpha, sigma)[0] for x, k in zip(x_t, y)])
    got = system.direction(x0, t, eps, {"condition": y}).flatten()
    assert torch.allclose(got, sigma**2 * (kappa - 1) * (given - free), atol=1e-12) and got.abs().max() > 0.1


# -- 2. the first step -----------------------------------------------------------------------------------------------


def test_before_the_fake_has_learned_the_student_does_not_move():
    """LoRA says exactly what the teacher says while its "up" matrix is zero, with the same κ on both sides."""
    teacher = unet_teacher()
    cfg = replace(TINY, batch=6, guidance="both", kappa=3.0)
    system = system_of(teacher, cfg, fake=Adapted(teacher, rank=4, targets=("attention", "convolutions")))
    batch, clock = batch_of(6), Clock(steps=9)
    before = copy.deepcopy(system.student.state_dict())
    terms = system.generator(batch, clock)
    assert float(terms.notes["size"]) == 0
    update = system.updates()[0]
    optimizer = update.optimizer(update.params)
    terms.total.backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in system.student.state_dict().items())
    alone = system_of(teacher, replace(cfg, guidance="teacher_only"), fake=system.fake_score)
    assert float(alone.generator(batch, clock).notes["size"]) > 0


def test_the_teacher_is_bitwise_itself_with_adapters_off_also_when_they_have_learned():
    teacher = unet_teacher()
    original = copy.deepcopy(teacher.network)
    fake = Adapted(teacher, rank=4, targets=("attention", "convolutions"))
    with torch.no_grad():
        for p in fake.parameters():
            p.add_(0.1)
    x, t, y = torch.randn(4, *SHAPE), torch.tensor([10, 300, 600, 900]), torch.tensor([1, 2, 3, NULL])
    with torch.no_grad():
        expected = original(x, t, class_labels=y).sample
        assert torch.equal(teacher.predict(x, t, y), expected)
        assert not torch.allclose(fake.predict(x, t, y), expected)
        with adapters(fake.network, on=False):
            assert torch.equal(fake.predict(x, t, y), expected)
        assert not torch.allclose(fake.predict(x, t, y), expected)  # and on again


# -- 3. the one-step formula -----------------------------------------------------------------------------------------


class Says(nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.heard = t
        return self.value


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_true_answer_gives_the_clean_sample_back(kind):
    """At Stable Diffusion's t = 999 (ᾱ = 0.0047) in float32, where 1/α is about 15."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=g)
    t = torch.full((8,), 999)
    assert float(STABLE.alpha_bar[-1]) == pytest.approx(0.0047, abs=5e-5)
    x_T = STABLE.add_noise(x0, eps, t)
    a, s = (float(f(t)[0]) for f in (STABLE.alpha, STABLE.sigma))
    net = Says({"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind])
    model = OneStep(net, Moment.of(STABLE, 999), kind, (3,))
    assert (model(x_T) - x0).abs().max() < 1e-4
    assert net.heard.tolist() == [999] * 8 and net.heard.dtype == torch.int64


def test_the_generator_hears_its_noise_unscaled_in_vp_and_scaled_in_flow():
    z = torch.ones(2, 2)
    assert torch.equal(OneStep(Says(z), Moment.of(Flow(), 0.5), "sample", (2,))(z), z)
    assert Moment.of(Flow(), 0.5).facts == {"alpha": 0.5, "sigma": 0.5, "time": 500.0, "scale": 0.5}
    assert Moment.of(STABLE, 999).facts["scale"] == 1.0


def test_no_guidance_in_the_generators_own_call():
    calls = []

    def net(x, t, condition):
        calls.append(condition)
        return 0 * x

    class Net(nn.Module):
        def forward(self, x, t, condition):
            return net(x, t, condition)

    teacher = Denoiser(Net(), STABLE, "epsilon", null=10)
    OneStep.of(teacher, 1.0, (2,))(torch.ones(3, 2), torch.tensor([1, 2, 3]))
    assert len(calls) == 1 and calls[0].tolist() == [1, 2, 3]


# -- 4. gradients ----------------------------------------------------------------------------------------------------


def test_gradient_at_the_sample_is_g_over_all_elements_and_reaches_nobody_else():
    teacher = unet_teacher()
    fake = Adapted(teacher, rank=2, targets=("attention",))
    with torch.no_grad():
        for p in fake.parameters():
            p.add_(0.1)
    cfg = replace(TINY, batch=5)
    free = nn.Parameter(torch.randn(5, *SHAPE))

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = free

        def forward(self, batch):
            return self.x

    system, batch, clock = system_of(teacher, cfg, Free(), fake), batch_of(5), Clock(steps=9)
    system.generator(batch, clock).total.backward()
    t, eps = system.noise(batch, clock, free, "student", *cfg.scores().times(clock))
    g = system.direction(free.detach(), t, eps, batch)
    assert g.abs().max() > 0 and torch.allclose(free.grad, g / free.numel(), rtol=1e-5, atol=0)
    assert all(p.grad is None for p in [*teacher.network.parameters(), *fake.parameters()])
    free.grad = None
    system.fake(batch, clock).total.backward()
    assert free.grad is None and all(p.grad is None for p in teacher.network.parameters())
    assert all(p.grad is not None for p in fake.parameters())


def test_sds_is_the_noise_in_place_of_the_fake():
    teacher = unet_teacher()
    system, batch, clock = system_of(teacher, replace(TINY, batch=4, fake="none")), batch_of(4), Clock(steps=9)
    x0 = system.student(batch).detach()
    t, eps = system.noise(batch, clock, x0, "student", 0.02, 0.98)
    x_t = teacher.process.add_noise(x0, eps, t)
    with torch.no_grad():
        free, given = (teacher.predict(x_t, t, y) for y in (torch.full((4,), NULL), batch["condition"]))
    sigma2 = teacher.process.sigma(t).float().square().view(-1, 1, 1, 1)
    expected = sigma2 * (free + TINY.kappa * (given - free) - eps)
    assert torch.allclose(system.direction(x0, t, eps, batch), expected, atol=1e-5)
    assert len(system.updates()) == 1


# -- what the fake is trained on -------------------------------------------------------------------------------------


class Heard(Denoiser):
    """A denoiser that remembers what it was asked."""

    def __init__(self, network: nn.Module, process, **kw):
        super().__init__(network, process, **kw)
        self.weights, self.calls = network, []

    def predict(self, x_t, t, condition=None, *, camera=None):
        self.calls.append((x_t.detach(), t, condition))
        return super().predict(x_t, t, condition)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, condition):
        return self.w * x


def heard(cfg: Config) -> tuple[ScoreDistillation, Heard, Heard]:
    teacher, fake = (Heard(Scale(), STABLE, null=NULL) for _ in range(2))
    start = Denoiser(Scale(), STABLE, null=NULL)
    return system_of(teacher, cfg, Student(OneStep.of(start, 1.0, SHAPE)), fake), teacher, fake


def test_same_noise_for_teacher_and_fake_and_fresh_noise_for_the_fakes_training():
    system, teacher, fake = heard(Config(batch=6, guidance="none", drop=0.0))
    batch, clock = batch_of(6), Clock(steps=9)
    system.generator(batch, clock)
    system.fake(batch, clock)
    system.fake(batch, replace(clock, turn=1))
    for a, b in zip(teacher.calls[0], fake.calls[0], strict=True):
        assert torch.equal(a, b)
    first, second, third = (c[0] for c in fake.calls)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_loss_of_the_fake_by_hand():
    """mean (α e_φ − α ε')² over all elements, on the detached sample."""
    system, _, fake = heard(Config(batch=6, guidance="none", drop=0.0))
    batch, clock = batch_of(6), Clock(steps=9)
    loss = system.fake(batch, clock).total
    x_t, t, _ = fake.calls[0]
    _, eps = system.noise(batch, clock, x_t, "fake", 0.0, 1.0)
    alpha = STABLE.alpha(t).float().view(-1, 1, 1, 1)
    assert torch.allclose(loss, (alpha * 0.5 * x_t - alpha * eps).square().mean(), rtol=1e-5)


def test_time_ranges_are_those_of_the_released_code():
    system, teacher, fake = heard(Config(batch=4000, guidance="none", drop=0.0))
    batch = batch_of(4000)
    system.generator(batch, Clock(steps=9))
    system.fake(batch, Clock(steps=9))
    seen, trained = teacher.calls[0][1], fake.calls[1][1]
    assert (int(seen.min()), int(seen.max())) == (20, 980)
    assert (int(trained.min()), int(trained.max())) == (0, 999)


def test_the_prompt_is_dropped_for_the_whole_batch_or_for_nobody():
    system, _, fake = heard(Config(batch=8, guidance="none", drop=0.3))
    for step in range(60):
        system.fake(batch_of(8), Clock(step=step, steps=99))
    gone = torch.stack([c[2] == NULL for c in fake.calls])
    assert bool((gone.all(1) | ~gone.any(1)).all()) and 8 <= int(gone.all(1).sum()) <= 30


# -- never an image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["input", "image", "images", "pixels", "x0", "label"])
def test_there_are_no_pixels_to_ask_for(key):
    batch = Prompts(torch.arange(10), SHAPE, 4).batch(Clock())
    assert set(batch) == {"index", "noise", "condition"}
    with pytest.raises(UserError, match="never sees an image"):
        batch[key]


def test_training_asks_for_noise_and_prompts_alone(tmp_path, monkeypatch):
    asked, plain = set(), Prompts.batch

    class Watched(dict):
        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

    monkeypatch.setattr(Prompts, "batch", lambda self, clock: Watched(plain(self, clock)))
    tiny(Run(tmp_path, device="cpu", quiet=True), TINY)
    assert {"noise", "condition"} <= asked <= {"index", "noise", "condition", "teacher_condition", "camera"}


def test_prompts_from_words_or_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red fox\n\n  a blue bird \n")
    assert read_prompts([str(path)]) == ["a red fox", "a blue bird"]
    assert read_prompts(["3", "7"]) == ["3", "7"] and read_prompts([]) == []
    path.write_text(" \n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts([str(path)])
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="could not be read"):
        read_prompts([str(path)])


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_the_fast_gate_moves_points_onto_the_ring(tmp_path):
    """A short run of the ring: VSD comes nearer, SDS goes to the middle."""
    from stillhouse.diffusion.exact import ring
    from stillhouse.diffusion.planar import planar_denoiser
    from stillhouse.recipes.swiftbrush.experiment import ring_score

    run = Run(tmp_path, device="cpu", quiet=True)
    teacher = ring(Flow(1.0))
    start = planar_denoiser(run, teacher, steps=300)
    first = ring_score(OneStep.of(start, RING.t_init, (2,)).sample, teacher, 0)["energy"]
    short = replace(RING, steps=300)
    far = {}
    for fake in ("copy", "none"):
        made = distill(run.child(fake), teacher, None, (2,), replace(short, fake=fake), start=start)
        far[fake] = ring_score(made.sample, teacher, 0)["energy"]
    assert far["copy"] < 0.3 * first and far["none"] > first


def test_sampling_is_seeded_and_in_parts(tmp_path):
    made = tiny(Run(tmp_path, device="cpu", quiet=True), TINY)
    made.save(tmp_path)
    again = stillhouse.load(tmp_path / "students/one-step")
    labels = torch.arange(300) % 10
    x = made.sample(labels, torch.Generator().manual_seed(5))
    assert x.shape == (300, *SHAPE) and torch.equal(x, again.sample(labels, torch.Generator().manual_seed(5)))
    assert not torch.equal(x, made.sample(labels, torch.Generator().manual_seed(6)))
    plan = json.loads((tmp_path / "students/one-step/plan.json").read_text())["base"]["options"]
    assert plan["network"]["name"] == "diffusers:UNet2DModel" and plan["prediction"] == "epsilon"
    assert plan["moment"]["time"] == 700 and plan["moment"]["alpha"] == pytest.approx(0.4493, abs=1e-4)


def test_the_outcome_is_exported_and_checked(tmp_path):
    pytest.importorskip("onnxruntime")
    tiny(Run(tmp_path / "run", device="cpu", quiet=True), TINY).save(tmp_path / "run")
    assert cli.invoke(["export", str(tmp_path / "run"), "--to", "onnx"]) == 0
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "run/exports/one-step.onnx"))
    z, y = torch.randn(5, *SHAPE), torch.tensor([0, 3, 9, 1, 2])
    found = session.run(None, {"noise": z.numpy(), "condition": y.numpy()})[0]
    with torch.no_grad():
        expected = stillhouse.load(tmp_path / "run/students/one-step")(z, y)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)


# -- a user's own teacher --------------------------------------------------------------------------------------------


def saved_teacher(folder: Path, **scheduler) -> str:
    digits_unet((8, 8), seed=1).save_pretrained(folder / "unet")
    digits_scheduler(**scheduler).save_pretrained(folder / "scheduler")
    return str(folder)


OWN = ["--steps", "2", "--batch", "3", "--lora-targets", "attention", "--rank", "2", "--device", "cpu", "--quiet"]


def test_the_command_on_a_folder_of_diffusers(tmp_path):
    model = saved_teacher(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("3\n7\n")
    flags = ["--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--null-class", "10", "--t-init", "0.7"]
    assert cli.invoke(["run", "swiftbrush", *flags, *OWN, "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [i["title"] for i in report["images"]] == [
        "Teacher in 25 steps",
        "Teacher in one step",
        "Student in one step",
    ]
    assert stillhouse.load(tmp_path / "run/students/one-step").sample(torch.tensor([3])).shape == (1, *SHAPE)


def text_teacher():
    """A tiny text-conditional U-Net with an encoder of its own, as a user would give it."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
    )

    def encode(prompts):
        return torch.stack([torch.full((2, 6), float(len(p))) for p in prompts])

    return unet, scheduler, {"encode": encode, "null": torch.zeros(2, 6)}


def test_the_command_on_a_text_conditional_teacher_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('sb_own', {__file__!r})\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[1] / 'contract')]!r}\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "teacher = m.text_teacher\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "mine:teacher", "--prompts", "a fox", "two birds", *OWN[:4], "--rank", "2", *OWN[8:]]
    assert cli.invoke(["run", "swiftbrush", *flags, "--out", "run"]) == 0
    model = stillhouse.load("run/students/one-step")
    assert model.sample(torch.ones(3, 2, 6)).shape == (3, 4, 8, 8)
    assert (
        json.loads(Path("run/students/one-step/plan.json").read_text())["base"]["options"]["prediction"]
        == "v_prediction"
    )


MISTAKES = {
    "class out of range": (["--prompts", "12", "--null-class", "10", "--t-init", "0.7"], "12"),
    "the null class as a prompt": (["--prompts", "10", "--null-class", "10", "--t-init", "0.7"], "10"),
    "words for a class-conditional teacher": (["--prompts", "a fox", "--t-init", "0.7"], "a fox"),
    "another kind of prediction": (["--prediction", "v_prediction"], "prediction_type"),
    "a start where alpha is zero": (["--null-class", "10"], "divide"),
    "guidance without a null class": (["--t-init", "0.7"], "null"),
    "layers that are not there": (["--null-class", "10", "--t-init", "0.7", "--lora-targets", "to_z"], "to_z"),
    "pixels": (["--data", "digits"], "never sees an image"),
    "times": (["--low", "0.9", "--high", "0.5"], "low"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_two(name, tmp_path, capsys):
    flags, word = MISTAKES[name]
    model = saved_teacher(tmp_path / "teacher")
    base = ["run", "swiftbrush", "--model", model, *OWN, "--out", str(tmp_path / "run")]
    assert cli.invoke([*base, *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and word in said, said


def test_an_empty_list_of_prompts(tmp_path, capsys):
    (tmp_path / "none.txt").write_text("\n")
    model = saved_teacher(tmp_path / "teacher")
    flags = ["--model", model, "--prompts", str(tmp_path / "none.txt"), *OWN, "--out", str(tmp_path / "run")]
    assert cli.invoke(["run", "swiftbrush", *flags]) == 2 and "holds no prompt" in capsys.readouterr().err
    with pytest.raises(UserError, match="empty"):
        distill(Run(tmp_path / "r", quiet=True), unet_teacher(), torch.arange(0), SHAPE, TINY)
    with pytest.raises(UserError, match="no class of the teacher"):
        distill(Run(tmp_path / "r", quiet=True), unet_teacher(), torch.tensor([3, 11]), SHAPE, TINY)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"rank": 0}, {"t_init": 0.0}, {"t_init": 1.5}, {"clip": 0.0}, {"drop": 2.0}, {"ema": -1.0}],
)
def test_settings_out_of_range(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        replace(PRESET, **changes)


def test_public_names():
    assert swiftbrush.Config is Config and swiftbrush.distill is distill and swiftbrush.Prompts is Prompts
