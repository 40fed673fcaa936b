"""
The hand-off from application threads to the collector.

Never waits, never logs, never raises, and never looks inside what it carries.

How a record gets in, told here for all who take part: a `Recorder` holds the queue's deque as `waiting` and its limit
as `capacity`, so that the hot path (`_recording.hot_path.end` and its twin in C) appends by itself while there is room.
A call of `put` would cost as much again as the append. The hot path calls `put` only where there is no room, and `put`
counts the refusal.

The same comparison starts the collector with the first record. A new recorder has a deque that stays empty, `capacity`
0, and a `StartingQueue` (`_collecting.engine`) for its queue. So the first record finds no room and comes to
`StartingQueue.put`, which starts the collector, steps aside through `Recorder.accept`, and puts the record into this
queue. A flag for whether it has started would do as well, but every stage would pay for looking at it. `accept` sets
`capacity` last, so no thread ever appends to the deque that nobody drains. Two threads may both come to
`StartingQueue.put`; the second finds the collector started, and accepts the same queue once more.

A queue of capacity 0 refuses everything. The child after a fork gives one to its parent's recorder.
"""

from __future__ import annotations

from collections import deque
from itertools import count, repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuscope._data.record import StageRecord


class RecordQueue:
    """A bounded queue that refuses the newest and counts what it refuses."""

    __slots__ = ("_count_refused", "capacity", "drained", "waiting")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.drained = 0
        self.waiting: deque[StageRecord] = deque()
        """The hot path appends here by itself while there is room: see above."""
        self._count_refused = count()

    def put(self, record: StageRecord) -> bool:
        """Take the record and return True, or count a refusal and return False."""
        # The length test and the append are two steps, so the queue can overshoot by one per thread. A lock would cost
        # ten times what the append does, and `queue.Queue` thirty times; the bound is a guard, not a promise.
        left: list[StageRecord | None] = [None, record]
        try:
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
        """Remove and return at most `limit` records, oldest first. For the collector's thread only."""
        take = min(limit, len(self.waiting))
        records = [self.waiting.popleft() for _ in range(take)]
        self.drained += take
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
