"""What a run found, in one form for every system: report.json, report.html, a table for the terminal.

`parts` is the data; `rating` puts students beside their teacher; `text` says a report in a terminal and `html` on a
page, with `plots` and `style`; `versus` compares runs; `units` writes numbers as people read them; `pictures` draws
samples. Imports go that way only, so a report can be read without
drawing it.
"""

from __future__ import annotations

from stillhouse.report.html import write
from stillhouse.report.parts import Claim, Curve, Image, Matrix, Report, Student, Table
from stillhouse.report.pictures import grid
from stillhouse.report.rating import DistillationReport, Rated, rate
from stillhouse.report.text import summary
from stillhouse.report.versus import compare, read_arms

__all__ = [
    "Claim",
    "Curve",
    "DistillationReport",
    "Image",
    "Matrix",
    "Rated",
    "Report",
    "Student",
    "Table",
    "compare",
    "grid",
    "rate",
    "read_arms",
    "summary",
    "write",
]
