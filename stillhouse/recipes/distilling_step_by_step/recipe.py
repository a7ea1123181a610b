"""Distilling step-by-step over live objects: a task, a sequence-to-sequence model and its tokenizer.

task = stillhouse.text.open_task("mine.jsonl")
made = distill(stillhouse.Run("runs/mine"), task, model, tokenizer, Config(steps=500, lr=1e-3))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.engine import Run, fit
from stillhouse.errors import UserError
from stillhouse.evaluate import logits_of
from stillhouse.models import ModelSpec
from stillhouse.objectives.tokens import IGNORE, token_cross_entropy, token_mean
from stillhouse.recipes.distilling_step_by_step.config import Config
from stillhouse.system import Batch, Clock, System, Terms, Update
from stillhouse.text import (
    Answerer,
    Codec,
    Example,
    Task,
    TextMember,
    TextModels,
    View,
    Views,
    encode,
    model_inputs,
    token_nll,
    with_adapters,
)

__all__ = ["Config", "StepByStep", "distill"]


class StepByStep(System):
    """L = α · L_label + (1 − α) · L_rationale, each the mean over ITS OWN target tokens of the global batch.

    One forward pass per view on the same examples, one backward. Nothing is detached: there is no teacher but its text.

    Args:
        student: called by name, ``(input_ids, attention_mask, decoder_input_ids, …)``, gives logits (n, t, C).
        cfg: settings.
        select: keep the weights that `offer` found best; else the last ones are the outcome.
    """

    def __init__(self, student: nn.Module, cfg: Config, select: bool = False):
        super().__init__()
        self.student, self.cfg, self.weights = student, cfg, cfg.weights()
        kept = self.moved if select else []
        self.best = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in kept)
        self.score = nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False)  # accuracy, −NLL of the best

    @property
    def moved(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def updates(self) -> Sequence[Update]:
        kind = torch.optim.AdamW if self.cfg.optimizer == "adamw" else torch.optim.SGD
        optimizer = partial(kind, lr=self.cfg.lr, weight_decay=self.cfg.weight_decay)
        return [Update("learn", self.moved, optimizer, lr=lambda clock: 1 - clock.progress, clip=self.cfg.clip or None)]

    def loss(self, view: Batch) -> Tensor:
        """(n,); its mean over the sequences of the global batch is Σ −log p / number of target tokens (ends too)."""
        values = token_cross_entropy(logits_of(self.student(**model_inputs(view))), view["labels"])
        per_sequence = view["tokens"].to(values.dtype) / view["sequences"]
        return token_mean(values, view["labels"] != IGNORE, per_sequence)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        nll = {view: self.loss(batch[view]).mean() for view in self.weights}
        return Terms(**{k: self.weights[k] * v for k, v in nll.items()}).note(**{f"{k}_nll": v for k, v in nll.items()})

    @torch.no_grad()
    def offer(self, accuracy: float, nll: float) -> None:
        """Keeps the weights as they are now if none were better: higher accuracy, then lower NLL."""
        new = torch.tensor([accuracy, -nll])
        if new.tolist() > self.score.tolist():
            self.score.copy_(new)
            for kept, p in zip(self.best, self.moved, strict=True):
                kept.copy_(p)

    @torch.no_grad()
    def outcome(self) -> nn.Module:
        for p, kept in zip(self.moved if len(self.best) else [], self.best, strict=True):
            p.copy_(kept)
        return self.student


def distill(
    run: Run, task: Task, model: nn.Module, tokenizer: Any, cfg: Config | None = None, spec: ModelSpec | None = None
) -> TextModels:
    """Train `model` on a task's labels and, as a second task, on the teacher's rationales.

    Args:
        run: folder, seed, device.
        task: ``task.train`` is trained on, ``task.valid`` selects among the weights, ``task.test`` is not read.
        model: sequence to sequence, trained in place; of transformers, or with ``config.decoder_start_token_id`` and
            ``generate``. tokenizer: its own, of transformers.
        cfg: settings.
        spec: how the model is built again; models of transformers say so themselves, others without it are loaded
            into a base that the user builds.

    Returns:
        The student and its tokenizer; `stillhouse.text.load` reads both from the folder they are saved in.

    Raises:
        UserError: settings, data or models that cannot be.

    Source: Hsieh et al. 2023, arXiv 2305.02301; loss and arms as in its released code.
    """
    cfg = (cfg or Config()).settled()
    if run.precision == "fp16" and "t5" in str(getattr(model.config, "model_type", "")):
        raise UserError("T5 overflows in fp16; give --precision bf16 or fp32")
    if spec is None and type(model).__module__.startswith("transformers."):
        spec = ModelSpec.of(model)
    limits = {"max_input": cfg.max_input, "max_target": cfg.max_target}
    codec = Codec.of(model, tokenizer, **limits, strict=cfg.too_long == "stop")
    if codec.decode(codec.targets([cfg.behind])) != [cfg.behind]:
        raise UserError(
            f"the tokenizer cannot write {cfg.behind!r}, behind which the answer is to stand; add its words"
        )
    views = make_views(codec, task.train, cfg)
    ask = {"prefix": cfg.prefixes()["predict"], "explain": cfg.prefixes().get("explain"), "behind": cfg.behind}
    text: dict[str, Any] = {**ask, **limits, "max_generated": cfg.longest_answer, "kind": task.kind.name}
    system = StepByStep(with_adapters(model, cfg.lora, run.seed), cfg, select=bool(task.valid) and cfg.eval_every > 0)
    labels = [str(e.label) for e in task.valid]
    gold = encode(codec, task.valid, text["prefix"], labels, "labels of valid")

    def evaluate(system: StepByStep, clock: Clock) -> dict[str, float]:
        said = Answerer(system.student, codec, text).examples(task.valid)
        accuracy = task.accuracy(said, task.valid)
        nll = 0.0 if cfg.behind else token_nll(system.student, gold)  # one target: no label stands alone
        system.offer(accuracy, nll)
        return {"valid_accuracy": accuracy, "valid_nll": nll}

    settings = {**asdict(cfg), "valid": gold.fingerprint}
    judge: dict[str, Any] = {"evaluate": evaluate, "evaluate_every": cfg.eval_every} if len(system.best) else {}
    fit(run, "learn", system, Views(views, cfg.batch), steps=cfg.steps, settings=settings, **judge)
    student: Any = system.outcome().cpu().eval()
    student = student.merge_and_unload() if cfg.lora else student
    example = model_inputs(next(iter(views.values())).batch(np.arange(1)))
    notes = [*task.notes, *codec.notes(), "each loss is a mean over its own tokens of the global batch"]
    member = TextMember("student", student, text=text)
    return TextModels([member], example, spec, notes=notes, logs=run.log("learn"), tokenizer=tokenizer)


def make_views(codec: Codec, examples: Sequence[Example], cfg: Config) -> dict[str, View]:
    """The views that have a weight: label for `predict`, rationale for `explain`; rows without a parse stay, empty."""
    prefixes = cfg.prefixes()
    labels = [label_of(e, cfg) for e in examples]
    targets: Mapping[str, list[str]] = {"predict": labels, "explain": [e.rationale for e in examples]}
    if cfg.behind:
        targets = {"predict": [f"{e.rationale} {cfg.behind} {y}" for e, y in zip(examples, labels, strict=True)]}
    what = {"predict": "rationales with labels" if cfg.behind else "labels", "explain": "rationales"}
    return {v: encode(codec, examples, prefixes[v], targets[v], what[v]) for v in cfg.weights()}


def label_of(e: Example, cfg: Config) -> str:
    """The label that is trained on."""
    if cfg.label_type == "llm":
        return e.taught
    if e.label is None:
        raise UserError(
            f"{e.where or 'a training example'} has no gold 'label'; train on the teacher's: --label-type llm"
        )
    return e.label
