"""
Looks for stalls: takes what the watch finds, asks the collector what the GPU has not done, and says each once.

On a thread of its own, which begins with the first stage and mostly waits without the GIL. Nothing here raises into a
stage, asks the GPU anything, or waits for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

from gpuscope._data.attributes import STALL, STALL_DURATION, STALL_KIND
from gpuscope._data.plain.values import shown
from gpuscope._flight.ring import make_ring
from gpuscope._interrupts import is_the_programs
from gpuscope._log import WarnOnce, inform, later, warn
from gpuscope._settings.flight import limits
from gpuscope._stalls import report
from gpuscope._stalls.circumstances import compiles, has_greenlets
from gpuscope._stalls.found import BEGINS, found_in, host_stall, streams_in
from gpuscope._stalls.limits import Limits
from gpuscope._stalls.not_done import NotDone
from gpuscope._stalls.watch import main_stack, make_watch, stream_states

if TYPE_CHECKING:
    from gpuscope._data.batch import StageBatch
    from gpuscope._data.flight import Flight, StallEvent, WaitingStage
    from gpuscope._data.record import Site, StageRecord
    from gpuscope._recording.state import Period
    from gpuscope._stalls.found import Found, Stall

_RING_BYTES = 2 << 20
"""Of a ring in memory, where there is no flight recorder: 12,000 stages, and a table of their names."""
_LOOK_EVERY_NS = 250_000_000
_LEARN_EVERY_NS = 5_000_000_000
_STACKS_EVERY_NS = 5_000_000_000
_LINES, _LINES_NS = 16, 60_000_000_000
"""So many lines of the log in that time; what is beyond is counted, and stands in the file."""
_STOP_NS = 100_000_000
"""The thread ends within a millisecond; nobody waits longer than this."""
_MOST_EVENTS = 1024


class Collecting(Protocol):
    """What is asked of the collector: `_collecting.collector.Collector`."""

    def waiting_stages(self) -> list[WaitingStage]:
        """Return the oldest stage of each stream that waits for the GPU."""

    def come(self) -> None:
        """Have the collector come before its time."""


class Stalls:
    """
    Looks for the stalls of one period of recording.

    Args:
        period: whose stages they are.
        collector: knows what the GPU has not done.

    """

    def __init__(self, period: Period, collector: Collecting) -> None:
        config = period.config
        self.path = report.path_beside(config.flight)
        """Of the file that says it."""
        self._period, self._recorder, self._collector = period, period.recorder, collector
        self._limits = Limits(limits(config.stall))
        self._watch = make_watch(self._limits.general_ns, config.warmup, self.path)
        self._not_done = NotDone(self._limits, config.warmup)
        self._thread: threading.Thread | None = None
        self._is_closed, self._has_begun = False, False
        self._followed: Flight | None = None
        self._ring: Flight | None = None
        """One of our own, in memory."""
        self._sites: dict[str, Site] = {}
        self._learn_ns = self._stacks_ns = 0
        self._lines: deque[int] = deque(maxlen=_LINES)
        self._unsaid = 0
        self._told: set[int] = set()
        """The spans of stages that are said to make no progress in the host, and have not been said to go on."""
        self._events: dict[int, StallEvent] = {}
        self.has_events = False
        self._warnings = WarnOnce(say=later)

    # ---- application threads

    def begin(self, flight: Flight | None) -> None:
        """Begin, with the first stage, and put the ring, one of our own if need be, where the hot path finds it."""
        recorder = self._recorder
        recorder.flight = flight
        if flight is None:
            self._make_ring()
        self._follow()
        self._has_begun = True
        self._start()

    def _make_ring(self) -> None:
        memory = mmap.mmap(-1, _RING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._ring = self._recorder.flight = make_ring(memory, 0)

    def _follow(self) -> None:
        flight = self._recorder.flight
        if flight is None and self._followed is None and not self._is_closed:  # The flight recorder has no file.
            self._make_ring()
            flight = self._ring
        if flight is not None and flight is not self._followed and self._watch.follow(flight):
            self._followed, self._learn_ns = flight, 0

    def start(self) -> None:
        """Look again, after `stop`."""
        if self._has_begun:
            self._start()

    def _start(self) -> None:
        if self._thread is not None or self._is_closed:
            return
        if has_greenlets():
            self._warnings.warn("greenlets", "GPUSCOPE_STALL: threads are greenlets here, so nobody looks for stalls.")
            return
        self._thread = threading.Thread(target=self._run, name="gpuscope-stalls", daemon=True)
        try:
            self._watch.start()  # Where that has no thread, what the host has left is still looked at.
            self._thread.start()
        except BaseException as error:  # No memory for a thread, or the interpreter ends.
            self._thread = None  # If it has begun, it ends by that.
            if is_the_programs(error):
                raise
            self._warnings.warn("thread", "GPUSCOPE_STALL: nobody looks for stalls: %s.", shown(error))

    def stop(self) -> None:
        """Look for nothing until `start`; the threads end."""
        self._thread = None
        self._watch.stop(_STOP_NS)

    # ---- the collector's thread

    def look(self, batch: StageBatch) -> None:
        """Learn the names of stages."""
        for site in batch.sites:
            if self._sites.get(site.name) is not site:
                self._sites[site.name] = site

    def take_event(self, span_id: int) -> StallEvent | None:
        """Return the event of a stage, once."""
        event = self._events.pop(span_id, None)
        self.has_events = bool(self._events)
        return event

    def close(self) -> None:
        """End."""
        self._is_closed = True
        self.stop()
        if self._ring is not None:
            with contextlib.suppress(Exception):  # The end of recording goes on.
                self._ring.close()  # type: ignore[attr-defined]  # It is a `Ring`.

    def abandon(self) -> None:
        """Let go: this process is the child of a fork, which has no such thread."""
        self._is_closed, self._thread = True, None

    # ---- the thread

    def _run(self) -> None:
        me = threading.current_thread()
        while self._thread is me:
            try:
                taken = self._watch.wait(_LOOK_EVERY_NS, compiles())
                if self._thread is me:
                    self._pass(taken)
            except Exception as error:  # The next look is as good.
                self._warnings.warn("look", "a look for stalls failed: %s.", shown(error))
                self._collector.come()

    def _pass(self, taken: bytes) -> None:
        clock = self._recorder.clock
        self._follow()
        if clock() >= self._learn_ns:
            self._learn_ns = clock() + _LEARN_EVERY_NS
            self._learn()
        if compiles():
            self._watch.excuse(clock())
            self._not_done.excuse(clock())
            return
        stalls = []
        if taken:
            states, ran = streams_in(stream_states()), self._not_done.last_done(self._collector.waiting_stages())
            for found in found_in(taken):
                if found.kind == BEGINS:
                    self._told.add(found.span_id)
                    stalls.append((host_stall(found, states, clock(), ran), bool(found.written)))
                else:
                    self._say_end(found)
        stalls += [(each, False) for each in self.look_at_gpu()]
        if stalls:
            self._say(stalls)

    def look_at_gpu(self) -> list[Stall]:
        """Return the stages that the host has left and the GPU has not done for too long."""
        waiting = self._collector.waiting_stages()
        if not waiting:
            return []
        if self._not_done.is_near(waiting, self._recorder.clock()):
            self._collector.come()  # What it knows is to be new.
        return self._not_done.look(waiting, self._recorder.clock(), lambda: streams_in(stream_states()))

    def _learn(self) -> None:
        if self._limits.follows_percentiles:
            self._limits.learn(self._period.summary.summary().stages)
        ring = self._followed
        for name, site in list(self._sites.items()):
            own_ns = self._limits.of(name)
            if ring is not None and own_ns != self._limits.general_ns:
                self._watch.limit(ring.site(site), own_ns, -1)  # type: ignore[attr-defined]  # It is a `Ring`.

    def _say(self, stalls: list[tuple[Stall, bool]]) -> None:
        now_ns = self._recorder.clock()
        has_stacks = now_ns >= self._stacks_ns or any(written for _, written in stalls)
        if has_stacks:
            self._stacks_ns = now_ns + _STACKS_EVERY_NS
        is_written = report.write(self.path, [each for each, _ in stalls], has_stacks=has_stacks, main=main_stack())
        for each, _ in stalls:
            self._recorder.ledger.stall(each.kind)
            self._note_event(each)
            self._log(each, self.path if is_written else "no file could be written")
        if (recorder := self._recorder.flight_recorder) is not None:
            recorder.ask("stall")
            self._collector.come()

    def _note_event(self, stall: Stall) -> None:
        if len(self._events) < _MOST_EVENTS:
            values = {STALL_KIND: stall.kind, STALL_DURATION: (stall.found_ns - stall.since_ns) / 1e9}
            self._events[stall.span_id] = STALL, stall.found_ns, values
            self.has_events = True

    def _log(self, stall: Stall, where: str) -> None:
        now_ns = self._recorder.clock()
        if len(self._lines) == _LINES and now_ns - self._lines[0] < _LINES_NS:
            self._unsaid += 1
            return
        self._lines.append(now_ns)
        more = f" ({self._unsaid} more stalls since the last line)" if self._unsaid else ""
        self._unsaid = 0
        facts = "".join(f"; {fact}" for fact in stall.facts[:4])
        warn("stall: %s%s. Stacks of all threads: %s.%s", stall.sentence(), facts, where, more)

    def _say_end(self, found: Found) -> None:
        if found.span_id in self._told:  # Others were excused before they were said.
            self._told.discard(found.span_id)
            inform("stage %s goes on, or has ended.", found.site_name.decode("utf-8", "replace"))


class FirstStage:
    """Begins with the first stage: most children of a fork have none, and need no thread for it."""

    def __init__(self, stalls: Stalls, flight: Flight | None) -> None:
        self._stalls, self._flight = stalls, flight
        self._turn = threading.Lock()
        self._pid = os.getpid()

    def begin(self, record: StageRecord) -> None:
        """Begin to look, step aside, and note the stage."""
        before = record.recorder.flight
        try:
            if not self._turn.acquire(blocking=False) or self._pid != os.getpid():
                return  # Who comes meanwhile is not in the ring.
            self._stalls.begin(self._flight)
            flight = record.recorder.flight
        except BaseException as error:  # No memory, say: stages go on without.
            if is_the_programs(error):  # A signal handler's: the next stage begins it.
                self._turn, record.recorder.flight = threading.Lock(), before
                raise
            flight = record.recorder.flight = self._flight
            later("GPUSCOPE_STALL: nobody looks for stalls: %s.", shown(error))
        if flight is not None:
            flight.begin(record)

    def end(self, record: StageRecord, error: BaseException | None) -> None:
        """Do nothing: what has begun before is not in the ring."""


def attach(period: Period, collector: Collecting) -> None:
    """Have a period of recording looked at for stalls from its first stage on."""
    recorder = period.recorder
    try:
        stalls = recorder.stalls = Stalls(period, collector)
    except Exception as error:  # Whatever it is, stages go on without.
        if is_the_programs(error):
            raise
        later("GPUSCOPE_STALL: nobody looks for stalls: %s.", shown(error))
        return
    recorder.flight = FirstStage(stalls, recorder.flight)
