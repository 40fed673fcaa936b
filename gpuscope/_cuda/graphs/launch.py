"""
A replay of a CUDA graph with stages inside: it gets events of its own before the launch, and a fence after it.

The exchange of events and the launch are one act, under the graph's lock. So is a launch while nothing is recorded: one
at the same time as an exchange in another thread may never come back from the driver (`watched.py`). The *fence* is an
event that is recorded after the launch. Nothing is read before it is done, because until a node runs again its event
tells of an older launch. What fails here costs the stages' times and no more; an exception of the launch itself is the
program's, and passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from gpuscope._cuda.driver import SUCCESS
from gpuscope._cuda.graphs.replay import Replay
from gpuscope._data.plain.values import shown
from gpuscope._data.record import Site
from gpuscope._interrupts import is_the_programs
from gpuscope._recording.hot_path import current, end, start, thread_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._cuda.driver import Driver
    from gpuscope._cuda.graphs.events import EventSet, GraphStages
    from gpuscope._cuda.graphs.watched import Watched
    from gpuscope._cuda.timed_stream import TimedStream
    from gpuscope._data.record import StageRecord
    from gpuscope._log import WarnOnce
    from gpuscope._recording.recorder import Recorder

R = TypeVar("R")


class Graph(Protocol):
    """What is called of PyTorch's `CUDAGraph`, which this room does not import."""

    def instantiate(self) -> object:
        """Make the graph executable."""

    def raw_cuda_graph_exec(self) -> int:
        """Return the address of the executable graph; raises `RuntimeError` before it is made."""


class Launcher:
    """
    Launches graphs.

    Args:
        warnings: logs each kind of failure once.

    """

    def __init__(self, warnings: WarnOnce) -> None:
        self._warnings = warnings
        self._site = Site("graph replay", {})

    def launch(self, graph: Graph, watched: Watched, recorder: Recorder | None, launch: Callable[[], R]) -> R:
        """
        Launch a graph, and have the stages inside timed if they are wanted.

        Args:
            graph: PyTorch's object.
            watched: what is known of it.
            recorder: wants the stages' times; None while nobody does.
            launch: launches the graph on the current stream.

        Returns:
            What `launch` returns.

        """
        timed_stream = None if recorder is None else self._stream_of(recorder, watched)
        if recorder is None or timed_stream is None:
            with watched.lock:
                if watched.stages is not None:
                    self._exchange(graph, watched.stages, watched.stages.scratch)
                return launch()
        outer = current.get()
        if outer is not None and outer.recorder is recorder and not outer.end_ns:
            return self._launch_in(outer, graph, watched, timed_stream, launch)
        # A stage of its own, so that those inside have one around them, and the rest of the replay is seen, too.
        around = start(recorder, self._site, None, 0)
        try:
            result = self._launch_in(around, graph, watched, timed_stream, launch)
        except BaseException as error:  # The program's, which goes on; the stage around it is left by it.
            end(around, error)
            raise
        end(around, None)
        return result

    def _stream_of(self, recorder: Recorder, watched: Watched) -> TimedStream | None:
        """Return where the graph is launched; None if that is not known, or if it becomes part of another graph."""
        stages, captures = watched.stages, recorder.captures
        if stages is None or captures is None:  # A recorder without captures wants no stages inside graphs.
            return None
        timed_stream: TimedStream | None = None
        try:
            timed_stream = captures.device.stream_of(stages.index)
            if timed_stream is not None and captures.includes(timed_stream):
                return None
        except Exception as error:  # The graph is launched as without us, and its stages are counted.
            if is_the_programs(error):
                raise
            self._warnings.warn("graphs", "finding the stream of a CUDA graph failed: %s.", shown(error))
            timed_stream = None
        if timed_stream is None:
            recorder.ledger.refuse("overwritten", len(stages))
        return timed_stream

    def _launch_in(
        self, outer: StageRecord, graph: Graph, watched: Watched, timed_stream: TimedStream, launch: Callable[[], R]
    ) -> R:
        with watched.lock:
            stages = watched.stages
            if stages is not None and stages.index == timed_stream.index:
                return self._launch_timed(outer, graph, stages, timed_stream, launch)
            if stages is not None:  # Another thread has captured it anew meanwhile, on another device.
                self._exchange(graph, stages, stages.scratch)
                outer.recorder.ledger.refuse("overwritten", len(stages))
            return launch()

    def _launch_timed(
        self, outer: StageRecord, graph: Graph, stages: GraphStages, timed_stream: TimedStream, launch: Callable[[], R]
    ) -> R:
        recorder: Recorder = outer.recorder
        thread, lost = thread_info(), "replay_failed"
        events = self._events_for(graph, stages, recorder)
        replay = Replay(stages, events, timed_stream, outer=outer, thread=thread) if events is not None else None
        held = [None, replay]
        try:
            stages.will_launch()
            launched_ns = recorder.clock()
            result = launch()
            if replay is not None and self._fenced(replay, launched_ns):
                recorder.replays.put(held)
            lost = "overwritten"
            return result
        finally:  # Also after an exception of the program's, or an interrupt.
            if replay is not None and held:
                stages.give_back(replay.events)
                recorder.ledger.refuse(lost, len(stages))

    def _events_for(self, graph: Graph, stages: GraphStages, recorder: Recorder) -> EventSet | None:
        """Have the next launch record into events of its own, and return them; None if there are none."""
        events = None if stages.is_broken else self._take(stages)
        try:
            exchanged = self._exchange(graph, stages, events or stages.scratch)
        except BaseException:  # An interrupt: the next exchange sets all nodes again.
            if events is not None:
                stages.give_back(events)
            raise
        if exchanged and events is not None:
            return events
        if events is not None:
            stages.give_back(events)
        recorder.ledger.refuse("overwritten", len(stages))
        return None

    def _take(self, stages: GraphStages) -> EventSet | None:
        try:
            return stages.take()
        except Exception as error:  # No new events.
            if is_the_programs(error):
                raise
            self._warnings.warn("graphs", "making events for a CUDA graph failed: %s.", shown(error))
            return None

    def _exchange(self, graph: Graph, stages: GraphStages, events: EventSet) -> bool:
        if stages.is_broken:
            return False
        try:
            if stages.will_record_into(events):
                return True
            if not stages.executable:
                stages.executable = _executable(graph)
            stages.exchange(events)
        except Exception as error:  # From now on nobody knows which replay has which events.
            if is_the_programs(error):
                raise  # The next exchange sets all nodes again.
            stages.is_broken = True
            self._warnings.warn("graphs", "timing stages inside a CUDA graph failed: %s.", shown(error))
        return not stages.is_broken

    def _fenced(self, replay: Replay, launched_ns: int) -> bool:
        replay.launched_ns = launched_ns
        try:
            replay.events.is_fenced = _record_fence(replay.graph.driver, replay)
            return replay.events.is_fenced
        except Exception as error:  # Without a fence nobody knows when to read.
            if is_the_programs(error):
                raise
            self._warnings.warn("graphs", "recording an event after a CUDA graph failed: %s.", shown(error))
            return False


def _record_fence(driver: Driver, replay: Replay) -> bool:
    fence, timed_stream = replay.events.fence, replay.timed_stream
    if driver.event_record(fence, timed_stream.handle) == SUCCESS:
        return True
    with driver.current(timed_stream.context):
        return bool(driver.event_record(fence, timed_stream.handle) == SUCCESS)


def _executable(graph: Graph) -> int:
    try:
        return int(graph.raw_cuda_graph_exec())
    except RuntimeError:  # The program keeps the graph, and leaves it to the first replay to instantiate it.
        graph.instantiate()
        return int(graph.raw_cuda_graph_exec())
