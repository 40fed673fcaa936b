"""
The hand-off from application threads to the collector.

Never waits, never logs, never raises, and never looks inside what it carries.
"""

from __future__ import annotations

from collections import deque
from itertools import count
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
        """The hot path appends here itself while there is room: a call would cost as much again."""
        self._count_refused = count()

    def put(self, record: StageRecord) -> bool:
        """Take the record and return True, or count a refusal and return False."""
        # The length test and the append are two steps, so the queue can overshoot by one per
        # thread. A lock would cost ten times what the append does; the bound is a guard, not a promise.
        if len(self.waiting) < self.capacity:
            self.waiting.append(record)
            return True
        next(self._count_refused)
        return False

    def drain(self, limit: int) -> list[StageRecord]:
        """Remove and return at most `limit` records, oldest first. For the collector's thread alone."""
        take = min(limit, len(self.waiting))
        records = [self.waiting.popleft() for _ in range(take)]
        self.drained += take
        return records

    def give_up(self) -> int:
        """Remove all records, unread, and return how many that were."""
        return len(self.drain(len(self)))

    @property
    def stages(self) -> int:
        """The records waiting."""
        return len(self.waiting)

    def __len__(self) -> int:
        """The records waiting."""
        return len(self.waiting)

    @property
    def refused(self) -> int:
        """How many records were refused since the start."""
        # `next(count)` is atomic where `+= 1` is not; what it has come to shows only in its repr, "count(5)".
        return int(repr(self._count_refused)[6:-1])
