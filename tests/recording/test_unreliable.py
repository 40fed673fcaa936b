"""Every part at the edges may raise at any call: the application does not notice, and no range stays open."""

from __future__ import annotations

import itertools

import pytest

from gpuscope import _log, stage
from gpuscope.testing import FakeDevice, ManualClock

CALLS = 14


class Unreliable:
    """Hands calls on to the real object, but raises at chosen ones, before or after doing the work."""

    def __init__(self, target, methods, failing_calls, *, after):
        """Choose which calls of which methods fail."""
        self._target, self._methods, self._failing, self._after = target, methods, failing_calls, after
        self.calls = itertools.count()

    def __getattr__(self, name):
        """Wrap a method that was chosen."""
        value = getattr(self._target, name)
        if name not in self._methods:
            return value

        def call(*args, **kwargs):
            fails = next(self.calls) in self._failing
            if fails and not self._after:
                raise RuntimeError(f"{name} failed")
            result = value(*args, **kwargs)
            if fails:
                raise RuntimeError(f"{name} failed after its work")
            return result

        return call


def run_stages():
    """Run stages in several forms; what they compute must be right whatever fails underneath."""

    @stage("plain")
    def plain(x):
        return x + 1

    @stage("generator")
    def generate():
        yield 1
        yield 2

    results = []
    with stage("outer") as outer:
        outer.set_attribute("a", 1)
        results.append(plain(1))
        results.extend(generate())
        with pytest.raises(KeyError), stage("failing"):
            raise KeyError("x")
    return results


STAGES = 5
DEVICE = ["begin", "end", "give_back", "attach", "is_capturing", "query", "elapsed_ms", "calibrate", "facts"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", DEVICE)
@pytest.mark.parametrize("failing", [set(range(CALLS * 9)), {0}, {1}, {2, 5}])
def test_device_may_raise_at_any_call(make_bench, method, failing, after):
    """A device that raises costs GPU times, never a stage, a result or a range."""
    clock = ManualClock()
    device = Unreliable(FakeDevice(clock, completes=True), {method}, failing, after=after)
    bench = make_bench(device=device, event_deadline_s=1.0)
    assert run_stages() == [2, 1, 2]
    assert bench.nvtx.stack == bench.nvtx.started == []
    bench.collect()
    bench.clock.advance(5)
    bench.collect()
    account = bench.statistics()
    assert account.recorded == STAGES + 1
    assert account.pending == 0
    with stage("next"):
        pass
    assert bench.engine.recorder.queue is bench.engine.queue


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["begin", "end"])
@pytest.mark.parametrize("failing", [set(range(CALLS)), {0}, {1}, {2, 5}])
def test_nvtx_may_raise_at_any_call(make_bench, fake_nvtx, method, failing, after):
    """NVTX that raises costs ranges at most; every stage is still exported or counted."""
    nvtx = Unreliable(fake_nvtx, {method}, failing, after=after)
    bench = make_bench(nvtx=nvtx)
    assert run_stages() == [2, 1, 2]
    if method == "end" and not after:
        # The end was tried again on its own; only a tool that fails twice in a row can keep a range open.
        assert len(fake_nvtx.stack) <= len(failing)
    bench.collect()
    account = bench.statistics()
    assert account.recorded == STAGES + 1
    assert account.exported + sum(account.lost.values()) == STAGES + 1


class Failing:
    """An exporter whose every method raises."""

    name = "failing"

    def export(self, batch, delivery):
        """Raise."""
        raise OSError("export")

    def flush(self, timeout_s):
        """Raise."""
        raise OSError("flush")

    def shutdown(self, timeout_s):
        """Raise."""
        raise OSError("shutdown")


class SettlesThenRaises(Failing):
    """An exporter that raises after it has settled the batch."""

    def export(self, batch, delivery):
        """Settle, then raise."""
        delivery.settle(len(batch.site))
        raise OSError("late")


def test_failing_exporter_does_not_cost_the_others(make_bench, caplog):
    """The other exporters get the batch; the failure is logged once per kind."""
    bench = make_bench(exporters=(Failing(),))
    for _ in range(3):
        run_stages()
        bench.collect()
    assert bench.statistics().exported == 3 * (STAGES + 1)
    assert bench.engine.shutdown(1.0)
    assert len([record for record in caplog.records if "failed" in record.message]) <= 3


def test_exporter_that_settles_and_raises_is_counted_once(make_bench):
    """A batch has one fate, whatever an exporter reports of it."""
    bench = make_bench(exporters=(SettlesThenRaises(),))
    run_stages()
    bench.collect()
    account = bench.statistics()
    assert account.recorded == STAGES + 1
    assert account.pending == 0


def test_message_of_the_exception_may_not_be_printable(bench):
    """An exception whose `__str__` raises passes through unchanged."""

    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("no")

    with pytest.raises(Odd), stage("odd"):
        raise Odd
    (span,) = bench.named("odd")
    assert span.status == "ERROR"


def test_a_handler_of_the_log_that_raises_costs_a_warning(bench, monkeypatch):
    """What waits to be said is said by the collector, and a handler that raises there harms nothing."""
    asked = []

    def refuse(record):
        asked.append(record.getMessage())
        raise RuntimeError("the application's")

    monkeypatch.setattr(_log.logger, "handle", refuse)
    _log.later("said of %s.", "one")
    _log.later("said of %s.", "another")
    run_stages()
    assert asked == []
    bench.collect()
    assert asked == ["said of one.", "said of another."]
    assert bench.statistics().exported == STAGES + 1


def test_what_waits_to_be_said_is_bounded():
    """Where nothing is collected, the oldest warnings give way."""
    for number in range(1000):
        _log.later("%d", number)
    assert len(_log._waiting) <= 64
    _log._waiting.clear()
