"""Small networks over embedded sentences (n, length, width), whose embedding is looked up before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bag(nn.Module):
    """The mean of the words (rows of zeros are padding), then linear."""

    def __init__(self, shape: tuple[int, int], classes: int):
        super().__init__()
        self.head = nn.Linear(shape[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        words = (x != 0).any(-1).sum(-1, keepdim=True).clamp(min=1)
        return self.head(x.sum(-2) / words)


class TextCNN(nn.Module):
    """`filters` filters of each width over the words, ReLU, maximum over positions, dropout, linear (Kim, 2014)."""

    def __init__(
        self,
        shape: tuple[int, int],
        classes: int,
        filters: int = 100,
        widths: tuple[int, ...] = (3, 4, 5),
        dropout: float = 0.5,
    ):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(shape[1], filters, w, padding=w // 2) for w in widths)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(filters * len(widths), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return self.head(self.drop(torch.cat([torch.relu(conv(x)).amax(-1) for conv in self.convs], -1)))


class BiLSTM(nn.Module):
    """A two-way LSTM; the mean of its outputs over all positions, then linear."""

    def __init__(self, shape: tuple[int, int], classes: int, hidden: int = 100, layers: int = 2):
        super().__init__()
        self.lstm = nn.LSTM(shape[1], hidden, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


def bag(shape: tuple[int, int], classes: int) -> nn.Module:
    return Bag(shape, classes)


def cnn(shape: tuple[int, int], classes: int, filters: int = 100, dropout: float = 0.5) -> nn.Module:
    return TextCNN(shape, classes, filters, dropout=dropout)


def lstm(shape: tuple[int, int], classes: int, hidden: int = 100, layers: int = 2) -> nn.Module:
    return BiLSTM(shape, classes, hidden, layers)
