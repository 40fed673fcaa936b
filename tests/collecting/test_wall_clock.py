"""The wall clock is set anew while stages run."""

from __future__ import annotations

import itertools

import pytest

from gpuscope import _runtime, stage
from gpuscope._collecting.aggregation.metrics import StageMetrics
from gpuscope._data.wall_clock import WallClock
from gpuscope._settings.config import Config
from gpuscope.exporters.memory import MemoryExporter
from gpuscope.testing import FakeDevice, ManualClock


@pytest.mark.parametrize("step_s", [-3600, -0.05, 0.05, 3600])
def test_a_request_is_placed_as_a_whole(step_s):
    """Stages of a request that goes on over a step lie in each other, and the next request follows the clock."""
    clock, step = ManualClock(), [10**18]
    spans = []
    config = Config().changed(mode="on", exporters="none", warmup=0)
    with _runtime.period(
        config,
        exporters=(MemoryExporter(spans),),
        device=FakeDevice(clock, completes=True, delay_ns=0),
        clock=clock,
        epoch_clock=lambda: clock.now_ns + step[0],
    ) as engine:
        engine.recorder.accept(engine.queue)
        with stage("request"):
            with stage("before"):
                clock.advance(1)
            engine.collector.step()
            step[0] += int(step_s * 1e9)
            with stage("between"):
                clock.advance(1)
            engine.collector.step()
            with stage("after"), stage("inside"):
                clock.advance(1)
        engine.collector.step()
        with stage("next"):
            began_ns = clock.now_ns + step[0]
        engine.collector.step()
    at = {span.name: span for span in spans if span.kind == "host"}
    whole = at["request"]
    for name in ("before", "between", "after", "inside"):
        assert whole.start_ns <= at[name].start_ns <= at[name].end_ns <= whole.end_ns, name
    assert at["before"].end_ns <= at["between"].start_ns < at["between"].end_ns <= at["after"].start_ns
    assert abs(at["next"].start_ns - began_ns) < 1_000_000
    gpu = {span.name: span for span in spans if span.kind == "gpu"}
    assert all(whole.start_ns <= span.start_ns for span in gpu.values() if not span.name.startswith("next"))


def test_steps_are_forgotten():
    """A wall clock that is set all the time costs no memory."""
    clock = ManualClock()
    steps = itertools.count(0, 10**9)
    wall = WallClock(clock, lambda: next(steps))
    for _ in range(1000):
        wall.read()
    assert sum(map(len, wall._known)) < 50


def test_a_reading_that_took_long_is_no_step():
    """A thread that waits between two readings sees them apart, and not the clock set anew."""
    clock = ManualClock()

    def interrupted():
        clock.advance(0.05)
        return clock.now_ns + 10**18

    wall = WallClock(clock, interrupted)
    assert abs(wall.read() - wall.read()) < 10**8
    assert not wall.has_stepped


def test_metrics_outlive_a_clock_that_is_set_back():
    """No interval ends before it begins, and the busy ratio goes on."""
    now = [2 * 10**18]
    metrics = StageMetrics(now[0])
    metrics.settle(now[0] + 600 * 10**9)
    metrics.settle(now[0] - 3600 * 10**9)
    metrics.settle(now[0] - 3000 * 10**9)
    metrics.end_interval()
    assert metrics._occupancy._settled_ns < now[0]
