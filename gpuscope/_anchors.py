"""
Takes anchors: paired readings of the host's clock and a GPU's.

For the collector's thread alone, which has relaxed its capture mode. Asks and never synchronises.
"""

from __future__ import annotations

import time
from collections import deque

from gpuscope._clock import Anchor
from gpuscope._cuda import NOT_READY, Driver, Handle

_TRIES = 5
_BUSY_NS = 100_000
_LIMIT_NS = 50_000_000


class Anchors:
    """A private stream and a ring of events on each device that was asked for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._parts: dict[int, tuple[Handle, deque[Handle]]] = {}

    def take(self, device: int, context: Handle) -> Anchor | None:
        """
        Bracket an event on an idle private stream between two readings of the host's clock; the tightest of several.

        On an NVIDIA H200 the bracket was 7.6 µs, with the GPU idle or saturated. Where the GPU answers late (another
        process has its time slice) the bracket is wide and its half, exported as uncertainty, says so.
        """
        driver = self._driver
        with driver.current(context):
            if device not in self._parts:
                # The clock still needs the anchor before, so that one's event must not come round again in one call.
                ring = deque(driver.new_event() for _ in range(2 * _TRIES + 1))
                self._parts[device] = (driver.new_stream(), ring)
            stream, ring = self._parts[device]
            best: Anchor | None = None
            for _ in range(_TRIES):
                ring.rotate(1)
                anchor = self._bracket(ring[0], stream)
                if anchor is not None and (best is None or anchor.half_ns < best.half_ns):
                    best = anchor
                if anchor is None or anchor.half_ns > _BUSY_NS:
                    break
        return best

    def _bracket(self, event: Handle, stream: Handle) -> Anchor | None:
        driver, now = self._driver, time.perf_counter_ns
        before = now()
        if driver.event_record(event, stream):
            return None
        while driver.event_query(event) == NOT_READY:
            waited = now() - before
            if waited > _LIMIT_NS:
                return None
            if waited > _BUSY_NS:
                time.sleep(0)  # Lets other threads have the GIL.
        after = now()
        return Anchor(event, (before + after) // 2, (after - before + 1) // 2)
