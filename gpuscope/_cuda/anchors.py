"""
Takes anchors: paired readings of the host's clock and a GPU's.

For the collector's thread alone, which has relaxed its capture mode. It polls, for 50 ms at first and 200 ms at most,
and never synchronises. The parts in C poll without the GIL, because the driver may hold its lock for as long as a copy
from pageable memory takes, and no thread of the program may wait for ours meanwhile.

On a GPU with one connection an event waits for all work before it, however long that is. After a tenth of a millisecond
the thread therefore sleeps between two questions, and the bracket is the time between the last two.

With the first anchors of a device it is measured what a pair of events takes of the GPU's time.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from gpuscope._cuda.driver import NOT_READY, Driver, Handle
from gpuscope._cuda.spares import AnchorParts, spares
from gpuscope._data.interfaces import Anchor

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._cuda.driver import EventReader

_TRIES, _RECORDS = 5, 3
_BUSY_NS = 100_000
"""Where an anchor took longer, the GPU or the driver is busy, and another try would not be better."""
_LIMIT_NS, _LONGEST_NS = 50_000_000, 200_000_000
"""An event that takes longer is given up; after that the next one may take twice as long, up to a limit."""
_NAP_S = 20e-6
_IN_A_ROW, _COST_MEASURES = 33, 8
"""How many events are recorded one after the other, and how often."""
_MOST_COST_NS, _BEHIND = 10_000, 0.8
"""
What is further apart was held up by something. The GPU is behind the host, and so busy, if the host takes less than
that part of the distance per event: 1.4 of 2.9 µs on an H200.
"""
_LATENCY_NS = 5_000
"""An event that is done is seen so much later at most, where nothing holds up the question."""


class Anchors:
    """
    A private stream and a ring of events on each device that was asked for.

    Args:
        driver: records the events and asks about them.
        reader: does both in C, where that was built.
        clock: nanoseconds, monotonic; the reader has its own.

    """

    def __init__(
        self,
        driver: Driver,
        reader: EventReader | None = None,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._driver = driver
        self._reader = reader
        self._clock = clock
        self._parts: dict[int, tuple[Handle, AnchorParts]] = {}
        self._limits_ns: dict[int, int] = {}
        self._costs_left: dict[int, int] = {}

    def take(self, device: int, context: Handle, keep: Anchor | None = None) -> Anchor | None:
        """
        Bracket an event on an idle private stream between two readings of the host's clock; the tightest of five.

        On an NVIDIA H200 the bracket was 7.6 µs wide, with the GPU idle or saturated. It is wide where the GPU answers
        late (another process has its time slice) or the driver does (it copies from pageable memory).

        Args:
            device: the device's index.
            context: the device's context.
            keep: an anchor that is still needed, whose event is not recorded again.

        Returns:
            The anchor, whose `half_ns` says how far it may be off; None if no event completed in time.

        """
        driver = self._driver
        with driver.current(context):
            if device not in self._parts:
                self._parts[device] = context, spares.take_anchor_parts(context) or self._new_parts()
            stream, ring, _ = self._parts[device][1]
            best: Anchor | None = None
            limit_ns = self._limits_ns.get(device, _LIMIT_NS)
            for _ in range(_TRIES):
                before_ns = self._clock()
                ring.rotate(1)
                if keep is not None and ring[0] is keep.event:
                    ring.rotate(1)
                anchor = self._bracket(ring[0], stream, limit_ns)
                if anchor is not None and (best is None or anchor.half_ns < best.half_ns):
                    best = anchor
                if anchor is None or self._clock() - before_ns > 2 * _BUSY_NS:
                    break
            if best is not None and self._reader is not None:
                best = replace(best, event_cost_ns=self._event_cost_ns(device, self._reader, limit_ns))
        self._limits_ns[device] = _LIMIT_NS if best is not None else min(2 * limit_ns, _LONGEST_NS)
        return best

    def _event_cost_ns(self, device: int, reader: EventReader, limit_ns: int) -> int:
        """
        Return how far apart two events are on the GPU with nothing between, while it is behind the host; 0 if unknown.

        That is the median of a row. It is what a pair takes of a stream's time, but for what a kernel needs to start:
        0.8 µs on an H200, which it would need without events as well (`benchmarks/check_clock.py`).
        """
        left, (stream, _, in_a_row) = self._costs_left.get(device, _COST_MEASURES), self._parts[device][1]
        if left == 0 or not in_a_row:
            return 0
        self._costs_left[device] = left - 1
        addresses = struct.pack(f"={len(in_a_row)}Q", *(event.value or 0 for event in in_a_row))
        found = reader.spacing(addresses, stream.value, limit_ns)
        if found is None:
            return 0
        host_ns, apart_ms = found
        cost_ns = int(apart_ms[len(apart_ms) // 2] * 1e6)
        return cost_ns if host_ns < _BEHIND * cost_ns and cost_ns <= _MOST_COST_NS else 0

    def _new_parts(self) -> AnchorParts:
        ring = deque(self._driver.new_event() for _ in range(_TRIES + 1))
        # Without the parts in C nobody records in a row.
        in_a_row = [self._driver.new_event() for _ in range(0 if self._reader is None else _IN_A_ROW)]
        return AnchorParts(self._driver.new_stream(), ring, in_a_row)

    def release(self) -> None:
        """Leave streams and events to a later period. The thread that calls `take` has ended."""
        while self._parts:
            spares.give_anchor_parts(*self._parts.popitem()[1])

    def _bracket(self, event: Handle, stream: Handle, limit_ns: int) -> Anchor | None:
        if self._reader is not None:
            bracket = self._reader.bracket(event.value, stream.value, limit_ns)
            return None if bracket is None else _middle(event, *bracket)
        # One that had to wait for the driver's lock may be followed by one that has not, before the next copy begins.
        for _ in range(_RECORDS):
            anchor = self._record_between(event, stream, limit_ns)
            if anchor is None or 2 * anchor.half_ns <= _BUSY_NS:
                break
        return anchor

    def _record_between(self, event: Handle, stream: Handle, limit_ns: int) -> Anchor | None:
        driver, now = self._driver, self._clock
        before = now()
        if driver.event_record(event, stream):
            return None
        recorded = asked = now()  # Much later, where a copy held the driver's lock.
        while driver.event_query(event) == NOT_READY:
            before = max(before, asked - _LATENCY_NS)  # It was not done then.
            if asked - recorded > _BUSY_NS:
                time.sleep(_NAP_S)
            asked = now()
            if asked - recorded > limit_ns:
                return None
        return _middle(event, before, now())


def _middle(event: Handle, before_ns: int, after_ns: int) -> Anchor:
    return Anchor(event, (before_ns + after_ns) // 2, (after_ns - before_ns + 1) // 2)
