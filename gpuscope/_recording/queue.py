"""
The hand-off from application threads to the collector.

Never waits, never logs, never raises, and never looks inside what it carries.

How a record gets in, told here for all who take part: a `Recorder` holds the queue's deque as `waiting` and as
`capacity` half of its limit, so that the hot path (`_recording.hot_path.end` and its twin in C) appends by itself while
the queue is less than half full. A call of `put` would cost as much again as the append. From then on the hot path
calls `put`, which wakes the collector, and counts the refusal where there is no room at all.

The same comparison starts the collector with the first record. A new recorder has a deque that stays empty, `capacity`
0, and a `StartingQueue` (`_collecting.engine`) for its queue. So the first record finds no room and comes to
`StartingQueue.put`, which starts the collector, steps aside through `Recorder.accept`, and puts the record into this
queue. A flag for whether it has started would do as well, but every stage would pay for looking at it. `accept` sets
`capacity` last, so no thread ever appends to the deque that nobody drains. Two threads may both come to
`StartingQueue.put`; the second finds the collector started, and accepts the same queue once more.

A queue of capacity 0 refuses everything. The child after a fork gives one to its parent's recorder.

Bytes are bounded as well, but not here, where each stage would pay for being weighed. What is large is weighed when a
stage is told it (`hold`). A stage for which there is no room loses it at once, and the collector drops the stage.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import deque
from itertools import count, repeat
from threading import RLock
from typing import TYPE_CHECKING, Any

from gpuscope._data.plain.descriptions import size_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import StageRecord

SMALL_BYTES, FEW = 256, 32
"""What is smaller is not weighed, of the first so many attributes: the limit of stages bounds it well enough."""


class RecordQueue:
    """
    A bounded queue that refuses the newest and counts what it refuses.

    Args:
        capacity: how many records may wait.
        wake: has somebody drain the queue; called once, when half of the capacity is reached, until that was done.

    """

    __slots__ = ("_count_refused", "_is_told", "_wake", "capacity", "half", "waiting")

    def __init__(self, capacity: int, wake: Callable[[], object] = lambda: None) -> None:
        self.capacity = capacity
        self.half = capacity // 2
        """So many may come in without `put`."""
        self._wake, self._is_told = wake, False
        self.waiting: deque[StageRecord] = deque()
        """The hot path appends here by itself while there is room: see above."""
        self._count_refused = count()

    def put(self, record: StageRecord) -> bool:
        """Take the record and return True, or count a refusal and return False."""
        # The length test and the append are two steps, so the queue can overshoot by one per thread. A lock would cost
        # ten times what the append does, and `queue.Queue` thirty times; the bound is a guard, not a promise.
        left: list[StageRecord | None] = [None, record]
        try:
            if not self._is_told and len(self.waiting) >= self.half:
                self._is_told = True
                self._wake()
            return self._put(left)
        except BaseException:  # An interrupt, which goes on; the record is counted all the same.
            if len(left) > 1:
                self._put(left)
            raise

    def _put(self, left: list[StageRecord | None]) -> bool:
        """Take the record out of the list and count it, in one step that no interrupt can divide."""
        if len(self.waiting) < self.capacity:
            self.waiting.extend(iter(left.pop, None))
            return True
        deque(map(next, repeat(self._count_refused), iter(left.pop, None)), 0)
        return False

    def drain(self, limit: int) -> list[StageRecord]:
        """Remove and return at most `limit` records, oldest first. For the collector, or who closes the account."""
        self._is_told = False
        records: list[StageRecord] = []
        with contextlib.suppress(IndexError):  # A signal handler has closed the account since their number was asked.
            records.extend(map(deque.popleft, repeat(self.waiting, min(limit, len(self.waiting)))))
        return records

    def give_up(self) -> int:
        """Remove all records unread, and return how many there were."""
        return len(self.drain(len(self)))

    @property
    def stages(self) -> int:
        """How many records wait."""
        return len(self.waiting)

    def __len__(self) -> int:
        """Return how many records wait."""
        return len(self.waiting)

    @property
    def refused(self) -> int:
        """How many records were refused since the start."""
        # `next(count)` is atomic where `+= 1` is not. Where it stands shows only in its repr, "count(5)".
        return int(repr(self._count_refused)[6:-1])


class ByteBudget:
    """
    The bytes of attributes that wait in the queue, with the collector or for an encoder, up to a limit.

    No method waits, because a stage may be told something in a signal handler, and attributes may be freed by the
    garbage collector, inside whatever runs.
    """

    __slots__ = ("_changes", "_lock", "_notes", "_used", "has_refused", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.has_refused = False
        """Whether some stage was refused, so that the collector has to look for such stages."""
        self._used = 0
        self._changes: deque[int | _Note] = deque()
        self._notes: set[_Note] = set()
        self._lock = RLock()

    @property
    def used(self) -> int:
        """How many bytes are held. Where another thread is counting, how many there were."""
        lock = self._lock
        inside = lock._is_owned()  # type: ignore[attr-defined]  # `threading.Condition` asks so, too.
        try:
            if not inside and lock.acquire(blocking=False):
                while self._changes:
                    change = self._changes.popleft()
                    if isinstance(change, int):
                        self._used += change
                    else:
                        self._used -= change.size
                        self._notes.discard(change)
        finally:
            # Asked again, because an interrupt may come just after the lock was taken.
            if not inside and lock._is_owned():  # type: ignore[attr-defined]
                lock.release()
        return self._used

    def take(self, size: int) -> Hold | None:
        """Count so many bytes as held until the result is freed; None where that would exceed the limit."""
        if self.used + size > self.limit:
            self.has_refused = True
            return None
        held = Hold(size)
        note = _Note(held, self._changes.append)
        note.size = size
        self._notes.add(note)
        self._changes.append(size)
        return held


class Hold:
    """Bytes that are held as long as this object lives."""

    __slots__ = ("__weakref__", "size")

    def __init__(self, size: int) -> None:
        self.size = size


class _Note(weakref.ref[Hold]):
    """
    Tells the account when a hold is freed.

    By a function in C: in a `__del__`, Python would swallow what the program's signal handler raises.
    """

    __slots__ = ("size",)
    size: int


class HeldAttributes(dict[str, Any]):
    """The attributes of a stage that was told something large."""

    __slots__ = ("holds",)
    holds: list[Hold] | None
    """None if there was no room: the stage is to be dropped."""

    @property
    def size(self) -> int:
        """How many bytes were weighed."""
        return sum(hold.size for hold in self.holds or ())


def hold(record: StageRecord, size: int, *, told: int = 0) -> bool:
    """
    Count bytes that a stage was told, and return whether there is room for them.

    Args:
        record: the stage.
        size: the bytes.
        told: how many things of this kind the stage was told before.

    """
    attributes = record.attributes
    if size < SMALL_BYTES and told < FEW:
        return True
    if type(attributes) is not HeldAttributes:
        record.attributes = attributes = HeldAttributes(attributes or ())
        attributes.holds = []
    holds = attributes.holds
    held = None if holds is None else record.recorder.budget.take(size)
    if holds is None or held is None:
        attributes.clear()
        attributes.holds = None
        return False
    holds.append(held)
    return True


def tell(record: StageRecord, attributes: dict[str, Any]) -> None:
    """Add attributes, which are snapshots, to those of a stage."""
    size = sum(size_of(key) + size_of(value) for key, value in attributes.items())
    if hold(record, size, told=len(record.attributes or ())):
        if record.attributes is None:
            record.attributes = {}
        record.attributes.update(attributes)


def said_of(attributes: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the program said of a stage, without what was found of one run."""
    # Whoever found something has imported the names; `import gpuscope` does without them.
    names = sys.modules.get("gpuscope._data.attributes")
    if not attributes or names is None or names.OF_ONE_RUN.isdisjoint(attributes):
        return attributes
    return {key: value for key, value in attributes.items() if key not in names.OF_ONE_RUN}


def is_refused(record: StageRecord) -> bool:
    """Tell whether there was no room for what the stage was told."""
    return type(record.attributes) is HeldAttributes and record.attributes.holds is None
