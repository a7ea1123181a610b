"""LGTM over live objects: two networks, one run, and which samples help the student."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import plain
from stillhouse.bilevel import along
from stillhouse.data import Batches, Data, Samples, prefetch, split, together
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import call, count_params, evaluating, logits_of
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.objectives import cross_entropy, kl
from stillhouse.outcomes import Member
from stillhouse.recipes.lgtm.config import Config
from stillhouse.recipes.lgtm.system import LGTM, answer, trained
from stillhouse.system import Signals, fold, map_tensors
from stillhouse.taps import head
from stillhouse.teachers import read_by_teachers
from stillhouse.weights import cosine


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teacher: nn.Module,
    cfg: Config | None = None,
    *,
    network: nn.Module | None = None,
) -> Family:
    """Train `teacher` and `student` together; the teacher learns what helps the student on held-out data.

    Args:
        run: folder, seed, device.
        data: training and test samples. Its held-out part judges the student in every step; without one, a part of
            the training samples is set apart. The test part is never seen.
        student: a live module (trained in place), or a `ModelSpec` (then it can be loaded from its folder alone).
        teacher: a network that is trained in place, from pre-trained or fresh weights.
        cfg: settings.
        network: the student with weights of its own where `student` is only a `ModelSpec`.

    Returns:
        A family of one, ``student``, with the teacher as it was at the end as its base.

    Raises:
        UserError: settings, classes or heads that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    example = data.train.take(np.arange(min(4, len(data.train))))
    read = read_by_teachers(example)
    check(network, teacher, example, read, data)
    if cfg.zero_heads:
        for model, key in ((network, "input"), (teacher, read)):
            zero(model.get_submodule(head(model, example[key])))
    if cfg.teacher_epochs:
        plain.train_teacher(run, "teacher", teacher, data, cfg.teachers())
    train, judge = parts(data, cfg, run.seed)
    source = together(
        train=Batches(train, cfg.batch), held_out=Batches(judge, cfg.batch, augment=False, seed_with="held out")
    )
    steps = max(1, round(cfg.epochs * source.steps_per_epoch))
    system = LGTM(network, teacher, cfg, cosine(warmup_steps=round(cfg.lr_warmup * steps)), read)
    fit(run, "lgtm", system, prefetch(source, run.workers), epochs=cfg.epochs, settings=cfg)
    cost = {
        "trained_params": sum(p.numel() for p in trained(system).values()),
        "teacher_params": count_params(teacher),
        "steps": steps,
        "seconds": time.monotonic() - began,
    }
    notes = [f"{len(train)} training samples, {len(judge)} held-out ones that judge the student in every step"]
    if cfg.zero_heads:
        notes.append("the heads of both networks began at zero")
    known: dict[str, Any] = {"base_name": "teacher", "base_reads": read, "logs": run.log("lgtm"), "notes": notes}
    return Family.of(data, [Member("student", network, spec=spec)], teacher, spec, cost, **known)


def parts(data: Data, cfg: Config, seed: int) -> tuple[Samples, Samples]:
    """What both learn from, and what judges the student: never the test part."""
    if data.held_out is not None:
        return data.train, data.held_out
    return split(data.train, cfg.held_out, seed=fold(seed, "held out"))


def check(student: nn.Module, teacher: nn.Module, example: Any, read: str, data: Data) -> None:
    """Outputs of both against the classes of the data; and that they are two networks with something to train."""
    shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    if shared:
        raise UserError("student and teacher share parameters; both are trained, so give two networks")
    for who, model in (("student", student), ("teacher", teacher)):
        if not trained(model):
            raise UserError(f"the {who} has no trainable parameter, and LGTM trains both; unfreeze it")
    plain.check_classes(student, [lambda batch: Signals(logits=asked(teacher, batch[read]))], example, data)


def asked(model: nn.Module, x: Any) -> Tensor:
    """Logits in eval mode, without a graph, where the model is."""
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        return logits_of(call(model, map_tensors(x, lambda t: t.to(device))))


def zero(layer: nn.Module) -> None:
    """A head that says every class is as likely, so that student and teacher begin with the same answer."""
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()


def helpful(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    cfg: Config | None = None,
    *,
    seed: int = 0,
    most: int = 512,
    device: Any = "cpu",
) -> tuple[Tensor, Tensor]:
    """The distillation influence of each training sample: ⟨∇F, ∇KL_i⟩, in one forward-mode pass per batch.

    F is the student's cross-entropy on held-out data, KL_i = KL(p_t ‖ p_s) on sample i: to first order, a step of size
    η on sample i lowers F by η times this.

    Args:
        student, teacher: any networks with the same classes.
        data: as for `distill`, with which the held-out part is the same for the same `seed` and `cfg`.
        most: training samples that are judged, evenly spaced, and held-out samples.
        device: where.

    Returns:
        Positions in the training part (m,), and the influences (m,), both on the CPU.
    """
    cfg = cfg or Config()
    train, judge = parts(data, cfg, seed)
    read = read_by_teachers(data.train.take(np.arange(1)))
    params = trained(student.to(device))
    teacher.to(device)

    def batches(samples: Samples, ids: np.ndarray) -> Any:
        for start in range(0, len(ids), 128):
            yield map_tensors(samples.take(ids[start : start + 128]), lambda t: t.to(device))

    with evaluating(student), evaluating(teacher):
        held = np.arange(0, len(judge), -(-len(judge) // most))
        v = {k: torch.zeros_like(p) for k, p in params.items()}
        for batch in batches(judge, held):
            loss = cross_entropy(logits_of(call(student, batch["input"])), batch["label"]).sum() / len(held)
            for (k, p), g in zip(params.items(), torch.autograd.grad(loss, list(params.values()), allow_unused=True)):
                v[k] += torch.zeros_like(p) if g is None else g
        ids, found = np.arange(0, len(train), -(-len(train) // most)), []
        for batch in batches(train, ids):
            t = asked(teacher, batch[read])

            def each(p: Mapping[str, Tensor], x: Any = batch["input"], t: Tensor = t) -> Tensor:
                return kl(t, answer(student, p, x), cfg.temperature) / cfg.temperature**2

            found.append(along(each, params, v).cpu())
    return torch.from_numpy(ids), torch.cat(found)
