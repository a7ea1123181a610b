"""The wheel holds all that the main job needs: built, installed into a fresh environment, run outside the checkout."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def call(*words: str | Path, cwd: Path) -> str:
    """Runs a command without anything of this process's Python path; its output, or the test's failure."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what belongs to the package, so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "stillhouse").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    flags = ["--no-build-isolation"] if setuptools_version() >= 77 else []
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *flags, "--wheel-dir", out, source, cwd=out)
    (made,) = out.glob("stillhouse-*.whl")
    return made


def setuptools_version() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


def test_wheel_holds_pages_and_types_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = [p.name for p in (ROOT / "stillhouse/recipes").iterdir() if (p / "__init__.py").exists()]
    assert {"stillhouse/py.typed", *(f"stillhouse/recipes/{r}/README.md" for r in recipes)} <= names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"stillhouse"}
    every = {str(p.relative_to(ROOT)) for p in (ROOT / "stillhouse").rglob("*.py")}
    assert every <= names


def test_main_job_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    env = tmp_path / "env"
    venv.create(env, system_site_packages=True, with_pip=False, symlinks=True)
    home = env / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # The dependencies are those of this environment; its own editable Stillhouse must not be found first or at all.
    borrowed = [p for p in site.getsitepackages() if Path(p).is_dir()]
    (home / "dependencies.pth").write_text("\n".join(borrowed) + "\n")
    call(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        home,
        wheel,
        cwd=tmp_path,
    )
    python, work = env / "bin/python", tmp_path / "work"
    work.mkdir()
    where = call(python, "-c", "import stillhouse; print(stillhouse.__file__)", cwd=work).strip()
    assert Path(where).is_relative_to(home), f"the environment imports {where}"

    said = call(python, "-m", "stillhouse", "run", "wml", "--epochs", "1", "--seeds", "1", "--out", "out", cwd=work)
    assert "report:" in said
    assert (work / "out/report.html").read_text().startswith("<!DOCTYPE html>")
    report = json.loads((work / "out/report.json").read_text())
    names = [s["name"] for s in report["students"] if s["role"] == "student"]
    assert len(names) == 4
    for name in names:
        assert (work / "out/students" / name / "model.safetensors").stat().st_size > 0
        assert (work / "out/students" / name / "plan.json").is_file()
    load = (
        f"import stillhouse, torch; print(stillhouse.load('out/students/{names[-1]}')(torch.zeros(2, 1, 8, 8)).shape)"
    )
    assert "[2, 10]" in call(python, "-c", load, cwd=work)
    assert "Weighted Mutual Learning" in call(python, "-m", "stillhouse", "show", "wml", cwd=work)
