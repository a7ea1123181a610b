"""Lower bounds of the mutual information between two features, from a critic's scores; a value per anchor.

Nothing is exponentiated before it is put in relation to something of its size, so large scores do no harm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast


def leave_one_out(scores: Tensor) -> Tensor:
    """log m_ij = log (1/(B−1)) Σ_{k≠j} exp F_ik: the mean over row i without column j, (B, B).

    In O(B²): all but the largest of a row are taken off the row's sum, where they are at most half of it; the row
    without its largest is summed anew.

    Example:
        >>> leave_one_out(torch.tensor([[0.0, 0.0, 0.0]])).exp()
        tensor([[1., 1., 1.]])
    """
    top = scores.argmax(1, keepdim=True)
    whole = scores.logsumexp(1, keepdim=True)
    share = (scores - whole).exp().scatter(1, top, 0.0)
    rest = scores.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    return (whole + torch.log1p(-share)).scatter(1, top, rest) - math.log(scores.shape[1] - 1)


def mutual_information(scores: Tensor, log_baseline: Tensor, alpha: float = 0.9) -> Tensor:
    """A lower bound of I(X; Y) in nats, per anchor (MI-α: Poole et al. 2019, arXiv 1905.06922; arXiv 2109.11105).

    Î_i = 1 + mean_{j≠i} (F_ii − log M_ij) − mean_{j≠i} exp(F_ij − log M_ii),
    M_ij = α m_ij + (1−α) exp c_i, m_ij the mean of exp F_ik over k ≠ j (`leave_one_out`).

    α = 1 is InfoNCE without the pair itself in the sum: the last mean is exactly 1 and Î ≤ log(B−1), so it is steady
    but cannot show more. α = 0 is the single-sample bound of Nguyen, Wainwright and Jordan with a learned baseline:
    tight where the critic is, of high variance. Its mean over the batch is the estimate; −mean is the loss.

    Args:
        scores: F (B, B), row i = the anchor y_i, column j = x_j, so that the diagonal holds the pairs that belong
            together. B ≥ 3, and no sample twice: its copy would count as a stranger.
        log_baseline: c (B,), a function of each row's anchor alone; the proof needs that. Unused where α = 1.
        alpha: in [0, 1].

    Returns:
        (B,). Nothing is detached.

    Raises:
        UserError: shapes that do not fit, fewer than 3 samples, α out of range.

    Example:
        >>> F = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
        >>> float(mutual_information(F, torch.zeros(3), alpha=1.0).mean()) < math.log(2)
        True
    """
    n = len(scores)
    if scores.dim() != 2 or scores.shape[1] != n or log_baseline.shape != (n,) or n < 3:
        raise UserError(
            f"mutual_information: needs scores (B, B) and baselines (B,) of B >= 3 samples, got {tuple(scores.shape)} "
            f"and {tuple(log_baseline.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise UserError(f"mutual_information: alpha must lie in [0, 1], got {alpha}")
    f, c = upcast(scores), upcast(log_baseline)[:, None].expand(n, n)
    log_m = leave_one_out(f) if alpha > 0 else c
    if 0 < alpha < 1:
        log_m = torch.logaddexp(log_m + math.log(alpha), c + math.log1p(-alpha))
    elif alpha == 0:
        log_m = c
    own = torch.eye(n, dtype=torch.bool, device=f.device)
    pairs = (f.diagonal()[:, None] - log_m).masked_fill(own, 0.0).sum(1) / (n - 1)
    if alpha == 1:
        return pairs  # 1 − 1, whatever the scores
    strangers = (f - log_m.diagonal()[:, None]).masked_fill(own, -math.inf).exp().sum(1) / (n - 1)
    return 1 + pairs - strangers
