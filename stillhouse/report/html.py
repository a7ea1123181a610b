"""The report as one HTML file: opens offline, needs no script, follows light and dark, prints."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stillhouse.files import atomic_write, write_json
from stillhouse.report import plots, units
from stillhouse.report.parts import Claim, Curve, Image, Matrix, Report, Student, Table
from stillhouse.report.rating import basis, rate, rating
from stillhouse.report.style import STYLE
from stillhouse.report.text import FIDELITY, RATED, Column, around, beside, columns, label, measured_with

_COSTS = (("params", "parameters"), ("macs", "MACs per sample"), ("latency_ms", "latency, ms"))


def write(report: Report, folder: str | Path) -> Path:
    """Write ``report.json`` and ``report.html`` into a folder, each whole or not at all.

    Args:
        report: what a run found; its students are rated against their teacher (`rate`) where it has one.
        folder: made when missing; other files in it stay.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: not writable or no space.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as d:
        ...     path = write(Report("wml", "On digits", "", 0, {}, {}, [], []), d)
        ...     path.name, Report.read(d).title
        ('report.html', 'On digits')
    """
    folder, data = Path(folder), rate(report).to_json()
    write_json(folder / "report.json", data)
    # Drawn from what was written, so that the page made again later is the same page.
    atomic_write(folder / "report.html", page(Report.from_json(data)))
    return folder / "report.html"


def text(value: Any) -> str:
    """Any value as escaped text without control characters."""
    return escape(units.plain(str(value)))


def name(value: Any) -> str:
    """A name in a box of its own: long ones end in an ellipsis and are whole in the title."""
    shown = text(value)
    return f'<bdi class="name" title="{shown}">{shown}</bdi>'


def page(report: Report) -> str:
    """The whole page. Depends on the report alone; every string in it is shown as text."""
    sections = [
        _section("Family", _family(report.students)),
        _section("Size and score against the teacher", _rating(report.students)),
        _section("Result", _facts(report.metrics)),
        _section("Pictures", _figures(map(_image, report.images))),
        _section("Cost and quality", _figures(_paretos(report.students))),
        _section("Over time", _figures(_curve(c, f"c{i}") for i, c in enumerate(report.curves))),
        _section("Between models", _figures(map(_matrix, report.matrices))),
        _section("Tables", "".join(map(_table, report.tables))),
        _section("Claims", _claims(report.claims)),
        _section("Cost of the distillation", _facts(report.cost)),
        _section("Command", _command(report)),
        _section("Environment", _facts({**_seeds(report.seed), **report.environment})),
        _section("Notes", _notes(report.notes)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(report.title)} · Stillhouse</title>\n<style>\n{STYLE}</style>\n"
        f"</head>\n<body>\n<main>\n{_header(report)}{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def _header(report: Report) -> str:
    facts = [f"system <b>{text(report.system)}</b>"]
    models = sum(s.role == "student" for s in report.students)
    facts += [f"{models} student{'s' if models > 1 else ''}"] if models else []
    facts += [f"{k} {text(v)}" for k, v in _seeds(report.seed).items()]
    if report.claims:
        facts.append(f"{sum(bool(c.holds) for c in report.claims)} of {len(report.claims)} claims hold")
    return (
        f'<header>\n<p class="kicker">Stillhouse report</p>\n<h1><bdi>{text(report.title)}</bdi></h1>\n'
        f'<p class="facts">{" <span>·</span> ".join(facts)}</p>\n</header>\n'
    )


def _seeds(seed: Any) -> dict[str, str]:
    if seed is None:
        return {}
    many = isinstance(seed, list | tuple)
    return {"seeds" if many else "seed": ", ".join(map(str, seed)) if many else str(seed)}


def _scroll(what: str, table: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text(what)}">{table}</div>'


def _family(students: Sequence[Student]) -> str:
    if not students:
        return ""
    shown = columns(students)
    best = {c.key: _best(students, c) for c in shown}
    head = "".join(f'<th scope="col" title="{text(c.hint)}">{text(c.title)}</th>' for c in shown)
    rows = "".join(_student(s, shown, best) for s in students)
    how = measured_with(students)
    said = ["bold: best of a column", *([f"latency: median, p10–p90 below ({how})"] if how else [])]
    head = f'<tr><th scope="col">Student</th>{head}</tr>'
    table = f'<table class="family"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    return _scroll("family table", table) + f'<p class="small">{text("; ".join(said))}</p>'


def _best(students: Sequence[Student], column: Column) -> float | None:
    """The best number among students, where there is a better and they differ."""
    found = [n for s in students if s.role == "student" and (n := s.number(column.key)) is not None]
    if not column.better or len(set(found)) < 2:
        return None
    return max(found) if column.better > 0 else min(found)


def _student(student: Student, shown: Sequence[Column], best: Mapping[str, float | None]) -> str:
    cells = []
    for column in shown:
        value = student.number(column.key)
        body = text(column.text(value))
        if column.key == "importance" and value is not None:
            width = 100 * min(1.0, max(0.0, value))
            body = f'<span class="bar" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>{body}'
        small = beside(student, column.key)
        body += f"<small>{text(small)}</small>" if small and value is not None else ""
        mark = ' class="best"' if value is not None and value == best[column.key] and student.role == "student" else ""
        cells.append(f"<td{mark}>{body}</td>")
    role = f'<small class="role">{text(student.role)}</small>' if student.role != "student" else ""
    path = f"<small>{name(student.path)}</small>" if student.path else ""
    head = f'<th scope="row">{name(student.name)}{role or path}</th>'
    return f'<tr class="{text(student.role)}">{head}{"".join(cells)}</tr>'


def _rating(students: Sequence[Student]) -> str:
    """Ratios, DS and the front, with what is needed to read them; nothing where no student has a teacher."""
    found = basis(students)
    alpha = next((a for s in students if (a := s.number("ds_alpha")) is not None), None)
    rated, made = rating(students, alpha) if alpha is not None else ([], None)
    if found is None or made is None:
        return ""
    shown = [c for c in (*RATED, *FIDELITY) if any(s.number(c.key) is not None for s in rated)]
    titles = {"ds": made.title}
    rows = []
    for s in rated:
        cells = [text(c.text(s.number(c.key))) for c in shown] + ["yes" if s.number("front") else "no"]
        low, high = s.number("score_ratio_low"), s.number("score_ratio_high")
        if low is not None and high is not None:
            cells[[c.key for c in shown].index("score_ratio")] += f"<small>{100 * low:.1f}–{100 * high:.1f}</small>"
        rows.append(f'<tr><th scope="row">{name(s.name)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    heads = [(titles.get(c.key, c.title), c.hint) for c in shown] + [("front", "beaten by none in size and score")]
    head = "".join(f'<th scope="col" title="{text(hint)}">{text(title)}</th>' for title, hint in heads)
    head = f'<th scope="col">Student</th>{head}'
    table = f'<table class="family"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    said = [
        f"against {found.teacher.name}: size in {label(found.size)}, score {label(found.score)}",
        f"DS = α · size ratio + (1 − α)(1 − score ratio); doing nothing has {made.alpha:g}, less is better",
        f"area dominated up to the teacher's size: {made.hypervolume:.3f}",
    ]
    if made.chance is not None:
        said.append(f"DS_adj: corrected for chance, {units.percent(made.chance)}, a constant answer's accuracy")
    if any(c in shown for c in FIDELITY):
        said.append("agreement and KL: with the teacher's answers")
    if any(s.number("score_ratio_low") is not None for s in rated):
        said.append("below the score ratio: 95 %, paired bootstrap over test samples")
    return _scroll("size and score against the teacher", table) + f'<p class="small">{text("; ".join(said))}</p>'


def _facts(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    items = "".join(
        f"<div><dt>{text(label(k))}</dt><dd>{text(units.humanise(k, v))}</dd></div>" for k, v in values.items()
    )
    return f'<dl class="facts-grid">{items}</dl>'


def _figures(figures: Iterable[str]) -> str:
    body = "\n".join(figures)
    return f'<div class="figures">\n{body}\n</div>' if body else ""


def _figure(title: str, body: str, kind: str = "") -> str:
    return f'<figure class="plot{kind}"><figcaption><bdi>{text(title)}</bdi></figcaption>{body}</figure>'


def _paretos(students: Sequence[Student]) -> Iterable[str]:
    how = measured_with(students)
    for key, title in _COSTS:
        points = [
            plots.Point(s.name, cost, good, s.role, *_ends(s, key))
            for s in students
            if (cost := s.number(key)) is not None and (good := s.number("accuracy")) is not None
        ]
        if len(points) > 1:
            axis = f"{title} ({how})" if how and key == "latency_ms" else title
            svg = plots.cost_quality(points, axis, "accuracy", f"p-{key}")
            yield _figure(f"Accuracy and {title.split(',')[0]}", svg + '<p class="small">line: Pareto front</p>')


def _ends(student: Student, key: str) -> tuple[float | None, float | None]:
    if key != "latency_ms":
        return None, None
    return student.number("latency_p10"), student.number("latency_p90")


def _curve(curve: Curve, key: str) -> str:
    names = list(curve.series)
    legend = "".join(
        f'<li><i style="border-color:var(--s{i % plots.SERIES + 1});border-style:'
        f'{("solid", "dashed", "dotted")[i // plots.SERIES % 3]}"></i>{name(n)}</li>'
        for i, n in enumerate(names)
    )
    svg = plots.lines(curve.series, curve.x_label, curve.y_label, key)
    return _figure(curve.title, svg + f'<ul class="legend">{legend}</ul>')


def _matrix(matrix: Matrix) -> str:
    """A heat map as a table, so that its numbers can be read, copied and heard."""
    found = [n for row in matrix.values for v in row if (n := units.number(v)) is not None]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    head = "".join(f'<th scope="col">{name(n)}</th>' for n in matrix.names)
    rows = []
    for title, row in zip(matrix.names, matrix.values):
        cells = []
        for value in row:
            x = units.number(value)
            heat = 0 if x is None else 6 + 54 * (x - low) / ((high - low) or 1.0)
            shown = units.MISSING if x is None else f"{x:.2f}" if abs(x) < 100 else units.digits(x)
            cells.append(f'<td style="--heat:{heat:.0f}%">{shown}</td>')
        rows.append(f'<tr><th scope="row">{name(title)}</th>{"".join(cells)}</tr>')
    table = f'<table class="heat"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return _figure(matrix.title, _scroll(matrix.title, table))


def _cell(value: Any) -> str:
    if isinstance(value, bool | str):
        return f"<td class='words'>{text(units.humanise('', value))}</td>"
    return f"<td>{text(units.humanise('', value))}</td>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{text(c)}</th>' for c in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f'<p class="small">{text(table.note)}</p>' if table.note else ""
    body = f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f"<h3><bdi>{text(table.title)}</bdi></h3>{_scroll(table.title, body)}{note}"


def _image(image: Image) -> str:
    data = base64.b64encode(image.png_bytes).decode()
    return _figure(image.title, f'<img alt="{text(image.title)}" src="data:image/png;base64,{data}">', " picture")


def _claims(claims: Sequence[Claim]) -> str:
    if not claims:
        return ""
    items = []
    for claim in claims:
        kind, said = ("holds", "holds") if claim.holds else ("fails", "does not hold")
        numbers = f"measured {units.humanise('', claim.value)} · threshold {units.humanise('', claim.threshold)}"
        seeds = f" · seeds {', '.join(map(str, claim.seeds))}" if claim.seeds else ""
        items.append(
            f'<li class="{kind}"><b>{said}</b><div><bdi>{text(claim.text)}</bdi>'
            f"<small>{text(numbers + around(claim) + seeds)}</small></div></li>"
        )
    return f'<ul class="claims">{"".join(items)}</ul>'


def _command(report: Report) -> str:
    if not report.command:
        return ""
    return f'<pre tabindex="0" title="one click selects it all">{text(report.command)}</pre>'


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{text(n)}</li>" for n in notes)}</ul>' if notes else ""
