"""Loss values of Stillhouse beside those of torchdistill 1.1.5, timm, TRL, TextBrewer and KD-Lib on random inputs.

Who divides by what stands here as data: for every pair the relation that holds between the two values, and its reason
in words. The relation is checked numerically, so a wrong explanation fails. What is not installed is left out:
`pip install torchdistill==1.1.5 timm`, and `pip install --no-deps trl textbrewer KD-Lib`, whose pins would move half
of an environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import objectives as O

N, C, CHANNELS, SIDE, WIDTH, T = 12, 10, 6, 5, 32, 4.0
TOLERANCE = 1e-5
ENDS = {f"{s}_module_{k}": v for s in ("student", "teacher") for k, v in (("path", "m"), ("io", "output"))}


@dataclass
class Inputs:
    """What both sides see; float32 as in training, positive maps as behind a ReLU."""

    seed: int
    labels: Tensor = field(init=False)
    logits: tuple[Tensor, Tensor] = field(init=False)  # of teacher and student
    maps: tuple[Tensor, Tensor] = field(init=False)  # (N, CHANNELS, SIDE, SIDE)
    late: tuple[Tensor, Tensor] = field(init=False)  # a later layer's, of the same positions
    rows: tuple[Tensor, Tensor] = field(init=False)  # (N, WIDTH) and (N, WIDTH / 2)
    variance: Tensor = field(init=False)  # (CHANNELS,), before its softplus

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.labels = torch.randint(0, C, (N,), generator=g)
        self.logits = 3 * draw(N, C), 2 * draw(N, C)
        self.maps = draw(N, CHANNELS, SIDE, SIDE).relu(), draw(N, CHANNELS, SIDE, SIDE).relu()
        self.late = draw(N, 4, SIDE, SIDE).relu(), draw(N, 4, SIDE, SIDE).relu()
        self.rows = draw(N, WIDTH), draw(N, WIDTH // 2)
        self.variance = draw(CHANNELS)


PACKAGES = {
    "torchdistill": "torchdistill", "timm": "timm", "TRL": "trl", "TextBrewer": "textbrewer", "KD-Lib": "KD_Lib",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One objective here and there.

    Attributes:
        name: of the objective here. other: the library and the class there, with the settings that matter.
        ours: its values per sample (or a number), from the inputs. theirs: the value there.
        relate: what their value is by our definition: from our per-sample values and the inputs; None is the mean.
        why: the difference in words; empty where the two are equal.
    """

    name: str
    other: str
    ours: Callable[[Inputs], Tensor]
    theirs: Callable[[Inputs], Tensor]
    relate: Callable[[Tensor, Inputs], Tensor] | None = None
    why: str = ""

    @property
    def library(self) -> str:
        return self.other.split()[0]

    @property
    def installed(self) -> bool:
        return find_spec(PACKAGES[self.library]) is not None

    def compare(self, i: Inputs) -> tuple[float, float, float]:
        """Our mean, their value, and what their value should be."""
        mine = self.ours(i)
        expected = mine.mean() if self.relate is None else self.relate(mine, i)
        return mine.mean().item(), self.theirs(i).item(), expected.item()


# -- torchdistill -----------------------------------------------------------------------------------------------


def torchdistill(name: str, student: Any, teacher: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The value of one of its losses on given outputs of a module called ``m``."""
    from torchdistill.losses import mid_level

    made = getattr(mid_level, name)(**kwargs)
    return torch.as_tensor(made(*({k: {"output": v} for k, v in side.items()} for side in (student, teacher)), *args))


def on_logits(name: str, alpha: float | None = None, **kwargs: Any) -> Callable[[Inputs], Tensor]:
    extra = {} if alpha is None else {"alpha": alpha}

    def value(i: Inputs) -> Tensor:
        return torchdistill(name, {"m": i.logits[1]}, {"m": i.logits[0]}, i.labels, **ENDS, **extra, **kwargs)

    return value


def on_rows(name: str, **kwargs: Any) -> Callable[[Inputs], Tensor]:
    def value(i: Inputs) -> Tensor:
        return torchdistill(name, {"m": i.rows[1].clone()}, {"m": i.rows[0].clone()}, **kwargs)

    return value


def on_maps(name: str, pairs: str, student: Callable[[Inputs], Any] = lambda i: i.maps[1], **kwargs: Any) -> Any:
    pair = {side: {"io": "output", "path": "m"} for side in ("student", "teacher")}

    def value(i: Inputs) -> Tensor:
        return torchdistill(name, {"m": student(i)}, {"m": i.maps[0]}, **{pairs: {"one": pair}}, **kwargs)

    return value


def fsp(i: Inputs) -> Tensor:
    ends = {
        f"{side}_{at}": {"io": "output", "path": at} for side in ("student", "teacher") for at in ("first", "second")
    }
    student, teacher = ({"first": i.maps[k], "second": i.late[k]} for k in (1, 0))
    return torchdistill("FSPLoss", student, teacher, fsp_pairs={"one": ends})


def wrapped_mse(i: Inputs) -> Tensor:
    from torchdistill.losses.mid_level import SimpleLossWrapper

    ends: Any = {
        "input": {"is_from_teacher": False, "module_path": "m", "io": "output"},
        "target": {"is_from_teacher": True, "module_path": "m", "io": "output"},
    }
    sides = ({"m": {"output": i.maps[k]}} for k in (1, 0))
    return SimpleLossWrapper(nn.MSELoss(), **ends)(*sides, None)


def flows(i: Inputs) -> tuple[Tensor, Tensor]:
    teacher, student = (O.flow(i.maps[k], i.late[k]) for k in (0, 1))
    return teacher, student


def taxicab(x: Tensor) -> Tensor:
    """Gram matrix of the samples with rows of L1 length 1."""
    g = x.flatten(1) @ x.flatten(1).T
    return g / g.abs().sum(1, keepdim=True)


def with_labels(soft: Callable[[Tensor, Tensor, float], Tensor], alpha: float) -> Callable[[Inputs], Tensor]:
    return lambda i: alpha * O.cross_entropy(i.logits[1], i.labels) + (1 - alpha) * soft(*i.logits, T)


def standardised(t: Tensor, s: Tensor, temperature: float) -> Tensor:
    return O.kl(O.standardise(t), O.standardise(s), temperature)


RKD: dict[str, Any] = {"student_output_path": "m", "teacher_output_path": "m", "reduction": "mean"}


# -- timm -------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A network whose answer is given."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = nn.Parameter(answer.clone())
        self.num_classes = answer.shape[1]
        self.pretrained_cfg = self.default_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, x: Tensor) -> Tensor:
        return self.answer


def timm_kd(i: Inputs) -> Tensor:
    from timm.task.distillation import DistillationTeacher, LogitDistillationTask

    teacher = DistillationTeacher(Given(i.logits[0]), num_classes=C)
    task = LogitDistillationTask(
        Given(i.logits[1]), teacher, nn.CrossEntropyLoss(), task_loss_weight=0.5, temperature=T, verbose=False
    )
    said = task(torch.zeros(N, 3, 2, 2), i.labels)
    return said["kd_loss"].detach()


# -- TRL, TextBrewer, KD-Lib ------------------------------------------------------------------------------------


def trl_jsd(beta: float) -> Callable[[Inputs], Tensor]:
    def value(i: Inputs) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        teacher, student = (z[:, None] for z in i.logits)  # sentences of one token
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=T)

    return value


def textbrewer(name: str, student: Callable[[Inputs], Any], teacher: Callable[[Inputs], Any], **kwargs: Any) -> Any:
    def value(i: Inputs) -> Tensor:
        from textbrewer import losses

        return getattr(losses, name)(student(i), teacher(i), **kwargs)

    return value


def tokens(k: int, *of: str) -> Callable[[Inputs], Any]:
    """Maps of the k-th side as (N, positions, CHANNELS); several as a list."""
    made = [lambda i, name=name: getattr(i, name)[k].flatten(2).transpose(1, 2) for name in of]
    return made[0] if len(made) == 1 else lambda i: [m(i) for m in made]


def kd_lib(module: str, name: str) -> Callable[[Inputs], Tensor]:
    """One of its losses from the file alone: the package itself asks for what transformers no longer has."""

    def value(i: Inputs) -> Tensor:
        root = find_spec("KD_Lib")
        assert root is not None and root.submodule_search_locations
        path = Path(root.submodule_search_locations[0], "KD", "vision", module, "loss_metric.py")
        spec = spec_from_file_location(f"kd_lib_{module}", path)
        assert spec is not None and spec.loader is not None
        losses = module_from_spec(spec)
        spec.loader.exec_module(losses)
        if module == "RKD":
            return getattr(losses, name)()(*i.rows)
        return getattr(losses, name)()(*([m] for m in i.maps))

    return value


def entropy(z: Tensor) -> Tensor:
    return -((z / T).softmax(1) * (z / T).log_softmax(1)).sum(1).mean()


def whole_map(x: Tensor) -> Tensor:
    return nn.functional.normalize(x.square().flatten(1))


PAIRS = [
    Pair("kd + labels", "torchdistill KDLoss, α 0.1", with_labels(O.kl, 0.1), on_logits("KDLoss", 0.1, temperature=T)),
    Pair("kd", "torchdistill KDLoss, α 0", lambda i: O.kl(*i.logits, T), on_logits("KDLoss", 0.0, temperature=T),
         lambda v, i: v.mean() / T**2, "with α = 0 (or no labels) it leaves the factor T² out, which it has otherwise"),
    Pair("kd", "timm LogitDistillationTask", lambda i: O.kl(*i.logits, T), timm_kd),
    Pair("kd", "TRL GKDTrainer, β 0", lambda i: O.kl(*i.logits, T), trl_jsd(0.0), lambda v, i: v.mean() / T**2,
         "it leaves the factor T² out"),
    Pair("reverse", "TRL GKDTrainer, β 1", lambda i: O.reverse_kl(*i.logits, T), trl_jsd(1.0),
         lambda v, i: v.mean() / T**2, "it leaves the factor T² out"),
    Pair("js", "TRL GKDTrainer, β 0.3", lambda i: O.jensen_shannon(*i.logits, T, 0.3), trl_jsd(0.3),
         lambda v, i: v.mean() / T**2, "it leaves the factor T² out"),
    Pair("kd", "TextBrewer kd_ce_loss", lambda i: O.kl(*i.logits, T),
         textbrewer("kd_ce_loss", lambda i: i.logits[1], lambda i: i.logits[0], temperature=T),
         lambda v, i: v.mean() / T**2 + entropy(i.logits[0]),
         "it is the cross-entropy, so the teacher's entropy more, and leaves the factor T² out"),
    Pair("logit-mse", "TextBrewer kd_mse_loss", lambda i: O.mse(*i.logits),
         textbrewer("kd_mse_loss", lambda i: i.logits[1], lambda i: i.logits[0])),
    Pair("standardised + labels", "torchdistill LogitStdKDLoss, α 0.1", with_labels(standardised, 0.1),
         on_logits("LogitStdKDLoss", 0.1, temperature=T)),
    Pair("dist", "torchdistill DISTLoss", lambda i: O.dist(*i.logits, T, 1.0, 2.0),
         on_logits("DISTLoss", tau=T, beta=1.0, gamma=2.0)),
    Pair("feature", "torchdistill MSELoss, wrapped", lambda i: O.mse(*i.maps), wrapped_mse),
    Pair("feature", "TextBrewer hid_mse_loss", lambda i: O.mse(*i.maps),
         textbrewer("hid_mse_loss", tokens(1, "maps"), tokens(0, "maps"))),
    Pair("cosine", "TextBrewer cos_loss", lambda i: O.cosine(*i.maps),
         textbrewer("cos_loss", lambda i: i.maps[1].flatten(1), lambda i: i.maps[0].flatten(1))),
    Pair("cosine", "TextBrewer pkd_loss", lambda i: O.cosine(*i.maps),
         textbrewer("pkd_loss", lambda i: i.maps[1].flatten(1), lambda i: i.maps[0].flatten(1)),
         lambda v, i: 2 * v.mean(), "it is the squared distance of directions, 2 − 2 cos"),
    Pair("attention", "torchdistill ATLoss, code", lambda i: O.attention_transfer(*i.maps),
         on_maps("ATLoss", "at_pairs", mode="code"), lambda v, i: v.mean() / SIDE**2,
         "it takes the mean over positions, as the authors' code; ours is their sum, the paper's distance squared"),
    Pair("attention", "torchdistill ATLoss, paper", lambda i: O.attention_transfer(*i.maps),
         on_maps("ATLoss", "at_pairs", mode="paper"), lambda v, i: v.sqrt().mean(),
         "it is the distance itself, as the paper writes it; ours is squared, as in the authors' code"),
    Pair("attention", "KD-Lib ATLoss", lambda i: O.attention_transfer(*i.maps), kd_lib("attention", "ATLoss"),
         lambda v, i: (whole_map(i.maps[0]) - whole_map(i.maps[1])).square().mean(),
         "it does not sum over the channels first: whole squared maps of length 1, not maps of attention"),
    Pair("flow", "TextBrewer fsp_loss", lambda i: O.mse(*flows(i)),
         textbrewer("fsp_loss", tokens(1, "maps", "late"), tokens(0, "maps", "late"))),
    Pair("flow", "torchdistill FSPLoss", lambda i: O.mse(*flows(i)), fsp,
         lambda v, i: (flows(i)[0] - flows(i)[1]).square().sum(1).sqrt().sum(1).mean(),
         "it sums the lengths of the columns of G_T − G_S; ours is the mean of squares, the paper's distance over the "
         "number of entries (and where maps differ in size it pools by the maximum, ours by the mean)"),
    Pair("vid", "torchdistill VIDLoss", lambda i: O.variational(i.maps[0], i.maps[1], i.variance),
         on_maps("VIDLoss", "feature_pairs",
                 lambda i: (i.maps[1], (nn.functional.softplus(i.variance) + 1e-5).view(1, -1, 1, 1)))),
    Pair("icc", "torchdistill ChSimLoss", lambda i: O.inter_channel(*i.maps), on_maps("ChSimLoss", "feature_pairs"),
         lambda v, i: v.mean() / N, "it divides by the batch twice, as the authors' code"),
    Pair("similarity", "torchdistill SPKDLoss", lambda i: O.similarity(*i.maps),
         lambda i: torchdistill("SPKDLoss", {"m": i.maps[1]}, {"m": i.maps[0]}, student_output_path="m",
                                teacher_output_path="m", reduction="batchmean"),
         lambda v, i: (taxicab(i.maps[0]) - taxicab(i.maps[1])).square().sum() / N**2,
         "it divides a row by the sum of its entries (F.normalize(G, 1) is p = 1); the paper and ours by its length"),
    Pair("rkd-distance", "torchdistill RKDLoss", lambda i: O.relative_distance(*i.rows),
         on_rows("RKDLoss", **RKD, dist_factor=1.0, angle_factor=0.0)),
    Pair("rkd-angle", "torchdistill RKDLoss", lambda i: O.relative_angle(*i.rows),
         on_rows("RKDLoss", **RKD, dist_factor=0.0, angle_factor=1.0)),
    Pair("rkd-distance", "KD-Lib RKDDistanceLoss", lambda i: O.relative_distance(*i.rows),
         kd_lib("RKD", "RKDDistanceLoss")),
    Pair("rkd-angle", "KD-Lib RKDAngleLoss", lambda i: O.relative_angle(*i.rows), kd_lib("RKD", "RKDAngleLoss")),
    Pair("pkt", "torchdistill PKTLoss", lambda i: O.probabilistic(*i.rows), on_rows("PKTLoss", **ENDS),
         lambda v, i: v.mean() / N, "it takes the mean over n² pairs, as the authors' code; ours is a KL per sample"),
]  # fmt: skip
APART = {  # objectives of one name that are different functions: no factor relates them
    "contrastive": "torchdistill CRDLoss: negatives from a memory of the whole training set, and NCE; ours: the other "
    "samples of the batch",
    "overhaul": "torchdistill AltActTransferLoss is activation boundaries (AB), the paper before it",
    "nst": "TextBrewer mmd_loss compares the positions of one layer with those of another; ours: the channels' "
    "selectivity over positions, a polynomial kernel",
}
ALONE = ("symmetric", "pseudo", "dkd", "nkd", "pld", "softmax", "cka", "mi", "simkd")  # what none of them has


def compared(seeds: int = 3) -> list[dict[str, Any]]:
    """Every pair on several random inputs: the last values, and the largest relative miss of the stated relation."""
    found = []
    for pair in PAIRS:
        if not pair.installed:
            continue
        each = [pair.compare(Inputs(seed)) for seed in range(seeds)]
        miss = max(abs(theirs - expected) / abs(expected) for _, theirs, expected in each)
        ours, theirs, expected = each[-1]
        found.append({
            "objective": pair.name, "there": pair.other, "ours": ours, "theirs": theirs, "expected": expected,
            "miss": miss, "agrees": miss <= TOLERANCE, "equal": pair.relate is None, "why": pair.why,
        })  # fmt: skip
    return found
