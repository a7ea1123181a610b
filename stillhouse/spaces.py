"""Spaces of students: networks named by a small tuple, to be searched (see `stillhouse.search`).

| name | a student is | how many |
|---|---|---|
| ``resnet`` | blocks of the three stages of a CIFAR ResNet 16/32/64, each in {1, 3, 5, 7} (space S0) | 64 |
| ``resnet-widths`` | the same and the width of the first stage in {4, 8, 12, 16}; ours | 256 |
| ``resnet-small`` | blocks of the three stages, each in {1, 2, 3}, and the width of the first two in {8, 16} | 54 |
| ``conv`` | the same of plain convolutions, without shortcuts | 54 |
| ``cell`` | the operations on the six edges of a cell, as in NAS-Bench-201 (arXiv 2001.00326) | 15,625 |

Your own is ``package.module:function``; the function may take ``shape`` and ``classes`` and returns a `Choices` or any
object with the three methods of `StudentSpace`.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.models import ModelSpec, import_object

Arch = Any
"""A student's name in its space: numbers and words, in nested tuples."""


class StudentSpace(Protocol):
    """What a search needs to know of students.

    Two further methods are used where they are there: ``cost(arch, measure)``, a number for the measure params, macs or
    latency that saves building the network (or a table measured on the device that counts), and ``__iter__``, all
    architectures.
    """

    def random(self, rng: Random) -> Arch:
        """Any student."""
        ...

    def mutate(self, arch: Arch, rng: Random) -> Arch:
        """A student that differs from `arch` in one thing."""
        ...

    def build(self, arch: Arch) -> ModelSpec | nn.Module:
        """The network; as a `ModelSpec` it can be loaded again from its folder alone."""
        ...


@dataclass(frozen=True)
class Choices:
    """A value for each slot: the space of all combinations.

    Attributes:
        slots: name to the values that can stand there, smallest first.
        make: the network of one combination.

    Example:
        >>> def timm_resnet(arch):
        ...     return ModelSpec("timm:resnet18", 10, (3, 32, 32), options={"layers": list(arch)})
        >>> space = Choices({f"stage {k}": (1, 2, 3) for k in range(4)}, timm_resnet)
        >>> len(space), space.mutate((1, 1, 1, 1), Random(0))
        (81, (1, 1, 1, 3))
    """

    slots: Mapping[str, Sequence[Any]]
    make: Callable[[Arch], ModelSpec | nn.Module]

    def random(self, rng: Random) -> Arch:
        return tuple(rng.choice(list(values)) for values in self.slots.values())

    def mutate(self, arch: Arch, rng: Random) -> Arch:
        slots = list(self.slots.values())
        k = rng.choice([i for i, values in enumerate(slots) if len(values) > 1])
        return (*arch[:k], rng.choice([v for v in slots[k] if v != arch[k]]), *arch[k + 1 :])

    def build(self, arch: Arch) -> ModelSpec | nn.Module:
        return self.make(arch)

    def __iter__(self) -> Iterator[Arch]:
        return itertools.product(*self.slots.values())

    def __len__(self) -> int:
        n = 1
        for values in self.slots.values():
            n *= len(values)
        return n


# -- spaces by name ---------------------------------------------------------------------------------------------------


def named(name: str, shape: Sequence[int], classes: int) -> StudentSpace:
    """A space by name, or by the ``package.module:function`` that gives it.

    Args:
        shape: of one input, (channels, height, width). classes: number of outputs.

    Raises:
        UserError: an unknown name, or something else than a space.

    Example:
        >>> named("resnet", (3, 32, 32), 10).build((1, 3, 5)).options["depths"]
        [1, 3, 5]
    """
    if ":" in name:
        return Imported(name, tuple(shape), classes)
    if name not in SPACES:
        raise UserError(f"no space {name!r}; {did_you_mean(name, SPACES)}; your own is package.module:function")
    return SPACES[name](tuple(shape), classes)


def _resnet(shape: tuple[int, ...], classes: int) -> Choices:
    slots = {f"blocks {k}": (1, 3, 5, 7) for k in (1, 2, 3)}
    return Choices(slots, lambda a: ModelSpec("stillhouse:resnet", classes, shape, options={"depths": list(a)}))


def _resnet_widths(shape: tuple[int, ...], classes: int) -> Choices:
    slots = {**{f"blocks {k}": (1, 3, 5, 7) for k in (1, 2, 3)}, "width": (4, 8, 12, 16)}

    def make(arch: Arch) -> ModelSpec:
        *depths, width = arch
        return ModelSpec("stillhouse:resnet", classes, shape, options={"depths": depths, "width": width})

    return Choices(slots, make)


def _small(network: str, shape: tuple[int, ...], classes: int) -> Choices:
    slots = {**{f"depth {k}": (1, 2, 3) for k in (1, 2, 3)}, "width": (8, 16)}

    def make(arch: Arch) -> ModelSpec:
        *depths, width = arch
        # All end in 16 channels, as all networks of the published spaces end in 64: S compares channels.
        return ModelSpec(network, classes, shape, options={"depths": depths, "widths": [width, width, 16]})

    return Choices(slots, make)


def _cell(shape: tuple[int, ...], classes: int, width: int = 16, cells: int = 5) -> Choices:
    def make(arch: Arch) -> ModelSpec:
        options = {"cell": list(arch), "width": width, "cells": cells}
        return ModelSpec("stillhouse.spaces:CellNet", classes, shape, options=options)

    return Choices({f"{a}→{b}": tuple(OPERATIONS) for a, b in EDGES}, make)


SPACES: dict[str, Callable[[tuple[int, ...], int], Choices]] = {
    "resnet": _resnet,
    "resnet-widths": _resnet_widths,
    "resnet-small": partial(_small, "stillhouse:resnet"),
    "conv": partial(_small, "stillhouse.spaces:Stages"),
    "cell": _cell,
}


def inner_of(space: StudentSpace) -> Any:
    """The object itself: of a space that came by its path, what the user's function gave."""
    return space.space if isinstance(space, Imported) else space


class Imported:
    """A user's space by its path: students can be loaded again, because the path stands in their plan."""

    def __init__(self, path: str, shape: tuple[int, ...], classes: int):
        self.path, self.shape, self.classes = path, shape, classes
        make = import_object(path, "--space")
        known = {"shape": shape, "classes": classes}
        try:
            takes = inspect.signature(make).parameters
            self.space: Any = make(**{k: v for k, v in known.items() if k in takes})
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise UserError(f"--space {path} raised {type(error).__name__}: {said}") from None
        lacks = [m for m in ("random", "mutate", "build") if not callable(getattr(self.space, m, None))]
        if lacks:
            raise UserError(
                f"--space {path} returned {type(self.space).__name__} without {', '.join(lacks)}(); give a "
                "stillhouse.spaces.Choices or an object with random(rng), mutate(arch, rng) and build(arch)"
            )

    def random(self, rng: Random) -> Arch:
        return self.space.random(rng)

    def mutate(self, arch: Arch, rng: Random) -> Arch:
        return self.space.mutate(arch, rng)

    def build(self, arch: Arch) -> ModelSpec:
        made = self.space.build(arch)
        if isinstance(made, ModelSpec):
            return made
        options = {"space": self.path, "arch": json.loads(json.dumps(arch))}
        return ModelSpec("stillhouse.spaces:from_space", self.classes, self.shape, options=options)


def from_space(space: str, arch: Arch, shape: Sequence[int], classes: int) -> nn.Module:
    """The network that a user's space builds for `arch`; how such students are loaded again."""
    made = Imported(space, tuple(shape), classes).space.build(frozen(arch))
    if not isinstance(made, nn.Module):
        raise UserError(f"--space {space}: build() returned {type(made).__name__}, expected a module or a ModelSpec")
    return made


def frozen(arch: Arch) -> Arch:
    """An architecture as nested tuples, also after it went through JSON.

    Raises:
        UserError: it holds something that JSON does not know.

    Example:
        >>> frozen([1, ["a", 2]])
        (1, ('a', 2))
    """
    if isinstance(arch, list | tuple):
        return tuple(frozen(a) for a in arch)
    if arch is None or type(arch) in (bool, int, float, str):
        return arch
    raise UserError(
        f"a space's architecture must be made of numbers and words in tuples, got {type(arch).__name__} {arch!r}"
    )


# -- their networks ---------------------------------------------------------------------------------------------------


class Stages(nn.Module):
    """Three stages of 3×3 convolution, batch norm, ReLU; stages two and three begin with stride 2; mean, linear."""

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        depths: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 16, 16),
        norm: bool = True,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        i = shape[0]
        for s, (depth, o) in enumerate(zip(depths, widths, strict=True)):
            for b in range(depth):
                layers.append(nn.Conv2d(i, o, 3, 2 if s and not b else 1, 1, bias=not norm))
                layers += [nn.BatchNorm2d(o), nn.ReLU()] if norm else [nn.ReLU()]
                i = o
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(i, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


def _relu_conv(i: int, o: int, size: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(i, o, size, stride, size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(o))


OPERATIONS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda c: None,
    "skip": lambda c: nn.Identity(),
    "pool3": lambda c: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "conv1": lambda c: _relu_conv(c, c, 1),
    "conv3": lambda c: _relu_conv(c, c, 3),
}


class Cell(nn.Module):
    """Four nodes; each is the sum over the edges that enter it of the edge's operation on the node it comes from."""

    def __init__(self, operations: Sequence[str], channels: int):
        super().__init__()
        self.edges = nn.ModuleDict()
        for (a, b), operation in zip(EDGES, operations, strict=True):
            if operation not in OPERATIONS:
                raise UserError(f"cell: no operation {operation!r}; {did_you_mean(operation, OPERATIONS)}")
            module = OPERATIONS[operation](channels)
            if module is not None:
                self.edges[f"{a}-{b}"] = module

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for b in (1, 2, 3):
            parts = [self.edges[f"{a}-{b}"](nodes[a]) for a in range(b) if f"{a}-{b}" in self.edges]
            nodes.append(torch.stack(parts).sum(0) if parts else torch.zeros_like(x))
        return nodes[3]


class Reduction(nn.Module):
    """A residual block that halves the image and changes the channels."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.body = nn.Sequential(_relu_conv(i, o, 3, 2), _relu_conv(o, o, 3))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(i, o, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class CellNet(nn.Module):
    """The skeleton of NAS-Bench-201: stem, three stages of N equal cells with C, 2C, 4C channels, a linear head.

    Args:
        cell: six operations, for the edges 0→1, 0→2, 1→2, 0→3, 1→3, 2→3; names are those of `OPERATIONS`.
        width, cells: C and N.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        cell: Sequence[str] = ("conv3",) * 6,
        width: int = 16,
        cells: int = 5,
    ):
        super().__init__()
        if len(cell) != len(EDGES):
            raise UserError(f"cell: expected {len(EDGES)} operations, one per edge, got {len(cell)}")
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)]
        for s in range(3):
            channels = width * 2**s
            layers += [Reduction(channels // 2, channels)] if s else []
            layers += [Cell(cell, channels) for _ in range(cells)]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(4 * width), nn.ReLU())
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))
