"""The house is as ARCHITECTURE.md says: rooms, doors, sizes, one reader of the environment."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpuscope"
SOURCES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
BESIDE = "beside them"
ROW = re.compile(r"^\| (?:`([\w./]+)`|" + BESIDE + r") \| .* \| ?(.*?) ?\|$", re.MULTILINE)
ROOMS = {
    name or BESIDE: set(re.findall(r"`([\w./]+)`", allowed)) or ({"everything"} if "everything" in allowed else set())
    for name, allowed in ROW.findall((ROOT / "ARCHITECTURE.md").read_text().partition("## Rules")[0])
}
FOUNDATIONS = ("_log.py", "_errors.py", "_interrupts.py", "_version.py", "_multiprocessing.py")
"""Files beside the rooms that import nothing of ours."""
DOORS = {
    "torch": ("commands/", "pinned/", "_overlap/"),
    "nvtx": ("_recording/nvtx.py", "commands/"),
    "opentelemetry": ("_otel/", "exporters/", "commands/"),
    "http": ("exporters/",),
    "rich": ("commands/",),
}
MAX_FILES = 12
NATIVE = "gpuscope._native"
"""The module in C, which imports nothing."""
BESIDE_FILES = (
    *FOUNDATIONS,
    "_runtime.py",
    "__init__.py",
    "_exits.py",
    "_said.py",
    "_profile.py",
    "testing.py",
    "_instrumentor.py",
    "__main__.py",
)
BEHIND_THE_DOORS = (
    "checks.py",
    "diagnosis.py",
    "doctor.py",
    "flight.py",
    "options.py",
    "_program.py",
    "run.py",
    "profile.py",
    "screen.py",
    "send.py",
    "sitecustomize.py",
    "watching.py",
    "sources.py",
    "command.py",
)
"""Of `commands/`, those that may import private rooms."""
ORDER = ("_reading/", "_structure/", "_busy/", "_verdicts/", "_viewers/")
"""Of `analysis/`: none imports what stands after it."""


def module_of(name: str) -> str:
    """Return the dotted name of a file of the package."""
    return "gpuscope." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_of(name): name for name in SOURCES} | {"gpuscope": "__init__.py"}


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
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import, which this test does not follow"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES or full == NATIVE else node.module)
    return found


def own_imports(name: str) -> set[str]:
    """The files of the package that a file imports, those for types included."""
    return {MODULES[module] for module in imports(SOURCES[name]) if module in MODULES} - {name}


def room_of(name: str) -> str:
    """The row of the table that a file belongs to: the longest folder, else what stands beside the rooms."""
    inside = [room for room in ROOMS if name == room or (name.startswith(room) and room.endswith("/"))]
    return max(inside, key=len, default=BESIDE)


def place_of(name: str) -> str:
    """How the table's last column names a file: by its room, or itself where it stands beside the rooms."""
    room = room_of(name)
    return name if room == BESIDE else room


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return one circle of a graph as the names along it, or nothing."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(arrows.get(name, ())):
            found = walk(following, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in arrows if (found := walk(name, []))), [])


def test_the_table_and_the_folders_are_the_same_rooms():
    """Each row is a folder, and each folder at the top has a row."""
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == {room for room in ROOMS if room.count("/") == 1}
    assert all((PACKAGE / room).exists() for room in ROOMS if room != BESIDE)
    beside = {name for name in SOURCES if "/" not in name}
    assert beside == {*BESIDE_FILES} | {room for room in ROOMS if room.endswith(".py")}


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_its_own_room_and_what_the_table_allows(name):
    """Data flows one way, imports for types included."""
    allowed = ROOMS[room_of(name)] | {room_of(name)}
    if name in FOUNDATIONS:
        allowed = set()
    if "everything" not in allowed:
        assert {other for other in own_imports(name) if place_of(other) not in allowed} == set()


def test_only_exporters_by_the_application_know_the_bridge():
    """The other exporters see batches alone."""
    users = {name for name in SOURCES if name.startswith("exporters/") and any(map(is_otel, own_imports(name)))}
    assert users <= {f"exporters/{name}.py" for name in ("application", "processors", "sdk")}


def is_otel(name: str) -> bool:
    """Tell whether a file is in the room of OpenTelemetry's contexts."""
    return name.startswith("_otel/")


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("commands/")])
def test_most_commands_use_what_everybody_may_use(name):
    """A command imports public modules, the errors, and its neighbours; a few look behind the doors."""
    if not name.endswith(BEHIND_THE_DOORS):
        used = {MODULES[module] for module in imports(SOURCES[name], runtime_only=True) if module in MODULES}
        foreign = {other for other in used if not other.startswith("commands/")} - {"_errors.py", "__init__.py"}
        assert {other for other in foreign if any(part.startswith("_") for part in other.split("/"))} <= {"__main__.py"}


def test_parts_of_rooms_keep_their_order():
    """Reports are built upwards, and what knows formats knows no sockets, nor the reverse."""
    for name in SOURCES:
        room, _, rest = name.partition("/")
        others = [other.partition("/")[2] for other in own_imports(name) if other.startswith(f"{room}/")]
        if room == "analysis" and rest.startswith(ORDER):
            after = ORDER[[rest.startswith(part) for part in ORDER].index(True) + 1 :]
            assert not [other for other in others if other.startswith(after)], name
        if rest.startswith("_transport/"):
            assert not [other for other in others if other.startswith("_encoding/")], name
        if rest.startswith("_encoding/"):
            assert not [other for other in others if other.startswith("_transport/")], name


def test_imports_by_name_are_where_names_are_given():
    """What imports a module by a text is out of sight of these tests: few do, all of them for the program's names."""
    users = {name for name, path in SOURCES.items() if re.search(r"import_module|__import__", path.read_text())}
    assert {name for name in users if not name.startswith(("instrument/", "commands/"))} <= {
        "__init__.py",
        "_startup/program.py",
    }


def test_no_circle_between_rooms():
    """A room that another is built on does not know it."""
    arrows: dict[str, set[str]] = {}
    for name in SOURCES:
        arrows.setdefault(place_of(name), set()).update(map(place_of, own_imports(name)))
    assert circle({place: others - {place} for place, others in arrows.items()}) == []


def test_no_circle_between_files():
    """No file reaches itself by what it imports, those for types included."""
    assert circle({name: own_imports(name) for name in SOURCES}) == []


def test_a_circle_would_be_found():
    """The search finds a circle behind a detour, and none where two ways meet."""
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]


def test_folders_stay_small():
    """A folder that one takes in at a glance: at most twelve files besides its `__init__`."""
    for folder in {path.parent for path in SOURCES.values()} - {PACKAGE}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_FILES, folder


@pytest.mark.parametrize("library", DOORS)
def test_foreign_libraries_live_behind_their_doors(library):
    """torch, nvtx, OpenTelemetry and the HTTP client are imported in few places."""
    users = {name for name, path in SOURCES.items() if any(found.split(".")[0] == library for found in imports(path))}
    assert {name for name in users if not name.startswith(DOORS[library])} == set()


def test_only_one_module_reads_the_environment():
    """`os.environ` and `getenv` are found in one module, and in what runs before any of ours."""
    readers = {name for name, path in SOURCES.items() if re.search(r"os\.environ|getenv", path.read_text())}
    assert readers == {"_settings/environment.py", "_startup/__init__.py", "_startup/backend.py"}


def test_nothing_uses_the_global_statement():
    """What is global is an attribute of `state`, or of an object that its module names."""
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


def test_records_and_batches_are_data():
    """Neither has a method that does anything, and neither imports anything of ours at run time."""
    for name in ("_data/record.py", "_data/batch.py"):
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


def test_each_part_in_c_names_its_twin():
    """Whoever reads a file of `csrc/` finds the Python that does the same, and that file exists."""
    for path in (PACKAGE / "csrc").iterdir():
        if path.suffix in (".c", ".h"):
            head = path.read_text().partition("*/")[0]
            named = re.findall(r"`([\w/]+\.py)`", head)
            assert named, path.name
            assert all((PACKAGE / name).exists() for name in named), (path.name, named)


def test_no_sleeps_in_tests_and_no_notes_to_self():
    """Tests wait for conditions; what is to be done is an issue."""
    words = ("time.sleep" + "(", "TO" + "DO", "FIX" + "ME")
    for folder, pattern in ((ROOT / "tests", words[0]), (ROOT / "gpuscope", "|".join(words[1:]))):
        for path in folder.rglob("*.py"):
            assert not re.search(re.escape(pattern).replace(r"\|", "|"), path.read_text()), path


WRITERS = {"warning", "info", "debug", "error", "exception", "critical", "log", "warn", "say", "_warn"}
"""Methods that write to a log."""
SHOWS_ERRORS_OF_ITS_OWN = {
    "__main__.py": "a command's own error, in the command's own process",
    "commands/_checks/checks.py": "as above",
    "commands/_program.py": "as above",
    "commands/_endpoint/options.py": "a setting of ours raised it, about an option",
    "commands/profile.py": "as above",
    "commands/run.py": "as above",
    "_settings/fields.py": "a parser of ours raised it, about a text of the environment or an argument",
    "_settings/keywords.py": "as above",
    "_settings/parsers.py": "as above",
    "exporters/_transport/route.py": "as above",
    "_profiling/session.py": "a `CannotProfileError` of ours",
    "instrument/_patching.py": "an `UnsuitableError` of ours",
    "exporters/file.py": "an `OSError` of a file that we write",
    "exporters/_transport/http.py": "of the HTTP client, in the sender's thread",
}
"""Files that show a caught exception as it is, and why its arguments hold nothing of the program's."""


def shown_as_they_are(tree: ast.AST) -> set[int]:
    """The lines on which a caught exception is formatted, or handed to a log, as it is or with its traceback."""
    found = set()
    for handler in ast.walk(tree):
        if isinstance(handler, ast.ExceptHandler):
            names = {handler.name} - {None}
            for node in ast.walk(handler):
                if isinstance(node, ast.FormattedValue | ast.Call) and any(is_shown(node, name) for name in names):
                    found.add(node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            logs_traceback = any(keyword.arg in ("exc_info", "stack_info") for keyword in node.keywords)
            called = getattr(node.func, "attr", "")
            if logs_traceback or called in ("print_exc", "format_exc") or (called == "exception" and node.args):
                found.add(node.lineno)
    return found


def is_shown(node: ast.FormattedValue | ast.Call, name: str) -> bool:
    """Tell whether a node makes a text of the name's value."""
    if isinstance(node, ast.FormattedValue):
        return isinstance(node.value, ast.Name) and node.value.id == name
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    given = {getattr(argument, "id", None) for argument in node.args}
    return name in given and called in {
        "str",
        "repr",
        "format",
        "print",
        "format_exception",
        "print_exception",
        *WRITERS,
    }


@pytest.mark.parametrize("path", [*SOURCES.values(), *sorted((ROOT / "integrations").glob("*.py"))], ids=str)
def test_no_exception_is_shown_as_it_is(path):
    """What an exception holds may be a tensor, whose text waits for the GPU: `values` says errors safely."""
    name = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name
    assert name in SHOWS_ERRORS_OF_ITS_OWN or shown_as_they_are(ast.parse(path.read_text())) == set()


def test_the_list_of_files_that_show_errors_is_true():
    """A file that shows no exception any more is not on the list."""
    for name in SHOWS_ERRORS_OF_ITS_OWN:
        assert shown_as_they_are(ast.parse(SOURCES[name].read_text())), name


@pytest.mark.parametrize(
    "text",
    [
        "f'{error}'",
        "f'{error!r}'",
        "str(error)",
        "log.warning('%s', error)",
        "log.exception('failed')",
        "log.warning('failed', exc_info=True)",
        "traceback.print_exc()",
    ],
)
def test_an_exception_that_is_shown_would_be_found(text):
    """Each way to make a text of an exception is found."""
    assert shown_as_they_are(ast.parse(f"try:\n    pass\nexcept Exception as error:\n    {text}\n")) == {4}
