"""
What gpuscope logs: few lines, through the logger `gpuscope`, and each kind of failure once.

A handler of the log is the program's: it may wait for a disk or a network, take any lock, or raise. So what runs on the
application's threads, in or around a stage, has the collector log it (`later`). Where the program has set up no log,
warnings go to standard error, and each line says who speaks.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("gpuscope")

SUPPRESSED = "Further warnings of this kind are suppressed."
COUNTED = f"{SUPPRESSED} `gpuscope.statistics()` counts what was lost."

SENDER = "gpuscope: "
_LAST_RESORT = "gpuscope, where nobody else logs"
_MOST_WAITING = 64
_waiting: deque[tuple[str, tuple[object, ...]]] = deque(maxlen=_MOST_WAITING)


def say(text: str, *, every_line: bool = True) -> None:
    """Write lines to standard error, with our name before each, or the first; where that fails, nothing happens."""
    with contextlib.suppress(Exception):
        stream = sys.stderr
        line = SENDER + (text.replace("\n", f"\n{SENDER}") if every_line else text) + "\n"
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(line.encode(encoding, "replace").decode(encoding))  # In one piece, between the program's own.
        stream.flush()


class LastResort(logging.Handler):
    """Does what Python's handler of last resort does, where the program has no handler, and says who speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.name = _LAST_RESORT

    def emit(self, record: logging.LogRecord) -> None:
        """Write a warning that nobody else gets."""
        if record.levelno >= logging.WARNING and logging.lastResort is not None and not has_handlers():
            say(record.getMessage())


def has_handlers() -> bool:
    """Tell whether the program has a handler for what we log."""
    at: logging.Logger | None = logger
    while at is not None:
        if any(handler.name != _LAST_RESORT for handler in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


def shows_information() -> bool:
    """Tell whether the program's log shows lines of the level `INFO`."""
    return has_handlers() and logger.isEnabledFor(logging.INFO)


def is_silenced() -> bool:
    """Tell whether somebody wants no information from us, by the level of our logger."""
    return logger.disabled or logger.level > logging.INFO


if all(handler.name != _LAST_RESORT for handler in logger.handlers):  # Else this package is imported again.
    logger.addHandler(LastResort())


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


def warn(message: str, *arguments: object) -> None:
    """Log a warning each time; for our own threads, as `inform`."""
    _warn(message, *arguments)


def inform(message: str, *arguments: object) -> None:
    """Log how things are; for our own threads, which outlive what the application's handlers raise."""
    _log(logging.INFO, message, *arguments)


def _log(level: int, message: str, *arguments: object) -> None:
    try:
        logger.log(level, message, *arguments)
    except BaseException:  # Of a handler of the application's: it costs the line alone, even if it is a `SystemExit`.
        if threading.current_thread() is threading.main_thread():  # There, it may be an interrupt.
            raise
