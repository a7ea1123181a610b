"""Plain distillation over live objects, which many systems begin with or compare themselves to.

`distill` teaches a student by any sum of objectives; `train_teacher` trains by labels alone; both from one `Plain`.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.comparisons import ON_LOGITS, Objective, taps_of
from stillhouse.data import Batches, Data, Samples, prefetch
from stillhouse.data.cache import SignalCache
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, count_params, evaluating, logits_of
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.outcomes import Member
from stillhouse.students.reuse import reuse_head
from stillhouse.system import Schedule, Teacher, map_tensors
from stillhouse.teachers import Asked, Cached, Ensemble, Frozen, Normalisation, read_by_teachers
from stillhouse.weights import cosine


@dataclass(frozen=True)
class Plain:
    """Settings of a plain distillation; every field is a flag of ``stillhouse distill``."""

    objective: tuple[str, ...] = ("kd:0.9?T=4",)  # NAME[:STUDENT=TEACHER][:WEIGHT][?OPTION=VALUE&…]; see the page
    label: float = 0.1  # weight of the labels' cross-entropy
    label_smoothing: float = 0.0  # part of each label that is spread over all classes
    teacher_epochs: float = 0.0  # train the teacher first, for so many passes; 0 takes it as it comes
    cache: int = -1  # ask the teacher once for so many augmented views and keep its logits; 0: plain view; -1: live
    epochs: float = 30.0  # passes over the training data
    batch: int = 128  # samples per step, over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has Nesterov momentum 0.9
    lr: float = 0.1  # learning rate at the top of its cosine
    lr_warmup: float = 0.05  # part of the run over which the learning rate rises
    weight_decay: float = 5e-4  # of all trained weights
    clip: float = 5.0  # largest gradient norm

    def __post_init__(self) -> None:
        for text in self.objective:
            Objective.parse(text)
        for name, least in (("label", 0), ("teacher_epochs", 0), ("cache", -1), ("batch", 1), ("lr", 0),
                            ("weight_decay", 0), ("clip", 0)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected a number from {least}, got {getattr(self, name)}")
        if not 0 <= self.lr_warmup <= 1:
            raise UserError(f"lr_warmup: expected a part of the run in [0, 1], got {self.lr_warmup}")
        if not self.epochs > 0:
            raise UserError(f"epochs: expected a positive number, got {self.epochs}")
        if self.cache >= 0 and any(Objective.parse(o).level not in ON_LOGITS for o in self.objective):
            raise UserError("cache: keeps logits only; drop the objectives on features, or ask the teacher live")


class Moves:
    """For a Config with these fields: what plain training takes of it."""

    LEAST: ClassVar = {"teacher_epochs": 0, "batch": 1, "teacher_lr": 0, "lr_warmup": 0, "weight_decay": 0, "clip": 0}
    teacher_epochs: float
    teacher_lr: float
    batch: int
    optimizer: Literal["sgd", "adamw"]
    lr_warmup: float
    weight_decay: float
    clip: float

    def moves(self, lr: float) -> Plain:
        """The optimiser's part of the settings, with this learning rate."""
        return Plain(
            (), batch=self.batch, optimizer=self.optimizer, lr=lr, lr_warmup=self.lr_warmup,
            weight_decay=self.weight_decay, clip=self.clip,
        )  # fmt: skip

    @property
    def first(self) -> Plain:
        """How a network is trained that comes without weights."""
        return replace(self.moves(self.teacher_lr), teacher_epochs=self.teacher_epochs)


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teacher: nn.Module | Sequence[nn.Module],
    cfg: Plain | None = None,
    *,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
    looks: Sequence[Mapping[str, Any]] = (),
    system: Callable[..., Distill] = Distill,
) -> Family:
    """Teach `student` on `data` what `teacher` says, by the objectives of `cfg`.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        student: a live module (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        teacher: a trained network; several are averaged by their logits, and features are of the first, or of the k-th
            by the path ``K/PATH``.
        cfg: settings.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        normalize, resize: of the teacher's input where it differs from the student's, as in `teachers.Frozen`.
        looks: these two by name for each teacher, where they differ among several.
        system: what is trained; other recipes build theirs on `Distill`.

    Returns:
        A family of one, ``student``, with the teacher as its base (as `teachers.Asked` where there are several).

    Raises:
        UserError: settings, classes or features that do not fit; said before the first step.
    """
    cfg, began = cfg or Plain(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    looks = looks or [{"normalize": normalize, "resize": resize}] * len(models)
    same = not any(v for look in looks for v in look.values())
    _check_looks(models, looks, data, cfg)
    if cfg.teacher_epochs:
        # What does not fit is said before a teacher is trained for hours.
        copies = copy.deepcopy([network, *models])  # a teacher's question freezes it, simkd changes the student
        assembled(run, data, copies[0], spec, copies[1:], cfg, looks, system, ask_later=True)
        for k, model in enumerate(models):
            train_teacher(run, f"teacher{k or ''}", model, data, cfg)
            model.cpu().eval()
    learner, live, network, spec = assembled(run, data, network, spec, models, cfg, looks, system)
    source = Batches(data.train, cfg.batch, views=max(0, cfg.cache), augment=cfg.cache != 0)
    fit(run, "distill", learner, prefetch(source, run.workers), epochs=cfg.epochs, settings=cfg)
    cost = {
        "trained_params": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "teacher_params": sum(map(count_params, models)),
        "steps": max(1, round(cfg.epochs * source.steps_per_epoch)),
        "seconds": time.monotonic() - began,
    }
    notes = [f"{o}: student {s}, teacher {t}, projector {p}" for o, s, t, p in learner.described]
    # Measured as it teaches: several as their mean, each with the normalisation and size it reads.
    base = models[0] if len(models) == 1 and same else Asked(live, models)
    return Family.of(
        data, [Member("student", network, spec=spec)], base, spec, cost, base_name="teacher", notes=notes,
        base_reads=read_by_teachers(data.train.take(np.arange(1))), logs=run.log("distill"),
    )  # fmt: skip


def _check_looks(models: Sequence[nn.Module], looks: Sequence[Mapping[str, Any]], data: Data, cfg: Plain) -> None:
    """Whether there are teachers, and inputs of their own for each that they can have."""
    if not models:
        raise UserError("no teacher: give a network, or several")
    if len(looks) != len(models):
        raise UserError(f"looks: expected one per teacher ({len(models)}), got {len(looks)}")
    if not any(v for look in looks for v in look.values()):
        return
    if hasattr(data.train, "tokenizer"):
        raise UserError("normalize and resize are of images, and these data are sentences")
    if cfg.teacher_epochs:
        raise UserError("a teacher that is trained first (teacher_epochs) reads the data: drop normalize, resize")


def assembled(
    run: Run,
    data: Data,
    network: nn.Module,
    spec: ModelSpec | None,
    models: Sequence[nn.Module],
    cfg: Plain,
    looks: Sequence[Mapping[str, Any]],
    system: Callable[..., Distill],
    ask_later: bool = False,
) -> tuple[Distill, Teacher, nn.Module, ModelSpec | None]:
    """What `distill` trains, its teacher, and the student and its spec, which ``simkd`` changes.

    Args:
        looks: ``normalize`` and ``resize`` of every teacher's input. ask_later: fill no cache; others as there.
    """
    example = data.train.take(np.arange(min(4, len(data.train))))
    read = read_by_teachers(example)
    objectives = [Objective.parse(o) for o in cfg.objective]
    check_classes(network, [Frozen(m, input=read, **look) for m, look in zip(models, looks)], example, data)
    reuse = next((o for o in objectives if o.name == "simkd"), None)
    if reuse:  # its projector and the teacher's head become part of the student
        seen = Frozen(models[0], **looks[0]).read(example)
        network, spec, paths = reuse_head(network, models[0], example["input"], spec, seen)
        objectives[objectives.index(reuse)] = Objective("feature", reuse.weight, *paths, reuse.options)
    taps: list[list[str]] = [taps_of(objectives)]
    if len(models) > 1:
        objectives = [_numbered(o, len(models)) for o in objectives]
        named = [p.partition("/") for p in taps_of(objectives)]
        taps = [[p for k, _, p in named if int(k) == i + 1] for i in range(len(models))]
    frozen = [Frozen(m, taps=t, input=read, **look) for m, t, look in zip(models, taps, looks)]
    live: Teacher = frozen[0] if len(frozen) == 1 else Ensemble(frozen)
    cached = cfg.cache >= 0 and objectives and not ask_later
    ask = kept(run, live, data, cfg.cache, batch=cfg.batch) if cached else live
    learner = system(
        network, ask if objectives else None, objectives=objectives, label=cfg.label, example=example,
        seed=run.seed, optimizer=optimizer_of(cfg), lr=schedule(data, cfg, cfg.epochs), clip=cfg.clip or None,
        label_smoothing=cfg.label_smoothing,
    )  # fmt: skip
    return learner, live, network, spec


def _numbered(o: Objective, teachers: int) -> Objective:
    """With every path of a teacher as ``K/PATH``, K = 1 where none is said."""
    paths = [p if re.match(r"\d+/", p) else f"1/{p}" for p in o.taps[1]]
    for path in paths:
        if not 1 <= int(path.partition("/")[0]) <= teachers:
            raise UserError(f"objective {o}: expected teacher 1…{teachers} in K/PATH, got {path!r}")
    return replace(o, teacher=">".join(paths) or None)


def train_teacher(run: Run, name: str, model: nn.Module, data: Data, cfg: Plain) -> None:
    """Labels alone, in place; a stage of its own, so that it is done once."""
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_(True)  # it was asked as a teacher before
    read = read_by_teachers(data.train.take(np.arange(1)))
    plain = Distill(
        model, None, objectives=(), read=read, optimizer=optimizer_of(cfg), clip=cfg.clip or None,
        lr=schedule(data, cfg, cfg.teacher_epochs),
    )  # fmt: skip
    source = prefetch(Batches(data.train, cfg.batch), run.workers)
    fit(run, name, plain, source, epochs=cfg.teacher_epochs, settings=cfg)


def train_first(run: Run, network: nn.Module, data: Data, cfg: Moves) -> nn.Module:
    """The network after ``cfg.teacher_epochs`` of labels alone, if any, in place; on the CPU, in eval mode."""
    if cfg.teacher_epochs:
        train_teacher(run, "teacher", network.requires_grad_(True), data, cfg.first)
    return network.cpu().eval()


def check_classes(student: nn.Module, teachers: Sequence[Teacher], example: Any, data: Data) -> None:
    """Outputs of student and teachers against the classes of the data, before anything is trained.

    Raises:
        UserError: a network that cannot take the inputs, or gives another number of logits; says which.
    """

    def asked() -> Tensor:
        device = next(student.parameters()).device
        with torch.no_grad(), evaluating(student):
            return logits_of(call(student, map_tensors(example["input"], lambda t: t.to(device))))

    asks: dict[str, Callable[[], Tensor]] = {"student" if teachers else "network": asked}
    asks |= {f"teacher {k}": partial(lambda t: t(example)["logits"], t) for k, t in enumerate(teachers)}
    for who, ask in asks.items():
        try:
            outputs = ask().shape[1]
        except UserError:
            raise
        except Exception as error:  # whatever a network raises about inputs it was not made for
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"the {who} cannot take inputs of shape {tuple(data.shape)} of {data.name}: {why}"
            ) from None
        if outputs != len(data.classes):
            raise UserError(f"the {who} gives {outputs} logits, but {data.name} has {len(data.classes)} classes")


def kept(
    run: Run,
    teacher: Any,
    data: Data,
    views: int,
    *,
    batch: int = 128,
    topk: int | None = None,
    samples: Samples | None = None,
    outputs: int | None = None,
) -> Teacher:
    """The teacher's logits, computed once for every sample and view, read from the run folder.

    Args:
        teacher: with a fingerprint. views: augmented views of every sample; 0 takes the plain one.
        batch: samples per question. topk: keep only so many answers of each.
        samples: those asked about; None takes the training part. outputs: answers of each, where not one per class.
    """
    train, classes = data.train if samples is None else samples, outputs or len(data.classes)
    who: dict[str, Any] = {"teacher_fingerprint": teacher.fingerprint, "data_fingerprint": train.fingerprint}
    folder = run.folder / "cache"
    if run.main:
        made = SignalCache.create(
            folder, n=len(train), classes=classes, views=views, topk=topk, dtype="float32", **who
        )  # fmt: skip
        if not made.complete:
            made.fill(teacher, train, seed=run.seed, batch_size=batch, device=run.device)
    run.barrier()
    return Cached(SignalCache.open(folder, **who, seed=run.seed))


def optimizer_of(cfg: Plain) -> Any:
    """What builds the optimiser from parameters."""
    if cfg.optimizer == "adamw":
        return partial(torch.optim.AdamW, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay)


def schedule(data: Data, cfg: Plain, epochs: float) -> Schedule:
    """A cosine over `epochs` passes, behind the warm-up."""
    steps = max(1, round(epochs * (len(data.train) // min(cfg.batch, len(data.train)))))
    return cosine(warmup_steps=round(cfg.lr_warmup * steps))
