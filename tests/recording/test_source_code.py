"""Where a stage's function is in the source: `code.function.name`, `code.file.path`, `code.line.number`."""

from __future__ import annotations

import copy
import functools
import sys
from types import ModuleType

import pytest

from gpuscope import stage
from gpuscope._recording.state import site_of_function
from gpuscope.instrument import instrument, uninstrument

PLACE = ("code.file.path", "code.line.number")


def prepare(*items: str) -> int:
    """Count."""
    return len(items)


def logged(function):
    """Wrap a function as decorators of the program do."""

    @functools.wraps(function)
    def wrapper(*items):
        return function(*items)

    return wrapper


class Model:
    """An object that can be called."""

    def __call__(self) -> int:
        """Return something."""
        return 5


def place_of(span):
    """What a span says of its function's place."""
    return tuple(span.attributes.get(name) for name in PLACE)


HERE = (prepare.__code__.co_filename, prepare.__code__.co_firstlineno)


@pytest.mark.parametrize("wrap", [lambda function: function, logged, classmethod, staticmethod, stage("inner")])
def test_a_function_has_its_place(bench, wrap):
    """File and first line are those of the function whose name it has, also below another decorator."""

    class Detector:
        prepared = stage("prepared")(wrap(prepare))

    Detector.prepared("x")
    (span,) = (span for span in bench.named("prepared") if span.kind == "host")
    assert place_of(span) == HERE
    assert span.attributes["code.function.name"] == f"{__name__}.prepare"


@pytest.mark.parametrize(
    ("called", "items"),
    [(len, ("abc",)), (functools.partial(prepare, "a"), ()), (Model(), ())],
    ids=["C", "partial", "object"],
)
def test_what_has_no_code_of_its_name_has_no_place(bench, called, items):
    """Functions in C, partials and objects: nothing is said of where they are, rather than where others are."""
    stage("called")(called)(*items)
    (span,) = (span for span in bench.named("called") if span.kind == "host")
    assert "code.function.name" in span.attributes
    assert place_of(span) == (None, None)


def test_a_chain_of_wrappers_without_an_end_is_left(bench):
    """A function that says it wraps itself is decorated all the same."""

    def endless():
        return 1

    endless.__wrapped__ = endless
    assert stage("endless")(endless)() == 1
    assert len(bench.named("endless")) == 1


def test_a_block_has_no_place(bench):
    """To learn where a block is would cost each entry more than the rest of it."""
    with stage("block"):
        pass
    (span,) = (span for span in bench.named("block") if span.kind == "host")
    assert not [name for name in span.attributes if name.startswith("code.")]


def test_a_function_by_name_has_its_place(bench, monkeypatch):
    """What `instrument` puts in a function's place says where that function is, with attributes from arguments too."""
    module = ModuleType("by_name")
    module.prepare = prepare
    monkeypatch.setitem(sys.modules, "by_name", module)
    instrument("prep=by_name:prepare{n=len(items)}")
    try:
        module.prepare("a", "b")
    finally:
        uninstrument()
    (span,) = (span for span in bench.named("prep") if span.kind == "host")
    assert span.attributes["n"] == 2
    assert place_of(span) == HERE


def test_a_place_is_pickled_with_its_stage():
    """A function that goes to another process by value says there where it came from."""
    site = site_of_function(prepare, None, None)
    again = copy.copy(site)
    assert again is not site
    assert (again.code, again.function, site.code) == (HERE, site.function, HERE)


def test_the_names_are_opentelemetrys():
    """As its package for conventions spells them, stable."""
    names = pytest.importorskip("opentelemetry.semconv.attributes.code_attributes")
    assert PLACE == (names.CODE_FILE_PATH, names.CODE_LINE_NUMBER)
