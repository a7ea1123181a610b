"""How samples, channels and classes relate inside a network, by row-normalised Gram matrices; teacher first.

| function | compares | a value per | depends on the rest of the batch |
|---|---|---|---|
| `similarity` (R) | samples with one another | anchor sample | yes, so not the same under micro-batches |
| `inter_channel` (ICC) | channels of one sample's feature map | sample | no |
| `class_activation` (S) | channels, as each class weighs them | class | its gradients are means over the batch |
| `class_relation` | classes with one another | class | the same |

Teachers are detached unless asked otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast


def gram(x: Tensor) -> Tensor:
    """Row-normalised X Xᵀ of the rows of X: (…, n, d) → (…, n, n); every row has length 1, that of a zero row stays 0.

    Each row of the Gram matrix is normalised, not the matrix. A common factor of all rows of X and a rotation of their
    axis change nothing.

    Example:
        >>> gram(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    x = upcast(x)
    # The result does not depend on the scale, so its gradient is that of x / constant. Without it, features of a
    # network with large weights overflow when squared.
    largest = x.detach().abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    product = x @ x.mT
    norm = product.square().sum(-1, keepdim=True)
    positive = norm > 0
    return product * torch.where(positive, norm, torch.ones_like(norm)).rsqrt() * positive


def similarity(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """(1/n) Σ_j (G_T[i,j] − G_S[i,j])² per anchor sample i, G = `gram` of the flattened features.

    Its mean over the batch is R = ‖G_T − G_S‖²_F / n², the similarity-preserving loss (SP, arXiv 1907.09682) and the
    relation score of DisWOT (arXiv 2303.15678). R ≤ 4/n, and ≤ 2/n for features that are not negative.

    Args:
        teacher, student: (n, …) features of one batch in one order; sizes may differ.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,). The value of a sample depends on which others share the batch.

    Raises:
        UserError: another number of samples, or no features.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> similarity(x, torch.tensor([[1.0], [1.0]]))
        tensor([0.2929, 0.2929])
    """
    if len(teacher) != len(student) or min(teacher.dim(), student.dim()) < 2:
        raise UserError(
            f"similarity: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be features (n, …) of "
            "one batch"
        )
    teacher = teacher.detach() if detach_teacher else teacher
    return (gram(teacher.flatten(1)) - gram(student.flatten(1))).square().mean(1)


def inter_channel(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """‖E_T − E_S‖²_F / C per sample, E = `gram` of the channels over the positions (ICKD, ICCV 2021).

    Each sample has a (C, C) matrix of its own, so nothing depends on the batch. Between 0 and 4.

    Args:
        teacher, student: (n, C, positions …) with one n and one C; positions may differ.
        detach_teacher: no gradient to the teacher.

    Returns:
        (n,).

    Raises:
        UserError: channels differ: put a 1×1 projector on the student.
    """
    if teacher.dim() < 3 or student.dim() < 3 or teacher.shape[:2] != student.shape[:2]:
        raise UserError(
            f"inter_channel: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be "
            "(n, C, positions …) with the same n and C; put a 1×1 projector on the student"
        )
    teacher = teacher.detach() if detach_teacher else teacher
    return (gram(teacher.flatten(2)) - gram(student.flatten(2))).square().sum(2).mean(1)


def class_activation(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """‖E_T − E_S‖²_F / C per class k, E = `gram` of the column g_k: the semantic score of DisWOT (arXiv 2303.15678).

    g = ∂CE/∂w of the classifier's weight are the Grad-CAM weights of each class. E has rank one, so that

        S_k = |g_T,k|₀/C + |g_S,k|₀/C − 2 cos(g_S,k, g_T,k) · mean_c sign(g_S,kc) sign(g_T,kc)

    with |·|₀ the number of entries that are not zero: 2 − 2·cos·a where none is. This is what is computed; no C × C
    matrix is made.

    Args:
        teacher, student: (K, C), the gradients; one C.
        detach_teacher: no gradient to the teacher.

    Returns:
        (K,), between 0 and 4; S is their mean.

    Raises:
        UserError: shapes that differ; with unequal C take `class_relation`.

    Example:
        >>> class_activation(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])).abs() < 1e-6
        tensor([True])
    """
    if teacher.shape != student.shape or teacher.dim() != 2:
        raise UserError(
            f"class_activation: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be (classes, C) "
            "of one shape; where C differs, compare classes: class_relation"
        )
    t, s = (_unit(upcast(g)) for g in (teacher.detach() if detach_teacher else teacher, student))
    signs = s.sign() * t.sign()
    filled = (s != 0).to(s.dtype).mean(1) + (t != 0).to(t.dtype).mean(1)
    return filled - 2 * (s * t).sum(1) * signs.mean(1)


def class_relation(teacher: Tensor, student: Tensor, detach_teacher: bool = True) -> Tensor:
    """Σ_l (E_T[k,l] − E_S[k,l])² per class k, E = `gram` of the classes' gradients (K, K).

    Ours: what stands for `class_activation` where teacher and student have unequal numbers of channels.

    Args:
        teacher, student: (K, C) with one K; C may differ.
        detach_teacher: no gradient to the teacher.

    Returns:
        (K,), between 0 and 4.
    """
    if teacher.dim() != 2 or student.dim() != 2 or len(teacher) != len(student):
        raise UserError(
            f"class_relation: teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must be (classes, C) "
            "with the same classes"
        )
    teacher = teacher.detach() if detach_teacher else teacher
    return (gram(teacher) - gram(student)).square().sum(1)


def _unit(g: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays. Scaled first, since squares of small gradients underflow."""
    largest = g.detach().abs().amax(1, keepdim=True)
    g = g / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = g.square().sum(1, keepdim=True)
    return g * torch.where(norm > 0, norm, torch.ones_like(norm)).rsqrt()
