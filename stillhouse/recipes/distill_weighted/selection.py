"""Which sources are similar, how much each counts, and a linear classifier for the new task on top of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.checkpoint import difference
from stillhouse.data import Samples, Subset
from stillhouse.data.cache import SignalCache
from stillhouse.encoders import Encoder, Probed, encode
from stillhouse.errors import UserError
from stillhouse.export import read_tensors, save_tensors
from stillhouse.recipes.distill_weighted.config import SELECTS, Config
from stillhouse.run import Run
from stillhouse.similarity import METRICS, Probe, probe, weights_of
from stillhouse.system import fold
from stillhouse.teachers import Cached, Ensemble, Frozen

FILES = ("heads.safetensors", "selection.json")


@dataclass
class Selection:
    """What a similarity says of the sources, and which are used.

    Attributes:
        names: of the sources. scores: their similarities, larger is better.
        weights: w_s, before the cut; they add up to 1. power: p.
        kept: positions of the sources used. C: inverse penalty of each used one's classifier.
        held_out: accuracy of that classifier on held-out folds of the labelled samples.
        heads: "weight.K", "bias.K" of the classifier of source K.
    """

    names: list[str]
    scores: list[float]
    weights: list[float]
    power: float
    kept: list[int]
    C: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float | None] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def nearest(self) -> int:
        """The position of the most similar source."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    def teacher(self, source: Encoder, k: int) -> Probed:
        """Source k with its classifier for the new task."""
        return Probed(source, self.heads[f"weight.{k}"], self.heads[f"bias.{k}"])


def some_of(samples: Samples, most: int, seed: int) -> Samples:
    """At most so many samples, chosen by the seed, the classes as even as they can be."""
    if len(samples) <= most:
        return samples
    order = np.random.default_rng(fold(seed, "probes")).permutation(len(samples))
    rank = np.empty(len(samples), int)
    for c in np.unique(samples.labels):
        mine = order[samples.labels[order] == c]
        rank[mine] = np.arange(len(mine))
    return Subset(samples, np.sort(np.lexsort((np.argsort(order), rank))[:most]))


def weigh(scores: Sequence[float], cfg: Config, power: float) -> np.ndarray:
    """The sources' weights by the rule of `cfg`; see `stillhouse.similarity.weights_of`."""
    e = np.array([METRICS[cfg.metric].positive(s) for s in scores])
    if cfg.minmax and len(e) > 1 and e.max() > e.min():
        e = (e - e.min()) / (e.max() - e.min())
    if cfg.rule == "nearest":
        return np.eye(len(e))[int(e.argmax())]
    return weights_of(e, power)


def tuned(scores: Sequence[float], found: dict[int, Probe], y: np.ndarray, cfg: Config) -> float:
    """The power whose mixture gives held-out labels the most likelihood; the first of equals."""
    said = [found[k].held_out for k in range(len(scores))]
    if any(p is None for p in said):
        raise UserError("tune: needs at least two labelled samples of every class; give --power instead")
    losses = []
    for power in cfg.tune:
        q = sum(w * p for w, p in zip(weigh(scores, cfg, power), said, strict=True) if p is not None)
        losses.append(-np.log(np.maximum(np.asarray(q)[np.arange(len(y)), y], 1e-300)).mean())
    return cfg.tune[int(np.argmin(losses))]


def select(
    sources: Sequence[Encoder], labelled: Samples, cfg: Config, *, seed: int = 0, device: Any = "cpu"
) -> Selection:
    """Scores every source on labelled samples, weighs them, and fits a classifier on each that is kept.

    Forward passes over the labelled samples only; no source is trained.

    Raises:
        UserError: no source, a class without a labelled sample, a metric that needs what a source does not give.
    """
    if not sources:
        raise UserError("at least one source model is needed; give --sources")
    metric, y = METRICS[cfg.metric], labelled.labels
    if len(missing := set(range(len(labelled.classes))) - set(y.tolist())):
        raise UserError(f"class {labelled.classes[min(missing)]!r} has no labelled sample; every class needs one")
    part = some_of(labelled, cfg.probes, seed)
    scores, features = [], []
    for source in sources:
        if metric.looks_at == "probabilities" and not source.classifies:
            raise UserError(f"metric {cfg.metric} needs sources that classify, {source.name} gives features; take parc")
        seen = encode(source, part, device=device)
        value = seen[0] if metric.looks_at == "features" else seen[1]
        assert value is not None
        scores.append(metric.score(value.numpy(), part.labels))
        features.append((seen[0] if part is labelled else encode(source, labelled, device=device)[0]).numpy())

    def classifier(k: int) -> Probe:
        return probe(features[k], y, len(labelled.classes), folds=cfg.folds)

    every = {k: classifier(k) for k in range(len(sources))} if cfg.tune else {}
    power = tuned(scores, every, y, cfg) if cfg.tune else cfg.power
    w = weigh(scores, cfg, power)
    kept = [k for k in range(len(w)) if w[k] > 0 and w[k] >= min(cfg.cutoff, 1 / len(w))]
    names = [s.name for s in sources]
    made = Selection(names, scores, w.tolist(), power if cfg.rule == "weighted" else math.inf, kept)
    for k in kept:
        found = every[k] if k in every else classifier(k)
        made.C[str(k)] = found.C
        right = None if found.held_out is None else float((found.held_out.argmax(1) == y).mean())
        made.held_out[str(k)] = right
        made.heads[f"weight.{k}"] = torch.from_numpy(found.weight).float()
        made.heads[f"bias.{k}"] = torch.from_numpy(found.bias).float()
    return made


def remembered(run: Run, sources: Sequence[Encoder], labelled: Samples, cfg: Config) -> Selection:
    """`select`, made once and read back from the run folder: every process and every resume has the same answer.

    Raises:
        UserError: the folder holds that of other settings, samples or sources.
    """
    home = run.folder / "selection"
    of = {k: v for k, v in asdict(cfg).items() if k in SELECTS} | {"tune": list(cfg.tune), "seed": run.seed}
    of |= {"labelled": labelled.fingerprint, "sources": [Frozen(s).fingerprint for s in sources]}
    if not (home / FILES[1]).exists() and run.main:
        made = select(sources, labelled, cfg, seed=run.seed, device=run.device)
        facts = {k: v for k, v in asdict(made).items() if k != "heads"}
        save_tensors(home, made.heads, {**facts, "of": of}, FILES)
    run.barrier()
    heads, facts = read_tensors(home, FILES)
    if (then := facts.pop("of", {})) != of:
        raise UserError(f"{home} holds a selection made otherwise ({difference(then, of)}); give a new run folder")
    facts["power"] = math.inf if facts["power"] is None else facts["power"]  # JSON has no infinity
    return Selection(**facts, heads=heads)


def mixed(
    run: Run, sources: Sequence[Encoder], selection: Selection, pool: Samples, cfg: Config, folder: Any = None
) -> Ensemble:
    """The teacher log Σ_s w_s q_s(x), every q_s asked once about every pool sample and kept by source.

    Kept apart, another power needs no further pass: give the same `folder`.
    """
    said, classes = [], len(selection.heads[f"bias.{selection.kept[0]}"])
    for k in selection.kept:
        teacher = Frozen(selection.teacher(sources[k], k))
        who: Any = {"teacher_fingerprint": teacher.fingerprint, "data_fingerprint": pool.fingerprint}
        home = (folder or run.folder / "cache") / f"source{k}"
        if run.main:
            dtype: Any = "float16" if cfg.half else "float32"
            cache = SignalCache.create(home, **who, n=len(pool), classes=classes, views=0, dtype=dtype)
            if not cache.complete:
                cache.fill(teacher, pool, seed=run.seed, batch_size=256, device=run.device)
        run.barrier()
        said.append(Cached(SignalCache.open(home, **who)))
        sources[k].cpu()
    return Ensemble(said, [selection.weights[k] for k in selection.kept], average="probabilities")
