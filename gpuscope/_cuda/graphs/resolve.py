"""
Which replays of CUDA graphs are done, and where in host time the stages inside them lie.

Asks the device and never waits for it. A replay leaves here once: with the times of all its stages, or counted as
dropped or lost.

All times of a replay are its own, or none is exported. No stage may have a negative length, end after the fence, begin
well before the launch, or begin before the previous launch of the graph has ended. A replay that fails this is counted
as `overwritten`. All nodes are read as distances to the fence, so stages that share a node meet to the nanosecond. All
events of a replay, and of the replays that wait with it, are read in one call.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._cuda.driver import PENDING_CODES
from gpuscope._cuda.graphs.placing import Placed, largest_crowd, place
from gpuscope._cuda.graphs.replay import stages_in
from gpuscope._data.interfaces import DONE, PENDING
from gpuscope._data.plain.values import shown
from gpuscope._log import SUPPRESSED, WarnOnce

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from gpuscope._cuda.clock import GpuClock
    from gpuscope._cuda.graphs.events import GraphStages
    from gpuscope._cuda.graphs.replay import Replay
    from gpuscope._cuda.timed_stream import TimedStream
    from gpuscope._data.interfaces import Anchor, Device, ReplaySink
    from gpuscope._recording.ledger import Ledger

_CROWD = 2
"""
With more graphs than this at once on one GPU, their record nodes may hold each other up: 1 stage in 100 was off by more
than 2 µs with two, 6 with four and 49 with eight (`benchmarks/bench_graphs.py`, H200).
"""


class ReplayResolver:
    """
    Holds the replays that are not done yet: one deque per stream, oldest first.

    Args:
        device: is asked about events.
        ledger: counts what is dropped and lost.
        queue: where replays wait.
        warnings: logs each kind of failure once.
        clock: the recorder's, in nanoseconds.
        deadline_ns: a replay that is not done so long after its launch is lost.
        inline: whether record nodes stand in line with the program's; else it warns of many graphs at once.

    """

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        queue: ReplaySink,
        warnings: WarnOnce,
        *,
        clock: Callable[[], int],
        deadline_ns: int,
        inline: bool,
    ) -> None:
        self._device = device
        self._ledger = ledger
        self._queue = queue
        self._warnings = warnings
        self._clock = clock
        self._deadline_ns = deadline_ns
        self._warns_of_crowds = not inline
        self._crowd_warnings = WarnOnce(SUPPRESSED)
        self._waiting: dict[TimedStream, deque[Replay]] = {}
        self._held = 0

    @property
    def pending(self) -> int:
        """The stages inside replays that are not done, or not taken from the queue."""
        return self._queue.stages + self._held

    def oldest_ns(self) -> int | None:
        """Return when the first replay was launched of those that wait on any stream, or None."""
        taken = (waiting[0].launched_ns for waiting in self._waiting.values() if waiting)
        return min(taken, default=None) if not self._queue.stages else 0

    def collect(
        self,
        limit: int,
        clock_of: Callable[[TimedStream], GpuClock | None],
        *,
        may_ask: bool,
        give_up: bool,
    ) -> list[Placed]:
        """
        Return replays that are done, with about `limit` stages in them.

        Args:
            limit: how many stages per stream.
            clock_of: returns the clock of a stream's device, or None if it can't be calibrated now.
            may_ask: whether the device may be asked at all on this thread.
            give_up: whether to count replays that are not done as lost.

        """
        for replay in self._ledger.take(self._queue.drain, stages_in):
            self._waiting.setdefault(replay.timed_stream, deque()).append(replay)
            self._held += len(replay.graph)
        placed: list[Placed] = []
        for timed_stream, waiting in list(self._waiting.items()):
            try:
                clock = clock_of(timed_stream) if may_ask and waiting else None
                if clock is not None:
                    placed += self._collect_stream(timed_stream, waiting, clock, limit)
            except Exception as error:  # A device that raises costs a replay's inner stages, and no more.
                self._warnings.warn("device", "asking the GPU about replays failed: %s.", shown(error))
                self._lose(waiting, "device_error")
            while waiting and (give_up or self._clock() - waiting[0].launched_ns > self._deadline_ns):
                self._lose(waiting, "given_up")
            if not waiting:
                del self._waiting[timed_stream]  # A stream that is gone leaves nothing behind.
        # Once it has been said, nothing is worked out for it.
        wanted = self._warns_of_crowds and not self._crowd_warnings.counts
        if wanted and (crowd := largest_crowd(placed)) > _CROWD:
            self._crowd_warnings.warn(
                "crowd",
                "%d CUDA graphs with stages inside ran on one GPU at once. They may hold each other up, and the times "
                "of these stages may be off by tens of microseconds; `GPUSCOPE_GRAPH_STAGES=inline` avoids that.",
                crowd,
            )
        return placed

    def _collect_stream(
        self, timed_stream: TimedStream, waiting: deque[Replay], clock: GpuClock, limit: int
    ) -> list[Placed]:
        window, stages = [], 0
        for replay in waiting:
            if stages >= limit:
                break
            window.append(replay)
            stages += len(replay.graph)
        said, distances = self._measure(timed_stream, clock, window)
        groups: dict[GraphStages, tuple[list[Replay], list[NDArray[np.float32]]]] = {}
        for row in distances:
            replay = self._next(waiting)
            replays, rows = groups.setdefault(replay.graph, ([], []))
            replays.append(replay)
            rows.append(row)
        if said not in (DONE, PENDING):
            self._lose(waiting, "device_error")
        return [self._placed(graph, *group, clock) for graph, group in groups.items()]

    def _lose(self, waiting: deque[Replay], reason: str) -> None:
        if waiting:
            replay = self._next(waiting)
            self._ledger.lose(reason, len(replay.graph))
            replay.graph.give_back(replay.events)

    def _next(self, waiting: deque[Replay]) -> Replay:
        self._held -= len(waiting[0].graph)
        return waiting.popleft()

    def _measure(
        self, timed_stream: TimedStream, clock: GpuClock, window: list[Replay]
    ) -> tuple[str, list[NDArray[np.float32]]]:
        """Return what is known of the first replay that is not done, and the distances of those before it."""
        reader, anchor = self._device.reader, clock.anchor
        if reader is None:
            return self._measure_in_python(timed_stream, anchor, window)
        code, done, distances = reader.read_replays(
            [replay.events.addresses for replay in window],
            timed_stream.context.value,
            timed_stream.raw,
            timed_stream.foreign,
            anchor.event.value if anchor else 0,
        )
        sizes = [len(replay.events.events) for replay in window[:done]]
        values = np.frombuffer(distances, np.float32)[: sum(sizes)]
        rows = np.split(values, np.cumsum(sizes)[:-1]) if done else []
        return DONE if code == 0 else PENDING if code in PENDING_CODES else str(code), rows

    def _measure_in_python(
        self, timed_stream: TimedStream, anchor: Anchor | None, window: list[Replay]
    ) -> tuple[str, list[NDArray[np.float32]]]:
        device, rows = self._device, list["NDArray[np.float32]"]()
        if device.is_capturing(timed_stream):
            return PENDING, rows
        for replay in window:
            said = device.query(replay)  # type: ignore[arg-type]  # It has a record's `pair`, and no more is asked of it.
            if said != DONE:
                return said, rows
            *nodes, fence = replay.events.events
            row = [device.elapsed_ms(node, fence) for node in nodes]
            row.append(device.elapsed_ms(anchor.event, fence) if anchor else 0.0)
            rows.append(np.array([np.nan if value is None else value for value in row], np.float32))
        return DONE, rows

    def _placed(
        self, graph: GraphStages, replays: list[Replay], rows: list[NDArray[np.float32]], clock: GpuClock
    ) -> Placed:
        """Place the stages of replays, and count those whose replay has times that can't be its own."""
        launched_ns = np.array([replay.launched_ns for replay in replays], np.int64)
        nodes = np.array(graph.starts), np.array(graph.ends)
        right, start_ns, end_ns, uncertainty_ns, early_ns = place(
            np.array(rows, np.float64), nodes, launched_ns, clock, self._clock()
        )
        for replay in replays:
            graph.give_back(replay.events, was_read=True)
        if graph.is_broken:
            right[:] = False
        if not right.all():
            self._ledger.drop("overwritten", int((~right).sum()) * len(graph))
        kept = np.flatnonzero(right)
        return Placed(
            graph,
            [replays[row] for row in kept.tolist()],
            start_ns[kept],
            end_ns[kept],
            uncertainty_ns[kept],
            (early_ns > uncertainty_ns.max(axis=1))[kept] | (clock.anchor is None),
            clock.anchor is None,
        )
