"""Soft-label data-set distillation over live objects.

The whole run, on built-in digits::

    stillhouse run soft_label_dataset_distillation --out runs/sldd
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.data import Batches, Data
from stillhouse.data.synthetic import Synthetic
from stillhouse.engine import Run, fit
from stillhouse.evaluate import evaluating, logits_of
from stillhouse.models import ModelSpec
from stillhouse.outcomes import DataSet
from stillhouse.recipes.soft_label_dataset_distillation.config import Config
from stillhouse.recipes.soft_label_dataset_distillation.labels import class_distances, initial_labels, starting_classes
from stillhouse.recipes.soft_label_dataset_distillation.nets import check_output, initialised, networks
from stillhouse.recipes.soft_label_dataset_distillation.steps import Params, Steps, label_loss
from stillhouse.system import Batch, Clock, System, Terms, Update, fold
from stillhouse.weights import step


class SoftLabels(System):
    """Samples, labels and step sizes that lower the real loss of a network trained on them.

    From w_0, for k = 0 … T−1 and block k mod n::

        w_{k+1} = w_k − η_k ∇_w [ −(1/m) Σ_i Σ_c ỹ_ic log softmax(f(x̃_i; w_k))_c ]

    the method `distil` gives L = mean over networks and real samples of CE(f(x; w_T), y), whose gradient reaches x̃, ỹ
    and r (η = softplus(r)) through all T steps. The networks are in train mode in the steps and in eval mode in L.

    Args:
        synthetic: what is learned.
        nets: one network for a known or unknown start, the whole pool for start ``pool``. Never trained.
        cfg: settings.
    """

    def __init__(self, synthetic: Synthetic, nets: Sequence[nn.Module], cfg: Config):
        super().__init__()
        self.synthetic, self.cfg = synthetic, cfg
        self.nets = nn.ModuleList(nets).requires_grad_(False)
        self.steps = Steps(cfg.blocks, cfg.momentum, cfg.label_softmax, cfg.segment)

    def updates(self) -> Sequence[Update]:
        adam = partial(torch.optim.Adam, lr=self.cfg.lr, betas=(0.5, 0.999))
        passed = range(1, int(self.cfg.epochs // self.cfg.decay) + 1) if self.cfg.decay else ()
        halving = step([self.cfg.decay * k for k in passed], 0.5)
        return [Update("distil", list(self.synthetic.parameters()), adam, lr=halving)]

    def starts(self, clock: Clock) -> Iterator[tuple[nn.Module, Params]]:
        """The networks of a step and their weights; the same on every rank and for every micro-batch."""
        for j in range(self.cfg.nets):
            seed, net = fold(clock.seed, clock.stage, clock.step, "start", j), self.nets[0]
            if self.cfg.start == "pool":
                net = self.nets[seed % len(self.nets)]
            drawn = initialised(net, self.cfg.weights, seed) if self.cfg.start == "unknown" else net
            yield net, dict(drawn.named_parameters())

    def distil(self, batch: Batch, clock: Clock) -> Terms:
        s, losses = self.synthetic, []
        for j, (net, start) in enumerate(self.starts(clock)):
            seed = fold(clock.seed, clock.stage, clock.step, "inner", j)
            final = self.steps(net, start, s.step_sizes, s.samples, s.labels, seed)
            with evaluating(net):
                z = logits_of(functional_call(net, final, (batch["input"],)))
            losses.append(label_loss(z, batch["label"]))
        return Terms(real=torch.stack(losses).mean()).note(mean_step_size=s.step_sizes.mean())

    def outcome(self) -> Synthetic:
        return self.synthetic


def distill(
    run: Run,
    data: Data,
    model: nn.Module | ModelSpec,
    cfg: Config | None = None,
    *,
    nets: Sequence[nn.Module] = (),
    distances: Tensor | None = None,
    kind: str = "images",
) -> DataSet:
    """A synthetic set on which a few gradient steps train `model` for `data`.

    Args:
        run: folder, seed, device.
        data: images, or sentences as `sentences.Sentences` (embedded, so that samples can be learned).
        model: the network to train on the set; never changed.
        cfg: settings.
        nets: the pool of start ``pool``, trained networks of the model's structure (else `cfg.pool` is read).
        distances: (C, C) between classes, for label_init ``similar`` (default: between mean inputs).
        kind: what the samples are called in the set, "images" or "embeddings".

    Returns:
        samples, labels and step sizes, for a known start also the weights to start from; `use.train_on` trains on it.

    Raises:
        UserError: settings, data and model that do not fit each other.
    """
    cfg = cfg or Config()
    g = torch.Generator().manual_seed(fold(run.seed, "synthetic"))
    if cfg.label_init == "similar" and distances is None:
        distances = class_distances(data.train)
    labels = initial_labels(cfg, len(data.classes), g, distances)
    samples = torch.randn(len(labels), *data.shape, generator=g)
    system = make_system(run, model, cfg, samples, labels, nets, kind)
    fit(run, "distil", system, Batches(data.train, cfg.batch), epochs=cfg.epochs, settings=cfg)
    return pack(run, data, model, system)


def make_system(
    run: Run,
    model: nn.Module | ModelSpec,
    cfg: Config,
    samples: Tensor,
    labels: Tensor,
    nets: Sequence[nn.Module] = (),
    kind: str = "images",
) -> SoftLabels:
    """The system that starts from these samples and labels."""
    rates = torch.full((cfg.steps,), cfg.step_size)
    synthetic = Synthetic(samples, labels, rates, blocks=cfg.blocks, learn_labels=cfg.labels == "soft", kind=kind)
    system = SoftLabels(synthetic, networks(run, model, cfg, nets), cfg)
    check_output(system.nets[0], samples[:1], labels.shape[1])
    return system


def pack(run: Run, data: Data, model: nn.Module | ModelSpec, system: SoftLabels) -> DataSet:
    """The finished set with everything that is needed to train on it."""
    cfg, tensors = system.cfg, system.outcome().tensors()
    if cfg.start == "known":
        tensors |= {f"start.{k}": p.detach().cpu().clone() for k, p in system.nets[0].named_parameters()}
    samples: Any = data.train
    while hasattr(samples, "parent"):
        samples = samples.parent
    facts: dict[str, Any] = {
        "method": "soft_label_dataset_distillation",
        "how": "stillhouse.recipes.soft_label_dataset_distillation.train_on(dataset, model)",
        "kind": system.synthetic.kind,
        "steps": asdict(system.steps),
        "start": cfg.start,
        "weights": cfg.weights,
        "one_logit": cfg.one_logit,
        "starting_classes": starting_classes(cfg, len(data.classes)).tolist() * cfg.blocks,
        "data": data.name,
        "classes": list(data.classes),
        "shape": list(data.shape),
        "normalisation": {k: getattr(samples, k, None) for k in ("mean", "std")},
        "model": model.to_json() if isinstance(model, ModelSpec) else {"class": type(model).__qualname__},
        "seed": run.seed,
    }
    if hasattr(samples, "vocabulary"):  # sentences: what is needed to embed others
        tensors["table"] = samples.vocabulary.table
        facts |= {"vocabulary": list(samples.vocabulary.words)}
        facts |= {"nearest_words": samples.vocabulary.nearest(tensors[system.synthetic.kind])}
    return DataSet(tensors, facts)
