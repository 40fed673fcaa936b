"""The event after a launch that tells when a replay may be read: recorded once, or the replay is not read at all."""

from __future__ import annotations

import ctypes
import sys

import pytest

from gpuscope import stage
from gpuscope._recording.hot_path import current


@pytest.fixture
def graph(machine):
    """A captured graph with one stage inside, replayed and collected once."""
    graph = sys.modules["torch.cuda.graphs"].CUDAGraph()
    graph.capture_begin()
    with stage("inner"):
        machine.library.fake_kernel()
    graph.capture_end()
    with stage("request"):
        graph.replay()
    machine.collect()
    return graph


def timed(machine):
    """How many runs of the stage inside the graph have a span."""
    return sum(bool(span.attributes.get("gpuscope.graph")) for span in machine.collect())


def test_a_fence_is_recorded_once(machine, graph):
    """One event after each launch, and no more."""
    with stage("request"):
        before = machine.library.fake_records()
        graph.replay()
        assert machine.library.fake_records() - before == 1
    assert timed(machine) == 2


def test_a_fence_that_is_refused_once_is_recorded_in_the_context(machine, graph):
    """As where the thread has none yet; the replay is read as any other."""
    with stage("request"):
        machine.library.fake_answer(201, 1)
        graph.replay()
    assert timed(machine) == 2
    assert machine.engine.statistics().dropped == {}


def test_a_replay_whose_fence_is_refused_is_not_read(machine, graph):
    """Nobody would know when: its events tell of an older replay. It is counted, and its events are used again."""
    for _ in range(2):
        with stage("request"):
            machine.library.fake_answer(999, 2)
            graph.replay()
        assert timed(machine) == 1
    assert machine.engine.statistics().dropped == {"overwritten": 2}
    assert machine.engine.statistics().pending == 0
    with stage("request"):
        graph.replay()
    assert timed(machine) == 2


def test_events_of_replays_that_are_not_read_are_used_again(machine, graph):
    """However many fences are refused, the next replay has events."""
    for _ in range(100):
        with stage("request"):
            machine.library.fake_answer(999, 2)
            graph.replay()
        machine.collect()
    with stage("request"):
        graph.replay()
    assert timed(machine) == 2
    assert machine.engine.statistics().dropped == {"overwritten": 100}


def test_a_fence_that_cannot_be_recorded_costs_the_program_nothing(machine, graph, monkeypatch, caplog):
    """An error of ours after the launch stays ours, is told of once, and the replay is counted."""

    def record(event, stream):
        raise OSError("no driver")

    for _ in range(2):
        with stage("request"), monkeypatch.context() as patch:
            patch.setattr(machine.engine.recorder.device.driver, "event_record", record)
            graph.replay()
    assert machine.engine.statistics().dropped == {"overwritten": 2}
    assert timed(machine) == 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert "recording an event after a CUDA graph failed: OSError('no driver')" in message


def test_a_bare_replay_that_fails_ends_the_stage_around_it(machine, graph):
    """The error is the program's, the stage is exported with it, and none stays current."""
    graph.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        graph.replay()
    assert current.get() is None
    (span,) = (span for span in machine.collect() if span.name == "graph replay")
    assert span.status == "ERROR"
    assert machine.engine.statistics().dropped == {"replay_failed": 1}


def test_after_a_refused_exchange_no_replay_that_waits_is_believed(machine, graph):
    """It may have been given the events of another one: its times are dropped, and counted."""
    machine.library.fake_hold()
    with stage("request"):
        graph.replay()
    machine.library.fake_refuse_exchanges(1)
    with stage("request"):
        graph.replay()
    machine.library.fake_work(1000)
    assert timed(machine) == 1
    assert machine.engine.statistics().dropped == {"overwritten": 2}


def test_no_replay_is_asked_about_while_its_stream_is_captured(machine, graph):
    """It waits until the capture is over, and is then read."""
    with stage("request"):
        graph.replay()
    machine.library.fake_capture(ctypes.c_void_p(0x70))
    assert timed(machine) == 1
    assert machine.engine.statistics().pending == 2
    machine.library.fake_capture(None)
    assert timed(machine) == 2
