"""Plots of a report as inline SVG: text stays text, colours are CSS variables, ids are reproducible."""

from __future__ import annotations

import itertools
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from stillhouse.report import units
from stillhouse.score import pareto

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
SERIES = 8
INK, MUTED, GRID = "#010101", "#020202", "#030303"
"""Stand-ins that become CSS variables in the SVG, so that a plot follows light and dark mode."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Point:
    """A model in a cost–quality plot; ``low``/``high`` bound the cost where it has a spread."""

    name: str
    cost: float
    quality: float
    role: str = "student"
    low: float | None = None
    high: float | None = None


def series_colour(index: int) -> str:
    """The stand-in for the colour of a line; they repeat after eight, with another dash."""
    return f"#1000{index % SERIES:02x}"


def lines(series: Mapping[str, tuple[Sequence[Any], Sequence[Any]]], x_label: str, y_label: str, key: str) -> str:
    """Lines over a common axis.

    Args:
        series: name to (xs, ys); None and NaN break a line; more than 600 points are thinned evenly.
        x_label, y_label: shown as they are. key: makes the ids of this SVG unique in the page.
    """
    with _figure() as (figure, axes):
        seen: list[float] = []
        for index, (xs, ys) in enumerate(series.values()):
            x, y = _thin([_float(v) for v in xs]), _thin([_float(v) for v in ys])
            n = min(len(x), len(y))
            dash = ("-", (0, (5, 2)), (0, (1.5, 1.5)))[index // SERIES % 3]
            marker = "o" if n <= 12 else None
            axes.plot(x[:n], y[:n], color=series_colour(index), linestyle=dash, marker=marker, markersize=3)
            seen += [v for v in y[:n] if math.isfinite(v)]
        if seen and min(seen) > 0 and max(seen) / min(seen) > 1000:
            axes.set_yscale("log")
        _axis(axes.yaxis, axes.get_yscale())
        axes.set_xlabel(units.plain(x_label))
        axes.set_ylabel(units.plain(y_label))
        return _svg(figure, key, f"{y_label} over {x_label}: {', '.join(series)}")


def cost_quality(points: Sequence[Point], x_label: str, y_label: str, key: str) -> str:
    """Models by cost and quality, the Pareto front joined, every point with its (shortened) name."""
    from matplotlib.ticker import FuncFormatter

    front = pareto([(p.cost, p.quality) for p in points])
    with _figure() as (figure, axes):
        best = sorted((p.cost, p.quality) for p, on in zip(points, front) if on)
        axes.plot([c for c, _ in best], [q for _, q in best], color=series_colour(0), linewidth=1.2, alpha=0.7)
        for point, on in zip(points, front):
            colour = series_colour(0) if on else MUTED
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [point.quality] * 2, color=colour, linewidth=3, alpha=0.25)
            marker = {"base": "s", "ensemble": "D"}.get(point.role, "o")
            fill = "none" if point.role == "ensemble" else colour
            axes.plot(point.cost, point.quality, marker, markersize=5, mfc=fill, mec=colour, linestyle="none")
        costs = [p.cost for p in points]
        if min(costs) > 0 and max(costs) / min(costs) > 20:
            axes.set_xscale("log")
        axes.margins(0.12, 0.16)
        _axis(axes.xaxis, axes.get_xscale())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %"))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _name_points(figure, axes, points, best)
        return _svg(figure, key, f"{y_label} over {x_label}: {', '.join(p.name for p in points)}")


Box = tuple[float, float, float, float]
_PLACES = tuple(
    (dx, dy, ha) for dy in (6, -13, -3.5, 16, -23) for dx, ha in ((0, "center"), (7, "left"), (-7, "right"))
)


def _name_points(figure: Any, axes: Any, points: Sequence[Point], front: list[tuple[float, float]]) -> None:
    """Write each name at the place where it hits the fewest other names, points and pieces of the front."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    spots = [axes.transData.transform((p.cost, p.quality)) for p in points]
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    for (x, y), (to_x, to_y) in itertools.pairwise(axes.transData.transform(front) if front else ()):
        along = [(x + t * (to_x - x), y + t * (to_y - y)) for t in (i / 24 for i in range(1, 24))]
        taken += [(a - 2, b - 2, a + 2, b + 2) for a, b in along]
    for point, (x, y) in zip(points, spots):
        text = units.shorten(point.name, 20)
        boxes = [_box(x, y, place, 4.9 * len(text)) for place in _PLACES]
        badness = [
            sum(_overlap(box, other) for other in taken)
            + 10 * (max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1 - 8))
            + index  # the earlier place where nothing else tells them apart
            for index, box in enumerate(boxes)
        ]
        best = badness.index(min(badness))
        taken.append(boxes[best])
        dx, dy, side = _PLACES[best]
        at = (point.cost, point.quality)
        axes.annotate(text, at, xytext=(dx, dy), textcoords="offset points", ha=side, fontsize=8)


def _box(x: float, y: float, place: tuple[float, float, str], wide: float) -> Box:
    """Where a name of this width would stand (points, y upwards)."""
    dx, dy, side = place
    left = x + dx - {"center": wide / 2, "left": 0.0, "right": wide}[side]
    return (left, y + dy, left + wide, y + dy + 9)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _float(value: Any) -> float:
    found = units.number(value)
    return math.nan if found is None else found


def _thin(values: list[float], limit: int = 600) -> list[float]:
    step = -(-len(values) // limit)
    return values if step <= 1 else values[::step]


_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))


def _axis(axis: Any, scale: str) -> None:
    """Numbers with SI prefixes; few of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    def tick(value: float, _: Any) -> str:
        factor, prefix = next(((f, p) for f, p in _SI if abs(value) >= f), (1.0, ""))
        return f"{value / factor:.4g} {prefix}".rstrip()

    axis.set_major_formatter(FuncFormatter(tick))
    axis.set_minor_formatter(NullFormatter())
    if scale == "linear":
        axis.set_major_locator(MaxNLocator(6))


class _figure:
    """A figure with one axes in our style; the global style and warnings are put back after."""

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib
        from matplotlib.figure import Figure

        self.style, self.quiet = matplotlib.rc_context(_STYLE), warnings.catch_warnings()
        self.style.__enter__()
        self.quiet.__enter__()
        # The browser's fonts draw the text; a glyph that matplotlib's own font lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(5.2, 3.2), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        return figure, axes

    def __exit__(self, *error: Any) -> None:
        self.quiet.__exit__(*error)
        self.style.__exit__(*error)


def _svg(figure: Any, key: str, says: str) -> str:
    """The figure as an ``<svg>`` element for a page: own ids, no metadata, a title, CSS colours."""
    import matplotlib

    out = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    for prefix, uri in (("", SVG), ("xlink", XLINK)):
        ET.register_namespace(prefix, uri)
    root = ET.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag == f"{{{SVG}}}metadata" or c.tag == f"{{{SVG}}}style"]:
            parent.remove(child)
    for element in root.iter():
        _localise(element, key)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    said = units.plain(says)
    root.set("role", "img")
    root.set("aria-label", said)
    title = ET.Element(f"{{{SVG}}}title")
    title.text = said
    root.insert(0, title)
    return ET.tostring(root, encoding="unicode")


def _localise(element: ET.Element, key: str) -> None:
    """Ids get the key of the plot, colour stand-ins become CSS variables."""
    for name, value in list(element.attrib.items()):
        if name == "id":
            value = f"{key}-{value}"
        elif name == f"{{{XLINK}}}href":
            value = f"#{key}-{value.removeprefix('#')}"
        elif name in ("style", "clip-path", "fill", "stroke"):
            value = re.sub(r"url\(#", f"url(#{key}-", value)
            for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "line")):
                value = value.replace(colour, f"var(--{variable})")
            value = re.sub(r"#1000(0[0-7])", lambda m: f"var(--s{int(m[1]) + 1})", value)
        element.set(name, value)
