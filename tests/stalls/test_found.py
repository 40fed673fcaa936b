"""Which kind of stall it is and how it is said, from what streams answered; and the limits of stages."""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace

import pytest

from gpuscope._settings.flight import limits
from gpuscope._stalls.found import FOUND, NEVER_LEFT, NOT_BACK, StreamState, found_in, host_stall, kind_of
from gpuscope._stalls.limits import LEAST_CALLS, LEAST_NS, Limits
from gpuscope._stalls.report import path_beside

S = 1_000_000_000
NOW = 100 * S


def found(**changes):
    """A stage that has run for 20 s, with a limit of 10 s."""
    fields = {
        "kind": 0, "high": 1, "low": 2, "span": 3, "thread": 7, "site": 4, "watch": 5,
        "start": 80 * S, "active": 80 * S, "limit": 10 * S, "now": 91 * S, "written": 0,
        "name": b"infer", "thread_name": b"worker", **changes,
    }  # fmt: skip
    (one,) = found_in(FOUND.pack(*fields.values()))
    return one


def state(asked_s=99.9, work_since_s=0.0, free_since_s=0.0, had_work_s=0.0, *, watch=5, opened=1):
    """What a stream answered last."""
    times = (round(each * S) for each in (asked_s, work_since_s, free_since_s, had_work_s))
    return StreamState(watch, 0x70, 0, opened, *times)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (state(work_since_s=81, had_work_s=99.9), NEVER_LEFT),
        (state(free_since_s=85, had_work_s=84), NOT_BACK),
        (state(free_since_s=85, had_work_s=70), NEVER_LEFT),
        (state(free_since_s=98, had_work_s=97), NEVER_LEFT),
        (state(asked_s=90, free_since_s=85, had_work_s=84), NEVER_LEFT),
        (None, NEVER_LEFT),
    ],
    ids=["works", "done", "had nothing to do", "done a moment ago", "not asked of late", "never asked"],
)
def test_the_kind_follows_from_the_answers(answers, kind):
    """The GPU is done with the stage if it had work of it, and has had none for half the limit."""
    assert kind_of(found(), answers, NOW) == kind


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        (state(work_since_s=81), "at every question work, for 19.0 s"),
        (state(free_since_s=85), "no work for 15.0 s"),
        (state(asked_s=90, work_since_s=81), "no answer for 10.0 s, before that work"),
        (state(asked_s=90, free_since_s=81, opened=0), "not asked for 10.0 s, before that no work"),
        (state(asked_s=0), "never asked"),
    ],
)
def test_what_a_stream_answered_is_said(answers, text):
    """With how long ago that was, where it is old."""
    assert answers.text(NOW) == f"GPU 0, stream 0x70: {text}"


def test_the_stall_of_a_stage_has_all_that_is_known():
    """Its own stream first, and the others beside it."""
    other = state(watch=6, free_since_s=99)
    stall = host_stall(found(), [other, state(work_since_s=81)], NOW)
    assert (stall.kind, stall.stage, stall.trace_id, stall.span_id) == (NEVER_LEFT, "infer", (1 << 64) + 2, 3)
    assert stall.facts[0].endswith("at every question work, for 19.0 s")
    assert stall.facts[1] == "beside it GPU 0, stream 0x70: no work for 1.0 s"
    assert "for 20.0 s (limit 10.0 s); thread worker, ident 7" in stall.sentence()
    assert "GIL" not in stall.sentence()


def test_what_the_thread_in_c_has_said_stands():
    """Whatever streams answer by now; and for how long no thread of Python came."""
    stall = host_stall(found(written=2), [state(work_since_s=81)], NOW)
    assert stall.kind == NOT_BACK
    assert "no thread of Python ran for 9.0 s of it: a call kept the GIL" in stall.sentence()


def test_the_file_is_where_one_can_be_made(tmp_path, monkeypatch):
    """Beside the flight recorder's, and in the temporary folder where there is no such folder or recorder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pid = os.getpid()
    beside = tmp_path / "flights"
    fallback = str(tmp_path / f"gpuscope-stalls-{pid}.txt")
    assert path_beside(str(beside / "x{pid}.flight")) == path_beside("") == fallback
    beside.mkdir()
    assert path_beside(str(beside / "x{pid}.flight")) == str(beside / f"x{pid}.flight.stalls-{pid}.txt")


def line(name, p99_ms, calls=LEAST_CALLS, gpu_ms=None, **more):
    """A line of the summary."""
    times = [None if each is None else SimpleNamespace(p99=each) for each in (p99_ms, gpu_ms)]
    return SimpleNamespace(
        name=name, measured_calls=calls, host_ms=times[0], gpu_ms=times[1], **{"only_warmup": False, **more}
    )


def test_multiples_are_of_the_longer_percentile_and_no_less_than_a_second():
    """Of stages with enough calls; the others have the general limit, or none."""
    lines = [line("a", 100.0), line("b", 100.0, gpu_ms=400.0), line("c", 1.0), line("d", 100.0, calls=99)]
    lines += [line("e", 100.0, only_warmup=True), line("f", 100.0), line("f", 300.0)]
    for given, general_ns in (("20x", 0), ("5s, 20x", 5 * S)):
        own = Limits(limits(given))
        own.learn(lines)
        expected = {"a": 2 * S, "b": 8 * S, "c": LEAST_NS, "f": 6 * S}
        if general_ns:
            expected = {name: min(each, general_ns) for name, each in expected.items()}
        assert {name: own.of(name) for name in "abcdefg"} == {**dict.fromkeys("abcdefg", general_ns), **expected}


def test_without_a_multiple_all_have_the_general_limit():
    """Nobody asks for percentiles then."""
    own = Limits(limits("10s"))
    assert not own.follows_percentiles
    assert own.of("any") == 10 * S
