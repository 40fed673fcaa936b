"""Anchors on a GPU that answers as late as it is told: which event is whose time, and which of several is kept."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import time

import pytest

from gpuscope._cuda.anchors import Anchors
from gpuscope._cuda.driver import NOT_READY, SUCCESS

US, MS = 1_000, 1_000_000
REFUSED = 999
STREAM_OF = {0xC0: 0x50, 0xC1: 0x51}
"""The stream that is made in each context."""


class LateGpu:
    """A driver and a reader in one: the next of `answers_after` says how late it answers a record, in nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 10**12
        self.answers_after = []
        self.recorded = {}
        """Per event, the host times before its last record and after its completion."""
        self.records = []
        """Event and stream of each record, refused ones included."""
        self.limits = set()
        self.held_ns, self.holds_all = 0, True
        """How long a record waits for the driver's lock; each, or the next one."""
        self.context, self.events = None, 0
        self.in_a_row = []
        """How long recording one took and how far neighbours are apart, in nanoseconds, per row; None: not in time."""
        self.rows = []
        """The events and the stream of each row."""

    def now(self):
        """Read the clock of the host."""
        return self.now_ns

    # ---- the driver

    @contextlib.contextmanager
    def current(self, context):
        """Make a context current."""
        self.context = context
        yield
        self.context = None

    def new_event(self):
        """Make an event."""
        assert self.context is not None
        self.events += 1
        return ctypes.c_void_p(self.events)

    def new_stream(self):
        """Make a stream, another one in each context."""
        return ctypes.c_void_p(STREAM_OF[self.context.value])

    def event_record(self, event, stream):
        """Record, or refuse where the answer is None."""
        assert self.context is not None
        self.records.append((event.value, stream.value))
        self.now_ns += self.held_ns
        self.held_ns = self.held_ns if self.holds_all else 0
        late_ns = self.answers_after.pop(0) if self.answers_after else 4 * US
        if late_ns is None:
            return REFUSED
        self.recorded[event.value] = (self.now_ns, self.now_ns + late_ns)
        return SUCCESS

    def event_query(self, event):
        """Answer; half a microsecond passes, or what is missing to the answer."""
        done_ns = self.recorded[event.value][1]
        if self.now_ns >= done_ns:
            return SUCCESS
        self.now_ns = min(self.now_ns + max(US // 2, (done_ns - self.now_ns) // 2), done_ns)
        return NOT_READY

    # ---- the reader

    def bracket(self, event, stream, limit_ns):
        """Do the same as the twin in Python."""
        self.limits.add(limit_ns)
        if self.event_record(ctypes.c_void_p(event), ctypes.c_void_p(stream)) != SUCCESS:
            return None
        before_ns, after_ns = self.recorded[event]
        self.now_ns = min(after_ns, before_ns + limit_ns + 1)
        return (before_ns, after_ns) if after_ns - before_ns <= limit_ns else None

    def spacing(self, events, stream, limit_ns):
        """Tell the next of `in_a_row`."""
        assert self.context is not None
        self.rows.append((struct.unpack(f"={len(events) // 8}Q", events), stream))
        host_ns, *apart_ns = (self.in_a_row.pop(0) if self.in_a_row else None) or [0]
        return (host_ns, tuple(each / 1e6 for each in apart_ns)) if apart_ns else None


@pytest.fixture
def gpu():
    """A GPU that answers after 4 µs until it is told otherwise."""
    return LateGpu()


@pytest.fixture(params=["reader", "twin"])
def take(request, gpu):
    """Return a function that takes an anchor, with the reader or with its twin."""
    anchors = Anchors(gpu, gpu if request.param == "reader" else None, clock=gpu.now)

    def take(*answers_after, keep=None, device=0):
        gpu.answers_after = list(answers_after)
        anchor = anchors.take(device, ctypes.c_void_p(0xC0 + device), keep)
        gpu.now_ns += MS
        return anchor

    return take


def bracket_of(anchor):
    """Host times before and after, as far as an anchor tells them."""
    return anchor.host_ns - anchor.half_ns, anchor.host_ns + anchor.half_ns


@pytest.mark.parametrize("tightest", range(5))
def test_an_anchor_has_the_time_of_its_own_event(gpu, take, tightest):
    """Whichever of five tries is kept, its event was recorded then and not again."""
    for _ in range(20):
        answers_after = [9 * US] * 5
        answers_after[tightest] = 3 * US
        anchor = take(*answers_after)
        before_ns, after_ns = gpu.recorded[anchor.event.value]
        assert (before_ns, after_ns) == bracket_of(anchor)
        assert after_ns - before_ns == 3 * US


def test_five_tries_use_five_events(gpu, take):
    """No try records over the event of another one."""
    take()
    assert len({event for event, _ in gpu.records}) == len(gpu.records) == 5


def test_the_first_of_equal_tries_is_kept(gpu, take):
    """A later one that is not tighter is not a reason to change."""
    assert take().event.value == gpu.records[0][0]


def test_the_event_of_the_anchor_before_is_not_recorded_again(gpu, take):
    """The distance between two anchors is that of their own events, however many follow each other."""
    keep, used = None, set()
    for number in range(40):
        answers_after = [9 * US] * 5
        answers_after[number * 3 % 5] = 3 * US
        anchor = take(*answers_after, keep=keep)
        if keep is not None:
            assert gpu.recorded[keep.event.value] == bracket_of(keep)
            assert anchor.event is not keep.event
        used.add(anchor.event.value)
        keep = anchor
    assert gpu.events - len({event for events, _ in gpu.rows for event in events}) == 6
    assert len(used) > 1


def test_half_of_a_bracket_is_rounded_up(take):
    """The true time is never further from the middle than is stated."""
    anchor = take(*[3_001] * 5)
    assert anchor.half_ns == 1_501
    assert take(*[3_002] * 5).half_ns == 1_501


@pytest.mark.parametrize(("late_ns", "tries"), [(200 * US, 5), (200 * US + 2, 1)])
def test_tries_end_where_the_gpu_is_busy(gpu, take, late_ns, tries):
    """An event that took longer than 200 µs is taken as it is."""
    anchor = take(*[late_ns] * 5)
    assert anchor.half_ns <= late_ns // 2
    assert len(gpu.records) == tries


def test_tries_end_with_the_first_that_is_refused(gpu, take):
    """A refusal ends the tries, and what was read before it is kept."""
    assert take(None) is None
    assert len(gpu.records) == 1
    anchor = take(5 * US, None)
    assert anchor.half_ns == 2_500
    assert len(gpu.records) == 3


def test_event_that_takes_too_long_is_given_up(gpu, take):
    """An answer is waited for 50 ms; after each that did not come twice as long, up to 200 ms; then 50 ms again."""
    assert take(50 * MS) is not None
    for limit_ms in (50, 100, 200, 200):
        started_ns = gpu.now_ns
        assert take((limit_ms + 10) * MS) is None
        assert gpu.now_ns - started_ns < (limit_ms + 10) * MS
    assert take(190 * MS) is not None
    assert take(60 * MS) is None
    assert gpu.limits <= {50 * MS, 100 * MS, 200 * MS}


def test_a_record_that_waits_for_the_drivers_lock_does_not_widen_the_bracket(gpu):
    """As during a copy from pageable memory: the event is not done when the record returns, and soon after that."""
    gpu.held_ns, gpu.answers_after = 60 * MS, [4 * US]
    anchor = Anchors(gpu, clock=gpu.now).take(0, ctypes.c_void_p(0xC0))
    before_ns, after_ns = bracket_of(anchor)
    assert before_ns <= gpu.recorded[anchor.event.value][1] <= after_ns
    assert 2 * anchor.half_ns < 10 * US


def test_an_event_that_is_done_when_a_held_record_returns_is_recorded_again(gpu):
    """It may have been done at any time of the wait. The lock is free now, for a while."""
    gpu.held_ns, gpu.holds_all, gpu.answers_after = 25 * MS, False, [0, 4 * US]
    anchor = Anchors(gpu, clock=gpu.now).take(0, ctypes.c_void_p(0xC0))
    before_ns, after_ns = bracket_of(anchor)
    assert before_ns <= gpu.recorded[anchor.event.value][1] <= after_ns
    assert 2 * anchor.half_ns < 10 * US


def test_a_lock_that_is_always_held_has_few_records(gpu):
    """Three, and the tightest anchor is as wide as its wait."""
    gpu.held_ns, gpu.answers_after = 25 * MS, [0, 0, 0]
    anchor = Anchors(gpu, clock=gpu.now).take(0, ctypes.c_void_p(0xC0))
    assert len(gpu.records) == 3
    assert anchor.half_ns == pytest.approx(12.5 * MS, abs=US)


def test_what_was_waited_for_is_bracketed_by_the_last_two_questions(gpu):
    """An event that waits for the program's work is placed as well as it was asked about, however long it took."""
    gpu.answers_after = [30 * MS]
    anchor = Anchors(gpu, clock=gpu.now).take(0, ctypes.c_void_p(0xC0))
    before_ns, after_ns = bracket_of(anchor)
    assert before_ns <= gpu.recorded[anchor.event.value][1] <= after_ns
    assert 2 * anchor.half_ns < 10 * US


def test_each_device_has_a_stream_and_events_of_its_own(gpu, take):
    """They are made once, in the device's context, which is current during the tries alone."""
    for _ in range(3):
        take()
        take(device=1)
    assert {stream for _, stream in gpu.records} == set(STREAM_OF.values())
    on_first, on_second = ({event for event, at in gpu.records if at == stream} for stream in STREAM_OF.values())
    assert not on_first & on_second
    assert gpu.events - len({event for events, _ in gpu.rows for event in events}) == 12
    assert gpu.context is None


def test_what_a_pair_of_events_takes_is_the_median_of_a_row(gpu, take):
    """Recorded on the private stream, on events of their own; it is measured with the first anchors alone."""
    gpu.in_a_row = [[1_400, 2_800, 2_900, 9_000]] * 20
    costs = [take().event_cost_ns for _ in range(12)]
    if gpu.rows:
        assert costs == [2_900] * 8 + [0] * 4
        assert {stream for _, stream in gpu.rows} == {0x50}
        assert len({event for events, _ in gpu.rows for event in events}) == 33
        assert not {event for events, _ in gpu.rows for event in events} & {event for event, _ in gpu.records}
    else:
        assert costs == [0] * 12  # Without the parts in C.


@pytest.mark.parametrize(
    "row", [None, [2_800, 2_800, 2_900, 3_000], [1_400, 10_001, 10_001, 10_001]], ids=["late", "slow host", "held up"]
)
def test_what_events_take_stays_unknown(gpu, take, row):
    """The GPU was not behind the host, or something else took its time; the anchor is none the worse."""
    gpu.in_a_row = [row]
    anchor = take()
    assert (anchor.half_ns, anchor.event_cost_ns) == (2 * US, 0)


@pytest.mark.parametrize(("late_us", "yields"), [(99, False), (300, True)])
def test_other_threads_run_while_the_gpu_is_late(gpu, monkeypatch, late_us, yields):
    """The twin sleeps between two questions once an answer takes longer than 100 µs, for 20 µs each time."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    gpu.answers_after = [late_us * US] * 5
    Anchors(gpu, clock=gpu.now).take(0, ctypes.c_void_p(0xC0))
    assert set(slept) == ({20e-6} if yields else set())
