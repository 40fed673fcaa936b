"""torch.profiler, switched on by the program while stages are recorded."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest

from gpuscope import stage
from gpuscope.testing import capture

torch = pytest.importorskip("torch")


def work(open_stage):
    """Two matrix products, one inside a range of the program's own; `open_stage` names parts of it."""
    matrix = torch.ones(8, 8)
    with open_stage("request"), torch.profiler.record_function("theirs"):
        with open_stage("infer"):
            product = matrix @ matrix
        return (product @ product).sum().item()


def profiled(open_stage):
    """Run the work; return the result, the operators and ranges counted, and what each was called from."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = work(open_stage)
    events = profiler.events()
    return result, Counter((event.name, event.cpu_parent and event.cpu_parent.name) for event in events)


def test_both_see_all():
    """The profiler counts the same operators and ranges, nested alike; stages nest around and inside its ranges."""
    with capture(warmup=0) as spans:
        result, seen = profiled(stage)
    assert (result, seen) == profiled(nullcontext)
    assert seen["theirs", None] == 1
    assert seen["aten::matmul", "theirs"] == 2
    request, infer = (next(span for span in spans if span.name == name) for name in ("request", "infer"))
    assert len(spans) == 2
    assert infer.parent_id == request.span_id
    assert request.start_ns <= infer.start_ns <= infer.end_ns <= request.end_ns


def test_the_profiler_may_begin_and_end_inside_a_stage():
    """A stage that holds the profiler's whole life is recorded, and so are those before and after it."""
    with capture(warmup=0) as spans, stage("outside"):
        for name in ("before", "during", "after"):
            with stage(name):
                if name == "during":
                    assert profiled(stage)[1]["aten::matmul", "theirs"] == 2
    assert Counter(span.name for span in spans) == dict.fromkeys(
        ("outside", "before", "during", "request", "infer", "after"), 1
    )
    names = {span.span_id: span.name for span in spans}
    parents = {span.name: names.get(span.parent_id) for span in spans}
    assert parents["request"] == "during"
    assert parents["after"] == "outside"
