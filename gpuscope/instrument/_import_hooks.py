"""
When an import is over: a function is called once a package is imported, and nothing of it is half done.

`wrapt` tells of a module as soon as its own code has run. That may be in the middle of its package's import, where what
imports more of the package would find it half done: `from transformers import LlamaForCausalLM` imports the module of
all models on the way. Never raises into an import.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def when_over(module: str, action: Callable[[ModuleType], None]) -> None:
    """Call the function with a module once that is imported, and no module of its package is being imported."""
    wrapt.when_imported(module)(lambda found: _when_none_is_left(module.partition(".")[0], lambda: action(found)))


def when_complete(module: ModuleType, action: Callable[[], None]) -> None:
    """Call the function once the code of a module, which is being imported, has run."""
    spec = module.__spec__
    if spec is None or not _is_running(spec) or not _call_at_end(spec, action):
        action()


def _when_none_is_left(package: str, action: Callable[[], None]) -> None:
    running = next(filter(_is_running, _specs(package)), None)
    if running is None or not _call_at_end(running, lambda: _when_none_is_left(package, action)):
        action()


def _specs(package: str) -> list[Any]:
    # A copy, made in one step, because another thread may import something.
    modules = [found for name, found in list(sys.modules.items()) if name.partition(".")[0] == package]
    specs = []
    for found in modules:
        with contextlib.suppress(Exception):  # Programs put objects of any class there.
            specs.append(vars(found).get("__spec__"))
    return specs


def _is_running(spec: object) -> bool:
    return getattr(spec, "_initializing", False) is True


def _call_at_end(spec: ModuleSpec, action: Callable[[], None]) -> bool:
    """
    Call the function when the import system notes that the module's code has run; False where that cannot be had.

    The import system sets `_initializing` of the module's spec, which is private to it, and calls nobody. So the spec
    is of a class of ours meanwhile. Other ways do less. A loader of ours would have to be there before the import
    begins, for every module. A thread that waits for the module would come after the program's next line.
    """
    kind = type(spec)

    def __setattr__(self: ModuleSpec, name: str, value: object) -> None:  # noqa: N807
        if name != "_initializing":
            kind.__setattr__(self, name, value)
            return
        self.__class__ = kind
        self._initializing = value  # type: ignore[attr-defined]  # Of the import system.
        with contextlib.suppress(Exception):  # What is called says itself what fails.
            action()

    try:
        spec.__class__ = type(kind.__name__, (kind,), {"__setattr__": __setattr__, "__module__": kind.__module__})
    except TypeError:  # Another layout: somebody's own spec.
        return False
    return True
