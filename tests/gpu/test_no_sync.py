"""Recording never waits for the GPU, on any thread."""

from __future__ import annotations

import statistics
from collections import Counter
from contextlib import nullcontext

import torch

import gpuscope
from gpuscope.testing import capture

ITERATIONS = 50
BUSY_CYCLES = 1_000_000
"""About half a millisecond on the GPU, in every iteration."""
QUESTION_NS = 100_000
"""Longer than any question takes, and shorter than any wait would be."""


def work(around):
    """A loop of requests with two operations each, with `around(name)` about every part."""
    a, b = torch.ones(256, 256, device="cuda"), torch.ones(256, 256, device="cuda")
    out = torch.empty_like(a)
    for _ in range(ITERATIONS):
        with around("request"):
            with around("matmul"):
                torch.cuda._sleep(BUSY_CYCLES)
                torch.mm(a, b, out=out)
            with around("add"):
                out.add_(1)


def test_the_method_sees_a_wait(cupti):
    """A call of `synchronize` that the program makes is seen, so that none being seen means something."""
    event = torch.cuda.Event()
    with cupti.Window(waits=True) as window:
        event.record()
        event.synchronize()
    assert any("EventSynchronize" in name for name in window.waits())


def test_the_method_files_a_question_as_an_event_sync_of_no_length(cupti):
    """CUPTI reports an event that was asked about and found done as "Event Sync", though nothing waited."""
    event, other = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    event.record()
    other.record()
    torch.cuda.synchronize()
    with cupti.Window(waits=True) as window:
        for _ in range(20):
            assert event.query()
            event.elapsed_time(other)
    assert not any("EventSynchronize" in name for name in window.waits())
    # The first questions after CUPTI was attached take longer.
    assert len(window.syncs("Event Sync")) >= 20
    assert statistics.median(window.syncs("Event Sync")) < QUESTION_NS


def test_the_method_files_a_question_about_a_stream_as_a_stream_sync_of_no_length(cupti):
    """And a wait for a stream as one of its length, beside the call."""
    stream = torch.cuda.current_stream()
    torch.cuda._sleep(BUSY_CYCLES)
    with cupti.Window(waits=True) as window:
        for _ in range(20):
            stream.query()
        torch.cuda._sleep(20 * BUSY_CYCLES)
        stream.synchronize()
    *asked, waited = window.syncs("Stream Sync")
    assert statistics.median(asked) < QUESTION_NS
    assert waited > 10 * QUESTION_NS
    assert any("StreamSynchronize" in name for name in window.waits())


def test_an_instrumented_loop_waits_as_often_as_a_plain_one(cupti):
    """CUPTI sees the same calls that wait in an instrumented loop, its collector and its flush as in the loop alone."""
    with cupti.Window(waits=True):
        work(nullcontext)
    with cupti.Window(waits=True) as plain:
        work(nullcontext)
    with cupti.Window(waits=True) as instrumented, capture(interval_s=0.001) as spans:
        work(gpuscope.stage)
        assert gpuscope.flush(30)
    assert Counter(instrumented.waits()) - Counter(plain.waits()) == Counter()
    # The GPU was always milliseconds behind, so that anything that waited for it would have waited for long.
    lengths = [length for kind in ("Event Sync", "Stream Sync") for length in instrumented.syncs(kind)]
    assert all(length < QUESTION_NS for length in lengths)
    assert sum(span.kind == "gpu" for span in spans) == 3 * ITERATIONS


def test_every_stage_is_resolved_while_synchronising_is_an_error():
    """With `torch.cuda.set_sync_debug_mode("error")` stages are recorded and all get GPU times."""
    work(nullcontext)
    with capture(interval_s=0.001) as spans:
        torch.cuda.set_sync_debug_mode("error")
        try:
            work(gpuscope.stage)
            assert gpuscope.flush(30)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        statistics = gpuscope.statistics()
    assert sum(span.kind == "gpu" for span in spans) == 3 * ITERATIONS
    assert statistics.untimed == {}
    assert statistics.lost == {}


def test_a_stage_ends_before_its_gpu_work():
    """Leaving a stage whose kernel still runs does not wait for the kernel."""
    torch.cuda._sleep(1)
    with capture():
        with gpuscope.stage("long"):
            torch.cuda._sleep(600_000_000)
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
        torch.cuda.synchronize()
