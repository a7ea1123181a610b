"""The last step of SSLD: the last layer alone is tuned to the size of the images that the student is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from stillhouse.data import Batches, Data, prefetch
from stillhouse.distill import Distill
from stillhouse.engine import Run, fit
from stillhouse.evaluate import classification, predict
from stillhouse.recipes.ssld.config import Config
from stillhouse.taps import head


class LastLayer(nn.Module):
    """A network of which only its last linear layer learns; all else is as in use, batch norm and dropout too.

    Args:
        network: is used, not copied; `release` gives it its trainable parameters back.
        at: path of that layer.
    """

    def __init__(self, network: nn.Module, at: str):
        super().__init__()
        self.network, self._moving = network, [p for p in network.parameters() if p.requires_grad]
        network.requires_grad_(False)
        network.get_submodule(at).requires_grad_(True)

    def train(self, mode: bool = True) -> LastLayer:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Any) -> Any:
        return self.network(x)

    def release(self) -> None:
        for p in self._moving:
            p.requires_grad_(True)


def fix(run: Run, network: nn.Module, learner: Callable[..., Distill], larger: Data, cfg: Config) -> str:
    """Tunes the last layer to images of another size, seen as in a test; says how good the network was before.

    Args:
        network: is changed in place.
        learner: what teaches a network.
        larger: the data at that size; their training images are not augmented.
    """
    before = run.memo("before_fix", lambda: classification(*predict(network, larger.test, device=run.device)))
    at = head(network, larger.train.take(np.arange(2))["input"])
    fixed = LastLayer(network, at)
    plain = prefetch(Batches(larger.train, cfg.batch, augment=False), run.workers)
    fit(run, "fix", learner(fixed), plain, epochs=cfg.fix_epochs, settings=cfg)
    fixed.release()
    shape = " × ".join(map(str, larger.shape[1:]))
    return f"images of {shape} pixels: {before['accuracy']:.1%} right before {at!r} was tuned to them"
