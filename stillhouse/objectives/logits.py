"""Losses and targets on logits. One value per sample; the caller takes the mean where it can be seen.

Logits are (..., n, C): leading dimensions, such as peers, pass through. Every KL is forward, teacher ‖
student, and carries its factor T². Half-precision logits are computed in float32; float64 stays.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError


def upcast(x: Tensor) -> Tensor:
    """At least float32: float16 and bfloat16 become float32, float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    """x / max(‖x‖, eps) along `dim`; zero vectors stay zero and get no gradient, where 1/eps times it would be wrong.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    zero = (x == 0).all(dim, keepdim=True)
    return F.normalize(torch.where(zero, 1.0, x), dim=dim, eps=eps).masked_fill(zero, 0.0)


def _same_shape(teacher: Tensor, student: Tensor, where: str) -> None:
    if teacher.shape != student.shape:
        raise UserError(
            f"{where}: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} differ in "
            "shape; check the number of classes of both"
        )


def _marked(target: Tensor, logits: Tensor) -> Tensor:
    """Where the label stands, (n, C)."""
    y = target.argmax(-1) if target.is_floating_point() else target
    return F.one_hot(y, logits.shape[-1]).bool()


def _peers(z: Tensor, where: str, least: int = 1) -> Tensor:
    if z.dim() != 3 or z.shape[0] < least:
        raise UserError(f"{where}: needs logits of >= {least} peers as (M, n, C), got {tuple(z.shape)}")
    return upcast(z)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per sample, −Σ_c y_c log softmax(z)_c.

    Args:
        logits: (..., n, C).
        target: class indices (n,) or probabilities (n, C), shared by all leading dimensions; or with them.
        label_smoothing: s in y ← (1−s)·y + s/C.

    Returns:
        (..., n).

    Raises:
        UserError: shapes that do not fit.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])
    """
    z = upcast(logits)
    soft = target.is_floating_point()
    shape = z.shape if soft else z.shape[:-1]
    if z.dim() < 2 or tuple(target.shape) not in (tuple(shape), tuple(shape[z.dim() - 2 :])):
        raise UserError(
            f"cross_entropy: logits {tuple(logits.shape)} need labels {tuple(z.shape[-2:-1])} or soft "
            f"targets {tuple(z.shape[-2:])}, got {tuple(target.shape)}"
        )
    y = target.expand(shape)
    y = y.reshape(-1, z.shape[-1]).to(z.dtype) if soft else y.reshape(-1)
    flat = F.cross_entropy(z.reshape(-1, z.shape[-1]), y, reduction="none", label_smoothing=label_smoothing)
    return flat.view(z.shape[:-1])


def kl(teacher_logits: Tensor, student_logits: Tensor, T: float = 1.0, detach_teacher: bool = True) -> Tensor:
    """T² · KL(softmax(t/T) ‖ softmax(s/T)) per sample (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        teacher_logits, student_logits: (..., n, C). The teacher is the first argument.
        T: temperature; T² keeps the size of the gradient, which is T·(softmax(s/T) − softmax(t/T)).
        detach_teacher: no gradient to the teacher's logits.

    Returns:
        (..., n), the sum over classes.

    Raises:
        UserError: teacher and student of different shapes.

    Example:
        >>> kl(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, 0.0]]), T=2)
        tensor([0.3652])
    """
    _same_shape(teacher_logits, student_logits, "kl")
    teacher = teacher_logits.detach() if detach_teacher else teacher_logits
    log_p = F.log_softmax(upcast(teacher) / T, -1)
    log_q = F.log_softmax(upcast(student_logits) / T, -1)
    return T**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def soft_cross_entropy(
    teacher_logits: Tensor, student_logits: Tensor, T: float = 1.0, detach_teacher: bool = True
) -> Tensor:
    """−T² Σ_c softmax(t/T)_c log softmax(s/T)_c per sample: `kl` plus the teacher's entropy.

    Same gradient for the student as `kl`; it is not zero where the two agree. Arguments as for `kl`.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.6931])
    """
    _same_shape(teacher_logits, student_logits, "soft_cross_entropy")
    teacher = teacher_logits.detach() if detach_teacher else teacher_logits
    p = F.softmax(upcast(teacher) / T, -1)
    return -(T**2) * (p * F.log_softmax(upcast(student_logits) / T, -1)).sum(-1)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor, T: float = 1.0, detach_teacher: bool = True) -> Tensor:
    """T² · KL(softmax(s/T) ‖ softmax(t/T)) per sample: seeks the teacher's modes, where `kl` covers all of them.

    Arguments and result as for `kl`; the teacher is still the first argument.
    """
    _same_shape(teacher_logits, student_logits, "reverse_kl")
    teacher = teacher_logits.detach() if detach_teacher else teacher_logits
    return kl(student_logits, teacher, T, detach_teacher=False)


def symmetric_kl(teacher_logits: Tensor, student_logits: Tensor, T: float = 1.0, detach_teacher: bool = True) -> Tensor:
    """T² · [KL(p ‖ q) + KL(q ‖ p)] / 2 per sample, p of the teacher and q of the student.

    Arguments and result as for `kl`. Some codes leave the ½ out.
    """
    forward = kl(teacher_logits, student_logits, T, detach_teacher)
    return (forward + reverse_kl(teacher_logits, student_logits, T, detach_teacher)) / 2


def jensen_shannon(
    teacher_logits: Tensor, student_logits: Tensor, T: float = 1.0, beta: float = 0.5, detach_teacher: bool = True
) -> Tensor:
    """T² · [β KL(p ‖ m) + (1−β) KL(q ‖ m)] per sample, m = β p + (1−β) q; at most T² log 2 (β = ½).

    Args:
        beta: weight of the teacher in the mixture, in (0, 1) (the generalised form of GKD, arXiv 2306.13649).

    Other arguments and result as for `kl`.
    """
    _same_shape(teacher_logits, student_logits, "jensen_shannon")
    if not 0 < beta < 1:
        raise UserError(f"jensen_shannon: beta must lie between 0 and 1, got {beta}; the ends are kl and reverse_kl")
    teacher = teacher_logits.detach() if detach_teacher else teacher_logits
    log_p = F.log_softmax(upcast(teacher) / T, -1)
    log_q = F.log_softmax(upcast(student_logits) / T, -1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    parts = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return T**2 * parts.sum(-1)


def decoupled_kl(
    teacher_logits: Tensor,
    student_logits: Tensor,
    target: Tensor,
    T: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    detach_teacher: bool = True,
) -> Tensor:
    """T² · [α KL(b_t ‖ b_s) + β KL(p̂_t ‖ p̂_s)] per sample (decoupled KD, arXiv 2203.08679).

    b is (probability of the label, of all others), p̂ the distribution among the others. With α = 1 and β the
    teacher's probability of the others it is `kl`; a constant β keeps that part alive where the teacher is sure.

    Args:
        teacher_logits, student_logits: (n, C), C ≥ 2.
        target: (n,) class indices, or probabilities (n, C), whose largest is the label.
        T: temperature. alpha, beta: weights of the two parts.
        detach_teacher: no gradient to the teacher's logits.

    Returns:
        (n,).
    """
    _same_shape(teacher_logits, student_logits, "decoupled_kl")
    teacher = teacher_logits.detach() if detach_teacher else teacher_logits
    label = _marked(target, teacher)

    def parts(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(upcast(z) / T, -1)
        inside = log_p.masked_fill(~label, -math.inf).logsumexp(-1)
        outside = log_p.masked_fill(label, -math.inf).logsumexp(-1)
        among = (log_p - outside.unsqueeze(-1)).masked_fill(label, 0.0)
        return torch.stack([inside, outside], -1), among

    (b_t, a_t), (b_s, a_s) = parts(teacher), parts(student_logits)
    binary = (b_t.exp() * (b_t - b_s)).sum(-1)
    others = (a_t.exp() * (a_t - a_s)).masked_fill(label, 0.0).sum(-1)
    return T**2 * (alpha * binary + beta * others)


def normalised_kd(
    teacher_logits: Tensor,
    student_logits: Tensor,
    target: Tensor,
    T: float = 1.0,
    gamma: float = 1.0,
    detach_teacher: bool = True,
) -> Tensor:
    """−p_y log q_y − γ T² Σ_{c≠y} p̂_c log q̂_c per sample (normalised KD, NKD, arXiv 2303.13005).

    p, q are the teacher's and the student's softmax, p̂, q̂ their distributions among the other classes at temperature T.
    The cross-entropy of the label itself, which the paper adds, is not in it.

    Args:
        teacher_logits, student_logits: (n, C), C ≥ 2.
        target: (n,) class indices, or probabilities (n, C), whose largest is y.
        T: temperature of the second part. gamma: its weight.
        detach_teacher: no gradient to the teacher's logits.

    Returns:
        (n,); not zero where the two agree.

    Example:
        >>> normalised_kd(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]))  # log 3 / 3 + log 2
        tensor([1.0594])
    """
    _same_shape(teacher_logits, student_logits, "normalised_kd")
    teacher, student = upcast(teacher_logits.detach() if detach_teacher else teacher_logits), upcast(student_logits)
    label = _marked(target, teacher)
    own = F.softmax(teacher, -1)[label] * F.log_softmax(student, -1)[label]
    among = [F.log_softmax((z / T).masked_fill(label, -math.inf), -1) for z in (teacher, student)]
    others = (among[0].exp() * among[1].masked_fill(label, 0.0)).sum(-1)
    return -own - gamma * T**2 * others


def standardise(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """(z − mean_c z) / (std_c z + eps): logits of mean 0 and spread 1 (logit standardisation, arXiv 2403.01427).

    Put both sides of any loss on logits through it, and the student need not match their size, only their shape. The
    standard deviation has C−1 below, as in the authors' code. Logits that are all equal get a gradient of 1/eps: clip.

    Example:
        >>> standardise(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    z = upcast(logits)
    return (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + eps)


def dist(
    teacher_logits: Tensor,
    student_logits: Tensor,
    T: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    detach_teacher: bool = True,
) -> Tensor:
    """β T² (1 − ρ(p_i, q_i)) + γ T² mean_c (1 − ρ(p_·c, q_·c)) (DIST, arXiv 2205.10536), ρ Pearson's correlation.

    The first part compares the classes of one sample, the second the samples of one class, so that it is one number
    for the whole batch (added to every sample) and its value depends on the batch size.

    Args:
        teacher_logits, student_logits: (n, C). T: temperature; T² as in the authors' code, the paper has no factor.
        beta, gamma: weights of the parts.
        detach_teacher: no gradient to the teacher's logits.

    Returns:
        (n,).
    """
    _same_shape(teacher_logits, student_logits, "dist")
    teacher = teacher_logits.detach() if detach_teacher else teacher_logits
    p, q = (F.softmax(upcast(z) / T, -1) for z in (teacher, student_logits))
    return T**2 * (beta * (1 - pearson(p, q)) + gamma * (1 - pearson(p.T, q.T)).mean())


def pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of the rows of a and b, (n, d) → (n,); 0 where a row is constant, with gradient 1/eps."""
    return F.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1, eps=eps)


def pairwise_kl(z: Tensor, T: float = 1.0, detach: bool = True, teacher: Tensor | None = None) -> Tensor:
    """K[j, i] = T² · KL(softmax(t_j/T) ‖ softmax(z_i/T)) per sample: row teaches column (arXiv 1706.00384).

    Args:
        z: (M, n, C) logits of the peers as students.
        T: temperature.
        detach: no gradient to the teaching side.
        teacher: (M, n, C) logits of the peers as teachers; None takes `z`. Separate ones are for peers that
            teach from stored logits.

    Returns:
        (M, M, n). The diagonal is exactly zero, in value and gradient, also with a separate `teacher`.

    Raises:
        UserError: not (M, n, C), or a teacher of another shape.

    Example:
        >>> z = torch.tensor([[[2.0, 0.0, -1.0]], [[1.0, 0.5, 0.0]]])
        >>> pairwise_kl(z, T=2).squeeze(-1)
        tensor([[0.0000, 0.3652],
                [0.3767, 0.0000]])
    """
    z = _peers(z, "pairwise_kl")
    t = z if teacher is None else upcast(teacher)
    _same_shape(t, z, "pairwise_kl")
    log_q = F.log_softmax(z / T, -1)
    log_p = F.log_softmax((t.detach() if detach else t) / T, -1)
    # One row at a time: M·n·C numbers alive instead of M²·n·C.
    rows = torch.stack([(row.exp() * (row - log_q)).sum(-1) for row in log_p])
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device).unsqueeze(-1)
    return T**2 * rows.masked_fill(itself, 0.0)


def mean_of_others(z: Tensor) -> Tensor:
    """m_i = Σ_{j≠i} z_j / (M−1): for each peer the mean logits of the others (CL-ILR, NeurIPS 2018).

    Args:
        z: (M, n, C), M ≥ 2. Nothing is detached.

    Returns:
        (M, n, C).

    Example:
        >>> mean_of_others(torch.tensor([[[1.0]], [[2.0]], [[6.0]]])).flatten()
        tensor([4.0000, 3.5000, 1.5000])
    """
    z = _peers(z, "mean_of_others", least=2)
    mix = (1 - torch.eye(len(z), dtype=z.dtype, device=z.device)) / (len(z) - 1)
    return torch.tensordot(mix, z, dims=1)
