"""Handwritten digits as a small diffusion problem: images in [−1, 1], a U-Net, a teacher, features to judge samples by.

Everything is trained here, in about two minutes on one core, and kept in the run folder, so that all arms and seeds of
a comparison share one fixed teacher and one fixed judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data.samples import Samples
from stillhouse.data.sets import Data, from_arrays
from stillhouse.data.sources import Batches
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.denoising import train_denoiser
from stillhouse.diffusion.metrics import Judge
from stillhouse.distill import Distill
from stillhouse.engine import fit
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, predict
from stillhouse.models import ModelSpec, import_library
from stillhouse.run import Run
from stillhouse.system import fold
from stillhouse.weights import cosine

NULL = 10
SHAPE = (1, 8, 8)
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "num_class_embeds": NULL + 1,
}


def digits() -> Data:
    """scikit-learn's 1,797 digits of 8 × 8 pixels in [−1, 1]; the same training and test samples as ``load("digits")``.

    Example:
        >>> data = digits()
        >>> x = all_of(data.train)[0]
        >>> len(data.train), len(data.test), float(x.min()), float(x.max())
        (1258, 539, -1.0, 1.0)
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (raw.images[:, None] / 8 - 1).astype(np.float32)
    return from_arrays(x, raw.target, test_fraction=0.3, normalize=False, name="digits in [-1, 1]", seed=0)


def all_of(samples: Samples) -> tuple[Tensor, Tensor]:
    """Every sample and label of a small set."""
    batch = samples.take(np.arange(len(samples)))
    return batch["input"], batch["label"]


def digits_unet(widths: Sequence[int] = (16, 32), *, seed: int = 0, **options: Any) -> nn.Module:
    """A ``diffusers.UNet2DModel`` for 8 × 8 images and ten classes; label 10 is "no label".

    Args:
        widths: channels at 8 × 8 and at 4 × 4, multiples of 8; (16, 32) has 178,000 parameters.
        options: other settings of the class.
    """
    wanted = {**UNET, "block_out_channels": list(widths), **options}
    return ModelSpec("diffusers:UNet2DModel", NULL + 1, SHAPE, options=wanted).build(seed=seed)


def digits_transformer(width: int = 48, layers: int = 8, heads: int = 3, *, seed: int = 0) -> nn.Module:
    """A ``diffusers.DiTTransformer2DModel`` for 8 × 8 images in patches of 2 × 2; label 10 is "no label".

    Its label embeddings drop nothing by themselves: each block has one, and would drop other labels than the next.

    Args:
        width: d, a multiple of `heads`. layers: blocks; eight of width 48 have 464,000 parameters.
    """
    wanted = {"num_attention_heads": heads, "attention_head_dim": width // heads, "num_layers": layers}
    wanted |= {"in_channels": 1, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": NULL}
    network = ModelSpec("diffusers:DiTTransformer2DModel", NULL, SHAPE, options=wanted).build(seed=seed)
    for part in network.modules():
        if hasattr(part, "token_drop"):
            part.dropout_prob = 0.0  # type: ignore[assignment]
    return network


def digits_scheduler(prediction: str = "epsilon", beta_schedule: str = "squaredcos_cap_v2") -> Any:
    """A ``diffusers.DDPMScheduler`` with T = 1000; the cosine schedule has next to no signal left at t = 999."""
    return import_library("diffusers").DDPMScheduler(
        num_train_timesteps=1000, beta_schedule=beta_schedule, prediction_type=prediction
    )


def digits_teacher(
    run: Run,
    *,
    prediction: str = "epsilon",
    beta_schedule: str = "squaredcos_cap_v2",
    widths: Sequence[int] = (16, 32),
    steps: int = 1500,
    batch: int = 64,
    lr: float = 2e-3,
) -> Denoiser:
    """A class-conditional diffusion teacher of digits, trained once per run folder.

    Seeded by the run's seed; `Denoiser.null` is `NULL`. In use at other sizes: see `train_denoiser`.
    """
    network = digits_unet(widths, seed=fold(run.seed, "teacher"))
    scheduler = digits_scheduler(prediction, beta_schedule)
    data = digits().train
    return train_denoiser(
        run, "teacher", network, scheduler, data, null=NULL, steps=steps, batch=batch, lr=lr, ema=0.995
    )


def digits_judge(run: Run, *, epochs: float = 30, least: float = 0.97) -> Judge:
    """A small CNN trained on the real training digits, whose 64 features samples are judged by.

    Args:
        run: where it is kept. epochs: of training.
        least: accuracy on the test digits below which it is no judge.

    Raises:
        UserError: it did not become good enough.
    """
    data = digits()
    network = ModelSpec("stillhouse:cnn", 10, SHAPE).build(seed=fold(run.seed, "judge"))
    learn = Distill(network, None, alpha=0, optimizer=partial(torch.optim.AdamW, lr=3e-3), lr=cosine())
    fit(run, "judge", learn, Batches(data.train, 64), epochs=epochs)
    accuracy = classification(*predict(network, data.test))["accuracy"]
    if accuracy < least:
        raise UserError(
            f"the judge has accuracy {accuracy:.3f} on real test digits, {least} is needed; train it longer"
        )
    return Judge(network, "hidden", all_of(data.train)[0])
