"""Small changes of a module's code, each at one place: what `run.py` tries."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),  # codespell:ignore
    ast.NotIn: (ast.In,),  # codespell:ignore
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "popleft": "pop", "append": "appendleft"}
REMOVED = (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    """One change: where, what, and the whole module with it."""

    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        """Return a line for the report."""
        return f"{self.line}: {self.before} -> {self.after}"


def mutants(source: str) -> list[Mutant]:
    """Return all changes of a module, each once, in order of their lines."""
    tree = ast.parse(source)
    found = {}
    for node in list(_code(tree)):
        for change in list(_changes(node)):
            before, kind, kept = _short(node), type(node), dict(vars(node))
            change(node)
            mutant = Mutant(getattr(node, "lineno", 0), before, _short(node), ast.unparse(tree))
            node.__class__ = kind
            vars(node).clear()
            vars(node).update(kept)
            found.setdefault(mutant.source, mutant)
    found.pop(ast.unparse(tree), None)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _short(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return (lines[0] if lines else "(removed)")[:100]


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that do something when the program runs: no annotations, decorators, docstrings or types."""
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_idle(child):
                yield child
                yield from _code(child)


def _is_idle(node: ast.AST) -> bool:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign) and any("__" in ast.unparse(target) for target in node.targets):
        return True  # `__slots__` and the like.
    if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(("TypeVar(", "ParamSpec(")):
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _changes(node: ast.AST) -> Iterator[Callable[[ast.AST], None]]:
    yield from _of_expressions(node)
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield _setter("test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension) and node.ifs:
        yield _setter("ifs", [])
    if isinstance(node, ast.Return) and ast.unparse(node) not in {"return", "return None"}:
        yield _setter("value", None)
    if isinstance(node, (ast.Break, ast.Continue)):
        yield _becomes(ast.Continue() if isinstance(node, ast.Break) else ast.Break())
    if isinstance(node, REMOVED):
        yield _becomes(ast.Pass())


def _of_expressions(node: ast.AST) -> Iterator[Callable[[ast.AST], None]]:
    if isinstance(node, ast.Compare):
        for other in COMPARISONS[type(node.ops[0])]:
            yield _setter("ops", [other(), *node.ops[1:]])
    if isinstance(node, ast.BoolOp):
        yield _setter("op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield _setter("op", OPERATORS[type(node.op)]())
    if isinstance(node, ast.UnaryOp):
        yield _becomes(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield _setter("value", not node.value if isinstance(node.value, bool) else _next(node.value))
    for name in ("id", "attr"):
        if getattr(node, name, None) in NAMES:
            yield _setter(name, NAMES[getattr(node, name)])
    if isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func) not in {"min", "max"}:
        yield _setter("args", [node.args[1], node.args[0], *node.args[2:]])


def _next(number: float) -> float:
    return number * 2 if isinstance(number, float) and number else number + 1


def _setter(name: str, value: object) -> Callable[[ast.AST], None]:
    return lambda node: setattr(node, name, value)


def _becomes(other: ast.AST) -> Callable[[ast.AST], None]:
    def change(node: ast.AST) -> None:
        node.__class__ = type(other)
        vars(node).update(copy.copy(vars(other)))

    return change
