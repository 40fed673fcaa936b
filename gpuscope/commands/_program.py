"""
Runs a Python program within this process as the interpreter would: its main module, arguments, path and tracebacks.

Changes nothing about what the program raises: that goes on to the interpreter.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import functools
import pkgutil
import runpy
import sys
from importlib.machinery import BuiltinImporter, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, cast

from gpuscope._errors import CommandError
from gpuscope._recording.state import state
from gpuscope.instrument import _main_module

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.abc import InspectLoader
    from importlib.machinery import ModuleSpec
    from types import CodeType, TracebackType

_CALL = f"__import__({__name__!r}, fromlist=['look_in_main']).look_in_main()"


class _Found(NamedTuple):
    """A program: the names in its main module before it runs, and its source, or its code if it has no source."""

    names: Mapping[str, object]
    source: str | bytes | None
    file: str
    code: CodeType | None = None


def become(kind: str, name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """
    Make this process that of a program, and return the function that runs it.

    Args:
        kind: `script`, `module` (as by `python -m`) or `code` (as by `python -c`).
        name: the script's path, the module's name, or the code.
        arguments: the program's own.

    Raises:
        CommandError: if a script cannot be read.

    """
    find: Callable[[], _Found]
    if kind == "script":
        folder, find = _script(name)
    else:
        folder = str(Path.cwd()) if kind == "module" else ""
        find = functools.partial(_module if kind == "module" else _text, name)
    sys.argv[:] = [{"script": name, "module": "-m", "code": "-c"}[kind], *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins)
    if sys.version_info < (3, 14):
        main.__dict__.update(__annotations__={})
    # It stays, because what the program pickles, or leaves to be run at exit, looks itself up there.
    sys.modules["__main__"] = main
    interrupted: list[BaseException] = []
    # The first handler, which therefore runs last.
    atexit.register(_remember, interrupted)
    return lambda: _run(main, find, interrupted)


def _script(name: str) -> tuple[str, Callable[[], _Found]]:
    """Return the first folder of `sys.path`, and what finds the script."""
    path = Path(name).absolute()
    importer = pkgutil.get_importer(str(path))
    if importer is not None:  # A folder or an archive with a `__main__.py` in it.
        spec = importer.find_spec("__main__", None)
        if spec is None:
            raise CommandError(f"cannot find `__main__.py` in {name!r}.")
        return str(path), lambda: _of_spec(spec)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {name!r}: {error.strerror}.") from error
    names = {"__file__": str(path), "__cached__": None, "__loader__": SourceFileLoader("__main__", str(path))}
    return str(path.resolve().parent), lambda: _Found(names, source, str(path))


def _text(source: str) -> _Found:
    return _Found({"__loader__": BuiltinImporter}, source, "<string>")


def _module(name: str) -> _Found:
    try:
        _, spec, _ = runpy._get_module_details(name)  # type: ignore[attr-defined]  # As pdb does.
    except ImportError as error:
        raise SystemExit(f"{sys.executable}: {error}") from error
    sys.argv[0] = spec.origin
    return _of_spec(spec)


def _of_spec(spec: ModuleSpec) -> _Found:
    loader = cast("InspectLoader", spec.loader)
    names = {"__file__": spec.origin, "__cached__": spec.cached, "__loader__": loader, "__package__": spec.parent}
    return _Found(
        {**names, "__spec__": spec}, loader.get_source(spec.name), str(spec.origin), loader.get_code(spec.name)
    )


def _run(main: ModuleType, find: Callable[[], _Found], interrupted: list[BaseException]) -> None:
    code = None
    try:
        found = find()
        main.__dict__.update(found.names)
        code = _compiled(found)
        exec(code, main.__dict__)  # noqa: S102 - as asked
    except BaseException as error:  # The program's own, which goes on.
        if isinstance(error, KeyboardInterrupt):  # Everything is raised again; only how it is shown is ours.
            interrupted.append(error)
        sys.excepthook = functools.partial(_show, sys.excepthook, code)
        raise


def _compiled(found: _Found) -> CodeType:
    """Compile the program, and add calls to it if functions of its own are to be stages."""
    current = state.instrumentation
    if current is None or found.source is None or not current.names_in_main():
        # `dont_inherit`: without the future statements of this module.
        return found.code or compile(found.source or "", found.file, "exec", dont_inherit=True)
    return compiled(found.source, found.file)


def compiled(source: str | bytes, file: str, first: str = "") -> CodeType:
    """Compile a program with calls after what is to be a stage, and `first` before all that can stand behind it."""
    current = state.instrumentation
    names = set() if current is None else current.names_in_main()
    tree = ast.parse(source, file)
    bound = _main_module.with_calls(tree, names, _CALL)
    if current is not None and "*" not in bound:
        current.say_what_main_lacks(bound)
    if first:
        _main_module.put_first(tree, first)
    return compile(tree, file, "exec", dont_inherit=True)


def _remember(interrupted: list[BaseException]) -> None:
    """
    Have the interpreter end itself by SIGINT, as it does after a KeyboardInterrupt.

    It forgets the KeyboardInterrupt when any text is compiled and run at exit, as every import of `dataclasses` does,
    and remembers it when such code is interrupted.
    """
    if interrupted:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102


def look_in_main() -> None:
    """Make stages of what the program has just defined. The calls that `_compiled` adds to a program call this."""
    if state.instrumentation is not None:
        state.instrumentation.look_in_main()


def _show(
    hook: Callable[..., object],
    code: CodeType | None,
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    """Show an exception with the hook that was there, without the frames above the program's."""
    inner = traceback
    while inner is not None and inner.tb_frame.f_code is not code:
        inner = inner.tb_next
    if inner is None and not isinstance(error, SyntaxError):  # Raised on the way to the program.
        inner = traceback
    hook(kind, error.with_traceback(inner), inner)
