"""DDIM against diffusers, one-step models, denoising as training, digits and points in the plane."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.denoising import Denoising, train_denoiser
from stillhouse.diffusion.digits import (
    NULL,
    SHAPE,
    all_of,
    digits,
    digits_judge,
    digits_scheduler,
    digits_teacher,
    digits_unet,
)
from stillhouse.diffusion.exact import Mixture, ring
from stillhouse.diffusion.metrics import energy_distance
from stillhouse.diffusion.planar import planar_denoiser
from stillhouse.diffusion.process import VP, Flow
from stillhouse.diffusion.sampling import Moment, OneStep, build_one_step, ddim, one_step_spec, trailing
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.run import Run
from stillhouse.system import Clock


def quiet(folder) -> Run:
    return Run(folder, device="cpu", quiet=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_ddim_is_that_of_diffusers(prediction, steps):
    from diffusers import DDIMScheduler

    config = digits_scheduler(prediction, "linear").config
    theirs = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=True)
    theirs.set_timesteps(steps)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()  # rounding of ε is amplified by 1/α, 158 at t = 999
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    teacher = Denoiser.of(digits_unet((8, 8)).double(), digits_scheduler(prediction, "linear"), null=NULL)
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(3, *SHAPE, generator=g, dtype=torch.float64), torch.tensor([1, 2, 3])
    x = z
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(teacher.network(x, t, class_labels=y).sample, t, x).prev_sample
    assert trailing(teacher.process, steps) == theirs.timesteps.tolist()
    assert torch.allclose(ddim(teacher, z, y, steps=steps, clip=1.0), x, atol=1e-10)


def test_ddim_of_an_exact_flow_reaches_the_data():
    teacher = ring(Flow(1.0), std=0.05)
    made = ddim(teacher, torch.randn(800, 2, generator=torch.Generator().manual_seed(0)), steps=60)
    assert energy_distance(made, teacher.sample(800, torch.Generator().manual_seed(1))) < 0.01


def test_guided_sampling_takes_the_condition_from_noise_to_its_mode():
    teacher = ring(Flow(1.0))
    made = ddim(teacher, torch.randn(50, 2), torch.full((50,), 3), kappa=1.0)
    assert (made - teacher.means[3]).norm(dim=1).max() < 0.6


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 3, "first": 0.0}, {"steps": 3, "first": 1.5}])
def test_bad_numbers_of_steps(bad):
    with pytest.raises(UserError, match="steps"):
        trailing(Flow(), **bad)


# -- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_one_step_model_is_one_step_of_ddim(kind):
    teacher = Denoiser.of(digits_unet((8, 8)), digits_scheduler(kind), null=NULL)
    z, y = torch.randn(3, *SHAPE), torch.tensor([1, 2, 3])
    model = OneStep.of(teacher, 0.7, SHAPE)
    assert torch.allclose(model(z, y), ddim(teacher, z, y, times=[700]), atol=1e-5)
    again = build_one_step(**_options(one_step_spec(model, ModelSpec.of(model.network))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(z, y), model(z, y))


def _options(spec: ModelSpec) -> dict:
    return {"shape": spec.shape, **spec.options}


def test_a_one_step_model_is_a_copy_in_full_precision():
    teacher = Denoiser.of(digits_unet((8, 8)).half(), digits_scheduler("v_prediction"))
    model = OneStep.of(teacher, 1.0, SHAPE)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float16}


def test_noise_prediction_cannot_start_where_nothing_is_left():
    teacher = Denoiser.of(digits_unet((8, 8)), digits_scheduler())
    with pytest.raises(UserError, match=r"alpha_bar .* < 0.001"):
        OneStep.of(teacher, 1.0, SHAPE)
    with pytest.raises(UserError, match=r"torch\.nn\.Module"):
        OneStep.of(ring(Flow()), 0.7, (2,))


def test_sampling_without_conditions_and_with_a_mapping():
    class Net(nn.Module):
        def forward(self, x, t, shift=0.0):
            return x + shift

    model = OneStep(Net(), Moment.of(Flow(), 1.0), "sample", (2,))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.sample(None, torch.Generator().manual_seed(0), 5), z)
    shift = torch.arange(5.0)[:, None]
    assert torch.equal(model.sample({"shift": shift}, torch.Generator().manual_seed(0)), z + shift)


# -- denoising -------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Answers w, whatever it is asked; remembers the labels."""

    def __init__(self, w: float = 0.0):
        super().__init__()
        self.w, self.labels = nn.Parameter(torch.tensor(w)), []

    def forward(self, sample, timestep, class_labels=None):
        self.labels.append(class_labels)
        return self.w.expand_as(sample)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_of_denoising_is_the_mean_square_to_the_target(kind):
    process, x0 = VP.linear(), torch.full((20000, 1), 2.0)
    of = Denoiser(Constant(), process, kind, null=NULL)
    loss = float(
        Denoising(of, drop=0.0).denoise({"input": x0, "label": torch.zeros(20000).long()}, Clock()).total.detach()
    )
    a2 = process.alpha_bar
    expected = {"epsilon": 1.0, "sample": 4.0, "v_prediction": float((a2 + 4 * (1 - a2)).mean())}[kind]
    assert loss == pytest.approx(expected, rel=0.03)


def test_labels_are_dropped_at_their_rate_and_sample_by_sample():
    net = Constant()
    system = Denoising(Denoiser(net, VP.linear(), null=NULL), drop=0.25)
    system.denoise({"input": torch.zeros(8000, 1), "label": torch.full((8000,), 3)}, Clock())
    gone = net.labels[0] == NULL
    assert set(net.labels[0].tolist()) == {3, NULL} and float(gone.double().mean()) == pytest.approx(0.25, abs=0.02)


def test_the_outcome_is_the_average_frozen():
    system = Denoising(Denoiser(Constant(0.0), VP.linear()), drop=0.0, ema=0.5)
    with torch.no_grad():
        system.network.w.fill_(1.0)
    system.after_step(Clock(step=0))  # warm-up: decay 1/10
    system.after_step(Clock(step=100))  # then 0.5
    made = system.outcome()
    assert float(made.network.w) == pytest.approx(0.95) and not made.network.w.requires_grad
    assert float(system.network.w.detach()) == 1


def test_denoising_of_a_line_finds_the_posterior_mean(tmp_path):
    """A linear network trained on N(m, c²) at one noise level has the optimum of `Mixture`."""
    teacher = Mixture(torch.tensor([[1.0, -1.0]]), 0.5, Flow(1.0))
    start = planar_denoiser(quiet(tmp_path), teacher, steps=400)
    x, t = torch.randn(200, 2), torch.full((200,), 0.5)
    assert (start.view(x, t).x0 - teacher.view(x, t).x0).abs().mean() < 0.1


def test_a_null_class_that_does_not_fit_is_refused(tmp_path):
    data = digits().train
    for null in (3, 11):
        with pytest.raises(UserError, match="null class"):
            train_denoiser(quiet(tmp_path), "t", digits_unet((8, 8)), digits_scheduler(), data, null=null, steps=1)
    with pytest.raises(UserError, match="what stands for no label"):
        Denoising(Denoiser(Constant(), VP.linear()), drop=0.1)
    with pytest.raises(UserError, match=r"torch\.nn\.Module"):
        Denoising(ring(Flow()), drop=0.0)


# -- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_the_data_module():
    from stillhouse.data import load

    ours, theirs = digits(), load("digits")
    assert (ours.train.labels == theirs.train.labels).all() and (ours.test.labels == theirs.test.labels).all()
    x, _ = all_of(ours.train)
    assert float(x.min()) == -1 and float(x.max()) == 1
    y, _ = all_of(theirs.train)
    slope = torch.cov(torch.stack([x.flatten(), y.flatten()]).double())
    assert float(slope[0, 1] ** 2 / slope[0, 0] / slope[1, 1]) == pytest.approx(1, abs=1e-5)  # the same up to scale


def test_the_teacher_is_trained_once_and_then_loaded(tmp_path):
    first = digits_teacher(quiet(tmp_path), widths=(8, 8), steps=3, batch=8)
    state = copy.deepcopy(first.network.state_dict())
    again = digits_teacher(quiet(tmp_path), widths=(8, 8), steps=3, batch=8)
    assert all(torch.equal(v, state[k]) for k, v in again.network.state_dict().items())
    assert first.null == NULL and first.prediction == "epsilon" and not first.network.training


def test_the_judge_knows_real_digits_and_refuses_to_judge_when_it_does_not(tmp_path):
    judge = digits_judge(quiet(tmp_path / "a"))
    x, y = all_of(digits().test)
    found = judge(x, y)
    assert found["accuracy"] >= 0.97 and found["precision"] > 0.8 and found["recall"] > 0.8
    noise = judge(torch.randn(500, *SHAPE), torch.arange(500) % 10)
    assert noise["fd"] > 20 * found["fd"] and noise["accuracy"] < 0.5
    with pytest.raises(UserError, match="judge"):
        digits_judge(quiet(tmp_path / "b"), epochs=0.1)
