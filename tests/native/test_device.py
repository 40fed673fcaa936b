"""`CudaDevice` on a driver that is made of C: every path of recording and resolving, in C and in Python."""

from __future__ import annotations

import ctypes
import time
from types import SimpleNamespace

import pytest

from gpuscope import stage

LONG_NS = 2_000_000
"""Longer than what a stage without work takes."""


def run(name="infer", **options):
    """Run an empty stage."""
    with stage(name, **options):
        pass


def test_gpu_span_lies_within_its_host_span(machine, caplog):
    """Work that takes no time runs between the stage's entry and its end. Nothing fails on the way."""
    run()
    host, gpu = machine.collect()
    assert not caplog.records
    assert (host.kind, gpu.kind, gpu.parent_id) == ("host", "gpu", host.span_id)
    slack_ns = 100_000  # A reading of the fake GPU's clock, and the uncertainty.
    assert host.start_ns <= gpu.start_ns <= gpu.end_ns <= host.end_ns + slack_ns
    assert gpu.attributes["gpuscope.device.index"] == 0


def test_a_stage_records_two_events(machine):
    """One at the entry and one at the end, and none besides."""
    run()
    before = machine.library.fake_records()
    run()
    assert machine.library.fake_records() - before == 2


def test_each_event_is_read_once(machine):
    """The newest event of a stream answers for those before it, and each stage takes two distances."""
    run()
    machine.collect()  # With an anchor.
    for _ in range(8):
        run()
    queries, distances = machine.library.fake_queries(), machine.library.fake_distances()
    assert len(machine.collect()) == 2 * 9
    assert machine.library.fake_queries() - queries == 1
    assert machine.library.fake_distances() - distances == 2 * 8


def test_current_device_and_stream_are_followed(machine):
    """Stages are timed on what is current at their entry."""
    run("a")
    machine.device = 1
    run("b")
    machine.streams[1] = 0x99
    run("c")
    assert set(machine.timed_streams) == {(0, 0x70), (1, 0x71), (1, 0x99)}
    gpu = [span for span in machine.collect() if span.kind == "gpu"]
    assert [span.attributes["gpuscope.device.index"] for span in gpu] == [0, 1, 1]
    assert [span.attributes["gpuscope.cuda.stream"] for span in gpu] == [0x70, 0x71, 0x99]


def test_given_stream_is_timed(machine):
    """`stream=` wins over the current stream, from its first stage on."""
    stream = SimpleNamespace(device_index=1, cuda_stream=0x42)
    run(stream=stream)
    run(stream=stream)
    gpu = [span for span in machine.collect() if span.kind == "gpu"]
    assert [span.attributes["gpuscope.cuda.stream"] for span in gpu] == [0x42, 0x42]


def test_contexts_are_put_back(machine):
    """Whatever the slow path made current, it takes away again."""
    for stream in (
        None,
        SimpleNamespace(device_index=1, cuda_stream=0),
        SimpleNamespace(device_index=1, cuda_stream=5),
    ):
        run(stream=stream)
        run(stream=stream)
    assert machine.library.fake_contexts_pushed() == 0


def test_event_that_is_refused_costs_the_gpu_span_alone(machine):
    """A driver that answers with an error, to the second try too, leaves a host span, and the pair goes back."""
    run()
    pairs = machine.timed_streams[0, 0x70].pairs
    available = len(pairs) + 1  # The one in use comes back when it is collected.
    machine.library.fake_answer(999, 2)
    run("refused")
    assert machine.untimed == {"event_failed": 1}
    assert [span.kind for span in machine.collect() if span.name.startswith("refused")] == ["host"]
    assert len(pairs) == available


def test_event_that_is_refused_once_is_recorded_in_the_context(machine):
    """A thread without a context gets error 201 first; the second try, in the stream's context, succeeds."""
    run()
    machine.library.fake_answer(201, 1)
    run("again")
    assert machine.untimed == {}
    assert [span.kind for span in machine.collect()].count("gpu") == 2


def test_end_event_that_is_refused_takes_the_pair_away(machine):
    """Without an end there is no GPU span, and the pair is used again."""
    with stage("infer"):
        machine.library.fake_answer(999, 2)
    assert [span.kind for span in machine.collect()] == ["host"]
    assert machine.untimed == {"event_failed": 1}


def test_pool_is_bounded(machine):
    """When all pairs are in use stages go without GPU times, and are counted."""
    blocks = [stage("held") for _ in range(40)]
    for block in blocks:
        block.__enter__()
    assert machine.untimed == {"no_free_events": 8}
    for block in reversed(blocks):
        block.__exit__(None, None, None)


def test_pairs_come_back(machine):
    """However many stages run, no more pairs are made than are in use at once."""
    for _ in range(50):
        run()
        machine.collect()
    assert machine.idle_pairs() == 16
    assert machine.engine.recorder.device.open_streams.pairs_made == 16


def test_captured_stages_stay_between_the_others(machine):
    """What was recorded in a capture has no GPU times; what was recorded before and after it has."""
    run("before")
    machine.library.fake_capture(ctypes.c_void_p(0x70))
    run("inside")
    assert machine.collect() == []  # Nothing is asked about a stream that is being captured.
    machine.library.fake_capture(None)
    run("after")
    spans = machine.collect()
    assert [span.name for span in spans if span.kind == "host"] == ["before", "inside", "after"]
    assert [span.name for span in spans if span.kind == "gpu"] == ["before [gpu]", "after [gpu]"]
    assert next(span for span in spans if span.name == "inside").attributes["gpuscope.captured"]
    assert machine.untimed == {"captured": 1}


def on_external(machine, stream, *, given):
    """Run a stage on a stream of another library: one that was given, or the current one."""
    if given:
        run("outside", stream=stream)
    else:
        before, machine.streams[0] = machine.streams[0], stream.cuda_stream
        run("outside")
        machine.streams[0] = before


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_a_stream_that_is_destroyed_before_it_is_asked_about(machine, given, again):
    """Its stages have their GPU times, and nothing is asked but their events, also if its address is used again."""
    for _ in range(5):
        stream = machine.new_external()
        on_external(machine, stream, given=given)
        machine.library.fake_destroy_stream(stream.cuda_stream, again)
    spans = machine.collect()
    assert [span.name for span in spans if span.kind == "gpu"] == ["outside [gpu]"] * 5
    assert machine.library.fake_crashes() == 0
    assert machine.untimed == {}


def test_a_capture_on_a_stream_of_another_library_is_seen_by_the_stage(machine):
    """What was captured there is known when the collector comes, which asks nothing, though the capture is open."""
    stream = machine.new_external()
    on_external(machine, stream, given=True)
    machine.library.fake_capture(ctypes.c_void_p(stream.cuda_stream))
    on_external(machine, stream, given=True)
    before, inside = machine.collect()[:2], machine.collect()[-1]
    assert [span.kind for span in before] == ["host", "gpu"]
    assert inside.attributes["gpuscope.captured"]
    assert machine.untimed == {"captured": 1}
    assert machine.idle_pairs(stream.cuda_stream) == 16


def test_a_capture_that_begins_or_ends_within_a_stage_of_another_library(machine):
    """Such a stage has no GPU times, and its events are used again."""
    stream = machine.new_external()
    for before, after in ((stream.cuda_stream, None), (None, stream.cuda_stream)):
        machine.library.fake_capture(ctypes.c_void_p(before))
        with stage("across", stream=stream):
            machine.library.fake_capture(ctypes.c_void_p(after))
        machine.library.fake_capture(None)
    spans = machine.collect()
    assert [span.attributes.get("gpuscope.captured") for span in spans] == [True, True]
    assert machine.idle_pairs(stream.cuda_stream) == 16


def test_streams_that_may_be_gone_do_not_pile_up(machine):
    """However many come and go, only the last are kept; those of PyTorch's pools stay."""
    run()
    for _ in range(200):
        on_external(machine, machine.new_external(), given=True)
        machine.collect()
    assert len(machine.timed_streams) <= 1 + 64
    assert (0, 0x70) in machine.timed_streams
    assert len(machine.engine.collector._intake._resolver._waiting) <= 1


def test_a_stage_on_a_stream_of_a_pool_asks_nothing(machine):
    """What other libraries' streams cost is not paid for those of PyTorch's pools."""
    run()
    before = machine.library.fake_questions()
    run()
    assert machine.library.fake_questions() == before


def test_an_anchor_that_waits_for_work_is_bracketed_where_it_is_done(machine):
    """On a GPU with one connection an anchor is as good as the time between two questions, not as its whole wait."""
    machine.library.fake_delay_anchors(ctypes.c_longlong(20_000_000))
    run()
    spans = machine.collect()
    assert [span.kind for span in spans] == ["host", "gpu"]
    assert spans[1].attributes["gpuscope.clock.uncertainty"] < 0.01
    assert "gpuscope.unplaced" not in spans[1].attributes


def test_an_anchor_that_waits_for_the_drivers_lock_begins_when_it_has_it(machine):
    """A copy from pageable memory holds the lock for as long as it takes. The event comes after that."""
    machine.library.fake_hold_records(60_000_000)  # Longer than an event is waited for, which begins later.
    machine.library.fake_delay_anchors(ctypes.c_longlong(30_000_000))
    run()
    spans = machine.collect()
    assert [span.kind for span in spans] == ["host", "gpu"]
    assert spans[1].attributes["gpuscope.clock.uncertainty"] < 0.02


def test_an_anchor_whose_event_was_done_meanwhile_is_taken_again(machine):
    """A record that had to wait for the driver's lock, and then had an event that was done at once."""
    machine.library.fake_hold_one_record(60_000_000)
    run()
    spans = machine.collect()
    assert [span.kind for span in spans] == ["host", "gpu"]
    assert spans[1].attributes["gpuscope.clock.uncertainty"] < 0.02


def test_without_any_anchor_the_durations_are_told(machine, monkeypatch):
    """A GPU whose clock can't be read is asked ever less often, and its stages have durations without a place."""
    attempts, device = [], machine.engine.recorder.device
    monkeypatch.setattr(device, "calibrate", lambda *arguments: attempts.append(arguments))
    run()
    while not machine.collect():
        pass
    with stage("infer"):
        until_ns = time.perf_counter_ns() + LONG_NS
        while time.perf_counter_ns() < until_ns:
            pass
    spans = machine.collect()
    assert len(attempts) == 3
    assert [span.kind for span in spans] == ["host", "gpu"] * 2
    for host, gpu in (spans[:2], spans[2:]):
        assert gpu.attributes["gpuscope.unplaced"]
        assert gpu.start_ns == host.start_ns
        assert 0 <= gpu.duration_ns < host.duration_ns + 100_000
        assert gpu.attributes["gpuscope.clock.uncertainty"] > 0
    assert spans[3].duration_ns >= LONG_NS
    monkeypatch.undo()
    while "gpuscope.unplaced" in machine.spans[-1].attributes:
        run()
        machine.collect()


def test_events_that_can_not_be_made_are_not_counted_as_made(machine):
    """After any number of failures the next stage has GPU times, once the driver can make events again."""
    machine.library.fake_make_events(0)
    for _ in range(10):
        run()
    assert machine.untimed == {"no_free_events": 10}
    assert [span.kind for span in machine.collect()] == ["host"] * 10
    machine.library.fake_make_events(7)
    run("after")
    assert machine.engine.recorder.device.open_streams.pairs_made == 3
    machine.library.fake_make_events(-1)
    assert [span.kind for span in machine.collect()] == ["host"] * 10 + ["host", "gpu"]


def test_events_and_streams_go_from_period_to_period(machine):
    """However often recording begins anew, no more events and streams are made, and each period has GPU times."""
    library, made = machine.library, []
    for _ in range(5):
        machine.spans.clear()
        with machine.period():
            run()
            assert [span.kind for span in machine.collect()] == ["host", "gpu"]
        made.append((library.fake_events_made(), library.fake_streams_made()))
    assert len(set(made)) == 1


def test_a_pair_that_comes_back_after_its_period_serves_the_next(machine):
    """A stage that ends after its period gives its events to the pool as any other does."""
    with machine.period():
        block = stage("late")
        block.__enter__()
    with machine.period():
        run()
        spare = machine.timed_streams[0, 0x70].pairs
        before = len(spare)
        block.__exit__(None, None, None)
        assert len(spare) == before + 1


def test_periods_side_by_side_take_anchors_with_streams_of_their_own(machine):
    """Two collectors never record into the same event."""
    run()
    machine.collect()
    made = machine.library.fake_streams_made()
    with machine.period():
        run()
        machine.collect()
        assert machine.library.fake_streams_made() == made + 1
