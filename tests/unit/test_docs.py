"""The documentation is true: its code runs, its commands parse, its links and the tests it names exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest

import stillhouse
from stillhouse import cli, flags, recipes
from stillhouse.options import ImageOptions

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "stillhouse/recipes").glob("*/README.md"))
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]+?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
FOREIGN = {"--num_processes"}  # of accelerate
PACKAGE = ROOT / "stillhouse"
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "stillhouse.") if "__main__" not in m.name)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the mark in the comment above it, where it stands and what it says."""

    kind: str
    mark: str
    line: int
    text: str

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["kind"], m["mark"] or "", text[: m.start("text")].count("\n") + 1, m["text"])
        for m in BLOCK.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The `stillhouse` commands of a shell text, as argument lists."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["accelerate", "launch"] and "-m" in words:
            words = words[words.index("-m") + 1 :]
        if words[:1] == ["stillhouse"]:
            yield words[1:]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory that Python imports from, also as a further home of recipes."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path / "recipes")])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            parent, _, leaf = name.rpartition(".")
            vars(sys.modules.get(parent, ModuleType(""))).pop(leaf, None)
            del sys.modules[name]


def write_files(page: Path, folder: Path) -> list[Path]:
    made = []
    for block in blocks(page):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            made.append(path)
    return made


def run_tests(path: Path) -> int:
    """Calls every test function of a file that needs no fixture."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [f for name, f in vars(module).items() if name.startswith("test_")]
    for test in tests:
        test()
    return len(tests)


# -- what the pages show ----------------------------------------------------------------------------------------


@pages
def test_code_runs(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python blocks in order in one namespace; files are written first; marked commands are run."""
    files = write_files(page, workplace)
    shown: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if block.kind == "python" and not block.file and block.mark != "no-run":
            code = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
            exec(compile(code, str(page), "exec"), shown)
        if block.mark == "run":
            found = list(commands(block.text))
            assert found, f"{page}:{block.line} is marked to be run but holds no stillhouse command"
            for argv in found:
                assert cli.invoke(argv) == 0, f"{page}:{block.line}: {capsys.readouterr().err}"
    for path in files:
        if path.name.startswith("test_"):
            assert run_tests(path)


@pages
def test_commands_parse(page: Path) -> None:
    shell = [b.text for b in blocks(page) if b.kind in ("bash", "sh") and b.mark != "run"]
    text = BLOCK.sub(lambda m: "" if (m["mark"] or "").startswith("file: ") else m[0], page.read_text())
    indented = "\n".join(line.strip() for line in text.splitlines() if line.startswith("    stillhouse "))
    for argv in commands("\n".join([*shell, indented])):
        argv = ["run", *argv] if argv[:1] == ["distill"] else argv
        if argv[:1] == ["run"] and "--help" not in argv:
            flags.refuse_idle(argv[2:], *flags.parse_flags(argv[1], argv[2:]))
        elif argv[:1] != ["run"]:
            cli.build_parser().parse_args(argv)


def known_flags() -> set[str]:
    configs = [recipes.find(name).Config for name in recipes.names()]
    options = [getattr(recipes.experiment(name), "OPTIONS", ImageOptions) for name in recipes.names()]
    names = {f.name.replace("_", "-") for c in (ImageOptions, *options, *configs) for f in fields(c)}
    commands_py = "".join((PACKAGE / name).read_text() for name in ("cli.py", "recommending.py"))
    scripts = "".join(p.read_text() for p in (ROOT / "benchmarks").glob("*.py"))
    return (
        {f"--{n}" for n in names}
        | {f"--no-{n}" for n in names}
        | set(re.findall(r'"(--[\w-]+)"', commands_py + scripts))
    )


@pages
def test_flags_exist(page: Path) -> None:
    text = BLOCK.sub(lambda m: "" if (m["mark"] or "").startswith("file: ") else m[0], page.read_text())
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z](?![\w-])", text))
    own = set(re.findall(r"--[\w-]+", " ".join(b.text for b in blocks(page) if b.mark == "run")))  # these are run
    assert named - own - known_flags() - FOREIGN - {"--help", "--version"} == set()


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pages
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, mark = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page.name} links to {target}, which does not exist"
        if mark:
            assert mark in {anchor(h) for h in re.findall(r"(?m)^#+ (.+)$", goal.read_text())}, target


@pages
def test_named_files_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    for path, test in re.findall(r"(tests/\w[\w/]*\.py)(?:::(\w+))?", text):
        assert (ROOT / path).exists(), f"{path} does not exist"
        if test:
            assert re.search(rf"(?m)^def {test}\(", (ROOT / path).read_text()), f"{path} has no {test}"
    for path in re.findall(r"benchmarks/\w+\.\w+", text):
        assert (ROOT / path).exists(), f"{path} does not exist"


PARTS = ["When to use it", "When not", "How good the source is", "Equations", "Cost", "Measured", "From Python"]


def page_of(name: str) -> Path:
    page = recipes.card(name).page
    if not page.exists():
        pytest.skip(f"{name} has no page yet")
    return page


@pytest.mark.parametrize("name", recipes.names())
def test_pages_of_systems_have_their_parts_in_order(name: str) -> None:
    text = BLOCK.sub("", page_of(name).read_text())
    headings = re.findall(r"(?m)^## (.+)$", text)
    known = ["Equations" if h == "Method" else h for h in headings if h in (*PARTS, "Method")]
    assert text.startswith("# ") and known == PARTS, f"{name}: {headings}"


@pytest.mark.parametrize("name", recipes.names())
def test_show_prints_the_page_and_every_option(name: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    page_of(name)
    monkeypatch.setenv("COLUMNS", "240")  # no option is broken over two lines
    assert cli.invoke(["show", name]) == 0
    shown = capsys.readouterr().out
    for field in fields(recipes.find(name).Config):
        row = re.search(rf"--{field.name.replace('_', '-')}\b(.*)", shown.split(f"Options of {name}")[1])
        assert row and recipes.comments(recipes.find(name).Config)[field.name], f"{name}: --{field.name} has no meaning"
    assert all(part in shown for part in PARTS if part != "Equations")


def test_the_example_system_keeps_the_contract(workplace: Path) -> None:
    """What the page on adding a system builds gives the same bytes for the same seed, and resumes."""
    write_files(ROOT / "docs/adding-a-system.md", workplace)
    experiment = recipes.experiment("born_again")

    def made(folder: str) -> dict[str, bytes]:
        experiment.tiny(stillhouse.Run(folder, quiet=True), experiment.TINY).save(folder)
        return {p.parent.name: p.read_bytes() for p in Path(folder).glob("students/*/model.safetensors")}

    first = made("a")
    assert set(first) == {"g0", "g1"} and first == made("b") == made("a")


# -- what the code says of itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", stillhouse.__all__)
def test_public_names_are_there_and_described(name: str) -> None:
    thing = getattr(stillhouse, name)
    if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
        text = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""  # not an inherited one
        assert text.strip() and not text.startswith(f"{name}("), f"stillhouse.{name} has no docstring of its own"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, workplace: Path) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


# -- architecture.md --------------------------------------------------------------------------------------------


def floors() -> dict[str, int]:
    rows = re.findall(r"(?m)^\| (\d+) \| ([^|]+) \|", (ROOT / "docs/architecture.md").read_text())
    return {module: int(floor) for floor, cell in rows for module in re.findall(r"`(\w+)`", cell)}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of the package that a file imports when loaded, and those that it imports at all."""
    loaded, every = set(), set()

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            names = [a.name for a in child.names] if isinstance(child, ast.Import) else []
            if isinstance(child, ast.ImportFrom) and child.module:
                names = (
                    [f"stillhouse.{a.name}" for a in child.names] if child.module == "stillhouse" else [child.module]
                )
            found = {n.split(".")[1] for n in names if n.startswith("stillhouse.")} - {"__version__"}
            every.update(found)
            loaded.update(set() if late else found)
            visit(child, late or isinstance(child, ast.FunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), False)
    return loaded, every


def test_imports_go_down_the_floors() -> None:
    floor = floors()
    loads: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        home = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if home == "__init__":
            continue
        assert home in floor, f"docs/architecture.md does not say on which floor {home} is"
        loaded, every = imports(path)
        loads.setdefault(home, set()).update(loaded - {home})
        for other in every - {home}:
            assert floor[other] <= floor[home], f"{path.name} (floor {floor[home]}) imports {other} ({floor[other]})"
    assert set(floor) == set(loads), "docs/architecture.md names modules that do not exist"
    for home, others in loads.items():
        assert not any(home in loads[o] for o in others), f"{home} and one of {others} import each other"
