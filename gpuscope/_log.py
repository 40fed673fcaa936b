"""
What gpuscope logs: few lines, through the logger `gpuscope`, and each kind of failure once.

The hot path never calls it.
"""

from __future__ import annotations

import logging

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

    def warn(self, kind: str, message: str, *arguments: object) -> None:
        """Log a warning the first time that this kind is seen."""
        # Counted before it is logged: the application's handlers may raise.
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] == 1:
            logger.warning(f"{message}{self._tail}", *arguments)  # noqa: G004
