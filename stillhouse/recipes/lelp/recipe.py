"""LELP over live objects: sub-classes found once, targets fixed once, a student with S outputs per class.

q_{c,k}(x) = softmax(z/T)_c · softmax_k(a_{c,k}(x)/β),   L = −τ² Σ_{c,k} q_{c,k} log softmax(s/τ)_{c,k}
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from stillhouse import plain
from stillhouse.data import Batches, Data, Samples, prefetch
from stillhouse.data.pools import Joined
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import count_params
from stillhouse.family import Family
from stillhouse.models import ModelSpec, spec_and_network
from stillhouse.objectives import cross_entropy, soft_cross_entropy
from stillhouse.outcomes import Member
from stillhouse.recipes.lelp.config import Config
from stillhouse.recipes.lelp.subclasses import (
    FILES,
    Subclasses,
    SubclassTeacher,
    TwoLogits,
    answers,
    find_subclasses,
    head_of,
    information,
)
from stillhouse.students.grouped import Grouped, grouped_head
from stillhouse.system import Batch, Clock, Schedule, System, Teacher, Terms, Update, fold, map_tensors
from stillhouse.teachers import Asked, Frozen, Normalisation, read_by_teachers
from stillhouse.weights import cosine


class Lelp(System):
    """(1−α)·mean L + α·mean CE of the class, where there is a label.

    Args:
        student: has C·S outputs.
        teacher: its logits are log q, (n, C·S).
        cfg: settings.
        lr: factor on the learning rate.
    """

    def __init__(self, student: Grouped, teacher: Teacher, cfg: Config, lr: Schedule | None = None):
        super().__init__()
        self.student, self.teacher, self.cfg, self.lr = student, teacher, cfg, lr

    def updates(self) -> Sequence[Update]:
        moving = [p for p in self.student.parameters() if p.requires_grad]
        return [Update("learn", moving, plain.optimizer_of(self.cfg.plain()), lr=self.lr, clip=self.cfg.clip or None)]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``subclasses`` and ``label``, as weighted; notes how often student and teacher name the same class."""
        c, s, terms = self.cfg, self.student.scores(batch["input"]), {}
        classes = self.student.group(s)
        if c.label < 1:
            log_q, tau = self.teacher(batch)["logits"], c.student_temperature
            # τ·log q, because the objective divides both by τ, and q is to stay as it is.
            terms["subclasses"] = (1 - c.label) * soft_cross_entropy(tau * log_q, s, tau).mean()
            same = (self.student.group(log_q).argmax(-1) == classes.argmax(-1)).float().mean()
        if c.label > 0:
            known = batch["label"] >= 0
            each = cross_entropy(classes, batch["label"].clamp(min=0))
            terms["label"] = c.label * (each * known).mean()
        return Terms(**terms).note(**({"agreement": same} if c.label < 1 else {}))

    def outcome(self) -> Grouped:
        return self.student


def distill(
    run: Run,
    data: Data,
    student: nn.Module | ModelSpec,
    teacher: nn.Module,
    cfg: Config | None = None,
    *,
    unlabelled: Samples | None = None,
    network: nn.Module | None = None,
    normalize: Normalisation | None = None,
    resize: int | None = None,
) -> Family:
    """Teach `student` the classes of `teacher` and, within each, the sub-classes of its embedding.

    Args:
        run: folder, seed, device.
        data: training and test samples; training labels are read where ``cfg.label`` or ``cfg.assign`` say so.
        student: a live module that ends in a linear layer (trained in place, its head replaced), or a `ModelSpec`
            (then it can be loaded from its folder alone).
        teacher: a trained classifier that ends in a linear layer, of C logits, or of one for two classes.
        cfg: settings.
        unlabelled: further training inputs, of the data's shape.
        network: the student with weights of its own where `student` is only a `ModelSpec`.
        normalize, resize: of the teacher's input where it differs from the student's, as in `teachers.Frozen`.

    Returns:
        A family of one, ``student``, a `Grouped` that gives class logits.

    Raises:
        UserError: settings or networks that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    spec, network = spec_and_network(student, network, run.seed)
    example = data.train.take(np.arange(min(4, len(data.train))))
    classes, read = len(data.classes), read_by_teachers(example)
    if (normalize or resize or unlabelled) and isinstance(example["input"], Mapping):
        raise UserError("normalize, resize and unlabelled are of images, and these data are sentences")
    at, logits = head_of(teacher, example[read], classes)
    grouped, spec = grouped_head(network, example["input"], classes, cfg.subclasses, spec=spec, seed=run.seed)
    reported = teacher if logits == classes else TwoLogits(teacher)
    if cfg.teacher_epochs:
        plain.train_teacher(run, "teacher", reported, data, cfg.plain())
    asked = SubclassTeacher(teacher, at, input=read, normalize=normalize, resize=resize)
    train = data.train if unlabelled is None else Joined([data.train, unlabelled])
    found = directions(run, asked, train, cfg)
    ask: Teacher = asked.use(found, cfg.temperature, cfg.beta)
    if cfg.cache >= 0 and cfg.label < 1:
        outputs = classes * cfg.subclasses
        ask = plain.kept(run, asked, data, cfg.cache, batch=cfg.batch, samples=train, outputs=outputs)
    source = Batches(train, cfg.batch, views=max(0, cfg.cache), augment=cfg.cache != 0)
    steps = max(1, round(cfg.epochs * source.steps_per_epoch))
    system = Lelp(grouped, ask, cfg, cosine(warmup_steps=round(cfg.lr_warmup * steps)))
    fit(run, "distill", system, prefetch(source, run.workers), epochs=cfg.epochs, settings=cfg)
    cost = {
        "trained_params": sum(p.numel() for p in grouped.parameters() if p.requires_grad),
        "teacher_params": count_params(reported),
        "steps": steps,
        "seconds": time.monotonic() - began,
    }
    some = data.train.take(np.arange(0, len(data.train), -(-len(data.train) // 512)))
    log_q = asked(map_tensors(some, lambda t: t.to(run.device)))["logits"].cpu()
    cost["class_bits"], cost["subclass_bits"] = information(log_q, classes)
    base: nn.Module = reported
    if normalize or resize:  # measured as it is asked
        base = Asked(Frozen(reported, input=read, normalize=normalize, resize=resize), [reported])
    members, logs = [Member("student", grouped, spec=spec)], run.log("distill")
    notes = found.notes(data.classes)
    return Family.of(data, members, base, spec, cost, base_reads=read, notes=notes, logs=logs, base_name="teacher")


def directions(run: Run, teacher: SubclassTeacher, train: Samples, cfg: Config) -> Subclasses:
    """The sub-classes of the training inputs, found once and read from the run folder ever after."""
    folder = run.folder / "subclasses"
    how = {k: getattr(cfg, k) for k in ("subclasses", "null_space", "rotate", "assign", "most")}
    who = {"teacher": teacher.network, "data": train.fingerprint, "seed": run.seed, **how}
    if run.main and not (folder / FILES[1]).exists():
        ids = np.random.default_rng(fold(run.seed, "subclasses")).permutation(len(train))[: cfg.most]
        h, z, y = answers(teacher, train, np.sort(ids), run.device)
        groups = z.argmax(-1) if cfg.assign == "predicted" else y
        weight = teacher.weight if cfg.null_space else None
        made = find_subclasses(h, groups, z.shape[1], cfg.subclasses, weight=weight, rotate=cfg.rotate, seed=run.seed)
        made.save(folder, who)
    run.barrier()
    found, facts = Subclasses.load(folder)
    if facts != who:
        raise UserError(f"{folder} holds the sub-classes of another teacher, other data or settings; give a new folder")
    return found
