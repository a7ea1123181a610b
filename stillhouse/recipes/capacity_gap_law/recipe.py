"""The law of capacity gap over live objects: teachers, a text, sizes of students.

stillhouse run capacity_gap_law --out runs/gap
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.data import Batches, prefetch
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.files import write_json
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member, Models
from stillhouse.recipes.capacity_gap_law.config import Config
from stillhouse.recipes.capacity_gap_law.pilots import Pilot, law_of
from stillhouse.recipes.capacity_gap_law.pruning import importance_of, prune
from stillhouse.recipes.capacity_gap_law.system import ChunkedDistill
from stillhouse.recommend.law import PUBLISHED, Law, short
from stillhouse.recommend.sizes import parse_size
from stillhouse.students.decoders import counted
from stillhouse.students.hub import names_of
from stillhouse.teachers import state_fingerprint
from stillhouse.text.language import adamw, check_language_model, nats, train_language_model
from stillhouse.text.windows import Corpus
from stillhouse.weights import cosine

__all__ = ["Config", "Pilots", "distill", "judged", "prune", "taught", "train_teachers"]


@dataclass
class Pilots(Models):
    """The students, what each pilot found, and the law they show.

    Attributes:
        pilots: one per pair of sizes that was tried. law: T* = aS + b, or None. why: what is missing where it is None.
    """

    pilots: list[Pilot] = field(default_factory=list)
    law: Law | None = None
    why: str = ""

    def save(self, folder: str | Path) -> list[Path]:
        """Writes the students, and ``folder/law.json``, which ``stillhouse recommend --law`` reads."""
        made, path = super().save(folder), Path(folder) / "law.json"
        law = None if self.law is None else self.law.to_json()
        write_json(path, {"format": 1, "law": law, "why": self.why, "pilots": [asdict(p) for p in self.pilots]})
        return [*made, path]


def distill(
    run: Run, text: Corpus, teachers: nn.Module | Member | Sequence[nn.Module | Member], cfg: Config | None = None
) -> Pilots:
    """Prune every teacher to every size, distil it on the same tokens, and fit the law where there are pilots enough.

    Args:
        run: folder, seed, device.
        text: training and test windows.
        teachers: decoders of transformers; a `Member` also says how it is built again. Not changed unless
            ``teacher_steps`` trains them.
        cfg: settings. Without sizes every teacher gets one student, of the size that the published law says.

    Returns:
        One student per pair of sizes, ``SIZE-of-TEACHER``; with four teachers and three sizes of students also the law.

    Raises:
        UserError: settings, models or sizes that do not fit; said before the first step.
    """
    cfg, began = cfg or Config(), time.monotonic()
    given = [teachers] if isinstance(teachers, nn.Module | Member) else list(teachers)
    known = [as_member(t, f"t{k}") for k, t in enumerate(given)]
    for t in known:
        check_language_model(t.model, text, f"teacher {t.name}")
    pairs, left = _pairs(known, cfg)
    train_teachers(run, text, known, cfg)
    members, pilots, importance = [], [], dict[str, list[Tensor]]()
    for t, size in pairs:
        if t.name not in importance:
            importance = {t.name: importance_of(run, text, t.model, cfg)}
        student = prune(run, text, t, cfg, size, importance[t.name])
        before = judged(run, student, text, cfg)
        taught(run, student, t.model, text, cfg)
        after = judged(run, student, text, cfg)
        own, theirs = (float(counted(m.model, cfg.counts)) for m in (student, t))
        pilots.append(Pilot(student.name, t.name, float(size or own), own, theirs, before, after))
        members.append(student)
    law, why = law_of(pilots, cfg.counts, run.seed)
    cost = {"steps": cfg.steps * len(pairs), "teacher_steps": cfg.teacher_steps, "seconds": time.monotonic() - began}
    logs = [{**row, "name": m.name} for m in members for row in run.log(f"distill-{m.name}")]
    return Pilots(
        members, text.example(), cost=cost, notes=left, logs=logs, tokenizer=text.tokenizer, pilots=pilots, law=law,
        why=why,
    )  # fmt: skip


def judged(run: Run, member: Member, text: Corpus, cfg: Config) -> float:
    """Nats per token of the test text."""
    return nats(member.model, text.test, limit=cfg.judged or None, device=run.device)


def train_teachers(run: Run, text: Corpus, teachers: Sequence[Member], cfg: Config) -> None:
    """On the text alone, in place, where ``teacher_steps`` asks for it; a stage each, so that it is done once."""
    how = cfg.training(cfg.teacher_lr, max(1, cfg.teacher_steps))
    for t in teachers if cfg.teacher_steps else ():
        train_language_model(run, f"teacher-{t.name}", t.model.requires_grad_(True), text, how, settings=how)


def as_member(teacher: nn.Module | Member, name: str) -> Member:
    """A teacher with how it is built again."""
    if isinstance(teacher, Member):
        return teacher
    names_of(teacher)  # is a decoder of transformers, so its class and configuration say how
    return Member(name, teacher, spec=ModelSpec.of(teacher))


def _pairs(teachers: Sequence[Member], cfg: Config) -> tuple[list[tuple[Member, float]], list[str]]:
    """Every teacher with every size that is smaller than it (0: the shape says), and a note on the others."""
    if not teachers:
        raise UserError("there is no teacher to prune; give one or more")
    whole = {t.name: counted(t.model, cfg.counts) for t in teachers}
    if cfg.shape:
        return [(t, 0.0) for t in teachers], []
    wanted = [float(parse_size(s) or 0) for s in cfg.sizes]
    all_ = [(t, s) for t in teachers for s in wanted or [float(round(PUBLISHED.student(whole[t.name])))]]
    pairs = [(t, s) for t, s in all_ if s < whole[t.name]]
    if not pairs:
        largest = max(whole.values())
        raise UserError(f"sizes {' '.join(cfg.sizes)}: no teacher is larger; the largest has {largest:,} parameters")
    left = [f"{t.name} ({short(whole[t.name])}) is not larger than {short(s)}" for t, s in all_ if s >= whole[t.name]]
    return pairs, left


def taught(run: Run, student: Member, teacher: nn.Module, text: Corpus, cfg: Config) -> None:
    """Distils in place; a stage of the run."""
    how = cfg.training(cfg.lr, cfg.steps)
    sgd = partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9)
    system = ChunkedDistill(
        student.model, teacher, alpha=cfg.alpha, T=cfg.temperature, chunk=cfg.chunk,
        optimizer=sgd if cfg.optimizer == "sgd" else partial(adamw, lr=cfg.lr, weight_decay=cfg.weight_decay),
        lr=cosine(round(how.lr_warmup * how.steps)), clip=cfg.clip or None,
    )  # fmt: skip
    settings = {**asdict(cfg), "teacher": state_fingerprint(teacher) if cfg.alpha else ""}
    source = prefetch(Batches(text.train, cfg.batch), run.workers)
    fit(run, f"distill-{student.name}", system, source, steps=cfg.steps, settings=settings)
    for model in (student.model, teacher):
        model.cpu().eval()
