"""
The stages inside one CUDA graph, and the events that its record nodes record into: another set for each replay.

An event that every replay records anew is overwritten while it is being read. So each replay has events of its own,
exchanged before its launch, and used again once they have been read. A launch keeps the events that it was given.
A launch that is not timed, because recording is off or no events are left, records into the *scratch*, which the nodes
were captured with and nobody reads. Calls the driver and nothing else, never waits, and never destroys an event.
"""

from __future__ import annotations

import contextlib
import threading
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._cuda.driver import SUCCESS, Handle
from gpuscope._data.native import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuscope._cuda.driver import Driver
    from gpuscope._data.record import Site


class InnerStage(NamedTuple):
    """A stage that was entered while its stream was being captured."""

    site: Site
    parent: int
    """Place of the enclosing stage within the graph, or -1."""
    start: int
    """Place of the node that records its start, among the graph's record nodes."""
    end: int
    """Place of the node that records its end; the same one where nothing was captured in the stage."""


class EventSet:
    """The events of one replay: one per node, and the fence, which is recorded after the graph."""

    __slots__ = ("addresses", "events", "fence", "is_fenced", "launched_in")

    def __init__(self, events: list[Handle]) -> None:
        self.events = events
        self.fence = events[-1]
        self.launched_in: object = None
        """The executable graph whose launch may still record into them; None if there is no such launch."""
        self.is_fenced = False
        """Whether the fence was recorded after that launch."""
        self.addresses = pack(events)
        """Of all of them, for the parts in C."""


def pack(handles: Sequence[Handle]) -> bytes:
    """Return the addresses of handles as an array in C."""
    return Struct(f"={len(handles)}Q").pack(*(handle.value or 0 for handle in handles))


class EventPool:
    """
    Events for the graphs of one context: as many as were ever needed at once, up to a limit.

    Events go from graph to graph. None is destroyed with its graph, because a launch that is still on its way may be
    about to record it. For the same reason the scratch of a graph that is gone only ever becomes scratch again. So do
    the events of a launch whose end nobody can tell; those with a fence are used again once that is done.

    Args:
        driver: makes the events.
        context: in which they are made.
        index: of the device.
        limit: how many events to be read there may be.

    """

    def __init__(self, driver: Driver, context: Handle, index: int, *, limit: int) -> None:
        self.driver = driver
        self.context = context
        self.index = index
        """Of the device."""
        self.set_event = driver.set_node_event_address
        self._left = limit
        self._spare: list[Handle] = []
        self._unread: list[Handle] = []
        self._launched: list[EventSet] = []
        """Of graphs that are gone; their launches have fences, and may not be over."""
        self._lock = threading.RLock()  # A garbage collection within may end a graph.

    def take(self, count: int) -> list[Handle] | None:
        """Return events to be read, or None at the limit."""
        if self._launched and count > len(self._spare):
            self._take_what_is_over()
        with self._lock:
            missing = max(0, count - len(self._spare))
            if missing > self._left:
                return None
            self._left -= missing
            taken = [self._spare.pop() for _ in range(count - missing)]
        try:
            return taken + self._new(missing)
        except BaseException:  # What could not be made does not count as made.
            with self._lock:
                self._left += missing
                self._spare += taken
            raise

    def give_back(self, events: list[Handle]) -> None:
        """Take them back."""
        with self._lock:
            self._spare += events

    def give_back_launched(self, events: EventSet) -> None:
        """Take back the events of a launch that may not be over, of a graph that will not be launched again."""
        with self._lock:
            if events.is_fenced:
                self._launched.append(events)
            else:  # They no longer are among those to be read.
                self._unread += events.events
                self._left += len(events.events)

    def _take_what_is_over(self) -> None:
        with self._lock:
            asked, self._launched = self._launched, []
        over: list[EventSet] = []
        before = self.driver.relax_capture_mode()
        try:
            with self.driver.current(self.context):
                over += [events for events in asked if self.driver.event_query(events.fence) == SUCCESS]
        finally:
            self.driver.exchange_capture_mode(before)
            with self._lock:
                self._launched += [events for events in asked if events not in over]
                for events in over:
                    self._spare += events.events

    def take_unread(self, count: int) -> list[Handle]:
        """Return events that nobody reads. There is no limit, because each graph has few."""
        with self._lock:
            taken = [self._unread.pop() for _ in range(min(count, len(self._unread)))]
        try:
            return taken + self._new(count - len(taken))
        except BaseException:  # Goes on: the caller counts it. What was taken is not lost.
            self.give_back_unread(taken)
            raise

    def give_back_unread(self, events: list[Handle]) -> None:
        """Take them back, for scratch alone: launches of a graph that is gone may still record into them."""
        with self._lock:
            self._unread += events

    def forget(self) -> None:
        """Replace the lock, which another thread may have held when this process was forked."""
        self._lock = threading.RLock()

    def _new(self, count: int) -> list[Handle]:
        if not count:
            return []
        # This thread may be capturing, and not every capture mode is documented to allow new events.
        before = self.driver.relax_capture_mode()
        try:
            with self.driver.current(self.context):
                return [self.driver.new_event() for _ in range(count)]
        finally:
            self.driver.exchange_capture_mode(before)


class GraphStages:
    """
    The stages inside one graph.

    Args:
        stages: those that were both entered and left during the capture, in the order of their entries.
        nodes: the address of each record node, with the event that it was captured with, which nobody reads.
        pool: where further events come from.

    """

    def __init__(self, stages: Sequence[InnerStage], nodes: Sequence[tuple[int, Handle]], pool: EventPool) -> None:
        self.sites = tuple(stage.site for stage in stages)
        self.parents = tuple(stage.parent for stage in stages)
        self.starts = tuple(stage.start for stage in stages)
        """For each stage the place of the node that records its start."""
        self.ends = tuple(stage.end for stage in stages)
        self.index = pool.index
        """Of the device."""
        self.driver = pool.driver
        self.executable = 0
        """The address of the graph as it is launched; 0 while it is not known."""
        self.is_broken = False
        """Whether an exchange failed: from then on nobody knows which replay has which events."""
        self.scratch = EventSet([event for _, event in nodes])
        self._current: EventSet | None = self.scratch
        """What a launch would record into; None if that is not known."""
        self._nodes = [node for node, _ in nodes]
        self._instance = object()
        """Stands for the executable graph: another one is not launched in turn with it."""
        self._packed_nodes = pack([Handle(node) for node in self._nodes])
        self._pool = pool
        self._free: list[EventSet] = []
        self._retired = False

    def __len__(self) -> int:
        """Return the number of stages."""
        return len(self.sites)

    def will_record_into(self, events: EventSet) -> bool:
        """Tell whether the next launch will record into these events."""
        return self._current is events

    def take(self) -> EventSet | None:
        """Return events for one replay, or None if all are held by replays that have not been read yet."""
        if self._free:
            return self._free.pop()
        events = self._pool.take(len(self._nodes) + 1)
        return None if events is None else EventSet(events)

    def will_launch(self) -> None:
        """Take notice that a launch is about to begin."""
        if self._current is not None:
            self._current.launched_in, self._current.is_fenced = self._instance, False

    def give_back(self, events: EventSet, *, was_read: bool = False) -> None:
        """Take back the events of a replay that was read, or that nobody will read."""
        if was_read:
            events.launched_in = None
        # A launch that was not read may still record into them. A later launch of the same graph, which is given them,
        # records after it, because launches of one graph follow each other: what is read then is the later one's.
        if events.launched_in in (None, self._instance):
            self._free.append(events)
        else:
            self._pool.give_back_launched(events)
        if self._retired:
            self._empty()

    def exchange(self, events: EventSet) -> None:
        """
        Have the next launch record into these events. The caller holds the graph's lock.

        Raises:
            DriverError: if the driver refuses.

        """
        self._current, driver = None, self.driver
        if native is None:
            driver.set_node_events(self.executable, self._nodes, events.events)
        else:
            code = native.exchange(self._pool.set_event, self.executable, self._packed_nodes, events.addresses)
            driver.check("cuGraphExecEventRecordNodeSetEvent", code)
        self._current = events

    def forget_executable(self) -> None:
        """Take notice that the graph was instantiated anew: its nodes record into the scratch again."""
        self.executable, self._current, self._instance = 0, self.scratch, object()
        free, self._free = self._free, []
        for events in free:
            self.give_back(events)

    def retire(self) -> None:
        """Let go of the events, because the graph is gone; once."""
        if self._retired:
            return
        self._retired = True
        self._empty()
        self._pool.give_back_unread(self.scratch.events)

    def _empty(self) -> None:
        while self._free:
            with contextlib.suppress(IndexError):  # Another thread took the last one.
                events = self._free.pop()
                if self.is_broken:  # Any launch may have recorded into any of them.
                    events.launched_in, events.is_fenced = self._instance, False
                if events.launched_in is None:
                    self._pool.give_back(events.events)
                else:
                    self._pool.give_back_launched(events)
