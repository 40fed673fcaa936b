"""
What finds stages without progress: a thread in C that needs no GIL (`csrc/stall.c`), and its twin, which needs it.

Both read the flight recorder's ring, or one of their own in memory.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from gpuscope._data.native import native
from gpuscope._flight.ring import RingInPython
from gpuscope._stalls.found import BEGINS, ENDS, FOUND

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._flight.ring import Running

_LOOK_EVERY_S = 0.25
_PAUSE_NS = 500_000_000
"""Looks are at most half as far apart, unless the process was stopped, or had no processor."""
_ALL = 1 << 31
"""Of calls: as many as are warm-up where all are."""
_LEAST_LOOKS = 8
"""So often a limit is looked for, where it is short."""
KEPT_NS = 600_000_000
"""If for so long no thread of Python comes for what was found, the thread in C writes it to the file."""


class Watch(Protocol):
    """Finds stages without progress."""

    def follow(self, ring: object) -> bool:
        """Look at a ring from now on; return whether it is one."""

    def start(self) -> bool:
        """Start, and return whether that was possible."""

    def stop(self, limit_ns: int) -> bool:
        """End, and whoever waits with it; return whether it has ended within the time."""

    def wait(self, limit_ns: int, is_excused: bool) -> bytes:
        """Return what is found within the time: many `FOUND`; nothing is while it is excused."""

    def excuse(self, now_ns: int) -> None:
        """Count all that runs as having made progress."""

    def limit(self, site: int, limit_ns: int, warmup: int) -> None:
        """
        Set limit and warm-up calls of a stage's name, by its number in the ring.

        0 and -1 for what holds without: the general limit, and the warm-up calls that the stage itself was given.
        """


class WatchInPython:
    """
    The twin. It needs the GIL, so what keeps that for as long as it stalls is not found; and no stream is asked.

    Args:
        limit_ns: from when on a stage without progress stalls; 0 for never.
        warmup: so many first calls of each stage are excused, and what is in them and around them.
        clock: of the records, in nanoseconds.

    """

    def __init__(self, limit_ns: int, warmup: int, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._limit_ns, self._warmup, self._clock = limit_ns, warmup, clock
        self._limits: dict[int, tuple[int, int]] = {}
        self._ring: RingInPython | None = None
        self._stopping = False
        self._asleep = threading.Lock()
        self._last_ns = 0
        self._said: dict[int, Running] = {}

    def follow(self, ring: object) -> bool:
        """As in `Watch`."""
        if isinstance(ring, RingInPython) and ring is not self._ring:
            if ring.running is None:
                ring.running = {}
            self._ring, self._said, self._limits = ring, {}, {}
        return isinstance(ring, RingInPython)

    def start(self) -> bool:
        """As in `Watch`."""
        self._stopping = False
        self._asleep.acquire(blocking=False)
        return True

    def stop(self, limit_ns: int) -> bool:  # noqa: ARG002 - there is no thread
        """As in `Watch`."""
        self._stopping = True
        if self._asleep.locked():
            self._asleep.release()
        return True

    def wait(self, limit_ns: int, is_excused: bool) -> bytes:
        """As in `Watch`."""
        until_s = time.monotonic() + limit_ns / 1e9
        own = [limit_ns for limit_ns, _ in self._limits.values()]
        shortest_ns = min((each for each in (self._limit_ns, *own) if each > 0), default=0)
        pause_s = min(_LOOK_EVERY_S, max(0.01, shortest_ns / _LEAST_LOOKS / 1e9)) if shortest_ns else _LOOK_EVERY_S
        while not self._stopping:
            if is_excused:
                self.excuse(self._clock())
            found = self.scan(self._clock())
            left_s = until_s - time.monotonic()
            if found or left_s <= 0:
                return found
            self._asleep.acquire(timeout=min(pause_s, left_s))
        return b""

    def excuse(self, now_ns: int) -> None:
        """As in `Watch`."""
        for each in self._running():
            each.active_ns = max(each.active_ns, now_ns)

    def limit(self, site: int, limit_ns: int, warmup: int) -> None:
        """As in `Watch`."""
        self._limits[site] = limit_ns, warmup

    def _running(self) -> list[Running]:
        running = None if self._ring is None else self._ring.running
        return [] if running is None else list(running.values())

    def scan(self, now_ns: int) -> bytes:
        """Return what is found at a moment."""
        opened = self._running()
        if self._last_ns and now_ns - self._last_ns > _PAUSE_NS:
            for each in opened:  # Nobody could make progress.
                each.active_ns += now_ns - self._last_ns
        self._last_ns = now_ns
        excused, late_inside = set(), set()
        for each in reversed(opened):  # What is inside stands behind what is around it.
            if self._is_warm(each):
                excused.add(each)
            outer = each.outer
            if outer is not None:
                outer.active_ns = max(outer.active_ns, each.active_ns)
                if each in excused:
                    excused.add(outer)
                elif each in late_inside or self._is_late(each, now_ns):
                    late_inside.add(outer)
        found = self._ended(opened, now_ns)
        for each in opened:
            if self._is_late(each, now_ns) and each not in excused | late_inside and not self._is_said(each):
                each.said = True
                self._said[id(each)] = each
                found += self._pack(BEGINS, each, now_ns)
        return found

    def _ended(self, opened: list[Running], now_ns: int) -> bytes:
        found, here = b"", set(map(id, opened))
        for key, each in list(self._said.items()):
            if key not in here or not self._is_late(each, now_ns):
                each.said = False
                del self._said[key]
                found += self._pack(ENDS, each, now_ns)
        return found

    def _is_said(self, each: Running) -> bool:
        at: Running | None = each
        while at is not None and not at.said:
            at = at.outer
        return at is not None

    def _own(self, each: Running) -> tuple[int, int]:
        number = 0 if self._ring is None else self._ring.site(each.site)
        limit_ns, warmup = self._limits.get(number, (0, -1))
        if warmup < 0:
            own = _ALL if each.site.warms_up else each.site.warmup
            warmup = self._warmup if own is None else own
        return limit_ns or self._limit_ns, warmup

    def _is_late(self, each: Running, now_ns: int) -> bool:
        limit_ns = self._own(each)[0]
        return limit_ns > 0 and now_ns - each.active_ns > limit_ns

    def _is_warm(self, each: Running) -> bool:
        at: Running | None = each
        while at is not None and at.calls > self._own(at)[1]:
            at = at.outer
        return at is not None

    def _pack(self, kind: int, each: Running, now_ns: int) -> bytes:
        trace_id, span_id = each.record_ids
        ids = trace_id >> 64, trace_id & (1 << 64) - 1, span_id, each.thread.ident
        times = each.start_ns, each.active_ns, self._own(each)[0], now_ns
        names = (text.encode("utf-8", "replace") for text in (each.site.name[:120], each.thread.name[:60]))
        return FOUND.pack(kind, *ids, 0, 0, *times, 0, *names)


def make_watch(limit_ns: int, warmup: int, path: str) -> Watch:
    """Return what finds stages without progress, in C where that was built, which then writes to this file."""
    if hasattr(native, "StallWatch"):
        made: Any = native.StallWatch(limit_ns, warmup, KEPT_NS, path)
        return made  # type: ignore[no-any-return]  # `native` has no stubs.
    return WatchInPython(limit_ns, warmup)


def main_stack() -> list[tuple[str, int, str]]:
    """Return the main thread's stack as it was when it let go of the GIL, if it kept that for long; once."""
    return native.main_stack() or [] if hasattr(native, "main_stack") else []


def stream_states() -> bytes:
    """Return what streams answered last, as many `STREAM`; nothing without the parts in C."""
    return native.stream_states() if hasattr(native, "stream_states") else b""
