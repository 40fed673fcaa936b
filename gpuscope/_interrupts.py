"""
Whose exception it is that came up in our code: one of a part of ours, or one that the program wants to have.

Python runs signal handlers between any two of its bytecodes, ours included. What a handler raises, such as the
`TimeoutError` of a deadline, is meant for the program and has to reach it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from types import FrameType

T = TypeVar("T")

_PARTS = frozenset(
    ("builtins", "gpuscope", "numpy", "nvtx", "opentelemetry", "torch", "wrapt", *sys.stdlib_module_names)
)
"""Packages whose exceptions come up in our files: ours, and those of C that we call, as `torch.AcceleratorError`."""


def is_the_programs(error: BaseException) -> bool:
    """Tell whether the exception has to reach the program; it was caught in code of ours."""
    if is_an_interrupt(error):
        return True
    origin = ""
    traceback = error.__traceback__
    while traceback is not None:
        origin = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    # None of our files raises a class of the program's: another thread has had it raised here.
    return origin.partition(".")[0] == "gpuscope" and type(error).__module__.partition(".")[0] not in _PARTS


def instead_of(error: Exception, value: T) -> T:
    """Return the value, in place of what has failed; raise the exception where it is the program's."""
    if is_the_programs(error):
        raise error
    return value


def is_an_interrupt(error: BaseException) -> bool:
    """Tell whether a signal handler has raised it; for where we call the program's code, which may raise anything."""
    if not isinstance(error, Exception):
        return True
    traceback = error.__traceback__
    while traceback is not None and not _is_handler(traceback.tb_frame):
        traceback = traceback.tb_next
    return traceback is not None


def _is_handler(frame: FrameType) -> bool:
    """Tell whether the frame is that of a signal handler: those alone are given the frame that they interrupt."""
    interrupted = frame.f_back
    return interrupted is not None and any(
        value is interrupted or (type(value) is tuple and any(item is interrupted for item in value))
        for value in frame.f_locals.values()
    )
