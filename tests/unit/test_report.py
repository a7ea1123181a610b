"""The report and its page: strict JSON, the same page again, and a real browser that finds nothing wrong."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import stillhouse.report
from stillhouse.errors import UserError
from stillhouse.report import Claim, Curve, Image, Matrix, Report, Student, Table, compare, summary, write
from stillhouse.report.plots import Point, cost_quality, lines

HOSTILE = [
    "<script>alert(1)</script>",
    "$x^2$ & \\frac{1}{0}",
    "long_" + "n" * 195,
    "🥃 emoji 👩‍🔬",
    "עברית مرحبا",
    '"><img src=x onerror=alert(1)>',
    "</title></style><svg onload=alert(1)>",
    "\u202eright-to-left override",
    "bell\x07 and surrogate \ud800",
]


def png(width: int = 8) -> bytes:
    from PIL import Image as Picture

    out = io.BytesIO()
    Picture.fromarray(np.arange(width * width, dtype=np.uint8).reshape(width, width)).save(out, "PNG")
    return out.getvalue()


def family(names: list[str]) -> list[Student]:
    base, students = 11_173_962, []
    for i, name in enumerate(names):
        keep = 1 / (1 + 0.8 * i)
        students.append(
            Student(
                name,
                f"students/p{i}",
                params=int(base * keep),
                macs=int(558e6 * keep),
                latency_ms=8.2 * keep,
                metrics={
                    "accuracy": 0.934 - 0.012 * i,
                    "nll": 0.21 + 0.03 * i,
                    "ece": 0.021 + 0.002 * i,
                    "bytes": int(4 * base * keep),
                    "latency_p10": 7.9 * keep,
                    "latency_p90": 9.1 * keep,
                    "threads": 1,
                    "batch": 1,
                    "compression": 1 / keep,
                    "speedup": 1 / keep,
                    "importance": 1 / len(names),
                },
                role="base" if i == 0 else "student",
            )
        )
    together = {"accuracy": 0.941, "nll": 0.19, "ece": math.nan}
    return [
        *students,
        Student("ω-ensemble", params=24_000_000, macs=1.2e9, metrics=together, role="ensemble"),
    ]


def example(names: list[str] | None = None, title: str = "WML · resnet18 on CIFAR-10") -> Report:
    names = names or ["p00", "p30", "p50", "p70"]
    steps = list(range(0, 400, 4))
    rng = np.random.default_rng(0)
    loss = {
        n: (steps, [2.3 * math.exp(-s / 150) + 0.03 * rng.random() + 0.1 * i for s in steps])
        for i, n in enumerate(names)
    }
    omega = {n: (steps, [1 / len(names) + (i - 1.5) * s / 6000 for s in steps]) for i, n in enumerate(names)}
    values = [[1.0 if i == j else 0.95 - 0.02 * abs(i - j) for j in range(len(names))] for i in range(len(names))]
    return Report(
        "wml",
        title,
        "stillhouse run wml --model torchvision:resnet18 --data cifar10 --ratios 0 0.3 0.5 0.7 --out runs/r18",
        [0, 1, 2],
        {"python": "3.11.9", "torch": "2.15.0", "cpu": "Xeon", "threads": 1, "devices": ["cpu"]},
        {
            "mean_accuracy": {"mean": 0.912, "std": 0.004, "n": 3},
            "ensemble_nll": 0.19,
            "diversity": torch.tensor(0.12),
        },
        [
            Claim(
                "The ensemble's NLL is at least 0.01 below uniform mutual learning",
                True,
                0.031,
                0.01,
                [0, 1, 2],
            ),
            Claim("Mean peer accuracy is at most 0.2 points below uniform", False, -0.004, -0.002, [0, 1, 2]),
        ],
        family(names),
        cost={
            "train_seconds": 754.2,
            "params_trained": 21_200_000,
            "macs_per_image": 1.06e9,
            "peak_bytes": 1.9e9,
        },
        curves=[
            Curve("Label loss", "step", "nats", loss),
            Curve("Mutual loss", "step", "nats", {n: (x, [v / 3 for v in y]) for n, (x, y) in loss.items()}),
            Curve("Importance ω", "step", "ω", omega),
        ],
        matrices=[Matrix("Agreement of top-1", names, values)],
        tables=[
            Table(
                "Arms",
                ["arm", "accuracy", "seconds"],
                [["wml", 0.912, 754], ["dml", math.nan, 801]],
                "3 seeds",
            )
        ],
        images=[Image("Samples", png())],
        notes=["The held-out part is a tenth of the training set."],
    )


def printed(thing: Any, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_json_is_strict_and_has_the_contract_keys(tmp_path: Path) -> None:
    write(example(), tmp_path)
    raw = (tmp_path / "report.json").read_text()
    data = json.loads(raw, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    for key in ("system", "command", "seed", "environment", "metrics", "claims", "students"):
        assert key in data
    assert set(data["claims"][0]) == {"text", "holds", "value", "threshold", "seeds"}
    assert {"name", "path", "params", "macs", "latency_ms", "metrics"} <= set(data["students"][0])
    assert data["students"][-1]["metrics"]["ece"] is None
    assert data["tables"][0]["rows"][1][1] is None
    assert data["metrics"]["diversity"] == pytest.approx(0.12)


def test_the_page_comes_again_from_the_json_alone(tmp_path: Path) -> None:
    write(example(HOSTILE[:4]), tmp_path / "a")
    write(Report.read(tmp_path / "a"), tmp_path / "b")
    for name in ("report.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Report.read(tmp_path / "a" / "report.json").images[0].png_bytes == png()


def test_empty_sections_are_not_shown(tmp_path: Path) -> None:
    html = write(Report("dpd", "bare", "", None, {}, {}, [], []), tmp_path).read_text()
    assert "<section" not in html
    assert math.isnan(
        Report.from_json(Report("s", "t", "", 0, {}, {}, [Claim("c", False, math.nan, 1.0)], []).to_json())
        .claims[0]
        .value
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "damaged"),
        ("[]", "not a report"),
        ('{"system": "wml"}', "lacks title"),
        ('{"system": "wml", "format": 99}', "format 99"),
        ('{"system": NaN}', "damaged"),
    ],
)
def test_a_bad_report_is_one_line_that_names_the_file(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        Report.read(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        Report.read(tmp_path / "nowhere")


def test_terminal_table_fits_and_cuts_only_names() -> None:
    out = printed(summary(example(["p00", "<b>[red]p30[/red]", "n" * 200, "p70"])))
    assert max(len(line) for line in out.splitlines()) <= 100
    for part in (
        "93.4 %",
        "11.2 M",
        "558 M",
        "44.7 MB",
        "8.2 ms",
        "1.8×",
        "0.250",
        "[red]p30[/red]",
        "does not hold",
    ):
        assert part in out, part
    row = next(line for line in out.splitlines() if line.startswith("nnn"))
    assert row.count("…") == 1


def test_compare_matches_students_by_name_and_takes_differences() -> None:
    a, b = example(), example()
    b.students[1].metrics["accuracy"] += 0.01
    b.students = b.students[:3]
    b.claims[0].holds = False
    shown, data = compare([a, b], ["runs/a", "runs/b"])
    entry = data["students"]["p30"]["accuracy"]
    assert entry["difference"] == [0, pytest.approx(0.01)]
    assert data["students"]["p70"]["accuracy"]["values"][1] is None
    assert data["claims"][0]["holds"] == [True, False]
    out = printed(shown)
    assert "93.2 % (+1.0 %)" in out and "runs/b does not hold" in out
    json.dumps(data, allow_nan=False)
    with pytest.raises(UserError, match="two"):
        compare([a])


def test_plots_are_reproducible_and_keep_names_as_text() -> None:
    points = [Point(n, i + 1.0, 0.5 + i / 20) for i, n in enumerate(HOSTILE)]
    first = cost_quality(points, "parameters", "accuracy", "k")
    assert first == cost_quality(points, "parameters", "accuracy", "k")
    assert "<script" not in first and "$x^2$" in first and "<metadata" not in first and "http://purl" not in first
    broken = lines({"a": ([0, 1, 2], [1.0, math.nan, None])}, "step", "loss", "k2")
    assert "k2-" in broken and "NaN" not in broken and "nan" not in broken
    many = lines({"a": (range(100_000), [float(i) for i in range(100_000)])}, "step", "loss", "k3")
    assert len(many) < 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(found).exists():
        pytest.fail(f"no Chromium at {found}; install it (apt-get install chromium) or set CHROMIUM=/path/to/it")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


@pytest.mark.parametrize("javascript", [True, False])
def test_in_a_real_browser(tmp_path: Path, browser: Any, javascript: bool) -> None:
    names = ["p00", *HOSTILE]
    report = example(names, title=f"WML on {HOSTILE[0]} {HOSTILE[2]}")
    report.environment[HOSTILE[5]] = HOSTILE[6]
    report.notes += HOSTILE
    report.command += " --out '" + HOSTILE[0] + "'"
    report.claims.append(Claim(HOSTILE[2], True, math.nan, 0.0, [1]))
    report.tables.append(Table(HOSTILE[2], [HOSTILE[2], "b"], [[HOSTILE[2], HOSTILE[0]]], HOSTILE[0]))
    page_file = write(report, tmp_path)
    context = browser.new_context(java_script_enabled=javascript)
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("dialog", lambda d: (problems.append(f"dialog {d.message}"), d.dismiss()))
    page.on("request", lambda r: requests.append(r.url))
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(page_file.as_uri())
        assert page.locator("figure.plot").count() == 8  # picture, three Pareto plots, three curves, one matrix
        for i in range(8):
            box = page.locator("figure.plot").nth(i).bounding_box()
            assert box["width"] > 100 and box["height"] > 100, (i, box)
        drawn = page.locator("figure.plot svg")
        assert drawn.count() == 6 and all(drawn.nth(i).bounding_box()["height"] > 100 for i in range(6))
        wide = page.evaluate("document.documentElement.scrollWidth") if javascript else width
        assert wide <= width, f"page is {wide} px wide in a window of {width}"
    said = page.inner_text("body")
    for name in HOSTILE[:7]:
        assert name in said, name
    assert page.locator("script").count() == 0 and page.locator("img").count() == 1
    assert not problems, problems
    outside = [url for url in requests if not url.startswith((page_file.as_uri(), "data:"))]
    assert not outside, outside
    if javascript:
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
    context.close()


def test_the_parts_of_the_package_do_not_import_in_circles() -> None:
    """Imports inside functions and for type checking count as well."""
    package = Path(stillhouse.report.__file__).parent
    needs: dict[str, set[str]] = {}
    for path in package.glob("*.py"):
        found: list[str] = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "stillhouse.report":
                found += [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stillhouse.report."):
                found.append(str(node.module).split(".")[2])
            elif isinstance(node, ast.Import):
                assert not any(a.name.startswith("stillhouse.report") for a in node.names), path.name
        needs["" if path.stem == "__init__" else path.stem] = set(found)
    for name, others in needs.items():  # a name that is no module comes from the package itself
        assert others <= set(needs), f"{name} imports {others - set(needs)} from the package"
    order = list(TopologicalSorter(needs).static_order())
    assert order[-1] == "" and order.index("parts") < min(order.index("text"), order.index("html"))


def test_reports_are_read_and_compared_without_heavy_libraries() -> None:
    code = "import sys, stillhouse.report; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_importance_shows_three_decimals_in_both_forms(tmp_path: Path) -> None:
    report = example()
    for student, weight in zip(report.students, (0.2514, 0.2496, 0.2488, 0.2502)):
        student.metrics["importance"] = weight
    out, html = printed(summary(report)), write(report, tmp_path).read_text()
    for shown in ("0.251", "0.250", "0.249"):
        assert shown in out and f"</span>{shown}</td>" in html


def test_names_in_a_cost_plot_stand_beside_the_front(tmp_path: Path, browser: Any) -> None:
    """No piece of the joined front runs through a name; a missing number in a table stands right, as numbers do."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(write(example(), tmp_path).as_uri())
    struck = page.evaluate(
        """() => [...document.querySelectorAll('figure.plot svg')].flatMap(svg => {
            const front = [...svg.querySelectorAll('path')].find(
                p => /opacity: 0\\.7\\b/.test(p.getAttribute('style')))
            if (!front) return []
            const along = [...Array(201).keys()].map(i => front.getPointAtLength(front.getTotalLength() * i / 200)
                .matrixTransform(front.getScreenCTM()))
            const names = [...svg.querySelectorAll('text')].filter(t => /^(p\\d0|ω-ensemble)$/.test(t.textContent))
            return names.flatMap(t => {
                const b = t.getBoundingClientRect(), mid = [b.top + b.height * 0.3, b.bottom - b.height * 0.3]
                const hit = along.some(q => q.x > b.left && q.x < b.right && q.y > mid[0] && q.y < mid[1])
                return hit ? [t.textContent] : []
            })
        })"""
    )
    found = page.evaluate("document.querySelectorAll('figure.plot svg text').length")
    assert found > 20 and struck == [], struck
    missing = page.locator("table.plain td", has_text="—").first
    assert missing.evaluate("e => getComputedStyle(e).textAlign") == "right"
    page.close()
