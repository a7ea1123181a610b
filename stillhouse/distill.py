"""One teacher into one student, by any sum of objectives on logits and features: the plain thing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse import teachers
from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.system import Batch, Clock, Schedule, Signals, System, Teacher, Terms, Update, fold
from stillhouse.taps import tap

Level = Literal["logits", "labelled", "same", "positions", "channels", "structure", "both", "flow"]


def _standardised(t: Tensor, s: Tensor, T: float = 2.0) -> Tensor:
    return O.kl(O.standardise(t.detach()), O.standardise(s), T)


# What an objective compares: logits; logits and labels; features of one shape (a projector on the student sees to
# that); maps with the same positions; maps with the same channels (the projector again); features of any width;
# features projected on both sides; two layers of each.
KNOWN: dict[str, tuple[Level, Callable[..., Tensor], dict[str, float]]] = {
    "kd": ("logits", O.kl, {"T": 4.0}),
    "reverse": ("logits", O.reverse_kl, {"T": 4.0}),
    "symmetric": ("logits", O.symmetric_kl, {"T": 4.0}),
    "js": ("logits", O.jensen_shannon, {"T": 4.0, "beta": 0.5}),
    "standardised": ("logits", _standardised, {"T": 2.0}),
    "dist": ("logits", O.dist, {"T": 1.0, "beta": 1.0, "gamma": 1.0}),
    "dkd": ("labelled", O.decoupled_kl, {"T": 4.0, "alpha": 1.0, "beta": 8.0}),
    "pld": ("labelled", O.plackett_luce, {"T": 1.0}),
    "feature": ("same", O.mse, {}),
    "cosine": ("same", O.cosine, {}),
    "overhaul": ("same", O.overhaul, {"margin": 0.0}),
    "vid": ("same", O.variational, {}),
    "attention": ("positions", O.attention_transfer, {"p": 2}),
    "nst": ("positions", O.neuron_selectivity, {}),
    "icc": ("channels", O.inter_channel, {}),
    "similarity": ("structure", O.similarity, {}),
    "rkd-distance": ("structure", O.relative_distance, {}),
    "rkd-angle": ("structure", O.relative_angle, {}),
    "pkt": ("structure", O.probabilistic, {}),
    "cka": ("structure", O.cka, {}),
    "contrastive": ("both", partial(O.contrastive, detach_teacher=False), {"T": 0.1, "width": 128}),
    "flow": ("flow", O.mse, {}),
}
ON_LOGITS = ("logits", "labelled")


@dataclass(frozen=True)
class Objective:
    """One term of a distillation: what is compared, where, and how much it weighs.

    As text: ``NAME[:STUDENT=TEACHER][:WEIGHT][?OPTION=VALUE&…]``, for example ``kd:0.9?T=2``,
    ``feature:layer2=layer3:100``, ``attention:layer3:50?until=0.8``. A single path is that of both; ``flow`` takes two
    layers of each, ``layer1>layer2``. A path may end in ``:in`` for a module's input; what lies behind the last
    colon and reads as a number is the weight.

    Attributes:
        name: see `KNOWN`.
        weight: factor of the mean over the batch.
        student, teacher: module paths; None where logits are compared.
        options: of the objective's function; further ``ramp`` (the part of the run over which the weight grows from 0)
            and ``until`` (the part after which it is 0).

    Raises:
        UserError: an unknown name or option, paths where none belong, or the reverse.

    Example:
        >>> Objective.parse("feature:layer2=body.3:100")
        Objective(name='feature', weight=100.0, student='layer2', teacher='body.3', options={})
    """

    name: str
    weight: float = 1.0
    student: str | None = None
    teacher: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Objective:
        body, _, query = text.partition("?")
        name, *parts = re.split(r":(?!in\b)", body)
        weight = 1.0
        if parts and _number(parts[-1]) is not None:
            weight = float(parts.pop())
        if len(parts) > 1:
            raise UserError(f"objective {text!r}: expected NAME[:STUDENT=TEACHER][:WEIGHT], got {len(parts)} paths")
        student, _, teacher = parts[0].partition("=") if parts else ("", "", "")
        options = {}
        for pair in filter(None, query.split("&")):
            key, _, value = pair.partition("=")
            number = _number(value)
            if number is None:
                raise UserError(f"objective {text!r}: option {key!r} needs a number, got {value!r}")
            options[key] = number
        return Objective(name, weight, student or None, teacher or student or None, options)

    def __post_init__(self) -> None:
        if self.name not in KNOWN:
            raise UserError(f"no objective {self.name!r}; {did_you_mean(self.name, KNOWN, limit=30)}")
        known = [*KNOWN[self.name][2], "ramp", "until"]
        for key in self.options:
            if key not in known:
                raise UserError(f"objective {self.name}: no option {key!r}; {did_you_mean(key, known)}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"objective {self.name}: the weight must be a number >= 0, got {self.weight}")
        if self.level in ON_LOGITS and self.student:
            raise UserError(f"objective {self.name} compares logits and takes no path, got {self.student!r}")
        if self.level not in ON_LOGITS and not (self.student and self.teacher):
            raise UserError(f"objective {self.name} compares features; say which: {self.name}:STUDENT=TEACHER:WEIGHT")
        for path in (self.student, self.teacher):
            if self.level == "flow" and path and path.count(">") != 1:
                raise UserError(f"objective flow goes between two layers, EARLY>LATE, got {path!r}")

    @property
    def level(self) -> Level:
        return KNOWN[self.name][0]

    @property
    def taps(self) -> tuple[list[str], list[str]]:
        """Paths to tap in the student and in the teacher."""
        student, teacher = ((p or "").split(">") if p else [] for p in (self.student, self.teacher))
        return student, teacher

    def at(self, clock: Clock) -> float:
        """The weight at this moment of the run."""
        ramp, until = self.options.get("ramp", 0.0), self.options.get("until", 1.0)
        if clock.progress >= until:
            return 0.0
        return self.weight * (min(1.0, clock.progress / ramp) if ramp else 1.0)

    def __str__(self) -> str:
        path = f":{self.student}={self.teacher}" if self.student else ""
        query = "&".join(f"{k}={v:g}" for k, v in self.options.items())
        return f"{self.name}{path}:{self.weight:g}" + (f"?{query}" if query else "")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Comparison(nn.Module):
    """One objective between features, with what it learns: projectors, variances.

    Positions of maps that differ are average-pooled to the smaller number; channels that differ are brought to the
    teacher's by a 1×1 convolution (a linear layer where there are no positions) on the student. Built for the shapes of
    one example batch.
    """

    def __init__(self, objective: Objective, student: Sequence[Tensor], teacher: Sequence[Tensor]):
        super().__init__()
        self.objective = objective
        _, self.fn, defaults = KNOWN[objective.name]
        chosen = {k: v for k, v in objective.options.items() if k not in ("ramp", "until")}
        self.options = {k: v for k, v in {**defaults, **chosen}.items() if k != "width"}
        self.sides = nn.ModuleList(nn.Identity() for _ in student)
        self.other: nn.Module = nn.Identity()
        self.raw_variance: nn.Parameter | None = None
        if objective.level in ("same", "channels", "flow"):
            self.sides = nn.ModuleList(_projector(s, t.shape[1]) for s, t in zip(student, teacher, strict=True))
        if objective.name == "vid":
            self.raw_variance = nn.Parameter(torch.full((teacher[0].shape[1],), math.log(math.expm1(5.0))))
        if objective.level == "both":
            width = int({**defaults, **chosen}["width"])
            self.sides, self.other = nn.ModuleList([_Flat(student[0], width)]), _Flat(teacher[0], width)
        self(student, teacher)  # shapes that cannot be compared are said here

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Per-sample values (n,) of the student's features against the teacher's (detached)."""
        t = [f.detach() for f in teacher]
        if self.objective.level not in ("structure", "channels"):
            student, t = _same_positions(student, t)
        s = [side(f) for side, f in zip(self.sides, student, strict=True)]
        if self.objective.level == "flow":
            return O.mse(O.flow(*t), O.flow(*s))
        if self.raw_variance is not None:
            return O.variational(t[0], s[0], self.raw_variance)
        return self.fn(self.other(t[0]), s[0], **self.options)

    def describe(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[str]:
        """A row for people: the objective, both shapes, and what it learns."""
        shapes = [" > ".join("×".join(map(str, f.shape[1:])) for f in fs) for fs in (student, teacher)]
        learned = sum(p.numel() for p in self.parameters())
        return [str(self.objective), *shapes, f"{learned:,} parameters" if learned else "–"]


class _Flat(nn.Sequential):
    """Mean over positions, then a linear layer: the embedding of a feature map."""

    def __init__(self, like: Tensor, width: int):
        pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)] if like.dim() == 4 else []
        flat = math.prod(like.shape[1:]) if like.dim() != 4 else like.shape[1]
        super().__init__(*pool, nn.Flatten(), nn.Linear(flat, width))


def _projector(like: Tensor, channels: int) -> nn.Module:
    if like.shape[1] == channels:
        return nn.Identity()
    return nn.Conv2d(like.shape[1], channels, 1) if like.dim() == 4 else nn.Linear(like.shape[1], channels)


def _same_positions(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    s, t = list(student), list(teacher)
    for i, (a, b) in enumerate(zip(s, t, strict=True)):
        if a.dim() == b.dim() == 4 and a.shape[2:] != b.shape[2:]:
            size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
            s[i], t[i] = F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)
    return s, t


class Distill(System):
    """w·mean CE(z, y) + Σ_k w_k·mean O_k(teacher, student).

    Without `objectives` this is Hinton et al. (2015, arXiv 1503.02531): (1−α)·mean CE + α·mean T² KL(softmax(t/T) ‖
    softmax(z/T)). The teacher is detached, in eval mode and no part of this module. Where no objective has weight it is
    not called, and training is plain cross-entropy bit for bit.

    Args:
        student: the network that learns; gives logits (n, C).
        teacher: a `Teacher` that answers with the logits and the taps that the objectives name (see `taps_of`), or a
            `teachers.Sequence` of them; None only where nothing is asked of it.
        objectives: `Objective` or their text, such as ``["kd:0.9?T=4", "feature:layer2:100"]``; None takes alpha and T.
        label: weight of the cross-entropy beside `objectives`.
        alpha, T: of the plain case.
        example: a batch for which the projectors of feature objectives are built; needed where there are such.
        seed: of the projectors' first weights.
        optimizer: builds the optimiser from the trainable parameters of student and projectors.
        lr: factor on the learning rate as a function of the clock.
        clip: largest gradient norm.
        label_smoothing: of the label term.

    Raises:
        UserError: a bare module as teacher, settings out of range, nothing to train, classes that differ, features
            that cannot be compared.

    Example:
        >>> system = Distill(nn.Linear(4, 3), teachers.Frozen(nn.Linear(4, 3)))
        >>> terms = system.learn({"input": torch.ones(2, 4), "label": torch.tensor([0, 2])}, Clock())
        >>> sorted(terms.terms)
        ['kd', 'label']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | teachers.Sequence | None,
        *,
        objectives: Sequence[Objective | str] | None = None,
        label: float = 1.0,
        alpha: float = 0.5,
        T: float = 4.0,
        example: Batch | None = None,
        seed: int = 0,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
        lr: Schedule | None = None,
        clip: float | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if isinstance(teacher, nn.Module):
            raise UserError(f"Distill: the teacher is a bare {type(teacher).__name__}; give teachers.Frozen(model)")
        if objectives is None:
            if not 0 <= alpha <= 1 or T <= 0:
                raise UserError(f"Distill: needs 0 <= alpha <= 1 and T > 0, got alpha={alpha}, T={T}")
            objectives, label = [Objective("kd", alpha, options={"T": T})], 1 - alpha
        parsed = [Objective.parse(o) if isinstance(o, str) else o for o in objectives]
        self.objectives = [o for o in parsed if o.weight > 0]
        if label < 0 or not (label or self.objectives):
            raise UserError(f"Distill: needs label >= 0 and something to learn from, got label={label} alone")
        if teacher is None and self.objectives:
            raise UserError(f"Distill: {self.objectives[0]} needs a teacher; give one, or labels alone (alpha=0)")
        if not any(p.requires_grad for p in student.parameters()):
            raise UserError(
                "Distill: the student has no trainable parameter; if it is also the teacher, give "
                "Frozen(model, copy=True) before its parameters are frozen"
            )
        self.student, self.teacher, self.label = student, teacher, label
        self.label_smoothing = label_smoothing
        self._optimizer = optimizer or partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self._lr, self._clip = lr, clip
        self._taps = list(dict.fromkeys(p for o in self.objectives for p in o.taps[0]))
        self.comparisons = nn.ModuleDict()
        self.described: list[list[str]] = []
        if self._taps:
            if example is None:
                raise UserError("Distill: objectives on features need example=, a batch to build their projectors for")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(fold("projectors", seed))
                self._prepare(example)

    def _prepare(self, example: Batch) -> None:
        """Builds every comparison of features for the shapes of one batch; also the check before the first step."""
        with torch.no_grad(), evaluating(self.student), tap(self.student, self._taps) as seen:
            call(self.student, example["input"])
        said = self._ask(example, Clock())
        for k, objective in enumerate(self.objectives):
            if objective.level in ON_LOGITS:
                self.described.append([str(objective), "logits", "logits", "–"])
                continue
            student, teacher = ([source[p] for p in paths] for source, paths in zip((seen, said), objective.taps))
            try:
                comparison = Comparison(objective, student, teacher)
            except (RuntimeError, UserError) as error:
                shapes = [[tuple(f.shape) for f in fs] for fs in (student, teacher)]
                raise UserError(
                    f"objective {objective}: student {shapes[0]} and teacher {shapes[1]} cannot be compared: {error}"
                ) from None
            self.comparisons[str(k)] = comparison
            self.described.append(comparison.describe(student, teacher))

    def updates(self) -> Sequence[Update]:
        moving = [p for p in self.parameters() if p.requires_grad]
        return [Update("learn", moving, self._optimizer, lr=self._lr, clip=self._clip)]

    def _ask(self, batch: Batch, clock: Clock) -> Signals:
        assert self.teacher is not None
        return (self.teacher.at(clock) if isinstance(self.teacher, teachers.Sequence) else self.teacher)(batch)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``label`` and one per objective, already weighted; notes the accuracy on the batch."""
        with tap(self.student, self._taps) if self._taps else nullcontext() as seen:
            z = logits_of(call(self.student, batch["input"]))
        terms = {}
        if self.label:
            label = O.cross_entropy(z, batch["label"], self.label_smoothing).mean()
            terms["label"] = label if self.label == 1 else self.label * label
        said = self._ask(batch, clock) if self.objectives else None
        for k, o in enumerate(self.objectives):
            assert said is not None
            name = o.name if o.name not in terms else f"{o.name} {k}"
            terms[name] = o.at(clock) * self._compare(k, o, z, seen, said, batch).mean()
        correct = (z.detach().argmax(-1) == batch["label"]).float().mean()
        return Terms(**terms).note(accuracy=correct)

    def _compare(self, k: int, o: Objective, z: Tensor, seen: Any, said: Signals, batch: Batch) -> Tensor:
        if o.level not in ON_LOGITS:
            return self.comparisons[str(k)]([seen[p] for p in o.taps[0]], [said[p] for p in o.taps[1]])
        _, fn, defaults = KNOWN[o.name]
        options = {**defaults, **{n: v for n, v in o.options.items() if n in defaults}}
        labels = [batch["label"]] if o.level == "labelled" else []
        return fn(said["logits"], z, *labels, **options)

    def outcome(self) -> Any:
        """The student."""
        return self.student


def taps_of(objectives: Sequence[Objective | str]) -> list[str]:
    """The module paths that the teacher must answer with: ``Frozen(model, taps=taps_of(objectives))``.

    Example:
        >>> taps_of(["kd:0.5", "feature:layer2=layer3:100", "flow:a>b=c>d:1"])
        ['layer3', 'c', 'd']
    """
    parsed = [Objective.parse(o) if isinstance(o, str) else o for o in objectives]
    return list(dict.fromkeys(p for o in parsed for p in o.taps[1]))
