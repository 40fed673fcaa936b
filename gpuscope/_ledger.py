"""
The account of every stage: exported, dropped, lost by reason, or still with an exporter.

Counts and nothing else; called off the application's threads, except for failures, which are rare.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Ledger:
    """Counts fates. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exported = 0
        self._with_exporters = 0
        self._dropped: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._untimed: Counter[str] = Counter()

    def drop(self, reason: str, stages: int = 1) -> None:
        """Count stages that were never meant to be exported, or could not be queued."""
        with self._lock:
            self._dropped[reason] += stages

    def lose(self, reason: str, stages: int = 1) -> None:
        """Count stages that should have been exported and will not be."""
        with self._lock:
            self._lost[reason] += stages

    def untimed(self, reason: str, stages: int = 1) -> None:
        """Count stages that go out without GPU times though a GPU is in use. They have another fate besides."""
        with self._lock:
            self._untimed[reason] += stages

    def deliver(self, stages: int, exporters: int) -> Delivery:
        """Open the account of a batch handed to a number of exporters."""
        with self._lock:
            self._with_exporters += stages
        return Delivery(self, stages, exporters)

    def snapshot(self) -> tuple[int, int, dict[str, int], dict[str, int], dict[str, int]]:
        """Return (exported, with exporters, dropped, lost, untimed) at one moment."""
        with self._lock:
            return self._exported, self._with_exporters, dict(self._dropped), dict(self._lost), dict(self._untimed)

    def _close(self, stages: int, exported: int, reasons: Counter[str]) -> None:
        with self._lock:
            self._with_exporters -= stages
            self._exported += exported
            missing = stages - exported
            for reason, count in reasons.most_common():
                share = min(count, missing)
                if share:
                    self._lost[reason] += share
                missing -= share
            if missing:
                self._lost["unaccounted"] += missing


class Delivery:
    """
    One batch on its way through its exporters, each of which calls `settle` exactly once, from any thread.

    A stage counts as exported when at least one exporter delivered it.
    """

    __slots__ = ("_best", "_ledger", "_lock", "_outstanding", "_reasons", "stages")

    def __init__(self, ledger: Ledger, stages: int, exporters: int) -> None:
        self.stages = stages
        self._ledger = ledger
        self._lock = threading.Lock()
        self._outstanding = exporters
        self._best = 0
        self._reasons: Counter[str] = Counter()

    def settle(self, exported: int, lost: Mapping[str, int] | None = None) -> None:
        """Report how many stages of the batch one exporter delivered, and the others by reason."""
        with self._lock:
            self._outstanding -= 1
            self._best = max(self._best, exported)
            self._reasons.update(lost or {})
            if self._outstanding:
                return
        self._ledger._close(self.stages, min(self._best, self.stages), self._reasons)
