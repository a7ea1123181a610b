"""Plain distillation over live objects, which many systems begin with or compare themselves to.

`distill` teaches a student by any sum of objectives; `train_teacher` trains by labels alone; both from one `Plain`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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
from stillhouse.teachers import Asked, Cached, Ensemble, Frozen, Normalisation
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
        for name, least in (("label", 0), ("teacher_epochs", 0), ("cache", -1), ("batch", 1), ("lr", 0), ("clip", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected a number from {least}, got {getattr(self, name)}")
        if not self.epochs > 0:
            raise UserError(f"epochs: expected a positive number, got {self.epochs}")
        if self.cache >= 0 and any(Objective.parse(o).level not in ON_LOGITS for o in self.objective):
            raise UserError("cache: keeps logits only; drop the objectives on features, or ask the teacher live")


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
    system: Callable[..., Distill] = Distill,
) -> Family:
    """Teach `student` on `data` what `teacher` says, by the objectives of `cfg`.

    Args:
        run: folder, seed, device.
        data: training and test samples.
        student: a live module (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        teacher: a trained network; several are averaged (logits), and then only objectives on logits can be asked.
        cfg: settings.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        normalize, resize: of the teacher's input where it differs from the student's, as in `teachers.Frozen`.
        system: what is trained; other recipes build theirs on `Distill`.

    Returns:
        A family of one, ``student``, with the teacher as its base (as `teachers.Asked` where there are several).

    Raises:
        UserError: settings, classes or features that do not fit; said before the first step.
    """
    cfg, began = cfg or Plain(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    if cfg.teacher_epochs:
        for k, model in enumerate(models):
            train_teacher(run, f"teacher{k or ''}", model, data, cfg)
    example = data.train.take(np.arange(min(4, len(data.train))))
    read = "teacher" if "teacher" in example else "input"
    if (normalize or resize) and read == "teacher":
        raise UserError("normalize and resize are of images, and these data are sentences")
    objectives = [Objective.parse(o) for o in cfg.objective]
    reuse = next((o for o in objectives if o.name == "simkd"), None)
    if reuse:  # its projector and the teacher's head become part of the student
        network, spec, paths = reuse_head(network, models[0], example["input"], spec)
        objectives[objectives.index(reuse)] = Objective("feature", reuse.weight, *paths, reuse.options)
    taps = taps_of(objectives)
    if taps and len(models) > 1:
        raise UserError(f"several teachers are averaged by their logits, but objectives ask for features {taps}")
    frozen = [Frozen(m, taps=taps, input=read, normalize=normalize, resize=resize) for m in models]
    check_classes(network, frozen, example, data)
    live: Teacher = frozen[0] if len(frozen) == 1 else Ensemble(frozen)
    ask = kept(run, live, data, cfg.cache, batch=cfg.batch) if cfg.cache >= 0 and objectives else live
    learner = system(
        network, ask if objectives else None, objectives=objectives, label=cfg.label, example=example,
        seed=run.seed, optimizer=optimizer_of(cfg), lr=schedule(data, cfg, cfg.epochs), clip=cfg.clip or None,
        label_smoothing=cfg.label_smoothing,
    )  # fmt: skip
    source = Batches(data.train, cfg.batch, views=max(0, cfg.cache), augment=cfg.cache != 0)
    fit(run, "distill", learner, prefetch(source, run.workers), epochs=cfg.epochs, settings=cfg)
    for model in (network, *models):
        model.cpu().eval()
    members = [Member("student", network, spec=spec)]
    cost = {
        "trained_params": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "teacher_params": sum(map(count_params, models)),
        "steps": max(1, round(cfg.epochs * source.steps_per_epoch)),
        "seconds": time.monotonic() - began,
    }
    notes = [f"{o}: student {s}, teacher {t}, projector {p}" for o, s, t, p in learner.described]
    shape, classes = tuple(data.shape), tuple(data.classes)
    logs = run.log("distill")
    one = data.train.take(np.arange(1))
    # Measured as it teaches: several as their mean, each with the normalisation and size it reads.
    base = models[0] if len(models) == 1 and not (normalize or resize) else Asked(live, models)
    return Family(
        members, shape, classes, base, spec, cost, notes=notes, logs=logs, base_name="teacher",
        inputs=one["input"] if isinstance(one["input"], Mapping) else None, base_inputs=one.get("teacher"),
        tokenizer=getattr(data.train, "tokenizer", None),
    )  # fmt: skip


def train_teacher(run: Run, name: str, model: nn.Module, data: Data, cfg: Plain) -> None:
    """Labels alone, in place; a stage of its own, so that it is done once."""
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_(True)  # it was asked as a teacher before
    read = "teacher" if "teacher" in data.train.take(np.arange(1)) else "input"
    plain = Distill(
        model, None, objectives=(), read=read, optimizer=optimizer_of(cfg), clip=cfg.clip or None,
        lr=schedule(data, cfg, cfg.teacher_epochs),
    )  # fmt: skip
    source = prefetch(Batches(data.train, cfg.batch), run.workers)
    fit(run, name, plain, source, epochs=cfg.teacher_epochs, settings=cfg)


def check_classes(student: nn.Module, frozen: Sequence[Frozen], example: Any, data: Data) -> None:
    """Outputs of student and teachers against the classes of the data, before anything is trained."""

    def asked() -> Tensor:
        device = next(student.parameters()).device
        with torch.no_grad(), evaluating(student):
            return logits_of(call(student, map_tensors(example["input"], lambda t: t.to(device))))

    asks: dict[str, Callable[[], Tensor]] = {"student": asked}
    asks |= {f"teacher {k}": partial(lambda t: t(example)["logits"], t) for k, t in enumerate(frozen)}
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
