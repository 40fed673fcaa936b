"""
The kinds of function (plain, coroutine, generator, async generator), and what a wrapper takes over from its function.

Decides nothing about what a wrapper does, and calls neither. `import gpuscope` does not import this: `inspect` is slow.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, TypeVar

T = TypeVar("T")


def by_kind(function: Any, *, plain: T, coroutine: T, generator: T, async_generator: T) -> T:
    """Return what is given for the function's kind."""
    if inspect.iscoroutinefunction(function):
        return coroutine
    if inspect.isasyncgenfunction(function):
        return async_generator
    return generator if inspect.isgeneratorfunction(function) else plain


def looking_like(function: Any, wrapper: Any) -> Any:
    """Return the wrapper, with the function's name, signature and docstring, and a code object of its own."""
    functools.update_wrapper(wrapper, function)
    name = getattr(function, "__name__", "stage")
    names = {"co_name": name}
    if sys.version_info >= (3, 11):
        names["co_qualname"] = getattr(function, "__qualname__", name)
    wrapper.__code__ = wrapper.__code__.replace(**names)
    return wrapper
