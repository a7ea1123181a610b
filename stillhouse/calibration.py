"""How sure a classifier is: temperature scaling, uncertainty and predictive diversity."""

from __future__ import annotations

from torch import Tensor

from stillhouse.errors import UserError


def fit_temperature(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, lowest: float = 0.01, highest: float = 100.0
) -> float:
    """The T that minimises the mean NLL of softmax(z/T): temperature scaling (Guo et al. 2017, arXiv 1706.04599).

    The NLL is convex in 1/T, so its derivative mean Σ_c (softmax(z/T)_c − t_c) z_c, t the label's one-hot, is bisected.

    Args:
        logits: (N, C), of held-out samples. labels: (N,).
        smoothing: part of each label that is spread over all classes. Where every sample is right, T would fall to
            `lowest`; 1/(N + 2), Platt's prior, keeps it from that.
        lowest, highest: where T is looked for; the bound is given where the NLL falls up to it.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> t = fit_temperature(z, torch.tensor([0, 0, 0, 1]))  # three of four: 2/T = log 3
        >>> round(t, 4)
        1.8205
    """
    z, y = logits.detach().double(), labels.long()
    if z.dim() != 2 or y.shape != z.shape[:1] or z.numel() == 0:
        raise UserError(f"fit_temperature needs logits (N, C) and labels (N,), got {tuple(z.shape)}, {tuple(y.shape)}")
    own = (1 - smoothing) * z.gather(1, y[:, None]).squeeze(1) + smoothing * z.mean(1)
    low, high = 1 / highest, 1 / lowest
    for _ in range(100):
        b = (low * high) ** 0.5
        slope = ((b * z).softmax(1) * z).sum(1).sub(own).mean()
        low, high = (b, high) if slope < 0 else (low, b)
    return 2 / (low + high)


def certainty(logits: Tensor, labels: Tensor, T: float = 1.0) -> dict[str, float]:
    """Uncertainty and predictive diversity of a teacher (Zhang & Sabuncu 2020, arXiv 2006.05065).

    With q = softmax(z/T): ``uncertainty`` = mean entropy of q in nats; ``diversity`` = standard deviation over samples
    of q_y, the confidence in the TRUE class; ``confidence`` = its mean. Label smoothing has the first and none of the
    second.

    Args:
        logits: (N, C). labels: (N,) true classes. T: temperature.

    Example:
        >>> import torch
        >>> certainty(torch.zeros(3, 4), torch.tensor([0, 1, 2]))["diversity"]
        0.0
    """
    log_q = (logits.detach().double() / T).log_softmax(1)
    own = log_q.gather(1, labels.long()[:, None]).exp()
    return {
        "uncertainty": float(-(log_q.exp() * log_q).sum(1).mean()),
        "diversity": float(own.std(correction=0)),
        "confidence": float(own.mean()),
    }
