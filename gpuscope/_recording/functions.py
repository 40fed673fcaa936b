"""
The kinds of function (plain, coroutine, generator, async generator), and what a wrapper takes over from its function.

Decides nothing about what a wrapper does, and calls neither. `import gpuscope` does not import this, because `inspect`
is slow to import.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

    class PythonFunction(Protocol):
        """A function that is written in Python, and so has a code object."""

        __code__: CodeType
        __call__: Callable[..., object]


T = TypeVar("T")
W = TypeVar("W", bound="PythonFunction")


def by_kind(function: object, *, plain: T, coroutine: T, generator: T, async_generator: T) -> T:
    """Return the argument that is named like the function's kind."""
    if inspect.iscoroutinefunction(function):
        return coroutine
    if inspect.isasyncgenfunction(function):
        return async_generator
    return generator if inspect.isgeneratorfunction(function) else plain


def looking_like(function: Callable[..., object], wrapper: W) -> W:
    """Return the wrapper, with the function's name, signature and docstring, and a code object of its own."""
    functools.update_wrapper(wrapper, function)
    name = getattr(function, "__name__", "stage")
    if sys.version_info >= (3, 11):
        qualname = getattr(function, "__qualname__", name)
        wrapper.__code__ = wrapper.__code__.replace(co_name=name, co_qualname=qualname)
    else:
        wrapper.__code__ = wrapper.__code__.replace(co_name=name)
    return wrapper
