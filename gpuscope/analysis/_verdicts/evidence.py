"""
What the host and the GPU were doing, as far as stages can show it: the evidence that verdicts are made from.

It would be simpler to compare a stage's host time with its GPU time, and to call the longer one the bottleneck. That
fails: a GPU interval lies between two events on a stream, so it includes all the time in which the stream waited for
the host, and a whole request takes about equally long on both, whichever is slow.

So this module relies on another property. A stream comes to an event when everything launched before it is done. At
each start and end of a stage it is therefore known how far the GPU is *behind*: by the time from the host's passing
that point to the stream's reaching it. While the GPU is behind, it has work; when it is not, it has finished all that
was launched before. Requests are cut at every such point into segments. At both ends of a segment the facts are known;
what happened in between is a reading of the two, and `Activity` lists the readings. If the GPU was behind at the start
and the host left just as it caught up, the host waited. If it was behind at neither end, the host set the pace.

One thing cannot be read. A wait for work that was launched in the same segment begins and ends with a GPU that is not
behind, as host work does. Where that would change the verdict, the answer is "unknown", because a guess would send
people to optimise the wrong side. Nothing here decides: `decide` does. Nothing here knows a stage by its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.ancestors import ancestors
from gpuscope.analysis._structure.intervals import Intervals, covered, union
from gpuscope.analysis._structure.parts import work_end_ns
from gpuscope.analysis._structure.replays import replays_of
from gpuscope.analysis._structure.segments import segments_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._structure.replays import ReplayIntervals
    from gpuscope.analysis._structure.segments import Segments
    from gpuscope.analysis.recording import Recording

BEHIND_NS = 10_000
"""The GPU is behind only if by more than this and the clock's uncertainty: even an idle stream executes an event 3 to
10 µs after it is recorded."""
BEHIND_SHARE = 0.2
"""A GPU that is behind at the end by less than this part of the GPU interval has kept up, but for the last kernels."""
MET_SHARE = 0.05
"""If the GPU is behind at the start by less than this part of the host's time, a wait for it explains little of it."""
WAIT_TAIL = 0.25
"""A host that waited leaves soon after the stream has caught up: at most this part of its time comes after that."""
COPY_BYTES_PER_NS = 1.0
"""Blocking copies from pageable memory reach 3 GB/s and more. At less than 1 GB/s, the time was hardly the copy's."""
NO_DEVICE = -1
SEVERAL_DEVICES = -2


class Activity(IntEnum):
    """What the host and the GPU did in a segment."""

    UNTIMED = 0
    """No GPU times."""
    AHEAD = 1
    """The host left with the GPU still behind. If the host launched all along, the GPU had work all along."""
    WAITS = 2
    """The GPU was behind at the start, is not at the end, and the host left as soon as it was not: it waited."""
    COPIES = 3
    """Like `PACED`, in a stage that says how many `bytes` it moves, at a copy's rate: the host waited for the copy."""
    PACED = 4
    """The GPU kept up with the host. The host worked or launched, unless it waited for what was launched in here."""
    UNCLEAR = 5
    """The host worked, or it waited. Either the GPU was behind at the start, and the host may have waited for that and
    then for what it launched here; or it looks like `PACED`, but the request must wait somewhere and shows no wait."""


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Columns beside those of a `Recording`, one value per row, and columns of its segments. Times are nanoseconds."""

    segments: Segments
    kind: NDArray[np.int8]
    """Of `Activity`, one per segment."""
    segment_idle_ns: NDArray[np.int64]
    """One per segment: how long the device of the request had nothing to do, as far as is known."""
    waited_for: NDArray[np.int64]
    """One per segment: the row whose GPU work the host waited for, or -1."""
    tangled: NDArray[np.bool_]
    """Whether stages of its request overlap, so that the request has no segments."""
    device: NDArray[np.int64]
    """A number for the device of its request, or `NO_DEVICE`, or `SEVERAL_DEVICES`."""
    end_ns: NDArray[np.int64]
    """When all its work was done, on the host and on the GPU, inner stages included."""
    wait_ns: NDArray[np.int64]
    """Host time in it, inner stages included, that was spent waiting for the GPU or for a copy."""
    copy_ns: NDArray[np.int64]
    """The part of `wait_ns` that was spent on copies."""
    waits: NDArray[np.int64]
    """How often the host waited for the GPU in it, inner stages included."""
    idle_ns: NDArray[np.int64]
    """Time from its host start to `end_ns` in which the device had nothing to do, as far as is known."""
    unproven_ns: NDArray[np.int64]
    """Time not in `idle_ns` because the host is taken to have launched all along in segments that it left ahead."""
    paced_ns: NDArray[np.int64]
    """The part of `idle_ns` in which the host is taken to have set the pace."""
    unclear_ns: NDArray[np.int64]
    """The part of `idle_ns` in which the host may instead have waited for GPU work that does not show."""
    untimed_ns: NDArray[np.int64]
    """Host time in it for which no GPU times are known."""
    gap_ns: NDArray[np.int64]
    """For an outermost stage, the time until the next one on its thread; -1 if there is none."""
    gap_idle_ns: NDArray[np.int64]
    """The part of that in which the device had nothing to do."""


def gather(recording: Recording) -> Evidence:
    """Return the evidence in a recording. It costs a few sorts of its rows."""
    segments, tangled = segments_of(recording)
    kind = _kinds(recording, segments)
    device, row_device = _devices(recording)
    replays = replays_of(recording)
    proven = _busy(segments, replays, device)
    busy = _busy(segments, replays, device, (kind == Activity.AHEAD) & segments.one_stream)
    root_device = row_device[recording.root]
    end_ns = work_end_ns(recording)
    whole = Intervals(recording.host_start_ns, end_ns)
    idle_ns = _idle(whole, root_device, busy)
    spans = Intervals(segments.host_start_ns, segments.host_end_ns)
    segment_idle_ns = _idle(spans, root_device[segments.owner], busy)
    host_ns = spans.end - spans.start
    gap = _gaps(recording)
    return Evidence(
        segments=segments,
        kind=kind,
        segment_idle_ns=segment_idle_ns,
        waited_for=_waited_for(recording, segments, kind),
        tangled=tangled,
        device=root_device,
        end_ns=end_ns,
        wait_ns=_summed(recording, segments, host_ns * np.isin(kind, (Activity.WAITS, Activity.COPIES))),
        copy_ns=_summed(recording, segments, host_ns * (kind == Activity.COPIES)),
        waits=_summed(recording, segments, kind == Activity.WAITS),
        idle_ns=idle_ns,
        unproven_ns=_idle(whole, root_device, proven) - idle_ns,
        paced_ns=_summed(recording, segments, segment_idle_ns * (kind == Activity.PACED)),
        unclear_ns=_summed(recording, segments, segment_idle_ns * (kind == Activity.UNCLEAR)),
        untimed_ns=_summed(recording, segments, host_ns * (kind == Activity.UNTIMED)),
        gap_ns=np.where(gap.end > 0, gap.end - gap.start, -1),
        gap_idle_ns=_idle(gap, root_device, busy),
    )


def _kinds(recording: Recording, segments: Segments) -> NDArray[np.int8]:
    host_ns = segments.host_end_ns - segments.host_start_ns
    gpu_ns = segments.gpu_end_ns - segments.gpu_start_ns
    behind_ns = segments.gpu_start_ns - segments.host_start_ns
    lag_ns = segments.gpu_end_ns - segments.host_end_ns
    tolerance_ns = BEHIND_NS + segments.uncertainty_ns
    was_behind, is_behind = behind_ns > tolerance_ns, lag_ns > tolerance_ns
    # From when the stream is there: a copy could not begin before.
    own_ns = segments.host_end_ns - np.maximum(segments.gpu_start_ns, segments.host_start_ns)
    copied = _moved(recording)[segments.owner] >= COPY_BYTES_PER_NS * np.maximum(own_ns, 1)
    kind = np.select(
        [
            ~segments.timed,
            is_behind & (lag_ns >= BEHIND_SHARE * gpu_ns),
            was_behind & ~is_behind & (own_ns <= WAIT_TAIL * host_ns),
            ~is_behind & copied,
            was_behind & ~is_behind & (behind_ns >= MET_SHARE * host_ns),
        ],
        [Activity.UNTIMED, Activity.AHEAD, Activity.WAITS, Activity.COPIES, Activity.UNCLEAR],
        Activity.PACED,
    )
    kind[(kind == Activity.PACED) & _may_hide_the_wait(recording, segments, kind)] = Activity.UNCLEAR
    return kind.astype(np.int8)


def _moved(recording: Recording) -> NDArray[np.float64]:
    """Return the `bytes` that each innermost stage says it moves; 0 if it says nothing."""
    moved = np.zeros(len(recording.stage))
    for row, attributes in recording.attributes.items():
        value = attributes.get("bytes")
        if isinstance(value, (int, float)) and math.isfinite(value):
            moved[row] = value
    moved[~recording.leaf] = 0
    return moved


def _may_hide_the_wait(recording: Recording, segments: Segments, kind: NDArray[np.int64]) -> NDArray[np.bool_]:
    """
    Return which segments, from the last innermost stage of a request on, may be a wait that does not show.

    A program that uses the GPU's results waits for the GPU somewhere. If the GPU falls behind or a copy blocks, the
    wait shows. If neither happens, the wait is in a stage that also launched what it waits for. Such a stage looks like
    one that works on the host. Any stage may be that one; the last is the most likely.
    """
    shown = np.zeros(len(recording.stage), np.bool_)
    shown[recording.root[segments.owner[np.isin(kind, (Activity.AHEAD, Activity.WAITS, Activity.COPIES))]]] = True
    last_ns = np.zeros(len(recording.stage), np.int64)
    np.maximum.at(last_ns, recording.root[recording.leaf], recording.host_start_ns[recording.leaf])
    root = recording.root[segments.owner]
    return ~shown[root] & (segments.host_start_ns >= last_ns[root])


def _devices(recording: Recording) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of each stream's device, and of the device that each outermost stage and all inside it use."""
    # One GPU may be the first device of one process and the second of another.
    ids = [each.device_uuid or (each.process, each.device) for each in recording.streams]
    device = np.array([ids.index(each) for each in ids], np.int64)
    found = np.full(len(recording.stage), NO_DEVICE, np.int64)
    timed = recording.measured
    root, used = recording.root[timed], device[recording.stream[timed]]
    found[root] = used
    found[root[used != found[root]]] = SEVERAL_DEVICES
    return device, found


def _busy(
    segments: Segments, replays: ReplayIntervals, device: NDArray[np.int64], through: NDArray[np.bool_] | None = None
) -> dict[int, Intervals]:
    """
    Return the time in which each device had work: from each point where the GPU is behind until it has caught up.

    These are unions, so that time in which two streams work counts once. From the first to the last stage inside a
    replay the GPU does not wait for the host.

    Args:
        segments: All segments.
        replays: All replays.
        device: The number of each stream's device.
        through: Segments in which the GPU is taken to have had work throughout the GPU interval.

    """
    tolerance_ns = BEHIND_NS + segments.uncertainty_ns
    late = segments.timed & (segments.gpu_end_ns - segments.host_end_ns > tolerance_ns)
    early = segments.timed & (segments.gpu_start_ns - segments.host_start_ns > tolerance_ns)
    through = np.zeros_like(late) if through is None else through
    starts = segments.host_end_ns[late], segments.host_start_ns[early], segments.gpu_start_ns[through], replays.start_ns
    ends = segments.gpu_end_ns[late], segments.gpu_start_ns[early], segments.gpu_end_ns[through], replays.end_ns
    streams = segments.stream[late], segments.stream[early], segments.stream[through], replays.stream
    start, end, where = np.concatenate(starts), np.concatenate(ends), device[np.concatenate(streams)]
    return {int(each): union(Intervals(start[where == each], end[where == each])) for each in np.unique(where)}


def _idle(spans: Intervals, device: NDArray[np.int64], busy: dict[int, Intervals]) -> NDArray[np.int64]:
    idle_ns: NDArray[np.int64] = np.maximum(spans.end - spans.start, 0)
    for each, intervals in busy.items():
        there = device == each
        idle_ns[there] -= covered(Intervals(spans.start[there], spans.end[there]), intervals)
    return idle_ns


def _summed(
    recording: Recording, segments: Segments, value: NDArray[np.int64] | NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return for each stage the sum of the values of its segments, and of the segments of all stages inside it."""
    own = np.zeros(len(recording.stage), np.int64)
    np.add.at(own, segments.owner, value)
    total: NDArray[np.int64] = own.copy()
    for rows, above in ancestors(recording.parent):
        np.add.at(total, above, own[rows])
    return total


def _waited_for(recording: Recording, segments: Segments, kind: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return for each segment that is a wait the stage that last launched GPU work before it in its request, or -1."""
    gpu_ns = segments.gpu_end_ns - segments.gpu_start_ns
    place = np.arange(len(kind))
    last = np.maximum.accumulate(np.where((kind == Activity.AHEAD) & (gpu_ns > BEHIND_NS), place, -1))
    owner = np.where(last >= 0, segments.owner[last], -1)
    known = (kind == Activity.WAITS) & (last >= 0) & (recording.root[owner] == recording.root[segments.owner])
    return np.where(known, owner, -1)


def _gaps(recording: Recording) -> Intervals:
    """Return the time from the end of each outermost stage to the next one on its thread; 0 to 0 if there is none."""
    start, end = np.zeros((2, len(recording.stage)), np.int64)
    roots = np.flatnonzero(recording.parent < 0)
    roots = roots[np.lexsort((recording.host_start_ns[roots], recording.thread[roots]))]
    one, following = roots[:-1], roots[1:]
    together = recording.thread[one] == recording.thread[following]
    one, following = one[together], following[together]
    start[one] = recording.host_end_ns[one]
    end[one] = np.maximum(recording.host_start_ns[following], start[one])
    return Intervals(start, end)
