"""
The flight recorder's ring: the newest stages, in a file that is mapped into memory. The twin in C is `csrc/flight.c`.

What is in the mapping belongs to the kernel, so it is there whatever ends the process: no signal is handled, and
nothing is flushed. A stage has one record, which gets its end where it stands. A record of a stage that still runs is
stepped over when the ring comes round, so that what hangs is still there an hour later. The ring is two, one half each:
what the collector writes, perhaps late and much at once, takes no place of what stages write. Nothing here raises into
a stage.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from gpuscope._data import flight as layout
from gpuscope._data.native import native
from gpuscope._interrupts import is_the_programs

if TYPE_CHECKING:
    from gpuscope._data.record import Site, StageRecord, ThreadInfo

_FIELDS = 7


class Running:
    """A stage that runs, for what looks for stalls without the parts in C."""

    __slots__ = ("active_ns", "calls", "outer", "record_ids", "said", "site", "start_ns", "thread")

    def __init__(self, record: StageRecord, outer: Running | None, calls: int) -> None:
        self.record_ids = record.trace.trace_id, record.span_id
        self.site, self.thread, self.outer, self.calls = record.site, record.thread, outer, calls
        self.start_ns = self.active_ns = record.start_ns
        """The second: when it or a stage inside it last began or ended."""
        self.said = False


class Ring(Protocol):
    """The ring of one process and one period of recording."""

    def begin(self, record: StageRecord) -> None:
        """Note that a stage has begun."""

    def end(self, record: StageRecord, error: BaseException | None) -> None:
        """Note that a stage has ended; a slow request, or one that an exception leaves, asks for a dump."""

    def write(self, records: bytes) -> None:
        """Write whole records, whose words lack lap and check."""

    def site(self, site: Site) -> int:
        """Return the number of a stage's name, and have that in the file."""

    def thread(self, thread: ThreadInfo) -> int:
        """Return a thread's ident, and have its name in the file."""

    def take_wanted(self) -> int:
        """Return why a dump is wanted, as bits, and forget it."""

    def close(self) -> None:
        """Let go of the file."""


class RingInPython:
    """
    The twin.

    Args:
        file: the mapped file.
        slow_ns: from how long on a request asks for a dump; 0 for none.

    """

    def __init__(self, file: Any, slow_ns: int) -> None:
        self._file: Any = file
        self._pid = os.getpid()
        """Of the process whose ring it is; a library may fork without Python's knowledge."""
        self._count = (len(file) - layout.RING_AT) // layout.SLOT_BYTES // 2
        """Of each half."""
        if not self._count:
            raise ValueError("no room for a ring")
        self._slow_ns = slow_ns
        self._places = itertools.count(), itertools.count()
        """Each is given to one record: to take the next is one step, so that no two threads have the same."""
        self._wanted = 0
        self._sites: dict[Site, int] = {}
        self._threads: dict[ThreadInfo, int] = {}
        self._thread_count = 0
        self.running: dict[int, Running] | None = None
        """By their places, the stages that run; None where nobody wants to know."""
        self.calls: Counter[Site] = Counter()
        """How often each stage has begun since somebody wanted to."""

    def begin(self, record: StageRecord) -> None:
        """As in `Ring`."""
        try:
            record.flight = self._write(self._fields(record), self._word(record))
            if self.running is not None:
                self._note_running(self.running, record)
        except Exception as error:  # A ring that was closed meanwhile, or fields that a program has changed.
            if is_the_programs(error):  # Or one of a signal handler's.
                raise

    def end(self, record: StageRecord, error: BaseException | None) -> None:
        """As in `Ring`."""
        try:
            if record.flight is not None:
                self._end(record, error)
        except BaseException as failure:  # As above.
            if is_the_programs(failure):  # It ends nevertheless: who catches that calls again.
                raise
            record.flight = None

    def write(self, records: bytes) -> None:
        """As in `Ring`."""
        try:
            for *fields, word in layout.SLOT.iter_unpack(records):
                self._write(tuple(fields), word, 1)
        except Exception as error:  # As above; a flush may write on the program's thread.
            if is_the_programs(error):
                raise

    def site(self, site: Site) -> int:
        """As in `Ring`."""
        number = self._sites.get(site)
        if number is None:
            if len(self._sites) == layout.SITES - 1:
                return 0
            number = self._sites.setdefault(site, len(self._sites) + 1)
            write_text(self._file, layout.SITES_AT + number * layout.SITE_BYTES, site.name, layout.SITE_BYTES)
        return number

    def thread(self, thread: ThreadInfo) -> int:
        """As in `Ring`."""
        ident = self._threads.get(thread)
        if ident is None:
            if self._thread_count and self._thread_count % layout.THREADS == 0:
                self._threads.clear()
            at = layout.THREADS_AT + self._thread_count % layout.THREADS * layout.THREAD_BYTES
            self._thread_count += 1
            ident = self._threads[thread] = thread.ident & layout.LOW_64
            layout.NUMBER.pack_into(self._file, at, ident)
            write_text(self._file, at + 8, thread.name, layout.THREAD_BYTES - 8)
        return ident

    def take_wanted(self) -> int:
        """As in `Ring`."""
        wanted, self._wanted = self._wanted, 0
        return wanted

    def want(self, why: int) -> None:
        """Ask for a dump: in a signal handler."""
        self._wanted |= why

    def close(self) -> None:
        """As in `Ring`."""
        self._file = None

    def _end(self, record: StageRecord, error: BaseException | None) -> None:
        at: Any = record.flight
        if self.running is not None and (ran := self.running.pop(at, None)) and ran.outer is not None:
            ran.outer.active_ns = max(ran.outer.active_ns, record.end_ns)
        ns, failed = max(0, record.end_ns - record.start_ns), error is not None
        end = ns << 2 | failed << 1 | 1
        if self._is_of(at, record) and os.getpid() == self._pid:
            layout.NUMBER.pack_into(self._file, at + layout.END_AT, end)
        else:
            self._write(self._fields(record, end), self._word(record))
        record.flight = None
        if record.outer is None:
            why = layout.SLOW if self._slow_ns and ns >= self._slow_ns else 0
            why |= layout.FAILED if isinstance(error, Exception) else 0
            if why:
                self._mark(record, why, ns)

    def _note_running(self, running: dict[int, Running], record: StageRecord) -> None:
        at, outer = record.flight, record.outer
        around = None if outer is None or outer.flight is None else running.get(outer.flight)
        if around is not None:
            around.active_ns = max(around.active_ns, record.start_ns)
        self.calls[record.site] += 1
        if at is not None:
            running[at] = Running(record, around, self.calls[record.site])

    def _fields(self, record: StageRecord, end: int = 0) -> tuple[int, ...]:
        trace, outer = record.trace, record.outer
        trace_id, parent_id = trace.trace_id, trace.parent_id if outer is None else outer.span_id
        high, low, thread = trace_id >> 64, trace_id & layout.LOW_64, self.thread(record.thread)
        return high, low, record.span_id, parent_id, record.start_ns & layout.LOW_64, end, thread

    def _word(self, record: StageRecord) -> int:
        flags = layout.REMOTE if record.outer is None and record.trace.remote else 0
        return layout.STAGE | flags << layout.FLAGS_AT | self.site(record.site) << layout.SITE_AT

    def _mark(self, record: StageRecord, why: int, ns: int) -> None:
        high, low, span_id, _, start_ns, _, thread = self._fields(record)
        word = self._word(record) & ~15 | layout.MARK
        self._write((high, low, span_id, why, start_ns, ns, thread), word)
        self._wanted |= why

    def _write(self, fields: tuple[int, ...], word: int, half: int = 0) -> int:
        """Write a record into the next slot of the stages' half, or the collector's, and return where that is."""
        if os.getpid() != self._pid:
            raise ProcessLookupError
        lap, at = self._take_slot(half)
        # As in C: whatever ends the process, the word is there last.
        layout.NUMBER.pack_into(self._file, at + _FIELDS * 8, 0)
        word = layout.checked(fields, word | lap % layout.LAPS << layout.LAP_AT)
        layout.SLOT.pack_into(self._file, at, *fields, word)
        return at

    def _take_slot(self, half: int) -> tuple[int, int]:
        for skipped, place in enumerate(self._places[half]):
            lap, slot = divmod(place, self._count)
            at = layout.RING_AT + (slot + half * self._count) * layout.SLOT_BYTES
            *fields, word = layout.SLOT.unpack_from(self._file, at)
            if word & 15 != layout.STAGE or fields[5] or skipped == layout.MOST_SKIPPED:
                break
        return lap, at

    def _is_of(self, at: int, record: StageRecord) -> bool:
        _, _, span_id, _, start_ns, end, _, word = layout.SLOT.unpack_from(self._file, at)
        own = record.span_id, record.start_ns & layout.LOW_64, 0, layout.STAGE
        return (span_id, start_ns, end, word & 15) == own


def write_text(file: Any, at: int, text: str, room: int) -> None:
    """Write text as the file has it: its length in 4 bytes, which are written last, and UTF-8."""
    letters = layout.cut(text, room - 4)
    layout.LENGTH.pack_into(file, at, 0)
    file[at + 4 : at + 4 + len(letters)] = letters
    layout.LENGTH.pack_into(file, at, len(letters))


def make_ring(file: Any, slow_ns: int) -> Ring:
    """Return the ring of a mapped file, in C where that was built."""
    ring: Ring = (RingInPython if native is None else native.FlightRing)(file, slow_ns)
    return ring
