"""
What gpuscope logs: few lines, through the logger `gpuscope`, and each kind of failure once.

A handler of the log is the program's: it may wait for a disk or a network, take any lock, or raise. So what runs on the
application's threads, in or around a stage, has the collector log it (`later`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("gpuscope")

SUPPRESSED = "Further warnings of this kind are suppressed."
COUNTED = f"{SUPPRESSED} `gpuscope.statistics()` counts what was lost."

_MOST_WAITING = 64
_waiting: deque[tuple[str, tuple[object, ...]]] = deque(maxlen=_MOST_WAITING)


def later(message: str, *arguments: object) -> None:
    """Have the collector log a warning in its next pass, or at its end."""
    _waiting.append((message, arguments))


def say_what_waits() -> None:
    """Log the warnings that wait; what handlers raise costs a warning."""
    for _ in range(len(_waiting)):
        with contextlib.suppress(Exception):
            message, arguments = _waiting.popleft()
            _warn(message, *arguments)


def forget_what_waits() -> None:
    """Leave it to whom it belongs: the parent of this process, or the test before this one."""
    _waiting.clear()


class WarnOnce:
    """
    Warns once per kind, and counts how often each kind was seen.

    Args:
        tail: the last sentence of each warning, such as `SUPPRESSED` or `COUNTED`.
        say: `later` on the application's threads; by default the warning is logged at once.

    """

    def __init__(self, tail: str = "", say: Callable[..., None] | None = None) -> None:
        self.counts: dict[str, int] = {}
        self._tail = tail and f" {tail}"
        self._say = say or _warn

    def warn(self, kind: str, message: str, *arguments: object) -> None:
        """Log a warning the first time that this kind is seen."""
        # Counted before it is logged: the application's handlers may raise.
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] == 1:
            self._say(f"{message}{self._tail}", *arguments)


def _warn(message: str, *arguments: object) -> None:
    _log(logging.WARNING, message, *arguments)


def inform(message: str, *arguments: object) -> None:
    """Log how things are; for our own threads, which outlive what the application's handlers raise."""
    _log(logging.INFO, message, *arguments)


def _log(level: int, message: str, *arguments: object) -> None:
    try:
        logger.log(level, message, *arguments)
    except BaseException:  # Of a handler of the application's: it costs the line alone, even if it is a `SystemExit`.
        if threading.current_thread() is threading.main_thread():  # There, it may be an interrupt.
            raise
