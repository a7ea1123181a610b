"""What VSD can move: anything that renders particles. Free images and a generator network are here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models import import_object
from stillhouse.system import Batch, fold


class Scene(nn.Module):
    """The form of a renderer; yours need not inherit from it.

    ``forward(particle, **drawn)`` gives x_0 (n, …) of particles (n,) int64. ``draw(n, generator)``, which may be left
    out, gives what is drawn anew for each render, a mapping of tensors with n rows; what it calls ``camera`` (n, k) is
    told to the fake score, and ``view`` (n,) int64 chooses the teacher's view words (``--views``).
    """

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}


class Images(Scene):
    """Every particle is a free image θ_i: x_0 = θ_i, at first noise of standard deviation `std`."""

    def __init__(self, particles: int, shape: tuple[int, ...], std: float = 0.5, seed: int = 0):
        super().__init__()
        start = torch.randn(particles, *shape, generator=torch.Generator().manual_seed(fold(seed, "particles")))
        self.values = nn.Parameter(std * start)

    def forward(self, particle: Tensor) -> Tensor:
        return self.values[particle]


class Generator(Scene):
    """A particle is a small network: x_0 = f(e_i, z) with an embedding e_i of its number and noise z ~ N(0, I)."""

    def __init__(self, particles: int, shape: tuple[int, ...], width: int = 128, noise: int = 16, seed: int = 0):
        super().__init__()
        self.shape, self.noise = tuple(shape), noise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(seed, "particles"))
            self.embedding = nn.Embedding(particles, width)
            self.inside = nn.Linear(noise, width)
            self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.last = nn.Linear(width, int(torch.Size(shape).numel()))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"noise": torch.randn(n, self.noise, generator=generator)}

    def forward(self, particle: Tensor, noise: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(particle) + self.inside(noise))
        return self.last(hidden).view(-1, *self.shape)


class Student(nn.Module):
    """A scene as `ScoreDistillation` calls its student: with the batch, of which it takes what it drew."""

    def __init__(self, scene: nn.Module):
        super().__init__()
        self.scene = scene
        self.names = list(drawn(scene, 1, torch.Generator()))

    def forward(self, batch: Batch) -> Tensor:
        return self.scene(batch["particle"], **{name: batch[name] for name in self.names})


def drawn(scene: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a scene draws for n renders; nothing where it has no ``draw``."""
    return dict(scene.draw(n, generator)) if hasattr(scene, "draw") else {}  # type: ignore[operator]


def own_scene(path: str, options: dict[str, Any]) -> nn.Module:
    """The renderer of ``package.module:function``, which is given those of particles, shape and seed that it takes."""
    import inspect

    build = import_object(path, "--renderer")
    try:
        takes = inspect.signature(build).parameters
        scene = build(**{k: v for k, v in options.items() if k in takes})
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"--renderer {path} raised {type(error).__name__}: {said}") from None
    if not isinstance(scene, nn.Module):
        raise UserError(f"--renderer {path} returned {type(scene).__name__}, expected a torch.nn.Module")
    return scene
