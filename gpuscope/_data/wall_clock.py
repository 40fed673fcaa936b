"""
Where a moment of the records' clock lies since the epoch, also when the wall clock was set anew meanwhile.

A request is placed as a whole by the offset that held when it began: otherwise a step of the wall clock (NTP at boot, a
machine that resumes) would put a stage before or after the one that it is in. The next requests follow the clock.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import StageRecord

_STEP_NS = 1_000_000
"""A smaller change is not a step. It comes from reading two clocks, or it is drift, which can wait."""
_REMEMBERED_NS = 3600 * 10**9
"""For so long after a step, requests that began before it are known; and for no more than `_MAX_STEPS` of them."""
_MAX_STEPS = 16


class WallClock:
    """
    Two clocks, read together now and then.

    Args:
        clock: the records': nanoseconds, monotonic.
        epoch_clock: nanoseconds since the epoch.

    """

    def __init__(self, clock: Callable[[], int], epoch_clock: Callable[[], int]) -> None:
        self._clock, self._epoch_clock = clock, epoch_clock
        self._known: tuple[list[int], list[int]] = [], []
        """From when on each offset but the first holds, on the records' clock; and the offsets. Replaced as one."""

    @property
    def has_stepped(self) -> bool:
        """Whether requests are known that have another offset than the latest."""
        return bool(self._known[0])

    def read(self) -> int:
        """Read both clocks, and return the offset of requests that begin now."""
        offset_ns, width_ns = self._reading()
        now_ns, (since, offsets) = self._clock(), self._known
        if not offsets:
            offsets = [offset_ns]
        elif abs(offset_ns - offsets[-1]) > _STEP_NS + width_ns:
            since, offsets = [*since, now_ns], [*offsets, offset_ns]
        forgotten = max(bisect_right(since, now_ns - _REMEMBERED_NS), len(since) - _MAX_STEPS)
        self._known = since[forgotten:], offsets[forgotten:]
        return offsets[-1]

    def offset_of(self, record: StageRecord) -> int:
        """Return the epoch less the records' clock for a stage: that of the outermost stage around it."""
        while record.outer is not None:
            record = record.outer
        since, offsets = self._known
        return offsets[bisect_right(since, record.start_ns)]

    def _reading(self) -> tuple[int, int]:
        """Return epoch less clock, read between two readings of the latter, and their distance; the best of three."""
        readings = [(self._clock(), self._epoch_clock(), self._clock()) for _ in range(3)]
        before, epoch, after = min(readings, key=lambda reading: reading[2] - reading[0])
        return epoch - (before + after) // 2, after - before
