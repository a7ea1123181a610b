"""Encoders made in the run, without labels: whitened principal components, and SimCLR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse.data import Batches, Samples
from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.models import ModelSpec
from stillhouse.recipes.wad.config import Config
from stillhouse.recipes.wad.views import view
from stillhouse.system import Batch, Clock, System, Terms, Update, fold
from stillhouse.weights import cosine

MOST = 10_000  # samples that principal components are computed from


def whitened_pca(samples: Samples, components: int, seed: int = 0) -> nn.Module:
    """(x − mean) V Λ^(−1/2): the first principal components of the inputs, each with spread 1 over the samples.

    Args:
        samples: at most 10,000 of them are used, chosen by the seed.
        components: fewer where there are not so many with any spread.

    Returns:
        A frozen module, inputs (n, …) → (n, k).
    """
    chosen = np.sort(np.random.default_rng(fold(seed, "pca")).permutation(len(samples))[:MOST])
    x = samples.take(chosen)["input"].flatten(1).double()
    mean = x.mean(0)
    _, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    spread = s / len(x) ** 0.5
    k = min(components, int((spread > 1e-6 * spread[0]).sum()))
    weight = v[:k] / spread[:k, None]
    linear = nn.Linear(x.shape[1], k)
    linear.load_state_dict({"weight": weight.float(), "bias": -(weight @ mean).float()})
    return nn.Sequential(nn.Flatten(), linear).requires_grad_(False).eval()


class SimCLR(System):
    """mean NT-Xent of two views of each image (SimCLR, arXiv 2002.05709); labels are not read.

    Args:
        encoder: images → (n, d), its projection head included.
        cfg: settings.
    """

    def __init__(self, encoder: nn.Module, cfg: Config):
        super().__init__()
        self.encoder, self.cfg = encoder, cfg

    def updates(self) -> Sequence[Update]:
        sgd = partial(torch.optim.SGD, lr=self.cfg.simclr_lr, momentum=0.9, weight_decay=1e-6)
        return [Update("contrast", list(self.encoder.parameters()), sgd, lr=self.lr)]

    def lr(self, clock: Clock) -> float:
        return cosine(warmup_steps=clock.steps // 10)(clock)

    def views(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return view(x, generator, crop=self.cfg.crop, flip=self.cfg.flip, colour=self.cfg.colour)

    def contrast(self, batch: Batch, clock: Clock) -> Terms:
        x = batch["input"]
        both = torch.cat([self.views(x, clock.generator(name)) for name in ("first", "second")])
        a, b = self.encoder(both).chunk(2)
        return Terms(nt_xent=O.nt_xent(a, b, self.cfg.simclr_temperature).mean())

    def outcome(self) -> nn.Module:
        return self.encoder


def simclr(run: Run, samples: Samples, spec: ModelSpec, cfg: Config) -> nn.Module:
    """The network `spec` with a projection head behind it, trained on views of `samples` as stage "simclr"."""
    if len(samples.shape) != 3:
        raise UserError(f"teacher simclr: needs images (C, h, w), got inputs {samples.shape}; take teacher pca")
    body = spec.build(seed=fold(run.seed, "encoder"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(run.seed, "projection"))
        encoder = nn.Sequential(body, nn.ReLU(), nn.Linear(cfg.projection, cfg.projection))
    system = SimCLR(encoder, cfg)
    fit(
        run, "simclr", system, Batches(samples, cfg.simclr_batch, augment=False), epochs=cfg.simclr_epochs, settings=cfg
    )
    return encoder.cpu().requires_grad_(False).eval()


@torch.no_grad()
def features(
    encoder: nn.Module, samples: Samples, cfg: Config, *, seed: int, device: Any = "cpu", batch_size: int = 256
) -> Tensor:
    """(N, d) float32 on the CPU: of one random view of each sample if `cfg.augmented`, else of the plain one.

    Args:
        seed: of the views.

    Raises:
        UserError: an encoder that does not give (n, d), or numbers that are not finite.
    """
    encoder.eval().to(device)
    generator, out = torch.Generator().manual_seed(seed), []
    for start in range(0, len(samples), batch_size):
        x = samples.take(np.arange(start, min(start + batch_size, len(samples))))["input"]
        if cfg.augmented:
            x = view(x, generator, crop=cfg.crop, flip=cfg.flip, colour=cfg.colour)
        f = encoder(x.to(device))
        if f.dim() != 2 or len(f) != len(x) or not bool(f.isfinite().all()):
            raise UserError(f"the encoder must give finite features (n, d), got {tuple(f.shape)} for {len(x)} samples")
        out.append(f.float().cpu())
    encoder.cpu()
    return torch.cat(out) if out else torch.zeros(0, 1)
