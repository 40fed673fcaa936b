"""
The program's main module: which names mean it, where its definitions are, and its code with calls after them.

Puts no stage anywhere: it yields modules, and changes only the syntax tree that it is given.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from gpuscope._settings.environment import is_of_multiprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import ModuleType

P = ParamSpec("P")
R = TypeVar("R")

MAIN = "__main__"
_IN_CHILD = "__mp_main__"
"""The name under which `multiprocessing` runs the main module again in a spawned child."""


def _main() -> ModuleType | None:
    main = sys.modules.get(MAIN)
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None) or ""
    # While `gpuscope run` itself is the main module, there is no program yet.
    is_ours = spec.name == "gpuscope.__main__" if spec else PurePath(file).stem == "gpuscope"
    return None if is_ours else main


def means_main(module: str) -> bool:
    """Tell whether a name means the main module, also the name for importing it: `app.serve` for `app/serve.py`."""
    if module == MAIN:
        return True
    main = _main()
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return bool(spec.name.removesuffix(".__main__") == module)
    file = PurePath(getattr(main, "__file__", None) or "")
    wanted = tuple(module.split("."))
    return (*file.parts[:-1], file.stem)[-len(wanted) :] == wanted


def has_begun() -> bool:
    """Tell whether the main program runs, or has run."""
    return hasattr(_main(), "__file__")


def namespaces() -> Iterator[ModuleType | Namespace]:
    """Yield the main module and, in a spawned child, the original of which it is a copy."""
    main = _main()
    if main is None:
        return
    yield main
    if sys.modules.get(_IN_CHILD) is main:
        originals = {id(names): names for value in vars(main).values() if (names := _globals_in_child(value))}
        yield from map(Namespace, originals.values())


def _globals_in_child(value: object) -> dict[str, object] | None:
    names = getattr(value, "__globals__", None)
    return names if isinstance(names, dict) and names.get("__name__") == _IN_CHILD else None


class Namespace:
    """A dictionary as an object: its items are the attributes, and setting an attribute sets an item."""

    def __init__(self, names: dict[str, object]) -> None:
        self.__dict__ = names


def with_calls(tree: ast.Module, names: Collection[str], call: str) -> set[str]:
    """
    Put a call after each statement of a module, outside functions and classes, that binds one of these names.

    Line numbers stay what they are. Returns the names that the module binds, and `*` for `from x import *`.
    """
    bound: set[str] = set()
    for node in [tree, *_blocks(tree)]:
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [new for old in statements for new in _followed(old, names, call, bound)])
    return bound


def put_first(tree: ast.Module, call: str) -> None:
    """Put a call before a module's statements, but for its docstring and what Python wants first."""
    at = next((at for at, node in enumerate(tree.body) if not _is_of_the_head(node)), len(tree.body))
    [statement] = ast.parse(call).body
    for node in ast.walk(statement):
        ast.copy_location(node, tree.body[at] if at < len(tree.body) else ast.Pass(lineno=1, col_offset=0))
    tree.body.insert(at, statement)


def _is_of_the_head(node: ast.stmt) -> bool:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _blocks(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case) and not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ):
            yield node
            yield from _blocks(node)


def _followed(statement: ast.stmt, names: Collection[str], call: str, bound: set[str]) -> Iterator[ast.stmt]:
    yield statement
    binds = _binds(statement)
    bound |= binds
    if binds & {*names, "*"}:
        [following] = ast.parse(call).body
        for node in ast.walk(following):
            ast.copy_location(node, statement)
        yield following


def _binds(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        return set() if is_future else {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}


def is_child() -> bool:
    """Tell whether this is a child of multiprocessing, which would repeat its parent's warnings."""
    process = sys.modules.get("multiprocessing.process")
    return is_of_multiprocessing() or (process is not None and process.parent_process() is not None)


def then(function: Callable[P, R], action: Callable[[], None]) -> Callable[P, R]:
    """Return the function with something that is done after it."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        result = function(*args, **kwargs)
        action()
        return result

    return wrapper
