"""
The main program, whose functions become stages as its code defines them: nobody imports a main module.

A script is run by the way that Python has for archives with a program in them: something on `sys.path_hooks` that takes
its path. A module of `python -m` is found by all that finds modules, and its code is compiled here. Both happen only
where the main program is named, and tools that are installed are left alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import CodeType, ModuleType

_MAIN = "__main__"
_FIRST = f"__import__({__name__!r}, fromlist=['be_a_script']).be_a_script()"


def watch_for_main(modules: Collection[str]) -> None:
    """Have the main program compiled with its stages, if one of the modules is that."""
    arguments = sys.argv or [""]
    if arguments[0] == "-m":
        name = sys.orig_argv[-len(arguments)]
        name = name.partition("m")[2] if name.startswith("-") else name  # As in `-mserve`.
        if _MAIN in modules or name in modules:
            sys.meta_path.insert(0, _MainFinder(name))
    elif (path := script()) and any(_means(module, path) for module in modules):
        sys.path_hooks.append(_Hook(path))


def script() -> str:
    """Return the path of the script that is about to run; empty where there is none, or it is an installed tool."""
    path = os.path.abspath(sys.argv[0]) if sys.argv and sys.argv[0] else ""  # noqa: PTH100 - `pathlib` costs 2 ms
    return path if os.path.isfile(path) and not _is_a_tool(path) else ""  # noqa: PTH113


def _means(module: str, path: str) -> bool:
    wanted = module.replace(".", os.sep)
    return module == _MAIN or os.path.splitext(path)[0].endswith(os.sep + wanted)  # noqa: PTH122


def _is_a_tool(path: str) -> bool:
    folder = os.path.dirname(path)  # noqa: PTH120
    bins = {os.path.join(prefix, name) for prefix in (sys.prefix, sys.base_prefix) for name in ("bin", "Scripts")}  # noqa: PTH118
    library = os.path.dirname(os.__file__)  # noqa: PTH120
    return folder in bins or path.startswith(library + os.sep) or "site-packages" in path or "dist-packages" in path


class _Hook:
    """Says of one path, the script's, that there is a program in it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, path: str) -> _ScriptFinder:
        if os.path.abspath(path) != self._path:  # noqa: PTH100
            raise ImportError
        return _ScriptFinder(path)


class _ScriptFinder:
    """Finds the script as the module `__main__`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find_spec(self, name: str, _target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the script, and nothing else."""
        if name != _MAIN:
            return None
        # As Python gives it, which is also how `__file__` begins: absolute, and otherwise as it was written.
        spec = ModuleSpec(_MAIN, _ScriptLoader(_MAIN, self._path), origin=self._path)
        spec.has_location = True
        return spec


class _ScriptLoader(SourceFileLoader):
    """Compiles the script, and has `sys.path` begin as for any script."""

    def get_code(self, _name: str) -> CodeType:
        """Return the code of the script."""
        be_like_a_scripts_path(str(self.path))
        with open(self.path, "rb") as file:  # noqa: PTH123
            source = file.read()
        main = type(sys)(_MAIN)
        # Python takes it away while it looks for the program, and puts the true one back.
        before = sys.modules.get(_MAIN)
        sys.modules[_MAIN] = main
        try:
            return _compiled(main, source, str(self.path), _FIRST)
        finally:
            if before is None:
                del sys.modules[_MAIN]
            else:
                sys.modules[_MAIN] = before


def be_like_a_scripts_path(path: str) -> None:
    """Put the script's folder where Python has put the script itself, because it took it for an archive."""
    sys.path_hooks[:] = [hook for hook in sys.path_hooks if not isinstance(hook, _Hook)]
    sys.path_importer_cache.pop(sys.path[0] if sys.path else "", None)
    if sys.path and sys.path[0] == path:
        is_safe = getattr(sys.flags, "safe_path", False) or sys.flags.isolated
        sys.path[:1] = [] if is_safe else [os.path.dirname(os.path.realpath(path))]  # noqa: PTH120


def be_a_script() -> None:
    """Have the main module look like that of a script; the first statement of its code calls this."""
    main: Any = sys.modules[_MAIN]
    main.__spec__ = main.__package__ = main.__cached__ = None


class _MainFinder:
    """Finds the module of `python -m`, whose code is compiled with its stages; once."""

    def __init__(self, name: str) -> None:
        self._names = (name, f"{name}.{_MAIN}")

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find what others find."""
        if name not in self._names:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.submodule_search_locations is None:
                    sys.meta_path.remove(self)
                    _compile_with_stages(spec)
                return spec
        return None


def _compile_with_stages(spec: ModuleSpec) -> None:
    """Have the spec's loader compile the code with calls after what it defines, if it can and is not a tool's."""
    loader: Any = spec.loader
    if not isinstance(loader, SourceFileLoader) or _is_a_tool(str(spec.origin)):
        return
    kind = type(loader)

    def get_code(self: SourceFileLoader, name: str) -> CodeType | None:
        self.__class__ = kind
        main: Any = sys.modules.get(_MAIN)
        if main is None or hasattr(main, "__file__"):  # It is imported, and not run.
            return self.get_code(name)
        main.__spec__ = spec
        try:
            return _compiled(main, self.get_data(str(spec.origin)), str(spec.origin))
        finally:
            vars(main).pop("__file__", None)

    with contextlib.suppress(TypeError):  # Another layout.
        loader.__class__ = type(kind.__name__, (kind,), {"get_code": get_code, "__module__": kind.__module__})


def _compiled(main: ModuleType, source: bytes, file: str, first: str = "") -> CodeType:
    try:
        import gpuscope  # noqa: F401 - does what the variables say
        from gpuscope.commands._program import compiled

        main.__file__ = file  # Not before: without it, gpuscope knows that the program has not begun.
        return compiled(source, file, first)
    except SyntaxError:  # The program's own, which is shown as ever.
        raise
    except Exception:  # Ours: the program runs without its stages.
        return compile(source, file, "exec", dont_inherit=True)
