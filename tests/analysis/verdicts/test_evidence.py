"""Segments and evidence: what the host and the GPU were doing between two points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._busy.known import NO_DEVICE, SEVERAL_DEVICES
from gpuscope.analysis._structure.segments import segments_of
from gpuscope.analysis._verdicts.evidence import Activity, gather

from ..recordings import Stage, recording, repeat
from .simulate import Machine
from .workloads import WORKLOADS


def kinds(*stages: Stage, name: str = "x") -> list[Activity]:
    """Kinds of the segments that belong to stages of a name."""
    stored = recording(*stages)
    evidence = gather(stored)
    owners = stored.stage[evidence.segments.owner]
    return [Activity(kind) for kind, owner in zip(evidence.kind, owners, strict=True) if stored.names[owner] == name]


def request(*inside: Stage, end: float = 1000, gpu: tuple[float, float] | None = None) -> Stage:
    """A request around stages, that the GPU keeps up with unless said otherwise."""
    return Stage("request", 0, end, gpu=gpu or (4, end + 3), inside=inside)


AFTER = Stage("after", 900, 990, gpu=(903, 993))
"""A stage that keeps the one before it from being the last, where a wait could hide."""


def test_nothing_is_known_of_nothing():
    """An empty recording has no segments and no evidence."""
    evidence = gather(recording())
    assert len(evidence.kind) == len(evidence.idle_ns) == 0


def test_a_request_is_cut_at_every_start_and_end():
    """Segments belong to the innermost stage, and together are as long as the request."""
    nested = Stage("a", 100, 300, inside=[Stage("b", 150, 200)])
    segments, tangled = segments_of(recording(request(nested, Stage("c", 300, 400))))
    assert segments.owner.tolist() == [0, 1, 2, 1, 0, 3, 0]
    assert ((segments.host_end_ns - segments.host_start_ns) // 1000).tolist() == [100, 50, 50, 100, 0, 100, 600]
    assert not tangled.any()


def test_stages_that_begin_and_end_together_are_nested_as_their_parents_say():
    """At one instant the inner stage ends first and starts last; an empty one does both."""
    empty = Stage("c", 5, 5)
    segments, tangled = segments_of(recording(Stage("a", 0, 9, inside=[Stage("b", 0, 9, inside=[empty])])))
    assert segments.owner.tolist() == [0, 1, 2, 1, 0]
    assert not tangled.any()


def test_requests_whose_stages_overlap_have_no_segments():
    """Concurrent tasks: the host is in two stages at a time, so that neither gets the time. Other requests do."""
    overlapping = request(Stage("a", 100, 300), Stage("b", 200, 400))
    segments, tangled = segments_of(recording(overlapping, request(Stage("a", 100, 300)).shifted(5000)))
    assert tangled.tolist() == [True] * 3 + [False] * 2
    assert set(segments.owner.tolist()) == {3, 4}


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (Stage("x", 100, 200, gpu=(104, 800)), Activity.AHEAD),
        (Stage("x", 100, 800, gpu=(104, 803)), Activity.PACED),
        (Stage("x", 100, 800, gpu=(104, 815)), Activity.PACED),
        (Stage("x", 100, 800, gpu=(104, 820)), Activity.PACED),
        (Stage("x", 100, 800, gpu=(780, 801)), Activity.WAITS),
        (Stage("x", 100, 800, gpu=(400, 801)), Activity.UNCLEAR),
        (Stage("x", 100, 800, gpu=(104, 803), attributes={"bytes": 5_000_000}), Activity.COPIES),
        (Stage("x", 100, 800, gpu=(400, 803), attributes={"bytes": 5_000_000}), Activity.COPIES),
        (Stage("x", 100, 800, gpu=(104, 803), attributes={"bytes": 5000}), Activity.PACED),
        (Stage("x", 100, 800, gpu=(104, 803), attributes={"bytes": "many"}), Activity.PACED),
        (Stage("x", 100, 800, gpu=(104, 803), attributes={"bytes": float("nan")}), Activity.PACED),
        (Stage("x", 100, 800), Activity.UNTIMED),
        (Stage("x", 100, 800, gpu=(104, 803), flags=RowFlag.CLAMPED), Activity.UNTIMED),
        (Stage("x", 100, 800, gpu=(130, 801), uncertainty=50), Activity.PACED),
    ],
)
def test_a_segment_is_read_by_how_far_the_gpu_is_behind_at_its_ends(stage, kind):
    """Behind at the end: ahead. Behind at the start only: waits. Never: paced, or a copy at a copy's rate."""
    assert kinds(request(stage, AFTER)) == [kind]


def test_the_last_stage_of_a_request_without_a_visible_wait_is_unclear():
    """The program waits for the GPU somewhere; where no stage shows it, the last one may be it, and what follows."""
    paced = Stage("x", 100, 800, gpu=(104, 803))
    assert kinds(request(Stage("y", 10, 90, gpu=(13, 93)), paced)) == [Activity.UNCLEAR]
    assert kinds(request(paced, AFTER)) == [Activity.PACED]
    assert kinds(request(Stage("y", 10, 20, gpu=(13, 93)), paced)) == [Activity.PACED]


def test_time_outside_inner_stages_is_read_like_a_stage():
    """A request that waits in its own code, after a stage that left the GPU behind, is seen to wait."""
    stages = request(Stage("infer", 10, 50, gpu=(13, 990)), end=1000, gpu=(3, 1001))
    assert kinds(stages, name="request") == [Activity.PACED, Activity.WAITS]


def test_gpu_work_on_two_streams_at_a_time_counts_once():
    """Idle time is what the union of GPU intervals leaves, not what their sum does."""
    left = Stage("left", 10, 20, gpu=(20, 620), stream=1)
    right = Stage("right", 30, 40, gpu=(40, 640), stream=2)
    join = Stage("join", 50, 650, gpu=(640, 650))
    evidence = gather(recording(request(left, right, join, gpu=(4, 1000))))
    assert evidence.idle_ns[0] == (1000 - (640 - 20)) * 1000


def test_the_work_of_another_process_on_the_same_gpu_is_not_idleness():
    """Devices are told apart by their uuid: one GPU of two processes is one."""
    waiting = Stage("idle", 0, 1000, gpu=(3, 1003), process="one", device=0)
    working = Stage("busy", 0, 10, gpu=(3, 903), process="two", device=0)
    elsewhere = Stage("busy", 0, 10, gpu=(3, 903), process="two", device=1)
    assert gather(recording(waiting, working)).idle_ns[0] == 103_000
    assert gather(recording(waiting, elsewhere)).idle_ns[0] == 1_003_000


def test_the_device_of_a_request_is_that_of_its_stages():
    """None without GPU times, and not one where there are several."""
    assert gather(recording(Stage("a", 0, 9))).device.tolist() == [NO_DEVICE]
    one, other = Stage("b", 10, 20, gpu=(12, 22)), Stage("c", 30, 40, gpu=(32, 42), device=1)
    assert set(gather(recording(request(one, other))).device.tolist()) == {SEVERAL_DEVICES}


def test_a_wait_is_for_the_stages_whose_work_lies_within_it():
    """For each as long as its work; the one that launched last may be the shortest of them."""
    stages = request(
        Stage("small", 10, 20, gpu=(13, 60)),
        Stage("large", 30, 40, gpu=(60, 680)),
        Stage("last", 45, 55, gpu=(680, 700)),
        Stage("x", 60, 703, gpu=(700, 704)),
    )
    stored = recording(stages)
    evidence = gather(stored)
    (waiting,) = (evidence.kind == Activity.WAITS).nonzero()[0]
    awaited = {
        stored.names[stored.stage[owner]]: ns // 1000
        for segment, owner, ns in zip(*evidence.awaited, strict=True)
        if segment == waiting
    }
    assert awaited == {"large": 620, "last": 20}


def test_a_request_ends_when_all_its_gpu_work_has():
    """Work on another stream that goes on after the request's own events is part of it."""
    aside = Stage("aside", 10, 20, gpu=(13, 5000), stream=1)
    stored = recording(request(aside))
    assert (gather(stored).end_ns - stored.host_start_ns[0]).tolist() == [5_000_000, 5_000_000]


def test_gaps_are_between_requests_of_one_thread():
    """Each thread has its own gaps; the last request has none."""
    one = repeat(Stage("request", 0, 100, gpu=(3, 103)), 3, every=500)
    other = [Stage("request", 50, 450, gpu=(53, 453), thread="other")]
    assert gather(recording(*one, *other)).gap_ns.tolist() == [400_000, -1, 400_000, -1]


def test_waits_and_idle_time_of_inner_stages_are_those_of_outer_ones_too():
    """A stage's figures include those of all stages inside it."""
    inner = Stage("x", 100, 800, gpu=(780, 801))
    evidence = gather(recording(request(Stage("outer", 50, 850, gpu=(55, 852), inside=[inner]), AFTER)))
    assert evidence.wait_ns[:3].tolist() == [700_000] * 3
    assert evidence.waits[:3].tolist() == [1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(WORKLOADS)), st.integers(0, 99))
def test_no_share_of_time_exceeds_the_time(name, seed):
    """Waiting, idle, unclear and unproven time are each between nothing and the stage's duration, with their parts."""
    machine = Machine(seed=seed, spread=0.5)
    WORKLOADS[name].run(machine)
    stored = machine.recording()
    evidence = gather(stored)
    duration_ns = evidence.end_ns - stored.host_start_ns
    for part, whole in (
        (evidence.wait_ns, duration_ns),
        (evidence.idle_ns + evidence.unproven_ns, duration_ns),
        (evidence.unclear_ns + evidence.paced_ns, evidence.idle_ns),
        (evidence.copy_ns, evidence.wait_ns),
        (evidence.gap_idle_ns[evidence.gap_ns >= 0], evidence.gap_ns[evidence.gap_ns >= 0]),
    ):
        assert (part >= 0).all()
        assert (part <= whole).all()


def test_what_a_wait_is_for_is_known_within_a_request_alone():
    """A launch in the first segment counts, one in the request before does not, and only waits are for anything."""
    launching = Stage("x", 10, 505, gpu=(500, 506))
    first = Stage("request", 0, 1000, gpu=(3, 1003), inside=[launching, AFTER])
    alone = Stage("request", 2000, 3000, gpu=(2003, 3003), inside=[Stage("x", 2010, 2505, gpu=(2500, 2506))])
    stored = recording(first, alone)
    evidence = gather(stored)
    waits = evidence.kind == Activity.WAITS
    assert [stored.names[stored.stage[row]] for row in evidence.segments.owner[waits]] == ["x", "x"]
    assert (evidence.awaited.segment.tolist(), evidence.awaited.owner.tolist()) == (
        np.flatnonzero(waits).tolist(),
        [0, 3],
    )
    # The same wait, with nothing in its own request that was launched before it.
    bare = Stage("x", 2000, 2505, gpu=(2500, 2506))
    evidence = gather(recording(first, bare))
    assert evidence.awaited.owner.tolist() == [0]


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (Stage("x", 100, 800, gpu=(104, 973)), Activity.LAGS),  # Behind by a little less than a fifth of 870 µs.
        (Stage("x", 100, 800, gpu=(104, 850)), Activity.LAGS),
        (Stage("x", 100, 800, gpu=(104, 849)), Activity.PACED),
        (Stage("x", 100, 800, gpu=(104, 977)), Activity.AHEAD),
        (Stage("x", 100, 150, gpu=(104, 163)), Activity.PACED),  # Behind by no more than 10 µs and the uncertainty.
        (Stage("x", 100, 150, gpu=(104, 164)), Activity.AHEAD),
        (Stage("x", 100, 300, gpu=(150, 350), uncertainty=50), Activity.PACED),  # Nothing of that is certain.
        (Stage("x", 100, 200, gpu=(110, 203)), Activity.PACED),  # No wait explains what is not behind.
        (Stage("x", 100, 115, gpu=(112, 118)), Activity.PACED),
        (Stage("x", 100, 800, gpu=(625, 801)), Activity.WAITS),  # A quarter of its time after the stream was there.
        (Stage("x", 100, 800, gpu=(624, 801)), Activity.UNCLEAR),
        (Stage("x", 100, 800, gpu=(135, 801)), Activity.UNCLEAR),  # Behind at the start by a twentieth of its time.
        (Stage("x", 100, 800, gpu=(134, 801)), Activity.PACED),
        (Stage("x", 100, 800, gpu=(104, 803), attributes={"bytes": 696_000}), Activity.COPIES),
        (Stage("x", 100, 800, gpu=(104, 803), attributes={"bytes": 695_999}), Activity.PACED),
    ],
)
def test_a_segment_is_read_by_thresholds(stage, kind):
    """Each at the last value on one side and the first on the other."""
    assert kinds(request(stage, AFTER)) == [kind]


def test_a_gpu_that_lags_behind_launches_does_so_by_a_fiftieth():
    """Beside a long stage, the last kernels are longer too."""
    for end, kind in ((8163, Activity.PACED), (8164, Activity.LAGS)):  # A fiftieth of 8,159 µs, or a little less.
        last = Stage("after", 8900, 8990, gpu=(8903, 8993))
        assert kinds(request(Stage("x", 1, 8000, gpu=(5, end)), last, end=9000)) == [kind]


def test_time_without_gpu_times_is_told():
    """A stage without them hides what the GPU did in all its time and up to the next events, one with them nothing."""
    stored = recording(request(Stage("x", 100, 800), AFTER))
    assert gather(stored).untimed_ns.tolist() == [900_000, 700_000, 0]
