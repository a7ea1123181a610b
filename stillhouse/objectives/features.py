"""Losses on intermediate features, one value per sample; teacher first, detached unless asked otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.objectives.logits import unit, upcast


def _pair(teacher: Tensor, student: Tensor, detach_teacher: bool, where: str) -> tuple[Tensor, Tensor]:
    if teacher.shape != student.shape or teacher.dim() < 2:
        raise UserError(
            f"{where}: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must have one shape "
            "(n, …); put a projector on the student"
        )
    teacher = teacher.detach() if detach_teacher else teacher
    return upcast(teacher).flatten(1), upcast(student).flatten(1)


def mse(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """mean_d (t_d − s_d)² per sample, over all its features d (FitNets, arXiv 1412.6550, without the ½).

    Args:
        teacher, student: (n, …) of one shape.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).
    """
    t, s = _pair(teacher, student, detach_teacher, "mse")
    return (t - s).square().mean(1)


def cosine(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """1 − ⟨t, s⟩ / (‖t‖ ‖s‖) per sample, on flattened features: 0 for equal directions, 2 for opposite ones.

    1, without gradient, where a side is zero.

    Args:
        teacher, student: (n, …) of one shape.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).
    """
    t, s = _pair(teacher, student, detach_teacher, "cosine")
    zero = (s == 0).all(1)
    value = F.cosine_similarity(t, torch.where(zero.unsqueeze(1), 1.0, s), dim=1)
    return 1 - value.masked_fill(zero, 0.0)


def smooth_l1(teacher: Tensor, student: Tensor, beta: float = 1.0, detach_teacher: bool = True) -> Tensor:
    """mean_d of e²/(2β) where |e| < β, |e| − β/2 elsewhere, e = t − s, per sample: Huber's loss over β.

    Args:
        teacher, student: (n, …) of one shape.
        beta: β > 0, where the parabola ends.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).

    Example:
        >>> smooth_l1(torch.tensor([[1.0], [4.0]]), torch.zeros(2, 1), beta=2.0)
        tensor([0.2500, 3.0000])
    """
    t, s = _pair(teacher, student, detach_teacher, "smooth_l1")
    return F.smooth_l1_loss(s, t, reduction="none", beta=beta).mean(1)


def overhaul(teacher: Tensor, student: Tensor, margin: Tensor | float = 0.0, detach_teacher: bool = True) -> Tensor:
    """Σ_d δ_d (t_d − s_d)² per sample, t ← max(t, margin), δ = 0 where s ≤ t ≤ 0 (arXiv 1904.01866).

    Features before the ReLU: where the teacher is off and the student further off, nothing is asked for.

    Args:
        teacher, student: (n, C, …) of one shape, before their ReLU.
        margin: (C,) or a number ≤ 0, the value that stands for "off": see `negative_mean`.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,), the sum over features; the authors divide it by a constant per layer.
    """
    m = torch.as_tensor(margin, dtype=teacher.dtype, device=teacher.device)
    clipped = torch.maximum(teacher, m.view(-1, *[1] * (teacher.dim() - 2)) if m.dim() else m)
    t, s = _pair(clipped, student, detach_teacher, "overhaul")
    return ((t - s).square() * ~((s <= t) & (t <= 0))).sum(1)


def negative_mean(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    """E[x | x < 0] of each channel behind a batch norm, x ~ N(bias, weight²): the margin of `overhaul`, (C,).

    μ − σ φ(μ/σ) / Φ(−μ/σ); channels that are almost never negative get −3σ, as in the authors' code.
    """
    mean, std = norm.bias.detach().double(), norm.weight.detach().double().abs().clamp_min(1e-12)
    normal = torch.distributions.Normal(0.0, 1.0)
    below = normal.cdf(-mean / std)
    inside = mean - std * normal.log_prob(mean / std).exp() / below.clamp_min(1e-30)
    return torch.where(below > 1e-3, inside, -3 * std).to(norm.weight.dtype)


def variational(teacher: Tensor, mean: Tensor, raw_variance: Tensor, detach_teacher: bool = True) -> Tensor:
    """mean_d ½ [log σ²_c + (t_d − μ_d)² / σ²_c] per sample, σ² = softplus(raw) + 1e-5 (VID, arXiv 1904.05835).

    The negative log-likelihood of the teacher's features under a Gaussian that the student predicts, without the
    constant ½ log 2π.

    Args:
        teacher, mean: (n, C, …) of one shape; `mean` is the student's feature after its regressor.
        raw_variance: (C,) learned.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,); may be negative.
    """
    variance = F.softplus(upcast(raw_variance)) + 1e-5
    variance = variance.view(-1, *[1] * (teacher.dim() - 2)).expand_as(teacher).flatten(1)
    t, m = _pair(teacher, mean, detach_teacher, "variational")
    return 0.5 * (variance.log() + (t - m).square() / variance).mean(1)


def neuron_selectivity(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """MMD² of the channels' activation patterns under (xᵀy)², per sample (NST, arXiv 1707.01219).

    Every channel is one pattern over positions, of length 1: mean k(t,t') + mean k(s,s') − 2 mean k(t,s).

    Args:
        teacher, student: (n, C, …positions); channels may differ, positions must not.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,), ≥ 0.
    """
    _same_positions(teacher, student, "neuron_selectivity")
    teacher = teacher.detach() if detach_teacher else teacher
    t, s = (unit(upcast(f).flatten(2)) for f in (teacher, student))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT).square().mean((1, 2))

    return kernel(t, t) + kernel(s, s) - 2 * kernel(t, s)


def flow(early: Tensor, late: Tensor) -> Tensor:
    """G = F_early F_lateᵀ / positions: the flow between two layers, (n, C, …), (n, D, …) → (n, C, D) (FSP, CVPR 2017).

    Compare the flows of teacher and student with `mse`. The larger map is average-pooled to the smaller one's size.
    """
    if early.dim() != 4 or late.dim() != 4 or len(early) != len(late):
        raise UserError(
            f"flow: needs two feature maps (n, C, H, W) of one batch, got {tuple(early.shape)} and {tuple(late.shape)}"
        )
    size = (min(early.shape[2], late.shape[2]), min(early.shape[3], late.shape[3]))
    a, b = (F.adaptive_avg_pool2d(upcast(f), size).flatten(2) for f in (early, late))
    return a @ b.mT / a.shape[2]


def _same_positions(teacher: Tensor, student: Tensor, where: str) -> None:
    ends = [(f.shape[0], *f.shape[2:]) for f in (teacher, student)]
    if teacher.dim() < 3 or student.dim() < 3 or ends[0] != ends[1]:
        raise UserError(
            f"{where}: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be (n, C, positions …) "
            "with the same n and positions; resize one of them"
        )


def attention_transfer(teacher: Tensor, student: Tensor, p: int = 2, detach_teacher: bool = True) -> Tensor:
    """‖ a(t)/‖a(t)‖ − a(s)/‖a(s)‖ ‖² per sample, a(f) = Σ_c |f_c|^p flattened over positions.

    The squared distance, summed over positions (Zagoruyko & Komodakis, arXiv 1612.03928: the paper writes the
    distance itself, the authors' code the squared one divided by the number of positions).

    Args:
        teacher, student: (n, C, H, W); the numbers of channels may differ, the positions must not.
        p: power of the activation, ≥ 1.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,), between 0 and 2.

    Raises:
        UserError: not four-dimensional, or different batch or positions.
    """
    ends = [(f.shape[0], *f.shape[2:]) for f in (teacher, student)]
    if teacher.dim() != 4 or student.dim() != 4 or ends[0] != ends[1]:
        raise UserError(
            f"attention_transfer: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be "
            "(n, C, H, W) with the same n, H, W; resize one of them"
        )
    if p < 1:
        raise UserError(f"attention_transfer: p must be at least 1, got {p}; a smaller power has no gradient at 0")
    teacher = teacher.detach() if detach_teacher else teacher
    t, s = (unit(upcast(f).abs().pow(p).sum(1).flatten(1)) for f in (teacher, student))
    return (t - s).square().sum(1)


def where_agreed(values: Tensor, teacher_logits: Tensor, student_logits: Tensor, share: Tensor | None = None) -> Tensor:
    """v_k · 1[argmax t_k = argmax z_k] / share per sample: its mean is that of v over the samples that agree.

    Args:
        values: (n,), such as `mse` of features; their gradient passes, the choice has none.
        teacher_logits, student_logits: (n, C).
        share: the part of all samples that agree, where these are a process's share of them; None takes it of these.

    Returns:
        (n,); zeros where no sample agrees. Source: GPUSQ-ViT (arXiv 2305.10727), which compares features so.

    Example:
        >>> t, z = torch.eye(3), torch.eye(3)[[0, 2, 2]]
        >>> where_agreed(torch.tensor([1.0, 50.0, 3.0]), t, z).mean()
        tensor(2.)
    """
    if values.shape != teacher_logits.shape[:1] or teacher_logits.shape != student_logits.shape:
        shapes = [tuple(x.shape) for x in (values, teacher_logits, student_logits)]
        raise UserError(f"where_agreed: expected values (n,) and two logits (n, C), got {shapes}")
    same = (teacher_logits.argmax(-1) == student_logits.argmax(-1)).to(values.dtype)
    share = same.mean() if share is None else share.to(values.dtype)
    return torch.where(same > 0, values / share.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
