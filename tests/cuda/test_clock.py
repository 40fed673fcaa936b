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


def test_implausible_drift_is_not_believed():
    """A reading that would mean thousands of parts per million is an error of measurement."""
    clock = GpuClock()
    clock.calibrate(Anchor("a", 10**12, 3_500), None)
    clock.calibrate(Anchor("b", 10**12 + 10**9, 3_500), 500.0)
    assert clock.drift[0] == 0.0


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
