"""Numbers and names as people read them: 11.2 M, 558 M, 42.7 MB, 3.1 ms, 1.8×, 93.1 %."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

MISSING = "—"


def number(value: Any) -> float | None:
    """The value as a finite float, or None when it is missing, not a number, NaN or infinite."""
    if getattr(value, "shape", None) == ():
        value = value.item()  # a scalar of numpy or torch
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def digits(value: float, significant: int = 3) -> str:
    """Fixed-point text with so many significant digits (whole numbers are never cut).

    Example:
        >>> digits(11.17), digits(558.4), digits(0.02345), digits(12345.6)
        ('11.2', '558', '0.0234', '12346')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else MISSING
    if abs(value) < 1e-4:
        return f"{value:.{significant - 1}e}"
    exponent = math.floor(math.log10(abs(float(f"{value:.{significant - 1}e}"))))
    return f"{value:.{max(0, significant - 1 - exponent)}f}"


def scaled(value: Any, unit: str = "", significant: int = 3) -> str:
    """SI-scaled text; the prefixes are decimal (1 MB = 10⁶ bytes).

    Args:
        value: a number, or anything else, which is shown as missing.
        unit: written after the prefix, e.g. ``"B"`` or ``"MACs"``.

    Example:
        >>> scaled(11_173_962), scaled(558_000_000, "MACs"), scaled(42_700_000, "B"), scaled(950)
        ('11.2 M', '558 MMACs', '42.7 MB', '950')
    """
    x = number(value)
    if x is None:
        return MISSING
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= factor * 0.9995:
            return f"{digits(x / factor, significant)} {prefix}{unit}".rstrip()
    plain = str(int(x)) if x == int(x) else digits(x, significant)
    return f"{plain} {unit}".rstrip()


def percent(value: Any, places: int = 1) -> str:
    """A fraction as percent: 0.9312 → ``93.1 %``."""
    x = number(value)
    return MISSING if x is None else f"{100 * x:.{places}f} %"


def times(value: Any) -> str:
    """A ratio: 1.83 → ``1.8×``."""
    x = number(value)
    if x is None:
        return MISSING
    return f"{x:.1f}×" if x < 99.95 else f"{x:.0f}×"


def milliseconds(value: Any) -> str:
    """A time in milliseconds: 3.14 → ``3.1 ms``; long ones in seconds, short ones in microseconds."""
    x = number(value)
    if x is None:
        return MISSING
    if x >= 1000:
        return f"{digits(x / 1000, 3)} s"
    return f"{digits(x, 2)} ms" if x >= 0.1 else f"{digits(x * 1000, 2)} µs"


def seconds(value: Any) -> str:
    """A duration: 12.3 s, 4 min 10 s, 2 h 05 min."""
    x = number(value)
    if x is None:
        return MISSING
    if x < 60:
        return milliseconds(x * 1000) if x < 1 else f"{digits(x, 3)} s"
    minutes, rest = divmod(round(x), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_PARTS: dict[str, Callable[[Any], str]] = {
    "accuracy": percent,
    "params": scaled,
    "parameters": scaled,
    "macs": lambda v: scaled(v, "MACs"),
    "bytes": lambda v: scaled(v, "B"),
    "seconds": seconds,
    "ms": milliseconds,
    "compression": times,
    "speedup": times,
}


def humanise(key: str, value: Any) -> str:
    """Text for a value under a key whose words may tell its unit (…_params, …_bytes, …_seconds, accuracy).

    A mapping as `stillhouse.evaluate.spread` makes it is shown as mean ± standard deviation.

    Example:
        >>> humanise("params_trained", 2_500_000), humanise("train_seconds", 250), humanise("alpha", 0.5)
        ('2.50 M', '4 min 10 s', '0.5')
        >>> humanise("accuracy", {"mean": 0.93, "std": 0.01, "n": 3})
        '93.0 % ± 1.0 % (n=3)'
    """
    if isinstance(value, Mapping):
        if "mean" in value:
            middle, wide = humanise(key, value["mean"]), value.get("std")
            around = f" ± {humanise(key, wide)}" if number(wide) is not None else ""
            return f"{middle}{around}" + (f" (n={value['n']})" if "n" in value else "")
        return ", ".join(f"{k} {humanise(str(k), v)}" for k, v in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(humanise(key, v) for v in value) or MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if number(value) is None:
        return MISSING if value is None or isinstance(value, float) else plain(str(value))
    shape = next((_PARTS[word] for word in key.lower().split("_") if word in _PARTS), None)
    if shape is not None:
        return shape(value)
    if isinstance(value, int):
        return str(value)
    shown = digits(float(value), 3)
    return shown.rstrip("0").rstrip(".") if "." in shown and "e" not in shown else shown


def plain(text: str) -> str:
    """The text without control characters and lone surrogates (each becomes �; line breaks become spaces)."""
    text = text.replace("\n", " ").replace("\t", " ").replace("\r", " ")
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def shorten(text: str, limit: int = 24) -> str:
    """The text cut in the middle to at most ``limit`` characters.

    Example:
        >>> shorten("a_very_long_student_name_p50", 15)
        'a_very_…ame_p50'
    """
    text = plain(text)
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"
