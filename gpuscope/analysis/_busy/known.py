"""
The time in which each GPU is known to have had work, from the places where a stream was behind the host.

Intervals alone; what they mean for a stage is said in `_verdicts.evidence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, covered, union

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._structure.replays import ReplayIntervals
    from gpuscope.analysis._structure.segments import Segments
    from gpuscope.analysis.recording import Recording

BEHIND_NS = 10_000
"""The GPU is behind only if by more than this and the clock's uncertainty: even an idle stream executes an event 3 to
10 µs after it is recorded."""
NO_DEVICE = -1
SEVERAL_DEVICES = -2


def devices(recording: Recording) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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


def known_busy(
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


def idle_within(spans: Intervals, device: NDArray[np.int64], busy: dict[int, Intervals]) -> NDArray[np.int64]:
    """Return for each span how many of its nanoseconds its device is not known to have had work."""
    idle_ns: NDArray[np.int64] = np.maximum(spans.end - spans.start, 0)
    for each, intervals in busy.items():
        there = device == each
        idle_ns[there] -= covered(Intervals(spans.start[there], spans.end[there]), intervals)
    return idle_ns
