"""Variational score distillation over live objects: a frozen denoiser, conditions, and whatever renders.

The built-in experiment::

    stillhouse run prolificdreamer_vsd --out runs/vsd

From Python, with a diffusion model and a renderer of your own::

    teacher = Denoiser.of(unet, scheduler, null=10)
    made = distill(run, teacher, torch.tensor([3, 7]), (1, 8, 8), Config(particles=16), scene=my_renderer)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data import Drawn
from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.diffusion.lora import Adapted, check_twin
from stillhouse.diffusion.prompts import count_of
from stillhouse.diffusion.score import ScoreDistillation, Scores
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.outcomes import DataSet, Member, Models
from stillhouse.recipes.prolificdreamer_vsd.scenes import Images, Student, drawn
from stillhouse.system import Update, fold, map_tensors
from stillhouse.weights import cosine, linear_warmup


@dataclass(frozen=True)
class Config:
    """Settings of a VSD run; every field is a flag."""

    prompts: tuple[str, ...] = ()  # what to make: class numbers, or texts where the teacher has a text encoder
    particles: int = 4  # per prompt
    loss: Literal["vsd", "sds"] = "vsd"  # the fake score, or the noise itself in its place
    kappa: float = 7.5  # guidance of the teacher, p(no) + kappa (p(y) - p(no)); the fake has none (SDS papers: 100)
    steps: int = 5000  # steps of the particles
    batch: int = 0  # renders in a step, particles drawn without repetition; 0: all, but at most 64
    lr: float = 0.03  # Adam, betas (0.9, 0.99), of free images in [-1, 1]; NeRFs: 1e-3; falls to 0 as a cosine
    init: float = 0.5  # standard deviation of the first images
    low: float = 0.02  # least noise, part of the way
    high: float = 0.98  # most noise
    late_high: float = 0.5  # most noise from late_from on
    late_from: float = 0.2  # part of the run after which late_high holds; 1 never
    weight: Literal["sigma2", "one", "dmd"] = "sigma2"  # w(t) of the gradient
    rank: int = 4  # of the fake's LoRA
    lora_alpha: float = 4.0  # scale of the LoRA is lora_alpha / rank
    lora_targets: tuple[str, ...] = ()  # attention, convolutions, linear, names of layers; none: the first two
    fake_lr: float = 1e-4  # AdamW of the fake
    fake_warmup: int = 500  # steps over which fake_lr grows
    fake_repeat: int = 1  # steps of the fake for one of the particles
    drop_camera: float = 0.1  # part of the fake's samples trained without their camera
    views: tuple[str, ...] = ()  # words put behind a prompt for the teacher, chosen by what the renderer draws as view
    renderer: str = ""  # your own renderer, package.module:function; none: free images
    null_class: int | None = None  # the teacher's label for "no class", for guidance
    prediction: Literal["auto", "epsilon", "sample", "v_prediction", "flow_prediction"] = "auto"  # of the teacher

    def __post_init__(self) -> None:
        if self.particles < 1 or self.steps < 1 or self.batch < 0:
            said = f"{self.particles}, {self.steps}, {self.batch}"
            raise UserError(f"particles and steps must be at least 1 and batch at least 0, got {said}")
        self.scores()

    def scores(self) -> Scores:
        """The part of the settings that is about scores."""
        return Scores(
            kappa=self.kappa, guidance="teacher_only", weight=self.weight, low=self.low, high=self.high,
            late_high=self.late_high, late_from=self.late_from, drop_camera=self.drop_camera,
        )  # fmt: skip


def distill(
    run: Run,
    teacher: Denoiser,
    conditions: Condition,
    shape: tuple[int, ...],
    cfg: Config | None = None,
    *,
    scene: nn.Module | None = None,
    spec: ModelSpec | None = None,
    fake: Callable[[nn.Module], Denoiser] | None = None,
    viewed: Condition = None,
) -> DataSet | Models:
    """Moves ``cfg.particles`` particles for each condition until a frozen teacher finds them likely.

    Args:
        run: folder, seed, device.
        teacher: the diffusion model; never changed.
        conditions: of k prompts: labels (k,), embeddings (k, l, d), a mapping of such; None for none (k = 1).
        shape: of one x_0.
        cfg: settings.
        scene: what is moved, for k·particles particles, numbered prompt by prompt (see `scenes.Scene`); None takes
            free images.
        spec: how the scene is built again.
        fake: gives an exact fake score of the scene; None trains a LoRA of the teacher.
        viewed: the teacher's conditions with view words, k·v of them, prompt by prompt.

    Returns:
        Free images as a `DataSet` (``particles``, ``prompt``), anything else as `Models` with the member ``scene``.

    Raises:
        UserError: no conditions, a teacher that is no denoiser, LoRA targets that match nothing.
    """
    cfg = cfg or Config()
    count = 1 if conditions is None else count_of(conditions)
    if not count:
        raise UserError("the list of prompts is empty; give at least one condition")
    n = count * cfg.particles
    scene = Images(n, shape, cfg.init, run.seed) if scene is None else scene
    student, size = Student(scene).to(run.device), cfg.batch or min(n, 64)
    draw = partial(renders, scene, conditions, viewed, n, cfg.particles)
    first = map_tensors(draw(min(size, 2), torch.Generator().manual_seed(0)), lambda v: v.to(run.device))
    check(teacher, student, first, shape, cfg)
    score: Denoiser | None = None
    if cfg.loss == "vsd":
        score = fake(scene) if fake else make_fake(teacher, cfg, first, shape, run)
    system = ScoreDistillation(
        student, teacher, score, cfg.scores(), size,
        generator=partial(Update, optimizer=partial(torch.optim.Adam, lr=cfg.lr, betas=(0.9, 0.99)), lr=cosine()),
        fake_update=partial(
            Update, optimizer=partial(torch.optim.AdamW, lr=cfg.fake_lr), lr=linear_warmup(cfg.fake_warmup),
            repeat=cfg.fake_repeat,
        ),
    )  # fmt: skip
    fit(run, "vsd", system, Drawn(draw, size, f"particles {n}"), steps=cfg.steps, settings=cfg)
    return outcome(scene.cpu().eval(), cfg, spec)


def renders(
    scene: nn.Module, conditions: Condition, viewed: Condition, n: int, each: int, size: int, generator: torch.Generator
) -> dict[str, Any]:
    """What a step renders: particles without repetition (as far as they reach), what the scene draws, conditions."""
    orders = [torch.randperm(n, generator=generator) for _ in range(-(-size // n))]
    particle = torch.cat(orders)[:size]
    batch: dict[str, Any] = {"index": torch.arange(size), "particle": particle, **drawn(scene, size, generator)}
    if conditions is not None:
        batch["condition"] = _rows(conditions, particle // each)
    if viewed is not None:
        if "view" not in batch:
            raise UserError("view words need a renderer whose draw() says which view it shows: view, (n,) int64")
        row = particle // each * (count_of(viewed) * each // n)
        batch["teacher_condition"] = _rows(viewed, row + batch["view"])
    return batch


def check(teacher: Denoiser, student: Student, batch: dict[str, Any], shape: tuple[int, ...], cfg: Config) -> None:
    """Refuses here, in one line, what would fail at the first step."""
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError(f"the renderer {type(student.scene).__name__} has no parameters that train")
    with torch.no_grad():
        x0 = student(batch)
    if tuple(x0.shape[1:]) != tuple(shape):
        raise UserError(f"the renderer gives {tuple(x0.shape[1:])} for a sample, the teacher wants {tuple(shape)}")
    teacher.check(x0, batch.get("condition"))
    if "condition" in batch and cfg.kappa != 1:
        teacher.no_condition(batch["condition"])


def make_fake(teacher: Denoiser, cfg: Config, batch: dict[str, Any], shape: tuple[int, ...], run: Run) -> Denoiser:
    """A LoRA of the teacher that is told the camera where there is one."""
    fake = Adapted(
        teacher, rank=cfg.rank, alpha=cfg.lora_alpha, targets=cfg.lora_targets,
        camera=batch["camera"].shape[1] if "camera" in batch else 0, seed=fold(run.seed, "lora"),
    )  # fmt: skip
    check_twin(teacher, fake, torch.ones(len(batch["index"]), *shape, device=run.device), batch.get("condition"))
    return fake


def outcome(scene: nn.Module, cfg: Config, spec: ModelSpec | None) -> DataSet | Models:
    """Images as a data set, a renderer or generator as a model."""
    if isinstance(scene, Images):
        values = scene.values.detach().clone()
        prompt = torch.arange(len(values)) // cfg.particles
        facts = {"method": "prolificdreamer_vsd", "loss": cfg.loss, "kappa": cfg.kappa, "prompts": list(cfg.prompts)}
        facts["values"] = "x_0 of the teacher: pixels in [-1, 1], or latents"
        return DataSet({"particles": values, "prompt": prompt}, facts)
    inputs = {"particle": torch.zeros(1, dtype=torch.int64), **drawn(scene, 1, torch.Generator().manual_seed(0))}
    return Models([Member("scene", scene, spec=spec)], inputs)


def _rows(values: Condition, index: Tensor) -> Condition:
    return map_tensors(values, lambda v: v[index])
