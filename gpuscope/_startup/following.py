"""
Waits for the modules that the variables name, and imports gpuscope as the first of them is about to be imported.

Reads the variables roughly: a module too many costs an import of gpuscope, and gpuscope reads them properly. Looks like
no part of the program: what finds modules here only passes on what others find.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_MODULE = re.compile(r"([\w.]+)\s*:\s*[A-Za-z_]")
"""In `infer=app.models:Model.forward`."""
_LIKE_A_FRAMEWORK = re.compile(r"[\w-]+")
_NEEDED = frozenset(("gpuscope", "numpy", "nvtx", "opentelemetry", "wrapt", "tomli", "typing_extensions"))
"""What importing gpuscope imports as well: that would go wrong while one of these is being imported."""


def follow(stages: str, frameworks: str, file: str) -> None:
    """Have gpuscope imported in time for the modules that are named."""
    modules = set(_MODULE.findall(stages))
    of_frameworks: set[str] = set()
    if file.strip():
        with contextlib.suppress(OSError), open(file.strip(), encoding="utf-8", errors="replace") as text:  # noqa: PTH123
            content = text.read()
            modules.update(_MODULE.findall(content))
            frameworks += " " + content.partition("frameworks")[2]
    if frameworks.strip():
        of_frameworks.update(_modules_of(_LIKE_A_FRAMEWORK.findall(frameworks)))
        modules.update(of_frameworks)
    waiting = Waiting({module.partition(".")[0] for module in modules})
    waiting.of_frameworks = {module.partition(".")[0] for module in of_frameworks}
    waiting.names_all = "all" in _LIKE_A_FRAMEWORK.findall(frameworks)
    if waiting.is_late():
        # Still not here: lines of `site-packages` that come after ours may say where its modules are.
        waiting.packages.add("sitecustomize")
    sys.meta_path.insert(0, waiting)
    atexit.register(waiting.say_what_never_came, os.getpid())
    from _gpuscope_startup.program import watch_for_main

    watch_for_main(modules)


def say_that_nobody_came(pid: int) -> None:
    """Warn, at exit, that a program of the user's that uses PyTorch records nothing, because nobody asked it to."""
    with contextlib.suppress(Exception):  # Standard error may be closed.
        came = "gpuscope" in sys.modules or "torch" not in sys.modules or hasattr(sys, "last_type")
        if not came and not _has_launched() and os.getpid() == pid and _is_a_program():
            sys.stderr.write(
                "gpuscope: GPUSCOPE is set, and nothing is recorded: the program does not import gpuscope, and no "
                "functions are named. GPUSCOPE_STAGES=name=module:function names some.\n"
            )


def _has_launched() -> bool:
    return any(name.startswith("multiprocessing.popen_") for name in list(sys.modules))


def begin() -> None:
    """Import gpuscope, which does what the variables say."""
    with contextlib.suppress(Exception):  # It is broken, or cannot run in this interpreter: the program goes on.
        import gpuscope  # noqa: F401


class Waiting:
    """
    Stands before all that finds modules until one of these comes.

    Args:
        packages: the modules that are named, without what is inside them.

    """

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages
        self.of_frameworks: set[str] = set()
        """Which of them are frameworks."""
        self.names_all = False
        """Whether every framework is named, so that nobody expects each of them."""
        self.has_come = False

    def is_late(self) -> bool:
        """Tell whether it is best to begin at once."""
        if self.packages & (_NEEDED | sys.stdlib_module_names) or any(name in sys.modules for name in self._named()):
            return True
        # A child of `multiprocessing` runs the program under another name, which nobody imports.
        return any(
            text in each for each in sys.orig_argv for text in ("--multiprocessing-fork", "multiprocessing.fork")
        )

    def _named(self) -> set[str]:
        return self.packages - {"__main__", "sitecustomize"}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find nothing; but begin before the first of the modules, which others then find."""
        if name in self.packages:
            self.leave()
            begin()
            # Those that came meanwhile would be passed over.
            return next(filter(None, (_found_by(finder, name, path, target) for finder in list(sys.meta_path))), None)
        if name == "gpuscope":
            self.leave()
        return None

    def leave(self) -> None:
        """Stand aside."""
        self.has_come = True
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def say_what_never_came(self, pid: int) -> None:
        """Warn, at exit, of modules that never came, if this looks like the program that they were named for."""
        with contextlib.suppress(Exception):  # Standard error may be closed.
            if self.has_come or _has_launched() or os.getpid() != pid:
                return
            from difflib import get_close_matches

            for name in sorted(self._named() - (self.of_frameworks if self.names_all else set())):
                variable = "GPUSCOPE_FRAMEWORKS" if name in self.of_frameworks else "GPUSCOPE_STAGES"
                close = get_close_matches(name, {each.partition(".")[0] for each in sys.modules}, 1, 0.85)
                if close or "torch" in sys.modules or (_is_a_program() and sys.stderr.isatty()):
                    hint = f"; did you mean `{close[0]}`?" if close else ", so nothing in it is a stage."
                    sys.stderr.write(f"gpuscope: `{name}` of {variable} was never imported{hint}\n")


def _found_by(finder: object, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    find: Callable[..., ModuleSpec | None] | None = getattr(finder, "find_spec", None)
    return None if find is None else find(name, path, target)


def _is_a_program() -> bool:
    """Tell whether this runs a script of the user's."""
    from _gpuscope_startup.program import script

    return bool(script())


def _modules_of(frameworks: Iterable[str]) -> Iterable[str]:
    """Return the modules of frameworks, by the files that gpuscope has for them."""
    spec = importlib.util.find_spec("gpuscope")  # Imports nothing, because it is not part of a package.
    found = {}
    for place in (spec and spec.submodule_search_locations) or ():
        # Beside the package where it is installed from a checkout.
        for folder in (os.path.join(place, "integrations"), os.path.join(os.path.dirname(place), "integrations")):  # noqa: PTH118, PTH120
            with contextlib.suppress(OSError):
                for file in os.scandir(folder):
                    if file.name.endswith(".py"):
                        with open(file.path, encoding="utf-8") as text:  # noqa: PTH123
                            content = text.read()
                        module = re.search(r'^MODULE = "([\w.]+)"', content, re.MULTILINE)
                        also = re.search(r'^ALSO = "([\w, ]+)"', content, re.MULTILINE)
                        names = [file.name[:-3], *(also[1].split(", ") if also else ())]
                        found.update(dict.fromkeys(names, module[1]) if module else {})
    names = list(frameworks)
    return found.values() if "all" in names else [found[name] for name in names if name in found]
