"""
What gpuscope logs: few lines, through the logger `gpuscope`, and each kind of failure once.

The hot path never calls it.
"""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("gpuscope")

SUPPRESSED = "Further warnings of this kind are suppressed."
COUNTED = f"{SUPPRESSED} `gpuscope.statistics()` counts what was lost."


class WarnOnce:
    """
    Warns once per kind, and counts how often each kind was seen.

    Args:
        tail: the last sentence of each warning, such as `SUPPRESSED` or `COUNTED`.

    """

    def __init__(self, tail: str = "") -> None:
        self.counts: dict[str, int] = {}
        self._tail = tail and f" {tail}"

    def warn(self, kind: str, message: str, *arguments: object, exc_info: bool = False) -> None:
        """Log a warning the first time that this kind is seen."""
        # Counted before it is logged: the application's handlers may raise.
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] == 1:
            _log(logging.WARNING, f"{message}{self._tail}", *arguments, exc_info=exc_info)


def inform(message: str, *arguments: object) -> None:
    """Log how things are; for our own threads, which outlive what the application's handlers raise."""
    _log(logging.INFO, message, *arguments)


def _log(level: int, message: str, *arguments: object, exc_info: bool = False) -> None:
    try:
        logger.log(level, message, *arguments, exc_info=exc_info)
    except BaseException:  # Of a handler of the application's: it costs the line alone, even if it is a `SystemExit`.
        if threading.current_thread() is threading.main_thread():  # There, it may be an interrupt.
            raise
