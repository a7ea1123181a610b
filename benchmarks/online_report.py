"""The table and the claims of benchmarks/online.py, from its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from common import pm, table

Results = dict[tuple[str, str], list[dict[str, Any]]]  # (variant, arm) -> one result per seed
COLUMNS = [
    "variant", "arm", "mean peer %", "… minus independent", "smallest (poisoned) %", "largest %", "ensemble %",
    "ensemble NLL", "weights", "trained parameters", "seconds", "tuned α, ramp, η, ρ",
]  # fmt: skip
ALONE = ("separate", "independent")


def paired(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Results of the same seed, side by side."""
    other = {r["settings"]["seed"]: r for r in b}
    return [(r, other[r["settings"]["seed"]]) for r in a if r["settings"]["seed"] in other]


def rows(results: Results) -> list[list[str]]:
    """One row per variant and arm; differences are paired by seed."""
    made = []
    for (variant, arm), rs in results.items():
        both = paired(rs, results.get((variant, "independent"), []))
        gains = [a["mean_accuracy"] - b["mean_accuracy"] for a, b in both]
        points = [
            [r["accuracy"][-1] for r in rs], [r["accuracy"][0] for r in rs], [r["ensemble_accuracy"] for r in rs],
        ]  # fmt: skip
        weights = [fmean(column) for column in zip(*(r["importance"] for r in rs), strict=True)]
        tuned = rs[0]["settings"]["changes"]
        made.append([
            variant, arm, pm([r["mean_accuracy"] for r in rs], 2, 100), pm(gains, 2, 100) if gains else "–",
            *(pm(v, 2, 100) for v in points), pm([r["ensemble_nll"] for r in rs], 3),
            " ".join(f"{w:.2f}" for w in weights), f"{rs[0]['trained_params']:,}",
            f"{fmean(r['seconds'] for r in rs):.0f}",
            ", ".join(str(tuned[k]) for k in ("alpha", "ramp", "eta", "floor") if k in tuned) or "–",
        ])  # fmt: skip
    return made


def claims(results: Results) -> list[dict[str, Any]]:
    """Claims 1–3 of wml.md and of online-baselines.md as measured, holding or not; what was not run is left out."""
    found: list[dict[str, Any]] = []

    def claim(text: str, values: Sequence[float], holds: Callable[[Sequence[float]], bool]) -> None:
        if values:
            found.append({"claim": text, "holds": holds(values), "mean": fmean(values), "each": list(values)})

    def change(variant: str, a: str, b: str, key: str, scale: float = 1.0) -> list[float]:
        pairs = paired(results.get((variant, a), []), results.get((variant, b), []))
        return [scale * (x[key] - y[key]) for x, y in pairs]

    for v in dict.fromkeys(variant for variant, _ in results):
        gain = change(v, "uniform", "wml", "ensemble_nll")
        if v == "poison":
            claim("wml 2 (poison): ensemble NLL, uniform − WML > 0", gain, lambda d: fmean(d) > 0)
        else:
            claim(f"wml 1 ({v}): ensemble NLL, uniform − WML > 0.01", gain, lambda d: fmean(d) > 0.01)
        points = change(v, "wml", "uniform", "mean_accuracy", 100)
        claim(f"wml 3 ({v}): mean peer accuracy, WML − uniform ≥ −0.2 points", points, lambda d: fmean(d) >= -0.2)
        arms = {a: rs for (variant, a), rs in results.items() if variant == v and a not in ALONE}
        better = [fmean(r["mean_nll"] - r["ensemble_nll"] for r in rs) for rs in arms.values()]
        text = f"baselines 1 ({v}): mean peer NLL − ensemble NLL ≥ 0, by arm: {', '.join(arms)}"
        claim(text, better, lambda d: min(d) >= 0)
    for arm, name in (("wml", "wml 2"), ("kdcl-general", "baselines 3")):
        omegas = [r["importance"] for r in results.get(("poison", arm), [])]
        text = f"{name}: {arm}'s weight of the poisoned peer < 0.5/M on every seed"
        claim(text, [o[-1] for o in omegas], lambda d: max(d) < 0.125)
        claim(f"{name}: … smallest weight of the others − the poisoned one's > 0",
              [min(o[:-1]) - o[-1] for o in omegas], lambda d: min(d) > 0)  # fmt: skip
    equal = [r["importance"][-1] for r in results.get(("poison", "dml"), [])]
    claim("baselines 3: dml cannot, the poisoned peer weighs 1/M", equal, lambda d: set(d) == {0.25})
    best = [
        float(r["held_out_error"][r["importance"].index(max(r["importance"]))] == min(r["held_out_error"]))
        for r in results.get(("clean", "kdcl-general"), [])
    ]
    text = "baselines 2: kdcl-general's largest weight is the peer of least held-out error (1 = yes)"
    claim(text, best, lambda d: min(d) == 1)
    return found


def text(data: str, results: Results, held: Sequence[dict[str, Any]], note: str) -> str:
    """The Markdown of one data set."""
    cells = [
        [c["claim"], "yes" if c["holds"] else "**no**", f"{c['mean']:.4f}", ", ".join(f"{e:.4f}" for e in c["each"])]
        for c in held
    ]
    return "\n\n".join(
        [f"### {data}", table(COLUMNS, rows(results)), note, table(["claim", "holds", "mean", "each"], cells)]
    )
