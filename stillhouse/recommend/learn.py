"""What pipelines add to the mean ratio of their task, by trees; tested on a task left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from stillhouse.recommend.runs import Recorded

Learner = Literal["forest", "boosting"]


def encoded(name: str, value: Any) -> dict[str, float]:
    """A setting as numbers: words become columns of their own, ``NAME:…:WEIGHT?OPTION=…`` its weight and options.

    Example:
        >>> encoded("objective", ["kd:0.5?T=4", "mi:a=b:1"])
        {'objective=kd': 0.5, 'objective=kd.T': 4.0, 'objective=mi': 1.0}
        >>> encoded("layer_map", "skip"), encoded("nothing", None)
        ({'layer_map=skip': 1.0}, {})
    """
    if value is None:
        return {}
    if isinstance(value, bool | int | float):
        return {name: float(value)}
    if isinstance(value, str):
        body, _, query = value.partition("?")
        word, *rest = body.split(":")
        weight = _number(rest[-1]) if rest else None
        options = {f"{name}={word}.{k}": v for k, v in re.findall(r"(\w+)=([^&]+)", query)}
        numbers = {k: n for k, v in options.items() if (n := _number(v)) is not None}
        return {f"{name}={word}": 1.0 if weight is None else weight, **numbers}
    if isinstance(value, Mapping):
        value = [f"{k}:{v}" for k, v in value.items()]
    if all(isinstance(v, str) for v in value):
        return {k: n for v in value for k, n in encoded(name, v).items()}
    return {f"{name}[{i}]": float(v) for i, v in enumerate(value) if isinstance(v, bool | int | float)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Model:
    """Tree model of what a pipeline adds to, or takes from, the mean ratio of its task.

    Args:
        rows: of one task or more.
        kind: forest (random forest, with a spread over trees) or boosting (gradient boosting).
    """

    def __init__(self, rows: Sequence[Recorded], kind: Learner = "forest"):
        from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor

        self.kind, self.columns = kind, sorted({k for r in rows for k in _numbers(r)})
        means = {t: float(np.mean([r.ratio for r in rows if r.task == t])) for t in {r.task for r in rows}}
        self.level = float(np.mean(list(means.values())))
        if kind == "forest":
            self.trees: Any = RandomForestRegressor(300, min_samples_leaf=2, max_features=0.5, random_state=0)
        else:
            self.trees = HistGradientBoostingRegressor(learning_rate=0.1, min_samples_leaf=3, random_state=0)
        self.trees.fit(self.matrix(rows), [r.ratio - means[r.task] for r in rows])

    def matrix(self, rows: Sequence[Recorded]) -> np.ndarray:
        """(rows, columns): a word that is not there is 0, a number that is not known NaN."""
        found = [_numbers(r) for r in rows]
        return np.array([[f.get(c, 0.0 if "=" in c else math.nan) for c in self.columns] for f in found])

    def predict(self, rows: Sequence[Recorded]) -> tuple[np.ndarray, np.ndarray]:
        """Predicted ratios, and their spread over the trees (NaN without trees to compare)."""
        x = self.matrix(rows)
        if self.kind != "forest":
            return self.level + self.trees.predict(x), np.full(len(x), math.nan)
        each = np.stack([tree.predict(x.astype(np.float32)) for tree in self.trees.estimators_])
        return self.level + each.mean(0), each.std(0)

    def matters(self, top: int = 4) -> list[str]:
        """The choices that the trees split by most, with their share."""
        if self.kind != "forest":
            return []
        ranked = sorted(zip(self.trees.feature_importances_, self.columns, strict=True), reverse=True)
        return [f"{name.replace('.', ' ', 1)} {share:.0%}" for share, name in ranked[:top] if share >= 0.01]


def _numbers(r: Recorded) -> dict[str, float]:
    settings = {k: n for key, value in r.settings.items() for k, n in encoded(f"{r.system}.{key}", value).items()}
    return {**r.facts, f"system={r.system}": 1.0, **settings}


def left_out(rows: Sequence[Recorded], kind: Learner = "forest") -> dict[str, float]:
    """Spearman's correlation of predicted and measured ratios on each task, by a model that has not seen the task.

    Tasks with fewer than three pipelines, or with one ratio only, have none; a model that cannot tell them apart has 0.
    """
    from scipy.stats import spearmanr

    found = {}
    for task in sorted({r.task for r in rows}):
        test, rest = [r for r in rows if r.task == task], [r for r in rows if r.task != task]
        if not rest or len(test) < 3 or len({round(r.ratio, 9) for r in test}) < 2:
            continue
        said = np.round(Model(rest, kind).predict(test)[0], 9)
        found[task] = float(spearmanr(said, [r.ratio for r in test]).statistic) if len(set(said)) > 1 else 0.0
    return found
