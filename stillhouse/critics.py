"""Critics: how well a teacher's feature and a student's belong together, learned; for bounds of mutual information."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError


class Encoder(nn.Module):
    """A feature of any kind to a vector: the mean over positions into two linear layers with ReLU.

    With `layers`, a transformer reads the positions first (linear, sinusoidal codes, pre-norm layers), and its outputs
    are averaged. Positions of a sequence that are zero throughout are padding (`comparisons.as_map`): they are neither
    read nor averaged.

    Args:
        like: an example, (n, d), (n, positions, d) or a map (n, d, height, width).
        width: of the result. hidden: of the hidden layer. layers: of the transformer.
    """

    def __init__(self, like: Tensor, width: int, hidden: int, layers: int = 0):
        super().__init__()
        size = like.shape[2] if like.dim() == 3 else like.shape[1]
        self.first, self.last = nn.Linear(size, hidden), nn.Linear(hidden, width)
        self.reader: nn.Module | None = None
        if layers:
            heads = next(h for h in (8, 4, 2, 1) if hidden % h == 0)
            layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, 0.0, batch_first=True, norm_first=True)
            self.reader = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, …) → (n, width)."""
        sequence = x.dim() == 3
        x = x if sequence else x.flatten(2).transpose(1, 2) if x.dim() > 3 else x.unsqueeze(1)
        own = (x != 0).any(2) | (not sequence)
        if self.reader is None:
            return self.last(torch.relu(self.first(_mean(x, own))))
        x = self.first(x) + _codes(x.shape[1], self.first.out_features).to(x)
        return self.last(_mean(self.reader(x, src_key_padding_mask=~own), own))


def _mean(x: Tensor, own: Tensor) -> Tensor:
    weight = own.unsqueeze(2).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def _codes(length: int, width: int) -> Tensor:
    """sin and cos of position / 10000^(2k/width), (length, width) (Vaswani et al. 2017)."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


class Critic(nn.Module):
    """F_ij = ⟨g(t_i), h(s_j)⟩ / √width and c_i = b(t_i): scores of all pairs, a log-baseline of the teacher's alone.

    Rows are the teacher's features, the anchors: a bound of mutual information may subtract what depends on the row's
    anchor and on nothing else. The features may be of any widths: no projector is needed.

    Args:
        student, teacher: example features, (n, d), (n, positions, d) or (n, d, height, width) each.
        width: of the vectors that are multiplied. hidden, layers: see `Encoder`.

    Raises:
        UserError: sizes that are no positive numbers.

    Example:
        >>> scores, baseline = Critic(torch.zeros(3, 5), torch.zeros(3, 7))(torch.ones(4, 5), torch.ones(4, 7))
        >>> scores.shape, baseline.shape
        (torch.Size([4, 4]), torch.Size([4]))
    """

    def __init__(self, student: Tensor, teacher: Tensor, *, width: int = 64, hidden: int = 128, layers: int = 0):
        super().__init__()
        if min(width, hidden) < 1 or layers < 0 or hidden % 2:
            raise UserError(
                f"Critic: needs width >= 1, an even hidden >= 2, layers >= 0; got {width}, {hidden}, {layers}"
            )
        self.of_student = Encoder(student, width, hidden, layers)
        self.of_teacher = Encoder(teacher, width, hidden, layers)
        self.baseline = Encoder(teacher, 1, hidden, layers)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n, n), row = teacher, column = student; log-baselines (n,)."""
        s, t = self.of_student(student), self.of_teacher(teacher)
        return t @ s.T / math.sqrt(s.shape[1]), self.baseline(teacher).squeeze(1)
