"""Training on a distilled set."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stillhouse.data import Samples
from stillhouse.errors import UserError
from stillhouse.evaluate import classification, predict
from stillhouse.outcomes import DataSet
from stillhouse.recipes.soft_label_dataset_distillation.nets import check_network, initialised
from stillhouse.recipes.soft_label_dataset_distillation.steps import Steps


def train_on(dataset: DataSet, model: nn.Module, *, start: str = "set", seed: int = 0) -> nn.Module:
    """A copy of `model` trained by the gradient steps that the set stands for; in eval mode.

    Args:
        dataset: from `distill` or ``stillhouse.load("RUN/dataset")``.
        model: a network of the structure that the set was made for (``dataset.facts["model"]``); not changed.
        start: where the steps start. ``set``: as the set was made, from its own w_0 (known start) or from weights
            drawn as it says (unknown start); a pool's set starts from the model's weights. ``model``: from the
            model's weights in any case.
        seed: of drawn weights and of dropout.

    Raises:
        UserError: another kind of set, or a model that the set's w_0 does not fit.

    Example:
        >>> from stillhouse.recipes.soft_label_dataset_distillation.use import train_on
        >>> made = DataSet(
        ...     {"images": torch.eye(2), "labels": torch.eye(2), "step_sizes": torch.ones(4)},
        ...     {"steps": {}, "start": "unknown", "weights": "zeros", "kind": "images"})
        >>> train_on(made, nn.Linear(2, 2))(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """
    facts = dataset.facts
    if start not in ("set", "model"):
        raise UserError(f"train_on: start must be 'set' or 'model', got {start!r}")
    if "steps" not in facts or "step_sizes" not in dataset.tensors:
        raise UserError(f"train_on: this set ({facts.get('method')}) has no training steps of its own")
    check_network(model)
    if start == "set" and facts["start"] == "unknown":
        net = initialised(model, facts["weights"], seed)
    else:
        net = copy.deepcopy(model)
        if start == "set" and facts["start"] == "known":
            load_start(net, dataset)
    net.train()
    device = next(net.parameters()).device
    rates, x, y = (dataset[k].to(device) for k in ("step_sizes", facts["kind"], "labels"))
    with torch.no_grad():
        final = Steps(**facts["steps"])(net, dict(net.named_parameters()), rates, x, y, seed)
        for name, p in net.named_parameters():
            p.copy_(final[name])
    return net.eval()


def load_start(net: nn.Module, dataset: DataSet) -> None:
    """Puts the set's w_0 into the network."""
    known = {k.removeprefix("start."): v for k, v in dataset.tensors.items() if k.startswith("start.")}
    own = dict(net.named_parameters())
    for name in [*own, *known]:
        if name not in own or name not in known or own[name].shape != known[name].shape:
            raise UserError(
                f"train_on: the set's starting weights do not fit {type(net).__name__}, first at {name!r}; build the "
                "model of dataset.facts['model'], or give start='model' (another start was never promised to work)"
            )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(known[name])


class TwoClasses(nn.Module):
    """Two logits (0, z) from a network with one: class 1 where z > 0."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.cat([torch.zeros_like(z), z], -1)


def accuracy(net: nn.Module, samples: Samples, one_logit: bool = False, device: str | torch.device = "cpu") -> float:
    """Share of samples that are classified rightly."""
    whole = TwoClasses(net) if one_logit else net
    return classification(*predict(whole, samples, device=device))["accuracy"]
