"""
The account of what batches add: light spans, which are not stages, and the faults in what batches were told.

Counts. The ledger holds both, and `statistics()` shows them.
"""

from __future__ import annotations

import threading
from collections import Counter, deque

from gpuscope._data.statistics import Delivery
from gpuscope._log import SUPPRESSED, WarnOnce, later

_PENDING, _EXPORTED = "pending", "exported"


class SharedSpans:
    """What became of the light spans of batches' members. Thread-safe; the same calls as the ledger's for stages."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._closed = False

    def drop(self, reason: str, spans: int = 1) -> None:
        """Count light spans that are not meant to be exported."""
        self.lose(reason, spans)

    def lose(self, reason: str, spans: int = 1) -> None:
        """Count light spans that will not be exported."""
        with self._lock:
            self._counts[reason] += spans

    def deliver(self, spans: int, exporters: int) -> Delivery:
        """Count light spans as being with a number of exporters."""
        with self._lock:
            if self._closed:
                return Delivery(lambda *_: None, spans, exporters)
            self._counts[_PENDING] += spans
        return Delivery(self._settle, spans, exporters)

    def close(self, reason: str) -> None:
        """Count what is still on its way as lost, and ignore what is reported later."""
        with self._lock:
            self._closed = True
            self._counts[reason] += self._counts.pop(_PENDING, 0)

    def counts(self) -> dict[str, int]:
        """Return how many are `pending`, `exported`, or lost by reason."""
        with self._lock:
            return {reason: count for reason, count in self._counts.items() if count}

    def _settle(self, spans: int, exported: int, reasons: Counter[str]) -> None:
        with self._lock:
            if self._closed:
                return
            self._counts[_PENDING] -= spans
            self._counts[_EXPORTED] += exported
            missing = spans - exported
            for reason, count in reasons.most_common():
                share = min(count, missing)
                self._counts[reason] += share
                missing -= share
            self._counts["unaccounted"] += missing


class Faults:
    """
    What was wrong with batches, by reason; each reason is logged once.

    Noted by any thread, which waits for no lock.
    """

    def __init__(self) -> None:
        self._noted: deque[str] = deque()
        self._counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._warnings = WarnOnce(f"{SUPPRESSED} `gpuscope.statistics().batch_faults` counts them.", later)

    def note(self, reason: str, message: str, *arguments: object) -> None:
        """Count a fault, and have it logged if it is the first of its kind."""
        self._noted.append(reason)
        self._warnings.warn(reason, message, *arguments)

    def counts(self) -> dict[str, int]:
        """Return how many there were, by reason."""
        with self._lock:
            while self._noted:
                self._counts[self._noted.popleft()] += 1
            return dict(self._counts)
