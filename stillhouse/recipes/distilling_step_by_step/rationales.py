"""SVAMP with the rationales of a 540B model, by a model trained from scratch: does it learn to reason as it is told?

A model that has read nothing else cannot show the published gain, which rests on a pre-trained T5. What it can show is
the mechanism: rationales that belong to their problems can be learnt, shuffled ones cannot, and learning them does not
cost the labels. Numbers are masked (the n-th number of the problem is Nn), so that 800 problems have words in common.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from stillhouse.engine import Run
from stillhouse.evaluate import spread
from stillhouse.outcomes import Member
from stillhouse.recipes.distilling_step_by_step.config import Config
from stillhouse.recipes.distilling_step_by_step.recipe import distill
from stillhouse.report import Claim, Table
from stillhouse.system import fold
from stillhouse.text import (
    KINDS,
    Example,
    Task,
    TextModels,
    encode,
    evaluate,
    gru_spec,
    parse_report,
    same_value,
    shuffled,
    small_tokenizer,
    token_nll,
)
from stillhouse.text.encoding import vocabulary_texts
from stillhouse.trials import Results, mean, slug, table, trials

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
LONGEST = 45  # words of a rationale
STEPS = 300
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "label only": ({"model_type": "standard"}, False),
    "DSS": ({"model_type": "task_prefix"}, False),
    "DSS, rationales shuffled": ({"model_type": "task_prefix"}, True),
}


def numbers(text: str) -> list[float]:
    """The distinct numbers of a text, in their order."""
    return list(dict.fromkeys(float(n.replace(",", "")) for n in NUMBER.findall(text)))


def masked(text: str, known: Sequence[float], other: str | None) -> str:
    """Words and signs apart, numbers as N1, N2, … of `known`; others become `other`, or stay where it is None."""

    def name(found: re.Match[str]) -> str:
        value = float(found[0].replace(",", ""))
        return f" N{known.index(value) + 1} " if value in known else f" {other or value} "

    return " ".join(re.findall(r"\d+\.\d+|\w+|[^\w\s]", NUMBER.sub(name, text)))


def restored(text: str, known: Sequence[float]) -> str:
    """The numbers in the place of their names again."""
    values = {f"N{i + 1}": repr(v) for i, v in enumerate(known)}
    return " ".join(values.get(word, word) for word in text.split())


def mask(e: Example) -> Example:
    known = numbers(e.input)
    reason = " ".join(masked(e.rationale, known, "NUM").split()[:LONGEST])
    label, taught = (masked(t, known, None) for t in (str(e.label), e.taught))
    return replace(e, input=masked(e.input, known, "NUM"), label=label, taught=taught, rationale=reason)


def masked_task(task: Task) -> Task:
    """The task with masked numbers; answers are then compared as text, and `accuracy` by value."""
    train, valid, test = ([mask(e) for e in part] for part in (task.train, task.valid, task.test))
    return Task(f"{task.name}, numbers masked", train, valid, test, KINDS["text"], task.notes)


def accuracy(said: Sequence[str], plain: Sequence[Example]) -> float:
    """Share of masked equations that have the value of the gold answer."""
    values = [evaluate(restored(s, numbers(e.input))) for s, e in zip(said, plain, strict=True)]
    return sum(same_value(v, e.value) for v, e in zip(values, plain, strict=True)) / len(plain)


def train(run: Run, task: Task, cfg: Config) -> TextModels:
    """A fresh student; all arms have the same vocabulary (words used at least twice) and first weights."""
    texts = vocabulary_texts([task.train], {"a": cfg.predict, "b": cfg.explain})
    tokenizer = small_tokenizer([*texts, cfg.predict, cfg.explain], min_count=2)  # both prefixes twice
    spec = gru_spec(len(tokenizer), 128)
    return distill(run, task, spec.build(seed=run.seed), tokenizer, cfg, spec)


def once(plain: Task, task: Task, cfg: Config, mixed: bool, run: Run) -> dict[str, Any]:
    """One arm on one seed; the test examples are read once, after training."""
    began = time.process_time()
    used = replace(task, train=shuffled(task.train, fold("shuffle", run.seed))) if mixed else task
    made = train(run, used, cfg)
    found: dict[str, Any] = {"cpu_seconds": time.process_time() - began}
    student = made.answerer("student")
    found["accuracy"] = accuracy(student.examples(task.test), plain.test)
    last = [row["predict_nll"] for row in made.logs if "predict_nll" in row and row["step"] >= 0.9 * cfg.steps]
    found["train_label_nll"] = spread(last)["mean"]
    labels = [str(e.label) for e in task.test]
    found["label_nll"] = token_nll(student.model, encode(student.codec, task.test, student.text["prefix"], labels, ""))
    if student.text["explain"]:
        reasons = [e.rationale for e in task.test]
        view = encode(student.codec, task.test, student.text["explain"], reasons, "")
        found["rationale_nll"] = token_nll(student.model, view)
    return found


def run_arms(run: Run, plain: Task, cfg: Config, seeds: Sequence[int]) -> Results:
    task = masked_task(plain)
    arms = {a: partial(once, plain, task, replace(cfg, **changes), mixed) for a, (changes, mixed) in ARMS.items()}
    return trials(run, arms, seeds)


def claims(found: Results, plain: Task, seeds: Sequence[int]) -> list[Claim]:
    """The claims of the card on these data, as measured, holding or not."""
    s = list(seeds)
    gap = mean(found["DSS, rationales shuffled"], "rationale_nll") - mean(found["DSS"], "rationale_nll")
    cost = mean(found["DSS"], "train_label_nll") - mean(found["label only"], "train_label_nll")
    kind = KINDS["svamp"]
    train, test = (parse_report(part, kind) for part in ([*plain.train, *plain.valid], plain.test))
    missing, right = (train[k] + test[k] for k in ("no_rationale", "right"))
    return [
        Claim("rationale NLL on test, nats a token: shuffled − DSS", gap > 0, gap, 0.0, s),
        Claim("label loss at the end of training, nats: DSS − label only", cost <= 0.1, cost, 0.1, s),
        Claim("rationales that could not be parsed (11 train, 2 test)", missing == 13, missing, 13, s),
        Claim("teacher's equations with the right value (585 train, 148 test)", right == 733, right, 733, s),
    ]


def tables(found: Results, plain: Task) -> list[Table]:
    columns = {
        "answers right %": ("accuracy", 100.0, 1),
        "rationale NLL, test": ("rationale_nll", 1.0, 3),
        "label NLL, end of training": ("train_label_nll", 1.0, 3),
        "label NLL, test": ("label_nll", 1.0, 3),
        "training, CPU seconds": ("cpu_seconds", 1.0, 0),
    }
    note = "NLL in nats per token; nothing is claimed of the accuracy, which a model without pre-training does not gain"
    return [table("SVAMP, trained from scratch", found, columns, note), plain.report()]


def students(run: Run, plain: Task, cfg: Config) -> TextModels:
    """The students of this run's seed, loaded from their finished arms."""
    task, made = masked_task(plain), {}
    for arm, name in (("DSS", "dss"), ("label only", "label-only")):
        child = run.child(f"{slug(arm)}-{run.seed}", seed=run.seed, quiet=True)
        made[name] = train(child, task, replace(cfg, **ARMS[arm][0]))
    members: list[Member] = [replace(one["student"], name=name) for name, one in made.items()]
    return replace(made["dss"], members=members)
