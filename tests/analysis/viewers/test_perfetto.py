"""The Chrome trace: tracks that nest, arrows that find their slices."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._viewers.tracks import gpu_slices, host_slices
from gpuscope.analysis.perfetto import events, write_perfetto

from ..recordings import Stage, recording

PIPELINE = Stage(
    "request",
    0,
    900,
    gpu=(3, 898),
    inside=[
        Stage("infer", 10, 300, gpu=(15, 880), attributes={"batch_size": 8}),
        Stage("copy back", 300, 890, gpu=(880, 888)),
    ],
)
TIMES = st.integers(0, 60).map(float)
INTERVALS = st.tuples(TIMES, TIMES).map(sorted)
STAGES = st.builds(
    lambda host, gpu, stream, thread, inside: Stage(
        "s", *host, gpu=gpu, stream=stream, thread=thread, inside=inside, uncertainty=2
    ),
    INTERVALS,
    st.none() | INTERVALS,
    st.integers(0, 1),
    st.sampled_from("ab"),
    st.lists(
        st.builds(lambda host, gpu: Stage("t", *host, gpu=gpu, uncertainty=2), INTERVALS, st.none() | INTERVALS),
        max_size=3,
    ),
)


def slices(trace, *, phase="X"):
    """The events of a phase."""
    return [event for event in trace if event["ph"] == phase]


def names(trace, kind="thread_name"):
    """Names of tracks by (pid, tid)."""
    return {(event["pid"], event.get("tid")): event["args"]["name"] for event in trace if event["name"] == kind}


def test_times_are_microseconds_since_the_first_stage():
    """The trace starts at zero, and keeps the nanoseconds."""
    trace = slices(events(recording(Stage("a", 1000, 1001.5), Stage("b", 1002.001, 1003))))
    assert [(event["ts"], event["dur"]) for event in trace] == [(0, 1.5), (2.001, 0.999)]


def test_one_track_a_thread_and_a_stream():
    """Each thread and each stream has one track, under its process and under its GPU."""
    stages = [
        Stage("a", 0, 9, gpu=(1, 5)),
        Stage("a", 0, 9, gpu=(1, 5), thread="worker", stream=255),
        Stage("a", 0, 9, gpu=(1, 5), process="other", device=1),
    ]
    trace = list(events(recording(*stages)))
    tracks, processes = names(trace), {pid: name for (pid, _), name in names(trace, "process_name").items()}
    assert sorted((processes[pid], name) for (pid, _), name in tracks.items()) == [
        ("other", "MainThread"),
        ("other: GPU 1 NVIDIA H200", "default stream"),
        ("server", "MainThread"),
        ("server", "worker"),
        ("server: GPU 0 NVIDIA H200", "default stream"),
        ("server: GPU 0 NVIDIA H200", "stream 0xff"),
    ]
    numbers = [*processes, *(tid for _, tid in tracks)]
    assert len(set(numbers)) == len(numbers)
    assert Counter((event["pid"], event["tid"]) for event in slices(trace)) == dict.fromkeys(tracks, 1)


def test_arrows_lead_from_launch_to_execution():
    """Each stage with GPU times has an arrow of its own, from its host slice's start to its GPU slice's."""
    whole = recording(PIPELINE, Stage("host only", 1000, 1100))
    trace = list(events(whole))
    starts, ends = slices(trace, phase="s"), slices(trace, phase="f")
    assert sorted(event["id"] for event in starts) == sorted(event["id"] for event in ends) == [1, 2, 3]
    assert all(event["bp"] == "e" for event in ends)
    for start, end in ((a, b) for a in starts for b in ends if a["id"] == b["id"]):
        row = start["id"] - 1
        host, gpu = (
            next(
                each for each in slices(trace) if at.items() >= {key: each[key] for key in ("pid", "tid", "ts")}.items()
            )
            for at in (start, end)
        )
        assert host["name"] == gpu["name"] == whole.names[whole.stage[row]]
        assert host["pid"] != gpu["pid"]


def test_what_a_slice_says():
    """A slice carries the application's attributes, what is known of its measurement, and the ids to find it by."""
    stage = Stage("a", 0, 9, gpu=(4, 8), flags=int(RowFlag.WARMUP), attributes={"n": 1, "odd": math.nan, "list": [1]})
    host, gpu = (event["args"] for event in slices(events(recording(stage))))
    assert host.items() >= {"n": 1, "odd": "nan", "list": "[1]", "gpuscope.warmup": True}.items()
    assert gpu.items() >= {"gpuscope.launch_to_start": 4e-6, "gpuscope.clock.uncertainty": 3e-6}.items()
    assert host["span_id"] == gpu["span_id"] == "0000000000000001"


def test_coroutines_that_overlap_get_another_layer():
    """Stages of one thread that overlap without being inside each other are on two tracks with the thread's name."""
    trace = list(events(recording(Stage("a", 0, 10), Stage("b", 5, 15), Stage("c", 11, 12))))
    tracks = names(trace)
    placed = {event["name"]: tracks[event["pid"], event["tid"]] for event in slices(trace)}
    assert placed == {"a": "MainThread", "b": "MainThread, overlapping 1", "c": "MainThread"}


def test_overlaps_within_the_uncertainty_are_none():
    """On a stream, what overlaps by less than the clock can tell stays on one track, after or inside the other."""
    inside = [Stage("first", 1, 2, gpu=(9, 20)), Stage("second", 2, 3, gpu=(19, 31))]
    found = gpu_slices(recording(Stage("outer", 0, 4, gpu=(10, 30), inside=inside)))
    assert found.layer.tolist() == [0, 0, 0]
    relative = [
        ((start - found.start_ns[0]) / 1e3, (end - found.start_ns[0]) / 1e3)
        for start, end in zip(found.start_ns, found.end_ns, strict=True)
    ]
    assert relative == [(0, 20), (0, 10), (10, 20)]


def test_real_overlaps_on_a_stream_get_another_layer():
    """Two threads that share a stream may overlap for long; neither slice is moved then."""
    found = gpu_slices(recording(Stage("a", 0, 1, gpu=(10, 50)), Stage("b", 0, 1, gpu=(30, 90), thread="worker")))
    assert found.layer.tolist() == [0, 1]
    assert ((found.end_ns - found.start_ns) / 1e3).tolist() == [40, 60]


def test_a_short_stage_at_the_end_of_another_stays_inside():
    """A stage inside another is not pushed out of it because it is short against the uncertainty."""
    outer = Stage("outer", 0, 100, gpu=(0, 100), inside=[Stage("inner", 98, 99, gpu=(98, 99))])
    found = gpu_slices(recording(outer))
    assert ((found.end_ns - found.start_ns) / 1e3).tolist() == [100, 1]


@given(st.lists(STAGES, max_size=8))
def test_slices_of_a_track_follow_or_contain_each_other(stages):
    """Whatever the times, no two slices of a layer overlap in part, in the order in which they are written."""
    whole = recording(*stages)
    for found in (host_slices(whole), gpu_slices(whole)):
        opened = defaultdict(list)
        for track, layer, start, end in zip(*(column.tolist() for column in found[1:]), strict=True):
            stack = opened[track, layer]
            while stack and stack[-1][1] <= start:
                stack.pop()
            assert start <= end
            assert all(first <= start and end <= last for first, last in stack)
            stack.append((start, end))


@given(st.lists(STAGES, max_size=8))
def test_slices_are_moved_by_no_more_than_the_uncertainty(stages):
    """Host slices are where they were measured; starts and ends of GPU slices within the uncertainty, each once."""
    whole = recording(*stages)
    host, gpu = host_slices(whole), gpu_slices(whole)
    assert sorted(host.row.tolist()) == list(range(len(whole.stage)))
    assert (host.start_ns == whole.host_start_ns[host.row]).all()
    assert (host.end_ns == whole.host_end_ns[host.row]).all()
    assert sorted(gpu.row.tolist()) == [row for row, stream in enumerate(whole.stream) if stream >= 0]
    # By the stage around it, by its neighbour, and by one that was itself moved.
    assert (abs(gpu.start_ns - whole.gpu_start_ns[gpu.row]) <= 3 * whole.uncertainty_ns[gpu.row]).all()
    assert (abs(gpu.end_ns - whole.gpu_end_ns[gpu.row]) <= 3 * whole.uncertainty_ns[gpu.row]).all()


@pytest.mark.parametrize("stages", [[], [PIPELINE]], ids=["empty", "pipeline"])
def test_the_file_is_json(tmp_path, stages):
    """The file is one JSON object with all events, also for an empty recording and for names in any script."""
    whole = recording(*stages, *[Stage('日本 "</script>', 5, 6)] * bool(stages))
    write_perfetto(whole, tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["traceEvents"] == list(events(whole))
