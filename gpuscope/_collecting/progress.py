"""
What is known of each stream's progress: which stage was done there last, and when the GPU last said that one is not.

The collector's thread writes it; what looks for stalls reads it, on a thread of its own.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from gpuscope._data.flight import WaitingStage

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Mapping

    from gpuscope._data.interfaces import TimedStreamOfDevice
    from gpuscope._data.record import Site, StageRecord

_MOST_STREAMS = 1024


class Progress:
    """
    The progress of all streams.

    Args:
        clock: of the records, in nanoseconds.
        waiting: the stages that wait on each stream, oldest first.

    """

    def __init__(self, clock: Callable[[], int], waiting: Mapping[TimedStreamOfDevice, deque[StageRecord]]) -> None:
        self._clock, self._waiting = clock, waiting
        self._asked_ns: dict[TimedStreamOfDevice, int] = {}
        self._done: dict[TimedStreamOfDevice, tuple[Site | None, int]] = {}

    def note_not_done(self, timed_stream: TimedStreamOfDevice) -> None:
        """The GPU was asked, and something that waits is not done."""
        self._asked_ns[timed_stream] = self._clock()

    def note_done(self, timed_stream: TimedStreamOfDevice, record: StageRecord) -> None:
        """A stage was found to be done."""
        if len(self._done) >= _MOST_STREAMS:
            self._done.clear()
            self._asked_ns.clear()
        self._done[timed_stream] = record.site, self._clock()

    def waiting_stages(self) -> list[WaitingStage]:
        """Return the oldest stage that waits on each stream; any thread may ask."""
        found = []
        for timed_stream, records in list(self._waiting.items()):
            with suppress(IndexError):  # The collector has just taken the last one.
                site, done_ns = self._done.get(timed_stream, (None, 0))
                asked_ns, place = self._asked_ns.get(timed_stream, 0), (timed_stream.index, timed_stream.raw)
                done = "" if site is None else site.name
                found.append(WaitingStage(records[0], *place, len(records), asked_ns, done, done_ns))
        return found
