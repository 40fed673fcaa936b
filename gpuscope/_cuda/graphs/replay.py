"""
The hand-off of replays of CUDA graphs with stages inside, from application threads to the collector.

Never waits, never raises. Bounded by the events that each replay holds. A replay is one object, however many stages are
inside, and none of them has a host span: the collector makes columns of all their times at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from itertools import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._cuda.graphs.events import EventSet, GraphStages
    from gpuscope._cuda.timed_stream import TimedStream
    from gpuscope._data.record import StageRecord, ThreadInfo

_MANY = 64
"""After so many replays the collector is woken before its next pass is due."""


class Replay:
    """One launch of a graph with stages inside, as the application's thread saw it."""

    __slots__ = ("events", "graph", "launched_ns", "outer", "pair", "thread", "timed_stream")

    def __init__(
        self,
        graph: GraphStages,
        events: EventSet,
        timed_stream: TimedStream,
        *,
        outer: StageRecord,
        thread: ThreadInfo,
        launched_ns: int = 0,
    ) -> None:
        self.graph = graph
        self.events = events
        self.pair = events.fence, events.fence
        """What a device asks about, as it does of a record."""
        self.timed_stream = timed_stream
        self.launched_ns = launched_ns
        self.outer = outer
        """The stage around the replay."""
        self.thread = thread


class ReplayQueue:
    """
    Replays that the collector has not taken yet.

    Args:
        wake: has the collector come before its next pass is due.

    """

    refused = 0
    """The queue refuses none: a replay for which no events are left does not come here, and the launcher counts it."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._waiting: deque[Replay] = deque()

    def put(self, held: list[Replay | None]) -> None:
        """Take the replay that is in a list after a None, out of there in the same step: no interrupt comes between."""
        self._waiting.extend(iter(held.pop, None))
        if len(self._waiting) % _MANY == 0:
            self._wake()

    def drain(self) -> list[Replay]:
        """Remove and return all replays, oldest first. For the collector, or who closes the account."""
        replays: list[Replay] = []
        with contextlib.suppress(IndexError):  # A signal handler has closed the account since their number was asked.
            replays.extend(map(deque.popleft, repeat(self._waiting, len(self._waiting))))
        return replays

    def give_up(self) -> int:
        """Remove all replays, unread, and return how many stages are inside them."""
        replays = self.drain()
        for replay in replays:
            replay.graph.give_back(replay.events)
        return stages_in(replays)

    @property
    def stages(self) -> int:
        """The stages inside the replays that wait."""
        return stages_in(list(self._waiting))


def stages_in(replays: list[Replay]) -> int:
    """Return how many stages are inside replays."""
    return sum(len(replay.graph) for replay in replays)
