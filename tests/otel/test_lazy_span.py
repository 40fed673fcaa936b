"""`LazySpan` keeps its parts to itself, and names nothing that the application's span may have."""

from __future__ import annotations

import ast
from pathlib import Path

from opentelemetry.trace import Span

import gpuscope
from gpuscope._otel.lazy_span import LazySpan

PACKAGE = Path(gpuscope.__file__).parent
FILE = PACKAGE / "_otel" / "lazy_span.py"
PARTS = {"_attached", "_context", "_notes", "_real", "_record", "_source"}


def touched(tree: ast.AST, *, own: bool) -> set[str]:
    """Return the parts that are read or set in a file; those of `self` only where that may be a lazy span."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (own or not (isinstance(node.value, ast.Name) and node.value.id == "self"))
    } & PARTS


def test_the_parts_are_those_of_the_class():
    """The list above is that of the span and of what the record has of it: what they declare or are given."""
    tree = ast.parse(FILE.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in ("LazySpan", "Standing")]
    assert len(classes) == 2
    nodes = [node for each in classes for node in ast.walk(each)]
    declared = {each.target.id for node in classes for each in node.body if isinstance(each, ast.AnnAssign)}
    stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    assert {name for name in declared | stored if name.startswith("_")} == PARTS


def test_nobody_else_touches_its_parts():
    """Other files use the functions of `lazy_span.py`."""
    found = {
        str(path.relative_to(PACKAGE)): touched(ast.parse(path.read_text()), own=path.parent == FILE.parent)
        for path in PACKAGE.rglob("*.py")
        if path != FILE
    }
    assert len(found) > 1
    assert {name: parts for name, parts in found.items() if parts} == {}


def test_it_hides_no_attribute_of_the_application_s_span():
    """Its public names are those of OpenTelemetry's API, and `context`: all others are passed on."""
    public = {name for name in vars(LazySpan) if not name.startswith("_")}
    assert public <= set(dir(Span)) | {"context"}
