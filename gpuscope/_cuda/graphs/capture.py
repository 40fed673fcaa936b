"""
Stages that are entered while their stream is being captured become nodes of the graph, which record events.

While a capture is open, `begin` and `end` of the device are the functions of `OpenCaptures`, so that the hot code knows
nothing of captures. Apart from its nodes, such a stage is recorded as any other: as a run that only captured. Never
waits for the GPU, and never asks about an event.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuscope._cuda.graphs.events import GraphStages, InnerStage
from gpuscope._errors import DriverError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._cuda.cuda_device import CudaDevice
    from gpuscope._cuda.driver import Handle
    from gpuscope._cuda.graphs.events import EventPool
    from gpuscope._cuda.timed_stream import TimedStream
    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import Site, StageRecord
    from gpuscope._recording.ledger import Ledger

TIMED = "timed"


@dataclass(slots=True, eq=False)
class _Begun:
    """A stage in a capture, with its nodes by their places among those of the capture."""

    site: Site
    around: _Begun | None
    start: int
    end: int = -1
    """-1 until it is left."""


class Capture:
    """
    One capture, and the stages in it.

    A record node waits for the program's nodes before it, and nothing of the program waits for it: after a node is
    added, the stream's position is put back to where it was (`cuStreamUpdateCaptureDependencies`). So the record nodes
    stand beside the chain of the program's nodes. Each also waits for the stream's record node before it, which makes
    them one branch, whose times ascend. Where nothing was captured in between, the end of one stage and the start of
    the next share a node.

    The rejected alternatives, with the figures of `benchmarks/bench_graphs.py` (H200; 40 kernels, 85.5 µs per replay):

    * *In line*, which is what a capture does by itself: the next kernel waits for the node. 16 stages add 46 µs to a
      replay, beside the chain 7 µs. Each stage is 3.6 µs longer than its kernels by CUPTI's timestamps, beside the
      chain 0.2 µs. In line has one advantage: branches of graphs that run at once share the GPU's queues and hold each
      other up. With 8 graphs at once, 1 stage in 100 is off by 49 µs or more beside the chain, and by 7 µs in line.
      Hence `inline`.
    * *Two nodes per stage*, as with pairs of PyTorch's external events, which stand in line: 16 stages are 32 nodes
      rather than 17, and add 63 µs.
    * *Leaves*, each waiting for the program's nodes alone: each would be a branch of its own, and a stage could end
      before it began. That decides it; what they cost is not recorded.
    * *The same events for all replays*: the next replay overwrites them while the collector reads. At 900 replays per
      second some intervals began in one replay and ended in another, and some were negative. So each launch gets events
      of its own (`launch.py`).

    All of this relies on two properties. A launch keeps the events that it was given, because
    `cuGraphExecEventRecordNodeSetEvent` only affects future launches. And the record nodes of one stream follow each
    other, because each waits for the one before it.

    Args:
        pool: where events come from.
        inline: whether the nodes stand in line with the program's.

    """

    def __init__(self, pool: EventPool, *, inline: bool = False) -> None:
        self.unfinished = 0
        """Stages that were not left before the capture ended."""
        self._pool = pool
        self._inline = inline
        self._nodes: list[tuple[int, Handle]] = []
        self._latest: dict[int, tuple[tuple[int, ...], int]] = {}
        """For each stream, the position at which its last record node was added, and the node's place."""
        self._begun: dict[StageRecord, _Begun] = {}
        self._stages: list[_Begun] = []

    def begin(self, record: StageRecord) -> None:
        """
        Take notice of a stage's start.

        Raises:
            DriverError: if the driver refuses the node; the stage is then not part of the graph.

        """
        begun = _Begun(record.site, self._around(record), self._mark(record))
        self._begun[record] = begun
        self._stages.append(begun)

    def end(self, record: StageRecord) -> None:
        """
        Take notice of its end, if it began in this capture.

        Raises:
            DriverError: if the driver refuses the node; the stage is then not part of the graph.

        """
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
        """Return the stages that were both entered and left; None if there are none."""
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
    The captures that are open on the streams of one `CudaDevice`.

    Args:
        device: whose `begin` and `end` this stands in for while a capture is open.
        ledger: counts what became of stages inside captures.
        inline: whether their nodes stand in line with those of the program.

    """

    def __init__(self, device: CudaDevice, ledger: Ledger, *, inline: bool) -> None:
        self.device = device
        self.ledger = ledger
        self.inline = inline
        self._open: dict[int, Capture | str] = {}
        self._lock = threading.RLock()  # A garbage collection within may end a capture.

    def open(self, ident: int, capture: Capture | str) -> None:
        """
        Take notice of stages on the streams of a capture that has begun.

        Args:
            ident: the driver's id of it.
            capture: takes the stages, or is the reason why none can be timed in it.

        """
        with self._lock:
            self._open[ident] = capture
            self._swap()

    def close(self, ident: int) -> None:
        """Take notice of no more; after the last open capture the device's own functions are called again."""
        with self._lock:
            self._open.pop(ident, None)
            self._swap()

    def _swap(self) -> None:
        """Set the device's functions, once more if a finalizer that runs within has opened or closed a capture."""
        are_open = not self._open
        while are_open != bool(self._open):
            are_open = bool(self._open)
            self.device.swap(*((self._begin, self._end) if are_open else ()))

    def includes(self, timed_stream: TimedStream) -> bool:
        """Tell whether a stream takes part in a capture, in a tenth of a microsecond where none is open."""
        # Later nobody can ask about a stream that may be gone, so it is asked about the captures of others, too.
        return (bool(self._open) or timed_stream.foreign) and self.device.capture_of(timed_stream) is not None

    def _begin(self, record: StageRecord, stream: Stream) -> None:
        self.device.usual[0](record, stream)
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
        self.device.usual[1](record)

    def _guarded(self, act: Callable[[StageRecord], None], record: StageRecord) -> None:
        try:
            act(record)
        except DriverError:
            self.ledger.graph_stage("driver_refused")

    def _capture_of(self, record: StageRecord) -> Capture | str | None:
        if record.pair is None:
            return None  # No events were left, or the stream must not be asked about.
        ident = self.device.capture_of(record.timed_stream)
        return None if ident is None else self._open.get(ident)
