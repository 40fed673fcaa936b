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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope.analysis._busy.known import BEHIND_NS, devices, idle_within, known_busy
from gpuscope.analysis._structure.ancestors import ancestors
from gpuscope.analysis._structure.intervals import Intervals
from gpuscope.analysis._structure.parts import work_end_ns
from gpuscope.analysis._structure.replays import replays_of
from gpuscope.analysis._structure.segments import segments_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._structure.segments import Segments
    from gpuscope.analysis.recording import Recording

BEHIND_SHARE = 0.2
"""A GPU that is behind at the end by less than this part of the GPU interval has kept up, but for the last kernels."""
LAGS_SHARE, LAGS_NS = 0.02, 50_000
"""If it is behind by at least this part and this time, the last kernels alone may be too little to explain it."""
MET_SHARE = 0.05
"""If the GPU is behind at the start by less than this part of the host's time, a wait for it explains little of it."""
WAIT_TAIL = 0.25
"""A host that waited leaves soon after the stream has caught up: at most this part of its time comes after that."""
COPY_BYTES_PER_NS = 1.0
"""Blocking copies from pageable memory reach 3 GB/s and more. At less than 1 GB/s, the time was hardly the copy's."""


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
    LAGS = 6
    """The host left with the GPU a little behind. Either launches set the pace and the last kernels were left, or the
    GPU had work all along, and launching takes nearly as long as that work."""


class Awaited(NamedTuple):
    """Columns of one length: which stages' GPU work lies within which waits of the host, and for how long."""

    segment: NDArray[np.int64]
    """The wait."""
    owner: NDArray[np.int64]
    """The row that launched the work."""
    ns: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Columns beside those of a `Recording`, one value per row, and columns of its segments. Times are nanoseconds."""

    segments: Segments
    kind: NDArray[np.int8]
    """Of `Activity`, one per segment."""
    segment_idle_ns: NDArray[np.int64]
    """One per segment: how long the device of the request had nothing to do, as far as is known."""
    awaited: Awaited
    """What the host waited for."""
    segment_unproven_ns: NDArray[np.int64]
    """One per segment: time that is not in `segment_idle_ns` because the host is taken to have launched all along."""
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
    copy_idle_ns: NDArray[np.int64]
    """The part of `idle_ns` in which the host waited for a copy."""
    lags_ns: NDArray[np.int64]
    """The part of `idle_ns` in which the GPU may have had work all along, because it lagged behind the launches."""
    open_ns: NDArray[np.int64]
    """Host time in it in which the host may have waited for work that it had launched there."""
    open_unclear_ns: NDArray[np.int64]
    """The part of that in which nothing tells whether it did."""
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
    device, row_device = devices(recording)
    replays = replays_of(recording)
    proven = known_busy(segments, replays, device)
    kind[_waits_for_other_streams(segments, kind, row_device[recording.root], proven)] = Activity.WAITS
    busy = known_busy(segments, replays, device, (kind == Activity.AHEAD) & segments.one_stream)
    root_device = row_device[recording.root]
    end_ns = work_end_ns(recording)
    whole = Intervals(recording.host_start_ns, end_ns)
    idle_ns = idle_within(whole, root_device, busy)
    spans = Intervals(segments.host_start_ns, segments.host_end_ns)
    segment_idle_ns = idle_within(spans, root_device[segments.owner], busy)
    host_ns = spans.end - spans.start
    gap = _gaps(recording)
    return Evidence(
        segments=segments,
        kind=kind,
        segment_idle_ns=segment_idle_ns,
        awaited=_awaited(recording, segments, kind),
        segment_unproven_ns=idle_within(spans, root_device[segments.owner], proven) - segment_idle_ns,
        tangled=tangled,
        device=root_device,
        end_ns=end_ns,
        wait_ns=_summed(recording, segments, host_ns * np.isin(kind, (Activity.WAITS, Activity.COPIES))),
        copy_ns=_summed(recording, segments, host_ns * (kind == Activity.COPIES)),
        waits=_summed(recording, segments, kind == Activity.WAITS),
        idle_ns=idle_ns,
        unproven_ns=idle_within(whole, root_device, proven) - idle_ns,
        paced_ns=_summed(recording, segments, segment_idle_ns * (kind == Activity.PACED)),
        unclear_ns=_summed(recording, segments, segment_idle_ns * (kind == Activity.UNCLEAR)),
        copy_idle_ns=_summed(recording, segments, segment_idle_ns * (kind == Activity.COPIES)),
        lags_ns=_summed(recording, segments, segment_idle_ns * (kind == Activity.LAGS)),
        open_ns=_summed(recording, segments, host_ns * np.isin(kind, (Activity.PACED, Activity.UNCLEAR))),
        open_unclear_ns=_summed(recording, segments, host_ns * (kind == Activity.UNCLEAR)),
        untimed_ns=_summed(recording, segments, host_ns * (kind == Activity.UNTIMED)),
        gap_ns=np.where(gap.end > 0, gap.end - gap.start, -1),
        gap_idle_ns=idle_within(gap, root_device, busy),
    )


def _kinds(recording: Recording, segments: Segments) -> NDArray[np.int8]:
    host_ns = segments.host_end_ns - segments.host_start_ns
    gpu_ns = segments.gpu_end_ns - segments.gpu_start_ns
    behind_ns = segments.gpu_start_ns - segments.host_start_ns
    lag_ns = segments.gpu_end_ns - segments.host_end_ns
    tolerance_ns = BEHIND_NS + segments.uncertainty_ns
    # That one stream was behind and another is not says nothing.
    was_behind, is_behind = segments.one_stream & (behind_ns > tolerance_ns), lag_ns > tolerance_ns
    # From when the stream is there: a copy could not begin before.
    own_ns = segments.host_end_ns - np.maximum(segments.gpu_start_ns, segments.host_start_ns)
    copied = _moved(recording)[segments.owner] >= COPY_BYTES_PER_NS * np.maximum(own_ns, 1)
    kind = np.select(
        [
            ~segments.timed,
            is_behind & (lag_ns >= BEHIND_SHARE * gpu_ns),
            is_behind & (lag_ns >= np.maximum(LAGS_SHARE * gpu_ns, LAGS_NS)),
            was_behind & ~is_behind & (own_ns <= WAIT_TAIL * host_ns),
            ~is_behind & copied,
            was_behind & ~is_behind & (behind_ns >= MET_SHARE * host_ns),
        ],
        [Activity.UNTIMED, Activity.AHEAD, Activity.LAGS, Activity.WAITS, Activity.COPIES, Activity.UNCLEAR],
        Activity.PACED,
    )
    kind[(kind == Activity.PACED) & _may_hide_the_wait(recording, segments, kind)] = Activity.UNCLEAR
    return kind.astype(np.int8)


def _waits_for_other_streams(
    segments: Segments, kind: NDArray[np.int8], root_device: NDArray[np.int64], proven: dict[int, Intervals]
) -> NDArray[np.bool_]:
    """Return which segments that show no wait on their own stream last until other streams have caught up."""
    device = root_device[segments.owner]
    start_ns, end_ns = segments.host_start_ns, segments.host_end_ns
    spent_ns = end_ns - start_ns
    after_ns = end_ns + BEHIND_NS + segments.uncertainty_ns
    idle_ns = idle_within(Intervals(start_ns, end_ns), device, proven)
    done = idle_within(Intervals(after_ns, after_ns + 1), device, proven) > 0
    alone = np.isin(kind, (Activity.PACED, Activity.UNCLEAR)) & (spent_ns > BEHIND_NS + segments.uncertainty_ns)
    waits: NDArray[np.bool_] = alone & done & (idle_ns <= WAIT_TAIL * spent_ns)
    return waits


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
    shows = np.isin(kind, (Activity.AHEAD, Activity.LAGS, Activity.WAITS, Activity.COPIES))
    shown[recording.root[segments.owner[shows]]] = True
    last_ns = np.zeros(len(recording.stage), np.int64)
    np.maximum.at(last_ns, recording.root[recording.leaf], recording.host_start_ns[recording.leaf])
    root = recording.root[segments.owner]
    return ~shown[root] & (segments.host_start_ns >= last_ns[root])


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


def _awaited(recording: Recording, segments: Segments, kind: NDArray[np.int8]) -> Awaited:
    """
    Return whose work the host waited for: that which its request had launched, and which ended within the wait.

    The stage that launched last need not be the one whose work took long. Only the next wait counts, because nothing is
    left after that.
    """
    place = np.arange(len(kind))
    gpu_ns = segments.gpu_end_ns - segments.gpu_start_ns
    launched = np.isin(kind, (Activity.AHEAD, Activity.LAGS)) & (gpu_ns > BEHIND_NS)
    waits = np.where(kind == Activity.WAITS, place, len(kind))
    following = np.minimum.accumulate(waits[::-1])[::-1] if len(kind) else waits
    at = np.flatnonzero(launched & (following < len(kind)))
    wait = following[at]
    root = recording.root[segments.owner]
    at, wait = at[root[at] == root[wait]], wait[root[at] == root[wait]]
    start_ns = np.maximum(segments.gpu_start_ns[at], segments.host_start_ns[wait])
    ns = np.minimum(segments.gpu_end_ns[at], segments.host_end_ns[wait]) - start_ns
    return Awaited(wait[ns > 0], segments.owner[at[ns > 0]], ns[ns > 0])


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
