"""Which layer of the student learns from which of the teacher's: maps as lists of pairs, and the layers of a network.

Hidden states are counted from the embeddings: 0 is their output, i that of layer i. Attention blocks count from 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError

Pairs = list[tuple[int, int]]
KINDS = ("hidden", "attention")


def skip(student: int, teacher: int, what: str = "hidden") -> Pairs:
    """Evenly spread, k = L_T/L_S: hidden i ↔ ⌊i k⌋ for i = 0…L_S, attention i ↔ ⌊(i+1) k⌋ − 1 for i = 0…L_S − 1.

    Args:
        student, teacher: numbers of layers, L_S and L_T.
        what: hidden or attention.

    Example:
        >>> skip(4, 12), skip(4, 12, "attention")
        ([(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)], [(0, 2), (1, 5), (2, 8), (3, 11)])
    """
    _checked(student, teacher, what)
    if what == "hidden":
        return [(i, i * teacher // student) for i in range(student + 1)]
    return [(i, max(0, (i + 1) * teacher // student - 1)) for i in range(student)]


def last(student: int, teacher: int, what: str = "hidden") -> Pairs:
    """The teacher's last ones: i ↔ L_T − L_S + i.

    Raises:
        UserError: a student with more layers than the teacher.

    Example:
        >>> last(4, 12)
        [(0, 8), (1, 9), (2, 10), (3, 11), (4, 12)]
    """
    _checked(student, teacher, what)
    if student > teacher:
        raise UserError(f"layer map last: the student has {student} layers, the teacher only {teacher}; take skip")
    return [(i, teacher - student + i) for i in range(student + (what == "hidden"))]


def every(student: int, teacher: int, what: str = "hidden") -> Pairs:
    """All pairs but the embeddings', student's layer by layer: what `transport` weighs.

    Example:
        >>> every(1, 3)
        [(1, 1), (1, 2), (1, 3)]
    """
    _checked(student, teacher, what)
    first = 1 if what == "hidden" else 0
    return [(i, j) for i in range(first, student + first) for j in range(first, teacher + first)]


MAPS: dict[str, Callable[..., Pairs]] = {"skip": skip, "last": last, "emd": every}


def _checked(student: int, teacher: int, what: str) -> None:
    if min(student, teacher) < 1 or what not in KINDS:
        raise UserError(f"layer maps need at least one layer of each and {KINDS}, got {student}, {teacher}, {what!r}")


def transport(cost: Tensor) -> Tensor:
    """argmin_π Σ_ij π_ij C_ij over π ≥ 0 with rows that sum to 1/L_S and columns that sum to 1/L_T: the EMD's flow.

    Exact, by a linear programme; where several plans cost the same, the solver's choice. The plan has no gradient.

    Args:
        cost: C (L_S, L_T), any finite numbers.

    Returns:
        π (L_S, L_T), summing to 1, of the type and on the device of the cost.

    Example:
        >>> transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    from scipy.optimize import linprog

    c = cost.detach().cpu().double().numpy()
    rows, columns = c.shape
    if not np.isfinite(c).all():  # of a loss that has diverged, which `fit` is about to say
        return torch.full_like(cost, 1 / c.size)
    sums = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    wanted = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    found = linprog(c.ravel(), A_eq=sums, b_eq=wanted, method="highs")
    return torch.as_tensor(np.clip(found.x, 0, None).reshape(rows, columns)).to(cost)


def layers_of(model: nn.Module) -> list[str | None]:
    """Module paths of hidden state 0 (the embeddings; None where there are none), 1, …, L, as `taps.tap` takes them.

    Of transformers: the entries of the longest stack of equal blocks, and the module named ``embeddings`` or
    ``patch_embed``. Of other networks: their direct children that hold modules (``block1``, ``layer3``, ``hidden``);
    of a plain chain: its activations.

    Raises:
        UserError: neither is there; then name them with --student-layers and --teacher-layers.

    Example:
        >>> layers_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        [None, '2']
    """
    stacks = [(n, m) for n, m in model.named_modules() if n and isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    alike = [(n, m) for n, m in stacks if len({type(b) for b in m}) == 1 and any(m[0].children())]
    name, stack = max(alike, key=lambda a: len(a[1]), default=("", nn.Sequential()))
    embeds = (n for n, _ in model.named_modules() if n.rpartition(".")[2] in ("embeddings", "patch_embed"))
    embedding = next(embeds, None)
    if name and (embedding or isinstance(stack, nn.ModuleList)):
        return [embedding, *(f"{name}.{i}" for i in range(len(stack)))]
    children = dict(model.named_children())
    blocks = [n for n, m in children.items() if any(m.children()) and any(True for _ in m.parameters())]
    if blocks and blocks[-1] == next(reversed(children)) and isinstance(children[blocks[-1]], nn.Sequential):
        blocks.pop()  # the head: its output is the logits
    if not blocks:
        acts = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.ELU)
        blocks = [n for n, m in children.items() if isinstance(m, acts)]
    if not blocks:
        raise UserError(
            f"{type(model).__name__}: no layers were found; name them with --student-layers and --teacher-layers"
        )
    return [None, *blocks]


def attention_of(model: nn.Module, block: str) -> str:
    """The path of a block's attention.

    Raises:
        UserError: it has none.
    """
    inside = dict(model.get_submodule(block).named_children())
    for name in ("attention", "self_attn", "self_attention", "attn"):
        if name in inside:
            return f"{block}.{name}"
    raise UserError(f"{block} of {type(model).__name__} has no attention (but {sorted(inside)}); take features hidden")
