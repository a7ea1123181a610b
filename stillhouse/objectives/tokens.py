"""Sequences of tokens: values per token, and the ONE masked reduction that makes a value per sequence of them.

What divides a sum of token losses is where most released language-model codes go wrong: a mean per micro-batch gives
short micro-batches more weight, padding that counts dilutes, and a shift applied twice trains on the wrong token. Here
the sum over tokens is divided by one number that the caller names, and the mean over SEQUENCES follows in plain sight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.logits import upcast

IGNORE = -100


def token_cross_entropy(logits: Tensor, labels: Tensor, *, shift: int = 0, ignore: int = IGNORE) -> Tensor:
    """−log softmax(z_t)[y_{t+shift}] per position; 0 where there is no such token or it is ignored.

    Args:
        logits: (n, t, C).
        labels: (n, t) token ids, `ignore` at padding and prompts.
        shift: 0 for decoders that were fed shifted targets (T5), 1 for decoder-only models.

    Returns:
        (n, t), at least float32; position p speaks of token p + shift, as `token_mean` expects.

    Raises:
        UserError: shapes that do not fit, or a shift that leaves nothing.

    Example:
        >>> token_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor([[1.3863, 0.0000]])
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise UserError(
            f"token_cross_entropy: logits (n, t, C) need labels (n, t), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    _check_shift(shift, labels.shape[1], "token_cross_entropy")
    z, y = upcast(logits[:, : labels.shape[1] - shift]), labels[:, shift:]
    values = F.cross_entropy(z.transpose(1, 2), y, ignore_index=ignore, reduction="none")
    return F.pad(values, (0, shift)) if shift else values


def token_mean(values: Tensor, mask: Tensor, normaliser: str | float | Tensor = "own", *, shift: int = 0) -> Tensor:
    """Σ_t m_t v_t / c per sequence, with m_t = mask_{t+shift} and one of three c:

    =============  ==============================================  =========================================
    normaliser     c                                               mean over sequences is then
    =============  ==============================================  =========================================
    ``"own"``      Σ_t m_t of the sequence itself                  every sequence counts alike
    (n,) tensor    tokens per sequence of the GLOBAL batch         every token of the global batch counts
                   (`tokens_per_sequence`)                         alike, however it is split over
                                                                   micro-batches and processes
    number         itself, e.g. the longest length                 independent of lengths
    =============  ==============================================  =========================================

    Args:
        values: (n, t), e.g. of `token_cross_entropy` or a KL per position; what the mask excludes may be anything,
            NaN too, and gets no gradient.
        mask: (n, t) over TOKENS, bool or non-negative weights.
        normaliser: see above.
        shift: values at position p speak of token p + shift.

    Returns:
        (n,); 0 for a sequence without tokens.

    Raises:
        UserError: shapes that do not fit, an unknown normaliser, one that is not positive.

    Example:
        >>> v, m = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> token_mean(v, m), token_mean(v, m, tokens_per_sequence(m)).mean()
        (tensor([2., 5.]), tensor(3.))
    """
    if values.dim() != 2 or values.shape != mask.shape:
        raise UserError(
            f"token_mean: values and mask must both be (n, t), got {tuple(values.shape)} and {tuple(mask.shape)}"
        )
    _check_shift(shift, mask.shape[1], "token_mean")
    m = mask[:, shift:].to(values.dtype)
    v = values[:, : values.shape[1] - shift]
    total = (torch.where(m != 0, v, 0) * m).sum(1)
    if isinstance(normaliser, str):
        if normaliser != "own":
            raise UserError(f"token_mean: normaliser must be 'own', a tensor (n,) or a number, got {normaliser!r}")
        count = m.sum(1)
        return total / torch.where(count == 0, 1, count)
    if isinstance(normaliser, Tensor):
        if normaliser.shape not in (total.shape, torch.Size([])):
            raise UserError(f"token_mean: {len(total)} sequences need a normaliser (n,), got {tuple(normaliser.shape)}")
        return total / normaliser.to(total.dtype)
    if not normaliser > 0:
        raise UserError(f"token_mean: a constant normaliser must be positive, got {normaliser}")
    return total / normaliser


def tokens_per_sequence(mask: Tensor, *, shift: int = 0) -> Tensor:
    """Σ m / n, the normaliser that makes the mean over sequences the mean over tokens; a scalar in float64.

    Call it on the mask of the GLOBAL batch; a source that splits the batch hands the number on with every sequence.

    Example:
        >>> float(tokens_per_sequence(torch.tensor([[1, 1, 1], [1, 0, 0]])))
        2.0
    """
    return mask[:, shift:].sum(dtype=torch.float64) / len(mask)


def _check_shift(shift: int, length: int, where: str) -> None:
    if not 0 <= shift <= length:
        raise UserError(f"{where}: shift must lie in 0..{length}, the number of tokens, got {shift}")
