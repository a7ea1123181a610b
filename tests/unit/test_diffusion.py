"""Forward processes, denoisers, exact scores, injected gradients, score distillation, LoRA: against closed forms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from stillhouse.checkpoint import Checkpoints
from stillhouse.data import Drawn
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.exact import Mixture, normal_quadrature, ring
from stillhouse.diffusion.lora import Adapted, adapters, check_twin, choose, second_tree
from stillhouse.diffusion.process import VP, Flow, View, check_first_step, guide, of_scheduler, scales_of, target
from stillhouse.diffusion.score import ScoreDistillation, Scores
from stillhouse.engine import fit
from stillhouse.errors import UserError
from stillhouse.objectives import inject
from stillhouse.run import Run
from stillhouse.system import Clock, Update
from stillhouse.teachers import state_fingerprint

F64 = torch.float64
PROCESSES = {"vp": VP.linear(), "flow": Flow()}
TIMES = {"vp": torch.tensor([0, 20, 500, 980]), "flow": torch.tensor([0.01, 0.3, 0.7, 0.98], dtype=F64)}
ADAM = partial(Update, optimizer=partial(torch.optim.Adam, lr=0.01))


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet(seed: int = 0, **options) -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            **{
                "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
                "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 8,
                "num_class_embeds": 4, **options,
            }
        )  # fmt: skip


class Free(nn.Module):
    """x_0 = θ."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = nn.Parameter(values.clone())

    def forward(self, batch) -> Tensor:
        return self.values[batch["index"]]


def distiller(student: nn.Module, teacher: Denoiser, fake: Denoiser | None, n: int, **scores) -> ScoreDistillation:
    return ScoreDistillation(student, teacher, fake, Scores(**scores), n, generator=ADAM, fake_update=ADAM)


# -- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction", "score"])
def test_every_form_of_a_true_prediction_gives_back_every_other(name, kind):
    process, t = PROCESSES[name], TIMES[name]
    x0, eps = rand(4, 3, 2), rand(4, 3, 2, seed=1)
    a, s = process.scales(t, x0)
    view = View(process, process.add_noise(x0, eps, t), t, kind, target(process, kind, x0, eps, t))
    for found, true in ((view.x0, x0), (view.eps, eps), (view.v, a * eps - s * x0), (view.velocity, eps - x0)):
        torch.testing.assert_close(found, true, rtol=0, atol=1e-9)
    torch.testing.assert_close(view.score * s, -eps, rtol=0, atol=1e-9)


def test_vp_is_what_the_scheduler_of_diffusers_does():
    x0, eps, t = (
        rand(4, 3, dtype=torch.float32),
        rand(4, 3, seed=1, dtype=torch.float32),
        torch.tensor([0, 1, 500, 999]),
    )
    for scheduler in (
        DDPMScheduler(),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    ):
        process, kind = of_scheduler(scheduler)
        torch.testing.assert_close(process.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t), rtol=1e-5, atol=1e-6)
        v = target(process, "v_prediction", x0, eps, t)
        torch.testing.assert_close(v, scheduler.get_velocity(x0, eps, t), rtol=1e-5, atol=1e-6)
        assert kind == scheduler.config.prediction_type
    ours, theirs = VP.linear().alpha_bar.float(), DDPMScheduler().alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_flow_is_what_the_scheduler_of_diffusers_does():
    scheduler = FlowMatchEulerDiscreteScheduler()
    process, kind = of_scheduler(scheduler)
    t = scheduler.timesteps[[10, 500]]
    x0, eps = rand(2, 3, dtype=torch.float32), rand(2, 3, seed=1, dtype=torch.float32)
    torch.testing.assert_close(process.add_noise(x0, eps, t / 1000), scheduler.scale_noise(x0, t, eps))
    assert kind == "flow_prediction" and torch.equal(process.network_time(torch.tensor([0.25])), torch.tensor([250.0]))


def test_times_cover_their_range_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    t = VP.linear().times(200_000, 0.02, 0.98, g)
    assert (int(t.min()), int(t.max())) == (20, 980)
    t = VP.linear().times(200_000, 0.0, 1.0, g)
    assert (int(t.min()), int(t.max())) == (0, 999)
    t = Flow().times(10_000, 0.2, 0.5, g)
    assert 0.2 <= float(t.min()) < 0.201 and 0.499 < float(t.max()) <= 0.5


def test_guidance_and_its_policies():
    no, yes = rand(2, 3), rand(2, 3, seed=1)
    assert torch.equal(guide(no, yes, 0), no)
    torch.testing.assert_close(guide(no, yes, 1), yes)
    w = 6.5  # the form of Imagen
    torch.testing.assert_close(guide(no, yes, 1 + w), yes + w * (yes - no))
    assert [scales_of(p, 3.0) for p in ("teacher_only", "both", "none")] == [(3, 1), (3, 3), (1, 1)]
    with pytest.raises(UserError, match="did you mean 'both'"):
        scales_of("bot", 3.0)


def test_schedulers_that_do_not_fit_are_refused_in_one_line():
    for make, match in (
        (
            lambda: of_scheduler(DDPMScheduler(), "v_prediction"),
            "said to predict 'v_prediction', but DDPMScheduler is set to",
        ),
        (lambda: of_scheduler(FlowMatchEulerDiscreteScheduler(), "epsilon"), "is set to 'flow_prediction'"),
        (lambda: of_scheduler(EDMEulerScheduler()), "alphas_cumprod or a FlowMatch one, got EDMEulerScheduler"),
        (lambda: of_scheduler(nn.Linear(1, 1)), "got Linear"),
        (lambda: VP([2.0, 1.0]), "numbers in"),
        (lambda: check_first_step(VP.linear(), 999, "epsilon"), "start at an earlier t"),
    ):
        with pytest.raises(UserError, match=match) as said:
            make()
        assert "\n" not in str(said.value)
    check_first_step(VP.linear(), 700, "epsilon")  # alpha_bar 0.0078
    check_first_step(VP.linear(), 999, "v_prediction")


# -- denoisers ------------------------------------------------------------------------------------------------------


def test_networks_are_called_as_they_want_to_be():
    x, t, c = rand(2, 1, 8, 8, dtype=torch.float32), torch.tensor([3, 7]), torch.tensor([0, 2])
    net = unet()
    teacher = Denoiser.of(net, DDPMScheduler(), null=3)
    with torch.no_grad():
        expected = net(x, t, class_labels=c).sample
        nothing = net(x, t, class_labels=torch.tensor([3, 3])).sample
        assert torch.equal(teacher.predict(x, t, c), expected)
        torch.testing.assert_close(teacher.view(x, t, c, 4.0).value, nothing + 4 * (expected - nothing))
        assert torch.equal(teacher.view(x, t, c, 0.0).value, nothing)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    third = Denoiser(lambda x, t, c: x + c[:, None, None, None], Flow(1.0), null=0)
    assert torch.equal(third.predict(x, t, c), x + c[:, None, None, None])
    named = Denoiser(lambda x, t, a, b: (x * a + b,), Flow(1.0), null={"a": torch.tensor(0.0), "b": torch.tensor(1.0)})
    cond = {"a": torch.full((2, 1, 1, 1), 2.0), "b": torch.zeros(2, 1, 1, 1)}
    torch.testing.assert_close(named.view(x, t, cond, 3.0).value, 1 + 3 * (2 * x - 1))


def test_text_conditions_and_their_null():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, cross_attention_dim=6,
    )  # fmt: skip
    null, text = rand(5, 6, dtype=torch.float32), rand(2, 5, 6, seed=1, dtype=torch.float32)
    teacher = Denoiser.of(net, DDPMScheduler(), null=null)
    x, t = rand(2, 1, 8, 8, dtype=torch.float32), torch.tensor([3, 7])
    with torch.no_grad():
        no, yes = (net(x, t, encoder_hidden_states=e).sample for e in (null.expand(2, 5, 6), text))
        torch.testing.assert_close(teacher.view(x, t, text, 7.5).value, no + 7.5 * (yes - no), rtol=1e-4, atol=1e-5)
    fake = Adapted(teacher, rank=2)
    check_twin(teacher, fake, x, text)


def test_a_score_is_asked_in_eval_mode_also_while_it_trains():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, t):
            return self.inner(x)

    score = Denoiser(Net(), Flow())
    x, t = rand(5, 2, dtype=torch.float32), torch.zeros(5)
    torch.testing.assert_close(score.view(x, t).value, net[0](x))
    assert net.training


def test_what_is_no_denoiser_is_refused_in_one_line():
    x = torch.zeros(2, 1, 8, 8)
    for network, match in (
        (nn.Linear(8, 8), r"Linear is no denoiser for samples \(1, 8, 8\)"),
        (lambda x, t: x[:, :, :4], "not the same"),
        (lambda x, t: "noise", "gives a tensor or something with 'sample', this one str"),
        (unet(out_channels=2, num_class_embeds=None), r"gives \(2, 2, 8, 8\)"),
    ):
        with pytest.raises(UserError, match=match) as said:
            Denoiser(network, VP.linear()).check(x)
        assert "\n" not in str(said.value)
    with pytest.raises(UserError, match="null class"):
        Denoiser(unet(), VP.linear()).view(x, torch.tensor([1, 1]), torch.tensor([0, 1]), 2.0)
    with pytest.raises(UserError, match="a denoiser is a network"):
        Denoiser("unet", VP.linear())


# -- exact scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_the_mixture_score_is_the_gradient_of_its_log_density(name, std):
    """Per class and over all, c = 0 (particles) included; by autograd in float64."""
    process, t = PROCESSES[name], TIMES[name][1:]
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    mixture = Mixture(rand(3, 2), std, process, weights=weights, classes=torch.tensor([0, 1, 0]))
    x = rand(3, 2, seed=5).requires_grad_()
    a, s = process.scales(t, x)
    for wanted in (-1, 0, 1):
        keep = (mixture.classes == wanted) | (wanted < 0)
        normal = torch.distributions.Normal(a[:, None] * mixture.means[keep], (a * a * std**2 + s * s).sqrt()[:, None])
        density = (normal.log_prob(x[:, None]).sum(-1) + weights[keep].log()).logsumexp(1)
        (expected,) = torch.autograd.grad(density.sum(), x)
        found = mixture.view(x.detach(), t, torch.full((3,), wanted))
        torch.testing.assert_close(found.score, expected, rtol=1e-9, atol=1e-9)
    unconditional = mixture.view(x.detach(), t).value
    assert torch.equal(unconditional, mixture.view(x.detach(), t, torch.tensor([0, 1, 1]), 0.0).value)


def test_a_gaussian_and_a_dirac_by_hand():
    process, t = Flow(), torch.tensor([0.4], dtype=F64)
    m, c, x = 1.5, 0.5, torch.tensor([[0.2]], dtype=F64)
    a, s = 0.6, 0.4
    by_hand = m + a * c**2 / (a**2 * c**2 + s**2) * (0.2 - a * m)
    found = Mixture(torch.tensor([[m]], dtype=F64), c, process).view(x, t).x0
    assert float(found) == pytest.approx(by_hand, abs=1e-14)
    assert float(Mixture(torch.tensor([[m]], dtype=F64), 0.0, process).view(x, t).x0) == m


def test_particles_that_move_are_seen_where_they_are():
    points = nn.Parameter(torch.zeros(2, 2, dtype=F64))
    score = Mixture(points, 0.0, Flow())
    with torch.no_grad():
        points.add_(3)
    found = score.view(rand(1, 2), torch.tensor([0.5])).x0
    torch.testing.assert_close(found, torch.full((1, 2), 3.0, dtype=F64))
    assert not found.requires_grad


def test_the_ring_and_its_draws():
    target_ = ring(VP.linear(), dtype=F64)
    torch.testing.assert_close(target_.means.norm(dim=1), torch.ones(8, dtype=F64))
    x = target_.sample(40_000, torch.Generator().manual_seed(0), condition=2)
    torch.testing.assert_close(x.mean(0), torch.tensor([0.0, 1.0], dtype=F64), rtol=0, atol=3e-3)
    torch.testing.assert_close(x.std(0), torch.tensor([0.1, 0.1], dtype=F64), rtol=0, atol=2e-3)


def test_quadrature_has_the_moments_of_a_normal():
    z, w = normal_quadrature(12)
    assert [float((w * z**k).sum()) for k in (0, 1, 2, 4, 6)] == pytest.approx([1, 0, 1, 3, 15], abs=1e-11)


# -- injection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_inject_gives_exactly_the_gradient(dtype):
    """Also where x is so large that x − (x − g) is not g."""
    x = (1e4 * rand(3, 2, 4)).to(dtype).requires_grad_()
    g = rand(3, 2, 4, seed=1).to(dtype)
    values = inject(x, g)
    values.sum().backward()
    assert torch.equal(x.grad, g)
    torch.testing.assert_close(values.detach(), 0.5 * g.to(values).square().flatten(1).sum(1))


def test_inject_reaches_parameters_by_the_chain_rule_and_not_g():
    w = rand(2, 3).requires_grad_()
    z, g = rand(5, 2, seed=1), rand(5, 3, seed=2).requires_grad_()
    inject(z @ w, g).mean().backward()
    torch.testing.assert_close(w.grad, z.T @ g.detach() / 5)
    assert g.grad is None
    with pytest.raises(UserError, match="one shape"):
        inject(z, g)


# -- score distillation ------------------------------------------------------------------------------------------


def toy(n: int = 6) -> tuple[Tensor, VP, Mixture]:
    process = VP.linear()
    return rand(n, 2, seed=3), process, ring(process, dtype=F64)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 6), ("mean", 12)])
def test_the_students_gradient_is_g_over_n_or_over_all_elements(reduction, factor):
    values, process, teacher = toy()
    system = distiller(Free(values), teacher, Mixture(values, 0.05, process), 6, reduction=reduction)
    batch, clock = {"index": torch.arange(6)}, Clock(seed=1)
    system.generator(batch, clock).total.backward()
    t, eps = system.noise(batch, clock, values, "student", 0.02, 0.98)
    x_t = process.add_noise(values, eps, t)
    e_teacher, e_fake = (-s.view(x_t, t).score * process.scales(t, x_t)[1] for s in (teacher, system.fake_score))
    g = (1 - process.alpha_bar[t])[:, None] * (e_teacher - e_fake)
    torch.testing.assert_close(system.student.values.grad, g / factor, rtol=1e-9, atol=1e-12)


def test_the_weight_of_dmd_is_the_difference_of_clean_samples_over_the_teachers_distance():
    values, process, teacher = toy()
    fake = Mixture(values, 0.05, process)
    system = distiller(Free(values), teacher, fake, 6, weight="dmd")
    t, eps = torch.tensor([30, 100, 300, 500, 700, 900]), rand(6, 2)
    x_t = process.add_noise(values, eps, t)
    real, false = teacher.view(x_t, t).x0, fake.view(x_t, t).x0
    by_hand = (false - real) / (values - real).abs().mean(1, keepdim=True).clamp_min(0.01)
    torch.testing.assert_close(system.direction(values, t, eps, {}), by_hand, rtol=1e-6, atol=1e-9)


def test_teacher_and_fake_see_the_same_noised_sample_and_the_fake_trains_on_another():
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"teacher": [], "fake": []}

    class Spy(nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.name, self.w = name, nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, x, t):
            seen[self.name].append((x.detach().clone(), t.clone()))
            return x * self.w

    process, values = VP.linear(), rand(6, 2)
    teacher = Denoiser(Spy("teacher"), process).freeze()
    fake = Denoiser(Spy("fake"), process).trainable_copy()
    system = distiller(Free(values), teacher, fake, 6)
    batch = {"index": torch.arange(6)}
    system.generator(batch, Clock()).total.backward()
    (x_t, t), (x_f, t_f) = seen["teacher"][0], seen["fake"][0]
    assert torch.equal(x_t, x_f) and torch.equal(t, t_f)
    assert all(p.grad is None for p in [*teacher.network.parameters(), *system.fake_weights.parameters()])
    with torch.no_grad():
        system.student.values.add_(1)  # the student's step; the fake still trains on what was rendered
    system.student.values.grad = None
    for turn in (0, 1):
        system.fake(batch, Clock(turn=turn)).total.backward()
    assert system.student.values.grad is None and all(p.grad is not None for p in system.fake_weights.parameters())
    (x_1, t_1), (x_2, t_2) = seen["fake"][1:]
    assert not torch.equal(t_1, t) and not torch.equal(t_1, t_2) and not torch.equal(x_1, x_2)
    alpha, sigma = process.scales(t_1, values)
    eps = system.noise(batch, Clock(), values, "fake", 0.0, 1.0)[1]
    torch.testing.assert_close(x_1, alpha * values + sigma * eps)


def test_the_fakes_loss_is_denoising_in_its_own_kind_and_may_be_weighed():
    process, x0 = VP.linear(), rand(4, 2)
    zero = nn.Linear(2, 2).double()
    zero.forward = lambda x, t: 0 * x + 0 * zero.weight.sum()  # type: ignore[method-assign]
    batch = {"index": torch.arange(4)}
    for kind in ("epsilon", "v_prediction"):
        fake = Denoiser(zero, process, kind)
        fake.weights = zero
        for weight in ("one", "alpha2"):
            system = distiller(Free(x0), ring(process, dtype=F64), fake, 4, fake_weight=weight)
            t, eps = system.noise(batch, Clock(), x0, "fake", 0.0, 1.0)
            a, s = process.scales(t, x0)
            error = (eps if kind == "epsilon" else a * eps - s * x0).square().mean(1, keepdim=True)
            expected = (error * (a * a if weight == "alpha2" else 1)).mean()
            torch.testing.assert_close(system.fake(batch, Clock()).total, expected)


def test_the_range_of_times_narrows():
    scores = Scores(late_high=0.5, late_from=0.25)
    assert [scores.times(Clock(step=s, steps=8))[1] for s in (0, 1, 2, 7)] == [0.98, 0.98, 0.5, 0.5]
    assert Scores().times(Clock(step=7, steps=8)) == (0.02, 0.98)


def test_conditions_and_cameras_are_dropped_alone_or_all_at_once():
    values, process, teacher = toy(400)
    fake = Mixture(values, 0.1, process)
    batch = {"index": torch.arange(400), "condition": torch.zeros(400, dtype=torch.int64), "camera": torch.ones(400, 3)}
    single = distiller(Free(values), teacher, fake, 400, drop=0.25, drop_camera=0.5)
    condition, camera = single.dropped(batch, Clock())
    assert 60 < int((condition == -1).sum()) < 140 and set(condition.tolist()) == {0, -1}
    assert 150 < int((camera == 0).all(1).sum()) < 250 and bool(((camera == 0).all(1) | (camera == 1).all(1)).all())
    whole = distiller(Free(values), teacher, fake, 400, drop=0.25, drop_whole=True)
    sets = [set(whole.dropped(batch, Clock(step=s))[0].tolist()) for s in range(60)]
    assert all(len(s) == 1 for s in sets) and 5 <= sum(s == {-1} for s in sets) <= 28


def test_draws_do_not_depend_on_how_the_batch_is_split():
    values, _, teacher = toy(7)
    system = distiller(Free(values), teacher, None, 7)
    whole = system.noise({"index": torch.arange(7)}, Clock(), values, "student", 0.0, 1.0)
    for clock, part in ((Clock(rank=1, world=2), slice(4, 7)), (Clock(micro=1, micros=2), slice(4, 7))):
        found = system.noise({"index": torch.arange(7)[part]}, clock, values, "student", 0.0, 1.0)
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True))


def test_settings_that_cannot_be():
    for change in ({"low": 0.5, "high": 0.5}, {"high": 1.2}, {"drop": 2.0}, {"late_high": 0.01}, {"guidance": "all"}):
        with pytest.raises(UserError):
            Scores(**change)


# -- LoRA -----------------------------------------------------------------------------------------------------------


def test_adapters_share_the_base_and_start_as_it():
    net = unet()
    teacher = Denoiser.of(net, DDPMScheduler(), null=3)
    before, names = state_fingerprint(net), [n for n, _ in net.named_modules()]
    fake = Adapted(teacher, rank=2, camera=5)
    x, c, t = rand(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0, 1]), torch.tensor([5, 900])
    check_twin(teacher, fake, x, c)
    with torch.no_grad():
        said = teacher.predict(x, t, c)
        assert torch.equal(fake.predict(x, t, c), said)  # B = 0
        for p in fake.parameters():
            p.add_(0.1)
        assert not torch.allclose(fake.predict(x, t, c), said, atol=1e-3)
        with adapters(fake.network, on=False):
            assert torch.equal(fake.predict(x, t, c), said)
        assert not torch.allclose(fake.predict(x, t, c), said, atol=1e-3)
        assert torch.equal(teacher.predict(x, t, c), said)
        one, two = (fake.predict(x, t, c, camera=torch.full((2, 5), v)) for v in (0.0, 1.0))
        assert not torch.allclose(one, two, atol=1e-4)
    assert state_fingerprint(net) == before and [n for n, _ in net.named_modules()] == names
    base = {id(p) for p in net.parameters()}
    assert base <= {id(p) for p in fake.network.parameters()}, "the base is stored twice"
    assert not base & {id(p) for p in fake.parameters()}
    assert all(p.requires_grad for p in fake.parameters())


def test_the_camera_is_told_by_the_time_embedding_and_starts_silent():
    fake = Adapted(Denoiser.of(unet(), DDPMScheduler(), null=3), camera=2)
    x, c, t = rand(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0, 1]), torch.tensor([5, 900])
    with torch.no_grad():
        assert torch.equal(fake.predict(x, t, c, camera=torch.ones(2, 2)), fake.predict(x, t, c))
    assert not fake.network.time_embedding._forward_hooks
    with pytest.raises(UserError, match="time_embedding"):
        Adapted(Denoiser(nn.Sequential(nn.Linear(2, 2)), Flow()), camera=2)


def test_only_adapters_move_and_only_they_are_saved(tmp_path):
    net = unet()
    teacher = Denoiser.of(net, DDPMScheduler(), null=3)
    before = state_fingerprint(net)
    fake = Adapted(teacher, rank=2, camera=3)
    system = distiller(Free(rand(4, 1, 8, 8, dtype=torch.float32)), teacher, fake, 4, kappa=2.0, drop_camera=0.5)
    start = {k: v.clone() for k, v in system.state_dict().items()}

    def draw(n: int, g: torch.Generator):
        return {"index": torch.arange(n), "condition": torch.arange(n) % 3, "camera": torch.randn(n, 3, generator=g)}

    run = Run(tmp_path, device="cpu", quiet=True)
    fit(run, "s", system, Drawn(draw, 4, "x"), steps=4)
    assert state_fingerprint(net) == before
    assert all(p.grad is None for p in net.parameters())
    moved = {k for k, v in system.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == set(start), set(start) - moved
    kept = Checkpoints(run.stage("s"), True)
    saved = {k.split("/")[1].split(".")[0] for k in kept.open(kept.last)[0] if k.startswith("system/")}
    assert saved == {"student", "fake_weights"}
    assert sum(v.numel() for k, v in start.items() if "lora" in k) == sum(p.numel() for p in fake.weights["lora"])


def test_layers_are_chosen_by_kind_or_by_name():
    net = unet()
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    attention, convolutions = choose(net, ["attention"]), choose(net, ["convolutions"])
    assert attention and all(n.rpartition("attentions.")[1] for n in attention)
    assert set(convolutions) == {n for n, m in layers.items() if isinstance(m, nn.Conv2d)}
    assert choose(net) == attention + convolutions
    assert {n.rpartition(".")[2] for n in choose(net, ["to_q", "conv1"])} == {"to_q", "conv1"}
    assert choose(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0", "2"]
    with pytest.raises(UserError, match=r"'to_w' matches no layer of UNet2DModel; did you mean .*'to_"):
        choose(net, ["to_q", "to_w"])
    with pytest.raises(UserError, match="no linear layers or convolutions"):
        choose(nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match="rank"):
        Adapted(Denoiser.of(net, DDPMScheduler()), rank=0)


def test_a_second_tree_shares_every_tensor():
    net = unet()
    twin = second_tree(net)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in net.parameters()]
    assert not {id(m) for m in twin.modules()} & {id(m) for m in net.modules()}


def test_a_trainable_copy_is_apart():
    teacher = Denoiser.of(unet(), DDPMScheduler(), null=3)
    copy = teacher.trainable_copy()
    assert all(p.requires_grad for p in copy.parameters()) and not any(
        p.requires_grad for p in teacher.network.parameters()
    )
    assert not {id(p) for p in copy.parameters()} & {id(p) for p in teacher.network.parameters()}
    system = distiller(Free(rand(4, 1, 8, 8, dtype=torch.float32)), teacher, copy, 4, ema=0.5)
    assert {u.name for u in system.updates()} == {"generator", "fake"}
    with torch.no_grad():
        system.student.values.add_(1)
    before = system.average.model.values.clone()
    system.after_step(Clock())
    torch.testing.assert_close(system.outcome().values, before + 0.5)
    assert {u.name for u in replace_fake(system, None).updates()} == {"generator"}


def replace_fake(system: ScoreDistillation, fake: Denoiser | None) -> ScoreDistillation:
    return distiller(system.student, system.teacher, fake, 4, **vars(replace(system.scores)))


def test_a_diffusion_transformer_is_a_teacher_too():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=4, norm_num_groups=1,
    )  # fmt: skip
    teacher = Denoiser.of(net, DDPMScheduler(), null=4)
    x, c = rand(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0, 3])
    teacher.check(x, c)
    check_twin(teacher, Adapted(teacher, rank=2, targets=["attention"]), x, c)
    assert teacher.view(x, torch.tensor([5, 900]), c, 2.0).eps.shape == x.shape


# -- the user's teacher ---------------------------------------------------------------------------------------------


def test_a_network_that_is_not_what_its_scheduler_says_is_noted():
    from stillhouse.diffusion.loading import Loaded, plain, suspicion

    exact = ring(VP.linear())
    for said in ("epsilon", "sample", "v_prediction"):
        for kind in ("epsilon", "sample", "v_prediction"):
            form = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[kind]
            network = Denoiser(lambda x, t, f=form: getattr(exact.view(x, t), f), exact.process, said)
            doubt = suspicion(Loaded("mine", network, (2,), None, plain, []))
            assert (doubt is not None) == ((said == "epsilon") != (kind == "epsilon")), (said, kind, doubt)


def test_a_function_may_return_a_denoiser_and_what_surrounds_it(tmp_path, monkeypatch):
    from stillhouse.diffusion.loading import load_teacher

    (tmp_path / "mine_teacher.py").write_text(
        "import torch\nfrom stillhouse.diffusion.exact import ring\nfrom stillhouse.diffusion.process import VP\n"
        "def exact():\n"
        "    return ring(VP.linear()), {'shape': (2,), 'encode': lambda names: torch.tensor([len(n) for n in names])}\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load_teacher("mine_teacher:exact")
    assert loaded.shape == (2,) and loaded.denoiser.null == -1 and loaded.notes == []
    assert loaded.conditions(["a", "abc"]).tolist() == [1, 3]
    for prompts in ([], ["a", " "]):
        with pytest.raises(UserError, match="empty"):
            loaded.conditions(prompts)
