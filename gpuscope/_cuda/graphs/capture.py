"""
Stages that are entered while their stream is being captured: nodes of the graph that record events.

Stands between the hot code and the device's door as long as a capture lasts, so that the hot code knows nothing of it.
Beside the nodes such a stage is recorded as ever, as what it is: a run that only captured.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuscope._cuda.graphs.events import GraphStages, InnerStage
from gpuscope._errors import DriverError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._cuda.driver import Driver, Handle
    from gpuscope._cuda.graphs.events import EventPool
    from gpuscope._data.record import Site, StageRecord
    from gpuscope._recording.ledger import Ledger

TIMED = "timed"


@dataclass(slots=True, eq=False)
class _Begun:
    """A stage in a capture; its nodes by their places."""

    site: Site
    around: _Begun | None
    start: int
    end: int = -1
    """-1 until it is left."""


class Capture:
    """
    One capture, and the stages in it.

    Nothing in the graph waits for a record node: the nodes stand beside the program's own. Among themselves those of a
    stream follow each other, so that they are one branch, and no stage ends before it began. In line with the program's
    nodes they cost a replay some 3 µs a stage, which is in the stage's time, but the branches of graphs that run at
    once hold each other up (`benchmarks/bench_graphs.py`). Stages that meet share a node.

    Args:
        pool: where events come from.
        inline: whether the nodes stand in line.

    """

    def __init__(self, pool: EventPool, *, inline: bool = False) -> None:
        self.unfinished = 0
        """Stages that were not left before it ended."""
        self._pool = pool
        self._inline = inline
        self._nodes: list[tuple[int, Handle]] = []
        self._latest: dict[int, tuple[tuple[int, ...], int]] = {}
        """Of each stream where its last record node was added, and the node's place."""
        self._begun: dict[StageRecord, _Begun] = {}
        self._stages: list[_Begun] = []

    def begin(self, record: StageRecord) -> None:
        """Take notice of a stage's start."""
        begun = _Begun(record.site, self._around(record), self._mark(record))
        self._begun[record] = begun
        self._stages.append(begun)

    def end(self, record: StageRecord) -> None:
        """Take notice of its end, if it began in this capture."""
        begun = self._begun.pop(record, None)
        if begun is not None:
            begun.end = self._mark(record)

    def _mark(self, record: StageRecord) -> int:
        """Have the graph record an event here, and return the node's place."""
        driver, timed_stream = self._pool.driver, record.timed_stream
        with driver.current(timed_stream.context):
            position = driver.capture_position(timed_stream.handle)
            last_position, last = self._latest.get(timed_stream.raw, (None, -1))
            if position == last_position:
                return last
            (event,) = self._pool.take_unread(1)
            if self._inline:
                node = driver.add_record_node(event, timed_stream.handle)
                position = (node,)
            else:
                node = self._add_beside(event, timed_stream.handle, position, last)
        self._nodes.append((node, event))
        self._latest[timed_stream.raw] = position, len(self._nodes) - 1
        return len(self._nodes) - 1

    def _add_beside(self, event: Handle, stream: Handle, position: tuple[int, ...], last: int) -> int:
        driver = self._pool.driver
        if last >= 0:
            driver.set_capture_position(stream, (*position, self._nodes[last][0]))
        try:
            return driver.add_record_node(event, stream)
        finally:
            driver.set_capture_position(stream, position)

    def _around(self, record: StageRecord) -> _Begun | None:
        outer = record.outer
        while outer is not None and outer not in self._begun:
            outer = outer.outer
        return None if outer is None else self._begun[outer]

    def finish(self) -> GraphStages | None:
        """Return the stages that were entered and left, or None without any."""
        whole = [begun for begun in self._stages if begun.end >= 0]
        self.unfinished = len(self._begun)
        if not whole:
            return None
        places = {id(begun): place for place, begun in enumerate(whole)}
        stages = []
        for begun in whole:
            around = begun.around
            while around is not None and id(around) not in places:
                around = around.around
            parent = -1 if around is None else places[id(around)]
            stages.append(InnerStage(begun.site, parent, begun.start, begun.end))
        return GraphStages(stages, self._nodes, self._pool)

    def abandon(self) -> None:
        """Let go of the events: the capture failed, or no whole stage is in it."""
        self._pool.give_back_unread([event for _, event in self._nodes])


class OpenCaptures:
    """
    The captures that are open on one device door.

    Args:
        device: whose `begin` and `end` this stands in for meanwhile.
        ledger: counts what became of stages inside captures.
        inline: whether their nodes stand in line with those of the program.

    """

    def __init__(self, device: Any, ledger: Ledger, *, inline: bool) -> None:
        self._device = device
        self.ledger = ledger
        self.inline = inline
        self._open: dict[int, Capture | str] = {}
        self._lock = threading.Lock()

    def open(self, ident: int, capture: Capture | str) -> None:
        """
        Take notice of stages on the streams of a capture that has begun.

        Args:
            ident: the driver's number of it.
            capture: takes the stages, or says why none can be timed in it.

        """
        with self._lock:
            if not self._open:
                self._device.swap(self._begin, self._end)
            self._open[ident] = capture

    def close(self, ident: int) -> None:
        """Take none any more; with the last capture that is open, the hot code has its way again."""
        with self._lock:
            if self._open.pop(ident, None) is not None and not self._open:
                self._device.swap()

    def includes(self, driver: Driver, stream: Handle) -> bool:
        """Tell whether a stream takes part in a capture, in a tenth of a microsecond where none is open."""
        return bool(self._open) and driver.capture_of(stream) is not None

    def _begin(self, record: StageRecord, stream: Any) -> None:
        self._device.usual[0](record, stream)
        capture = self._capture_of(record)
        if capture is None:
            return
        if isinstance(capture, str):
            self.ledger.graph_stage(capture)
        elif not record.site.graph:
            self.ledger.graph_stage("opted_out")
        else:
            self._guarded(capture.begin, record)

    def _end(self, record: StageRecord) -> None:
        capture = self._capture_of(record)
        if isinstance(capture, Capture):
            self._guarded(capture.end, record)
        self._device.usual[1](record)

    def _guarded(self, act: Callable[[StageRecord], None], record: StageRecord) -> None:
        try:
            act(record)
        except DriverError:
            self.ledger.graph_stage("driver_refused")

    def _capture_of(self, record: StageRecord) -> Capture | str | None:
        if record.pair is None:
            return None  # No events left, or a stream that must not be asked about.
        ident = self._device.driver.capture_of(record.timed_stream.handle)
        return None if ident is None else self._open.get(ident)
