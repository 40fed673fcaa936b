"""
`Delivery`: what became of one batch with its exporters.

Counts for one batch only. Adding the counts up is the ledger's part.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Delivery:
    """
    One batch on its way through its exporters. Each of them calls `settle` exactly once, from any thread.

    A stage counts as exported when at least one exporter delivered it.

    Args:
        settle: called once, after the last exporter has settled: with the number of stages, how many of them were
            exported, and what the exporters said of the others, by reason.
        stages: the number of stages in the batch.
        exporters: the number of exporters that the batch goes to.

    """

    __slots__ = ("_best", "_lock", "_outstanding", "_reasons", "_settle", "stages")

    def __init__(self, settle: Callable[[int, int, Counter[str]], None], stages: int, exporters: int) -> None:
        self.stages = stages
        self._settle = settle
        self._lock = threading.Lock()
        self._outstanding = exporters
        self._best = 0
        self._reasons: Counter[str] = Counter()

    def settle(self, exported: int, lost: Mapping[str, int] | None = None) -> None:
        """Report how many stages of the batch one exporter delivered, and how many it lost, by reason."""
        with self._lock:
            if not self._outstanding:
                return
            self._outstanding -= 1
            self._best = max(self._best, exported)
            self._reasons.update(lost or {})
            if self._outstanding:
                return
        self._settle(self.stages, min(self._best, self.stages), self._reasons)
