"""Replays of CUDA graphs in host time: which times are a replay's own, and what becomes of them in a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuscope._cuda.clock import GpuClock
from gpuscope._cuda.graphs.placing import Placed, largest_crowd, place
from gpuscope._cuda.graphs.rows import InnerRows
from gpuscope._data.batch import RowFlag
from gpuscope._data.interfaces import Anchor
from gpuscope._data.record import Site, ThreadInfo
from gpuscope._data.row import ROW

ANCHOR_NS = 10**12


def new_clock():
    """A clock whose anchor is good to 3.5 µs."""
    clock = GpuClock()
    clock.calibrate(Anchor(None, ANCHOR_NS, 3500), None)
    return clock


def placed(*replays, launched_ms=0.0):
    """Place replays; each is a list of (start, end) of stages and the fence, in milliseconds from the anchor."""
    rows = [[fence - at for stage in stages for at in stage] + [fence] for *stages, fence in replays]
    places = np.arange(len(rows[0]) - 1)
    launched_ns = np.full(len(rows), ANCHOR_NS + round(launched_ms * 1e6), np.int64)
    return place(np.array(rows), (places[::2], places[1::2]), launched_ns, new_clock(), 0)


def test_times_of_their_own_are_taken():
    """Stages before the fence, after the launch and in order are placed by their distance from the anchor."""
    right, start_ns, end_ns, uncertainty_ns, early_ns = placed(
        [(1.0, 2.0), (2.0, 3.0), 3.1], [(4.0, 5.0), (5.0, 6.0), 6.1]
    )
    assert right.tolist() == [True, True]
    assert ((start_ns - ANCHOR_NS) // 1000).tolist() == [[1000, 2000], [4000, 5000]]
    assert ((end_ns - ANCHOR_NS) // 1000).tolist() == [[2000, 3000], [5000, 6000]]
    assert (uncertainty_ns > 3500).all()
    assert early_ns.tolist() == [0, 0]


@pytest.mark.parametrize(
    "second",
    [
        [(4.0, 3.9), (5.0, 6.0), 6.1],  # Ends before it starts.
        [(4.0, 5.0), (5.0, 6.2), 6.1],  # Ends after the fence: of a later launch.
        [(2.9, 5.0), (5.0, 6.0), 6.1],  # Starts before the launch before it has ended.
        [(4.0, 5.0), (5.0, float("nan")), 6.1],
    ],
)
def test_a_mixed_interval_takes_its_replay_with_it(second):
    """A replay with a time that can't be its own is left out whole, and those beside it are not."""
    right, *_ = placed([(1.0, 2.0), (2.0, 3.0), 3.1], second, [(7.0, 8.0), (8.0, 9.0), 9.1])
    assert right.tolist() == [True, False, True]


def test_what_began_long_before_its_launch_is_left_out():
    """A stage a tenth of a millisecond before its launch has the time of an earlier one."""
    right, *_ = placed([(0.9, 1.5), 1.6], launched_ms=1.0)
    assert right.tolist() == [False]


def test_what_began_a_little_before_its_launch_is_moved_as_a_whole():
    """Within what the clocks may be off, all stages of a replay move to the launch together."""
    right, start_ns, end_ns, _, early_ns = placed([(1.0, 2.0), (2.5, 3.0), 3.1], launched_ms=1.002)
    assert right.tolist() == [True]
    assert 1900 < early_ns[0] <= 2000
    assert abs(start_ns[0, 0] - ANCHOR_NS - 1_002_000) <= 1
    assert abs(start_ns[0, 1] - end_ns[0, 0] - 500_000) <= 1


@given(st.lists(st.tuples(st.floats(0.001, 5), st.floats(0.001, 5)), min_size=1, max_size=6))
def test_each_stage_is_placed_as_a_record_would_be(stages):
    """The same place, but for rounding, as `GpuClock.place` gives one stage."""
    position, spans = 0.0, []
    for gap, length in stages:
        spans.append((position + gap, position + gap + length))
        position += gap + length
    right, start_ns, end_ns, uncertainty_ns, _ = placed([*spans, position + 1])
    assert right.all()
    for index, (start, end) in enumerate(spans):
        as_record = new_clock().place(end, end - start)
        assert abs(start_ns[0, index] - as_record[0]) <= 2
        assert abs(end_ns[0, index] - as_record[1]) <= 2
        assert abs(uncertainty_ns[0, index] - as_record[2]) <= 1


def test_stages_that_share_nodes_meet():
    """Whatever the rounding, a stage begins where the one before it ends, and the one around both where they do."""
    rng = np.random.default_rng(0)
    to_fence_ms = np.sort(rng.uniform(0, 30, (50, 3)).astype(np.float32))[:, ::-1]
    distances = np.hstack([to_fence_ms, 7_000 + 40 * np.arange(50, dtype=np.float32)[:, np.newaxis]])
    nodes = np.array([0, 0, 1]), np.array([2, 1, 2])  # One around two.
    right, start_ns, end_ns, *_ = place(distances.astype(np.float64), nodes, np.full(50, ANCHOR_NS), new_clock(), 0)
    assert right.all()
    assert (start_ns[:, 0] == start_ns[:, 1]).all()
    assert (end_ns[:, 1] == start_ns[:, 2]).all()
    assert (end_ns[:, 2] == end_ns[:, 0]).all()


def test_without_an_anchor_a_replay_begins_at_its_launch():
    """Its stages keep their lengths and distances, and may be as late as they were seen done."""
    distances, nodes = np.array([[5.0, 4.0, 4.0, 1.0, 0.0]] * 2), (np.array([0, 2]), np.array([1, 3]))
    launched_ns, seen_ns = np.array([ANCHOR_NS, ANCHOR_NS + 1000]), ANCHOR_NS + 10**7
    right, start_ns, end_ns, uncertainty_ns, _ = place(distances, nodes, launched_ns, GpuClock(), seen_ns)
    assert right.tolist() == [True, True]
    assert (start_ns - launched_ns[:, np.newaxis]).tolist() == [[0, 1_000_000]] * 2
    assert (end_ns - start_ns).tolist() == [[1_000_000, 3_000_000]] * 2
    assert (uncertainty_ns == seen_ns - end_ns).all()


class TimedStream(NamedTuple):
    """A stream of a GPU."""

    index: int
    raw: int


def on_stream(timed_stream, *times_us):
    """Replays of one stage on a stream, each (start, end)."""
    times_ns = np.array(times_us, np.int64).reshape(-1, 2) * 1000
    replays = [SimpleNamespace(timed_stream=timed_stream)] * len(times_us)
    return Placed(None, replays, times_ns[:, :1], times_ns[:, 1:], times_ns[:, :1], np.zeros(len(times_us), np.bool_))


def test_replays_at_once_are_counted_by_device():
    """As many as overlap on one GPU; those that follow each other, on one stream or several, are one."""
    first, second, third = (TimedStream(0, raw) for raw in range(3))
    other = TimedStream(1, 0)
    assert largest_crowd([]) == 0
    assert largest_crowd([on_stream(first, (0, 100), (99, 200))]) == 1
    assert largest_crowd([on_stream(first, (0, 100)), on_stream(second, (100, 200))]) == 1
    assert largest_crowd([on_stream(first, (0, 100)), on_stream(other, (50, 200))]) == 1
    crowd = [on_stream(first, (0, 100), (99, 200)), on_stream(second, (50, 150)), on_stream(third, (140, 160))]
    assert largest_crowd(crowd) == 3
    assert largest_crowd([*crowd, on_stream(first)]) == 3


ATTENTION, MLP, REQUEST = Site("attention", {}), Site("mlp", {}), Site("request", {})


class Graph:
    """What is known of three stages, the last inside the second."""

    sites, parents = (ATTENTION, MLP, ATTENTION), (-1, -1, 1)

    def __len__(self):
        return 3


def new_placed(replays):
    """So many replays of the graph, in a request each."""
    trace = SimpleNamespace(trace_id=5 << 64 | 6, root=REQUEST)
    launched = [
        SimpleNamespace(
            outer=SimpleNamespace(trace=trace, span_id=100 + number),
            timed_stream=SimpleNamespace(raw=7, index=1),
            thread=ThreadInfo(number, "main"),
            launched_ns=1000 + number,
        )
        for number in range(replays)
    ]
    times = np.arange(replays * 3).reshape(replays, 3)
    return Placed(Graph(), launched, times + 10, times + 20, times + 30, np.zeros(replays, np.bool_))


def cells_of(rows, placed, sites, threads):
    """The rows of replays, by names."""
    settle = lambda outer: (outer.trace.trace_id, outer.span_id, True)  # noqa: E731
    return np.frombuffer(rows.cells(placed, sites, threads, settle), ROW)


def test_cells_hold_what_records_would():
    """Ids, parents, tables, times and flags of each stage of each replay."""
    for site in (ATTENTION, MLP):
        site.calls = 0
    sites, threads = {REQUEST: 0}, {}
    cells = cells_of(InnerRows(0), new_placed(2), sites, threads)
    assert len(cells) == 6
    ids = cells["span_id"]
    assert len(set(ids.tolist())) == 6
    assert (ids >= 2**63).all()
    assert cells["parent_id"].tolist() == [100, 100, ids[1], 101, 101, ids[4]]
    assert cells[["trace_high", "trace_low"]].tolist() == [(5, 6)] * 6
    assert [list(sites)[i].name for i in cells["site"]] == ["attention", "mlp", "attention"] * 2
    assert cells["thread"].tolist() == [0, 0, 0, 1, 1, 1]
    assert cells["host_start_ns"].tolist() == cells["host_end_ns"].tolist() == [1000] * 3 + [1001] * 3
    assert cells["gpu_start_ns"].tolist() == list(range(10, 16))
    assert cells["flags"].tolist() == [int(RowFlag.IN_GRAPH)] * 6
    assert (ATTENTION.calls, MLP.calls) == (4, 2)


def test_first_calls_are_warm_up():
    """Calls are counted in the order of the replays, and the first of each stage flagged."""
    for site in (ATTENTION, MLP):
        site.calls = 0
    rows, warmup = InnerRows(3), int(RowFlag.WARMUP)
    assert (cells_of(rows, new_placed(2), {}, {})["flags"] & warmup).tolist() == [1, 1, 1, 1, 1, 0]
    assert (cells_of(rows, new_placed(3), {}, {})["flags"] & warmup).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]
