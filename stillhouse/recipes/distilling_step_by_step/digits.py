"""Odd or even? A task whose labels carry one bit, and a teacher whose rationales carry the ten digits behind it.

A network that knows the ten digits verbalises what it sees: "it is seven maybe one". The student reads an image as 16
patches and answers "odd" or "even". Shuffled rationales keep the compute, the tokens and the regularisation of the
second task and take its content away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data import Batches, Data, Samples
from stillhouse.engine import Run, fit
from stillhouse.evaluate import logits_of, predict
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.distilling_step_by_step.config import Config
from stillhouse.recipes.distilling_step_by_step.recipe import distill
from stillhouse.report import Claim, Curve, Table
from stillhouse.system import Batch, Clock, System, Terms, Update, fold
from stillhouse.text import Example, Task, TextModels, gru_spec, shuffled, small_tokenizer
from stillhouse.text.encoding import vocabulary_texts
from stillhouse.trials import Results, mean, slug, table, trials

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = (100, 200, 500, 1000)  # labelled images of the data-efficiency curve
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "label only": ({"model_type": "standard"}, False),
    "DSS": ({"model_type": "task_prefix"}, False),
    "DSS, rationales shuffled": ({"model_type": "task_prefix"}, True),
}
GATE, ORDER = 200, 1000  # where the claims are made
WIDTH = 96


class Classifier(System):
    """Plain cross-entropy, for the teacher."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def updates(self) -> Sequence[Update]:
        return [Update("learn", list(self.network.parameters()), partial(torch.optim.AdamW, lr=2e-3))]

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        return Terms(label=F.cross_entropy(logits_of(self.network(batch["input"])), batch["label"]))


def teacher(run: Run, data: Data, epochs: float) -> nn.Module:
    """A network with one hidden layer of 128 units, trained on all training digits."""
    spec = ModelSpec("stillhouse:mlp", 10, tuple(data.shape), options={"widths": [128]})
    system = Classifier(spec.build(seed=fold(run.seed, "teacher")))
    return fit(run, "teacher", system, Batches(data.train, 128), epochs=epochs).network.cpu().eval()


def patches(images: Tensor) -> Tensor:
    """(n, 1, h, w) images as sequences of 16 squares: (n, 16, h·w/16), row by row."""
    side = images.shape[-1] // 4
    return F.unfold(images, side, stride=side).transpose(1, 2).contiguous()


def examples(samples: Samples, network: nn.Module | None) -> list[Example]:
    """Images as examples; with a network, what it says of each, its errors kept."""
    taken = samples.take(np.arange(len(samples)))
    seen, digits = patches(taken["input"]), taken["label"].tolist()
    top: list[list[int]] = [[]] * len(digits)
    if network is not None:
        top = predict(network, samples)[0].topk(2).indices.tolist()
    made = []
    for x, digit, said in zip(seen, digits, top, strict=True):
        rationale = f"it is {WORDS[said[0]]} maybe {WORDS[said[1]]}" if said else ""
        taught = parity(said[0]) if said else ""
        made.append(Example("", parity(digit), rationale, taught, tensors={"patches": x}))
    return made


def parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def task_of(run: Run, data: Data, epochs: float) -> Task:
    """All training images with the teacher's rationales, and the test images."""
    network = teacher(run, data, epochs)
    train = examples(data.train, network)
    right = np.mean([e.taught == e.label for e in train])
    note = f"the teacher's parity is right for {right:.1%} of the training images"
    return Task(f"odd or even on {data.name}", train, (), examples(data.test, None), notes=(note,))


def part(task: Task, n: int, seed: int, mixed: bool) -> Task:
    """n training images, a prefix of one permutation per seed; with their rationales shuffled among them if `mixed`."""
    order = np.random.default_rng(fold("images", seed)).permutation(len(task.train))
    train = [task.train[i] for i in order[:n]]
    return replace(task, train=shuffled(train, fold("shuffle", seed)) if mixed else train)


def train(run: Run, task: Task, cfg: Config) -> TextModels:
    """A fresh student of the task; all arms have the same vocabulary and first weights."""
    tokenizer = small_tokenizer(vocabulary_texts([task.train], {"a": cfg.predict, "b": cfg.explain}) + list(WORDS))
    size = int(task.train[0].tensors["patches"].shape[-1])
    spec = gru_spec(len(tokenizer), WIDTH, size)
    return distill(run, task, spec.build(seed=run.seed), tokenizer, cfg, spec)


def once(task: Task, cfg: Config, n: int, mixed: bool, run: Run) -> dict[str, Any]:
    """One arm on one seed: accuracy on the test images, read once, after training."""
    began = time.process_time()
    made = train(run, part(task, n, run.seed, mixed), cfg)
    seconds = time.process_time() - began
    return {"accuracy": task.accuracy(made.answerer("student").examples(task.test), task.test), "cpu_seconds": seconds}


def name_of(arm: str, n: int) -> str:
    return f"{arm}, n = {n}"


def run_arms(run: Run, task: Task, cfg: Config, seeds: Sequence[int]) -> Results:
    """Three arms at n = 200 and 1000 on every seed; DSS also at half as many, against label-only training."""
    arms = {}
    for n in SIZES:
        for arm, (changes, mixed) in ARMS.items():
            if arm == "DSS" or n in (GATE, ORDER):
                arms[name_of(arm, n)] = partial(once, task, replace(cfg, **changes), n, mixed)
    return trials(run, arms, seeds)


def claims(found: Results, seeds: Sequence[int]) -> list[Claim]:
    """The claims of the card, as measured, holding or not."""

    def points(n: int, other: str) -> float:
        return 100 * (mean(found[name_of("DSS", n)], "accuracy") - mean(found[name_of(other, n)], "accuracy"))

    said = []
    for other in ("label only", "DSS, rationales shuffled"):
        gain, later = points(GATE, other), points(ORDER, other)
        text = f"test accuracy at n = {GATE}, DSS − {other}, points"
        said.append(Claim(text, gain >= 1.5, gain, 1.5, list(seeds)))
        said.append(Claim(f"… and in the same order at n = {ORDER}, points", later > 0, later, 0.0, list(seeds)))
    return said


def curve(found: Results) -> Curve:
    """Mean accuracy over the number of labelled images."""
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for arm in ARMS:
        sizes = [n for n in SIZES if name_of(arm, n) in found]
        series[arm] = (sizes, [100 * mean(found[name_of(arm, n)], "accuracy") for n in sizes])
    return Curve("Accuracy over labelled images", "labelled images", "test accuracy in per cent", series)


def saved_labels(found: Results) -> str:
    """The smallest n of the curve at which DSS passes label-only training on twice as many images."""
    for n in SIZES:
        if name_of("label only", 2 * n) in found:
            dss, plain = (mean(found[name_of(a, k)], "accuracy") for a, k in (("DSS", n), ("label only", 2 * n)))
            if dss >= plain:
                return f"DSS with {n} labels passes label-only training with {2 * n} ({dss:.1%} against {plain:.1%})"
    return "at no size of the curve does DSS pass label-only training on twice as many labels"


def tables(found: Results) -> list[Table]:
    columns = {"test accuracy %": ("accuracy", 100.0, 1), "training, CPU seconds": ("cpu_seconds", 1.0, 0)}
    return [table("Odd or even from 16 patches", found, columns)]


def students(run: Run, task: Task, cfg: Config) -> TextModels:
    """The students of this run's seed at n = 200, loaded from their finished arms."""
    made = {}
    for arm, name in (("DSS", "dss"), ("label only", "label-only")):
        changes, mixed = ARMS[arm]
        child = run.child(f"{slug(name_of(arm, GATE))}-{run.seed}", seed=run.seed, quiet=True)
        made[name] = train(child, part(task, GATE, run.seed, mixed), replace(cfg, **changes))
    members: list[Member] = [replace(one["student"], name=name) for name, one in made.items()]
    return replace(made["dss"], members=members)


def rationales(made: TextModels, task: Task, count: int = 8) -> Table:
    """What the student answers and what it gives as its reasons, on the first test images."""
    some, student = list(task.test[:count]), made.answerer("dss")
    answers, reasons = student.examples(some), student.examples(some, explain=True)
    rows = [[str(i), str(e.label), a, r] for i, (e, a, r) in enumerate(zip(some, answers, reasons, strict=True))]
    return Table("Answers and decoded rationales of test images", ["image", "label", "answer", "rationale"], rows)
