"""The house is as ARCHITECTURE.md says: floors, doors, sizes, one reader of the environment."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpuscope"
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROW = re.compile(r"^\| \w+ \| `([\w.]+)` \|", re.MULTILINE)
FLOORS = {name: height for height, name in enumerate(ROW.findall((ROOT / "ARCHITECTURE.md").read_text()))}
OTEL = ("_sampling", "_lazy_span", "_contexts", "_identity", "_otel", "_propagation", "exporters", "commands")
HELPERS = (
    "pinned",
    "_pinned_buffer",
    "_pinned_checks",
    "_pinned_memory",
    "_slots",
    "_graphs",
    "_flight",
    "_double_buffer",
    "_overlap",
)
DOORS = {
    "torch": ("commands", *HELPERS),
    "nvtx": ("_nvtx", "commands"),
    "opentelemetry": OTEL,
    "requests": ("exporters",),
    "rich": ("commands",),
}


def imports(path: Path, *, runtime_only: bool = False) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file; optionally without those for types."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    found = set()
    for node in ast.walk(tree):
        if runtime_only and id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_floor():
    """The table names each module once, and no module that does not exist."""
    assert set(FLOORS) == set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_module_imports_only_from_above_it_in_the_table(name):
    """Data flows one way: no module imports what is built on it."""
    own = {
        found.removeprefix("gpuscope.") for found in imports(SOURCES[name], runtime_only=True) if "gpuscope." in found
    }
    above = {module for module in own & set(FLOORS) if FLOORS[module] > FLOORS[name]}
    assert not above, f"{name} imports {above}"


@pytest.mark.parametrize("library", DOORS)
def test_foreign_libraries_live_behind_their_doors(library):
    """torch, nvtx, OpenTelemetry and the HTTP client are imported in few places."""
    users = {name for name, path in SOURCES.items() if any(found.split(".")[0] == library for found in imports(path))}
    assert {name for name in users if name.split(".")[0] not in DOORS[library]} == set()


def test_only_one_module_reads_the_environment():
    """`os.environ` and `getenv` are found in one module."""
    readers = {name for name, path in SOURCES.items() if re.search(r"os\.environ|getenv", path.read_text())}
    assert readers == {"_environment"}


def test_only_runtime_keeps_global_state():
    """No module uses the `global` statement."""
    users = {
        name
        for name, path in SOURCES.items()
        if any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert users == set()


def test_modules_and_functions_stay_small():
    """No module over 300 lines, no function over 60."""
    for name, path in SOURCES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 300, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_our_exceptions_are_one_family_drawn_at_its_head():
    """`_errors` alone defines exceptions; its opening names each, with the built-in type that it also is."""
    classes = {
        (name, node.name): [ast.unparse(base) for base in node.bases]
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and re.search(r"(Error|Exception)\b", " ".join(map(ast.unparse, node.bases)))
    }
    assert {name for name, _ in classes} == {"_errors"}
    drawn = re.findall(r"── (\w+)(?: \((\w+)\))?", ast.get_docstring(ast.parse(SOURCES["_errors"].read_text())))
    family = {name: ["GpuscopeError", *filter(None, [built_in])] for name, built_in in drawn}
    assert {name: bases for (_, name), bases in classes.items()} == {"GpuscopeError": ["Exception"], **family}


def test_records_and_batches_are_data():
    """Neither has a method that does anything, and neither imports anything of ours at run time."""
    for name in ("_record", "_columns"):
        tree = ast.parse(SOURCES[name].read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert functions <= {"__init__"}
        assert not any(found.startswith("gpuscope") for found in imports(SOURCES[name], runtime_only=True))


def test_each_broad_except_has_its_reason():
    """A broad `except` is a boundary, and a comment beside it says which."""
    for name, path in SOURCES.items():
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.search(r"except (Exception|BaseException)", line):
                around = " ".join(lines[number : number + 3])
                assert "#" in around or "raise" in around or "warn(" in around, f"{name}:{number + 1}"


def test_no_sleeps_in_tests_and_no_notes_to_self():
    """Tests wait for conditions; what is to be done is an issue."""
    words = ("time.sleep" + "(", "TO" + "DO", "FIX" + "ME")
    for folder, pattern in ((ROOT / "tests", words[0]), (ROOT / "gpuscope", "|".join(words[1:]))):
        for path in folder.rglob("*.py"):
            assert not re.search(re.escape(pattern).replace(r"\|", "|"), path.read_text()), path
