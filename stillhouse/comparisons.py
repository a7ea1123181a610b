"""What is compared, where, and how much it weighs: objectives as text, and comparisons of features with projectors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.critics import Critic
from stillhouse.errors import UserError, did_you_mean
from stillhouse.system import Clock

Level = Literal["logits", "labelled", "same", "positions", "channels", "structure", "both", "flow", "head"]


def _standardised(t: Tensor, s: Tensor, T: float = 2.0) -> Tensor:
    return O.kl(O.standardise(t.detach()), O.standardise(s), T)


def _logit_mse(t: Tensor, s: Tensor, T: float = 1.0) -> Tensor:
    return O.mse(t / T, s / T)


def _softmax(t: Tensor, s: Tensor) -> Tensor:
    return O.soft_cross_entropy(t.flatten(1), s.flatten(1))


def _pseudo(t: Tensor, s: Tensor) -> Tensor:
    return O.cross_entropy(s, t.argmax(-1))


# What an objective compares: logits; logits and labels; features of one shape (a projector on the student sees to
# that); maps with the same positions; maps with the same channels (the projector again); features of any width;
# features projected on both sides; two layers of each; the features behind a projector that the teacher's head reads.
KNOWN: dict[str, tuple[Level, Callable[..., Tensor], dict[str, float]]] = {
    "kd": ("logits", O.kl, {"T": 4.0}),
    "reverse": ("logits", O.reverse_kl, {"T": 4.0}),
    "symmetric": ("logits", O.symmetric_kl, {"T": 4.0}),
    "js": ("logits", O.jensen_shannon, {"T": 4.0, "beta": 0.5}),
    "standardised": ("logits", _standardised, {"T": 2.0}),
    "dist": ("logits", O.dist, {"T": 1.0, "beta": 1.0, "gamma": 1.0}),
    "logit-mse": ("logits", _logit_mse, {"T": 1.0}),
    "pseudo": ("logits", _pseudo, {}),
    "dkd": ("labelled", O.decoupled_kl, {"T": 4.0, "alpha": 1.0, "beta": 8.0}),
    "nkd": ("labelled", O.normalised_kd, {"T": 1.0, "gamma": 1.0}),
    "pld": ("labelled", O.plackett_luce, {"T": 1.0, "topk": 0}),
    "feature": ("same", O.mse, {}),
    "cosine": ("same", O.cosine, {}),
    "softmax": ("same", _softmax, {}),
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
    "mi": ("structure", O.mutual_information, {"alpha": 0.9, "width": 64, "hidden": 128, "layers": 0}),
    "contrastive": ("both", partial(O.contrastive, detach_teacher=False), {"T": 0.1, "width": 128}),
    "flow": ("flow", O.mse, {}),
    "simkd": ("head", O.mse, {}),
}
ON_LOGITS = ("logits", "labelled")
SCHEDULE = ("ramp", "until")
FRONT = 8  # most class and register tokens in front of an image's patches
# What an option may be, for objectives in general and for single ones: whether it is so, and how that is said.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "T": (lambda v: 0 < v < math.inf, "a positive number"),
    "alpha": (lambda v: 0 <= v < math.inf, "a number >= 0"),
    "beta": (lambda v: 0 <= v < math.inf, "a number >= 0"),
    "gamma": (lambda v: 0 <= v < math.inf, "a number >= 0"),
    "margin": (lambda v: -math.inf < v <= 0, "a number <= 0"),
    "p": (lambda v: 1 <= v < math.inf, "a number >= 1"),
    "ramp": (lambda v: 0 <= v <= 1, "a part of the run in [0, 1]"),
    "until": (lambda v: 0 < v <= 1, "a part of the run in (0, 1]"),
    "js beta": (lambda v: 0 < v < 1, "a number between 0 and 1 (the ends are kd and reverse)"),
    "pld T": (lambda v: v > 0, "a positive number, or inf"),
    "mi alpha": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
    "token": (lambda v: v % 1 == 0, "a position, such as 0 or -1"),
    **{k: (lambda v: v >= 1 and v % 1 == 0, "a whole number >= 1") for k in ("width", "hidden")},
    **{k: (lambda v: v >= 0 and v % 1 == 0, "a whole number >= 0") for k in ("layers", "topk")},
}


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
            and ``until`` (the part after which it is 0); and ``token``, for features of token sequences, the position
            that is compared, such as 0 for [CLS], instead of the mean over a sentence's own tokens.

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
        known = [*KNOWN[self.name][2], *SCHEDULE, *(() if self.level in ON_LOGITS else ("token",))]
        for key, value in self.options.items():
            if key not in known:
                raise UserError(f"objective {self.name}: no option {key!r}; {did_you_mean(key, known)}")
            fits, expected = RANGES.get(f"{self.name} {key}", RANGES[key])
            if not fits(value):
                raise UserError(f"objective {self.name}: {key} must be {expected}, got {value:g}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"objective {self.name}: the weight must be a number >= 0, got {self.weight}")
        if self.level in (*ON_LOGITS, "head") and self.student:
            where = "finds the last feature maps itself" if self.level == "head" else "compares logits"
            raise UserError(f"objective {self.name} {where} and takes no path, got {self.student!r}")
        if self.level not in (*ON_LOGITS, "head") and not (self.student and self.teacher):
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

    def over(self, clock: Clock) -> bool:
        """Whether the run is past its ``until``."""
        return clock.progress >= self.options.get("until", 1.0)

    def at(self, clock: Clock) -> float:
        """The weight at this moment of the run."""
        ramp = self.options.get("ramp", 0.0)
        if self.over(clock):
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

    Positions of maps that differ are average-pooled to the smaller number; tokens of an image, which become a map
    (n, d, length, 1), are put back into rows and columns for that (see `grid`). Channels that differ are brought to the
    teacher's by a 1×1 convolution (a linear layer where there are no positions) on the student. Built for the shapes of
    one example batch.

    Args:
        image: (height, width) of the inputs where they are images, so that sequences are of patches.
        margin: of ``overhaul``, (C,), where its options give none: see `objectives.negative_mean`.
    """

    margin: Tensor | None

    def __init__(
        self,
        objective: Objective,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        *,
        image: Sequence[int] | None = None,
        margin: Tensor | None = None,
    ):
        super().__init__()
        self.objective, self.image = objective, image
        _, self.fn, defaults = KNOWN[objective.name]
        self.register_buffer("margin", margin, persistent=False)
        chosen = {k: v for k, v in objective.options.items() if k not in (*SCHEDULE, "token")}
        self.options = {k: v for k, v in {**defaults, **chosen}.items() if k != "width"}
        self.sides = nn.ModuleList(nn.Identity() for _ in student)
        self.other: nn.Module = nn.Identity()
        self.raw_variance: nn.Parameter | None = None
        if objective.level in ("same", "channels", "flow"):
            self.sides = nn.ModuleList(_projector(s, t.shape[1]) for s, t in zip(student, teacher, strict=True))
        if objective.name == "vid":
            self.raw_variance = nn.Parameter(torch.full((teacher[0].shape[1],), math.log(math.expm1(5.0))))
        self.critic: Critic | None = None
        if objective.name == "mi":
            sizes = {k: int(v) for k, v in {**defaults, **chosen}.items() if k != "alpha"}
            self.critic = Critic(student[0], teacher[0], **sizes)
        if objective.level == "both":
            width = int({**defaults, **chosen}["width"])
            self.sides, self.other = nn.ModuleList([_Flat(student[0], width)]), _Flat(teacher[0], width)
        self(student, teacher)  # shapes that cannot be compared are said here

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Per-sample values (n,) of the student's features against the teacher's (detached)."""
        t = [f.detach() for f in teacher]
        if self.objective.level not in ("structure", "channels"):
            student, t = _same_positions(student, t, self.image)
        s = [side(f) for side, f in zip(self.sides, student, strict=True)]
        if self.critic is not None:
            return -self.bound(s[0], t[0])
        if self.objective.level == "flow":
            return O.mse(O.flow(*t), O.flow(*s))
        if self.raw_variance is not None:
            return O.variational(t[0], s[0], self.raw_variance)
        if self.margin is not None:
            return O.overhaul(t[0], s[0], self.margin.to(t[0]))
        return self.fn(self.other(t[0]), s[0], **self.options)

    def bound(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of ``mi``: the bound Î_α per sample, (n,), nats; the objective is its negative."""
        assert self.critic is not None
        scores, baseline = self.critic(student, teacher)
        return O.mutual_information(scores, baseline, self.options["alpha"])

    def describe(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[str]:
        """A row for people: the objective, both shapes, and what it learns."""
        shapes = [" > ".join("×".join(map(str, f.shape[1:])) for f in fs) for fs in (student, teacher)]
        learned = sum(p.numel() for p in self.parameters())
        made = [f"{learned:,} parameters"] * bool(learned) + ["margins of a batch norm"] * (self.margin is not None)
        return [str(self.objective), *shapes, ", ".join(made) or "–"]


class _Flat(nn.Sequential):
    """Mean over positions, then a linear layer: the embedding of a feature map."""

    def __init__(self, like: Tensor, width: int):
        pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)] if like.dim() == 4 else []
        flat = math.prod(like.shape[1:]) if like.dim() != 4 else like.shape[1]
        super().__init__(*pool, nn.Flatten(), nn.Linear(flat, width))


def as_map(feature: Tensor, inputs: Any, token: float | None = None, keep: float = 0) -> Tensor:
    """A feature as objectives take it: (n, d), or a map (n, d, height, width).

    Maps of networks that keep their channels last (Swin), (n, height, width, d), are turned. Token sequences
    (n, length, d) become their mean over a sentence's own tokens, (n, d), where the inputs have an
    ``attention_mask`` of that length: sentences and tokenizers differ in length. Without a mask, as in vision
    transformers, they become maps (n, d, length, 1).

    Args:
        feature: what was tapped. inputs: what the network was called with.
        token: take this position of a sequence instead.
        keep: leave sequences with a mask as they are, (n, length, d), with zeros where the sentence has no token.

    Raises:
        UserError: a sequence without that position.
    """
    if feature.dim() == 4 and isinstance(inputs, Tensor) and inputs.dim() == 4:
        shape = tuple(inputs.shape[2:])
        last = not _alike(feature.shape[2:], shape) and _alike(feature.shape[1:3], shape)
        return feature.permute(0, 3, 1, 2) if last else feature
    if feature.dim() != 3:
        return feature
    if token is not None:
        if not -feature.shape[1] <= token < feature.shape[1]:
            raise UserError(f"token={token:g}: the sequence has {feature.shape[1]} positions, counted from 0")
        return feature[:, int(token)]
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or mask.shape != feature.shape[:2]:
        return feature.transpose(1, 2).unsqueeze(-1)
    own = mask.unsqueeze(-1).to(feature.dtype)
    if keep:
        return feature * own
    return (feature * own).sum(1) / own.sum(1).clamp(min=1)


def _projector(like: Tensor, channels: int) -> nn.Module:
    if like.shape[1] == channels:
        return nn.Identity()
    return nn.Conv2d(like.shape[1], channels, 1) if like.dim() == 4 else nn.Linear(like.shape[1], channels)


def _alike(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two grids (height, width) have the same proportions; a row more or less of unequal sides is rounding."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= (0 if b[0] == b[1] else max(b))


def grid(tokens: Tensor, like: Sequence[int]) -> Tensor:
    """Tokens of an image as its rows and columns: (n, d, length, 1) → (n, d, height, width).

    Patches lie row by row. Class and register tokens are in front of them and are left out: the fewest whose absence
    leaves a grid closest to the asked proportions.

    Args:
        like: (height, width) of a map of the same image.

    Raises:
        UserError: no such grid.

    Example:
        >>> grid(torch.zeros(2, 8, 65, 1), (7, 7)).shape
        torch.Size([2, 8, 8, 8])
    """
    length, found = tokens.shape[2], []
    for front in range(min(FRONT + 1, length)):
        rows = max(1, round(math.sqrt((length - front) * like[0] / like[1])))
        columns, rest = divmod(length - front, rows)
        if not rest and _alike((rows, columns), like):
            found.append((abs(rows * like[1] - columns * like[0]), front, rows, columns))
    if found:
        _, front, rows, columns = min(found)
        return tokens[:, :, front:, 0].unflatten(2, (rows, columns))
    raise UserError(f"{length} tokens are no grid of the proportions {like[0]}×{like[1]}; tap a map instead")


def _same_positions(
    student: Sequence[Tensor], teacher: Sequence[Tensor], image: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    s, t = list(student), list(teacher)
    for i, (a, b) in enumerate(zip(s, t, strict=True)):
        if a.dim() == b.dim() == 4 and a.shape[2:] != b.shape[2:]:
            if image:
                sizes = [image if _tokens(f) else tuple(f.shape[2:]) for f in (a, b)]
                a, b = (grid(f, size) if _tokens(f) else f for f, size in ((a, sizes[1]), (b, sizes[0])))
            size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
            s[i], t[i] = F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)
    return s, t


def _tokens(f: Tensor) -> bool:
    return f.shape[2] > 1 and f.shape[3] == 1


def taps_of(objectives: Sequence[Objective | str]) -> list[str]:
    """The module paths that the teacher must answer with: ``Frozen(model, taps=taps_of(objectives))``.

    Example:
        >>> taps_of(["kd:0.5", "feature:layer2=layer3:100", "flow:a>b=c>d:1"])
        ['layer3', 'c', 'd']
    """
    parsed = [Objective.parse(o) if isinstance(o, str) else o for o in objectives]
    return list(dict.fromkeys(p for o in parsed for p in o.taps[1]))
