"""What a run found, in one form for every system: report.json, report.html, a table for the terminal.

`parts` is the data; `text` says it in a terminal and `html` on a page, with `plots` and `style`; `units` writes
numbers as people read them; `pictures` draws samples. Imports go that way only, so a report can be read without
drawing it.
"""

from __future__ import annotations

from stillhouse.report.html import write
from stillhouse.report.parts import Claim, Curve, Image, Matrix, Report, Student, Table
from stillhouse.report.pictures import grid
from stillhouse.report.text import compare, summary

__all__ = ["Claim", "Curve", "Image", "Matrix", "Report", "Student", "Table", "compare", "grid", "summary", "write"]
