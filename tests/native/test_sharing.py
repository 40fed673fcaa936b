"""Neighbouring stages share an event where nothing can have been enqueued in between, and nowhere else."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuscope import stage
from gpuscope._cuda import cuda_device
from gpuscope._data.native import native

pytestmark = pytest.mark.skipif(native is None, reason="the twins share no events")
SHARE_NS = 300_000
"""Longer than on a GPU, so that a loaded machine shares as well; `machine` takes it from here."""
CLOCK_NS = 250_000
"""A reading of the fake GPU's clock on a loaded machine, and the uncertainty; less than what is enqueued takes."""


@pytest.fixture(autouse=True)
def in_c(machine):
    """The twins share nothing."""
    if cuda_device.native is None:
        pytest.skip("the twins share no events")


def enqueue():
    """Take as long as what is enqueued takes at least; return when that is over."""
    until_ns = time.perf_counter_ns() + 2 * SHARE_NS
    while time.perf_counter_ns() < until_ns:
        pass
    return time.time_ns()


def request(stages):
    """Run a request whose stages each enqueue something, one after the other."""
    with stage("request"):
        for number in range(stages):
            with stage(f"stage {number}"):
                enqueue()


def records(machine, work):
    """Return how many events some work records."""
    before = machine.library.fake_records()
    work()
    return machine.library.fake_records() - before


def gpu_times(machine):
    """Return start and end of each GPU span by the stage's name."""
    return {
        span.name.removesuffix(" [gpu]"): (span.start_ns, span.end_ns)
        for span in machine.collect()
        if span.kind == "gpu"
    }


def test_a_chain_of_stages_has_one_event_more_than_stages(machine):
    """Of sixteen events eight are left; on a loaded machine some more, of which the least counts."""
    request(1)
    seen = []
    for _ in range(20):
        enqueue()
        seen.append(records(machine, lambda: request(7)))
        machine.collect()
    assert min(seen) == 8


def test_neighbours_have_one_time(machine):
    """Outer and first inner start together, one ends when the next starts, last inner and outer end together."""
    for _ in range(20):
        machine.spans.clear()
        enqueue()
        count = records(machine, lambda: request(3))
        times = gpu_times(machine)
        if count == 4:
            break
    assert count == 4
    starts, ends = zip(*(times[f"stage {number}"] for number in range(3)), strict=True)
    # What begins before its launch is moved there, by the microseconds that a stage takes to enter.
    for one, other in zip((*times["request"], *ends[:2]), (starts[0], ends[2], *starts[1:]), strict=True):
        assert abs(one - other) < CLOCK_NS


def test_what_was_enqueued_between_belongs_to_none(machine):
    """A stage that comes later has an event of its own."""
    request(1)
    enqueue()
    assert records(machine, lambda: (request(1), enqueue(), request(1))) >= 4


def test_an_empty_stage_takes_no_time(machine):
    """Its start is its end."""
    for _ in range(20):
        machine.spans.clear()
        with stage("empty"):
            pass
        if (times := gpu_times(machine)["empty"])[0] == times[1]:
            return
    raise AssertionError(times)


def run_elsewhere(machine):
    """Run a stage on the same stream in another thread."""
    thread = threading.Thread(target=request, args=(1,))
    thread.start()
    thread.join()


def on_a_foreign_stream(machine):
    """Have the current stream be one that another library may destroy."""
    machine.streams[0] = machine.new_external().cuda_stream
    request(1)


def with_a_guard(machine):
    """Have a library that may capture on blocking streams of its own."""
    machine.streams[0] = 0
    request(1)
    machine.timed_streams[0, 0].guarded = True


@pytest.mark.parametrize("happens", [run_elsewhere, on_a_foreign_stream, with_a_guard])
def test_where_it_cannot_be_known_nothing_is_shared(machine, happens):
    """Another thread on the stream, within the last second; a stream of another library; a stream that is guarded."""
    request(1)
    happens(machine)
    assert records(machine, lambda: request(3)) == 8


def test_a_stream_of_its_own_is_shared_on(machine):
    """Stages of other streams in between do not matter."""
    other = SimpleNamespace(device_index=1, cuda_stream=0x99)
    request(1)
    with stage("other", stream=other):
        pass
    assert min(records(machine, lambda: request(3)) for _ in range(20)) <= 4


def test_an_event_that_was_refused_is_not_shared(machine):
    """The stage after it has one of its own."""
    request(1)
    enqueue()
    machine.library.fake_answer(999, 2)
    with stage("refused"):
        pass
    assert records(machine, lambda: request(1)) >= 2
    assert set(gpu_times(machine)) >= {"request", "stage 0"}
    assert "refused" not in gpu_times(machine)


def test_a_capture_is_not_asked_about(machine):
    """What is shared in a capture was captured, as its event was."""
    request(1)
    known = len(machine.collect())
    enqueue()
    machine.library.fake_capture(ctypes.c_void_p(0x70))
    request(2)
    assert len(machine.collect()) == known
    machine.library.fake_capture(None)
    enqueue()
    request(1)
    machine.collect()
    assert machine.untimed == {"captured": 3}


def test_pairs_come_back_at_the_end_of_the_period(machine):
    """Also those that the next stage would have shared, and those of a stage that ends after it."""
    request(3)
    machine.collect()
    assert machine.idle_pairs() == machine.engine.recorder.device.open_streams.pairs_made
    request(3)
    machine.collect()
    assert machine.idle_pairs() == machine.engine.recorder.device.open_streams.pairs_made


PLANS = st.recursive(
    st.sampled_from(["work", "collect", "later"]), lambda inner: st.lists(inner, max_size=4), max_leaves=24
)


class TestAnyNesting:
    """Stages of any shape, resolved at any time, some long after the stages next to them."""

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(plan=st.lists(PLANS, max_size=8))
    def test_no_stage_begins_before_or_ends_after_what_was_enqueued(self, machine, plan):
        """Each event is that of its own moment, whoever shares it: none is recorded again while one needs it."""
        machine.spans.clear()
        bounds, open_blocks, counter = {}, contextlib.ExitStack(), Counter()
        last_ns = [enqueue()]

        def enter(name):
            bounds[name] = [last_ns[0], None, None, None]
            block = stage(name)
            block.__enter__()
            bounds[name][1] = time.time_ns()
            return block

        def leave(name, block):
            bounds[name][2] = last_ns[0]
            block.__exit__(None, None, None)
            bounds[name][3] = time.time_ns()
            counter["left"] += 1
            if counter["left"] % 4 == 0:  # The queue is short.
                machine.collect()

        def run(steps):
            counter["stages"] += 1
            name = f"stage {counter['stages']}"
            block = enter(name)
            for step in steps:
                if isinstance(step, list):
                    run(step)
                elif step == "work":
                    last_ns[0] = enqueue()
                elif step == "collect":
                    machine.collect()
                elif counter["later"] < 10:
                    counter["later"] += 1
                    later = f"later {counter['later']}"
                    open_blocks.callback(leave, later, enter(later))
            leave(name, block)

        run(plan)
        open_blocks.close()
        times = gpu_times(machine)
        assert set(times) == set(bounds)
        for name, (start_ns, end_ns) in times.items():
            after_ns, entered_ns, worked_ns, left_ns = bounds[name]
            assert after_ns - CLOCK_NS <= start_ns <= entered_ns + CLOCK_NS, name
            assert worked_ns - CLOCK_NS <= end_ns <= left_ns + CLOCK_NS, name
            assert start_ns <= end_ns
