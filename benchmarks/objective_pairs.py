"""The two teacher–student pairs of objectives.py: arms, data, teacher, student, and how both are judged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse import plain
from stillhouse.data import Data, Samples, find, load
from stillhouse.data.named import CIFAR10_MEAN, CIFAR10_STD
from stillhouse.data.samples import Subset
from stillhouse.distill import Distill
from stillhouse.engine import Run
from stillhouse.models import ModelSpec
from stillhouse.plain import Plain
from stillhouse.system import map_tensors
from stillhouse.teacher_options import filled
from stillhouse.teachers import Frozen
from stillhouse.text import bert_spec, open_rows, sentence_data
from stillhouse.text.sentences import read_jsonl

Arms = Mapping[str, tuple[tuple[str, ...], float]]  # objectives, and the weight of the labels beside them

# Objectives and the weight of the labels: those of the papers or of the code most compare with (RepDistiller), brought
# to our definitions: where that code takes the mean over positions or over n² pairs, the weight is divided by these.
ON_LOGITS: Arms = {
    "labels": ((), 1.0),
    "kd": (("kd:0.9?T=4",), 0.1),
    "reverse": (("reverse:0.9?T=4",), 0.1),
    "symmetric": (("symmetric:0.9?T=4",), 0.1),
    "js": (("js:3.6?T=4",), 0.1),  # near agreement JS is a quarter of KL
    "standardised": (("standardised:9?T=2",), 0.1),
    "dist": (("dist:1?T=4&beta=2&gamma=2",), 1.0),
    "dkd": (("dkd:1?T=4&alpha=1&beta=2&ramp=0.08",), 1.0),
    "nkd": (("nkd:1?T=1&gamma=1.5",), 1.0),
    "pld": (("pld:1?T=3",), 0.0),  # holds the label's cross-entropy itself
    "logit-mse": (("logit-mse:1",), 0.1),
    "pseudo": (("pseudo:0.9",), 0.1),
}


def on_vectors(path: str) -> Arms:
    """Objectives on the input of the last layer; the factor of `pkt` is 30,000 / 128."""
    return {
        "cosine": ((f"cosine:{path}:in:1",), 1.0),
        "softmax": ((f"softmax:{path}:in:1",), 1.0),
        "rkd": ((f"rkd-distance:{path}:in:25", f"rkd-angle:{path}:in:50"), 1.0),
        "pkt": ((f"pkt:{path}:in:234",), 1.0),
        "mi": ((f"mi:{path}:in:1",), 1.0),
        "contrastive": ((f"contrastive:{path}:in:0.8",), 1.0),
    }


ATTENTION = ("attention:layer1:1", "attention:layer2:4", "attention:layer3:16")  # 1000 / positions
IMAGES: Arms = {
    **ON_LOGITS,
    "feature": (("feature:layer2:100",), 1.0),
    **on_vectors("linear"),
    "overhaul": (("overhaul:layer3:0.001",), 1.0),  # behind the last ReLU: the sum before it is no module here
    "vid": (("vid:layer3:1",), 1.0),
    "attention": (ATTENTION, 1.0),
    "nst": (("nst:layer3:50",), 1.0),
    "icc": (("icc:layer3:2.5",), 1.0),
    "similarity": (("similarity:layer3:3000",), 1.0),
    "cka": (("cka:layer3:1",), 1.0),
    "flow": (("flow:layer1>layer2:50", "flow:layer2>layer3:50"), 1.0),
    "simkd": (("simkd:1",), 0.0),
    "kd + attention": (("kd:0.9?T=4", *ATTENTION), 0.1),
}
LAST = "bert.encoder.layer.1=bert.encoder.layer.3"
TEXT: Arms = {
    **ON_LOGITS,
    "feature": ((f"feature:{LAST}:1",), 1.0),
    **on_vectors("classifier"),
    "vid": ((f"vid:{LAST}:1",), 1.0),
    "similarity": (("similarity:classifier:in:3000",), 1.0),
    "cka": (("cka:classifier:in:1",), 1.0),
    "kd + feature": (("kd:0.9?T=4", f"feature:{LAST}:1"), 0.1),
}


@dataclass(frozen=True)
class Task:
    """One run; everything that its result depends on."""

    pair: str
    arm: str
    seed: int
    steps: int
    batch: int
    limit: int | None
    precision: str

    def folder(self, out: str) -> Path:
        return Path(out) / self.pair / self.arm.replace(" ", "") / f"seed{self.seed}"


class Pair:
    """What both pairs have: the settings of a task, and what learns in it."""

    arms: Arms
    optimizer: Mapping[str, Any]
    normalize: Any = None

    def config(self, task: Task, data: Data) -> Plain:
        objectives, label = self.arms[task.arm]
        epochs = task.steps / (len(data.train) // task.batch)
        return Plain(objective=objectives, label=label, batch=task.batch, epochs=epochs, **self.optimizer)

    def learner(self, task: Task, data: Data, master: nn.Module) -> Distill:
        """What `distill` trains, to be timed without it."""
        look = {"normalize": self.normalize}
        with tempfile.TemporaryDirectory() as folder:
            run, student = Run(folder, seed=task.seed, quiet=True), self.student(data).build(seed=task.seed)
            return plain.assembled(run, data, student, None, [master], self.config(task, data), [look], Distill)[0]

    def student(self, data: Data) -> ModelSpec:
        raise NotImplementedError


class Images(Pair):
    """CIFAR-10: ResNet-56 with published weights into ResNet-20.

    Students learn from batches 1–4. The teacher's weights have seen all five training batches, so it is judged, and
    agreement with it is measured, on the first 1,000 official test images (standard error near 1.5 points); the first
    3,000 of batch 5, which no student has seen, stand beside it for the students alone.
    """

    name, arms, quick = "images", IMAGES, ("labels", "kd", "attention", "simkd")
    steps, batch, optimizer = 400, 64, {"optimizer": "sgd", "lr": 0.1}
    about = (
        "CIFAR-10 batches 1–4, crops and flips; accuracy, agreement, KL and NLL on the first 1,000 official test "
        "images; beside it the first 3,000 of batch 5, which the teacher has seen and no student has"
    )
    normalize = (CIFAR10_MEAN, CIFAR10_STD, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def data(self, task: Task) -> Data:
        return load("cifar10", limit=task.limit, seed=task.seed)

    def teacher(self, out: str, data: Data) -> nn.Module:
        path = Path(os.environ.get("STILLHOUSE_DATA", "")) / "resnet-cifar10-weights" / "resnet56.safetensors"
        return filled(ModelSpec("stillhouse:resnet56", 10, (3, 32, 32)).build(), path)

    def student(self, data: Data) -> ModelSpec:
        return ModelSpec("stillhouse:resnet20", 10, (3, 32, 32))

    def judged_on(self, data: Data) -> tuple[Samples, Samples]:
        return data.extra["test_first1000"], Subset(data.test, np.arange(3000), own_ids=True)


class Text(Pair):
    """SST-2: a BERT of 4 layers and width 128 into one of 2 layers and width 48, both from scratch."""

    name, arms, quick = "text", TEXT, ("labels", "kd", "feature", "contrastive")
    steps, batch, optimizer = 400, 64, {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
    about = "SST-2, 6,920 sentences as words; judged on its 1,821 test sentences, beside them on 872 of its dev part"

    def data(self, task: Task) -> Data:
        dev = open_rows("sst2")  # its test part is the official dev part
        rows = read_jsonl(find("sst2") / "test.jsonl.gz")
        test = [{**r, "label": ("negative", "positive")[int(r["label"])]} for r in rows]
        parts = {"train": dev["train"], "test": test, "held_out": dev["test"]}
        return sentence_data(parts, "sst2", length=48, limit=task.limit)

    def teacher(self, out: str, data: Data) -> nn.Module:
        """Trained once on the labels, with seed 0; a stage of its own in OUT."""
        vocabulary = len(data.train.tokenizer)  # type: ignore[attr-defined]
        model = bert_spec(vocabulary, 2, width=128, layers=4, length=48).build(seed=0)
        cfg = plain.Plain(objective=(), label=1.0, batch=64, teacher_epochs=6.0, lr=5e-4, optimizer="adamw")
        plain.train_teacher(Run(Path(out) / "text" / "teacher", seed=0, quiet=True), "teacher", model, data, cfg)
        return model

    def student(self, data: Data) -> ModelSpec:
        return bert_spec(len(data.train.tokenizer), 2, width=48, layers=2, length=48)  # type: ignore[attr-defined]

    def judged_on(self, data: Data) -> tuple[Samples, Samples]:
        return data.test, data.held_out or data.test


PAIRS: dict[str, Images | Text] = {"images": Images(), "text": Text()}


@torch.no_grad()
def asked(model: nn.Module, samples: Samples, device: Any, normalize: Any) -> torch.Tensor:
    """The teacher's logits, its input normalised as its weights expect."""
    frozen, parts = Frozen(model.to(device), normalize=normalize), []
    for start in range(0, len(samples), 500):
        batch = samples.take(np.arange(start, min(start + 500, len(samples))))
        inputs = map_tensors(batch["input"], partial(torch.Tensor.to, device=device))
        parts.append(frozen({"input": inputs}).logits.float().cpu())
    return torch.cat(parts)
