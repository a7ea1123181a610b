"""What the benchmark scripts share: one thread, JSON files, Markdown tables. Import it before torch."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two multi-threaded runs side by side are 25 times slower than one


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that an interrupted script leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def remember(path: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result that is made once; one of other settings is refused."""
    settings = json.loads(json.dumps(settings))
    found = read(path)
    if found is None:
        found = {"settings": settings, **make()}
        write(path, found)
    elif found["settings"] != settings:
        changed = [k for k in {**settings, **found["settings"]} if settings.get(k) != found["settings"].get(k)]
        raise SystemExit(f"{path} was made with other settings ({', '.join(changed)}): give another --out or delete it")
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def pm(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """Mean ± sample standard deviation."""
    x = [scale * v for v in values]
    mean = statistics.fmean(x)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(x):.{digits}f}" if len(x) > 1 else "")
