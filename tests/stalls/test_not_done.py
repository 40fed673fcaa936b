"""Stages that the host has left and the GPU has not done: on the fake GPU, with looks by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpuscope import stage
from gpuscope._collecting.aggregation.metrics import account_points
from gpuscope._data.attributes import STALL_KIND
from gpuscope._data.metrics import STALLS
from gpuscope._flight.dumps import copies
from gpuscope._stalls.stalls import _LINES

SIDE = SimpleNamespace(cuda_stream=9, device_index=0)


@pytest.fixture
def looked(make_bench, tmp_path, monkeypatch):
    """Return a function that makes a bench with a limit of 10 s, whose watch looks when it is told to."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def make(**settings):
        bench = make_bench(completes=False, **{"stall": "10s", **settings})
        stalls = bench.stalls = bench.engine.recorder.stalls
        stalls._start = lambda: None  # No thread: the clock is moved by hand.

        def look(seconds=0.0, passes=1):
            for _ in range(passes):
                bench.clock.advance(seconds / passes)
                bench.collect()
                stalls._pass(b"")
            return bench.statistics().stalls

        bench.look = look
        return bench

    return make


def run(name, stream=None):
    """One stage."""
    with stage(name, stream=stream):
        pass


def test_work_that_does_not_end_is_found_once(looked, caplog):
    """By name, device and stream, with what was done there last; it is counted, logged, and in a file."""
    bench = looked()
    run("tokenize")
    bench.device.complete()
    bench.look()
    run("infer")
    run("next")
    assert bench.look(9) == {}
    with caplog.at_level(logging.WARNING):
        assert bench.look(2) == {"gpu_not_done": 1}
    (line,) = [record.getMessage() for record in caplog.records if "stall" in record.getMessage()]
    assert "gpu_not_done: the host has left stage infer, and the GPU is not done, for 11.0 s (limit 10.0 s)" in line
    for fact in ("GPU 0, stream 0x7", "2 stages wait there", "last done there: tokenize, 11.0 s ago"):
        assert fact in line
    said = Path(bench.stalls.path).read_text()
    assert "infer" in said
    assert "most recent call first" in said
    assert bench.look(50) == {"gpu_not_done": 1}


def test_the_account_balances_and_the_span_says_it(looked):
    """The stage is exported as any other once the GPU is done, with an event; it is a metric, too."""
    bench = looked()
    run("infer")
    bench.look(11)
    bench.device.complete()
    bench.look()
    (span,) = [span for span in bench.named("infer") if span.kind == "host"]
    ((name, at_ns, attributes),) = span.events
    assert name == "gpuscope.stall"
    assert attributes["gpuscope.stall.kind"] == "gpu_not_done"
    assert attributes["gpuscope.stall.duration"] == pytest.approx(11.0, abs=0.01)
    assert at_ns - span.end_ns == pytest.approx(11e9, rel=0.01)
    account = bench.statistics()
    assert (account.recorded, account.exported, account.pending) == (1, 1, 0)
    (point,) = account_points(account)[STALLS]
    assert (point.attributes, point.value) == ({STALL_KIND: "gpu_not_done"}, 1)
    assert not bench.stalls.has_events


def test_after_progress_it_may_stall_again(looked):
    """A second stall is a second line."""
    bench = looked()
    run("first")
    run("second")
    bench.look(11)
    bench.device.complete(1)
    assert bench.look(5) == {"gpu_not_done": 1}
    assert bench.look(11, passes=11) == {"gpu_not_done": 2}


def test_a_stream_with_a_backlog_that_moves_has_not_stalled(looked):
    """Although its oldest stage was left long ago."""
    bench = looked()
    for _ in range(20):
        run("infer")
    for _ in range(19):
        assert bench.look(5) == {}
        bench.device.complete(1)


def test_other_streams_are_said_to_move(looked, caplog):
    """One stuck stream beside a healthy one."""
    bench = looked()
    run("stuck")
    for _ in range(12):
        run("healthy", SIDE)
        bench.device.lanes[0, 9].recorded and [
            setattr(event, "done", True) for event in bench.device.lanes[0, 9].recorded.popleft()
        ]
        bench.look(0.9)
        run("healthy", SIDE)
    with caplog.at_level(logging.WARNING):
        assert bench.look(1) == {"gpu_not_done": 1}
    assert "stage stuck" in caplog.text
    assert "beside it GPU 0, stream 0x9: " in caplog.text
    assert "(healthy)" in caplog.text


def test_nothing_is_asked_or_said_during_a_capture(looked):
    """What is not asked is not known; the fake GPU fails the test if it is asked."""
    bench = looked()
    with stage("infer"):
        bench.device.lanes[0, 7].capturing = True
    assert bench.look(50, passes=5) == {}
    bench.device.lanes[0, 7].capturing = False


def test_first_calls_are_excused(looked):
    """They load and compile."""
    bench = looked(warmup=2)
    for number in range(3):
        run("loads and compiles")
        assert bench.look(11) == ({} if number < 2 else {"gpu_not_done": 1})
        bench.device.complete()
        bench.look()


def test_a_compilation_is_excused(looked, monkeypatch):
    """The time begins again with its end."""
    bench = looked()
    run("infer")
    monkeypatch.setattr("gpuscope._stalls.stalls.compiles", lambda: True)
    assert bench.look(30, passes=3) == {}
    monkeypatch.setattr("gpuscope._stalls.stalls.compiles", lambda: False)
    assert bench.look(9) == {}
    assert bench.look(2) == {"gpu_not_done": 1}


def test_multiples_of_the_percentile(looked):
    """A stage with enough calls has a limit of its own, 1 s at least; others have none, or the general one."""
    bench = looked(stall="20x")
    for _ in range(150):
        with stage("infer"):
            bench.clock.advance(0.1)
        bench.device.complete()
        bench.look()
    bench.look(6)  # Percentiles are taken every 5 s.
    run("rare")
    assert bench.look(100) == {}
    bench.device.complete()
    bench.look()
    run("infer")
    assert bench.look(1.9) == {}
    assert bench.look(0.2) == {"gpu_not_done": 1}


def test_a_stall_is_dumped(looked, tmp_path):
    """The flight recorder's file is copied beside itself, and what is said stands there, too."""
    bench = looked(flight=str(tmp_path / "flight"))
    run("infer")
    bench.look(11)
    bench.engine.recorder.poll_flight()
    ((_, reason, _),) = copies(tmp_path / "flight")
    assert reason == "stall"
    assert bench.stalls.path.startswith(str(tmp_path / "flight.stalls-"))


def test_many_stalls_are_few_lines(looked, caplog):
    """What is beyond is counted, and said with the next line."""
    bench = looked()
    for number in range(_LINES + 5):
        run("infer", SimpleNamespace(cuda_stream=100 + number, device_index=0))
    with caplog.at_level(logging.WARNING):
        assert bench.look(11) == {"gpu_not_done": _LINES + 5}
        assert caplog.text.count("stall: ") == _LINES
        bench.clock.advance(100)
        run("more")
        bench.look(11)
    assert "(5 more stalls since the last line)" in caplog.text


def test_a_file_that_is_not_ours_is_left_alone(looked, tmp_path):
    """Links are not followed; the stall is counted and logged all the same."""
    bench = looked()
    (tmp_path / "other").write_text("theirs")
    (tmp_path / bench.stalls.path.rpartition("/")[2]).symlink_to(tmp_path / "other")
    run("infer")
    assert bench.look(11) == {"gpu_not_done": 1}
    assert (tmp_path / "other").read_text() == "theirs"
