"""The arithmetic of placing GPU events in host time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._cuda.clock import MAX_ANCHOR_AGE_NS, GpuClock
from gpuscope._data.interfaces import Anchor


class Gpu:
    """A GPU clock with a drift, read as CUDA gives it: 32-bit floats of milliseconds."""

    def __init__(self, drift_ppm: float, half_ns: int) -> None:
        """Choose the drift against the host, and the half-width of brackets."""
        self.drift, self.half_ns = drift_ppm * 1e-6, half_ns

    def gpu_ns(self, host_ns: float) -> float:
        """GPU time at a host time."""
        return host_ns / (1 + self.drift)

    def elapsed_ms(self, first_host_ns: float, second_host_ns: float) -> float:
        """What `cuEventElapsedTime` would answer."""
        return float(np.float32((self.gpu_ns(second_host_ns) - self.gpu_ns(first_host_ns)) / 1e6))

    def anchor(self, host_ns: int, error: float) -> Anchor:
        """An anchor whose midpoint is off by a part of the half bracket."""
        return Anchor(host_ns, host_ns + round(error * self.half_ns), self.half_ns)


drifts = st.floats(-45, 45)
errors = st.floats(-1, 1)


@settings(max_examples=150, deadline=None)
@given(drift=drifts, error=errors, seed=st.randoms(use_true_random=False), half=st.integers(500, 20_000))
def test_every_stage_is_placed_within_the_stated_uncertainty(drift, error, seed, half):
    """Over a minute of renewed anchors, the true start and end lie within the uncertainty that is exported."""
    gpu, clock, now = Gpu(drift, half), GpuClock(), 10**12
    for _ in range(120):
        now += seed.randrange(1, 10**9)
        if clock.is_due(now):
            anchor = gpu.anchor(now, error * seed.choice((-1, 1)))
            before = clock.anchor
            clock.calibrate(anchor, gpu.elapsed_ms(before.event, anchor.event) if before else None)
        length = seed.randrange(1_000, 10**8)
        start, end = now - length, now
        placed = clock.place(gpu.elapsed_ms(clock.anchor.event, end), gpu.elapsed_ms(start, end))
        start_ns, end_ns, uncertainty_ns = placed
        assert abs(end_ns - end) <= uncertainty_ns + 5
        assert abs(start_ns - start) <= uncertainty_ns + 5


@given(first=st.floats(0, 7000), gap=st.floats(0.01, 500), duration=st.floats(0.001, 100))
def test_order_is_kept(first, gap, duration):
    """Of two stages placed by one anchor the later is placed later."""
    clock = GpuClock()
    clock.calibrate(Anchor("a", 10**12, 3_500), None)
    assert clock.place(first, duration)[1] < clock.place(first + gap, duration)[1]


def test_drift_is_known_after_two_anchors():
    """The slope between anchors corrects the placement: 40 µs in 30 s without it."""
    gpu, clock = Gpu(1.5, 3_500), GpuClock()
    first, second = gpu.anchor(10**12, 0.0), gpu.anchor(10**12 + 8 * 10**9, 0.0)
    clock.calibrate(first, None)
    clock.calibrate(second, gpu.elapsed_ms(first.event, second.event))
    assert clock.drift[0] == pytest.approx(1.5e-6, abs=2e-7)


def test_anchors_are_renewed_soon_at_first_and_every_eight_seconds_later():
    """The age at which an anchor is renewed grows from 50 ms to eight seconds."""
    clock, now, ages = GpuClock(), 10**12, []
    for _ in range(10):
        clock.calibrate(Anchor("a", now, 3_500), None)
        age = 0
        while not clock.is_due(now + age):
            age += 10_000_000
        ages.append(age)
        now += age
    assert ages[0] <= 60_000_000
    assert ages == sorted(ages)
    assert ages[-1] <= MAX_ANCHOR_AGE_NS + 100_000_000


def test_anchor_that_was_held_up_is_not_taken():
    """While the anchor before still tells the time better, it stays, and another attempt is made soon."""
    clock, now = GpuClock(), 10**12
    good, late = Anchor("good", now, 3_500), Anchor("late", now + 10**9, 20_000_000)
    clock.calibrate(good, None)
    clock.calibrate(late, 1000.0)
    assert clock.anchor is good
    assert clock.is_due(late.host_ns + 50_000_000)
    assert clock.place(1000.0, 1.0)[2] < 100_000


def test_attempts_become_rare_where_every_bracket_is_wide():
    """On a GPU that always answers late the attempts do not keep the collector busy."""
    clock, now, attempts = GpuClock(), 10**12, 0
    for _ in range(1000):
        now += 50_000_000
        if clock.is_due(now):
            attempts += 1
            clock.calibrate(Anchor(attempts, now, 2_000_000), None if attempts == 1 else 50.0)
    assert 5 < attempts < 25


def test_long_pause_starts_the_drift_anew():
    """After an hour without stages the distance between anchors is too coarse to tell a drift from."""
    clock = GpuClock()
    clock.calibrate(Anchor("a", 10**12, 3_500), None)
    clock.calibrate(Anchor("b", 10**12 + 3600 * 10**9, 3_500), 3_600_000.25)
    assert clock.drift[0] == 0.0


@pytest.mark.parametrize(("elapsed_ms", "believed"), [(500.0, False), (998.9, False), (999.1, True), (1001.1, False)])
def test_implausible_drift_is_not_believed(elapsed_ms, believed):
    """A reading that would mean thousands of parts per million is an error of measurement."""
    clock = GpuClock()
    clock.calibrate(Anchor("a", 10**12, 3_500), None)
    clock.calibrate(Anchor("b", 10**12 + 10**9, 3_500), elapsed_ms)
    assert (clock.drift[0] != 0.0) is believed


def test_place_without_anchor_is_an_error():
    """The order of calls is the caller's to keep."""
    with pytest.raises(RuntimeError, match="needs an anchor"):
        GpuClock().place(1.0, 1.0)


def test_attempts_that_fail_come_ever_less_often():
    """After a few the clock is lost, until an anchor is taken; and with one it never is."""
    clock, now, attempts = GpuClock(), 10**12, []
    while now < 10**12 + 20 * 10**9:
        if clock.is_due(now):
            clock.miss(now)
            attempts.append(now)
        assert clock.is_lost == (len(attempts) >= 3)
        now += 5_000_000
    assert len(attempts) < 15
    clock.calibrate(Anchor("a", now, 3_500), None)
    for _ in range(5):
        clock.miss(now)
    assert not clock.is_lost
    assert not clock.is_due(now + 10_000_000)


SECOND, MS, US = 10**9, 10**6, 10**3
NOON = 10**12


def tight(host_ns: int) -> Anchor:
    """An anchor that nothing held up."""
    return Anchor(host_ns, host_ns, 3_500)


def due_after(clock: GpuClock, host_ns: int, age_ns: int) -> bool:
    """Whether an anchor is due when the one of this time is older than this, and not before."""
    return not clock.is_due(host_ns + age_ns) and clock.is_due(host_ns + age_ns + 1)


def test_age_of_anchors_doubles_up_to_eight_seconds():
    """A tight anchor serves for 50 ms, the next one for twice as long, and so on: neither longer nor shorter."""
    clock, now = GpuClock(), NOON
    for age_ms in (50, 100, 200, 400, 800, 1600, 3200, 6400, 8000, 8000):
        clock.calibrate(tight(now), None)
        assert due_after(clock, now, age_ms * MS)
        now += age_ms * MS


def test_wide_anchor_is_replaced_soon():
    """A first anchor that was held up is taken for want of a better one, and another attempt follows within 20 ms."""
    clock = GpuClock()
    clock.calibrate(Anchor("wide", NOON, 50_001), None)
    assert clock.anchor.event == "wide"
    assert due_after(clock, NOON, 20 * MS)
    clock.calibrate(Anchor("tight", NOON + 20 * MS, 50_000), 20.0)
    assert clock.anchor.event == "tight"
    assert due_after(clock, NOON + 20 * MS, 50 * MS)


def test_attempts_after_a_wide_bracket_become_rare_until_one_is_tight():
    """They come after 20, 40, 80 ms and so on, up to eight seconds; after a tight one they start anew."""
    clock, now = GpuClock(), NOON
    for wait_ms in (20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 8000, 8000):
        clock.calibrate(Anchor("wide", now, 2 * MS), None)
        assert due_after(clock, now, wait_ms * MS)
        now += wait_ms * MS
    clock.calibrate(tight(now), None)
    clock.calibrate(Anchor("wide", now + 50 * MS, 2 * MS), 50.0)
    assert due_after(clock, now + 50 * MS, 20 * MS)


@pytest.mark.parametrize(("half_us", "taken"), [(49, True), (50, True), (300, True), (400, True), (410, False)])
def test_doubt_of_an_old_anchor_grows_with_its_age(half_us, taken):
    """After eight seconds of unknown drift the old anchor is off by 400 µs: a new one within that is the better."""
    clock = GpuClock()
    clock.calibrate(Anchor("old", NOON, 3_500), None)
    clock.calibrate(Anchor("new", NOON + 8 * SECOND, half_us * US), 8000.0)
    assert (clock.anchor.event == "new") is taken


@pytest.mark.parametrize("elapsed_ms", [None, 0.0, -1.0, 32_001.0])
def test_distance_that_cannot_be_told_makes_any_anchor_welcome(elapsed_ms):
    """Without a usable distance from the anchor before, that one is of no more use, and the drift is unknown."""
    clock = GpuClock()
    for second in range(3):
        clock.calibrate(tight(NOON + second * SECOND), second and 1000.02)
    assert clock.drift[0] != 0.0
    clock.calibrate(Anchor("wide", NOON + 3 * SECOND, 2 * MS), elapsed_ms)
    assert clock.anchor.event == "wide"
    assert clock.drift == (0.0, 50e-6)


@pytest.mark.parametrize("elapsed_ms", [0.001, 31_999.0, 32_000.0])
def test_distance_up_to_four_times_the_greatest_age_is_used(elapsed_ms):
    """A pause of half a minute does not end the use of an anchor."""
    clock = GpuClock()
    clock.calibrate(tight(NOON), None)
    clock.calibrate(Anchor("wide", NOON + round(elapsed_ms * MS), 5 * MS), elapsed_ms)
    assert clock.anchor.event != "wide"


def test_drift_is_the_slope_of_the_last_minute():
    """Anchors count for 64 seconds: 10 parts per million in the first eight weigh an eighth, and then nothing."""
    clock, now = GpuClock(), NOON
    clock.calibrate(tight(now), None)
    for _ in range(8):
        elapsed_ms, now = 8000.0 if now > NOON else 8000.0 - 0.08, now + 8 * SECOND
        clock.calibrate(tight(now), elapsed_ms)
    assert clock.drift[0] == pytest.approx(10e-6 / 8, rel=1e-3)
    clock.calibrate(tight(now + 8 * SECOND), 8000.0)
    assert clock.drift[0] == pytest.approx(0.0, abs=1e-12)


def test_doubt_of_the_drift_is_both_brackets_over_the_distance():
    """Of several readings the one with the least doubt tells the drift."""
    clock = GpuClock()
    for second, half_ns in ((0, 3_000), (8, 1_000), (16, 2_000)):
        elapsed_ms = None if not second else 8000.0
        clock.calibrate(Anchor(second, NOON + second * SECOND, half_ns), elapsed_ms)
    assert clock.drift == (0.0, pytest.approx((2_000 + 3_000) / 16e9))
    clock.calibrate(Anchor(17, NOON + 17 * SECOND, 500), 1000.0)
    assert clock.drift == (0.0, pytest.approx((500 + 1_000) / 9e9))


def test_terms_are_those_of_the_anchor():
    """Until a drift is measured each millisecond adds 50 parts per million, and a step of a 32-bit float."""
    clock = GpuClock()
    clock.calibrate(Anchor("a", NOON, 3_500), None)
    assert clock.terms == (NOON, 3_500, 1e6, pytest.approx(50 + 1e6 * 2**-23), 0)


def costing(*costs_ns):
    """Make a clock of which each anchor says what a pair of events takes."""
    clock = GpuClock()
    for second, cost_ns in enumerate(costs_ns):
        clock.calibrate(Anchor(second, NOON + second * SECOND, 3_500, cost_ns), 1000.0 if second else None)
    return clock


def test_events_take_the_least_that_was_measured():
    """More than that was held up by something; an anchor that says nothing changes nothing."""
    assert costing(0).event_cost_ns == 0
    assert costing(0, 2_950, 3_100, 0).event_cost_ns == 2_950
    assert costing(3_100, 2_950).terms[4] == 2_950


def test_what_the_events_took_is_taken_off_where_all_work_was_waiting():
    """That is where the host had left the stage for sure by then. What ends together goes on ending together."""
    start, end, clock = NOON, NOON + 10_000, costing(2_900)
    assert clock.less_events(start, end, 100, left_ns=start - 100) == (start, end - 2_900)
    assert clock.less_events(start, end, 100, left_ns=start - 99) is None
    assert clock.less_events(start, start + 2_000, 0, left_ns=start) == (start - 900, start - 900)
    assert costing(0).less_events(start, end, 100, left_ns=start - SECOND) is None


def test_place_is_exact():
    """The end is as far from the anchor as its event, the start before it by the duration, and the doubt rounded up."""
    clock = GpuClock()
    clock.calibrate(Anchor("a", NOON, 3_500), None)
    doubt_ns = 3_500 + int(1002 * (50 + 1e6 * 2**-23)) + 1
    assert clock.place(1000.0, 2.0) == (NOON + 998 * MS, NOON + SECOND, doubt_ns)
    assert clock.place(-1000.0, 2.0) == (NOON - 1002 * MS, NOON - SECOND, doubt_ns)
