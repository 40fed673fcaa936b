"""
What gpuscope says: few lines, through the logger `gpuscope`, each kind of failure once.

Never called by the hot path.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("gpuscope")


class Complaints:
    """Warns once a kind, and counts."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def about(self, kind: str, message: str, *arguments: object) -> None:
        """Log a warning, the first time that this kind is seen."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] == 1:
            logger.warning(f"{message} Said once; `gpuscope.statistics()` counts what was lost.", *arguments)  # noqa: G004
