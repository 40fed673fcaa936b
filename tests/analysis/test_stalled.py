"""What the report says of garbage collections, from files with events."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

import gpuscope
from gpuscope import stage
from gpuscope._data.attributes import MEMORY_PEAK, SYNC_BYTES, SYNC_COUNT, SYNCS
from gpuscope.analysis._reading.stalls import Collected, Stalls
from gpuscope.analysis._verdicts.stalled import sentences, stalls
from gpuscope.analysis.read import read_lines
from gpuscope.analysis.runs import only, runs_of
from gpuscope.testing import capture

from .recordings import Stage, recording, repeat


def with_collections(each, generation=2):
    """Twenty requests of 1 ms, and one of 2 ms in which a collection took half; `each` more took so many us."""
    found = recording(*repeat(Stage("request", 0, 1000), 20, 3000), Stage("request", 100_000, 102_000))
    starts = found.host_start_ns.tolist()
    met = {20: (Collected(starts[20], 1_000_000, generation),)}
    if each:
        met |= {row: (Collected(starts[row], each * 1000, generation),) for row in range(20)}
    object.__setattr__(found, "stalls", Stalls(met))
    return found


def test_the_slow_requests_are_told_of():
    """The share of the slowest tenth, that of all, and what to do."""
    (said,) = sentences(with_collections(0))
    assert said.startswith("Garbage collection took 33% of the slow requests `request`")
    assert "4.5% of all" in said
    assert "`gc.freeze()`" in said


def test_young_objects_want_another_advice():
    """What stays is not what takes the time."""
    (said,) = sentences(with_collections(0, generation=0))
    assert "gc.freeze" not in said
    assert "set_threshold" in said


def test_little_is_not_worth_a_line():
    """Less than 1 % of the slow requests."""
    assert list(sentences(recording(*repeat(Stage("request", 0, 1000), 20, 3000)))) == []


def test_a_collection_counts_as_far_as_it_is_within():
    """One that began before the request takes only its part of it."""
    found = recording(Stage("request", 0, 1000))
    start = int(found.host_start_ns[0])
    object.__setattr__(found, "stalls", Stalls({0: (Collected(start - 900_000, 1_000_000, 2),)}))
    (said,) = sentences(found)
    assert "took 10% of" in said


def test_files_have_them():
    """What a stage was open in is found by its row, and stays with it when one run is taken out."""
    with capture() as spans:
        with stage("request"):
            gc.collect()
        with stage("other"):
            pass
        gpuscope.flush()
    found = spans.recording()
    row = found.names.index("request")
    (collected,) = found.stalls.collections[row]
    assert collected.generation == 2
    assert found.host_start_ns[row] <= collected.start_ns < collected.start_ns + collected.took_ns
    assert only(found, runs_of(found)[0]).stalls == found.stalls
    assert found.stalls.kept(np.array([-1, -1])) == Stalls()


def spans_with(events):
    """A line with one span that has these events."""
    attributes = [
        {"key": "gpuscope.stage", "value": {"stringValue": "request"}},
        {"key": "gpuscope.host.duration", "value": {"doubleValue": 1.0}},
        {"key": "thread.id", "value": {"intValue": "1"}},
    ]
    span = {
        "traceId": "0" * 31 + "1",
        "spanId": "0" * 15 + "1",
        "startTimeUnixNano": "1000",
        "endTimeUnixNano": "2000",
        "attributes": attributes,
        "events": events,
    }
    scope = {"scope": {"name": "gpuscope"}, "spans": [span]}
    return json.dumps({"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [scope]}]})


def test_files_have_stalls():
    """The kind of a stall is found by the row of its stage, and stays with it."""
    values = [{"key": "gpuscope.stall.kind", "value": {"stringValue": "gpu_not_done"}}]
    found = read_lines([spans_with([{"name": "gpuscope.stall", "timeUnixNano": "1", "attributes": values}])])
    assert found.stalls.stalled == {0: "gpu_not_done"}
    assert only(found, runs_of(found)[0]).stalls == found.stalls


def test_the_longest_stalls_are_told():
    """Three at most, and how many more there are."""
    found = recording(*[Stage("infer", 1e6 * number, 1e6 * number + 1e5 * number) for number in range(1, 6)])
    object.__setattr__(found, "stalls", Stalls(stalled=dict.fromkeys(range(5), "host_never_left")))
    (said,) = stalls(found)
    assert said.startswith("5 stalls: host_never_left in `infer`, 500 ms, trace ")
    assert said.endswith(f"host_never_left in `infer`, 300 ms, trace {3:032x}; and 2 more.")
    assert list(stalls(recording(Stage("infer", 0, 1)))) == []


@pytest.mark.parametrize(
    "events",
    [
        7,
        [7],
        [{}],
        [{"name": "gpuscope.gc", "timeUnixNano": "1"}],
        [{"name": "gpuscope.stall", "timeUnixNano": "1"}],
        [{"name": "gpuscope.stall", "timeUnixNano": "1", "attributes": []}],
        [{"name": "gpuscope.gc", "timeUnixNano": "-1", "attributes": []}],
        [
            {
                "name": "gpuscope.gc",
                "timeUnixNano": "1",
                "attributes": [
                    {"key": "gpuscope.gc.duration", "value": {"intValue": "-5"}},
                    {"key": "gpuscope.gc.generation", "value": {"intValue": "2"}},
                ],
            }
        ],
    ],
)
def test_events_that_cannot_be_read_are_counted(events):
    """The span stays."""
    found = read_lines([spans_with(events)])
    assert len(found.stage) == 1
    assert found.stalls == Stalls()
    assert found.losses.skipped_lines == {"malformed events": 1}


def test_memory_that_ran_out():
    """It is known by the exception's type, whatever module that is in."""
    event = {
        "name": "exception",
        "timeUnixNano": "1500",
        "attributes": [{"key": "exception.type", "value": {"stringValue": "torch.OutOfMemoryError"}}],
    }
    assert read_lines([spans_with([event])]).stalls.out_of_memory == (0,)


def out_of_memory(*rows, peaks=()):
    """A request with two stages, from which the exception went out of these rows."""
    inner = [
        Stage(name, 100 * number, 100 * number + 50, attributes={MEMORY_PEAK: peak} if peak else {})
        for number, (name, peak) in enumerate([("prefill", 0), ("decode", 0), *peaks], 1)
    ]
    found = recording(Stage("request", 0, 2000, inside=inner))
    object.__setattr__(found, "stalls", Stalls({}, rows))
    return found


def test_the_stage_the_request_and_the_largest_peaks_are_named():
    """Of the stages that the exception left, the innermost; peaks in descending order, three at most."""
    peaks = [("embed", 10**9), ("attend", 5 * 10**9), ("attend", 7 * 10**9), ("sample", 2 * 10**9), ("small", 10**6)]
    (said,) = sentences(out_of_memory(0, 2, peaks=peaks))
    assert said == (
        "GPU memory ran out in `decode` of request `request`. "
        "Largest peaks: `attend` 7.00 GB, `sample` 2.00 GB, `embed` 1.00 GB."
    )


def test_without_peaks_it_says_how_to_have_them():
    """The request itself may be the innermost stage."""
    (said,) = sentences(out_of_memory(0))
    assert said == "GPU memory ran out in `request`. GPUSCOPE_MEMORY=1 tells which stages have how much."


def test_watched_synchronisations_are_told_by_stage():
    """With how often, how many bytes, and the lines, three at most."""
    told = {SYNCS: ["a.py:1 item", "a.py:2 cpu"], SYNC_COUNT: 5, SYNC_BYTES: 2000}
    more = {SYNCS: ["a.py:1 item", "a.py:3 to", "a.py:4 to"], SYNC_COUNT: 4, SYNC_BYTES: 0}
    found = recording(
        Stage("request", 0, 100, inside=[Stage("decode", 10, 20, attributes=told)]),
        Stage("request", 200, 300, inside=[Stage("decode", 210, 220, attributes=more)]),
        Stage("odd", 400, 500, attributes={SYNCS: "text", SYNC_COUNT: "many"}),
    )
    first, odd = sentences(found)
    assert first == (
        "In `decode` the host waited for the GPU, or copied pageable memory, 9 times and copied 2,000 bytes in "
        "2 watched calls: a.py:1 item; a.py:2 cpu; a.py:3 to; and 1 more."
    )
    assert odd.startswith("In `odd`")
