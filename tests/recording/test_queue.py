"""The queue of records and the account of bytes, by themselves."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from gpuscope._data.native import StageRecord
from gpuscope._recording.queue import FEW, SMALL_BYTES, ByteBudget, HeldAttributes, RecordQueue, hold, is_refused, tell


def record_with(budget, attributes=None):
    """Return a stage that was told something."""
    record = StageRecord()
    record.recorder, record.attributes = SimpleNamespace(budget=budget), attributes
    return record


def test_what_comes_first_is_drained_first():
    """So many at most; what is given up is gone, unread."""
    queue, records = RecordQueue(5), [StageRecord() for _ in range(7)]
    assert [queue.put(record) for record in records] == [True] * 5 + [False] * 2
    assert (len(queue), queue.stages, queue.refused) == (5, 5, 2)
    assert queue.drain(3) == records[:3]
    assert queue.put(records[5])
    assert queue.drain(10) == [*records[3:5], records[5]]
    assert queue.drain(10) == []
    queue.put(records[6])
    assert queue.give_up() == 1
    assert (len(queue), queue.refused) == (0, 2)


def test_the_collector_is_woken_once_when_half_of_the_queue_is_full():
    """And once more when that happens after somebody has drained it."""
    lengths = []
    queue = RecordQueue(8, lambda: lengths.append(len(queue)))
    for _ in range(10):
        queue.put(StageRecord())
    assert lengths == [4]
    queue.drain(8)
    for _ in range(6):
        queue.put(StageRecord())
    assert lengths == [4, 4]
    assert queue.refused == 2


@pytest.mark.parametrize("has_room", [True, False])
def test_a_record_whose_hand_off_is_interrupted_is_in_the_queue_or_counted(has_room):
    """Once, and the interrupt goes on."""

    class Limit:
        """Raises the first time that anybody compares with it."""

        interrupts = True

        def __floordiv__(self, other):
            """Leave half of it out of this test."""
            return 10

        def __gt__(self, length):
            """Be interrupted, or answer."""
            if self.interrupts:
                self.interrupts = False
                raise KeyboardInterrupt
            return has_room

    queue = RecordQueue(Limit())
    with pytest.raises(KeyboardInterrupt):
        queue.put(StageRecord())
    assert (len(queue), queue.refused) == (has_room, not has_room)


def test_bytes_are_held_as_long_as_anybody_has_them():
    """Up to the limit, to the byte."""
    budget = ByteBudget(100)
    first, second = budget.take(60), budget.take(40)
    assert (budget.used, budget.has_refused) == (100, False)
    assert budget.take(1) is None
    assert (budget.used, budget.has_refused) == (100, True)
    del first
    assert budget.used == 40
    assert second.size == 40
    del second
    assert budget.used == 0
    assert not budget._notes


def test_an_account_that_another_thread_counts_is_answered_at_once():
    """With what was known, and that thread goes on."""
    budget, counts, go_on = ByteBudget(100), threading.Event(), threading.Event()

    def count():
        with budget._lock:
            counts.set()
            assert go_on.wait(60)

    other = threading.Thread(target=count)
    other.start()
    assert counts.wait(60)
    held = budget.take(60)
    assert budget.used == 0
    go_on.set()
    other.join()
    assert (budget.used, held.size) == (60, 60)


@pytest.mark.parametrize(
    ("size", "told", "weighed"),
    [(SMALL_BYTES - 1, FEW - 1, False), (SMALL_BYTES, 0, True), (0, FEW, True)],
)
def test_only_what_is_large_or_much_is_weighed(size, told, weighed):
    """The rest is bounded by the number of stages."""
    budget = ByteBudget(10_000)
    record = record_with(budget, {"a": 1})
    assert hold(record, size, told=told)
    assert record.attributes == {"a": 1}
    assert (type(record.attributes) is HeldAttributes) is weighed
    assert budget.used == size * weighed
    assert not is_refused(record)


def test_what_a_stage_was_told_is_held_together():
    """Each part counts, and goes with the stage."""
    budget = ByteBudget(10_000)
    record = record_with(budget)
    tell(record, {"small": 1})
    assert type(record.attributes) is dict
    for number in range(3):
        tell(record, {f"large {number}": "x" * 1000})
    assert list(record.attributes) == ["small", "large 0", "large 1", "large 2"]
    assert record.attributes.size == budget.used >= 3000
    record.attributes = None
    assert budget.used == 0


def test_a_stage_without_room_keeps_nothing():
    """Neither what it was told before, nor what it is told later."""
    budget = ByteBudget(1500)
    record = record_with(budget)
    for _ in range(2):
        tell(record, {"large": "x" * 1000})
    assert is_refused(record)
    assert record.attributes == {}
    assert budget.used == 0
    assert not hold(record, 1000)
    assert budget.used == 0
