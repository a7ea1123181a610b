"""A small diffusion teacher of one's own: denoising with dropped conditions and an average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.samples import Samples
from stillhouse.data.sources import Batches
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.process import of_scheduler, target
from stillhouse.engine import fit
from stillhouse.errors import UserError
from stillhouse.run import Run
from stillhouse.system import Batch, Clock, System, Terms, Update
from stillhouse.teachers import EMA
from stillhouse.weights import cosine


class Denoising(System):
    """mean over elements of (net(x_t, t, y) − target)², x_t = α_t x_0 + σ_t ε, y → null for a part of the samples.

    t is uniform over the whole way; the target is what the denoiser's `prediction` says (ε, x_0, v, velocity).

    Args:
        denoiser: its network trains; `null` is what a dropped label becomes.
        drop: part of the samples that are trained without their label; needed for guidance.
        ema: decay of the average that is the outcome; it warms up as (1 + step)/(10 + step).
        optimizer: builds the optimiser. clip: largest gradient norm.

    The batch holds "input" x_0 (n, …) and, unless the denoiser's `null` is None, "label" (n,).

    Raises:
        UserError: a network that is no module, or labels to drop without `null`.

    Source: arXiv 2006.11239 (ε), 2202.00512 (v), 2207.12598 (dropped conditions).

    Example:
        >>> from stillhouse.diffusion.process import Flow
        >>> class Net(nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> system = Denoising(Denoiser(Net(2, 2), Flow(), "flow_prediction"), drop=0)
        >>> list(system.denoise({"input": torch.zeros(4, 2)}, Clock()).terms)
        ['mse']
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        drop: float = 0.1,
        ema: float = 0.999,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
        warmup: int = 100,
        clip: float | None = 1.0,
    ):
        super().__init__()
        if not isinstance(denoiser.network, nn.Module):
            raise UserError(f"Denoising trains a torch.nn.Module, got {type(denoiser.network).__name__}")
        if not 0 <= drop < 1 or not 0 <= ema < 1:
            raise UserError(f"Denoising: drop and ema must lie in [0, 1), got {drop} and {ema}")
        if drop and denoiser.null is None:
            raise UserError("Denoising: dropped labels need to know what stands for no label; give null, or drop=0")
        self.network, self.denoiser, self.drop = denoiser.network.requires_grad_(True), denoiser, drop
        self.average = EMA(self.network, lambda clock: min(ema, (1 + clock.step) / (10 + clock.step)))
        self.optimizer, self.warmup, self.clip = optimizer or partial(torch.optim.AdamW, lr=1e-3), warmup, clip

    def updates(self) -> Sequence[Update]:
        return [
            Update("denoise", list(self.network.parameters()), self.optimizer, lr=cosine(self.warmup), clip=self.clip)
        ]

    def denoise(self, batch: Batch, clock: Clock) -> Terms:
        """The loss on one batch, with times, noise and dropped labels drawn from the clock."""
        x0, of, g = batch["input"], self.denoiser, clock.generator("denoise")
        t = of.process.times(len(x0), 0.0, 1.0, g).to(x0.device)
        eps = torch.randn(x0.shape, generator=g, dtype=x0.dtype).to(x0.device)
        condition = batch["label"] if of.null is not None else None
        if condition is not None and self.drop:
            gone = (torch.rand(len(x0), generator=g) < self.drop).to(x0.device)
            condition = of.drop(condition, gone)
        said = of.predict(of.process.add_noise(x0, eps, t), t, condition)
        return Terms(mse=(said - target(of.process, of.prediction, x0, eps, t)).square().mean())

    def after_step(self, clock: Clock) -> None:
        self.average.update(self.network, clock)

    def outcome(self) -> Denoiser:
        """The averaged network as a frozen denoiser."""
        of = self.denoiser
        return Denoiser(self.average.model, of.process, of.prediction, null=of.null).freeze()


def train_denoiser(
    run: Run,
    name: str,
    network: nn.Module,
    scheduler: Any,
    samples: Samples,
    *,
    null: int | None = None,
    steps: int = 3000,
    batch: int = 128,
    lr: float = 1e-3,
    drop: float = 0.1,
    ema: float = 0.999,
) -> Denoiser:
    """A diffusion teacher trained on labelled images, kept in the run folder (trained once, then loaded).

    Args:
        run, name: where it is kept, see `fit`.
        network: a ``UNet2DModel`` (``num_class_embeds`` one more than there are classes, the last is `null`), or any
            other network that a `Denoiser` takes; trained in place.
        scheduler: of diffusers; says the process and what the network predicts (``prediction_type``).
        samples: x_0 in [−1, 1] and labels.
        null: class that stands for no label; None trains without labels.
        steps, batch, lr, drop, ema: AdamW with a cosine, see `Denoising`.

    Returns:
        The averaged network, frozen.
    """
    process, kind = of_scheduler(scheduler)
    classes = getattr(getattr(network, "config", None), "num_class_embeds", None)
    if null is not None and classes is not None and not len(samples.classes) <= null < classes:
        raise UserError(
            f"the null class {null} must lie behind the {len(samples.classes)} classes of the data and be one of the "
            f"network's {classes} (num_class_embeds)"
        )
    system = Denoising(
        Denoiser(network, process, kind, null=null),
        drop=drop if null is not None else 0.0,
        ema=ema,
        optimizer=partial(torch.optim.AdamW, lr=lr),
    )
    settings = {"batch": batch, "lr": lr, "drop": drop, "ema": ema, "prediction": kind}
    fit(run, name, system, Batches(samples, batch, augment=False), steps=steps, settings=settings)
    return system.outcome()
