"""Weights of several layers as mixes of a few shared matrices: the mix, its closed-form fit, and what is left over.

A layer's weight is (out, in), as torch has it; the input is the second axis, and what whitens acts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.objectives.logits import upcast


class Mix(nn.Module):
    """W = Σ_s c_s D_s + A·B: a parametrization whose dictionary D other layers hold too.

    Its originals are the layer's own: the code c (S,) and, with a rank, the thin A (out, q) and B (q, in). Put on
    a layer it starts from the code that comes closest to the weight, and from factors of zero.

    Args:
        atoms: D, (S, out, in); one parameter for all layers that are given it. S may be 0.
        rank: q.

    Example:
        >>> layer, atoms = nn.Linear(2, 1, bias=False), nn.Parameter(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]))
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", Mix(atoms))
        >>> codes(layer).tolist(), layer.weight.tolist()
        ([3.0, 2.0], [[3.0, 4.0]])
    """

    def __init__(self, atoms: nn.Parameter, rank: int = 0):
        super().__init__()
        self.atoms, self.rank = atoms, rank

    def forward(self, code: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
        made = (code @ self.atoms.flatten(1)).view(self.atoms.shape[1:])
        return made if left is None or right is None else made + left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        flat = self.atoms.detach().flatten(1).to(weight)
        code = weight.new_zeros(len(flat))
        if len(flat):  # least squares through the small Gram matrix; equal atoms share alike
            code = torch.linalg.pinv(flat @ flat.T, hermitian=True) @ (flat @ weight.flatten())
        if not self.rank:
            return (code,)
        rows, columns = weight.shape
        return code, weight.new_zeros(rows, self.rank), weight.new_zeros(self.rank, columns)


def codes(layer: nn.Module) -> nn.Parameter:
    """The code of a layer that has a `Mix`, (S,)."""
    return layer.parametrizations["weight"].original0  # type: ignore[index, union-attr]


def leftovers(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The thin factors of a layer that has a `Mix` with a rank: (out, q) and (q, in)."""
    chain = layer.parametrizations["weight"]  # type: ignore[index]
    return chain.original1, chain.original2  # type: ignore[union-attr]


class Basis(NamedTuple):
    """What `matrix_pca` finds: atoms (S, out, in), codes (L, S), and all L eigenvalues, largest first."""

    atoms: Tensor
    codes: Tensor
    eigenvalues: Tensor


@torch.no_grad()
def matrix_pca(weights: Sequence[Tensor], atoms: int) -> Basis:
    """min Σ_l ‖W_l − Σ_s ⟨D_s, W_l⟩ D_s‖_F²  with ⟨D_i, D_j⟩ = δ_ij, the trace inner product; no mean is taken off.

    With V = [vec W_1 … vec W_L] and VᵀV = Q Λ Qᵀ, only L × L: D = V Q_S Λ_S^(−1/2). The error is the sum of the
    eigenvalues left out.

    Args:
        weights: L matrices (out, in). atoms: S, from 0 to L.

    Returns:
        In the weights' precision, at least float32. Atoms beyond the rank of V are zero.

    Source: MASA (arXiv 2508.04581), section on the training-free fit.

    Example:
        >>> same = torch.ones(2, 3)
        >>> basis = matrix_pca([same, 2 * same], 1)
        >>> torch.allclose(basis.codes[1, 0] * basis.atoms[0], 2 * same), bool(basis.eigenvalues[1].abs() < 1e-6)
        (True, True)
    """
    v = torch.stack([w.detach().flatten() for w in weights])
    # A Gram matrix squares the condition number: float64 keeps orthonormality to what float32 holds.
    wide = v.double()
    values, q = torch.linalg.eigh(wide @ wide.T)
    values, q = values.flip(0).clamp(min=0), q.flip(1)
    top = values[:atoms]
    scale = torch.where(top > 1e-14 * values[0], top.clamp(min=1e-300).rsqrt(), 0.0)
    found = (q[:, :atoms] * scale).T @ wide
    kind = upcast(v).dtype
    return Basis(found.view(-1, *weights[0].shape).to(kind), (wide @ found.T).to(kind), values.to(kind))


def root(moment: Tensor, damping: float = 1e-4) -> Tensor:
    """M, lower triangular in float64, with M Mᵀ = A + damping · mean(diag A) · I, which is definite where A is not.

    Args:
        moment: A = E[x xᵀ] of a layer's inputs, (in, in).
    """
    a = moment.double()
    spread = damping * a.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.cholesky(a + spread * torch.eye(len(a), dtype=a.dtype, device=a.device))


def spectrum(residual: Tensor, whiten: Tensor | None = None) -> Tensor:
    """σ² of R·M, largest first: what each further rank takes off E‖(R − Z) x‖²; without M off ‖R − Z‖_F².

    Args:
        residual: R, (out, in). whiten: M of `root`.
    """
    r = upcast(residual.detach())
    return torch.linalg.svdvals(r if whiten is None else r @ whiten.to(r)) ** 2


@torch.no_grad()
def thin(residual: Tensor, rank: int, whiten: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The Z = A·B of this rank with the least E‖(R − Z) x‖² = ‖(R − Z) M‖_F²:  Z = SVD_q(R M) M⁻¹.

    Without M it is the truncated singular value decomposition. The singular values are shared evenly by A and B.

    Args:
        residual: R, (out, in). rank: q. whiten: M of `root`.

    Returns:
        A (out, q) and B (q, in).

    Example:
        >>> a, b = thin(torch.diag(torch.tensor([3.0, 2.0])), 1, torch.diag(torch.tensor([1.0, 5.0])))
        >>> bool(torch.allclose(a @ b, torch.diag(torch.tensor([0.0, 2.0])), atol=1e-5))
        True
    """
    r = upcast(residual.detach())
    u, s, v = torch.linalg.svd(r if whiten is None else r @ whiten.to(r), full_matrices=False)
    half = s[:rank].sqrt()
    left, right = u[:, :rank] * half, half[:, None] * v[:rank]
    if whiten is not None:
        right = torch.linalg.solve_triangular(whiten, right.to(whiten), upper=False, left=False).to(r)
    return left, right


def allocate(gains: Sequence[Tensor], costs: Sequence[int], budget: float, most: Sequence[int]) -> list[int]:
    """Ranks for several matrices: the next one always goes where it takes off the most per stored value.

    Args:
        gains: `spectrum` of each matrix. costs: stored values per rank of each, out + in.
        budget: stored values in all. most: the largest rank of each.

    Returns:
        A rank per matrix. What is left of the budget is less than any rank that is still open costs.

    Example:
        >>> allocate([torch.tensor([9.0, 1.0]), torch.tensor([4.0, 3.0])], [2, 1], 4, [2, 2])
        [1, 2]
    """
    order = sorted(
        (-float(g) / cost, i, k)
        for i, (values, cost) in enumerate(zip(gains, costs, strict=True))
        for k, g in enumerate(values[: most[i]])
    )
    ranks = [0] * len(gains)
    for _, i, k in order:
        if k == ranks[i] and costs[i] <= budget:
            ranks[i], budget = k + 1, budget - costs[i]
    return ranks
